//! One fault, cancel or crash at every single point of a copy.

use engine::copy::{ErrorPolicy, SyncMode};
use engine::job::Outcome;
use engine::ring::sim::{Fault, FaultPlan};
use nix::errno::Errno;

use crate::oracle::{Before, check};
use crate::run::{End, Script, run};
use crate::scenario::Scenario;

/// Scenarios that together reach every part of the copier.
fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for target_is_zero in [true, false] {
        for (verify, map) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut scenario = Scenario::plain(11);
            scenario.target_is_zero = target_is_zero;
            scenario.target.fixed_length = !target_is_zero;
            scenario.verify = verify;
            scenario.map = map;
            all.push(scenario);
        }
    }
    for verify in [true, false] {
        all.push(Scenario { buffered: true, map: true, verify, ..Scenario::plain(12) });
    }
    all.push(Scenario { sync: SyncMode::Top, map: true, ..Scenario::plain(13) });
    all
}

const FAULTS: [Fault; 7] = [
    Fault::Short,
    Fault::Errno(Errno::EIO),
    Fault::Errno(Errno::ENOSPC),
    Fault::Errno(Errno::EAGAIN),
    Fault::Errno(Errno::EINTR),
    Fault::Errno(Errno::ECANCELED),
    Fault::Errno(Errno::EOPNOTSUPP),
];

// One test for each policy, which run side by side.

#[test]
fn every_single_fault_at_every_operation_reported() {
    every_single_fault_at_every_operation(ErrorPolicy::Report);
}

#[test]
fn every_single_fault_at_every_operation_stopped_at() {
    every_single_fault_at_every_operation(ErrorPolicy::Stop);
}

#[test]
fn every_single_fault_at_every_operation_ignored() {
    every_single_fault_at_every_operation(ErrorPolicy::Ignore);
}

fn every_single_fault_at_every_operation(policy: ErrorPolicy) {
    for scenario in scenarios() {
        let operations = {
            let world = scenario.world();
            run(&scenario, &world, FaultPlan::default(), Script::default()).operations
        };
        assert!(operations > 50, "a copy of some substance");
        for operation in 0..operations {
            for fault in FAULTS {
                let mut scenario = scenario.clone();
                scenario.source_policy = policy;
                scenario.target_policy = policy;
                single_fault(&scenario, operation, fault);
            }
        }
    }
}

fn single_fault(scenario: &Scenario, operation: u64, fault: Fault) {
    let world = scenario.world();
    let before = Before::of(&world);
    let faults = FaultPlan::single(operation, fault);
    let first = run(scenario, &world, faults, Script::default());
    let context = || format!("{fault:?} at operation {operation} of {scenario:?}");
    check(scenario, &world, &before, first.result()).unwrap_or_else(|wrong| panic!("{wrong}: {}", context()));
    let outcome = &first.result().outcome;
    match scenario.source_policy {
        // One fault is survived: by a retry, or by the operator's resume.
        ErrorPolicy::Stop | ErrorPolicy::Ignore => {
            assert!(matches!(outcome, Outcome::Complete), "{outcome:?} after {}", context());
        }
        _ => assert!(
            matches!(outcome, Outcome::Complete | Outcome::Failed(_)),
            "{outcome:?} after {}",
            context()
        ),
    }
    if scenario.map && !matches!(outcome, Outcome::Complete) {
        let second = run(scenario, &world, FaultPlan::default(), Script::default());
        assert!(matches!(second.result().outcome, Outcome::Complete), "resumed after {}", context());
        check(scenario, &world, &before, second.result())
            .unwrap_or_else(|wrong| panic!("{wrong}: {}", context()));
    }
}

#[test]
fn a_cancel_at_every_point() {
    for scenario in scenarios() {
        let turns = {
            let world = scenario.world();
            run(&scenario, &world, FaultPlan::default(), Script::default()).turns
        };
        for cancel_at in 0..turns {
            let world = scenario.world();
            let before = Before::of(&world);
            let script = Script { cancel_at: Some(cancel_at), ..Script::default() };
            let first = run(&scenario, &world, FaultPlan::default(), script);
            let outcome = &first.result().outcome;
            check(&scenario, &world, &before, first.result()).unwrap();
            if matches!(outcome, Outcome::Complete) {
                assert!(
                    cancel_at + 10 > turns,
                    "too late only at the very end, not at turn {cancel_at} of {turns}"
                );
                continue;
            }
            assert!(matches!(outcome, Outcome::Cancelled), "cancelled at turn {cancel_at}: {outcome:?}");
            if scenario.map {
                let second = run(&scenario, &world, FaultPlan::default(), Script::default());
                assert!(
                    matches!(second.result().outcome, Outcome::Complete),
                    "resumed after a cancel at {cancel_at}"
                );
                check(&scenario, &world, &before, second.result()).unwrap();
                let (called_done, resumed) = (first.result().progress.done, second.result().progress.resumed);
                assert_eq!(called_done, resumed, "what a cancelled copy calls done is on its map");
                let again = first.written + second.written;
                // What was not read back by then is copied again: the window that was being compared, and the one being filled.
                let window = scenario.checkpoint_bytes + u64::from(scenario.slots) * scenario.cluster;
                let unverified = if scenario.verify { 2 * window } else { 0 };
                assert!(
                    again <= scenario.length + unverified,
                    "cancelled at {cancel_at} of {turns}: {} + {} bytes of {scenario:?}",
                    first.written,
                    second.written
                );
            }
        }
    }
}

#[test]
fn a_crash_at_every_point_then_a_resume() {
    for scenario in scenarios().into_iter().filter(|scenario| scenario.map) {
        let operations = {
            let world = scenario.world();
            run(&scenario, &world, FaultPlan::default(), Script::default()).operations
        };
        for crash_at in 1..operations {
            for seed in 0..8 {
                let scenario = Scenario { seed: scenario.seed + seed, ..scenario.clone() };
                let world = scenario.world();
                let before = Before::of(&world);
                let script = Script { crash_at: Some(crash_at), ..Script::default() };
                if let End::Over(_) = run(&scenario, &world, FaultPlan::default(), script).end {
                    continue;
                }
                let second = run(&scenario, &world, FaultPlan::default(), Script::default());
                assert!(
                    matches!(second.result().outcome, Outcome::Complete),
                    "resumed after a crash at {crash_at}"
                );
                check(&scenario, &world, &before, second.result()).unwrap_or_else(|wrong| {
                    panic!("{wrong} after a crash at operation {crash_at} of {scenario:?}")
                });
            }
        }
    }
}
