//! The interval set under loom: every interleaving, and every value that the memory model lets a load return, of cases
//! as small as show the point. Run with
//! `cargo test -p engine --features loom --test interval_set_loom`.
//!
//! Bookkeeping of the tests themselves (who copied what) is in standard atomics: they are no part of the model, and
//! loom, which runs one thread at a time, needs not branch on them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use engine::interval_set::{Cancellation, Claim, Found, IntervalSet, Registration, Waited, Waiter};
use engine::units::{ClusterCount, ClusterIndex, ClusterRange};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool as ModelBool, fence};
use loom::thread;

/// Two words; the cases play at their border.
const CLUSTERS: u64 = 64;
const BORDER: u64 = 32;

fn model(preemptions: Option<usize>, case: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(case);
}

fn set() -> Arc<IntervalSet> {
    Arc::new(IntervalSet::new(ClusterCount(CLUSTERS)).unwrap())
}

fn one(cluster: u64) -> ClusterRange {
    ClusterRange::new(cluster, cluster + 1)
}

fn claim_one(set: &IntervalSet, cluster: u64) -> Option<Claim> {
    set.claim_first(one(cluster), ClusterCount(1))
}

/// How often each cluster was claimed for a copy. All these copies succeed, so once is right and twice is a double
/// claim, at whatever time.
struct Copies(Vec<AtomicU32>);

impl Copies {
    fn new() -> Arc<Self> {
        Arc::new(Self((0..CLUSTERS).map(|_| AtomicU32::new(0)).collect()))
    }

    fn of(&self, cluster: ClusterIndex) -> &AtomicU32 {
        &self.0[usize::try_from(cluster.0).unwrap()]
    }

    fn copy(&self, set: &IntervalSet, claim: Claim) {
        for cluster in claim.range().iter() {
            assert_eq!(self.of(cluster).fetch_add(1, Ordering::Relaxed), 0, "double claim");
        }
        set.complete(claim);
    }

    /// A guest's copy-before-write: copy what is free, wait for the rest, until all is done.
    fn copy_before_write(&self, set: &IntervalSet, range: ClusterRange) {
        while !set.is_done(range) {
            let (mut claims, mut busy) = (Vec::new(), Vec::new());
            set.claim_free(range, &mut |found| match found {
                Found::Claimed(claim) => claims.push(claim),
                Found::Busy(range) => busy.push(range),
            });
            claims.into_iter().for_each(|claim| self.copy(set, claim));
            for cluster in busy.iter().flat_map(|range| range.iter()) {
                assert_eq!(set.wait_blocking(cluster, None, || ()), Waited::Released);
            }
        }
    }
}

/// That the models try both orders of a look and a release at all: it takes the wrapped atomics of the crate's `sync`,
/// since loom alone runs this one in a single order and finds every claim about the other one true.
#[test]
fn the_models_see_a_look_both_before_and_after_a_release() {
    static FOUND: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];
    model(None, || {
        let set = set();
        let claim = claim_one(&set, 0).unwrap();
        let holder = {
            let set = set.clone();
            thread::spawn(move || set.complete(claim))
        };
        FOUND[usize::from(set.is_done(one(0)))].fetch_add(1, Ordering::Relaxed);
        holder.join().unwrap();
    });
    let [before, after] = [0, 1].map(|done| FOUND[done].load(Ordering::Relaxed));
    assert!(before > 0 && after > 0, "{before} executions looked before the release, {after} after it");
}

#[test]
fn a_sweep_and_two_guests_over_two_words_copy_each_cluster_once() {
    model(Some(2), || {
        let (set, copies) = (set(), Copies::new());
        let guests: Vec<_> = [(BORDER - 1, BORDER + 1), (BORDER, BORDER + 1)]
            .map(|(start, end)| {
                let (set, copies) = (set.clone(), copies.clone());
                thread::spawn(move || copies.copy_before_write(&set, ClusterRange::new(start, end)))
            })
            .into_iter()
            .collect();
        let disk = ClusterRange::new(BORDER - 1, BORDER + 1);
        while let Some(claim) = set.claim_first(disk, ClusterCount(2)) {
            copies.copy(&set, claim);
        }
        guests.into_iter().for_each(|guest| guest.join().unwrap());
        assert!(set.is_done(disk));
        for cluster in disk.iter() {
            assert_eq!(copies.of(cluster).load(Ordering::Relaxed), 1, "{cluster:?}");
        }
    });
}

#[test]
fn no_wake_up_is_lost() {
    model(None, || {
        let set = set();
        let claim = claim_one(&set, 0).unwrap();
        let waiter = {
            let set = set.clone();
            thread::spawn(move || {
                assert_eq!(set.wait_blocking(ClusterIndex(0), None, || ()), Waited::Released);
                assert!(set.is_done(one(0)));
            })
        };
        set.complete(claim);
        waiter.join().unwrap();
    });
}

