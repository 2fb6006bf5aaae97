//! Whether a job's word is true.

mod kept;

use std::collections::BTreeSet;
use std::time::Duration;

use engine::copy::SyncMode;
use engine::job::{JobHandle, JobResult, Outcome, Status};
use engine::live::sim::SimJobState;
use engine::live::{JobId, SweepDepth};
use engine::ring::sim::SharedWorld;
use engine::units::{ByteRange, Timestamp};

use crate::blame::Blame;
use crate::scenario::{BLOCK, GUEST_RETRIES, JobSpec, Scenario};
use crate::seen::Seen;

/// A job that was asked for, and what is known of it.
pub(crate) struct Job {
    pub(crate) spec: JobSpec,
    pub(crate) handle: JobHandle,
    /// Its target's number in the world.
    pub(crate) target: usize,
    /// That of its fleece file, used or not.
    pub(crate) fleece: usize,
    /// What the target held before.
    before: Vec<u8>,
    /// The disk at t0, once that was taken.
    pub(crate) t0: Option<Vec<u8>>,
    /// Which of its clusters the job covers: all, or those of which something was allocated in the top layer at t0.
    covered: Vec<bool>,
    pub(crate) ended: bool,
    /// How.
    pub(crate) ended_as: Option<Outcome>,
    /// Whether its end is decided.
    pub(crate) ends: bool,
    /// Whether guests copy for it, as was seen last.
    pub(crate) attached: bool,
    /// Its number on the engine, once it has started.
    pub(crate) id: Option<JobId>,
    /// When that was.
    pub(crate) started_at: Timestamp,
    /// When its end was told.
    pub(crate) ended_at: Option<Timestamp>,
    /// When it was decided that it ends: for how long guests of its disk had waited at most, if that is known.
    pub(crate) guests_waited: Option<Option<Duration>>,
    /// When an error was found to have paused it.
    pub(crate) stopped_at: Option<Timestamp>,
    /// Never starts: its start was refused.
    pub(crate) refused: bool,
    /// Somebody has asked for its end, or for that of its group.
    pub(crate) cancel_asked: bool,
    /// Another of its group may take it along.
    pub(crate) may_be_taken_along: bool,
    done: u64,
    skipped: u64,
    /// How often something was taken off the list of what was left out.
    unskipped: u64,
    /// Where clusters begin that were in the fleece file, and not on the target.
    fleeced: BTreeSet<usize>,
    /// The disk when guests ceased to copy for it.
    at_detach: Option<Vec<u8>>,
}

impl Job {
    pub(crate) fn new(
        spec: JobSpec,
        handle: JobHandle,
        (target, fleece): (usize, usize),
        before: Vec<u8>,
    ) -> Self {
        Self {
            spec,
            handle,
            target,
            fleece,
            before,
            t0: None,
            covered: Vec::new(),
            ended: false,
            ended_as: None,
            ends: false,
            attached: false,
            id: None,
            started_at: Timestamp::default(),
            ended_at: None,
            guests_waited: None,
            stopped_at: None,
            refused: false,
            cancel_asked: false,
            may_be_taken_along: false,
            done: 0,
            skipped: 0,
            unskipped: 0,
            fleeced: BTreeSet::new(),
            at_detach: None,
        }
    }

    /// This is t0.
    pub(crate) fn take_t0(&mut self, world: &SharedWorld) {
        let mut world = world.borrow_mut();
        let disk = world.disk(self.spec.disk);
        let t0 = disk.view().to_vec();
        let per_cluster = self.spec.cluster / BLOCK;
        let blocks = (t0.len() as u64).div_ceil(BLOCK);
        let holds = |cluster: u64| {
            let end = blocks.min((cluster + 1) * per_cluster);
            (cluster * per_cluster..end).any(|block| disk.top_layer_holds(block))
        };
        let clusters = blocks.div_ceil(per_cluster);
        let top = self.spec.sync == SyncMode::Top;
        self.covered = (0..clusters).map(|cluster| !top || holds(cluster)).collect();
        self.t0 = Some(t0);
    }

    /// Whether the cluster of byte `at` is to be in the copy.
    pub(crate) fn covers(&self, at: u64) -> bool {
        self.covered[usize::try_from(at / self.spec.cluster).unwrap()]
    }

    /// Bytes that are not.
    fn uncovered(&self) -> u64 {
        let length = self.t0.as_ref().expect("it has started").len() as u64;
        let starts = (0..length).step_by(usize::try_from(self.spec.cluster).unwrap());
        starts.filter(|&at| !self.covers(at)).map(|at| self.spec.cluster.min(length - at)).sum()
    }

