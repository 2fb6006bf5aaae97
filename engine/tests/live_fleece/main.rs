//! A fleece file between guests and a target that is slow, stuck, full or broken: the product's own reactor over the simulated ring.
//!
//! What is watched in every turn of a run in which all copies go through the fleece file: of each cluster that differs from t0, the old contents
//! are on the target's medium (a power loss may come at any time) or in the fleece file. That is what a slot that is used again too early breaks.

mod bench;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::copier::plan::PlantedBug;
use engine::copy::{ErrorPolicy, SyncMode};
use engine::job::{ErrorAction, IoStatus, JobEvent, JobResult, Observer, Outcome, Refusal};
use engine::live::carrier::IoOutcome;
use engine::live::sim::Pending;
use engine::live::{CbwErrorPolicy, IoRequest};
use engine::ring::sim::{Disk, Fault, FaultPlan, Rates};
use engine::units::ByteRange;
use fastrand::Rng;
use nix::errno::Errno;

use bench::{Bench, CLUSTER, CLUSTERS, FLEECE, LENGTH, PROMPT, SOURCE, Setup, TARGET, ZEROS, bytes_of};

/// What the operator asks for may be refused: done already, or too late.
fn perhaps(_: Result<(), Refusal>) {}

#[test]
fn guests_outlast_a_target_that_is_stuck() {
    for seed in 0..20 {
        let mut bench = Bench::start(&Setup { target_is_zero: seed % 2 == 0, ..Setup::new(seed) });
        bench.with_disk(TARGET, Disk::set_stuck);
        if seed % 4 < 2 {
            // The sweep is reading it.
            bench.with_disk(SOURCE, |disk| disk.set_slowness(10));
            bench.pass(Duration::from_millis(1));
            bench.with_disk(SOURCE, |disk| disk.set_slowness(1));
            bench.write(1);
        }
        bench.pass(Duration::from_millis(50));
        // Those among them that the sweep is writing to the target.
        for cluster in bench.shuffled() {
            bench.write(cluster);
        }
        for cluster in (0..CLUSTERS).filter(|cluster| !ZEROS.contains(cluster)) {
            let bytes = bytes_of(cluster);
            let range = ByteRange::between(bytes.start as u64, bytes.end as u64);
            assert!(bench.read_snapshot(range) == bench.t0[bytes], "seed {seed}, cluster {cluster}");
        }
        assert!(bench.job.wait_timeout(Duration::ZERO).is_none());
        bench.pass(Duration::from_secs(100));
        bench.with_disk(TARGET, Disk::set_free);
        bench.end_complete();
    }
}

/// A source of which each run is many writes, so that the sweep could fill all the places on the ring that its job has.
#[test]
fn a_target_that_is_stuck_leaves_guests_of_the_same_job_places_on_the_ring() {
    for seed in 0..20 {
        let setup = Setup { crumbled: true, capacity: 48, ..Setup::new(seed) };
        let mut bench = Bench::start(&setup);
        bench.with_disk(TARGET, Disk::set_stuck);
        bench.pass(Duration::from_millis(50));
        for cluster in bench.shuffled() {
            bench.write(cluster);
        }
        bench.with_disk(TARGET, Disk::set_free);
        bench.end_complete();
    }
}

#[test]
fn without_direct_io_it_is_the_same() {
    let mut bench = Bench::start(&Setup { alignment: None, ..Setup::new(1) });
    bench.with_disk(TARGET, |disk| disk.set_slowness(50));
    for cluster in bench.shuffled() {
        bench.write(cluster);
    }
    bench.end_complete();
}

/// Guests who change everything, not much faster than a small fleece file is drained and flushed.
fn paced(setup: &Setup) -> (Bench, Arc<JobResult>) {
    let mut bench = Bench::start(setup);
    bench.watched = true;
    for cluster in bench.shuffled() {
        bench.write(cluster);
        let pause = Duration::from_millis(bench.rng.u64(0..12));
        bench.pass(pause);
    }
    let result = bench.end();
    (bench, result)
}

