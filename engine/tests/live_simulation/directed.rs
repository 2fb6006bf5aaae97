//! What random runs seldom meet, or would not notice.

use std::time::Duration;

use engine::copy::ErrorPolicy;
use engine::live::{GroupFailure, SweepDepth};
use engine::modes::CbwErrorPolicy;
use engine::units::ByteRange;

use crate::run::{Ended, run};
use crate::scenario::{JobSpec, Operator, Path, Scenario, StartSpec, Stuck};

fn ended(scenario: &Scenario) -> Ended {
    run(scenario).unwrap_or_else(|wrong| panic!("{wrong}"))
}

/// A scenario in which guests meet a job that gets nowhere.
fn busy(seed: u64, path: Path) -> Scenario {
    let mut scenario = Scenario::plain(seed, path);
    scenario.disks[0].requests = 60;
    scenario.starts[0].at = Duration::ZERO;
    scenario
}

#[test]
fn guests_do_not_wait_for_a_sweep_that_is_throttled() {
    for (seed, path) in [(41, Path::Carried), (42, Path::Own)] {
        let mut scenario = busy(seed, path);
        // A cluster every 80 s.
        scenario.starts[0].jobs[0].speed = Some(100);
        scenario.starts[0].jobs[0].cancel_at = Some(Duration::from_secs(5));
        let ended = ended(&scenario);
        assert!(ended.longest < Duration::from_millis(400), "{:?}", ended.longest);
        // Guests have copied it all, or it was far from its end.
        assert!(ended.seen.cancelled + ended.seen.complete == 1, "{:?}", ended.seen);
    }
}

#[test]
fn guests_are_served_while_the_sweep_is_paused() {
    for (seed, path) in [(43, Path::Carried), (44, Path::Own)] {
        let mut scenario = busy(seed, path);
        scenario.operator = Operator::Pauses;
        let ended = ended(&scenario);
        assert!(ended.longest < Duration::from_millis(400), "{:?}", ended.longest);
        assert!(ended.seen.complete == 1 && ended.seen.complete_late == 1, "{:?}", ended.seen);
    }
}

/// A target that does not answer, and a source of which every second block is a hole, so that each cluster is many operations.
#[test]
fn a_target_that_is_stuck_leaves_places_on_the_ring_to_guests_of_others() {
    let mut scenario = busy(45, Path::Carried);
    scenario.disks[0].length = 64 * 65_536;
    scenario.disks[0].crumbled = true;
    scenario.disks.push(scenario.disks[0].clone());
    scenario.disks[0].requests = 0;
    let job = |disk| JobSpec {
        slots: 16,
        max_run: 4,
        depth: SweepDepth::Fixed(14),
        ..JobSpec::plain(disk, 65_536)
    };
    let stuck = Stuck { from: Duration::ZERO, until: None };
    let cancel_at = Some(Duration::from_secs(20));
    scenario.starts[0].jobs = vec![JobSpec { stuck: Some(stuck), cancel_at, ..job(0) }, job(1)];
    scenario.capacity = 64;
    let ended = ended(&scenario);
    assert!(ended.longest < Duration::from_secs(2), "{:?}", ended.longest);
    assert!(ended.seen.complete == 1, "{:?}", ended.seen);
}

/// So many of them that together they could have all the places that jobs have.
#[test]
fn targets_that_are_stuck_leave_places_on_the_ring_to_another_job() {
    let mut scenario = busy(51, Path::Own);
    scenario.disks[0].length = 64 * 65_536;
    scenario.disks[0].crumbled = true;
    let job = || JobSpec { slots: 20, max_run: 8, depth: SweepDepth::Fixed(18), ..JobSpec::plain(0, 65_536) };
    let stuck = Stuck { from: Duration::ZERO, until: None };
    let cancel_at = Some(Duration::from_secs(20));
    scenario.disks.push(scenario.disks[0].clone());
    scenario.disks[0].requests = 0;
    scenario.starts[0].jobs = vec![JobSpec { stuck: Some(stuck), cancel_at, ..job() }; 12];
    let healthy = StartSpec { at: Duration::from_secs(1), ..scenario.starts[0].clone() };
    scenario.starts.push(StartSpec { jobs: vec![JobSpec { disk: 1, ..job() }], ..healthy });
    scenario.disks[1].pace = Duration::from_millis(50);
    scenario.capacity = 1024;
    let ended = ended(&scenario);
    assert!(ended.longest < Duration::from_secs(1), "{:?}", ended.longest);
    assert!(ended.seen.complete == 1, "{:?}", ended.seen);
}

