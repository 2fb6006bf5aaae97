//! An engine turned by hand: who asks what in which order is told, and each answer looked at.

use std::num::NonZeroU64;
use std::time::Duration;

use engine::copy::SyncMode;
use engine::job::{JobHandle, Outcome, Status};
use engine::live::sim::{PendingCopy, SimDisk, SimEngine};
use engine::live::{JobId, SweepDepth};
use engine::ring::Wait;
use engine::ring::sim::{SharedWorld, SimRing};
use engine::units::{ByteRange, ClusterRange, Length, Speed};

use crate::scenario::{BLOCK, JobSpec, Path, Scenario};

const CLUSTER: u64 = 8192;
/// The first disk of a world is the live one, the next its copy's target.
const SOURCE: usize = 0;
const TARGET: usize = 1;

/// An engine with a disk, of which a copy has just started that its sweep does nothing for.
struct Hand {
    world: SharedWorld,
    engine: SimEngine,
    disk: SimDisk,
    job: JobId,
    handle: JobHandle,
}

/// Of a disk of 64 clusters; `prepare` has the last word on its contents.
fn start(spec: JobSpec, prepare: impl FnOnce(&SharedWorld)) -> Hand {
    let mut scenario = Scenario::plain(7, Path::Own);
    scenario.disks[0].length = 64 * spec.cluster;
    scenario.starts[0].jobs = vec![spec];
    let world = scenario.world();
    prepare(&world);
    let faults = scenario.faults.clone();
    let ring = SimRing::new(world.clone(), scenario.arena(), scenario.capacity, 7, faults);
    let mut engine = SimEngine::new(ring);
    engine.set_carrier(scenario.carrier, scenario.carrier_bytes);
    let (disk, _) = engine.add_disk(SOURCE, Length(scenario.disks[0].length), Some(512));
    let start = &scenario.starts[0];
    let job = start.jobs[0].job(&scenario, disk.clone(), TARGET);
    let (mut handles, pending) = engine.start(vec![job], start.on_failure, start.timeout);
    let handle = handles.remove(0);
    // A cluster every 80 s.
    handle.set_speed(NonZeroU64::new(100).map(Speed)).unwrap();
    assert!(engine.act().is_some(), "it is in use");
    let job = pending.take().expect("nobody holds a permit").expect("there is room")[0];
    Hand { world, engine, disk, job, handle }
}

impl Hand {
    fn turn(&mut self, times: u32) {
        for _ in 0..times {
            let wait = self.engine.act().expect("it is in use");
            // Nothing is due but what is in flight.
            self.engine.wait(if matches!(wait, Wait::Until(_)) && self.engine.in_flight() == 0 {
                Wait::Poll
            } else {
                wait
            });
        }
    }

    fn copy(&self, start: u64, end: u64) -> PendingCopy {
        self.engine.copy(self.job, ClusterRange::new(start, end))
    }

    fn answered(&mut self, pending: &PendingCopy) {
        for _ in 0..1000 {
            if let Some(answer) = pending.take() {
                return answer.expect("nothing fails");
            }
            self.turn(1);
        }
        panic!("no answer: {:?}", self.handle);
    }

    fn target_holds(&self, cluster: u64) -> bool {
        let bytes =
            usize::try_from(cluster * CLUSTER).unwrap()..usize::try_from((cluster + 1) * CLUSTER).unwrap();
        let mut world = self.world.borrow_mut();
        let source = world.disk(SOURCE).view()[bytes.clone()].to_vec();
        world.disk(TARGET).view().get(bytes) == Some(&source)
    }

    /// Clusters of the target that a power loss would leave.
    fn stored(&self) -> usize {
        let mut world = self.world.borrow_mut();
        let source = world.disk(SOURCE).view().to_vec();
        let target = world.disk(TARGET).medium().chunks(usize::try_from(CLUSTER).unwrap());
        target
            .zip(source.chunks(usize::try_from(CLUSTER).unwrap()))
            .filter(|(copy, data)| copy == data)
            .count()
    }