/// Of runs in which the fleece file was never full: how many there were, and in how many something would have been lost.
fn runs(planted: Option<PlantedBug>) -> (u32, u32) {
    let (mut count, mut lost) = (0, 0);
    for seed in 0..60 {
        let (bench, result) = paced(&Setup { fleece_slots: 12, planted, ..Setup::of_changes(seed) });
        // Everything was changed, so everything was copied.
        assert!(bench.is_whole(&result), "{result:?}");
        assert!(bench.world.borrow_mut().disk(TARGET).medium() == bench.t0, "seed {seed}");
        if result.notices.is_empty() {
            count += 1;
            lost += u32::from(bench.lost.is_some());
        }
    }
    (count, lost)
}

#[test]
fn slots_are_used_again_when_what_they_held_is_on_stable_storage() {
    let (count, lost) = runs(None);
    assert!(count >= 20, "{count} runs of 60 are of any use");
    assert_eq!(lost, 0);
}

#[test]
fn slots_that_are_used_again_too_early_are_found() {
    let (count, lost) = runs(Some(PlantedBug::FleeceFreedBeforeFlush));
    assert!(lost > count / 2, "found in {lost} of {count} runs");
}

#[test]
fn a_flush_that_fails_ends_the_job_and_nothing_else() {
    let faults = FaultPlan { rates: Rates { flush: 1024, ..Rates::default() }, ..FaultPlan::default() };
    let (bench, result) = paced(&Setup { fleece_slots: 24, faults, ..Setup::of_changes(3) });
    let Outcome::Failed(error) = &result.outcome else { panic!("{result:?}") };
    assert!(error.to_string().contains("flush"), "{error}");
    drop(bench);
}

/// A job that has stopped because its target is full, and guests who have filled its fleece file.
fn full_and_stopped(on_cbw_error: CbwErrorPolicy) -> Bench {
    let setup = Setup {
        room: 10,
        fleece_slots: 16,
        on_target_error: ErrorPolicy::Enospc,
        on_cbw_error,
        ..Setup::new(5)
    };
    let mut bench = Bench::start(&setup);
    assert!(bench.has_stopped());
    // Of the zeros among them nothing is kept.
    for cluster in 30..30 + 17 {
        bench.write(cluster);
    }
    bench.write(30);
    assert_eq!(bench.job.progress().fleeced, 16 * CLUSTER);
    bench
}

#[test]
fn a_target_that_is_full_stops_the_job_and_not_the_guests() {
    let mut bench = full_and_stopped(CbwErrorPolicy::BreakGuestWrite);
    assert_eq!(bench.job.progress().io_status, IoStatus::NoSpace);
    bench.pass(Duration::from_secs(3600));
    bench.enlarge();
    bench.job.resume().unwrap();
    bench.end_complete();
}

#[test]
fn a_full_fleece_file_breaks_the_write_of_a_guest_who_chose_that() {
    let mut bench = full_and_stopped(CbwErrorPolicy::BreakGuestWrite);
    for _ in 0..2 {
        let error = bench.try_write(50).expect("decided at once").unwrap_err().to_string();
        let told = ["fleece2", "the fleece file is full (128 KiB)", "larger", "target"];
        assert!(told.iter().all(|part| error.contains(part)), "{error}");
    }
    // What is done, or zeros, needs no room.
    bench.write(33);
    bench.write(7);
    bench.enlarge();
    bench.job.resume().unwrap();
    bench.pass(Duration::from_millis(500));
    bench.write(50);
    bench.end_complete();
}

#[test]
fn a_full_fleece_file_breaks_the_snapshot_otherwise() {
    let mut bench = full_and_stopped(CbwErrorPolicy::BreakSnapshot);
    bench.write(50);
    let result = bench.end();
    let Outcome::Failed(error) = &result.outcome else { panic!("{result:?}") };
    assert!(error.to_string().contains("the fleece file is full"), "{error}");
}

