//! Jobs that stand and fall together: none concludes before all may.
//!
//! # Model
//! A job of such a group that is done waits, detached from its disk, until the work of the others is done, too; then all are pending, and all
//! conclude when none of them is kept from it, or when one of them is asked to. Until then the end of one without success is that of
//! all.
//!
//! # Ordering
//! Looked at once a turn, after the jobs have acted and before any concludes: a job that is aborting is seen here before it is gone. A cancel of
//! one that comes while all are told to conclude is either refused or holds all of them back.

use super::command::GroupFailure;
use super::reactor::{Job, Reactor};
use crate::job::{Lifecycle, Status};
use crate::ring::Ring;

/// Where a group stands.
struct Standing {
    aborting: bool,
    waiting: bool,
    pending: bool,
    finalized: bool,
    asked: bool,
}

impl<R: Ring> Reactor<R> {
    /// Move the groups on; `true`: jobs have more to do at once.
    pub(super) fn settle_groups(&mut self) -> bool {
        let together = |job: &Job| job.on_failure == GroupFailure::FailAll;
        let mut groups: Vec<u64> =
            self.jobs.iter().filter(|(_, job)| together(job)).map(|(_, job)| job.group).collect();
        groups.sort_unstable();
        groups.dedup();
        let mut more = false;
        for group in groups {
            more |= self.settle_group(group);
        }
        more
    }

    fn settle_group(&mut self, group: u64) -> bool {
        let standing = self.standing_of(group);
        let mut more = false;
        for (_, job) in self.jobs.iter_mut().filter(|(_, job)| job.group == group) {
            let shared = std::sync::Arc::clone(job.runner.shared());
            let status = shared.with_lifecycle(|lifecycle| lifecycle.status());
            if standing.aborting && status != Status::Aborting {
                // One whose end is being written down is cancelled once it waits for the others.
                more |= job.runner.cancel();
            } else if standing.waiting {
                shared.with_lifecycle(Lifecycle::group_finished);
                more = true;
            }
        }
        if standing.pending && (standing.finalized || standing.asked) {
            more |= !self.conclude_group(group);
        }
        more
    }

    /// Decide that all of a group conclude, unless one was cancelled that did not show it yet: `false`, then none does.
    fn conclude_group(&mut self, group: u64) -> bool {
        let of_group = || self.jobs.iter().map(|(_, job)| job).filter(|job| job.group == group);
        let all = of_group().all(|job| job.runner.shared().conclude_with_group());
        if !all {
            of_group().for_each(|job| job.runner.shared().with_lifecycle(Lifecycle::conclude_not_yet));
        }
        all
    }

    fn standing_of(&self, group: u64) -> Standing {
        let mut standing =
            Standing { aborting: false, waiting: true, pending: true, finalized: true, asked: false };
        let mut members = 0;
        for (_, job) in self.jobs.iter().filter(|(_, job)| job.group == group) {
            members += 1;
            job.runner.shared().with_lifecycle(|lifecycle| {
                let status = lifecycle.status();
                standing.aborting |= status == Status::Aborting;
                standing.waiting &= status == Status::Waiting;
                standing.pending &= status == Status::Pending;
                standing.finalized &= lifecycle.is_finalized();
                standing.asked |= lifecycle.finalize_asked();
            });
        }
        // One alone was never told to wait, so it is never found waiting.
        assert!(members > 0, "a group that was found has jobs");
        standing
    }
}
