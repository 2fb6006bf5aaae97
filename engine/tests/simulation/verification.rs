//! What verification finds, and what becomes of it: the cases that random runs seldom meet.

use engine::copy::ErrorPolicy;
use engine::error::Operation;
use engine::job::Outcome;
use engine::ring::sim::{Fault, FaultPlan};
use engine::units::ByteRange;
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

/// A copy of a source with a bad sector, then one of the mended source that goes on and copies nothing twice. `false`: the first run
/// has not failed by its source, or its last checkpoint was lost.
fn failed_by_its_source(scenario: &Scenario, faults: FaultPlan, undisturbed: u64) -> bool {
    let world = scenario.world();
    let before = Before::of(&world);
    let first = run(scenario, &world, faults, Script::default());
    check(scenario, &world, &before, first.result()).unwrap();
    let by_source = match &first.result().outcome {
        Outcome::Failed(error) => error.operation() == Operation::Read,
        _ => false,
    };
    if !by_source || !first.result().notices.is_empty() {
        return false;
    }
    world.borrow_mut().disk(0).repair();
    let second = run(scenario, &world, FaultPlan::default(), Script::default());
    assert!(matches!(second.result().outcome, Outcome::Complete), "{:?}", second.result());
    check(scenario, &world, &before, second.result()).unwrap();
    assert_eq!(second.result().progress.resumed, first.result().progress.done, "{scenario:?}");
    // The neighbours of a bad sector in its run are tried alone, and written as a whole, holes in them and all.
    let most = undisturbed + u64::from(scenario.max_run - 1) * scenario.cluster;
    let (once, twice) = (first.written, second.written);
    assert!(once + twice <= most, "{once} + {twice} bytes, not {undisturbed}, of {scenario:?}");
    true
}

/// The source has failed, not what was copied of it: the last checkpoint is read back and claimed like any other.
#[test]
fn what_was_copied_before_the_source_failed_is_not_copied_again() {
    let fails = |max_run, bad: u64, buffered, faults| {
        let good = Scenario { verify: true, map: true, max_run, buffered, ..Scenario::plain(27) };
        let undisturbed = run(&good, &good.world(), FaultPlan::default(), Script::default()).written;
        let bad_source = vec![ByteRange::new(bad * 8192 + 512, 512)];
        failed_by_its_source(&Scenario { bad_source, ..good }, faults, undisturbed)
    };
    let each = (0..80).flat_map(|bad| [(bad, false), (bad, true)]);
    let failed = each.filter(|&(bad, buffered)| fails(3, bad, buffered, FaultPlan::default())).count();
    assert!(failed > 70, "{failed} of 160 runs have failed by their source");
    // A short result while it is read back is met like any other, too.
    let each = (0..200).map(|operation| FaultPlan::single(operation, Fault::Short));
    let failed = each.filter(|faults| fails(1, 29, false, faults.clone())).count();
    assert!(failed > 150, "{failed} of 200 runs have failed by their source");
}
