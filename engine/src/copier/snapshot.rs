//! Reading the disk as it was at t0 while the job runs.
//!
//! # Model
//! A read goes window by window. What is copied already is read from the target, which nobody changes any more, or from the fleece file while
//! it is there alone; what is not is read from the source under a claim, which keeps guests from changing it meanwhile and is released afterwards, for it is not a copy. What
//! somebody else is copying is waited for. Clusters that were left out of the copy are an error: their old contents may be gone. So are those that
//! sync `top` does not cover, once that is known: guests change them as they like, and the target does not hold them.
//!
//! # Ordering
//! Reads come after guests and before the sweep. They never take the slots that are kept for guests.
//!
//! The sweep passes by what is being read, and there may always be one who reads it. So a reader who has held clusters that the sweep has
//! passed by does not give them back: their copy is made at once, under his claim, in his slots, and of the bytes that he has read. Thus each is
//! passed by once, and the sweep never goes back for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crossbeam::queue::SegQueue;
use nix::errno::Errno;

use super::plan::Side;
use super::slots::SlotRun;
use super::transfer::{Purpose, Transfer};
use super::{Copier, Task, one};
use crate::error::{Error, ErrorKind, Operation};
use crate::interval_set::{Cancellation, Claim, ClusterState, Registration, Ticket, Waiter};
use crate::piece::{Direction, Fault, Piece, Step};
use crate::ring::{Arena, Output};
use crate::units::{ByteRange, ClusterCount, ClusterIndex, ClusterRange, Timestamp};

/// Names a read among those of one copier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId(pub u64);

/// The bytes, or why they cannot be had.
pub type SnapshotOutcome = Result<Vec<u8>, Error>;

/// Where a window is read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Source,
    Target,
    /// From this slot on.
    Fleece(u32),
}

/// A window that is being read, and what it holds.
#[derive(Debug)]
pub(super) struct SnapshotRead {
    id: SnapshotId,
    from: From,
    clusters: ClusterRange,
    /// Of the source, of the target, or of the fleece file.
    piece: Piece,
    /// Where the window's bytes are in the arena.
    buffer: u32,
    slots: SlotRun,
    claim: Option<Claim>,
}

impl SnapshotRead {
    /// What guests cannot change until it is over.
    pub(super) fn held(&self) -> Option<ClusterRange> {
        self.claim.as_ref().map(Claim::range)
    }

    /// The claim, whatever is under way: the copier is going away.
    pub(super) fn abandon(self) -> Option<Claim> {
        self.claim
    }
}

#[derive(Debug)]
struct Request {
    range: ByteRange,
    /// Filled so far.
    bytes: Vec<u8>,
    running: bool,
    waits: Option<Ticket>,
}

/// The reads of one copier. See the module's header.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    requests: BTreeMap<SnapshotId, Request>,
    ready: BTreeSet<SnapshotId>,
    woken: Arc<SegQueue<SnapshotId>>,
    outcomes: Vec<(SnapshotId, SnapshotOutcome)>,
    /// Clusters whose retry was due while they were being read, with their failed retries.
    missed: BTreeMap<ClusterIndex, u32>,
    /// Windows in flight.
    pub(super) running: u32,
}

impl Copier {
    /// Read `range` as it was at t0. Answered through [`Self::take_snapshot_outcomes`].
    ///
    /// # Panics
    /// If `id` is in use.
    pub fn read_snapshot(&mut self, id: SnapshotId, range: ByteRange) {
        if range.checked_end().is_none_or(|end| end > self.plan.geometry.length().0) {
            let error = self.snapshot_error(range, "it lies beyond the end of the disk", Errno::EINVAL);
            return self.snapshots.outcomes.push((id, Err(error)));
        }
        let mut bytes = Vec::new();
        // As a whole, at once: growing, it would be copied again and again.
        if usize::try_from(range.length).map_or(true, |length| bytes.try_reserve_exact(length).is_err()) {
            let error = self.snapshot_error(range, "there is no memory for it", Errno::ENOMEM);
            return self.snapshots.outcomes.push((id, Err(error)));
        }
        let request = Request { range, bytes, running: false, waits: None };
        let before = self.snapshots.requests.insert(id, request);
        assert!(before.is_none(), "{id:?} is in use");
        self.snapshots.ready.insert(id);
    }

