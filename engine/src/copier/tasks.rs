//! Carrying transfers through: what a completion leads to.

use nix::errno::Errno;

use super::allocation::Reserved;
use super::checkpoint::Stage;
use super::faults::side_of;
use super::inspect::is_zero;
use super::piece::{Direction, Fault, Piece, Step};
use super::plan::planted;
use super::tally::Was;
use super::transfer::{Category, Expected, Failure, Purpose, TransferId};
use super::{Copier, Task, Zeroing};
use crate::error::Operation;
use crate::ring::{Arena, Completion, ExtentQuery, Op, Output, ZeroMethod};
use crate::units::{ByteRange, ClusterIndex, ClusterRange, Timestamp};

impl Copier {
    /// Take in a completion. `arena` is the ring's.
    ///
    /// # Panics
    /// If nothing is in flight under its token.
    pub fn on_completion(&mut self, completion: Completion, arena: &Arena, now: Timestamp) {
        let task = self.queue.complete(completion.token);
        let result = completion.result;
        match task {
            Task::Move { transfer, piece } => self.on_moved(transfer, piece, result, arena, now),
            Task::Zero { transfer, range, method, best_effort } => {
                let method = (!best_effort).then_some(method);
                self.on_zeroed(transfer, range, method, &result, now);
            }
            Task::Digest { transfer } => self.on_digests(transfer, result, now),
            Task::ZeroRun { claim, method, since } => {
                self.on_zero_run(claim, method, now.since(since), &result)
            }
            Task::SourceExtents => self.on_described(ExtentQuery::Data, result),
            Task::SourceLayers => self.on_described(ExtentQuery::TopLayer, result),
            Task::Coverage { transfer, range } => self.on_coverage(transfer, range, result, now),
            Task::TargetExtents => self.on_target_extents(result),
            Task::Allocate => self.on_reserved(&result, arena, now),
            Task::GiveBack => {
                if let Err(errno) = result {
                    tracing::debug!(%errno, "space not given back");
                }
                self.on_given_back(result == Err(Errno::EOPNOTSUPP));
            }
            Task::Flush => self.on_flushed(&result, now),
            Task::Publish => self.on_published(&result),
            Task::DropBeforeVerify | Task::DropTargetCache => self.on_written_back(&result, now),
            Task::Fleece { transfer, clusters, slot, rescue, piece } => {
                self.on_fleeced(transfer, clusters, slot, rescue, piece, result, now);
            }
            Task::Drain { transfer, clusters, piece } => {
                self.on_drained(transfer, clusters, piece, result, arena, now);
            }
            Task::Snapshot(read) => self.on_snapshot_read(*read, result, arena, now),
            Task::DropSourceCache => {
                if let Err(errno) = result {
                    tracing::debug!(%errno, "page cache not dropped");
                }
            }
        }
    }

    fn on_moved(
        &mut self,
        id: TransferId,
        mut piece: Piece,
        result: Result<Output, Errno>,
        arena: &Arena,
        now: Timestamp,
    ) {
        let verifying = matches!(self.transfers[id].purpose, Purpose::Verify(_));
        let operation = match (piece.direction(), verifying) {
            (Direction::Read, false) => Operation::Read,
            (Direction::Read, true) => Operation::Verify,
            (Direction::Write, _) => Operation::Write,
        };
        let side = if operation == Operation::Read { &self.plan.source } else { &self.plan.target };
        let short_write = operation == Operation::Write && matches!(result, Ok(Output::Bytes(_)));
        let mut step = piece.on_result(result, side);
        if planted!(self.plan, ShortWriteIsWhole) && short_write {
            step = Step::Finished;
        }
        match step {
            Step::Again if self.goes_on(id) => {
                let op = piece.op(side);
                self.push(Task::Move { transfer: id, piece }, op);
            }
            Step::Again => self.fail_task(id, piece.range(), Fault::Errno(Errno::ECANCELED), operation, now),
            Step::Finished => match operation {
                Operation::Read => self.on_read(id, arena, now),
                Operation::Verify => self.on_read_back(id, arena, now),
                _ if planted!(self.plan, DoneBeforeWrite) => {
                    self.transfers[id].written += piece.range().length;
                    self.transfers[id].outstanding -= 1;
                    self.finish_if_over(id, now);
                }
                _ => {
                    self.transfers[id].written += piece.range().length;
                    self.task_done(id, self.plan.geometry.covering(piece.range()), now);
                }
            },
            Step::Failed(fault) => {
                if planted!(self.plan, FailedWriteIsDone) && operation == Operation::Write {
                    return self.task_done(id, self.plan.geometry.covering(piece.range()), now);
                }
                tracing::debug!(range = %piece.range(), ?fault, operation = operation.verb(), "failed");
                self.fail_task(id, piece.range(), fault, operation, now);
            }
        }
    }

