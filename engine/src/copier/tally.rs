//! The copier's counters, in bytes.

/// What a settled cluster was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Was {
    /// Data, of which `written` bytes a cluster were written and the rest lay in holes.
    Data {
        /// See above.
        written: u32,
    },
    /// Read, and all zero.
    Zeros,
    /// A hole as a whole.
    Hole,
}

/// See [`crate::job::Progress`] for the meaning of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) copied: u64,
    pub(super) holes: u64,
    pub(super) zeros: u64,
    pub(super) uncovered: u64,
    pub(super) resumed: u64,
    /// Clusters that count as done or were left out.
    pub(super) settled_clusters: u64,
}

impl Tally {
    /// Bytes that count as done.
    pub(super) fn done(&self) -> u64 {
        self.copied + self.holes + self.zeros + self.uncovered + self.resumed
    }

    /// `clusters` clusters of together `bytes` bytes are done, each as `was` says.
    pub(super) fn settle(&mut self, was: Was, clusters: u64, bytes: u64) {
        match was {
            Was::Data { written } => {
                let written = u64::from(written) * clusters;
                assert!(written <= bytes, "no more is written than there is");
                self.copied += written;
                self.holes += bytes - written;
            }
            Was::Zeros => self.zeros += bytes,
            Was::Hole => self.holes += bytes,
        }
        self.settled_clusters += clusters;
    }

    /// `clusters` clusters of together `bytes` bytes are not done after all, each as `was` says.
    pub(super) fn withdraw(&mut self, was: Was, clusters: u64, bytes: u64) {
        match was {
            Was::Data { written } => {
                let written = u64::from(written) * clusters;
                self.copied -= written;
                self.holes -= bytes - written;
            }
            Was::Zeros => self.zeros -= bytes,
            Was::Hole => self.holes -= bytes,
        }
        self.settled_clusters -= clusters;
    }
}