#[test]
fn slots_that_held_what_is_on_the_target_are_free_in_a_pause() {
    let setup = Setup {
        room: 30,
        fleece_slots: 16,
        on_target_error: ErrorPolicy::Stop,
        on_cbw_error: CbwErrorPolicy::BreakGuestWrite,
        ..Setup::of_changes(14)
    };
    let mut bench = Bench::start(&setup);
    for cluster in 20..30 {
        bench.write(cluster);
    }
    bench.pass(Duration::from_millis(200));
    assert_eq!(bench.job.progress().fleeced, 0, "drained, and not flushed");
    bench.write(40);
    assert!(bench.has_stopped());
    assert!(bench.engine.now().0 < Duration::from_millis(900), "before a flush was due by itself");
    for cluster in 41..40 + 16 {
        bench.write(cluster);
    }
    assert!(bench.try_write(56).expect("decided at once").is_err(), "all 16 are in use");
    bench.enlarge();
    bench.job.resume().unwrap();
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.job.progress().fleeced, 0);
    for cluster in bench.shuffled() {
        bench.write(cluster);
    }
    bench.end_complete();
}

/// What the drain meets is told as what the sweep meets is: who watches the job has nothing else to go by.
#[test]
fn an_error_of_the_drain_is_told() {
    let policies = [
        (ErrorPolicy::Enospc, ErrorAction::Stop),
        (ErrorPolicy::Report, ErrorAction::Report),
        (ErrorPolicy::Ignore, ErrorAction::Ignore),
    ];
    for (policy, action) in policies {
        let setup = Setup { room: 30, on_target_error: policy, ..Setup::of_changes(15) };
        let mut bench = Bench::start(&setup);
        let told = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&told);
        bench.job.observe(Observer::new(move |event| {
            if let JobEvent::Error { error, action } = event {
                hears.lock().unwrap().push((error.to_string(), action));
            }
        }));
        bench.write(40);
        bench.pass(Duration::from_millis(500));
        let told = told.lock().unwrap();
        assert!(!told.is_empty(), "{policy:?}: {:?}", bench.job.progress());
        for (error, then) in told.iter() {
            assert!(error.contains("cannot write target") && error.contains("ENOSPC"), "{error}");
            assert_eq!(*then, action);
        }
    }
}

#[test]
fn guests_who_find_it_full_go_to_the_target() {
    for paused in [false, true] {
        // The sweep gets nowhere, and so does the drain.
        let mut bench = Bench::start(&Setup { fleece_slots: 3, speed: Some(1), ..Setup::new(6) });
        if paused {
            bench.job.pause().unwrap();
        }
        for cluster in bench.shuffled() {
            bench.write(cluster);
        }
        bench.job.set_speed(None).unwrap();
        if paused {
            bench.job.resume().unwrap();
        }
        let result = bench.end_complete();
        assert!(result.notices.iter().any(|notice| notice.contains("was full")), "{result:?}");
    }
}

#[test]
fn a_guest_whose_copy_finds_no_way_is_let_go_in_its_time() {
    let cbw_timeout = Some(Duration::from_millis(50));
    for on_cbw_error in [CbwErrorPolicy::BreakGuestWrite, CbwErrorPolicy::BreakSnapshot] {
        let setup = Setup { fleece_slots: 2, cbw_timeout, on_cbw_error, ..Setup::of_changes(8) };
        let mut bench = Bench::start(&setup);
        bench.with_disk(TARGET, Disk::set_stuck);
        bench.write(20);
        bench.write(21);
        let broken = bench.try_write(22).expect("within its time-out");
        assert_eq!(broken.is_err(), on_cbw_error == CbwErrorPolicy::BreakGuestWrite);
        bench.with_disk(TARGET, Disk::set_free);
        bench.write(23);
        if broken.is_ok() {
            assert!(matches!(bench.end().outcome, Outcome::Failed(_)));
        }
    }
}

#[test]
fn slots_that_cannot_be_written_are_not_used_and_said_once() {
    let mut bench = Bench::start(&Setup::of_changes(9));
    bench.with_disk(FLEECE, |disk| disk.set_bad(ByteRange::new(3 * CLUSTER + 100, 8 * CLUSTER)));
    for cluster in bench.shuffled() {
        bench.write(cluster);
    }
    let result = bench.end_complete();
    assert_eq!(result.notices.len(), 1, "{result:?}");
    assert!(result.notices[0].contains("fleece2"), "{result:?}");
}

