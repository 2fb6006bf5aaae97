//! What to start next: verification runs, retries, then the sweep in order, and last what an earlier run left out.

use super::checkpoint::Stage;
use super::extents::{ExtentWindow, Known};
use super::fleece::Drained;
use super::piece::Direction;
use super::plan::planted;
use super::retry::is_retry;
use super::tally::Was;
use super::transfer::{Purpose, Transfer};
use super::verify::ReadBack;
use super::{Copier, Task, Zeroing, one};
use crate::interval_set::Claim;
use crate::modes::SyncMode;
use crate::ring::Op;
use crate::units::{ByteRange, ClusterCount, ClusterIndex, ClusterRange, Geometry, Timestamp};

/// Grain at which data within a cluster is told from holes: no file system has smaller blocks that matter, and every alignment divides it.
const GRAIN: u64 = 4096;
/// Clusters settled without I/O in one step.
const MAX_SETTLED_AT_ONCE: u64 = 1 << 16;
/// Steps an iteration of the ring thread, so that completions are never kept waiting long.
const STEPS: u32 = 128;
/// So many clusters settled without I/O count as one more step.
const SETTLED_A_STEP: u64 = 1 << 11;

/// What the clusters from the sweep's position on have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stretch {
    /// Not covered by the mode.
    Uncovered,
    /// Holes as a whole.
    Hole,
    /// At least some data in each.
    Data,
}

impl Copier {
    /// Start what can be started now. `true`: the work budget of an iteration was used up before that.
    pub(super) fn advance(&mut self, now: Timestamp) -> bool {
        self.steps_left = STEPS;
        while self.steps_left > 0 && self.step(now) {
            self.steps_left = self.steps_left.saturating_sub(1);
        }
        let more = self.steps_left == 0;
        if self.ending.is_some() || self.paused() || self.plan.sync == SyncMode::None {
            return more;
        }
        if let Some(op) = self.holes.question(self.plan.source.file) {
            self.push(Task::SourceExtents, op);
        }
        let layers = self.layers.as_mut().and_then(|layers| layers.question(self.plan.source.file));
        if let Some(op) = layers {
            self.push(Task::SourceLayers, op);
        }
        more
    }

    /// One step; `false` when nothing can be started before something happens.
    fn step(&mut self, now: Timestamp) -> bool {
        if self.plan.live.is_some() && !self.queue.has_place_for_sweep(&self.places) {
            return false;
        }
        if self.start_verification(now) {
            return true;
        }
        if self.is_draining_out() {
            return self.drain(now) == Drained::Started;
        }
        if self.ending.is_some() || self.paused() || self.hold_until.is_some() {
            return false;
        }
        if self.throttle.allowance(now) == Some(0) {
            return false;
        }
        // The next flush of a live copy is due while one is under way: what it will have to store is bounded.
        if !self.checkpoints.is_idle() && self.write_back.is_due(self.written) {
            return false;
        }
        match self.drain(now) {
            Drained::Started => return true,
            Drained::NoRoom => return false,
            Drained::Nothing if self.plan.sync == SyncMode::None => return false,
            Drained::Nothing => {}
        }
        // The next checkpoint is due and cannot begin yet: what it will have to cover is bounded.
        if self.keeps_checkpoints() && self.checkpoints.bytes_since() >= self.plan.limits.checkpoint_bytes {
            return false;
        }
        if self.retries.len() > 0 {
            let (start, free) = self.slots.longest_run(1);
            if free > 0
                && self.sweep_room() > 0
                && let Some((cluster, attempts)) = self.retries.take_due(now)
            {
                tracing::debug!(?cluster, attempts, "retry");
                match self.set.claim_first(one(cluster), ClusterCount(1)) {
                    Some(claim) => self.start_copy(claim, start, Some(attempts), now),
                    None => self.miss(cluster, attempts),
                }
                return true;
            }
            if self.retries.len() >= self.plan.slots as usize {
                return false;
            }
        }
        self.sweep(now)
    }

