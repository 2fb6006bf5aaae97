//! What an operation in flight is for, and whether a guest waits for it.
//!
//! # Whether a guest waits
//! What guests wait for goes before all else, and finds places on the ring that nothing else has (`queue`). Of a transfer that is known:
//! it is made for a guest, or one has come to wait for it. A reader of the snapshot holds clusters of the source as well while he reads, so whoever
//! waits for these waits for his read; and a read that was short is asked for again, as urgent as it has become meanwhile. Which of those who wait
//! are guests and which other readers the set does not tell; a guest may be among them.

use super::Copier;
use super::snapshot::SnapshotRead;
use super::transfer::TransferId;
use crate::interval_set::Claim;
use crate::piece::Piece;
use crate::ring::{Op, ZeroMethod};
use crate::units::{ByteRange, ClusterRange, Timestamp};

/// What an operation in flight is for.
#[derive(Debug)]
pub(super) enum Task {
    /// A read or write of a transfer.
    Move { transfer: TransferId, piece: Piece },
    /// Zeros of a transfer's clusters. `best_effort`: they read as zeros already, space is given back.
    Zero { transfer: TransferId, range: ByteRange, method: ZeroMethod, best_effort: bool },
    /// Checksums of a transfer's clusters.
    Digest { transfer: TransferId },
    /// A hole made zero on the target.
    ZeroRun { claim: Claim, method: ZeroMethod, since: Timestamp },
    /// A question about the source.
    SourceExtents,
    /// A question about the source's layers.
    SourceLayers,
    /// The same about `range` of a guest's transfer, under its claim.
    Coverage { transfer: TransferId, range: ByteRange },
    /// A question about the target, for a verification.
    TargetExtents,
    /// Space reserved ahead.
    Allocate,
    /// Space given back.
    GiveBack,
    /// A checkpoint's flush.
    Flush,
    /// A checkpoint's map.
    Publish,
    /// A write of a transfer's clusters to the fleece file, in slots from `slot` on. `rescue`: they are written to the target as well.
    Fleece { transfer: TransferId, clusters: ClusterRange, slot: u32, rescue: bool, piece: Piece },
    /// A read of a transfer's clusters from the fleece file.
    Drain { transfer: TransferId, clusters: ClusterRange, piece: Piece },
    /// A window of a read as of t0.
    Snapshot(Box<SnapshotRead>),
    /// Page cache dropped behind a buffered source.
    DropSourceCache,
    /// Page cache written back and dropped behind a buffered target.
    DropTargetCache,
    /// Page cache of a buffered target dropped before it is read back.
    DropBeforeVerify,
}

impl Task {
    /// The transfer of which it is a part.
    pub(super) fn transfer(&self) -> Option<TransferId> {
        match self {
            Self::Move { transfer, .. }
            | Self::Zero { transfer, .. }
            | Self::Digest { transfer }
            | Self::Coverage { transfer, .. }
            | Self::Fleece { transfer, .. }
            | Self::Drain { transfer, .. } => Some(*transfer),
            _ => None,
        }
    }
}

impl Copier {
    /// Queue `op`, which is for `task`.
    pub(super) fn push(&mut self, task: Task, op: Op) {
        let urgent = match &task {
            // A guest waits for it, whoever else is in no hurry with the transfer.
            Task::Fleece { .. } => true,
            Task::Snapshot(read) => read.held().is_some_and(|clusters| self.set.has_waiters(clusters)),
            task => {
                let transfer = task.transfer().and_then(|transfer| self.transfers.get(transfer));
                transfer.is_some_and(|transfer| transfer.urgent)
            }
        };
        self.queue.push(task, op, urgent);
    }
}
