//! What the two real rings share: the arena, the tables of storages, documents and sockets, the record of operations in flight, and
//! the ways in which an operation ends without the kernel's ring: at once, or on the helper pool.
//!
//! # Model
//! An operation is either *in flight* (an entry in [`Flight`], with the kernel or with the pool) or *ready* (its completion
//! is known and leaves with the next `wait`). A storage without descriptors does no I/O worth a thread or a system call, so
//! operations on it are carried out in `push` and are ready at once, unless it is remote: then the pool carries them out.
//!
//! Operations on sockets stand in the same record, but are not counted: they have places of their own (see `socket`).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use super::arena::{Access, Arena};
use super::blocking::{Job, LaneId, Pool, Subject, execute_on_storage};
use super::config::RingConfig;
use super::held::{Receiving, Sending};
use super::lent::Lent;
use super::poller::Attempt;
use super::signal::Signal;
use super::socket::{Place, Sockets, Waiting, Way};
use super::{Completion, DocumentId, FileId, Op, RingFailure, SocketId, Token, Wait};
use crate::storage::{Document, Storage};
use crate::units::{ByteRange, Timestamp};

/// Most storages, and most documents, of a ring.
pub(crate) const MAX_FILES: usize = 64;

/// Most operations in flight that a ring can be made for.
pub(crate) const MAX_CAPACITY: usize = 4096;

/// Who has an operation in flight, and what its completion means.
pub(crate) enum Task {
    /// The helper pool, buffer included.
    Pool,
    /// The kernel: moves bytes.
    Transfer(Lent),
    /// The kernel: succeeds or fails.
    Plain,
    /// The kernel: a request to cancel another.
    Cancel,
    /// The kernel: a discard, which the pool does where the kernel has no such command.
    Discard {
        /// Where.
        file: FileId,
        /// Which bytes.
        range: ByteRange,
    },
    /// The kernel: accepts from a listener.
    Accept(SocketId),
    /// The kernel: receives.
    Receive(SocketId, Receiving),
    /// The kernel: sends.
    Send(SocketId, Sending),
    /// Nobody: it is attempted again when the socket is ready.
    Unready(Place, Attempt),
}

impl Task {
    /// The place of a socket that it takes, if it works on one.
    pub(crate) fn place(&self) -> Option<Place> {
        match self {
            Self::Accept(socket) | Self::Receive(socket, _) => Some(Place { socket: *socket, way: Way::In }),
            Self::Send(socket, _) => Some(Place { socket: *socket, way: Way::Out }),
            Self::Unready(place, _) => Some(*place),
            Self::Pool | Self::Transfer(_) | Self::Plain | Self::Cancel | Self::Discard { .. } => None,
        }
    }
}

struct Slot {
    generation: u32,
    entry: Option<(Token, Task)>,
}

/// The operations in flight: a slab. Its keys carry a generation, so that a stale one is caught.
pub(crate) struct Flight {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Without those on sockets.
    count: usize,
}

impl Flight {
    fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), count: 0 }
    }

    /// Note an operation; the key names it until [`Flight::remove`].
    pub(crate) fn insert(&mut self, token: Token, task: Task) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, entry: None });
            u32::try_from(self.slots.len() - 1).expect("bounded by the ring's capacity")
        });
        let slot = &mut self.slots[index as usize];
        assert!(slot.entry.is_none(), "slot {index} is taken");
        self.count += usize::from(task.place().is_none());
        slot.entry = Some((token, task));
        u64::from(slot.generation) << 32 | u64::from(index)
    }

    /// The operation `key` has ended.
    ///
    /// # Panics
    /// If there is none: an operation that completes twice, or was never pushed.
    pub(crate) fn remove(&mut self, key: u64) -> (Token, Task) {
        let (generation, index) = split(key);
        let slot = &mut self.slots[index];
        assert_eq!(slot.generation, generation, "operation {key:#x} completed a second time");
        let entry = slot.entry.take().expect("an operation completes once");
        slot.generation = slot.generation.wrapping_add(1) & GENERATION_MASK;
        self.free.push(u32::try_from(index).expect("came from a u32"));
        self.count -= usize::from(entry.1.place().is_none());
        entry
    }

    /// The operation `key`, if it is in flight.
    pub(crate) fn get(&self, key: u64) -> Option<&(Token, Task)> {
        let (generation, index) = split(key);
        self.slots.get(index).filter(|slot| slot.generation == generation)?.entry.as_ref()
    }

    /// The operation `key`, if it is in flight, to change it.
    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut (Token, Task)> {
        let (generation, index) = split(key);
        self.slots.get_mut(index).filter(|slot| slot.generation == generation)?.entry.as_mut()
    }

    /// The operation under `token`. Scans: only for the rare.
    pub(crate) fn find(&self, token: Token) -> Option<(u64, &Task)> {
        self.entries().find(|(_, entry)| entry.0 == token).map(|(key, entry)| (key, &entry.1))
    }

    /// Keys of all operations that the kernel has.
    pub(crate) fn with_kernel(&self) -> Vec<u64> {
        self.entries().filter(|(_, entry)| !matches!(entry.1, Task::Pool)).map(|(key, _)| key).collect()
    }

    fn entries(&self) -> impl Iterator<Item = (u64, &(Token, Task))> {
        (0_u64..).zip(&self.slots).filter_map(|(index, slot)| {
            let key = u64::from(slot.generation) << 32 | index;
            slot.entry.as_ref().map(|entry| (key, entry))
        })
    }
}

