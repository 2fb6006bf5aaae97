//! What `engine-cli info` tells about a disk. Opens it for reading, claims, locks and changes nothing: it is told of a disk in use, too. Of its
//! contents it looks at the first few bytes, for a hint to people. Of an export over NBD it is what its server says.

use std::fs::Metadata;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde::Serialize;

use super::locator::{Locator, Place};
use super::nbd::{Layers, NbdInfo, open_nbd};
use super::open::{Access, OpenedPair, errno_of, image_in, length_of, open_both, refuse_non_disk};
use super::sharing::{self, Permission};
use super::{Storage, sys, topology};
use crate::error::{Error, Operation, Refusal, Result};
use crate::nbd::client::NbdUri;

/// Regular file, block device or export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
    /// An export of an NBD server.
    Nbd,
}

/// A disk as it is found. Serialises to a flat JSON object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskInfo {
    /// Where, symbolic links resolved; of an export its URI.
    pub path: String,
    /// Regular file, block device or export.
    pub kind: DiskKind,
    /// Length in bytes.
    pub length: u64,
    /// Bytes that a file occupies; `None` for a device.
    pub allocated_bytes: Option<u64>,
    /// Logical block size of a device, in bytes.
    pub logical_block_bytes: Option<u32>,
    /// Physical block size of a device, in bytes.
    pub physical_block_bytes: Option<u32>,
    /// What offset, length and memory of direct I/O are multiples of; `None` where direct I/O is refused.
    pub direct_io_alignment: Option<u32>,
    /// Whether a file's holes can be found (`SEEK_HOLE`), or those of an export (block status).
    pub finds_holes: bool,
    /// Whether a device or an export gives space back; `None` where that is not known.
    pub discards: Option<bool>,
    /// Whether a device or an export refuses writes.
    pub read_only: Option<bool>,
    /// Whether a device is mounted.
    pub mounted: Option<bool>,
    /// A device's serial number.
    pub serial: Option<String>,
    /// What other programs use of it, as far as they say so by QEMU's locks.
    pub used_by_others: Vec<Permission>,
    /// What other programs that use it let nobody else use.
    pub not_shared_by_others: Vec<Permission>,
    /// What the server of an export offers.
    pub nbd: Option<NbdInfo>,
    /// The image format, `qcow2`, whose mark stands at the beginning; `None` for none that is known. It is a raw disk all the same: a guest
    /// can write any mark into its disk.
    pub begins_like: Option<&'static str>,
}

/// Look at a disk.
///
/// # Errors
/// A refusal for what is no disk or cannot be opened.
pub fn info(locator: &Locator) -> Result<DiskInfo> {
    let path = match locator.place() {
        Place::Path(path) => path,
        Place::Nbd(uri) => return describe_export(locator, uri),
        Place::Null { .. } => {
            return Err(Error::refused(
                Refusal::NotADisk,
                Operation::Inspect,
                locator.as_str(),
                "a null disk has no properties",
            )
            .advise("name a regular file, a block device or an NBD export"));
        }
    };
    let refused = |errno| Error::refused_by_system(Operation::Inspect, locator.as_str(), errno);
    let seen = std::fs::metadata(path).map_err(|error| refused(errno_of(&error)))?;
    refuse_non_disk(Operation::Inspect, locator, &seen)?;
    let pair = open_both(Operation::Inspect, locator, path, &seen, Access::Read)?;
    let length = length_of(&pair.buffered, &pair.metadata).map_err(refused)?;
    describe(locator, path, &seen, pair, length)
}

fn describe_export(locator: &Locator, uri: &NbdUri) -> Result<DiskInfo> {
    let export = open_nbd(Operation::Inspect, locator, uri, Layers::NotAsked)?;
    let nbd = export.describe();
    Ok(DiskInfo {
        path: locator.as_str().to_owned(),
        kind: DiskKind::Nbd,
        length: export.limits().length.0,
        allocated_bytes: None,
        logical_block_bytes: None,
        physical_block_bytes: None,
        direct_io_alignment: None,
        finds_holes: nbd.block_status,
        discards: Some(export.trims()),
        read_only: Some(export.is_read_only()),
        mounted: None,
        serial: None,
        used_by_others: Vec::new(),
        not_shared_by_others: Vec::new(),
        nbd: Some(nbd),
        begins_like: None,
    })
}

fn describe(
    locator: &Locator,
    path: &Path,
    seen: &Metadata,
    pair: OpenedPair,
    length: u64,
) -> Result<DiskInfo> {
    let is_device = seen.file_type().is_block_device();
    let number = is_device.then(|| seen.rdev());
    let fd = pair.buffered.as_fd();
    // An empty file has no data to seek: it knows holes unless it says that it does not.
    let finds_holes = !is_device
        && !matches!(lseek(fd, 0, Whence::SeekHole), Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS));
    let (used_by_others, not_shared_by_others) = sharing::of_others(&pair.buffered);
    let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut info = DiskInfo {
        path: resolved.to_string_lossy().into_owned(),
        kind: if is_device { DiskKind::BlockDevice } else { DiskKind::File },
        length,
        allocated_bytes: (!is_device).then(|| seen.blocks() * 512),
        logical_block_bytes: number.and_then(|_| sys::logical_block(fd).ok()),
        physical_block_bytes: number.and_then(|_| sys::physical_block(fd).ok()),
        direct_io_alignment: None,
        finds_holes,
        discards: number.and_then(topology::discards),
        read_only: number.and_then(|_| sys::is_read_only(fd).ok()),
        mounted: number.map(topology::is_mounted),
        serial: number.and_then(topology::serial),
        used_by_others,
        not_shared_by_others,
        nbd: None,
        begins_like: image_in(&pair.buffered),
    };
    info.direct_io_alignment = pair.into_storage(Operation::Inspect, locator)?.limits().direct_alignment;
    Ok(info)
}
