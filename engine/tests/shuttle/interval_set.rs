//! The interval set and its table of waiters: a sweep and several guests over several words, copies that fail, waiters who
//! change their minds, and a set that is closed under all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use engine::interval_set::{Cancellation, Claim, Found, IntervalSet, Registration, Ticket, Waited, Waiter};
use engine::units::{ClusterCount, ClusterIndex, ClusterRange};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;

use crate::check;

/// Four words, in two shards of the table.
const CLUSTERS: u64 = 128;
/// Copies that may fail in a run.
const FAILURES: u32 = 12;

/// What is done to the set, and how often.
struct Copies {
    set: IntervalSet,
    held: Vec<AtomicBool>,
    made: Vec<AtomicU32>,
    failures: AtomicU32,
}

fn index(cluster: ClusterIndex) -> usize {
    usize::try_from(cluster.0).unwrap()
}

impl Copies {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            set: IntervalSet::new(ClusterCount(CLUSTERS)).unwrap(),
            held: (0..CLUSTERS).map(|_| AtomicBool::new(false)).collect(),
            made: (0..CLUSTERS).map(|_| AtomicU32::new(0)).collect(),
            failures: AtomicU32::new(0),
        })
    }

    /// Copy the clusters of a claim, all at once or in two parts, each of which may fail.
    fn copy(&self, mut claim: Claim) {
        for cluster in claim.range().iter() {
            assert!(!self.held[index(cluster)].swap(true, Ordering::Relaxed), "two claims on {cluster:?}");
        }
        thread::yield_now();
        let range = claim.range();
        if range.count() > 1 && thread_rng().gen_bool(0.5) {
            let at = thread_rng().gen_range(range.start.0 + 1..range.end.0);
            let rest = claim.split_off(ClusterIndex(at));
            self.end(rest);
            thread::yield_now();
        }
        self.end(claim);
    }

    fn end(&self, claim: Claim) {
        let range = claim.range();
        for cluster in range.iter() {
            assert!(self.held[index(cluster)].swap(false, Ordering::Relaxed), "{cluster:?} is held");
        }
        let fails = thread_rng().gen_bool(0.25) && self.failures.load(Ordering::Relaxed) < FAILURES;
        if fails {
            self.failures.fetch_add(1, Ordering::Relaxed);
            return self.set.release(claim);
        }
        for cluster in range.iter() {
            assert_eq!(
                self.made[index(cluster)].fetch_add(1, Ordering::Relaxed),
                0,
                "{cluster:?} is copied once"
            );
        }
        self.set.complete(claim);
    }

    /// Whatever is free, in order, and nothing that is not.
    fn sweep(&self) {
        let mut at = 0;
        while at < CLUSTERS {
            let max = ClusterCount(thread_rng().gen_range(1..40));
            let Some(claim) = self.set.claim_first(ClusterRange::new(at, CLUSTERS), max) else { return };
            at = claim.range().end.0;
            self.copy(claim);
        }
    }

    /// Until all of `range` is done; `false`: the set was closed.
    fn copy_before_write(&self, range: ClusterRange) -> bool {
        while !self.set.is_done(range) {
            let (mut claims, mut busy) = (Vec::new(), Vec::new());
            self.set.claim_free(range, &mut |found| match found {
                Found::Claimed(claim) => claims.push(claim),
                Found::Busy(range) => busy.push(range),
            });
            claims.into_iter().for_each(|claim| self.copy(claim));
            // The first one alone, as the copier does, or all in turn.
            let all = thread_rng().gen_bool(0.5);
            let busy = busy.iter().flat_map(|range| range.iter()).take(if all { usize::MAX } else { 1 });
            for cluster in busy {
                if self.set.wait_blocking(cluster, None, || ()) == Waited::Closed {
                    return false;
                }
            }
        }
        for cluster in range.iter() {
            assert_eq!(self.made[index(cluster)].load(Ordering::Relaxed), 1, "done means copied");
        }
        true
    }
}

/// A waiter who is called, and how often.
struct Call {
    ticket: Option<Ticket>,
    called: Arc<AtomicU32>,
}

/// Waits for clusters by callbacks, and gives some of the waits up.
fn impatient(copies: &Copies) -> Vec<(Call, Option<Cancellation>)> {
    let mut calls = Vec::new();
    for _ in 0..6 {
        let cluster = ClusterIndex(thread_rng().gen_range(0..CLUSTERS));
        let called = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&called);
        let waiter = Waiter::callback(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        match copies.set.wait_for(cluster, waiter) {
            Registration::Registered { ticket, .. } => calls.push(Call { ticket: Some(ticket), called }),
            Registration::AlreadyReleased(_) | Registration::Closed(_) => {
                assert_eq!(called.load(Ordering::Relaxed), 0, "who is not taken in is not called");
            }
        }
        thread::yield_now();
    }
    calls
        .into_iter()
        .map(|mut call| {
            let gives_up = thread_rng().gen_bool(0.6);
            let cancelled = call.ticket.take().filter(|_| gives_up).map(|ticket| copies.set.cancel(ticket));
            (call, cancelled)
        })
        .collect()
}

/// Nobody is called twice, nobody who has gone, and everybody else.
fn check_calls(calls: Vec<(Call, Option<Cancellation>)>) {
    for (call, cancelled) in calls {
        let expected = u32::from(cancelled != Some(Cancellation::Removed));
        assert_eq!(call.called.load(Ordering::Relaxed), expected, "{cancelled:?}");
    }
}

/// A sweep, guests that write where they overlap over several words, and impatient ones; `closes`: the set is closed meanwhile.
fn case(closes: bool) {
    let copies = Copies::new();
    let spawn = |work: fn(&Copies)| {
        let copies = Arc::clone(&copies);
        thread::spawn(move || work(&copies))
    };
    let guest = |copies: &Copies| {
        for _ in 0..2 {
            let start = thread_rng().gen_range(0..CLUSTERS - 1);
            let end = CLUSTERS.min(start + thread_rng().gen_range(1..70));
            if !copies.copy_before_write(ClusterRange::new(start, end)) {
                return;
            }
        }
    };
    let workers: Vec<_> = [Copies::sweep, guest, guest, guest].into_iter().map(spawn).collect();
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let copies = Arc::clone(&copies);
            thread::spawn(move || impatient(&copies))
        })
        .collect();
    if closes {
        copies.set.close();
    }
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    let calls: Vec<_> = waiting.into_iter().flat_map(|waiting| waiting.join().unwrap()).collect();
    while !copies.set.is_done(copies.set.all()) {
        copies.sweep();
    }
    assert!(!copies.set.has_waiters(copies.set.all()));
    check_calls(calls);
    assert!(copies.made.iter().all(|made| made.load(Ordering::Relaxed) == 1));
}

#[test]
fn each_cluster_is_copied_once_and_everybody_is_woken() {
    check(8000, || case(false));
}

#[test]
fn a_set_that_is_closed_lets_everybody_go() {
    check(4000, || case(true));
}
