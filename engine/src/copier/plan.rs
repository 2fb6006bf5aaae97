//! What a copier is to do: everything decided before it starts.

use std::sync::Arc;
use std::time::Duration;

use crate::job::TargetHolds;
use crate::modes::{CbwErrorPolicy, ErrorPolicy, SyncMode};
use crate::ring::{DocumentId, FileId};
use crate::units::{ClusterRange, Geometry, Speed};

/// One side of a copy, as the logic sees it.
#[derive(Clone, Debug)]
pub struct Side {
    /// On the ring.
    pub file: FileId,
    /// How messages name it.
    pub name: Arc<str>,
    /// Alignment of direct I/O; `None`: buffered, and the page cache is dropped behind the copy.
    pub direct_alignment: Option<u32>,
    /// It is at a server: what is lost with the connection does not come back, whatever a policy says.
    pub remote: bool,
}

/// A small state that a later run can go on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Clusters whose copy is on stable storage, ascending, neither empty nor adjacent.
    pub done: Vec<ClusterRange>,
    /// Clusters left out, which the next run tries again.
    pub skipped: Vec<ClusterRange>,
    /// Whether what is neither done nor skipped still reads as zeros on the target, unless it holds what the source holds.
    pub blank_is_zero: bool,
}

/// Puts a checkpoint into the form in which it is stored.
pub type EncodeCheckpoint = Box<dyn Fn(&Checkpoint) -> Vec<u8> + Send>;

/// Where checkpoints go.
pub struct MapPlan {
    /// On the ring.
    pub document: DocumentId,
    /// How messages name it.
    pub name: Arc<str>,
    /// Its form.
    pub encode: EncodeCheckpoint,
}

/// What a copy of a live disk adds.
#[derive(Clone, Copy, Debug)]
pub struct LivePlan {
    /// When a guest's write cannot go on because of the copy.
    pub on_cbw_error: CbwErrorPolicy,
    /// How long a guest's write waits for the copy at most; `None`: as long as it takes.
    pub cbw_timeout: Option<Duration>,
    /// Slots that the sweep leaves to guests; fewer than all.
    pub reserved_slots: u32,
    /// Space was reserved on the target, which reads as zeros: what is not needed is given back at the end.
    pub space_reserved: bool,
    /// Zeros may give space of the target back. If not, they keep it, and what was reserved stays so.
    pub may_unmap: bool,
}

impl LivePlan {
    /// Whether space that was reserved is given back.
    pub(super) fn gives_back(&self) -> bool {
        self.space_reserved && self.may_unmap
    }
}

/// What a copier is to do.
pub struct Plan {
    /// Length and cluster size.
    pub geometry: Geometry,
    /// Read from.
    pub source: Side,
    /// Written to.
    pub target: Side,
    /// What is covered.
    pub sync: SyncMode,
    /// Look for clusters of zeros.
    pub zero_detect: bool,
    /// What was not written yet reads as zeros on the target.
    pub target_is_zero: bool,
    /// Reserve space on the target ahead of the data.
    pub allocate_ahead: bool,
    /// The target can tell which of its ranges are holes; else what was not written has to be read back, to verify that it is zero.
    pub target_shows_holes: bool,
    /// What the target holds where this run writes nothing.
    pub target_before: TargetHolds,
    /// In-flight clusters; the arena holds as many.
    pub slots: u32,
    /// Where the first slot lies in the arena, in bytes.
    pub arena_start: u32,
    /// Most clusters in one request, at least 1.
    pub max_run: u32,
    /// Policy for reads.
    pub on_source_error: ErrorPolicy,
    /// Policy for writes, flushes and verification.
    pub on_target_error: ErrorPolicy,
    /// Speed limit at the start.
    pub speed: Option<Speed>,
    /// Read back and compare what was written.
    pub verify: bool,
    /// Keep a map. Its first version, with nothing done, was published already.
    pub map: Option<MapPlan>,
    /// What an earlier run has done.
    pub resumed: Vec<ClusterRange>,
    /// The source is a disk that guests write to.
    pub live: Option<LivePlan>,
    /// What an earlier run left out, ascending: tried again after all else.
    pub postponed: Vec<ClusterRange>,
    /// Limits that tests make smaller.
    pub limits: Limits,
    /// A bug put in on purpose, to see that the tests catch it.
    #[cfg(feature = "sim")]
    pub planted: Option<PlantedBug>,
}