    fn sweep(&mut self, now: Timestamp) -> bool {
        let end = ClusterIndex(self.plan.geometry.clusters().0);
        if self.position >= end {
            return self.turn_to_postponed();
        }
        let Some(next) = self.set.next_not_done(self.position) else {
            self.position = end;
            return self.turn_to_postponed();
        };
        self.position = next;
        let left_out = self.skipped.next_from(next);
        if let Some(range) = left_out.filter(|range| range.contains(next)) {
            // Of a live disk it is free: no guest has changed it yet.
            self.position = range.end;
            return true;
        }
        let following = self.postponed.partition_point(|range| range.end <= next);
        let postponed = self.postponed.get(following).copied();
        if let Some(range) = postponed.filter(|range| range.contains(next)) {
            self.position = range.end;
            return true;
        }
        let offset = self.plan.geometry.offset_of(next);
        self.holes.passed(offset);
        if let Some(layers) = &mut self.layers {
            layers.passed(offset);
        }
        let Some((stretch, end)) = self.stretch_at(next) else {
            let needed = self.plan.geometry.bytes_of(one(next)).end();
            self.holes.need(needed);
            if let Some(layers) = &mut self.layers {
                layers.need(needed);
            }
            return false;
        };
        let barred = [left_out, postponed].into_iter().flatten().map(|range| range.start).min();
        let end = barred.map_or(end, |start| end.min(start));
        match stretch {
            Stretch::Uncovered => {
                self.settle_at_once(ClusterRange { start: next, end }, None);
                true
            }
            Stretch::Hole if self.blank_is_zero => {
                self.settle_at_once(ClusterRange { start: next, end }, Some(Was::Hole));
                true
            }
            Stretch::Hole => self.start_zero_run(ClusterRange { start: next, end }, now),
            Stretch::Data => self.start_run(ClusterRange { start: next, end }, now),
        }
    }

    /// Everything else was passed: once it is also done, try what an earlier run left out. It may fail again, and take long to.
    fn turn_to_postponed(&mut self) -> bool {
        let Some(&first) = self.postponed.first() else { return false };
        if !self.transfers.is_empty() || self.zero_runs.in_flight > 0 || self.retries.len() > 0 {
            return false;
        }
        self.postponed.clear();
        self.rewind_to(first.start);
        true
    }

    /// What lies from `cluster` on, and up to where; `None`: not known yet.
    fn stretch_at(&self, cluster: ClusterIndex) -> Option<(Stretch, ClusterIndex)> {
        let geometry = self.plan.geometry;
        let max = u64::from(self.plan.max_run);
        let mut limit = ClusterIndex(geometry.clusters().0);
        if let Some(layers) = &self.layers {
            let (covered, end) = run_of(layers, geometry, cluster, max)?;
            if !covered {
                return Some((Stretch::Uncovered, end));
            }
            limit = end;
        }
        let (data, end) = run_of(&self.holes, geometry, cluster, max)?;
        let end = end.min(limit);
        let last_bytes = geometry.bytes_of(one(ClusterIndex(geometry.clusters().0 - 1)));
        // The last cluster of a target that needs zeros written goes as data when it ends within a sector.
        let odd_end = !self.blank_is_zero && !last_bytes.end().is_multiple_of(GRAIN);
        let holes_as_data = !self.blank_is_zero && self.zeroing == Zeroing::Data;
        if data || holes_as_data {
            return Some((Stretch::Data, end));
        }
        if odd_end && end.0 == geometry.clusters().0 {
            let before = ClusterIndex(end.0 - 1);
            return Some(if cluster == before { (Stretch::Data, end) } else { (Stretch::Hole, before) });
        }
        if self.blank_is_zero {
            return Some((Stretch::Hole, end));
        }
        let (as_data, end) = self.zero_runs.goes_as_data(cluster, end);
        Some((if as_data { Stretch::Data } else { Stretch::Hole }, end))
    }

    /// Clusters of `range` that need no I/O: not covered (`None`), or holes of a target that is zero.
    fn settle_at_once(&mut self, range: ClusterRange, was: Option<Was>) {
        let to_read_back = was.is_some() && self.plan.verify && !self.plan.target_shows_holes;
        let window = (self.plan.limits.checkpoint_bytes / self.plan.geometry.cluster_size().bytes()).max(1);
        let max = if to_read_back { window.min(MAX_SETTLED_AT_ONCE) } else { MAX_SETTLED_AT_ONCE };
        let Some(claim) = self.set.claim_first(range, ClusterCount(range.count().min(max))) else {
            self.position = range.end;
            return;
        };
        let clusters = claim.range();
        let bytes = self.plan.geometry.bytes_of(clusters).length;
        self.position = clusters.end;
        self.retries.forget(clusters);
        tracing::trace!(?clusters, ?was, "skip");
        self.set.complete(claim);
        let steps = u32::try_from(clusters.count() / SETTLED_A_STEP).expect("bounded by MAX_SETTLED_AT_ONCE");
        self.steps_left = self.steps_left.saturating_sub(steps);
        match was {
            Some(was) => self.note_zeros(clusters, was),
            None => self.note_uncovered(clusters),
        }
        // A window holds what is to be read back, and no more questions to the target than it could hold clusters.
        let charge = match was {
            Some(_) if to_read_back => bytes,
            Some(_) if self.plan.verify => self.plan.geometry.cluster_size().bytes(),
            _ => 0,
        };
        self.checkpoints.on_settled(charge);
    }

