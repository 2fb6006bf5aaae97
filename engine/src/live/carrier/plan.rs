//! What a carrier is given: its disk, its bounds, the requests of guests, and whom it asks for leave to write.

use std::time::Duration;

use super::super::asks::Waited;
use super::super::jobs::JobId;
use crate::copier::plan::Side;
use crate::error::Error;
use crate::ring::BufferRange;
use crate::units::{ByteRange, ClusterRange, Length};

/// Names a request from its submission to its outcome. Chosen by the caller; unique among those under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IoId(pub u64);

/// What a guest asks for. Any alignment, any length; a request beyond the disk's end is refused with an outcome.
#[derive(Debug)]
pub enum IoRequest {
    /// Read `range` into `buffer`, which is as long.
    Read {
        /// Which bytes.
        range: ByteRange,
        /// Where they go; comes back filled.
        buffer: Vec<u8>,
    },
    /// Write `data` at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Comes back as given.
        data: Vec<u8>,
    },
    /// Bring to stable storage every write whose outcome was given out before. Where data goes through the page cache, all fail after one that
    /// has failed, until the disk is opened anew: nobody tells what that one has lost.
    Flush,
    /// Contents of `range` are not needed any more, and undefined until written again.
    Discard {
        /// Which bytes.
        range: ByteRange,
    },
    /// Make `range` read as zeros.
    WriteZeroes {
        /// Which bytes.
        range: ByteRange,
        /// Whether its space may be given back.
        may_unmap: bool,
        /// Fail with `EOPNOTSUPP`, changing nothing more, where it would take to write zeros.
        only_fast: bool,
    },
}

/// How a request ended.
#[derive(Debug)]
pub struct IoOutcome {
    /// The request's buffer: filled for a read, as given for a write, empty for the others.
    pub result: Result<Vec<u8>, Error>,
    /// What it has spent of the time of jobs: more may follow that is of the same request of a guest.
    pub(in crate::live) waited: Waited,
}

impl IoOutcome {
    pub(in crate::live) fn new(result: Result<Vec<u8>, Error>) -> Self {
        Self { result, waited: Waited::default() }
    }

    /// Nothing had to be done.
    pub(in crate::live) fn nothing() -> Self {
        Self::new(Ok(Vec::new()))
    }
}

/// Names one copy-before-write that was asked for, until it is answered by [`super::Carrier::copied`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyWait {
    /// Never used twice by a carrier.
    pub number: u64,
    /// For how long which jobs were asked for this request, all its windows together: the host's, which hands it back longer.
    pub(in crate::live) waited: Waited,
}

/// What comes of asking for a permit.
#[derive(Debug)]
pub enum Attempt<P> {
    /// The range may be changed while the permit is held.
    Granted(P),
    /// A job is starting: ask again after [`super::Carrier::barrier_lowered`].
    AtBarrier,
    /// These clusters have to be copied for this job first; then ask again.
    Copy(JobId, ClusterRange),
}

/// Which part of a range may be discarded now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardRule {
    /// The first run of bytes of the range of which every cluster touched is done in all jobs; `None`: there is none.
    pub now: Option<ByteRange>,
}

/// Decides when the disk may be changed. Answers at once; never calls back.
pub trait AdmissionHost {
    /// What is held while the disk is being changed; given back by dropping it.
    type Permit;

    /// Ask for leave to change `range`. The permits of a carrier never nest: at a raised barrier it waits.
    fn attempt(&mut self, range: ByteRange) -> Attempt<Self::Permit>;

    /// Have `clusters` copied for `job` before `range` is changed, which other jobs may have to copy, too. Answered by [`super::Carrier::copied`], later: never before this has returned.
    fn copy(&mut self, job: JobId, clusters: ClusterRange, range: ByteRange, wait: CopyWait);

    /// Which part of `range`, which is not empty, may be discarded now. Loads only.
    fn discards(&mut self, range: ByteRange) -> DiscardRule;
}

/// What a carrier works with.
#[derive(Clone, Debug)]
pub struct CarrierPlan {
    /// The disk.
    pub file: Side,
    /// Its length.
    pub length: Length,
    /// Whether making zeros in the space that they have ([`crate::ring::ZeroMethod::Keep`]) never means to write them. A block device that has no
    /// operation for it has the kernel write them, and does not tell.
    pub keep_is_fast: bool,
    /// The carrier's part of the arena; starts on a page.
    pub buffers: BufferRange,
    /// Bounds.
    pub limits: CarrierLimits,
    /// A bug put in on purpose, to see that the tests catch it.
    #[cfg(feature = "sim")]
    pub planted: Option<CarrierBug>,
}

/// Bugs that the simulation must catch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CarrierBug {
    /// A permit is for the guest's bytes only, not for the rest of the blocks that are written back.
    PermitWithoutBlocks,
    /// A permit is given back when the write is given out.
    PermitDroppedEarly,
    /// Blocks that are read and written back are not locked.
    BlocksNotLocked,
    /// A discard that was put off does not look who writes there.
    DiscardNotLocked,
    /// A discard that was put off is carried out although the guest wrote there since.
    DiscardAfterWrite,
    /// A write that failed counts as done.
    FailedWriteIsDone,
    /// What a write covers in part is not read before.
    BlocksNotRead,
    /// A flush that succeeds is believed although another has failed before.
    FlushBelievedAgain,
}

impl CarrierPlan {
    /// Whether `bug` was put in. Never, outside the simulation.
    #[cfg(feature = "sim")]
    pub(super) fn has_bug(&self, bug: CarrierBug) -> bool {
        self.planted == Some(bug)
    }

    #[cfg(not(feature = "sim"))]
    pub(super) fn has_bug(&self, _bug: CarrierBug) -> bool {
        false
    }
}

/// Named bounds of a carrier.
#[derive(Clone, Copy, Debug)]
pub struct CarrierLimits {
    /// Most requests under way, without those that wait for a copy or at the barrier; submitting one more is a bug of the caller.
    pub requests: usize,
    /// Unit in which the buffers are handed out, in bytes: whole pages.
    pub slot_bytes: u32,
    /// Most bytes of a request that are moved at a time: whole slots, not more than the buffers hold.
    pub window_bytes: u64,
    /// Most bytes made zero or discarded at a time where nothing has to be copied before.
    pub wide_window_bytes: u64,
    /// Most ranges of discards that are put off.
    pub deferred_ranges: usize,
    /// To what the ranges are rounded in when there are too many, in bytes.
    pub deferred_grain: u64,
    /// Most stretches of discards put off that are looked at before a pause.
    pub discard_checks: u32,
    /// That pause.
    pub discard_pause: Duration,
    /// Most requests looked at, and most operations given out, in one poll.
    pub steps_a_poll: usize,
}

impl Default for CarrierLimits {
    fn default() -> Self {
        Self {
            requests: 1024,
            slot_bytes: 64 << 10,
            window_bytes: 1 << 20,
            wide_window_bytes: 32 << 20,
            deferred_ranges: 1024,
            deferred_grain: 64 << 10,
            discard_checks: 16,
            discard_pause: Duration::from_millis(20),
            steps_a_poll: 128,
        }
    }
}
