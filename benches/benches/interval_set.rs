//! The interval set against what it replaces: the same job done by a `BTreeMap` of claims under a lock, and by a plain
//! list of claims under a lock.
//!
//! Both baselines keep what is done in a bitmap under the same lock, scanned a word at a time, so that only the
//! bookkeeping of claims differs between them, and it is parking_lot's lock, the fastest at hand. Neither knows waiters,
//! which is in their favour. Sixteen claims of others are live throughout.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use criterion::{
    BatchSize, BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime,
};
use engine::interval_set::{Claim, IntervalSet};
use engine::units::{ClusterCount, ClusterRange};
use parking_lot::Mutex;

/// Clusters that the benches work on: the claim map of a disk of 64 GiB, which stays in the cache.
const CLUSTERS: u64 = 1 << 20;
const OTHERS: u64 = 16;
/// Clusters that the sweep takes at once.
const RUN: u64 = 16;

/// What a bench needs of a set.
trait Contender: Send + Sync + Sized + 'static {
    const NAME: &str;
    type Claim;

    /// A set of `CLUSTERS` and some more, with live claims on `OTHERS` of the latter.
    fn new() -> Self;
    fn is_done(&self, range: ClusterRange) -> bool;
    /// Claims the first free run.
    fn claim(&self, within: ClusterRange, max: u64) -> Option<Self::Claim>;
    fn end_of(claim: &Self::Claim) -> u64;
    fn complete(&self, claim: Self::Claim);
    fn release(&self, claim: Self::Claim);
}

/// Where the claims of others are: one each in words of their own.
fn others() -> impl Iterator<Item = ClusterRange> {
    (0..OTHERS).map(|i| CLUSTERS + 32 * i).map(|at| ClusterRange::new(at, at + 1))
}

struct LockFree {
    set: IntervalSet,
    others: Vec<Claim>,
}

impl Contender for LockFree {
    const NAME: &str = "interval set";
    type Claim = Claim;

    fn new() -> Self {
        let set = IntervalSet::new(ClusterCount(CLUSTERS + 32 * OTHERS)).expect("a small map");
        let others = others().filter_map(|range| set.claim_first(range, ClusterCount(1))).collect();
        Self { set, others }
    }

    fn is_done(&self, range: ClusterRange) -> bool {
        self.set.is_done(range)
    }

    fn claim(&self, within: ClusterRange, max: u64) -> Option<Claim> {
        self.set.claim_first(within, ClusterCount(max))
    }

    fn end_of(claim: &Claim) -> u64 {
        claim.range().end.0
    }

    fn complete(&self, claim: Claim) {
        self.set.complete(claim);
    }

    fn release(&self, claim: Claim) {
        self.set.release(claim);
    }
}

impl Drop for LockFree {
    fn drop(&mut self) {
        self.others.drain(..).for_each(|claim| self.set.release(claim));
    }
}

/// How the baselines keep claims.
trait InFlight: Default + Send + 'static {
    const NAME: &str;

    /// The first claim that ends after `at`, in order of position.
    fn next_after(&self, at: u64) -> Option<ClusterRange>;
    fn insert(&mut self, range: ClusterRange);
    fn remove(&mut self, range: ClusterRange);
}

/// Start → end.
#[derive(Default)]
struct Tree(BTreeMap<u64, u64>);

impl InFlight for Tree {
    const NAME: &str = "Mutex<BTreeMap>";

    fn next_after(&self, at: u64) -> Option<ClusterRange> {
        // At most one claim begins before `at` and ends after it, since claims never overlap.
        let before = self.0.range(..=at).next_back().filter(|&(_, &end)| end > at);
        before.or_else(|| self.0.range(at..).next()).map(|(&start, &end)| ClusterRange::new(start, end))
    }

    fn insert(&mut self, range: ClusterRange) {
        self.0.insert(range.start.0, range.end.0);
    }

    fn remove(&mut self, range: ClusterRange) {
        self.0.remove(&range.start.0);
    }
}

