//! What comes from the peer after the handshake, byte by byte: headers of requests, payloads of writes, and payloads that nobody wants.
//!
//! # Model
//! A stream that is cut anywhere: [`Transmission::consume`] takes what it can do something with and leaves the rest, when there is no room for another
//! request, or no memory for the next piece of a payload. How the stream is cut makes no difference to what comes of it.
//!
//! # What is checked when
//! A header that does not begin as one, or announces more payload than anybody may send, ends the connection: where the next one begins cannot be
//! known. Everything else is an error of its request, and is told when the payload has been dropped.

use super::action::{CloseReason, PayloadBuffer, Receive};
use super::output::Output;
use super::table::{Body, Failure, Key, Transmission};
use crate::nbd::wire::RequestHeader;
use crate::units::ByteRange;

/// A piece of which so many bytes are missing is received by itself, into its own buffer. Less than that is received together with what follows.
const WORTH_A_RECEIVE: usize = 16 << 10;

/// What is being received.
#[derive(Debug)]
pub(super) enum Incoming {
    /// A header, of which so many bytes have come.
    Header {
        bytes: [u8; RequestHeader::BYTES],
        filled: usize,
    },
    Payload(Payload),
    /// So many bytes of payload that are of no use, and what follows then.
    Dropped {
        left: usize,
        then: Then,
    },
}

/// What follows a payload that was dropped.
#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    /// The request was refused.
    Refuse { cookie: u64, failure: Failure },
    /// A piece of this write has failed; those that are on the disk are waited for.
    End(Key),
}

impl Default for Incoming {
    fn default() -> Self {
        Self::Header { bytes: [0; RequestHeader::BYTES], filled: 0 }
    }
}

/// The payload of a write.
#[derive(Debug)]
pub(super) struct Payload {
    request: Key,
    /// Where on the disk the next piece goes, and what follows it.
    rest: ByteRange,
    piece: Option<Piece>,
}

/// A piece of a payload.
#[derive(Debug)]
struct Piece {
    offset: u64,
    length: usize,
    /// What has come.
    data: Vec<u8>,
}

impl Transmission {
    /// What to receive next. `unsent`: replies that have not left.
    pub(super) fn wants(&self, most: usize, unsent: usize) -> Option<Receive> {
        if self.is_deaf() || (self.draining && self.is_idle()) {
            return None;
        }
        let any = Some(Receive::Any { most });
        match &self.incoming {
            Incoming::Header { .. } => any.filter(|_| self.has_room(unsent)),
            Incoming::Dropped { .. } => any,
            Incoming::Payload(payload) => {
                let piece = payload.piece.as_ref()?;
                let missing = piece.length - piece.data.len();
                if missing >= WORTH_A_RECEIVE { Some(Receive::Payload { missing }) } else { any }
            }
        }
    }

    fn has_room(&self, unsent: usize) -> bool {
        self.requests_under_way() + unsent < self.limits.requests
    }

    /// Take what can be taken of `bytes`, and say how many these are.
    pub(super) fn consume(&mut self, bytes: &[u8], output: &mut Output) -> usize {
        let mut rest = bytes;
        while !self.is_deaf() && self.consume_some(&mut rest, output) {}
        if self.is_deaf() { bytes.len() } else { bytes.len() - rest.len() }
    }

    /// One step; `false`: nothing more can be done.
    fn consume_some(&mut self, rest: &mut &[u8], output: &mut Output) -> bool {
        let has_room = self.has_room(output.unsent_replies());
        match &mut self.incoming {
            Incoming::Header { bytes, filled } => {
                if rest.is_empty() || !has_room {
                    return false;
                }
                let taken = take(rest, RequestHeader::BYTES - *filled);
                bytes[*filled..*filled + taken.len()].copy_from_slice(taken);
                *filled += taken.len();
                if *filled == RequestHeader::BYTES {
                    let header = RequestHeader::decode(bytes);
                    self.incoming = Incoming::default();
                    match header {
                        Some(header) => self.request(header, output),
                        None => self.violation("a request did not begin as requests do"),
                    }
                }
                true
            }
            Incoming::Dropped { left, then } => {
                *left -= take(rest, *left).len();
                if *left > 0 {
                    return false;
                }
                let then = *then;
                self.incoming = Incoming::default();
                match then {
                    Then::Refuse { cookie, failure } => self.fail(output, cookie, failure),
                    Then::End(key) => self.payload_ended(key, output),
                }
                true
            }
            Incoming::Payload(_) => {
                if !self.has_piece() {
                    return self.begin_piece();
                }
                if rest.is_empty() {
                    return false;
                }
                let Incoming::Payload(Payload { piece: Some(piece), .. }) = &mut self.incoming else {
                    unreachable!("there is a piece")
                };
                piece.data.extend_from_slice(take(rest, piece.length - piece.data.len()));
                self.end_piece(output);
                true
            }
        }
    }

