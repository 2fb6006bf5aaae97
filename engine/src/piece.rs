//! One read or write of contiguous bytes, with its resumption state.
//!
//! # Model
//! A piece is a wanted byte range of one side and the place in the arena where it goes or comes from. It is carried out by
//! one operation after another until the whole range is there: the kernel may give less than was asked for. Direct I/O works in
//! sectors: a read is rounded up (its buffer has room), a write goes as far as whole sectors reach and the rest of the last sector
//! follows through the page cache, so that nothing beyond the disk's end is written. After a short result the next
//! operation starts at the sector that it ended in.
//!
//! # What counts as what
//! A read that gives nothing before the range's end, or no whole sector twice in a row, has met the end of a storage that
//! was longer when it was opened. A write that writes nothing is an error. `EAGAIN`, `EINTR` and a cancellation nobody asked for are
//! retried a bounded number of times; every other error ends the piece.

use nix::errno::Errno;

use crate::copier::plan::Side;
use crate::error::is_lost_connection;
use crate::ring::{BufferRange, IoPath, Op, Output};
use crate::units::ByteRange;

/// Results without progress in a row before a piece gives up.
const MAX_STALLS: u32 = 16;
/// Short results within the first sector in a row before they count as the end of the storage.
const MAX_SUBSECTOR_READS: u32 = 2;

/// Direction of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Storage to arena.
    Read,
    /// Arena to storage.
    Write,
}

/// Why an operation on a cluster failed for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The kernel said so.
    Errno(Errno),
    /// So the connection to a server was lost: nothing can be read or written there any more.
    Lost(Errno),
    /// The storage ended before the length that it had when it was opened.
    EndOfStorage,
    /// A write wrote nothing, again and again.
    NothingWritten,
    /// What was read back is not what was written.
    Mismatch,
}

impl Fault {
    /// What `errno` of an operation on `side` means.
    pub(crate) fn of(errno: Errno, side: &Side) -> Self {
        if side.remote && is_lost_connection(errno) { Self::Lost(errno) } else { Self::Errno(errno) }
    }
}

/// What follows from a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The whole range is there.
    Finished,
    /// Go on with [`Piece::op`].
    Again,
    /// It failed.
    Failed(Fault),
}

/// A read or write under way. See the module's header.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    direction: Direction,
    range: ByteRange,
    /// Where `range` starts in the arena.
    buffer: u32,
    /// Bytes of `range` that are there.
    done: u64,
    stalls: u32,
}

impl Piece {
    /// A piece for `range`, which starts on a sector of the side and whose bytes are at `buffer` in the arena.
    pub(crate) fn new(direction: Direction, range: ByteRange, buffer: u32) -> Self {
        assert!(!range.is_empty(), "a piece has bytes");
        assert!(u32::try_from(range.length).is_ok(), "a piece fits the arena");
        Self { direction, range, buffer, done: 0, stalls: 0 }
    }

    pub(crate) fn range(&self) -> ByteRange {
        self.range
    }

    pub(crate) fn direction(&self) -> Direction {
        self.direction
    }

    /// The next operation, for `side`.
    pub(crate) fn op(&self, side: &Side) -> Op {
        let offset = self.range.offset + self.done;
        let left = self.range.length - self.done;
        assert!(left > 0, "a finished piece has no operation");
        let (length, path) = match (side.direct_alignment.map(u64::from), self.direction) {
            (None, _) => (left, IoPath::Buffered),
            (Some(sector), Direction::Read) => (left.next_multiple_of(sector), IoPath::Direct),
            (Some(sector), Direction::Write) if left >= sector => (left - left % sector, IoPath::Direct),
            (Some(_), Direction::Write) => (left, IoPath::Buffered),
        };
        let start = self.buffer + u32::try_from(self.done).expect("within the arena");
        let buffer = BufferRange { start, length: u32::try_from(length).expect("within the arena") };
        match self.direction {
            Direction::Read => Op::Read { file: side.file, offset, buffer, path },
            Direction::Write => Op::Write { file: side.file, offset, buffer, path },
        }
    }

    /// Take in the result of the last operation.
    pub(crate) fn on_result(&mut self, result: Result<Output, Errno>, side: &Side) -> Step {
        match result {
            Ok(Output::Bytes(bytes)) => self.advance(u64::from(bytes), side),
            Ok(other) => panic!("a read or write completes with bytes, not {other:?}"),
            Err(errno @ (Errno::EAGAIN | Errno::EINTR | Errno::ECANCELED)) => {
                self.stalled(Fault::Errno(errno), MAX_STALLS)
            }
            Err(errno) => Step::Failed(Fault::of(errno, side)),
        }
    }

    fn advance(&mut self, bytes: u64, side: &Side) -> Step {
        let end_fault = match self.direction {
            Direction::Read => Fault::EndOfStorage,
            Direction::Write => Fault::NothingWritten,
        };
        if bytes == 0 {
            return Step::Failed(end_fault);
        }
        let reached = self.done + bytes;
        if reached >= self.range.length {
            assert!(
                self.direction == Direction::Read || reached == self.range.length,
                "wrote {reached} bytes of {:?}",
                self.range
            );
            self.done = self.range.length;
            return Step::Finished;
        }
        let sector = u64::from(side.direct_alignment.unwrap_or(1));
        let whole = reached - reached % sector;
        if whole <= self.done {
            return self.stalled(end_fault, MAX_SUBSECTOR_READS);
        }
        self.done = whole;
        self.stalls = 0;
        Step::Again
    }

