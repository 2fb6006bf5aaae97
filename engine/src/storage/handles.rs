//! The two descriptors of a disk and what files and block devices do alike on them.
//!
//! One descriptor has `O_DIRECT`, the other does not: a tail shorter than a sector, and everything where direct I/O is
//! refused, goes through the page cache. What the kernel claims about alignment is not trusted beyond reason: anything
//! but a power of two of at most 4096 switches direct I/O off, and so does a file system that takes `O_DIRECT` at open
//! and then refuses the first aligned read.
//!
//! A flush through one descriptor covers what was written through both, since the kernel keeps a file's pages, its writes in flight and
//! their errors by inode. FUSE hands each flush to a program that may keep them by descriptor (sshfs does), so there both are flushed.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::statfs::{FsType, fstatfs};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::fdatasync;

use super::sharing::Announced;
use super::sys::{self, DirectSupport};
use super::{Descriptors, Limits};
use crate::ring::{IoPath, ZeroMethod};
use crate::units::{ByteRange, Length};

/// Largest alignment that the engine's buffers and clusters can keep; also what is assumed where nothing is known.
const MAX_ALIGNMENT: u32 = 4096;

/// What kind of thing is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HandleKind {
    RegularFile,
    BlockDevice,
}

/// The descriptors of a disk. See the module's header.
#[derive(Debug)]
pub(super) struct Handles {
    buffered: File,
    direct: Option<File>,
    kind: HandleKind,
    limits: Limits,
    announced: Option<Announced>,
    /// Each descriptor answers for what was written through it alone.
    flushes_apart: bool,
}

impl Handles {
    /// Takes over both descriptors of one disk of `length` bytes, and drops the direct one where it is of no use.
    pub(super) fn new(kind: HandleKind, buffered: File, direct: Option<File>, length: Length) -> Self {
        let alignment = direct.as_ref().and_then(|direct| direct_alignment(kind, direct, length));
        let direct = if alignment.is_some() { direct } else { None };
        let flushes_apart = direct.as_ref().is_some_and(is_fuse);
        Self {
            buffered,
            direct,
            kind,
            limits: Limits { length, direct_alignment: alignment },
            announced: None,
            flushes_apart,
        }
    }

    /// Others know that it is in use until this is gone.
    pub(super) fn keep(&mut self, announced: Option<Announced>) {
        self.announced = announced;
    }

    /// Whether [`Self::flush`] is `fdatasync` on the buffered descriptor and nothing else.
    pub(super) fn flush_is_plain(&self) -> bool {
        !self.flushes_apart
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    pub(super) fn buffered(&self) -> &File {
        &self.buffered
    }

    pub(super) fn descriptors(&self) -> Descriptors<'_> {
        Descriptors {
            direct: self.direct.as_ref().map(AsFd::as_fd),
            buffered: self.buffered.as_fd(),
            block_device: self.kind == HandleKind::BlockDevice,
        }
    }

    fn on(&self, path: IoPath) -> Result<&File, Errno> {
        match path {
            IoPath::Buffered => Ok(&self.buffered),
            // Asked for direct I/O on a disk without: as the kernel answers a misaligned request.
            IoPath::Direct => self.direct.as_ref().ok_or(Errno::EINVAL),
        }
    }

    pub(super) fn read_at(&self, path: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        pread(self.on(path)?, buffer, signed(offset)?)
    }

    pub(super) fn write_at(&self, path: IoPath, offset: u64, buffer: &[u8]) -> Result<usize, Errno> {
        pwrite(self.on(path)?, buffer, signed(offset)?)
    }

