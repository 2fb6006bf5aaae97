//! Checkpoints, withdrawals, and the end.

use std::sync::Arc;

use nix::errno::Errno;

use super::checkpoint::{Captured, Stage, subtract};
use super::fleece::Fleece;
use super::piece::Fault;
use super::plan::{Checkpoint, planted};
use super::retry::{Verdict, verdict};
use super::skipped::merged;
use super::verify::{Unverified, Verification, Window};
use super::{Consent, Copier, Ending, Event, Task};
use crate::error::{Error, Operation, describe};
use crate::modes::SyncMode;
use crate::ring::{Op, Output};
use crate::units::{ByteRange, ClusterRange, Length, Timestamp};

/// Clusters looked at in one iteration of the ring thread when all is done: 1 MiB of the set.
const COUNTED_AT_ONCE: u64 = 1 << 22;

impl Copier {
    /// Do whatever checkpoints and the end call for.
    pub(super) fn settle(&mut self, now: Timestamp) {
        if self.finished {
            return;
        }
        self.finish_verification(now);
        if self.ending.is_some() {
            return self.settle_ending(now);
        }
        let idle = self.is_idle();
        let completes = self.all_is_settled();
        // Once all is settled, the last checkpoint covers them. A pause may be long, and guests need the slots.
        let frees_slots = !completes && self.fleece.as_ref().is_some_and(Fleece::has_unflushed);
        let still = match self.plan.live {
            // Guests go on, and what is copied for them.
            Some(_) => {
                let gives_back = self.give_back.as_ref().is_some_and(|give_back| !give_back.is_idle());
                self.sweep_is_idle() && self.checkpoints.is_idle() && !frees_slots && !gives_back
            }
            None => idle && self.checkpoints.is_idle() && self.nothing_under_way(),
        };
        if self.paused() && still && !self.drained_said {
            if self.outlasts_pause() && !completes {
                return self.begin_checkpoint(false, now);
            }
            self.drained_said = true;
            self.events.push(Event::Drained);
        }
        if self.writing_back {
            return;
        }
        if completes && idle && self.checkpoints.is_idle() && !self.paused() {
            if self.gives_back() {
                return;
            }
            return self.begin_checkpoint(true, now);
        }
        if self.keeps_checkpoints() && !self.drained() && self.checkpoints.is_due(now, &self.plan.limits) {
            self.begin_checkpoint(false, now);
        }
        let halts = self.paused() && self.sweep_is_idle();
        let due = self.fleece.as_ref().is_some_and(|fleece| fleece.flush_is_due(now, halts));
        let due = due || self.write_back.is_due(self.written);
        if due && self.checkpoints.is_idle() && !completes {
            self.begin_checkpoint(false, now);
        }
        if !self.paused() {
            self.drop_cache();
        }
    }

    /// Whether nothing is left to do but the last checkpoint. What is for guests alone goes on until it is cancelled, also where they have
    /// changed everything.
    fn all_is_settled(&self) -> bool {
        let all = self.tally.settled_clusters == self.plan.geometry.clusters().0;
        all && self.plan.sync != SyncMode::None
    }

    /// Whether there is something new for the map before a pause, which may be long, and which the host may not outlive. (What is to be read back
    /// first is not waited for: the pause was asked for now.)
    fn outlasts_pause(&self) -> bool {
        let new = self.checkpoints.dirty && self.checkpoints.bytes_since() > 0;
        self.plan.map.is_some() && !self.plan.verify && new && !self.writing_back
    }

    fn settle_ending(&mut self, now: Timestamp) {
        if !self.is_idle() || !self.checkpoints.is_idle() || self.writing_back || self.is_draining_out() {
            return;
        }
        let decided = matches!(self.ending, Some(Ending::Complete));
        let last_word = self.plan.map.is_some() && !self.salvaged && !decided;
        // What guests had copied is the result, and the user has ended it.
        let fleeced = self.plan.sync == SyncMode::None
            && matches!(self.ending, Some(Ending::Cancelled))
            && !self.salvaged;
        if fleeced && self.gives_back() {
            return;
        }
        self.salvaged = true;
        if fleeced || (last_word && self.checkpoints.dirty && !self.plan.verify) {
            self.begin_checkpoint(false, now);
        } else if last_word && (self.checkpoints.dirty || self.checkpoints.map_stale) {
            // To claim more it would have to be read back first, for as long as that takes. So no more is called done either.
            self.tally = self.checkpoints.durable.tally;
            self.tally.settled_clusters += self.skipped.clusters();
            self.checkpoints.stage = Stage::Publishing;
            self.push_map(false);
        } else if self.nothing_under_way() && (!decided || self.count_some()) {
            let ending = self.ending.clone().expect("it is ending");
            self.finish(ending);
        }
    }

