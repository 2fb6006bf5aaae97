//! What verification finds, and what becomes of it: the cases that random runs seldom meet.

use std::time::Duration;

use engine::copy::ErrorPolicy;
use engine::error::Operation;
use engine::job::Outcome;
use engine::ring::sim::{Fault, FaultPlan, Rates};
use nix::errno::Errno;

use crate::oracle::{Before, check};
use crate::run::{Script, run};
use crate::scenario::Scenario;

/// Every block of the target is stained although it is said to be zero.
fn stained(policy: ErrorPolicy) -> Scenario {
    let plain = Scenario::plain(21);
    let stained = (0..plain.length.div_ceil(4096)).collect();
    Scenario { stained, verify: true, map: true, source_policy: policy, target_policy: policy, ..plain }
}

/// A blank that is not zero is found and made zero, not found again and again.
#[test]
fn a_target_that_is_not_as_zero_as_was_said_is_mended() {
    for policy in [ErrorPolicy::Ignore, ErrorPolicy::Stop] {
        let scenario = stained(policy);
        let world = scenario.world();
        let before = Before::of(&world);
        let run = run(&scenario, &world, FaultPlan::default(), Script::default());
        assert!(matches!(run.result().outcome, Outcome::Complete), "{:?}", run.result());
        check(&scenario, &world, &before, run.result()).unwrap();
    }
}

/// What a failed run has learned about the target's blanks, the next one knows.
#[test]
fn a_run_that_goes_on_does_not_believe_blanks_that_were_found_not_to_be_zero() {
    let first = stained(ErrorPolicy::Report);
    let world = first.world();
    let before = Before::of(&world);
    let failed = run(&first, &world, FaultPlan::default(), Script::default());
    assert!(matches!(failed.result().outcome, Outcome::Failed(_)));
    let second = Scenario { verify: false, ..first };
    let went_on = run(&second, &world, FaultPlan::default(), Script::default());
    assert!(matches!(went_on.result().outcome, Outcome::Complete));
    check(&second, &world, &before, went_on.result()).unwrap();
}

/// A silent corruption anywhere, then a failure anywhere, then a run that goes on: nothing that was not read back is claimed.
#[test]
fn what_a_failed_run_did_not_read_back_is_not_claimed() {
    let scenario = Scenario { verify: true, map: true, ..Scenario::plain(23) };
    for corrupt in (0..150).step_by(2) {
        for fail in (corrupt + 1..170).step_by(2) {
            let world = scenario.world();
            let before = Before::of(&world);
            let mut faults = FaultPlan::single(corrupt, Fault::Corrupt);
            faults.exact.insert(fail, Fault::Errno(Errno::EIO));
            let first = run(&scenario, &world, faults, Script::default());
            check(&scenario, &world, &before, first.result()).unwrap();
            if matches!(first.result().outcome, Outcome::Complete) {
                continue;
            }
            let second = run(&scenario, &world, FaultPlan::default(), Script::default());
            check(&scenario, &world, &before, second.result())
                .unwrap_or_else(|wrong| panic!("{wrong}: corrupt at {corrupt}, failed at {fail}"));
        }
    }
}

/// One sector that cannot be read back costs its cluster, not the run that it was read in.
#[test]
fn a_run_that_cannot_be_read_back_is_taken_apart() {
    let mut skipped_alone = 0;
    for operation in 0..150 {
        let scenario = Scenario {
            verify: true,
            source_policy: ErrorPolicy::Report,
            target_policy: ErrorPolicy::Report,
            ..Scenario::plain(25)
        };
        let world = scenario.world();
        let before = Before::of(&world);
        let run =
            run(&scenario, &world, FaultPlan::single(operation, Fault::Errno(Errno::EIO)), Script::default());
        check(&scenario, &world, &before, run.result()).unwrap();
        // A single passing error of a run is survived even under `report`: its clusters are read alone.
        skipped_alone += usize::from(matches!(run.result().outcome, Outcome::Complete));
    }
    assert!(skipped_alone > 100, "{skipped_alone} of 150 single errors were survived");
}

/// A blank device is read back window by window too, although nothing was written to it; a file shows its holes.
#[test]
fn what_has_to_be_read_back_is_bounded_although_it_is_holes() {
    let scenario = Scenario {
        length: 600 * 8192,
        opaque: true,
        verify: true,
        checkpoint_interval: Duration::from_secs(3600),
        ..Scenario::plain(27)
    };
    let world = scenario.world();
    world.borrow_mut().disk(0).punch(0..scenario.length / 4096);
    let before = Before::of(&world);
    let opaque = run(&scenario, &world, FaultPlan::default(), Script::default());
    assert!(matches!(opaque.result().outcome, Outcome::Complete));
    check(&scenario, &world, &before, opaque.result()).unwrap();
    assert_eq!(opaque.result().progress.verified, scenario.length);
    let shown = Scenario { opaque: false, ..scenario };
    let world = shown.world();
    world.borrow_mut().disk(0).punch(0..shown.length / 4096);
    let shown = run(&shown, &world, FaultPlan::default(), Script::default());
    assert!(matches!(shown.result().outcome, Outcome::Complete));
    assert!(shown.operations < 10, "{} operations for one hole", shown.operations);
}

