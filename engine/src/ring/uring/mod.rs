//! The ring over io_uring.
//!
//! # Model
//! Reads, writes, flushes, zeroing and discards are requests to the kernel; what has no request there (`SEEK_HOLE`, allocation
//! of many ranges, checksums, publishing a document) goes to a pool of two helper threads. A remote storage, of which the kernel knows nothing,
//! goes there as a whole; the pool then has as many threads as the configuration says. `push` writes the request into the
//! submission queue, `wait` makes one system call that submits all of them and waits, then takes every completion. With
//! nothing at the kernel and something ready, it makes none.
//!
//! Accepts, receives and sends are requests to the kernel as well (`sockets`), which attempts each at once and watches the socket only if it would have to wait.
//!
//! # Ordering
//! The kernel's ring keeps no order among requests. A flush covers what had *completed* when it was pushed; more is the
//! caller's business.
//!
//! # Waking
//! Other threads (see `signal`) write to an eventfd on which a lasting poll stands in the ring, and only when the ring thread sleeps.
//!
//! # Thread
//! The ring belongs to the thread that made it (the kernel insists: `SINGLE_ISSUER`), so it is not `Send`.

mod setup;
mod sockets;
mod sys;

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::arena::Arena;
use super::base::{Base, Task, file_of};
use super::config::{RingConfig, SetupError};
use super::signal::{Kick, Signal};
use super::socket::{Waiting, place_of};
use super::{
    Completion, DocumentId, FileId, IoPath, Op, Output, Ring, RingFailure, SocketId, Timestamp, Token, Wait,
    Wake, ZeroMethod,
};
use crate::storage::lock::Watch;
use crate::storage::{Descriptors, Document, Storage};
pub use setup::{SetupFlags, UringTraits};
use sys::{Enter, Event, Kernel, Request, Target};

/// Threads for what the kernel's ring cannot do.
const HELPER_THREADS: usize = 2;

/// How often in a row the kernel may have no room before the ring counts as broken.
const MAX_CONGESTION: u32 = 1000;

/// Pause before trying again when the kernel has no room and nothing completes.
const CONGESTION_PAUSE: Duration = Duration::from_millis(1);

/// How long a ring that is dropped waits for operations in flight to be cancelled.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the kernel may take over letting go of files that are released, and how often that is looked at.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
const RELEASE_POLL: Duration = Duration::from_millis(1);

/// Errors below this are the kernel's own (restart codes); they mean "interrupted".
const FIRST_INTERNAL_ERRNO: i32 = 512;

/// How a storage is reached.
#[derive(Clone, Copy, Debug)]
struct Reach {
    direct: Option<Target>,
    buffered: Target,
    block_device: bool,
    /// The kernel's ring has no discard for it.
    discard_by_pool: bool,
    /// A flush is more than one system call.
    flush_by_pool: bool,
}

/// See the module's header.
pub struct UringRing {
    // Before `base`: the ring is closed before the arena goes.
    kernel: Kernel,
    base: Base,
    /// Parallel to the table of storages; `None` for those without descriptors.
    reach: Vec<Option<Reach>>,
    traits: UringTraits,
    /// Of the pool, once there is a remote storage.
    remote_threads: usize,
    /// The poll on the wake-up's descriptor stands.
    wake_armed: bool,
    /// How often in a row the kernel had no room.
    congestion: u32,
    not_send: PhantomData<*const ()>,
}

