//! What guests who write by themselves ask of the ring thread besides copies: to have put-off discards forgotten, and to be forgotten.

use std::sync::Arc;

use super::DiskId;
use super::ask::Answer;
use super::jobs::JobId;
use super::reactor::{Asker, Reactor};
use crate::copier::guests::CbwId;
use crate::error::Error;
use crate::ring::Ring;
use crate::units::ByteRange;

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

    /// Of those who wait for copies of `id` some are gone: their requests must not run into the job's time-out.
    pub(super) fn forget_copies(&mut self, id: JobId) {
        if let Some((_, job)) = self.jobs.iter_mut().find(|(_, job)| job.watch.id() == id) {
            job.some_are_gone = true;
        }
    }

    /// Forget those who are gone.
    pub(super) fn drop_those_gone(&mut self) {
        for (_, job) in self.jobs.iter_mut().filter(|(_, job)| job.some_are_gone) {
            job.some_are_gone = false;
            let gone = |asker: &Asker| matches!(asker, Asker::Guest(answer) if !answer.is_wanted());
            let ids: Vec<CbwId> =
                job.asks.iter().filter(|(_, asker)| gone(asker)).map(|(&id, _)| id).collect();
            for id in ids {
                job.runner.copier.forget_cbw(id);
                job.asks.remove(&id);
            }
        }
    }
}
