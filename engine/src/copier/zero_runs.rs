//! Holes of the source that are made zero on a target which does not read as zeros already.
//!
//! # Model
//! A run of zeros takes no slots, so its size is bounded by itself. Where a target gives space back, megabytes take microseconds; where it writes
//! zeros, they take as long as data, and what guests' copies want to write there waits. Which it is shows by how long the runs take. So
//! those of a live disk begin small, are larger after one that was quick and smaller after one that was slow, and while guests
//! are about there is one at a time. Of a disk that nobody writes to they are large from the beginning.

use std::time::Duration;

use super::tally::Was;
use super::{Copier, Task, Zeroing};
use crate::interval_set::Claim;
use crate::ring::{Op, Output, ZeroMethod};
use crate::units::{ClusterCount, ClusterRange, Timestamp};
use nix::errno::Errno;

/// Runs in flight of a disk that nobody writes to.
const MAX_RUNS: u32 = 4;
/// The first runs of a live disk have as many bytes, and none has fewer (but for one cluster).
const FIRST_BYTES: u64 = 512 << 10;
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
}

impl ZeroRuns {
    /// Of at most `most_bytes` each, in clusters of `cluster_bytes`.
    pub(super) fn new(most_bytes: u64, cluster_bytes: u64, live: bool) -> Self {
        let clusters = |bytes: u64| (bytes / cluster_bytes).max(1);
        let most = clusters(most_bytes);
        let least = clusters(FIRST_BYTES).min(most);
        let first = if live { least } else { most };
        Self { in_flight: 0, limit: MAX_RUNS, tainted: false, clusters: first, least, most }
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