    /// A task over `range` of a transfer has failed.
    pub(super) fn fail_task(
        &mut self,
        id: TransferId,
        range: ByteRange,
        fault: Fault,
        operation: Operation,
        now: Timestamp,
    ) {
        let transfer = &mut self.transfers[id];
        let clusters = match operation {
            Operation::Read | Operation::Verify => transfer.clusters,
            _ => self.plan.geometry.covering(range),
        };
        transfer.task_failed(clusters, Failure { fault, operation, range });
        transfer.outstanding -= 1;
        if operation != Operation::Read {
            self.skipped.may_be_written(clusters);
        }
        self.finish_if_over(id, now);
    }

    /// A task of a transfer that is tainted is not carried on: its clusters are copied again, each alone and as a whole.
    fn drop_task(&mut self, id: TransferId, now: Timestamp) {
        assert!(self.transfers[id].tainted, "what is dropped is copied again");
        self.transfers[id].outstanding -= 1;
        self.finish_if_over(id, now);
    }

    /// A task over `clusters` of a transfer has succeeded: settle the clusters that have none left.
    pub(super) fn task_done(&mut self, id: TransferId, clusters: ClusterRange, now: Timestamp) {
        let transfer = &mut self.transfers[id];
        transfer.outstanding -= 1;
        let ranges = transfer.task_done(clusters);
        self.settle_in(id, &ranges);
        self.finish_if_over(id, now);
    }

    /// The data of a copy is there: find zeros, start the checksum and the writes.
    fn on_read(&mut self, id: TransferId, arena: &Arena, now: Timestamp) {
        if self.ending.is_some() {
            let range = self.transfers[id].bytes;
            return self.fail_task(id, range, Fault::Errno(Errno::ECANCELED), Operation::Read, now);
        }
        if self.transfers[id].tainted {
            // It would not count. And what it read may be too little: what lies between the data is in the arena's slot as it was before.
            return self.drop_task(id, now);
        }
        let transfer = &mut self.transfers[id];
        if transfer.outstanding > 1 || transfer.failure.is_some() {
            // One of several reads; the last one goes on, if all went well.
            transfer.outstanding -= 1;
            return self.finish_if_over(id, now);
        }
        if self.allocation.holds(self.transfers[id].bytes) {
            self.held.push(id);
            return;
        }
        self.write_out(id, arena, now);
    }

    /// Start the writes of a transfer that was read. Its read still counts as outstanding.
    pub(super) fn write_out(&mut self, id: TransferId, arena: &Arena, now: Timestamp) {
        let all = self.transfers[id].clusters;
        for cluster in all.iter() {
            if self.transfers[id].work(cluster).is_settled() {
                continue;
            }
            if self.is_zero_cluster(id, cluster, arena) {
                self.transfers[id].set_category(cluster, Category::Zeros);
                self.allocation.on_zeros();
            } else {
                self.allocation.on_data(self.plan.geometry.cluster_size().bytes());
            }
        }
        if self.plan.verify {
            let buffer = self.transfers[id].buffer_of(self.transfers[id].bytes);
            let chunk = u32::try_from(self.plan.geometry.cluster_size().bytes()).expect("at most 4 MiB");
            self.transfers[id].add_task(all);
            self.transfers[id].outstanding += 1;
            self.push(Task::Digest { transfer: id }, Op::Digest { buffer, chunk });
        }
        let mut start = all.start;
        while start < all.end {
            let category = self.transfers[id].work(start).category;
            let mut end = ClusterIndex(start.0 + 1);
            while end < all.end && self.transfers[id].work(end).category == category {
                end.0 += 1;
            }
            let clusters = ClusterRange { start, end };
            match category {
                Category::Uncovered => {}
                Category::Zeros => self.zero_out(id, clusters),
                _ if self.is_fleeced(id) => self.write_fleece(id, clusters, now),
                _ => self.write_data(id, clusters),
            }
            start = end;
        }
        let transfer = &mut self.transfers[id];
        transfer.is_written_out = true;
        self.rescue_waited(id);
        let transfer = &mut self.transfers[id];
        transfer.outstanding -= 1;
        let ranges = transfer.settleable(all);
        self.settle_in(id, &ranges);
        self.finish_if_over(id, now);
    }

