//! What is looked at in every turn.

use engine::job::Outcome;
use engine::live::GroupFailure;
use engine::units::Timestamp;

use super::{LOOKS, Run, perhaps};
use crate::blame::Blame;
use crate::oracle::Job;
use crate::scenario::Operator;

impl Run<'_> {
    /// Look at everything after the first half of a turn. What is seen of a disk then is what t0 was, if that was taken just now.
    pub(super) fn observe(&mut self) -> Result<(), String> {
        let now = self.engine.now();
        for added in &self.added {
            if let Some(Err(error)) = added.take() {
                return Err(format!("a disk was refused: {error}"));
            }
        }
        self.observe_starts(now)?;
        let waits: Vec<_> = self.guests.iter().map(|guests| guests.waits(now)).collect();
        for state in self.engine.jobs() {
            let job =
                self.jobs.iter_mut().find(|job| job.target == state.target).expect("a job has its target");
            let looks = self.rng.u8(..LOOKS) == 0;
            job.check_running(state, looks, waits[job.spec.disk], &self.world, &mut self.seen)
                .map_err(|wrong| format!("{wrong}: {:?}", job.spec))?;
        }
        let blame = self.blame();
        for job in &mut self.jobs {
            job.check_ended(&blame, now, waits[job.spec.disk], &self.world, &mut self.seen)?;
        }
        self.check_groups()?;
        self.observe_reads(&blame)?;
        for guests in &mut self.guests {
            guests.take_answers(&self.world, now, (&blame, &self.jobs), &mut self.seen)?;
        }
        Ok(())
    }

    pub(super) fn observe_reads(&mut self, blame: &Blame<'_>) -> Result<(), String> {
        for (readers, job) in self.readers.iter_mut().zip(&self.jobs) {
            readers.take_answers(job, blame, &mut self.seen)?;
        }
        Ok(())
    }

    /// Of a group that is worth something as a whole only, no job goes on to its end when another has failed.
    fn check_groups(&self) -> Result<(), String> {
        for (start, spec) in self.starts.iter().zip(&self.scenario.starts) {
            let jobs = &self.jobs[start.jobs.clone()];
            if spec.on_failure == GroupFailure::GoOn || jobs.len() < 2 {
                continue;
            }
            let failed = |job: &Job| matches!(job.ended_as, Some(Outcome::Failed(_) | Outcome::Cancelled));
            if jobs.iter().any(failed)
                && let Some(other) = jobs.iter().find(|job| job.runs() && !job.ends)
            {
                return Err(format!("another has failed, and this goes on: {:?}", other.spec));
            }
        }
        Ok(())
    }

    /// At the end, where everybody was told: who was cancelled without being asked was taken along by another of the group.
    pub(super) fn check_taken_along(&self) -> Result<(), String> {
        for start in &self.starts {
            let jobs = &self.jobs[start.jobs.clone()];
            let reason = |job: &Job| job.cancel_asked || matches!(job.ended_as, Some(Outcome::Failed(_)));
            let cancelled = |job: &&Job| matches!(job.ended_as, Some(Outcome::Cancelled));
            if !jobs.iter().any(reason)
                && let Some(job) = jobs.iter().find(cancelled)
            {
                return Err(format!("cancelled, and none of its group has failed: {:?}", job.spec));
            }
        }
        Ok(())
    }

    fn observe_starts(&mut self, now: Timestamp) -> Result<(), String> {
        for (number, start) in self.starts.iter_mut().enumerate() {
            let Some(pending) = &start.pending else { continue };
            let Some(answer) = pending.take() else {
                if now > start.answer_by {
                    return Err(format!(
                        "start {number} waits since before {:?}, now {now:?}",
                        start.answer_by
                    ));
                }
                continue;
            };
            start.pending = None;
            match answer {
                Ok(ids) => {
                    self.seen.started += 1;
                    for (job, id) in self.jobs[start.jobs.clone()].iter_mut().zip(ids) {
                        job.id = Some(id);
                        job.started_at = now;
                        job.attached = true;
                        job.take_t0(&self.world);
                        if self.scenario.operator == Operator::Pauses {
                            perhaps(job.handle.pause());
                        }
                    }
                }
                Err(error) => {
                    self.seen.not_started += 1;
                    let refused = error.is_refusal() && self.scenario.tight;
                    let late = error.to_string().contains("no point in time");
                    let left =
                        error.to_string().contains("has left") && self.removed.iter().any(|&left| left);
                    if !refused && !late && !left {
                        return Err(format!("start {number} failed for no reason: {error}"));
                    }
                    for job in &mut self.jobs[start.jobs.clone()] {
                        job.check_refused(&self.world)?;
                    }
                }
            }
        }
        Ok(())
    }
}
