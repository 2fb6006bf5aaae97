//! A regular file as a storage.
//!
//! # Holes
//! `SEEK_DATA` and `SEEK_HOLE` describe a moving target: the file may shrink, grow and change between any two calls.
//! The answer given here is always contiguous, ascending and within what was asked, and errs towards data: what lies
//! beyond the *present* end of the file is reported as data, so that reading it finds the short source instead of a hole
//! hiding it.

use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};

use super::handles::{HandleKind, Handles, signed};
use super::sharing::Announced;
use super::{Descriptors, Limits, Storage};
use crate::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
use crate::units::{ByteRange, Length};

/// A regular file. See the module's header.
#[derive(Debug)]
pub struct FileStorage {
    name: String,
    handles: Handles,
}

impl FileStorage {
    /// The storage of an open regular file: `buffered` opened without `O_DIRECT`, `direct` the same file with it (`None`
    /// where that was refused). Its length is the file's at this moment. Holds the descriptors, and with them any lock.
    ///
    /// # Errors
    /// The system's, when asked for the length.
    pub fn from_files(name: impl Into<String>, buffered: File, direct: Option<File>) -> Result<Self, Errno> {
        let length = Length(size_of_file(&buffered)?);
        let handles = Handles::new(HandleKind::RegularFile, buffered, direct, length);
        Ok(Self { name: name.into(), handles })
    }

    /// Others know that the file is in use for as long as this storage is there.
    pub(super) fn announced(mut self, announced: Option<Announced>) -> Self {
        self.handles.keep(announced);
        self
    }
}

impl Storage for FileStorage {
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
        self.handles.write_zeroes(range, ZeroMethod::Unmap)
    }

    fn allocate(&self, ranges: &[ByteRange]) -> Result<(), Errno> {
        ranges
            .iter()
            .try_for_each(|&range| self.handles.fallocate(FallocateFlags::FALLOC_FL_KEEP_SIZE, range))
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

    fn extents(&self, range: ByteRange, query: ExtentQuery, limit: usize) -> Result<Vec<Extent>, Errno> {
        match query {
            ExtentQuery::TopLayer => Ok(vec![Extent { range, present: true }]),
            ExtentQuery::Data => seek_extents(&SeekFile(self.handles.buffered()), range, limit),
        }
    }
}

fn size_of_file(file: impl AsFd) -> Result<u64, Errno> {
    u64::try_from(fstat(file)?.st_size).map_err(|_| Errno::EOVERFLOW)
}

/// What is asked of a file to find its holes. A trait, so that tests can play a file that changes between two calls.
trait Seek {
    fn size(&self) -> Result<u64, Errno>;
    fn seek(&self, offset: u64, whence: Whence) -> Result<u64, Errno>;
}

struct SeekFile<'a>(&'a File);

impl Seek for SeekFile<'_> {
    fn size(&self) -> Result<u64, Errno> {
        size_of_file(self.0)
    }

    fn seek(&self, offset: u64, whence: Whence) -> Result<u64, Errno> {
        let found = lseek(self.0, signed(offset)?, whence)?;
        u64::try_from(found).map_err(|_| Errno::EIO)
    }
}

/// At most `limit` extents of `range` from its start. See the module's header.
fn seek_extents(file: &impl Seek, range: ByteRange, limit: usize) -> Result<Vec<Extent>, Errno> {
    let mut found = Extents { list: Vec::new(), at: range.offset, end: range.end(), limit };
    while !found.is_complete() {
        match next_data(file, found.at, found.end)? {
            Found::AllData => found.push(found.end, true),
            Found::HoleUntil(data) if data > found.at => found.push(data, false),
            Found::HoleUntil(_) => {
                let hole = match file.seek(found.at, Whence::SeekHole) {
                    // An answer that does not lead on, or none (the file has shrunk meanwhile): data to the end.
                    Ok(hole) if hole > found.at => hole.min(found.end),
                    Ok(_) | Err(Errno::ENXIO) => found.end,
                    Err(error) => return Err(error),
                };
                found.push(hole, true);
            }
        }
    }
    assert!(found.list.first().is_none_or(|extent| extent.range.offset == range.offset));
    assert!(found.list.len() <= limit);
    Ok(found.list)
}

enum Found {
    /// A hole, perhaps empty, ends here; data follows.
    HoleUntil(u64),
    /// Everything up to the end counts as data.
    AllData,
}

fn next_data(file: &impl Seek, at: u64, end: u64) -> Result<Found, Errno> {
    // The size before and after, because a file that shrinks in between has no hole where it has no bytes.
    let before = file.size()?;
    if before <= at {
        return Ok(Found::AllData);
    }
    match file.seek(at, Whence::SeekData) {
        Ok(data) if data < at => Ok(Found::AllData),
        Ok(data) => Ok(Found::HoleUntil(data.min(end))),
        Err(Errno::ENXIO) => {
            let size = before.min(file.size()?);
            Ok(if size <= at { Found::AllData } else { Found::HoleUntil(size.min(end)) })
        }
        Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ESPIPE) => Ok(Found::AllData),
        Err(error) => Err(error),
    }
}

struct Extents {
    list: Vec<Extent>,
    at: u64,
    end: u64,
    limit: usize,
}

impl Extents {
    fn is_complete(&self) -> bool {
        self.at == self.end || self.list.len() == self.limit
    }

    /// Appends what lies up to `until`, joined to the extent before it where that is of the same kind.
    fn push(&mut self, until: u64, present: bool) {
        assert!(self.at < until && until <= self.end, "extent {}..{until} up to {}", self.at, self.end);
        match self.list.last_mut() {
            Some(last) if last.present == present => last.range.length += until - self.at,
            _ => self.list.push(Extent { range: ByteRange::between(self.at, until), present }),
        }
        self.at = until;
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
