//! The copier: one copy as a pure state machine. Events in (completions, commands, the time), operations out.
//!
//! # Model
//! The *sweep* walks the disk in order. For each stretch it asks what lies there (holes, data, not covered), claims a run of
//! free clusters in the interval set, takes a run of slots and starts a *transfer*: read, inspect, write. Holes and zeros become holes or
//! efficient zeros on the target, or nothing where the target is zero already. Checkpoints flush the target, read back what was
//! written if asked to, and publish what a later run may rely on.
//!
//! # Ordering
//! - Claims are held by I/O in flight only. A cluster that failed is released before it waits for its retry or for a resume.
//! - A cluster is completed in the set after its last task succeeded; the set of done clusters is captured before a flush is
//!   submitted; the map claims what was captured, after that flush succeeded.
//! - Success is decided once a flush that was submitted after the last write has succeeded (and what it covered was read back); from then
//!   on a cancel is too late. So whoever carries an offline copy is asked before ([`Copier::asks_to_complete`]): he refuses cancels from then on,
//!   or has accepted one and passes it on. Failure and cancel are decided at once, and told when nothing is in flight any more.
//!
//! # Bounds
//! Operations in flight: the ring's capacity, of which a live job has a part (`queue`); those queued behind it: for each slot as many as its cluster has blocks of 4 KiB. Everything else is counted in slots, in
//! [`plan::Limits`], or in bits per cluster.
//!
//! The parts: [`sweep`](self) decides what to start, `tasks` carries transfers through, `settle` handles errors, checkpoints and the end.

mod allocation;
mod bits;
mod checkpoint;
mod coverage;
mod extents;
mod faults;
pub mod fleece;
mod give_back;
pub mod guests;
pub mod inspect;
mod operations;
pub mod plan;
mod queue;
mod retry;
mod settle;
mod skipped;
mod slots;
pub mod snapshot;
mod sweep;
mod tally;
mod tasks;
mod throttle;
mod transfer;
mod verify;
mod write_back;
mod zero_runs;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;

use crate::error::Error;
use crate::interval_set::IntervalSet;
use crate::job::{ErrorAction, IoStatus, SkippedRange};
use crate::modes::SyncMode;
use crate::piece;
use crate::ring::{ExtentQuery, Op, Token, ZeroMethod};
use crate::units::{ClusterIndex, ClusterRange, Speed, Timestamp};

use allocation::AllocateAhead;
use bits::ClusterBits;
use checkpoint::{Captured, Checkpoints, Stage};
use extents::ExtentWindow;
use fleece::Fleece;
use give_back::GiveBack;
use guests::Guests;
use operations::Task;
use plan::{LivePlan, Plan};
pub use queue::Places;
use queue::Queue;
use retry::RetryList;
use skipped::Skipped;
use slots::Slots;
use snapshot::Snapshots;
use tally::Tally;
use throttle::Throttle;
use transfer::{Transfer, TransferId};
use verify::Window;
use write_back::WriteBack;
use zero_runs::ZeroRuns;

/// What the copier tells the job.
#[derive(Clone, Debug)]
pub enum Event {
    /// The sweep has met an error; what becomes of the copy is told besides.
    Error {
        /// The error.
        error: Arc<Error>,
        /// What its policy makes of it.
        action: ErrorAction,
    },
    /// An error has paused the sweep.
    Stopped {
        /// What kind of error.
        io_status: IoStatus,
        /// The error.
        error: Arc<Error>,
    },
    /// Nothing is in flight, and nothing will be before a resume (or the end); said once after each pause.
    Drained,
    /// Something worth telling a person that is no error of the copy.
    Notice(String),
    /// It is over.
    Finished(Ending),
}

/// How a copier ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// Everything is on stable storage, but for the ranges left out.
    Complete,
    /// Failed.
    Failed(Arc<Error>),
    /// Cancelled.
    Cancelled,
}

/// Whether somebody has a say before it is decided that a copy ends complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Consent {
    /// Nobody has.
    NotNeeded,
    /// Somebody has, and was not asked yet.
    Needed,
    /// All is done and durable but for the word.
    Asked,
    /// The word was given.
    Given,
}