    /// Whether clusters of zeros of this transfer must be made zero on the target: always where it does not read as zeros, and for a
    /// cluster that was tried before, of which anything may be there.
    fn needs_zeros(&self, id: TransferId) -> bool {
        let tried =
            matches!(self.transfers[id].purpose, Purpose::Copy { alone: Some(_) } | Purpose::Drain { .. });
        !self.blank_is_zero || tried
    }

    fn is_zero_cluster(&self, id: TransferId, cluster: ClusterIndex, arena: &Arena) -> bool {
        let bytes = self.plan.geometry.bytes_of(super::one(cluster));
        let needs_zeros = self.needs_zeros(id);
        // Where zeros are needed an odd end goes as data: operations work on whole blocks.
        let odd_end = needs_zeros && !bytes.end().is_multiple_of(4096);
        // So do those of a guest that does not wait for the target: they are told from data when they are drained.
        let failed = || self.zero_runs.goes_as_data(cluster, cluster).0;
        let as_data = needs_zeros && (self.zeroing == Zeroing::Data || self.is_fleeced(id) || failed());
        if !self.plan.zero_detect || odd_end || as_data {
            return false;
        }
        let transfer = &self.transfers[id];
        transfer
            .data
            .iter()
            .filter_map(|range| range.intersection(bytes))
            .all(|range| is_zero(arena.slice(transfer.buffer_of(range))))
    }

    pub(super) fn write_data(&mut self, id: TransferId, clusters: ClusterRange) {
        let bytes = self.plan.geometry.bytes_of(clusters);
        let ranges: Vec<ByteRange> =
            self.transfers[id].data.iter().filter_map(|range| range.intersection(bytes)).collect();
        for range in ranges {
            let transfer = &mut self.transfers[id];
            let piece = transfer.piece(Direction::Write, range);
            if !planted!(self.plan, DoneBeforeWrite) {
                transfer.add_task(self.plan.geometry.covering(range));
            }
            transfer.outstanding += 1;
            let op = piece.op(&self.plan.target);
            tracing::trace!(%range, "write");
            self.push(Task::Move { transfer: id, piece }, op);
        }
    }

    fn zero_out(&mut self, id: TransferId, clusters: ClusterRange) {
        let range = self.plan.geometry.bytes_of(clusters);
        let best_effort = !self.needs_zeros(id);
        if best_effort && !self.allocation.covers(range) {
            return;
        }
        let Zeroing::Operation(method) = self.zeroing else {
            assert!(best_effort, "zeros go as data then");
            return;
        };
        let transfer = &mut self.transfers[id];
        transfer.add_task(clusters);
        transfer.outstanding += 1;
        let op = Op::WriteZeroes { file: self.plan.target.file, range, method };
        self.push(Task::Zero { transfer: id, range, method, best_effort }, op);
    }

    fn on_zeroed(
        &mut self,
        id: TransferId,
        range: ByteRange,
        needed: Option<ZeroMethod>,
        result: &Result<Output, Errno>,
        now: Timestamp,
    ) {
        match (result, needed) {
            (Err(errno), Some(method)) => {
                self.zeroing_failed(method, *errno);
                let transfer = &self.transfers[id];
                if transfer.tainted {
                    return self.drop_task(id, now);
                }
                // The buffer holds nothing but zeros: write them as data.
                assert!(transfer.reads_whole(range), "zeros are needed where everything was read");
                let piece = transfer.piece(Direction::Write, range);
                let op = piece.op(&self.plan.target);
                self.push(Task::Move { transfer: id, piece }, op);
            }
            (result, _) => {
                match result {
                    Ok(_) => self.zeroing_failures = 0,
                    Err(errno) => tracing::debug!(%errno, %range, "space of zeros not given back"),
                }
                self.task_done(id, self.plan.geometry.covering(range), now);
            }
        }
    }

    /// A zero operation failed that was done by `method`. Where there is no such operation, or it fails again and again, the next way is
    /// tried from now on.
    pub(super) fn zeroing_failed(&mut self, method: ZeroMethod, errno: Errno) {
        if self.zeroing != Zeroing::Operation(method) {
            // Another failure has led further meanwhile, and this one tells nothing of the way that is taken now.
            return;
        }
        self.zeroing_failures += 1;
        let never = matches!(errno, Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS | Errno::ENOTTY);
        let hopeless = never || self.zeroing_failures >= self.plan.limits.zeroing_failures;
        if hopeless {
            self.zeroing_failures = 0;
            self.zeroing = match (method, errno) {
                (ZeroMethod::Unmap, Errno::EOPNOTSUPP) => Zeroing::Operation(ZeroMethod::Keep),
                _ => Zeroing::Data,
            };
        }
        tracing::debug!(%errno, ?method, next = ?self.zeroing, "zero operation failed");
    }

