//! A plain storage for tests, written against the trait alone, so that the suite judges rings and not the product's storages.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use engine::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
use engine::storage::{Descriptors, Limits, Storage};
use engine::units::{ByteRange, Length};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{Whence, fdatasync, lseek};

nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);

/// A file, or anything that can be opened by path.
pub(crate) struct PlainFile {
    pub(crate) path: PathBuf,
    pub(crate) direct: Option<File>,
    pub(crate) buffered: File,
    block_device: bool,
    /// How often [`Storage::discard`] was called.
    pub(crate) discards: AtomicU32,
}

impl PlainFile {
    pub(crate) fn open(path: &Path, writable: bool) -> std::io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(writable);
        let buffered = options.open(path)?;
        let direct = options.custom_flags(libc::O_DIRECT).open(path).ok();
        let block_device = buffered.metadata()?.file_type().is_block_device();
        Ok(Self { path: path.to_owned(), direct, buffered, block_device, discards: AtomicU32::new(0) })
    }

    fn descriptor(&self, path: IoPath) -> Result<&File, Errno> {
        match path {
            IoPath::Direct => self.direct.as_ref().ok_or(Errno::EINVAL),
            IoPath::Buffered => Ok(&self.buffered),
        }
    }

    fn fallocate(&self, mode: FallocateFlags, range: ByteRange) -> Result<(), Errno> {
        fallocate(
            &self.buffered,
            mode | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            signed(range.offset),
            signed(range.length),
        )
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).expect("an offset")
}

fn unsigned(offset: i64) -> u64 {
    u64::try_from(offset).expect("an offset")
}

impl Storage for PlainFile {
    fn name(&self) -> &str {
        self.path.to_str().expect("tests use plain paths")
    }

    fn limits(&self) -> Limits {
        let length = Length(self.buffered.metadata().map_or(0, |metadata| metadata.len()));
        Limits { length, direct_alignment: self.direct.as_ref().map(|_| 4096) }
    }

    fn descriptors(&self) -> Option<Descriptors<'_>> {
        Some(Descriptors {
            direct: self.direct.as_ref().map(AsFd::as_fd),
            buffered: self.buffered.as_fd(),
            block_device: self.block_device,
        })
    }

    fn read_at(&self, path: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        pread(self.descriptor(path)?, buffer, signed(offset))
    }

    fn write_at(&self, path: IoPath, offset: u64, buffer: &[u8]) -> Result<usize, Errno> {
        pwrite(self.descriptor(path)?, buffer, signed(offset))
    }

    fn write_zeroes(&self, range: ByteRange, method: ZeroMethod) -> Result<(), Errno> {
        match method {
            ZeroMethod::Unmap => self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, range),
            ZeroMethod::Keep => self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, range),
        }
    }

    fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        self.discards.fetch_add(1, Ordering::Relaxed);
        if self.block_device {
            let bounds = [range.offset, range.length];
            // SAFETY: the descriptor is open, and BLKDISCARD reads two words, which live through the call.
            return unsafe { blkdiscard(self.buffered.as_raw_fd(), &raw const bounds) }.map(drop);
        }
        self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, range)
    }

    fn allocate(&self, ranges: &[ByteRange]) -> Result<(), Errno> {
        ranges.iter().try_for_each(|range| self.fallocate(FallocateFlags::empty(), *range))
    }

    fn flush(&self) -> Result<(), Errno> {
        fdatasync(&self.buffered)
    }

    fn drop_cache(&self, range: ByteRange) -> Result<(), Errno> {
        fdatasync(&self.buffered)?;
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(&self.buffered, signed(range.offset), signed(range.length), advice)
    }

    fn extents(&self, range: ByteRange, query: ExtentQuery, limit: usize) -> Result<Vec<Extent>, Errno> {
        if query == ExtentQuery::TopLayer {
            return Ok(vec![Extent { range, present: true }]);
        }
        let mut extents = Vec::new();
        let mut at = range.offset;
        while at < range.end() && extents.len() < limit {
            let data = match lseek(&self.buffered, signed(at), Whence::SeekData) {
                Ok(data) => unsigned(data).min(range.end()),
                Err(Errno::ENXIO) => range.end(),
                Err(errno) => return Err(errno),
            };
            let (present, end) = if data > at {
                (false, data)
            } else {
                let hole = lseek(&self.buffered, signed(at), Whence::SeekHole)?;
                (true, unsigned(hole).min(range.end()))
            };
            extents.push(Extent { range: ByteRange::between(at, end), present });
            at = end;
        }
        Ok(extents)
    }
}
