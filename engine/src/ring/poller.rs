//! Sockets for the ring that has no io_uring: attempts that never wait, and one thread that waits for all of them.
//!
//! # Model
//! The ring thread attempts an operation on a socket when it is pushed, and most end there. One that would have to wait becomes
//! an [`Attempt`] in the record of operations in flight, and its socket is handed to the [`Poller`]: a thread in `epoll_wait`, which does nothing but
//! note which sockets have become ready and rouse the ring thread, which then attempts again. So buffers never leave the ring thread,
//! and a note that comes late, for a socket that has been closed since or whose operation is over, costs one look and nothing else.
//!
//! # Why no readiness is lost
//! A socket is watched once at a time (`EPOLLONESHOT`), and watching one that is ready already is an event at once. It is watched after the attempt
//! that found nothing; a note is taken back before the attempt that it leads to. Notes are bounded: one a socket, marked in a flag.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::JoinHandle;

use crossbeam::queue::ArrayQueue;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv, sendmsg};

use super::signal::Signal;
use super::socket::{Place, Sockets, Way, rest};
use super::{MAX_SEND_PARTS, Op, Output, SocketId};

/// Most bytes that one attempt receives, so that a peer that never pauses leaves time for the others.
const ATTEMPT_BYTES: usize = 1 << 20;

/// Events taken in one system call.
const EVENTS: usize = 64;

/// What the event that ends the thread carries.
const STOP: u64 = u64::MAX;

/// What is left of an operation on a socket.
pub(crate) enum Attempt {
    /// All of it.
    Accept,
    /// `moved` bytes have come.
    Receive { buffer: Vec<u8>, filled: usize, whole: bool, moved: usize },
    /// All of it.
    Send { parts: Vec<Vec<u8>>, skip: usize },
}

impl Attempt {
    /// `op`, which works on a socket.
    pub(crate) fn new(op: Op) -> Self {
        match op {
            Op::Accept { .. } => Self::Accept,
            Op::Receive { buffer, filled, whole, .. } => Self::Receive { buffer, filled, whole, moved: 0 },
            Op::Send { parts, skip, .. } => Self::Send { parts, skip },
            other => panic!("{other:?} is not for a socket"),
        }
    }

    /// Try it now. `None`: the socket is not ready, or has had its share.
    pub(crate) fn run(&mut self, sockets: &mut Sockets, socket: SocketId) -> Option<Result<Output, Errno>> {
        let result = match self {
            Self::Accept => uninterrupted(|| sockets.accept(socket)).map(Output::Accepted),
            Self::Receive { buffer, filled, whole, moved } => {
                let left = &mut buffer[*filled..];
                receive(sockets.descriptor(socket), left, *whole, moved)
                    .map(|bytes| Output::Received { buffer: std::mem::take(buffer), bytes })
            }
            Self::Send { parts, skip } => send(sockets.descriptor(socket), parts, *skip)
                .map(|bytes| Output::Sent { parts: std::mem::take(parts), bytes }),
        };
        match result {
            Err(Errno::EAGAIN) => None,
            result => Some(result),
        }
    }
}

fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

fn counted(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("at most MAX_SOCKET_BYTES")
}

/// Fill `buffer` behind the `moved` bytes that came before. `EAGAIN`: to be gone on with.
fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], whole: bool, moved: &mut usize) -> Result<u32, Errno> {
    let share = moved.saturating_add(ATTEMPT_BYTES);
    loop {
        let left = &mut buffer[*moved..];
        let bytes = uninterrupted(|| recv(socket.as_raw_fd(), left, MsgFlags::MSG_DONTWAIT))?;
        *moved += bytes;
        if bytes == 0 || !whole || *moved == buffer.len() {
            return Ok(counted(*moved));
        }
        if *moved >= share {
            return Err(Errno::EAGAIN);
        }
    }
}

