//! A guest thread: requests of every kind, alignment and length on its part of the disk, one after the other.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use engine::live::LiveDisk;
use engine::units::ByteRange;
use nix::fcntl::{FallocateFlags, fallocate};
use parking_lot::Mutex;

use crate::shadow::{Content, Shadow, data};

const BLOCK: u64 = 4096;
/// Longer than any request takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// How guests write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Through the engine.
    Carried,
    /// By themselves, under permits.
    Own,
}

/// A change of the disk, from before it was asked for until after it was acknowledged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) range: ByteRange,
    pub(crate) content: Content,
    pub(crate) began: u64,
    pub(crate) ended: u64,
}

/// What all guests share.
pub(crate) struct Shared {
    pub(crate) stop: AtomicBool,
    pub(crate) clock: AtomicU64,
    /// Of each guest, what it has changed since the log was taken last.
    pub(crate) logs: Vec<Mutex<Vec<Entry>>>,
    /// Of each guest, when the request began that it has logged last.
    logged: Vec<AtomicU64>,
}

impl Shared {
    pub(crate) fn new(guests: u64) -> Self {
        Self {
            stop: AtomicBool::new(false),
            clock: AtomicU64::new(1),
            logs: (0..guests).map(|_| Mutex::default()).collect(),
            logged: (0..guests).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Until every guest has ended a request that began after `time`.
    pub(crate) fn wait_for_logs_after(&self, time: u64) {
        let since = Instant::now();
        while self.logged.iter().any(|logged| logged.load(Ordering::SeqCst) <= time) {
            assert!(since.elapsed() < PATIENCE, "a guest hangs");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// See the module's header.
pub(crate) struct Guest {
    disk: LiveDisk,
    /// To write by itself.
    file: Option<File>,
    number: u64,
    shadow: Shadow,
    random: fastrand::Rng,
}

impl Guest {
    pub(crate) fn new(
        disk: LiveDisk,
        file: Option<File>,
        number: u64,
        part: ByteRange,
        initial: &[u8],
    ) -> Self {
        let random = fastrand::Rng::with_seed(number);
        Self { disk, file, number, shadow: Shadow::new(part, initial), random }
    }

    /// Until it is to stop; what its part holds then, and how many requests it has made.
    pub(crate) fn run(mut self, shared: &Shared) -> (Shadow, u64) {
        let mut requests = 0;
        while !shared.stop.load(Ordering::Relaxed) {
            let began = shared.clock.fetch_add(1, Ordering::SeqCst);
            match self.random.u8(..20) {
                0..12 => self.write(shared, began),
                12..14 => self.zero(shared, began),
                14..16 => self.discard(shared, began),
                16..19 => self.read(),
                _ => self.flush(),
            }
            shared.logged[usize::try_from(self.number).unwrap()].store(began, Ordering::SeqCst);
            requests += 1;
        }
        (self.shadow, requests)
    }

    /// Of any alignment, or of whole blocks. A request is no longer than what is carried out as a whole.
    fn range(&mut self, whole_blocks: bool) -> ByteRange {
        let part = self.shadow.part;
        let most = [600, 9000, 70_000][self.random.usize(..3)];
        let range = ByteRange::new(part.offset + self.random.u64(..part.length), self.random.u64(1..most));
        if whole_blocks || self.random.bool() {
            let start = range.offset / BLOCK * BLOCK;
            return ByteRange::between(start, range.end().next_multiple_of(BLOCK).min(part.end()));
        }
        ByteRange::between(range.offset, range.end().min(part.end()))
    }

    fn log(&mut self, shared: &Shared, range: ByteRange, content: Content, began: u64) {
        self.shadow.apply(range, content);
        let ended = shared.clock.fetch_add(1, Ordering::SeqCst);
        let entry = Entry { range, content, began, ended };
        shared.logs[usize::try_from(self.number).unwrap()].lock().push(entry);
    }

    fn write(&mut self, shared: &Shared, began: u64) {
        let range = self.range(false);
        let seed = began << 8 | self.number;
        let bytes = data(seed, range.length);
        match &self.file {
            Some(file) => {
                let _permit = self.disk.begin_write(range).unwrap();
                file.write_all_at(&bytes, range.offset).unwrap();
            }
            None => self.disk.write(range.offset, bytes).unwrap(),
        }
        self.log(shared, range, Content::Data(seed), began);
    }

    /// Whole blocks: others would be more than one operation, and t0 might be between them.
    fn zero(&mut self, shared: &Shared, began: u64) {
        let range = self.range(true);
        match &self.file {
            Some(file) => {
                let _permit = self.disk.begin_write(range).unwrap();
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (start, length) = (range.offset.cast_signed(), range.length.cast_signed());
                fallocate(file, flags, start, length).unwrap();
            }
            None => self.disk.write_zeroes(range, self.random.bool()).unwrap(),
        }
        self.log(shared, range, Content::Zeros, began);
    }

    /// Through the engine alone.
    fn discard(&mut self, shared: &Shared, began: u64) {
        if self.file.is_some() {
            return self.write(shared, began);
        }
        let range = self.range(false);
        self.disk.discard(range).unwrap();
        self.log(shared, range, Content::Undefined, began);
    }

    fn read(&mut self) {
        let range = self.range(false);
        let bytes = self.disk.read(range.offset, usize::try_from(range.length).unwrap()).unwrap();
        assert_eq!(self.shadow.differences(range, &bytes), 0, "{range} reads as something else");
    }

    fn flush(&mut self) {
        match &self.file {
            Some(file) => file.sync_data().unwrap(),
            None => self.disk.flush().unwrap(),
        }
    }
}