    /// See whether all is done that should be, a part of a large disk at a time; whether that is over.
    fn count_some(&mut self) -> bool {
        let end = self.plan.geometry.clusters().0;
        let start = self.counted_to.0;
        let part = ClusterRange::new(start, end.min(start + COUNTED_AT_ONCE));
        assert_eq!(self.set.count_done_in(part).0, part.count(), "everything was settled");
        self.counted_to = part.end;
        part.end.0 == end
    }

    /// Whether no cluster is being copied. Reads of the snapshot do not count: there may always be one.
    fn is_idle(&self) -> bool {
        let idle = self.transfers.is_empty() && self.zero_runs.in_flight == 0;
        let all_free = self.snapshots.running > 0 || self.slots.all_free();
        assert!(!idle || all_free, "slots belong to transfers, and to reads of the snapshot");
        idle
    }

    /// Whether nothing of the sweep is under way; guests' copies may be.
    fn sweep_is_idle(&self) -> bool {
        self.sweep_slots == 0 && self.aside_slots == 0 && self.zero_runs.in_flight == 0
    }

    fn nothing_under_way(&self) -> bool {
        self.queue.is_empty()
    }

    fn finish(&mut self, ending: Ending) {
        assert!(
            self.is_idle() && self.nothing_under_way() && !self.finished,
            "it ends once, with nothing in flight"
        );
        if matches!(ending, Ending::Complete) {
            let counters = self.counters();
            assert_eq!(counters.done + counters.skipped, counters.total, "everything was done or left out");
            assert_eq!(self.counted_to.0, self.plan.geometry.clusters().0, "that was seen");
            assert!(counters.written >= counters.copied, "what was copied was written");
            assert_eq!(self.fleeced_bytes(), 0, "nothing is left in the fleece file");
        }
        self.ending = Some(ending.clone());
        self.finished = true;
        self.events.push(Event::Finished(ending));
    }

    /// It is to end so, once nothing is in flight; the first reason counts.
    pub(super) fn end_with(&mut self, ending: Ending) {
        if self.ending.is_some() || self.finished {
            return;
        }
        tracing::debug!(?ending, "ending");
        self.ending = Some(ending);
        self.stopped = None;
        self.user_paused = false;
        self.retries.clear();
    }

    /// The set of done clusters now, without those left out.
    fn capture(&self) -> Captured {
        let mut tally = self.tally;
        tally.settled_clusters -= self.skipped.clusters();
        // Without checkpoints nothing is ever taken back to this.
        let ranges: Vec<ClusterRange> =
            if self.keeps_checkpoints() { self.set.done_ranges().collect() } else { Vec::new() };
        // A flush that only frees slots of the fleece file is not the last of a copy of changes.
        let complete = self.all_is_settled();
        Captured { done: subtract(&ranges, &self.skipped.ranges()), tally, complete }
    }

    fn begin_checkpoint(&mut self, last: bool, now: Timestamp) {
        let captured = self.capture();
        assert!(!last || captured.complete, "the last checkpoint covers everything");
        if last {
            // What is to be in the copy is written: what was left out stays so.
            self.give_up_skipped(self.set.all());
        }
        tracing::debug!(ranges = captured.done.len(), last, "checkpoint");
        self.closed_window = std::mem::take(&mut self.window);
        self.checkpoints.begin(captured, now);
        if let Some(fleece) = &mut self.fleece {
            fleece.capture(now);
        }
        self.write_back.begin(self.written, now);
        self.push(Task::Flush, Op::Flush { file: self.plan.target.file });
        if planted!(self.plan, MapBeforeFlush) && self.plan.map.is_some() {
            let captured = self.checkpoints.captured.clone();
            self.checkpoints.durable = captured;
            self.push_map(false);
        }
    }

