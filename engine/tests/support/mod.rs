//! What the conformance suite stands on: the [`Fixture`] that a ring under test provides, and how checks drive a ring.

pub(crate) mod checks;
pub(crate) mod network;
pub(crate) mod plain;
pub(crate) mod real;
pub(crate) mod simulated;
pub(crate) mod storage;

use std::time::Duration;

use engine::ring::{BufferRange, Completion, Op, Output, Ring, Token, Wait};
use nix::errno::Errno;

use network::{Dial, Family, Peer};

/// A disk that a check can see from outside the ring.
pub(crate) trait TestDisk {
    /// Put `bytes` there.
    fn fill(&self, offset: u64, bytes: &[u8]);
    /// Everything.
    fn contents(&self) -> Vec<u8>;
    /// Bytes of space taken, if the disk can tell.
    fn allocated(&self) -> Option<u64>;
}

/// A way to make an operation fail as a kernel would.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Writing to a storage that was opened for reading: `EBADF`.
    WriteToReadOnly,
    /// Reading what the device cannot: `EIO`.
    UnreadableData,
    /// Writing to a storage that is full: `ENOSPC`.
    Full,
    /// [`engine::ring::ZeroMethod::Keep`] where there is no such operation: `EOPNOTSUPP`.
    NoZeroing,
    /// Panics when its extents are asked for.
    Panics,
}

/// A storage whose reads wait until they are let go.
pub(crate) struct Blocked<File> {
    pub(crate) file: File,
    /// So many reads get stuck beyond recall; one pushed after them can be cancelled.
    pub(crate) beyond_recall: usize,
    /// Let all go.
    pub(crate) release: Box<dyn Fn()>,
}

/// What a document holds now, seen from outside.
pub(crate) type Inspect = Box<dyn Fn() -> Option<Vec<u8>>>;

/// A ring under test, with what it works on.
pub(crate) trait Fixture: Default {
    type R: Ring;
    type Disk: TestDisk;

    /// Why the ring cannot be tested on this host.
    fn unavailable() -> Option<String>;
    /// A ring that takes no sockets.
    fn ring(&self, arena_bytes: usize, capacity: usize) -> Self::R {
        self.ring_with_sockets(arena_bytes, capacity, 0)
    }
    fn ring_with_sockets(&self, arena_bytes: usize, capacity: usize, sockets: usize) -> Self::R;
    /// A listening socket, and how to connect to it.
    fn listener(&self, family: Family) -> (<Self::R as Ring>::Socket, Dial);
    /// More bytes than a connection takes that nobody reads from.
    const MORE_THAN_FITS: usize;
    /// A connected socket, and its peer.
    fn pair(&self, family: Family) -> (<Self::R as Ring>::Socket, Box<dyn Peer>);
    /// A disk that is one hole of `length` bytes.
    fn disk(&self, length: u64) -> Self::Disk;
    fn file(&self, disk: &Self::Disk) -> <Self::R as Ring>::File;
    /// Whether its disks take direct I/O.
    fn has_direct(&self) -> bool;
    /// A storage without descriptors.
    fn null(&self) -> Option<<Self::R as Ring>::File>;
    fn faulty(&self, fault: Fault) -> Option<<Self::R as Ring>::File>;
    fn document(&self) -> (<Self::R as Ring>::Document, Inspect);
    fn blocked(&self) -> Option<Blocked<<Self::R as Ring>::File>>;
}

/// Beyond this a check counts as hung.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Say on one line why a check did not run.
pub(crate) fn skip(what: &str, reason: &str) {
    eprintln!("skipped: {what}: {reason}");
}

/// Wait until `count` operations have completed.
pub(crate) fn complete<R: Ring>(ring: &mut R, count: usize) -> Vec<Completion> {
    let mut completions = Vec::new();
    let deadline = ring.now().after(PATIENCE);
    while completions.len() < count {
        assert!(ring.now() < deadline, "hung with {} of {count} complete", completions.len());
        ring.wait(Wait::Until(deadline), &mut completions).expect("the ring works");
    }
    assert_eq!(completions.len(), count, "more completions than operations");
    completions
}

/// Carry out one operation on an idle ring.
pub(crate) fn run<R: Ring>(ring: &mut R, op: Op) -> Result<Output, Errno> {
    assert_eq!(ring.in_flight(), 0, "the ring is idle");
    ring.push(Token(77), op);
    assert_eq!(ring.in_flight(), 1);
    let completion = complete(ring, 1).remove(0);
    assert_eq!((completion.token, ring.in_flight()), (Token(77), 0));
    completion.result
}

/// The part of the arena of `length` bytes from page `page` on.
pub(crate) fn buffer(page: u32, length: u32) -> BufferRange {
    BufferRange { start: page * 4096, length }
}

/// Bytes that differ from page to page and from seed to seed.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// SplitMix64: a seed gives the same run everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
