//! `copy`: what an embedder or the command line calls to copy one disk to another.
//!
//! [`start`] checks everything before it touches anything of the target, then starts the ring thread and returns a handle.

mod end;
mod sample;
mod start;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::job::JobHandle;
use crate::map::MapFile;
pub use crate::modes::{ErrorPolicy, Format, SyncMode};
pub use crate::ring::select::IoEngine;
use crate::units::{ClusterSize, Speed};
pub use start::{start, start_unless_given_up, start_with};

/// What to copy and how.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// A path, `null:SIZE`, or an NBD URI.
    pub source: String,
    /// A path, `null:`, or an NBD URI.
    pub target: String,
    /// Image format of the source.
    pub source_format: Format,
    /// Image format of the target.
    pub target_format: Format,
    /// Copy a source that another program has open for writing. If it changes a file meanwhile, the copy fails as ever.
    pub force_share: bool,
    /// What is covered.
    pub sync: SyncMode,
    /// Unit of copying.
    pub cluster_size: ClusterSize,
    /// Most clusters in flight; `None`: chosen from the cluster size.
    pub queue_depth: Option<u32>,
    /// Speed limit.
    pub speed: Option<Speed>,
    /// Policy for reads.
    pub on_source_error: ErrorPolicy,
    /// Policy for writes.
    pub on_target_error: ErrorPolicy,
    /// Map file, to go on after an interruption.
    pub map: Option<PathBuf>,
    /// Read back what was written and compare.
    pub verify: bool,
    /// Look for clusters of zeros.
    pub zero_detect: bool,
    /// The target (a device) reads as zeros already.
    pub target_is_zero: bool,
    /// Overwrite an existing target file.
    pub force: bool,
    /// Which ring.
    pub io_engine: IoEngine,
}

impl CopyOptions {
    /// The defaults of the command line for copying `source` to `target`.
    #[must_use]
    pub fn new(source: impl Into<String>, target: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            target: target.into(),
            source_format: Format::Raw,
            target_format: Format::Raw,
            force_share: false,
            sync: SyncMode::Full,
            cluster_size: ClusterSize::DEFAULT,
            queue_depth: None,
            speed: None,
            on_source_error: ErrorPolicy::Report,
            on_target_error: ErrorPolicy::Report,
            map: None,
            verify: false,
            zero_detect: true,
            target_is_zero: false,
            force: false,
            io_engine: IoEngine::Auto,
        }
    }
}

/// Lets a start be given up as long as nothing was touched: until then it may wait long, for servers that do not answer and for what is compared before a
/// copy goes on.
#[derive(Clone, Debug, Default)]
pub struct StartToken(Arc<Start>);

#[derive(Debug, Default)]
struct Start {
    decided: AtomicU8,
    /// Has an empty file stand in where there was none.
    map: Mutex<Weak<MapFile>>,
}

impl StartToken {
    const TOUCHES: u8 = 1;
    const GIVEN_UP: u8 = 2;

    /// Give the start up; whether that was in time: then nothing of the target was touched, nor will be, and a map file that it has made is gone. If not,
    /// the start goes to its end.
    #[must_use]
    pub fn give_up(&self) -> bool {
        let in_time = self.decide(Self::GIVEN_UP);
        // The start itself may wait for a server for as long as the program lasts.
        let map = if in_time { self.0.map.lock().upgrade() } else { None };
        if let Some(map) = map {
            map.remove_stand_in();
        }
        in_time
    }

    /// From here on the target is touched, unless the start was given up.
    pub(crate) fn touch(&self) -> bool {
        self.decide(Self::TOUCHES)
    }

    /// The start has opened `map`; whether it goes on.
    pub(crate) fn has_map(&self, map: &Arc<MapFile>) -> bool {
        *self.0.map.lock() = Arc::downgrade(map);
        self.0.decided.load(Ordering::Acquire) != Self::GIVEN_UP
    }

    /// The first word counts.
    fn decide(&self, wanted: u8) -> bool {
        match self.0.decided.compare_exchange(0, wanted, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(decided) => decided == wanted,
        }
    }
}

/// A copy that has started.
#[derive(Debug)]
pub struct Copy {
    /// Steers and watches it.
    pub job: JobHandle,
    /// Things worth telling at the start, one line each (io_uring refused, direct I/O refused, little space left, resumed from a map).
    pub notices: Vec<String>,
}