    /// Have the sweep pass `cluster` again.
    pub(super) fn rewind_to(&mut self, cluster: ClusterIndex) {
        if cluster < self.position {
            self.position = cluster;
            let offset = self.plan.geometry.offset_of(cluster);
            self.dropped_to = self.dropped_to.min(offset);
            self.holes.seek(offset);
            if let Some(layers) = &mut self.layers {
                layers.seek(offset);
            }
        }
    }

    fn on_digests(&mut self, id: TransferId, result: Result<Output, Errno>, now: Timestamp) {
        match result {
            Ok(Output::Digests(digests)) => {
                let clusters = self.transfers[id].clusters;
                assert_eq!(digests.len() as u64, clusters.count(), "one checksum a cluster");
                self.transfers[id].digests = digests;
                if matches!(self.transfers[id].purpose, Purpose::Verify(_)) {
                    self.compare(id, None, now);
                } else {
                    self.task_done(id, clusters, now);
                }
            }
            Ok(other) => panic!("a checksum completes with checksums, not {other:?}"),
            Err(errno) => {
                let range = self.transfers[id].bytes;
                self.fail_task(id, range, Fault::Errno(errno), Operation::Verify, now);
            }
        }
    }

    /// What was read back is there: compare zeros now, contents once their checksums are.
    fn on_read_back(&mut self, id: TransferId, arena: &Arena, now: Timestamp) {
        let transfer = &self.transfers[id];
        let Purpose::Verify(expected) = &transfer.purpose else { unreachable!("a verification") };
        let zeros = |expected: &Expected| matches!(expected, Expected::Zeros(_));
        if expected.iter().any(zeros) {
            assert!(expected.iter().all(zeros), "runs of zeros are not mixed");
            return self.compare(id, Some(arena), now);
        }
        let buffer = transfer.buffer_of(transfer.bytes);
        let chunk = u32::try_from(self.plan.geometry.cluster_size().bytes()).expect("at most 4 MiB");
        self.push(Task::Digest { transfer: id }, Op::Digest { buffer, chunk });
    }

    fn compare(&mut self, id: TransferId, arena: Option<&Arena>, now: Timestamp) {
        let transfer = &self.transfers[id];
        let Purpose::Verify(expected) = &transfer.purpose else { unreachable!("a verification") };
        let mut wrong = Vec::new();
        for (index, cluster) in transfer.clusters.iter().enumerate() {
            let bytes = self.plan.geometry.bytes_of(super::one(cluster));
            let equal = match expected[index] {
                Expected::Digest { digest, .. } => transfer.digests[index] == digest,
                Expected::Zeros(_) => {
                    arena.is_some_and(|arena| is_zero(arena.slice(transfer.buffer_of(bytes))))
                }
            };
            if !equal && !planted!(self.plan, VerifyBelieves) {
                wrong.push((cluster, bytes));
            }
        }
        let transfer = &mut self.transfers[id];
        for &(cluster, range) in &wrong {
            let failure = Failure { fault: Fault::Mismatch, operation: Operation::Verify, range };
            transfer.task_failed(super::one(cluster), failure);
        }
        transfer.outstanding -= 1;
        let ranges = transfer.settleable(transfer.clusters);
        for &range in &ranges {
            let claim = self.transfers[id].settle(range);
            assert!(claim.is_none(), "a verification holds no claim");
            self.verified += self.plan.geometry.bytes_of(range).length;
        }
        self.finish_if_over(id, now);
    }

    fn on_target_extents(&mut self, result: Result<Output, Errno>) {
        let extents = match result {
            Ok(Output::Extents(extents)) => Some(extents),
            Ok(other) => panic!("an extent query completes with extents, not {other:?}"),
            Err(_) => None,
        };
        if let Stage::Verifying(verification) = &mut self.checkpoints.stage {
            self.verified += verification.on_answer(extents);
        }
    }

    fn on_reserved(&mut self, result: &Result<Output, Errno>, arena: &Arena, now: Timestamp) {
        let reserved = match result {
            Ok(_) => Reserved::Whole,
            Err(Errno::EOPNOTSUPP) => Reserved::Nothing,
            Err(_) => Reserved::InPart,
        };
        if let Err(errno) = result {
            tracing::debug!(%errno, "space not reserved ahead; going on without");
        }
        self.allocation.end(reserved);
        for id in std::mem::take(&mut self.held) {
            self.on_read(id, arena, now);
        }
    }