/// In no order, as block layers have kept their requests in flight.
#[derive(Default)]
struct List(Vec<ClusterRange>);

impl InFlight for List {
    const NAME: &str = "Mutex<Vec>";

    fn next_after(&self, at: u64) -> Option<ClusterRange> {
        self.0.iter().filter(|range| range.end.0 > at).min_by_key(|range| range.start).copied()
    }

    fn insert(&mut self, range: ClusterRange) {
        self.0.push(range);
    }

    fn remove(&mut self, range: ClusterRange) {
        if let Some(at) = self.0.iter().position(|&other| other == range) {
            self.0.swap_remove(at);
        }
    }
}

/// A baseline: everything under one lock.
struct Locked<F>(Mutex<State<F>>);

struct State<F> {
    in_flight: F,
    done: Vec<u64>,
}

impl<F> State<F> {
    /// The words that `range` touches, each with the bits of it.
    fn words(range: ClusterRange) -> impl Iterator<Item = (usize, u64)> {
        let mut at = range.start.0;
        std::iter::from_fn(move || {
            let left = range.end.0.checked_sub(at).filter(|&left| left > 0)?;
            let length = (64 - at % 64).min(left);
            let mask = (u64::MAX >> (64 - length)) << (at % 64);
            let word = usize::try_from(at / 64).expect("64 bits");
            at += length;
            Some((word, mask))
        })
    }

    /// The first cluster of `range` whose bit, after `flip`, is set.
    fn find(&self, range: ClusterRange, flip: u64) -> Option<u64> {
        Self::words(range).find_map(|(word, mask)| {
            let hit = (self.done[word] ^ flip) & mask;
            (hit != 0).then(|| word as u64 * 64 + u64::from(hit.trailing_zeros()))
        })
    }
}

impl<F: InFlight> Contender for Locked<F> {
    const NAME: &str = F::NAME;
    type Claim = ClusterRange;

    fn new() -> Self {
        let mut in_flight = F::default();
        others().for_each(|range| in_flight.insert(range));
        let words = usize::try_from((CLUSTERS + 32 * OTHERS).div_ceil(64)).expect("64 bits");
        Self(Mutex::new(State { in_flight, done: vec![0; words] }))
    }

    fn is_done(&self, range: ClusterRange) -> bool {
        self.0.lock().find(range, u64::MAX).is_none()
    }

    fn claim(&self, within: ClusterRange, max: u64) -> Option<ClusterRange> {
        let mut state = self.0.lock();
        let mut at = within.start.0;
        loop {
            let start = state.find(ClusterRange::new(at, within.end.0), u64::MAX)?;
            let limit = (start + max).min(within.end.0);
            let busy = state.in_flight.next_after(start).filter(|busy| busy.start.0 < limit);
            if let Some(busy) = busy.filter(|busy| busy.start.0 <= start) {
                at = busy.end.0.min(within.end.0);
                continue;
            }
            let limit = busy.map_or(limit, |busy| busy.start.0);
            let end = state.find(ClusterRange::new(start, limit), 0).unwrap_or(limit);
            let claim = ClusterRange::new(start, end);
            state.in_flight.insert(claim);
            return Some(claim);
        }
    }

    fn end_of(claim: &ClusterRange) -> u64 {
        claim.end.0
    }

    fn complete(&self, claim: ClusterRange) {
        let mut state = self.0.lock();
        state.in_flight.remove(claim);
        State::<F>::words(claim).for_each(|(word, mask)| state.done[word] |= mask);
    }

    fn release(&self, claim: ClusterRange) {
        self.0.lock().in_flight.remove(claim);
    }
}

/// Claims and completes all before `end`.
fn sweep<C: Contender>(set: &C, end: u64) {
    let mut at = 0;
    while let Some(claim) = set.claim(ClusterRange::new(at, end), RUN) {
        at = C::end_of(&claim);
        set.complete(claim);
    }
    assert_eq!(at, end);
}

fn claim_and_release<C: Contender>(set: &C, range: ClusterRange) {
    let claim = set.claim(black_box(range), range.count()).expect("nobody else claims it");
    set.release(black_box(claim));
}

