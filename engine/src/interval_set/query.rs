//! Looking at the set: loads only, Acquire throughout, so that what is found done is visibly done.
//!
//! An answer about several words is no snapshot of one instant: each word was so when it was read. For *done* that is
//! as good, because a cluster that is done stays done (until a failed flush reopens it, which no reader of a live set
//! ever sees).

use super::{
    CLUSTERS, ClusterState, IntervalSet, Mask, Ordering, Span, Word, first_span, in_one_word, spans, word_of,
};
use crate::units::{ClusterCount, ClusterIndex, ClusterRange};

impl IntervalSet {
    #[inline]
    fn read(&self, word: usize) -> Word {
        Word(self.words[word].load(Ordering::Acquire))
    }

    /// Whether all clusters of `range` are done; true for none. What their holders did before they completed them is
    /// visible to the caller.
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    #[inline]
    #[must_use]
    pub fn is_done(&self, range: ClusterRange) -> bool {
        self.check(range);
        match in_one_word(range) {
            Some((word, mask)) => self.read(word).done().covers(mask),
            None => self.all_done(range),
        }
    }

    /// [`Self::is_done`] for what lies in several words: kept out of the callers' code.
    #[inline(never)]
    fn all_done(&self, range: ClusterRange) -> bool {
        spans(range).all(|span| self.read(span.word).done().covers(span.mask))
    }

    /// Whether anybody waits for a cluster of `range`: then its copy is urgent.
    ///
    /// To decide by the answer whether to go to sleep, put a sequentially consistent fence between the store that says
    /// so and this call (see *Ordering* in the [module](super)).
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    #[must_use]
    pub fn has_waiters(&self, range: ClusterRange) -> bool {
        self.check(range);
        spans(range).any(|span| !(self.read(span.word).waited_for() & span.mask).is_empty())
    }

    /// Where `cluster` stands at the moment.
    ///
    /// # Panics
    /// If the set has no such cluster.
    #[must_use]
    pub fn state(&self, cluster: ClusterIndex) -> ClusterState {
        assert!(cluster.0 < self.clusters.0, "cluster {} of {}", cluster.0, self.clusters.0);
        self.read(word_of(cluster.0)).state(cluster)
    }

    /// How many clusters are done. Reads the whole set: for reports, not for every completion.
    #[must_use]
    pub fn count_done(&self) -> ClusterCount {
        self.count_done_in(self.all())
    }

    /// How many clusters of `range` are done. Reads all of it.
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    #[must_use]
    pub fn count_done_in(&self, range: ClusterRange) -> ClusterCount {
        self.check(range);
        let count = spans(range).map(|span| (self.read(span.word).done() & span.mask).count()).sum();
        assert!(count <= range.count(), "{count} of {} clusters are done", range.count());
        ClusterCount(count)
    }

    /// The first cluster at or after `from` that is not done; `None` if all the rest is.
    ///
    /// # Panics
    /// If `from` is beyond the end of the set; its end itself is allowed.
    #[must_use]
    pub fn next_not_done(&self, from: ClusterIndex) -> Option<ClusterIndex> {
        self.find(from, |word| word.done().complement())
    }

    /// The first cluster of `range` that is not done.
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    #[must_use]
    pub fn first_not_done(&self, range: ClusterRange) -> Option<ClusterIndex> {
        self.find_in(range, |word| word.done().complement())
    }

    /// The first cluster of `range` that is to copy, with nobody at it.
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    #[must_use]
    pub fn first_to_copy(&self, range: ClusterRange) -> Option<ClusterIndex> {
        self.find_in(range, Word::to_copy)
    }

    /// The first cluster of `range` on which there is a claim.
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    #[must_use]
    pub fn first_busy(&self, range: ClusterRange) -> Option<ClusterIndex> {
        self.find_in(range, Word::busy)
    }

    /// The first cluster of `range` that is done.
    ///
    /// # Panics
    /// If `range` reaches beyond the set.
    #[must_use]
    pub fn first_done(&self, range: ClusterRange) -> Option<ClusterIndex> {
        self.find_in(range, Word::done)
    }

    /// The done clusters as ranges without a gap, in order, as read while the iterator runs.
    ///
    /// For checkpoints: every cluster named was done when its word was read, and what its holder did is visible. A
    /// cluster that is completed meanwhile may or may not be named, and may part two ranges that touch.
    pub fn done_ranges(&self) -> impl Iterator<Item = ClusterRange> {
        let mut at = ClusterIndex(0);
        std::iter::from_fn(move || {
            let start = self.find(at, Word::done)?;
            let end = self.next_not_done(start).unwrap_or(self.all().end);
            // Equal when the cluster was reopened in between, which is a caller's bug.
            assert!(start < end, "cluster {} is done no longer", start.0);
            at = end;
            Some(ClusterRange { start, end })
        })
    }

    /// The first cluster at or after `from` that `pick` picks.
    fn find(&self, from: ClusterIndex, pick: impl Fn(Word) -> Mask) -> Option<ClusterIndex> {
        self.find_in(ClusterRange { start: from, end: self.all().end }, pick)
    }

    /// The first cluster of `range` that `pick` picks.
    fn find_in(&self, range: ClusterRange, pick: impl Fn(Word) -> Mask) -> Option<ClusterIndex> {
        self.check(range);
        let (span, seen) = self.find_word(range, &pick)?;
        let found = ClusterIndex(span.base + u64::from((pick(seen) & span.mask).lowest()));
        debug_assert!(range.contains(found));
        Some(found)
    }

    /// The first word of `range` in which `pick` picks something, as the part of it that lies in `range`, and what was
    /// read. Words that lie in `range` as a whole are passed over in a loop that knows nothing of masks: it is what the
    /// sweep spends its time in when most is done.
    #[inline]
    pub(super) fn find_word(&self, range: ClusterRange, pick: impl Fn(Word) -> Mask) -> Option<(Span, Word)> {
        let hit = |span: Span| {
            let seen = self.read(span.word);
            (!(pick(seen) & span.mask).is_empty()).then_some((span, seen))
        };
        let first = first_span(range)?;
        let last = word_of(range.end.0 - 1);
        if let Some(found) = hit(first) {
            return Some(found);
        }
        if last == first.word {
            return None;
        }
        for (at, word) in (first.word + 1..).zip(&self.words[first.word + 1..last]) {
            let seen = Word(word.load(Ordering::Acquire));
            if !pick(seen).is_empty() {
                return Some((Span { word: at, mask: Mask::ALL, base: at as u64 * CLUSTERS }, seen));
            }
        }
        let base = range.end.0 - 1 - (range.end.0 - 1) % CLUSTERS;
        first_span(ClusterRange::new(base, range.end.0)).and_then(hit)
    }
}