    /// Whether it is under way.
    pub(crate) fn runs(&self) -> bool {
        self.t0.is_some() && !self.ended
    }

    /// Whether nothing more is to be expected of it at `now`.
    pub(crate) fn is_over(&self, now: Timestamp) -> bool {
        self.refused || self.ended || (self.is_lost(now) && self.cancel_asked)
    }

    fn is_lost(&self, now: Timestamp) -> bool {
        self.t0.is_some() && self.spec.stuck.is_some_and(|stuck| stuck.until.is_none() && stuck.from <= now.0)
    }

    /// The start has failed: nothing may have changed.
    pub(crate) fn check_refused(&mut self, world: &SharedWorld) -> Result<(), String> {
        self.refused = true;
        let same = world.borrow_mut().disk(self.target).view() == self.before;
        if same { Ok(()) } else { Err("a start that failed has changed its target".into()) }
    }

    /// While it runs. `looks`: at all of it.
    pub(crate) fn check_running(
        &mut self,
        state: SimJobState,
        looks: bool,
        guests_wait: Option<Duration>,
        world: &SharedWorld,
        seen: &mut Seen,
    ) -> Result<(), String> {
        let sweep = state.sweep;
        if state.ends {
            self.guests_waited.get_or_insert(guests_wait);
        }
        if self.attached && !state.attached {
            self.at_detach = Some(world.borrow_mut().disk(self.spec.disk).view().to_vec());
        }
        self.attached = state.attached;
        self.ends = state.ends;
        if let SweepDepth::Fixed(limit) = self.spec.depth
            && sweep > limit.max(1)
        {
            return Err(format!("{sweep} clusters of the sweep are in flight, the limit is {limit}"));
        }
        if sweep > self.spec.slots - self.spec.reserved {
            return Err(format!("the sweep has {sweep} slots of {}", self.spec.slots));
        }
        // Of guests; the sweep and those who read have what their slots hold each.
        let most_to_retry = GUEST_RETRIES + 3 * self.spec.slots as usize;
        if state.to_retry > most_to_retry {
            return Err(format!(
                "{} clusters are to be tried again, {most_to_retry} are the most",
                state.to_retry
            ));
        }
        let progress = self.handle.progress();
        if progress.status == Status::Paused && sweep > 0 {
            return Err(format!("paused with {sweep} clusters in flight"));
        }
        if state.fails && progress.status != Status::Aborting {
            return Err(format!("it fails, and says {}", progress.status));
        }
        if progress.done < self.done || progress.done + progress.skipped > progress.total {
            return Err(format!("progress goes from {} to {progress:?}", self.done));
        }
        self.done = progress.done;
        self.unskipped += u64::from(progress.skipped < self.skipped);
        self.skipped = progress.skipped;
        if !looks || !state.attached || progress.skipped > 0 || self.t0.is_none() {
            return Ok(());
        }
        self.check_kept(&mut world.borrow_mut(), seen)
    }

    /// Take its result, if it has ended.
    pub(crate) fn check_ended(
        &mut self,
        blame: &Blame<'_>,
        now: Timestamp,
        guests_wait: Option<Duration>,
        world: &SharedWorld,
        seen: &mut Seen,
    ) -> Result<(), String> {
        if !self.runs() {
            return Ok(());
        }
        let Some(result) = self.handle.wait_timeout(Duration::ZERO) else { return Ok(()) };
        self.guests_waited.get_or_insert(guests_wait);
        self.ended = true;
        self.ended_at = Some(now);
        self.ended_as = Some(result.outcome.clone());
        self.check_result(blame, now, world, &result, seen)
            .map_err(|wrong| format!("{wrong}\n{result:?}\n{:?}", self.spec))
    }

