//! The interval set under real threads for about a second: a sweep, guests and failures all at once, on few enough
//! clusters that they meet all the time.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use engine::interval_set::{Cancellation, Claim, Found, IntervalSet, Registration, Waited, Waiter};
use engine::units::{ClusterCount, ClusterIndex, ClusterRange};

const CLUSTERS: u64 = 100;
const GUESTS: u64 = 3;
const BUDGET: Duration = Duration::from_secs(1);

/// A stuck thread fails the test by this rather than hang it; never reached when all is well.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(30));

/// xorshift: the threads' choices need be neither good nor the same from run to run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// One round: a fresh set, and what is known of it from outside.
struct Round {
    set: IntervalSet,
    /// Whether the cluster is being copied now.
    live: Vec<AtomicBool>,
    /// How often it was completed.
    completed: Vec<AtomicU32>,
    registered: AtomicU64,
    cancelled: AtomicU64,
    woken: Arc<AtomicU64>,
    failures: AtomicU64,
    waits: AtomicU64,
}

impl Round {
    fn new() -> Self {
        Self {
            set: IntervalSet::new(ClusterCount(CLUSTERS)).unwrap(),
            live: (0..CLUSTERS).map(|_| AtomicBool::new(false)).collect(),
            completed: (0..CLUSTERS).map(|_| AtomicU32::new(0)).collect(),
            registered: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            woken: Arc::default(),
            failures: AtomicU64::new(0),
            waits: AtomicU64::new(0),
        }
    }

    /// Copies what is claimed, cluster by cluster, and fails now and then.
    fn copy(&self, claim: Claim, dice: &mut Dice) {
        for cluster in claim.range().iter() {
            let before = self.live[index(cluster)].swap(true, Ordering::Relaxed);
            assert!(!before, "double claim on cluster {}", cluster.0);
        }
        for claim in claim.into_clusters() {
            self.finish(claim, dice);
        }
    }

    fn finish(&self, claim: Claim, dice: &mut Dice) {
        let cluster = claim.range().start;
        // The holder's own waiter shows when exactly waiters are woken. (Waiting for it would be a deadlock.)
        let own = (dice.roll(4) == 0).then(|| self.register_own(cluster));
        if dice.roll(8) == 0 {
            thread::yield_now();
        }
        if let Some(own) = &own {
            assert_eq!(own.load(Ordering::Relaxed), 0, "woken before the cluster was released");
        }
        assert!(self.live[index(cluster)].swap(false, Ordering::Relaxed));
        if dice.roll(4) == 0 {
            self.failures.fetch_add(1, Ordering::Relaxed);
            self.set.release(claim);
        } else {
            let before = self.completed[index(cluster)].fetch_add(1, Ordering::Relaxed);
            assert_eq!(before, 0, "cluster {} completed twice", cluster.0);
            self.set.complete(claim);
            assert!(self.set.is_done(ClusterRange::new(cluster.0, cluster.0 + 1)));
        }
        if let Some(own) = own {
            assert_eq!(own.load(Ordering::Relaxed), 1, "not woken exactly once by the release");
        }
    }

    fn register_own(&self, cluster: ClusterIndex) -> Arc<AtomicU32> {
        let woken = Arc::new(AtomicU32::new(0));
        let (count, total) = (Arc::clone(&woken), Arc::clone(&self.woken));
        let waiter = Waiter::callback(move || {
            count.fetch_add(1, Ordering::Relaxed);
            total.fetch_add(1, Ordering::Relaxed);
        });
        let registration = self.set.wait_for(cluster, waiter);
        assert!(matches!(registration, Registration::Registered { .. }), "{registration:?} under a claim");
        self.registered.fetch_add(1, Ordering::Relaxed);
        woken
    }

    fn sweep(&self, dice: &mut Dice) {
        let mut from = ClusterIndex(0);
        while let Some(next) = self.set.next_not_done(from) {
            let within = ClusterRange::new(next.0, CLUSTERS);
            match self.set.claim_first(within, ClusterCount(dice.roll(40) + 1)) {
                Some(claim) => self.copy(claim, dice),
                None => thread::yield_now(),
            }
            from = next;
        }
    }

