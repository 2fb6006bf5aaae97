//! What is left out of the copy, why, and what the target holds there.
//!
//! Neighbours with the same error are one range, so a dead zone of a disk costs no more than a single bad cluster, however large it is.
//!
//! # What the target holds there
//! What it held before the run, as long as the run has written nothing there. A write that failed may have written a part. A
//! cluster that was done and is to be copied again was written as a whole, and which ones that concerns is not remembered: from then on
//! nothing more is claimed of any cluster that is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::error::Error;
use crate::job::{SkippedRange, TargetHolds};
use crate::units::{ClusterIndex, ClusterRange, Geometry};

/// Most clusters remembered of which a write has failed. They wait for a retry, which bounds them; beyond it, none is told apart.
const MOST_WRITTEN: usize = 65_536;

/// Neighbours that were left out because of the same error.
#[derive(Debug)]
struct Run {
    end: ClusterIndex,
    error: Arc<Error>,
    holds: TargetHolds,
}

impl Run {
    fn goes_with(&self, error: &Error, holds: TargetHolds) -> bool {
        self.holds == holds && self.error.tells_the_same_as(error)
    }
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Skipped {
    runs: BTreeMap<ClusterIndex, Run>,
    clusters: u64,
    /// What the target holds where this run writes nothing.
    before: TargetHolds,
    /// Clusters to copy of which something may have been written.
    written: BTreeSet<ClusterIndex>,
    /// That may be so of every cluster.
    any_written: bool,
}

impl Skipped {
    /// Nothing is left out, of a target that holds `before`.
    pub(super) fn new(before: TargetHolds) -> Self {
        Self { runs: BTreeMap::new(), clusters: 0, before, written: BTreeSet::new(), any_written: false }
    }

    /// Something may have been written to `clusters`, which are not done.
    pub(super) fn may_be_written(&mut self, clusters: ClusterRange) {
        if !self.any_written {
            self.written.extend(clusters.iter());
        }
        if self.written.len() > MOST_WRITTEN {
            self.all_may_be_written();
        }
    }

    /// Something may have been written to whatever is not done.
    pub(super) fn all_may_be_written(&mut self) {
        self.any_written = true;
        self.written.clear();
    }

    /// `clusters` are done.
    pub(super) fn done(&mut self, clusters: ClusterRange) {
        if !self.written.is_empty() {
            clusters.iter().for_each(|cluster| _ = self.written.remove(&cluster));
        }
    }

    /// Leave `cluster` out because of `error`.
    pub(super) fn add(&mut self, cluster: ClusterIndex, error: Arc<Error>) {
        let is_written = self.written.remove(&cluster) || self.any_written;
        let holds = if is_written { TargetHolds::Unknown } else { self.before };
        let mut range = super::one(cluster);
        if let Some((&start, run)) = self.runs.range(..=cluster).next_back() {
            assert!(run.end <= cluster, "{cluster:?} is left out already");
            if run.end == cluster && run.goes_with(&error, holds) {
                range.start = start;
            }
        }
        if self.runs.get(&range.end).is_some_and(|next| next.goes_with(&error, holds)) {
            let next = self.runs.remove(&range.end).expect("it was just there");
            range.end = next.end;
        }
        self.runs.insert(range.start, Run { end: range.end, error, holds });
        self.clusters += 1;
    }

    /// `cluster` is not left out after all; whether it was.
    pub(super) fn remove(&mut self, cluster: ClusterIndex) -> bool {
        let Some((&start, run)) = self.runs.range_mut(..=cluster).next_back() else { return false };
        let end = run.end;
        if end <= cluster {
            return false;
        }
        let after = ClusterIndex(cluster.0 + 1);
        let rest = (after < end).then(|| Run { end, error: Arc::clone(&run.error), holds: run.holds });
        let may_be_written = run.holds != self.before;
        run.end = cluster;
        if start == cluster {
            self.runs.remove(&start);
        }
        if let Some(rest) = rest {
            self.runs.insert(after, rest);
        }
        self.clusters -= 1;
        if may_be_written {
            // Left out again, it still is.
            self.may_be_written(super::one(cluster));
        }
        true
    }

    /// The first range that ends after `cluster`, whatever comes with another error behind it.
    pub(super) fn next_from(&self, cluster: ClusterIndex) -> Option<ClusterRange> {
        let range = |(&start, run): (&ClusterIndex, &Run)| ClusterRange { start, end: run.end };
        let before = self.runs.range(..=cluster).next_back().map(range);
        let after = || self.runs.range(cluster..).next().map(range);
        before.filter(|range| range.contains(cluster)).or_else(after)
    }

    /// Why `cluster` was left out, if it was.
    pub(super) fn error_of(&self, cluster: ClusterIndex) -> Option<&Arc<Error>> {
        let (_, run) = self.runs.range(..=cluster).next_back()?;
        (cluster < run.end).then_some(&run.error)
    }

    /// Ranges, told apart by their errors.
    pub(super) fn count(&self) -> usize {
        self.runs.len()
    }

    /// Clusters in all of them.
    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// The ranges, ascending and not adjacent, whatever their errors.
    pub(super) fn ranges(&self) -> Vec<ClusterRange> {
        merged(self.runs.iter().map(|(&start, run)| ClusterRange { start, end: run.end }))
    }

