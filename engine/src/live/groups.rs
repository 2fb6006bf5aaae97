//! Jobs that stand and fall together: none concludes before all may.
//!
//! # Model
//! A job of such a group that is done waits, detached from its disk, until the work of the others is done, too; then all are pending, and all
//! conclude when none of them is kept from it, or when one of them is asked to. Before that each target is looked at once more, in a thread of its own:
//! one that was renamed or removed meanwhile is no copy, and its job fails. Until then the end of one without success is that of all.
//!
//! # Ordering
//! Looked at once a turn, after the jobs have acted and before any concludes: a job that is aborting is seen here before it is gone. A cancel of
//! one that comes while all are told to conclude is either refused or holds all of them back.

use std::sync::Arc;

use super::command::GroupFailure;
use super::ends::{LastLook, run_aside};
use super::jobs::JobId;
use super::reactor::{Job, Reactor};
use crate::error::Error;
use crate::foreign;
use crate::job::{Lifecycle, Status};
use crate::ring::Ring;

/// The last look at a job's target, before its group concludes.
pub(super) enum Look {
    Due(LastLook),
    UnderWay,
    /// Or there is nothing to look at.
    Over,
}

impl Look {
    pub(super) fn of(look: Option<LastLook>) -> Self {
        look.map_or(Self::Over, Self::Due)
    }
}

/// What was found: why the target is lost, if it is.
pub(super) type Looked = (JobId, Option<Arc<Error>>);

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
        let mut more = self.take_looks();
        for group in groups {
            more |= self.settle_group(group);
        }
        more
    }

    fn settle_group(&mut self, group: u64) -> bool {
        let standing = self.standing_of(group);
        let mut more = false;
        for (_, job) in self.jobs.iter_mut().filter(|(_, job)| job.group == group) {
            let shared = Arc::clone(job.runner.shared());
            let status = shared.with_lifecycle(|lifecycle| lifecycle.status());
            if standing.aborting && status != Status::Aborting {
                // One whose end is being written down is cancelled once it waits for the others.
                more |= job.runner.cancel();
            } else if standing.waiting {
                shared.with_lifecycle(Lifecycle::group_finished);
                more = true;
            }
        }
        let concludes = standing.pending && (standing.finalized || standing.asked);
        if concludes && self.has_looked(group) {
            more |= !self.conclude_group(group);
        }
        more
    }

    /// Whether the targets of a group were looked at; else that begins, if it has not. A job that is alone looks at its own end.
    fn has_looked(&mut self, group: u64) -> bool {
        let of_group = |job: &Job| job.group == group;
        if self.jobs.iter().filter(|(_, job)| of_group(job)).count() == 1 {
            return true;
        }
        let mut all = true;
        for (_, job) in self.jobs.iter_mut().filter(|(_, job)| of_group(job)) {
            all &= matches!(job.look, Look::Over);
            if !matches!(job.look, Look::Due(_)) {
                continue;
            }
            let Look::Due(look) = std::mem::replace(&mut job.look, Look::UnderWay) else {
                unreachable!("just seen")
            };
            let (id, looked, waker) = (job.watch.id(), Arc::clone(&self.looked), self.ring.waker());
            let ending = self.ending.clone();
            run_aside("engine-look", move |_| {
                let mut lost = None;
                foreign::call("a last look", || lost = look());
                looked.push((id, lost));
                waker.wake();
                drop(ending);
            });
        }
        all
    }

    /// Take in what was found: `true`, something was.
    fn take_looks(&mut self) -> bool {
        let mut any = false;
        while let Some((id, lost)) = self.looked.pop() {
            any = true;
            // One that was cancelled meanwhile may be gone.
            let Some((_, job)) = self.jobs.iter_mut().find(|(_, job)| job.watch.id() == id) else { continue };
            job.look = Look::Over;
            if let Some(error) = lost {
                job.runner.fail(error);
            }
        }
        any
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
