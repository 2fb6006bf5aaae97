//! Known bugs are put in, and must be found.

use engine::live::carrier::CarrierBug;

use crate::run::one_seed;

/// More seeds than it takes to find any of them.
const SEEDS: u64 = 1000;

/// Whether the runs that pass without `bug` find it, and say one of `words`.
fn finds(bug: CarrierBug, words: &[&str]) {
    let found = (0..SEEDS).find_map(|seed| one_seed(seed, Some(bug)).err().map(|wrong| (seed, wrong)));
    let (seed, wrong) = found.unwrap_or_else(|| panic!("{bug:?} is not found in {SEEDS} seeds"));
    assert!(words.iter().any(|word| wrong.contains(word)), "seed {seed} finds something else: {wrong}");
}

#[test]
fn planted_permit_without_blocks() {
    finds(CarrierBug::PermitWithoutBlocks, &["without a permit"]);
}

#[test]
fn planted_permit_dropped_early() {
    finds(CarrierBug::PermitDroppedEarly, &["without a permit", "in flight"]);
}

#[test]
fn planted_blocks_not_locked() {
    finds(CarrierBug::BlocksNotLocked, &["may be"]);
}

#[test]
fn planted_discard_not_locked() {
    finds(CarrierBug::DiscardNotLocked, &["may be"]);
}

#[test]
fn planted_discard_after_write() {
    finds(CarrierBug::DiscardAfterWrite, &["may be"]);
}

#[test]
fn planted_failed_write_is_done() {
    finds(CarrierBug::FailedWriteIsDone, &["may be"]);
}

#[test]
fn planted_blocks_not_read() {
    finds(CarrierBug::BlocksNotRead, &["may be"]);
}

#[test]
fn planted_flush_believed_again() {
    finds(CarrierBug::FlushBelievedAgain, &["Flush: ", "may be"]);
}
