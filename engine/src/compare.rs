//! `compare`: whether two disks hold the same bytes, and if not, where they first differ.
//!
//! # How
//! A `Plan` walks both disks' holes and data side by side and hands out pieces in ascending order: where both
//! have holes nothing is read, where one has a hole the other's bytes must be zero. A few threads take pieces, read
//! them past the page cache where the storage allows it, and compare. While one thread compares, others read, so both
//! devices stay busy; the memory is fixed (`WORKERS` × 2 × `PIECE_BYTES`).
//!
//! # The first difference
//! Pieces are settled out of order. What is found, a difference or an error, is kept if it lies before everything found
//! so far, and no piece behind it is begun any more. Pieces before it were handed out earlier and are finished.
//! So at the end the kept one is the first, and an error only counts where no difference lies before it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use nix::errno::Errno;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Operation};
use crate::ring::{Arena, BufferRange, Extent, ExtentQuery, IoPath};
use crate::storage::Storage;
use crate::units::{ByteRange, Length};

/// Threads that read and compare.
const WORKERS: usize = 4;
/// Most bytes of a piece.
const PIECE_BYTES: u32 = 1 << 20;
/// Borders of pieces: what every storage's direct I/O is content with.
const GRAIN: u64 = 4096;
/// Bytes of a disk whose extents are asked for at once.
const QUERY_BYTES: u64 = 1 << 30;
/// Most extents of one answer.
const QUERY_EXTENTS: usize = 256;

/// Where two disks first differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Offset of the byte.
    pub offset: u64,
    /// The byte on the first disk and the byte on the second; `None` where one of them ends.
    pub bytes: Option<(u8, u8)>,
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Length of the first disk.
    pub length_a: Length,
    /// Length of the second disk.
    pub length_b: Length,
    /// The first difference; where one disk is longer, at the latest the other's end.
    pub difference: Option<Difference>,
}

/// How far a comparison is; shared with whoever watches or stops it.
#[derive(Debug, Default)]
pub struct Watch {
    total: AtomicU64,
    settled: AtomicU64,
    holes: AtomicU64,
    stop: AtomicBool,
}

impl Watch {
    /// Bytes to compare: what both disks have.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Of these, how many are compared.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.settled.load(Ordering::Relaxed)
    }

    /// Of these, how many lay in holes of both disks and were not read.
    #[must_use]
    pub fn holes(&self) -> u64 {
        self.holes.load(Ordering::Relaxed)
    }

    /// End the comparison: it gives an error of kind [`ErrorKind::Cancelled`] soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Compare `a` with `b`. Holes count as zeros. A difference in length is one.
///
/// # Errors
/// A range before the first difference could not be read; the buffers could not be had; the watch was told to stop.
pub fn compare(a: &dyn Storage, b: &dyn Storage, watch: &Watch) -> Result<Comparison, Error> {
    let (length_a, length_b) = (a.limits().length, b.limits().length);
    let common = length_a.min(length_b).0;
    watch.total.store(common, Ordering::Relaxed);
    let found = Found { before: AtomicU64::new(common), what: Mutex::new(None) };
    let plan = Mutex::new(Plan { sides: [Side::new(a), Side::new(b)], next: 0, end: common });
    let buffers = (0..WORKERS).map(|_| Pair::new(a.name())).collect::<Result<Vec<_>, _>>()?;
    thread::scope(|scope| {
        for mut pair in buffers {
            let (plan, found) = (&plan, &found);
            scope.spawn(move || work([a, b], plan, found, watch, &mut pair));
        }
    });
    if watch.is_stopped() {
        return Err(Error::cancelled(a.name()));
    }
    let difference = match found.what.into_inner() {
        Some((_, what)) => Some(what?),
        None => longer(length_a, length_b),
    };
    Ok(Comparison { length_a, length_b, difference })
}

/// The difference at the end of the shorter disk. Its byte is not read: whatever it is, the other disk has none.
fn longer(length_a: Length, length_b: Length) -> Option<Difference> {
    let offset = length_a.min(length_b).0;
    (length_a != length_b).then_some(Difference { offset, bytes: None })
}

/// The first difference or error so far.
struct Found {
    /// Only what lies before this offset matters any more.
    before: AtomicU64,
    what: Mutex<Option<(u64, Result<Difference, Error>)>>,
}

