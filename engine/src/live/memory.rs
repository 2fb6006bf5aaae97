//! Parts of a ring's arena, handed out to jobs and disks and taken back.
//!
//! The arena of an engine is one mapping of a fixed size (it may be registered with the kernel as a whole), so the memory of everything that
//! runs on the engine is bounded by it, and what does not fit is refused at the start rather than in the middle. First fit; parts are
//! few and live long.

use crate::ring::BufferRange;

/// Granularity of parts in bytes: transparent huge pages and every alignment of direct I/O divide or are divided by it.
const GRAIN: u32 = 64 << 10;

/// Which parts of an arena are handed out.
#[derive(Debug)]
pub(super) struct Memory {
    bytes: u32,
    /// Ascending, disjoint.
    taken: Vec<BufferRange>,
}

impl Memory {
    pub(super) fn new(bytes: u32) -> Self {
        Self { bytes, taken: Vec::new() }
    }

    /// A part of `length` bytes that nobody has, or `None`.
    pub(super) fn take(&mut self, length: u32) -> Option<BufferRange> {
        assert!(length > 0, "a part has bytes");
        let length = length.checked_next_multiple_of(GRAIN)?;
        let mut start = 0_u32;
        let mut at = self.taken.len();
        for (index, part) in self.taken.iter().enumerate() {
            if part.start - start >= length {
                at = index;
                break;
            }
            start = part.start + part.length;
        }
        (self.bytes - start >= length).then(|| {
            let part = BufferRange { start, length };
            self.taken.insert(at, part);
            part
        })
    }

    /// Take a part back.
    ///
    /// # Panics
    /// If it was not handed out.
    pub(super) fn give_back(&mut self, part: BufferRange) {
        let at = self.taken.iter().position(|taken| *taken == part).expect("a part that was handed out");
        self.taken.remove(at);
    }

    /// How many parts are handed out.
    #[cfg(feature = "sim")]
    pub(super) fn parts(&self) -> usize {
        self.taken.len()
    }

    /// Bytes in the largest part that could be had.
    #[cfg(test)]
    fn largest(&self) -> u32 {
        let starts = std::iter::once(0).chain(self.taken.iter().map(|part| part.start + part.length));
        let ends = self.taken.iter().map(|part| part.start).chain(std::iter::once(self.bytes));
        starts.zip(ends).map(|(start, end)| end - start).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_disjoint_and_come_back() {
        let mut memory = Memory::new(10 * GRAIN);
        let first = memory.take(3 * GRAIN).unwrap();
        let second = memory.take(4 * GRAIN - 1).unwrap();
        assert_eq!((first.start, second.start, second.length), (0, 3 * GRAIN, 4 * GRAIN));
        assert_eq!(memory.take(4 * GRAIN), None);
        assert_eq!(memory.largest(), 3 * GRAIN);
        memory.give_back(first);
        assert_eq!(memory.take(2 * GRAIN).unwrap().start, 0);
        assert_eq!(memory.take(GRAIN).unwrap().start, 2 * GRAIN);
        assert_eq!(memory.take(3 * GRAIN).unwrap().start, 7 * GRAIN);
        assert_eq!(memory.largest(), 0);
        assert_eq!(memory.take(1), None);
    }
}
