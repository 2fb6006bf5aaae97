//! The bytes of the fleece file on their way: guests' copies into it, and what is held out of it to the target.

use std::sync::Arc;

use nix::errno::Errno;

use super::{Fleece, FleecePlan, State};
use crate::copier::plan::planted;
use crate::copier::retry::{Verdict, is_retry, verdict};
use crate::copier::transfer::{Category, Failure, Purpose, Transfer, TransferId};
use crate::copier::{Copier, Ending, Event, Task, one};
use crate::error::{Error, ErrorKind, Operation};
use crate::interval_set::ClusterState;
use crate::modes::SyncMode;
use crate::piece::{Direction, Fault, Piece, Step};
use crate::ring::{Arena, Output};
use crate::units::{ClusterIndex, ClusterRange, Length, Timestamp};

/// What became of an attempt to drain something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::copier) enum Drained {
    /// There is nothing to drain.
    Nothing,
    /// Something is on its way.
    Started,
    /// There is something, and no room for it now.
    NoRoom,
}

impl Copier {
    /// With a fleece file for what guests are about to change.
    ///
    /// # Panics
    /// If the plan is not for a live disk, or the fleece file has no slots or more than [`super::MAX_SLOTS`].
    #[must_use]
    pub fn with_fleece(mut self, fleece: FleecePlan) -> Self {
        assert!(self.plan.live.is_some(), "guests write to live disks only");
        let freed_early = planted!(self.plan, FleeceFreedBeforeFlush);
        self.fleece = Some(Fleece::new(fleece, self.plan.geometry.cluster_size().bytes(), freed_early));
        self
    }

    /// Bytes of the fleece file that hold old contents which are not on the target yet.
    #[must_use]
    pub fn fleeced_bytes(&self) -> u64 {
        let clusters = self.fleece.as_ref().map_or(0, Fleece::undrained) as u64;
        clusters * self.plan.geometry.cluster_size().bytes()
    }

    /// Whether the data of transfer `id` goes to the fleece file.
    pub(in crate::copier) fn is_fleeced(&self, id: TransferId) -> bool {
        self.fleece.is_some() && self.transfers[id].guest.is_some()
    }

    /// Whether it was cancelled and what is held is its result, which is still brought to the target.
    pub(in crate::copier) fn is_draining_out(&self) -> bool {
        self.plan.sync == SyncMode::None
            && matches!(self.ending, Some(Ending::Cancelled))
            && self.fleece.as_ref().is_some_and(|fleece| fleece.undrained > 0)
    }

    /// Whether the operations of transfer `id` are to go on.
    pub(in crate::copier) fn goes_on(&self, id: TransferId) -> bool {
        let drains = matches!(self.transfers[id].purpose, Purpose::Drain { .. });
        self.ending.is_none() || (drains && self.is_draining_out())
    }

    /// Write the data of `clusters` of a guest's transfer to the fleece file, and what finds no room there to the target.
    pub(in crate::copier) fn write_fleece(&mut self, id: TransferId, clusters: ClusterRange, now: Timestamp) {
        let mut at = clusters.start;
        while at < clusters.end {
            let fleece = self.fleece.as_mut().expect("asked before");
            let left = u32::try_from(clusters.end.0 - at.0).expect("bounded by the slots");
            let Some((slot, count)) = fleece.space.take(left) else {
                return self.overflow(id, ClusterRange { start: at, end: clusters.end }, now);
            };
            let part = ClusterRange::new(at.0, at.0 + u64::from(count));
            at = part.end;
            for (cluster, slot) in part.iter().zip(slot..) {
                self.transfers[id].set_category(cluster, Category::Fleeced { slot });
            }
            self.transfers[id].add_task(part);
            tracing::trace!(clusters = ?part, slot, "to the fleece file");
            self.push_fleece(id, part, slot, false);
        }
    }

    fn push_fleece(&mut self, id: TransferId, clusters: ClusterRange, slot: u32, rescue: bool) {
        let fleece = self.fleece.as_ref().expect("it was asked before");
        let bytes = self.plan.geometry.bytes_of(clusters);
        let transfer = &mut self.transfers[id];
        transfer.outstanding += 1;
        let buffer = transfer.buffer_of(bytes).start;
        let piece = Piece::new(Direction::Write, fleece.place(slot, bytes.length), buffer);
        let op = piece.op(&fleece.side);
        self.push(Task::Fleece { transfer: id, clusters, slot, rescue, piece }, op);
    }