#[test]
fn a_guest_outlasts_a_target_that_is_stuck() {
    for (seed, on_cbw_error) in [(46, CbwErrorPolicy::BreakGuestWrite), (47, CbwErrorPolicy::BreakSnapshot)] {
        let mut scenario = busy(seed, Path::Both);
        let job = &mut scenario.starts[0].jobs[0];
        job.stuck = Some(Stuck { from: Duration::from_millis(1), until: None });
        job.on_cbw_error = on_cbw_error;
        job.cbw_timeout = Some(Duration::from_millis(100));
        job.cancel_at = Some(Duration::from_secs(100));
        let ended = ended(&scenario);
        let broken = ended.seen.failed + ended.seen.refused;
        assert!(ended.longest < Duration::from_millis(400), "{:?}", ended.longest);
        assert_eq!(broken > 0, on_cbw_error == CbwErrorPolicy::BreakGuestWrite, "{:?}", ended.seen);
    }
}

/// Two copies of one disk with the same time-out: all of it goes by while the target of one does not answer.
#[test]
fn a_target_that_is_stuck_leaves_another_copy_of_the_disk_its_time() {
    for (seed, path) in [(52, Path::Own), (53, Path::Carried)] {
        let mut scenario = busy(seed, path);
        let stuck = Stuck { from: Duration::ZERO, until: None };
        let job = JobSpec {
            cbw_timeout: Some(Duration::from_millis(100)),
            on_cbw_error: CbwErrorPolicy::BreakSnapshot,
            // A cluster every 80 s: what is copied is what guests ask for.
            speed: Some(100),
            cancel_at: Some(Duration::from_secs(5)),
            ..scenario.starts[0].jobs[0].clone()
        };
        scenario.starts[0].jobs = vec![JobSpec { stuck: Some(stuck), ..job.clone() }, job];
        scenario.starts[0].on_failure = GroupFailure::GoOn;
        let ended = ended(&scenario);
        // Guests may have had all of it copied by then.
        let sound = ended.seen.complete + ended.seen.cancelled;
        assert_eq!((ended.seen.failed_jobs, sound), (1, 1), "{:?}", ended.seen);
    }
}

/// Guests have waited for long when another copy of their disk starts.
#[test]
fn a_copy_that_starts_while_guests_wait_for_another_has_its_own_time() {
    for (seed, path) in [(54, Path::Own), (55, Path::Carried)] {
        let mut scenario = busy(seed, path);
        let stuck = Stuck { from: Duration::ZERO, until: None };
        let job = JobSpec {
            on_cbw_error: CbwErrorPolicy::BreakSnapshot,
            speed: Some(100),
            cancel_at: Some(Duration::from_secs(5)),
            ..scenario.starts[0].jobs[0].clone()
        };
        let first =
            JobSpec { stuck: Some(stuck), cbw_timeout: Some(Duration::from_millis(100)), ..job.clone() };
        let second = JobSpec { cbw_timeout: Some(Duration::from_millis(80)), ..job };
        scenario.starts[0].jobs = vec![first];
        let at = Duration::from_millis(60);
        scenario.starts.push(StartSpec { at, jobs: vec![second], ..scenario.starts[0].clone() });
        let ended = ended(&scenario);
        let sound = ended.seen.complete + ended.seen.cancelled;
        assert_eq!((ended.seen.failed_jobs, sound), (1, 1), "{:?}", ended.seen);
    }
}

/// Guests' writes fail for one copy's sake, and would break another if they came so far.
#[test]
fn a_write_that_fails_for_one_copy_breaks_no_other() {
    for (seed, path) in [(57, Path::Own), (57, Path::Carried)] {
        let mut scenario = busy(seed, path);
        let job = scenario.starts[0].jobs[0].clone();
        let first = JobSpec {
            stuck: Some(Stuck { from: Duration::ZERO, until: None }),
            on_cbw_error: CbwErrorPolicy::BreakGuestWrite,
            cbw_timeout: Some(Duration::from_millis(100)),
            cancel_at: Some(Duration::from_secs(20)),
            ..job.clone()
        };
        let second = JobSpec {
            stuck: Some(Stuck { from: Duration::ZERO, until: Some(Duration::from_millis(300)) }),
            on_cbw_error: CbwErrorPolicy::BreakSnapshot,
            cbw_timeout: Some(Duration::from_millis(50)),
            ..job
        };
        scenario.starts[0].jobs = vec![first, second];
        scenario.starts[0].on_failure = GroupFailure::GoOn;
        let ended = ended(&scenario);
        // The first is cancelled and still stuck when the engine dies.
        assert_eq!((ended.seen.failed_jobs, ended.seen.complete), (1, 1), "{:?}", ended.seen);
        assert!(ended.seen.failed + ended.seen.refused > 0, "{:?}", ended.seen);
    }
}

