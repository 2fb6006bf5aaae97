//! The simulated ring: deterministic, seeded, in virtual time, with faults.
//!
//! # Model
//! Each operation gets a random duration when it is pushed and takes effect at one instant, when it completes; [`Ring::wait`] moves the
//! virtual clock to the next completion or to the deadline. So operations complete in any order that a real device
//! could choose, and the same seed gives the same run. Reads and writes may be short at any sector, and fail, as the
//! [`FaultPlan`] says.
//!
//! # Stable storage
//! A disk of the [`World`] has a *view* (what a read gives) and a *medium* (what a power loss leaves). A write changes the view when it
//! completes; it reaches the medium with the first flush that was pushed after it had completed. [`World::crash`] keeps or loses
//! each sector that was not flushed, and each sector of a write in flight, at random. A flush that fails loses some of what it covered for good, and
//! says so only once, as Linux does.

mod faults;
mod world;

pub use faults::{Fault, FaultPlan, Rates};
pub use world::{Disk, DiskTraits, SharedWorld, World};

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use nix::errno::Errno;

use super::arena::{Access, Arena, BufferRange};
use super::{Completion, DocumentId, FileId, IoPath, Op, Output, Ring, RingFailure, Token, Wait, Wake};
use crate::units::Timestamp;

/// Smallest unit that a torn write keeps or loses whole, in bytes.
pub const SECTOR: usize = 512;

struct InFlight {
    token: Token,
    op: Op,
    fault: Option<Fault>,
    cancelled: bool,
    /// For a flush: how many writes had completed when it was pushed.
    covers: u64,
}

/// See the module's header.
pub struct SimRing {
    arena: Arena,
    world: SharedWorld,
    rng: Rng,
    faults: FaultPlan,
    clock: Timestamp,
    capacity: usize,
    files: Vec<usize>,
    documents: Vec<usize>,
    in_flight: Vec<Option<InFlight>>,
    due: BinaryHeap<Reverse<(Timestamp, u64, usize)>>,
    sequence: u64,
    pushed: u64,
}

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

impl SimRing {
    /// A ring over `world`.
    ///
    /// # Panics
    /// If the arena's memory cannot be had.
    #[must_use]
    pub fn new(
        world: SharedWorld,
        arena_bytes: usize,
        capacity: usize,
        seed: u64,
        faults: FaultPlan,
    ) -> Self {
        let mut arena = Arena::new(arena_bytes).expect("memory for a test");
        // Stale bytes must show: a slot is never assumed to be zero.
        let all = BufferRange { start: 0, length: u32::try_from(arena.bytes()).expect("at most 1 GiB") };
        arena.slice_mut(all).fill(0xA5);
        Self {
            arena,
            world,
            rng: Rng::with_seed(seed),
            faults,
            clock: Timestamp::default(),
            capacity,
            files: Vec::new(),
            documents: Vec::new(),
            in_flight: Vec::new(),
            due: BinaryHeap::new(),
            sequence: 0,
            pushed: 0,
        }
    }

    /// Operations pushed so far.
    #[must_use]
    pub fn pushed(&self) -> u64 {
        self.pushed
    }

    /// The power goes: writes in flight are torn, what was not flushed is kept or lost sector by sector. The ring is gone.
    pub fn crash(mut self) {
        let mut world = self.world.borrow_mut();
        for slot in self.in_flight.iter_mut().filter_map(Option::take) {
            match &slot.op {
                Op::Write { file, offset, buffer, .. } => {
                    let bytes = self.arena.slice(*buffer).to_vec();
                    world.disk(self.files[file.0 as usize]).write(*offset, &bytes);
                }
                Op::WriteZeroes { file, range, .. } => {
                    world.disk(self.files[file.0 as usize]).write_zeroes(*range);
                }
                // Replaced atomically: all or nothing.
                Op::Publish { document, contents } if self.rng.bool() => {
                    world.publish(self.documents[document.0 as usize], contents.clone());
                }
                _ => {}
            }
            if let Some((buffer, access)) = lent(&slot.op) {
                self.arena.give_back(buffer, access);
            }
        }
        world.crash(&mut self.rng);
    }

    fn complete(&mut self, index: usize) -> Completion {
        let slot = self.in_flight[index].take().expect("in flight");
        if let Some((buffer, access)) = lent(&slot.op) {
            self.arena.give_back(buffer, access);
        }
        let result = if slot.cancelled { Err(Errno::ECANCELED) } else { self.carry_out(&slot) };
        Completion { token: slot.token, result }
    }

