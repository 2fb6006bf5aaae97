//! Copy-before-write: guests that are about to change clusters which are not in the copy yet.
//!
//! # Model
//! A *request* names the clusters that a guest's write touches. It is over when each of them is done, or need not be copied any more
//! (left out, or the job is ending); then the guest looks once more and goes on. A request claims what is free of its
//! clusters, as far as there are slots, and copies it in runs of its own; it waits in the set's table for the first cluster that
//! somebody else is copying, which makes that copy urgent, and looks again when that one is released.
//!
//! Requests are served in rounds, a run for each: one of many clusters does not keep the others waiting until the last of its own is claimed. Who
//! finds no slot and has some already lets those go first who came later.
//!
//! # Ordering
//! Requests are served in the order in which they came, round by round, before the sweep, its throttle, its pause and its retries; some slots are
//! kept from the sweep for them. They never wait for each other but through clusters: claims are held by I/O in flight only.
//!
//! # Failures
//! A run that failed is taken apart; a cluster that failed alone is the request's own failure, for the sweep's failures only
//! release the cluster, and a request that waited for it then finds it free and copies it itself. `on_cbw_error` decides:
//! either the guest's write fails and the job goes on, or the job fails and the write goes on. So does the time-out. Either
//! way the cluster stays to copy: it is on the sweep's list, or the sweep comes to it again.
//!
//! # Time-outs
//! Their time counts from the moment that whoever asks says. He may have asked before, for other clusters of the same write: then that lies back for as long as
//! he has waited by now.
//!
//! Nobody is refused whose clusters are done, whoever has copied them and however late that is seen. And a deadline is judged by the time of the last turn, for
//! what had completed by then has been handed in: a ring thread that stood still for long (a process that was stopped, a host without
//! time for it) finds copies complete that it has not heard of, and takes them before it calls anything late.
//!
//! What the sweep has left out under policy `ignore` stays free, for no guest has changed it yet. The first request that touches it takes it off the
//! list of what was left out and copies it; if that fails, too, it is left out for good and the guest goes on. (Where the guest has only been asked
//! for beside another job, it goes back to the sweep instead, which leaves it out again: he may not come.) When the job
//! is about to end, and when the list has as many ranges as it may have, nothing is taken off it any more.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::queue::SegQueue;
use nix::errno::Errno;

use super::faults::{SideName, side_of};
use super::piece::Fault;
use super::plan::planted;
use super::transfer::{Failure, TransferId};
use super::{Copier, Ending, Task, one};
use crate::error::{Error, ErrorKind, Operation};
use crate::interval_set::{Cancellation, Registration, Ticket, Waiter};
use crate::modes::{CbwErrorPolicy, ErrorPolicy, SyncMode};
use crate::units::{ClusterCount, ClusterIndex, ClusterRange, Timestamp};

/// The list of turns is not tidied before it has this many.
const FEW_TURNS: usize = 64;
/// Most of those who wait for a slot that are looked at in one iteration of the ring thread: perhaps they need none any more.
const LOOKS: usize = 256;

/// Names a guest's request among those of one copier; ascending in the order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CbwId(pub u64);

/// How a request ended: the guest may look again, or its write fails.
pub type CbwOutcome = Result<(), Arc<Error>>;

#[derive(Debug)]
struct Request {
    /// What is not known to be done yet.
    clusters: ClusterRange,
    /// When it gives up.
    deadline: Option<Timestamp>,
    /// Transfers of its own in flight.
    in_flight: u32,
    /// A run of it has failed: it goes on cluster by cluster.
    alone: bool,
    /// The cluster of somebody else that it waits for.
    waits: Option<Ticket>,
    /// It is to be looked at.
    ready: bool,
    /// Nobody waits for it yet.
    beside: bool,
}

/// What was claimed for a request in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claimed {
    /// A run; there may be more.
    Run,
    /// Nothing, for nothing is free.
    Nothing,
    /// Nothing, for want of a slot.
    NoSlot,
}

