//! The carrier's part of the arena, handed out in contiguous runs of slots.
//!
//! First fit. A run that is not to be had now will be: what is taken belongs to I/O in flight, whoever waits for a run waits at the
//! head of the line, and the whole holds the largest run that is ever asked for.

use crate::ring::BufferRange;
use crate::ring::arena::PAGE_BYTES;

/// See the module's header.
#[derive(Debug)]
pub(super) struct Buffers {
    start: u32,
    slot_bytes: u32,
    free: Vec<bool>,
    free_count: usize,
}

impl Buffers {
    /// `range` in slots of `slot_bytes`; what is left over at its end is not used.
    pub(super) fn new(range: BufferRange, slot_bytes: u32) -> Self {
        assert!((range.start as usize).is_multiple_of(PAGE_BYTES), "{range:?} starts on a page");
        assert!(
            slot_bytes > 0 && (slot_bytes as usize).is_multiple_of(PAGE_BYTES),
            "slots of {slot_bytes} bytes are whole pages"
        );
        let slots = (range.length / slot_bytes) as usize;
        Self { start: range.start, slot_bytes, free: vec![true; slots], free_count: slots }
    }

    /// Bytes of the largest run.
    pub(super) fn capacity(&self) -> u64 {
        self.free.len() as u64 * u64::from(self.slot_bytes)
    }

    /// Whether nothing is taken.
    pub(super) fn all_free(&self) -> bool {
        self.free_count == self.free.len()
    }

    /// A run of at least `bytes` bytes, if there is one.
    pub(super) fn take(&mut self, bytes: u64) -> Option<BufferRange> {
        assert!(bytes > 0 && bytes <= self.capacity(), "a run of {bytes} bytes");
        let count = usize::try_from(bytes.div_ceil(u64::from(self.slot_bytes))).expect("checked above");
        if count > self.free_count {
            return None;
        }
        let mut run = 0;
        for at in 0..self.free.len() {
            run = if self.free[at] { run + 1 } else { 0 };
            if run == count {
                return Some(self.mark(at + 1 - count, count));
            }
        }
        None
    }

    fn mark(&mut self, first: usize, count: usize) -> BufferRange {
        self.free[first..first + count].fill(false);
        self.free_count -= count;
        let slots = |slots: usize| u32::try_from(slots).expect("within the arena") * self.slot_bytes;
        BufferRange { start: self.start + slots(first), length: slots(count) }
    }

    /// Give a run back, as it was taken.
    pub(super) fn give_back(&mut self, run: BufferRange) {
        let first = ((run.start - self.start) / self.slot_bytes) as usize;
        let count = (run.length / self.slot_bytes) as usize;
        for free in &mut self.free[first..first + count] {
            assert!(!*free, "a buffer is given back once");
            *free = true;
        }
        self.free_count += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers(slots: u32) -> Buffers {
        Buffers::new(BufferRange { start: 8192, length: slots * 4096 + 1 }, 4096)
    }

    #[test]
    fn runs_are_contiguous_and_whole_slots() {
        let mut buffers = buffers(4);
        assert_eq!(buffers.capacity(), 4 * 4096);
        let first = buffers.take(1).unwrap();
        assert_eq!(first, BufferRange { start: 8192, length: 4096 });
        let second = buffers.take(4097).unwrap();
        assert_eq!(second, BufferRange { start: 8192 + 4096, length: 8192 });
        assert_eq!(buffers.take(8192), None);
        buffers.give_back(first);
        assert_eq!(buffers.take(8192), None, "two are free, but apart");
        buffers.give_back(second);
        assert!(buffers.all_free());
        assert!(buffers.take(4 * 4096).is_some());
    }

    #[test]
    #[should_panic(expected = "given back once")]
    fn a_buffer_is_not_given_back_twice() {
        let mut buffers = buffers(2);
        let run = buffers.take(1).unwrap();
        buffers.give_back(run);
        buffers.give_back(run);
    }
}
