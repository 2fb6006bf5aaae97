//! The proof: what stands on a disk, held against the guest's writes in their order.
//!
//! First every block is read, and every byte of it checked ([`versions`]): it holds one whole version. Then the guest's writes are gone
//! through in their order ([`prefix`]): the disk is the disk after exactly *k* of them if it has the first *k* and none of
//! the others. A disk that has a write and lacks an earlier one never was like that.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use engine::error::{Error, ErrorKind, Operation};
use engine::units::ByteRange;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::content::{BLOCK, Content, Wrong};
use super::io_error;

/// Bytes read at a time.
const PIECE: usize = 1 << 20;

/// Why a disk is not what it should be; the counts of writes begin with 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// A block holds no version whole.
    Block { block: u64, wrong: Wrong },
    /// A block holds a version that was never written.
    NeverWritten { block: u64, version: u32, written: u32 },
    /// It lacks a write and has a later one.
    NoInstant { lacks: u64, has: u64 },
    /// It is the disk after so many writes, which is not a time from `from` to `to`.
    OtherInstant { writes: u64, from: u64, to: u64 },
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block { block, wrong: Wrong::Foreign } => {
                write!(f, "block {block} holds nothing that was ever written to this disk")
            }
            Self::Block { block, wrong: Wrong::Misplaced(place) } => {
                write!(f, "block {block} holds what belongs to block {place}")
            }
            Self::Block { block, wrong: Wrong::Torn } => {
                write!(f, "block {block} holds no version whole: it is torn or damaged")
            }
            Self::NeverWritten { block, version, written } => {
                write!(
                    f,
                    "block {block} holds version {version}, but the guest wrote {written} versions of it"
                )
            }
            Self::NoInstant { lacks, has } => {
                write!(
                    f,
                    "it has the guest's write {has} and lacks write {lacks}: the disk never was like that"
                )
            }
            Self::OtherInstant { writes, from, to } => {
                write!(f, "it is the disk after {writes} of the guest's writes instead of {from} to {to}")
            }
        }
    }
}

impl Flaw {
    /// As an error about `path`.
    pub(super) fn error(self, path: &Path) -> Error {
        let path = path.display().to_string();
        Error::new(ErrorKind::VerifyMismatch, Operation::Verify, path, self.to_string())
            .advise("please report it; with --log debug the engine says what it did")
    }
}

/// Why no versions came.
#[derive(Debug)]
pub(super) enum Unread {
    Flaw(Flaw),
    Error(Error),
    /// `go_on` said no.
    Stopped,
}

/// The version that each of the `blocks` blocks of the file holds; `go_on` is asked now and then.
pub(super) fn versions(
    path: &Path,
    content: Content,
    blocks: u32,
    go_on: impl Fn() -> bool,
) -> Result<Vec<u32>, Unread> {
    let failed =
        |operation, range, error: &std::io::Error| Unread::Error(io_error(operation, path, range, error));
    let file = File::open(path).map_err(|error| failed(Operation::Inspect, None, &error))?;
    // Read what reached the medium rather than what the page cache holds; some file systems have nothing else.
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).ok();
    let length = file.metadata().map_err(|error| failed(Operation::Inspect, None, &error))?.len();
    if length != u64::from(blocks) * BLOCK as u64 {
        let reason = format!("it has {length} bytes instead of {blocks} blocks of {BLOCK}");
        let path = path.display().to_string();
        return Err(Unread::Error(Error::new(ErrorKind::VerifyMismatch, Operation::Verify, path, reason)));
    }
    let mut found = Vec::with_capacity(blocks as usize);
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < length {
        if !go_on() {
            return Err(Unread::Stopped);
        }
        let count = usize::try_from(length - at).map_or(PIECE, |left| left.min(PIECE));
        file.read_exact_at(&mut piece[..count], at)
            .map_err(|error| failed(Operation::Read, Some(ByteRange::new(at, count as u64)), &error))?;
        let (whole, _) = piece[..count].as_chunks::<BLOCK>();
        for bytes in whole {
            let block = found.len() as u64;
            let version = content.version(block, bytes);
            found.push(version.map_err(|wrong| Unread::Flaw(Flaw::Block { block, wrong }))?);
        }
        at += count as u64;
    }
    Ok(found)
}

/// After how many of the guest's writes the disk was as `found` says, one version for each block; `order`: the blocks that it wrote,
/// in order.
pub(super) fn prefix(found: &[u32], order: impl Iterator<Item = u32>) -> Result<u64, Flaw> {
    let mut written = vec![0_u32; found.len()];
    let (mut lacks, mut has) = (None, 0);
    for (write, block) in (1_u64..).zip(order) {
        let block = block as usize;
        written[block] += 1;
        if written[block] <= found[block] {
            has = write;
        } else if lacks.is_none() {
            lacks = Some(write);
        }
    }
    for (block, (&version, &written)) in (0..).zip(found.iter().zip(&written)) {
        if version > written {
            return Err(Flaw::NeverWritten { block, version, written });
        }
    }
    match lacks {
        Some(lacks) if lacks < has => Err(Flaw::NoInstant { lacks, has }),
        _ => Ok(has),
    }
}

