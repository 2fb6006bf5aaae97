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
    jobs: Vec<JobHandle>,
}

impl State {
    fn call(&mut self) {
        self.called = true;
        for job in &self.jobs {
            if let Err(refusal) = job.cancel() {
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
        if let Some(job) = state.jobs.get(place) {
            job.cancel()?;
        }
        state.call();
        Ok(())
    }

    pub(super) fn was_called(&self) -> bool {
        self.state.lock().called
    }

    /// Calls are for these jobs from now on, and so is one that has come already. `false`: it has.
    pub(super) fn hand_over(&self, jobs: Vec<JobHandle>) -> bool {
        let mut state = self.state.lock();
        state.jobs = jobs;
        if state.called {
            state.call();
        }
        !state.called
    }
}
