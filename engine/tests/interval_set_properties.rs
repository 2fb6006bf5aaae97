//! The interval set against the naive oracle, and the oracle against planted bugs.

mod interval_set_oracle;

use std::cell::Cell;

use engine::interval_set::{Claim, ClusterState, Found, IntervalSet, Registration, Waiter};
use engine::units::{ClusterCount, ClusterIndex, ClusterRange};
use interval_set_oracle::{MAX_CLUSTERS, Raw, Subject, drive};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};

/// Sizes at and around the borders of words, and any others.
fn clusters() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(31),
        Just(32),
        Just(33),
        Just(64),
        Just(65),
        Just(MAX_CLUSTERS),
        0..=MAX_CLUSTERS
    ]
}

fn steps() -> impl Strategy<Value = Vec<Raw>> {
    let step = (any::<u8>(), any::<u16>(), any::<u16>()).prop_map(|(kind, a, b)| Raw { kind, a, b });
    prop::collection::vec(step, 0..120)
}

fn set_of(clusters: u64) -> IntervalSet {
    IntervalSet::new(ClusterCount(clusters)).unwrap()
}

/// Drives what `make` makes with random steps; what the oracle says of the smallest failure, if there is one.
fn check<S: Subject>(cases: u32, make: impl Fn(u64) -> S) -> Result<(), String> {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&(clusters(), steps()), |(clusters, steps)| {
        drive(&make(clusters), steps).map_err(TestCaseError::fail)
    });
    match outcome {
        Ok(()) => Ok(()),
        Err(TestError::Fail(reason, (clusters, steps))) => {
            Err(format!("{reason}\nof {clusters} clusters, {steps:?}"))
        }
        Err(abort @ TestError::Abort(_)) => panic!("{abort}"),
    }
}

#[test]
fn does_what_the_oracle_does() {
    check(3000, set_of).unwrap();
}

/// Two sets that do not know of each other: now and then a claim comes from the wrong one.
struct SplitBrain {
    set: IntervalSet,
    other: IntervalSet,
    calls: Cell<u32>,
}

impl Subject for SplitBrain {
    fn set(&self) -> &IntervalSet {
        &self.set
    }

    fn claim_first(&self, within: ClusterRange, max: ClusterCount) -> Option<Claim> {
        self.calls.set(self.calls.get() + 1);
        if self.calls.get().is_multiple_of(4) { &self.other } else { &self.set }.claim_first(within, max)
    }
}

#[test]
fn the_oracle_catches_a_double_claim() {
    let make = |clusters| SplitBrain { set: set_of(clusters), other: set_of(clusters), calls: Cell::new(0) };
    let error = check(3000, make).unwrap_err();
    // Of the two that it knows of it, the one that a random case meets first.
    assert!(
        error.contains("double claim") || error.contains("the set says ToCopy, the oracle Copying"),
        "{error}"
    );
}

/// Forgets every third waiter.
struct Forgetful {
    set: IntervalSet,
    calls: Cell<u32>,
}

impl Subject for Forgetful {
    fn set(&self) -> &IntervalSet {
        &self.set
    }

    fn wait_for(&self, cluster: ClusterIndex, waiter: Waiter) -> Registration {
        self.calls.set(self.calls.get() + 1);
        let forgotten = self.calls.get().is_multiple_of(3);
        self.set.wait_for(cluster, if forgotten { Waiter::callback(|| ()) } else { waiter })
    }
}

#[test]
fn the_oracle_catches_a_lost_wake_up() {
    let error = check(3000, |clusters| Forgetful { set: set_of(clusters), calls: Cell::new(0) }).unwrap_err();
    assert!(error.contains("woken"), "{error}");
}

/// Counts failed copies as done.
struct Optimist(IntervalSet);

impl Subject for Optimist {
    fn set(&self) -> &IntervalSet {
        &self.0
    }

    fn release(&self, claim: Claim) {
        self.0.complete(claim);
    }
}

