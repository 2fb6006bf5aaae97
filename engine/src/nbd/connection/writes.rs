//! Writes: every piece goes to the disk as soon as it was received as a whole, whatever becomes of the others.
//!
//! Once a piece has failed, those that have not been given to the disk are received and dropped. A write that is to be durable before its reply
//! is one operation for the disk if it is one piece; else the disk is flushed after the last one.

use super::action::{IoKind, Outcome};
use super::output::Output;
use super::table::{Body, Failure, Io, Key, Transmission, length_of, outcome_of, succeed};
use crate::units::ByteRange;

/// A write of which the first piece is being received, or that is further on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Write {
    /// Durable before the reply.
    pub(super) fua: bool,
    /// All of its payload has come.
    pub(super) received: bool,
    /// Pieces that were given to the disk.
    pub(super) pieces: usize,
    /// What follows is no piece, but the flush.
    pub(super) flushing: bool,
}

impl Transmission {
    fn write(&mut self, key: Key) -> &mut Write {
        match &mut self.requests[key].body {
            Body::Write(write) => write,
            _ => unreachable!("it is a write"),
        }
    }

    /// A piece has come; `last`: the last one.
    pub(super) fn piece_received(
        &mut self,
        key: Key,
        offset: u64,
        data: Vec<u8>,
        last: bool,
        output: &mut Output,
    ) {
        let failed = self.requests[key].failure.is_some();
        let write = self.write(key);
        write.received = last;
        if failed {
            self.receiving.give(data.len());
            return self.settle_write(key, output);
        }
        let fua = write.fua && last && write.pieces == 0;
        write.pieces += 1;
        let range = ByteRange::new(offset, data.len() as u64);
        self.submit(key, range, 0, IoKind::Write { offset, data, fua });
    }

    /// The payload has ended without another piece.
    pub(super) fn payload_ended(&mut self, key: Key, output: &mut Output) {
        self.write(key).received = true;
        self.settle_write(key, output);
    }

    pub(super) fn piece_written(&mut self, io: &Io, outcome: Outcome, output: &mut Output) {
        self.receiving.give(length_of(io.range));
        if let Err(error) = outcome_of(outcome) {
            self.requests[io.request].fail(Failure::at(error, io.range));
        }
        self.settle_write(io.request, output);
    }

    /// Answer, if everything is done.
    fn settle_write(&mut self, key: Key, output: &mut Output) {
        let failed = self.requests[key].failure.is_some();
        let waits = self.requests[key].in_flight > 0;
        let write = self.write(key);
        if !write.received || waits {
            return;
        }
        if write.fua && write.pieces > 1 && !write.flushing && !failed {
            write.flushing = true;
            return self.submit(key, ByteRange::new(0, 0), 0, IoKind::Flush);
        }
        let request = self.end(key);
        match request.failure {
            None => succeed(output, request.cookie),
            Some(failure) => self.fail(output, request.cookie, failure),
        }
    }
}