#[test]
fn old_contents_that_cannot_be_read_back_go_by_the_targets_policy() {
    for policy in [ErrorPolicy::Report, ErrorPolicy::Ignore] {
        let setup = Setup { on_target_error: policy, ..Setup::of_changes(10) };
        let mut bench = Bench::start(&setup);
        bench.job.pause().unwrap();
        for cluster in (0..CLUSTERS).rev() {
            bench.write(cluster);
        }
        bench.with_disk(FLEECE, |disk| disk.set_bad(ByteRange::new(5 * CLUSTER, 10)));
        bench.job.resume().unwrap();
        let result = bench.end();
        match &result.outcome {
            Outcome::Failed(error) if policy == ErrorPolicy::Report => {
                assert!(error.to_string().contains("from the fleece file fleece2"), "{error}");
            }
            Outcome::Cancelled if policy == ErrorPolicy::Ignore => {
                assert_eq!(result.skipped.len(), 1, "{result:?}");
                assert_eq!(result.skipped[0].range.length, CLUSTER);
            }
            _ => panic!("{result:?}"),
        }
    }
}

#[test]
fn the_snapshot_is_read_from_wherever_it_is() {
    for seed in 0..10 {
        let mut bench = Bench::start(&Setup { fleece_slots: 24, ..Setup::of_changes(seed) });
        bench.with_disk(TARGET, Disk::set_stuck);
        for cluster in [3, 4, 5, 9, CLUSTERS - 1, 6] {
            bench.write(cluster);
        }
        let all = ByteRange::new(0, LENGTH);
        assert!(bench.read_snapshot(all) == bench.t0, "held, or never touched");
        bench.with_disk(TARGET, Disk::set_free);
        // While slots are drained, freed and used again.
        bench.with_disk(FLEECE, |disk| disk.set_slowness(5));
        for cluster in bench.shuffled() {
            let range =
                ByteRange::between(bench.rng.u64(0..LENGTH / 2), LENGTH - bench.rng.u64(0..LENGTH / 2));
            let pending = bench.engine.read_snapshot(bench.id, range);
            bench.write(cluster);
            if bench.job.wait_timeout(Duration::ZERO).is_some() {
                break;
            }
            if let Ok(bytes) = bench.answer(&pending, Duration::from_secs(5)).unwrap().result {
                let start = usize::try_from(range.offset).unwrap();
                assert!(bytes == bench.t0[start..start + bytes.len()], "seed {seed}");
            }
        }
        bench.end_complete();
    }
}

#[test]
fn a_slot_that_is_used_again_while_it_is_read_is_no_snapshot() {
    for seed in 0..5 {
        let mut bench = Bench::start(&Setup { fleece_slots: 4, ..Setup::of_changes(seed) });
        bench.with_disk(TARGET, Disk::set_stuck);
        for cluster in 3..7 {
            bench.write(cluster);
        }
        // This read, and no other, takes long.
        bench.with_disk(FLEECE, |disk| disk.set_slowness(10_000));
        let range = ByteRange::new(3 * CLUSTER, 4 * CLUSTER);
        let pending = bench.engine.read_snapshot(bench.id, range);
        bench.pass(Duration::from_nanos(1));
        bench.with_disk(FLEECE, |disk| disk.set_slowness(1));
        bench.with_disk(TARGET, Disk::set_free);
        bench.pass(Duration::from_millis(100));
        for cluster in 40..44 {
            bench.write(cluster);
        }
        assert!(pending.take().is_none(), "seed {seed}: the read is under way");
        let bytes = bench.answer(&pending, Duration::from_secs(10)).unwrap().result.unwrap();
        assert!(bytes == bench.t0[bytes_of(3).start..bytes_of(6).end], "seed {seed}");
    }
}

#[test]
fn a_cancelled_job_forgets_what_it_held() {
    let mut bench = Bench::start(&Setup { speed: Some(1), ..Setup::new(12) });
    for cluster in 20..30 {
        bench.write(cluster);
    }
    bench.job.cancel().unwrap();
    bench.write(40);
    assert!(matches!(bench.end().outcome, Outcome::Cancelled));
}

