//! What guests who write by themselves ask of the ring thread: copies, and to have put-off discards forgotten. Who goes is forgotten himself. Who
//! asks for nothing is looked for.

use std::sync::Arc;

use super::DiskId;
use super::ask::Answer;
use super::asks::{Asker, MAX_ASKS, Wish, ask_jobs, forget_unwanted};
use super::hosted::too_many;
use super::reactor::{Job, Reactor};
use crate::error::{Error, Operation};
use crate::ring::Ring;
use crate::units::{ByteRange, Timestamp};

/// One who waits until a discard that was put off, and is just being carried out, is over.
pub(super) struct ForgetWait {
    disk: DiskId,
    range: ByteRange,
    answer: Answer<Result<(), Arc<Error>>>,
}

impl<R: Ring> Reactor<R> {
    /// A guest is about to write to `range` by himself.
    pub(super) fn forget_discards(
        &mut self,
        disk: DiskId,
        range: ByteRange,
        answer: Answer<Result<(), Arc<Error>>>,
    ) {
        self.forgetting.push(ForgetWait { disk, range, answer });
        self.answer_forgotten();
    }

    /// Let those go who have nothing more to wait for.
    pub(super) fn answer_forgotten(&mut self) {
        let disks = &mut self.disks;
        let waits = |wait: &ForgetWait| {
            disks.get_mut(&wait.disk).is_some_and(|disk| !disk.carrier.forget_discards(wait.range))
        };
        let (waiting, over): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.forgetting).into_iter().partition(waits);
        self.forgetting = waiting;
        over.into_iter().for_each(|wait| wait.answer.give(Ok(())));
    }

    /// A guest has waited since then to have copied what it wishes.
    pub(super) fn copy_before_write(
        &mut self,
        wish: Wish,
        answer: Answer<Result<(), Arc<Error>>>,
        since: Timestamp,
    ) {
        // He may have left word before his command was taken.
        if !answer.is_wanted() {
            return;
        }
        let full = |job: &Job| job.watch.id() == wish.job && job.asks.len() >= MAX_ASKS;
        if let Some((_, job)) = self.jobs.iter().find(|(_, job)| full(job)) {
            let name = self.disks[&job.disk].shared.name().to_string();
            return answer.give(Err(Arc::new(too_many(Operation::CopyBeforeWrite, name, MAX_ASKS))));
        }
        ask_jobs(&mut self.jobs, wish, Asker::Guest(answer), since);
    }

    /// Tell the jobs of those guests who write by themselves and ask for nothing, for all is copied where they write.
    pub(super) fn look_for_guests(&mut self, now: Timestamp) {
        if self.jobs.is_empty() {
            return;
        }
        for (&id, disk) in &mut self.disks {
            let Some(together) = disk.passers.look(now, disk.shared.gate()) else { continue };
            for (_, job) in self.jobs.iter_mut().filter(|(_, job)| job.disk == id) {
                job.controller.on_guest(now, together);
            }
        }
    }

    /// Copies of those who have gone are forgotten.
    pub(super) fn forget_those_who_left(&mut self) {
        if self.inbox.has_someone_left() {
            forget_unwanted(&mut self.jobs);
        }
    }
}
