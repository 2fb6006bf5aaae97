//! Which slots of the fleece file are free.
//!
//! Not `Slots`: that looks at every slot for the longest run, which is right for the few of the arena and would hold up the ring thread
//! over a million slots of a file. Here the free slots are intervals, and the next one in turn is taken whatever its length (next
//! fit): a guest's run goes to as many pieces as it takes. Any operation costs the logarithm of the number of intervals.

use std::collections::BTreeMap;

/// See the module's header.
#[derive(Debug)]
pub(super) struct Space {
    /// Start and length of each free interval; disjoint, not adjacent, not empty.
    free: BTreeMap<u32, u32>,
    free_count: u32,
    total: u32,
    /// Where the last run that was taken ended.
    cursor: u32,
}

impl Space {
    /// `total` free slots.
    pub(super) fn new(total: u32) -> Self {
        assert!(total > 0, "a fleece file has slots");
        Self { free: BTreeMap::from([(0, total)]), free_count: total, total, cursor: 0 }
    }

    #[cfg(test)]
    pub(super) fn free_count(&self) -> u32 {
        self.free_count
    }

    /// Whether fewer than a quarter are free.
    pub(super) fn is_short(&self) -> bool {
        self.free_count < self.total.div_ceil(4)
    }

    /// Take at most `max` adjacent slots: the first and how many; `None`: none is free.
    pub(super) fn take(&mut self, max: u32) -> Option<(u32, u32)> {
        assert!(max > 0, "something is wanted");
        let next = self.free.range(self.cursor..).next().or_else(|| self.free.iter().next());
        let (&start, &length) = next?;
        let count = length.min(max);
        self.free.remove(&start);
        if count < length {
            self.free.insert(start + count, length - count);
        }
        self.free_count -= count;
        self.cursor = start + count;
        Some((start, count))
    }

    /// Slot `slot` is free again.
    pub(super) fn give_back(&mut self, slot: u32) {
        assert!(slot < self.total, "slot {slot} of {}", self.total);
        let before = self.free.range(..=slot).next_back().map(|(&start, &length)| (start, length));
        let (mut start, mut length) = (slot, 1);
        if let Some((other, count)) = before {
            assert!(other + count <= slot, "slot {slot} was taken");
            if other + count == slot {
                (start, length) = (other, count + 1);
            }
        }
        if let Some(count) = self.free.remove(&(slot + 1)) {
            length += count;
        }
        self.free.insert(start, length);
        self.free_count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_follow_each_other_and_begin_anew() {
        let mut space = Space::new(10);
        assert_eq!(space.take(4), Some((0, 4)));
        assert_eq!(space.take(4), Some((4, 4)));
        space.give_back(1);
        assert_eq!(space.take(4), Some((8, 2)));
        assert_eq!(space.take(4), Some((1, 1)));
        assert_eq!(space.take(1), None);
        assert!(space.is_short());
    }

    #[test]
    fn what_is_given_back_grows_together() {
        let mut space = Space::new(8);
        while space.take(3).is_some() {}
        for slot in [3, 5, 4, 0, 7, 6, 1, 2] {
            space.give_back(slot);
        }
        assert_eq!(space.free, BTreeMap::from([(0, 8)]));
        assert_eq!(space.free_count(), 8);
        assert!(!space.is_short());
    }

    #[test]
    #[should_panic(expected = "was taken")]
    fn a_free_slot_is_not_given_back() {
        let mut space = Space::new(4);
        space.give_back(2);
    }

    #[test]
    fn every_slot_belongs_to_one_at_a_time() {
        let mut rng = fastrand::Rng::with_seed(11);
        let mut space = Space::new(97);
        let mut taken = std::collections::BTreeSet::new();
        for _ in 0..20_000 {
            if rng.bool() {
                let max = rng.u32(1..9);
                match space.take(max) {
                    Some((start, count)) => {
                        assert!(count <= max);
                        assert!((start..start + count).all(|slot| taken.insert(slot)));
                    }
                    None => assert_eq!(taken.len(), 97),
                }
            } else if let Some(&slot) = taken.range(rng.u32(..97)..).next() {
                taken.remove(&slot);
                space.give_back(slot);
            }
            assert_eq!(space.free_count() as usize + taken.len(), 97);
            assert_eq!(space.free.values().sum::<u32>(), space.free_count());
        }
    }
}