/// The requests of one copier. See the module's header.
#[derive(Debug, Default)]
pub(super) struct Guests {
    requests: BTreeMap<CbwId, Request>,
    /// To be looked at, in this order. Some are over, or not ready any more.
    turns: VecDeque<CbwId>,
    /// When requests give up.
    deadlines: BTreeSet<(Timestamp, CbwId)>,
    /// What had completed by then was handed in.
    judged: Timestamp,
    /// Which turn is looked at next, and how many are still to be.
    next_look: usize,
    looks_left: usize,
    /// Woken by the set, in whatever thread released the cluster.
    woken: Arc<SegQueue<CbwId>>,
    outcomes: Vec<(CbwId, CbwOutcome)>,
}

impl Guests {
    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.deadlines.first().map(|&(deadline, _)| deadline)
    }

    /// Whether some of those who wait for a slot were not looked at for want of time.
    pub(super) fn has_looks_left(&self) -> bool {
        self.looks_left > 0
    }

    /// The next of those who wait for a slot to be looked at. Those who could not be looked at the last time come first.
    fn looks(&mut self) -> impl Iterator<Item = CbwId> {
        let count = self.turns.len();
        let left = if self.looks_left > 0 { self.looks_left.min(count) } else { count };
        let looks = left.min(LOOKS);
        let start = self.next_look;
        self.looks_left = left - looks;
        self.next_look = (start + looks).checked_rem(count).unwrap_or(0);
        (start..start + looks).map(move |at| self.turns[at % count])
    }

    /// `id` is to be looked at, if it is there.
    fn make_ready(&mut self, id: CbwId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if !std::mem::replace(&mut request.ready, true) {
            self.turns.push_back(id);
        }
    }

    /// Whose turn it is.
    fn first(&mut self) -> Option<CbwId> {
        while let Some(&id) = self.turns.front() {
            if self.requests.get(&id).is_some_and(|request| request.ready) {
                return Some(id);
            }
            self.turns.pop_front();
        }
        None
    }

    /// Forget those who are over, if they are more than the others.
    fn tidy(&mut self) {
        if self.turns.len() > FEW_TURNS + 2 * self.requests.len() {
            let requests = &self.requests;
            self.turns.retain(|id| requests.get(id).is_some_and(|request| request.ready));
        }
    }

    /// Whose turn it was has had it. `again`: has another, after the others.
    fn end_turn(&mut self, again: bool) {
        let id = self.turns.pop_front().expect("it was somebody's turn");
        if let Some(request) = self.requests.get_mut(&id) {
            request.ready = again;
            if again {
                self.turns.push_back(id);
            }
        }
    }
}

impl Copier {
    /// A guest, whose time counts from `since`, is about to change `clusters`. Answered through [`Self::take_cbw_outcomes`], at the earliest after the next
    /// [`Self::poll`].
    ///
    /// # Panics
    /// If the plan is not for a live disk, or `id` is in use.
    pub fn copy_before_write(&mut self, id: CbwId, clusters: ClusterRange, since: Timestamp) {
        self.ask(id, clusters, since, false);
    }

    /// The same for one who waits for another job at present, and will ask for himself. What fails until then, or takes too long, harms neither the
    /// job nor its copy: his write may never come.
    pub fn copy_beside(&mut self, id: CbwId, clusters: ClusterRange, since: Timestamp) {
        self.ask(id, clusters, since, true);
    }

    fn ask(&mut self, id: CbwId, clusters: ClusterRange, since: Timestamp, beside: bool) {
        let live = self.plan.live.as_ref().expect("guests write to live disks only");
        let deadline = live.cbw_timeout.map(|timeout| since.after(timeout));
        tracing::trace!(?id, ?clusters, "guest waits");
        let request =
            Request { clusters, deadline, in_flight: 0, alone: false, waits: None, ready: false, beside };
        let before = self.guests.requests.insert(id, request);
        assert!(before.is_none(), "{id:?} is in use");
        self.guests.deadlines.extend(deadline.map(|deadline| (deadline, id)));
        self.guests.make_ready(id);
    }

    /// For so long nobody could hear of what has completed: the time of all who wait ends so much later.
    pub fn put_off_deadlines(&mut self, time: Duration) {
        let Guests { requests, deadlines, .. } = &mut self.guests;
        deadlines.clear();
        for (&id, request) in requests {
            request.deadline = request.deadline.map(|deadline| deadline.after(time));
            deadlines.extend(request.deadline.map(|deadline| (deadline, id)));
        }
    }

