//! How a guest write gets its permit.
//!
//! It enters the gate, **then** looks whether the jobs have copied what it is going to write; see
//! [`jobs`](super::jobs) for why in this order. If not, it gives its pass back while the copy is made: copies may take long, and
//! must not hold up t0 of another job. Then it begins again, as a job may have started meanwhile.

use super::gate::{Entry, Gate};
use super::jobs::{JobId, JobList};
use super::slot::Pass;
use crate::units::{ByteRange, ClusterRange};

/// What a guest write holds from the end of its copy-before-write until its data is on the source.
///
/// While it lives no job starts on its disk, so it is to be dropped as soon as the write is complete. It may be dropped on
/// any thread.
#[must_use = "the write is to be made while the permit lives"]
#[derive(Debug)]
pub struct Permit {
    _pass: Pass,
}

/// How an attempt to get a permit went.
#[must_use = "without its permit a guest must not write"]
#[derive(Debug)]
pub enum Attempt {
    /// The guest may write.
    Granted(Permit),
    /// A job is about to start: wait at the gate, then try again.
    AtBarrier,
    /// These clusters are to be copied by that job first (some of them may be done or on their way); then try again.
    Copy(JobId, ClusterRange),
}

/// Tries to get a permit to write to `range`, for a request that may block its thread; see [`Gate::enter`].
#[inline]
pub fn attempt(gate: &Gate, jobs: &JobList, range: ByteRange) -> Attempt {
    decide(gate.enter(), jobs, range)
}

/// The same for a request that does not block its thread; see [`Gate::enter_unnested`].
#[inline]
pub fn attempt_unnested(gate: &Gate, jobs: &JobList, range: ByteRange) -> Attempt {
    decide(gate.enter_unnested(), jobs, range)
}

#[inline]
fn decide(entry: Entry, jobs: &JobList, range: ByteRange) -> Attempt {
    let Entry::Admitted(pass) = entry else { return Attempt::AtBarrier };
    match jobs.first_undone(range) {
        None => Attempt::Granted(Permit { _pass: pass }),
        Some((job, clusters)) => {
            drop(pass);
            Attempt::Copy(job, clusters)
        }
    }
}
