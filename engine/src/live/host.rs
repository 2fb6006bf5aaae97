//! What a disk's carrier finds around it on the ring thread: the gate, the jobs that copy before its writes.

use slab::Slab;

use super::admission::{Permit, attempt_unnested};
use super::asks::{Asker, Wish, ask_jobs};
use super::carrier::{AdmissionHost, Attempt, CopyWait, DiscardRule};
use super::disk::DiskShared;
use super::jobs::JobId;
#[cfg(feature = "sim")]
use super::planted::Planted;
use super::reactor::Job;
use crate::units::{ByteRange, ClusterRange, Timestamp};

/// What a disk's carrier finds around it.
pub(super) struct Host<'a> {
    pub(super) disk: &'a DiskShared,
    pub(super) jobs: &'a mut Slab<Job>,
    pub(super) now: Timestamp,
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

    fn copy(&mut self, job: JobId, clusters: ClusterRange, range: ByteRange, mut wait: CopyWait) {
        let waited = std::mem::take(&mut wait.waited);
        let wish = Wish { job, clusters, range };
        let asked = ask_jobs(self.jobs, wish, Asker::Carrier(wait), waited, self.now);
        assert!(asked.is_ok(), "the carrier has just found it");
    }

    fn discards(&mut self, range: ByteRange) -> DiscardRule {
        #[cfg(feature = "sim")]
        if self.planted.discards(range) {
            return DiscardRule { now: Some(range) };
        }
        DiscardRule { now: self.disk.jobs().first_done(range) }
    }
}