    fn carry_out(&mut self, slot: &InFlight) -> Result<Output, Errno> {
        let shared = Rc::clone(&self.world);
        let mut world = shared.borrow_mut();
        match (&slot.op, slot.fault) {
            (Op::Flush { file } | Op::DropCache { file, .. }, Some(fault)) => {
                world.disk(self.files[file.0 as usize]).fail_flush(slot.covers, &mut self.rng);
                return Err(fault.errno());
            }
            (Op::Write { file, offset, buffer, .. }, Some(Fault::Corrupt)) => {
                let mut bytes = self.arena.slice(*buffer).to_vec();
                let at = self.rng.usize(..bytes.len());
                bytes[at] ^= 1 << self.rng.u8(..8);
                world.disk(self.files[file.0 as usize]).write(*offset, &bytes);
                return Ok(Output::Bytes(buffer.length));
            }
            (Op::Read { .. } | Op::Write { .. }, Some(Fault::Short)) | (_, None) => {}
            // A write that fails may have changed any of its sectors.
            (Op::Write { file, offset, buffer, .. }, Some(fault)) => {
                let bytes = self.arena.slice(*buffer).to_vec();
                let keep = self.rng.usize(..=bytes.len() / SECTOR) * SECTOR;
                world.disk(self.files[file.0 as usize]).write(*offset, &bytes[..keep.min(bytes.len())]);
                return Err(fault.errno());
            }
            (_, Some(Fault::Short | Fault::Corrupt)) => {}
            (_, Some(fault)) => return Err(fault.errno()),
        }
        match &slot.op {
            Op::Read { file, offset, buffer, path } => {
                let disk = world.disk(self.files[file.0 as usize]);
                check_alignment(disk, *offset, *buffer, *path)?;
                let available = disk.readable(*offset, u64::from(buffer.length))?;
                let count = self.shorten(slot, available, *path);
                let part = BufferRange { start: buffer.start, length: count };
                let disk = world.disk(self.files[file.0 as usize]);
                disk.read(*offset, self.arena.slice_mut(part));
                Ok(Output::Bytes(count))
            }
            Op::Write { file, offset, buffer, path } => {
                let disk = world.disk(self.files[file.0 as usize]);
                check_alignment(disk, *offset, *buffer, *path)?;
                disk.writable(*offset, u64::from(buffer.length))?;
                let count = self.shorten(slot, u64::from(buffer.length), *path);
                let bytes = self.arena.slice(BufferRange { start: buffer.start, length: count });
                world.disk(self.files[file.0 as usize]).write(*offset, bytes);
                Ok(Output::Bytes(count))
            }
            Op::WriteZeroes { file, range, method } => {
                let disk = world.disk(self.files[file.0 as usize]);
                disk.may_zero(*method)?;
                disk.write_zeroes(*range);
                Ok(Output::Done)
            }
            Op::Discard { file, range } => {
                world.disk(self.files[file.0 as usize]).write_zeroes(*range);
                Ok(Output::Done)
            }
            Op::Allocate { file, ranges } => {
                let disk = world.disk(self.files[file.0 as usize]);
                ranges.iter().try_for_each(|range| disk.allocate(*range)).map(|()| Output::Done)
            }
            Op::Flush { file } => {
                world.disk(self.files[file.0 as usize]).flush(slot.covers);
                Ok(Output::Done)
            }
            Op::DropCache { .. } => Ok(Output::Done),
            Op::Extents { file, range, query, limit } => {
                Ok(Output::Extents(world.disk(self.files[file.0 as usize]).extents(*range, *query, *limit)))
            }
            Op::Digest { buffer, chunk } => {
                let bytes = self.arena.slice(*buffer);
                Ok(Output::Digests(bytes.chunks(*chunk as usize).map(xxhash_rust::xxh3::xxh3_128).collect()))
            }
            Op::Publish { document, contents } => {
                world.publish(self.documents[document.0 as usize], contents.clone());
                Ok(Output::Done)
            }
            Op::Cancel { .. } => Ok(Output::Done),
        }
    }

    /// How much of `available` bytes a read or write does.
    fn shorten(&mut self, slot: &InFlight, available: u64, path: IoPath) -> u32 {
        let available = u32::try_from(available).expect("no more than the buffer");
        let grain = if path == IoPath::Direct { SECTOR as u32 } else { 1 };
        if slot.fault != Some(Fault::Short) || available <= grain {
            return available;
        }
        (self.rng.u32(1..available) / grain * grain).max(grain)
    }
}

