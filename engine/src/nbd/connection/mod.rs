//! A connection of a client to the NBD server, from the first byte to the last: what it receives, does and sends.
//!
//! # Model
//! A pure state machine: bytes and outcomes of I/O go in, [`Action`]s come out. It knows of no socket, no disk and no clock. Its driver
//!
//! 1. asks [`Connection::wants`] what to receive, and hands it over (one receive at a time);
//! 2. calls [`Connection::poll`] until it returns `None`, after each call of anything else (calls may be gathered: an iteration of a loop takes all
//!    completions, then polls);
//! 3. does what the actions say: I/O in any order and any number at a time, one send at a time;
//! 4. after [`Action::Close`] shuts the socket down, and drops the connection once [`Connection::is_finished`].
//!
//! Time is the driver's: a peer that is [`Connection::in_handshake`] for too long, or does not end after [`Connection::drain`], is told by
//! [`Connection::lost`].
//!
//! # Payloads
//! They move in pieces, so that a request of 32 MiB never has 32 MiB in memory. A write is received and given to the disk piece by
//! piece. A read is sent piece by piece as its pieces come, each a chunk of its own, among the chunks of other replies. Where a reply has to go
//! out as a whole (simple replies, and `NBD_CMD_FLAG_DF`), it is read before its first byte goes, so that an error can be told; if it is too
//! long for that, it is sent while it is read, and other replies wait behind it. If reading fails then, a simple reply can only be cut off by closing the
//! connection; a structured one is filled up with zeros, and an error is sent after it.
//!
//! # Bounds
//! [`ConnectionLimits`] has them. A request counts until its reply has left. Where there is no room for more, [`Connection::wants`] is `None`, and
//! the peer has to wait.
//!
//! The parts: [`action`](self) has the types, `input` takes headers and payloads apart, `requests` says what becomes of a request, `table` knows what is
//! under way, `reads`, `writes`, `status` and
//! `streams` are the lives of requests, `output` is the line of replies.

mod action;
mod input;
mod output;
mod reads;
mod requests;
mod status;
mod streams;
mod table;
mod writes;

use std::sync::Arc;

pub use self::action::{
    Action, CloseReason, IoId, IoKind, Outcome, PayloadBuffer, Receive, RequestId, StatusExtent,
};
use self::output::Output;
use self::table::Transmission;
use super::export::{Export, Exports};
use super::handshake::{Handshake, Progress};
use super::limits::{ConnectionLimits, SharedBytes};

/// Bytes that a first receive asks for; more where it turns out to be too little.
const FIRST_RECEIVE: usize = 4096;

/// Where a connection stands.
#[derive(Debug)]
enum Phase {
    Handshake(Handshake),
    Transmission(Box<Transmission>),
}

/// What a connection has in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffered {
    /// Bytes of writes that are being received or written.
    pub incoming: usize,
    /// Bytes of replies that are being read or sent, as they are accounted for.
    pub outgoing: usize,
    /// Of them those of replies that go out as a whole while they are read.
    pub stream: usize,
    /// Bytes that were received and not looked at yet.
    pub backlog: usize,
    /// Requests whose reply has not left.
    pub requests: usize,
}

/// See the module's header.
#[derive(Debug)]
pub struct Connection {
    limits: ConnectionLimits,
    shared: SharedBytes,
    phase: Phase,
    /// Received, and not used up yet: from byte `used` on.
    backlog: Vec<u8>,
    used: usize,
    output: Output,
    attach: Option<Arc<Export>>,
    /// Something has happened since the last look.
    stirred: bool,
    /// The handshake waits for its replies to leave.
    replies_full: bool,
    /// A piece's buffer is with the driver.
    lent: bool,
    /// Bytes that the next receive of requests asks for.
    receive_bytes: usize,
    draining: bool,
    /// Nothing more is received; the end comes when all is done and sent.
    ending: Option<CloseReason>,
    /// The end, at once.
    broken: Option<CloseReason>,
    closed: bool,
}

impl Connection {
    /// A connection that has just been accepted.
    ///
    /// # Panics
    /// If the limits contradict themselves.
    #[must_use]
    pub fn new(limits: ConnectionLimits, shared: SharedBytes) -> Self {
        limits.check();
        let mut output = Output::new(&limits, &shared);
        let handshake = Handshake::new(&limits, output.options());
        Self {
            limits,
            shared,
            phase: Phase::Handshake(handshake),
            backlog: Vec::new(),
            used: 0,
            output,
            attach: None,
            stirred: true,
            replies_full: false,
            lent: false,
            receive_bytes: FIRST_RECEIVE,
            draining: false,
            ending: None,
            broken: None,
            closed: false,
        }
    }

