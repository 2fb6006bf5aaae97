//! The interval set: which clusters are copied, which are being copied and by whom, and who waits for that.
//!
//! It serialises copy-before-write requests against each other and against the sweep. Guest threads and the ring thread
//! share one through an `Arc` and never hold a lock while they use it, except where somebody has to wait anyway.
//!
//! # Model
//!
//! Every cluster is in one of four states, two bits each, 32 clusters to an atomic word (`word`), the words in lazily
//! mapped memory (`words`):
//!
//! ```text
//!              claim_first, claim_free                  wait_for
//!     to copy ─────────────────────────► copying ────────────────────► copying with waiters
//!      ▲ ▲  │                            │   │  ▲                            │   │
//!      │ │  │ mark_done          release │   │  └───── the last one cancels ─┤   │
//!      │ │  ▼                            │   │ complete                      │   │
//!      │ └─ done ◄───────────────────────┼───┴───────────────────────────────┼───┘ complete
//!      │ reopen                          ▼                                   ▼
//!      └─────────────────────────────────┴───────────────────────────────────┘ release
//! ```
//!
//! - A [`Claim`] is the right to copy a contiguous range; exactly one exists for every busy cluster. It is taken by
//!   one compare-and-swap a word, each of which takes *whatever is free* in its word: nothing is tried as a whole, so
//!   nothing is rolled back, and nobody waits while holding a claim. A claim counts from the compare-and-swap of its
//!   word; over several words it is not one instant, and needs not be, since each cluster is its own right.
//! - A waiter waits for one cluster. It is entered in a table (`waiters`) and woken exactly once, by the thread that
//!   releases that cluster, in the call that releases it. Woken, it looks again: done, or free to be claimed (the
//!   copy failed and now it is the waiter's to make), or claimed by somebody who was faster.
//! - Claiming and releasing are lock-free: a compare-and-swap fails only because another thread changed the word, and
//!   that thread has made progress. Looking is wait-free, loads only.
//!
//! # Ordering, and why
//!
//! All that is shared between a holder and the next reader of a cluster goes through that cluster's word, and **a word
//! is changed by read-modify-write operations only, never by a plain store**. That matters: a release sequence is
//! continued by every later read-modify-write of the same word, whatever cluster it is about and whatever ordering it
//! has, so an acquire load that sees *done* synchronises with the `complete` that made it so, even if thirty other
//! clusters of the word changed in between.
//!
//! - *To done and to free*: Release. What the holder did under its claim (the old contents read, the target written)
//!   happens before anything that a thread does which finds the cluster done or claims it anew.
//! - *Claiming*: Acquire on success, for the second half of that. There is nothing to publish yet.
//! - *Looking*: Acquire, for the first half. On x86-64 that is a plain load.
//! - *Failed compare-and-swaps and the loads before them*: Relaxed. They only pick the operand; acting on a value
//!   happens through the successful operation.
//!
//! *No lost wake-up, none too early.* A cluster enters and leaves *copying with waiters* only under the lock of its
//! shard, and the entry is put in or taken out under the same hold of the lock. So under the lock the state and the
//! table agree. A holder that releases reads and replaces the word in one compare-and-swap: if the state was plain
//! copying, there was nobody in the table, and one who comes now fails to set the state and sees the cluster released.
//! If the state was with waiters, the holder takes the lock, releases and empties the table in one; the state cannot
//! change before, since only the holder may end it and only under the lock. One who waits for the *next* claim on that
//! cluster needs the lock too, so is never mistaken for one who waited for this. All of this is one word's
//! modification order plus a lock, and needs no fence.
//!
//! *Store, then load of something else.* One place does. A waiter that wants the holder to hurry sets the state, then
//! looks whether the holder's thread sleeps (the flag is the ring's); the holder's thread sets its flag, then looks
//! whether anybody waits. Either may be the first, neither may miss the other, and Acquire and Release do not order a
//! store before a later load. So [`wait_for`](IntervalSet::wait_for) ends in a sequentially consistent fence, and the
//! holder puts one between its flag and [`has_waiters`](IntervalSet::has_waiters). A caller that just sends the holder
//! a message when it is told that it is the first needs none of this.
//!
//! The proofs: `tests/interval_set_loom.rs` (every interleaving of small cases), `tests/shuttle` (larger cases in orders
//! chosen at random), `tests/interval_set_oracle/` (driven by proptest and by a fuzz target), `tests/interval_set_stress.rs`
//! (real threads).