    /// Whether guests wait whose time counts.
    #[must_use]
    pub fn has_deadlines(&self) -> bool {
        !self.guests.deadlines.is_empty()
    }

    /// The guest does not want it any more. Copies under way go on; it is not answered.
    pub fn forget_cbw(&mut self, id: CbwId) {
        self.drop_request(id);
        self.guests.outcomes.retain(|&(answered, _)| answered != id);
    }

    /// What became of requests since the last call.
    pub fn take_cbw_outcomes(&mut self) -> Vec<(CbwId, CbwOutcome)> {
        std::mem::take(&mut self.guests.outcomes)
    }

    /// Whether requests wait for something.
    #[must_use]
    pub fn has_guests(&self) -> bool {
        !self.guests.is_empty()
    }

    fn drop_request(&mut self, id: CbwId) -> bool {
        let Some(request) = self.guests.requests.remove(&id) else { return false };
        self.guests.tidy();
        request.deadline.map(|deadline| self.guests.deadlines.remove(&(deadline, id)));
        if let Some(ticket) = request.waits {
            // Woken already or not: nobody looks for it any more.
            let (Cancellation::Removed | Cancellation::AlreadyWoken) = self.set.cancel(ticket);
        }
        true
    }

    fn answer(&mut self, id: CbwId, outcome: CbwOutcome) {
        if self.drop_request(id) {
            tracing::trace!(?id, ok = outcome.is_ok(), "guest answered");
            self.guests.outcomes.push((id, outcome));
        }
    }

    /// Serve the guests; before anything of the sweep.
    pub(super) fn serve_guests(&mut self, now: Timestamp) {
        while let Some(id) = self.guests.woken.pop() {
            if planted!(self.plan, WakeUpLost) {
                continue;
            }
            // One that was woken and has gone since is not in the table any more.
            if let Some(request) = self.guests.requests.get_mut(&id) {
                request.waits = None;
                self.guests.make_ready(id);
            }
        }
        if self.guests.is_empty() {
            self.guests.looks_left = 0;
            return;
        }
        if self.ending.is_some() {
            return self.release_guests();
        }
        self.time_out_guests();
        if self.ending.is_some() {
            return self.release_guests();
        }
        while let Some(id) = self.guests.first() {
            if !self.serve(id, now) {
                return self.answer_done();
            }
            if self.ending.is_some() {
                return self.release_guests();
            }
        }
        self.guests.looks_left = 0;
    }

    /// Slots are missing. Those who need none are not kept waiting by those who do.
    fn answer_done(&mut self) {
        let looks: Vec<CbwId> = self.guests.looks().collect();
        for id in looks {
            let request = self.guests.requests.get(&id).filter(|request| request.ready);
            if request.is_some_and(|request| self.set.is_done(request.clusters)) {
                self.answer(id, Ok(()));
            }
        }
    }

    /// The job is ending: nothing needs to be copied for a guest any more.
    fn release_guests(&mut self) {
        self.guests.looks_left = 0;
        let ids: Vec<CbwId> = self.guests.requests.keys().copied().collect();
        for id in ids {
            self.answer(id, Ok(()));
        }
    }

    fn time_out_guests(&mut self) {
        let judged = self.guests.judged;
        while let Some(&(_, id)) = self.guests.deadlines.first().filter(|(deadline, _)| *deadline <= judged) {
            let clusters = self.guests.requests[&id].clusters;
            if self.set.is_done(clusters) {
                self.answer(id, Ok(()));
                continue;
            }
            let range = self.plan.geometry.bytes_of(clusters);
            let reason = "the old contents were not copied within the guest's time-out";
            let error = Error::new(
                ErrorKind::Io(Errno::ETIMEDOUT),
                Operation::CopyBeforeWrite,
                self.plan.target.name.to_string(),
                reason,
            )
            .at(range);
            self.refuse(id, Arc::new(error));
            if self.ending.is_some() {
                return;
            }
        }
    }

    /// The copy that `id` needs cannot be made: by `on_cbw_error` its write fails, or the job does.
    fn refuse(&mut self, id: CbwId, error: Arc<Error>) {
        let live = self.plan.live.as_ref().expect("guests write to live disks only");
        if self.guests.requests.get(&id).is_some_and(|request| request.beside) {
            return self.answer(id, Err(error));
        }
        match live.on_cbw_error {
            CbwErrorPolicy::BreakGuestWrite => self.answer(id, Err(error)),
            CbwErrorPolicy::BreakSnapshot => self.end_with(Ending::Failed(error)),
        }
    }