/// Counters for [`crate::job::Progress`], in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// See [`crate::job::Progress`].
    pub total: u64,
    /// See [`crate::job::Progress`].
    pub done: u64,
    /// See [`crate::job::Progress`].
    pub copied: u64,
    /// See [`crate::job::Progress`].
    pub holes: u64,
    /// See [`crate::job::Progress`].
    pub zeros: u64,
    /// See [`crate::job::Progress`].
    pub uncovered: u64,
    /// See [`crate::job::Progress`].
    pub resumed: u64,
    /// See [`crate::job::Progress`].
    pub skipped: u64,
    /// See [`crate::job::Progress`].
    pub verified: u64,
    /// See [`crate::job::Progress`].
    pub retries: u64,
    /// See [`crate::job::Progress`].
    pub in_flight: u64,
    /// Bytes handed to the target as data, retries included.
    pub written: u64,
}

/// How the target is made to read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zeroing {
    /// By an operation of its own.
    Operation(ZeroMethod),
    /// By writing zeros as data: it has no such operation.
    Data,
}

/// One copy. See the module's header.
pub struct Copier {
    plan: Plan,
    set: Arc<IntervalSet>,
    slots: Slots,
    transfers: Slab<Transfer>,
    queue: Queue,
    /// What of the ring there is for it in this iteration.
    places: Places,
    guests: Guests,
    fleece: Option<Fleece>,
    snapshots: Snapshots,
    /// Most slots that the sweep may hold at a time.
    sweep_limit: u32,
    /// Most clusters in one of its requests.
    sweep_run: u32,
    /// Slots that it holds.
    sweep_slots: u32,
    /// Slots in which it has copies made that it has taken over from readers.
    aside_slots: u32,
    /// Next cluster for the sweep to look at.
    position: ClusterIndex,
    holes: ExtentWindow,
    layers: Option<ExtentWindow>,
    /// For reads as of t0: what is done and not on the target.
    uncovered: Option<ClusterBits>,
    /// Space to be given back, where it was reserved before t0.
    give_back: Option<GiveBack>,
    zeroing: Zeroing,
    /// Operations for zeros that have failed since the last that did not.
    zeroing_failures: u32,
    /// What was not written yet reads as zeros on the target. Believed until something shows, or may show, otherwise.
    blank_is_zero: bool,
    zero_runs: ZeroRuns,
    allocation: AllocateAhead,
    /// Transfers that were read and wait for their space.
    held: Vec<TransferId>,
    throttle: Throttle,
    retries: RetryList,
    /// Failed verifications of a cluster so far.
    mismatches: BTreeMap<ClusterIndex, u32>,
    skipped: Skipped,
    /// What guests copy, or have tried to, that was left out before.
    second_chances: BTreeSet<ClusterIndex>,
    /// What an earlier run left out, as long as the sweep passes over it.
    postponed: Vec<ClusterRange>,
    /// What was copied since the last capture.
    window: Window,
    /// What was copied between the last two captures, while its flush is under way.
    closed_window: Window,
    checkpoints: Checkpoints,
    write_back: WriteBack,
    tally: Tally,
    verified: u64,
    retry_count: u64,
    /// Clusters that failed and wait for the end of this pause on an error.
    failed_in_pause: u64,
    skipped_bytes: u64,
    /// The map operation under way removes it.
    map_removed: bool,
    /// After a failed flush: not before this.
    hold_until: Option<Timestamp>,
    written: u64,
    /// Up to where the page cache was dropped, for each buffered side.
    dropped_to: u64,
    /// The target's page cache is being written back outside a checkpoint.
    writing_back: bool,
    /// Of the work of this iteration.
    steps_left: u32,
    /// Up to where it was seen that all is done.
    counted_to: ClusterIndex,
    user_paused: bool,
    stopped: Option<Arc<Error>>,
    drained_said: bool,
    ending: Option<Ending>,
    salvaged: bool,
    finished: bool,
    consent: Consent,
    events: Vec<Event>,
}

