//! Starting jobs: one t0 for all disks of a group, or nothing.
//!
//! # Order
//! 1. Everything that can fail is done first, with guests writing on. (Memory and places on the ring were had before that: see `room`.)
//! 2. The barriers of the disks are raised. Writes under way go on; new ones wait.
//! 3. When the last permit of the last disk is back, that is t0: the jobs are attached, the barriers lowered.
//! 4. If that does not come within the start's timeout (a permit that was forgotten, an I/O that hangs), the barriers are lowered, the jobs
//!    undone and the start fails. Nothing was copied.
//!
//! One start is under way at a time; the others wait for their turn, their timeouts counted from then on. After a barrier was up, the disks
//! rest for as long before the next is raised, so that guests who are held back write at least half of the time; starts of other disks go first
//! meanwhile, but none that needs a disk of one that came earlier.
//!
//! A start without jobs is a *rehearsal*: what would be destroyed by preparing the jobs is not, if no instant can be found.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::DiskId;
use super::command::{GroupFailure, NewFleece, NewGroup, NewJob};
use super::controller::Controller;
use super::groups::Look;
use super::jobs::{JobId, Watch};
use super::reactor::{NewlyMade, Reactor};
use crate::copier::Copier;
use crate::copier::fleece::FleecePlan;
use crate::copier::plan::Side;
use crate::error::{Error, ErrorKind, Operation, Refusal};
use crate::job::Lifecycle;
use crate::job::runner::Runner;
use crate::ring::{Ring, RingFailure};
use crate::units::Timestamp;
use nix::errno::Errno;

/// A start whose barriers are up.
pub(super) struct Raised {
    jobs: Vec<NewlyMade>,
    disks: Vec<DiskId>,
    since: Timestamp,
    deadline: Timestamp,
    timeout: Duration,
    answer: super::ask::Answer<Result<Vec<JobId>, Error>>,
}

impl Raised {
    pub(super) fn deadline(&self) -> Timestamp {
        self.deadline
    }

    /// Whether one of its jobs is to copy `disk`.
    pub(super) fn needs(&self, disk: DiskId) -> bool {
        self.disks.contains(&disk)
    }
}

impl<R: Ring> Reactor<R> {
    /// Go on with the start that is under way, or begin the next.
    pub(super) fn advance_start(&mut self, now: Timestamp) {
        loop {
            if let Some(raised) = self.raised.take() {
                let drained = raised.disks.iter().all(|disk| self.disks[disk].shared.gate().is_drained());
                #[cfg(feature = "sim")]
                let drained = drained || self.planted.has(crate::copier::plan::PlantedBug::PermitOutAtT0);
                if drained {
                    self.take_t0(raised, now);
                } else if now >= raised.deadline {
                    self.give_up(raised, now);
                } else {
                    self.raised = Some(raised);
                    return;
                }
            }
            self.rests.retain(|_, &mut until| until > now);
            let Some(next) = self.next_rested() else { return };
            let group = self.waiting.remove(next).expect("just seen");
            self.raise(group, now);
        }
    }

    /// The first of the starts that wait whose disks have rested. None goes before one that came earlier and needs one of its disks: a group would
    /// wait for ever where each of its disks has starts of its own.
    fn next_rested(&self) -> Option<usize> {
        let mut taken = BTreeSet::new();
        self.waiting.iter().position(|group| {
            let free = |disk: DiskId| !self.rests.contains_key(&disk) && !taken.contains(&disk);
            let is_next = group.disks().all(free);
            taken.extend(group.disks());
            is_next
        })
    }

    /// When a start that waits may begin.
    pub(super) fn next_start(&self) -> Option<Timestamp> {
        let may_begin =
            |group: &NewGroup<R::File>| group.disks().filter_map(|disk| self.rests.get(&disk)).max().copied();
        self.waiting.iter().filter_map(may_begin).min()
    }

    /// The barriers of a start are to come down: guests have as long now as they were held back.
    fn rest(&mut self, raised: &Raised, now: Timestamp) {
        let until = now.after(now.since(raised.since));
        if until > now {
            self.rests.extend(raised.disks.iter().map(|&disk| (disk, until)));
        }
    }

    fn raise(&mut self, group: NewGroup<R::File>, now: Timestamp) {
        let NewGroup { jobs, more_disks, on_failure, timeout, answer } = group;
        let number = self.next_group;
        self.next_group += 1;
        let mut made: Vec<NewlyMade> = Vec::new();
        for job in jobs {
            match self.make(job, number, on_failure, now) {
                Ok(job) => made.push(job),
                Err(error) => {
                    self.undo(made);
                    return answer.give(Err(error));
                }
            }
        }
        let mut disks: Vec<DiskId> = made.iter().map(|job| job.disk).collect();
        disks.extend(more_disks.into_iter().filter(|disk| self.disks.contains_key(disk)));
        disks.sort_unstable();
        disks.dedup();
        for disk in &disks {
            self.disks[disk].shared.gate().raise();
        }
        tracing::debug!(disks = disks.len(), jobs = made.len(), "barrier raised");
        let deadline = now.after(timeout);
        self.raised = Some(Raised { jobs: made, disks, since: now, deadline, timeout, answer });
    }