/// Generation and index of a key.
#[expect(clippy::cast_possible_truncation, reason = "cuts the two halves apart")]
fn split(key: u64) -> (u32, usize) {
    ((key >> 32) as u32, key as u32 as usize)
}

/// Keeps generations away from the values with the top bits set, which rings use for themselves.
const GENERATION_MASK: u32 = 0x7fff_ffff;

struct Ready {
    completion: Completion,
    lent: Option<Lent>,
    /// Given back with the completion.
    place: Option<Place>,
}

/// A storage in a ring's table.
pub(crate) struct FileEntry {
    /// The storage.
    pub(crate) storage: Arc<dyn Storage>,
    /// Neither with descriptors nor remote: its operations are carried out in `push`.
    pub(crate) inline: bool,
}

/// See the module's header.
pub(crate) struct Base {
    pub(crate) name: &'static str,
    pub(crate) arena: Arena,
    /// `None`: the place is free.
    pub(crate) files: Vec<Option<FileEntry>>,
    documents: Vec<Arc<dyn Document>>,
    pub(crate) sockets: Sockets,
    pub(crate) flight: Flight,
    ready: Vec<Ready>,
    /// How many of them are on sockets.
    ready_on_sockets: usize,
    pub(crate) pool: Pool,
    pub(crate) signal: Arc<Signal>,
    started: Instant,
    capacity: usize,
    failure: Option<RingFailure>,
}

impl Base {
    /// # Panics
    /// If the configuration is out of its bounds.
    pub(crate) fn new(
        name: &'static str,
        arena: Arena,
        config: &RingConfig,
        waiting: Waiting,
        signal: Arc<Signal>,
    ) -> Self {
        let RingConfig { capacity, threads, sockets, .. } = *config;
        assert!((1..=MAX_CAPACITY).contains(&capacity), "a ring of capacity {capacity}");
        Self {
            name,
            arena,
            files: Vec::new(),
            documents: Vec::new(),
            sockets: Sockets::new(sockets, waiting),
            flight: Flight::new(),
            ready: Vec::with_capacity(capacity),
            ready_on_sockets: 0,
            pool: Pool::new(threads, capacity, Arc::clone(&signal)),
            signal,
            started: Instant::now(),
            capacity,
            failure: None,
        }
    }

    pub(crate) fn add_file(&mut self, storage: Arc<dyn Storage>) -> Result<FileId, RingFailure> {
        let place = self.files.iter().position(Option::is_none).unwrap_or(self.files.len());
        if place == MAX_FILES {
            return Err(RingFailure { ring: self.name, errno: Errno::ENFILE });
        }
        let inline = storage.descriptors().is_none() && !storage.is_remote();
        let entry = Some(FileEntry { storage, inline });
        if place == self.files.len() {
            self.files.push(entry);
        } else {
            self.files[place] = entry;
        }
        Ok(FileId(u16::try_from(place).expect("at most MAX_FILES")))
    }

    /// Take a storage out of the table.
    ///
    /// # Panics
    /// If it is not in it.
    pub(crate) fn remove_file(&mut self, file: FileId) -> FileEntry {
        self.files[usize::from(file.0)].take().expect("a storage is removed once")
    }

    fn entry(&self, file: FileId) -> &FileEntry {
        self.files[usize::from(file.0)].as_ref().expect("the storage was not removed")
    }

    pub(crate) fn add_document(&mut self, document: Arc<dyn Document>) -> Result<DocumentId, RingFailure> {
        if self.documents.len() == MAX_FILES {
            return Err(RingFailure { ring: self.name, errno: Errno::ENFILE });
        }
        let id = u16::try_from(self.documents.len()).expect("at most MAX_FILES");
        self.documents.push(document);
        Ok(DocumentId(id))
    }