    pub(super) fn on_flushed(&mut self, result: &Result<Output, Errno>, now: Timestamp) {
        match result {
            Ok(_) => {
                if planted!(self.plan, CaptureAfterFlush) {
                    self.checkpoints.captured = self.capture();
                }
                self.write_back.end(now);
                if let Some(fleece) = &mut self.fleece {
                    fleece.flushed();
                }
                self.begin_verification();
            }
            Err(_) if planted!(self.plan, FlushRetriedAndBelieved) => {
                self.push(Task::Flush, Op::Flush { file: self.plan.target.file });
            }
            Err(errno) => self.flush_failed(*errno, now),
        }
    }

    /// The window that the last capture closed is on the medium: read it back. Without `verify` it is empty.
    fn begin_verification(&mut self) {
        let window = std::mem::take(&mut self.closed_window);
        let wanted = self.plan.verify && self.ending.is_none();
        let cached = wanted && self.plan.target.direct_alignment.is_none();
        if cached {
            let range = ByteRange::new(0, self.plan.geometry.length().0);
            self.push(Task::DropBeforeVerify, Op::DropCache { file: self.plan.target.file, range });
        }
        let verification = Verification::new(window, self.plan.geometry, cached);
        self.checkpoints.stage = Stage::Verifying(Box::new(verification));
    }

    /// The target's page cache was written back and dropped. An error here is the kernel's only word about lost data, so it counts as
    /// a failed flush; and none is under way at the same time, which might have swallowed or missed it.
    pub(super) fn on_written_back(&mut self, result: &Result<Output, Errno>, now: Timestamp) {
        self.writing_back = false;
        match (result, &mut self.checkpoints.stage) {
            (Err(errno), _) => self.flush_failed(*errno, now),
            (Ok(_), Stage::Verifying(verification)) => verification.cached = false,
            (Ok(_), _) => {}
        }
    }

    /// A flush failed: what was written since the last good one may be lost, whatever a later flush says.
    fn flush_failed(&mut self, errno: Errno, now: Timestamp) {
        if self.plan.live.is_some() {
            return self.live_flush_failed(errno);
        }
        let attempts = self.checkpoints.failed_flushes;
        let fault = Fault::of(errno, &self.plan.target);
        let verdict = verdict(self.plan.on_target_error, fault, attempts, &self.plan.limits);
        let error = Arc::new(self.io_error(Operation::Flush, None, errno));
        tracing::info!(%error, ?verdict, "flush failed");
        self.tell_error(&error, verdict);
        self.withdraw();
        self.checkpoints.failed_flushes += 1;
        self.salvaged = true;
        match verdict {
            Verdict::Pause(io_status) if self.ending.is_none() => {
                self.salvaged = false;
                self.stop(io_status, error);
            }
            Verdict::Retry(pause) if self.ending.is_none() => {
                self.salvaged = false;
                self.hold_until = Some(now.after(pause));
            }
            _ if self.ending.is_some() => {
                self.events.push(Event::Notice(format!(
                    "what was copied since the last checkpoint is lost: {error}"
                )));
            }
            _ => self.end_with(Ending::Failed(error)),
        }
    }

    /// Of a live disk what a failed flush may have lost cannot be copied again: guests have written since.
    fn live_flush_failed(&mut self, errno: Errno) {
        let error = Arc::new(self.io_error(Operation::Flush, None, errno));
        tracing::info!(%error, "flush failed");
        self.tell_error(&error, Verdict::Fail);
        self.checkpoints.stage = Stage::Idle;
        if self.plan.sync == SyncMode::None && matches!(self.ending, Some(Ending::Cancelled)) {
            // What guests had copied is the result. Another flush would tell nothing of what this one has lost.
            self.ending = Some(Ending::Failed(error));
            return;
        }
        if self.ending.is_some() {
            self.events.push(Event::Notice(format!("what was copied may be lost: {error}")));
        }
        self.end_with(Ending::Failed(error));
    }