    /// `ranges` of a transfer have no task left: complete their claims and count them.
    pub(super) fn settle_in(&mut self, id: TransferId, ranges: &[ClusterRange]) {
        for &range in ranges {
            let transfer = &mut self.transfers[id];
            let held = transfer.work(range.start).is_early()
                || matches!(transfer.purpose, Purpose::Drain { .. })
                || planted!(self.plan, AllocationAskedLate);
            match transfer.settle(range) {
                Some(claim) => self.set.complete(claim),
                None => assert!(held, "a copy holds its claim until it is settled"),
            }
            for cluster in range.iter() {
                self.settle_cluster(id, cluster);
            }
        }
    }

    fn settle_cluster(&mut self, id: TransferId, cluster: ClusterIndex) {
        let transfer = &self.transfers[id];
        let bytes = self.plan.geometry.bytes_of(super::one(cluster));
        self.second_chances.remove(&cluster);
        match transfer.work(cluster).category {
            Category::Fleeced { slot } => return self.hold(cluster, slot),
            Category::Uncovered => return self.note_uncovered(super::one(cluster)),
            Category::Data | Category::Zeros => {}
        }
        if transfer.work(cluster).category == Category::Zeros {
            self.note_zeros(super::one(cluster), Was::Zeros);
        } else {
            let written = transfer.data.iter().filter_map(|range| range.intersection(bytes));
            let written =
                u32::try_from(written.map(|range| range.length).sum::<u64>()).expect("at most 4 MiB");
            if self.plan.verify {
                let index =
                    usize::try_from(cluster.0 - transfer.clusters.start.0).expect("bounded by the slots");
                self.window.note_data(cluster, transfer.digests[index], written);
            }
            self.tally.settle(Was::Data { written }, 1, bytes.length);
            self.keep_space(super::one(cluster));
        }
        self.skipped.done(super::one(cluster));
        self.checkpoints.on_settled(bytes.length);
        if let Some(fleece) = &mut self.fleece {
            fleece.written(cluster);
        }
    }

    /// Count `clusters`, which read as zeros, as done.
    pub(super) fn note_zeros(&mut self, clusters: ClusterRange, was: Was) {
        if self.plan.verify {
            self.window.note_zeros(clusters, was);
        }
        self.tally.settle(was, clusters.count(), self.plan.geometry.bytes_of(clusters).length);
    }

    /// Once nothing of a transfer is under way, take it apart.
    pub(super) fn finish_if_over(&mut self, id: TransferId, now: Timestamp) {
        if self.transfers[id].outstanding > 0 {
            return;
        }
        let transfer = self.transfers.remove(id);
        self.written += transfer.written;
        let failure = transfer.failure;
        let tainted = transfer.tainted;
        let clusters = transfer.clusters;
        let (guest, aside) = (transfer.guest, transfer.aside);
        let drains = matches!(transfer.purpose, Purpose::Drain { .. });
        let (held, unsettled): (Vec<ClusterIndex>, Vec<ClusterIndex>) =
            transfer.unsettled().partition(|&cluster| drains || transfer.work(cluster).is_early());
        let unverified = transfer.unverified();
        let alone = match &transfer.purpose {
            Purpose::Copy { alone } | Purpose::Drain { alone } => Some(*alone),
            Purpose::Verify(_) => None,
        };
        let all_settled = unsettled.is_empty() && held.is_empty();
        assert!(failure.is_some() || tainted || all_settled, "a transfer settles what did not fail");
        let (claims, run) = transfer.into_claims();
        if aside {
            self.aside_slots -= run.count();
        } else if guest.is_none() {
            self.sweep_slots -= run.count();
        }
        self.slots.give_back(&run);
        for claim in claims {
            self.set.release(claim);
        }
        self.drain_ended(&held, clusters, alone.flatten(), failure, now);
        match alone {
            Some(alone) if guest.is_some() => {
                let id = guest.expect("it was made for a guest");
                self.guest_copy_ended(id, &unsettled, clusters, alone, failure, now);
            }
            Some(alone) => self.copy_failed(&unsettled, clusters, alone, failure, tainted, now),
            None => self.verification_ended(unverified, failure),
        }
    }

    /// How messages name the side on which `operation` failed.
    pub(super) fn path_of(&self, operation: Operation) -> String {
        let side = side_of(operation);
        if let (Operation::ReadFleece, Some(fleece)) = (operation, &self.fleece) {
            return fleece.side.name.to_string();
        }
        if side == super::faults::SideName::Source { &self.plan.source.name } else { &self.plan.target.name }
            .to_string()
    }
}
