//! Discards that the guest was told are done, and that wait until their clusters are copied.
//!
//! # Model
//! A set of byte ranges, whole grains of the disk, disjoint and never adjacent. The guest may write to a range at any time: it is taken
//! out before the write reaches the disk, and out it stays.
//!
//! # Bound
//! A discard is a hint, and the set has a fixed number of ranges. When there are too many, all are rounded in to whole clusters, which drops the
//! crumbs between writes; when that is not enough, the smallest are forgotten. What is forgotten is space that is not given
//! back, never data.

use std::collections::BTreeMap;

use crate::units::ByteRange;

/// See the module's header.
#[derive(Debug)]
pub(super) struct DeferredDiscards {
    /// Start and end of each range.
    ranges: BTreeMap<u64, u64>,
    /// Most ranges.
    limit: usize,
    /// What ranges are rounded in to when there are too many, in bytes.
    coarse: u64,
    /// Ranges forgotten, for want of room.
    forgotten: u64,
}

impl DeferredDiscards {
    /// An empty set of at most `limit` ranges, at least 1.
    pub(super) fn new(limit: usize, coarse: u64) -> Self {
        assert!(limit > 0 && coarse > 0, "a set of {limit} ranges, in multiples of {coarse}");
        Self { ranges: BTreeMap::new(), limit, coarse, forgotten: 0 }
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }

    /// Ranges forgotten so far, for want of room.
    pub(super) fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Add `range`, merged with what it overlaps or touches.
    pub(super) fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.offset, range.end());
        while let Some((&other, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(&other);
            start = start.min(other);
            end = end.max(other_end);
        }
        self.ranges.insert(start, end);
        self.keep_bound();
    }

    /// Take `range` out.
    pub(super) fn remove(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let mut split = false;
        while let Some((&start, &end)) = self.ranges.range(..range.end()).next_back() {
            if end <= range.offset {
                break;
            }
            self.ranges.remove(&start);
            if end > range.end() {
                self.ranges.insert(range.end(), end);
                split = true;
            }
            if start < range.offset {
                self.ranges.insert(start, range.offset);
            }
        }
        if split {
            self.keep_bound();
        }
    }

    /// Forget everything.
    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// The first bytes that wait at or after `from`, at most `most` of them, up to a multiple of `most`.
    pub(super) fn next(&self, from: u64, most: u64) -> Option<ByteRange> {
        let around = self.ranges.range(..=from).next_back().filter(|&(_, &end)| end > from);
        let (&start, &end) = around.or_else(|| self.ranges.range(from..).next())?;
        let start = start.max(from);
        let boundary = (start / most + 1).saturating_mul(most);
        Some(ByteRange::between(start, end.min(boundary)))
    }

    fn keep_bound(&mut self) {
        if self.ranges.len() <= self.limit {
            return;
        }
        let before = self.ranges.len();
        let coarse = self.coarse;
        self.ranges = std::mem::take(&mut self.ranges)
            .into_iter()
            .map(|(start, end)| (start.next_multiple_of(coarse), end / coarse * coarse))
            .filter(|(start, end)| start < end)
            .collect();
        while self.ranges.len() > self.limit {
            let smallest = self.ranges.iter().min_by_key(|(start, end)| *end - *start);
            let start = *smallest.expect("more than the limit").0;
            self.ranges.remove(&start);
        }
        self.forgotten += (before - self.ranges.len()) as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GRAIN: u64 = 512;
    const BLOCKS: usize = 128;

    fn blocks(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start * GRAIN, end * GRAIN)
    }

    fn contents(set: &DeferredDiscards) -> Vec<bool> {
        let mut bits = vec![false; BLOCKS];
        for (&start, &end) in &set.ranges {
            assert!(start < end, "an empty range");
            assert_eq!((start % GRAIN, end % GRAIN), (0, 0));
            for block in start / GRAIN..end / GRAIN {
                assert!(
                    !std::mem::replace(&mut bits[usize::try_from(block).unwrap()], true),
                    "ranges overlap"
                );
            }
        }
        bits
    }

    #[test]
    fn neighbours_merge_and_a_write_cuts() {
        let mut set = DeferredDiscards::new(8, 4096);
        set.insert(blocks(0, 4));
        set.insert(blocks(8, 12));
        set.insert(blocks(4, 8));
        assert_eq!(set.ranges.len(), 1);
        set.remove(blocks(5, 6));
        assert_eq!(set.next(0, 1 << 20), Some(blocks(0, 5)));
        assert_eq!(set.next(5 * GRAIN, 1 << 20), Some(blocks(6, 12)));
        assert_eq!(set.next(7 * GRAIN, 1024), Some(blocks(7, 8)), "up to a multiple");
        assert_eq!(set.next(12 * GRAIN, 1024), None);
        assert_eq!(set.bytes(), 11 * GRAIN);
    }

    #[test]
    fn too_many_are_rounded_in_and_then_the_smallest_go() {
        let mut set = DeferredDiscards::new(2, 4096);
        set.insert(blocks(1, 7));
        set.insert(blocks(9, 24));
        set.insert(blocks(30, 60));
        assert_eq!(set.ranges, BTreeMap::from([(8192, 12288), (16384, 28672)]), "the first held no cluster");
        set.insert(blocks(64, 80));
        assert_eq!(set.ranges, BTreeMap::from([(16384, 28672), (32768, 40960)]), "the smallest is gone");
        assert_eq!(set.forgotten(), 2);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Insert,
        Remove,
        Next,
    }

    fn steps() -> impl Strategy<Value = Vec<(Step, u64, u64)>> {
        let kind = prop_oneof![3 => Just(Step::Insert), 2 => Just(Step::Remove), 1 => Just(Step::Next)];
        prop::collection::vec((kind, 0..BLOCKS as u64, 0u64..20), 1..120)
    }

    proptest! {
        #[test]
        fn holds_exactly_what_a_list_of_blocks_does(steps in steps(), limit in prop_oneof![Just(1000usize), 1usize..6]) {
            let mut set = DeferredDiscards::new(limit, 2048);
            let mut naive = vec![false; BLOCKS];
            for (step, start, length) in steps {
                let end = (start + length).min(BLOCKS as u64);
                let range = blocks(start, end);
                let bits = usize::try_from(start).unwrap()..usize::try_from(end).unwrap();
                match step {
                    Step::Insert => {
                        set.insert(range);
                        naive[bits].fill(true);
                    }
                    Step::Remove => {
                        set.remove(range);
                        naive[bits].fill(false);
                    }
                    Step::Next => {
                        let want = (start..BLOCKS as u64).find(|&block| naive[usize::try_from(block).unwrap()]);
                        let got = set.next(start * GRAIN, 4096).map(|found| found.offset / GRAIN);
                        prop_assert_eq!(got, want);
                    }
                }
                prop_assert!(set.ranges.len() <= limit);
                let held = contents(&set);
                for (held, naive) in held.iter().zip(&mut naive) {
                    prop_assert!(!*held || *naive, "what was not discarded, or was written since");
                    // What was forgotten is not missed.
                    *naive &= *held || limit == 1000;
                }
                if limit == 1000 {
                    prop_assert_eq!(held, naive.clone());
                }
            }
        }
    }
}
