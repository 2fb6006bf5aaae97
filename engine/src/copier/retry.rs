//! What to do about a cluster that failed: policies, pauses, and the list of those to try again.
//!
//! A failed request over several clusters is first taken apart: each of its clusters is tried alone, at once and without asking
//! the policy, so that an error names one cluster and the good ones around it are copied. A cluster that failed alone goes by
//! the policy of the side that failed. Clusters in the list are not claimed; they are claimed when their time has come.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::errno::Errno;

use super::piece::Fault;
use super::plan::Limits;
use crate::job::IoStatus;
use crate::modes::ErrorPolicy;
use crate::units::{ClusterIndex, ClusterRange, Timestamp};

/// What a policy says about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Fail the job.
    Fail,
    /// Pause it, and try again after resume.
    Pause(IoStatus),
    /// Try again after a pause.
    Retry(Duration),
    /// Leave the cluster out.
    Skip,
}

impl Fault {
    /// Whether the storage is out of space.
    pub(super) fn is_no_space(self) -> bool {
        matches!(self, Self::Errno(Errno::ENOSPC | Errno::EDQUOT))
    }
}

/// The verdict of `policy` on `fault`, met after `attempts` failed retries.
pub(super) fn verdict(policy: ErrorPolicy, fault: Fault, attempts: u32, limits: &Limits) -> Verdict {
    let io_status = if fault.is_no_space() { IoStatus::NoSpace } else { IoStatus::Failed };
    match policy {
        ErrorPolicy::Report => Verdict::Fail,
        ErrorPolicy::Stop => Verdict::Pause(io_status),
        ErrorPolicy::Enospc | ErrorPolicy::Auto if fault.is_no_space() => Verdict::Pause(io_status),
        ErrorPolicy::Enospc | ErrorPolicy::Auto => Verdict::Fail,
        ErrorPolicy::Ignore if attempts < limits.retries => {
            Verdict::Retry(limits.retry_pause * 2u32.saturating_pow(attempts.min(16)))
        }
        ErrorPolicy::Ignore => Verdict::Skip,
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    attempts: u32,
    at: Timestamp,
}

/// Clusters to try again, each alone.
#[derive(Debug, Default)]
pub(super) struct RetryList {
    entries: BTreeMap<ClusterIndex, Entry>,
}

impl RetryList {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Try `cluster` again at `at`, after `attempts` failed retries.
    pub(super) fn add(&mut self, cluster: ClusterIndex, attempts: u32, at: Timestamp) {
        let before = self.entries.insert(cluster, Entry { attempts, at });
        assert!(before.is_none(), "{cluster:?} was waiting for its retry already");
    }

    /// As [`Self::add`], whether it was waiting already or not.
    pub(super) fn put(&mut self, cluster: ClusterIndex, attempts: u32, at: Timestamp) {
        self.entries.insert(cluster, Entry { attempts, at });
    }

    /// Somebody else tries `clusters` now: the failed retries of any of them.
    pub(super) fn take_out(&mut self, clusters: ClusterRange) -> Option<u32> {
        let of_them = self.entries.range(clusters.start..clusters.end).map(|(_, entry)| entry.attempts);
        let attempts = of_them.max();
        if attempts.is_some() {
            self.forget(clusters);
        }
        attempts
    }

    /// Whether a cluster's time has come.
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        self.entries.values().any(|entry| entry.at <= now)
    }

    /// Take a cluster whose time has come, with its failed retries.
    pub(super) fn take_due(&mut self, now: Timestamp) -> Option<(ClusterIndex, u32)> {
        let (&cluster, &entry) = self.entries.iter().find(|(_, entry)| entry.at <= now)?;
        self.entries.remove(&cluster);
        Some((cluster, entry.attempts))
    }

    /// The sweep has claimed `clusters` itself: they wait for nothing any more.
    pub(super) fn forget(&mut self, clusters: ClusterRange) {
        if !self.entries.is_empty() {
            self.entries.retain(|&cluster, _| !clusters.contains(cluster));
        }
    }

    /// Nothing waits for a retry any more.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }

    /// When the next cluster's time comes. Those whose time has come already wait for something else: a slot, a turn.
    pub(super) fn next_after(&self, now: Timestamp) -> Option<Timestamp> {
        self.entries.values().map(|entry| entry.at).filter(|&at| at > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EIO: Fault = Fault::Errno(Errno::EIO);
    const FULL: Fault = Fault::Errno(Errno::ENOSPC);

    #[test]
    fn policies_say_what_the_table_says() {
        let limits = Limits::default();
        let say = |policy, fault| verdict(policy, fault, 0, &limits);
        assert_eq!(say(ErrorPolicy::Report, EIO), Verdict::Fail);
        assert_eq!(say(ErrorPolicy::Report, FULL), Verdict::Fail);
        assert_eq!(say(ErrorPolicy::Stop, EIO), Verdict::Pause(IoStatus::Failed));
        assert_eq!(say(ErrorPolicy::Stop, FULL), Verdict::Pause(IoStatus::NoSpace));
        for policy in [ErrorPolicy::Enospc, ErrorPolicy::Auto] {
            assert_eq!(say(policy, EIO), Verdict::Fail);
            assert_eq!(say(policy, FULL), Verdict::Pause(IoStatus::NoSpace));
        }
    }

    #[test]
    fn ignore_retries_with_growing_pauses_and_then_skips() {
        let limits = Limits::default();
        let mut last = Duration::ZERO;
        for attempts in 0..limits.retries {
            let Verdict::Retry(pause) = verdict(ErrorPolicy::Ignore, EIO, attempts, &limits) else {
                panic!()
            };
            assert!(pause > last);
            last = pause;
        }
        assert_eq!(verdict(ErrorPolicy::Ignore, EIO, limits.retries, &limits), Verdict::Skip);
    }

    #[test]
    fn due_clusters_are_taken_once() {
        let mut list = RetryList::default();
        list.add(ClusterIndex(4), 1, Timestamp(Duration::from_secs(2)));
        list.add(ClusterIndex(9), 0, Timestamp(Duration::from_secs(1)));
        assert_eq!(list.take_due(Timestamp::default()), None);
        assert_eq!(list.next_after(Timestamp::default()), Some(Timestamp(Duration::from_secs(1))));
        assert_eq!(list.take_due(Timestamp(Duration::from_secs(3))), Some((ClusterIndex(4), 1)));
        assert_eq!(list.take_due(Timestamp(Duration::from_secs(3))), Some((ClusterIndex(9), 0)));
        assert_eq!(list.len(), 0);
    }
}