/// A target that is wrong all over: the first word of it ends the copy, if it is to.
#[test]
fn one_mismatch_is_enough_to_fail() {
    let scenario = Scenario {
        checkpoint_bytes: 1 << 30,
        checkpoint_interval: Duration::from_secs(3600),
        most_mismatches: usize::MAX,
        ..stained(ErrorPolicy::Report)
    };
    let world = scenario.world();
    let before = Before::of(&world);
    let run = run(&scenario, &world, FaultPlan::default(), Script::default());
    check(&scenario, &world, &before, run.result()).unwrap();
    assert!(matches!(run.result().outcome, Outcome::Failed(_)));
    let read_back = run.result().progress.verified;
    let in_flight = u64::from(scenario.slots) * scenario.cluster;
    assert!(read_back <= in_flight, "{read_back} bytes were compared, {in_flight} may have been under way");
}

/// A target that is wrong all over, and a copy that goes on all the same: what is remembered of it is bounded, and the rest of the window is
/// swept again instead of being tried again cluster by cluster.
#[test]
fn a_window_that_is_wrong_all_over_is_given_up() {
    for (most_mismatches, fewest, most) in [(4, 1, 20), (usize::MAX, 21, 80)] {
        let scenario =
            Scenario { checkpoint_bytes: 1 << 30, most_mismatches, ..stained(ErrorPolicy::Ignore) };
        let world = scenario.world();
        let before = Before::of(&world);
        let run = run(&scenario, &world, FaultPlan::default(), Script::default());
        check(&scenario, &world, &before, run.result()).unwrap();
        assert!(matches!(run.result().outcome, Outcome::Complete));
        let alone = run.result().progress.retries;
        assert!(
            (fewest..=most).contains(&alone),
            "{alone} retries after at most {most_mismatches} mismatches"
        );
    }
}

/// Whoever cancels does not wait until everything is read back; what was compared so far is claimed.
#[test]
fn a_cancel_does_not_read_back_the_rest() {
    for (map, buffered) in [(false, false), (true, false), (true, true)] {
        let scenario = Scenario {
            verify: true,
            map,
            buffered,
            checkpoint_bytes: 1 << 30,
            checkpoint_interval: Duration::from_secs(3600),
            ..Scenario::plain(29)
        };
        let uncancelled = run(&scenario, &scenario.world(), FaultPlan::default(), Script::default());
        let mut kept = 0;
        for cancel_at in 0..uncancelled.turns {
            let world = scenario.world();
            let before = Before::of(&world);
            let script = Script { cancel_at: Some(cancel_at), ..Script::default() };
            let first = run(&scenario, &world, FaultPlan::default(), script);
            check(&scenario, &world, &before, first.result()).unwrap();
            // The checksums of what is in flight, the questions under way, the map.
            let few = 2 * u64::from(scenario.slots);
            assert!(first.after_cancel <= few, "{} more after a cancel at {cancel_at}", first.after_cancel);
            if map && matches!(first.result().outcome, Outcome::Cancelled) {
                let second = run(&scenario, &world, FaultPlan::default(), Script::default());
                assert!(matches!(second.result().outcome, Outcome::Complete));
                check(&scenario, &world, &before, second.result()).unwrap();
                kept += u64::from(second.result().progress.resumed > 0);
            }
        }
        assert!(!map || kept > 5, "what was compared before a cancel was claimed {kept} times");
    }
}

/// What is found wrong while a copy ends for another reason is told.
#[test]
fn a_mismatch_that_is_found_after_a_cancel_is_told() {
    let mut told = 0;
    for corrupt in (0..150).step_by(3) {
        for cancel_at in (10..200).step_by(2) {
            let scenario = Scenario { verify: true, map: true, ..Scenario::plain(33) };
            let world = scenario.world();
            let script = Script { cancel_at: Some(cancel_at), ..Script::default() };
            let run = run(&scenario, &world, FaultPlan::single(corrupt, Fault::Corrupt), script);
            let result = run.result();
            let noticed = result.notices.iter().filter(|notice| notice.contains("differs")).count();
            match &result.outcome {
                Outcome::Cancelled => told += noticed,
                _ => assert_eq!(noticed, 0, "it is the error: {result:?}"),
            }
        }
    }
    assert!(told > 0, "no cancel came between a mismatch and its end");
}

/// A write-back that fails before everything is read back is tried again a bounded number of times, however often the flush
/// before it succeeds.
#[test]
fn a_page_cache_that_can_never_be_written_back_ends_the_copy() {
    let scenario = Scenario {
        length: 6 * 8192,
        verify: true,
        buffered: true,
        target_policy: ErrorPolicy::Ignore,
        ..Scenario::plain(35)
    };
    let rates = Rates { drop_cache: 1024, ..Rates::default() };
    let faults = FaultPlan { rates, ..FaultPlan::default() };
    let run = run(&scenario, &scenario.world(), faults, Script::default());
    let Outcome::Failed(error) = &run.result().outcome else { panic!("{:?}", run.result()) };
    assert_eq!(error.operation(), Operation::Flush);
}

/// What is read back counts against the speed limit, also while the job is being paused.
#[test]
fn the_speed_limit_holds_for_what_is_read_back() {
    let scenario = Scenario { verify: true, speed: Some(1 << 20), ..Scenario::plain(37) };
    for fidget in [None, Some(1), Some(2)] {
        let script = Script { fidget, ..Script::default() };
        let world = scenario.world();
        let before = Before::of(&world);
        let run = run(&scenario, &world, FaultPlan::default(), script);
        check(&scenario, &world, &before, run.result()).unwrap();
        assert!(matches!(run.result().outcome, Outcome::Complete));
        if fidget.is_none() {
            let progress = &run.result().progress;
            // Each byte is read twice; where there are holes, nothing is.
            let least = Duration::from_secs_f64((2 * progress.copied) as f64 / f64::from(1 << 20) - 0.11);
            assert!(run.result().elapsed >= least, "{:?} instead of {least:?}", run.result().elapsed);
        }
    }
}