    fn written(&self) -> u64 {
        self.world.borrow_mut().disk(TARGET).written_bytes()
    }
}

/// No holes, no zeros.
fn dense(world: &SharedWorld) {
    let mut world = world.borrow_mut();
    let bytes: Vec<u8> = (0..64 * CLUSTER).map(|at| u8::try_from(at % 251).unwrap() | 1).collect();
    world.disk(SOURCE).fill(0, &bytes);
}

#[test]
fn what_nobody_waits_for_any_more_is_not_copied() {
    let spec = JobSpec { sync: SyncMode::None, slots: 2, max_run: 1, ..JobSpec::plain(0, CLUSTER) };
    let mut hand = start(spec, dense);
    hand.world.borrow_mut().disk(TARGET).set_stuck();
    let first = hand.copy(0, 2);
    let (dropped, kept) = (hand.copy(5, 9), hand.copy(20, 21));
    hand.turn(20);
    assert!(first.take().is_none() && dropped.take().is_none() && kept.take().is_none());
    // One that begins and goes at once, one that has waited, and one under way.
    drop(hand.copy(30, 31));
    drop(dropped);
    drop(first);
    hand.world.borrow_mut().disk(TARGET).set_free();
    hand.answered(&kept);
    hand.turn(20);
    assert_eq!(hand.written(), 3 * CLUSTER, "a cluster each of what had begun, and what is wanted");
    assert!([0, 5, 20].into_iter().all(|cluster| hand.target_holds(cluster)));
}

#[test]
fn a_guest_with_little_to_copy_does_not_wait_for_one_with_much() {
    let spec = JobSpec { sync: SyncMode::None, slots: 4, max_run: 2, ..JobSpec::plain(0, CLUSTER) };
    let mut hand = start(spec, dense);
    let large = [hand.copy(0, 30), hand.copy(25, 60)];
    hand.turn(2);
    let small = [hand.copy(61, 62), hand.copy(62, 63), hand.copy(40, 41)];
    for small in &small {
        hand.answered(small);
    }
    assert!(hand.written() <= 24 * CLUSTER, "{} clusters", hand.written() / CLUSTER);
    assert!(large.iter().all(|large| large.take().is_none()));
    for large in &large {
        hand.answered(large);
    }
    assert_eq!(hand.written(), 62 * CLUSTER, "each once");
}

#[test]
fn a_guest_has_no_more_copied_than_the_top_layer_holds() {
    let spec = JobSpec { sync: SyncMode::Top, ..JobSpec::plain(0, CLUSTER) };
    // A block of every third cluster: an answer has room for a few of them only.
    let held = |cluster: u64| cluster.is_multiple_of(3);
    let mut hand = start(spec, |world| {
        dense(world);
        world
            .borrow_mut()
            .disk(SOURCE)
            .set_top_layer((0..64).filter(|&cluster| held(cluster)).map(|cluster| 2 * cluster + 1));
    });
    hand.turn(20);
    let before = (hand.written(), hand.handle.progress());
    let clusters = 40..52;
    let copied = hand.copy(clusters.start, clusters.end);
    hand.answered(&copied);
    hand.turn(1);
    let progress = hand.handle.progress();
    let wanted = clusters.clone().filter(|&cluster| held(cluster)).count() as u64;
    assert_eq!(hand.written() - before.0, wanted * CLUSTER);
    assert_eq!(progress.uncovered - before.1.uncovered, (12 - wanted) * CLUSTER);
    for cluster in clusters.clone() {
        assert_eq!(hand.target_holds(cluster), held(cluster), "{cluster}");
    }
    // A guest's write allocates: what is asked later is too late.
    hand.world.borrow_mut().disk(SOURCE).fill(41 * CLUSTER, &[7; 512]);
    assert!(hand.world.borrow_mut().disk(SOURCE).top_layer_holds(82));
    let again = hand.copy(clusters.start, clusters.end);
    hand.answered(&again);
    assert_eq!(hand.written() - before.0, wanted * CLUSTER);
}