impl Found {
    fn note(&self, offset: u64, what: Result<Difference, Error>) {
        let mut kept = self.what.lock();
        if kept.as_ref().is_none_or(|(first, _)| offset < *first) {
            *kept = Some((offset, what));
            self.before.fetch_min(offset, Ordering::Relaxed);
        }
    }
}

/// A range to settle, and which of the two disks hold data there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    range: ByteRange,
    data: [bool; 2],
}

/// Hands out pieces. See the module's header.
struct Plan<'a> {
    sides: [Side<'a>; 2],
    next: u64,
    end: u64,
}

impl Plan<'_> {
    /// The next piece: at least one side has data, or, in one piece, neither has.
    fn next(&mut self) -> Option<Piece> {
        if self.next >= self.end {
            return None;
        }
        let [a, b] = &mut self.sides;
        let ((data_a, end_a), (data_b, end_b)) = (a.at(self.next, self.end), b.at(self.next, self.end));
        let mut end = end_a.min(end_b).min(self.end);
        if data_a || data_b {
            end = end.min(self.next + u64::from(PIECE_BYTES));
        }
        let range = ByteRange::between(self.next, end);
        self.next = end;
        Some(Piece { range, data: [data_a, data_b] })
    }
}

/// What is known about one disk's holes ahead.
struct Side<'a> {
    storage: &'a dyn Storage,
    known: VecDeque<Extent>,
}

impl<'a> Side<'a> {
    fn new(storage: &'a dyn Storage) -> Self {
        Self { storage, known: VecDeque::new() }
    }

    /// Whether there is data at `offset`, and up to where that answer holds, rounded to the grain in favour of data.
    fn at(&mut self, offset: u64, end: u64) -> (bool, u64) {
        while self.known.front().is_some_and(|extent| extent.range.end() <= offset) {
            self.known.pop_front();
        }
        if self.known.is_empty() {
            self.ask(ByteRange::between(offset, end.min(offset.saturating_add(QUERY_BYTES))));
        }
        let grain_end = offset.saturating_add(GRAIN).min(end);
        match self.known.front() {
            Some(extent) if extent.range.offset <= offset => {
                let until = extent.range.end();
                if extent.present {
                    return (true, until.next_multiple_of(GRAIN).min(end));
                }
                let whole = if until >= end { end } else { until / GRAIN * GRAIN };
                if whole > offset { (false, whole) } else { (true, grain_end) }
            }
            _ => (true, grain_end),
        }
    }

    /// A disk that cannot tell its holes is read as a whole.
    fn ask(&mut self, range: ByteRange) {
        match self.storage.extents(range, ExtentQuery::Data, QUERY_EXTENTS) {
            Ok(extents) if !extents.is_empty() => {
                // Adjacent extents of one kind are one, so that pieces become as large as they can.
                for extent in extents {
                    match self.known.back_mut() {
                        Some(last)
                            if last.present == extent.present && last.range.end() == extent.range.offset =>
                        {
                            last.range.length += extent.range.length;
                        }
                        _ => self.known.push_back(extent),
                    }
                }
            }
            answer => {
                if let Err(errno) = answer {
                    tracing::warn!(disk = self.storage.name(), %range, %errno, "holes unknown: reading all");
                }
                self.known.push_back(Extent { range, present: true });
            }
        }
    }
}

/// The buffers of one thread, one for each disk.
struct Pair([Arena; 2]);

impl Pair {
    fn new(name: &str) -> Result<Self, Error> {
        let buffer = || {
            Arena::new(PIECE_BYTES as usize).map_err(|error| {
                let errno = error.raw_os_error().map_or(Errno::ENOMEM, Errno::from_raw);
                Error::io(Operation::Read, name, None, errno)
            })
        };
        Ok(Self([buffer()?, buffer()?]))
    }
}

/// Compares single ranges of two disks.
pub(crate) struct Spots<'a> {
    disks: [&'a dyn Storage; 2],
    pair: Pair,
}