impl UringRing {
    /// A ring of this thread.
    ///
    /// # Errors
    /// When io_uring cannot be used here, or memory cannot be had.
    ///
    /// # Panics
    /// If the configuration is out of the bounds that [`RingConfig`] states.
    pub fn new(config: &RingConfig) -> Result<Self, SetupError> {
        assert!((1..=RingConfig::MAX_CAPACITY).contains(&config.capacity), "{config:?}");
        assert!(config.sockets <= RingConfig::MAX_SOCKETS, "{config:?}");
        let arena = Arena::new(config.arena_bytes)
            .map_err(|source| SetupError::Memory { bytes: config.arena_bytes, source })?;
        let (kernel, traits) = setup::open(config, &arena)?;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| SetupError::Refused { step: "eventfd", errno })?;
        let signal = Arc::new(Signal::new(Kick::Event(event)));
        let remote_threads = config.threads.max(HELPER_THREADS);
        let config = RingConfig { threads: HELPER_THREADS, ..*config };
        let base = Base::new("io_uring", arena, &config, Waiting::InKernel, signal);
        Ok(Self {
            kernel,
            base,
            reach: Vec::new(),
            traits,
            remote_threads,
            wake_armed: false,
            congestion: 0,
            not_send: PhantomData,
        })
    }

    /// What the kernel granted.
    #[must_use]
    pub fn traits(&self) -> UringTraits {
        self.traits
    }

    /// Register the descriptors of the storage `file`, or use them plainly where that is refused.
    fn reach_of(&self, file: FileId, storage: &dyn Storage, descriptors: &Descriptors<'_>) -> Reach {
        let first = 2 * u32::from(file.0);
        let target = |place, file: BorrowedFd<'_>| {
            if self.traits.registered_files {
                match self.kernel.register_file(place, file) {
                    Ok(()) => return Target::Registered(place),
                    Err(errno) => tracing::debug!(%errno, place, "descriptor not registered"),
                }
            }
            Target::Plain(file.as_raw_fd())
        };
        Reach {
            direct: descriptors.direct.map(|file| target(first, file)),
            buffered: target(first + 1, descriptors.buffered),
            block_device: descriptors.block_device,
            discard_by_pool: false,
            flush_by_pool: !storage.flush_is_plain(),
        }
    }

    fn reach(&self, file: FileId) -> Reach {
        self.reach[usize::from(file.0)].expect("a storage with descriptors")
    }

    /// Push an operation on a storage with descriptors.
    fn push_to_file(&mut self, token: Token, op: Op, file: FileId) {
        let reach = self.reach(file);
        match op {
            Op::Read { offset, path, .. } | Op::Write { offset, path, .. } => {
                self.push_transfer(token, &op, offset, target_for(reach, path));
            }
            Op::WriteZeroes { range, method, .. } => {
                let mode = match method {
                    ZeroMethod::Unmap => libc::FALLOC_FL_PUNCH_HOLE,
                    ZeroMethod::Keep => libc::FALLOC_FL_ZERO_RANGE,
                };
                let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
                self.push_plain(
                    token,
                    Task::Plain,
                    &Request::Fallocate { target: reach.buffered, range, mode },
                );
            }
            Op::Discard { range, .. } if !reach.block_device => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                self.push_plain(
                    token,
                    Task::Plain,
                    &Request::Fallocate { target: reach.buffered, range, mode },
                );
            }
            Op::Discard { range, .. } if !reach.discard_by_pool => match reach.buffered {
                Target::Registered(place) => {
                    let task = Task::Discard { file, range };
                    self.push_plain(token, task, &Request::Discard { place, range });
                }
                Target::Plain(_) => self.base.push_to_pool(token, op),
            },
            Op::Flush { .. } if !reach.flush_by_pool => {
                self.push_plain(token, Task::Plain, &Request::Flush { target: reach.buffered });
            }
            other => self.base.push_to_pool(token, other),
        }
    }

    fn push_transfer(&mut self, token: Token, op: &Op, offset: u64, target: Option<Target>) {
        let Some(target) = target else {
            // What the kernel says to a direct transfer that the storage cannot do.
            self.base.push_ready(Completion { token, result: Err(Errno::EINVAL) });
            return;
        };
        let lent = self.base.lend(op).expect("a transfer has a buffer");
        let fills = matches!(op, Op::Read { .. });
        let key = self.base.flight.insert(token, Task::Transfer(lent));
        let Some((_, Task::Transfer(lent))) = self.base.flight.get(key) else {
            unreachable!("it was just inserted")
        };
        let request = if fills {
            Request::Read { target, offset, lent }
        } else {
            Request::Write { target, offset, lent }
        };
        // SAFETY: the flight holds the lent buffer until `reap` is told of the end of `key`; a ring dropped before that
        // leaves it lent, and the arena then keeps its mapping for ever.
        unsafe { self.kernel.push(key, &request) };
    }

    fn push_plain(&mut self, token: Token, task: Task, request: &Request<'_>) {
        let key = self.base.flight.insert(token, task);
        // SAFETY: these requests name no buffer.
        unsafe { self.kernel.push(key, request) };
    }

    fn cancel(&mut self, token: Token, target: Token) {
        let found = self.base.flight.find(target).map(|(key, task)| (key, matches!(task, Task::Pool)));
        let result = match found {
            Some((key, false)) => {
                return self.push_plain(token, Task::Cancel, &Request::Cancel { key });
            }
            Some((key, true)) => {
                self.base.withdraw(key);
                Ok(Output::Done)
            }
            None if self.base.is_ready(target) => Ok(Output::Done),
            None => Err(Errno::ENOENT),
        };
        self.base.push_ready(Completion { token, result });
    }

    /// Submit, and wait if `may_wait`: until a completion, a kick, or the deadline. Says whether [`Wake`] was used.
    fn enter(&mut self, may_wait: bool, deadline: Option<Instant>) -> Result<bool, RingFailure> {
        let mut waits = None;
        if may_wait {
            if !self.wake_armed {
                let event = self.base.signal.event().expect("the signal of this ring has a descriptor");
                self.kernel.push_wake_poll(event);
                self.wake_armed = true;
            }
            if self.base.signal.fall_asleep() {
                waits = Some(deadline.map(|at| at.saturating_duration_since(Instant::now())));
            }
        }
        if waits.is_none() && !self.kernel.needs_entering() {
            return Ok(false);
        }
        match self.kernel.enter(waits) {
            Ok(Enter::Entered) => self.congestion = 0,
            Ok(Enter::Congested) => {
                self.congestion += 1;
                if self.congestion > MAX_CONGESTION {
                    return Err(self.base.fail(Errno::EAGAIN));
                }
                if may_wait {
                    std::thread::sleep(CONGESTION_PAUSE);
                }
            }
            Err(errno) => return Err(self.base.fail(errno)),
        }
        Ok(waits.is_some() && self.base.signal.take())
    }

    /// Take every completion of the kernel.
    fn reap(&mut self, completions: &mut Vec<Completion>) -> Result<(), RingFailure> {
        let mut broken = None;
        for event in self.kernel.drain() {
            match event {
                Event::Ended { key, result } => {
                    let (token, task) = self.base.flight.remove(key);
                    if let Some(completion) = ended(&mut self.base, &mut self.reach, token, task, result) {
                        completions.push(completion);
                    }
                }
                Event::Kicked { armed: Ok(armed) } => self.wake_armed = armed,
                Event::Kicked { armed: Err(errno) } => broken = Some(errno),
                Event::Ignored => {}
            }
        }
        broken.map_or(Ok(()), |errno| Err(self.base.fail(errno)))
    }

    fn unregister(&self, reach: Option<Reach>) {
        for target in reach.into_iter().flat_map(|reach| [reach.direct, Some(reach.buffered)]) {
            let Some(Target::Registered(place)) = target else { continue };
            if let Err(errno) = self.kernel.unregister_file(place) {
                tracing::debug!(%errno, place, "descriptor stays registered until the ring is gone");
            }
        }
    }

    /// Wait until the kernel has let go of what was released.
    fn await_release(&mut self, watches: &[Watch]) {
        // A request that a worker of the kernel has carried out lets go of its file a moment after its completion came, and
        // has this thread do it the next time it enters.
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        while watches.iter().any(Watch::is_locked) && Instant::now() < deadline {
            if let Err(errno) = self.kernel.enter(Some(Some(RELEASE_POLL))) {
                tracing::debug!(%errno, "the ring cannot be entered any more");
                break;
            }
        }
    }

    fn dispatch(&mut self) -> Result<(), RingFailure> {
        self.base.pool.dispatch().map_err(|errno| self.base.fail(errno))
    }

    /// Cancel what the kernel still has, and wait for its end until `deadline`.
    fn recall(&mut self, deadline: Instant) -> Result<(), RingFailure> {
        let mut completions = Vec::new();
        for key in self.base.flight.with_kernel() {
            while !self.kernel.push_cancel(key) {
                self.enter(false, None)?;
                self.reap(&mut completions)?;
            }
        }
        while !self.base.flight.with_kernel().is_empty() && Instant::now() < deadline {
            self.base.signal.take();
            self.enter(true, Some(deadline))?;
            self.reap(&mut completions)?;
        }
        Ok(())
    }
}

