//! What guests who write by themselves ask of the ring thread: copies, and to have put-off discards forgotten. Who goes is forgotten himself. Who
//! asks for nothing is looked for.

use std::sync::{Arc, Weak};

use super::DiskId;
use super::ask::Answer;
use super::asks::{Asker, Copied, MAX_ASKS, Waited, Wish, ask_jobs, forget_unwanted};
use super::hosted::{HostedDisk, too_many};
use super::own_write::Writer;
use super::reactor::{Job, Reactor};
use crate::error::{Error, Operation};
use crate::ring::Ring;
use crate::units::{ByteRange, Timestamp};

/// One who is about to write by himself: no discard of his range is put off.
pub(super) struct ForgetWait {
    disk: DiskId,
    range: ByteRange,
    writer: Weak<Writer>,
    /// Until none is just being carried out there.
    answer: Option<Answer<Result<(), Arc<Error>>>>,
}

impl ForgetWait {
    /// Forget what was put off there, on `disk`, before anybody is told that it is done. One that is under way he is not told of, but waits for.
    pub(super) fn forget(&self, disk: &mut HostedDisk) {
        if self.disk == disk.shared.id() && self.writer.strong_count() > 0 {
            disk.carrier.forget_discards(self.range);
        }
    }
}

impl<R: Ring> Reactor<R> {
    /// A guest is about to write to `range` by himself.
    pub(super) fn forget_discards(
        &mut self,
        disk: DiskId,
        range: ByteRange,
        writer: Weak<Writer>,
        answer: Answer<Result<(), Arc<Error>>>,
    ) {
        if self.forgetting.len() >= MAX_ASKS {
            let name = self.disks.get(&disk).map_or_else(String::new, |disk| disk.shared.name().to_string());
            return answer.give(Err(Arc::new(too_many(Operation::Queue, name, MAX_ASKS))));
        }
        self.forgetting.push(ForgetWait { disk, range, writer, answer: Some(answer) });
        self.answer_forgotten();
    }

    /// Let those go who have nothing more to wait for, and forget those who have written, or gone.
    pub(super) fn answer_forgotten(&mut self) {
        let disks = &mut self.disks;
        let mut over = Vec::new();
        self.forgetting.retain_mut(|wait| {
            let alive = wait.writer.strong_count() > 0;
            let free = |disk: &mut HostedDisk| disk.carrier.forget_discards(wait.range);
            if alive && wait.answer.is_some() && !disks.get_mut(&wait.disk).is_none_or(free) {
                return true;
            }
            over.extend(wait.answer.take());
            alive
        });
        over.into_iter().for_each(|answer| answer.give(Ok(())));
    }

    /// A guest wishes to have something copied, and jobs were asked for him before.
    pub(super) fn copy_before_write(
        &mut self,
        wish: Wish,
        waited: Waited,
        answer: Answer<Copied>,
        now: Timestamp,
    ) {
        // He may have left word before his command was taken.
        if !answer.is_wanted() {
            return;
        }
        let full = |job: &Job| job.watch.id() == wish.job && job.asks.len() >= MAX_ASKS;
        if let Some((_, job)) = self.jobs.iter().find(|(_, job)| full(job)) {
            let name = self.disks[&job.disk].shared.name().to_string();
            let error = too_many(Operation::CopyBeforeWrite, name, MAX_ASKS);
            return answer.give(Copied { outcome: Err(Arc::new(error)), waited });
        }
        let asker = Asker::Guest(answer);
        if let Err((Asker::Guest(answer), waited)) = ask_jobs(&mut self.jobs, wish, asker, waited, now) {
            answer.give(Copied { outcome: Ok(()), waited });
        }
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