impl Copier {
    /// A copier for `plan`, over `set`, in which nothing is claimed or done yet.
    ///
    /// # Panics
    /// If the plan contradicts itself.
    #[must_use]
    pub fn new(plan: Plan, set: Arc<IntervalSet>) -> Self {
        let geometry = plan.geometry;
        assert_eq!(set.clusters(), geometry.clusters(), "the set is the disk's");
        assert!(plan.slots > 0 && plan.max_run > 0, "slots and runs are not empty");
        let reserved = plan.live.map_or(0, |live| live.reserved_slots);
        assert!(reserved < plan.slots, "the sweep has a slot");
        let restarts = plan.map.is_some() || plan.verify || !plan.resumed.is_empty();
        assert!(plan.live.is_none() || !restarts, "the old contents of a live disk can be copied once only");
        let mut tally = Tally::default();
        for &range in &plan.resumed {
            let marked = set.mark_done(range);
            assert_eq!(marked.0, range.count(), "resumed clusters were free");
            tally.resumed += geometry.bytes_of(range).length;
            tally.settled_clusters += range.count();
        }
        let resumed = Captured { done: plan.resumed.clone(), tally, complete: false };
        let (length, cluster_bytes) = (geometry.length().0, geometry.cluster_size().bytes());
        let window_of =
            |query| ExtentWindow::new(query, length, plan.limits.extents, plan.limits.unanswered_bytes);
        let layers = (plan.sync == SyncMode::Top).then(|| window_of(ExtentQuery::TopLayer));
        let uncovered = plan.live.filter(|_| layers.is_some()).map(|_| ClusterBits::new(geometry.clusters()));
        Self {
            slots: Slots::new(plan.slots, plan.arena_start),
            transfers: Slab::new(),
            queue: Queue::new(plan.target.file),
            places: Places::alone(0),
            guests: Guests::default(),
            fleece: None,
            snapshots: Snapshots::default(),
            sweep_limit: plan.slots,
            sweep_run: plan.max_run,
            sweep_slots: 0,
            aside_slots: 0,
            position: ClusterIndex(0),
            holes: window_of(ExtentQuery::Data),
            layers,
            uncovered,
            give_back: plan.live.filter(LivePlan::gives_back).map(|_| GiveBack::new(geometry.clusters())),
            zeroing: Zeroing::Operation(match plan.live {
                Some(LivePlan { may_unmap: false, .. }) => ZeroMethod::Keep,
                _ => ZeroMethod::Unmap,
            }),
            zeroing_failures: 0,
            blank_is_zero: plan.target_is_zero,
            zero_runs: ZeroRuns::new(plan.limits.zero_run_bytes, cluster_bytes, plan.live.is_some()),
            allocation: AllocateAhead::of(&plan),
            held: Vec::new(),
            throttle: Throttle::new(plan.speed, cluster_bytes),
            retries: RetryList::default(),
            mismatches: BTreeMap::new(),
            skipped: Skipped::new(plan.target_before),
            second_chances: BTreeSet::new(),
            postponed: plan.postponed.clone(),
            window: Window::default(),
            closed_window: Window::default(),
            checkpoints: Checkpoints::new(resumed, plan.map.is_some()),
            write_back: WriteBack::new(plan.limits.write_back),
            tally,
            verified: 0,
            retry_count: 0,
            failed_in_pause: 0,
            skipped_bytes: 0,
            map_removed: false,
            hold_until: None,
            written: 0,
            dropped_to: 0,
            writing_back: false,
            steps_left: 0,
            counted_to: ClusterIndex(0),
            user_paused: false,
            stopped: None,
            drained_said: false,
            ending: None,
            salvaged: false,
            finished: false,
            consent: Consent::NotNeeded,
            events: Vec::new(),
            plan,
            set,
        }
    }

    /// Do what can be done at `now`, and give the operations to push that find `places`. `true`: there is more to do at once. What completes up to
    /// `now` is handed in ([`Self::on_completion`]) before the next call.
    pub fn poll(&mut self, now: Timestamp, places: Places, out: &mut Vec<(Token, Op)>) -> bool {
        self.places = places;
        let mut more = self.fleece.as_mut().is_some_and(Fleece::free_some);
        if self.hold_until.is_some_and(|until| until <= now) {
            self.hold_until = None;
        }
        self.serve_guests(now);
        self.serve_snapshots();
        self.settle(now);
        if !self.finished {
            more |= self.advance(now);
            self.settle(now);
        }
        if self.ending.is_some() {
            self.serve_guests(now);
            self.serve_snapshots();
        }
        self.end_guests_turn(now);
        self.queue.take(places, out);
        (more || self.guests.has_looks_left() || self.counted_to.0 > 0 || self.asks_to_complete())
            && !self.finished
    }

