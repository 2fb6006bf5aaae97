//! Several disks on one ring, of which some do not answer.

use super::DiskId;
use super::carrier::{CarrierLimits, IoOutcome, IoRequest};
use super::disk::read;
use super::sim::{Pending, SimDisk, SimEngine};
use crate::ring::Wait;
use crate::ring::sim::{Disk, DiskTraits, FaultPlan, SharedWorld, SimRing, World};
use crate::units::Length;

const LENGTH: u64 = 65_536;
/// What the carrier of each disk has of the arena.
const BYTES: u32 = 65_536;
/// Enough turns for whatever comes at all.
const TURNS: u32 = 500;

struct Bench {
    world: SharedWorld,
    engine: SimEngine,
    disks: Vec<SimDisk>,
}

impl Bench {
    fn new(disks: usize, capacity: usize) -> Self {
        let world = World::shared();
        for _ in 0..disks {
            let traits = DiskTraits { fixed_length: true, ..DiskTraits::default() };
            world.borrow_mut().add_disk(Disk::new(vec![7; LENGTH.try_into().unwrap()], traits));
        }
        let ring = SimRing::new(world.clone(), disks * BYTES as usize, capacity, 1, FaultPlan::default());
        let mut engine = SimEngine::new(ring);
        let limits = CarrierLimits { slot_bytes: 4096, window_bytes: 16_384, ..CarrierLimits::default() };
        engine.set_carrier(limits, BYTES);
        let mut bench = Self { world, engine, disks: Vec::new() };
        for number in 0..disks {
            let (disk, added) = bench.engine.add_disk(number, Length(LENGTH), Some(512));
            bench.turn();
            assert!(added.take().unwrap().is_ok());
            bench.disks.push(disk);
        }
        bench
    }

    fn turn(&mut self) {
        let soon = self.engine.now().after(std::time::Duration::from_millis(1));
        let wait = match self.engine.act().expect("it has not ended") {
            Wait::Poll => Wait::Poll,
            Wait::Until(until) => Wait::Until(until.min(soon)),
            Wait::Forever => Wait::Until(soon),
        };
        self.engine.wait(wait);
    }

    /// Requests that take nothing but places, on a disk that does not answer.
    fn hang(&mut self, disk: usize, count: usize) -> Vec<Pending<IoOutcome>> {
        self.world.borrow_mut().disk(disk).set_hung();
        let requests = (0..count).map(|_| self.engine.io(&self.disks[disk], IoRequest::Flush)).collect();
        for _ in 0..20 {
            self.turn();
        }
        requests
    }

    /// Whether a guest of `disk` reads.
    fn reads(&mut self, disk: usize) -> bool {
        let request = self.engine.io(&self.disks[disk], read(1000, 9000));
        for _ in 0..TURNS {
            self.turn();
            if let Some(outcome) = request.take() {
                return outcome.result.unwrap() == [7; 9000];
            }
        }
        false
    }
}

#[test]
fn disks_that_hang_leave_places_to_the_others() {
    // On a small ring what one disk has at most is all that keeps it from the rest.
    for (capacity, hang) in [(32, 1), (32, 2), (1024, 1), (1024, 3), (1024, 12)] {
        let mut bench = Bench::new(hang + 2, capacity);
        let requests: Vec<_> = (0..hang).flat_map(|disk| bench.hang(disk, 1000)).collect();
        let hanging = bench.engine.in_flight();
        for disk in [hang, hang + 1, hang] {
            assert!(bench.reads(disk), "{hang} disks keep {hanging} of {capacity} places");
        }
        assert!(requests.iter().all(|request| request.take().is_none()), "they hang");
        for disk in 0..hang {
            bench.world.borrow_mut().disk(disk).set_free();
        }
        for _ in 0..TURNS * 20 {
            bench.turn();
        }
        assert!(requests.iter().all(|request| request.take().is_some_and(|ended| ended.result.is_ok())));
    }
}

#[test]
fn disks_take_turns_in_being_the_first() {
    let mut bench = Bench::new(3, 64);
    let mut first = Vec::new();
    for _ in 0..6 {
        first.push(bench.engine.first_disk());
        bench.turn();
    }
    assert_eq!(first[..3], first[3..]);
    for disk in 0..3 {
        assert!(first.contains(&DiskId(disk)), "{first:?}");
    }
}
