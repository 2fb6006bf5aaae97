//! The seam between the logic and the world: a [`Ring`] carries out typed [`Op`]s and reports typed [`Completion`]s.
//!
//! # Model
//! One thread owns a ring. It pushes operations, each under a [`Token`] of its own choosing, then calls
//! [`Ring::wait`], which submits everything pushed in one batch and returns when at least one completion is there,
//! the deadline has passed, or the [`Wake`] handle was used. Every operation pushed completes exactly once, in any
//! order. Nothing in a ring retries, resumes or interprets: a short result, `EAGAIN`, `ENOSPC` reach the logic as they
//! came from the kernel, so that one piece of code (tested under the simulation) decides what they mean.
//!
//! # Buffers
//! All data of disks moves through the ring's [`Arena`]. An operation names a [`BufferRange`] of it; from `push` to the completion
//! that range is lent to the ring and the arena refuses to hand out references to it.
//!
//! # Sockets
//! Listening and connected stream sockets are carried by the same ring and the same `wait`. What they receive and send lies in vectors
//! that the operation owns: the ring keeps them until the completion, which brings them back. The bytes of an operation that fails are
//! lost with it. A socket has two places for operations in flight: one for an [`Op::Accept`] or an [`Op::Receive`], one for an
//! [`Op::Send`]. These places are apart from [`Ring::capacity`], so peers that let a thousand receives wait take nothing from the disks. A
//! peer may keep a place for ever, which is what peers do; [`Ring::shutdown_socket`] is the way to get it back.
//!
//! # Implementations
//! `uring` (the product), `threads` (hosts where io_uring is refused), `sim` (deterministic, seeded, virtual time, faults).
//! One conformance suite (`tests/ring_conformance.rs`) runs over all three.

pub mod arena;
mod base;
mod blocking;
mod config;
mod held;
mod lent;
mod poller;
pub mod select;
mod signal;
#[cfg(feature = "sim")]
pub mod sim;
mod socket;
pub mod threads;
pub mod uring;

use std::sync::Arc;

use nix::errno::Errno;

use crate::error::describe;
use crate::units::{ByteRange, Timestamp};
pub use arena::{Arena, BufferRange};
pub(crate) use base::{MAX_FILES, file_of};

/// Names an operation between `push` and its completion. Chosen by the caller; unique among those in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// A storage that was added to a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(pub u16);

/// A document (a small file that is replaced as a whole) that was added to a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DocumentId(pub u16);

/// A socket that was added to a ring, or accepted by it. Its number is used again once it was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub u16);

/// Most bytes that a receive asks for, or that a send has left to send (1 GiB).
pub const MAX_SOCKET_BYTES: usize = 1 << 30;

/// Most parts of a send that are sent by one operation; what is behind them makes the send a short one.
pub const MAX_SEND_PARTS: usize = 1024;

/// How bytes travel between buffer and storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoPath {
    /// Past the page cache; offset, length and memory are multiples of the storage's alignment.
    Direct,
    /// Through the page cache: storages without direct I/O, and a tail shorter than a sector.
    Buffered,
}

/// How a range is made to read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMethod {
    /// Give the space back: the range becomes a hole or is unmapped, and reads as zeros.
    Unmap,
    /// Keep the space allocated; the range reads as zeros.
    Keep,
}

/// What to ask a storage about its ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentQuery {
    /// Which ranges hold data and which are holes that read as zeros.
    Data,
    /// Which ranges are allocated in the top layer. A storage without layers is allocated as a whole.
    TopLayer,
}

/// A range as a storage describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where.
    pub range: ByteRange,
    /// For [`ExtentQuery::Data`]: holds data (`false`: a hole). For [`ExtentQuery::TopLayer`]: allocated in the top layer.
    pub present: bool,
}

