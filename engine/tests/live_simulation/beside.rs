//! Two copies of one disk, of which the second is asked beside the first: engines turned by hand.

use std::num::NonZeroU64;
use std::time::Duration;

use engine::copy::{ErrorPolicy, SyncMode};
use engine::job::{JobHandle, Outcome};
use engine::live::sim::{SimDisk, SimEngine};
use engine::live::{CbwErrorPolicy, GroupFailure, IoRequest};
use engine::ring::Wait;
use engine::ring::sim::{SharedWorld, SimRing};
use engine::units::{ByteRange, ClusterRange, Length, Speed};

use crate::scenario::{JobSpec, Path, Scenario};

const CLUSTER: u64 = 8192;
const SOURCE: usize = 0;

struct Bench {
    world: SharedWorld,
    engine: SimEngine,
    disk: SimDisk,
    handles: Vec<JobHandle>,
}

/// A disk of 64 clusters of data.
fn scenario(jobs: Vec<JobSpec>) -> Scenario {
    let mut scenario = Scenario::plain(7, Path::Carried);
    scenario.disks[0].length = 64 * CLUSTER;
    scenario.starts[0].jobs = jobs;
    scenario
}

fn engine_of(scenario: &Scenario, world: &SharedWorld) -> (SimEngine, SimDisk) {
    world.borrow_mut().disk(SOURCE).fill(0, &vec![7; usize::try_from(64 * CLUSTER).unwrap()]);
    let ring = SimRing::new(world.clone(), scenario.arena(), scenario.capacity, 7, scenario.faults.clone());
    let mut engine = SimEngine::new(ring);
    engine.set_carrier(scenario.carrier, scenario.carrier_bytes);
    let (disk, _) = engine.add_disk(SOURCE, Length(64 * CLUSTER), Some(512));
    (engine, disk)
}

fn turn(engine: &mut SimEngine, times: u32) {
    for _ in 0..times {
        let Some(wait) = engine.act() else { return };
        engine.wait(if matches!(wait, Wait::Forever) && engine.in_flight() == 0 { Wait::Poll } else { wait });
    }
}

fn first_sector() -> IoRequest {
    IoRequest::Write { offset: 0, data: vec![9; 512] }
}

/// The first copies for guests only, the second has left out its first cluster, which cannot be read.
fn left_out(first: JobSpec, stuck: bool) -> Bench {
    let second = JobSpec { source_policy: ErrorPolicy::Ignore, ..JobSpec::plain(0, CLUSTER) };
    let scenario = scenario(vec![JobSpec { sync: SyncMode::None, ..first }, second]);
    let world = scenario.world();
    let (mut engine, disk) = engine_of(&scenario, &world);
    world.borrow_mut().disk(SOURCE).set_bad(ByteRange::new(0, 512));
    if stuck {
        world.borrow_mut().disk(1).set_stuck();
    }
    let start = &scenario.starts[0];
    let jobs = start.jobs.iter().enumerate();
    let jobs = jobs.map(|(at, job)| job.job(&scenario, disk.clone(), 1 + at)).collect();
    let (handles, pending) = engine.start(jobs, GroupFailure::GoOn, start.timeout);
    handles[1].set_speed(NonZeroU64::new(100_000).map(Speed)).unwrap();
    assert!(engine.act().is_some());
    pending.take().expect("nobody holds a permit").expect("room");
    for _ in 0..10_000 {
        if handles[1].progress().skipped > 0 {
            return Bench { world, engine, disk, handles };
        }
        turn(&mut engine, 1);
    }
    panic!("nothing was left out: {handles:?}");
}

impl Bench {
    /// The second copy ends, at full speed.
    fn second_ends(&mut self) -> (Outcome, u64, u64) {
        self.handles[1].set_speed(None).unwrap();
        turn(&mut self.engine, 5000);
        let result = self.handles[1].wait_timeout(Duration::from_secs(5)).expect("it ends");
        (result.outcome.clone(), result.progress.done, result.progress.skipped)
    }
}

#[test]
fn what_was_left_out_is_copied_beside_another_job() {
    let mut bench = left_out(JobSpec::plain(0, CLUSTER), true);
    bench.world.borrow_mut().disk(SOURCE).repair();
    let write = bench.engine.io(&bench.disk, first_sector());
    turn(&mut bench.engine, 30);
    assert!(write.take().is_none(), "it waits for the first job");
    let (outcome, done, skipped) = bench.second_ends();
    assert!(matches!(outcome, Outcome::Complete), "{outcome:?}");
    assert_eq!((done, skipped), (64 * CLUSTER, 0));
}

/// The guest's write has failed at the first job, so he never asks the second one himself.
#[test]
fn what_fails_again_beside_another_job_is_left_out_again() {
    let first = JobSpec { on_cbw_error: CbwErrorPolicy::BreakGuestWrite, ..JobSpec::plain(0, CLUSTER) };
    let mut bench = left_out(first, false);
    let write = bench.engine.io(&bench.disk, first_sector());
    turn(&mut bench.engine, 200);
    assert!(write.take().expect("it is over").result.is_err());
    let (outcome, done, skipped) = bench.second_ends();
    assert!(matches!(outcome, Outcome::CompleteWithSkipped), "{outcome:?}");
    assert_eq!((done, skipped), (63 * CLUSTER, CLUSTER));
}

/// The start of another job holds guests up for longer than a copy may take.
#[test]
fn time_at_a_barrier_is_not_that_of_a_copy() {
    let timeout = Some(Duration::from_millis(100));
    let first = JobSpec { sync: SyncMode::None, cbw_timeout: timeout, ..JobSpec::plain(0, CLUSTER) };
    let scenario = scenario(vec![first, JobSpec::plain(0, CLUSTER)]);
    let world = scenario.world();
    let (mut engine, disk) = engine_of(&scenario, &world);
    let start = &scenario.starts[0];
    let job = start.jobs[0].job(&scenario, disk.clone(), 1);
    let (first, pending) = engine.start(vec![job], start.on_failure, start.timeout);
    assert!(engine.act().is_some());
    let id = pending.take().expect("t0").expect("room")[0];
    let copied = engine.copy(id, ClusterRange::new(5, 6));
    turn(&mut engine, 20);
    copied.take().expect("copied").expect("copied");
    // A write of a guest's own that takes its time.
    let permit = engine.attempt(&disk, ByteRange::new(5 * CLUSTER, 512));
    let job = start.jobs[1].job(&scenario, disk.clone(), 2);
    let (_second, pending) = engine.start(vec![job], start.on_failure, Duration::from_millis(500));
    let write = engine.io(&disk, first_sector());
    turn(&mut engine, 100);
    drop(permit);
    assert!(pending.take().expect("it has given up").is_err(), "somebody held a permit");
    turn(&mut engine, 100);
    assert!(write.take().expect("the write is over").result.is_ok());
    assert!(first[0].wait_timeout(Duration::ZERO).is_none(), "{:?}", first[0]);
}