    pub(crate) fn add_socket(&mut self, socket: OwnedFd) -> Result<SocketId, RingFailure> {
        self.sockets.add(socket).map_err(|errno| RingFailure { ring: self.name, errno })
    }

    pub(crate) fn release_files(&mut self) {
        assert_eq!(self.in_flight(), 0, "storages are in use");
        self.files.clear();
        self.documents.clear();
    }

    /// Never close the storages: the kernel may still write to them, and until it does not, nobody else shall.
    pub(crate) fn leak_files(&mut self) {
        std::mem::forget(std::mem::take(&mut self.files));
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.flight.count + self.ready.len() - self.ready_on_sockets
    }

    pub(crate) fn now(&self) -> Timestamp {
        Timestamp(self.started.elapsed())
    }

    /// Check that an operation may be pushed under `token`.
    ///
    /// # Panics
    /// If the ring is full or, in debug builds, if the token is in flight.
    pub(crate) fn admit(&self, token: Token) {
        assert!(self.in_flight() < self.capacity, "{} operations are in flight already", self.capacity);
        self.admit_on_socket(token);
    }

    /// Check that an operation on a socket may be pushed under `token`.
    ///
    /// # Panics
    /// In debug builds, if the token is in flight.
    pub(crate) fn admit_on_socket(&self, token: Token) {
        debug_assert!(!self.is_in_flight(token), "{token:?} is in flight already");
    }

    /// The storage `file`.
    ///
    /// # Panics
    /// If it was never added.
    pub(crate) fn storage(&self, file: FileId) -> &Arc<dyn Storage> {
        &self.entry(file).storage
    }

    /// Whether `file` is carried out in `push`.
    pub(crate) fn is_inline(&self, file: FileId) -> bool {
        self.entry(file).inline
    }

    /// Lend the buffer that `op` names, if it names one.
    pub(crate) fn lend(&mut self, op: &Op) -> Option<Lent> {
        let (buffer, access) = match op {
            Op::Read { buffer, .. } => (*buffer, Access::Fill),
            Op::Write { buffer, .. } | Op::Digest { buffer, .. } => (*buffer, Access::Look),
            _ => return None,
        };
        Some(Lent::new(&mut self.arena, buffer, access))
    }

    /// Carry `op` out now, on a storage without descriptors.
    pub(crate) fn push_inline(&mut self, token: Token, op: &Op, file: FileId) {
        let mut lent = self.lend(op);
        let storage = Arc::clone(&self.entry(file).storage);
        let result = execute_on_storage(op, storage.as_ref(), lent.as_mut());
        self.ready.push(Ready { completion: Completion { token, result }, lent, place: None });
    }

    /// Hand `op` to the helper pool at the next `wait`.
    ///
    /// # Panics
    /// If it names a storage or a document that was never added, or a digest's chunk is 0.
    pub(crate) fn push_to_pool(&mut self, token: Token, op: Op) {
        let (lane, subject) = match &op {
            Op::Digest { chunk, .. } => {
                assert!(*chunk > 0, "a checksum of chunks of 0 bytes");
                (LaneId::Memory, Subject::Memory)
            }
            Op::Publish { document, .. } => {
                let document = Arc::clone(&self.documents[usize::from(document.0)]);
                (LaneId::Documents, Subject::Document(document))
            }
            _ => {
                let file = file_of(&op).expect("all that is left works on a storage");
                (LaneId::File(file), Subject::Storage(Arc::clone(self.storage(file))))
            }
        };
        let lent = self.lend(&op);
        let key = self.flight.insert(token, Task::Pool);
        self.pool.stage(Job { key, op, lane, subject, lent });
    }

    /// Complete `token`, which has no buffer, with the next `wait`.
    pub(crate) fn push_ready(&mut self, completion: Completion) {
        self.ready.push(Ready { completion, lent: None, place: None });
    }

    /// Complete what has `place` with the next `wait`, and give the place back with that.
    pub(crate) fn push_ready_on(&mut self, place: Place, completion: Completion) {
        self.ready.push(Ready { completion, lent: None, place: Some(place) });
        self.ready_on_sockets += 1;
    }

    /// Take the job `key` back from the pool if it has not begun; it completes with `ECANCELED` then.
    pub(crate) fn withdraw(&mut self, key: u64) {
        let Some(job) = self.pool.withdraw(key) else { return };
        let (token, _) = self.flight.remove(key);
        let completion = Completion { token, result: Err(Errno::ECANCELED) };
        self.ready.push(Ready { completion, lent: job.lent, place: None });
    }

    /// Whether a completion under `token` was not returned yet.
    pub(crate) fn is_in_flight(&self, token: Token) -> bool {
        self.is_ready(token) || self.flight.find(token).is_some()
    }