    fn stalled(&mut self, fault: Fault, limit: u32) -> Step {
        self.stalls += 1;
        if self.stalls > limit { Step::Failed(fault) } else { Step::Again }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::FileId;

    fn side(direct_alignment: Option<u32>) -> Side {
        Side { file: FileId(3), name: "disk".into(), direct_alignment, remote: false }
    }

    fn bytes(count: u32) -> Result<Output, Errno> {
        Ok(Output::Bytes(count))
    }

    fn shape(op: &Op) -> (u64, u32, u32, IoPath) {
        match op {
            Op::Read { offset, buffer, path, .. } | Op::Write { offset, buffer, path, .. } => {
                (*offset, buffer.start, buffer.length, *path)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_direct_read_is_rounded_up_and_resumed_at_its_sector() {
        let side = side(Some(512));
        let mut piece = Piece::new(Direction::Read, ByteRange::new(4096, 5000), 8192);
        assert_eq!(shape(&piece.op(&side)), (4096, 8192, 5120, IoPath::Direct));
        assert_eq!(piece.on_result(bytes(1500), &side), Step::Again);
        assert_eq!(shape(&piece.op(&side)), (5120, 9216, 4096, IoPath::Direct));
        assert_eq!(piece.on_result(bytes(3976), &side), Step::Finished);
    }

    #[test]
    fn a_direct_write_ends_with_the_last_partial_sector_through_the_page_cache() {
        let side = side(Some(512));
        let mut piece = Piece::new(Direction::Write, ByteRange::new(0, 1025), 0);
        assert_eq!(shape(&piece.op(&side)), (0, 0, 1024, IoPath::Direct));
        assert_eq!(piece.on_result(bytes(1024), &side), Step::Again);
        assert_eq!(shape(&piece.op(&side)), (1024, 1024, 1, IoPath::Buffered));
        assert_eq!(piece.on_result(bytes(1), &side), Step::Finished);
    }

    #[test]
    fn every_length_around_the_sector_is_moved_exactly_once() {
        for alignment in [None, Some(512), Some(4096)] {
            let side = side(alignment);
            for length in (1..=9).chain(505..=520).chain(4090..=4100).chain(8190..=8200) {
                let mut piece = Piece::new(Direction::Write, ByteRange::new(65536, length), 0);
                let mut next = 65536;
                loop {
                    let (offset, start, count, path) = shape(&piece.op(&side));
                    assert_eq!(offset, next, "length {length}");
                    assert_eq!(u64::from(start), offset - 65536);
                    if path == IoPath::Direct {
                        assert_eq!(count % alignment.unwrap(), 0);
                    }
                    next += u64::from(count);
                    match piece.on_result(bytes(count), &side) {
                        Step::Finished => break,
                        Step::Again => {}
                        Step::Failed(fault) => panic!("{fault:?}"),
                    }
                }
                assert_eq!(next, 65536 + length);
            }
        }
    }

    #[test]
    fn nothing_read_before_the_end_is_a_truncated_source() {
        let side = side(Some(512));
        let mut piece = Piece::new(Direction::Read, ByteRange::new(0, 4096), 0);
        assert_eq!(piece.on_result(bytes(0), &side), Step::Failed(Fault::EndOfStorage));
        let mut odd = Piece::new(Direction::Read, ByteRange::new(0, 4096), 0);
        assert_eq!(odd.on_result(bytes(1000), &side), Step::Again);
        assert_eq!(odd.on_result(bytes(488), &side), Step::Again);
        assert_eq!(odd.on_result(bytes(488), &side), Step::Again);
        assert_eq!(odd.on_result(bytes(488), &side), Step::Failed(Fault::EndOfStorage));
    }

    #[test]
    fn interruptions_are_retried_but_not_for_ever() {
        let side = side(None);
        let mut piece = Piece::new(Direction::Write, ByteRange::new(0, 10), 0);
        let mut retries = 0;
        while piece.on_result(Err(Errno::EINTR), &side) == Step::Again {
            retries += 1;
        }
        assert_eq!(retries, MAX_STALLS);
        let mut refused = Piece::new(Direction::Write, ByteRange::new(0, 10), 0);
        assert_eq!(refused.on_result(Err(Errno::EIO), &side), Step::Failed(Fault::Errno(Errno::EIO)));
        let reset = Errno::ECONNRESET;
        assert_eq!(refused.on_result(Err(reset), &side), Step::Failed(Fault::Errno(reset)));
        let remote = Side { remote: true, ..side.clone() };
        assert_eq!(refused.on_result(Err(reset), &remote), Step::Failed(Fault::Lost(reset)));
        assert_eq!(refused.on_result(Err(Errno::EIO), &remote), Step::Failed(Fault::Errno(Errno::EIO)));
        assert_eq!(refused.on_result(bytes(0), &side), Step::Failed(Fault::NothingWritten));
    }
}