#[test]
fn changes_that_are_held_at_a_cancel_are_kept() {
    for seed in 0..10 {
        let mut bench = Bench::start(&Setup { speed: Some(1), ..Setup::of_changes(seed) });
        for cluster in 20..35 {
            bench.write(cluster);
        }
        if seed % 2 == 0 {
            bench.job.pause().unwrap();
        }
        bench.job.cancel().unwrap();
        bench.write(40);
        bench.write(21);
        let result = bench.end();
        assert!(matches!(result.outcome, Outcome::Cancelled) && result.skipped.is_empty(), "{result:?}");
        let medium = bench.world.borrow_mut().disk(TARGET).medium().to_vec();
        for cluster in 20..35 {
            assert!(medium[bytes_of(cluster)] == bench.t0[bytes_of(cluster)], "cluster {cluster}");
        }
    }
}

/// A copy of changes whose flush, which is to free slots, is under way; and which operation that is.
fn flushing(faults: FaultPlan) -> (Bench, u64) {
    let mut bench = Bench::start(&Setup { faults, ..Setup::of_changes(16) });
    for cluster in 20..30 {
        bench.write(cluster);
    }
    while bench.job.progress().fleeced > 0 {
        bench.pass(Duration::from_micros(100));
    }
    bench.with_disk(TARGET, Disk::set_hung);
    let number = bench.engine.pushed();
    bench.job.pause().unwrap();
    bench.pass(Duration::from_millis(10));
    assert_eq!((bench.engine.pushed(), bench.engine.in_flight()), (number + 1, 1), "the flush");
    (bench, number)
}

/// The kernel tells of lost writes once: the next flush would succeed.
#[test]
fn a_flush_under_way_at_a_cancel_that_fails_is_the_end_of_what_was_held() {
    let (_, number) = flushing(FaultPlan::default());
    let (mut bench, _) = flushing(FaultPlan::single(number, Fault::Errno(Errno::EIO)));
    bench.job.cancel().unwrap();
    bench.pass(Duration::from_millis(10));
    bench.with_disk(TARGET, Disk::set_free);
    let result = bench.end();
    let Outcome::Failed(error) = &result.outcome else { panic!("{result:?}") };
    assert!(error.to_string().contains("flush"), "{error}");
    assert_eq!(bench.engine.pushed(), number + 1, "nobody asks again");
}

#[test]
fn changes_whose_last_flush_fails_are_not_kept() {
    let faults = FaultPlan { rates: Rates { flush: 1024, ..Rates::default() }, ..FaultPlan::default() };
    let mut bench = Bench::start(&Setup { speed: Some(1), faults, ..Setup::of_changes(17) });
    for cluster in 20..30 {
        bench.write(cluster);
    }
    bench.job.cancel().unwrap();
    let result = bench.end();
    let Outcome::Failed(error) = &result.outcome else { panic!("{result:?}") };
    assert!(error.to_string().contains("flush"), "{error}");
}

/// Everything is on the target by then, and the flushes that free slots find nothing left to copy.
#[test]
fn a_copy_of_changes_goes_on_when_all_was_changed() {
    for fleece_slots in [4, 64] {
        let mut bench = Bench::start(&Setup { fleece_slots, ..Setup::of_changes(15) });
        for cluster in bench.shuffled() {
            bench.write(cluster);
        }
        bench.pass(Duration::from_secs(10));
        assert_eq!(bench.job.progress().fleeced, 0);
        assert!(bench.job.wait_timeout(Duration::ZERO).is_none(), "nobody has cancelled it");
        bench.end_complete();
    }
}

#[test]
fn changes_that_cannot_be_kept_at_a_cancel_are_listed() {
    let setup = Setup { room: 25, on_target_error: ErrorPolicy::Stop, ..Setup::of_changes(13) };
    let mut bench = Bench::start(&setup);
    for cluster in 20..28 {
        bench.write(cluster);
    }
    assert!(bench.has_stopped());
    bench.job.cancel().unwrap();
    let result = bench.end();
    assert!(matches!(result.outcome, Outcome::Cancelled), "{result:?}");
    assert_eq!(result.skipped.len(), 1, "{result:?}");
    assert_eq!(result.skipped[0].range, ByteRange::new(25 * CLUSTER, 3 * CLUSTER));
}

