//! Where disks have data is asked for by many, while one of the disks does not answer.

use engine::live::NbdOptions;
use engine::live::carrier::CarrierLimits;
use engine::live::sim::{SimDisk, SimEngine};
use engine::ring::Wait;
use engine::ring::sim::{
    Disk, DiskTraits, FaultPlan, SharedWorld, SimAddress, SimPeer, SimRing, SimSocket, World,
};
use engine::units::Length;

use crate::client::{
    self, BLOCK_STATUS, OPT_GO, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, Parser, REP_ACK, Request,
};

const LENGTH: u64 = 1 << 20;
const DISKS: usize = 2;
const HUNG: usize = 0;
const WELL: usize = 1;
/// Each of so many clients of a disk asks so often, without waiting.
const CLIENTS: usize = 4;
const QUESTIONS: u64 = 10;

/// One who asks where data is, and waits for the answers.
struct Asking {
    peer: SimPeer,
    parser: Parser,
    greeted: bool,
    /// Replies to its three options.
    settled: u32,
    answered: u64,
}

impl Asking {
    fn connect(address: &SimAddress, export: &str) -> Self {
        let peer = address.connect().expect("a place");
        let mut said = client::client_flags(3);
        said.extend(client::option(OPT_STRUCTURED_REPLY, &[]));
        said.extend(client::option(
            OPT_SET_META_CONTEXT,
            &client::context_data(export, &["base:allocation"]),
        ));
        said.extend(client::option(OPT_GO, &client::info_data(export, &[])));
        for cookie in 0..QUESTIONS {
            said.extend(Request::new(BLOCK_STATUS, 0, cookie, 0, 65_536).bytes());
        }
        assert_eq!(peer.write(&said), Ok(said.len()));
        Self { peer, parser: Parser::default(), greeted: false, settled: 0, answered: 0 }
    }

    fn listen(&mut self) {
        while let Ok(bytes) = self.peer.read(65_536) {
            assert!(!bytes.is_empty(), "it is not sent away");
            self.parser.push(&bytes);
        }
        self.greeted = self.greeted || self.parser.greeting().is_some();
        while self.greeted && self.settled < 3 {
            let Some(reply) = self.parser.option_reply() else { return };
            assert_eq!(reply.kind >> 31, 0, "{:x}", reply.kind);
            self.settled += u32::from(reply.kind == REP_ACK);
        }
        while self.settled == 3 && self.parser.message(|_| 0).is_some() {
            self.answered += 1;
        }
    }
}

struct Bench {
    world: SharedWorld,
    engine: SimEngine,
    disks: Vec<SimDisk>,
    clients: Vec<Vec<Asking>>,
}

impl Bench {
    /// A server with an export of each disk, of which one does not answer, and clients of each.
    fn new() -> Self {
        let world = World::shared();
        world.borrow_mut().set_pipe_bytes(100_000);
        for _ in 0..DISKS {
            world.borrow_mut().add_disk(Disk::sparse(LENGTH.try_into().unwrap(), DiskTraits::default()));
        }
        world.borrow_mut().disk(HUNG).set_hung();
        let ring = SimRing::new(world.clone(), DISKS << 20, 64, 5, FaultPlan::default());
        let mut engine = SimEngine::new(ring.with_sockets(DISKS * CLIENTS + 1));
        engine.set_carrier(CarrierLimits::default(), 1 << 20);
        let (listener, address) = SimSocket::listen(&world);
        let (server, listens) = engine.listen(listener, NbdOptions::default());
        let mut asked = vec![listens];
        let mut disks = Vec::new();
        for (number, name) in ["hung", "well"].into_iter().enumerate() {
            let (disk, added) = engine.add_disk(number, Length(LENGTH), Some(512));
            let (_, exported) = engine.export(server, name, &disk, None, Box::new(|| {}));
            asked.extend([added, exported]);
            disks.push(disk);
        }
        let mut bench = Self { world, engine, disks, clients: Vec::new() };
        bench.turn(10);
        assert!(asked.iter().all(|asked| matches!(asked.take(), Some(Ok(())))));
        for name in ["hung", "well"] {
            bench.clients.push((0..CLIENTS).map(|_| Asking::connect(&address, name)).collect());
            // Those of the one that hangs are all there first.
            bench.turn(200);
        }
        bench
    }

    fn turn(&mut self, count: u32) {
        for _ in 0..count {
            let soon = self.engine.now().after(std::time::Duration::from_micros(100));
            let wait = match self.engine.act().expect("it has not ended") {
                Wait::Poll => Wait::Poll,
                Wait::Until(until) => Wait::Until(until.min(soon)),
                Wait::Forever => Wait::Until(soon),
            };
            self.engine.wait(wait);
            self.clients.iter_mut().flatten().for_each(Asking::listen);
        }
    }

    fn answered(&self, disk: usize) -> u64 {
        self.clients[disk].iter().map(|client| client.answered).sum()
    }
}

#[test]
fn a_disk_that_does_not_tell_where_its_data_is_keeps_no_other_from_telling() {
    let mut bench = Bench::new();
    bench.turn(2000);
    let all = CLIENTS as u64 * QUESTIONS;
    assert_eq!((bench.answered(HUNG), bench.answered(WELL)), (0, all));
    assert_eq!(bench.engine.in_flight(), 2, "as many as one disk is asked at a time");
    // One that is to go waits for what it was asked; and once it answers, everybody is told.
    bench.engine.remove_disk(&bench.disks[HUNG]);
    bench.turn(10);
    assert_eq!(bench.engine.taken().1, DISKS);
    bench.world.borrow_mut().disk(HUNG).set_free();
    bench.turn(2000);
    assert_eq!((bench.answered(HUNG), bench.engine.taken().1), (all, DISKS - 1));
}
