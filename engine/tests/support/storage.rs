//! The other storages and documents of the suite: those that differ from a harmless file in one point.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use engine::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
use engine::storage::{Descriptors, Document, Limits, Published, Storage};
use engine::units::{ByteRange, Length};
use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};

use super::TestDisk;
use super::plain::PlainFile;

impl TestDisk for Arc<PlainFile> {
    fn fill(&self, offset: u64, bytes: &[u8]) {
        self.buffered.write_all_at(bytes, offset).unwrap();
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn allocated(&self) -> Option<u64> {
        self.buffered.sync_all().unwrap();
        Some(self.buffered.metadata().unwrap().blocks() * 512)
    }
}

/// Storages that differ from a harmless one in one point.
pub(crate) enum Odd {
    /// Without descriptors: takes and gives nothing.
    Null,
    /// Reads wait until released. Its descriptor is never used, but says that there is one.
    Gate(Arc<(Mutex<bool>, Condvar)>, File),
    /// Reads wait as with a gate, and are counted. It is remote: there is no descriptor.
    Remote(Arc<(Mutex<bool>, Condvar)>, AtomicU32),
    /// A FIFO: the kernel's own reads wait until something is written to it.
    Fifo(File),
    /// Asking for extents panics.
    Panics(File),
    /// Its flush, which counts how often it was asked for, fails; one by the kernel, on its descriptor, would succeed.
    FlushesItself(File, AtomicU32),
}

impl Storage for Odd {
    fn name(&self) -> &'static str {
        "odd"
    }

    fn limits(&self) -> Limits {
        Limits { length: Length(1 << 40), direct_alignment: None }
    }

    fn descriptors(&self) -> Option<Descriptors<'_>> {
        match self {
            Self::Null | Self::Remote(..) => None,
            Self::Gate(_, file) | Self::Fifo(file) | Self::Panics(file) | Self::FlushesItself(file, _) => {
                Some(Descriptors { direct: None, buffered: file.as_fd(), block_device: false })
            }
        }
    }

    fn is_remote(&self) -> bool {
        matches!(self, Self::Remote(..))
    }

    fn read_at(&self, path: IoPath, _: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        if let Self::Remote(_, begun) = self {
            begun.fetch_add(1, Ordering::SeqCst);
        }
        match self {
            Self::Gate(..) | Self::Fifo(_) if path == IoPath::Direct => return Err(Errno::EINVAL),
            Self::Gate(gate, _) | Self::Remote(gate, _) => {
                let mut open = gate.0.lock();
                while !*open {
                    gate.1.wait(&mut open);
                }
            }
            Self::Fifo(file) => return nix::unistd::read(file, buffer),
            Self::Null | Self::Panics(_) | Self::FlushesItself(..) => {}
        }
        Ok(buffer.len())
    }

    fn write_at(&self, _: IoPath, _: u64, buffer: &[u8]) -> Result<usize, Errno> {
        Ok(buffer.len())
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroMethod) -> Result<(), Errno> {
        Ok(())
    }

    fn discard(&self, _: ByteRange) -> Result<(), Errno> {
        Ok(())
    }

    fn allocate(&self, _: &[ByteRange]) -> Result<(), Errno> {
        Ok(())
    }

    fn flush(&self) -> Result<(), Errno> {
        let Self::FlushesItself(_, flushes) = self else { return Ok(()) };
        flushes.fetch_add(1, Ordering::SeqCst);
        Err(Errno::EIO)
    }

    fn flush_is_plain(&self) -> bool {
        !matches!(self, Self::FlushesItself(..))
    }

    fn drop_cache(&self, _: ByteRange) -> Result<(), Errno> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, _: ExtentQuery, _: usize) -> Result<Vec<Extent>, Errno> {
        assert!(!matches!(self, Self::Panics(_)), "planted: this storage panics");
        Ok(vec![Extent { range, present: true }])
    }
}

/// A document at a path, replaced by renaming.
pub(crate) struct PlainDocument(pub(crate) PathBuf);

impl Document for PlainDocument {
    fn publish(&self, contents: Option<&[u8]>) -> Result<Published, Errno> {
        let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let fresh = self.0.with_extension("new");
        match contents {
            Some(contents) => std::fs::write(&fresh, contents)
                .and_then(|()| File::open(&fresh)?.sync_all())
                .and_then(|()| std::fs::rename(&fresh, &self.0)),
            None => match std::fs::remove_file(&self.0) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                result => result,
            },
        }
        .map(|()| Published::Durably)
        .map_err(errno)
    }
}

/// Makes the FIFO at `path`, and opens it so that it never ends.
pub(crate) fn fifo(path: &Path) -> File {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}