    /// The peer broke a rule.
    pub(super) fn violation(&mut self, what: &'static str) {
        self.break_off(CloseReason::Violation(what));
    }

    fn has_piece(&self) -> bool {
        matches!(&self.incoming, Incoming::Payload(payload) if payload.piece.is_some())
    }

    /// A write has been accepted, whose payload comes next.
    pub(super) fn expect_payload(&mut self, request: Key, range: ByteRange) {
        self.incoming = Incoming::Payload(Payload { request, rest: range, piece: None });
    }

    /// So many bytes of payload come next that nobody wants.
    pub(super) fn expect_useless(&mut self, left: usize, then: Then) {
        self.incoming = Incoming::Dropped { left, then };
    }

    /// Find the memory for the next piece; `false`: there is none for now.
    fn begin_piece(&mut self) -> bool {
        let Incoming::Payload(payload) = &mut self.incoming else { unreachable!("a payload is received") };
        let (key, start, end) = (payload.request, payload.rest.offset, payload.rest.end());
        if self.requests[key].failure.is_some() {
            let left = usize::try_from(end - start).expect("payloads are bounded");
            self.expect_useless(left, Then::End(key));
            return true;
        }
        let Some(length) = self.receiving.take_piece(start, end, self.limits.piece_bytes) else {
            return false;
        };
        payload.piece = Some(Piece { offset: start, length, data: Vec::with_capacity(length) });
        payload.rest = ByteRange::between(start + length as u64, end);
        true
    }

    /// If the piece is complete, it goes to the disk.
    fn end_piece(&mut self, output: &mut Output) {
        let Incoming::Payload(payload) = &mut self.incoming else { unreachable!("a payload is received") };
        let Some(piece) = payload.piece.take_if(|piece| piece.data.len() == piece.length) else { return };
        let (key, last) = (payload.request, payload.rest.is_empty());
        if last {
            self.incoming = Incoming::default();
        }
        self.piece_received(key, piece.offset, piece.data, last, output);
    }

    fn piece(&mut self) -> &mut Piece {
        match &mut self.incoming {
            Incoming::Payload(Payload { piece: Some(piece), .. }) => piece,
            _ => panic!("a piece of payload is to be received"),
        }
    }

    /// Hand out the buffer of the piece.
    pub(super) fn lend(&mut self) -> PayloadBuffer {
        let piece = self.piece();
        let filled = piece.data.len();
        let mut buffer = std::mem::take(&mut piece.data);
        buffer.resize(piece.length, 0);
        PayloadBuffer { buffer, filled }
    }

    /// It comes back with `bytes` more.
    pub(super) fn take_back(&mut self, lent: PayloadBuffer, bytes: usize, output: &mut Output) {
        let PayloadBuffer { mut buffer, filled } = lent;
        let piece = self.piece();
        let filled = filled + bytes;
        assert!(buffer.len() == piece.length && filled <= piece.length, "the buffer is that of the piece");
        buffer.truncate(filled);
        piece.data = buffer;
        self.end_piece(output);
    }

    /// What is being received will never be whole.
    pub(super) fn abandon_payload(&mut self) {
        let key = match std::mem::take(&mut self.incoming) {
            Incoming::Payload(payload) => {
                self.receiving.give(payload.piece.map_or(0, |piece| piece.length));
                payload.request
            }
            Incoming::Dropped { then: Then::End(key), .. } => key,
            Incoming::Header { .. } | Incoming::Dropped { .. } => return,
        };
        self.requests[key].body = Body::Abandoned;
        if self.requests[key].in_flight == 0 {
            self.end(key);
        }
    }
}

/// The first `most` of `rest`, or all of it if that is less.
fn take<'a>(rest: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (taken, left) = rest.split_at(most.min(rest.len()));
    *rest = left;
    taken
}