    /// When to call [`Self::poll`] again although nothing has happened.
    #[must_use]
    pub fn next_deadline(&self, now: Timestamp) -> Option<Timestamp> {
        let checkpoint = (self.keeps_checkpoints()
            && self.checkpoints.awaits_time()
            && self.ending.is_none()
            && !self.drained())
        .then(|| self.checkpoints.due_at(&self.plan.limits))
        // One that is due already waits for something in flight, whose completion comes first.
        .filter(|&due| due > now);
        let drain = self.fleece.as_ref().and_then(|fleece| fleece.retries.next_after(now));
        let sweep = match self.hold_until {
            _ if self.is_draining_out() => drain,
            _ if self.ending.is_some() || self.paused() => None,
            Some(until) => Some(until),
            None => {
                let throttle = self.throttle.next_at(now).into_iter();
                throttle.chain(self.retries.next_after(now)).chain(drain).min()
            }
        };
        let reading_back = matches!(&self.checkpoints.stage, Stage::Verifying(window) if window.has_next());
        let read_back = if reading_back { self.throttle.next_at(now) } else { None };
        let flush = self.fleece.as_ref().and_then(Fleece::flush_due_at);
        let flush = flush.filter(|&due| due > now && self.ending.is_none() && self.checkpoints.is_idle());
        let guests = self.guests.next_deadline();
        checkpoint.into_iter().chain(sweep).chain(read_back).chain(flush).chain(guests).min()
    }

    /// A user pauses the sweep, or lets it go on. Letting go on also lifts a pause on an error.
    pub fn set_paused(&mut self, paused: bool) {
        // Said again even if nothing changed: a resume may have come and gone unseen.
        self.drained_said = false;
        self.user_paused = paused;
        if !paused && self.stopped.take().is_some() {
            self.retry_count += std::mem::take(&mut self.failed_in_pause);
        }
    }

    /// Change the speed limit.
    pub fn set_speed(&mut self, speed: Option<Speed>, now: Timestamp) {
        self.throttle.set_speed(speed, now);
    }

    /// Most clusters that the sweep may have in flight, and in one request, and most runs of zeros; at least 1 each. Guests' copies do not count.
    pub fn set_sweep_limit(&mut self, clusters: u32, run: u32, zero_runs: u32) {
        self.zero_runs.limit = zero_runs.max(1);
        self.sweep_limit = clusters.max(1);
        self.sweep_run = run.clamp(1, self.plan.max_run);
    }

    /// How long a flush of the target may take, as far as that is in the copy's hands; `None`: as long as it takes. Of a live copy alone: those of
    /// others have nobody waiting.
    pub fn set_flush_aim(&mut self, aim: Option<Duration>) {
        self.write_back.set_aim(aim.filter(|_| self.plan.live.is_some()));
    }

    /// End without a result. What is in flight is waited for; with a map, a last checkpoint keeps what was done. `false`: too
    /// late, how it ends is decided. Of a live copy that is complete nothing is decided yet while something is in flight: a read of the
    /// snapshot from a target that does not answer must not keep whoever wants it to end from that, nor the others of a group.
    pub fn cancel(&mut self) -> bool {
        let undecided = self.plan.live.is_some() && self.is_complete() && !self.finished;
        if undecided {
            self.ending = None;
        }
        let accepted = self.ending.is_none();
        self.end_with(Ending::Cancelled);
        accepted
    }

    /// Have [`Self::complete`] said before it is decided that the copy is complete; not of a live copy, see [`Self::cancel`].
    pub fn ask_before_complete(&mut self) {
        if self.plan.live.is_none() {
            self.consent = Consent::Needed;
        }
    }

    /// Whether the copy is complete as soon as [`Self::complete`] is said, and not before.
    #[must_use]
    pub fn asks_to_complete(&self) -> bool {
        self.consent == Consent::Asked && self.ending.is_none()
    }