fn target_for(reach: Reach, path: IoPath) -> Option<Target> {
    match path {
        IoPath::Direct => reach.direct,
        IoPath::Buffered => Some(reach.buffered),
    }
}

/// The kernel is done with an operation. `None`: it goes on elsewhere.
fn ended(
    base: &mut Base,
    reach: &mut [Option<Reach>],
    token: Token,
    task: Task,
    result: i32,
) -> Option<Completion> {
    let result = match u32::try_from(result) {
        Ok(value) => Ok(value),
        Err(_) if -result >= FIRST_INTERNAL_ERRNO => Err(Errno::EINTR),
        Err(_) => Err(Errno::from_raw(-result)),
    };
    if let Some(place) = task.place() {
        base.sockets.end(place);
    }
    let result = match task {
        Task::Transfer(lent) => {
            let length = lent.range().length;
            lent.give_back(&mut base.arena);
            result.map(|bytes| {
                assert!(bytes <= length, "the kernel moved {bytes} bytes where {length} were asked for");
                Output::Bytes(bytes)
            })
        }
        Task::Plain => result.map(|_| Output::Done),
        // Found, not found any more, or past recall: the target's own completion tells.
        Task::Cancel => match result {
            Ok(_) | Err(Errno::ENOENT | Errno::EALREADY) => Ok(Output::Done),
            Err(errno) => Err(errno),
        },
        Task::Discard { file, range } => match result {
            Ok(_) => Ok(Output::Done),
            Err(errno @ (Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::ENOSYS)) => {
                // This kernel has no such command, or the device no discard, or the range is not to its taste: the ioctl tells
                // which. Only in the last case is the command worth another try.
                let reach = reach[usize::from(file.0)].as_mut().expect("a storage with descriptors");
                reach.discard_by_pool |= errno != Errno::EINVAL;
                base.push_to_pool(token, Op::Discard { file, range });
                return None;
            }
            Err(errno) => Err(errno),
        },
        Task::Accept(listener) => sockets::accepted(base, listener, result),
        Task::Receive(_, receiving) => sockets::received(receiving, result),
        Task::Send(_, sending) => sockets::sent(sending, result),
        Task::Pool | Task::Unready(..) => panic!("the kernel completed what it did not have"),
    };
    Some(Completion { token, result })
}

