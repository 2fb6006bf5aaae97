//! The fleece file: local storage that takes the old contents of what a guest is about to change, when the target is slow or stuck.
//!
//! # Model
//! The file is divided into *slots* of one cluster. A guest's copy goes there instead of to the target: its claim is completed, and the
//! guest goes on, once the slot is written. From then on the cluster is *held*: it is done for guests, but not settled for the job. The sweep *drains* what
//! is held, before its own work and by its rules (throttle, pause, policies): runs of adjacent clusters are read from their slots
//! and written to the target. `carry` moves the bytes; this module knows what is where.
//!
//! A guest that waits for a cluster which the sweep has read and is writing to a slow target is helped the same way: the bytes are at hand, and go
//! to a slot beside the write that is under way. Whichever ends first lets the guest go.
//!
//! # Ordering
//! - A slot is free again only after a flush of the target that was submitted after the cluster's write had succeeded has succeeded: captured
//!   first, then flushed, then freed exactly what was captured. Until then there is one durable copy, or one that no flush can lose.
//! - A slot is read by the drain, which keeps it, and by reads as of t0. These look once more when they have the bytes: what is still held in
//!   the same slot was not overwritten, since a cluster is held once only.
//! - A job is complete only when nothing is held that is not on the target.
//!
//! # When it is full, or fails
//! Guests' copies go to the target itself, as without a fleece: that never takes longer than to wait for another cluster's drain and its
//! flush, behind the throttle and the pause of the sweep. Only while the job is stopped on an error of the target is there
//! no use in that, and `on_cbw_error` decides at once. A slot that cannot be written is not used again; the copy goes to the target then.
//!
//! # Bounds
//! Everything is bounded by the slots, and these by [`MAX_SLOTS`].

mod carry;
mod space;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::plan::Side;
use super::retry::RetryList;
use crate::units::{ByteRange, ClusterIndex, ClusterRange, Timestamp};
use space::Space;

pub(super) use carry::Drained;

/// Fewest slots of a fleece file.
pub const MIN_SLOTS: u32 = 16;
/// Most slots of a fleece file: 64 GiB with clusters of 64 KiB, and at most some 100 MiB of memory to know them by.
pub const MAX_SLOTS: u32 = 1 << 20;
/// Most slots that are given back in one iteration of the ring thread: after a flush that took long there are many.
const FREED_AT_ONCE: usize = 4096;
/// Longest time between two flushes that free slots, while there are some to free.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// A fleece file that is ready to be used.
#[derive(Clone, Debug)]
pub struct FleecePlan {
    /// On the ring; at least `slots` clusters long, and nobody else's.
    pub side: Side,
    /// Clusters that it takes, at least one.
    pub slots: u32,
}

/// How far a cluster has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In its slot alone.
    InFleece,
    /// On its way to the target.
    Draining,
    /// Written to the target, and not known to be on stable storage.
    OnTarget,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    slot: u32,
    state: State,
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Fleece {
    pub(super) side: Side,
    cluster_bytes: u64,
    slots: u32,
    space: Space,
    held: BTreeMap<ClusterIndex, Held>,
    /// Held in their slots alone, and not waiting for a retry.
    waiting: BTreeSet<ClusterIndex>,
    /// Held in their slots alone, to be tried again, each alone.
    pub(super) retries: RetryList,
    /// Held and not on the target.
    undrained: usize,
    /// Where the next run that is drained is looked for.
    cursor: ClusterIndex,
    /// On the target since the last capture.
    written: Vec<ClusterIndex>,
    /// What the flush under way covers.
    captured: Vec<ClusterIndex>,
    /// What a flush has covered, and whose slots are still to be given back.
    flushed: Vec<ClusterIndex>,
    last_flush: Timestamp,
    full_noted: bool,
    failure_noted: bool,
    /// A bug that tests plant: slots are free as soon as their cluster is written.
    freed_early: bool,
}

impl Fleece {
    fn new(plan: FleecePlan, cluster_bytes: u64, freed_early: bool) -> Self {
        assert!(plan.slots <= MAX_SLOTS, "a fleece file of at most {MAX_SLOTS} slots");
        Self {
            space: Space::new(plan.slots),
            side: plan.side,
            slots: plan.slots,
            cluster_bytes,
            held: BTreeMap::new(),
            waiting: BTreeSet::new(),
            retries: RetryList::default(),
            undrained: 0,
            cursor: ClusterIndex(0),
            written: Vec::new(),
            captured: Vec::new(),
            flushed: Vec::new(),
            last_flush: Timestamp::default(),
            full_noted: false,
            failure_noted: false,
            freed_early,
        }
    }

    /// Bytes of it.
    fn bytes(&self) -> u64 {
        u64::from(self.slots) * self.cluster_bytes
    }

    /// Held clusters that are not on the target.
    pub(super) fn undrained(&self) -> usize {
        self.undrained
    }

    /// Where `bytes` bytes lie from slot `slot` on, rounded up to what direct I/O takes: slots are whole clusters.
    pub(super) fn place(&self, slot: u32, bytes: u64) -> ByteRange {
        let sector = u64::from(self.side.direct_alignment.unwrap_or(1));
        ByteRange::new(u64::from(slot) * self.cluster_bytes, bytes.next_multiple_of(sector))
    }