    fn start_run(&mut self, range: ClusterRange, now: Timestamp) -> bool {
        let cluster_bytes = self.plan.geometry.cluster_size().bytes();
        let mut max = u64::from(self.sweep_run.min(self.sweep_limit)).min(range.count());
        if let Some(allowance) = self.throttle.allowance(now) {
            max = max.min(allowance / cluster_bytes);
        }
        let max = u32::try_from(max).expect("bounded by max_run");
        let room = self.sweep_room();
        let (start, count) = if room == 0 { (0, 0) } else { self.slots.longest_run(max.min(room)) };
        // Half a run now would be half a request for good: wait for the slots in flight instead.
        if count == 0 || (count < max.div_ceil(2) && self.sweep_slots > 0) {
            return false;
        }
        let Some(claim) = self.set.claim_first(range, ClusterCount(u64::from(count))) else {
            self.position = range.end;
            return true;
        };
        tracing::trace!(clusters = ?claim.range(), "claim");
        self.position = claim.range().end;
        self.retries.forget(claim.range());
        self.reserve_ahead(claim.range());
        self.start_copy(claim, start, None, now);
        true
    }

    /// Slots that the sweep may take now.
    pub(super) fn sweep_room(&self) -> u32 {
        let reserved = self.plan.live.map_or(0, |live| live.reserved_slots);
        let free = self.slots.free_count().saturating_sub(reserved);
        free.min(self.sweep_limit.saturating_sub(self.sweep_slots))
    }

    /// Copy the clusters of `claim` for a guest. `attempts`: one of them was tried before.
    pub(super) fn start_guest_copy(
        &mut self,
        claim: Claim,
        slot: u32,
        guest: super::guests::CbwId,
        attempts: Option<u32>,
        now: Timestamp,
    ) {
        let clusters = claim.range();
        let count = u32::try_from(clusters.count()).expect("bounded by the slots");
        let run = self.slots.take(slot, count);
        let purpose = Purpose::Copy { alone: attempts };
        self.retry_count += u64::from(is_retry(attempts));
        let mut transfer = Transfer::new(purpose, clusters, self.plan.geometry, run);
        if planted!(self.plan, AllocationAskedLate) && self.layers.is_some() {
            self.set.complete(claim);
        } else {
            transfer = transfer.with_claim(claim);
        }
        transfer.guest = Some(guest);
        transfer.urgent = true;
        transfer.outstanding += 1;
        tracing::trace!(?clusters, ?guest, "copy before write");
        let id = self.transfers.insert(transfer);
        self.cover(id, now);
    }

    /// Read the clusters of `claim` into the slots from `slot` on.
    fn start_copy(&mut self, claim: Claim, slot: u32, alone: Option<u32>, now: Timestamp) {
        let clusters = claim.range();
        let count = u32::try_from(clusters.count()).expect("bounded by the slots");
        let run = self.slots.take(slot, count);
        self.sweep_slots += count;
        let mut transfer =
            Transfer::new(Purpose::Copy { alone }, clusters, self.plan.geometry, run).with_claim(claim);
        let whole = transfer.bytes;
        let exact = alone.is_none() && self.blank_is_zero;
        transfer.data = if exact { self.data_in(whole) } else { vec![whole] };
        // What may go to the fleece file goes as a whole.
        let read = if self.plan.verify || self.fleece.is_some() {
            whole
        } else {
            let first = transfer.data.first().map_or(whole.offset, |range| range.offset);
            let last = transfer.data.last().map_or(whole.end(), |range| range.end());
            ByteRange::between(first, last)
        };
        self.throttle.spend(transfer.data.iter().map(|range| range.length).sum(), now);
        self.retry_count += u64::from(is_retry(alone));
        tracing::trace!(?clusters, ?alone, %read, "read");
        self.start_read(transfer, read);
    }

    fn start_read(&mut self, mut transfer: Transfer, range: ByteRange) {
        transfer.outstanding += 1;
        let piece = transfer.piece(Direction::Read, range);
        let side = if matches!(transfer.purpose, Purpose::Verify(_)) {
            &self.plan.target
        } else {
            &self.plan.source
        };
        let op = piece.op(side);
        let id = self.transfers.insert(transfer);
        self.push(Task::Move { transfer: id, piece }, op);
    }

