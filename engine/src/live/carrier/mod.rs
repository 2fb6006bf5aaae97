//! The carrier: guest I/O on one disk as a pure state machine. Requests, completions and answers in, operations and outcomes out.
//!
//! # Model
//! A request of any alignment and length is cut into *windows*, which are carried out one after the other. A window that changes the
//! disk goes through
//!
//! ```text
//! ready ─► buffers ─► lock ─► permit ─► read what is covered in part ─► write ─► all given back ─► next window
//!   ▲         │         │        │
//!   │         │         │        └── at the barrier, or to be copied first: everything given back, ready again when that is over
//!   │         │         └─────────── waits for its lock, with nothing in its hands
//!   └─────────┴───────────────────── none free: stays at the head of the line
//! ```
//!
//! A read needs buffers only; a flush needs nothing.
//!
//! # What is held while waiting: nothing
//! Buffers, locks and permits are taken together, in one step, and held by I/O in flight only (a lock that was waited for is held
//! until its window starts, which waits for buffers at most). So there is no deadlock, a permit is never held up by
//! anything but the I/O that it is for, and a guest waits for the clusters that it touches or for bytes in flight.
//!
//! # Permits
//! Nothing that changes the disk is given out without a permit for all bytes that it changes, the blocks read and written back
//! included. It is dropped when the last operation of its window has completed, whatever its result.
//!
//! # Discards
//! A guest never waits for a discard. Whatever is in its way (clusters not copied, the barrier, a lock) puts it off: the guest is told that it is done, and
//! it is carried out later, piece by piece, unless the guest writes there first. Never in the poll that has put it off: whoever is about to write there
//! by other means has it forgotten between two polls.
//!
//! # Bounds
//! [`CarrierLimits`] has them. Operations given out at a time: two for each window whose buffers are held, and one for each other request.
//!
//! The parts: [`plan`](self) has the types, `windows` cuts, `locks`, `buffers` and `deferred` are what their names say, `start` lets windows
//! in, `carry` takes their results, `flushes` those of flushes, `errors` finds the words.

mod buffers;
mod carry;
mod deferred;
mod errors;
mod flushes;
mod locks;
mod plan;
mod start;
#[cfg(test)]
mod tests;
mod windows;

use std::collections::{BTreeMap, VecDeque};

use slab::Slab;

use super::asks::Waited;
use crate::error::{Error, Operation};
use crate::piece::{Fault, Piece};
use crate::ring::{BufferRange, Op, Token, ZeroMethod};
use crate::units::{ByteRange, Timestamp};

use buffers::Buffers;
use deferred::DeferredDiscards;
use flushes::Flushes;
use locks::{LockId, Locks};
use windows::{Cutter, Window};

pub use plan::{
    AdmissionHost, Attempt, CarrierBug, CarrierLimits, CarrierPlan, CopyWait, DiscardRule, IoId, IoOutcome,
    IoRequest,
};

/// Place of a request in the table.
type Key = usize;

/// What a request is.
#[derive(Debug)]
enum Body {
    Read(Vec<u8>),
    Write(Vec<u8>),
    Flush,
    Discard,
    Zeroes {
        may_unmap: bool,
        only_fast: bool,
    },
    /// A piece of the discards that were put off. No guest waits for it.
    Deferred,
}

/// Where a request stands.
#[derive(Debug)]
enum Stage<P> {
    /// In the line.
    Ready,
    /// Waits for the lock in `claimed`.
    Locking,
    /// Waits for the barrier to be lowered.
    AtBarrier,
    /// Waits for a copy-before-write of that number.
    Copying(u64),
    /// A window is being carried out.
    Running(Running<P>),
}

/// A window that is being carried out, and what it holds.
#[derive(Debug)]
struct Running<P> {
    window: Window,
    buffer: Option<BufferRange>,
    lock: Option<LockId>,
    permit: Option<P>,
    /// Operations of it that have not completed.
    operations: u32,
    failure: Option<Failure>,
}

/// Why a window failed.
#[derive(Clone, Copy, Debug)]
struct Failure {
    operation: Operation,
    range: ByteRange,
    fault: Fault,
}