/// Named bounds of a copier.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest time between the starts of two checkpoints while there is something new.
    pub checkpoint_interval: Duration,
    /// Most bytes copied between the starts of two checkpoints.
    pub checkpoint_bytes: u64,
    /// Retries of a cluster under policy `ignore`, and of a failed flush, before giving up on it.
    pub retries: u32,
    /// Pause before the first retry; doubles with each.
    pub retry_pause: Duration,
    /// Clusters in the list of those to try again, beyond which one that a guest could not copy is no longer put there: the sweep goes
    /// back to it instead.
    pub guest_retries: usize,
    /// Most ranges left out, of whatever size; one more fails the job.
    pub skipped_ranges: usize,
    /// Clusters that a verification finds wrong before it leaves the rest of its window to be copied again.
    pub mismatches: usize,
    /// Most bytes made zero by one request.
    pub zero_run_bytes: u64,
    /// Operations for zeros that fail one after the other, for reasons that may pass, before zeros are written as data.
    pub zeroing_failures: u32,
    /// First and smallest window of space reserved ahead, in bytes of data.
    pub allocation_window_min: u64,
    /// Largest window of space reserved ahead.
    pub allocation_window_max: u64,
    /// Extents asked for at a time.
    pub extents: usize,
    /// Bytes that count as data, or as allocated, where a question about them has no answer; behind them it is asked again. Above 0.
    pub unanswered_bytes: u64,
    /// Bytes of sweep after which the page cache behind a buffered side is dropped.
    pub drop_step: u64,
    /// How much of a live copy is written between two flushes.
    pub write_back: WriteBackLimits,
}

/// Bounds of what is written to the target of a live copy between two flushes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteBackLimits {
    /// Before anything is known of the target.
    pub start_bytes: u64,
    /// At least, however long flushes take; above 0.
    pub min_bytes: u64,
    /// At most.
    pub max_bytes: u64,
}

impl WriteBackLimits {
    /// What a real device is good with.
    pub const DEFAULT: Self = Self { start_bytes: 4 << 20, min_bytes: 1 << 20, max_bytes: 1 << 30 };
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            checkpoint_interval: Duration::from_secs(5),
            checkpoint_bytes: 1 << 30,
            retries: 5,
            retry_pause: Duration::from_millis(100),
            guest_retries: 4096,
            skipped_ranges: 65_536,
            mismatches: 1024,
            zero_run_bytes: 32 << 20,
            zeroing_failures: 4,
            allocation_window_min: 16 << 20,
            allocation_window_max: 1 << 30,
            extents: 1024,
            unanswered_bytes: 1 << 30,
            drop_step: 32 << 20,
            write_back: WriteBackLimits::DEFAULT,
        }
    }
}

/// Bugs that the simulation must catch.
#[cfg(feature = "sim")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedBug {
    /// A short write counts as the whole.
    ShortWriteIsWhole,
    /// The map is written without waiting for the flush.
    MapBeforeFlush,
    /// The set of done clusters is captured when the flush has ended, not before it was submitted.
    CaptureAfterFlush,
    /// A failed flush is tried again and, when that succeeds, believed.
    FlushRetriedAndBelieved,
    /// A cluster counts as done although its write failed.
    FailedWriteIsDone,
    /// What is read back is not compared.
    VerifyBelieves,
    /// A cluster counts as copied as soon as its write is submitted.
    DoneBeforeWrite,
    /// A guest that waited for a cluster is not woken.
    WakeUpLost,
    /// The last cluster that a guest's write touches is not copied first.
    TailForgotten,
    /// A guest's discard is carried out at once, copied first or not.
    DiscardNotCopied,
    /// A discard that was put off is carried out although a guest has written there by himself since.
    DiscardNotForgotten,
    /// t0 is taken although a permit is out.
    PermitOutAtT0,
    /// A guest that had clusters copied for one job does not look at the jobs again.
    NoSecondLook,
    /// A guest is let go before it was asked whether sync `top` covers what it changes.
    AllocationAskedLate,
    /// A slot of the fleece file is free once its cluster is written to the target, flushed or not.
    FleeceFreedBeforeFlush,
}

impl Plan {
    /// Whether `bug` was put in. Never, outside the simulation.
    #[cfg(feature = "sim")]
    #[must_use]
    pub(super) fn has_bug(&self, bug: PlantedBug) -> bool {
        self.planted == Some(bug)
    }
}

/// Whether a bug was planted in `$plan`: `false`, at no cost, outside the simulation.
macro_rules! planted {
    ($plan:expr, $bug:ident) => {{
        #[cfg(feature = "sim")]
        {
            $plan.has_bug($crate::copier::plan::PlantedBug::$bug)
        }
        #[cfg(not(feature = "sim"))]
        {
            let _ = &$plan;
            false
        }
    }};
}
pub(super) use planted;