    /// The data within `range`, rounded out to [`GRAIN`]s, as the source described it.
    fn data_in(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut data: Vec<ByteRange> = Vec::new();
        for extent in self.holes.present_in(range) {
            let start = extent.offset - extent.offset % GRAIN;
            let end = extent.end().next_multiple_of(GRAIN).min(range.end());
            let start = start.max(range.offset);
            match data.last_mut() {
                Some(last) if last.end() >= start => last.length = end - last.offset,
                _ => data.push(ByteRange::between(start, end)),
            }
        }
        if data.is_empty() { vec![range] } else { data }
    }

    /// Reserve space for the data from the run just claimed on, if that is due.
    fn reserve_ahead(&mut self, claimed: ClusterRange) {
        let position = self.plan.geometry.offset_of(claimed.start);
        let Some((from, budget)) = self.allocation.due(position) else { return };
        let length = self.plan.geometry.length().0;
        let mut ranges: Vec<ByteRange> = Vec::new();
        let mut left = budget;
        for extent in self.holes.present_in(ByteRange::between(from.min(length), length)) {
            if left == 0 || ranges.len() >= self.plan.limits.extents {
                break;
            }
            let part = ByteRange::new(extent.offset, extent.length.min(left));
            // What is done, by an earlier run, is not come to again: zeros there would stay reserved.
            if self.set.count_done_in(self.plan.geometry.covering(part)).0 > 0 {
                break;
            }
            left -= part.length;
            ranges.push(part);
        }
        if ranges.is_empty() {
            self.allocation.skip_to(from);
            return;
        }
        tracing::debug!(ranges = ranges.len(), bytes = budget - left, "reserve");
        self.allocation.begin(&ranges);
        self.push(Task::Allocate, Op::Allocate { file: self.plan.target.file, ranges });
    }

    /// Read back the next run of the window under verification.
    fn start_verification(&mut self, now: Timestamp) -> bool {
        let Stage::Verifying(verification) = &mut self.checkpoints.stage else { return false };
        if verification.cached {
            return false;
        }
        if let Some(op) = verification.question(self.plan.target.file, self.plan.limits.extents) {
            self.push(Task::TargetExtents, op);
            return true;
        }
        if !verification.has_next() {
            return false;
        }
        let mut max = self.plan.max_run;
        if let Some(allowance) = self.throttle.allowance(now) {
            let clusters = allowance / self.plan.geometry.cluster_size().bytes();
            max = u32::try_from(clusters).map_or(max, |clusters| max.min(clusters));
        }
        if max == 0 {
            return false;
        }
        let (start, count) = self.slots.longest_run(max);
        if count == 0 || (count < max.div_ceil(2) && !self.transfers.is_empty()) {
            return false;
        }
        let Some(ReadBack { clusters, expected }) = verification.next(u64::from(count)) else { return false };
        verification.running += 1;
        let count = u32::try_from(clusters.count()).expect("bounded by the slots");
        let run = self.slots.take(start, count);
        self.sweep_slots += count;
        let transfer = Transfer::new(Purpose::Verify(expected), clusters, self.plan.geometry, run);
        let bytes = transfer.bytes;
        self.throttle.spend(bytes.length, now);
        tracing::trace!(?clusters, "read back");
        self.start_read(transfer, bytes);
        true
    }
}

/// Whether `cluster` is absent as a whole or (partly) present in `window`, and up to where that holds: any number of absent
/// clusters, at most `max` present ones. `None`: not known yet.
fn run_of(
    window: &ExtentWindow,
    geometry: Geometry,
    cluster: ClusterIndex,
    max: u64,
) -> Option<(bool, ClusterIndex)> {
    let length = geometry.length().0;
    let present = |cluster| -> Option<(bool, u64)> {
        let bytes = geometry.bytes_of(one(cluster));
        match window.at(bytes.offset) {
            Known::Unknown => None,
            Known::Until { present: false, until } if until >= bytes.end() => Some((false, until)),
            Known::Until { present: true, until } if until >= bytes.end() => Some((true, until)),
            // In pieces: all of them must be known, for what is not known to be data would be left out.
            Known::Until { .. } if window.reaches(bytes.end()) => Some((true, bytes.end())),
            Known::Until { .. } => None,
        }
    };
    let (first, until) = present(cluster)?;
    if !first {
        let bytes = ByteRange::between(geometry.offset_of(cluster), until.min(length));
        return Some((false, geometry.within(bytes).end));
    }
    let mut end = ClusterIndex(cluster.0 + 1);
    let mut known_present_to = until;
    while end.0 - cluster.0 < max && end.0 < geometry.clusters().0 {
        if geometry.bytes_of(one(end)).end() > known_present_to {
            match present(end) {
                Some((true, until)) => known_present_to = until,
                Some((false, _)) | None => break,
            }
        }
        end.0 += 1;
    }
    Some((true, end))
}
