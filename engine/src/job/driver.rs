//! The loop of the ring thread for one copy: requests, the copier, the ring, completions, and the job's end.
//!
//! One [`Driver::turn`] lets the runner drain the requests of handles and the copier act, pushes what it asks for, submits and waits, and
//! hands the completions back. The same code runs over the real rings and over the simulated one. No lock is held while it waits.

use std::sync::Arc;

use super::handle::Shared;
use super::runner::{AtEnd, Runner, empty_progress};
use super::{JobHandle, Lifecycle};
use crate::copier::{Copier, Counters, Places};
use crate::ring::{Completion, Op, Ring, RingFailure, Token, Wait};
use crate::units::Speed;

/// Drives one copier over one ring. See the module's header.
pub struct Driver<R: Ring> {
    ring: R,
    runner: Runner,
    completions: Vec<Completion>,
    ops: Vec<(Token, Op)>,
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
        let mut runner = Runner::new(copier, shared, at_end, ring.now());
        runner.start(ring.now());
        Self { ring, runner, completions: Vec::new(), ops: Vec::new() }
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &R {
        &self.ring
    }

    /// Take out what was to run at the end: the driver is going away before that.
    pub(crate) fn take_at_end(&mut self) -> Option<AtEnd> {
        self.runner.take_at_end()
    }

    /// Take the ring out, whatever is in flight on it: for simulated crashes.
    #[must_use]
    pub fn into_ring(self) -> R {
        self.ring
    }

    /// The copier.
    #[must_use]
    pub fn copier(&self) -> &Copier {
        &self.runner.copier
    }

    /// The copier's counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.runner.copier.counters()
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
        if self.runner.is_over() {
            return Ok(true);
        }
        let now = self.ring.now();
        let room = self.ring.capacity() - self.ring.in_flight();
        let more = self.runner.poll(now, Places::alone(room), &mut self.ops);
        for (token, op) in self.ops.drain(..) {
            self.ring.push(token, op);
        }
        if let Some(result) = self.runner.conclusion(self.ring.now(), self.ring.name()) {
            self.ring.release_files();
            self.runner.conclude(result);
            return Ok(true);
        }
        let wait = if more {
            Wait::Poll
        } else {
            self.runner.copier.next_deadline(now).map_or(Wait::Forever, Wait::Until)
        };
        self.ring.wait(wait, &mut self.completions)?;
        let now = self.ring.now();
        for completion in self.completions.drain(..) {
            self.runner.on_completion(completion, self.ring.arena(), now);
        }
        self.runner.take_events();
        Ok(false)
    }
}
