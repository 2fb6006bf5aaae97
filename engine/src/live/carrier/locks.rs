//! Who may change which bytes at the same time.
//!
//! # Model
//! Whoever changes the disk holds a lock over the bytes that it touches, from before its first operation to after its last. Two writes
//! of whole blocks may overlap: the disk carries them out in one order or the other, as it does for any guest. Some
//! bytes of a lock are *exclusive*: nobody else may touch them. These are the blocks that a write first reads and then writes back,
//! and everything that is discarded.
//!
//! # Order
//! A lock waits for every earlier one that it is in conflict with, waiting ones included: so nobody is overtaken for ever. Each
//! counts how many it waits for; the end of one counts down those behind it. Locks are held by I/O in flight only, or by a
//! window that has just been let in and starts next; they are no more than there are requests, so a list will do.

use crate::units::ByteRange;

/// What a lock covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Footprint {
    /// All bytes that are touched.
    pub(super) range: ByteRange,
    /// Bytes that nobody else may touch meanwhile: at the start and at the end of `range`, possibly none.
    pub(super) exclusive: [ByteRange; 2],
}

impl Footprint {
    /// A footprint that shares no byte.
    pub(super) fn exclusive(range: ByteRange) -> Self {
        Self { range, exclusive: [range, ByteRange::new(range.offset, 0)] }
    }

    fn excludes(&self, range: ByteRange) -> bool {
        self.exclusive.iter().any(|zone| zone.intersection(range).is_some())
    }

    fn conflicts(&self, other: &Self) -> bool {
        self.excludes(other.range) || other.excludes(self.range)
    }
}

/// Names a lock, held or waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LockId(u64);

#[derive(Debug)]
struct Entry {
    id: LockId,
    footprint: Footprint,
    owner: usize,
    /// Earlier locks that this one waits for.
    waits_for: usize,
}

/// See the module's header.
#[derive(Debug, Default)]
pub(super) struct Locks {
    /// Ascending by id.
    entries: Vec<Entry>,
    next: u64,
}

impl Locks {
    /// Lock `footprint`. `true`: it is held; else `owner` is named by a [`Self::release`] once it is.
    pub(super) fn acquire(&mut self, footprint: Footprint, owner: usize) -> (LockId, bool) {
        let waits_for = self.entries.iter().filter(|entry| entry.footprint.conflicts(&footprint)).count();
        let id = LockId(self.next);
        self.next += 1;
        self.entries.push(Entry { id, footprint, owner, waits_for });
        (id, waits_for == 0)
    }

    /// Lock `footprint` if that can be had at once.
    pub(super) fn try_acquire(&mut self, footprint: Footprint, owner: usize) -> Option<LockId> {
        let free = self.entries.iter().all(|entry| !entry.footprint.conflicts(&footprint));
        free.then(|| self.acquire(footprint, owner).0)
    }

    /// End a lock, held or waited for. Gives the owners of those that are held from now on, in the order of asking.
    pub(super) fn release(&mut self, id: LockId) -> Vec<usize> {
        let at = self.entries.binary_search_by_key(&id, |entry| entry.id).expect("a lock is released once");
        let ended = self.entries.remove(at);
        let mut held = Vec::new();
        for entry in &mut self.entries[at..] {
            if entry.footprint.conflicts(&ended.footprint) {
                entry.waits_for -= 1;
                if entry.waits_for == 0 {
                    held.push(entry.owner);
                }
            }
        }
        held
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Blocks `start..end` of which the first, the last, or none is exclusive.
    fn footprint(start: u64, end: u64, head: bool, tail: bool) -> Footprint {
        let block = |at: u64, wanted: bool| ByteRange::new(at * 512, if wanted { 512 } else { 0 });
        Footprint {
            range: ByteRange::between(start * 512, end * 512),
            exclusive: [block(start, head), block(end - 1, tail)],
        }
    }

    #[test]
    fn whole_blocks_overlap_and_ends_do_not() {
        let mut locks = Locks::default();
        let (whole, held) = locks.acquire(footprint(0, 8, false, false), 1);
        assert!(held);
        assert!(locks.acquire(footprint(4, 12, false, false), 2).1, "two writes of whole blocks");
        let (edge, held) = locks.acquire(footprint(7, 9, true, false), 3);
        assert!(!held, "reads back what the first is writing");
        assert!(locks.acquire(footprint(20, 21, true, true), 4).1, "elsewhere");
        assert_eq!(locks.release(whole), Vec::<usize>::new(), "the second still writes there");
        assert!(!locks.acquire(footprint(8, 10, false, true), 5).1);
        let (late, held) = locks.acquire(footprint(7, 8, false, false), 6);
        assert!(!held, "not before one that waits already");
        assert_eq!(locks.release(edge), [6], "gone without having been held");
        assert_eq!(locks.release(late), Vec::<usize>::new());
    }

    #[test]
    fn a_discard_excludes_all_of_its_range() {
        let mut locks = Locks::default();
        let discard = Footprint::exclusive(ByteRange::new(4096, 8192));
        let id = locks.try_acquire(discard, 1).unwrap();
        assert!(locks.try_acquire(footprint(12, 13, false, false), 2).is_none());
        assert!(locks.try_acquire(footprint(24, 25, true, true), 3).is_some());
        assert_eq!(locks.release(id), Vec::<usize>::new());
        assert!(locks.try_acquire(footprint(12, 13, false, false), 2).is_some());
        assert!(locks.try_acquire(discard, 1).is_none());
    }

    proptest! {
        #[test]
        fn no_two_in_conflict_are_held_and_nobody_is_forgotten(
            steps in prop::collection::vec((0u64..20, 1u64..6, any::<bool>(), any::<bool>(), any::<u8>()), 1..80)
        ) {
            let mut locks = Locks::default();
            // In the order of asking, with whether it is held.
            let mut all: Vec<(LockId, Footprint, usize, bool)> = Vec::new();
            for (owner, (start, length, head, tail, pick)) in steps.into_iter().enumerate() {
                if pick < 120 && !all.is_empty() {
                    let (id, ..) = all.remove(usize::from(pick) % all.len());
                    for owner in locks.release(id) {
                        all.iter_mut().find(|entry| entry.2 == owner).unwrap().3 = true;
                    }
                } else {
                    let wanted = footprint(start, start + length, head, tail);
                    let (id, held) = locks.acquire(wanted, owner);
                    all.push((id, wanted, owner, held));
                }
                for (at, (_, mine, _, held)) in all.iter().enumerate() {
                    let blocked = all[..at].iter().any(|(_, other, ..)| other.conflicts(mine));
                    prop_assert_eq!(*held, !blocked);
                }
            }
        }
    }
}
