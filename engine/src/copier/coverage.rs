//! What sync `top` covers, where a guest comes first.
//!
//! # Model
//! Covered is what was allocated in the source's top layer at t0. The sweep asks ahead of itself (`extents`). A guest that is about to change
//! clusters of which the sweep knows nothing yet has them claimed, and its copy begins with that question: what is not
//! allocated is done without a copy, the rest is read and written as ever. Answers come a few extents at a time, so it may take several
//! questions. One that fails counts as "allocated", which costs a needless copy at worst.
//!
//! # Ordering
//! The guest's own write allocates what it touches, so a question that is asked when the guest was let go finds everything
//! allocated, and the copy would hold the new contents. Therefore the claim is held from before the question until its answer
//! has been acted upon. What the sweep knows was asked after t0; where a cluster is still free when it is claimed, no guest has
//! changed it in between, and the answer is that of t0.
//!
//! A layer may allocate in larger units than the copy's clusters: then a guest's write also allocates neighbours, which are copied
//! though they need not be. Their contents are those of t0 all the same.

use nix::errno::Errno;

use super::piece::{Direction, Fault};
use super::transfer::{Category, TransferId};
use super::{Copier, Task};
use crate::error::Operation;
use crate::ring::{ExtentQuery, Op, Output};
use crate::units::{ByteRange, ClusterIndex, ClusterRange, Timestamp};

impl Copier {
    /// Whether `cluster` was found to be no part of the copy.
    pub(super) fn is_uncovered(&self, cluster: ClusterIndex) -> bool {
        self.uncovered.as_ref().is_some_and(|uncovered| uncovered.contains(cluster))
    }

    /// `clusters`, which are done, are no part of the copy: count them.
    pub(super) fn note_uncovered(&mut self, clusters: ClusterRange) {
        if let Some(uncovered) = &mut self.uncovered {
            uncovered.set(clusters);
        }
        self.tally.uncovered += self.plan.geometry.bytes_of(clusters).length;
        self.tally.settled_clusters += clusters.count();
    }

    /// The copy of a guest's transfer begins: with a question, unless the answer is known. That counts as one operation of the transfer,
    /// which was added before.
    pub(super) fn cover(&mut self, id: TransferId, now: Timestamp) {
        let bytes = self.transfers[id].bytes;
        let Some(layers) = &self.layers else {
            self.transfers[id].data = vec![bytes];
            return self.copy_covered(id, now);
        };
        if layers.knows(bytes) {
            let present: Vec<ByteRange> = layers.present_in(bytes).collect();
            present.into_iter().for_each(|present| self.note_covered(id, present));
            return self.copy_covered(id, now);
        }
        self.ask_coverage(id, bytes);
    }

    fn ask_coverage(&mut self, id: TransferId, range: ByteRange) {
        let (file, limit) = (self.plan.source.file, self.plan.limits.extents);
        let op = Op::Extents { file, range, query: ExtentQuery::TopLayer, limit };
        self.push(Task::Coverage { transfer: id, range }, op);
    }

    /// `present` is allocated, and with it the whole of each of its clusters is covered.
    fn note_covered(&mut self, id: TransferId, present: ByteRange) {
        let geometry = self.plan.geometry;
        let transfer = &mut self.transfers[id];
        let Some(present) = present.intersection(transfer.bytes) else { return };
        let whole = geometry.bytes_of(geometry.covering(present));
        match transfer.data.last_mut() {
            Some(last) if last.end() >= whole.offset => {
                *last = ByteRange::between(last.offset, last.end().max(whole.end()));
            }
            _ => transfer.data.push(whole),
        }
    }

    /// The answer to the question about `range` of a guest's transfer.
    pub(super) fn on_coverage(
        &mut self,
        id: TransferId,
        range: ByteRange,
        result: Result<Output, Errno>,
        now: Timestamp,
    ) {
        if self.ending.is_some() {
            return self.fail_task(id, range, Fault::Errno(Errno::ECANCELED), Operation::Read, now);
        }
        let mut known_to = range.offset;
        match result {
            Ok(Output::Extents(extents)) => {
                for extent in extents {
                    known_to = known_to.max(extent.range.end());
                    if extent.present {
                        self.note_covered(id, extent.range);
                    }
                }
            }
            Ok(other) => panic!("an extent query completes with extents, not {other:?}"),
            Err(errno) => tracing::debug!(%errno, %range, "allocation not known"),
        }
        if known_to > range.offset && known_to < range.end() {
            return self.ask_coverage(id, ByteRange::between(known_to, range.end()));
        }
        if known_to < range.end() {
            self.note_covered(id, range);
        }
        self.copy_covered(id, now);
    }

    /// What of a guest's transfer is covered is known: its `data`, as whole clusters. Read that; the rest is done.
    fn copy_covered(&mut self, id: TransferId, now: Timestamp) {
        let data = self.transfers[id].data.clone();
        let mut rest = self.transfers[id].clusters;
        for &range in &data {
            let covered = self.plan.geometry.covering(range);
            self.leave_uncovered(id, ClusterRange { start: rest.start, end: covered.start });
            rest.start = covered.end;
        }
        self.leave_uncovered(id, rest);
        // What goes to the fleece file is paid for when it is drained.
        if self.fleece.is_none() {
            self.throttle.spend_for_guest(data.iter().map(|range| range.length).sum(), now);
        }
        for range in data {
            let transfer = &mut self.transfers[id];
            transfer.outstanding += 1;
            let piece = transfer.piece(Direction::Read, range);
            let op = piece.op(&self.plan.source);
            self.push(Task::Move { transfer: id, piece }, op);
        }
        self.transfers[id].outstanding -= 1;
        self.finish_if_over(id, now);
    }

    fn leave_uncovered(&mut self, id: TransferId, clusters: ClusterRange) {
        if clusters.is_empty() {
            return;
        }
        tracing::trace!(?clusters, "not covered");
        for cluster in clusters.iter() {
            self.transfers[id].set_category(cluster, Category::Uncovered);
        }
        self.settle_in(id, &[clusters]);
    }
}
