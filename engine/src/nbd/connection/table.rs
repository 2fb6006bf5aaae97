//! What is under way in the transmission: requests, and their I/O.
//!
//! # Model
//! A request is in the table from the moment it was understood until its last reply is in the line of replies; from then until that has left, `Output`
//! counts it. A request that is refused at once, or needs no I/O, is answered without being in the table. An I/O is in its table from the moment it
//! was decided on until its outcome; so is the memory that it needs.

use std::collections::VecDeque;
use std::sync::Arc;

use slab::Slab;

use super::action::{CloseReason, IoId, IoKind, Outcome, RequestId};
use super::input::Incoming;
use super::output::Output;
use super::reads::{Chunks, Gathered};
use super::status::Status;
use super::streams::Stream;
use super::writes::Write;
use crate::nbd::export::Export;
use crate::nbd::handshake::{Agreement, Selected};
use crate::nbd::limits::{Account, ConnectionLimits, SharedBytes};
use crate::nbd::wire::{self, ChunkHeader, WireError, chunk};
use crate::units::ByteRange;

/// Place of a request in the table.
pub(super) type Key = usize;

/// Tables that had more than so many entries give their memory back when they are empty.
const KEPT_ENTRIES: usize = 16;

/// The place in its table of what such a number names.
fn index_of(number: u64) -> usize {
    usize::try_from(number & u64::from(u32::MAX)).expect("32 bits")
}

/// Why a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) error: WireError,
    pub(super) message: &'static str,
    /// The first byte that is concerned, if that is known.
    pub(super) offset: Option<u64>,
}

impl Failure {
    /// Of a request as a whole.
    pub(super) fn new(error: WireError, message: &'static str) -> Self {
        Self { error, message, offset: None }
    }

    /// Of the I/O on `range`; an empty one is nowhere in particular.
    pub(super) fn at(error: WireError, range: ByteRange) -> Self {
        // Only a request for fast zeros may be told so.
        let error = if error == WireError::NotSupported { WireError::Io } else { error };
        Self { error, message: error.message(), offset: (!range.is_empty()).then_some(range.offset) }
    }
}

/// What a request is.
#[derive(Debug)]
pub(super) enum Body {
    /// A read whose reply is sent in chunks as they come.
    Chunks(Chunks),
    /// A read whose reply is sent when all of it is there.
    Gathered(Gathered),
    /// A read whose reply is sent as a whole while it is read; its state is in the stream.
    Streamed(ByteRange),
    Write(Write),
    Status(Status),
    /// One I/O without payload. `fast`: it may be answered that it would not be fast.
    Plain {
        fast: bool,
    },
    /// Nobody waits for a reply.
    Abandoned,
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) cookie: u64,
    /// How many came before it.
    number: u32,
    pub(super) body: Body,
    /// I/O that has no outcome yet.
    pub(super) in_flight: usize,
    pub(super) failure: Option<Failure>,
}

impl Request {
    /// It fails. Of several failures that with the lowest offset is told.
    pub(super) fn fail(&mut self, failure: Failure) {
        let earlier = self.failure.is_some_and(|known| known.offset <= failure.offset);
        if !earlier {
            self.failure = Some(failure);
        }
    }
}

/// An I/O that has no outcome yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Io {
    serial: u32,
    pub(super) request: Key,
    pub(super) range: ByteRange,
    /// Which piece of its request.
    pub(super) piece: usize,
}

/// The phase after the handshake. Its methods are spread over the modules of the parts.
#[derive(Debug)]
pub(super) struct Transmission {
    pub(super) export: Arc<Export>,
    pub(super) structured: bool,
    pub(super) contexts: Vec<Selected>,
    pub(super) limits: ConnectionLimits,
    pub(super) requests: Slab<Request>,
    ios: Slab<Io>,
    serial: u32,
    /// Requests that were ever in the table.
    begun: u32,
    /// I/O that the driver has not been given yet.
    issue: VecDeque<(IoId, IoKind)>,
    pub(super) incoming: Incoming,
    /// Of writes.
    pub(super) receiving: Account,
    /// Requests that need memory for their reply to go on, in the order of their turns.
    pub(super) line: VecDeque<Key>,
    /// Requests whose reply has to go out as a whole and is too long to be gathered, and the one whose turn it is.
    pub(super) streams: VecDeque<Key>,
    pub(super) stream: Option<Stream>,
    pub(super) draining: bool,
    disconnected: bool,
    broken: Option<CloseReason>,
    abandoned: bool,
}

impl Transmission {
    pub(super) fn new(agreement: Agreement, limits: ConnectionLimits, shared: SharedBytes) -> Self {
        Self {
            export: agreement.export,
            structured: agreement.structured,
            contexts: agreement.contexts,
            limits,
            requests: Slab::new(),
            ios: Slab::new(),
            serial: 0,
            begun: 0,
            issue: VecDeque::new(),
            incoming: Incoming::default(),
            receiving: Account::new(shared, limits.reserve_bytes, limits.incoming_bytes),
            line: VecDeque::new(),
            streams: VecDeque::new(),
            stream: None,
            draining: false,
            disconnected: false,
            broken: None,
            abandoned: false,
        }
    }