    /// What became of reads since the last call.
    pub fn take_snapshot_outcomes(&mut self) -> Vec<(SnapshotId, SnapshotOutcome)> {
        std::mem::take(&mut self.snapshots.outcomes)
    }

    fn snapshot_error(&self, range: ByteRange, reason: &'static str, errno: Errno) -> Error {
        let path = self.plan.source.name.to_string();
        Error::new(ErrorKind::Io(errno), Operation::ReadSnapshot, path, reason).at(range)
    }

    /// Let the reads go on.
    pub(super) fn serve_snapshots(&mut self) {
        while let Some(id) = self.snapshots.woken.pop() {
            if let Some(request) = self.snapshots.requests.get_mut(&id) {
                request.waits = None;
                self.snapshots.ready.insert(id);
            }
        }
        if self.ending.is_some() {
            return self.end_snapshots();
        }
        while let Some(&id) = self.snapshots.ready.first() {
            if !self.serve_snapshot(id) {
                break;
            }
        }
    }

    /// The job is ending: guests do not wait for it any more, so what is not on the target is not as of t0.
    fn end_snapshots(&mut self) {
        let ids: Vec<SnapshotId> = self.snapshots.requests.keys().copied().collect();
        for id in ids {
            let range = self.snapshots.requests[&id].range;
            let error =
                self.snapshot_error(range, "the job has ended, and with it the snapshot", Errno::ESTALE);
            self.answer_snapshot(id, Err(error));
        }
    }

    fn answer_snapshot(&mut self, id: SnapshotId, outcome: SnapshotOutcome) {
        self.snapshots.ready.remove(&id);
        let Some(request) = self.snapshots.requests.remove(&id) else { return };
        if let Some(ticket) = request.waits {
            // Woken already or not: nobody looks for it any more.
            let (Cancellation::Removed | Cancellation::AlreadyWoken) = self.set.cancel(ticket);
        }
        self.snapshots.outcomes.push((id, outcome));
    }

    /// Start the next window of a read. `false`: there is no slot.
    fn serve_snapshot(&mut self, id: SnapshotId) -> bool {
        let request = self.snapshots.requests.get_mut(&id).expect("it is ready");
        let rest = ByteRange::between(request.range.offset + request.bytes.len() as u64, request.range.end());
        if rest.is_empty() {
            let bytes = std::mem::take(&mut request.bytes);
            self.answer_snapshot(id, Ok(bytes));
            return true;
        }
        let clusters = self.plan.geometry.covering(rest);
        let first = clusters.start;
        if let Some(error) = self.skipped.error_of(first) {
            let reason = format!(
                "it was left out of the copy, and a guest may have changed it since: {}",
                error.reason()
            );
            let range = self.plan.geometry.bytes_of(one(first));
            let path = self.plan.source.name.to_string();
            let error =
                Error::new(ErrorKind::Io(Errno::EIO), Operation::ReadSnapshot, path, reason).at(range);
            self.answer_snapshot(id, Err(error));
            return true;
        }
        if self.is_uncovered(first) {
            let reason = "the top layer did not hold it, so it is no part of the copy";
            let range = self.plan.geometry.bytes_of(one(first));
            let error = self.snapshot_error(range, reason, Errno::ENODATA);
            self.answer_snapshot(id, Err(error.advise("read it from the layers below, which do not change")));
            return true;
        }
        match self.set.state(first) {
            ClusterState::Copying | ClusterState::CopyingWithWaiters => {
                self.wait_for_snapshot(id, first);
                true
            }
            state => self.start_window(id, clusters, rest, state == ClusterState::Done),
        }
    }

    fn wait_for_snapshot(&mut self, id: SnapshotId, cluster: ClusterIndex) {
        let woken = Arc::clone(&self.snapshots.woken);
        match self.set.wait_for(cluster, Waiter::callback(move || woken.push(id))) {
            Registration::Registered { ticket, .. } => {
                self.snapshots.ready.remove(&id);
                self.snapshots.requests.get_mut(&id).expect("it is there").waits = Some(ticket);
            }
            // Looked at again at once.
            Registration::AlreadyReleased(_) | Registration::Closed(_) => {}
        }
    }

