//! What has happened, over all runs: a test in which nothing happens proves nothing.

/// Counts.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) granted: u64,
    pub(crate) at_barrier: u64,
    pub(crate) copies: u64,
    pub(crate) refused: u64,
    pub(crate) failed: u64,
    pub(crate) read: u64,
    pub(crate) flushed: u64,
    pub(crate) left: u64,
    pub(crate) orphaned: u64,
    pub(crate) started: u64,
    pub(crate) not_started: u64,
    pub(crate) complete: u64,
    pub(crate) complete_late: u64,
    pub(crate) skipped: u64,
    pub(crate) failed_jobs: u64,
    pub(crate) cancelled: u64,
    pub(crate) died: u64,
    pub(crate) lost: u64,
    /// Reads of the disk as of t0.
    pub(crate) snapshot: u64,
    /// Complete copies of disks under guests' writes of which something was not covered.
    pub(crate) uncovered: u64,
    /// Discards that were put off, and forgotten for a guest who writes by himself.
    pub(crate) forgot: u64,
    /// Clusters that were seen in a fleece file, and not on the target.
    pub(crate) fleeced: u64,
    /// Jobs whose fleece file was full.
    pub(crate) fleece_full: u64,
    /// Of those that have failed, or their guests, because it was full while they were stopped.
    pub(crate) fleece_refused: u64,
    /// Answers to guests.
    pub(crate) answers: u64,
    /// Of these, to requests that nothing can have made to fail.
    pub(crate) sure_answers: u64,
    /// Jobs whose end was told.
    pub(crate) jobs: u64,
    /// Of these, those that nothing can have made to fail.
    pub(crate) sure_jobs: u64,
    /// What was left out, and then tried by a guest.
    pub(crate) unskipped: u64,
}

impl Seen {
    fn counts(&mut self) -> [&mut u64; 29] {
        [
            &mut self.granted,
            &mut self.at_barrier,
            &mut self.copies,
            &mut self.refused,
            &mut self.failed,
            &mut self.read,
            &mut self.flushed,
            &mut self.left,
            &mut self.orphaned,
            &mut self.started,
            &mut self.not_started,
            &mut self.complete,
            &mut self.complete_late,
            &mut self.skipped,
            &mut self.failed_jobs,
            &mut self.cancelled,
            &mut self.died,
            &mut self.lost,
            &mut self.snapshot,
            &mut self.uncovered,
            &mut self.forgot,
            &mut self.fleeced,
            &mut self.fleece_full,
            &mut self.answers,
            &mut self.sure_answers,
            &mut self.jobs,
            &mut self.sure_jobs,
            &mut self.fleece_refused,
            &mut self.unskipped,
        ]
    }

    /// A guest was answered, and nothing can have made his request fail, or something can.
    pub(crate) fn answer(&mut self, is_sure: bool) {
        self.answers += 1;
        self.sure_answers += u64::from(is_sure);
    }

    pub(crate) fn add(&mut self, mut other: Self) {
        for (sum, count) in self.counts().into_iter().zip(other.counts()) {
            *sum += *count;
        }
    }

    /// The least of all counts but the last two, for which there are runs of their own.
    pub(crate) fn least(&mut self) -> u64 {
        let [counts @ .., _, _] = self.counts();
        counts.into_iter().map(|count| *count).min().expect("there are some")
    }
}
