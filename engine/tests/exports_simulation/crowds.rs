//! More requests than anybody else may have waiting, of clients each of whom keeps to his bounds: none of them is told to come again.

use std::time::Duration;

use engine::job::JobHandle;
use engine::live::carrier::CarrierLimits;
use engine::live::sim::{SimDisk, SimEngine, SimServer};
use engine::live::{GroupFailure, JobId, NbdOptions};
use engine::ring::Wait;
use engine::ring::sim::{
    Disk, DiskTraits, FaultPlan, SharedWorld, SimAddress, SimPeer, SimRing, SimSocket, World,
};
use engine::units::{ByteRange, ClusterSize, Geometry, Length};

use crate::client::{self, Message, OPT_GO, Parser, READ, REP_ACK, Request};
use crate::jobs::job;

const LENGTH: u64 = 1 << 20;
const CLUSTER: u64 = 16 << 10;
const SLOTS: u32 = 8;
const BYTES: u32 = 512;
/// Of a client, without waiting: as many as a connection takes.
const REQUESTS: u64 = 128;
const DISK: usize = 0;

/// One who reads, and waits for the answers.
struct Reader {
    peer: SimPeer,
    parser: Parser,
    greeted: bool,
    settled: bool,
    answered: u64,
    errors: Vec<u32>,
}

impl Reader {
    fn connect(address: &SimAddress, export: &str) -> Self {
        let peer = address.connect().expect("a place");
        let mut said = client::client_flags(3);
        said.extend(client::option(OPT_GO, &client::info_data(export, &[])));
        for cookie in 0..REQUESTS {
            let offset = cookie * 8192 % LENGTH;
            said.extend(Request::new(READ, 0, cookie, offset, BYTES).bytes());
        }
        assert_eq!(peer.write(&said), Ok(said.len()));
        Self {
            peer,
            parser: Parser::default(),
            greeted: false,
            settled: false,
            answered: 0,
            errors: Vec::new(),
        }
    }

    fn listen(&mut self) {
        while let Ok(bytes) = self.peer.read(65_536) {
            assert!(!bytes.is_empty(), "it is not sent away");
            self.parser.push(&bytes);
        }
        self.greeted = self.greeted || self.parser.greeting().is_some();
        while self.greeted && !self.settled {
            let Some(reply) = self.parser.option_reply() else { return };
            assert_eq!(reply.kind >> 31, 0, "{:x}", reply.kind);
            self.settled = reply.kind == REP_ACK;
        }
        while self.settled
            && let Some(message) = self.parser.message(|_| BYTES as usize)
        {
            let Message::Simple { error, .. } = message else { panic!("none was agreed on") };
            self.answered += 1;
            self.errors.extend((error != 0).then_some(error));
        }
    }
}

struct Bench {
    world: SharedWorld,
    engine: SimEngine,
    disk: SimDisk,
    server: SimServer,
    address: SimAddress,
    readers: Vec<Reader>,
}

impl Bench {
    /// A server with an export `disk`, and places for so many clients.
    fn new(clients: usize) -> Self {
        let world = World::shared();
        world.borrow_mut().set_pipe_bytes(200_000);
        let contents = vec![7; LENGTH.try_into().unwrap()];
        world.borrow_mut().add_disk(Disk::new(contents, DiskTraits::default()));
        world.borrow_mut().add_disk(Disk::sparse(LENGTH.try_into().unwrap(), DiskTraits::default()));
        let ring = SimRing::new(world.clone(), 2 << 20, 64, 5, FaultPlan::default());
        let mut engine = SimEngine::new(ring.with_sockets(clients + 1));
        engine.set_carrier(CarrierLimits::default(), 1 << 20);
        let (listener, address) = SimSocket::listen(&world);
        let (server, listens) = engine.listen(listener, NbdOptions::default());
        let (disk, added) = engine.add_disk(DISK, Length(LENGTH), Some(512));
        let (_, exported) = engine.export(server, "disk", &disk, None, Box::new(|| {}));
        let mut bench = Self { world, engine, disk, server, address, readers: Vec::new() };
        bench.turn(10);
        assert!([listens, added, exported].iter().all(|asked| matches!(asked.take(), Some(Ok(())))));
        bench
    }