fn send(socket: BorrowedFd<'_>, parts: &[Vec<u8>], skip: usize) -> Result<u32, Errno> {
    let vectors: Vec<_> = rest(parts, skip).take(MAX_SEND_PARTS).map(std::io::IoSlice::new).collect();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    uninterrupted(|| sendmsg::<()>(socket.as_raw_fd(), &vectors, &[], flags, None)).map(counted)
}

struct Shared {
    epoll: Epoll,
    stop: EventFd,
    /// Sockets that have become ready.
    notes: ArrayQueue<SocketId>,
    /// Which of them have a note.
    noted: Vec<AtomicBool>,
    /// Why the thread has ended before it was told to; 0: it has not.
    broken: AtomicI32,
    signal: Arc<Signal>,
}

/// See the module's header.
pub(crate) struct Poller {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    /// A thread that watches up to `limit` sockets, which is not 0.
    ///
    /// # Errors
    /// When descriptors or a thread cannot be had.
    pub(crate) fn new(limit: usize, signal: Arc<Signal>) -> std::io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        epoll.add(&stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        let noted = (0..limit).map(|_| AtomicBool::new(false)).collect();
        let notes = ArrayQueue::new(limit);
        let shared = Arc::new(Shared { epoll, stop, notes, noted, broken: AtomicI32::new(0), signal });
        let watcher = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("ring-poller".to_owned())
            .stack_size(256 << 10)
            .spawn(move || watcher.watch())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Watch a socket until it is ready one of the ways given, once.
    ///
    /// # Errors
    /// When the kernel has no memory left.
    pub(crate) fn watch(
        &self,
        id: SocketId,
        socket: BorrowedFd<'_>,
        incoming: bool,
        outgoing: bool,
    ) -> Result<(), Errno> {
        let mut events = EpollFlags::EPOLLONESHOT;
        events.set(EpollFlags::EPOLLIN, incoming);
        events.set(EpollFlags::EPOLLOUT, outgoing);
        let mut event = EpollEvent::new(events, u64::from(id.0));
        match self.shared.epoll.modify(socket, &mut event) {
            Err(Errno::ENOENT) => self.shared.epoll.add(socket, event),
            result => result,
        }
    }

    /// Watch a socket no more: it is about to be closed, and somebody else may have it, too.
    pub(crate) fn forget(&self, socket: BorrowedFd<'_>) {
        match self.shared.epoll.delete(socket) {
            // It was never watched.
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => tracing::debug!(%errno, "a socket is watched until it is closed everywhere"),
        }
    }

    /// A socket that has become ready since it was watched last, and may have been removed since.
    ///
    /// # Errors
    /// When the thread has ended.
    pub(crate) fn take(&self) -> Result<Option<SocketId>, Errno> {
        let Some(id) = self.shared.notes.pop() else {
            return match self.shared.broken.load(Ordering::Acquire) {
                0 => Ok(None),
                errno => Err(Errno::from_raw(errno)),
            };
        };
        // Before the attempt: what happens after this makes another note.
        self.shared.noted[usize::from(id.0)].store(false, Ordering::Release);
        Ok(Some(id))
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        // The counter is far from full, so this cannot fail; if it did, a thread would be left behind, which harms nobody.
        if self.shared.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches sockets has panicked");
        }
    }
}

impl Shared {
    fn watch(&self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    self.broken.store(errno as i32, Ordering::Release);
                    return self.signal.notify();
                }
            };
            for event in &events[..count] {
                if event.data() == STOP {
                    return;
                }
                let id = SocketId(u16::try_from(event.data()).expect("numbers of sockets were given"));
                if !self.noted[usize::from(id.0)].swap(true, Ordering::AcqRel) {
                    assert!(self.notes.push(id).is_ok(), "a socket has one note");
                }
            }
            self.signal.notify();
        }
    }
}

/// Both places of a socket, the sending one first: whoever answers gets rid of what it holds before it takes in more.
pub(crate) fn both_places(socket: SocketId) -> [Place; 2] {
    [Place { socket, way: Way::Out }, Place { socket, way: Way::In }]
}