#[test]
fn a_disk_may_be_let_go_while_its_copy_starts() {
    let mut scenario = Scenario::plain(48, Path::Own);
    scenario.disks[0].requests = 3;
    scenario.disks[0].hold = Duration::from_millis(2);
    scenario.disks[0].leaves_early = true;
    let mut started = 0;
    for at in 0..100 {
        scenario.starts[0].at = Duration::from_micros(20 * at);
        started += ended(&scenario).seen.started;
    }
    assert_eq!(started, 100, "what was asked for comes to be");
}

#[test]
fn a_group_that_does_not_fit_is_refused_as_a_whole() {
    let mut scenario = Scenario::plain(49, Path::Both);
    // With the disk one more than a ring has places.
    scenario.starts[0].jobs = vec![scenario.starts[0].jobs[0].clone(); 64];
    let mut small = scenario.starts[0].clone();
    small.jobs.truncate(2);
    scenario.starts.push(small);
    scenario.tight = true;
    let ended = ended(&scenario);
    assert_eq!((ended.seen.not_started, ended.seen.started), (1, 1));
    assert_eq!(ended.seen.complete, 2);
}

#[test]
fn guests_of_one_disk_leave_places_on_the_ring_to_those_of_another() {
    let mut scenario = Scenario::plain(50, Path::Carried);
    scenario.disks.push(scenario.disks[0].clone());
    scenario.disks[0].length = 8 << 20;
    scenario.disks[0].requests = 3000;
    scenario.disks[0].at_a_time = 64;
    scenario.disks[0].pace = Duration::from_nanos(1);
    scenario.disks[1].at_a_time = 1;
    scenario.starts[0].jobs = vec![JobSpec::plain(1, 8192)];
    scenario.starts[0].at = Duration::ZERO;
    scenario.carrier.requests = 64;
    scenario.carrier_bytes = 1 << 20;
    scenario.capacity = 8;
    let ended = ended(&scenario);
    assert!(ended.waits[1] < Duration::from_millis(100), "{:?}", ended.waits);
}

/// On a ring of two places jobs have one together: the sweep of one disk, whose target is slow, and the guests' copies of another. (Seed 30041484.)
#[test]
fn a_sweep_leaves_places_on_the_ring_to_copies_for_guests_of_another_disk() {
    for seed in 60..70 {
        let mut scenario = busy(seed, Path::Own);
        scenario.disks.push(scenario.disks[0].clone());
        scenario.disks[0].length = 512 * 8192;
        scenario.disks[0].requests = 0;
        let slow = JobSpec { slowness: 10, ..JobSpec::plain(0, 8192) };
        // Every block of it is a guest's first.
        let job =
            JobSpec { speed: Some(100), cancel_at: Some(Duration::from_secs(20)), ..JobSpec::plain(1, 8192) };
        scenario.starts[0].jobs = vec![slow, job];
        scenario.capacity = 2;
        let ended = ended(&scenario);
        assert!(ended.waits[1] < Duration::from_secs(1), "{:?}", ended.waits);
    }
}

/// There is always a read under way, also when all is copied.
#[test]
fn those_who_read_the_snapshot_all_the_time_do_not_keep_a_copy_from_its_end() {
    let mut reads = 0;
    for seed in 51..71 {
        let mut scenario = busy(seed, Path::Own);
        scenario.starts[0].jobs[0].reads = 20_000;
        let ended = ended(&scenario);
        assert_eq!(ended.seen.complete, 1);
        assert!(ended.seen.snapshot < 10_000, "{:?}", ended.seen);
        reads += ended.seen.snapshot;
    }
    assert!(reads > 100, "{reads}");
}

/// Without guests only the sweep copies, so what it has passed by stays out unless it comes back.
#[test]
fn what_a_reader_held_when_the_sweep_passed_is_copied() {
    for seed in 71..91 {
        let mut scenario = Scenario::plain(seed, Path::Own);
        scenario.disks[0].requests = 0;
        scenario.starts[0].jobs[0].reads = 200;
        assert_eq!(ended(&scenario).seen.complete, 1);
    }
}

/// A disk, or a target, with bad sectors, a copy that pauses when it has left out some of them, and guests.
fn blemished(seed: u64, source: bool, path: Path) -> Scenario {
    let mut scenario = busy(seed, path);
    scenario.disks[0].length = 128 * 8192;
    scenario.disks[0].requests = 100;
    scenario.disks[0].pace = Duration::from_micros(2500);
    scenario.operator = Operator::PausesWithout(4 * 8192);
    let job = &mut scenario.starts[0].jobs[0];
    job.source_policy = ErrorPolicy::Ignore;
    job.target_policy = ErrorPolicy::Ignore;
    job.on_cbw_error = CbwErrorPolicy::BreakGuestWrite;
    let bad = (0..10).map(|at| ByteRange::new(at * 4 * 8192 + 5000, 512)).collect();
    if source {
        scenario.disks[0].bad = bad
    } else {
        job.bad_target = bad
    }
    scenario
}