    fn start_window(&mut self, id: SnapshotId, clusters: ClusterRange, rest: ByteRange, done: bool) -> bool {
        let reserved = self.plan.live.map_or(0, |live| live.reserved_slots);
        let room = self.slots.free_count().saturating_sub(reserved);
        let max = u64::from(self.plan.max_run.min(room)).min(clusters.count());
        let (slot, free) = match u32::try_from(max).expect("bounded by max_run") {
            0 => return false,
            max => self.slots.longest_run(max),
        };
        if free == 0 {
            return false;
        }
        let end = ClusterIndex(clusters.start.0 + u64::from(free));
        // What was left out is nobody's to claim but a guest's.
        let left_out = self.skipped.next_from(clusters.start).map_or(end, |range| range.start);
        let wanted = ClusterRange { start: clusters.start, end: end.min(left_out) };
        let held = self.fleece.as_ref().and_then(|fleece| fleece.first_run(wanted));
        let (run, claim) = if let Some((_, count)) = held {
            (ClusterRange::new(wanted.start.0, wanted.start.0 + count), None)
        } else if done {
            (self.on_target(wanted), None)
        } else {
            let Some(claim) = self.set.claim_first(wanted, ClusterCount(wanted.count())) else {
                return true;
            };
            (claim.range(), Some(claim))
        };
        assert_eq!(run.start, clusters.start, "the ring thread alone claims");
        let slots = self.slots.take(slot, u32::try_from(run.count()).expect("bounded by the slots"));
        let from = match held {
            Some((slot, _)) => From::Fleece(slot),
            None if done => From::Target,
            None => From::Source,
        };
        let window = self.plan.geometry.bytes_of(run);
        let cluster_bytes = u32::try_from(self.plan.geometry.cluster_size().bytes()).expect("at most 4 MiB");
        let buffer = slots.buffer(cluster_bytes).start;
        // Whole clusters, so that offsets and lengths suit direct I/O.
        let piece = Piece::new(Direction::Read, self.place_of(from, window), buffer);
        debug_assert!(window.offset <= rest.offset);
        self.snapshots.ready.remove(&id);
        self.snapshots.requests.get_mut(&id).expect("it is there").running = true;
        self.snapshots.running += 1;
        self.push_snapshot(SnapshotRead { id, from, clusters: run, piece, buffer, slots, claim });
        true
    }

    /// How many of the first of `clusters` are to be read from the target.
    fn on_target(&self, clusters: ClusterRange) -> ClusterRange {
        let same = clusters.iter().take_while(|&cluster| {
            let held = self.fleece.as_ref().and_then(|fleece| fleece.slot_of(cluster));
            self.set.state(cluster) == ClusterState::Done && held.is_none() && !self.is_uncovered(cluster)
        });
        ClusterRange::new(clusters.start.0, clusters.start.0 + same.count() as u64)
    }

    fn side_of_read(&self, from: From) -> &Side {
        match from {
            From::Source => &self.plan.source,
            From::Target => &self.plan.target,
            From::Fleece(_) => &self.fleece.as_ref().expect("it holds something").side,
        }
    }

    /// Where the bytes `window` of the disk are to be read.
    fn place_of(&self, from: From, window: ByteRange) -> ByteRange {
        match from {
            From::Source | From::Target => window,
            From::Fleece(slot) => {
                self.fleece.as_ref().expect("it holds something").place(slot, window.length)
            }
        }
    }

    fn push_snapshot(&mut self, read: SnapshotRead) {
        let op = read.piece.op(self.side_of_read(read.from));
        self.push(Task::Snapshot(Box::new(read)), op);
    }