/// A job about which everything is at random.
fn at_random(seed: u64, rng: &mut Rng) -> Setup {
    let faulty = rng.bool();
    let mut rate = |most: u16| if faulty { rng.u16(0..most) } else { 0 };
    let rates = Rates {
        short: rate(200),
        passing: rate(40),
        eio: rate(15),
        nospace: rate(15),
        flush: rate(10),
        drop_cache: 0,
        publish: 0,
        unsupported: rate(300),
    };
    let faults = FaultPlan { rates, quiet_from: Some(rng.u64(0..500)), ..FaultPlan::default() };
    Setup {
        fleece_slots: rng.u32(1..40),
        on_target_error: if rng.bool() { ErrorPolicy::Ignore } else { ErrorPolicy::Stop },
        target_is_zero: rng.bool(),
        speed: rng.bool().then(|| rng.u64(100_000..40_000_000)),
        sync: if rng.u8(..4) == 0 { SyncMode::None } else { SyncMode::Full },
        faults,
        ..Setup::new(seed)
    }
}

/// A guest changes some clusters, and another reads them as of t0. A target that keeps them waiting comes free at last.
fn change_and_read(bench: &mut Bench, cluster: u64, rng: &mut Rng) {
    let start = cluster * CLUSTER + rng.u64(0..4000);
    let range = ByteRange::between(start, (start + rng.u64(1..4 * CLUSTER)).min(LENGTH));
    let bytes = usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap();
    let reading = rng.bool().then(|| bench.engine.read_snapshot(bench.id, range));
    let data = vec![rng.u8(..); bytes.len()];
    let writing = bench.engine.io(&bench.disk, IoRequest::Write { offset: start, data: data.clone() });
    let mut answer = |pending: &Pending<IoOutcome>| {
        bench.answer(pending, PROMPT).or_else(|| {
            bench.with_disk(TARGET, Disk::set_free);
            bench.answer(pending, Duration::from_secs(20))
        })
    };
    let written = answer(&writing).expect("a guest is let go").result;
    let read = reading.map(|reading| answer(&reading).expect("a reader is let go").result);
    if let Some(Ok(read)) = read {
        assert!(read == bench.t0[bytes.clone()], "{range} is not as of t0");
    }
    if written.is_ok() {
        bench.now[bytes].copy_from_slice(&data);
    } else {
        // What a write that failed has left is its guest's business.
        let view = bench.world.borrow_mut().disk(SOURCE).view().to_vec();
        bench.now[bytes.clone()].copy_from_slice(&view[bytes]);
    }
}

/// Slow and stuck targets, passing faults, small fleece files, pauses and speeds.
fn troubled(seed: u64) -> (Bench, Arc<JobResult>) {
    let mut rng = Rng::with_seed(seed ^ 0xF1EE);
    let mut bench = Bench::start(&at_random(seed, &mut rng));
    for cluster in bench.shuffled() {
        match rng.u8(..24) {
            0 => bench.with_disk(TARGET, Disk::set_stuck),
            1 => bench.with_disk(TARGET, |disk| disk.set_slowness(rng.u64(1..40))),
            2 => perhaps(bench.job.pause()),
            3..6 => perhaps(bench.job.resume()),
            _ => {}
        }
        change_and_read(&mut bench, cluster, &mut rng);
    }
    bench.with_disk(TARGET, Disk::set_free);
    let until = bench.engine.now().after(Duration::from_secs(1000));
    while bench.job.wait_timeout(Duration::ZERO).is_none() {
        perhaps(bench.job.resume());
        bench.cancel_if_whole();
        bench.pass(Duration::from_millis(100));
        assert!(bench.engine.now() < until, "{:?}", bench.job.progress());
    }
    let result = bench.end();
    (bench, result)
}

#[test]
fn whatever_happens_a_complete_copy_is_of_t0() {
    let mut complete = 0;
    let seeds = std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(300);
    for seed in 0..seeds {
        let (bench, result) =
            std::panic::catch_unwind(|| troubled(seed)).unwrap_or_else(|_| panic!("seed {seed}"));
        if bench.is_whole(&result) {
            complete += 1;
            assert!(bench.world.borrow_mut().disk(TARGET).medium() == bench.t0, "seed {seed}");
        }
    }
    assert!(complete > seeds / 2, "{complete} of {seeds} are complete");
}