    /// `fallocate` does the same on files and on block devices: a hole or an unmapped range, or zeros that keep their space.
    pub(super) fn write_zeroes(&self, range: ByteRange, method: ZeroMethod) -> Result<(), Errno> {
        let mode = match method {
            ZeroMethod::Unmap => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            ZeroMethod::Keep => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        self.fallocate(mode | FallocateFlags::FALLOC_FL_KEEP_SIZE, range)
    }

    pub(super) fn fallocate(&self, mode: FallocateFlags, range: ByteRange) -> Result<(), Errno> {
        if range.is_empty() {
            return Ok(());
        }
        fallocate(&self.buffered, mode, signed(range.offset)?, signed(range.length)?)
    }

    /// On the buffered descriptor: the one on which the kernel remembers failed write-backs. `fdatasync` also brings the
    /// length and the allocation of a file to the disk, since reading the data back needs them.
    pub(super) fn flush(&self) -> Result<(), Errno> {
        let direct = self.direct.as_ref().filter(|_| self.flushes_apart);
        // Both in any case: an error is told once, and either may have one.
        let results = [direct.map_or(Ok(()), fdatasync), fdatasync(&self.buffered)];
        results.into_iter().collect()
    }

    /// An error of this call is final: the kernel reports a failed write-back once, so the next flush may succeed.
    pub(super) fn drop_cache(&self, range: ByteRange) -> Result<(), Errno> {
        if range.is_empty() {
            return Ok(());
        }
        let (offset, length) = (signed(range.offset)?, signed(range.length)?);
        write_back_or_flush(sys::write_back(self.buffered.as_fd(), offset, length), || self.flush())?;
        // Whether the pages go is the kernel's business: what they held is written back.
        let advised = posix_fadvise(&self.buffered, offset, length, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        if let Err(errno) = advised {
            tracing::debug!(%errno, %range, "page cache not dropped");
        }
        Ok(())
    }
}

/// What follows from `written_back`, the result of `sync_file_range`. Where that call does not exist (a kernel, a file system or a filter
/// of system calls without it) nothing was written back and no error was told: a flush does it instead.
fn write_back_or_flush(
    written_back: Result<(), Errno>,
    flush: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), Errno> {
    match written_back {
        Err(Errno::ENOSYS | Errno::EPERM | Errno::EOPNOTSUPP | Errno::ESPIPE) => flush(),
        result => result,
    }
}

/// A file offset as the system takes it; beyond its range as the system would answer.
pub(super) fn signed(offset: u64) -> Result<i64, Errno> {
    i64::try_from(offset).map_err(|_| Errno::EINVAL)
}

/// `FUSE_SUPER_MAGIC`.
const FUSE_MAGIC: FsType = FsType(0x6573_5546);

/// Whether a program carries out what is asked of the file. Where that cannot be told, it is not.
fn is_fuse(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| found.filesystem_type() == FUSE_MAGIC)
}

/// The alignment for direct I/O through `direct`; `None` where it should not be used.
fn direct_alignment(kind: HandleKind, direct: &File, length: Length) -> Option<u32> {
    let fd = direct.as_fd();
    let claimed = match sys::direct_support(fd) {
        Ok(DirectSupport::Refused) => return None,
        Ok(DirectSupport::Aligned { memory, offset }) => return usable(memory.max(offset)),
        // Before Linux 6.1, and on file systems that do not say.
        Ok(DirectSupport::Unknown) | Err(_) => match kind {
            HandleKind::BlockDevice => sys::logical_block(fd).unwrap_or(MAX_ALIGNMENT),
            HandleKind::RegularFile => MAX_ALIGNMENT,
        },
    };
    let alignment = usable(claimed)?;
    (length.0 == 0 || takes_direct_read(direct)).then_some(alignment)
}

/// Whether an alignment can be kept by the engine. The smallest sector is 512 bytes, whatever a driver claims.
fn usable(alignment: u32) -> Option<u32> {
    (alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT).then_some(alignment.max(512))
}

/// Whether a read that is aligned in every respect is not refused as misaligned.
fn takes_direct_read(direct: &File) -> bool {
    let alignment = MAX_ALIGNMENT as usize;
    let mut memory = vec![0_u8; 2 * alignment];
    let skip = memory.as_ptr().align_offset(alignment);
    pread(direct, &mut memory[skip..skip + alignment], 0) != Err(Errno::EINVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_back_that_is_not_there_is_a_flush_and_one_that_fails_is_not() {
        for refusal in [Errno::ENOSYS, Errno::EPERM, Errno::EOPNOTSUPP, Errno::ESPIPE] {
            assert_eq!(write_back_or_flush(Err(refusal), || Ok(())), Ok(()));
            assert_eq!(write_back_or_flush(Err(refusal), || Err(Errno::EIO)), Err(Errno::EIO));
        }
        let unasked = || panic!("the next flush would not tell of the error again");
        for lost in [Errno::EIO, Errno::ENOSPC, Errno::EDQUOT] {
            assert_eq!(write_back_or_flush(Err(lost), unasked), Err(lost));
        }
        assert_eq!(write_back_or_flush(Ok(()), unasked), Ok(()));
    }

    /// A pipe cannot be flushed: it stands for a descriptor whose flush fails.
    #[test]
    fn where_descriptors_answer_for_themselves_each_is_flushed() {
        let file = || tempfile::tempfile().unwrap();
        let pipe = || File::from(nix::unistd::pipe().unwrap().0);
        let flush = |buffered: File, direct: Option<File>, flushes_apart: bool| {
            let limits = Limits { length: Length(0), direct_alignment: None };
            let handles = Handles {
                buffered,
                direct,
                kind: HandleKind::RegularFile,
                limits,
                announced: None,
                flushes_apart,
            };
            assert_eq!(handles.flush_is_plain(), !flushes_apart);
            handles.flush()
        };
        assert_eq!(flush(file(), Some(file()), true), Ok(()));
        assert_eq!(flush(file(), None, true), Ok(()));
        assert_eq!(flush(file(), Some(pipe()), true), Err(Errno::EINVAL));
        assert_eq!(flush(pipe(), Some(file()), true), Err(Errno::EINVAL));
        assert_eq!(flush(file(), Some(pipe()), false), Ok(()), "one is enough elsewhere");
    }

    #[test]
    fn a_strange_alignment_switches_direct_io_off() {
        assert_eq!(usable(512), Some(512));
        assert_eq!(usable(4), Some(512));
        assert_eq!(usable(4096), Some(4096));
        for strange in [0, 3, 520, 8192, u32::MAX] {
            assert_eq!(usable(strange), None, "{strange}");
        }
    }
}