    /// What to receive next; `None`: nothing now (there is no room, or nothing more will be taken). One receive at a time: one that is under way
    /// may be handed over whatever this says meanwhile.
    #[must_use]
    pub fn wants(&self) -> Option<Receive> {
        if self.closed || self.lent || self.ending.is_some() || self.broken.is_some() {
            return None;
        }
        let any = Some(Receive::Any { most: self.receive_bytes });
        match &self.phase {
            Phase::Handshake(_) => any.filter(|_| !self.replies_full),
            Phase::Transmission(_) if !self.backlog.is_empty() => None,
            Phase::Transmission(transmission) => {
                transmission.wants(self.receive_bytes, self.output.unsent_replies())
            }
        }
    }

    /// Bytes have come, any number of them: what was asked for with [`Receive::Any`], or the next of a payload.
    pub fn received(&mut self, bytes: &[u8]) {
        self.stirred = true;
        if bytes.len() >= self.receive_bytes {
            self.receive_bytes = (self.receive_bytes * 2).min(self.limits.read_ahead);
        } else if bytes.len() < self.receive_bytes / 4 {
            self.receive_bytes = (self.receive_bytes / 2).max(FIRST_RECEIVE);
        }
        if self.closed || self.ending.is_some() || self.broken.is_some() {
            return;
        }
        let taken = match &mut self.phase {
            Phase::Transmission(transmission) if self.backlog.is_empty() => {
                transmission.consume(bytes, &mut self.output)
            }
            _ => 0,
        };
        self.backlog.extend_from_slice(&bytes[taken..]);
    }

    /// The buffer in which to receive what [`Receive::Payload`] asked for.
    ///
    /// # Panics
    /// If that was not what [`Self::wants`] said last.
    pub fn lend_payload(&mut self) -> PayloadBuffer {
        let Phase::Transmission(transmission) = &mut self.phase else {
            panic!("payloads come after the handshake")
        };
        self.lent = true;
        transmission.lend()
    }