    /// Take back every claim since the last good flush: those clusters are copied again.
    fn withdraw(&mut self) {
        let durable = &self.checkpoints.durable;
        let done: Vec<ClusterRange> = self.set.done_ranges().collect();
        let lost = subtract(&subtract(&done, &durable.done), &self.skipped.ranges());
        for &range in &lost {
            self.set.reopen(range);
        }
        tracing::info!(ranges = lost.len(), "withdrawn");
        self.tally = durable.tally;
        self.tally.settled_clusters += self.skipped.clusters();
        for (_, transfer) in &mut self.transfers {
            transfer.tainted = !matches!(transfer.purpose, super::transfer::Purpose::Verify(_));
        }
        self.zero_runs.tainted = self.zero_runs.in_flight > 0;
        self.window = Window::default();
        self.closed_window = Window::default();
        self.checkpoints.withdraw();
        self.retries.clear();
        self.failed_in_pause = 0;
        self.rewind_to(crate::units::ClusterIndex(0));
        // What was written and lost may be there in part: nothing on the target is known to be zero any more. A later run must not
        // believe it either, however this one ends.
        self.blanks_are_not_zero();
        if self.plan.map.is_some() {
            self.checkpoints.stage = Stage::Publishing;
            self.push_map(false);
        }
    }

    /// What was not written yet does not read as zeros on the target, or is not known to. Transfers that leave holes out, because it did, have
    /// to begin again; those that have not written yet do not write at all.
    pub(super) fn blanks_are_not_zero(&mut self) {
        self.blank_is_zero = false;
        self.skipped.all_may_be_written();
        for (_, transfer) in &mut self.transfers {
            let copies = !matches!(transfer.purpose, super::transfer::Purpose::Verify(_));
            transfer.tainted |= copies && !transfer.reads_whole(transfer.bytes);
        }
    }

    /// When the window under verification is through: claim what compared equal.
    fn finish_verification(&mut self, now: Timestamp) {
        let Stage::Verifying(verification) = &mut self.checkpoints.stage else { return };
        if self.ending.is_some() {
            // Whoever wants it to end does not wait for the rest. What was compared so far is claimed.
            verification.abandon();
        }
        if !verification.is_done() {
            return;
        }
        let completes = self.checkpoints.captured.complete && !verification.has_unverified();
        if completes && self.ending.is_none() && matches!(self.consent, Consent::Needed | Consent::Asked) {
            if self.consent == Consent::Needed {
                tracing::debug!("complete, if whoever carries it agrees");
            }
            self.consent = Consent::Asked;
            return;
        }
        let unverified = verification.take_unverified();
        self.checkpoints.stage = Stage::Idle;
        let mut captured = std::mem::take(&mut self.checkpoints.captured);
        if !unverified.is_empty() {
            let ranges: Vec<ClusterRange> = unverified.iter().map(|unverified| unverified.clusters).collect();
            captured.complete = false;
            captured.done = subtract(&captured.done, &ranges);
            for &Unverified { clusters, was, .. } in &unverified {
                let bytes = self.plan.geometry.bytes_of(clusters).length;
                captured.tally.withdraw(was, clusters.count(), bytes);
            }
        }
        let complete = captured.complete;
        self.mismatches.retain(|&cluster, _| !captured.holds(cluster));
        if captured.tally.done() > self.checkpoints.durable.tally.done() {
            self.checkpoints.failed_flushes = 0;
        }
        self.checkpoints.durable = captured;
        self.reopen_unverified(&unverified, now);
        if complete {
            self.end_with(Ending::Complete);
        }
        if self.plan.map.is_some() {
            self.checkpoints.stage = Stage::Publishing;
            let succeeded = matches!(self.ending, Some(Ending::Complete));
            self.push_map(succeeded && self.skipped.count() == 0);
        }
    }

    /// Publish what is durable, or, at the end of a complete copy, remove the map.
    fn push_map(&mut self, remove: bool) {
        let Some(map) = &self.plan.map else { return };
        let mut skipped = [self.skipped.ranges().as_slice(), &self.postponed].concat();
        skipped.sort_unstable_by_key(|range| range.start);
        let skipped = merged(skipped.into_iter());
        let contents = (!remove).then(|| {
            (map.encode)(&Checkpoint {
                done: self.checkpoints.durable.done.clone(),
                skipped,
                blank_is_zero: self.blank_is_zero,
            })
        });
        let document = map.document;
        self.map_removed = remove;
        self.checkpoints.publishing_bytes = self.checkpoints.durable.tally.done();
        self.push(Task::Publish, Op::Publish { document, contents });
    }

