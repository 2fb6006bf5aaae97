//! Several disks on one ring, of which some do not answer.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use crossbeam::channel::RecvTimeoutError;
use nix::errno::Errno;
use parking_lot::Mutex;

use super::DiskId;
use super::ask::ask;
use super::carrier::{CarrierLimits, IoOutcome, IoRequest};
use super::command::Command;
use super::disk::{DiskShared, read};
use super::reactor::Reactor;
use super::sim::{Pending, SimDisk, SimEngine};
use crate::error::Operation;
use crate::ring::select::RingConfig;
use crate::ring::sim::{Disk, DiskTraits, FaultPlan, SharedWorld, SimRing, World};
use crate::ring::threads::ThreadsRing;
use crate::ring::{Extent, ExtentQuery, IoPath, MAX_FILES, Ring, Wait, ZeroMethod};
use crate::storage::{Descriptors, Limits, NullStorage, Storage};
use crate::units::{ByteRange, Length};

const LENGTH: u64 = 65_536;
/// What the carrier of each disk has of the arena.
const BYTES: u32 = 65_536;
/// How long anything may take that should take a moment.
const PATIENCE: Duration = Duration::from_secs(30);
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
        let soon = self.engine.now().after(Duration::from_millis(1));
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

/// Its close hangs until it is let go.
struct HangsAtClose(NullStorage, Mutex<Receiver<()>>);

impl Drop for HangsAtClose {
    fn drop(&mut self) {
        assert!(self.1.lock().recv_timeout(2 * PATIENCE).is_ok());
    }
}

impl Storage for HangsAtClose {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn descriptors(&self) -> Option<Descriptors<'_>> {
        self.0.descriptors()
    }
    fn read_at(&self, path: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        self.0.read_at(path, offset, buffer)
    }
    fn write_at(&self, path: IoPath, offset: u64, buffer: &[u8]) -> Result<usize, Errno> {
        self.0.write_at(path, offset, buffer)
    }
    fn write_zeroes(&self, range: ByteRange, method: ZeroMethod) -> Result<(), Errno> {
        self.0.write_zeroes(range, method)
    }
    fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        self.0.discard(range)
    }
    fn allocate(&self, ranges: &[ByteRange]) -> Result<(), Errno> {
        self.0.allocate(ranges)
    }
    fn flush(&self) -> Result<(), Errno> {
        self.0.flush()
    }
    fn drop_cache(&self, range: ByteRange) -> Result<(), Errno> {
        self.0.drop_cache(range)
    }
    fn extents(&self, range: ByteRange, query: ExtentQuery, limit: usize) -> Result<Vec<Extent>, Errno> {
        self.0.extents(range, query, limit)
    }
}

#[test]
fn a_disk_that_hangs_when_it_is_closed_keeps_nobody_waiting() {
    let config = RingConfig { arena_bytes: 1 << 20, capacity: 8, threads: 1, sockets: 0 };
    let mut reactor = Reactor::new(ThreadsRing::new(&config).unwrap());
    let (ending, ended) = crossbeam::channel::bounded(0);
    reactor.tell_end(ending);
    let (inbox, room) = (reactor.inbox(), reactor.room());
    let (let_go, held) = mpsc::channel();
    let share = room.take(1 << 20, 1, Operation::OpenSource, "disk");
    let disk = DiskShared::new(DiskId(0), Arc::from("disk"), Length(LENGTH), reactor.ring.waker());
    let (answer, added) = ask();
    inbox.send(Command::AddDisk {
        file: Arc::new(HangsAtClose(NullStorage::new("disk", Length(LENGTH)), Mutex::new(held))),
        direct_alignment: Some(512),
        keep_is_fast: true,
        disk,
        opened: None,
        share: share.unwrap(),
        answer,
    });
    assert!(reactor.act().is_some() && added.try_take().unwrap().is_ok());
    inbox.send(Command::RemoveDisk { disk: DiskId(0), source: None });
    inbox.send(Command::Quit);
    let before = Instant::now();
    assert!(reactor.act().is_none(), "nothing is left to do");
    assert!(before.elapsed() < PATIENCE, "the ring thread was held up");
    // Its room is free, but until it is closed the engine is not at its end.
    reactor.close();
    let all = || room.take(1 << 20, MAX_FILES, Operation::OpenSource, "disk");
    assert!(all().is_ok());
    assert_eq!(ended.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
    let_go.send(()).unwrap();
    assert_eq!(ended.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
}