#[test]
fn the_snapshot_tells_what_the_top_layer_does_not_hold() {
    let spec = JobSpec { sync: SyncMode::Top, ..JobSpec::plain(0, CLUSTER) };
    let mut hand = start(spec, |world| {
        dense(world);
        world.borrow_mut().disk(SOURCE).set_top_layer(80..84);
    });
    let t0 = hand.world.borrow_mut().disk(SOURCE).view().to_vec();
    let read = |hand: &mut Hand, cluster: u64| {
        let pending = hand.engine.read_snapshot(hand.job, ByteRange::new(cluster * CLUSTER, CLUSTER));
        for _ in 0..1000 {
            if let Some(outcome) = pending.take() {
                return outcome.result;
            }
            hand.turn(1);
        }
        panic!("no answer");
    };
    let bytes = |cluster: u64| {
        let start = usize::try_from(cluster * CLUSTER).unwrap();
        &t0[start..start + usize::try_from(CLUSTER).unwrap()]
    };
    let copied = hand.copy(39, 42);
    hand.answered(&copied);
    for cluster in [39, 40] {
        hand.world.borrow_mut().disk(SOURCE).fill(cluster * CLUSTER + BLOCK, &[7; 512]);
    }
    assert_eq!(read(&mut hand, 40).unwrap(), bytes(40), "from the target");
    let error = read(&mut hand, 39).unwrap_err().to_string();
    assert!(error.contains("top layer") && error.contains("layers below"), "{error}");
}

/// How a job ends while there are always some who read `cluster`; `None`: not in as many turns as it should take.
fn end_under_readers(hand: &mut Hand, cluster: u64) -> Option<Outcome> {
    let range = ByteRange::new(cluster * CLUSTER, CLUSTER);
    let mut reads = [(); 4].map(|()| hand.engine.read_snapshot(hand.job, range));
    hand.handle.set_speed(None).unwrap();
    for _ in 0..5000 {
        // The first does not wait, for it has been asked something.
        hand.turn(2);
        for read in &mut reads {
            if read.take().is_some() {
                *read = hand.engine.read_snapshot(hand.job, range);
            }
        }
        if hand.engine.jobs().count() == 0 {
            // Its last steps are another thread's.
            return hand.handle.wait_timeout(Duration::from_secs(60)).map(|result| result.outcome.clone());
        }
    }
    None
}

#[test]
fn readers_who_take_turns_do_not_keep_the_sweep_from_a_cluster() {
    for (sync, held) in [(SyncMode::Full, true), (SyncMode::Top, true), (SyncMode::Top, false)] {
        let mut hand = start(JobSpec { sync, ..JobSpec::plain(0, CLUSTER) }, |world| {
            dense(world);
            let blocks = if held { 0..128 } else { 80..128 };
            world.borrow_mut().disk(SOURCE).set_top_layer(blocks);
        });
        let outcome = end_under_readers(&mut hand, 30);
        assert!(matches!(outcome, Some(Outcome::Complete)), "{sync:?}: {outcome:?}");
        assert!(sync == SyncMode::Top || hand.written() == 64 * CLUSTER, "each once");
        assert!((45..64).all(|cluster| hand.target_holds(cluster)));
        assert_eq!(hand.target_holds(30), held);
    }
}

#[test]
fn readers_who_take_turns_do_not_keep_the_sweep_from_an_error() {
    let mut hand = start(JobSpec::plain(0, CLUSTER), |world| {
        dense(world);
        world.borrow_mut().disk(SOURCE).set_bad(ByteRange::new(30 * CLUSTER, 512));
    });
    let outcome = end_under_readers(&mut hand, 30);
    assert!(matches!(outcome, Some(Outcome::Failed(_))), "{outcome:?}");
}

