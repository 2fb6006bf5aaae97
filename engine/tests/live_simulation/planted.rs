//! Bugs put in on purpose: each is caught by the seeds that pass without it.

use std::time::Duration;

use engine::copier::plan::PlantedBug;
use engine::copy::SyncMode;

use crate::run::run;
use crate::scenario::{Layers, Path, Scenario};

/// Those that `seeded` runs by default.
const SEEDS: u64 = 1500;

fn expect_caught(bug: PlantedBug) {
    expect_caught_in(bug, Scenario::random, "");
}

/// By runs of `scenario`, one of which tells so of it.
fn expect_caught_in(bug: PlantedBug, scenario: impl Fn(u64) -> Scenario, telling: &str) {
    let caught = (0..SEEDS).find_map(|seed| {
        let scenario = Scenario { planted: Some(bug), ..scenario(seed) };
        match std::panic::catch_unwind(|| run(&scenario)) {
            Ok(Ok(_)) => None,
            Ok(Err(wrong)) => Some((seed, wrong)),
            Err(_) => Some((seed, "it panicked".to_owned())),
        }
        .filter(|(_, wrong)| wrong.contains(telling))
    });
    let (seed, wrong) = caught.unwrap_or_else(|| panic!("{bug:?} was not caught"));
    run(&scenario(seed)).unwrap_or_else(|wrong| panic!("without {bug:?}: {wrong}"));
    println!("{bug:?} is caught by seed {seed}: {}", wrong.lines().next().unwrap_or_default());
}

#[test]
fn an_allocation_asked_after_the_guests_write() {
    expect_caught(PlantedBug::AllocationAskedLate);
    // Little is allocated at t0, and what is allocated later is no part of the copy.
    let empty = |seed| {
        let mut scenario = Scenario::plain(seed, Path::Both);
        scenario.disks[0].layers = Layers::Empty;
        scenario.starts[0].at = Duration::ZERO;
        scenario.starts[0].jobs[0].sync = SyncMode::Top;
        scenario
    };
    expect_caught_in(PlantedBug::AllocationAskedLate, empty, "not in the top layer");
}

#[test]
fn a_cluster_done_before_it_is_written() {
    expect_caught(PlantedBug::DoneBeforeWrite);
}

#[test]
fn a_guest_that_is_not_woken() {
    expect_caught(PlantedBug::WakeUpLost);
}

#[test]
fn a_last_cluster_that_is_not_copied_first() {
    expect_caught(PlantedBug::TailForgotten);
}

#[test]
fn a_discard_that_is_not_copied_first() {
    expect_caught(PlantedBug::DiscardNotCopied);
}

#[test]
fn a_discard_put_off_that_comes_after_a_write() {
    expect_caught(PlantedBug::DiscardNotForgotten);
}

#[test]
fn t0_taken_with_a_permit_out() {
    expect_caught(PlantedBug::PermitOutAtT0);
}

#[test]
fn a_permit_without_a_second_look_at_the_jobs() {
    expect_caught(PlantedBug::NoSecondLook);
}

#[test]
fn a_short_write_taken_as_whole() {
    expect_caught(PlantedBug::ShortWriteIsWhole);
}

#[test]
fn a_failed_write_taken_as_done() {
    expect_caught(PlantedBug::FailedWriteIsDone);
}