    /// Nobody cancels it any more: it is complete from the next [`Self::poll`] on.
    pub fn complete(&mut self) {
        assert!(self.asks_to_complete(), "it was asked for");
        self.consent = Consent::Given;
    }

    /// Whether how it ends is decided: nothing needs to be copied for a guest any more.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// Whether it is decided that it ends complete.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        matches!(self.ending, Some(Ending::Complete))
    }

    /// Whether [`Event::Finished`] was given.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Operations on the ring besides so many of each kind: see [`Places::own`].
    #[must_use]
    pub fn beyond(&self, own: usize) -> usize {
        self.queue.beyond(own)
    }

    /// Clusters that the sweep has in flight.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn sweep_in_flight(&self) -> u32 {
        self.sweep_slots
    }

    /// Clusters in the list of those to try again.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn to_retry(&self) -> usize {
        self.retries.len()
    }

    /// Runs of zeros in flight.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn zero_runs_in_flight(&self) -> u32 {
        self.zero_runs.in_flight
    }

    /// What has happened since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// The counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let tally = &self.tally;
        Counters {
            total: self.plan.geometry.length().0,
            done: tally.done(),
            copied: tally.copied,
            holes: tally.holes,
            zeros: tally.zeros,
            uncovered: tally.uncovered,
            resumed: tally.resumed,
            skipped: self.skipped_bytes,
            verified: self.verified,
            retries: self.retry_count,
            in_flight: u64::from(self.slots.in_use()) * self.plan.geometry.cluster_size().bytes(),
            written: self.written,
        }
    }

    /// Ranges left out so far, ascending; neighbours with the same error merged.
    #[must_use]
    pub fn skipped_ranges(&self) -> Vec<SkippedRange> {
        self.skipped.told(self.plan.geometry)
    }

    /// Whether a later run can go on from the map as it stands.
    #[must_use]
    pub fn is_resumable(&self) -> bool {
        self.plan.map.is_some() && self.checkpoints.map_written
    }

    /// Whether the map was removed, at the end of a complete copy.
    #[must_use]
    pub fn map_was_removed(&self) -> bool {
        self.plan.map.is_some() && self.map_removed && !self.checkpoints.map_written
    }

    /// Bytes that the map calls done, as it stands.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        if self.is_resumable() { self.checkpoints.mapped_bytes } else { 0 }
    }

    /// Whether `verify` was asked for and everything done by this run was compared.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.plan.verify && matches!(self.ending, Some(Ending::Complete))
    }

    fn keeps_checkpoints(&self) -> bool {
        self.plan.map.is_some() || self.plan.verify
    }

    fn paused(&self) -> bool {
        self.user_paused || self.stopped.is_some()
    }

    /// Paused, and it was said that nothing is in flight: nothing may be started then, a checkpoint that is due neither.
    fn drained(&self) -> bool {
        self.paused() && self.drained_said
    }
}

impl std::fmt::Debug for Copier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copier")
            .field("position", &self.position)
            .field("queue", &self.queue)
            .field("transfers", &self.transfers)
            .field("held", &self.held)
            .field("retries", &self.retries)
            .field("fleece", &self.fleece)
            .field("holes", &self.holes)
            .field("allocation", &self.allocation)
            .field("stage", &self.checkpoints.stage)
            .field("tally", &self.tally)
            .field("stopped", &self.stopped)
            .field("ending", &self.ending)
            .finish_non_exhaustive()
    }
}

impl Drop for Copier {
    /// A copier that goes away in mid-copy (its ring broke) gives its claims back.
    fn drop(&mut self) {
        let transfers = self.transfers.drain().flat_map(Transfer::abandon);
        let runs = self.queue.drain().filter_map(|task| match task {
            Task::ZeroRun { claim, .. } => Some(claim),
            Task::Snapshot(read) => read.abandon(),
            _ => None,
        });
        for claim in transfers.chain(runs) {
            self.set.release(claim);
        }
    }
}

/// The range of one cluster.
fn one(cluster: ClusterIndex) -> crate::units::ClusterRange {
    crate::units::ClusterRange::new(cluster.0, cluster.0 + 1)
}
