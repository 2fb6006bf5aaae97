//! One word of the set as a value: the states of 32 clusters, and the masks that pick some of them.
//!
//! The two bits of a cluster lie 32 apart: bit *i* and bit *32 + i*. So the low halves of all clusters form one plane
//! and the high halves another, and every question about many clusters is a handful of operations on two `u32`,
//! whatever their number. The encoding is chosen so that leaving the busy states needs no knowledge of which of them
//! a cluster is in: done is both bits set (one OR), to copy is both clear (one AND).
//!
//! | high | low | state                |
//! |------|-----|----------------------|
//! | 0    | 0   | to copy              |
//! | 0    | 1   | copying              |
//! | 1    | 0   | copying with waiters |
//! | 1    | 1   | done                 |

use std::ops::BitAnd;

use super::ClusterState;
use crate::units::{ClusterIndex, ClusterRange};

/// Clusters in one word.
pub(super) const CLUSTERS: u64 = 32;
const BITS: u32 = 32;

/// Some of the clusters of one word, bit *i* for the *i*-th.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mask(u32);

impl Mask {
    pub(super) const EMPTY: Self = Self(0);
    pub(super) const ALL: Self = Self(u32::MAX);

    /// `length` clusters from the `first`-th on.
    #[inline]
    pub(super) fn span(first: u32, length: u32) -> Self {
        debug_assert!(length >= 1, "a span holds a cluster");
        debug_assert!(first + length <= BITS, "a span ends in its word");
        Self((u32::MAX >> (BITS - length)) << first)
    }

    /// The one cluster.
    #[inline]
    pub(super) fn of(cluster: ClusterIndex) -> Self {
        Self(1 << bit_of(cluster.0))
    }

    #[inline]
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[inline]
    pub(super) fn count(self) -> u64 {
        u64::from(self.0.count_ones())
    }

    /// Whether it holds all of `other`.
    #[inline]
    pub(super) fn covers(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The clusters of this word that it lacks.
    #[inline]
    pub(super) fn complement(self) -> Self {
        Self(!self.0)
    }

    /// Number of the lowest cluster; the mask is not empty.
    #[inline]
    pub(super) fn lowest(self) -> u32 {
        debug_assert!(!self.is_empty(), "an empty mask has no lowest cluster");
        self.0.trailing_zeros()
    }

    /// The lowest clusters without a gap, at most `max` of them; the mask is not empty.
    #[inline]
    pub(super) fn lowest_run(self, max: u64) -> Self {
        debug_assert!(max >= 1, "a run of no clusters");
        let first = self.lowest();
        let length = (self.0 >> first).trailing_ones();
        // Where `max` does not fit in 32 bits it does not bind either.
        Self::span(first, u32::try_from(max).map_or(length, |max| length.min(max)))
    }

    /// Its runs without a gap, lowest first.
    pub(super) fn runs(mut self) -> impl Iterator<Item = Self> {
        std::iter::from_fn(move || {
            if self.is_empty() {
                return None;
            }
            let run = self.lowest_run(CLUSTERS);
            self.0 &= !run.0;
            Some(run)
        })
    }

    /// A run as the clusters that it stands for, in a word whose first cluster is `base`.
    #[inline]
    pub(super) fn to_range(self, base: u64) -> ClusterRange {
        debug_assert_eq!(self, self.lowest_run(CLUSTERS), "only a run without a gap is a range");
        let first = self.lowest();
        let start = base + u64::from(first);
        // Not `count`: counting bits takes a dozen instructions on processors that cannot be relied on to do it in one.
        ClusterRange::new(start, start + u64::from((self.0 >> first).trailing_ones()))
    }

    #[inline]
    fn low(self) -> u64 {
        u64::from(self.0)
    }

    /// Both bits of each of its clusters.
    #[inline]
    pub(super) fn both(self) -> u64 {
        self.low() | self.low() << BITS
    }
}

impl BitAnd for Mask {
    type Output = Self;

    #[inline]
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// What a holder leaves behind when it gives a cluster up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// The copy is complete.
    Done,
    /// It failed: the cluster is to be copied by whoever comes next.
    ToCopy,
}

/// The states of 32 clusters, as read at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Word(pub(super) u64);

impl Word {
    #[inline]
    fn planes(self) -> (u32, u32) {
        #[expect(clippy::cast_possible_truncation, reason = "the low plane is what is wanted")]
        let low = self.0 as u32;
        (low, (self.0 >> BITS) as u32)
    }

    #[inline]
    pub(super) fn to_copy(self) -> Mask {
        let (low, high) = self.planes();
        Mask(!(low | high))
    }

    #[inline]
    pub(super) fn done(self) -> Mask {
        let (low, high) = self.planes();
        Mask(low & high)
    }

    /// Copying, with or without waiters.
    #[inline]
    pub(super) fn busy(self) -> Mask {
        let (low, high) = self.planes();
        Mask(low ^ high)
    }

    /// Copying with waiters.
    #[inline]
    pub(super) fn waited_for(self) -> Mask {
        let (low, high) = self.planes();
        Mask(high & !low)
    }

    /// After to copy → copying.
    #[inline]
    pub(super) fn claimed(self, mask: Mask) -> Self {
        debug_assert!(self.to_copy().covers(mask), "claimed what is not free");
        Self(self.0 | mask.low())
    }

    /// After copying → copying with waiters.
    pub(super) fn promoted(self, mask: Mask) -> Self {
        debug_assert!(self.busy().covers(mask), "nobody to wait for");
        debug_assert!((self.waited_for() & mask).is_empty(), "promoted twice");
        Self(self.0 ^ mask.both())
    }

