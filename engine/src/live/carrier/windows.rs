//! Cutting requests into windows: which bytes are moved at a time, and what has to be read, locked and buffered for it.
//!
//! # Model
//! A window is a stretch of a request that is carried out as a whole, under one permit. Its *cover* is what the storage sees: the window
//! rounded out to blocks, cut at the end of the disk. A *block* is the alignment of direct I/O (1 byte where there is none:
//! the page cache takes everything). Blocks that a write covers in part are read first and written back. A *grain* is what is
//! discarded or zeroed by an operation of its own: a block, or a sector where there are no blocks.
//!
//! # The end of a disk that ends within a block
//! The bytes of that block go through the page cache, since direct I/O would write beyond the end. The page cache works in pages: it would
//! read and write back what direct I/O writes to the same page at the same time. So such a write has the last page for itself.

use super::locks::Footprint;
use crate::ring::ZeroMethod;
use crate::ring::arena::PAGE_BYTES;
use crate::units::{ByteRange, Length};

/// Smallest grain.
const SECTOR: u64 = 512;
const PAGE: u64 = PAGE_BYTES as u64;

/// What is done with a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// Read.
    Read,
    /// Write data, or zeros as data.
    Write,
    /// Made zero by an operation of its own.
    Zero(ZeroMethod),
    /// Discarded.
    Discard,
    /// The disk is flushed.
    Flush,
}

/// See the module's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Bytes of the request.
    pub(super) range: ByteRange,
    /// Bytes that the storage sees.
    pub(super) cover: ByteRange,
    /// What is done.
    pub(super) act: Act,
}

impl Window {
    /// The window of a flush.
    pub(super) const FLUSH: Self =
        Self { range: ByteRange::new(0, 0), cover: ByteRange::new(0, 0), act: Act::Flush };

    /// Whether it changes the disk.
    pub(super) fn modifies(&self) -> bool {
        !matches!(self.act, Act::Read | Act::Flush)
    }
}

/// See the module's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cutter {
    length: u64,
    block: u64,
    grain: u64,
    narrow: u64,
    wide: u64,
}

impl Cutter {
    /// For a disk of `length` bytes. `narrow` and `wide`: most bytes of a window.
    pub(super) fn new(length: Length, alignment: Option<u32>, narrow: u64, wide: u64) -> Self {
        let block = alignment.map_or(1, u64::from);
        let grain = block.max(SECTOR);
        assert!(block.is_power_of_two(), "an alignment of {block}");
        assert!(narrow >= grain && narrow.is_multiple_of(grain), "windows of {narrow} bytes");
        assert!(wide >= narrow && wide.is_multiple_of(grain), "wide windows of {wide} bytes");
        Self { length: length.0, block, grain, narrow, wide }
    }

    /// Whether `range` lies on the disk.
    pub(super) fn holds(&self, range: ByteRange) -> bool {
        range.offset.checked_add(range.length).is_some_and(|end| end <= self.length)
    }

    /// The whole grains in `range`.
    pub(super) fn inward(&self, range: ByteRange) -> ByteRange {
        let start = range.offset.next_multiple_of(self.grain);
        let end = range.end() / self.grain * self.grain;
        if start < end { ByteRange::between(start, end) } else { ByteRange::new(range.offset, 0) }
    }

    /// All grains that `range` touches.
    pub(super) fn outward(&self, range: ByteRange) -> ByteRange {
        let start = range.offset / self.grain * self.grain;
        ByteRange::between(start, range.end().next_multiple_of(self.grain))
    }

    /// The first window of a read or write (`act`) of `rest`.
    pub(super) fn data(&self, act: Act, rest: ByteRange) -> Window {
        let start = rest.offset / self.block * self.block;
        let range = ByteRange::between(rest.offset, rest.end().min(start + self.narrow));
        let end = range.end().next_multiple_of(self.block).min(self.length);
        Window { range, cover: ByteRange::between(start, end), act }
    }

    /// The first window of `rest`, which is made zero by `method`, or as data. `free`: whether a range can be changed with nothing copied before.
    pub(super) fn zeroes(
        &self,
        rest: ByteRange,
        method: Option<ZeroMethod>,
        free: impl FnOnce(ByteRange) -> bool,
    ) -> Window {
        let Some(method) = method else { return self.data(Act::Write, rest) };
        let first = rest.offset.next_multiple_of(self.grain).min(rest.end());
        if first > rest.offset {
            return self.data(Act::Write, ByteRange::between(rest.offset, first));
        }
        let whole = self.inward(rest);
        if whole.is_empty() {
            return self.data(Act::Write, rest);
        }
        let stretch = |most: u64| ByteRange::new(whole.offset, whole.length.min(most));
        let wide = stretch(self.wide);
        let range = if wide.length > self.narrow && !free(wide) { stretch(self.narrow) } else { wide };
        Window { range, cover: range, act: Act::Zero(method) }
    }

