//! A live disk as its users have it: permits for those who write by themselves, requests for those who let the engine do it.
//!
//! Every call is there in three forms: blocking, with a callback, and as a future that needs no runtime. A callback is called on the ring
//! thread, which everybody waits for: it must be quick, and call nothing that waits (the blocking forms panic there, and do nothing). Any number of threads may call; whatever is dropped at whatever time harms nothing: a request under way
//! owns its buffer and its permit.
//!
//! # Both ways on one disk
//! Who writes by himself may have the engine carry other requests to the same disk. Discards, reads and flushes mix with such writes freely. The
//! engine carries a write or zeros of any alignment by reading the blocks at both ends and writing them back; it knows nothing of what others
//! write to these blocks meanwhile. So whoever has writes carried and writes by himself does not do both within one block at the same time: a
//! block is what direct I/O on the disk is aligned to, at most 4096 bytes.

use std::fmt;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use nix::errno::Errno;

use super::DiskId;
use super::admission::{Attempt, Permit, attempt};
use super::ask::{Answer, Asked, ask, ask_with, may_wait};
use super::asks::{Copied, Waited, Wish};
use super::begin_write::{Begin, Desk, begin_with};
use super::carrier::{IoOutcome, IoRequest};
use super::command::{Command, Inbox};
use super::gate::Gate;
use super::jobs::JobList;
use super::latency::Latencies;
use super::opened::Opened;
use super::own_write::{OwnWrite, Step, Writer};
use crate::error::{Error, ErrorKind, Operation, Refusal};
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
    /// Whether discards were put off: see [`super::own_write`].
    discards_put_off: AtomicBool,
}