    /// No new requests.
    pub(super) fn drain(&mut self) {
        self.draining = true;
    }

    /// The peer said goodbye.
    pub(super) fn disconnect(&mut self) {
        self.disconnected = true;
    }

    /// This cannot go on.
    pub(super) fn break_off(&mut self, reason: CloseReason) {
        self.broken.get_or_insert(reason);
    }

    pub(super) fn has_disconnected(&self) -> bool {
        self.disconnected
    }

    pub(super) fn broken(&self) -> Option<CloseReason> {
        self.broken
    }

    /// Whether anything more that comes is passed over.
    pub(super) fn is_deaf(&self) -> bool {
        self.disconnected || self.broken.is_some()
    }

    /// Whether nothing is under way (replies that have not left aside).
    pub(super) fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }

    /// Whether I/O that the driver was given has no outcome yet.
    pub(super) fn has_io(&self) -> bool {
        !self.ios.is_empty()
    }

    pub(super) fn requests_under_way(&self) -> usize {
        self.requests.len()
    }

    pub(super) fn incoming_bytes(&self) -> usize {
        self.receiving.used()
    }

    /// Bytes that it has in memory, itself and spare room included, without the pieces of payloads.
    pub(super) fn heap_bytes(&self) -> usize {
        size_of::<Self>()
            + self.requests.capacity() * size_of::<Request>()
            + self.ios.capacity() * size_of::<Io>()
            + self.issue.capacity() * size_of::<(IoId, IoKind)>()
            + (self.line.capacity() + self.streams.capacity()) * size_of::<Key>()
    }

    /// Put a request in the table.
    pub(super) fn begin(&mut self, cookie: u64, body: Body) -> Key {
        let number = self.begun;
        self.begun = self.begun.wrapping_add(1);
        self.requests.insert(Request { cookie, number, body, in_flight: 0, failure: None })
    }

    /// The request that `id` is of, unless everything was abandoned.
    pub(super) fn request_of(&self, id: IoId) -> Option<RequestId> {
        let key = self.ios.get(index_of(id.0))?.request;
        let request = self.requests.get(key)?;
        Some(RequestId(u64::from(request.number) << 32 | key as u64))
    }

    /// Whether `id` is under way.
    pub(super) fn has_request(&self, id: RequestId) -> bool {
        self.requests.get(index_of(id.0)).is_some_and(|request| u64::from(request.number) == id.0 >> 32)
    }

    /// Take a request out of the table.
    pub(super) fn end(&mut self, key: Key) -> Request {
        let request = self.requests.remove(key);
        debug_assert!(request.in_flight == 0, "a request outlives its I/O");
        if self.requests.is_empty() && self.requests.capacity() > KEPT_ENTRIES {
            self.requests = Slab::new();
        }
        request
    }

    /// Decide on an I/O of the request `key`.
    pub(super) fn submit(&mut self, key: Key, range: ByteRange, piece: usize, kind: IoKind) {
        self.serial = self.serial.wrapping_add(1);
        let index = self.ios.insert(Io { serial: self.serial, request: key, range, piece });
        self.requests[key].in_flight += 1;
        self.issue.push_back((IoId(u64::from(self.serial) << 32 | index as u64), kind));
    }

    /// The next I/O for the driver.
    pub(super) fn next_io(&mut self) -> Option<(IoId, IoKind)> {
        let next = self.issue.pop_front();
        if self.issue.is_empty() && self.issue.capacity() > KEPT_ENTRIES {
            self.issue = VecDeque::new();
        }
        next
    }

    fn take_io(&mut self, id: IoId) -> Io {
        let index = index_of(id.0);
        let known = self.ios.get(index).is_some_and(|io| u64::from(io.serial) == id.0 >> 32);
        assert!(known, "{id:?} is not under way");
        let io = self.ios.remove(index);
        if self.ios.is_empty() && self.ios.capacity() > KEPT_ENTRIES {
            self.ios = Slab::new();
        }
        io
    }

    /// An I/O has ended.
    pub(super) fn answered(&mut self, id: IoId, outcome: Outcome, output: &mut Output) {
        let io = self.take_io(id);
        if self.abandoned {
            return;
        }
        let request = &mut self.requests[io.request];
        request.in_flight -= 1;
        match &request.body {
            Body::Chunks(_) => self.chunk_read(&io, outcome, output),
            Body::Gathered(_) => self.piece_gathered(&io, outcome, output),
            Body::Streamed(_) => self.stream_read(&io, outcome, output),
            Body::Write(_) => self.piece_written(&io, outcome, output),
            Body::Status(_) => self.status_found(&io, outcome, output),
            Body::Plain { fast } => {
                let fast = *fast;
                self.plain_done(&io, fast, outcome, output);
            }
            Body::Abandoned => {
                self.receiving.give(length_of(io.range));
                if self.requests[io.request].in_flight == 0 {
                    self.end(io.request);
                }
            }
        }
    }

    fn plain_done(&mut self, io: &Io, fast: bool, outcome: Outcome, output: &mut Output) {
        let request = self.end(io.request);
        match outcome_of(outcome) {
            Ok(()) => succeed(output, request.cookie),
            Err(error @ WireError::NotSupported) if fast => {
                self.fail(output, request.cookie, Failure::new(error, error.message()));
            }
            Err(error) => self.fail(output, request.cookie, Failure::at(error, io.range)),
        }
    }

    /// Give every request in the line that can go on what it needs.
    pub(super) fn start_replies(&mut self, output: &mut Output) {
        while let Some(&key) = self.line.front() {
            match self.start_one(key, output) {
                Turn::Over => {
                    self.line.pop_front();
                }
                Turn::Again => {
                    // Behind the others: what is long does not keep them waiting.
                    self.line.rotate_left(1);
                }
                Turn::NoRoom => break,
            }
        }
        if self.line.is_empty() && self.line.capacity() > KEPT_ENTRIES {
            self.line = VecDeque::new();
        }
        self.advance_streams(output);
    }

    fn start_one(&mut self, key: Key, output: &mut Output) -> Turn {
        match self.requests[key].body {
            Body::Chunks(_) => self.start_chunk(key, output),
            Body::Gathered(_) => self.start_gathering(key, output),
            Body::Status(_) => self.start_status(key, output),
            _ => unreachable!("others need no memory for their reply"),
        }
    }

    /// Nothing more is done, and nobody is answered. What the driver was given goes on to its end, and keeps what it holds until the
    /// connection is dropped.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
        for (id, _) in std::mem::take(&mut self.issue) {
            self.take_io(id);
        }
        self.requests = Slab::new();
        self.line = VecDeque::new();
        self.streams = VecDeque::new();
        self.stream = None;
        self.incoming = Incoming::default();
    }

    /// Answer that a request has failed.
    pub(super) fn fail(&self, output: &mut Output, cookie: u64, failure: Failure) {
        let text = output.text();
        if self.structured {
            put_error(text, cookie, failure);
        } else {
            wire::simple_reply(text, cookie, Some(failure.error));
        }
        output.end_reply();
    }
}

