//! Letting windows in: what can be started now is given its buffers, its lock and its permit, in one step, and goes.

use super::super::asks::Waited;
use super::locks::Footprint;
use super::windows::{Act, Window};
use super::{
    AdmissionHost, Attempt, Body, Carrier, CarrierBug, CopyWait, Doing, Key, Request, Running, Stage, Task,
};
use crate::piece::{Direction, Piece};
use crate::ring::{Arena, BufferRange, Op, Token, ZeroMethod};
use crate::units::{ByteRange, Timestamp};

/// Whether others may be started after one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Yes.
    Next,
    /// It stays at the head of the line until buffers are given back, lest larger ones behind smaller ones starve.
    Starved,
}

impl<P> Carrier<P> {
    /// Do what can be done at `now`, and give at most `room` operations to push. `true`: there is more to do at once.
    pub fn poll(
        &mut self,
        now: Timestamp,
        room: usize,
        arena: &mut Arena,
        host: &mut dyn AdmissionHost<Permit = P>,
        out: &mut Vec<(Token, Op)>,
    ) -> bool {
        self.background.fresh = false;
        let most = self.plan.limits.steps_a_poll;
        let full = out.len() + room.min(most);
        for _ in 0..most {
            self.give_backlog(full, out);
            if out.len() >= full {
                break;
            }
            match self.ready.pop_front() {
                Some(key) if self.start(key, arena, host) == Turn::Starved => return false,
                Some(_) => {}
                // Guests come first.
                None if self.discard_deferred(now, host) => {}
                None => return false,
            }
        }
        self.give_backlog(full, out);
        // Without room there is more to do once something completes, not at once.
        let room_left = out.len() < full || room > most;
        room_left && !(self.backlog.is_empty() && self.ready.is_empty())
    }

    fn give_backlog(&mut self, full: usize, out: &mut Vec<(Token, Op)>) {
        let count = self.backlog.len().min(full - out.len());
        out.extend(self.backlog.drain(..count));
    }

    /// Start the next window of a request that was ready, or have it wait for what it lacks.
    fn start(&mut self, key: Key, arena: &mut Arena, host: &mut dyn AdmissionHost<Permit = P>) -> Turn {
        if matches!(self.requests[key].body, Body::Discard) {
            self.start_discard(key, host);
            return Turn::Next;
        }
        if matches!(self.requests[key].body, Body::Flush)
            && let Some(error) = self.flushes.failed().cloned()
        {
            self.finish(key, Err(error));
            return Turn::Next;
        }
        if let Body::Zeroes { may_unmap, only_fast: true } = self.requests[key].body
            && self.zero_method(may_unmap, true).is_none()
        {
            let error = self.not_fast(key);
            self.finish(key, Err(error));
            return Turn::Next;
        }
        let (lock, window) = match self.requests[key].claimed.take() {
            Some((lock, window)) => (Some(lock), window),
            None => (None, self.cut(&self.requests[key], host)),
        };
        let bytes = self.cutter.buffer_bytes(&window);
        let buffer = (bytes > 0).then(|| self.buffers.take(bytes));
        if buffer == Some(None) {
            self.requests[key].claimed = lock.map(|lock| (lock, window));
            self.ready.push_front(key);
            return Turn::Starved;
        }
        let mut running =
            Running { window, buffer: buffer.flatten(), lock, permit: None, operations: 0, failure: None };
        if window.modifies() && !self.admit(key, &mut running, host) {
            return Turn::Next;
        }
        self.launch(key, running, arena);
        Turn::Next
    }

    /// The next window of `request`.
    fn cut(&self, request: &Request<P>, host: &mut dyn AdmissionHost<Permit = P>) -> Window {
        let rest = request.rest();
        match request.body {
            Body::Read(_) => self.cutter.data(Act::Read, rest),
            Body::Write(_) => self.cutter.data(Act::Write, rest),
            Body::Flush => Window::FLUSH,
            Body::Discard | Body::Deferred => unreachable!("discards are cut where they are started"),
            Body::Zeroes { may_unmap, only_fast } => {
                self.cutter.zeroes(rest, self.zero_method(may_unmap, only_fast), |range| {
                    !request.narrow && host.discards(range).now == Some(range)
                })
            }
        }
    }

    fn zero_method(&self, may_unmap: bool, only_fast: bool) -> Option<ZeroMethod> {
        if may_unmap && self.can_unmap {
            return Some(ZeroMethod::Unmap);
        }
        let fast_enough = self.plan.keep_is_fast || !only_fast;
        (self.can_keep && fast_enough).then_some(ZeroMethod::Keep)
    }