#[derive(Debug)]
struct Request<P> {
    /// Who waits for the outcome. `None`: nobody, or nobody any more.
    owner: Option<IoId>,
    body: Body,
    range: ByteRange,
    /// Where the next window starts.
    at: u64,
    /// For how long jobs were asked to copy before the next window.
    waited: Waited,
    /// Whether anything of it was ever started.
    started: bool,
    /// The next window has something to be copied before, and is no wide one.
    narrow: bool,
    /// A lock that was waited for, and the window that it is for.
    claimed: Option<(LockId, Window)>,
    stage: Stage<P>,
}

impl<P> Request<P> {
    fn rest(&self) -> ByteRange {
        ByteRange::between(self.at, self.range.end())
    }

    fn running(&mut self) -> &mut Running<P> {
        match &mut self.stage {
            Stage::Running(running) => running,
            _ => panic!("an operation belongs to a window that is being carried out"),
        }
    }
}

/// What an operation in flight is for.
#[derive(Debug)]
struct Task {
    request: Key,
    doing: Doing,
}

#[derive(Clone, Debug)]
enum Doing {
    /// Reads what the guest asked for.
    Load(Piece),
    /// Reads what a write covers in part.
    Fetch(Piece),
    /// Writes a window.
    Store(Piece),
    /// Changes a range without data; after so many interruptions.
    Zero(ZeroMethod, u32),
    Discard(u32),
    /// The flush of that number.
    Flush(u64),
}

/// How far the discards that were put off have been looked at.
#[derive(Debug)]
struct Background {
    /// Where to look next.
    cursor: u64,
    /// Not before this.
    next_look: Timestamp,
    /// Some were put off in this poll.
    fresh: bool,
    /// A piece is being discarded: this one.
    running: bool,
    piece: ByteRange,
}

/// Guest I/O on one disk. See the module's header. `P`: the permits of its host.
#[derive(Debug)]
pub struct Carrier<P> {
    plan: CarrierPlan,
    cutter: Cutter,
    buffers: Buffers,
    locks: Locks,
    flushes: Flushes,
    requests: Slab<Request<P>>,
    tasks: Slab<Task>,
    /// What can be started, the oldest first.
    ready: VecDeque<Key>,
    barred: Vec<Key>,
    copying: BTreeMap<u64, Key>,
    next_wait: u64,
    /// Operations to give out before anything else is started.
    backlog: VecDeque<(Token, Op)>,
    outcomes: Vec<(IoId, IoOutcome)>,
    deferred: DeferredDiscards,
    background: Background,
    /// Ways of making zeros that the disk was not found to be without.
    can_unmap: bool,
    can_keep: bool,
    can_discard: bool,
    /// Why no request is taken any more.
    dead: Option<Error>,
}

impl<P> Carrier<P> {
    /// A carrier for `plan`, with nothing to do.
    ///
    /// # Panics
    /// If the plan contradicts itself.
    #[must_use]
    pub fn new(plan: CarrierPlan) -> Self {
        let limits = plan.limits;
        let alignment = plan.file.direct_alignment;
        let buffers = Buffers::new(plan.buffers, limits.slot_bytes);
        assert!(
            limits.slot_bytes.is_multiple_of(alignment.unwrap_or(1)),
            "slots of {} bytes hold whole blocks",
            limits.slot_bytes
        );
        assert!(limits.window_bytes <= buffers.capacity(), "the buffers hold a window");
        assert!(
            limits.requests > 0 && limits.steps_a_poll > 0 && limits.discard_checks > 0,
            "limits above 0"
        );
        Self {
            cutter: Cutter::new(plan.length, alignment, limits.window_bytes, limits.wide_window_bytes),
            buffers,
            locks: Locks::default(),
            flushes: Flushes::new(&plan),
            requests: Slab::new(),
            tasks: Slab::new(),
            ready: VecDeque::new(),
            barred: Vec::new(),
            copying: BTreeMap::new(),
            next_wait: 0,
            backlog: VecDeque::new(),
            outcomes: Vec::new(),
            deferred: DeferredDiscards::new(limits.deferred_ranges, limits.deferred_grain),
            background: Background {
                cursor: 0,
                next_look: Timestamp::default(),
                fresh: false,
                running: false,
                piece: ByteRange::new(0, 0),
            },
            can_unmap: true,
            can_keep: true,
            can_discard: true,
            dead: None,
            plan,
        }
    }

