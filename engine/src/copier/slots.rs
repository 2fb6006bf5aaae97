//! The fixed slots in which clusters are in flight: slot *n* is the *n*-th cluster-sized part of the arena.
//!
//! Adjacent clusters are read and written as one request, so slots are handed out in contiguous runs. First fit over a bitmap;
//! runs are given back whole, so that the holes between them stay as large as the runs were.

use crate::ring::BufferRange;

/// A contiguous run of slots, held by one transfer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SlotRun {
    arena_start: u32,
    start: u32,
    count: u32,
}

impl SlotRun {
    /// Slots in it.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// The arena bytes of the run.
    pub(super) fn buffer(&self, slot_bytes: u32) -> BufferRange {
        BufferRange { start: self.arena_start + self.start * slot_bytes, length: self.count * slot_bytes }
    }
}

/// Which slots are free.
#[derive(Debug)]
pub(super) struct Slots {
    free: Vec<bool>,
    free_count: u32,
    arena_start: u32,
}

impl Slots {
    /// `count` free slots, the first of them `arena_start` bytes into the arena.
    pub(super) fn new(count: u32, arena_start: u32) -> Self {
        assert!(count > 0, "a copier needs a slot");
        Self { free: vec![true; count as usize], free_count: count, arena_start }
    }

    /// How many are not.
    pub(super) fn in_use(&self) -> u32 {
        u32::try_from(self.free.len()).expect("made from a u32") - self.free_count
    }

    /// How many are free.
    pub(super) fn free_count(&self) -> u32 {
        self.free_count
    }

    /// Whether all are free.
    pub(super) fn all_free(&self) -> bool {
        self.free_count as usize == self.free.len()
    }

    /// The longest free run of at most `max` slots, the first of that length: its start and length (0: none is free).
    pub(super) fn longest_run(&self, max: u32) -> (u32, u32) {
        let (mut best, mut run_start, mut run) = ((0, 0), 0, 0);
        for (at, &free) in (0u32..).zip(&self.free) {
            if !free {
                run = 0;
                continue;
            }
            if run == 0 {
                run_start = at;
            }
            run += 1;
            if run > best.1 {
                best = (run_start, run);
                if run == max {
                    break;
                }
            }
        }
        best
    }

    /// Take `count` slots from `start` on.
    ///
    /// # Panics
    /// If one of them is taken.
    pub(super) fn take(&mut self, start: u32, count: u32) -> SlotRun {
        for slot in &mut self.free[start as usize..(start + count) as usize] {
            assert!(*slot, "a slot is taken once");
            *slot = false;
        }
        self.free_count -= count;
        SlotRun { arena_start: self.arena_start, start, count }
    }

    /// Give a run back.
    pub(super) fn give_back(&mut self, run: &SlotRun) {
        for slot in &mut self.free[run.start as usize..(run.start + run.count) as usize] {
            assert!(!*slot, "a slot is given back once");
            *slot = true;
        }
        self.free_count += run.count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_contiguous_and_bounded() {
        let mut slots = Slots::new(10, 0);
        assert_eq!(slots.longest_run(4), (0, 4));
        let first = slots.take(0, 4);
        let second = slots.take(4, 4);
        assert_eq!(slots.longest_run(4), (8, 2));
        slots.give_back(&first);
        assert_eq!(slots.longest_run(16), (0, 4));
        slots.give_back(&second);
        assert_eq!(slots.longest_run(16), (0, 10));
        assert!(slots.all_free());
    }

    #[test]
    #[should_panic(expected = "taken once")]
    fn a_taken_slot_is_not_taken_again() {
        let mut slots = Slots::new(2, 0);
        let _run = slots.take(0, 2);
        let _again = slots.take(1, 1);
    }
}
