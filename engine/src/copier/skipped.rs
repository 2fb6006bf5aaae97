//! What is left out of the copy, and why.
//!
//! Neighbours with the same error are one range, so a dead zone of a disk costs no more than a single bad cluster, however large it is.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::Error;
use crate::job::SkippedRange;
use crate::units::{ClusterIndex, ClusterRange, Geometry};

/// Neighbours that were left out because of the same error.
#[derive(Debug)]
struct Run {
    end: ClusterIndex,
    error: Arc<Error>,
}

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct Skipped {
    runs: BTreeMap<ClusterIndex, Run>,
    clusters: u64,
}

impl Skipped {
    /// Leave `cluster` out because of `error`.
    pub(super) fn add(&mut self, cluster: ClusterIndex, error: Arc<Error>) {
        let mut range = super::one(cluster);
        if let Some((&start, run)) = self.runs.range(..=cluster).next_back() {
            assert!(run.end <= cluster, "{cluster:?} is left out already");
            if run.end == cluster && run.error.tells_the_same_as(&error) {
                range.start = start;
            }
        }
        if self.runs.get(&range.end).is_some_and(|next| next.error.tells_the_same_as(&error)) {
            let next = self.runs.remove(&range.end).expect("it was just there");
            range.end = next.end;
        }
        self.runs.insert(range.start, Run { end: range.end, error });
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
        let rest = (after < end).then(|| Run { end, error: Arc::clone(&run.error) });
        run.end = cluster;
        if start == cluster {
            self.runs.remove(&start);
        }
        if let Some(rest) = rest {
            self.runs.insert(after, rest);
        }
        self.clusters -= 1;
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
            SkippedRange { range, error: Error::clone(&run.error).at(range).to_string() }
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
        let mut skipped = Skipped::default();
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
    fn what_is_taken_off_again_leaves_the_rest() {
        let error = Arc::new(Error::io(Operation::Read, "disk", None, Errno::EIO));
        let mut naive = std::collections::BTreeSet::new();
        let mut skipped = Skipped::default();
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