impl<'a> Spots<'a> {
    /// With buffers of its own.
    ///
    /// # Errors
    /// They cannot be had.
    pub(crate) fn new(disks: [&'a dyn Storage; 2]) -> Result<Self, Error> {
        Ok(Self { disks, pair: Pair::new(disks[0].name())? })
    }

    /// The first difference in `range`, of a long one in its first [`PIECE_BYTES`]. It begins where direct I/O may begin.
    ///
    /// # Errors
    /// One of the disks cannot be read there.
    pub(crate) fn first_difference(&mut self, range: ByteRange) -> Result<Option<Difference>, Error> {
        let range = ByteRange::new(range.offset, range.length.min(u64::from(PIECE_BYTES)));
        settle(self.disks, Piece { range, data: [true, true] }, &mut self.pair).map_err(|(_, error)| error)
    }
}

fn work(disks: [&dyn Storage; 2], plan: &Mutex<Plan<'_>>, found: &Found, watch: &Watch, pair: &mut Pair) {
    while !watch.is_stopped() {
        let Some(piece) = plan.lock().next() else { return };
        if piece.range.offset >= found.before.load(Ordering::Relaxed) {
            return;
        }
        if piece.data == [false, false] {
            watch.holes.fetch_add(piece.range.length, Ordering::Relaxed);
        } else {
            match settle(disks, piece, pair) {
                Ok(None) => {}
                Ok(Some(difference)) => found.note(difference.offset, Ok(difference)),
                Err((offset, error)) => found.note(offset, Err(error)),
            }
        }
        watch.settled.fetch_add(piece.range.length, Ordering::Relaxed);
    }
}

/// Compare a piece. Where it cannot be read as a whole it is compared grain by grain, so that a bad sector hides no difference before it and
/// the error names no more than is bad. An error comes with its offset.
fn settle(
    disks: [&dyn Storage; 2],
    piece: Piece,
    pair: &mut Pair,
) -> Result<Option<Difference>, (u64, Error)> {
    let range = piece.range;
    match settle_whole(disks, piece, pair) {
        Err(_) if range.length > GRAIN => {
            let mut offset = range.offset;
            while offset < range.end() {
                let grain = ByteRange::between(offset, range.end().min(offset + GRAIN));
                let found = settle_whole(disks, Piece { range: grain, ..piece }, pair);
                if let Some(difference) = found.map_err(|error| (offset, error))? {
                    return Ok(Some(difference));
                }
                offset = grain.end();
            }
            Ok(None)
        }
        other => other.map_err(|error| (range.offset, error)),
    }
}

/// Read a piece from the disks that hold data there, and compare.
fn settle_whole(
    disks: [&dyn Storage; 2],
    piece: Piece,
    pair: &mut Pair,
) -> Result<Option<Difference>, Error> {
    let mut bytes: [Option<&[u8]>; 2] = [None, None];
    for (side, arena) in pair.0.iter_mut().enumerate() {
        if piece.data[side] {
            let all = arena.slice_mut(BufferRange { start: 0, length: PIECE_BYTES });
            bytes[side] = Some(read(disks[side], piece.range, all)?);
        }
    }
    let found = match bytes {
        [Some(a), Some(b)] => first_difference(a, b).map(|at| (at, a[at], b[at])),
        [Some(a), None] => first_nonzero(a).map(|at| (at, a[at], 0)),
        [None, Some(b)] => first_nonzero(b).map(|at| (at, 0, b[at])),
        [None, None] => None,
    };
    Ok(found.map(|(at, a, b)| Difference { offset: piece.range.offset + at as u64, bytes: Some((a, b)) }))
}

/// Fill `buffer` from `range`, past the page cache where that goes; gives the bytes of the range.
fn read<'b>(disk: &dyn Storage, range: ByteRange, buffer: &'b mut [u8]) -> Result<&'b [u8], Error> {
    let error = if disk.is_remote() { Error::io_at_server } else { Error::io };
    let failed = |errno| error(Operation::Read, disk.name().to_owned(), Some(range), errno);
    let length = usize::try_from(range.length).map_err(|_| failed(Errno::EOVERFLOW))?;
    let (mut path, alignment) = match disk.limits().direct_alignment {
        Some(alignment) => (IoPath::Direct, alignment as usize),
        None => (IoPath::Buffered, 1),
    };
    // At the end of a disk a direct read asks for whole sectors and comes back short.
    let mut wanted = length.next_multiple_of(alignment);
    let mut filled = 0;
    while filled < length {
        match disk.read_at(path, range.offset + filled as u64, &mut buffer[filled..wanted]) {
            Ok(0) => {
                return Err(Error::new(
                    ErrorKind::SourceShrank,
                    Operation::Read,
                    disk.name(),
                    "it has become shorter since it was opened",
                )
                .at(range)
                .advise("compare again while nothing truncates it"));
            }
            Ok(count) => filled += count,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        if !filled.is_multiple_of(alignment) && filled < length {
            (path, wanted) = (IoPath::Buffered, length);
        }
    }
    Ok(&buffer[..length])
}

