//! Hearing of everything that happens to a job, in order.
//!
//! # Rules
//! An observer is called with the job's state locked, so that what it hears is in the order in which it happened: mostly on the ring thread, and
//! for what a verb changes at once (a resume, a dismissal) on the thread that asked. It must be quick, must not block, and must not use the
//! job's handle: it leaves what it heard for another thread. A panic in it harms nobody.

use std::fmt;
use std::sync::Arc;

use super::{JobResult, Status};
use crate::error::Error;

/// What becomes of the job because of an error that its sweep has met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// It fails.
    Report,
    /// It pauses.
    Stop,
    /// It tries again, or leaves the cluster out.
    Ignore,
}

/// Something that happened to a job.
#[derive(Clone, Debug)]
pub enum JobEvent<'a> {
    /// It has entered this state. `created`, in which a job is made, is not told.
    Status(Status),
    /// Its sweep has met an error. [`Error::operation`] says at what, and with it on which side.
    Error {
        /// The error.
        error: &'a Arc<Error>,
        /// What becomes of the job.
        action: ErrorAction,
    },
    /// It has ended so; before [`Status::Concluded`] is told.
    Ended(&'a JobResult),
}

/// See the module's header.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(JobEvent<'_>) + Send + Sync>);

impl Observer {
    /// Have `call` called.
    pub fn new(call: impl Fn(JobEvent<'_>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(call))
    }

    pub(crate) fn tell(&self, event: JobEvent<'_>) {
        crate::foreign::call("an observer", || (self.0)(event));
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}
