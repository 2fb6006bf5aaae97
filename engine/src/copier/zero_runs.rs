//! Holes of the source that are made zero on a target which does not read as zeros already.
//!
//! # Model
//! A run of zeros takes no slots, so its size is bounded by itself. Where a target gives space back, megabytes take microseconds; where it writes
//! zeros, they take as long as data, and what guests' copies want to write there waits. Which it is shows by how long the runs take. So
//! those of a live disk begin small, are larger after one that was quick and smaller after one that was slow, and while guests
//! are about there is one at a time. Of a disk that nobody writes to they are large from the beginning.
//!
//! A run that fails for a reason that may pass is tried once more, and then written as data, whatever becomes of the others: a bad place
//! on the target costs two attempts, and what it is told by is the write.

use std::time::Duration;

use super::tally::Was;
use super::{Copier, Task, Zeroing};
use crate::interval_set::Claim;
use crate::ring::{Op, Output, ZeroMethod};
use crate::units::{ClusterCount, ClusterIndex, ClusterRange, Timestamp};
use nix::errno::Errno;

/// Runs in flight of a disk that nobody writes to.
const MAX_RUNS: u32 = 4;
/// The first runs of a live disk have as many bytes, and none has fewer (but for one cluster).
const FIRST_BYTES: u64 = 512 << 10;
/// Most runs that have failed and are kept in mind, once or twice; with more of them all zeros are written as data.
const MAX_FAILED: usize = 64;
/// A run that takes less time may be followed by one that is twice as large.
const QUICK: Duration = Duration::from_millis(2);
/// One that takes more is followed by one that is half as large.
const SLOW: Duration = Duration::from_millis(8);

/// See the module's header.
#[derive(Debug)]
pub(super) struct ZeroRuns {
    pub(super) in_flight: u32,
    /// Most of them in flight.
    pub(super) limit: u32,
    /// What those in flight wrote cannot be believed: a flush failed meanwhile.
    pub(super) tainted: bool,
    /// Clusters of the next one.
    clusters: u64,
    least: u64,
    most: u64,
    /// Failed once.
    failed: Vec<ClusterRange>,
    /// Failed twice: these zeros are data.
    as_data: Vec<ClusterRange>,
}

fn meet(a: ClusterRange, b: ClusterRange) -> bool {
    a.start < b.end && b.start < a.end
}

impl ZeroRuns {
    /// Of at most `most_bytes` each, in clusters of `cluster_bytes`.
    pub(super) fn new(most_bytes: u64, cluster_bytes: u64, live: bool) -> Self {
        let clusters = |bytes: u64| (bytes / cluster_bytes).max(1);
        let most = clusters(most_bytes);
        let least = clusters(FIRST_BYTES).min(most);
        let first = if live { least } else { most };
        let (failed, as_data) = (Vec::new(), Vec::new());
        Self { in_flight: 0, limit: MAX_RUNS, tainted: false, clusters: first, least, most, failed, as_data }
    }

    /// A run of `clusters` has failed. Gives whether that is more than can be kept in mind.
    fn failed(&mut self, clusters: ClusterRange) -> bool {
        if self.failed.iter().any(|&failed| meet(failed, clusters)) {
            self.failed.retain(|&failed| !meet(failed, clusters));
            self.as_data.push(clusters);
        } else {
            self.failed.push(clusters);
        }
        self.failed.len() + self.as_data.len() > MAX_FAILED
    }

    /// Whether zeros at `cluster` are written as data, and up to where that holds, `end` at most.
    pub(super) fn goes_as_data(&self, cluster: ClusterIndex, end: ClusterIndex) -> (bool, ClusterIndex) {
        let here = |range: &ClusterRange| range.contains(cluster);
        if let Some(range) = self.as_data.iter().find(|range| here(range)) {
            return (true, end.min(range.end));
        }
        let next = self.as_data.iter().map(|range| range.start).filter(|&start| start > cluster).min();
        (false, next.map_or(end, |next| end.min(next)))
    }

    /// A run of `clusters` has taken so long.
    fn took(&mut self, clusters: u64, time: Duration) {
        if time > SLOW {
            self.clusters = (self.clusters / 2).max(self.least);
        } else if time < QUICK && clusters >= self.clusters {
            self.clusters = (self.clusters * 2).min(self.most);
        }
    }
}