mod claim;
mod query;
mod waiters;
mod waiting;
mod word;
mod words;

use std::fmt;
use std::io;

use crate::sync::Ordering;
use crate::units::{ClusterCount, ClusterIndex, ClusterRange};

pub use self::claim::{Claim, ClaimClusters};
use self::waiters::Table;
pub(crate) use self::waiters::{Parker, Woken};
pub use self::waiters::{Ticket, Waiter};
pub use self::waiting::{Cancellation, Registration, Waited};
use self::word::{CLUSTERS, Mask, Outcome, Span, Word, first_span, in_one_word, spans, word_of};
use self::words::Words;

/// Where a cluster stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClusterState {
    /// Not in the copy, and nobody is at it.
    ToCopy,
    /// There is a claim on it.
    Copying,
    /// There is a claim on it, and somebody waits for its end.
    CopyingWithWaiters,
    /// In the copy.
    Done,
}

/// What [`IntervalSet::claim_free`] comes across.
#[derive(Debug)]
pub enum Found {
    /// These were free and are the caller's now: as many in a row as there were.
    Claimed(Claim),
    /// These are being copied by others; to be waited for one by one. Each may be released by now.
    Busy(ClusterRange),
}

/// The states of all clusters of one disk under one job; see the [module](self).
pub struct IntervalSet {
    words: Words,
    clusters: ClusterCount,
    table: Table,
}

/// Where in a word a run may begin.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begin {
    Anywhere,
    /// At the first cluster asked for, to continue a run from the word before.
    AtOnce,
}

