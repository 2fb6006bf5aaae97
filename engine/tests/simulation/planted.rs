//! Bugs put in on purpose: each is caught by the same runs that pass without it.

use engine::copier::plan::PlantedBug;
use engine::copy::ErrorPolicy;
use engine::job::Outcome;
use engine::ring::sim::{Fault, FaultPlan};
use nix::errno::Errno;

use crate::oracle::{Before, check};
use crate::run::{Script, run};
use crate::scenario::Scenario;

/// Runs under `bug` until one is caught; gives how many there were.
fn caught(
    bug: Option<PlantedBug>,
    runs: impl Iterator<Item = (Scenario, FaultPlan, Script)>,
) -> Option<usize> {
    for (number, (mut scenario, faults, script)) in runs.enumerate() {
        scenario.planted = bug;
        let outcome = std::panic::catch_unwind(|| {
            let world = scenario.world();
            let before = Before::of(&world);
            let first = run(&scenario, &world, faults, script);
            if script.crash_at.is_none() {
                check(&scenario, &world, &before, first.result())?;
                if matches!(first.result().outcome, Outcome::Complete) {
                    return Ok(());
                }
            }
            if scenario.map {
                let second = run(&scenario, &world, FaultPlan::default(), Script::default());
                check(&scenario, &world, &before, second.result())?;
            }
            Ok::<(), String>(())
        });
        if !matches!(outcome, Ok(Ok(()))) {
            return Some(number);
        }
    }
    None
}

fn expect_caught(bug: PlantedBug, runs: impl Iterator<Item = (Scenario, FaultPlan, Script)> + Clone) {
    assert_eq!(caught(None, runs.clone()), None, "the runs pass without the bug");
    assert!(caught(Some(bug), runs).is_some(), "{bug:?} was not caught");
}

fn with_map(seed: u64) -> Scenario {
    Scenario { map: true, ..Scenario::plain(seed) }
}

fn faults_at_every_operation(fault: Fault) -> impl Iterator<Item = (Scenario, FaultPlan, Script)> + Clone {
    (0..150)
        .map(move |operation| (Scenario::plain(3), FaultPlan::single(operation, fault), Script::default()))
}

fn crashes() -> impl Iterator<Item = (Scenario, FaultPlan, Script)> + Clone {
    (1..150).flat_map(|at| (0..6).map(move |seed| (at, seed))).map(|(at, seed)| {
        (with_map(seed), FaultPlan::default(), Script { crash_at: Some(at), ..Script::default() })
    })
}

#[test]
fn a_short_write_taken_as_whole() {
    expect_caught(PlantedBug::ShortWriteIsWhole, faults_at_every_operation(Fault::Short));
}

#[test]
fn a_failed_write_taken_as_done() {
    expect_caught(PlantedBug::FailedWriteIsDone, faults_at_every_operation(Fault::Errno(Errno::EIO)));
}

#[test]
fn the_map_written_before_the_flush() {
    expect_caught(PlantedBug::MapBeforeFlush, crashes());
}

#[test]
fn the_done_set_captured_after_the_flush_was_submitted() {
    expect_caught(PlantedBug::CaptureAfterFlush, crashes());
}

#[test]
fn a_failed_flush_retried_and_believed() {
    let runs = (0..150).flat_map(|operation| {
        (0..4).map(move |seed| {
            let scenario = Scenario {
                source_policy: ErrorPolicy::Ignore,
                target_policy: ErrorPolicy::Ignore,
                ..with_map(seed)
            };
            (scenario, FaultPlan::single(operation, Fault::Errno(Errno::EIO)), Script::default())
        })
    });
    expect_caught(PlantedBug::FlushRetriedAndBelieved, runs);
}

#[test]
fn a_verification_that_does_not_compare() {
    // Silent corruption: only a verification can see it, so the runs without the bug must say so too.
    let corrupt = |bug| {
        let mut complete_but_wrong = 0;
        let mut told = 0;
        for operation in 0..150 {
            let scenario = Scenario { verify: true, planted: bug, ..Scenario::plain(5) };
            let world = scenario.world();
            let before = Before::of(&world);
            let run = run(&scenario, &world, FaultPlan::single(operation, Fault::Corrupt), Script::default());
            match &run.result().outcome {
                Outcome::Failed(_) => told += 1,
                _ if check(&scenario, &world, &before, run.result()).is_err() => complete_but_wrong += 1,
                _ => {}
            }
        }
        (told, complete_but_wrong)
    };
    let (told, wrong) = corrupt(None);
    assert!(told > 0 && wrong == 0, "corruption is told: {told}, believed: {wrong}");
    let (_, wrong) = corrupt(Some(PlantedBug::VerifyBelieves));
    assert!(wrong > 0, "without comparing, corruption is believed");
}