impl Ring for UringRing {
    type File = Arc<dyn Storage>;
    type Document = Arc<dyn Document>;
    type Socket = OwnedFd;

    fn name(&self) -> &'static str {
        self.base.name
    }

    fn arena(&self) -> &Arena {
        &self.base.arena
    }

    fn arena_mut(&mut self) -> &mut Arena {
        &mut self.base.arena
    }

    fn add_file(&mut self, file: Self::File) -> Result<FileId, RingFailure> {
        assert_eq!(self.reach.len(), self.base.files.len(), "the tables run in parallel");
        let id = self.base.add_file(Arc::clone(&file))?;
        if file.is_remote() {
            self.base.pool.widen(self.remote_threads);
        }
        let reach = file.descriptors().map(|descriptors| self.reach_of(id, file.as_ref(), &descriptors));
        match self.reach.get_mut(usize::from(id.0)) {
            Some(place) => *place = reach,
            None => self.reach.push(reach),
        }
        Ok(id)
    }

    fn add_document(&mut self, document: Self::Document) -> Result<DocumentId, RingFailure> {
        self.base.add_document(document)
    }

    fn remove_file(&mut self, file: FileId) -> Self::File {
        // While the storage is open: what the kernel drops here is not the last of its file, which it would close in this thread.
        let reach = self.reach[usize::from(file.0)].take();
        self.unregister(reach);
        self.base.remove_file(file).storage
    }

    fn add_socket(&mut self, socket: OwnedFd) -> Result<SocketId, RingFailure> {
        self.base.add_socket(socket)
    }

    fn remove_socket(&mut self, socket: SocketId) {
        drop(self.base.sockets.remove(socket));
    }

    fn shutdown_socket(&mut self, socket: SocketId) {
        self.shut_down(socket);
    }

    fn release_files(&mut self) {
        let storages = self.base.files.iter().flatten().filter_map(|entry| entry.storage.descriptors());
        let watches: Vec<_> = storages.filter_map(|files| Watch::on(files.buffered)).collect();
        self.base.release_files();
        for reach in std::mem::take(&mut self.reach) {
            self.unregister(reach);
        }
        self.await_release(&watches);
    }

    fn capacity(&self) -> usize {
        self.base.capacity()
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }

    fn push(&mut self, token: Token, op: Op) {
        if let Some(place) = place_of(&op) {
            return self.push_on_socket(token, op, place);
        }
        self.base.admit(token);
        match (file_of(&op), &op) {
            (Some(file), _) if self.base.is_inline(file) => self.base.push_inline(token, &op, file),
            (Some(file), _) if self.reach[usize::from(file.0)].is_some() => {
                self.push_to_file(token, op, file)
            }
            (None, Op::Cancel { target }) => self.cancel(token, *target),
            // No request of the kernel's does it, or the storage is remote.
            _ => self.base.push_to_pool(token, op),
        }
    }

    fn wait(&mut self, until: Wait, completions: &mut Vec<Completion>) -> Result<(), RingFailure> {
        self.base.check()?;
        let before = completions.len();
        let deadline = self.base.deadline(until);
        let mut woken = false;
        loop {
            self.dispatch()?;
            woken |= self.base.signal.take();
            self.base.collect(completions)?;
            let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let last = completions.len() > before || woken || until == Wait::Poll || late();
            woken |= self.enter(!last, deadline)?;
            self.reap(completions)?;
            if last || completions.len() > before {
                return self.dispatch();
            }
        }
    }

    fn now(&self) -> Timestamp {
        self.base.now()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.base.signal) as Arc<dyn Wake>
    }
}

impl Drop for UringRing {
    fn drop(&mut self) {
        let deadline = Instant::now() + DROP_TIMEOUT;
        if let Err(failure) = self.recall(deadline) {
            tracing::warn!(%failure, "operations in flight could not be recalled; their buffers are leaked");
        }
        if !self.base.flight.with_kernel().is_empty() {
            self.base.leak_files();
        }
        self.base.shut_down(deadline);
    }
}