    /// `cluster` is in `slot`, and nowhere else any more.
    fn hold(&mut self, cluster: ClusterIndex, slot: u32, state: State) {
        let before = self.held.insert(cluster, Held { slot, state });
        assert!(before.is_none(), "{cluster:?} is held once");
        self.undrained += 1;
        if state == State::InFleece {
            self.waiting.insert(cluster);
        }
    }

    /// Whether there is something to drain at `now`, if there are at most `most` clusters to be tried again.
    fn has_work(&self, now: Timestamp, most: usize) -> bool {
        self.retries.is_due(now) || (!self.waiting.is_empty() && self.retries.len() < most)
    }

    /// What to drain next, at most `max` adjacent clusters: from now on it is on its way. A cluster that is tried again comes alone, with
    /// its failed retries.
    fn next_run(&mut self, max: u32, now: Timestamp, most: usize) -> Option<(ClusterRange, Option<u32>)> {
        if let Some((cluster, attempts)) = self.retries.take_due(now) {
            self.held.get_mut(&cluster).expect("it is held").state = State::Draining;
            return Some((super::one(cluster), Some(attempts)));
        }
        if self.retries.len() >= most {
            return None;
        }
        let first = self.waiting.range(self.cursor..).next().or_else(|| self.waiting.first()).copied()?;
        let mut end = first;
        while end.0 - first.0 < u64::from(max) && self.waiting.remove(&end) {
            self.held.get_mut(&end).expect("it is held").state = State::Draining;
            end.0 += 1;
        }
        self.cursor = end;
        Some((ClusterRange { start: first, end }, None))
    }

    /// The way of `cluster` to the target has failed: it is tried again at `at`.
    fn try_again(&mut self, cluster: ClusterIndex, attempts: u32, at: Timestamp) {
        let held = self.held.get_mut(&cluster).expect("it is held");
        assert_eq!(held.state, State::Draining, "it was on its way");
        held.state = State::InFleece;
        self.retries.add(cluster, attempts, at);
    }

    /// `cluster` is on the target, if it was held at all.
    pub(super) fn written(&mut self, cluster: ClusterIndex) {
        let Some(held) = self.held.get_mut(&cluster) else { return };
        assert_eq!(held.state, State::Draining, "it was on its way");
        held.state = State::OnTarget;
        self.undrained -= 1;
        if self.freed_early {
            return self.let_go(cluster);
        }
        self.written.push(cluster);
    }

    /// `cluster`, which is on its way, is left out of the copy.
    fn leave_out(&mut self, cluster: ClusterIndex) {
        self.undrained -= 1;
        self.let_go(cluster);
    }

    fn let_go(&mut self, cluster: ClusterIndex) {
        let held = self.held.remove(&cluster).expect("it is held");
        self.space.give_back(held.slot);
    }

    /// Whether a flush is due that lets slots be used again. `halts`: nothing else is going to be written.
    pub(super) fn flush_is_due(&self, now: Timestamp, halts: bool) -> bool {
        self.flush_due_at().is_some_and(|at| halts || at <= now || self.space.is_short())
    }

    /// Whether a flush, one that is under way perhaps, lets slots be used again.
    pub(super) fn has_unflushed(&self) -> bool {
        !self.written.is_empty() || !self.captured.is_empty() || !self.flushed.is_empty()
    }

    /// When the next flush is due at the latest; `None`: it would free nothing.
    pub(super) fn flush_due_at(&self) -> Option<Timestamp> {
        (!self.written.is_empty()).then(|| self.last_flush.after(FLUSH_INTERVAL))
    }

    /// A flush of the target is about to be submitted.
    pub(super) fn capture(&mut self, now: Timestamp) {
        self.last_flush = now;
        self.captured.append(&mut self.written);
    }

    /// It has succeeded.
    pub(super) fn flushed(&mut self) {
        self.flushed.append(&mut self.captured);
    }

    /// Give back some of the slots whose contents are safe elsewhere; whether there are more.
    pub(super) fn free_some(&mut self) -> bool {
        for _ in 0..FREED_AT_ONCE {
            let Some(cluster) = self.flushed.pop() else { break };
            self.let_go(cluster);
        }
        !self.flushed.is_empty()
    }

    /// The slot of `cluster`, if it is nowhere else for sure.
    pub(super) fn slot_of(&self, cluster: ClusterIndex) -> Option<u32> {
        self.held.get(&cluster).filter(|held| held.state != State::OnTarget).map(|held| held.slot)
    }

    /// Whether `clusters` are still held in the slots from `slot` on.
    pub(super) fn still_holds(&self, clusters: ClusterRange, slot: u32) -> bool {
        let slots = u64::from(slot)..;
        clusters
            .iter()
            .zip(slots)
            .all(|(cluster, slot)| self.held.get(&cluster).is_some_and(|held| u64::from(held.slot) == slot))
    }

    /// How many of the first of `clusters` are in adjacent slots, and nowhere else for sure; and the first slot.
    pub(super) fn first_run(&self, clusters: ClusterRange) -> Option<(u32, u64)> {
        let first = self.slot_of(clusters.start)?;
        let slots = u64::from(first)..;
        let adjacent = clusters
            .iter()
            .zip(slots)
            .take_while(|&(cluster, slot)| self.slot_of(cluster).is_some_and(|at| u64::from(at) == slot));
        Some((first, adjacent.count() as u64))
    }
}

#[cfg(test)]
mod tests;
