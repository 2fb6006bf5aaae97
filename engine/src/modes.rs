//! The choices that a copy is made by: what it covers, what it does about errors, how its disks lie in their files.

/// What the copy covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// The whole disk.
    Full,
    /// Of a live disk only what a guest is about to change, until the job is cancelled: then what was copied is flushed and kept.
    None,
    /// What is allocated in the top layer of the source. A raw source has one layer, allocated as a whole.
    Top,
}

/// What the sweep does about an I/O error. See the table in the README.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// The job fails with that error.
    Report,
    /// The job pauses; resume tries the same cluster again.
    Stop,
    /// `Stop` when out of space, else `Report`.
    Enospc,
    /// As `Enospc`.
    Auto,
    /// A bounded number of retries with growing pauses, then the cluster is left out and listed.
    Ignore,
}

/// What becomes of a guest's write whose old contents cannot be copied first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CbwErrorPolicy {
    /// The guest's write fails with the error; the job lives on, and the guest may try again.
    BreakGuestWrite,
    /// The guest's write goes on; the job fails, since its point in time is lost.
    #[default]
    BreakSnapshot,
}

/// Image format of one side. Never guessed from the contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes as they are.
    Raw,
    /// QEMU's qcow2.
    Qcow2,
}