/// Some of the guests come after everything was mended.
#[test]
fn what_was_left_out_is_copied_for_a_guest_that_comes_later() {
    let (mut tried, mut whole) = (0, 0);
    for (seed, source) in (91..171).map(|seed| (seed, seed % 2 == 0)) {
        let path = if source { Path::Own } else { Path::Both };
        let mut scenario = blemished(seed, source, path);
        scenario.mended_at = Duration::from_millis(25);
        scenario.operator = Operator::PausesWithout(8192);
        let ended = ended(&scenario);
        assert_eq!(ended.seen.complete, 1, "{:?}", ended.seen);
        tried += ended.seen.unskipped;
        whole += u64::from(ended.seen.unskipped > 0 && ended.seen.skipped == 0);
    }
    assert!(tried > 8 && whole > 4, "{tried} were tried again, {whole} copies are whole after all");
}

/// Guests of their own write whether the disk can be read or not.
#[test]
fn a_guest_goes_on_where_what_was_left_out_fails_again() {
    let (mut tried, mut changed, mut refused) = (0, 0, 0);
    for seed in 131..171 {
        let mut scenario = blemished(seed, seed % 2 == 0, Path::Own);
        scenario.mended_at = Duration::from_secs(100);
        let ended = ended(&scenario);
        assert_eq!((ended.seen.complete, ended.seen.skipped), (1, 1), "{:?}", ended.seen);
        assert!(ended.longest < Duration::from_millis(400), "{:?}", ended.longest);
        tried += ended.seen.unskipped;
        changed += ended.seen.complete_late;
        refused += ended.seen.refused;
    }
    // One that comes before the sweep has given up is refused by a failure of its own, as anywhere.
    assert!(tried > 40 && changed == 40 && refused < tried, "{tried} were tried again, {refused} refused");
}

/// That is what was chosen for the one, and no failure.
#[test]
fn a_copy_that_leaves_something_out_does_not_take_its_group_along() {
    for seed in 231..241 {
        let mut scenario = blemished(seed, true, Path::Own);
        scenario.operator = Operator::Watches;
        scenario.mended_at = Duration::from_secs(100);
        scenario.disks.push(scenario.disks[0].clone());
        scenario.disks[1].bad.clear();
        scenario.starts[0].jobs.push(JobSpec::plain(1, 8192));
        scenario.starts[0].on_failure = GroupFailure::FailAll;
        let seen = ended(&scenario).seen;
        assert_eq!((seen.complete, seen.skipped, seen.cancelled, seen.failed_jobs), (2, 1, 0, 0), "{seen:?}");
    }
}

/// Guests whose writes fail one after the other while the job is stopped: what is to be tried again has its bound (see the oracle), and none of it is
/// forgotten.
#[test]
fn guests_of_a_job_that_is_stopped_may_go_on_to_fail() {
    for seed in 241..247 {
        let mut scenario = busy(seed, if seed % 2 == 0 { Path::Carried } else { Path::Own });
        scenario.disks[0].length = 120 * 8192;
        scenario.disks[0].requests = 150;
        scenario.mends_after = Duration::from_millis(200);
        scenario.mended_at = Duration::from_secs(100);
        let job = &mut scenario.starts[0].jobs[0];
        job.on_cbw_error = CbwErrorPolicy::BreakGuestWrite;
        job.bad_target = vec![ByteRange::new(0, scenario.disks[0].length)];
        job.target_policy = ErrorPolicy::Stop;
        let seen = ended(&scenario).seen;
        assert!(seen.complete == 1 && seen.failed + seen.refused > 40, "{seen:?}");
    }
}

/// Those who read the snapshot send the sweep back over what was left out, and come upon it themselves.
#[test]
fn readers_and_the_sweep_leave_alone_what_was_left_out() {
    let mut reads = 0;
    for seed in 171..231 {
        let mut scenario = blemished(seed, seed % 2 == 0, Path::Own);
        scenario.mended_at = Duration::from_secs(100);
        scenario.disks[0].requests = 30;
        scenario.starts[0].jobs[0].reads = 300;
        let ended = ended(&scenario);
        assert_eq!((ended.seen.complete, ended.seen.skipped), (1, 1), "{:?}", ended.seen);
        reads += ended.seen.snapshot;
    }
    assert!(reads > 1000, "{reads}");
}