impl DiskShared {
    pub(super) fn new(id: DiskId, name: Arc<str>, length: Length, waker: Arc<dyn Wake>) -> Arc<Self> {
        let gate = Gate::new(waker);
        let discards_put_off = AtomicBool::new(false);
        Arc::new(Self { id, name, length, gate, jobs: JobList::new(), discards_put_off })
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

    /// Whether discards wait, or are being carried out, of which their guest was told that they are done.
    #[inline]
    pub(super) fn has_discards_put_off(&self) -> bool {
        self.discards_put_off.load(Ordering::Acquire)
    }

    /// For the ring thread: before it tells anybody that a discard is done.
    pub(super) fn set_discards_put_off(&self, put_off: bool) {
        if put_off != self.discards_put_off.load(Ordering::Relaxed) {
            self.discards_put_off.store(put_off, Ordering::Release);
        }
    }
}

/// The storages of an engine that is no simulation.
pub(super) type File = Arc<dyn Storage>;

/// Where commands for the ring thread of such an engine are left.
pub(super) type LiveInbox = Inbox<File, OwnedFd>;

pub(super) struct Inner {
    pub(super) shared: Arc<DiskShared>,
    pub(super) inbox: Arc<LiveInbox>,
    /// Until it is dropped.
    pub(super) source: Option<Box<OpenedSource>>,
    pub(super) opened: Option<Arc<Opened>>,
    pub(super) writable: bool,
}

impl Inner {
    /// What is open.
    pub(super) fn source(&self) -> &OpenedSource {
        self.source.as_ref().expect("it is there until this is dropped")
    }
}

impl Drop for Inner {
    /// Nothing is closed here: this may be the ring thread, and a close may take its time.
    fn drop(&mut self) {
        if let Some(opened) = &self.opened {
            opened.close();
        }
        self.inbox.send(Command::RemoveDisk { disk: self.shared.id, source: self.source.take() });
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

impl Desk for LiveDisk {
    fn shared(&self) -> &Arc<DiskShared> {
        &self.inner.shared
    }

    fn forget(&self, range: ByteRange, writer: Weak<Writer>, answer: Answer<Result<(), Arc<Error>>>) {
        let disk = self.inner.shared.id;
        self.inner.inbox.send(Command::ForgetDiscards { disk, range, writer, answer });
    }

    fn copy(&self, wish: Wish, waited: Waited, answer: Answer<Copied>) {
        self.inner.inbox.send(Command::Copy { wish, waited, answer });
    }

    fn left(&self) -> &Arc<AtomicBool> {
        self.inner.inbox.left()
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

    /// What its guests have felt in the last 30 to 60 seconds: the latencies of requests that the engine carried. What was felt before the end of
    /// its last job is in that one's result instead ([`super::GuestLatencies`]), so this is what comes after.
    ///
    /// # Errors
    /// When the engine has died.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn latencies(&self) -> Result<Latencies, Error> {
        may_wait();
        let (answer, asked) = ask();
        self.inner.inbox.send(Command::Felt { disk: self.inner.shared.id, answer });
        asked.wait()
    }

    /// Before a write of one's own to `range`: waits until its old contents are copied by every job that needs them, and returns the permit to
    /// hold until the write is on the disk. Where they are copied already, or there is no job, this takes no lock and wakes nobody. A job keeps
    /// it for its `cbw_timeout` at most, which is one for all of `range`.
    ///
    /// A thread that holds a permit of this disk already is let through the barrier of a job that starts, so permits may nest in a
    /// thread. Only in this form, and only on one disk: who waits, with a permit in his hands, for a permit of another disk that the same
    /// start holds back, or for a request that the engine carries, keeps that start from its instant, and waits until it gives up. Give
    /// a permit back before waiting for anything but the write that it is for.
    ///
    /// # Errors
    /// When the old contents cannot be copied and the job's choice is to break the guest's write, or the range cannot be one. Nothing
    /// may be written then.
    ///
    /// # Panics
    /// In a callback on the ring thread, where there is something to wait for: it would wait for itself.
    #[inline]
    pub fn begin_write(&self, range: ByteRange) -> Result<Permit, Error> {
        let shared = &*self.inner.shared;
        // The flag after the permit: see `own_write`.
        if range.checked_end().is_some()
            && let Attempt::Granted(permit) = attempt(&shared.gate, &shared.jobs, range)
            && !shared.has_discards_put_off()
        {
            return Ok(permit);
        }
        self.begin_write_slowly(range)
    }

    #[cold]
    fn begin_write_slowly(&self, range: ByteRange) -> Result<Permit, Error> {
        let shared = &*self.inner.shared;
        let mut write = self.own_write(range)?;
        loop {
            match write.next(shared, |range| attempt(&shared.gate, &shared.jobs, range)) {
                Step::Granted(permit) => return Ok(permit),
                Step::AtBarrier => {
                    may_wait();
                    let lowered = shared.gate.wait_blocking(None);
                    debug_assert!(lowered, "there is no timeout");
                }
                Step::Forget(writer) => {
                    may_wait();
                    let (answer, asked) = ask();
                    self.forget(range, writer, answer);
                    asked.wait().map_err(|error| Error::clone(&error))?;
                }
                Step::Copy(wish, waited) => {
                    may_wait();
                    let (answer, asked) = ask();
                    self.copy(wish, waited, answer);
                    write.copied(asked.wait())?;
                }
            }
        }
    }

    /// One who is about to write to `range` by himself, if that is one.
    fn own_write(&self, range: ByteRange) -> Result<OwnWrite, Error> {
        if range.checked_end().is_some() {
            return Ok(OwnWrite::new(range));
        }
        Err(self.not_a_range(Operation::Write, range))
    }

    fn not_a_range(&self, operation: Operation, range: ByteRange) -> Error {
        let reason = format!("the disk ends at byte {}", self.length().0);
        let kind = ErrorKind::Io(Errno::EINVAL);
        Error::new(kind, operation, self.name().to_owned(), reason).at(range).because(Errno::EINVAL)
    }

    /// As [`Self::begin_write`], as a future. It waits at a barrier whatever permits are out.
    pub fn begin_write_async(&self, range: ByteRange) -> BeginWrite {
        BeginWrite(self.own_write(range).map(|write| Begin::new(self.clone(), write)))
    }

    /// As [`Self::begin_write`], with a callback: at once on this thread where nothing is to be waited for, else on the ring thread. It
    /// waits at a barrier whatever permits are out.
    pub fn begin_write_with(
        &self,
        range: ByteRange,
        call: impl FnOnce(Result<Permit, Error>) + Send + 'static,
    ) {
        begin_with(self.clone(), self.own_write(range), call);
    }

    /// Read `length` bytes from `offset` on.
    ///
    /// # Errors
    /// The disk's, a range beyond its end, or that of an engine that is gone.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        may_wait();
        let range = ByteRange::new(offset, length as u64);
        if range.checked_end().is_none_or(|end| end > self.length().0) {
            return Err(self.not_a_range(Operation::Read, range));
        }
        let buffer = new_buffer(length)
            .map_err(|errno| Error::io(Operation::Read, self.name(), Some(range), errno))?;
        self.submit(IoRequest::Read { range, buffer }).wait().result
    }

    /// Write `data` at `offset`, after its old contents are copied.
    ///
    /// # Errors
    /// As [`Self::read`], and as [`Self::begin_write`].
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn write(&self, offset: u64, data: Vec<u8>) -> Result<(), Error> {
        may_wait();
        self.submit(IoRequest::Write { offset, data }).wait().result.map(drop)
    }

    /// Bring every write that has completed to stable storage.
    ///
    /// # Errors
    /// As [`Self::read`]. Where data of the disk goes through the page cache (there is no direct I/O, or the disk ends within one of its blocks, or something was made zero that ends within 4 KiB), all
    /// flushes fail after one that has failed, whoever asks for them, until the disk is opened anew: what it has lost is told once, to nobody in particular.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn flush(&self) -> Result<(), Error> {
        may_wait();
        self.submit(IoRequest::Flush).wait().result.map(drop)
    }