    /// Whether the completion under `token` is known and waits to be returned.
    pub(crate) fn is_ready(&self, token: Token) -> bool {
        self.ready.iter().any(|ready| ready.completion.token == token)
    }

    /// Append what is ready and what the pool has done.
    ///
    /// # Errors
    /// When an operation panicked.
    pub(crate) fn collect(&mut self, completions: &mut Vec<Completion>) -> Result<(), RingFailure> {
        for Ready { completion, lent, place } in self.ready.drain(..) {
            if let Some(lent) = lent {
                lent.give_back(&mut self.arena);
            }
            if let Some(place) = place {
                self.sockets.end(place);
            }
            completions.push(completion);
        }
        self.ready_on_sockets = 0;
        while let Some(done) = self.pool.collect() {
            if let Some(lent) = done.lent {
                lent.give_back(&mut self.arena);
            }
            let (token, _) = self.flight.remove(done.key);
            let Some(result) = done.result else {
                tracing::error!(ring = self.name, "an operation panicked on a helper thread");
                return Err(self.fail(Errno::EOWNERDEAD));
            };
            completions.push(Completion { token, result });
        }
        Ok(())
    }

    /// The ring is broken from now on.
    pub(crate) fn fail(&mut self, errno: Errno) -> RingFailure {
        let failure = RingFailure { ring: self.name, errno };
        self.failure.get_or_insert(failure).clone()
    }

    /// # Errors
    /// When the ring broke earlier.
    pub(crate) fn check(&self) -> Result<(), RingFailure> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// When `until` ends, on the clock of the standard library; `None`: never.
    pub(crate) fn deadline(&self, until: Wait) -> Option<Instant> {
        match until {
            Wait::Poll => Some(self.started),
            // Beyond what the clock can say is never.
            Wait::Until(at) => self.started.checked_add(at.0),
            Wait::Forever => None,
        }
    }

    /// The ring goes: take everything back from the pool, waiting until `deadline` for what runs.
    pub(crate) fn shut_down(&mut self, deadline: Instant) {
        for job in self.pool.stop() {
            if let Some(lent) = job.lent {
                lent.give_back(&mut self.arena);
            }
        }
        self.pool.join(deadline);
        while let Some(done) = self.pool.collect() {
            if let Some(lent) = done.lent {
                lent.give_back(&mut self.arena);
            }
        }
        for Ready { lent, .. } in self.ready.drain(..) {
            if let Some(lent) = lent {
                lent.give_back(&mut self.arena);
            }
        }
    }
}

/// The storage that `op` works on, if any.
pub(crate) fn file_of(op: &Op) -> Option<FileId> {
    match op {
        Op::Read { file, .. }
        | Op::Write { file, .. }
        | Op::WriteZeroes { file, .. }
        | Op::Discard { file, .. }
        | Op::Allocate { file, .. }
        | Op::Flush { file }
        | Op::DropCache { file, .. }
        | Op::Extents { file, .. } => Some(*file),
        Op::Digest { .. }
        | Op::Publish { .. }
        | Op::Accept { .. }
        | Op::Receive { .. }
        | Op::Send { .. }
        | Op::Cancel { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_used_again_under_another_key() {
        let mut flight = Flight::new();
        let first = flight.insert(Token(1), Task::Plain);
        let other = flight.insert(Token(2), Task::Pool);
        assert_eq!(flight.find(Token(1)).map(|(key, _)| key), Some(first));
        assert_eq!(flight.with_kernel(), [first]);
        assert_eq!(flight.remove(first).0, Token(1));
        let second = flight.insert(Token(1), Task::Plain);
        assert_ne!(first, second);
        assert!(flight.get(first).is_none() && flight.get(second).is_some() && flight.get(other).is_some());
        assert_eq!((flight.count, flight.slots.len()), (2, 2));
    }

    #[test]
    fn what_is_on_sockets_is_not_counted() {
        let mut flight = Flight::new();
        let accept = flight.insert(Token(1), Task::Accept(SocketId(3)));
        let plain = flight.insert(Token(2), Task::Plain);
        assert_eq!(flight.count, 1);
        flight.remove(accept);
        assert_eq!(flight.count, 1);
        flight.remove(plain);
        assert_eq!(flight.count, 0);
    }

    #[test]
    #[should_panic(expected = "completed a second time")]
    fn a_second_completion_is_caught() {
        let mut flight = Flight::new();
        let key = flight.insert(Token(1), Task::Plain);
        flight.remove(key);
        flight.insert(Token(2), Task::Plain);
        flight.remove(key);
    }
}