    /// Take a request. Its outcome is given by [`Self::take_outcomes`], sooner or later.
    ///
    /// # Panics
    /// If there are too many, or a read's buffer is not as long as its range.
    pub fn submit(&mut self, id: IoId, request: IoRequest) {
        self.submit_part(id, request, Waited::default());
    }

    /// The same of a part of what a guest has asked for, for which so much was spent of the time of jobs before.
    pub(in crate::live) fn submit_part(&mut self, id: IoId, request: IoRequest, waited: Waited) {
        assert!(self.has_room(), "the caller bounds its requests");
        let (body, mut range) = match request {
            IoRequest::Read { range, buffer } => (Body::Read(buffer), range),
            IoRequest::Write { offset, data } => {
                let range = ByteRange::new(offset, data.len() as u64);
                (Body::Write(data), range)
            }
            IoRequest::Flush => (Body::Flush, ByteRange::new(0, 0)),
            IoRequest::Discard { range } => (Body::Discard, range),
            IoRequest::WriteZeroes { range, may_unmap, only_fast } => {
                (Body::Zeroes { may_unmap, only_fast }, range)
            }
        };
        let refusal =
            self.dead.clone().or_else(|| (!self.cutter.holds(range)).then(|| self.beyond(&body, range)));
        if let Some(error) = refusal {
            return self.outcomes.push((id, IoOutcome::new(Err(error))));
        }
        if let Body::Read(buffer) = &body {
            assert_eq!(buffer.len() as u64, range.length, "a read's buffer is as long as its range");
        }
        if matches!(body, Body::Discard) {
            range = self.cutter.inward(range);
        }
        if range.is_empty() && !matches!(body, Body::Flush) {
            return self.outcomes.push((id, IoOutcome::new(Ok(into_buffer(body)))));
        }
        let key = self.requests.insert(Request {
            owner: Some(id),
            body,
            range,
            at: range.offset,
            waited,
            started: false,
            narrow: false,
            claimed: None,
            stage: Stage::Ready,
        });
        self.ready.push_back(key);
    }

    /// The guest of `id` is gone. A request of which nothing was started ends at once, without effect; `false`: it goes on to its
    /// end, or there is none. Either way its outcome is given.
    pub fn cancel(&mut self, id: IoId) -> bool {
        let found = self.requests.iter().find(|(_, request)| request.owner == Some(id));
        let Some((key, request)) = found else { return false };
        if request.started {
            return false;
        }
        self.withdraw(key);
        let error = self.cancelled(key);
        self.finish(key, Err(error));
        true
    }

    /// The copy-before-write that [`AdmissionHost::copy`] was asked for has ended. On an error the guest's request fails with it.
    /// One that nobody waits for any more is passed over.
    pub fn copied(&mut self, wait: CopyWait, result: Result<(), std::sync::Arc<Error>>) {
        let Some(key) = self.copying.remove(&wait.number) else { return };
        let request = &mut self.requests[key];
        request.stage = Stage::Ready;
        request.waited = wait.waited;
        match result {
            Ok(()) => self.ready.push_front(key),
            Err(error) => self.finish(key, Err(std::sync::Arc::unwrap_or_clone(error))),
        }
    }

    /// The barrier is down again: whoever waits at it asks again.
    pub fn barrier_lowered(&mut self) {
        for key in std::mem::take(&mut self.barred).into_iter().rev() {
            self.requests[key].stage = Stage::Ready;
            self.ready.push_front(key);
        }
    }

    /// The end: every request fails with `error`, now and from now on. What is in flight keeps its buffers, lock and permit until it
    /// completes, and leads to nothing more. Discards that were put off are forgotten.
    pub fn fail_all(&mut self, error: &Error) {
        self.dead = Some(error.clone());
        self.deferred.clear();
        let keys: Vec<Key> = self.requests.iter().map(|(key, _)| key).collect();
        for key in keys {
            if matches!(self.requests[key].stage, Stage::Running(_)) {
                self.tell(key, Err(error.clone()));
            } else {
                self.withdraw(key);
                self.finish(key, Err(error.clone()));
            }
        }
        // What was not given out yet never is.
        for (token, _) in std::mem::take(&mut self.backlog) {
            let task = self.tasks.remove(token_index(token));
            self.failed(&task, Fault::Errno(nix::errno::Errno::ECANCELED));
        }
    }

    /// What has ended since the last call.
    pub fn take_outcomes(&mut self) -> Vec<(IoId, IoOutcome)> {
        std::mem::take(&mut self.outcomes)
    }

