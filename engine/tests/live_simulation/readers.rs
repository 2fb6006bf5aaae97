//! Those who read the disk as it was at t0 while a job runs.

use std::time::Duration;

use engine::live::carrier::IoOutcome;
use engine::live::sim::{Pending, SimEngine};
use engine::units::{ByteRange, Timestamp};
use fastrand::Rng;

use crate::blame::Blame;
use crate::oracle::Job;
use crate::seen::Seen;

/// Reads at a time.
const AT_A_TIME: usize = 4;

struct Read {
    range: ByteRange,
    pending: Pending<IoOutcome>,
}

/// The readers of one job.
pub(crate) struct Readers {
    left: u64,
    next_at: Timestamp,
    pace: u64,
    reads: Vec<Read>,
}

impl Readers {
    pub(crate) fn new(reads: u64, rng: &mut Rng) -> Self {
        let pace = [10, 300, 3000][rng.usize(..3)];
        Self { left: reads, next_at: Timestamp::default(), pace, reads: Vec::new() }
    }

    fn may_read(&self, job: &Job) -> bool {
        job.runs() && self.left > 0 && self.reads.len() < AT_A_TIME
    }

    pub(crate) fn are_gone(&self) -> bool {
        self.reads.is_empty()
    }

    pub(crate) fn next_event(&self, job: &Job) -> Option<Timestamp> {
        self.may_read(job).then_some(self.next_at)
    }

    /// Ask for what is due at `now`.
    pub(crate) fn act(&mut self, job: &Job, engine: &SimEngine, now: Timestamp, rng: &mut Rng) {
        while self.may_read(job) && self.next_at <= now {
            self.next_at = now.after(Duration::from_micros(rng.u64(0..self.pace)));
            self.left -= 1;
            let length = job.t0.as_ref().expect("it runs").len() as u64;
            let start = rng.u64(..length);
            let most = [700, 9000, 200_000][rng.usize(..3)];
            let range = ByteRange::between(start, length.min(start + rng.u64(..most)));
            let pending = engine.read_snapshot(job.id.expect("it has started"), range);
            self.reads.push(Read { range, pending });
            if rng.u8(..50) == 0 {
                // One who does not wait.
                self.reads.pop();
            }
        }
    }

    /// Take in answers.
    pub(crate) fn take_answers(
        &mut self,
        job: &Job,
        blame: &Blame<'_>,
        seen: &mut Seen,
    ) -> Result<(), String> {
        let mut wrong = None;
        self.reads.retain(|read| {
            let Some(outcome) = read.pending.take() else { return true };
            let result = check(read.range, outcome, job, blame, seen);
            wrong = wrong.take().or(result.err());
            false
        });
        wrong.map_or(Ok(()), Err)
    }
}

fn check(
    range: ByteRange,
    outcome: IoOutcome,
    job: &Job,
    blame: &Blame<'_>,
    seen: &mut Seen,
) -> Result<(), String> {
    let over = !job.runs() || !job.attached;
    match outcome.result {
        Ok(bytes) => {
            seen.snapshot += 1;
            let t0 = job.t0.as_ref().expect("it has started");
            let wanted = usize::try_from(range.offset).unwrap()..usize::try_from(range.end()).unwrap();
            if bytes == t0[wanted] { Ok(()) } else { Err(format!("{range} is not as it was at t0")) }
        }
        Err(_) if over || job.handle.progress().skipped > 0 => Ok(()),
        Err(error) if blame.snapshot(job, &error) => Ok(()),
        Err(_) if (range.offset..range.end()).any(|at| !job.covers(at)) => Ok(()),
        Err(error) => Err(format!("{range} as of t0 cannot be read: {error}")),
    }
}