    /// Lock what `running` changes and get its permit. `false`: the request waits for one of them, and holds nothing.
    fn admit(
        &mut self,
        key: Key,
        running: &mut Running<P>,
        host: &mut dyn AdmissionHost<Permit = P>,
    ) -> bool {
        let window = running.window;
        let (lock, held) = match running.lock {
            Some(lock) => (lock, true),
            None => self.locks.acquire(self.footprint(&window), key),
        };
        if !held {
            self.give_back(running.buffer);
            let request = &mut self.requests[key];
            request.claimed = Some((lock, window));
            request.stage = Stage::Locking;
            return false;
        }
        let without = self.plan.has_bug(CarrierBug::PermitWithoutBlocks);
        let stage = match host.attempt(if without { window.range } else { window.cover }) {
            Attempt::Granted(permit) => {
                running.lock = Some(lock);
                running.permit = Some(permit).filter(|_| !self.plan.has_bug(CarrierBug::PermitDroppedEarly));
                return true;
            }
            Attempt::AtBarrier => {
                self.barred.push(key);
                Stage::AtBarrier
            }
            // A job has started since it was cut: what a guest waits for at a time stays small.
            Attempt::Copy(..) if window.cover.length > self.plan.limits.window_bytes => {
                self.requests[key].narrow = true;
                self.ready.push_front(key);
                Stage::Ready
            }
            Attempt::Copy(job, clusters) => {
                let number = self.next_wait;
                let waited = std::mem::take(&mut self.requests[key].waited);
                self.next_wait += 1;
                self.copying.insert(number, key);
                host.copy(job, clusters, window.cover, CopyWait { number, waited });
                Stage::Copying(number)
            }
        };
        self.requests[key].stage = stage;
        self.give_back(running.buffer);
        self.unlock(lock);
        false
    }

    /// What `window` locks.
    fn footprint(&self, window: &Window) -> Footprint {
        let mut footprint = self.cutter.footprint(window);
        let bug = match window.act {
            Act::Discard => CarrierBug::DiscardNotLocked,
            _ => CarrierBug::BlocksNotLocked,
        };
        if self.plan.has_bug(bug) {
            footprint.range.length = 0;
            footprint.exclusive = [footprint.range; 2];
        }
        footprint
    }

    pub(super) fn give_back(&mut self, buffer: Option<BufferRange>) {
        if let Some(buffer) = buffer {
            self.buffers.give_back(buffer);
        }
    }

    /// Give out the first operations of a window that holds all that it needs.
    fn launch(&mut self, key: Key, running: Running<P>, arena: &mut Arena) {
        let window = running.window;
        let request = &mut self.requests[key];
        request.started = true;
        request.stage = Stage::Running(running);
        if window.modifies() && !self.plan.has_bug(CarrierBug::DiscardAfterWrite) {
            // The guest changes it after the discards that it was told are done: they must not come later.
            self.deferred.remove(self.cutter.outward(window.range));
        }
        let file = self.plan.file.file;
        match window.act {
            Act::Read => {
                // Rounded up to whole blocks by the piece itself.
                let range = ByteRange::between(window.cover.offset, window.range.end());
                self.move_bytes(key, Direction::Read, range, Doing::Load);
            }
            Act::Write => {
                let blind = self.plan.has_bug(CarrierBug::BlocksNotRead);
                let fetches = self.cutter.fetches(&window);
                for &range in fetches.iter().filter(|range| !range.is_empty() && !blind) {
                    self.move_bytes(key, Direction::Read, range, Doing::Fetch);
                }
                if self.requests[key].running().operations == 0 {
                    self.store(key, arena);
                }
            }
            Act::Zero(method) => {
                if !self.plan.has_bug(CarrierBug::FlushBelievedAgain) {
                    self.flushes.zeroing(window.cover);
                }
                let op = Op::WriteZeroes { file, range: window.cover, method };
                self.give_out(key, Doing::Zero(method, 0), op);
            }
            Act::Discard => unreachable!("discards do not stand in the line"),
            Act::Flush => {
                let doing = Doing::Flush(self.flushes.begin());
                self.give_out(key, doing, Op::Flush { file });
            }
        }
    }