#[test]
fn two_waiters_on_one_cluster_are_both_woken_and_one_is_first() {
    model(Some(3), || {
        let set = set();
        let claim = claim_one(&set, 0).unwrap();
        let promoted = Arc::new(AtomicU32::new(0));
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let (set, promoted) = (set.clone(), promoted.clone());
                thread::spawn(move || {
                    let promote = || {
                        promoted.fetch_add(1, Ordering::Relaxed);
                    };
                    assert_eq!(set.wait_blocking(ClusterIndex(0), None, promote), Waited::Released);
                    assert!(set.is_done(one(0)));
                })
            })
            .collect();
        set.complete(claim);
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        assert!(promoted.load(Ordering::Relaxed) <= 1, "only one can be the first");
        assert!(!set.has_waiters(set.all()));
    });
}

/// Clusters of one claim in two words: each one's waiter is woken, whichever word is released first.
#[test]
fn waiters_on_both_words_of_a_claim_are_woken() {
    model(Some(2), || {
        let set = set();
        let claim = set.claim_first(ClusterRange::new(BORDER - 1, BORDER + 1), ClusterCount(2)).unwrap();
        let waiters: Vec<_> = [BORDER - 1, BORDER]
            .map(|cluster| {
                let set = set.clone();
                thread::spawn(move || {
                    assert_eq!(set.wait_blocking(ClusterIndex(cluster), None, || ()), Waited::Released);
                    assert!(set.is_done(one(cluster)));
                })
            })
            .into_iter()
            .collect();
        set.complete(claim);
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
    });
}

#[test]
fn a_waiter_whose_blocker_failed_copies_the_cluster_itself() {
    model(None, || {
        let (set, copies) = (set(), Copies::new());
        let claim = claim_one(&set, 0).unwrap();
        let guest = {
            let (set, copies) = (set.clone(), copies.clone());
            thread::spawn(move || copies.copy_before_write(&set, one(0)))
        };
        set.release(claim);
        guest.join().unwrap();
        assert!(set.is_done(one(0)));
        assert_eq!(copies.of(ClusterIndex(0)).load(Ordering::Relaxed), 1);
    });
}

/// Data that only claims protect. loom itself fails the model if two accesses race.
struct Data(UnsafeCell<u32>);

// SAFETY: the tests reach it only under a claim or after its cluster is done; that this suffices is what loom checks.
unsafe impl Sync for Data {}
// SAFETY: a number, at home in any thread.
unsafe impl Send for Data {}

impl Data {
    fn new() -> Arc<Self> {
        Arc::new(Self(UnsafeCell::new(0)))
    }

    fn add_one(&self) {
        // SAFETY: see `Sync`; loom panics on a race before the pointer is used.
        self.0.with_mut(|data| unsafe { *data += 1 });
    }

    fn get(&self) -> u32 {
        // SAFETY: as above.
        self.0.with(|data| unsafe { *data })
    }
}

/// The neighbours in the word change between `complete` and the look, by operations of weaker ordering.
#[test]
fn done_means_that_the_copy_is_visible() {
    model(Some(3), || {
        let (set, data) = (set(), Data::new());
        let holder = {
            let (set, data) = (set.clone(), data.clone());
            let claim = claim_one(&set, 0).unwrap();
            thread::spawn(move || {
                data.add_one();
                set.complete(claim);
            })
        };
        let neighbour = {
            let set = set.clone();
            thread::spawn(move || {
                let claim = claim_one(&set, 1).unwrap();
                set.release(claim);
            })
        };
        if set.is_done(one(0)) {
            assert_eq!(data.get(), 1);
        }
        if let Some(range) = set.done_ranges().next() {
            assert_eq!(range, one(0));
            assert_eq!(data.get(), 1);
        }
        holder.join().unwrap();
        neighbour.join().unwrap();
        assert_eq!(data.get(), 1);
    });
}

/// Two threads change the same data under claims, one after the other, whoever comes first.
#[test]
fn claims_exclude_each_other_and_hand_their_data_on() {
    model(None, || {
        let (set, data) = (set(), Data::new());
        let work = |set: &IntervalSet, data: &Data| {
            claim_one(set, 0).is_some_and(|claim| {
                data.add_one();
                set.release(claim);
                true
            })
        };
        let other = {
            let (set, data) = (set.clone(), data.clone());
            thread::spawn(move || work(&set, &data))
        };
        let mine = u32::from(work(&set, &data));
        let both = mine + u32::from(other.join().unwrap());
        assert!((1..=2).contains(&both), "one of them found it free");
        assert_eq!(data.get(), both);
    });
}

