//! One who writes by himself and does not block his thread for it: a future, or a callback.
//!
//! # Model
//! What is to be waited for is `own_write`'s to say. This waits: for the barrier by a waiter at the gate, for the ring thread by a question. It asks at a
//! [`Desk`], which is a live disk's handle, or that of a simulated one: so the simulation runs this very code, polled when it likes.
//!
//! # Going away
//! A future that is dropped takes its waiter from the gate, and leaves word that its copies are not wanted. A callback's steps own all that
//! they need, and run to their end on whatever thread comes with the answer: the ring thread, mostly.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use parking_lot::Mutex;

use super::admission::{Attempt, Permit, attempt_unnested};
use super::ask::{Answer, Asked, ask, ask_noting, ask_with};
use super::asks::{Copied, Waited, Wish};
use super::disk::DiskShared;
use super::gate::WaitTicket;
use super::own_write::{OwnWrite, Step, Writer};
use crate::error::Error;
use crate::interval_set::{Cancellation, Waiter};
use crate::units::ByteRange;

/// Where one who writes by himself asks.
pub(super) trait Desk: Clone + Send + 'static {
    /// His disk.
    fn shared(&self) -> &Arc<DiskShared>;

    /// See [`super::command::Command::ForgetDiscards`].
    fn forget(&self, range: ByteRange, writer: Weak<Writer>, answer: Answer<Result<(), Arc<Error>>>);

    /// See [`super::command::Command::Copy`].
    fn copy(&self, wish: Wish, waited: Waited, answer: Answer<Copied>);

    /// Set when one goes who waits for a copy.
    fn left(&self) -> &Arc<AtomicBool>;

    /// Try to get a permit, whatever permits are out.
    fn attempt(&self, range: ByteRange) -> Attempt {
        attempt_unnested(self.shared().gate(), self.shared().jobs(), range)
    }
}

/// What a future waits for.
enum Waits {
    No,
    Barrier(WaitTicket),
    Forgotten(Asked<Result<(), Arc<Error>>>),
    Copied(Asked<Copied>),
}

/// A permit to come.
pub(super) struct Begin<D: Desk> {
    desk: D,
    write: OwnWrite,
    waits: Waits,
}

impl<D: Desk> Begin<D> {
    pub(super) fn new(desk: D, write: OwnWrite) -> Self {
        Self { desk, write, waits: Waits::No }
    }

    /// See [`Future::poll`].
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Permit, Error>> {
        loop {
            match std::mem::replace(&mut self.waits, Waits::No) {
                Waits::No => {}
                Waits::Barrier(ticket) => self.leave_barrier(ticket),
                Waits::Forgotten(mut asked) => match Pin::new(&mut asked).poll(context) {
                    Poll::Pending => {
                        self.waits = Waits::Forgotten(asked);
                        return Poll::Pending;
                    }
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Error::clone(&error))),
                },
                Waits::Copied(mut asked) => match Pin::new(&mut asked).poll(context) {
                    Poll::Pending => {
                        self.waits = Waits::Copied(asked);
                        return Poll::Pending;
                    }
                    Poll::Ready(copied) => {
                        if let Err(error) = self.write.copied(copied) {
                            return Poll::Ready(Err(error));
                        }
                    }
                },
            }
            match self.write.next(self.desk.shared(), |range| self.desk.attempt(range)) {
                Step::Granted(permit) => return Poll::Ready(Ok(permit)),
                Step::AtBarrier => {
                    let waiter = Waiter::task(context.waker().clone());
                    if let Ok(ticket) = self.desk.shared().gate().wait(waiter) {
                        self.waits = Waits::Barrier(ticket);
                        return Poll::Pending;
                    }
                }
                Step::Forget(writer) => {
                    let (answer, asked) = ask();
                    self.desk.forget(self.write.range, writer, answer);
                    self.waits = Waits::Forgotten(asked);
                }
                Step::Copy(wish, waited) => {
                    let (answer, asked) = ask_noting(self.desk.left());
                    self.desk.copy(wish, waited, answer);
                    self.waits = Waits::Copied(asked);
                }
            }
        }
    }

    /// Woken or not: a look costs little.
    fn leave_barrier(&self, ticket: WaitTicket) {
        let (Cancellation::Removed | Cancellation::AlreadyWoken) = self.desk.shared().gate().cancel(ticket);
    }
}

impl<D: Desk> Drop for Begin<D> {
    fn drop(&mut self) {
        if let Waits::Barrier(ticket) = std::mem::replace(&mut self.waits, Waits::No) {
            self.leave_barrier(ticket);
        }
    }
}

/// Who is told; behind a lock because a waiter that is not needed is handed back whole.
type PermitCall = Arc<Mutex<Option<Box<dyn FnOnce(Result<Permit, Error>) + Send>>>>;

/// Get a permit for `write`, if that may be, and tell `call`.
pub(super) fn begin_with<D: Desk>(
    desk: D,
    write: Result<OwnWrite, Error>,
    call: impl FnOnce(Result<Permit, Error>) + Send + 'static,
) {
    let call: PermitCall = Arc::new(Mutex::new(Some(Box::new(call))));
    match write {
        Ok(write) => step(desk, write, call),
        Err(error) => finish(&call, Err(error)),
    }
}

fn finish(call: &PermitCall, result: Result<Permit, Error>) {
    let call = call.lock().take();
    if let Some(call) = call {
        crate::foreign::call("a callback", || call(result));
    }
}

/// Go as far as there is nothing to wait for.
fn step<D: Desk>(desk: D, mut write: OwnWrite, call: PermitCall) {
    loop {
        let next = write.next(desk.shared(), |range| desk.attempt(range));
        let (again, theirs) = (desk.clone(), Arc::clone(&call));
        match next {
            Step::Granted(permit) => return finish(&call, Ok(permit)),
            Step::AtBarrier => {
                let same = write.clone();
                let waiter = Waiter::callback(move || step(again, same, theirs));
                if desk.shared().gate().wait(waiter).is_ok() {
                    return;
                }
            }
            Step::Forget(writer) => {
                let range = write.range;
                let answer = ask_with(move |forgotten: Result<(), Arc<Error>>| match forgotten {
                    Ok(()) => step(again, write, theirs),
                    Err(error) => finish(&theirs, Err(Error::clone(&error))),
                });
                return desk.forget(range, writer, answer);
            }
            Step::Copy(wish, waited) => {
                let answer = ask_with(move |copied: Copied| match write.copied(copied) {
                    Ok(()) => step(again, write, theirs),
                    Err(error) => finish(&theirs, Err(error)),
                });
                return desk.copy(wish, waited, answer);
            }
        }
    }
}