    /// The first window of a discard of `rest`, which is whole grains.
    pub(super) fn discard(&self, rest: ByteRange) -> Window {
        let range = ByteRange::new(rest.offset, rest.length.min(self.wide));
        Window { range, cover: range, act: Act::Discard }
    }

    /// Most bytes of a window of any kind.
    pub(super) fn widest(&self) -> u64 {
        self.wide
    }

    /// How many bytes of buffer `window` needs.
    pub(super) fn buffer_bytes(&self, window: &Window) -> u64 {
        match window.act {
            // A direct read is rounded up to blocks, at the end of the disk as well.
            Act::Read | Act::Write => window.cover.length.next_multiple_of(self.block),
            Act::Zero(_) | Act::Discard | Act::Flush => 0,
        }
    }

    /// What has to be read before `window` can be written, in one piece or two (else empty). Two never share a page of the buffer.
    pub(super) fn fetches(&self, window: &Window) -> [ByteRange; 2] {
        let Window { range, cover, .. } = *window;
        let nothing = ByteRange::new(cover.offset, 0);
        if window.act != Act::Write {
            return [nothing; 2];
        }
        let head = ByteRange::new(cover.offset, self.block.min(cover.length));
        let last = range.end() / self.block * self.block;
        let (unaligned_head, unaligned_tail) = (range.offset > cover.offset, range.end() < cover.end());
        match (unaligned_head, unaligned_tail) {
            (false, false) => [nothing; 2],
            (true, false) => [head, nothing],
            (false, true) => [ByteRange::between(last, cover.end()), nothing],
            (true, true) if cover.length <= 2 * self.block.max(PAGE) => [cover, nothing],
            (true, true) => [head, ByteRange::between(last, cover.end())],
        }
    }