/// The next holder's waiter comes while the last holder is still busy waking: it must not be taken for one of his.
#[test]
fn a_waiter_is_not_woken_by_the_release_before() {
    model(None, || {
        let set = set();
        let claim = claim_one(&set, 0).unwrap();
        let early = set.wait_for(ClusterIndex(0), Waiter::callback(|| ()));
        assert!(matches!(early, Registration::Registered { first: true, .. }));
        let next = {
            let set = set.clone();
            thread::spawn(move || {
                let Some(claim) = claim_one(&set, 0) else { return };
                let woken = Arc::new(AtomicBool::new(false));
                let flag = woken.clone();
                let waiter = Waiter::callback(move || assert!(!flag.swap(true, Ordering::Relaxed), "twice"));
                let registration = set.wait_for(ClusterIndex(0), waiter);
                assert!(matches!(registration, Registration::Registered { first: true, .. }));
                thread::yield_now();
                assert!(!woken.load(Ordering::Relaxed), "woken before its cluster was released");
                set.complete(claim);
                assert!(woken.load(Ordering::Relaxed), "not woken by the release");
            })
        };
        set.release(claim);
        next.join().unwrap();
    });
}

#[test]
fn a_waiter_is_either_cancelled_or_woken() {
    model(None, || {
        let set = set();
        let claim = claim_one(&set, 0).unwrap();
        let woken = Arc::new(AtomicU32::new(0));
        let count = woken.clone();
        let waiter = Waiter::callback(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let Registration::Registered { ticket, .. } = set.wait_for(ClusterIndex(0), waiter) else {
            panic!("the cluster is busy")
        };
        let holder = {
            let set = set.clone();
            thread::spawn(move || set.complete(claim))
        };
        let cancelled = set.cancel(ticket) == Cancellation::Removed;
        holder.join().unwrap();
        assert_eq!(woken.load(Ordering::Relaxed), u32::from(!cancelled));
    });
}

/// One waiter leaves while another comes: the state follows the table, so the one who stays is woken.
#[test]
fn cancelling_does_not_cost_another_waiter_its_wake_up() {
    model(Some(3), || {
        let set = set();
        let claim = claim_one(&set, 0).unwrap();
        let Registration::Registered { ticket, .. } = set.wait_for(ClusterIndex(0), Waiter::callback(|| ()))
        else {
            panic!("the cluster is busy")
        };
        let waiter = {
            let set = set.clone();
            thread::spawn(move || set.wait_blocking(ClusterIndex(0), None, || ()))
        };
        let holder = {
            let set = set.clone();
            thread::spawn(move || set.complete(claim))
        };
        // Either way of ending is right here.
        let (Cancellation::Removed | Cancellation::AlreadyWoken) = set.cancel(ticket);
        assert_eq!(waiter.join().unwrap(), Waited::Released);
        holder.join().unwrap();
    });
}

#[test]
fn closing_lets_everybody_go() {
    model(None, || {
        let set = set();
        let claim = claim_one(&set, 0).unwrap();
        let waiter = {
            let set = set.clone();
            thread::spawn(move || set.wait_blocking(ClusterIndex(0), None, || ()))
        };
        set.close();
        let waited = waiter.join().unwrap();
        assert_eq!(waited, Waited::Closed);
        set.release(claim);
    });
}

/// A holder about to sleep and a waiter about to ask whether he does; at least one of them must see the other.
fn sleep_and_promote(fenced: bool) {
    model(None, move || {
        let set = set();
        let claim = claim_one(&set, 0).unwrap();
        let sleeping = Arc::new(ModelBool::new(false));
        let waiter = {
            let (set, sleeping) = (set.clone(), sleeping.clone());
            thread::spawn(move || {
                let registration = set.wait_for(ClusterIndex(0), Waiter::callback(|| ()));
                assert!(matches!(registration, Registration::Registered { .. }));
                sleeping.load(Ordering::Relaxed)
            })
        };
        sleeping.store(true, Ordering::Relaxed);
        if fenced {
            fence(Ordering::SeqCst);
        }
        let holder_saw = set.has_waiters(one(0));
        let waiter_saw = waiter.join().unwrap();
        assert!(holder_saw || waiter_saw, "the holder sleeps and nobody tells him");
        set.complete(claim);
    });
}

#[test]
fn the_fences_keep_a_holder_from_sleeping_through_a_promotion() {
    sleep_and_promote(true);
}

/// The models can fail: without the holder's fence loom finds the execution in which neither sees the other.
#[test]
#[should_panic(expected = "the holder sleeps and nobody tells him")]
fn without_its_fence_the_holder_may_sleep_through_a_promotion() {
    sleep_and_promote(false);
}
