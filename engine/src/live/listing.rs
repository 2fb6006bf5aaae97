//! The jobs of an engine, for those who have no handle of them.

use std::fmt;
use std::sync::Arc;

use super::ask::Lost;
use super::command::gone;
use super::reactor::{Job, Reactor};
use crate::error::Error;
use crate::job::JobHandle;
use crate::ring::Ring;

/// A job that runs on an engine.
#[derive(Clone)]
pub struct RunningJob {
    /// How messages name its disk.
    pub disk: String,
    /// How messages name its target.
    pub target: String,
    /// To steer it and to wait for it.
    pub job: JobHandle,
}

impl fmt::Debug for RunningJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningJob")
            .field("disk", &self.disk)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

impl<R: Ring> Reactor<R> {
    pub(super) fn running_jobs(&self) -> Vec<RunningJob> {
        let listed = |job: &Job| RunningJob {
            disk: self.disks[&job.disk].shared.name().to_string(),
            target: job.target_name.to_string(),
            job: JobHandle::new(Arc::clone(job.runner.shared())),
        };
        self.jobs.iter().map(|(_, job)| listed(job)).collect()
    }
}

impl Lost for Result<Vec<RunningJob>, Error> {
    fn lost() -> Self {
        Err(gone())
    }
}