    /// `cluster` is in slot `slot`: its guest may go on.
    pub(in crate::copier) fn hold(&mut self, cluster: ClusterIndex, slot: u32) {
        self.fleece.as_mut().expect("it was written to").hold(cluster, slot, State::InFleece);
    }

    /// There is no slot for `clusters`. See the header of the module above.
    fn overflow(&mut self, id: TransferId, clusters: ClusterRange, now: Timestamp) {
        let fleece = self.fleece.as_mut().expect("it was asked before");
        let target_failed = self
            .stopped
            .as_ref()
            .is_some_and(|error| matches!(error.operation(), Operation::Write | Operation::Flush));
        if target_failed {
            let fault = Fault::Errno(Errno::ENOSPC);
            let range = self.plan.geometry.bytes_of(clusters);
            let failure = Failure { fault, operation: Operation::CopyBeforeWrite, range };
            return self.transfers[id].task_failed(clusters, failure);
        }
        if !fleece.full_noted {
            fleece.full_noted = true;
            let notice = format!(
                "the fleece file {} ({}) was full: guests have waited for the target meanwhile; a larger one would take more",
                fleece.side.name,
                Length(fleece.bytes())
            );
            self.events.push(Event::Notice(notice));
        }
        self.write_instead(id, clusters, now);
    }

    /// Write `clusters` of a guest's transfer to the target after all.
    fn write_instead(&mut self, id: TransferId, clusters: ClusterRange, now: Timestamp) {
        for cluster in clusters.iter() {
            self.transfers[id].set_category(cluster, Category::Data);
        }
        self.throttle.spend_for_guest(self.plan.geometry.bytes_of(clusters).length, now);
        self.write_data(id, clusters);
    }

    /// The error of a guest whose copy finds no place.
    pub(in crate::copier) fn fleece_is_full(&self, failure: Failure) -> Error {
        let fleece = self.fleece.as_ref().expect("it is full");
        let size = Length(fleece.bytes());
        let reason = match &self.stopped {
            Some(error) => format!("the fleece file is full ({size}), and the job is stopped: {error}"),
            None => format!("the fleece file is full ({size})"),
        };
        let path = fleece.side.name.to_string();
        Error::new(ErrorKind::NoSpace, Operation::CopyBeforeWrite, path, reason)
            .advise("use a larger fleece file, or mend what is wrong with the target and resume sooner")
            .at(failure.range)
    }

    /// A guest has begun to wait for `cluster`, which the sweep has read and is writing: put it into a slot as well.
    pub(in crate::copier) fn rescue(&mut self, id: TransferId, cluster: ClusterIndex) {
        let Some(fleece) = &mut self.fleece else { return };
        let transfer = &self.transfers[id];
        let sweeps = transfer.guest.is_none() && matches!(transfer.purpose, Purpose::Copy { .. });
        if !sweeps || !transfer.is_written_out || !transfer.work(cluster).may_be_helped() {
            return;
        }
        let Some((slot, _)) = fleece.space.take(1) else { return };
        tracing::trace!(?cluster, slot, "to the fleece file as well");
        self.transfers[id].set_helped(cluster);
        self.push_fleece(id, one(cluster), slot, true);
    }

    /// The writes of a transfer of the sweep have been started: help those who wait for it already.
    pub(in crate::copier) fn rescue_waited(&mut self, id: TransferId) {
        if self.fleece.is_none() || !self.transfers[id].urgent {
            return;
        }
        for cluster in self.transfers[id].clusters.iter() {
            if self.set.state(cluster) == ClusterState::CopyingWithWaiters {
                self.rescue(id, cluster);
            }
        }
    }