    /// Everything of a job that can fail.
    fn make(
        &mut self,
        job: NewJob<R::File>,
        group: u64,
        on_failure: GroupFailure,
        now: Timestamp,
    ) -> Result<NewlyMade, Error> {
        let NewJob { disk: id, target, fleece, geometry, set, shared, share, depth, plan, at_end, last_look } =
            job;
        let Some(disk) = self.disks.get(&id) else {
            let reason = "its disk has left the engine";
            return Err(Error::refused(Refusal::Unavailable, Operation::Copy, "disk", reason));
        };
        let name = disk.shared.name().to_string();
        let refused = |failure| {
            let reason = "the ring does not take its files";
            Error::refused(Refusal::Unavailable, Operation::Copy, name.clone(), reason).because(failure)
        };
        let side = disk.side.clone();
        let target = self.ring.add_file(target).map_err(refused)?;
        let fleece = match fleece.map(|fleece| self.add_fleece(fleece)).transpose() {
            Ok(fleece) => fleece,
            Err(failure) => {
                drop(self.ring.remove_file(target));
                return Err(refused(failure));
            }
        };
        shared.set_waker(self.ring.waker());
        let plan = plan(side, target, share.memory());
        let target_name = Arc::clone(&plan.target.name);
        let mut copier = Copier::new(plan, Arc::clone(&set));
        let fleece_file = fleece.as_ref().map(|fleece| fleece.side.file);
        if let Some(fleece) = fleece {
            copier = copier.with_fleece(fleece);
        }
        let runner = Runner::new(copier, shared, at_end, now);
        self.next_job += 1;
        let watch = Arc::new(Watch::new(JobId(self.next_job), set, geometry));
        let controller = Controller::new(depth, geometry.cluster_size().bytes());
        Ok(NewlyMade {
            disk: id,
            runner,
            controller,
            target,
            target_name,
            fleece: fleece_file,
            share,
            watch,
            group,
            on_failure,
            look: Look::of(last_look),
        })
    }

    fn add_fleece(&mut self, fleece: NewFleece<R::File>) -> Result<FleecePlan, RingFailure> {
        let NewFleece { file, name, direct_alignment, slots } = fleece;
        let file = self.ring.add_file(file)?;
        Ok(FleecePlan { side: Side { file, name, direct_alignment, remote: false }, slots })
    }

    /// Every permit is back: this is t0.
    fn take_t0(&mut self, raised: Raised, now: Timestamp) {
        self.rest(&raised, now);
        let Raised { jobs, disks, answer, .. } = raised;
        let numbers = jobs.iter().map(|job| job.watch.id()).collect();
        let together = jobs.len() > 1;
        for mut job in jobs {
            let watch = Arc::clone(&job.watch);
            if together && job.on_failure == GroupFailure::FailAll {
                job.runner.shared().with_lifecycle(Lifecycle::join_group);
            }
            job.runner.start(now);
            self.disks[&job.disk].shared.jobs().attach(watch);
            self.put_job(job, now);
        }
        self.barrier_lowered(&disks);
        tracing::debug!("t0");
        answer.give(Ok(numbers));
    }

    fn give_up(&mut self, raised: Raised, now: Timestamp) {
        self.rest(&raised, now);
        let Raised { jobs, disks, answer, timeout, .. } = raised;
        // Asked for while the barriers are up.
        let is_kept = |disk: &&DiskId| !self.disks[*disk].shared.gate().is_drained();
        let kept = disks.iter().find(is_kept).unwrap_or(&disks[0]);
        let name = self.disks[kept].shared.name().to_string();
        self.barrier_lowered(&disks);
        self.undo(jobs);
        let reason = format!(
            "writes that had begun before did not end within {timeout:?}, so there is no point in time"
        );
        let error = Error::new(ErrorKind::Io(Errno::ETIMEDOUT), Operation::Copy, name, reason)
            .advise("find the write that hangs, or allow more time for the start");
        answer.give(Err(error));
    }

    /// Nothing is closed here: whoever asked for the start has the storages, too, until he is told.
    fn undo(&mut self, jobs: Vec<NewlyMade>) {
        for job in jobs {
            for file in [Some(job.target), job.fleece].into_iter().flatten() {
                drop(self.ring.remove_file(file));
            }
        }
    }
}