impl IntervalSet {
    /// A set of `clusters` clusters, all to copy.
    ///
    /// # Errors
    /// If the address space has no room for it.
    pub fn new(clusters: ClusterCount) -> io::Result<Self> {
        let count = usize::try_from(clusters.0.div_ceil(CLUSTERS)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let words = Words::new(count)?;
        assert_eq!(words.len(), count, "every cluster has its word");
        Ok(Self { words, clusters, table: Table::new() })
    }

    /// How many clusters it has.
    #[must_use]
    pub fn clusters(&self) -> ClusterCount {
        self.clusters
    }

    /// All its clusters.
    #[must_use]
    pub fn all(&self) -> ClusterRange {
        ClusterRange::new(0, self.clusters.0)
    }

    /// Claims the first free run in `within`, at most `max` clusters of it; `None` if nothing in it is free.
    ///
    /// For the sweep: passes over what is done or busy, a word at a time, and never waits. When others are at the same
    /// words it may come back with less than was free a moment ago, never with a gap.
    ///
    /// # Panics
    /// If `within` reaches beyond the set or `max` is 0.
    #[inline]
    pub fn claim_first(&self, within: ClusterRange, max: ClusterCount) -> Option<Claim> {
        self.check(within);
        assert!(max.0 > 0, "a claim holds a cluster");
        let range = self.take_first(within, max.0)?;
        let ends_in_word = !range.end.0.is_multiple_of(CLUSTERS);
        let range = if ends_in_word { range } else { self.take_on(range, within.end, max.0) };
        debug_assert!(range.count() <= max.0 && within.start <= range.start && range.end <= within.end);
        Some(Claim::new(self.words.id(), range))
    }

    /// Claims the first free run in `within` as far as it lies in one word, at most `max` clusters.
    #[inline]
    fn take_first(&self, within: ClusterRange, max: u64) -> Option<ClusterRange> {
        let mut rest = within;
        loop {
            let (span, seen) = self.find_word(rest, Word::to_copy)?;
            if let Some(run) = self.take_run(span, seen, max, Begin::Anywhere) {
                return Some(run);
            }
            // Others were faster in that word; on to the next.
            rest.start = ClusterIndex((span.base + CLUSTERS).min(rest.end.0));
        }
    }

    /// Extends `range`, just claimed up to the border of a word, into the next words as long as they begin with free
    /// clusters, up to `end` and to `max` clusters in all.
    fn take_on(&self, mut range: ClusterRange, end: ClusterIndex, max: u64) -> ClusterRange {
        while range.end.0.is_multiple_of(CLUSTERS) && range.count() < max {
            let Some(span) = first_span(ClusterRange { start: range.end, end }) else { break };
            let seen = Word(self.words[span.word].load(Ordering::Relaxed));
            let left = max - range.count();
            let Some(more) = self.take_run(span, seen, left, Begin::AtOnce) else { break };
            range.end = more.end;
        }
        range
    }

    /// Claims a run of at most `max` clusters in one word, which was just read as `seen`.
    #[inline]
    fn take_run(&self, span: Span, mut seen: Word, max: u64, begin: Begin) -> Option<ClusterRange> {
        let word = &self.words[span.word];
        loop {
            let free = seen.to_copy() & span.mask;
            if free.is_empty() || (begin == Begin::AtOnce && free.lowest() != span.mask.lowest()) {
                return None;
            }
            let run = free.lowest_run(max);
            let new = seen.claimed(run);
            match word.compare_exchange_weak(seen.0, new.0, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(run.to_range(span.base)),
                Err(now) => seen = Word(now),
            }
        }
    }

    /// Claims whatever in `range` is free, and says what in it is busy; what it does not mention is done.
    ///
    /// For guest requests: a single pass that never waits. The claims are as long as they can be; each kind is reported
    /// in order, the two kinds in no order to each other.
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    pub fn claim_free(&self, range: ClusterRange, found: &mut impl FnMut(Found)) {
        self.check(range);
        let id = self.words.id();
        let (mut claimed, mut busy) = (Joiner::default(), Joiner::default());
        for span in spans(range) {
            let (taken, left) = self.take_all(span);
            for run in taken.runs() {
                if let Some(whole) = claimed.push(run.to_range(span.base)) {
                    found(Found::Claimed(Claim::new(id, whole)));
                }
            }
            for run in left.runs() {
                if let Some(whole) = busy.push(run.to_range(span.base)) {
                    found(Found::Busy(whole));
                }
            }
        }
        if let Some(whole) = claimed.finish() {
            found(Found::Claimed(Claim::new(id, whole)));
        }
        if let Some(whole) = busy.finish() {
            found(Found::Busy(whole));
        }
    }

    /// Claims all that is free in a part of a word; returns that, and what was busy at the same instant.
    #[inline]
    fn take_all(&self, span: Span) -> (Mask, Mask) {
        let word = &self.words[span.word];
        // Acquire: with nothing free this load is all there is, and what it calls done must be visibly so.
        let mut seen = Word(word.load(Ordering::Acquire));
        loop {
            let free = seen.to_copy() & span.mask;
            let busy = seen.busy() & span.mask;
            if free.is_empty() {
                return (Mask::EMPTY, busy);
            }
            let new = seen.claimed(free);
            match word.compare_exchange_weak(seen.0, new.0, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return (free, busy),
                Err(now) => seen = Word(now),
            }
        }
    }

    /// Ends a claim: its clusters are in the copy. To be called after the whole write has succeeded. Wakes those who
    /// wait for these clusters.
    ///
    /// # Panics
    /// If the claim is of another set.
    #[inline]
    pub fn complete(&self, claim: Claim) {
        self.leave(claim, Outcome::Done);
    }

    /// Ends a claim without a copy: its clusters are to copy again. Wakes those who wait for these clusters.
    ///
    /// # Panics
    /// If the claim is of another set.
    #[inline]
    pub fn release(&self, claim: Claim) {
        self.leave(claim, Outcome::ToCopy);
    }

    #[inline]
    fn leave(&self, claim: Claim, outcome: Outcome) {
        let range = claim.into_range(self.words.id());
        debug_assert!(!range.is_empty() && range.end.0 <= self.clusters.0);
        for span in spans(range) {
            self.leave_word(span, outcome);
        }
    }

    #[inline]
    fn leave_word(&self, span: Span, outcome: Outcome) {
        let word = &self.words[span.word];
        let mut seen = Word(word.load(Ordering::Relaxed));
        loop {
            assert!(seen.busy().covers(span.mask), "a claim on clusters that are not busy");
            if !(seen.waited_for() & span.mask).is_empty() {
                return self.leave_waited_for(span, outcome);
            }
            let new = seen.left(span.mask, outcome);
            match word.compare_exchange_weak(seen.0, new.0, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => seen = Word(now),
            }
        }
    }

    /// Sets clusters that nobody is copying to done: for what is known to be in the copy already, before the job starts
    /// (an offline copy that resumes). Returns how many were not done before.
    ///
    /// # Panics
    /// If a cluster of `range` is claimed (the words before that cluster's are then marked), or `range` reaches beyond
    /// the set.
    pub fn mark_done(&self, range: ClusterRange) -> ClusterCount {
        self.rewrite(range, |word, mask| {
            assert!((word.busy() & mask).is_empty(), "clusters marked done that are being copied");
            (word.to_copy() & mask, Outcome::Done)
        })
    }

    /// Sets what is done in `range` to copy again: a flush has failed, and what was written since the last good one
    /// may be lost. Returns how many clusters that are. What is not done is left as it is.
    ///
    /// Only for copies whose source does not change: a guest write that found its cluster done has gone ahead, so the
    /// old contents may be gone. The caller makes sure that no guest relies on this set.
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    pub fn reopen(&self, range: ClusterRange) -> ClusterCount {
        self.rewrite(range, |word, mask| (word.done() & mask, Outcome::ToCopy))
    }

    /// Changes what `pick` picks in each word, which holds no busy cluster; returns how many clusters that were.
    fn rewrite(&self, range: ClusterRange, pick: impl Fn(Word, Mask) -> (Mask, Outcome)) -> ClusterCount {
        self.check(range);
        let mut count = 0;
        for span in spans(range) {
            let word = &self.words[span.word];
            let mut seen = Word(word.load(Ordering::Relaxed));
            loop {
                let (picked, outcome) = pick(seen, span.mask);
                debug_assert!((seen.busy() & picked).is_empty() && span.mask.covers(picked));
                if picked.is_empty() {
                    break;
                }
                let new = seen.left(picked, outcome);
                match word.compare_exchange_weak(seen.0, new.0, Ordering::AcqRel, Ordering::Relaxed) {
                    Ok(_) => {
                        count += picked.count();
                        break;
                    }
                    Err(now) => seen = Word(now),
                }
            }
        }
        ClusterCount(count)
    }

    #[inline]
    fn check(&self, range: ClusterRange) {
        if range.start > range.end || range.end.0 > self.clusters.0 {
            self.out_of_bounds(range);
        }
    }

    /// Apart, so that the check itself needs no memory: what is formatted has an address.
    #[cold]
    #[inline(never)]
    fn out_of_bounds(&self, range: ClusterRange) -> ! {
        panic!("{range:?} in a set of {} clusters", self.clusters.0)
    }
}

impl fmt::Debug for IntervalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntervalSet").field("clusters", &self.clusters.0).finish_non_exhaustive()
    }
}

/// Joins ranges that come in order into ranges without a gap.
#[derive(Default)]
struct Joiner(Option<ClusterRange>);

impl Joiner {
    /// Takes the next range; returns the one before if it is whole now.
    fn push(&mut self, next: ClusterRange) -> Option<ClusterRange> {
        match &mut self.0 {
            Some(open) if open.end == next.start => {
                open.end = next.end;
                None
            }
            open => {
                debug_assert!(open.is_none_or(|open| open.end < next.start), "ranges come in order");
                open.replace(next)
            }
        }
    }

    fn finish(self) -> Option<ClusterRange> {
        self.0
    }
}
