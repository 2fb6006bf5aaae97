//! A live disk as its users have it: permits for those who write by themselves, requests for those who let the engine do it.
//!
//! Every call is there in three forms: blocking, with a callback (called on the ring thread, so it must be quick), and as a future
//! that needs no runtime. Any number of threads may call; whatever is dropped at whatever time harms nothing: a request under way
//! owns its buffer and its permit.

use std::fmt;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;

use super::DiskId;
use super::admission::{Attempt, Permit, attempt, attempt_unnested};
use super::ask::{Answer, Asked, ask, ask_with};
use super::carrier::{IoOutcome, IoRequest};
use super::command::{Command, Inbox};
use super::gate::{Gate, WaitTicket};
use super::jobs::JobList;
use crate::error::{Error, Operation, Refusal};
use crate::interval_set::{Cancellation, Waiter};
use crate::ring::Wake;
use crate::storage::{OpenedSource, Storage};
use crate::units::{ByteRange, Length};

/// What guest threads and the ring thread share of a disk.
pub(super) struct DiskShared {
    id: DiskId,
    name: Arc<str>,
    length: Length,
    gate: Arc<Gate>,
    jobs: JobList,
}

impl DiskShared {
    pub(super) fn new(id: DiskId, name: Arc<str>, length: Length, waker: Arc<dyn Wake>) -> Arc<Self> {
        Arc::new(Self { id, name, length, gate: Gate::new(waker), jobs: JobList::new() })
    }

    pub(super) fn id(&self) -> DiskId {
        self.id
    }

    pub(super) fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    pub(super) fn length(&self) -> Length {
        self.length
    }

    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }

    pub(super) fn jobs(&self) -> &JobList {
        &self.jobs
    }
}

/// The storages of an engine that is no simulation.
pub(super) type File = Arc<dyn Storage>;

/// Where commands for the ring thread of such an engine are left.
pub(super) type LiveInbox = Inbox<File, OwnedFd>;

pub(super) struct Inner {
    pub(super) shared: Arc<DiskShared>,
    pub(super) inbox: Arc<LiveInbox>,
    pub(super) source: OpenedSource,
    pub(super) writable: bool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.inbox.send(Command::RemoveDisk { disk: self.shared.id });
    }
}

/// A disk that may be written to while it is copied. Cheap to clone; it leaves the engine with its last clone, once its jobs and requests
/// have ended.
#[derive(Clone)]
pub struct LiveDisk {
    pub(super) inner: Arc<Inner>,
}

impl fmt::Debug for LiveDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveDisk").field("name", &self.inner.shared.name).finish_non_exhaustive()
    }
}

impl LiveDisk {
    /// How messages name it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.shared.name
    }

    /// Its length in bytes; it does not change.
    #[must_use]
    pub fn length(&self) -> Length {
        self.inner.shared.length
    }

    /// Whether it was opened so that the engine carries writes to it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.inner.writable
    }

    /// Before a write of one's own to `range`: waits until its old contents are copied by every job that needs them, and returns the permit to
    /// hold until the write is on the disk. Where they are copied already, or there is no job, this takes no lock and wakes nobody.
    ///
    /// A thread that holds a permit already is let through the barrier of a job that starts, so permits may nest in a thread.
    ///
    /// # Errors
    /// When the old contents cannot be copied and the job's choice is to break the guest's write. Nothing may be written then.
    #[inline]
    pub fn begin_write(&self, range: ByteRange) -> Result<Permit, Error> {
        let shared = &*self.inner.shared;
        match attempt(&shared.gate, &shared.jobs, range) {
            Attempt::Granted(permit) => Ok(permit),
            other => self.begin_write_slowly(range, other),
        }
    }

    #[cold]
    fn begin_write_slowly(&self, range: ByteRange, mut found: Attempt) -> Result<Permit, Error> {
        let shared = &*self.inner.shared;
        loop {
            match found {
                Attempt::Granted(permit) => return Ok(permit),
                Attempt::AtBarrier => {
                    let lowered = shared.gate.wait_blocking(None);
                    debug_assert!(lowered, "there is no timeout");
                }
                Attempt::Copy(job, clusters) => {
                    let asked = self.inner.inbox.ask_copy(job, clusters);
                    asked.wait().map_err(|error| Error::clone(&error))?;
                }
            }
            found = attempt(&shared.gate, &shared.jobs, range);
        }
    }

    /// As [`Self::begin_write`], as a future.
    pub fn begin_write_async(&self, range: ByteRange) -> BeginWrite {
        BeginWrite { disk: self.clone(), range, waits: Waits::No }
    }

    /// As [`Self::begin_write`], with a callback: at once on this thread where nothing is to be waited for, else on the ring thread.
    pub fn begin_write_with(
        &self,
        range: ByteRange,
        call: impl FnOnce(Result<Permit, Error>) + Send + 'static,
    ) {
        step(self.clone(), range, Arc::new(Mutex::new(Some(Box::new(call)))));
    }

    /// Read `length` bytes from `offset` on.
    ///
    /// # Errors
    /// The disk's, a range beyond its end, or that of an engine that is gone.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        self.submit(read(offset, length)).wait().result
    }

    /// Write `data` at `offset`, after its old contents are copied.
    ///
    /// # Errors
    /// As [`Self::read`], and as [`Self::begin_write`].
    pub fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), Error> {
        self.submit(IoRequest::Write { offset, data }).wait().result.map(drop)
    }

    /// Bring every write that has completed to stable storage.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn flush(&self) -> Result<(), Error> {
        self.submit(IoRequest::Flush).wait().result.map(drop)
    }

    /// Say that `range` is not needed any more; what it reads as afterwards is undefined. Where old contents are still to be copied
    /// it is remembered and carried out later, so this never waits for a copy.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn discard(&self, range: ByteRange) -> Result<(), Error> {
        self.submit(IoRequest::Discard { range }).wait().result.map(drop)
    }

    /// Make `range` read as zeros; `may_unmap`: its space may be given back.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), Error> {
        self.submit(IoRequest::WriteZeroes { range, may_unmap, only_fast: false }).wait().result.map(drop)
    }

    /// Any of the requests above as a future.
    pub fn request(&self, request: IoRequest) -> Io {
        Io(self.submit(request))
    }

    /// Any of the requests above with a callback, called on the ring thread.
    pub fn request_with(
        &self,
        request: IoRequest,
        call: impl FnOnce(Result<Vec<u8>, Error>) + Send + 'static,
    ) {
        self.send(request, ask_with(move |outcome: IoOutcome| call(outcome.result)));
    }

    fn submit(&self, request: IoRequest) -> Asked<IoOutcome> {
        let (answer, asked) = ask();
        self.send(request, answer);
        asked
    }

    fn send(&self, request: IoRequest, answer: Answer<IoOutcome>) {
        let reads = matches!(request, IoRequest::Read { .. } | IoRequest::Flush);
        if !reads && !self.inner.writable {
            let name = self.name().to_owned();
            let reason = "it was opened for reading, so the engine carries no writes to it";
            let error = Error::refused(Refusal::BadArgument, Operation::Write, name, reason)
                .advise("open it writable, or take permits and write to it by other means");
            return answer.give(IoOutcome { result: Err(error) });
        }
        self.inner.inbox.send(Command::Io { disk: self.inner.shared.id, request, answer });
    }
}

