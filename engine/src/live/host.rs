//! What a disk's carrier finds around it on the ring thread: the gate, the jobs that copy before its writes.

use slab::Slab;

use super::admission::{Permit, attempt_unnested};
use super::carrier::{AdmissionHost, Attempt, CopyWait, DiscardRule};
use super::disk::DiskShared;
use super::jobs::JobId;
#[cfg(feature = "sim")]
use super::planted::Planted;
use super::reactor::{Asker, Job};
use crate::copier::guests::CbwId;
use crate::units::{ByteRange, ClusterRange, Timestamp};

/// Have `clusters` copied by a job for a guest that has asked at `since`.
pub(super) fn ask_job(
    jobs: &mut Slab<Job>,
    id: JobId,
    clusters: ClusterRange,
    asker: Asker,
    since: Timestamp,
) {
    let job = jobs.iter_mut().map(|(_, job)| job).find(|job| job.watch.id() == id && job.attached);
    let Some(job) = job else {
        // It has ended meanwhile: the asker looks again and does not find it.
        return match asker {
            Asker::Guest(answer) => answer.give(Ok(())),
            Asker::Carrier(_) => unreachable!("the carrier has just found it"),
        };
    };
    let ask = CbwId(job.next_ask);
    job.next_ask += 1;
    job.asks.insert(ask, asker);
    job.controller.on_guest(since, job.asks.len());
    job.runner.copier.copy_before_write(ask, clusters, since);
}

/// What a disk's carrier finds around it.
pub(super) struct Host<'a> {
    pub(super) disk: &'a DiskShared,
    pub(super) jobs: &'a mut Slab<Job>,
    #[cfg(feature = "sim")]
    pub(super) planted: &'a mut Planted,
}

impl AdmissionHost for Host<'_> {
    type Permit = Permit;

    fn attempt(&mut self, range: ByteRange) -> Attempt<Permit> {
        use super::admission::Attempt as Found;
        #[cfg(feature = "sim")]
        let asked = self.planted.looked_at(range);
        #[cfg(not(feature = "sim"))]
        let asked = range;
        let look = || attempt_unnested(self.disk.gate(), self.disk.jobs(), asked);
        #[cfg(feature = "sim")]
        let found = self.planted.pass(self.disk.id(), self.disk.gate(), range).unwrap_or_else(look);
        #[cfg(not(feature = "sim"))]
        let found = look();
        match found {
            Found::Granted(permit) => Attempt::Granted(permit),
            Found::AtBarrier => Attempt::AtBarrier,
            Found::Copy(job, clusters) => {
                #[cfg(feature = "sim")]
                self.planted.looked(self.disk.id(), range);
                Attempt::Copy(job, clusters)
            }
        }
    }

    fn copy(&mut self, job: JobId, clusters: ClusterRange, wait: CopyWait) {
        ask_job(self.jobs, job, clusters, Asker::Carrier(wait), wait.since);
    }

    fn discards(&mut self, range: ByteRange) -> DiscardRule {
        #[cfg(feature = "sim")]
        if self.planted.discards(range) {
            return DiscardRule { now: Some(range) };
        }
        DiscardRule { now: self.disk.jobs().first_done(range) }
    }
}