/// Bytes compared at once before looking closer.
const BLOCK: usize = 4096;

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    assert_eq!(a.len(), b.len(), "two readings of one range");
    let mut offset = 0;
    for (block_a, block_b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        if block_a != block_b {
            let within = block_a.iter().zip(block_b).position(|(byte_a, byte_b)| byte_a != byte_b);
            return Some(offset + within.expect("the blocks differ"));
        }
        offset += block_a.len();
    }
    None
}

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let mut offset = 0;
    for block in bytes.chunks(BLOCK) {
        if block != &ZEROS[..block.len()] {
            let within = block.iter().position(|&byte| byte != 0);
            return Some(offset + within.expect("the block is not zero"));
        }
        offset += block.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::ZeroMethod;
    use crate::storage::{Descriptors, Limits};

    /// A disk in memory, with holes where it is told to have them, and a range that cannot be read.
    struct Memory {
        bytes: Vec<u8>,
        /// What it says about its holes; `None`: it cannot tell.
        extents: Option<Vec<Extent>>,
        bad: Option<ByteRange>,
    }

    impl Memory {
        fn new(bytes: Vec<u8>) -> Self {
            Self { bytes, extents: None, bad: None }
        }

        /// With these ranges as data and holes around them.
        fn sparse(length: usize, data: &[(usize, usize)]) -> Self {
            let mut disk = Self::new(vec![0; length]);
            let mut extents = vec![];
            let mut at = 0;
            for &(start, end) in data {
                disk.bytes[start..end].fill(0xda);
                extents.push(Extent { range: ByteRange::between(at, start as u64), present: false });
                extents.push(Extent { range: ByteRange::between(start as u64, end as u64), present: true });
                at = end as u64;
            }
            extents.push(Extent { range: ByteRange::between(at, length as u64), present: false });
            extents.retain(|extent| !extent.range.is_empty());
            disk.extents = Some(extents);
            disk
        }
    }

    impl Storage for Memory {
        fn name(&self) -> &'static str {
            "memory"
        }
        fn limits(&self) -> Limits {
            Limits { length: Length(self.bytes.len() as u64), direct_alignment: Some(512) }
        }
        fn descriptors(&self) -> Option<Descriptors<'_>> {
            None
        }
        fn read_at(&self, path: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
            let asked = ByteRange::new(offset, buffer.len() as u64);
            if path == IoPath::Direct {
                assert!(
                    offset.is_multiple_of(512) && buffer.len().is_multiple_of(512),
                    "{asked} is not aligned"
                );
            }
            if self.bad.is_some_and(|bad| bad.intersection(asked).is_some()) {
                return Err(Errno::EIO);
            }
            let rest = &self.bytes[usize::try_from(offset).expect("small").min(self.bytes.len())..];
            // Short now and then, at odd places too.
            let count = rest.len().min(buffer.len()).min(300_001);
            buffer[..count].copy_from_slice(&rest[..count]);
            Ok(count)
        }
        fn write_at(&self, _: IoPath, _: u64, _: &[u8]) -> Result<usize, Errno> {
            Err(Errno::EROFS)
        }
        fn write_zeroes(&self, _: ByteRange, _: ZeroMethod) -> Result<(), Errno> {
            Err(Errno::EROFS)
        }
        fn discard(&self, _: ByteRange) -> Result<(), Errno> {
            Err(Errno::EROFS)
        }
        fn allocate(&self, _: &[ByteRange]) -> Result<(), Errno> {
            Err(Errno::EROFS)
        }
        fn flush(&self) -> Result<(), Errno> {
            Ok(())
        }
        fn drop_cache(&self, _: ByteRange) -> Result<(), Errno> {
            Ok(())
        }
        fn extents(&self, range: ByteRange, _: ExtentQuery, limit: usize) -> Result<Vec<Extent>, Errno> {
            let known = self.extents.as_ref().ok_or(Errno::EOPNOTSUPP)?;
            let cut = |extent: &Extent| {
                extent.range.intersection(range).map(|range| Extent { range, present: extent.present })
            };
            Ok(known.iter().filter_map(cut).take(limit).collect())
        }
    }

    fn difference(a: &Memory, b: &Memory) -> Option<Difference> {
        let watch = Watch::default();
        let found = compare(a, b, &watch).expect("readable").difference;
        if found.is_none() {
            assert_eq!(watch.settled(), watch.total());
        }
        found
    }

    #[test]
    fn first_of_many_differences() {
        let length = 9 * PIECE_BYTES as usize + 777;
        let a = Memory::new((0..=250).cycle().take(length).collect());
        for at in [0, 1, 4095, 4096, 1 << 20, (3 << 20) + 12_345, length - 1] {
            let mut b = Memory::new(a.bytes.clone());
            for place in (at..length).step_by(70_001) {
                b.bytes[place] ^= 0x80;
            }
            let expected = Difference { offset: at as u64, bytes: Some((a.bytes[at], a.bytes[at] ^ 0x80)) };
            assert_eq!(difference(&a, &b), Some(expected));
        }
        assert_eq!(difference(&a, &Memory::new(a.bytes.clone())), None);
    }

    #[test]
    fn a_difference_in_length_is_one() {
        let (a, b) = (Memory::new(vec![7; 5000]), Memory::new(vec![7; 4999]));
        assert_eq!(difference(&a, &b), Some(Difference { offset: 4999, bytes: None }));
        assert_eq!(difference(&b, &a), Some(Difference { offset: 4999, bytes: None }));
        let empty = Memory::new(vec![]);
        assert_eq!(difference(&empty, &Memory::new(vec![])), None);
        assert_eq!(difference(&empty, &b), Some(Difference { offset: 0, bytes: None }));
    }

    #[test]
    fn holes_count_as_zeros() {
        let length = (40 << 20) + 100;
        let data = [(5000, 9000), (1 << 20, (1 << 20) + 1), (8 << 20, 20 << 20), (length - 50, length - 10)];
        let sparse = Memory::sparse(length, &data);
        let dense = Memory::new(sparse.bytes.clone());
        assert_eq!(difference(&sparse, &dense), None);
        assert_eq!(difference(&sparse, &Memory::sparse(length, &data)), None);
        for at in [4095, 5000, 9001, (1 << 20) + 5, (30 << 20) + 3, length - 1] {
            let mut changed = Memory::new(sparse.bytes.clone());
            changed.bytes[at] = 0x55;
            let expected = Some((sparse.bytes[at], 0x55));
            assert_eq!(
                difference(&sparse, &changed).map(|found| (found.offset, found.bytes)),
                Some((at as u64, expected))
            );
        }
    }

    #[test]
    fn holes_of_both_are_not_read() {
        let mut a = Memory::sparse(64 << 20, &[(0, 4096)]);
        a.bad = Some(ByteRange::between(8192, 64 << 20));
        let watch = Watch::default();
        let found =
            compare(&a, &Memory::sparse(64 << 20, &[(0, 4096)]), &watch).expect("nothing bad is read");
        assert_eq!(found.difference, None);
        assert_eq!(watch.holes(), (64 << 20) - 4096);
    }

    #[test]
    fn an_error_counts_only_before_the_first_difference() {
        let good = Memory::new(vec![1; 16 << 20]);
        let mut changed = Memory::new(good.bytes.clone());
        changed.bytes[6 << 20] = 2;
        changed.bad = Some(ByteRange::new(10 << 20, 512));
        assert_eq!(difference(&good, &changed).map(|found| found.offset), Some(6 << 20));
        changed.bad = Some(ByteRange::new(2 << 20, 512));
        let error =
            compare(&good, &changed, &Watch::default()).expect_err("unreadable before the difference");
        assert_eq!(error.kind(), ErrorKind::Io(Errno::EIO));
        assert_eq!(error.range(), Some(ByteRange::new(2 << 20, 4096)), "no more is named than is bad");
        // Both within what is read at once.
        for (difference_at, is_hidden) in
            [((2 << 20) - 1, false), ((2 << 20) - 500_000, false), ((2 << 20) + 4096, true)]
        {
            changed.bytes[difference_at] = 3;
            let found = compare(&good, &changed, &Watch::default());
            let offset = found.ok().and_then(|found| found.difference).map(|found| found.offset);
            assert_eq!(offset, (!is_hidden).then_some(difference_at as u64));
            changed.bytes[difference_at] = 1;
        }
    }

    #[test]
    fn stops_when_told() {
        let disk = Memory::new(vec![1; 1 << 20]);
        let watch = Watch::default();
        watch.stop();
        assert_eq!(compare(&disk, &disk, &watch).expect_err("stopped").kind(), ErrorKind::Cancelled);
    }
}
