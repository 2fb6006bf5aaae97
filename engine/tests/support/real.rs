//! Fixtures of the two rings that do real I/O.

use std::fs::File;
use std::io::Write;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use engine::ring::Ring;
use engine::ring::select::{RingConfig, SetupError};
use engine::ring::threads::ThreadsRing;
use engine::ring::uring::UringRing;
use engine::storage::{Document, Storage};
use parking_lot::{Condvar, Mutex};
use tempfile::TempDir;

use super::network::{Dial, Family, Peer, real_listener, real_pair};
use super::plain::PlainFile;
use super::storage::{Odd, PlainDocument, fifo};
use super::{Blocked, Fault, Fixture, Inspect};

/// Few, so that a check can occupy all of them.
const THREADS: usize = 3;

/// The configuration that the suite uses.
pub(crate) fn config(arena_bytes: usize, capacity: usize, sockets: usize) -> RingConfig {
    RingConfig { arena_bytes, capacity, threads: THREADS, sockets }
}

/// A ring over real storages.
pub(crate) trait RealRing:
    Ring<File = Arc<dyn Storage>, Document = Arc<dyn Document>, Socket = OwnedFd> + Sized
{
    fn open(config: &RingConfig) -> Result<Self, SetupError>;
    fn blocked(directory: &Path) -> Blocked<Arc<dyn Storage>>;
}

impl RealRing for UringRing {
    fn open(config: &RingConfig) -> Result<Self, SetupError> {
        Self::new(config)
    }

    fn blocked(directory: &Path) -> Blocked<Arc<dyn Storage>> {
        let file = fifo(&directory.join("fifo"));
        let writer = file.try_clone().unwrap();
        Blocked {
            file: Arc::new(Odd::Fifo(file)),
            beyond_recall: 0,
            release: Box::new(move || (&writer).write_all(&[1; 4096 * 8]).unwrap()),
        }
    }
}

impl RealRing for ThreadsRing {
    fn open(config: &RingConfig) -> Result<Self, SetupError> {
        Self::new(config)
    }

    fn blocked(_: &Path) -> Blocked<Arc<dyn Storage>> {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        let release = {
            let gate = Arc::clone(&gate);
            move || {
                *gate.0.lock() = true;
                gate.1.notify_all();
            }
        };
        Blocked {
            file: Arc::new(Odd::Gate(gate, File::open("/dev/null").unwrap())),
            beyond_recall: THREADS,
            release: Box::new(release),
        }
    }
}

/// Files in a directory of its own.
pub(crate) struct Real<R> {
    directory: TempDir,
    count: AtomicU32,
    ring: PhantomData<R>,
}

impl<R> Default for Real<R> {
    fn default() -> Self {
        Self { directory: TempDir::new().unwrap(), count: AtomicU32::new(0), ring: PhantomData }
    }
}

impl<R> Real<R> {
    fn path(&self) -> PathBuf {
        self.directory.path().join(self.count.fetch_add(1, Ordering::Relaxed).to_string())
    }
}

impl<R: RealRing> Fixture for Real<R> {
    type R = R;
    type Disk = Arc<PlainFile>;
    const MORE_THAN_FITS: usize = 32 << 20;

    fn unavailable() -> Option<String> {
        R::open(&config(4096, 1, 0)).err().filter(SetupError::is_refusal).map(|refusal| refusal.to_string())
    }

    fn ring_with_sockets(&self, arena_bytes: usize, capacity: usize, sockets: usize) -> R {
        R::open(&config(arena_bytes, capacity, sockets)).unwrap()
    }

    fn listener(&self, family: Family) -> (OwnedFd, Dial) {
        real_listener(family, self.path())
    }

    fn pair(&self, family: Family) -> (OwnedFd, Box<dyn Peer>) {
        real_pair(family)
    }

    fn disk(&self, length: u64) -> Self::Disk {
        let path = self.path();
        File::create(&path).unwrap().set_len(length).unwrap();
        Arc::new(PlainFile::open(&path, true).unwrap())
    }

    fn file(&self, disk: &Self::Disk) -> R::File {
        Arc::clone(disk) as Arc<dyn Storage>
    }

    fn has_direct(&self) -> bool {
        self.disk(0).direct.is_some()
    }

    fn null(&self) -> Option<R::File> {
        Some(Arc::new(Odd::Null))
    }

    fn faulty(&self, fault: Fault) -> Option<R::File> {
        let file = match fault {
            Fault::WriteToReadOnly => {
                let path = self.path();
                std::fs::write(&path, [0; 8192]).unwrap();
                PlainFile::open(&path, false)
            }
            // Nothing is mapped at address 0, so reading it there is an I/O error.
            Fault::UnreadableData => PlainFile::open(Path::new("/proc/self/mem"), false),
            Fault::Full => PlainFile::open(Path::new("/dev/full"), true),
            Fault::NoZeroing => {
                // tmpfs punches holes but has no ZERO_RANGE.
                let path = PathBuf::from(format!("/dev/shm/ring-conformance-{}", std::process::id()));
                std::fs::write(&path, [1; 8192]).ok()?;
                let file = PlainFile::open(&path, true);
                std::fs::remove_file(&path).unwrap();
                file
            }
            Fault::Panics => return Some(Arc::new(Odd::Panics(File::open("/dev/null").unwrap()))),
        };
        file.ok().map(|file| Arc::new(file) as Arc<dyn Storage>)
    }

    fn document(&self) -> (R::Document, Inspect) {
        let path = self.path();
        let document = Arc::new(PlainDocument(path.clone()));
        (document, Box::new(move || std::fs::read(&path).ok()))
    }

    fn blocked(&self) -> Option<Blocked<R::File>> {
        Some(R::blocked(self.directory.path()))
    }
}