/// What came of a turn in the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It needs nothing more for now.
    Over,
    /// It wants more.
    Again,
    /// There is not enough memory for now.
    NoRoom,
}

/// Answer that a request without payload has succeeded.
pub(super) fn succeed(output: &mut Output, cookie: u64) {
    wire::simple_reply(output.text(), cookie, None);
    output.end_reply();
}

/// Append an error, the last chunk of its reply.
pub(super) fn put_error(text: &mut Vec<u8>, cookie: u64, failure: Failure) {
    let kind = if failure.offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
    let message = failure.message.as_bytes();
    let length = u16::try_from(message.len()).expect("messages are short");
    let offset = failure.offset.unwrap_or(0).to_be_bytes();
    let fields: [&[u8]; 4] = [
        &failure.error.code().to_be_bytes(),
        &length.to_be_bytes(),
        message,
        if failure.offset.is_some() { &offset } else { &[] },
    ];
    ChunkHeader { done: true, kind, cookie }.put(text, &fields, 0);
}

/// How an I/O without data went.
///
/// # Errors
/// As the disk said it.
pub(super) fn outcome_of(outcome: Outcome) -> Result<(), WireError> {
    match outcome {
        Outcome::Done => Ok(()),
        Outcome::Failed(error) => Err(error),
        // An answer to another question: the driver's mistake, which must not become anybody's data.
        Outcome::Data(_) | Outcome::Zero | Outcome::Extents(_) => Err(WireError::Io),
    }
}

/// The data of an I/O that reads; `Ok(None)`: zeros.
///
/// # Errors
/// Why it has failed.
pub(super) fn data_of(outcome: Outcome, range: ByteRange) -> Result<Option<Vec<u8>>, Failure> {
    match outcome {
        Outcome::Data(data) if data.len() == length_of(range) => Ok(Some(data)),
        Outcome::Zero => Ok(None),
        Outcome::Failed(error) => Err(Failure::at(error, range)),
        // As above.
        Outcome::Data(_) | Outcome::Done | Outcome::Extents(_) => Err(Failure::at(WireError::Io, range)),
    }
}

/// Length of a piece.
pub(super) fn length_of(range: ByteRange) -> usize {
    usize::try_from(range.length).expect("pieces are bounded")
}
