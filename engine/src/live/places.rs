//! Whose the places on the ring are.
//!
//! # Model
//! What does not answer keeps its places for ever, so what others may need later must never have been given away. Every job and every disk has some
//! places of its own, which are set aside for good: a job `own` of each kind of its operations (see `copier::Places`), a disk as many as these
//! together. Each of them has a storage on the ring to itself, so there are no more of them than the ring has storages.
//!
//! The rest is common. Guests' requests leave a quarter of it to the jobs, and the jobs together leave a quarter to guests' requests. One job, and
//! the guests of one disk, have at most an eighth of the ring: one that hangs takes no more.
//!
//! A ring that is too small for that, as those of tests are, has common places only.

use super::hosted::MAX_QUESTIONS;
use crate::copier::Places;
use crate::ring::MAX_FILES;

/// Of the common places the part that jobs leave to guests' requests, and these to jobs.
const KEPT_PART: usize = 4;
/// The part of the ring that one job, and the guests of one disk, have at most.
const MOST_PART: usize = 8;
/// At most this part of the ring is jobs' and disks' own.
const OWN_PART: usize = 4;
/// Kinds of operations of a job.
const KINDS: usize = 3;
/// A disk has places for its questions and for a request besides, also on a small ring.
const LEAST_OF_DISK: usize = MAX_QUESTIONS + 1;
const _: () = assert!(LEAST_OF_DISK <= KINDS, "what is a disk's own is not for its questions alone");

/// How a ring's places are divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Division {
    capacity: usize,
    /// Of each kind of a job's operations.
    own: usize,
}

/// Who has which places.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// On the ring in all.
    pub(super) in_flight: usize,
    /// Of the common places those that the guests of disks have.
    pub(super) of_guests: usize,
    /// Of the common places those that jobs have.
    pub(super) of_jobs: usize,
}

impl Division {
    pub(super) fn of(capacity: usize) -> Self {
        Self { capacity, own: capacity / (OWN_PART * KINDS * MAX_FILES) }
    }

    /// Places that a job has of its own, of each kind.
    pub(super) fn own(&self) -> usize {
        self.own
    }

    /// Places that a disk has of its own.
    fn own_of_disk(&self) -> usize {
        self.own * KINDS
    }

    /// How many of the places of a disk that has so many are common ones.
    pub(super) fn beyond_own(&self, of_disk: usize) -> usize {
        of_disk.saturating_sub(self.own_of_disk())
    }

    /// How many of the common places those may still take who have `theirs` of them, when `others` have so many.
    fn common(&self, theirs: usize, others: usize) -> usize {
        let all = self.capacity - self.own * KINDS * MAX_FILES;
        let kept = (all / KEPT_PART).max(1);
        all.saturating_sub(kept).max(1).saturating_sub(theirs).min(all.saturating_sub(theirs + others))
    }

    /// How many the guests of a disk may take that have `of_disk` already.
    pub(super) fn for_disk(&self, taken: Taken, of_disk: usize) -> usize {
        let own = self.own_of_disk().saturating_sub(of_disk);
        let most = (self.capacity / MOST_PART).max(LEAST_OF_DISK).max(self.own_of_disk());
        let room = own + self.common(taken.of_guests, taken.of_jobs);
        room.min(most.saturating_sub(of_disk)).min(self.capacity - taken.in_flight)
    }

    /// What a job may take.
    pub(super) fn for_job(&self, taken: Taken) -> Places {
        Places {
            free: self.capacity - taken.in_flight,
            common: self.common(taken.of_jobs, taken.of_guests),
            own: self.own,
            most: (self.capacity / MOST_PART).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Taken = Taken { in_flight: 0, of_guests: 0, of_jobs: 0 };

    /// What the guests of `disks` take who take all that they get, and what each of them has then.
    fn greedy(division: Division, disks: usize, mut taken: Taken) -> (Taken, Vec<usize>) {
        let mut have = Vec::new();
        for _ in 0..disks {
            let room = division.for_disk(taken, 0);
            taken.in_flight += room;
            taken.of_guests += division.beyond_own(room);
            have.push(room);
        }
        (taken, have)
    }

    #[test]
    fn whoever_is_greedy_leaves_something() {
        let division = Division::of(1024);
        assert!(division.own() >= 1);
        let all = greedy(division, MAX_FILES, NOTHING).1;
        assert!(all.iter().all(|&have| have >= LEAST_OF_DISK), "{all:?}");
        let disks = 20;
        let (taken, _) = greedy(division, disks, NOTHING);
        assert!((400..800).contains(&taken.of_guests), "{taken:?}");
        let of_jobs = division.for_job(taken).common;
        assert!(of_jobs >= 128, "{of_jobs}");
        // Both have taken what they may: every job still finds what is its own.
        let taken = Taken { in_flight: taken.in_flight + of_jobs, of_jobs, ..taken };
        let places = division.for_job(taken);
        assert_eq!(places.common, 0);
        assert!(places.free >= KINDS * division.own() * (MAX_FILES - disks), "{places:?}");
        // The other way round.
        let of_jobs = division.for_job(NOTHING).common;
        let taken = Taken { in_flight: of_jobs, of_guests: 0, of_jobs };
        assert!(greedy(division, MAX_FILES, taken).0.of_guests >= 128);
    }

    #[test]
    fn one_disk_takes_no_more_than_its_part() {
        let division = Division::of(1024);
        let (taken, have) = greedy(division, 1, NOTHING);
        assert_eq!(have, [128]);
        assert_eq!(division.for_disk(taken, 128), 0, "it has had it");
        assert_eq!(division.for_disk(taken, 0), 128, "another has as much");
        assert_eq!(division.for_disk(taken, 120), 8);
    }

    #[test]
    fn what_is_ones_own_costs_nobody_anything() {
        let division = Division::of(1024);
        let taken = Taken { in_flight: KINDS * division.own() * MAX_FILES, ..NOTHING };
        assert_eq!(division.for_disk(taken, 0), division.for_disk(NOTHING, 0));
        assert_eq!(division.for_job(taken).common, division.for_job(NOTHING).common);
    }

    /// Whoever comes and goes in whatever order, the ring never has more than it can, and nobody misses what is his own.
    #[test]
    fn what_is_set_aside_is_never_given_away() {
        let division = Division::of(1024);
        let own = division.own_of_disk();
        let mut rng = fastrand::Rng::with_seed(3);
        let mut disks = [0_usize; MAX_FILES];
        for _ in 0..20_000 {
            let of_guests = disks.iter().map(|&have| division.beyond_own(have)).sum();
            let in_flight: usize = disks.iter().sum();
            let taken = Taken { in_flight, of_guests, of_jobs: 0 };
            let disk = rng.usize(..MAX_FILES);
            let room = division.for_disk(taken, disks[disk]);
            assert!(room >= own.saturating_sub(disks[disk]), "{room} of {taken:?}");
            assert!(in_flight + room <= 1024);
            disks[disk] = if rng.u8(..8) == 0 { 0 } else { disks[disk] + rng.usize(..=room) };
        }
    }

    #[test]
    fn a_small_ring_is_used_as_well() {
        for capacity in 1..100 {
            let division = Division::of(capacity);
            assert_eq!(division.own(), 0);
            let room = division.for_disk(NOTHING, 0);
            assert!((1..capacity.max(2)).contains(&room), "{room} of {capacity}");
            let places = division.for_job(NOTHING);
            assert!(places.common >= 1 && places.most >= 1 && places.free == capacity, "{places:?}");
        }
    }
}
