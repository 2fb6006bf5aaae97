//! Bugs put in on purpose: each is caught by the seeds that pass without it.
//!
//! Caught is what the oracle tells, in words that fit the bug. A run that an assertion of the product ends proves nothing about the oracle, and is
//! passed over.

use std::time::Duration;

use engine::copier::plan::PlantedBug;
use engine::copy::SyncMode;

use crate::run::run;
use crate::scenario::{Layers, Path, Scenario};

/// Those that `seeded` runs by default.
const SEEDS: u64 = 1000;

/// What was changed by a guest was not copied before.
const NOT_COPIED: [&str; 3] =
    ["is changed before it is on target", "has changed and is not on the target", "was at t0"];

/// One of the first runs of `scenario` tells of `bug` in one of the words `telling`.
#[track_caller]
fn expect_caught_in(bug: PlantedBug, scenario: impl Fn(u64) -> Scenario, telling: &[&str]) {
    let mut panicked = 0;
    let caught = (0..SEEDS).find_map(|seed| {
        let scenario = Scenario { planted: Some(bug), ..scenario(seed) };
        let Ok(ended) = std::panic::catch_unwind(|| run(&scenario)) else {
            panicked += 1;
            return None;
        };
        let wrong = ended.err()?;
        let told = wrong.lines().next().unwrap_or_default().to_owned();
        telling.iter().any(|telling| told.contains(telling)).then_some((seed, told))
    });
    let Some((seed, told)) = caught else { panic!("{bug:?} was not caught, {panicked} runs panicked") };
    run(&scenario(seed)).unwrap_or_else(|wrong| panic!("without {bug:?}: {wrong}"));
    println!("{bug:?} is caught by seed {seed} ({panicked} have panicked before): {told}");
}

#[track_caller]
fn expect_caught(bug: PlantedBug, telling: &[&str]) {
    expect_caught_in(bug, Scenario::random, telling);
}

/// The same where all guests write by themselves, and where the engine carries all that they do.
#[track_caller]
fn expect_caught_on_both_paths(bug: PlantedBug, telling: &[&str]) {
    for path in [Path::Own, Path::Carried] {
        let random = |seed| {
            let mut scenario = Scenario::random(seed);
            scenario.disks.iter_mut().for_each(|disk| disk.path = path);
            scenario
        };
        expect_caught_in(bug, random, telling);
    }
}

#[test]
fn an_allocation_asked_after_the_guests_write() {
    // Little is allocated at t0, and what is allocated later is no part of the copy.
    let empty = |seed| {
        let mut scenario = Scenario::plain(seed, Path::Both);
        scenario.disks[0].layers = Layers::Empty;
        scenario.starts[0].at = Duration::ZERO;
        scenario.starts[0].jobs[0].sync = SyncMode::Top;
        scenario
    };
    expect_caught_in(PlantedBug::AllocationAskedLate, empty, &["not in the top layer"]);
    expect_caught(PlantedBug::AllocationAskedLate, &NOT_COPIED);
}

#[test]
fn a_cluster_done_before_it_is_written() {
    expect_caught(PlantedBug::DoneBeforeWrite, &NOT_COPIED);
}

#[test]
fn a_guest_that_is_not_woken() {
    expect_caught(PlantedBug::WakeUpLost, &["hangs in", "a guest has waited for", "never ends"]);
}

#[test]
fn a_last_cluster_that_is_not_copied_first() {
    expect_caught_on_both_paths(PlantedBug::TailForgotten, &NOT_COPIED);
}

#[test]
fn a_discard_that_is_not_copied_first() {
    expect_caught(PlantedBug::DiscardNotCopied, &NOT_COPIED[1..]);
}

#[test]
fn a_discard_put_off_that_comes_after_a_write() {
    expect_caught(PlantedBug::DiscardNotForgotten, &["may be ["]);
}

#[test]
fn t0_taken_with_a_permit_out() {
    expect_caught(PlantedBug::PermitOutAtT0, &NOT_COPIED);
}

#[test]
fn a_permit_without_a_second_look_at_the_jobs() {
    expect_caught_on_both_paths(PlantedBug::NoSecondLook, &NOT_COPIED);
}

#[test]
fn a_short_write_taken_as_whole() {
    expect_caught(PlantedBug::ShortWriteIsWhole, &NOT_COPIED);
}

#[test]
fn a_failed_write_taken_as_done() {
    expect_caught(PlantedBug::FailedWriteIsDone, &NOT_COPIED);
}

#[test]
fn a_slot_of_the_fleece_file_that_is_free_before_a_flush() {
    let telling = ["has left the fleece file and is not on the medium"];
    expect_caught(PlantedBug::FleeceFreedBeforeFlush, &telling);
}

#[test]
fn a_failed_flush_that_is_tried_again_and_believed() {
    expect_caught(PlantedBug::FlushRetriedAndBelieved, &["the target's medium is"]);
    let of_changes = |seed| {
        let mut scenario = Scenario::random(seed);
        for job in scenario.starts.iter_mut().flat_map(|start| &mut start.jobs) {
            job.sync = SyncMode::None;
            job.cancel_at = job.cancel_at.or(Some(Duration::from_millis(50)));
        }
        scenario
    };
    expect_caught_in(
        PlantedBug::FlushRetriedAndBelieved,
        of_changes,
        &["was cancelled, and is not on the medium"],
    );
}