    /// A write to the fleece file has completed.
    pub(in crate::copier) fn on_fleeced(
        &mut self,
        id: TransferId,
        clusters: ClusterRange,
        slot: u32,
        rescue: bool,
        mut piece: Piece,
        result: Result<Output, Errno>,
        now: Timestamp,
    ) {
        let side = &self.fleece.as_ref().expect("it was written to").side;
        let step = piece.on_result(result, side);
        let op = if step == Step::Again { Some(piece.op(side)) } else { None };
        match (step, op) {
            (Step::Again, Some(op)) if self.ending.is_none() => {
                self.push(Task::Fleece { transfer: id, clusters, slot, rescue, piece }, op);
            }
            (Step::Finished, _) if rescue => {
                self.rescued(id, clusters.start, slot);
                self.transfers[id].outstanding -= 1;
                self.finish_if_over(id, now);
            }
            (Step::Finished, _) => self.task_done(id, clusters, now),
            (Step::Failed(fault), _) => self.fleece_failed(id, clusters, rescue, fault, now),
            (Step::Again, _) => {
                self.fleece_failed(id, clusters, rescue, Fault::Errno(Errno::ECANCELED), now);
            }
        }
    }

    /// `cluster`, which the sweep is writing, is in slot `slot`, too: guests need not wait for it any more.
    fn rescued(&mut self, id: TransferId, cluster: ClusterIndex, slot: u32) {
        let fleece = self.fleece.as_mut().expect("it was written to");
        let transfer = &mut self.transfers[id];
        if transfer.work(cluster).is_settled() {
            return fleece.space.give_back(slot);
        }
        let claim = transfer.take_early(cluster);
        fleece.hold(cluster, slot, State::Draining);
        self.set.complete(claim);
    }

    /// Slots could not be written, and are not used again.
    fn fleece_failed(
        &mut self,
        id: TransferId,
        clusters: ClusterRange,
        rescue: bool,
        fault: Fault,
        now: Timestamp,
    ) {
        let fleece = self.fleece.as_mut().expect("it was written to");
        let range = self.plan.geometry.bytes_of(clusters);
        if !fleece.failure_noted && self.ending.is_none() {
            fleece.failure_noted = true;
            let errno = if let Fault::Errno(errno) = fault { errno } else { Errno::EIO };
            let error = Error::io(Operation::WriteFleece, fleece.side.name.to_string(), None, errno);
            let notice =
                format!("{error}; what it does not take goes to the target, and guests wait for that");
            self.events.push(Event::Notice(notice));
        }
        if rescue {
            self.transfers[id].outstanding -= 1;
        } else if self.ending.is_some() {
            let failure = Failure { fault, operation: Operation::WriteFleece, range };
            let transfer = &mut self.transfers[id];
            transfer.task_failed(clusters, failure);
            transfer.outstanding -= 1;
        } else {
            self.write_instead(id, clusters, now);
            return self.task_done(id, clusters, now);
        }
        self.finish_if_over(id, now);
    }

    /// Start to bring the next run of what is held to the target.
    pub(in crate::copier) fn drain(&mut self, now: Timestamp) -> Drained {
        let most = self.plan.slots as usize;
        let Some(fleece) = self.fleece.as_ref().filter(|fleece| fleece.has_work(now, most)) else {
            return Drained::Nothing;
        };
        // What is tried again comes alone.
        let wanted = if fleece.retries.is_due(now) { 1 } else { self.run_limit(now) };
        let room = self.sweep_room();
        let (start, count) = if room == 0 { (0, 0) } else { self.slots.longest_run(wanted.min(room)) };
        if count == 0 {
            return Drained::NoRoom;
        }
        let fleece = self.fleece.as_mut().expect("just seen");
        let Some((clusters, alone)) = fleece.next_run(count, now, most) else { return Drained::Nothing };
        let count = u32::try_from(clusters.count()).expect("bounded by the slots");
        let run = self.slots.take(start, count);
        self.sweep_slots += count;
        self.retry_count += u64::from(is_retry(alone));
        let mut transfer = Transfer::new(Purpose::Drain { alone }, clusters, self.plan.geometry, run);
        let whole = transfer.bytes;
        transfer.data = vec![whole];
        self.throttle.spend(whole.length, now);
        tracing::trace!(?clusters, ?alone, "drain");
        let id = self.transfers.insert(transfer);
        let mut at = clusters.start;
        while at < clusters.end {
            at = self.read_held(id, ClusterRange { start: at, end: clusters.end });
        }
        Drained::Started
    }

    /// Most clusters in a request of the sweep now: at least one, since nothing is asked while the throttle allows none.
    fn run_limit(&self, now: Timestamp) -> u32 {
        let max = self.sweep_run.min(self.sweep_limit);
        if self.is_draining_out() {
            return max;
        }
        let allowed =
            self.throttle.allowance(now).map(|bytes| bytes / self.plan.geometry.cluster_size().bytes());
        allowed
            .and_then(|clusters| u32::try_from(clusters).ok())
            .map_or(max, |clusters| max.min(clusters))
            .max(1)
    }