    /// What completes up to `now` is handed in before the next turn.
    pub(super) fn end_guests_turn(&mut self, now: Timestamp) {
        self.guests.judged = now;
    }

    /// Do for the request whose turn it is what can be done in one round. `false`: there is no slot, and none for those behind it.
    fn serve(&mut self, id: CbwId, now: Timestamp) -> bool {
        let all = self.guests.requests[&id].clusters;
        let Some(first) = self.set.first_not_done(all) else {
            self.answer(id, Ok(()));
            return true;
        };
        let rest = ClusterRange { start: first, end: all.end };
        if self.skipped.count() >= self.plan.limits.skipped_ranges {
            self.give_up_skipped(rest);
        }
        let request = self.guests.requests.get_mut(&id).expect("it is there");
        request.clusters = rest;
        let (alone, waits) = (request.alone, request.waits.is_some());
        if !waits {
            self.wait_for_others(id, rest);
        }
        let claimed = self.claim_for(id, rest, alone, now);
        let request = &self.guests.requests[&id];
        let left_alone = request.in_flight == 0 && request.waits.is_none();
        match claimed {
            // Those of its clusters that are free wait for a slot, and so does everybody behind.
            Claimed::NoSlot => {
                if request.in_flight > 0 {
                    self.guests.end_turn(true);
                }
                return false;
            }
            Claimed::Run => self.guests.end_turn(true),
            // Everything busy was released meanwhile, or what was claimed needed no copy: look again.
            Claimed::Nothing => self.guests.end_turn(left_alone),
        }
        true
    }

    /// Claim and copy the first run in `range` that is free.
    fn claim_for(&mut self, id: CbwId, range: ClusterRange, alone: bool, now: Timestamp) -> Claimed {
        let max = if alone { 1 } else { u64::from(self.plan.max_run).min(range.count()) };
        let (slot, free) = self.slots.longest_run(u32::try_from(max).expect("bounded by max_run"));
        if free == 0 {
            let any = self.set.first_to_copy(range).is_some();
            return if any { Claimed::NoSlot } else { Claimed::Nothing };
        }
        let Some(claim) = self.set.claim_first(range, ClusterCount(u64::from(free))) else {
            return Claimed::Nothing;
        };
        let request = self.guests.requests.get_mut(&id).expect("it is there");
        request.in_flight += 1;
        self.give_second_chance(claim.range());
        let attempts = self.retries.take_out(claim.range());
        self.start_guest_copy(claim, slot, id, attempts, now);
        Claimed::Run
    }

    /// Wait for the first cluster of `range` that somebody else is copying.
    fn wait_for_others(&mut self, id: CbwId, mut range: ClusterRange) {
        while let Some(cluster) = self.set.first_busy(range) {
            let holder = self.transfer_of(cluster).map(|transfer| &self.transfers[transfer]);
            if let Some(own) = holder.filter(|transfer| transfer.guest == Some(id)) {
                range.start = range.end.min(own.clusters.end);
                continue;
            }
            range.start = ClusterIndex(cluster.0 + 1);
            let woken = Arc::clone(&self.guests.woken);
            let waiter = Waiter::callback(move || woken.push(id));
            match self.set.wait_for(cluster, waiter) {
                Registration::Registered { ticket, .. } => {
                    self.guests.requests.get_mut(&id).expect("it is there").waits = Some(ticket);
                    // Also if it is not the first who waits: that may be one who reads the snapshot.
                    self.promote(cluster);
                    return;
                }
                Registration::AlreadyReleased(_) | Registration::Closed(_) => {}
            }
        }
    }

    pub(super) fn transfer_of(&self, cluster: ClusterIndex) -> Option<TransferId> {
        self.transfers.iter().find(|(_, transfer)| transfer.clusters.contains(cluster)).map(|(id, _)| id)
    }