impl Copier {
    pub(super) fn start_zero_run(&mut self, range: ClusterRange, now: Timestamp) -> bool {
        let Zeroing::Operation(method) = self.zeroing else { unreachable!("holes go as data then") };
        if self.zero_runs.in_flight >= self.zero_runs.limit || self.zero_runs.tainted {
            return false;
        }
        let Some(claim) = self.set.claim_first(range, ClusterCount(self.zero_runs.clusters)) else {
            self.position = range.end;
            return true;
        };
        let clusters = claim.range();
        self.position = clusters.end;
        self.retries.forget(clusters);
        self.zero_runs.in_flight += 1;
        let range = self.plan.geometry.bytes_of(clusters);
        let op = Op::WriteZeroes { file: self.plan.target.file, range, method };
        tracing::trace!(?clusters, ?method, "zero");
        self.push(Task::ZeroRun { claim, method, since: now }, op);
        true
    }

    pub(super) fn on_zero_run(
        &mut self,
        claim: Claim,
        method: ZeroMethod,
        time: Duration,
        result: &Result<Output, Errno>,
    ) {
        self.zero_runs.in_flight -= 1;
        let clusters = claim.range();
        if self.plan.live.is_some() {
            self.zero_runs.took(clusters.count(), time);
        }
        match result {
            Ok(_) if !self.zero_runs.tainted => {
                self.zeroing_failures = 0;
                self.set.complete(claim);
                self.skipped.done(clusters);
                self.note_zeros(clusters, Was::Hole);
                self.checkpoints.on_settled(self.plan.geometry.bytes_of(clusters).length);
            }
            result => {
                if let Err(errno) = result {
                    self.zeroing_failed(method, *errno);
                    let still = self.zeroing == Zeroing::Operation(method);
                    if still && self.zero_runs.failed(clusters) {
                        self.zeroing = Zeroing::Data;
                    }
                }
                if !matches!(result, Err(Errno::EOPNOTSUPP)) {
                    self.skipped.may_be_written(clusters);
                }
                self.set.release(claim);
                self.rewind_to(clusters.start);
            }
        }
        if self.zero_runs.in_flight == 0 {
            self.zero_runs.tainted = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u64 = 32 << 20;
    const CLUSTER: u64 = 65_536;

    /// The bytes of a run after many, on a target that zeroes so many bytes a second besides what each takes anyway.
    fn settled(speed: u64, each: Duration) -> u64 {
        let mut runs = ZeroRuns::new(MOST, CLUSTER, true);
        for _ in 0..100 {
            let bytes = runs.clusters * CLUSTER;
            runs.took(runs.clusters, each + Duration::from_micros(bytes * 1_000_000 / speed));
        }
        runs.clusters * CLUSTER
    }

    #[test]
    fn runs_are_as_large_as_the_target_is_quick() {
        assert_eq!(settled(1 << 40, Duration::from_micros(50)), MOST);
        let written = settled(500 << 20, Duration::from_micros(100));
        assert!((512 << 10..=4 << 20).contains(&written), "{written}");
        assert_eq!(settled(1 << 20, Duration::ZERO), FIRST_BYTES, "they do not get smaller and smaller");
        // It cannot be had for less.
        assert_eq!(settled(1 << 40, Duration::from_millis(20)), FIRST_BYTES);
    }

    #[test]
    fn what_failed_twice_is_data() {
        let mut runs = ZeroRuns::new(MOST, CLUSTER, false);
        let at = |runs: &ZeroRuns, cluster| runs.goes_as_data(ClusterIndex(cluster), ClusterIndex(100));
        assert!(!runs.failed(ClusterRange::new(10, 20)));
        assert_eq!(at(&runs, 10), (false, ClusterIndex(100)));
        assert!(!runs.failed(ClusterRange::new(30, 40)), "another");
        assert!(!runs.failed(ClusterRange::new(15, 20)), "a part of it");
        assert_eq!(at(&runs, 0), (false, ClusterIndex(15)));
        assert_eq!(at(&runs, 15), (true, ClusterIndex(20)));
        assert_eq!(at(&runs, 20), (false, ClusterIndex(100)));
        let most = u64::try_from(MAX_FAILED).unwrap();
        let more = |at: u64| ClusterRange::new(100 + 2 * at, 101 + 2 * at);
        assert!(!(0..most - 2).any(|at| runs.failed(more(at))));
        assert!(runs.failed(more(most)));
    }

    #[test]
    fn short_ones_say_nothing_of_long_ones() {
        let mut runs = ZeroRuns::new(MOST, CLUSTER, true);
        runs.took(1, Duration::ZERO);
        assert_eq!(runs.clusters * CLUSTER, FIRST_BYTES);
    }

    #[test]
    fn of_a_disk_that_nobody_writes_to_they_are_large() {
        assert_eq!(ZeroRuns::new(MOST, CLUSTER, false).clusters * CLUSTER, MOST);
        assert_eq!(ZeroRuns::new(1, CLUSTER, false).clusters, 1);
        assert_eq!(ZeroRuns::new(1, CLUSTER, true).clusters, 1);
    }
}