/// A request to read.
#[must_use]
pub fn read(offset: u64, length: usize) -> IoRequest {
    IoRequest::Read { range: ByteRange::new(offset, length as u64), buffer: vec![0; length] }
}

/// A request under way, as a future: the bytes read, or nothing. Dropped, the request goes on and its outcome is dropped.
#[must_use = "a future does nothing unless it is polled; the request goes on"]
pub struct Io(Asked<IoOutcome>);

impl Io {
    pub(super) fn new(asked: Asked<IoOutcome>) -> Self {
        Self(asked)
    }
}

impl Future for Io {
    type Output = Result<Vec<u8>, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|outcome| outcome.result)
    }
}

/// What a [`BeginWrite`] waits for.
enum Waits {
    No,
    Barrier(WaitTicket),
    Copy(Asked<Result<(), Arc<Error>>>),
}

/// A permit to come. Dropped, nothing is left behind: copies for it that have not begun are not made.
#[must_use = "a future does nothing unless it is polled"]
pub struct BeginWrite {
    disk: LiveDisk,
    range: ByteRange,
    waits: Waits,
}

impl Future for BeginWrite {
    type Output = Result<Permit, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let shared = Arc::clone(&this.disk.inner.shared);
        loop {
            match std::mem::replace(&mut this.waits, Waits::No) {
                Waits::No => {}
                Waits::Barrier(ticket) => {
                    // Woken or not: a look costs little.
                    let (Cancellation::Removed | Cancellation::AlreadyWoken) = shared.gate.cancel(ticket);
                }
                Waits::Copy(mut asked) => match Pin::new(&mut asked).poll(context) {
                    Poll::Pending => {
                        this.waits = Waits::Copy(asked);
                        return Poll::Pending;
                    }
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Error::clone(&error))),
                },
            }
            match attempt_unnested(&shared.gate, &shared.jobs, this.range) {
                Attempt::Granted(permit) => return Poll::Ready(Ok(permit)),
                Attempt::AtBarrier => {
                    if let Ok(ticket) = shared.gate.wait(Waiter::task(context.waker().clone())) {
                        this.waits = Waits::Barrier(ticket);
                        return Poll::Pending;
                    }
                }
                Attempt::Copy(job, clusters) => {
                    this.waits = Waits::Copy(this.disk.inner.inbox.ask_copy(job, clusters));
                }
            }
        }
    }
}

impl Drop for BeginWrite {
    fn drop(&mut self) {
        if let Waits::Barrier(ticket) = std::mem::replace(&mut self.waits, Waits::No) {
            let (Cancellation::Removed | Cancellation::AlreadyWoken) =
                self.disk.inner.shared.gate.cancel(ticket);
        }
    }
}

type PermitCall = Arc<Mutex<Option<Box<dyn FnOnce(Result<Permit, Error>) + Send>>>>;

/// A step of [`LiveDisk::begin_write_with`]; the callback is behind a lock because a waiter that is not needed is handed back whole.
fn step(disk: LiveDisk, range: ByteRange, call: PermitCall) {
    let finish = |result| {
        let call = call.lock().take();
        if let Some(call) = call {
            call(result);
        }
    };
    let shared = Arc::clone(&disk.inner.shared);
    loop {
        match attempt_unnested(&shared.gate, &shared.jobs, range) {
            Attempt::Granted(permit) => return finish(Ok(permit)),
            Attempt::AtBarrier => {
                let (again, call) = (disk.clone(), Arc::clone(&call));
                let waiter = Waiter::callback(move || step(again, range, call));
                if shared.gate.wait(waiter).is_ok() {
                    return;
                }
            }
            Attempt::Copy(job, clusters) => {
                let (again, call) = (disk.clone(), Arc::clone(&call));
                let answer = ask_with(move |copied: Result<(), Arc<Error>>| match copied {
                    Ok(()) => step(again, range, call),
                    Err(error) => {
                        let call = call.lock().take();
                        if let Some(call) = call {
                            call(Err(Error::clone(&error)));
                        }
                    }
                });
                return disk.inner.inbox.send(Command::Copy { job, clusters, answer });
            }
        }
    }
}