    /// Read those of the first of `clusters` that are in adjacent slots; gives where the rest begins.
    fn read_held(&mut self, id: TransferId, clusters: ClusterRange) -> ClusterIndex {
        let fleece = self.fleece.as_ref().expect("it is drained");
        let (slot, count) = fleece.first_run(clusters).expect("it is held");
        let part = ClusterRange::new(clusters.start.0, clusters.start.0 + count);
        let bytes = self.plan.geometry.bytes_of(part);
        let transfer = &mut self.transfers[id];
        transfer.outstanding += 1;
        let place = fleece.place(slot, bytes.length);
        let piece = Piece::new(Direction::Read, place, transfer.buffer_of(bytes).start);
        let op = piece.op(&fleece.side);
        self.push(Task::Drain { transfer: id, clusters: part, piece }, op);
        part.end
    }

    /// A read from the fleece file has completed.
    pub(in crate::copier) fn on_drained(
        &mut self,
        id: TransferId,
        clusters: ClusterRange,
        mut piece: Piece,
        result: Result<Output, Errno>,
        arena: &Arena,
        now: Timestamp,
    ) {
        let side = &self.fleece.as_ref().expect("it was read").side;
        let step = piece.on_result(result, side);
        let fault = match step {
            Step::Again if self.goes_on(id) => {
                let op = piece.op(side);
                return self.push(Task::Drain { transfer: id, clusters, piece }, op);
            }
            Step::Finished if self.goes_on(id) => None,
            Step::Again | Step::Finished => Some(Fault::Errno(Errno::ECANCELED)),
            Step::Failed(fault) => Some(fault),
        };
        let range = self.plan.geometry.bytes_of(clusters);
        let transfer = &mut self.transfers[id];
        if let Some(fault) = fault {
            transfer.task_failed(clusters, Failure { fault, operation: Operation::ReadFleece, range });
        }
        if transfer.outstanding > 1 || transfer.failure.is_some() {
            transfer.outstanding -= 1;
            return self.finish_if_over(id, now);
        }
        self.write_out(id, arena, now);
    }

    /// A transfer has ended; `unsettled` of it are held and not on the target: as [`Copier::copy_failed`].
    pub(in crate::copier) fn drain_ended(
        &mut self,
        unsettled: &[ClusterIndex],
        clusters: ClusterRange,
        alone: Option<u32>,
        failure: Option<Failure>,
        now: Timestamp,
    ) {
        if unsettled.is_empty() || (self.ending.is_some() && !self.is_draining_out()) {
            return;
        }
        let failure = failure.expect("unsettled clusters have a reason");
        let fleece = self.fleece.as_mut().expect("it was drained");
        if clusters.count() > 1 {
            for &cluster in unsettled {
                fleece.try_again(cluster, alone.unwrap_or(0), now);
            }
            return;
        }
        let (cluster, attempts) = (unsettled[0], alone.unwrap_or(0));
        let policy = self.plan.on_target_error;
        let verdict = verdict(policy, failure.fault, attempts, &self.plan.limits);
        let error = Arc::new(self.error_of(failure));
        tracing::info!(%error, ?policy, ?verdict, attempts, "drain failed");
        self.tell_error(&error, verdict);
        let ends = self.ending.is_some();
        let fleece = self.fleece.as_mut().expect("it was drained");
        match verdict {
            Verdict::Retry(pause) => fleece.try_again(cluster, attempts + 1, now.after(pause)),
            Verdict::Skip => self.leave_held_out(cluster, error),
            // What can be saved of a job that has been cancelled is saved.
            Verdict::Fail | Verdict::Pause(_) if ends => self.leave_held_out(cluster, error),
            Verdict::Fail => self.end_with(Ending::Failed(error)),
            Verdict::Pause(io_status) => {
                fleece.try_again(cluster, attempts, now);
                self.failed_in_pause += 1;
                self.stop(io_status, error);
            }
        }
    }

    fn leave_held_out(&mut self, cluster: ClusterIndex, error: Arc<Error>) {
        self.fleece.as_mut().expect("it was drained").leave_out(cluster);
        self.leave_out(cluster, error);
    }
}
