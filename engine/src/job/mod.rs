//! A job: one copy with its lifecycle, as those who steer and watch it see it.
//!
//! [`Lifecycle`] is the state machine (QEMU's, so that the library, the command line and QMP tell the same story).
//! [`JobHandle`] steers and watches from any thread: it never waits for the ring thread, which looks at the requests when it is
//! woken. [`JobResult`] is how it ended. An [`Observer`] hears of everything on the way.

pub mod driver;
pub mod handle;
pub mod lifecycle;
pub mod observer;
pub mod progress;
pub(crate) mod runner;

pub use handle::JobHandle;
pub use lifecycle::{IoStatus, Lifecycle, Refusal, Status, Verb};
pub use observer::{ErrorAction, JobEvent, Observer};
pub use progress::Progress;

use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::live::GuestLatencies;
use crate::units::ByteRange;

/// A range that was left out of the copy after its retries (policy `ignore`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkippedRange {
    /// Whole clusters, cut at the end of the disk.
    pub range: ByteRange,
    /// The last error, in one line.
    pub error: String,
    /// What is there on the target instead of the source's bytes.
    pub target: TargetHolds,
}

/// What the target holds where nothing was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetHolds {
    /// Zeros: a file that this run has created or emptied, and nothing was written there since.
    Zeros,
    /// What it held before this run, which has written nothing there.
    Unchanged,
    /// Nobody knows: a write there failed, or this run or an earlier one may have written there.
    Unknown,
}

/// What became of the job.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Every cluster that the mode covers is on the target, flushed to stable storage (but see [`JobResult::durable`]).
    Complete,
    /// The same, but for [`JobResult::skipped`].
    CompleteWithSkipped,
    /// It failed with this error; the target is not a copy.
    Failed(Arc<Error>),
    /// It was cancelled.
    Cancelled,
}

/// How a job ended.
#[derive(Clone, Debug)]
pub struct JobResult {
    /// What became of it.
    pub outcome: Outcome,
    /// Counters at the end.
    pub progress: Progress,
    /// Ranges left out, ascending, adjacent ones with the same error merged.
    pub skipped: Vec<SkippedRange>,
    /// Whether what was written was read back from the target and compared, all of it.
    pub verified: bool,
    /// Whether what is complete is on stable storage, too. It is, unless the target, at a server, cannot be flushed.
    pub durable: bool,
    /// From the start of the copy to its end, pauses included.
    pub elapsed: Duration,
    /// Which ring carried it: `"io_uring"` or `"threads"`.
    pub engine: &'static str,
    /// Whether a later run can go on from the map file.
    pub resumable: bool,
    /// Bytes that the map file calls done, from which a later run goes on; 0 unless it is resumable.
    pub resumable_bytes: u64,
    /// Whether there was a map file and it was removed, because nothing is left to go on with.
    pub map_removed: bool,
    /// What the guests of the disk felt; `None` where the engine carries no requests of guests.
    pub guests: Option<Box<GuestLatencies>>,
    /// Things worth telling a person that are no errors (a source that changed meanwhile, direct I/O refused, …).
    pub notices: Vec<String>,
}
