//! The loop of the ring thread: requests, the copier, the ring, completions, and the job's end.
//!
//! One [`Driver::turn`] drains the requests of handles, lets the copier act, pushes what it asks for, submits and waits, and hands the
//! completions back. The same code runs over the real rings and over the simulated one. No lock is held while it waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::handle::Shared;
use super::{IoStatus, JobHandle, JobResult, Lifecycle, Outcome, Progress, Status};
use crate::copier::{Copier, Counters, Ending, Event};
use crate::ring::{Completion, Op, Ring, RingFailure, Token, Wait};
use crate::units::{Speed, Timestamp};

/// Runs once when the copy is over and before anybody is told, to clean up and to add to the result.
pub type AtEnd = Box<dyn FnOnce(&mut JobResult)>;

/// Drives one copier over one ring. See the module's header.
pub struct Driver<R: Ring> {
    ring: R,
    copier: Copier,
    shared: Arc<Shared>,
    seen: Option<u64>,
    started: Timestamp,
    rate: RateMeter,
    completions: Vec<Completion>,
    ops: Vec<(Token, Op)>,
    notices: Vec<String>,
    paused_on: Option<String>,
    ending: Option<Ending>,
    at_end: Option<AtEnd>,
    over: bool,
}

impl<R: Ring> Driver<R> {
    /// A driver, and the handle of its job.
    #[must_use]
    pub fn new(ring: R, copier: Copier, lifecycle: Lifecycle, speed: Option<Speed>) -> (Self, JobHandle) {
        let shared = Shared::new(lifecycle, empty_progress(copier.counters().total), speed);
        let handle = JobHandle::new(Arc::clone(&shared));
        (Self::attached(ring, copier, shared, None), handle)
    }

    /// A driver for a job whose handle was given out already.
    pub(crate) fn attached(ring: R, copier: Copier, shared: Arc<Shared>, at_end: Option<AtEnd>) -> Self {
        shared.set_waker(ring.waker());
        shared.with_lifecycle(Lifecycle::start);
        let started = ring.now();
        Self {
            ring,
            copier,
            shared,
            seen: None,
            started,
            rate: RateMeter::default(),
            completions: Vec::new(),
            ops: Vec::new(),
            notices: Vec::new(),
            paused_on: None,
            ending: None,
            at_end,
            over: false,
        }
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &R {
        &self.ring
    }

    /// Take out what was to run at the end: the driver is going away before that.
    pub(crate) fn take_at_end(&mut self) -> Option<AtEnd> {
        self.at_end.take()
    }

    /// Take the ring out, whatever is in flight on it: for simulated crashes.
    #[must_use]
    pub fn into_ring(self) -> R {
        self.ring
    }

    /// The copier.
    #[must_use]
    pub fn copier(&self) -> &Copier {
        &self.copier
    }

    /// The copier's counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.copier.counters()
    }

    /// Turn until the job is over.
    ///
    /// # Errors
    /// When the ring breaks; the job has not ended then.
    pub fn run(&mut self) -> Result<(), RingFailure> {
        while !self.turn()? {}
        Ok(())
    }

    /// One iteration; `true` when the job is over.
    ///
    /// # Errors
    /// When the ring breaks; the job has not ended then.
    pub fn turn(&mut self) -> Result<bool, RingFailure> {
        if self.over {
            return Ok(true);
        }
        self.take_requests();
        let now = self.ring.now();
        let room = self.ring.capacity() - self.ring.in_flight();
        let more = self.copier.poll(now, room, &mut self.ops);
        for (token, op) in self.ops.drain(..) {
            self.ring.push(token, op);
        }
        self.take_events();
        self.publish(now);
        if self.try_conclude() {
            return Ok(true);
        }
        let wait =
            if more { Wait::Poll } else { self.copier.next_deadline(now).map_or(Wait::Forever, Wait::Until) };
        self.ring.wait(wait, &mut self.completions)?;
        let now = self.ring.now();
        for completion in self.completions.drain(..) {
            self.copier.on_completion(completion, self.ring.arena(), now);
        }
        self.take_events();
        Ok(false)
    }

    fn take_requests(&mut self) {
        let version = self.shared.version();
        if self.seen == Some(version) {
            return;
        }
        self.seen = Some(version);
        let requests = self.shared.requests();
        self.copier.set_speed(requests.speed, self.ring.now());
        self.copier.set_paused(requests.pause);
        if !requests.pause || self.shared.with_lifecycle(|lifecycle| lifecycle.io_status()) == IoStatus::Ok {
            self.paused_on = None;
        }
        if requests.cancel {
            // In `pending` the copy is complete but the job has not concluded: it can still be cancelled. A cancel that comes while the
            // end is being written down is too late.
            let pending = matches!(self.ending, Some(Ending::Complete));
            if self.copier.cancel() || pending {
                self.shared.with_lifecycle(Lifecycle::abort);
            } else {
                self.shared.forget_cancel();
            }
            if pending {
                self.ending = Some(Ending::Cancelled);
            }
        }
    }

