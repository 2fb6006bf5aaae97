//! Whose the places on the ring are.
//!
//! # Model
//! Every job that there may be has some places of its own (`own` of each kind of its operations, see `copier::Places`), which are set aside for good:
//! what does not answer keeps its places for ever, so what others may need later must never have been given away. The rest is
//! common. Guests' requests leave a quarter of it to the jobs, and the jobs together leave a quarter to guests' requests; one job has at most
//! an eighth of the ring.
//!
//! A ring that is too small for that, as those of tests are, has common places only.

use crate::copier::Places;
use crate::ring::MAX_FILES;

/// Of the common places the part that jobs leave to guests' requests, and these to jobs.
const KEPT_PART: usize = 4;
/// The part of the ring that one job has at most.
const JOB_PART: usize = 8;
/// At most this part of the ring is jobs' own.
const OWN_PART: usize = 4;
/// Kinds of operations of a job.
const KINDS: usize = 3;
/// Each has a target of its own, and there is a disk.
const MAX_JOBS: usize = MAX_FILES - 1;

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
    /// Of these the jobs', their own included.
    pub(super) of_jobs: usize,
    /// Of these those that are common.
    pub(super) common: usize,
}

impl Division {
    pub(super) fn of(capacity: usize) -> Self {
        Self { capacity, own: capacity / (OWN_PART * KINDS * MAX_JOBS) }
    }

    /// Places that a job has of its own, of each kind.
    pub(super) fn own(&self) -> usize {
        self.own
    }

    /// How many of the common places those may still take who have `theirs` of them, when `others` have so many.
    fn common(&self, theirs: usize, others: usize) -> usize {
        let all = self.capacity - self.own * KINDS * MAX_JOBS;
        let kept = (all / KEPT_PART).max(1);
        all.saturating_sub(kept).max(1).saturating_sub(theirs).min(all.saturating_sub(theirs + others))
    }

    /// How many guests' requests may take.
    pub(super) fn for_guests(&self, taken: Taken) -> usize {
        let of_guests = taken.in_flight - taken.of_jobs;
        self.common(of_guests, taken.common).min(self.capacity - taken.in_flight)
    }

    /// What a job may take.
    pub(super) fn for_job(&self, taken: Taken) -> Places {
        Places {
            free: self.capacity - taken.in_flight,
            common: self.common(taken.common, taken.in_flight - taken.of_jobs),
            own: self.own,
            most: (self.capacity / JOB_PART).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Taken = Taken { in_flight: 0, of_jobs: 0, common: 0 };

    #[test]
    fn whoever_is_greedy_leaves_something() {
        let division = Division::of(1024);
        assert!(division.own() >= 1);
        let all = division.for_guests(NOTHING);
        assert!((500..800).contains(&all), "{all}");
        let taken = Taken { in_flight: all, ..NOTHING };
        let of_jobs = division.for_job(taken).common;
        assert!(of_jobs >= 128, "{of_jobs}");
        // Both have taken what they may: every job still finds what is its own.
        let taken = Taken { in_flight: all + of_jobs, of_jobs, common: of_jobs };
        assert_eq!(division.for_guests(taken), 0);
        let places = division.for_job(taken);
        assert_eq!(places.common, 0);
        assert!(places.free >= KINDS * division.own() * MAX_JOBS, "{places:?}");
        // The other way round.
        let of_jobs = division.for_job(NOTHING).common;
        let taken = Taken { in_flight: of_jobs, of_jobs, common: of_jobs };
        assert!(division.for_guests(taken) >= 128);
    }

    #[test]
    fn what_is_a_jobs_own_costs_nobody_anything() {
        let division = Division::of(1024);
        let own = KINDS * division.own() * MAX_JOBS;
        let taken = Taken { in_flight: own, of_jobs: own, common: 0 };
        assert_eq!(division.for_guests(taken), division.for_guests(NOTHING));
        assert_eq!(division.for_job(taken).common, division.for_job(NOTHING).common);
    }

    #[test]
    fn a_small_ring_is_used_as_well() {
        for capacity in 1..100 {
            let division = Division::of(capacity);
            assert_eq!(division.own(), 0);
            assert!(division.for_guests(NOTHING) >= 1);
            let places = division.for_job(NOTHING);
            assert!(places.common >= 1 && places.most >= 1 && places.free == capacity, "{places:?}");
        }
    }
}