    /// Whether no request is under way, nothing is in flight and no outcome is left to take. Discards may still be put off: see
    /// [`Self::deferred_bytes`].
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let idle = self.requests.is_empty() && self.outcomes.is_empty();
        debug_assert!(
            !self.requests.is_empty()
                || (self.locks.is_empty() && self.buffers.all_free() && self.tasks.is_empty()),
            "an idle carrier holds nothing"
        );
        idle
    }

    /// Requests whose outcome is not decided yet.
    #[must_use]
    pub fn requests_under_way(&self) -> usize {
        self.requests.len() - usize::from(self.background.running)
    }

    /// Whether one more request may be submitted. Those that wait for a copy or at the barrier hold nothing and are in nobody's way: they take no room.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let waiting = self.copying.len() + self.barred.len();
        self.requests_under_way() - waiting < self.plan.limits.requests
    }

    /// Bytes of discards that were put off and not carried out yet.
    #[must_use]
    pub fn deferred_bytes(&self) -> u64 {
        self.deferred.bytes()
    }

    /// Whether discards were put off that are not over yet.
    #[must_use]
    pub fn has_discards_put_off(&self) -> bool {
        self.background.running || !self.deferred.is_empty()
    }

    /// A guest is about to change `range` by other means: discards put off are not to be carried out there any more. `false`: one is
    /// just being carried out there; ask again after the next completion.
    pub fn forget_discards(&mut self, range: ByteRange) -> bool {
        let end = range.checked_end().unwrap_or(u64::MAX).min(self.plan.length.0);
        if range.offset >= end {
            return true;
        }
        let range = ByteRange::between(range.offset, end);
        self.deferred.remove(self.cutter.outward(range));
        !(self.background.running && self.background.piece.intersection(range).is_some())
    }

    /// Ranges of discards that were given up because there were too many.
    #[must_use]
    pub fn discards_forgotten(&self) -> u64 {
        self.deferred.forgotten()
    }

    /// When to call [`Self::poll`] again although nothing has happened.
    #[must_use]
    pub fn next_deadline(&self, now: Timestamp) -> Option<Timestamp> {
        let looks = !self.deferred.is_empty() && !self.background.running;
        // One that is due already waits for room, which comes with a completion.
        let due = self.background.next_look;
        looks.then(|| if due > now { due } else { now.after(self.plan.limits.discard_pause) })
    }

    /// Take a request that is not running out of wherever it waits.
    fn withdraw(&mut self, key: Key) {
        match &self.requests[key].stage {
            Stage::Ready => self.ready.retain(|&other| other != key),
            Stage::AtBarrier => self.barred.retain(|&other| other != key),
            Stage::Copying(number) => {
                self.copying.remove(number);
            }
            Stage::Locking => {}
            Stage::Running(_) => unreachable!("what is in flight is not withdrawn"),
        }
        if let Some((lock, _)) = self.requests[key].claimed.take() {
            self.unlock(lock);
        }
    }

    /// End a request that holds nothing any more.
    fn finish(&mut self, key: Key, result: Result<(), Error>) {
        self.tell(key, result);
        self.requests.remove(key);
    }

    /// Give the outcome to whoever waits for it, if anybody does.
    fn tell(&mut self, key: Key, result: Result<(), Error>) {
        let request = &mut self.requests[key];
        let Some(id) = request.owner.take() else { return };
        let result = match result {
            Ok(()) => Ok(into_buffer(std::mem::replace(&mut request.body, Body::Flush))),
            Err(error) => Err(error),
        };
        let waited = std::mem::take(&mut request.waited);
        self.outcomes.push((id, IoOutcome { result, waited }));
    }

    /// End a lock, and let those in that waited for it.
    fn unlock(&mut self, lock: LockId) {
        for key in self.locks.release(lock).into_iter().rev() {
            self.requests[key].stage = Stage::Ready;
            self.ready.push_front(key);
        }
    }
}

fn token_index(token: Token) -> usize {
    usize::try_from(token.0).expect("our own token")
}

/// The guest's buffer, to be given back.
fn into_buffer(body: Body) -> Vec<u8> {
    match body {
        Body::Read(buffer) | Body::Write(buffer) => buffer,
        Body::Flush | Body::Discard | Body::Zeroes { .. } | Body::Deferred => Vec::new(),
    }
}