fn check_alignment(disk: &Disk, offset: u64, buffer: BufferRange, path: IoPath) -> Result<(), Errno> {
    let alignment = u64::from(disk.alignment());
    let aligned = offset.is_multiple_of(alignment) && u64::from(buffer.length).is_multiple_of(alignment);
    if path == IoPath::Direct && !aligned { Err(Errno::EINVAL) } else { Ok(()) }
}

fn lent(op: &Op) -> Option<(BufferRange, Access)> {
    match op {
        Op::Read { buffer, .. } => Some((*buffer, Access::Fill)),
        Op::Write { buffer, .. } | Op::Digest { buffer, .. } => Some((*buffer, Access::Look)),
        _ => None,
    }
}

impl Ring for SimRing {
    /// Number of a disk in the world.
    type File = usize;
    /// Number of a document in the world.
    type Document = usize;

    fn name(&self) -> &'static str {
        "sim"
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn arena_mut(&mut self) -> &mut Arena {
        &mut self.arena
    }

    fn add_file(&mut self, file: usize) -> Result<FileId, RingFailure> {
        self.files.push(file);
        Ok(FileId(u16::try_from(self.files.len() - 1).expect("a few")))
    }

    fn add_document(&mut self, document: usize) -> Result<DocumentId, RingFailure> {
        self.documents.push(document);
        Ok(DocumentId(u16::try_from(self.documents.len() - 1).expect("a few")))
    }

    fn release_files(&mut self) {
        assert_eq!(self.in_flight(), 0, "disks are in use");
        self.files.clear();
        self.documents.clear();
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn in_flight(&self) -> usize {
        self.due.len()
    }

    fn push(&mut self, token: Token, op: Op) {
        assert!(self.in_flight() < self.capacity, "the ring is full");
        let duplicate = self.in_flight.iter().flatten().any(|slot| slot.token == token);
        assert!(!duplicate, "{token:?} is in flight");
        if let Some((buffer, access)) = lent(&op) {
            let _ = self.arena.lend(buffer, access);
        }
        if let Op::Cancel { target } = op {
            for slot in self.in_flight.iter_mut().flatten().filter(|slot| slot.token == target) {
                slot.cancelled = true;
            }
        }
        let mut covers = 0;
        if let Op::Flush { file } | Op::DropCache { file, .. } = &op {
            covers = self.world.borrow_mut().disk(self.files[file.0 as usize]).writes_so_far();
        }
        let fault = self.faults.decide(self.pushed, &op, &mut self.rng);
        self.pushed += 1;
        self.sequence += 1;
        let slow = if self.rng.u8(..20) == 0 { 50 } else { 1 };
        let duration = Duration::from_micros(self.rng.u64(20..400) * slow);
        let index = self.in_flight.iter().position(Option::is_none).unwrap_or_else(|| {
            self.in_flight.push(None);
            self.in_flight.len() - 1
        });
        self.in_flight[index] = Some(InFlight { token, op, fault, cancelled: false, covers });
        self.due.push(Reverse((self.clock.after(duration), self.sequence, index)));
    }

    fn wait(&mut self, until: Wait, completions: &mut Vec<Completion>) -> Result<(), RingFailure> {
        let next = self.due.peek().map(|Reverse((at, ..))| *at);
        let target = match (until, next) {
            (Wait::Poll, _) => self.clock,
            (Wait::Until(deadline), Some(next)) => deadline.min(next),
            (Wait::Until(deadline), None) => deadline,
            (Wait::Forever, Some(next)) => next,
            // A real ring would sleep until it is woken; here whoever wakes it runs next.
            (Wait::Forever, None) => self.clock,
        };
        self.clock = self.clock.max(target);
        // Sometimes the reaper comes late and finds several.
        let reach = if until != Wait::Poll && self.rng.u8(..4) == 0 {
            Duration::from_micros(300)
        } else {
            Duration::ZERO
        };
        while let Some(&Reverse((at, _, index))) = self.due.peek() {
            if at > self.clock.after(reach) {
                break;
            }
            self.due.pop();
            self.clock = self.clock.max(at);
            let completion = self.complete(index);
            completions.push(completion);
        }
        Ok(())
    }

    fn now(&self) -> Timestamp {
        self.clock
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(NoWake)
    }
}
