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

impl Progress {
    /// The rate is over so many seconds.
    const RATE_SPAN: Duration = Duration::from_secs(4);
    /// Younger ones are as good as new.
    const FRESH: Duration = Duration::from_millis(500);

    /// What it says so long after it was told, if nothing has happened since: a device that does not answer has no rate.
    pub(crate) fn age(&mut self, by: Duration) {
        if by < Self::FRESH {
            return;
        }
        self.elapsed += by;
        let span = Self::RATE_SPAN.as_millis();
        let rate = u128::from(self.rate) * span / (span + by.as_millis());
        self.rate = u64::try_from(rate).expect("no more than before");
        let left = self.total.saturating_sub(self.done + self.skipped);
        self.time_left = (self.rate > 0).then(|| Duration::from_secs_f64(left as f64 / self.rate as f64));
    }
}

#[cfg(test)]
mod tests {
    use super::super::runner::empty_progress;
    use super::*;

    #[test]
    fn what_was_told_long_ago_has_no_rate() {
        let told = Progress {
            done: 50 << 20,
            rate: 100 << 20,
            elapsed: Duration::from_secs(7),
            time_left: Some(Duration::from_secs(1)),
            ..empty_progress(150 << 20)
        };
        let after = |by| {
            let mut progress = told.clone();
            progress.age(by);
            progress
        };
        assert_eq!(after(Duration::from_millis(100)), told);
        let stalled = after(Duration::from_secs(4));
        assert_eq!((stalled.elapsed, stalled.rate), (Duration::from_secs(11), 50 << 20));
        assert_eq!(stalled.time_left, Some(Duration::from_secs(2)));
        assert!(after(Duration::from_secs(400)).rate <= 1 << 20);
        let never = after(Duration::from_secs(1 << 40));
        assert_eq!((never.rate, never.time_left, never.done), (0, None, told.done));
    }
}