/// One request to the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill `buffer` from `offset`. Completes with the bytes read: fewer than asked for at the end of the storage, or anywhere.
    Read {
        /// From where.
        file: FileId,
        /// First byte.
        offset: u64,
        /// To where.
        buffer: BufferRange,
        /// Direct or buffered.
        path: IoPath,
    },
    /// Write `buffer` at `offset`. Completes with the bytes written, which may be fewer.
    Write {
        /// To where.
        file: FileId,
        /// First byte.
        offset: u64,
        /// From where.
        buffer: BufferRange,
        /// Direct or buffered.
        path: IoPath,
    },
    /// Make a range read as zeros. All or an error (`EOPNOTSUPP` where the storage has no such operation).
    WriteZeroes {
        /// Where.
        file: FileId,
        /// Which bytes.
        range: ByteRange,
        /// Keep the space or give it back.
        method: ZeroMethod,
    },
    /// Tell the storage that a range is not needed any more; its contents are undefined afterwards.
    Discard {
        /// Where.
        file: FileId,
        /// Which bytes.
        range: ByteRange,
    },
    /// Reserve space for ranges without changing what they read as, nor the storage's length.
    Allocate {
        /// Where.
        file: FileId,
        /// Ranges in ascending order.
        ranges: Vec<ByteRange>,
    },
    /// Bring everything whose write completed before this was pushed to stable storage, data and what is needed to read it.
    Flush {
        /// Which storage.
        file: FileId,
    },
    /// Drop a range from the page cache, writing it back first. Only for storages used through [`IoPath::Buffered`].
    DropCache {
        /// Where.
        file: FileId,
        /// Which bytes.
        range: ByteRange,
    },
    /// Describe `range` from its start: contiguous extents, at most `limit` of them, so possibly less than `range`.
    Extents {
        /// Where.
        file: FileId,
        /// Which bytes, not empty.
        range: ByteRange,
        /// What to ask.
        query: ExtentQuery,
        /// Most extents to return, at least 1.
        limit: usize,
    },
    /// Checksum (XXH3, 128 bits) of each `chunk` bytes of `buffer`, the last one possibly shorter.
    Digest {
        /// What.
        buffer: BufferRange,
        /// Bytes a checksum.
        chunk: u32,
    },
    /// Replace a document atomically and durably (`Some`), or remove it durably (`None`; it may be missing). One that was removed, but perhaps
    /// not durably, is [`Output::Unsynced`]. Where replacing fails, the old version has the name or the new one.
    Publish {
        /// Which document.
        document: DocumentId,
        /// Its new contents.
        contents: Option<Vec<u8>>,
    },
    /// Accept one connection; it is in the ring's table when this completes, and is removed with [`Ring::remove_socket`].
    ///
    /// When the table is full, the connection is closed and this completes with `ENFILE`. Every error is about one connection
    /// or about what the host has left (`EMFILE`, `ENOMEM`), none about the listener; in the latter case the connection stays in the
    /// backlog, so whoever accepts again at once may find the same error at once: pause for a moment after any error.
    Accept {
        /// Where: a listening socket.
        listener: SocketId,
    },
    /// Receive into `buffer`, from byte `filled` to its end. Completes with the bytes received, which may be fewer, 0 only when the
    /// peer has ended. `EINTR` and `EAGAIN` mean that nothing was received; after any other error the connection is of no use.
    Receive {
        /// From where.
        socket: SocketId,
        /// To where. At most [`MAX_SOCKET_BYTES`] are left to fill, and at least 1.
        buffer: Vec<u8>,
        /// Bytes of it that are left alone.
        filled: usize,
        /// Wait for all of it rather than for some bytes. May be short even so: at the end, or for no reason.
        whole: bool,
    },
    /// Send `parts`, one behind the other, from byte `skip` of the whole on. Completes with the bytes sent, which may be fewer, but not
    /// 0. Errors are as for a receive; to a peer that has gone away it is `EPIPE`, without a signal. At most [`MAX_SEND_PARTS`] of the parts are sent at a time.
    Send {
        /// To where.
        socket: SocketId,
        /// What. At most [`MAX_SOCKET_BYTES`] are left to send, and at least 1.
        parts: Vec<Vec<u8>>,
        /// Bytes that were sent before.
        skip: usize,
    },
    /// Cancel the operation in flight under `target`, if it can still be. The cancelled operation completes with
    /// `ECANCELED`, or normally; this one completes with success either way, or `ENOENT` if there was none. A receive or a send that
    /// was cancelled may have moved bytes: its stream is of no use any more.
    Cancel {
        /// Token of the operation to cancel.
        target: Token,
    },
}

/// What an operation that succeeded gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Nothing but success.
    Done,
    /// A document was removed, but that is not on stable storage, for this error.
    Unsynced(Errno),
    /// Bytes read or written.
    Bytes(u32),
    /// Extents in ascending order without gaps, the first starting where asked.
    Extents(Vec<Extent>),
    /// Checksums in the order of the chunks.
    Digests(Vec<u128>),
    /// A connection, now in the ring's table.
    Accepted(SocketId),
    /// What was received.
    Received {
        /// As pushed, with `bytes` more filled.
        buffer: Vec<u8>,
        /// How many; 0: the peer has ended.
        bytes: u32,
    },
    /// What was sent.
    Sent {
        /// As pushed.
        parts: Vec<Vec<u8>>,
        /// How many bytes of them, at least 1.
        bytes: u32,
    },
}

