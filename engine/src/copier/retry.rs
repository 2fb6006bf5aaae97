//! What to do about a cluster that failed: policies, pauses, and the list of those to try again.
//!
//! A failed request over several clusters is first taken apart: each of its clusters is tried alone, at once and without asking
//! the policy, so that an error names one cluster and the good ones around it are copied. A cluster that failed alone goes by
//! the policy of the side that failed. Clusters in the list are not claimed; they are claimed when their time has come.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
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

/// The verdict of `policy` on `fault`, met after `attempts` failed retries. A storage that is lost is lost for every cluster and every retry:
/// no policy has a say.
pub(super) fn verdict(policy: ErrorPolicy, fault: Fault, attempts: u32, limits: &Limits) -> Verdict {
    let io_status = if fault.is_no_space() { IoStatus::NoSpace } else { IoStatus::Failed };
    match policy {
        _ if matches!(fault, Fault::Lost(_)) => Verdict::Fail,
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

/// Whether a cluster that is tried `alone`, after so many failed attempts, has failed by itself before. The first time alone is that of a
/// request that was taken apart: nothing says yet that this cluster is bad.
pub(super) fn is_retry(alone: Option<u32>) -> bool {
    alone.is_some_and(|attempts| attempts > 0)
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    attempts: u32,
    at: Timestamp,
}

/// Clusters to try again, each alone. On a bad disk there are as many as slots, and the sweep asks at each of its steps: nothing here
/// looks at more than it moves.
///
/// Each cluster is in `entries` and in one of the two others, by whether its time had come when that was last looked at. The time
/// never goes back.
#[derive(Debug, Default)]
pub(super) struct RetryList {
    entries: BTreeMap<ClusterIndex, Entry>,
    /// Their time has come: in the order of the disk.
    due: BTreeSet<ClusterIndex>,
    /// The others: in the order of time.
    later: BTreeSet<(Timestamp, ClusterIndex)>,
}

impl RetryList {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Try `cluster` again at `at`, after `attempts` failed retries.
    pub(super) fn add(&mut self, cluster: ClusterIndex, attempts: u32, at: Timestamp) {
        let before = self.entries.insert(cluster, Entry { attempts, at });
        assert!(before.is_none(), "{cluster:?} was waiting for its retry already");
        self.later.insert((at, cluster));
    }

    /// As [`Self::add`], whether it was waiting already or not.
    pub(super) fn put(&mut self, cluster: ClusterIndex, attempts: u32, at: Timestamp) {
        self.forget(super::one(cluster));
        self.add(cluster, attempts, at);
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

    /// Whether any of `clusters` waits for its retry.
    pub(super) fn waits(&self, clusters: ClusterRange) -> bool {
        self.entries.range(clusters.start..clusters.end).next().is_some()
    }

    /// Whether a cluster's time has come.
    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        !self.due.is_empty() || self.later.first().is_some_and(|&(at, _)| at <= now)
    }

    /// Take the first cluster whose time has come, with its failed retries.
    pub(super) fn take_due(&mut self, now: Timestamp) -> Option<(ClusterIndex, u32)> {
        while let Some(&(at, cluster)) = self.later.first().filter(|(at, _)| *at <= now) {
            self.later.remove(&(at, cluster));
            self.due.insert(cluster);
        }
        let cluster = self.due.pop_first()?;
        let entry = self.entries.remove(&cluster).expect("what is due waits for its retry");
        Some((cluster, entry.attempts))
    }

    /// The sweep has claimed `clusters` itself: they wait for nothing any more.
    pub(super) fn forget(&mut self, clusters: ClusterRange) {
        while let Some((&cluster, &entry)) = self.entries.range(clusters.start..clusters.end).next() {
            self.entries.remove(&cluster);
            let found = self.due.remove(&cluster) || self.later.remove(&(entry.at, cluster));
            assert!(found, "{cluster:?} waits for its retry");
        }
    }

    /// Nothing waits for a retry any more.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// When the next cluster's time comes. Those whose time has come already wait for something else: a slot, a turn.
    pub(super) fn next_after(&self, now: Timestamp) -> Option<Timestamp> {
        let last_now = (now, ClusterIndex(u64::MAX));
        self.later.range((Bound::Excluded(last_now), Bound::Unbounded)).next().map(|&(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        let all = [
            ErrorPolicy::Report,
            ErrorPolicy::Stop,
            ErrorPolicy::Enospc,
            ErrorPolicy::Auto,
            ErrorPolicy::Ignore,
        ];
        for policy in all {
            assert_eq!(say(policy, Fault::Lost(Errno::ECONNRESET)), Verdict::Fail, "{policy:?}");
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

    /// The list without its indices: every question looks at everything.
    #[derive(Default)]
    struct Naive(BTreeMap<ClusterIndex, Entry>);

    impl Naive {
        fn take_due(&mut self, now: Timestamp) -> Option<(ClusterIndex, u32)> {
            let (&cluster, &entry) = self.0.iter().find(|(_, entry)| entry.at <= now)?;
            self.0.remove(&cluster);
            Some((cluster, entry.attempts))
        }

        fn next_after(&self, now: Timestamp) -> Option<Timestamp> {
            self.0.values().map(|entry| entry.at).filter(|&at| at > now).min()
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add { cluster: u64, attempts: u32, pause: u64 },
        TakeDue,
        Forget { start: u64, count: u64 },
        Clear,
        Pass { time: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..40_u64, 0..6_u32, 0..8_u64)
                .prop_map(|(cluster, attempts, pause)| Step::Add { cluster, attempts, pause }),
            6 => Just(Step::TakeDue),
            2 => (0..40_u64, 0..10_u64).prop_map(|(start, count)| Step::Forget { start, count }),
            1 => Just(Step::Clear),
            4 => (0..6_u64).prop_map(|time| Step::Pass { time }),
        ]
    }

    proptest! {
        #[test]
        fn the_list_does_what_a_search_of_everything_does(steps in prop::collection::vec(step(), 0..200)) {
            let (mut list, mut naive) = (RetryList::default(), Naive::default());
            let mut now = Timestamp::default();
            for step in steps {
                match step {
                    Step::Add { cluster, attempts, pause } => {
                        let (cluster, at) = (ClusterIndex(cluster), now.after(Duration::from_secs(pause)));
                        if let std::collections::btree_map::Entry::Vacant(free) = naive.0.entry(cluster) {
                            free.insert(Entry { attempts, at });
                            list.add(cluster, attempts, at);
                        }
                    }
                    Step::TakeDue => prop_assert_eq!(list.take_due(now), naive.take_due(now)),
                    Step::Forget { start, count } => {
                        let clusters = ClusterRange::new(start, start + count);
                        list.forget(clusters);
                        naive.0.retain(|&cluster, _| !clusters.contains(cluster));
                    }
                    Step::Clear => {
                        list.clear();
                        naive.0.clear();
                    }
                    Step::Pass { time } => now = now.after(Duration::from_secs(time)),
                }
                prop_assert_eq!(list.len(), naive.0.len());
                prop_assert_eq!(list.next_after(now), naive.next_after(now));
                prop_assert_eq!(list.due.len() + list.later.len(), list.len());
            }
        }
    }
}