    /// After the holder of `mask` gave it up.
    #[inline]
    pub(super) fn left(self, mask: Mask, outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self(self.0 | mask.both()),
            Outcome::ToCopy => Self(self.0 & !mask.both()),
        }
    }

    pub(super) fn state(self, cluster: ClusterIndex) -> ClusterState {
        let one = Mask::of(cluster);
        match (self.busy().covers(one), self.done().covers(one)) {
            (true, _) if self.waited_for().covers(one) => ClusterState::CopyingWithWaiters,
            (true, _) => ClusterState::Copying,
            (false, true) => ClusterState::Done,
            (false, false) => ClusterState::ToCopy,
        }
    }
}

/// The part of a range that lies in one word.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// Number of the word.
    pub(super) word: usize,
    /// Which of its clusters, without a gap.
    pub(super) mask: Mask,
    /// First cluster of the word, not of the span.
    pub(super) base: u64,
}

/// `range` cut at the borders of words.
#[inline]
pub(super) fn spans(range: ClusterRange) -> impl Iterator<Item = Span> {
    let mut rest = range;
    std::iter::from_fn(move || {
        let span = first_span(rest)?;
        rest.start = ClusterIndex((span.base + CLUSTERS).min(rest.end.0));
        Some(span)
    })
}

/// Number of the word that holds `cluster`.
#[inline]
pub(super) fn word_of(cluster: u64) -> usize {
    // Words are in memory, and memory is counted in usize; the engine runs on 64 bits alone.
    const { assert!(usize::BITS == 64) };
    (cluster / CLUSTERS) as usize
}

/// The first part of `range` that lies in one word; `None` for an empty range.
#[inline]
pub(super) fn first_span(range: ClusterRange) -> Option<Span> {
    let at = range.start.0;
    if at >= range.end.0 {
        return None;
    }
    let first = bit_of(at);
    let base = at - u64::from(first);
    // At most 32, so it fits.
    let length = bit_count((CLUSTERS - u64::from(first)).min(range.end.0 - at));
    Some(Span { word: word_of(base), mask: Mask::span(first, length), base })
}

/// `range`, which lies in one word, as that word's number and which of its clusters; `None` if it reaches beyond. An empty range may
/// be either, with no clusters.
///
/// For the check that a guest makes before each write: a comparison and two shifts, none of which can overflow.
#[inline]
pub(super) fn in_one_word(range: ClusterRange) -> Option<(usize, Mask)> {
    let first = range.start.0;
    let last = range.end.0.wrapping_sub(1);
    if first / CLUSTERS != last / CLUSTERS {
        return None;
    }
    let from_first = u32::MAX << bit_of(first);
    let to_last = u32::MAX >> (BITS - 1 - bit_of(last));
    Some((word_of(first), Mask(from_first & to_last)))
}

#[inline]
fn bit_of(cluster: u64) -> u32 {
    bit_count(cluster % CLUSTERS)
}

#[inline]
fn bit_count(count: u64) -> u32 {
    debug_assert!(count <= CLUSTERS, "{count} clusters are more than a word");
    #[expect(clippy::cast_possible_truncation, reason = "at most 32, asserted above")]
    let count = count as u32;
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_encoding() {
        let states = [
            (0, ClusterState::ToCopy),
            (1, ClusterState::Copying),
            (1 << 32, ClusterState::CopyingWithWaiters),
            (1 << 32 | 1, ClusterState::Done),
        ];
        for (bits, state) in states {
            for cluster in [0, 1, 31, 32, 95] {
                let word = Word(bits << (cluster % 32));
                assert_eq!(word.state(ClusterIndex(cluster)), state, "cluster {cluster}");
                assert_eq!(word.to_copy().count() + word.busy().count() + word.done().count(), 32);
            }
        }
    }

    #[test]
    fn spans_cut_a_range_at_the_borders_of_words() {
        let cut = |start, end| -> Vec<_> {
            spans(ClusterRange::new(start, end)).map(|s| (s.word, s.mask.to_range(s.base))).collect()
        };
        assert_eq!(cut(5, 5), []);
        assert_eq!(cut(31, 32), [(0, ClusterRange::new(31, 32))]);
        assert_eq!(cut(31, 33), [(0, ClusterRange::new(31, 32)), (1, ClusterRange::new(32, 33))]);
        assert_eq!(cut(32, 64), [(1, ClusterRange::new(32, 64))]);
        assert_eq!(cut(0, 70).last(), Some(&(2, ClusterRange::new(64, 70))));
    }

    #[test]
    fn a_range_in_one_word_is_its_only_span() {
        for start in 0..70 {
            for end in start..=70 {
                let range = ClusterRange::new(start, end);
                let spans: Vec<_> = spans(range).map(|span| (span.word, span.mask)).collect();
                match in_one_word(range) {
                    Some((_, mask)) if range.is_empty() => assert_eq!(mask, Mask::EMPTY),
                    Some(only) => assert_eq!(spans, [only], "{range:?}"),
                    None => assert_ne!(spans.len(), 1, "{range:?}"),
                }
            }
        }
    }

    #[test]
    fn runs_are_maximal_and_in_order() {
        let runs: Vec<_> = Mask(0b1011_0001).runs().map(|run| run.to_range(64)).collect();
        assert_eq!(runs, [ClusterRange::new(64, 65), ClusterRange::new(68, 70), ClusterRange::new(71, 72)]);
        assert_eq!(Mask(u32::MAX).runs().count(), 1);
        assert_eq!(Mask(u32::MAX).lowest_run(u64::MAX).count(), 32);
        assert_eq!(Mask::EMPTY.runs().count(), 0);
    }
}