    fn turn(&mut self, count: u32) {
        for _ in 0..count {
            let soon = self.engine.now().after(Duration::from_micros(100));
            let wait = match self.engine.act().expect("it has not ended") {
                Wait::Poll => Wait::Poll,
                Wait::Until(until) => Wait::Until(until.min(soon)),
                Wait::Forever => Wait::Until(soon),
            };
            self.engine.wait(wait);
        }
        self.readers.iter_mut().for_each(Reader::listen);
    }

    /// So many clients come, who are not answered as long as the disk hangs.
    fn crowd(&mut self, export: &str, clients: usize) {
        for _ in 0..clients {
            self.readers.push(Reader::connect(&self.address, export));
            self.turn(20);
        }
        self.turn(500);
    }

    fn answered(&self) -> u64 {
        self.readers.iter().map(|reader| reader.answered).sum()
    }

    fn errors(&self) -> usize {
        self.readers.iter().map(|reader| reader.errors.len()).sum()
    }

    /// The disk answers, and so is everybody.
    fn free(&mut self) {
        self.world.borrow_mut().disk(DISK).set_free();
        let all = self.readers.len() as u64 * REQUESTS;
        for _ in 0..20_000 {
            if self.answered() == all {
                break;
            }
            self.turn(10);
        }
        assert_eq!((self.answered(), self.errors()), (all, 0));
    }

    fn export_t0(&mut self, job: JobId) {
        let (_, exported) = self.engine.export(self.server, "t0", &self.disk, Some(job), Box::new(|| {}));
        self.turn(10);
        assert!(matches!(exported.take(), Some(Ok(()))));
    }

    /// A job that copies nothing by itself.
    fn start(&mut self) -> (JobHandle, JobId) {
        let geometry = Geometry::new(Length(LENGTH), ClusterSize::new(CLUSTER).unwrap());
        let job = job(self.disk.clone(), geometry, SLOTS, |_| ());
        let (mut handles, pending) = self.engine.start(vec![job], GroupFailure::GoOn, Duration::from_secs(5));
        for _ in 0..1000 {
            if let Some(started) = pending.take() {
                return (handles.pop().unwrap(), started.unwrap()[0]);
            }
            self.turn(1);
        }
        panic!("it does not start");
    }
}

/// 140 × 128 are more than 16,384 that wait and 1024 that the carrier has.
#[test]
fn a_crowd_of_clients_on_a_disk_that_hangs_waits_and_nobody_is_refused() {
    const CLIENTS: usize = 140;
    let mut bench = Bench::new(CLIENTS);
    bench.world.borrow_mut().disk(DISK).set_hung();
    bench.crowd("disk", CLIENTS);
    assert_eq!(bench.answered(), 0);
    bench.free();
}

/// 40 × 128 are more than 4096 reads of a snapshot that are under way.
#[test]
fn a_crowd_of_readers_of_a_snapshot_waits_and_nobody_is_refused() {
    const CLIENTS: usize = 40;
    let mut bench = Bench::new(CLIENTS);
    let (_handle, job) = bench.start();
    bench.export_t0(job);
    bench.world.borrow_mut().disk(DISK).set_hung();
    bench.crowd("t0", CLIENTS);
    assert_eq!(bench.answered(), 0);
    // A program that reads it by itself has its own room.
    let read = bench.engine.read_snapshot(job, ByteRange::new(0, 10));
    bench.turn(10);
    assert!(read.take().is_none());
    bench.free();
    assert_eq!(read.take().unwrap().result.unwrap(), [7; 10]);
}

/// Those who wait for their turn hear of it, too.
#[test]
fn a_crowd_of_readers_hears_that_the_job_has_ended() {
    const CLIENTS: usize = 40;
    let mut bench = Bench::new(CLIENTS);
    let (handle, job) = bench.start();
    bench.export_t0(job);
    bench.world.borrow_mut().disk(DISK).set_hung();
    bench.crowd("t0", CLIENTS);
    handle.cancel().unwrap();
    bench.world.borrow_mut().disk(DISK).set_free();
    bench.turn(5000);
    assert_eq!(bench.answered(), CLIENTS as u64 * REQUESTS);
    assert!(bench.errors() as u64 > CLIENTS as u64 * REQUESTS - 4096 && bench.engine.jobs().count() == 0);
}
