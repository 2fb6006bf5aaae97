//! Reads whose replies stand for themselves: in chunks as the pieces come, or gathered until all of it is there.

use super::action::{IoKind, Outcome};
use super::output::Output;
use super::table::{Body, Io, Key, Transmission, Turn, data_of, length_of, put_error};
use crate::nbd::wire::{self, ChunkHeader, chunk};
use crate::units::ByteRange;

/// A read that is answered in chunks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunks {
    /// What was not given to the disk yet.
    pub(super) rest: ByteRange,
    /// It is in the line for memory.
    pub(super) in_line: bool,
}

/// A read that is answered when all of it is there.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) range: ByteRange,
    /// What has come; empty where it has not, or has failed.
    pub(super) pieces: Vec<Vec<u8>>,
}

impl Transmission {
    fn chunks(&mut self, key: Key) -> &mut Chunks {
        match &mut self.requests[key].body {
            Body::Chunks(chunks) => chunks,
            _ => unreachable!("it is read in chunks"),
        }
    }

    fn gathered(&mut self, key: Key) -> &mut Gathered {
        match &mut self.requests[key].body {
            Body::Gathered(gathered) => gathered,
            _ => unreachable!("it is gathered"),
        }
    }

    /// Give the next piece to the disk, if there is memory for it.
    pub(super) fn start_chunk(&mut self, key: Key, output: &mut Output) -> Turn {
        let (piece_bytes, pieces) = (self.limits.piece_bytes, self.limits.pieces_a_request);
        let rest = self.chunks(key).rest;
        let Some(length) = output.outgoing.take_piece(rest.offset, rest.end(), piece_bytes) else {
            return Turn::NoRoom;
        };
        let range = ByteRange::new(rest.offset, length as u64);
        self.submit(key, range, 0, IoKind::Read { range });
        let enough = self.requests[key].in_flight >= pieces;
        let chunks = self.chunks(key);
        chunks.rest = ByteRange::between(range.end(), rest.end());
        chunks.in_line = !chunks.rest.is_empty() && !enough;
        if chunks.in_line { Turn::Again } else { Turn::Over }
    }

    pub(super) fn chunk_read(&mut self, io: &Io, outcome: Outcome, output: &mut Output) {
        let key = io.request;
        let data = data_of(outcome, io.range);
        if let Err(failure) = data {
            self.requests[key].fail(failure);
            // There is no use in the rest.
            if self.chunks(key).in_line {
                self.line.retain(|&other| other != key);
            }
            *self.chunks(key) = Chunks { rest: ByteRange::new(io.range.end(), 0), in_line: false };
        }
        let chunks = self.chunks(key);
        if !chunks.rest.is_empty() && !chunks.in_line {
            chunks.in_line = true;
            self.line.push_back(key);
        }
        let over = self.chunks(key).rest.is_empty() && self.requests[key].in_flight == 0;
        let request = &self.requests[key];
        let done = over && request.failure.is_none();
        let (cookie, length) = (request.cookie, length_of(io.range));
        let offset = io.range.offset.to_be_bytes();
        match data {
            Ok(Some(data)) => {
                let header = ChunkHeader { done, kind: chunk::OFFSET_DATA, cookie };
                header.put(output.text(), &[&offset], length);
                output.payload(data, length);
            }
            Ok(None) => {
                let size = u32::try_from(length).expect("pieces are bounded").to_be_bytes();
                let header = ChunkHeader { done, kind: chunk::OFFSET_HOLE, cookie };
                header.put(output.text(), &[&offset, &size], 0);
                output.outgoing.give(length);
            }
            Err(_) => output.outgoing.give(length),
        }
        if over {
            if let Some(failure) = self.end(key).failure {
                put_error(output.text(), cookie, failure);
            }
            output.end_reply();
        }
    }

    /// Give all of it to the disk, if there is memory for that.
    pub(super) fn start_gathering(&mut self, key: Key, output: &mut Output) -> Turn {
        let piece_bytes = self.limits.piece_bytes;
        let range = self.gathered(key).range;
        if !output.outgoing.take(length_of(range)) {
            if output.outgoing.used() > 0 {
                return Turn::NoRoom;
            }
            // Others have all that is shared, and may keep it; what this connection has to itself is too little.
            self.requests[key].body = Body::Streamed(range);
            self.streams.push_back(key);
            return Turn::Over;
        }
        let mut rest = range;
        while !rest.is_empty() {
            let length = first_piece(rest, piece_bytes as u64);
            let piece = ByteRange::new(rest.offset, length);
            rest = ByteRange::between(piece.end(), rest.end());
            let gathered = self.gathered(key);
            gathered.pieces.push(Vec::new());
            let index = gathered.pieces.len() - 1;
            self.submit(key, piece, index, IoKind::Read { range: piece });
        }
        Turn::Over
    }

    pub(super) fn piece_gathered(&mut self, io: &Io, outcome: Outcome, output: &mut Output) {
        let key = io.request;
        match data_of(outcome, io.range) {
            Ok(data) => {
                let data = data.unwrap_or_else(|| vec![0; length_of(io.range)]);
                self.gathered(key).pieces[io.piece] = data;
            }
            Err(failure) => self.requests[key].fail(failure),
        }
        if self.requests[key].in_flight > 0 {
            return;
        }
        let request = self.end(key);
        let Body::Gathered(gathered) = request.body else { unreachable!("it is gathered") };
        let length = length_of(gathered.range);
        if let Some(failure) = request.failure {
            output.outgoing.give(length);
            return self.fail(output, request.cookie, failure);
        }
        self.put_whole_header(output.text(), request.cookie, gathered.range, true);
        for piece in gathered.pieces {
            let length = piece.len();
            output.payload(piece, length);
        }
        output.end_reply();
    }

    /// Append the header of a reply that goes out as a whole. `done`: nothing can go wrong any more.
    pub(super) fn put_whole_header(&self, text: &mut Vec<u8>, cookie: u64, range: ByteRange, done: bool) {
        if self.structured {
            let header = ChunkHeader { done, kind: chunk::OFFSET_DATA, cookie };
            header.put(text, &[&range.offset.to_be_bytes()], length_of(range));
        } else {
            wire::simple_reply(text, cookie, None);
        }
    }
}

/// Length of the first piece of `range`, as [`crate::nbd::limits`] cuts them where there is room.
fn first_piece(range: ByteRange, piece_bytes: u64) -> u64 {
    if range.length <= piece_bytes { range.length } else { piece_bytes - range.offset % piece_bytes }
}
