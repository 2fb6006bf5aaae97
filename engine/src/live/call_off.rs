//! Calling a start off that is under way.
//!
//! Until its targets are about to be touched that is a flag; from then on it goes to the jobs. Between the two there is one lock, so that a call
//! is either seen by the start or has reached its jobs: none gets lost, and a start that nobody wants leaves no target half prepared.

use parking_lot::Mutex;

use crate::job::{JobHandle, Refusal};

#[derive(Debug, Default)]
struct State {
    called: bool,
    /// Of the start, in order, once their targets are ready.
    jobs: Vec<Called>,
}

/// A job of a start.
#[derive(Debug)]
struct Called {
    job: JobHandle,
    /// It has accepted a cancel.
    cancelled: bool,
}

impl Called {
    fn call(&mut self) -> Result<(), Refusal> {
        self.job.cancel()?;
        self.cancelled = true;
        Ok(())
    }
}

impl State {
    fn call(&mut self) {
        self.called = true;
        for job in &mut self.jobs {
            if let Err(refusal) = job.call() {
                tracing::debug!(%refusal, "called off too late");
            }
        }
    }
}

/// Calls one start off ([`Engine::start_group_unless`](super::Engine::start_group_unless)), from any thread, but
/// not in an observer of a job: it uses the handles of the jobs.
#[derive(Debug, Default)]
pub struct CallOff {
    state: Mutex<State>,
}

impl CallOff {
    /// Nobody wants any of it: the start fails, or each of its jobs is cancelled that is not ending already.
    pub fn all(&self) {
        self.state.lock().call();
    }

    /// The same, but nothing is done where the job of the disk at `place` is ending already.
    ///
    /// # Errors
    /// Then.
    pub fn with(&self, place: usize) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        if let Some(job) = state.jobs.get_mut(place) {
            job.call()?;
        }
        state.call();
        Ok(())
    }

    pub(super) fn was_called(&self) -> bool {
        self.state.lock().called
    }

    /// Whether the job of the disk at `place` was cancelled by a call: one that was ending already was not.
    pub(super) fn has_cancelled(&self, place: usize) -> bool {
        self.state.lock().jobs.get(place).is_some_and(|job| job.cancelled)
    }

    /// Calls are for these jobs from now on, and so is one that has come already. `false`: it has.
    pub(super) fn hand_over(&self, jobs: Vec<JobHandle>) -> bool {
        let mut state = self.state.lock();
        state.jobs = jobs.into_iter().map(|job| Called { job, cancelled: false }).collect();
        if state.called {
            state.call();
        }
        !state.called
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Lifecycle;
    use crate::job::handle::Shared;
    use crate::job::runner::empty_progress;

    /// A job that has begun; `late`: it takes no cancel any more.
    fn job(late: bool) -> JobHandle {
        let shared = Shared::new(Lifecycle::new(true, false), empty_progress(100), None);
        shared.with_lifecycle(Lifecycle::start);
        assert!(!late || shared.refuse_cancels());
        JobHandle::new(shared)
    }

    #[test]
    fn a_call_has_cancelled_those_that_took_it() {
        for before in [true, false] {
            let call_off = CallOff::default();
            if before {
                call_off.all();
            }
            assert_eq!(call_off.hand_over(vec![job(false), job(true), job(false)]), !before);
            if !before {
                call_off.with(1).expect_err("it is ending already");
                assert!(!call_off.was_called(), "nothing is done then");
                call_off.with(0).expect("it takes a cancel");
            }
            let cancelled: Vec<bool> = (0..4).map(|place| call_off.has_cancelled(place)).collect();
            assert_eq!(cancelled, [true, false, true, false]);
        }
    }
}