/// As [`prefix`], for a disk that must be as it was after `from` to `to` writes.
pub(super) fn prefix_within(
    found: &[u32],
    order: impl Iterator<Item = u32>,
    from: u64,
    to: u64,
) -> Result<u64, Flaw> {
    match prefix(found, order)? {
        writes if (from..=to).contains(&writes) => Ok(writes),
        writes => Err(Flaw::OtherInstant { writes, from, to }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tempfile::NamedTempFile;

    use super::*;

    const BLOCKS: u32 = 600;
    const CONTENT: Content = Content::new(1);

    /// The disk after `writes` writes of the guest.
    fn disk_after(writes: usize) -> NamedTempFile {
        let mut versions: BTreeMap<u32, u32> = BTreeMap::new();
        CONTENT.order(BLOCKS).take(writes).for_each(|block| *versions.entry(block).or_default() += 1);
        let disk = NamedTempFile::new().unwrap();
        for block in 0..BLOCKS {
            put(&disk, block, versions.get(&block).copied().unwrap_or(0));
        }
        disk
    }

    fn put(disk: &NamedTempFile, block: u32, version: u32) {
        let mut bytes = [0; BLOCK];
        CONTENT.fill(u64::from(block), version, &mut bytes);
        disk.as_file().write_all_at(&bytes, u64::from(block) * BLOCK as u64).unwrap();
    }

    fn look(disk: &NamedTempFile) -> Result<Vec<u32>, Unread> {
        versions(disk.path(), CONTENT, BLOCKS, || true)
    }

    fn after(disk: &NamedTempFile, writes: usize) -> Result<u64, Flaw> {
        prefix(&look(disk).unwrap(), CONTENT.order(BLOCKS).take(writes))
    }

    #[track_caller]
    fn flaw(disk: &NamedTempFile) -> Flaw {
        match look(disk) {
            Err(Unread::Flaw(flaw)) => flaw,
            other => panic!("no flaw: {other:?}"),
        }
    }

    #[test]
    fn every_instant_is_told_exactly() {
        for writes in [0, 1, 2, 599, 600, 5000] {
            assert_eq!(after(&disk_after(writes), 5000), Ok(writes as u64));
        }
    }

    #[test]
    fn an_instant_must_lie_where_it_belongs() {
        let found = look(&disk_after(100)).unwrap();
        let within = |from, to| prefix_within(&found, CONTENT.order(BLOCKS).take(5000), from, to);
        assert_eq!(within(100, 100), Ok(100));
        assert_eq!(within(90, 110), Ok(100));
        assert_eq!(within(101, 110), Err(Flaw::OtherInstant { writes: 100, from: 101, to: 110 }));
        assert_eq!(within(90, 99), Err(Flaw::OtherInstant { writes: 100, from: 90, to: 99 }));
    }

    #[test]
    fn a_write_that_came_too_late_or_is_missing_is_found() {
        let order: Vec<u32> = CONTENT.order(BLOCKS).take(1000).collect();
        let version_after = |block, writes: usize| {
            u32::try_from(order[..writes].iter().filter(|&&other| other == block).count()).unwrap()
        };
        // Copied too late: write 900 is there, long after the instant.
        let disk = disk_after(500);
        put(&disk, order[899], version_after(order[899], 900));
        assert!(matches!(after(&disk, 1000), Err(Flaw::NoInstant { lacks: 501, has: 900 })));
        // Lost: a block as it was before write 100.
        let disk = disk_after(500);
        put(&disk, order[99], version_after(order[99], 99));
        assert!(matches!(after(&disk, 1000), Err(Flaw::NoInstant { lacks: 100, has: 500 })));
    }

    #[test]
    fn a_version_from_nowhere_is_found() {
        let disk = disk_after(500);
        put(&disk, 7, 1000);
        assert!(matches!(after(&disk, 1000), Err(Flaw::NeverWritten { block: 7, version: 1000, .. })));
    }

    #[test]
    fn every_damaged_byte_is_found() {
        for (at, wrong) in [(0, Wrong::Foreign), (16, Wrong::Torn), (24, Wrong::Torn), (4095, Wrong::Torn)] {
            let disk = disk_after(500);
            let place = 300 * BLOCK as u64 + at;
            let mut byte = [0];
            disk.as_file().read_exact_at(&mut byte, place).unwrap();
            disk.as_file().write_all_at(&[byte[0] ^ 0x80], place).unwrap();
            assert_eq!(flaw(&disk), Flaw::Block { block: 300, wrong });
        }
    }

    #[test]
    fn torn_swapped_and_empty_blocks_are_found() {
        let half = BLOCK as u64 / 2;
        let disk = disk_after(500);
        let mut newer = [0; BLOCK];
        CONTENT.fill(3, 9, &mut newer);
        disk.as_file().write_all_at(&newer[BLOCK / 2..], 3 * BLOCK as u64 + half).unwrap();
        assert_eq!(flaw(&disk), Flaw::Block { block: 3, wrong: Wrong::Torn });
        let disk = disk_after(500);
        let mut other = [0; BLOCK];
        CONTENT.fill(4, 0, &mut other);
        disk.as_file().write_all_at(&other, 3 * BLOCK as u64).unwrap();
        assert_eq!(flaw(&disk), Flaw::Block { block: 3, wrong: Wrong::Misplaced(4) });
        let disk = disk_after(500);
        disk.as_file().write_all_at(&[0; BLOCK], 599 * BLOCK as u64).unwrap();
        assert_eq!(flaw(&disk), Flaw::Block { block: 599, wrong: Wrong::Foreign });
    }

    #[test]
    fn another_length_is_an_error_and_a_stop_is_none() {
        let disk = disk_after(0);
        disk.as_file().set_len(599 * BLOCK as u64).unwrap();
        assert!(matches!(look(&disk), Err(Unread::Error(error)) if error.to_string().contains("600 blocks")));
        assert!(matches!(versions(disk_after(0).path(), CONTENT, BLOCKS, || false), Err(Unread::Stopped)));
    }
}
