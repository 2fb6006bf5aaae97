//! What becomes of a request once its header is there: it is refused, answered at once, or put in the table.
//!
//! The order of the checks: is the export still served, is it a request that is known, with flags that are, may the export be changed, does the range
//! lie on the disk. A write that is refused has its payload dropped first.

use super::action::{CloseReason, IoKind};
use super::input::Then;
use super::output::Output;
use super::reads::{Chunks, Gathered};
use super::status::Status;
use super::table::{Body, Failure, Transmission, succeed};
use super::writes::Write;
use crate::nbd::wire::{ChunkHeader, MAX_PAYLOAD, RequestHeader, WireError, chunk, command, command_flag};
use crate::units::ByteRange;

type Checked<T> = Result<T, Failure>;

fn refuse<T>(error: WireError, message: &'static str) -> Checked<T> {
    Err(Failure::new(error, message))
}

impl Transmission {
    /// A header has come.
    pub(super) fn request(&mut self, header: RequestHeader, output: &mut Output) {
        if header.command == command::DISC {
            return self.disconnect();
        }
        if header.command == command::WRITE && header.length > MAX_PAYLOAD {
            return self.break_off(CloseReason::Violation("a write was longer than anything"));
        }
        let result = self.check(&header);
        let payload = if header.command == command::WRITE { header.length as usize } else { 0 };
        match result {
            Ok(range) => self.accept(&header, range, output),
            Err(failure) if payload > 0 => {
                self.expect_useless(payload, Then::Refuse { cookie: header.cookie, failure });
            }
            Err(failure) => self.fail(output, header.cookie, failure),
        }
    }

    /// Whether it can be done, and on which bytes.
    fn check(&self, header: &RequestHeader) -> Checked<ByteRange> {
        if self.draining {
            return refuse(WireError::Shutdown, WireError::Shutdown.message());
        }
        self.check_flags(header)?;
        self.check_offered(header.command)?;
        if header.command == command::FLUSH {
            // Its range means nothing.
            return Ok(ByteRange::new(0, 0));
        }
        self.check_range(header)
    }

    fn check_flags(&self, header: &RequestHeader) -> Checked<()> {
        let features = self.export.features;
        let own = match header.command {
            command::READ if self.structured => command_flag::DF,
            command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE_ZEROES if features.fast_zero => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::WRITE_ZEROES => command_flag::NO_HOLE,
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            _ => return refuse(WireError::Invalid, "the command is not known"),
        };
        // Durability may be asked of every command, if of any.
        let fua = if features.flush { command_flag::FUA } else { 0 };
        if header.flags & !(own | fua) != 0 {
            return refuse(WireError::Invalid, "a flag is not known, or not for this command");
        }
        Ok(())
    }

    /// Whether the export offers the command, or it can be done nevertheless.
    fn check_offered(&self, which: u16) -> Checked<()> {
        let features = self.export.features;
        let changes = matches!(which, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if changes && self.export.is_read_only() {
            return refuse(WireError::Permission, "the export is read-only");
        }
        let offered = match which {
            command::FLUSH => features.flush || self.export.is_read_only(),
            command::TRIM => features.trim,
            command::WRITE_ZEROES => features.write_zeroes,
            command::BLOCK_STATUS => {
                if self.contexts.is_empty() {
                    return refuse(WireError::Invalid, "no metadata context was selected");
                }
                true
            }
            // Clients are known that ask for caching without its being offered.
            _ => true,
        };
        if offered { Ok(()) } else { refuse(WireError::Invalid, "the export does not offer the command") }
    }

    fn check_range(&self, header: &RequestHeader) -> Checked<ByteRange> {
        let sizes = self.export.block_sizes;
        let length = u64::from(header.length);
        let beyond = match header.command {
            command::WRITE | command::WRITE_ZEROES => WireError::NoSpace,
            _ => WireError::Invalid,
        };
        let end = header.offset.checked_add(length);
        if end.is_none_or(|end| end > self.export.length().0) {
            return refuse(beyond, "the request is beyond the end of the export");
        }
        let carries = matches!(header.command, command::READ | command::WRITE);
        if carries && header.length > sizes.maximum_payload() {
            return refuse(WireError::Invalid, "the request is longer than the export allows");
        }
        let minimum = u64::from(sizes.minimum());
        // What reaches the end of the export may end with it.
        let ends_well = length.is_multiple_of(minimum) || end == Some(self.export.length().0);
        if !header.offset.is_multiple_of(minimum) || !ends_well {
            return refuse(WireError::Invalid, "the request is not aligned to the minimum block size");
        }
        if header.command == command::BLOCK_STATUS && length == 0 {
            return refuse(WireError::Invalid, "the status of nothing was asked for");
        }
        Ok(ByteRange::new(header.offset, length))
    }

    /// Put a request that was found good in the table, or answer it at once if there is nothing to do.
    fn accept(&mut self, header: &RequestHeader, range: ByteRange, output: &mut Output) {
        let cookie = header.cookie;
        let has = |flag: u16| header.flags & flag != 0;
        let fua = has(command_flag::FUA);
        if range.is_empty() && header.command != command::FLUSH {
            return self.accept_empty(header, output);
        }
        match header.command {
            command::READ => self.accept_read(cookie, range, has(command_flag::DF)),
            command::WRITE => {
                let write = Write { fua, received: false, pieces: 0, flushing: false };
                let key = self.begin(cookie, Body::Write(write));
                self.expect_payload(key, range);
            }
            command::FLUSH if self.export.features.flush => {
                let key = self.begin(cookie, Body::Plain { fast: false });
                self.submit(key, range, 0, IoKind::Flush);
            }
            command::TRIM => {
                let key = self.begin(cookie, Body::Plain { fast: false });
                self.submit(key, range, 0, IoKind::Discard { range, fua });
            }
            command::WRITE_ZEROES => {
                let (no_hole, fast) = (has(command_flag::NO_HOLE), has(command_flag::FAST_ZERO));
                let key = self.begin(cookie, Body::Plain { fast });
                self.submit(key, range, 0, IoKind::WriteZeroes { range, no_hole, fast, fua });
            }
            command::CACHE if self.export.features.cache => {
                let key = self.begin(cookie, Body::Plain { fast: false });
                self.submit(key, range, 0, IoKind::Cache { range });
            }
            command::BLOCK_STATUS => {
                let one = has(command_flag::REQ_ONE);
                let key = self.begin(cookie, Body::Status(Status { range, one, extents: 0, charge: 0 }));
                self.line.push_back(key);
            }
            // A flush of what cannot change, and advice that is of no use here.
            _ => succeed(output, cookie),
        }
    }

    fn accept_empty(&mut self, header: &RequestHeader, output: &mut Output) {
        if header.command == command::READ && self.structured {
            let end = ChunkHeader { done: true, kind: chunk::NONE, cookie: header.cookie };
            end.put(output.text(), &[], 0);
            return output.end_reply();
        }
        succeed(output, header.cookie);
    }

    /// `unfragmented`: the reply is one chunk.
    fn accept_read(&mut self, cookie: u64, range: ByteRange, unfragmented: bool) {
        if self.structured && !unfragmented {
            let key = self.begin(cookie, Body::Chunks(Chunks { rest: range, in_line: true }));
            return self.line.push_back(key);
        }
        if range.length <= self.limits.stream_bytes.min(self.limits.outgoing_bytes) as u64 {
            let key = self.begin(cookie, Body::Gathered(Gathered { range, pieces: Vec::new() }));
            return self.line.push_back(key);
        }
        let key = self.begin(cookie, Body::Streamed(range));
        self.streams.push_back(key);
    }
}
