//! What a connection and its driver say to each other.

use std::sync::Arc;

use nix::errno::Errno;

use crate::nbd::export::{Export, MetaContext};
use crate::nbd::wire::WireError;
use crate::units::ByteRange;

/// Names an I/O between [`Action::Io`] and [`super::Connection::answered`]. Unique among those of its connection that are in flight, and not
/// used again soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoId(pub u64);

/// Names a request of the peer that is under way: its I/O is of one guest's request, however many pieces that has. Not used again soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// What to receive next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receive {
    /// Requests, and small payloads among them: whatever has come, at most so many bytes. Hand it over with
    /// [`super::Connection::received`]; the buffer stays the driver's.
    Any {
        /// Most bytes.
        most: usize,
    },
    /// The rest of a piece of payload, nothing else. Take the buffer with [`super::Connection::lend_payload`], fill it up (as a whole,
    /// rather than by bits), and hand it back with [`super::Connection::received_payload`]; then it goes to the disk as it is. (Or receive
    /// at most so many bytes elsewhere and call [`super::Connection::received`]: that is right, too, and a copy more.)
    Payload {
        /// Bytes that are missing.
        missing: usize,
    },
}

/// A buffer in which a piece of payload is received.
#[derive(Debug)]
pub struct PayloadBuffer {
    /// As long as the piece.
    pub buffer: Vec<u8>,
    /// Bytes at its beginning that are there already; the rest, at least 1 byte, is to be received.
    pub filled: usize,
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    /// The peer has chosen an export; all I/O to come is for it. Once a connection, before its first I/O.
    Attach(Arc<Export>),
    /// Do this I/O and give its outcome to [`super::Connection::answered`], in any order.
    Io {
        /// Its name.
        id: IoId,
        /// What to do.
        kind: IoKind,
    },
    /// Send these parts, one behind the other, all of them; then call [`super::Connection::sent`]. There is one at a time. None is empty; there
    /// are at most 64.
    Send(Vec<Vec<u8>>),
    /// Shut the socket down: nothing more is received or sent. What is being received or sent may fail and need not be handed back. The
    /// connection stays until [`super::Connection::is_finished`].
    Close(CloseReason),
}

/// An I/O on the disk. All ranges lie on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// Read. Answered with [`Outcome::Data`] of that length, or [`Outcome::Zero`].
    Read {
        /// Which bytes: at least 1, at most a piece.
        range: ByteRange,
    },
    /// Write. Answered with [`Outcome::Done`], as is whatever follows but block status.
    Write {
        /// First byte.
        offset: u64,
        /// What: at least 1 byte, at most a piece.
        data: Vec<u8>,
        /// Durable before the answer. A long write has a flush of its own instead.
        fua: bool,
    },
    /// Bring all that was answered to stable storage.
    Flush,
    /// Not needed any more. Where there is no such thing, nothing need be done.
    Discard {
        /// Which bytes: at least 1, up to 4 GiB.
        range: ByteRange,
        /// Durable before the answer.
        fua: bool,
    },
    /// Make zero.
    WriteZeroes {
        /// Which bytes: at least 1, up to 4 GiB.
        range: ByteRange,
        /// The space stays allocated.
        no_hole: bool,
        /// Fail with `EOPNOTSUPP`, changing nothing, if that is no faster than writing zeros.
        fast: bool,
        /// Durable before the answer.
        fua: bool,
    },
    /// It will be read soon. Nothing need be done.
    Cache {
        /// Which bytes: at least 1.
        range: ByteRange,
    },
    /// What is where. Answered with [`Outcome::Extents`].
    BlockStatus {
        /// Which bytes: at least 1, up to 4 GiB.
        range: ByteRange,
        /// What is asked, at least one.
        contexts: Vec<MetaContext>,
        /// Most extents in each list of the outcome; more are cut off. 1 where the peer wants one.
        extents: usize,
    },
}

/// A range in the outcome of a block status request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// In bytes, not 0.
    pub length: u64,
    /// What its context says of it.
    pub flags: u32,
}

impl StatusExtent {
    /// `base:allocation`: there is no space behind it.
    pub const HOLE: u32 = 1;
    /// `base:allocation`: it reads as zeros.
    pub const ZERO: u32 = 2;
}

/// How an I/O went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// What was read.
    Data(Vec<u8>),
    /// What was read is all zeros (and has no space behind it, as a rule).
    Zero,
    /// For each context in the order of the request, consecutive extents from the start of the range, at least one. They may end before the
    /// range, or beyond it.
    Extents(Vec<Vec<StatusExtent>>),
    /// It failed; [`WireError::from`] makes one of an [`Errno`] or of the crate's error.
    Failed(WireError),
}

impl Outcome {
    /// It failed with `errno`.
    #[must_use]
    pub fn errno(errno: Errno) -> Self {
        Self::Failed(errno.into())
    }
}

/// Why a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The peer asked for it (`NBD_CMD_DISC` or `NBD_OPT_ABORT`).
    #[error("the client disconnected")]
    Disconnected,
    /// The peer just ended its stream.
    #[error("the client went away without a word")]
    EndOfStream,
    /// Asked for with [`super::Connection::drain`].
    #[error("the export was closed")]
    Drained,
    /// [`super::Connection::lost`].
    #[error("the connection was lost")]
    Lost,
    /// The peer broke a rule, and there is no other way to tell.
    #[error("the client broke the protocol: {0}")]
    Violation(&'static str),
    /// It asked for an export that is not there, by the option that has no error reply.
    #[error("the client asked for an export that is not there")]
    UnknownExport,
    /// Reading failed after the reply had begun, and there is no other way to tell.
    #[error("a read failed after its reply had begun")]
    ReadFailed,
}
