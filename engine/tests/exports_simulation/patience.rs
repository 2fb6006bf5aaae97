//! A client's large write, which goes to its disk in pieces, and has the time of a backup once.

use std::time::Duration;

use engine::job::JobHandle;
use engine::live::carrier::CarrierLimits;
use engine::live::sim::{SimDisk, SimEngine};
use engine::live::{GroupFailure, NbdOptions};
use engine::ring::Wait;
use engine::ring::sim::{Disk, DiskTraits, FaultPlan, SharedWorld, SimPeer, SimRing, SimSocket, World};
use engine::units::{ClusterSize, Geometry, Length};

use crate::client::{self, OPT_GO, Request, WRITE};
use crate::jobs::job;

const LENGTH: u64 = 4 << 20;
const CLUSTER: u64 = 64 << 10;
const SLOTS: u32 = 8;
const TIMEOUT: Duration = Duration::from_secs(30);
/// For so long the target does not answer, again and again.
const STUCK: Duration = Duration::from_secs(12);
/// Of a payload. It is all the memory that clients share, so that a write has few pieces on their way to the disk at a time.
const PIECE: u64 = 256 << 10;

struct Bench {
    world: SharedWorld,
    engine: SimEngine,
    disk: SimDisk,
    peer: SimPeer,
    /// What the client has not sent yet.
    rest: Vec<u8>,
}

impl Bench {
    /// A disk, and a client of its export.
    fn new() -> Self {
        let world = World::shared();
        world.borrow_mut().set_pipe_bytes(100_000);
        let length = usize::try_from(LENGTH).unwrap();
        world.borrow_mut().add_disk(Disk::new(vec![7; length], DiskTraits::default()));
        world.borrow_mut().add_disk(Disk::sparse(length, DiskTraits::default()));
        let ring = SimRing::new(world.clone(), 4 << 20, 64, 5, FaultPlan::default());
        let mut engine = SimEngine::new(ring.with_sockets(2));
        engine.set_carrier(CarrierLimits::default(), 1 << 20);
        let (listener, address) = SimSocket::listen(&world);
        let little = NbdOptions { memory: PIECE, ..NbdOptions::default() };
        let (server, listens) = engine.listen(listener, little);
        let (disk, added) = engine.add_disk(0, Length(LENGTH), Some(512));
        let (_, exported) = engine.export(server, "disk", &disk, None, Box::new(|| {}));
        let mut rest = client::client_flags(3);
        rest.extend(client::option(OPT_GO, &client::info_data("disk", &[])));
        let peer = address.connect().expect("a place");
        let mut bench = Self { world, engine, disk, peer, rest };
        let asked = [listens, added, exported];
        let soon = bench.engine.now().after(Duration::from_millis(20));
        bench.turn_until(|bench| bench.engine.now() >= soon);
        assert!(asked.iter().all(|asked| matches!(asked.take(), Some(Ok(())))));
        bench
    }

    /// The client writes to all of the disk but the end, in so many requests.
    fn write(&mut self, requests: u64) {
        let length = (LENGTH - PIECE) / requests;
        for cookie in 0..requests {
            let mut write = Request::new(WRITE, 0, cookie, cookie * length, u32::try_from(length).unwrap());
            write.payload = vec![9; usize::try_from(length).unwrap()];
            self.rest.extend(write.bytes());
        }
    }

    fn turn_until(&mut self, mut there: impl FnMut(&mut Self) -> bool) {
        for _ in 0..2_000_000 {
            if there(self) {
                return;
            }
            if let Ok(sent) = self.peer.write(&self.rest) {
                self.rest.drain(..sent);
            }
            while self.peer.read(65_536).is_ok_and(|bytes| !bytes.is_empty()) {}
            let soon = self.engine.now().after(Duration::from_millis(1));
            let wait = match self.engine.act().expect("it has not ended") {
                Wait::Poll => Wait::Poll,
                Wait::Until(until) => Wait::Until(until.min(soon)),
                Wait::Forever => Wait::Until(soon),
            };
            self.engine.wait(wait);
        }
        panic!("it never comes");
    }

    /// A job that copies next to nothing by itself.
    fn start(&mut self) -> JobHandle {
        let geometry = Geometry::new(Length(LENGTH), ClusterSize::new(CLUSTER).unwrap());
        let job = job(self.disk.clone(), geometry, SLOTS, |plan| {
            plan.live.as_mut().expect("its disk is live").cbw_timeout = Some(TIMEOUT);
        });
        let (mut handles, pending) = self.engine.start(vec![job], GroupFailure::GoOn, Duration::from_secs(5));
        let mut started = None;
        self.turn_until(|_| {
            started = pending.take();
            started.is_some()
        });
        assert!(started.unwrap().is_ok());
        handles.pop().unwrap()
    }
}

/// Whether a backup outlives writes to `LENGTH - PIECE` bytes in so many requests, while its target stops for 12 s, four times.
fn outlives(requests: u64) -> bool {
    let mut bench = Bench::new();
    let handle = bench.start();
    bench.write(requests);
    for _ in 0..4 {
        bench.world.borrow_mut().disk(1).set_stuck();
        let until = bench.engine.now().after(STUCK);
        bench.turn_until(|bench| bench.engine.now() >= until);
        let done = handle.progress().done;
        bench.world.borrow_mut().disk(1).set_free();
        let ended = |bench: &mut Bench| bench.engine.jobs().all(|job| job.fails);
        bench.turn_until(|bench| handle.progress().done > done || ended(bench));
        if ended(&mut bench) {
            return false;
        }
    }
    true
}

#[test]
fn the_pieces_of_a_clients_write_have_the_time_of_a_backup_together() {
    assert!(!outlives(1), "it has waited for 48 s");
    assert!(outlives(15), "none has waited for longer than 12 s or so");
}
