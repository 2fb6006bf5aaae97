//! Fixture of the simulated ring: disks and documents of a world in memory, and virtual time.

use std::sync::atomic::{AtomicU64, Ordering};

use engine::ring::sim::{Disk, DiskTraits, FaultPlan, SharedWorld, SimRing, SimSocket, World};
use engine::units::ByteRange;

use super::network::{Dial, Family, Peer, sim_dial};
use super::{Blocked, Fault, Fixture, Inspect, TestDisk};

/// A world of its own. Each ring over it has another seed.
pub(crate) struct Simulated {
    world: SharedWorld,
    seed: AtomicU64,
}

impl Default for Simulated {
    fn default() -> Self {
        Self { world: World::shared(), seed: AtomicU64::new(1) }
    }
}

impl Simulated {
    fn add(&self, disk: Disk) -> usize {
        self.world.borrow_mut().add_disk(disk)
    }
}

/// A disk of the world, by its number.
pub(crate) struct SimDisk {
    world: SharedWorld,
    number: usize,
}

impl TestDisk for SimDisk {
    fn fill(&self, offset: u64, bytes: &[u8]) {
        self.world.borrow_mut().disk(self.number).fill(offset, bytes);
    }

    fn contents(&self) -> Vec<u8> {
        self.world.borrow_mut().disk(self.number).view().to_vec()
    }

    fn allocated(&self) -> Option<u64> {
        Some(self.world.borrow_mut().disk(self.number).space_bytes())
    }
}

impl Fixture for Simulated {
    type R = SimRing;
    type Disk = SimDisk;
    const MORE_THAN_FITS: usize = 1 << 20;

    fn unavailable() -> Option<String> {
        None
    }

    fn ring_with_sockets(&self, arena_bytes: usize, capacity: usize, sockets: usize) -> SimRing {
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        SimRing::new(self.world.clone(), arena_bytes, capacity, seed, FaultPlan::default())
            .with_sockets(sockets)
    }

    fn listener(&self, _: Family) -> (SimSocket, Dial) {
        let (socket, address) = SimSocket::listen(&self.world);
        (socket, sim_dial(address))
    }

    fn pair(&self, _: Family) -> (SimSocket, Box<dyn Peer>) {
        let (socket, peer) = SimSocket::pair(&self.world);
        (socket, Box::new(peer))
    }

    fn disk(&self, length: u64) -> SimDisk {
        let length = usize::try_from(length).unwrap();
        let number = self.add(Disk::sparse(length, DiskTraits::default()));
        SimDisk { world: self.world.clone(), number }
    }

    fn file(&self, disk: &SimDisk) -> usize {
        disk.number
    }

    fn has_direct(&self) -> bool {
        true
    }

    /// The simulation knows no descriptors; any disk will do.
    fn null(&self) -> Option<usize> {
        Some(self.disk(1 << 20).number)
    }

    fn faulty(&self, fault: Fault) -> Option<usize> {
        let disk = match fault {
            Fault::UnreadableData => {
                let mut disk = Disk::sparse(8192, DiskTraits::default());
                disk.set_bad(ByteRange::new(0, 8192));
                disk
            }
            Fault::Full => Disk::sparse(0, DiskTraits { fixed_length: true, ..DiskTraits::default() }),
            Fault::NoZeroing => Disk::sparse(8192, DiskTraits { zeroes: false, ..DiskTraits::default() }),
            Fault::WriteToReadOnly | Fault::Panics => return None,
        };
        Some(self.add(disk))
    }

    fn document(&self) -> (usize, Inspect) {
        let number = self.world.borrow_mut().add_document();
        let world = self.world.clone();
        (number, Box::new(move || world.borrow().document(number).map(<[u8]>::to_vec)))
    }

    fn blocked(&self) -> Option<Blocked<usize>> {
        let mut disk = Disk::sparse(1 << 20, DiskTraits { direct_alignment: None, ..DiskTraits::default() });
        disk.set_stuck();
        Some(Blocked { file: self.add(disk), beyond_recall: 0, release: Box::new(|| ()) })
    }
}