#[test]
fn the_oracle_catches_a_failed_copy_that_counts() {
    let error = check(3000, |clusters| Optimist(set_of(clusters))).unwrap_err();
    assert!(error.contains("ToCopy"), "{error}");
}

#[test]
fn a_claim_dropped_is_a_bug_that_debug_builds_catch() {
    let set = set_of(4);
    let claim = set.claim_first(set.all(), ClusterCount(4)).unwrap();
    let dropped = std::panic::catch_unwind(move || drop(claim));
    assert_eq!(dropped.is_err(), cfg!(debug_assertions));
    assert_eq!(set.state(ClusterIndex(0)), ClusterState::Copying);
}

#[test]
fn a_claim_belongs_to_its_set() {
    let (one, other) = (set_of(4), set_of(4));
    let claim = one.claim_first(one.all(), ClusterCount(1)).unwrap();
    let foreign = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| other.complete(claim)));
    assert!(foreign.is_err());
    assert_eq!(other.state(ClusterIndex(0)), ClusterState::ToCopy);
}

#[test]
fn marking_done_what_is_being_copied_is_refused() {
    let set = set_of(40);
    let claim = set.claim_first(ClusterRange::new(35, 40), ClusterCount(1)).unwrap();
    let marked =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| set.mark_done(ClusterRange::new(32, 40))));
    assert!(marked.is_err());
    assert_eq!(set.count_done(), ClusterCount(0));
    set.release(claim);
    assert_eq!(set.mark_done(ClusterRange::new(30, 40)), ClusterCount(10));
    assert_eq!(set.mark_done(set.all()), ClusterCount(30));
    assert_eq!(set.reopen(ClusterRange::new(0, 33)), ClusterCount(33));
    assert_eq!(set.next_not_done(ClusterIndex(0)), Some(ClusterIndex(0)));
}

#[test]
fn ranges_beyond_the_set_are_refused() {
    let set = set_of(33);
    let beyond = ClusterRange::new(32, 34);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| set.is_done(beyond))).is_err());
    let mut found = |found: Found| panic!("{found:?}");
    let claim = std::panic::AssertUnwindSafe(|| set.claim_free(beyond, &mut found));
    assert!(std::panic::catch_unwind(claim).is_err());
    assert!(set.is_done(ClusterRange::new(33, 33)), "nothing is always done");
}

/// A 64 TiB disk in clusters of 64 KiB: the map is 256 MiB, of which two clusters far apart touch two pages.
#[test]
fn a_huge_disk_costs_what_is_touched() {
    let set = set_of(1 << 30);
    let before = resident();
    for at in [0, (1 << 30) - 1] {
        let claim = set.claim_first(ClusterRange::new(at, 1 << 30), ClusterCount(1)).unwrap();
        assert_eq!(claim.range(), ClusterRange::new(at, at + 1));
        set.complete(claim);
    }
    assert!(set.is_done(ClusterRange::new(0, 1)) && !set.is_done(ClusterRange::new(0, 2)));
    // Other tests of this process run meanwhile; huge pages or a map all touched would show far above this.
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes became resident");
    assert!(IntervalSet::new(ClusterCount(u64::MAX)).is_err(), "no address space holds it");
}

fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// One waiter that panics costs the others nothing.
#[test]
fn a_waiter_that_panics_does_not_take_the_others_along() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    let set = set_of(1);
    let claim = set.claim_first(set.all(), ClusterCount(1)).unwrap();
    let woken = Arc::new(AtomicU32::new(0));
    for which in 0..3 {
        let woken = Arc::clone(&woken);
        let waiter = Waiter::callback(move || {
            woken.fetch_add(1, Ordering::Relaxed);
            assert_ne!(which, 0, "the first one panics");
        });
        assert!(matches!(set.wait_for(ClusterIndex(0), waiter), Registration::Registered { .. }));
    }
    let completed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| set.complete(claim)));
    assert!(completed.is_err());
    assert_eq!(woken.load(Ordering::Relaxed), 3);
    assert!(set.is_done(set.all()));
}