    /// What `window` locks.
    pub(super) fn footprint(&self, window: &Window) -> Footprint {
        let Window { range, cover, act } = *window;
        if act == Act::Discard {
            return Footprint::exclusive(cover);
        }
        let nothing = ByteRange::new(cover.offset, 0);
        let mut exclusive = [nothing; 2];
        if act == Act::Write {
            if range.offset > cover.offset {
                exclusive[0] = ByteRange::new(cover.offset, self.block);
            }
            if !cover.end().is_multiple_of(self.block) {
                let page = cover.end() / self.block.max(PAGE) * self.block.max(PAGE);
                exclusive[1] = ByteRange::between(page, self.length);
            } else if range.end() < cover.end() {
                exclusive[1] = ByteRange::between(cover.end() - self.block, cover.end());
            }
        }
        Footprint { range: cover, exclusive }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u64 = 1024;

    fn cutter(length: u64, alignment: Option<u32>) -> Cutter {
        Cutter::new(Length(length), alignment, 16 * KIB, 64 * KIB)
    }

    #[test]
    fn only_the_ends_of_a_write_are_unaligned() {
        let cutter = cutter(1 << 20, Some(512));
        let rest = ByteRange::between(700, 40_000);
        let first = cutter.data(Act::Write, rest);
        assert_eq!(first.range, ByteRange::between(700, 512 + 16384));
        assert_eq!(first.cover, ByteRange::between(512, 512 + 16384));
        assert_eq!(cutter.fetches(&first), [ByteRange::new(512, 512), ByteRange::new(512, 0)]);
        let last = cutter.data(Act::Write, ByteRange::between(33_280, 40_000));
        assert_eq!(last.cover, ByteRange::between(33_280, 40_448));
        assert_eq!(cutter.fetches(&last)[0], ByteRange::between(39_936, 40_448));
        assert_eq!(cutter.footprint(&last).exclusive[1], ByteRange::between(39_936, 40_448));
    }

    #[test]
    fn a_write_within_few_blocks_reads_them_in_one_piece() {
        let cutter = cutter(1 << 20, Some(512));
        let small = cutter.data(Act::Write, ByteRange::between(1000, 1100));
        assert_eq!(small.cover, ByteRange::between(512, 1536));
        assert_eq!(cutter.fetches(&small)[0], small.cover);
        let large = cutter.data(Act::Write, ByteRange::between(1000, 9800));
        assert_eq!(cutter.fetches(&large), [ByteRange::new(512, 512), ByteRange::new(9728, 512)]);
    }

    #[test]
    fn the_odd_end_of_a_disk_takes_its_page() {
        let cutter = cutter(100_000, Some(512));
        let tail = cutter.data(Act::Write, ByteRange::between(99_900, 100_000));
        assert_eq!(tail.cover, ByteRange::between(99_840, 100_000));
        assert_eq!(cutter.fetches(&tail)[0], ByteRange::between(99_840, 100_000));
        assert_eq!(cutter.buffer_bytes(&tail), 512);
        assert_eq!(cutter.footprint(&tail).exclusive[1], ByteRange::between(98_304, 100_000));
        let whole = cutter.data(Act::Write, ByteRange::between(99_840, 100_000));
        assert!(cutter.fetches(&whole)[0].is_empty(), "all bytes of the last block are new");
        assert_eq!(cutter.footprint(&whole).exclusive[1], ByteRange::between(98_304, 100_000));
        let before = cutter.data(Act::Write, ByteRange::between(99_328, 99_840));
        assert!(cutter.footprint(&before).exclusive.iter().all(|zone| zone.is_empty()));
    }

    #[test]
    fn zeros_go_by_grains_with_data_at_the_ends() {
        let cutter = cutter(1 << 20, Some(4096));
        let method = Some(ZeroMethod::Unmap);
        let cut = |rest: ByteRange, free: bool| cutter.zeroes(rest, method, |_| free);
        let rest = ByteRange::between(100, 200_000);
        assert_eq!(cut(rest, true).range, ByteRange::between(100, 4096));
        assert_eq!(cut(rest, true).act, Act::Write);
        let rest = ByteRange::between(4096, 200_000);
        assert_eq!(cut(rest, true).range, ByteRange::new(4096, 65536));
        assert_eq!(cut(rest, false).range, ByteRange::new(4096, 16384));
        let rest = ByteRange::between(196_608, 200_000);
        assert_eq!(cut(rest, true), cutter.data(Act::Write, rest));
        assert_eq!(cut(ByteRange::between(10, 20), true).range, ByteRange::between(10, 20));
    }

    proptest! {
        #[test]
        fn windows_follow_each_other_and_stay_within_bounds(
            alignment in prop_oneof![Just(None), Just(Some(512)), Just(Some(4096))],
            length in 1u64..300_000, start in 0u64..300_000, count in 0u64..200_000, kind in 0u8..3,
        ) {
            let cutter = cutter(length, alignment);
            let block = alignment.map_or(1, u64::from);
            let start = start.min(length);
            let all = ByteRange::between(start, (start + count).min(length));
            let mut at = all.offset;
            while at < all.end() {
                let rest = ByteRange::between(at, all.end());
                let window = match kind {
                    0 => cutter.data(Act::Read, rest),
                    1 => cutter.data(Act::Write, rest),
                    _ => cutter.zeroes(rest, Some(ZeroMethod::Keep), |_| at.is_multiple_of(1024)),
                };
                prop_assert_eq!(window.range.offset, at);
                prop_assert!(!window.range.is_empty() && window.range.end() <= all.end());
                prop_assert_eq!(window.cover.intersection(window.range), Some(window.range));
                prop_assert!(window.cover.offset.is_multiple_of(block));
                prop_assert!(window.cover.end().is_multiple_of(block) || window.cover.end() == length);
                prop_assert!(cutter.buffer_bytes(&window) <= 16 * KIB);
                if window.act == Act::Write {
                    // What is written and not the guest's was read before, and nobody else touches it.
                    let fetched = cutter.fetches(&window);
                    let edges = [
                        ByteRange::between(window.cover.offset, window.range.offset),
                        ByteRange::between(window.range.end(), window.cover.end()),
                    ];
                    for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
                        prop_assert!(fetched.iter().any(|part| part.intersection(edge) == Some(edge)));
                        let zones = cutter.footprint(&window).exclusive;
                        prop_assert!(zones.iter().any(|zone| zone.intersection(edge) == Some(edge)));
                    }
                    if !fetched[1].is_empty() {
                        let page = |offset: u64| (offset - window.cover.offset) / PAGE;
                        prop_assert!(page(fetched[0].end() - 1) < page(fetched[1].offset));
                    }
                }
                at = window.range.end();
            }
        }
    }
}