    fn check_result(
        &self,
        blame: &Blame<'_>,
        now: Timestamp,
        world: &SharedWorld,
        result: &JobResult,
        seen: &mut Seen,
    ) -> Result<(), String> {
        let scenario = blame.scenario;
        let listed: u64 = result.skipped.iter().map(|skipped| skipped.range.length).sum();
        if !blame.dead {
            seen.jobs += 1;
            seen.sure_jobs += u64::from(!blame.may_fail(self, self.started_at));
        }
        seen.fleece_full += u64::from(result.notices.iter().any(|notice| notice.contains("was full")));
        match &result.outcome {
            Outcome::Failed(error) => {
                blame.job(self, error, now)?;
                seen.failed_jobs += 1;
                seen.fleece_refused += u64::from(error.reason().contains("fleece file is full"));
            }
            Outcome::Cancelled if self.cancel_asked || self.may_be_taken_along => {
                seen.cancelled += 1;
                if self.spec.sync == SyncMode::None && !blame.dead {
                    self.check_changes(world, result)?;
                }
            }
            Outcome::Cancelled => return Err("cancelled, and nobody asked for it".into()),
            Outcome::Complete | Outcome::CompleteWithSkipped if self.spec.sync == SyncMode::None => {
                return Err("it ended by itself, which is for whoever started it to decide".into());
            }
            Outcome::Complete | Outcome::CompleteWithSkipped => {
                let progress = &result.progress;
                if progress.done + progress.skipped != progress.total || listed != progress.skipped {
                    return Err(format!("{listed} bytes are listed as skipped"));
                }
                if matches!(result.outcome, Outcome::Complete) != result.skipped.is_empty() {
                    return Err("the outcome contradicts the list of skipped ranges".into());
                }
                seen.complete += 1;
                seen.skipped += u64::from(listed > 0);
                seen.unskipped += self.unskipped;
                self.check_copy(scenario, world, result, seen)?;
            }
        }
        Ok(())
    }

    /// The target holds the disk as it was at t0.
    fn check_copy(
        &self,
        scenario: &Scenario,
        world: &SharedWorld,
        result: &JobResult,
        seen: &mut Seen,
    ) -> Result<(), String> {
        let t0 = self.t0.as_ref().expect("it has started");
        let mut world = world.borrow_mut();
        seen.complete_late += u64::from(world.disk(self.spec.disk).view() != *t0);
        let target = world.disk(self.target);
        for (name, bytes) in [("view", target.view()), ("medium", target.medium())] {
            if bytes.len() < t0.len() {
                return Err(format!("the target's {name} has {} bytes of {}", bytes.len(), t0.len()));
            }
            let skipped = |at: usize| {
                let byte = ByteRange::new(at as u64, 1);
                result.skipped.iter().any(|skipped| skipped.range.intersection(byte).is_some())
            };
            let wrong = (0..t0.len()).find(|&at| {
                let copied = bytes[at] == t0[at] && (self.covers(at as u64) || !scenario.is_told());
                let left_alone = bytes[at] == self.before[at] && !self.covers(at as u64);
                !copied && !left_alone && !skipped(at)
            });
            if let Some(at) = wrong {
                let cluster = at as u64 / self.spec.cluster;
                let (is, was) = (bytes[at], t0[at]);
                let covered = if self.covers(at as u64) { "" } else { ", not in the top layer" };
                return Err(format!(
                    "byte {at} (cluster {cluster}) of the target's {name} is {is}, was {was} at t0{covered}"
                ));
            }
            let beyond = if self.spec.target_is_zero { &[][..] } else { &self.before[t0.len()..] };
            if bytes[t0.len()..] != *beyond {
                return Err(format!("the target's {name} has changed beyond the disk's end"));
            }
        }
        let uncovered = (result.progress.uncovered, self.uncovered());
        if scenario.is_sound() && uncovered.0 != uncovered.1 {
            return Err(format!("{uncovered:?} bytes are not covered"));
        }
        seen.uncovered += u64::from(uncovered.0 > 0 && world.disk(self.spec.disk).view() != *t0);
        let target = world.disk(self.target);
        // A cluster without data takes no space, but for what is left of the last one.
        let size = usize::try_from(self.spec.cluster).unwrap();
        let whole = t0.len() as u64 / BLOCK;
        let idle = |block: &u64| {
            let at = usize::try_from(block * BLOCK).unwrap() / size * size;
            let zero = t0[at..t0.len().min(at + size)].iter().all(|&byte| byte == 0);
            !self.covers(at as u64) || (zero && self.spec.zero_detect)
        };
        let gives_back = scenario.is_sound() && self.spec.target.unmaps && self.spec.target_is_zero;
        let wasted = (0..whole).filter(idle).find(|&block| target.takes_space(block));
        if let Some(block) = wasted.filter(|_| gives_back) {
            return Err(format!("block {block} of the target takes space for nothing"));
        }
        // Where zeros can only be made by writing them they count as zeros all the same.
        let traits = self.spec.target;
        let counted = self.spec.target_is_zero || (traits.unmaps && traits.zeroes);
        if scenario.is_sound() && counted && target.written_bytes() != result.progress.copied {
            return Err(format!("{} bytes written", target.written_bytes()));
        }
        Ok(())
    }
}
