//! What a disk is to the engine: its length, its alignment, and the operations that block.
//!
//! A [`Storage`] is shared by the threads that carry out operations. The `threads` ring calls its methods for everything;
//! the `uring` ring uses its descriptors ([`Storage::descriptors`]) for what the kernel does asynchronously and calls the methods, on
//! its small helper pool, for the rest (`SEEK_HOLE`, `BLKDISCARD`, …). Of a remote one ([`Storage::is_remote`]) all is for helpers. Methods map to one system call where they can,
//! and return its result as it is: short counts and errors are for the logic to judge.

mod block;
mod file;
mod fleece;
mod handles;
mod identity;
mod info;
pub mod locator;
pub(crate) mod lock;
mod nbd;
mod null;
pub(crate) mod open;
mod place;
pub(crate) mod prepare;
mod sharing;
mod sys;
mod target;
pub(crate) mod topology;

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use crate::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
use crate::units::{ByteRange, Length};
pub use block::BlockStorage;
pub use file::FileStorage;
pub(crate) use fleece::{OpenedFleece, open_fleece};
pub use identity::{Difference, DiskId, FileTime, Identity};
pub use info::{DiskInfo, DiskKind, info};
pub use locator::Locator;
pub use nbd::{NbdInfo, plan_nbd};
pub use null::NullStorage;
pub(crate) use open::{LiveAccess, node_at, open_live};
pub use open::{OpenedSource, SourceOptions, open_source, source_unchanged};
pub use sharing::Permission;
pub use target::{OpenedTarget, Resume, TargetOptions, TargetPlan, plan_target};
pub use topology::share_bytes;

/// The descriptors of a storage that the kernel can do I/O on.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors<'a> {
    /// Opened with `O_DIRECT`; `None` where the storage refuses direct I/O.
    pub direct: Option<BorrowedFd<'a>>,
    /// Opened without `O_DIRECT`.
    pub buffered: BorrowedFd<'a>,
    /// Whether it is a block device (`BLK*` commands) rather than a regular file.
    pub block_device: bool,
}

/// What the logic must know to form operations on a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Length when it was opened.
    pub length: Length,
    /// Offset, length and memory of direct I/O are multiples of this (a power of two, at most 4096); `None` where direct I/O is refused.
    pub direct_alignment: Option<u32>,
}

/// A disk. See the module's header.
pub trait Storage: Send + Sync {
    /// How messages name it: its path as the user gave it.
    fn name(&self) -> &str;
    /// Length and alignment.
    fn limits(&self) -> Limits;
    /// Descriptors to do I/O on; `None` for a storage without any (`null:`), whose reads and writes complete at once, unless it is remote.
    fn descriptors(&self) -> Option<Descriptors<'_>>;
    /// Whether operations wait for somebody else, although there are no descriptors: rings have helper threads carry all of them out.
    fn is_remote(&self) -> bool {
        false
    }

    /// `pread`. Short at the end of the storage.
    ///
    /// # Errors
    /// The system call's.
    fn read_at(&self, path: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno>;
    /// `pwrite`.
    ///
    /// # Errors
    /// The system call's.
    fn write_at(&self, path: IoPath, offset: u64, buffer: &[u8]) -> Result<usize, Errno>;
    /// Make `range` read as zeros.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there is no such operation, else the system call's.
    fn write_zeroes(&self, range: ByteRange, method: ZeroMethod) -> Result<(), Errno>;
    /// Tell the storage that `range` is not needed any more.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there is no such operation, else the system call's.
    fn discard(&self, range: ByteRange) -> Result<(), Errno>;
    /// Reserve space for `ranges`, keeping length and contents.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where there is no such operation, else the system call's.
    fn allocate(&self, ranges: &[ByteRange]) -> Result<(), Errno>;
    /// Whether [`Self::flush`] can mean anything. Where it cannot, nobody can promise what survives a loss of power, whatever succeeds.
    fn can_be_flushed(&self) -> bool {
        true
    }
    /// Bring data, and what is needed to read it, to stable storage.
    ///
    /// # Errors
    /// The system call's.
    fn flush(&self) -> Result<(), Errno>;
    /// Whether [`Self::flush`] is `fdatasync` on the buffered descriptor and nothing else, so that a ring may ask the kernel for that.
    fn flush_is_plain(&self) -> bool {
        true
    }
    /// Write `range` back and drop it from the page cache.
    ///
    /// # Errors
    /// The system call's.
    fn drop_cache(&self, range: ByteRange) -> Result<(), Errno>;
    /// Describe `range` from its start: at most `limit` extents, ascending, without gaps. Where the storage cannot tell, the whole
    /// range is data ([`ExtentQuery::Data`]), and, without layers, allocated ([`ExtentQuery::TopLayer`]).
    ///
    /// # Errors
    /// The system call's.
    fn extents(&self, range: ByteRange, query: ExtentQuery, limit: usize) -> Result<Vec<Extent>, Errno>;
}

/// The alignment of direct I/O on `storage`, as the logic takes it; `None`: buffered. A storage without descriptors takes any.
pub(crate) fn alignment_of(storage: &dyn Storage) -> Option<u32> {
    if storage.descriptors().is_some() { storage.limits().direct_alignment } else { Some(512) }
}

/// How a document was replaced or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// A crash changes nothing of it.
    Durably,
    /// It was removed, but its directory could not be synced: after a crash it may be there again.
    Unsynced(Errno),
}

/// Whether making zeros in the space that they have ([`ZeroMethod::Keep`]) never means to write them. A file that has no such operation says so.
/// For a block device the kernel writes them then, and whether it has to is not known before.
pub(crate) fn keep_is_fast(storage: &dyn Storage) -> bool {
    !storage.descriptors().is_some_and(|descriptors| descriptors.block_device)
}

/// A small file that is replaced as a whole.
pub trait Document: Send + Sync {
    /// Replace it atomically and durably, or remove it durably.
    ///
    /// # Errors
    /// The system call's; what stood there may stand there still.
    fn publish(&self, contents: Option<&[u8]>) -> Result<Published, Errno>;
}
