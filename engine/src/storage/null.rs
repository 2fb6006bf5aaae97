//! `null:`: a disk of a given length without contents, to measure the engine alone.
//!
//! Reads leave the buffer as it is, writes vanish, both at once and whole within the length. There are no descriptors,
//! so no ring makes a system call for it.

use nix::errno::Errno;

use super::{Descriptors, Limits, Storage};
use crate::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
use crate::units::{ByteRange, Length};

/// A disk without contents. See the module's header.
#[derive(Clone, Debug)]
pub struct NullStorage {
    name: String,
    length: Length,
}

impl NullStorage {
    /// A null disk of `length` bytes.
    #[must_use]
    pub fn new(name: impl Into<String>, length: Length) -> Self {
        Self { name: name.into(), length }
    }

    /// How much of `bytes` bytes at `offset` lies on the disk.
    fn within(&self, offset: u64, bytes: usize) -> usize {
        let room = self.length.0.saturating_sub(offset);
        usize::try_from(room).map_or(bytes, |room| room.min(bytes))
    }
}

impl Storage for NullStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn limits(&self) -> Limits {
        Limits { length: self.length, direct_alignment: Some(512) }
    }

    fn descriptors(&self) -> Option<Descriptors<'_>> {
        None
    }

    fn read_at(&self, _: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        Ok(self.within(offset, buffer.len()))
    }

    fn write_at(&self, _: IoPath, offset: u64, buffer: &[u8]) -> Result<usize, Errno> {
        match self.within(offset, buffer.len()) {
            0 if !buffer.is_empty() => Err(Errno::ENOSPC),
            written => Ok(written),
        }
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
        Ok(())
    }

    fn drop_cache(&self, _: ByteRange) -> Result<(), Errno> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, _: ExtentQuery, _: usize) -> Result<Vec<Extent>, Errno> {
        Ok(vec![Extent { range, present: true }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_leave_the_buffer_and_end_at_the_length() {
        let disk = NullStorage::new("null:", Length(1000));
        let mut buffer = [9; 512];
        assert_eq!(disk.read_at(IoPath::Direct, 0, &mut buffer), Ok(512));
        assert_eq!(disk.read_at(IoPath::Direct, 512, &mut buffer), Ok(488));
        assert_eq!(disk.read_at(IoPath::Direct, 1000, &mut buffer), Ok(0));
        assert_eq!(buffer, [9; 512]);
        assert_eq!(disk.write_at(IoPath::Buffered, 999, &buffer), Ok(1));
        assert_eq!(disk.write_at(IoPath::Buffered, 1000, &buffer), Err(Errno::ENOSPC));
    }
}
