//! Starting jobs: one t0 for all disks of a group, or nothing.
//!
//! # Order
//! 1. Everything that can fail is done first, with guests writing on: memory, places on the ring, the copiers.
//! 2. The barriers of the disks are raised. Writes under way go on; new ones wait.
//! 3. When the last permit of the last disk is back, that is t0: the jobs are attached, the barriers lowered.
//! 4. If that does not come within the start's timeout (a permit that was forgotten, an I/O that hangs), the barriers are lowered, the jobs
//!    undone and the start fails. Nothing was copied.
//!
//! One start is under way at a time; the others wait for their turn, their timeouts counted from then on.

use std::sync::Arc;
use std::time::Duration;

use super::DiskId;
use super::command::{GroupFailure, NewFleece, NewGroup, NewJob};
use super::controller::Controller;
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
                    self.give_up(raised);
                } else {
                    self.raised = Some(raised);
                    return;
                }
            }
            let Some(group) = self.waiting.pop_front() else { return };
            self.raise(group, now);
        }
    }

    fn raise(&mut self, group: NewGroup<R::File>, now: Timestamp) {
        let NewGroup { jobs, on_failure, timeout, answer } = group;
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
        disks.sort_unstable();
        disks.dedup();
        for disk in &disks {
            self.disks[disk].shared.gate().raise();
        }
        tracing::debug!(disks = disks.len(), jobs = made.len(), "barrier raised");
        self.raised = Some(Raised { jobs: made, disks, deadline: now.after(timeout), timeout, answer });
    }

    /// Everything of a job that can fail.
    fn make(
        &mut self,
        job: NewJob<R::File>,
        group: u64,
        on_failure: GroupFailure,
        now: Timestamp,
    ) -> Result<NewlyMade, Error> {
        let NewJob { disk: id, target, fleece, geometry, set, shared, memory, depth, plan, at_end } = job;
        let Some(disk) = self.disks.get(&id) else {
            let reason = "its disk has left the engine";
            return Err(Error::refused(Refusal::Unavailable, Operation::Copy, "disk", reason));
        };
        let name = disk.shared.name().to_string();
        let refused = |reason: &'static str| {
            Error::refused(Refusal::Unavailable, Operation::Copy, name.clone(), reason)
                .advise("wait until another job has ended, or give the engine more memory")
        };
        let side = disk.side.clone();
        let Some(memory) = self.memory.take(memory) else {
            return Err(refused("the engine has no memory left for another job"));
        };
        let target = match self.ring.add_file(target) {
            Ok(target) => target,
            Err(failure) => {
                self.memory.give_back(memory);
                return Err(refused("the engine carries as many disks as it can").because(failure));
            }
        };
        let fleece = match fleece.map(|fleece| self.add_fleece(fleece)).transpose() {
            Ok(fleece) => fleece,
            Err(failure) => {
                self.ring.remove_file(target);
                self.memory.give_back(memory);
                return Err(refused("the engine carries as many disks as it can").because(failure));
            }
        };
        shared.set_waker(self.ring.waker());
        let mut copier = Copier::new(plan(side, target, memory), Arc::clone(&set));
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
            fleece: fleece_file,
            memory,
            watch,
            group,
            on_failure,
        })
    }

    fn add_fleece(&mut self, fleece: NewFleece<R::File>) -> Result<FleecePlan, RingFailure> {
        let NewFleece { file, name, direct_alignment, slots } = fleece;
        let file = self.ring.add_file(file)?;
        Ok(FleecePlan { side: Side { file, name, direct_alignment }, slots })
    }

    /// Every permit is back: this is t0.
    fn take_t0(&mut self, raised: Raised, now: Timestamp) {
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

    fn give_up(&mut self, raised: Raised) {
        let Raised { jobs, disks, answer, timeout, .. } = raised;
        self.barrier_lowered(&disks);
        let name = self.disks[&disks[0]].shared.name().to_string();
        self.undo(jobs);
        let reason = format!(
            "writes that had begun before did not end within {timeout:?}, so there is no point in time"
        );
        let error = Error::new(ErrorKind::Io(Errno::ETIMEDOUT), Operation::Copy, name, reason)
            .advise("find the write that hangs, or allow more time for the start");
        answer.give(Err(error));
    }

    fn undo(&mut self, jobs: Vec<NewlyMade>) {
        for job in jobs {
            for file in [Some(job.target), job.fleece].into_iter().flatten() {
                self.ring.remove_file(file);
            }
            self.memory.give_back(job.memory);
        }
    }
}