    /// Copy-before-write over random ranges.
    fn guest(&self, dice: &mut Dice) {
        while self.set.count_done().0 < CLUSTERS {
            let start = dice.roll(CLUSTERS);
            let range = ClusterRange::new(start, (start + 1 + dice.roll(40)).min(CLUSTERS));
            while !self.set.is_done(range) {
                let (mut claims, mut busy) = (Vec::new(), Vec::new());
                self.set.claim_free(range, &mut |found| match found {
                    Found::Claimed(claim) => claims.push(claim),
                    Found::Busy(range) => busy.push(range),
                });
                claims.into_iter().for_each(|claim| self.copy(claim, dice));
                busy.iter().flat_map(|range| range.iter()).for_each(|cluster| self.wait(cluster, dice));
            }
        }
    }

    /// Waits asleep, or changes its mind, or with a time limit so short that it may be over.
    fn wait(&self, cluster: ClusterIndex, dice: &mut Dice) {
        match dice.roll(4) {
            0 => self.change_mind(cluster),
            1 => {
                let waited =
                    self.set.wait_blocking(cluster, Some(Duration::from_micros(dice.roll(20))), || ());
                assert_ne!(waited, Waited::Closed);
            }
            _ => {
                self.waits.fetch_add(1, Ordering::Relaxed);
                assert_eq!(self.set.wait_blocking(cluster, PATIENCE, || ()), Waited::Released);
            }
        }
    }

    fn change_mind(&self, cluster: ClusterIndex) {
        let woken = Arc::clone(&self.woken);
        let waiter = Waiter::callback(move || {
            woken.fetch_add(1, Ordering::Relaxed);
        });
        let Registration::Registered { ticket, .. } = self.set.wait_for(cluster, waiter) else { return };
        self.registered.fetch_add(1, Ordering::Relaxed);
        thread::yield_now();
        if self.set.cancel(ticket) == Cancellation::Removed {
            self.cancelled.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// All threads are done with it.
    fn verify(&self) {
        assert!(self.set.is_done(self.set.all()));
        assert!(!self.set.has_waiters(self.set.all()));
        assert!(self.completed.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        let [registered, cancelled, woken] =
            [&self.registered, &self.cancelled, &*self.woken].map(|count| count.load(Ordering::Relaxed));
        assert_eq!(registered, cancelled + woken, "every waiter is cancelled or woken, and once");
    }
}

/// The other threads would wait at the barrier for one that has panicked: better an end than a hang.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

fn index(cluster: ClusterIndex) -> usize {
    usize::try_from(cluster.0).unwrap()
}

#[test]
fn real_threads_never_hold_a_cluster_twice_and_every_waiter_is_woken_once() {
    let end = Instant::now() + BUDGET;
    let start = Barrier::new(usize::try_from(GUESTS).unwrap() + 1);
    let round = Mutex::new(Arc::new(Round::new()));
    let stop = AtomicBool::new(false);
    let totals = [const { AtomicU64::new(0) }; 4];
    thread::scope(|scope| {
        for guest in 0..GUESTS {
            let (start, round, stop) = (&start, &round, &stop);
            scope.spawn(move || {
                let _guard = AbortOnPanic;
                let mut dice = Dice(0x9E37_79B9_7F4A_7C15 ^ guest);
                loop {
                    start.wait();
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let current = Arc::clone(&round.lock().unwrap());
                    current.guest(&mut dice);
                    start.wait();
                }
            });
        }
        let _guard = AbortOnPanic;
        let mut dice = Dice(0x2545_F491_4F6C_DD1D);
        while Instant::now() < end {
            start.wait();
            let current = Arc::clone(&round.lock().unwrap());
            current.sweep(&mut dice);
            start.wait();
            current.verify();
            let seen = [&current.failures, &current.waits, &current.cancelled, &*current.woken];
            for (total, seen) in totals.iter().zip(seen) {
                total.fetch_add(seen.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            *round.lock().unwrap() = Arc::new(Round::new());
        }
        stop.store(true, Ordering::Relaxed);
        start.wait();
    });
    // That the threads met at all is part of the test.
    for (what, total) in ["failures", "waits", "cancellations", "wake-ups"].iter().zip(&totals) {
        assert!(total.load(Ordering::Relaxed) > 0, "no {what} in all that time");
    }
}