    pub(super) fn on_snapshot_read(
        &mut self,
        mut read: SnapshotRead,
        result: Result<Output, Errno>,
        arena: &Arena,
        now: Timestamp,
    ) {
        let side = self.side_of_read(read.from).clone();
        let fault = match read.piece.on_result(result, &side) {
            Step::Again if self.ending.is_none() => return self.push_snapshot(read),
            Step::Again => Some(Fault::Errno(Errno::ECANCELED)),
            Step::Finished => None,
            Step::Failed(fault) => Some(fault),
        };
        let SnapshotRead { id, from, clusters, piece: _, buffer, slots, claim } = read;
        let window = self.plan.geometry.bytes_of(clusters);
        let valid = match from {
            From::Target => true,
            // The guest cannot have changed it before this: it was claimed.
            From::Source => self.ending.is_none(),
            From::Fleece(slot) => {
                self.fleece.as_ref().is_some_and(|fleece| fleece.still_holds(clusters, slot))
            }
        };
        if let Some(request) = self.snapshots.requests.get_mut(&id) {
            request.running = false;
            match fault {
                None if valid => {
                    let start = request.range.offset + request.bytes.len() as u64;
                    let part = ByteRange::between(start, window.end().min(request.range.end()));
                    let skip = u32::try_from(start - window.offset).expect("within the window");
                    let length = u32::try_from(part.length).expect("within the window");
                    let at = crate::ring::BufferRange { start: buffer + skip, length };
                    request.bytes.extend_from_slice(arena.slice(at));
                    self.snapshots.ready.insert(id);
                }
                // Once more, from where it is now.
                _ if !valid => {
                    self.snapshots.ready.insert(id);
                }
                None => unreachable!("it is valid"),
                Some(fault) => {
                    let errno =
                        if let Fault::Errno(errno) | Fault::Lost(errno) = fault { errno } else { Errno::EIO };
                    let error =
                        Error::io(Operation::ReadSnapshot, side.name.to_string(), Some(window), errno);
                    self.answer_snapshot(id, Err(error));
                }
            }
        }
        self.snapshots.running -= 1;
        match claim {
            Some(claim) => self.end_claim(claim, slots, fault.is_none(), arena, now),
            None => self.slots.give_back(&slots),
        }
    }

    /// The retry of `cluster`, which somebody has claimed, was due. If it is a guest, his copy takes its place.
    pub(super) fn miss(&mut self, cluster: ClusterIndex, attempts: u32) {
        if !self.set.is_done(one(cluster)) && self.transfer_of(cluster).is_none() {
            self.snapshots.missed.insert(cluster, attempts);
        }
    }

    /// A reader needs `claim` no more: give it back, or, if the sweep has passed it by meanwhile, have the sweep's copy made. `is_read`: the
    /// bytes are in `slots`.
    fn end_claim(&mut self, claim: Claim, slots: SlotRun, is_read: bool, arena: &Arena, now: Timestamp) {
        let clusters = claim.range();
        let mut missed: Option<u32> = None;
        while let Some((&cluster, &attempts)) =
            self.snapshots.missed.range(clusters.start..clusters.end).next()
        {
            self.snapshots.missed.remove(&cluster);
            missed = missed.max(Some(attempts));
        }
        if self.ending.is_some() || self.paused() || clusters.start >= self.position {
            self.set.release(claim);
            self.rewind_to(clusters.start);
            return self.slots.give_back(&slots);
        }
        if self.retries.waits(clusters) {
            // What waits for its retry is copied when that is due, and so is the rest.
            self.set.release(claim);
            self.slots.give_back(&slots);
            let others = clusters.iter().filter(|&cluster| !self.retries.waits(one(cluster)));
            for cluster in others.collect::<Vec<_>>() {
                self.retries.add(cluster, missed.unwrap_or(0), now);
            }
            return;
        }
        tracing::trace!(?clusters, "copied for the sweep");
        self.aside_slots += slots.count();
        let purpose = Purpose::Copy { alone: missed };
        let mut transfer = Transfer::new(purpose, clusters, self.plan.geometry, slots).with_claim(claim);
        transfer.aside = true;
        // Guests may be among those who wait.
        transfer.urgent = self.set.has_waiters(clusters);
        transfer.outstanding += 1;
        let whole = transfer.bytes;
        let id = self.transfers.insert(transfer);
        if !is_read || self.layers.is_some() {
            // It is read again, for what cannot be read is the sweep's failure; and it is asked first whether it is covered.
            return self.cover(id, now);
        }
        self.transfers[id].data = vec![whole];
        self.throttle.spend_for_guest(whole.length, now);
        self.write_out(id, arena, now);
    }
}