    /// The buffer comes back with `bytes` more filled.
    ///
    /// # Panics
    /// If none was lent, or it is another one.
    pub fn received_payload(&mut self, buffer: PayloadBuffer, bytes: usize) {
        self.stirred = true;
        let lent = std::mem::take(&mut self.lent);
        if self.closed || self.ending.is_some() || self.broken.is_some() {
            return;
        }
        assert!(lent, "a buffer comes back that was not lent");
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.take_back(buffer, bytes, &mut self.output);
        }
    }

    /// The peer has ended its side of the stream. What it asked for before is done and answered.
    pub fn end_of_stream(&mut self) {
        self.stirred = true;
        self.lent = false;
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.abandon_payload();
        }
        self.end(CloseReason::EndOfStream);
    }

    /// The socket is broken, or the driver has had enough. I/O that has begun goes on to its end, and nothing else.
    pub fn lost(&mut self) {
        self.break_off(CloseReason::Lost);
    }

    /// No new requests: they are answered with `ESHUTDOWN`. The end comes when those under way are done and answered. A connection that has not chosen
    /// an export yet just ends.
    pub fn drain(&mut self) {
        self.stirred = true;
        self.draining = true;
        match &mut self.phase {
            Phase::Handshake(_) => self.end(CloseReason::Drained),
            Phase::Transmission(transmission) => transmission.drain(),
        }
    }

    /// Which request of the peer `id` belongs to, as long as that has no outcome; none where nobody is answered any more.
    #[must_use]
    pub fn request_of(&self, id: IoId) -> Option<RequestId> {
        match &self.phase {
            Phase::Transmission(transmission) => transmission.request_of(id),
            Phase::Handshake(_) => None,
        }
    }

    /// Whether more I/O of `id` may follow.
    #[must_use]
    pub fn has_request(&self, id: RequestId) -> bool {
        matches!(&self.phase, Phase::Transmission(transmission) if transmission.has_request(id))
    }

    /// An I/O has ended.
    ///
    /// # Panics
    /// If it is not under way.
    pub fn answered(&mut self, id: IoId, outcome: Outcome) {
        self.stirred = true;
        let Phase::Transmission(transmission) = &mut self.phase else {
            panic!("an answer before there were requests")
        };
        transmission.answered(id, outcome, &mut self.output);
    }

    /// The bytes of the last [`Action::Send`] have left, all of them.
    ///
    /// # Panics
    /// If nothing is being sent.
    pub fn sent(&mut self) {
        self.stirred = true;
        if self.broken.is_none() {
            self.output.sent();
        }
    }

    /// What to do next; `None`: nothing for now.
    pub fn poll(&mut self, exports: &dyn Exports) -> Option<Action> {
        if self.closed {
            return None;
        }
        if std::mem::take(&mut self.stirred) {
            self.advance(exports);
        }
        if let Some(reason) = self.broken {
            self.closed = true;
            return Some(Action::Close(reason));
        }
        if let Some(export) = self.attach.take() {
            return Some(Action::Attach(export));
        }
        let mut idle = true;
        if let Phase::Transmission(transmission) = &mut self.phase {
            if let Some((id, kind)) = transmission.next_io() {
                return Some(Action::Io { id, kind });
            }
            idle = transmission.is_idle();
        }
        if let Some(parts) = self.output.next_send() {
            return Some(Action::Send(parts));
        }
        let reason = self.ending.filter(|_| idle && self.output.is_empty())?;
        self.closed = true;
        Some(Action::Close(reason))
    }

    /// Whether it was closed and none of its I/O is under way: it can be dropped.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let waits = matches!(&self.phase, Phase::Transmission(transmission) if transmission.has_io());
        self.closed && !waits
    }

    /// Whether no export has been chosen yet.
    #[must_use]
    pub fn in_handshake(&self) -> bool {
        matches!(self.phase, Phase::Handshake(_))
    }

    /// What it has in memory.
    #[must_use]
    pub fn buffered(&self) -> Buffered {
        let mut buffered = Buffered {
            outgoing: self.output.outgoing.used() + self.output.stream.used(),
            stream: self.output.stream.used(),
            backlog: self.backlog.len(),
            ..Buffered::default()
        };
        if let Phase::Transmission(transmission) = &self.phase {
            buffered.incoming = transmission.incoming_bytes();
            buffered.requests = transmission.requests_under_way() + self.output.unsent_replies();
        }
        buffered
    }

    /// Bytes of memory that it has now besides itself, spare room included, and without what its driver was given.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        let transmission = match &self.phase {
            Phase::Transmission(transmission) => transmission.heap_bytes(),
            Phase::Handshake(_) => 0,
        };
        self.backlog.capacity() + self.output.heap_bytes() + transmission
    }

    /// What it shares with others.
    #[must_use]
    pub fn shared_bytes(&self) -> &SharedBytes {
        &self.shared
    }

    /// Do whatever has become possible.
    fn advance(&mut self, exports: &dyn Exports) {
        if self.broken.is_some() {
            return;
        }
        if self.ending.is_none() {
            self.shake_hands(exports);
            self.use_backlog();
        }
        let Phase::Transmission(transmission) = &mut self.phase else { return };
        transmission.start_replies(&mut self.output);
        if let Some(reason) = transmission.broken() {
            return self.break_off(reason);
        }
        if transmission.has_disconnected() {
            self.end(CloseReason::Disconnected);
        } else if self.draining && transmission.is_idle() {
            self.end(CloseReason::Drained);
        }
    }

    fn shake_hands(&mut self, exports: &dyn Exports) {
        let Phase::Handshake(handshake) = &mut self.phase else { return };
        let (taken, progress) = handshake.step(&self.backlog[self.used..], exports, self.output.options());
        self.used += taken;
        self.replies_full = matches!(progress, Progress::RepliesFull);
        match progress {
            Progress::Starved | Progress::RepliesFull => self.trim_backlog(),
            Progress::Over(reason @ CloseReason::Disconnected) => self.end(reason),
            Progress::Over(reason) => self.break_off(reason),
            Progress::Agreed(agreement) => {
                self.attach = Some(Arc::clone(&agreement.export));
                let transmission = Transmission::new(agreement, self.limits, self.shared.clone());
                self.phase = Phase::Transmission(Box::new(transmission));
            }
        }
    }

    fn use_backlog(&mut self) {
        let Phase::Transmission(transmission) = &mut self.phase else { return };
        self.used += transmission.consume(&self.backlog[self.used..], &mut self.output);
        self.trim_backlog();
    }

    /// Forget what was used up of the backlog, once that is all or the greater part.
    fn trim_backlog(&mut self) {
        if self.used == self.backlog.len() {
            self.backlog = Vec::new();
            self.used = 0;
        } else if self.used > self.backlog.len() / 2 {
            self.backlog.drain(..self.used);
            self.used = 0;
        }
    }

    /// Nothing more is received.
    fn end(&mut self, reason: CloseReason) {
        self.ending.get_or_insert(reason);
        self.backlog = Vec::new();
        self.used = 0;
    }

    /// Nothing more is done.
    fn break_off(&mut self, reason: CloseReason) {
        self.stirred = true;
        if self.broken.is_some() || self.closed {
            return;
        }
        self.broken = Some(reason);
        self.end(reason);
        self.attach = None;
        self.output.clear();
        if let Phase::Transmission(transmission) = &mut self.phase {
            transmission.abandon();
        }
    }
}