    fn take_events(&mut self) {
        for event in self.copier.take_events() {
            match event {
                Event::Stopped { io_status, error } => {
                    self.paused_on = Some(error.to_string());
                    self.shared.stopped(io_status, error.to_string());
                }
                Event::Drained => self.shared.with_lifecycle(Lifecycle::drained),
                Event::Notice(notice) => self.notices.push(notice),
                Event::Finished(ending) => {
                    match ending {
                        Ending::Complete => self.shared.with_lifecycle(Lifecycle::finished),
                        Ending::Failed(_) | Ending::Cancelled => self.shared.with_lifecycle(Lifecycle::abort),
                    }
                    self.ending = Some(ending);
                }
            }
        }
    }

    /// When the copier is through and the job may conclude: tell everybody.
    fn try_conclude(&mut self) -> bool {
        let Some(ending) = &self.ending else { return false };
        if !self.shared.with_lifecycle(|lifecycle| lifecycle.may_conclude()) {
            return false;
        }
        let skipped = self.copier.skipped_ranges();
        let outcome = match ending {
            Ending::Complete if skipped.is_empty() => Outcome::Complete,
            Ending::Complete => Outcome::CompleteWithSkipped,
            Ending::Failed(error) => Outcome::Failed(Arc::clone(error)),
            Ending::Cancelled => Outcome::Cancelled,
        };
        let now = self.ring.now();
        let mut result = JobResult {
            outcome,
            progress: self.progress(now),
            skipped,
            verified: self.copier.is_verified(),
            elapsed: now.since(self.started),
            engine: self.ring.name(),
            resumable: self.copier.is_resumable(),
            notices: std::mem::take(&mut self.notices),
        };
        if let Some(at_end) = self.at_end.take() {
            at_end(&mut result);
        }
        // Whoever is told that the job has ended may use its disks at once. What the end needed of them is dropped by now.
        self.ring.release_files();
        self.shared.end(result);
        self.over = true;
        true
    }

    fn publish(&mut self, now: Timestamp) {
        let progress = self.progress(now);
        self.shared.publish(progress);
    }

    fn progress(&mut self, now: Timestamp) -> Progress {
        let counters = self.copier.counters();
        self.rate.sample(now, counters.done);
        let rate = self.rate.rate();
        let left = counters.total - counters.done - counters.skipped;
        let time_left = (rate > 0).then(|| Duration::from_secs_f64(left as f64 / rate as f64));
        Progress {
            total: counters.total,
            done: counters.done,
            copied: counters.copied,
            holes: counters.holes,
            zeros: counters.zeros,
            uncovered: counters.uncovered,
            resumed: counters.resumed,
            skipped: counters.skipped,
            verified: counters.verified,
            retries: counters.retries,
            rate,
            time_left,
            paused_on: self.paused_on.clone(),
            elapsed: now.since(self.started),
            ..empty_progress(counters.total)
        }
    }
}

/// Progress before anything was done.
pub(crate) fn empty_progress(total: u64) -> Progress {
    Progress {
        status: Status::Created,
        io_status: IoStatus::Ok,
        total,
        done: 0,
        copied: 0,
        holes: 0,
        zeros: 0,
        uncovered: 0,
        resumed: 0,
        skipped: 0,
        verified: 0,
        retries: 0,
        rate: 0,
        time_left: None,
        speed: None,
        paused_on: None,
        elapsed: Duration::ZERO,
    }
}

/// The rate over the last seconds, from samples a quarter of a second apart.
#[derive(Debug, Default)]
struct RateMeter {
    samples: VecDeque<(Timestamp, u64)>,
}

impl RateMeter {
    const SPACING: Duration = Duration::from_millis(250);
    const SAMPLES: usize = 16;

    fn sample(&mut self, now: Timestamp, done: u64) {
        let due = self.samples.back().is_none_or(|(last, _)| now.since(*last) >= Self::SPACING);
        if due {
            if self.samples.len() == Self::SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back((now, done));
        }
    }

    /// Bytes a second, 0 while there are no two samples.
    fn rate(&self) -> u64 {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return 0 };
        let nanos = last.0.since(first.0).as_nanos();
        if nanos == 0 {
            return 0;
        }
        let bytes = u128::from(last.1.saturating_sub(first.1));
        u64::try_from(bytes * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
    }
}
