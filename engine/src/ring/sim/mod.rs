//! The simulated ring: deterministic, seeded, in virtual time, with faults.
//!
//! # Model
//! Each operation gets a random duration when it is pushed and takes effect at one instant, when it completes; [`Ring::wait`] moves the
//! virtual clock to the next completion or to the deadline. So operations complete in any order that a real device
//! could choose, and the same seed gives the same run. Reads and writes may be short at any sector, and fail, as the
//! [`FaultPlan`] says. A wake-up makes the current or the next `wait` return without moving the clock.
//!
//! # Stable storage
//! A disk of the [`World`] has a *view* (what a read gives) and a *medium* (what a power loss leaves). A write changes the view when it
//! completes; it reaches the medium with the first flush that was pushed after it had completed. [`World::crash`] keeps or loses
//! each sector that was not flushed, and each sector of a write in flight, at random. A flush that fails loses some of what it covered for good, and
//! says so only once, as Linux does.
//!
//! # Sockets
//! Connections run through the world as well (`network`). A test plays the other end by hand (`ends`), between the turns of whatever drives the ring: what
//! it does takes effect at once, and the ring finds out with the next `wait`.

mod ends;
mod faults;
mod network;
mod sockets;
mod world;

pub use ends::{SimAddress, SimPeer, SimSocket};
pub use faults::{Fault, FaultPlan, Rates, SocketRates};
pub use world::{Disk, DiskTraits, SharedWorld, World};

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fastrand::Rng;
use nix::errno::Errno;

use super::arena::{Access, Arena, BufferRange};
use super::base::{MAX_FILES, file_of};
use super::socket::{check_bytes, place_of};
use super::{
    Completion, DocumentId, FileId, IoPath, Op, Output, Ring, RingFailure, SocketId, Token, Wait, Wake,
    ZeroMethod,
};
use crate::units::{ByteRange, Timestamp};
use sockets::Sockets;

/// Smallest unit that a torn write keeps or loses whole, in bytes.
pub const SECTOR: usize = 512;

/// What a short direct read or write is a multiple of.
const SECTOR_BYTES: u32 = 512;
const _: () = assert!(SECTOR_BYTES as usize == SECTOR);

struct InFlight {
    token: Token,
    op: Op,
    fault: Option<Fault>,
    cancelled: bool,
    /// Somebody wants it cancelled: it does not start to wait any more.
    recalled: bool,
    /// Does not complete unless it is cancelled, or what it waits for has come about.
    stuck: bool,
    /// For a receive of a whole: bytes that have come.
    moved: usize,
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
    /// Disk numbers; `None`: the place is free.
    files: Vec<Option<usize>>,
    documents: Vec<usize>,
    sockets: Sockets,
    in_flight: Vec<Option<InFlight>>,
    /// How many of them there are, and how many are not on sockets.
    occupied: usize,
    count: usize,
    /// When which slot completes. What is stuck is not in it.
    due: BinaryHeap<Reverse<(Timestamp, u64, usize)>>,
    sequence: u64,
    pushed: u64,
    woken: Arc<WakeFlag>,
}

/// Set: the next `wait` returns at once.
#[derive(Default)]
struct WakeFlag(AtomicBool);