    /// The ranges with their errors, ascending.
    pub(super) fn told(&self, geometry: Geometry) -> Vec<SkippedRange> {
        let told = |(&start, run): (&ClusterIndex, &Run)| {
            let range = geometry.bytes_of(ClusterRange { start, end: run.end });
            SkippedRange { range, error: Error::clone(&run.error).at(range).to_string(), target: run.holds }
        };
        self.runs.iter().map(told).collect()
    }
}

/// Ascending, disjoint ranges with those that touch made one.
pub(super) fn merged(ranges: impl Iterator<Item = ClusterRange>) -> Vec<ClusterRange> {
    let mut merged: Vec<ClusterRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::error::Operation;
    use crate::units::{ClusterSize, Length};

    #[test]
    fn neighbours_with_the_same_error_become_one_in_any_order() {
        let geometry = Geometry::new(Length(100 << 16), ClusterSize::DEFAULT);
        let error = |operation, cluster| {
            let range = geometry.bytes_of(super::super::one(ClusterIndex(cluster)));
            Arc::new(Error::io(operation, "disk", Some(range), Errno::EIO))
        };
        let mut skipped = Skipped::new(TargetHolds::Zeros);
        for cluster in [7, 3, 5, 4, 6, 20] {
            skipped.add(ClusterIndex(cluster), error(Operation::Read, cluster));
        }
        assert_eq!((skipped.count(), skipped.clusters()), (2, 6));
        skipped.add(ClusterIndex(8), error(Operation::Write, 8));
        skipped.add(ClusterIndex(9), error(Operation::Write, 9));
        assert_eq!((skipped.count(), skipped.clusters()), (3, 8));
        assert_eq!(skipped.ranges(), [ClusterRange::new(3, 10), ClusterRange::new(20, 21)]);
        let told = skipped.told(geometry);
        let ranges: Vec<_> =
            told.iter().map(|told| (told.range.offset >> 16, told.range.end() >> 16)).collect();
        assert_eq!(ranges, [(3, 8), (8, 10), (20, 21)]);
        assert!(told[1].error.contains("write") && told[1].error.contains("524288"), "{:?}", told[1]);
    }

    #[test]
    fn what_the_target_holds_is_told_only_where_nothing_was_written() {
        let geometry = Geometry::new(Length(100 << 16), ClusterSize::DEFAULT);
        let error = Arc::new(Error::io(Operation::Read, "disk", None, Errno::EIO));
        for before in [TargetHolds::Zeros, TargetHolds::Unchanged, TargetHolds::Unknown] {
            let mut skipped = Skipped::new(before);
            skipped.may_be_written(ClusterRange::new(5, 9));
            skipped.done(ClusterRange::new(7, 8));
            for cluster in 4..9 {
                skipped.add(ClusterIndex(cluster), Arc::clone(&error));
            }
            skipped.all_may_be_written();
            skipped.add(ClusterIndex(20), Arc::clone(&error));
            let told: Vec<_> =
                skipped.told(geometry).iter().map(|told| (told.range.offset >> 16, told.target)).collect();
            let unknown = TargetHolds::Unknown;
            match before {
                TargetHolds::Unknown => assert_eq!(told, [(4, unknown), (20, unknown)]),
                _ => assert_eq!(told, [(4, before), (5, unknown), (7, before), (8, unknown), (20, unknown)]),
            }
        }
    }

    #[test]
    fn what_was_written_once_is_remembered_by_a_second_chance() {
        let geometry = Geometry::new(Length(100 << 16), ClusterSize::DEFAULT);
        let error = Arc::new(Error::io(Operation::Read, "disk", None, Errno::EIO));
        let mut skipped = Skipped::new(TargetHolds::Zeros);
        skipped.may_be_written(ClusterRange::new(5, 6));
        for cluster in [5, 6] {
            skipped.add(ClusterIndex(cluster), Arc::clone(&error));
            assert!(skipped.remove(ClusterIndex(cluster)));
            skipped.add(ClusterIndex(cluster), Arc::clone(&error));
        }
        let told: Vec<_> = skipped.told(geometry).iter().map(|told| told.target).collect();
        assert_eq!(told, [TargetHolds::Unknown, TargetHolds::Zeros]);
    }

    #[test]
    fn what_was_written_is_not_remembered_without_end() {
        let mut skipped = Skipped::new(TargetHolds::Zeros);
        skipped.may_be_written(ClusterRange::new(0, MOST_WRITTEN as u64));
        assert!(!skipped.any_written);
        skipped.may_be_written(ClusterRange::new(1 << 30, (1 << 30) + 1));
        assert!(skipped.any_written && skipped.written.is_empty());
    }

    #[test]
    fn what_is_taken_off_again_leaves_the_rest() {
        let error = Arc::new(Error::io(Operation::Read, "disk", None, Errno::EIO));
        let mut naive = std::collections::BTreeSet::new();
        let mut skipped = Skipped::new(TargetHolds::Unknown);
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..5000 {
            let cluster = rng.u64(0..40);
            if rng.bool() {
                assert_eq!(skipped.remove(ClusterIndex(cluster)), naive.remove(&cluster));
            } else if naive.insert(cluster) {
                skipped.add(ClusterIndex(cluster), Arc::clone(&error));
            }
            assert_eq!(skipped.clusters(), naive.len() as u64);
            let listed: Vec<u64> =
                skipped.ranges().iter().flat_map(|range| range.start.0..range.end.0).collect();
            assert_eq!(listed, naive.iter().copied().collect::<Vec<_>>());
            let from = rng.u64(0..41);
            let next = skipped.next_from(ClusterIndex(from)).map(|range| range.start.0.max(from));
            assert_eq!(next, naive.range(from..).next().copied());
        }
    }
}
