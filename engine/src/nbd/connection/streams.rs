//! Reads whose reply goes out as a whole while it is read: there is not enough memory to have all of it before its first byte leaves.
//!
//! # Model
//! One at a time. Its pieces are read within a window, which is an account of its own, so that nothing else can keep it from going on. First
//! the window is filled: until then an error can still be told. Then the header leaves, and the pieces in their order; replies
//! of other requests wait behind.
//!
//! # After the header
//! A piece that cannot be read ends the connection, if the reply is a simple one: there is no other way to tell. In a structured reply it is zeros,
//! and an error with the offset follows the data.

use std::collections::VecDeque;

use super::action::{CloseReason, IoKind, Outcome};
use super::output::Output;
use super::table::{Body, Io, Key, Transmission, data_of, length_of, put_error};
use crate::nbd::wire::{ChunkHeader, chunk};
use crate::units::ByteRange;

/// The reply that is being sent while it is read.
#[derive(Debug)]
pub(super) struct Stream {
    key: Key,
    range: ByteRange,
    /// What was not given to the disk yet.
    rest: ByteRange,
    /// Pieces that are read or about to be sent, in order; `None`: on the disk.
    pieces: VecDeque<Option<Vec<u8>>>,
    /// Number of the first of them.
    first: usize,
    /// Bytes of the window that they hold.
    held: usize,
    /// The header has gone.
    headed: bool,
}

impl Stream {
    fn new(key: Key, range: ByteRange) -> Self {
        Self { key, range, rest: range, pieces: VecDeque::new(), first: 0, held: 0, headed: false }
    }
}

impl Transmission {
    pub(super) fn stream_read(&mut self, io: &Io, outcome: Outcome, output: &mut Output) {
        let stream = self.stream.as_mut().expect("only the one whose turn it is has I/O");
        let data = match data_of(outcome, io.range) {
            Ok(Some(data)) => data,
            Ok(None) => vec![0; length_of(io.range)],
            Err(failure) => {
                self.requests[io.request].fail(failure);
                if stream.headed && !self.structured {
                    return self.break_off(CloseReason::ReadFailed);
                }
                // Before the header this is dropped.
                if stream.headed { vec![0; length_of(io.range)] } else { Vec::new() }
            }
        };
        stream.pieces[io.piece - stream.first] = Some(data);
        self.advance_streams(output);
    }

    /// Do whatever has become possible.
    pub(super) fn advance_streams(&mut self, output: &mut Output) {
        loop {
            if self.stream.is_none() {
                let Some(key) = self.streams.pop_front() else { return };
                let Body::Streamed(range) = self.requests[key].body else { unreachable!("it is a stream") };
                self.stream = Some(Stream::new(key, range));
            }
            self.fill_window(output);
            if !self.begin_stream(output) {
                return;
            }
            self.send_pieces(output);
            if !self.end_stream(output) {
                return;
            }
        }
    }

    /// Give pieces to the disk while there is room in the window.
    fn fill_window(&mut self, output: &mut Output) {
        let Some(mut stream) = self.stream.take() else { return };
        let hopeless = !stream.headed && self.requests[stream.key].failure.is_some();
        while !stream.rest.is_empty() && !hopeless {
            let (start, end) = (stream.rest.offset, stream.rest.end());
            let Some(length) = output.stream.take_piece(start, end, self.limits.piece_bytes) else { break };
            let range = ByteRange::new(start, length as u64);
            self.submit(stream.key, range, stream.first + stream.pieces.len(), IoKind::Read { range });
            stream.pieces.push_back(None);
            stream.held += length;
            stream.rest = ByteRange::between(range.end(), end);
        }
        self.stream = Some(stream);
    }

    /// Send the header, if it is time. Whether the reply is under way, or has failed before.
    fn begin_stream(&mut self, output: &mut Output) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        let request = &self.requests[stream.key];
        if stream.headed {
            return true;
        }
        if request.in_flight > 0 {
            return false;
        }
        if request.failure.is_some() {
            return true;
        }
        // What the reply before this one still holds of the window is free in a moment.
        let window_to_come = output.stream.used() > stream.held;
        if stream.pieces.is_empty() || (!stream.rest.is_empty() && window_to_come) {
            return false;
        }
        stream.headed = true;
        let (range, cookie) = (stream.range, request.cookie);
        self.put_whole_header(output.begin_stream(), cookie, range, false);
        true
    }

    fn send_pieces(&mut self, output: &mut Output) {
        let Some(stream) = &mut self.stream else { return };
        while stream.headed
            && let Some(Some(_)) = stream.pieces.front()
        {
            let data = stream.pieces.pop_front().flatten().expect("just seen");
            stream.first += 1;
            stream.held -= data.len();
            output.stream_payload(data);
        }
    }

    /// End the reply, if all of it is in the line, or it has failed before it began. Whether it was ended.
    fn end_stream(&mut self, output: &mut Output) -> bool {
        let Some(stream) = self.stream.take() else { return false };
        if !stream.headed {
            output.stream.give(stream.held);
            let request = self.end(stream.key);
            let failure = request.failure.expect("else it would have a header");
            self.fail(output, request.cookie, failure);
            return true;
        }
        if !stream.pieces.is_empty() || !stream.rest.is_empty() {
            self.stream = Some(stream);
            return false;
        }
        let request = self.end(stream.key);
        let mut end = Vec::new();
        match request.failure {
            Some(failure) => put_error(&mut end, request.cookie, failure),
            None if self.structured => {
                ChunkHeader { done: true, kind: chunk::NONE, cookie: request.cookie }.put(&mut end, &[], 0);
            }
            None => {}
        }
        output.end_stream(&end);
        true
    }
}