impl Wake for WakeFlag {
    fn wake(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
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
            sockets: Sockets::new(0),
            in_flight: Vec::new(),
            occupied: 0,
            count: 0,
            due: BinaryHeap::new(),
            sequence: 0,
            pushed: 0,
            woken: Arc::default(),
        }
    }

    /// Operations pushed so far.
    #[must_use]
    pub fn pushed(&self) -> u64 {
        self.pushed
    }

    /// Storages that were added and not removed.
    #[must_use]
    pub fn files(&self) -> usize {
        self.files.iter().flatten().count()
    }

    /// The power goes: writes in flight are torn, what was not flushed is kept or lost sector by sector. The ring is gone.
    pub fn crash(mut self) {
        let mut world = self.world.borrow_mut();
        let in_flight = std::mem::take(&mut self.in_flight);
        for slot in in_flight.into_iter().flatten() {
            match &slot.op {
                Op::Write { file, offset, buffer, .. } => {
                    let bytes = self.arena.slice(*buffer).to_vec();
                    world.disk(self.disk_of(*file)).write(*offset, &bytes);
                }
                Op::WriteZeroes { file, range, method } => {
                    world.disk(self.disk_of(*file)).write_zeroes(*range, *method);
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
        drop(world);
        let shared = Rc::clone(&self.world);
        self.reset_sockets(&mut shared.borrow_mut());
    }

    /// What is in flight in `index` takes effect. `None`: it waits for more.
    fn complete(&mut self, index: usize) -> Option<Completion> {
        let mut slot = self.in_flight[index].take().expect("in flight");
        if let Some(place) = place_of(&slot.op) {
            let result = match self.carry_out_on_socket(place, &mut slot) {
                Some(result) => result,
                None if slot.recalled => Err(Errno::ECANCELED),
                None => {
                    slot.stuck = true;
                    self.in_flight[index] = Some(slot);
                    return None;
                }
            };
            self.occupied -= 1;
            self.sockets.end(place);
            return Some(Completion { token: slot.token, result });
        }
        self.occupied -= 1;
        self.count -= 1;
        if let Some((buffer, access)) = lent(&slot.op) {
            self.arena.give_back(buffer, access);
        }
        let result = if slot.cancelled { Err(Errno::ECANCELED) } else { self.carry_out(&slot) };
        Some(Completion { token: slot.token, result })
    }

    /// What becomes of an operation with a fault that decides it; `None`: it is carried out, if perhaps in part.
    fn carry_out_fault(&mut self, slot: &InFlight, world: &mut World) -> Option<Result<Output, Errno>> {
        match (&slot.op, slot.fault) {
            (Op::Flush { file } | Op::DropCache { file, .. }, Some(fault)) => {
                world.disk(self.disk_of(*file)).fail_flush(slot.covers, &mut self.rng);
                Some(Err(fault.errno()))
            }
            (Op::Write { file, offset, buffer, .. }, Some(Fault::Corrupt)) => {
                let mut bytes = self.arena.slice(*buffer).to_vec();
                let at = self.rng.usize(..bytes.len());
                bytes[at] ^= 1 << self.rng.u8(..8);
                world.disk(self.disk_of(*file)).write(*offset, &bytes);
                Some(Ok(Output::Bytes(buffer.length)))
            }
            (Op::Read { .. } | Op::Write { .. }, Some(Fault::Short)) | (_, None) => None,
            // A write that fails may have changed any of its sectors.
            (Op::Write { file, offset, buffer, .. }, Some(fault)) => {
                let bytes = self.arena.slice(*buffer).to_vec();
                let keep = self.rng.usize(..=bytes.len() / SECTOR) * SECTOR;
                world.disk(self.disk_of(*file)).write(*offset, &bytes[..keep.min(bytes.len())]);
                Some(Err(fault.errno()))
            }
            (_, Some(Fault::Short | Fault::Corrupt)) => None,
            // The new version may have the name when it fails, as where the directory cannot be synced.
            (Op::Publish { document, contents: Some(contents) }, Some(fault)) => {
                if self.rng.bool() {
                    world.publish(self.documents[document.0 as usize], Some(contents.clone()));
                }
                Some(Err(fault.errno()))
            }
            (Op::Extents { .. }, Some(fault)) => {
                world.question_failed = true;
                Some(Err(fault.errno()))
            }
            (_, Some(fault)) => Some(Err(fault.errno())),
        }
    }

    fn carry_out(&mut self, slot: &InFlight) -> Result<Output, Errno> {
        let shared = Rc::clone(&self.world);
        let mut world = shared.borrow_mut();
        if let Some(result) = self.carry_out_fault(slot, &mut world) {
            return result;
        }
        match &slot.op {
            Op::Read { file, offset, buffer, path } => {
                let disk = world.disk(self.disk_of(*file));
                check_alignment(disk, *offset, *buffer, *path)?;
                let available = disk.readable(*offset, u64::from(buffer.length))?;
                let count = self.shorten(slot, available, *path);
                let part = BufferRange { start: buffer.start, length: count };
                let disk = world.disk(self.disk_of(*file));
                disk.read(*offset, self.arena.slice_mut(part));
                Ok(Output::Bytes(count))
            }
            Op::Write { file, offset, buffer, path } => {
                let disk = world.disk(self.disk_of(*file));
                check_alignment(disk, *offset, *buffer, *path)?;
                disk.writable(*offset, u64::from(buffer.length))?;
                let count = self.shorten(slot, u64::from(buffer.length), *path);
                let bytes = self.arena.slice(BufferRange { start: buffer.start, length: count });
                let disk = world.disk(self.disk_of(*file));
                disk.write(*offset, bytes);
                disk.count_written(u64::from(count));
                Ok(Output::Bytes(count))
            }
            Op::WriteZeroes { file, range, method } => {
                let disk = world.disk(self.disk_of(*file));
                check_not_empty(*range)?;
                disk.may_zero(*method)?;
                disk.write_zeroes(*range, *method);
                Ok(Output::Done)
            }
            Op::Discard { file, range } => {
                check_not_empty(*range)?;
                let disk = world.disk(self.disk_of(*file));
                disk.may_zero(ZeroMethod::Unmap)?;
                disk.write_zeroes(*range, ZeroMethod::Unmap);
                Ok(Output::Done)
            }
            Op::Allocate { file, ranges } => {
                let disk = world.disk(self.disk_of(*file));
                for range in ranges {
                    check_not_empty(*range)?;
                    disk.allocate(*range)?;
                }
                Ok(Output::Done)
            }
            Op::Flush { file } => {
                world.disk(self.disk_of(*file)).flush(slot.covers);
                Ok(Output::Done)
            }
            Op::DropCache { .. } => Ok(Output::Done),
            Op::Extents { file, range, query, limit } => {
                Ok(Output::Extents(world.disk(self.disk_of(*file)).extents(*range, *query, *limit)))
            }
            Op::Digest { buffer, chunk } => {
                let bytes = self.arena.slice(*buffer);
                Ok(Output::Digests(bytes.chunks(*chunk as usize).map(xxhash_rust::xxh3::xxh3_128).collect()))
            }
            Op::Publish { document, contents } => {
                world.publish(self.documents[document.0 as usize], contents.clone());
                let unsynced = contents.is_none() && slot.fault == Some(Fault::Short);
                Ok(if unsynced { Output::Unsynced(Errno::EIO) } else { Output::Done })
            }
            Op::Cancel { .. } => Ok(Output::Done),
            Op::Accept { .. } | Op::Receive { .. } | Op::Send { .. } => unreachable!("it is on a socket"),
        }
    }

    pub(crate) fn disk_of(&self, file: FileId) -> usize {
        self.files[file.0 as usize].expect("the disk was not removed")
    }

    /// Whoever drives the ring stands still for `time`. What completes meanwhile is found afterwards.
    pub fn stand_still(&mut self, time: Duration) {
        self.clock = self.clock.after(time);
    }

    /// The operation in `index` completes after a random time.
    fn schedule(&mut self, index: usize) {
        self.sequence += 1;
        let slow = if self.rng.u8(..20) == 0 { 50 } else { 1 };
        let op = &self.in_flight[index].as_ref().expect("in flight").op;
        let slow = slow * file_of(op).map_or(1, |file| self.slowness(file));
        let duration = Duration::from_micros(self.rng.u64(20..400) * slow);
        self.due.push(Reverse((self.clock.after(duration), self.sequence, index)));
    }

    /// Cancel what is in flight under `target`: for sure if it is stuck, else it may be too late. `false`: there is nothing.
    fn cancel(&mut self, target: Token) -> bool {
        let found = self.in_flight.iter_mut().enumerate().find_map(|(index, slot)| {
            slot.as_mut().filter(|slot| slot.token == target).map(|slot| (index, slot))
        });
        let Some((index, slot)) = found else { return false };
        slot.cancelled |= slot.stuck || self.rng.bool();
        slot.recalled = true;
        if std::mem::take(&mut slot.stuck) {
            self.schedule(index);
        }
        true
    }

    fn slowness(&self, file: FileId) -> u64 {
        self.world.borrow_mut().disk(self.disk_of(file)).slowness()
    }

    /// What was stuck on disks that have come free, and on sockets that have become ready, goes on.
    fn free_stuck(&mut self) {
        for index in 0..self.in_flight.len() {
            let Some(slot) = self.in_flight[index].as_ref().filter(|slot| slot.stuck) else { continue };
            if !self.is_stuck(&slot.op) {
                self.in_flight[index].as_mut().expect("just seen").stuck = false;
                self.schedule(index);
            }
        }
    }

    fn is_stuck(&self, op: &Op) -> bool {
        if let Some(place) = place_of(op) {
            return self.sockets.is_stuck(place, op, &mut self.world.borrow_mut());
        }
        if file_of(op).is_some_and(|file| self.world.borrow_mut().disk(self.disk_of(file)).is_hung()) {
            return true;
        }
        let (Op::Read { file, path, .. } | Op::Write { file, path, .. }) = op else { return false };
        let mut world = self.world.borrow_mut();
        let disk = world.disk(self.disk_of(*file));
        // What is refused is refused at once.
        disk.is_stuck() && (*path == IoPath::Buffered || disk.direct_alignment().is_some())
    }

    /// The number of the next entry of a table of `entries`.
    fn free_entry(&self, entries: usize) -> Result<u16, RingFailure> {
        let full = RingFailure { ring: self.name(), errno: Errno::ENFILE };
        if entries < MAX_FILES { u16::try_from(entries).map_err(|_| full) } else { Err(full) }
    }

    /// How much of `available` bytes a read or write does.
    fn shorten(&mut self, slot: &InFlight, available: u64, path: IoPath) -> u32 {
        let available = u32::try_from(available).expect("no more than the buffer");
        let grain = if path == IoPath::Direct { SECTOR_BYTES } else { 1 };
        if slot.fault != Some(Fault::Short) || available <= grain {
            return available;
        }
        (self.rng.u32(1..available) / grain * grain).max(grain)
    }
}

fn check_alignment(disk: &Disk, offset: u64, buffer: BufferRange, path: IoPath) -> Result<(), Errno> {
    if path == IoPath::Buffered {
        return Ok(());
    }
    let alignment = u64::from(disk.direct_alignment().ok_or(Errno::EINVAL)?);
    let aligned = offset.is_multiple_of(alignment) && u64::from(buffer.length).is_multiple_of(alignment);
    if aligned { Ok(()) } else { Err(Errno::EINVAL) }
}

fn check_not_empty(range: ByteRange) -> Result<(), Errno> {
    if range.is_empty() { Err(Errno::EINVAL) } else { Ok(()) }
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
    type Socket = SimSocket;

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
        let place = self.files.iter().position(Option::is_none).unwrap_or(self.files.len());
        let id = self.free_entry(place)?;
        if place == self.files.len() {
            self.files.push(None);
        }
        self.files[place] = Some(file);
        Ok(FileId(id))
    }

    fn add_document(&mut self, document: usize) -> Result<DocumentId, RingFailure> {
        let id = self.free_entry(self.documents.len())?;
        self.documents.push(document);
        Ok(DocumentId(id))
    }

    fn remove_file(&mut self, file: FileId) -> usize {
        let named = self.in_flight.iter().flatten().any(|slot| file_of(&slot.op) == Some(file));
        assert!(!named, "{file:?} is in use");
        self.files[file.0 as usize].take().expect("a disk is removed once")
    }

    fn add_socket(&mut self, socket: SimSocket) -> Result<SocketId, RingFailure> {
        self.insert_socket(socket)
    }

    fn remove_socket(&mut self, socket: SocketId) {
        self.sockets.remove(socket);
    }

    fn shutdown_socket(&mut self, socket: SocketId) {
        self.shut_down(socket);
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
        self.count
    }

    fn push(&mut self, token: Token, op: Op) {
        let place = place_of(&op);
        assert!(place.is_some() || self.in_flight() < self.capacity, "the ring is full");
        let duplicate = self.in_flight.iter().flatten().any(|slot| slot.token == token);
        assert!(!duplicate, "{token:?} is in flight");
        if let Some((buffer, access)) = lent(&op) {
            let _ = self.arena.lend(buffer, access);
        }
        if let Some(place) = place {
            check_bytes(&op);
            self.sockets.begin(place);
        }
        let mut covers = 0;
        if let Op::Flush { file } | Op::DropCache { file, .. } = &op {
            covers = self.world.borrow_mut().disk(self.disk_of(*file)).writes_so_far();
        }
        let mut fault = self.faults.decide(self.pushed, &op, &mut self.rng);
        if let Op::Cancel { target } = op
            && !self.cancel(target)
        {
            fault = Some(Fault::Errno(Errno::ENOENT));
        }
        self.pushed += 1;
        // A connection breaks, or a call is interrupted, at any time.
        let fails = place.is_some() && matches!(fault, Some(Fault::Errno(_)));
        let stuck = !fails && self.is_stuck(&op);
        let index = self.in_flight.iter().position(Option::is_none).unwrap_or_else(|| {
            self.in_flight.push(None);
            self.in_flight.len() - 1
        });
        let slot = InFlight { token, op, fault, cancelled: false, recalled: false, stuck, moved: 0, covers };
        self.in_flight[index] = Some(slot);
        self.occupied += 1;
        self.count += usize::from(place.is_none());
        if !stuck {
            self.schedule(index);
        }
    }

    fn wait(&mut self, until: Wait, completions: &mut Vec<Completion>) -> Result<(), RingFailure> {
        if self.occupied > self.due.len() {
            self.free_stuck();
        }
        let next = self.due.peek().map(|Reverse((at, ..))| *at);
        let woken = self.woken.0.swap(false, Ordering::Relaxed);
        let target = match (until, next) {
            (Wait::Poll, _) => self.clock,
            _ if woken => self.clock,
            (Wait::Until(deadline), Some(next)) => deadline.min(next),
            (Wait::Until(deadline), None) => deadline,
            (Wait::Forever, Some(next)) => next,
            // A real ring would sleep until it is woken; here whoever wakes it runs next.
            (Wait::Forever, None) => self.clock,
        };
        self.clock = self.clock.max(target);
        // Sometimes the reaper comes late and finds several.
        let reach = if until != Wait::Poll && !woken && self.rng.u8(..4) == 0 {
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
            completions.extend(self.complete(index));
        }
        Ok(())
    }

    fn now(&self) -> Timestamp {
        self.clock
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.woken) as Arc<dyn Wake>
    }
}
