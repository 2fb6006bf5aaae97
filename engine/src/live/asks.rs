//! Copies before a guest's write: asked of all jobs at once, waited for one after the other.
//!
//! # Model
//! A guest finds the first job that has not copied what he is about to change, and asks that one. With it the other jobs of the disk are
//! asked *beside* it for what they have not copied of his range. So jobs copy for him at the same time; and the time of each counts from
//! the moment at which he came, without one whose target does not answer using up that of the others, which have copied long before
//! he comes to them.
//!
//! Nobody waits for what is asked beside, and the write may never come: should it fail, or take too long, nothing happens until the guest asks for himself.
//! A job that has started while he waited was not asked; its time counts from its start.
//!
//! What is asked beside lives as long as what it was asked with: when that is answered, or nobody wants it any more, it is forgotten. The
//! guest looks again then and asks for himself what is missing, on the same clock.

use std::collections::BTreeMap;
use std::sync::Arc;

use slab::Slab;

use super::ask::Answer;
use super::carrier::CopyWait;
use super::jobs::JobId;
use super::reactor::Job;
use crate::copier::guests::CbwId;
use crate::error::Error;
use crate::units::{ByteRange, ClusterRange, Timestamp};

/// Most guests with an I/O path of their own who wait for copies of a job, and most that are asked beside.
pub(super) const MAX_ASKS: usize = 65_536;

/// What a guest is to have copied before his write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    /// The first job that has not copied everything.
    pub(super) job: JobId,
    /// What is to be copied by that job.
    pub(super) clusters: ClusterRange,
    /// What he is about to change: for the other jobs.
    pub(super) range: ByteRange,
}

/// Who waits for a copy-before-write.
pub(super) enum Asker {
    Guest(Answer<Result<(), Arc<Error>>>),
    Carrier(CopyWait),
    /// Nobody yet: it was asked beside another.
    Beside,
}

/// A copy that a job was asked for.
pub(super) struct Ask {
    asker: Asker,
    /// What was asked beside it, of which jobs.
    beside: Vec<(JobId, CbwId)>,
}

/// The copies that one job was asked for.
#[derive(Default)]
pub(super) struct Asks(BTreeMap<CbwId, Ask>);

impl Asks {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Drop them all: whoever waits is answered so.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// One is answered, `beside` gets what is to be forgotten with it ([`forget_beside`]).
    pub(super) fn answered(&mut self, id: CbwId, beside: &mut Vec<(JobId, CbwId)>) -> Asker {
        let ask = self.0.remove(&id).expect("every request has its asker");
        beside.extend(ask.beside);
        ask.asker
    }
}

/// Have jobs copy for a guest that came at `since`.
pub(super) fn ask_jobs(jobs: &mut Slab<Job>, wish: Wish, asker: Asker, since: Timestamp) {
    let found = jobs.iter().find(|(_, job)| job.watch.id() == wish.job && job.attached);
    let Some((index, disk)) = found.map(|(index, job)| (index, job.disk)) else {
        // It has ended meanwhile: the asker looks again and does not find it.
        return match asker {
            Asker::Guest(answer) => answer.give(Ok(())),
            Asker::Carrier(_) | Asker::Beside => unreachable!("the carrier has just found it"),
        };
    };
    let mut beside = Vec::new();
    for (_, job) in
        jobs.iter_mut().filter(|&(other, ref job)| other != index && job.disk == disk && job.attached)
    {
        if job.asks.len() >= MAX_ASKS {
            continue;
        }
        if let Some(clusters) = job.watch.undone(wish.range) {
            let id = job.ask(clusters, Ask { asker: Asker::Beside, beside: Vec::new() }, since);
            beside.push((job.watch.id(), id));
        }
    }
    jobs[index].ask(wish.clusters, Ask { asker, beside }, since);
}

impl Job {
    fn ask(&mut self, clusters: ClusterRange, ask: Ask, since: Timestamp) -> CbwId {
        let id = CbwId(self.next_ask);
        let beside = matches!(ask.asker, Asker::Beside);
        // Before that there was nothing to ask it for.
        let since = since.max(self.runner.started());
        self.next_ask += 1;
        self.asks.0.insert(id, ask);
        self.controller.on_guest(since, self.asks.len());
        if beside {
            self.runner.copier.copy_beside(id, clusters, since);
        } else {
            self.runner.copier.copy_before_write(id, clusters, since);
        }
        id
    }
}

/// What it was asked with is over. What is under way goes on.
pub(super) fn forget_beside(jobs: &mut Slab<Job>, beside: &[(JobId, CbwId)]) {
    for &(id, ask) in beside {
        if let Some((_, job)) = jobs.iter_mut().find(|(_, job)| job.watch.id() == id)
            && job.asks.0.remove(&ask).is_some()
        {
            job.runner.copier.forget_cbw(ask);
        }
    }
}

/// Copies that nobody waits for any more are not begun, and do not run into the time-out of their job.
pub(super) fn forget_unwanted(jobs: &mut Slab<Job>) {
    let mut beside = Vec::new();
    for (_, job) in jobs.iter_mut() {
        let copier = &mut job.runner.copier;
        job.asks.0.retain(|&id, ask| {
            let wanted = !matches!(&ask.asker, Asker::Guest(answer) if !answer.is_wanted());
            if !wanted {
                copier.forget_cbw(id);
                beside.append(&mut ask.beside);
            }
            wanted
        });
    }
    forget_beside(jobs, &beside);
}