    /// Put the guest's bytes in the buffer of a write, whose other bytes are there, and write it.
    pub(super) fn store(&mut self, key: Key, arena: &mut Arena) {
        let request = &mut self.requests[key];
        let Window { range, cover, .. } = request.running().window;
        let part = request.part_of(range);
        let bytes = arena.slice_mut(part);
        match &request.body {
            Body::Write(data) => bytes.copy_from_slice(&data[request.data_of(range)]),
            Body::Zeroes { .. } => bytes.fill(0),
            other => unreachable!("written as data: {other:?}"),
        }
        self.move_bytes(key, Direction::Write, cover, Doing::Store);
    }

    fn move_bytes(&mut self, key: Key, direction: Direction, range: ByteRange, doing: fn(Piece) -> Doing) {
        let part = self.requests[key].part_of(range);
        let piece = Piece::new(direction, range, part.start);
        let op = piece.op(&self.plan.file);
        self.give_out(key, doing(piece), op);
    }

    /// Give out an operation of a window.
    pub(super) fn give_out(&mut self, key: Key, doing: Doing, op: Op) {
        self.requests[key].running().operations += 1;
        let token = Token(self.tasks.insert(Task { request: key, doing }) as u64);
        self.backlog.push_back((token, op));
    }

    /// Discard now what can be, and put off the rest.
    fn start_discard(&mut self, key: Key, host: &mut dyn AdmissionHost<Permit = P>) {
        let rest = self.requests[key].rest();
        if !self.can_discard {
            return self.finish(key, Ok(()));
        }
        let window = self.cutter.discard(rest);
        let free = host.discards(window.cover).now == Some(window.cover);
        if !free || !self.try_discard(key, window, host) {
            self.deferred.insert(rest);
            self.background.fresh = true;
            self.finish(key, Ok(()));
        }
    }

    /// Give out a discard if nothing at all is in its way.
    fn try_discard(&mut self, key: Key, window: Window, host: &mut dyn AdmissionHost<Permit = P>) -> bool {
        let Some(lock) = self.locks.try_acquire(self.footprint(&window), key) else {
            return false;
        };
        let Attempt::Granted(permit) = host.attempt(window.cover) else {
            self.unlock(lock);
            return false;
        };
        let request = &mut self.requests[key];
        request.started = true;
        let (lock, permit) = (Some(lock), Some(permit));
        request.stage =
            Stage::Running(Running { window, buffer: None, lock, permit, operations: 0, failure: None });
        self.deferred.remove(window.cover);
        let op = Op::Discard { file: self.plan.file.file, range: window.cover };
        self.give_out(key, Doing::Discard(0), op);
        true
    }

    /// Look at discards that were put off, and carry one out that can be by now. `false`: none, for the time being.
    fn discard_deferred(&mut self, now: Timestamp, host: &mut dyn AdmissionHost<Permit = P>) -> bool {
        let idle = self.background.running || self.deferred.is_empty() || self.background.next_look > now;
        if idle || self.background.fresh || self.dead.is_some() {
            return false;
        }
        for _ in 0..self.plan.limits.discard_checks {
            let Some(piece) = self.deferred.next(self.background.cursor, self.cutter.widest()) else {
                self.background.cursor = 0;
                break;
            };
            let free = host.discards(piece).now.and_then(|free| free.intersection(piece));
            let range = free.map_or(ByteRange::new(piece.offset, 0), |free| self.cutter.inward(free));
            if range.is_empty() {
                self.background.cursor = piece.end();
                continue;
            }
            self.background.cursor = range.end();
            let key = self.requests.insert(Request {
                owner: None,
                body: Body::Deferred,
                range,
                at: range.offset,
                waited: Waited::default(),
                started: false,
                narrow: false,
                claimed: None,
                stage: Stage::Ready,
            });
            if self.try_discard(key, self.cutter.discard(range), host) {
                self.background.running = true;
                self.background.piece = range;
                return true;
            }
            self.requests.remove(key);
        }
        self.background.next_look = now.after(self.plan.limits.discard_pause);
        false
    }
}

impl<P> Request<P> {
    /// Where the bytes `range` of the window that is being carried out lie in the arena.
    pub(super) fn part_of(&mut self, range: ByteRange) -> BufferRange {
        let running = self.running();
        let skip = u32::try_from(range.offset - running.window.cover.offset).expect("within the arena");
        let length = u32::try_from(range.length).expect("within the arena");
        running.buffer.expect("a window with data has a buffer").part(skip, length)
    }

    /// Where the bytes `range` lie in the guest's buffer.
    pub(super) fn data_of(&self, range: ByteRange) -> std::ops::Range<usize> {
        let skip = usize::try_from(range.offset - self.range.offset).expect("within the guest's buffer");
        skip..skip + usize::try_from(range.length).expect("within the guest's buffer")
    }
}