    /// Say that `range` is not needed any more; what it reads as afterwards is undefined. Where old contents are still to be copied
    /// it is remembered and carried out later, so this never waits for a copy.
    ///
    /// # Errors
    /// As [`Self::read`].
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn discard(&self, range: ByteRange) -> Result<(), Error> {
        may_wait();
        self.submit(IoRequest::Discard { range }).wait().result.map(drop)
    }

    /// Make `range` read as zeros; `may_unmap`: its space may be given back.
    ///
    /// # Errors
    /// As [`Self::write`].
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), Error> {
        may_wait();
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
        if let IoRequest::Read { range, buffer } = &request
            && buffer.len() as u64 != range.length
        {
            let reason = format!("its buffer has {} bytes and its range {}", buffer.len(), range.length);
            let error = Error::refused(Refusal::BadArgument, Operation::Read, self.name().to_owned(), reason);
            return answer.give(IoOutcome::new(Err(error)));
        }
        let reads = matches!(request, IoRequest::Read { .. } | IoRequest::Flush);
        if !reads && !self.inner.writable {
            let name = self.name().to_owned();
            let reason = "it was opened for reading, so the engine carries no writes to it";
            let error = Error::refused(Refusal::BadArgument, Operation::Write, name, reason)
                .advise("open it writable, or take permits and write to it by other means");
            return answer.give(IoOutcome::new(Err(error)));
        }
        self.inner.inbox.send(Command::Io { disk: self.inner.shared.id, request, answer });
    }
}

/// A buffer of `length` zeros, or none where there is no memory for it.
pub(super) fn new_buffer(length: usize) -> Result<Vec<u8>, Errno> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(length).map_err(|_| Errno::ENOMEM)?;
    buffer.resize(length, 0);
    Ok(buffer)
}

/// A request to read.
///
/// # Panics
/// Where there is no memory for `length` bytes.
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

/// A permit to come. Dropped, nothing is left behind: copies for it that have not begun are not made. It may be polled whenever that suits: what
/// it has not asked for yet uses up nobody's time.
#[must_use = "a future does nothing unless it is polled"]
pub struct BeginWrite(Result<Begin<LiveDisk>, Error>);

impl Future for BeginWrite {
    type Output = Result<Permit, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Ok(begin) => begin.poll(context),
            Err(error) => Poll::Ready(Err(error.clone())),
        }
    }
}
