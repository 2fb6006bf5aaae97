//! The exclusive right to copy some clusters.

use super::words::SetId;
use crate::units::{ClusterIndex, ClusterRange};

/// The exclusive right to copy a contiguous, non-empty range of clusters.
///
/// It stands for bits in its set that only [`complete`](super::IntervalSet::complete) and
/// [`release`](super::IntervalSet::release) can take back, so it is used up by one of these, whole or in parts
/// ([`split_off`](Self::split_off), [`into_clusters`](Self::into_clusters)). To drop it instead is a bug: its clusters
/// would be busy for ever. Debug builds panic; release builds log an error. A thread that is panicking may drop claims:
/// it poisons its engine, and the set's [`close`](super::IntervalSet::close) lets the waiters go.
#[must_use = "the clusters of a claim stay busy until it is completed or released"]
#[derive(Debug, PartialEq, Eq)]
pub struct Claim {
    set: SetId,
    range: ClusterRange,
}

impl Claim {
    /// The caller has just turned `range` from to copy to copying in the set, and hands the right to it over.
    #[inline]
    pub(super) fn new(set: SetId, range: ClusterRange) -> Self {
        debug_assert!(!range.is_empty(), "a claim holds a cluster");
        Self { set, range }
    }

    /// The clusters claimed.
    #[must_use]
    pub fn range(&self) -> ClusterRange {
        self.range
    }

    /// Cuts the claim in two: `self` keeps what lies before `at`, the rest is returned.
    ///
    /// # Panics
    /// If either part would be empty.
    pub fn split_off(&mut self, at: ClusterIndex) -> Self {
        assert!(self.range.start < at && at < self.range.end, "cannot cut {:?} at {}", self.range, at.0);
        let rest = Self::new(self.set, ClusterRange { start: at, end: self.range.end });
        self.range.end = at;
        debug_assert_eq!(self.range.end, rest.range.start);
        rest
    }

    /// One claim for each cluster, in order: for slots that finish on their own and in any order. What is left of the
    /// iterator is a claim like any other, so it is to be run to its end.
    pub fn into_clusters(self) -> ClaimClusters {
        ClaimClusters { rest: Some(self) }
    }

    /// Ends the claim and tells what it held.
    ///
    /// # Panics
    /// If it is a claim on another set.
    #[inline]
    pub(super) fn into_range(self, set: SetId) -> ClusterRange {
        assert_eq!(self.set, set, "the claim on {:?} belongs to another set", self.range);
        let range = self.range;
        std::mem::forget(self);
        range
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        tracing::error!(claim = ?self.range, "claim dropped, its clusters stay busy");
        debug_assert!(false, "claim on {:?} was neither completed nor released", self.range);
    }
}

/// The clusters of a claim as claims of their own; see [`Claim::into_clusters`].
#[must_use = "what is left of it is a claim"]
#[derive(Debug)]
pub struct ClaimClusters {
    rest: Option<Claim>,
}

impl Iterator for ClaimClusters {
    type Item = Claim;

    fn next(&mut self) -> Option<Claim> {
        let mut first = self.rest.take()?;
        if first.range.count() > 1 {
            self.rest = Some(first.split_off(ClusterIndex(first.range.start.0 + 1)));
        }
        debug_assert_eq!(first.range.count(), 1);
        Some(first)
    }
}