/// All is copied and flushed, and somebody reads the snapshot from a target that does not answer any more.
#[test]
fn a_copy_that_is_complete_is_cancelled_while_a_read_keeps_it() {
    let mut hand = start(JobSpec::plain(0, CLUSTER), dense);
    hand.handle.pause().unwrap();
    let copied = hand.copy(0, 64);
    hand.answered(&copied);
    // The read gets stuck, the flush does not.
    hand.world.borrow_mut().disk(TARGET).set_stuck();
    let read = hand.engine.read_snapshot(hand.job, ByteRange::new(0, CLUSTER));
    assert!(hand.engine.act().is_some());
    hand.world.borrow_mut().disk(TARGET).set_free();
    hand.handle.resume().unwrap();
    assert!(hand.engine.act().is_some());
    hand.world.borrow_mut().disk(TARGET).set_stuck();
    hand.turn(50);
    assert_eq!(hand.engine.in_flight(), 1, "the read");
    hand.handle.cancel().unwrap();
    hand.turn(2);
    assert_eq!(hand.handle.progress().status, Status::Aborting);
    hand.world.borrow_mut().disk(TARGET).set_free();
    hand.turn(50);
    assert!(read.take().is_some());
    let result = hand.handle.wait_timeout(Duration::from_secs(60)).expect("nothing keeps it any more");
    assert!(matches!(result.outcome, Outcome::Cancelled), "{:?}", result.outcome);
}

/// The most clusters, and the most runs of zeros, that the sweep has in flight while it copies a disk with holes, or nothing else. `guests`: somebody
/// tries to write to it by himself, and asks for nothing.
fn most_in_flight(guests: bool, holes: bool) -> (u32, u32) {
    let spec = JobSpec {
        slots: 60,
        max_run: 16,
        target_is_zero: false,
        space_reserved: false,
        ..JobSpec::plain(0, 65_536)
    };
    let mut hand = start(spec, |world| {
        let mut world = world.borrow_mut();
        world.disk(SOURCE).fill(0, &vec![1; 64 * 65_536]);
        if holes {
            world.disk(SOURCE).punch(64..1024);
        }
        world.disk(TARGET).set_slowness(20);
    });
    let mut most = (0, 0);
    // Time passes while something is in flight.
    let started = hand.engine.now();
    let mut reading = None;
    for _ in 0..4000 {
        if guests {
            // He gets his permit or goes away.
            drop(hand.engine.attempt(&hand.disk, ByteRange::new(0, 1)));
        }
        if hand.engine.now().since(started) < Duration::from_millis(30) {
            let range = ByteRange::new(63 * 65_536, 512);
            reading = Some(hand.engine.read_snapshot(hand.job, range));
            hand.turn(1);
        } else if reading.take().is_some() {
            hand.handle.set_speed(None).unwrap();
        }
        hand.turn(1);
        for job in hand.engine.jobs() {
            most = (most.0.max(job.sweep), most.1.max(job.zero_runs));
        }
    }
    assert_eq!(hand.engine.jobs().count(), 0, "it is over");
    most
}

#[test]
fn guests_who_write_by_themselves_have_the_sweep_hold_back() {
    let (alone, beside) = (most_in_flight(false, false).0, most_in_flight(true, false).0);
    assert!(alone >= 24 && (1..=14).contains(&beside), "{alone} clusters alone, {beside} beside guests");
    let (alone, beside) = (most_in_flight(false, true).1, most_in_flight(true, true).1);
    assert!(alone > 1 && beside == 1, "{alone} runs of zeros alone, {beside} beside guests");
}

#[test]
fn what_is_copied_is_stored_before_it_is_much() {
    for (depth, stored) in [(SweepDepth::Auto, 16..=23), (SweepDepth::Fixed(1), 0..=0)] {
        let mut hand = start(JobSpec { depth, slots: 3, ..JobSpec::plain(0, CLUSTER) }, dense);
        // A flush every seven clusters, of which nobody knows yet how long they take.
        for cluster in 1..25 {
            let copy = hand.copy(cluster, cluster + 1);
            hand.answered(&copy);
            hand.turn(5);
        }
        assert!(stored.contains(&hand.stored()), "{depth:?}: {}", hand.stored());
    }
}