/// Time for two threads to claim and release `rounds` times each, on a cluster of their own.
fn two_threads<C: Contender>(set: &Arc<C>, starts: [u64; 2], rounds: u64) -> Duration {
    let barrier = Arc::new(Barrier::new(2));
    let threads = starts.map(|start| {
        let (set, barrier) = (Arc::clone(set), Arc::clone(&barrier));
        std::thread::spawn(move || {
            barrier.wait();
            let began = Instant::now();
            for _ in 0..rounds {
                claim_and_release(&*set, ClusterRange::new(start, start + 1));
            }
            (began, Instant::now())
        })
    });
    let spans = threads.map(|thread| thread.join().expect("no claim is in the way"));
    let began = spans.iter().map(|span| span.0).min().expect("two threads");
    let ended = spans.iter().map(|span| span.1).max().expect("two threads");
    ended - began
}

/// What the loop of [`done_check`] costs by itself: to be taken off its figures.
fn no_check(group: &mut BenchmarkGroup<'_, WallTime>) {
    let range = ClusterRange::new(1000, 1001);
    group.bench_function("nothing", |b| b.iter(|| black_box(black_box(range).start < range.end)));
}

fn done_check<C: Contender>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let set = C::new();
    sweep(&set, CLUSTERS);
    for count in [1, 64] {
        let range = ClusterRange::new(1000, 1000 + count);
        group.bench_function(format!("{}/{count}", C::NAME), |b| {
            b.iter(|| black_box(set.is_done(black_box(range))));
        });
    }
}

fn uncontended<C: Contender>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let set = C::new();
    for count in [1, 16] {
        let range = ClusterRange::new(1024, 1024 + count);
        group.bench_function(format!("{}/{count}", C::NAME), |b| b.iter(|| claim_and_release(&set, range)));
    }
}

fn contended<C: Contender>(group: &mut BenchmarkGroup<'_, WallTime>) {
    let set = Arc::new(C::new());
    // Words 0 and 64, 512 bytes apart; words 0 and 1, neighbours in one cache line.
    for (what, starts) in [("apart", [0, 64 * 32]), ("same cache line", [0, 32])] {
        group.bench_function(format!("{}/{what}", C::NAME), |b| {
            b.iter_custom(|rounds| two_threads(&set, starts, rounds));
        });
    }
}

fn sweeps<C: Contender>(group: &mut BenchmarkGroup<'_, WallTime>) {
    group.bench_function(format!("{}/all", C::NAME), |b| {
        b.iter_batched_ref(C::new, |set| sweep(set, CLUSTERS), BatchSize::PerIteration);
    });
    let set = C::new();
    sweep(&set, CLUSTERS - 1);
    let whole = ClusterRange::new(0, CLUSTERS);
    group.bench_function(format!("{}/past what is done", C::NAME), |b| {
        b.iter(|| {
            let claim = set.claim(black_box(whole), RUN).expect("the last one is free");
            set.release(claim);
        });
    });
}

fn all(criterion: &mut Criterion) {
    type Bench = fn(&mut BenchmarkGroup<'_, WallTime>);
    let benches: [(&str, [Bench; 3]); 4] = [
        ("done-check", [done_check::<LockFree>, done_check::<Locked<Tree>>, done_check::<Locked<List>>]),
        (
            "claim and release",
            [uncontended::<LockFree>, uncontended::<Locked<Tree>>, uncontended::<Locked<List>>],
        ),
        ("two threads", [contended::<LockFree>, contended::<Locked<Tree>>, contended::<Locked<List>>]),
        ("sweep of 1 Mi clusters", [sweeps::<LockFree>, sweeps::<Locked<Tree>>, sweeps::<Locked<List>>]),
    ];
    for (name, contenders) in benches {
        let mut group = criterion.benchmark_group(name);
        group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
        if name == "done-check" {
            no_check(&mut group);
        }
        contenders.iter().for_each(|bench| bench(&mut group));
        group.finish();
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
