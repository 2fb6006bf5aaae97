//! A block device as a storage.
//!
//! All of it is data: a device does not tell what it holds. Ranges given to [`Storage::write_zeroes`] and
//! [`Storage::discard`] are multiples of the logical block size, else the kernel answers `EINVAL`. Where the device has no
//! such operation it answers `EOPNOTSUPP` to a discard and to [`ZeroMethod::Unmap`], and the logic tries the next way; for
//! [`ZeroMethod::Keep`] it writes zeros by itself, as slowly as they are written, and does not tell. So on a device that one is not
//! for those who want zeros only where they are fast.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::handles::{HandleKind, Handles};
use super::sharing::Announced;
use super::{Descriptors, Limits, Storage, sys};
use crate::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
use crate::units::{ByteRange, Length};

/// A block device. See the module's header.
#[derive(Debug)]
pub struct BlockStorage {
    name: String,
    handles: Handles,
}

impl BlockStorage {
    /// The storage of an open block device: `buffered` opened without `O_DIRECT`, `direct` the same device with it. Holds
    /// the descriptors, and with them an exclusive claim (`O_EXCL`).
    ///
    /// # Errors
    /// The system's, when asked for the length.
    pub fn from_files(name: impl Into<String>, buffered: File, direct: Option<File>) -> Result<Self, Errno> {
        let length = Length(sys::device_length(buffered.as_fd())?);
        let handles = Handles::new(HandleKind::BlockDevice, buffered, direct, length);
        Ok(Self { name: name.into(), handles })
    }

    /// Others know that the device is in use for as long as this storage is there.
    pub(super) fn announced(mut self, announced: Option<Announced>) -> Self {
        self.handles.keep(announced);
        self
    }
}

impl Storage for BlockStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn limits(&self) -> Limits {
        self.handles.limits()
    }

    fn descriptors(&self) -> Option<Descriptors<'_>> {
        Some(self.handles.descriptors())
    }

    fn read_at(&self, path: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        self.handles.read_at(path, offset, buffer)
    }

    fn write_at(&self, path: IoPath, offset: u64, buffer: &[u8]) -> Result<usize, Errno> {
        self.handles.write_at(path, offset, buffer)
    }

    fn write_zeroes(&self, range: ByteRange, method: ZeroMethod) -> Result<(), Errno> {
        self.handles.write_zeroes(range, method)
    }

    fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        if range.is_empty() {
            return Ok(());
        }
        sys::discard_device(self.handles.buffered().as_fd(), range)
    }

    /// A device has all the space it will ever have.
    fn allocate(&self, _ranges: &[ByteRange]) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.handles.flush()
    }

    fn flush_is_plain(&self) -> bool {
        self.handles.flush_is_plain()
    }

    fn drop_cache(&self, range: ByteRange) -> Result<(), Errno> {
        self.handles.drop_cache(range)
    }

    fn extents(&self, range: ByteRange, _: ExtentQuery, _: usize) -> Result<Vec<Extent>, Errno> {
        Ok(vec![Extent { range, present: true }])
    }
}
