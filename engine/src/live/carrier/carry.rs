//! Carrying windows through: what a completion leads to.

use nix::errno::Errno;

use super::{Body, Carrier, CarrierBug, Doing, Failure, Key, Stage, Task, token_index};
use crate::error::Operation;
use crate::piece::{Fault, Step};
use crate::ring::{Arena, Completion, Op, ZeroMethod};
use crate::units::Timestamp;

/// Interruptions of an operation without data before it counts as failed.
const MAX_INTERRUPTIONS: u32 = 16;

impl<P> Carrier<P> {
    /// Take in a completion. `arena` is the ring's.
    ///
    /// # Panics
    /// If nothing is in flight under its token.
    pub fn on_completion(&mut self, completion: Completion, arena: &mut Arena, _now: Timestamp) {
        let mut task = self.tasks.remove(token_index(completion.token));
        match (&mut task.doing, completion.result) {
            (Doing::Load(piece) | Doing::Fetch(piece) | Doing::Store(piece), result) => {
                match piece.on_result(result, &self.plan.file) {
                    Step::Finished => self.succeeded(&task, arena),
                    Step::Again => self.again(task),
                    Step::Failed(fault) => self.failed(&task, fault),
                }
            }
            // A flush is never tried again: what the first did not bring there, a second does not tell of.
            (Doing::Flush(_), result) => self.on_flushed(&task, result.map(drop)),
            (Doing::Zero(_, count) | Doing::Discard(count), Err(errno))
                if *count < MAX_INTERRUPTIONS && is_passing(errno) =>
            {
                *count += 1;
                self.again(task);
            }
            (Doing::Zero(method, _), Err(Errno::EOPNOTSUPP)) => {
                match method {
                    ZeroMethod::Unmap => self.can_unmap = false,
                    ZeroMethod::Keep => self.can_keep = false,
                }
                self.start_over(task.request);
            }
            (Doing::Discard(_), Err(Errno::EOPNOTSUPP)) => {
                self.can_discard = false;
                self.deferred.clear();
                self.succeeded(&task, arena);
            }
            (_, Err(errno)) => self.failed(&task, Fault::Errno(errno)),
            (_, Ok(_)) => self.succeeded(&task, arena),
        }
    }

    /// Go on with an operation that has not done everything.
    fn again(&mut self, task: Task) {
        if self.dead.is_some() {
            return self.failed(&task, Fault::Errno(Errno::ECANCELED));
        }
        let running = self.requests[task.request].running();
        running.operations -= 1;
        let (file, range) = (self.plan.file.file, running.window.cover);
        let op = match &task.doing {
            Doing::Load(piece) | Doing::Fetch(piece) | Doing::Store(piece) => piece.op(&self.plan.file),
            Doing::Zero(method, _) => Op::WriteZeroes { file, range, method: *method },
            Doing::Discard(_) => Op::Discard { file, range },
            Doing::Flush(_) => unreachable!("a flush is not tried again"),
        };
        self.give_out(task.request, task.doing, op);
    }

    /// An operation did everything: the next step of its window, once all of this one are over.
    fn succeeded(&mut self, task: &Task, arena: &mut Arena) {
        let key = task.request;
        let request = &mut self.requests[key];
        let running = request.running();
        running.operations -= 1;
        if running.operations > 0 {
            return;
        }
        if self.dead.is_some() || running.failure.is_some() {
            return self.end_window(key);
        }
        match task.doing {
            Doing::Fetch(_) => self.store(key, arena),
            Doing::Load(_) => {
                let range = running.window.range;
                let from = request.part_of(range);
                let to = request.data_of(range);
                let Body::Read(buffer) = &mut request.body else { unreachable!("only reads load") };
                buffer[to].copy_from_slice(arena.slice(from));
                self.end_window(key);
            }
            Doing::Store(_) | Doing::Zero(..) | Doing::Discard(_) => self.end_window(key),
            Doing::Flush(_) => unreachable!("a flush has its own way"),
        }
    }

    /// An operation failed for good: so does its window, once all its operations are over.
    pub(super) fn failed(&mut self, task: &Task, fault: Fault) {
        let key = task.request;
        let request = &mut self.requests[key];
        let own = request.body.operation();
        let running = request.running();
        let window = running.window;
        let (operation, range) = match &task.doing {
            Doing::Load(_) | Doing::Store(_) => (own, window.range),
            Doing::Fetch(piece) => (Operation::Read, piece.range()),
            Doing::Zero(..) | Doing::Discard(_) | Doing::Flush(_) => (own, window.cover),
        };
        let believed = operation == Operation::Write && self.plan.has_bug(CarrierBug::FailedWriteIsDone);
        if !believed {
            running.failure.get_or_insert(Failure { operation, range, fault });
        }
        running.operations -= 1;
        if running.operations == 0 {
            self.end_window(key);
        }
        self.flush_over(task);
    }

    /// The disk cannot do it in this way: the same bytes again in another.
    fn start_over(&mut self, key: Key) {
        self.requests[key].running().operations -= 1;
        if self.dead.is_some() {
            return self.end_window(key);
        }
        self.let_go(key);
        self.ready.push_front(key);
    }

    /// Give back all that a window holds. Gives how far it went, and what went wrong.
    fn let_go(&mut self, key: Key) -> (u64, Option<Failure>) {
        let stage = std::mem::replace(&mut self.requests[key].stage, Stage::Ready);
        let Stage::Running(running) = stage else { unreachable!("a window that is carried out") };
        assert_eq!(running.operations, 0, "nothing of it is in flight");
        self.give_back(running.buffer);
        drop(running.permit);
        if let Some(lock) = running.lock {
            self.unlock(lock);
        }
        (running.window.range.end(), running.failure)
    }

    /// A window is over: on to the next, or to the request's end.
    pub(super) fn end_window(&mut self, key: Key) {
        let (end, failure) = self.let_go(key);
        let request = &mut self.requests[key];
        request.at = end;
        request.narrow = false;
        let over = end == request.range.end() || self.dead.is_some();
        let deferred = matches!(request.body, Body::Deferred);
        if let Some(failure) = failure {
            let error = self.error_of(failure);
            if deferred {
                // Whoever asked for it was told long ago; its space stays taken, which is all.
                tracing::warn!(%error, "discard given up");
            }
            self.finish(key, Err(error));
        } else if over {
            self.finish(key, Ok(()));
        } else {
            self.ready.push_back(key);
        }
        if deferred {
            self.background.running = false;
            self.background.next_look = Timestamp::default();
        }
    }
}

/// Whether an operation that ended so may succeed when tried again.
fn is_passing(errno: Errno) -> bool {
    matches!(errno, Errno::EAGAIN | Errno::EINTR | Errno::ECANCELED)
}