    /// A guest waits for `cluster`, which the sweep is copying or somebody is reading: what is queued of that goes before the rest of the sweep.
    fn promote(&mut self, cluster: ClusterIndex) {
        let id = self.transfer_of(cluster);
        if let Some(id) = id {
            let was_urgent = std::mem::replace(&mut self.transfers[id].urgent, true);
            self.rescue(id, cluster);
            if was_urgent {
                return;
            }
        }
        self.queue.promote(|task| match task {
            Task::ZeroRun { claim, .. } => claim.range().contains(cluster),
            Task::Snapshot(read) => read.held().is_some_and(|clusters| clusters.contains(cluster)),
            task => task.transfer().is_some_and(|transfer| Some(transfer) == id),
        });
    }

    /// A guest could not copy `cluster`, which the sweep may have passed. While the job is paused nothing takes it off the list again, and guests may
    /// go on to fail for hours: the list has its bound.
    fn put_back(&mut self, cluster: ClusterIndex, attempts: u32, now: Timestamp) {
        if self.retries.len() < self.plan.limits.guest_retries || self.retries.waits(one(cluster)) {
            return self.retries.put(cluster, attempts, now);
        }
        self.rewind_to(cluster);
    }

    /// A transfer made for the request `id` has ended; `unsettled` of it could not be copied.
    pub(super) fn guest_copy_ended(
        &mut self,
        id: CbwId,
        unsettled: &[ClusterIndex],
        clusters: ClusterRange,
        alone: Option<u32>,
        failure: Option<Failure>,
        now: Timestamp,
    ) {
        for &cluster in unsettled {
            // In mode none nobody would ever take it from the list again.
            if self.ending.is_none() && self.plan.sync != SyncMode::None {
                // A run that failed is taken apart: which cluster of it is bad is not known yet.
                let failed = u32::from(clusters.count() == 1);
                self.put_back(cluster, alone.unwrap_or(0) + failed, now);
            }
        }
        let Some(request) = self.guests.requests.get_mut(&id) else { return };
        request.in_flight -= 1;
        request.alone |= failure.is_some();
        let beside = request.beside;
        self.guests.make_ready(id);
        let Some(failure) = failure else { return };
        if self.ending.is_some() || unsettled.is_empty() || clusters.count() > 1 {
            return;
        }
        let cluster = unsettled[0];
        let error = Arc::new(self.error_of(failure));
        tracing::info!(%error, ?id, "copy before write failed");
        let unreadable =
            side_of(failure.operation) == SideName::Source && failure.fault != Fault::Errno(Errno::ECANCELED);
        let ignored = unreadable && self.plan.on_source_error == ErrorPolicy::Ignore;
        if !beside && (ignored || self.second_chances.contains(&cluster)) {
            let _ = self.retries.take_out(one(cluster));
            return self.skip_for_good(cluster, error);
        }
        self.refuse(id, error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(count: u64) -> Guests {
        let mut guests = Guests::default();
        for id in (0..count).map(CbwId) {
            let clusters = ClusterRange::new(id.0, id.0 + 1);
            let request = Request {
                clusters,
                deadline: None,
                in_flight: 0,
                alone: false,
                waits: None,
                ready: false,
                beside: false,
            };
            guests.requests.insert(id, request);
            guests.make_ready(id);
        }
        guests
    }

    #[test]
    fn all_who_wait_for_a_slot_are_looked_at_some_at_a_time() {
        for count in [1, 255, 256, 257, 1000] {
            let mut guests = waiting(count);
            // A round goes to its end, and the next one begins anew.
            for _ in 0..3 {
                let mut seen = BTreeSet::new();
                loop {
                    let looks: Vec<CbwId> = guests.looks().collect();
                    assert!((1..=LOOKS).contains(&looks.len()));
                    seen.extend(looks);
                    if !guests.has_looks_left() {
                        break;
                    }
                }
                assert_eq!(seen.len() as u64, count);
            }
        }
        assert_eq!(Guests::default().looks().count(), 0);
    }

    #[test]
    fn turns_that_nobody_takes_are_forgotten() {
        let mut guests = waiting(1000);
        for id in (1..1000).map(CbwId) {
            guests.requests.remove(&id);
            guests.tidy();
        }
        assert_eq!(guests.first(), Some(CbwId(0)));
        assert!(guests.turns.len() <= FEW_TURNS + 2, "{}", guests.turns.len());
    }
}
