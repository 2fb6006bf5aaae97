//! How far a job is.

use std::time::Duration;

use super::lifecycle::{IoStatus, Status};

/// Counters of a job. `done + skipped == total` at its end, for every sync mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Where the job stands.
    pub status: Status,
    /// Whether it has paused on an error.
    pub io_status: IoStatus,
    /// Bytes that the job covers: the source's length.
    pub total: u64,
    /// Bytes settled: copied, found to be zero, holes, not covered by the mode, or done by an earlier run.
    pub done: u64,
    /// Of `done`: bytes written to the target as data.
    pub copied: u64,
    /// Of `done`: bytes in holes of the source, which were not read.
    pub holes: u64,
    /// Of `done`: bytes read and found to be all zero, a whole cluster at a time.
    pub zeros: u64,
    /// Of `done`: bytes that the sync mode does not cover (`top`: not allocated in the top layer).
    pub uncovered: u64,
    /// Of `done`: bytes that an earlier run had copied.
    pub resumed: u64,
    /// Bytes left out after their retries (policy `ignore`); not in `done`. Of a live disk a guest may have them copied after all.
    pub skipped: u64,
    /// Bytes read back and compared (`verify`).
    pub verified: u64,
    /// Clusters that failed and were tried again so far, each as often as it was. (To look for them in a larger request that failed is none.)
    pub retries: u64,
    /// Bytes of buffers that hold clusters on their way.
    pub in_flight: u64,
    /// Bytes of the fleece file that hold old contents which are not on the target yet; not in `done`.
    pub fleeced: u64,
    /// Bytes a second settled, over the last seconds.
    pub rate: u64,
    /// Estimated time left; `None` while there is no rate.
    pub time_left: Option<Duration>,
    /// Limit in bytes a second.
    pub speed: Option<u64>,
    /// Why the job is paused on an error, in one line.
    pub paused_on: Option<String>,
    /// Since the start of the copy.
    pub elapsed: Duration,
}