/// The end of one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// As pushed.
    pub token: Token,
    /// How it went.
    pub result: Result<Output, Errno>,
}

/// How long [`Ring::wait`] may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all: submit, and take what is there.
    Poll,
    /// Until a completion, a wake-up, or this moment.
    Until(Timestamp),
    /// Until a completion or a wake-up.
    Forever,
}

/// Interrupts [`Ring::wait`] from any thread; a wake-up while nobody waits is kept for the next wait.
pub trait Wake: Send + Sync {
    /// Make the current or the next `wait` return.
    fn wake(&self);
}

/// The ring itself broke (not an operation in it): nothing more can be done with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {ring} ring failed: {}", describe(*.errno))]
pub struct RingFailure {
    /// Which implementation.
    pub ring: &'static str,
    /// What the kernel said.
    pub errno: Errno,
}

/// Carries out operations. See the module's header.
pub trait Ring {
    /// A storage as this ring takes it.
    type File: Send + 'static;
    /// A document as this ring takes it.
    type Document;
    /// A listening or connected stream socket as this ring takes it.
    type Socket;

    /// `"io_uring"`, `"threads"` or `"sim"`.
    fn name(&self) -> &'static str;
    /// The buffers.
    fn arena(&self) -> &Arena;
    /// The buffers, to fill them.
    fn arena_mut(&mut self) -> &mut Arena;
    /// Add a storage. At most 64 a ring at a time.
    ///
    /// # Errors
    /// When the table is full or the kernel refuses.
    fn add_file(&mut self, file: Self::File) -> Result<FileId, RingFailure>;
    /// Add a document. At most 64 a ring.
    ///
    /// # Errors
    /// When the table is full.
    fn add_document(&mut self, document: Self::Document) -> Result<DocumentId, RingFailure>;
    /// Take a storage out; its place is free for another. This never waits, since others may have work on the ring. Who drops the last of the
    /// storage closes it, which may take its time; where the kernel still has a hand on it, it is closed a moment later.
    ///
    /// # Panics
    /// If it was never added. Nothing that names it may be in flight.
    #[must_use = "dropped, it may be closed, which may take its time"]
    fn remove_file(&mut self, file: FileId) -> Self::File;
    /// Add a listening or a connected socket. At most as many at a time as the ring was made for, those accepted included.
    ///
    /// # Errors
    /// When the table is full (the socket is closed then), or the kernel refuses.
    fn add_socket(&mut self, socket: Self::Socket) -> Result<SocketId, RingFailure>;
    /// Close a socket; its place is free for another. The peer sees the end of the stream, or a reset if it has sent what nobody received.
    ///
    /// # Panics
    /// If it is not in the table, or an operation on it is in flight.
    fn remove_socket(&mut self, socket: SocketId);
    /// Make whatever is in flight on a socket, and whatever will be pushed on it, complete soon: a receive gives what is there, then 0
    /// bytes; a send is short or fails with `EPIPE`, also one that a peer never drains; an accept fails with `ECANCELED`, unless it has
    /// its connection already. Never blocks. The socket stays in the table. A connection ends for the peer, too; a listener, which may
    /// be shared with others, is left as it is.
    ///
    /// # Panics
    /// If it is not in the table.
    fn shutdown_socket(&mut self, socket: SocketId);
    /// Forget all storages and documents. What nobody else holds is closed when this returns, its locks and claims given up (the
    /// kernel takes its time over a ring that just goes away).
    ///
    /// # Panics
    /// If operations are in flight.
    fn release_files(&mut self);
    /// Most operations in flight; accepts, receives and sends do not count.
    fn capacity(&self) -> usize;
    /// Operations pushed whose completion was not returned yet; accepts, receives and sends do not count.
    fn in_flight(&self) -> usize;
    /// Queue an operation; it is submitted by the next `wait`.
    ///
    /// # Panics
    /// If `capacity` operations are in flight, if the token is in flight, if the buffer is lent or out of bounds, if the place of a
    /// socket is taken or there is nothing to receive into or to send.
    fn push(&mut self, token: Token, op: Op);
    /// Submit what was pushed and append what has completed to `completions`. May return with none.
    ///
    /// # Errors
    /// When the ring itself is broken; operations in flight are lost then.
    fn wait(&mut self, until: Wait, completions: &mut Vec<Completion>) -> Result<(), RingFailure>;
    /// The ring's clock.
    fn now(&self) -> Timestamp;
    /// A handle that interrupts `wait`.
    fn waker(&self) -> Arc<dyn Wake>;
}