    pub(super) fn on_published(&mut self, result: &Result<Output, Errno>) {
        if matches!(self.checkpoints.stage, Stage::Publishing) {
            self.checkpoints.stage = Stage::Idle;
        }
        if let Ok(Output::Unsynced(errno)) = result {
            // It claims what is true: nothing is lost by it.
            let notice = format!(
                "map file {} was removed, but its directory could not be synced: {}; after a power loss it may be there again: remove it then",
                self.map_name(),
                describe(*errno)
            );
            self.events.push(Event::Notice(notice));
        }
        match result {
            Ok(_) => {
                let was_stale = std::mem::replace(&mut self.checkpoints.map_stale, false);
                self.checkpoints.map_written = !self.map_removed;
                self.checkpoints.mapped_bytes = self.checkpoints.publishing_bytes;
                if was_stale
                    && !self.map_removed
                    && !std::mem::replace(&mut self.checkpoints.map_mended_said, true)
                {
                    self.events
                        .push(Event::Notice(format!("map file {} can be written again", self.map_name())));
                }
            }
            Err(Errno::EEXIST) if self.map_removed => {
                let name = self.map_name();
                self.events.push(Event::Notice(format!(
                    "map file {name} is another run's by now: it was left alone"
                )));
            }
            Err(errno) if self.map_removed => {
                let name = self.map_name();
                let notice = format!(
                    "the copy is complete, but its map file {name} cannot be removed: {}; remove it by hand",
                    describe(*errno)
                );
                self.events.push(Event::Notice(notice));
            }
            Err(errno) => {
                self.checkpoints.map_stale = true;
                tracing::warn!(%errno, "map file cannot be written");
                // Once a job: a map file that fails now and then fails often.
                if !std::mem::replace(&mut self.checkpoints.map_failure_said, true) {
                    self.events.push(Event::Notice(self.map_unwritable(*errno)));
                }
            }
        }
    }

    fn map_name(&self) -> String {
        self.plan.map.as_ref().map(|map| map.name.to_string()).unwrap_or_default()
    }

    /// The map stays as it was: what that means for whoever relies on it.
    fn map_unwritable(&self, errno: Errno) -> String {
        let error = Error::io(Operation::WriteMap, self.map_name(), None, errno);
        if matches!(errno, Errno::ENOENT | Errno::EEXIST) {
            let why =
                if errno == Errno::EEXIST { "; it is another run's by now, and left alone" } else { "" };
            let goes_on = if self.ending.is_none() { "; the copy goes on without one" } else { "" };
            return format!("{error}{why}{goes_on}");
        }
        let mapped = Length(self.checkpoints.mapped_bytes);
        let total = self.plan.geometry.length();
        let goes_on = match self.ending {
            None => "the copy goes on, and tries to write it again; until then ",
            Some(_) => "",
        };
        format!("{error}; {goes_on}a repeat would go on from {mapped} of {total}")
    }

    /// Drop the page cache behind a buffered side, a step of the sweep at a time and no closer than the slots in flight. Between
    /// checkpoints only, see [`Self::on_written_back`].
    fn drop_cache(&mut self) {
        let behind = u64::from(self.plan.slots) * self.plan.geometry.cluster_size().bytes();
        let to = self.plan.geometry.offset_of(self.position).saturating_sub(behind);
        if to < self.dropped_to + self.plan.limits.drop_step || !self.checkpoints.is_idle() {
            return;
        }
        let range = ByteRange::between(self.dropped_to, to);
        self.dropped_to = to;
        if self.plan.source.direct_alignment.is_none() && self.plan.live.is_none() {
            self.push(Task::DropSourceCache, Op::DropCache { file: self.plan.source.file, range });
        }
        if self.plan.target.direct_alignment.is_none() {
            self.writing_back = true;
            self.push(Task::DropTargetCache, Op::DropCache { file: self.plan.target.file, range });
        }
    }
}
