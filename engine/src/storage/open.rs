//! Opening the source of a copy, with all that can be refused about it.
//!
//! A path is looked at before it is opened (opening a FIFO would hang, opening a tape would rewind it) and again
//! afterwards, through the descriptor: what was opened must be what was looked at. A source is never written to. For as
//! long as it is open others know it by its locks ([`super::sharing`]), so that no copy chooses it as a target.

use std::fs::{File, Metadata, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;

use super::identity::Identity;
use super::locator::{Locator, Place};
use super::lock;
use super::nbd::{Layers, open_nbd_source};
use super::sharing::{self, Announced, Permission, Role, Taken};
use super::topology::{self, Node};
use super::{BlockStorage, FileStorage, NullStorage, Storage, sys};
use crate::error::{Error, ErrorKind, Operation, Refusal, Result};
use crate::modes::Format;
use crate::units::{Length, MAX_LENGTH};

/// What a qcow2 image begins with.
const QCOW2_MARK: &[u8; 4] = b"QFI\xfb";

/// How to open a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceOptions {
    /// How the disk lies in its file or device.
    pub format: Format,
    /// Read it even if another program has it open for writing, like a running virtual machine. What that writes meanwhile may be read or not.
    pub force_share: bool,
    /// It will be asked what is in its top layer: a server is asked whether it tells that.
    pub layers: bool,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self { format: Format::Raw, force_share: false, layers: false }
    }
}

/// A source that is ready to be read.
pub struct OpenedSource {
    storage: Arc<dyn Storage>,
    identity: Identity,
    metadata: Option<(File, Metadata)>,
    warnings: Vec<String>,
}

impl std::fmt::Debug for OpenedSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenedSource").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl OpenedSource {
    /// Of a storage that is not of this machine.
    pub(super) fn remote(storage: Arc<dyn Storage>, identity: Identity, warnings: Vec<String>) -> Self {
        Self { storage, identity, metadata: None, warnings }
    }

    /// To read it.
    #[must_use]
    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }

    /// Which disk it is, as it was when it was opened.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Length when it was opened.
    #[must_use]
    pub fn length(&self) -> Length {
        self.storage.limits().length
    }

    /// What the user should know, a line each.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The file or device under it; `None` for `null:` and what is not of this machine.
    pub(crate) fn node(&self) -> Option<Node> {
        self.metadata.as_ref().map(|(_, metadata)| Node::of(metadata))
    }

    /// The permission bits that a new copy of it should have: its own if it is a file, else the owner's alone.
    pub(super) fn mode_of_copy(&self) -> u32 {
        match &self.metadata {
            Some((_, metadata)) if metadata.is_file() => metadata.mode() & 0o666 | 0o600,
            _ => 0o600,
        }
    }

    /// Bytes that a copy with its holes kept is expected to take.
    pub(super) fn expected_allocation(&self) -> u64 {
        match &self.metadata {
            Some((_, metadata)) if metadata.is_file() => (metadata.blocks() * 512).min(self.length().0),
            Some(_) => self.length().0,
            None => 0,
        }
    }
}

/// Open the source of a copy.
///
/// # Errors
/// Refusals only; see the module's header.
pub fn open_source(locator: &Locator, options: &SourceOptions) -> Result<OpenedSource> {
    refuse_format(Operation::OpenSource, locator, options.format)?;
    match locator.place() {
        Place::Path(path) => {
            let role = if options.force_share { Role::ForcedSource } else { Role::Source };
            open_path(locator, path, Access::Read, role)
        }
        Place::Null { length: Some(length) } => Ok(OpenedSource {
            storage: Arc::new(NullStorage::new(locator.as_str(), *length)),
            identity: Identity::null(*length),
            metadata: None,
            warnings: Vec::new(),
        }),
        Place::Nbd(uri) => open_nbd_source(locator, uri, Layers::of(options.layers)),
        Place::Null { length: None } => Err(Error::refused(
            Refusal::BadArgument,
            Operation::OpenSource,
            locator.as_str(),
            "a null source needs a size",
        )
        .advise("write it as null:SIZE, like null:64G")),
    }
}

/// Who writes to a live disk, and who keeps others off it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LiveAccess {
    /// The engine carries the writes.
    Carried,
    /// The embedder writes under permits; that others do not is seen to here.
    Permits,
    /// The embedder does both.
    PermitsAndLocks,
}

/// Open a disk that is to be copied while it is written to: by this program alone, whoever in it writes.
///
/// # Errors
/// Refusals only.
pub(crate) fn open_live(locator: &Locator, access: LiveAccess) -> Result<OpenedSource> {
    let path = match locator.place() {
        Place::Path(path) => path,
        Place::Null { .. } => return open_source(locator, &SourceOptions::default()),
        Place::Nbd(_) => return Err(no_live_nbd(Operation::OpenSource, locator)),
    };
    match access {
        LiveAccess::Carried => open_path(locator, path, Access::Write, Role::LiveDisk),
        LiveAccess::Permits => open_path(locator, path, Access::Read, Role::LiveDisk),
        LiveAccess::PermitsAndLocks => open_path(locator, path, Access::Read, Role::ForcedSource),
    }
}

/// The refusal of an export as a side of the copy of a live disk.
pub(super) fn no_live_nbd(operation: Operation, locator: &Locator) -> Error {
    let reason = "NBD is not supported by this version for live disks and their backups";
    Error::refused(Refusal::Unsupported, operation, locator.as_str(), reason)
        .advise("attach the export as a block device (nbd-client, qemu-nbd -c) and name that")
}

/// The file or device that `locator` names now, whatever it is good for; `None` where there is none.
pub(crate) fn node_at(locator: &Locator) -> Option<Node> {
    let Place::Path(path) = locator.place() else { return None };
    std::fs::metadata(path).ok().map(|seen| Node::of(&seen))
}

/// Whether the source is still what it was when it was opened, as far as its file system tells. A device's contents may
/// change without a trace.
///
/// # Errors
/// [`ErrorKind::SourceChanged`], or an I/O error when it cannot be asked.
pub fn source_unchanged(source: &OpenedSource) -> Result<()> {
    let Some((file, before)) = &source.metadata else { return Ok(()) };
    let name = source.storage.name();
    let failed = |errno| Error::io(Operation::Inspect, name, None, errno);
    let now = file.metadata().map_err(|error| failed(errno_of(&error)))?;
    let changed = |what: &str| {
        Err(Error::new(
            ErrorKind::SourceChanged,
            Operation::Copy,
            name,
            format!("its {what} changed while it was copied, so the copy may mix old and new contents"),
        )
        .advise("copy again while nothing writes to it"))
    };
    let length = length_of(file, &now).map_err(failed)?;
    if length != source.length().0 {
        return changed("length");
    }
    if before.is_file() && (before.mtime(), before.mtime_nsec()) != (now.mtime(), now.mtime_nsec()) {
        return changed("modification time");
    }
    if before.is_file() && (before.ctime(), before.ctime_nsec()) != (now.ctime(), now.ctime_nsec()) {
        return changed("change time");
    }
    Ok(())
}

fn open_path(locator: &Locator, path: &Path, access: Access, role: Role) -> Result<OpenedSource> {
    let operation = Operation::OpenSource;
    let refused = |errno| Error::refused_by_system(operation, locator.as_str(), errno);
    let seen = std::fs::metadata(path).map_err(|error| refused(errno_of(&error)))?;
    refuse_non_disk(operation, locator, &seen)?;
    let is_device_seen = seen.file_type().is_block_device();
    let access = if access == Access::Write && is_device_seen { Access::Claim } else { access };
    let mut opened = open_both(operation, locator, path, &seen, access)?;
    let is_device = seen.file_type().is_block_device();
    let length = length_of(&opened.buffered, &opened.metadata).map_err(refused)?;
    if is_device && length == 0 {
        return Err(no_length(operation, locator));
    }
    if length > MAX_LENGTH {
        return Err(Error::refused(
            Refusal::TooLarge,
            operation,
            locator.as_str(),
            format!(
                "its {length} bytes are more than the largest disk that can be copied ({MAX_LENGTH} bytes)"
            ),
        ));
    }
    let mut warnings = Vec::new();
    opened.announced = take(operation, locator, &opened, role)?;
    let others_write = || sharing::of_others(&opened.buffered).0.contains(&Permission::Write);
    if role != Role::LiveDisk && (others_write() || is_device && topology::is_mounted(seen.rdev())) {
        warnings.push(format!(
            "{locator} is in use (mounted, or the disk of a running machine): if it is written to meanwhile, the copy \
             mixes old and new contents"
        ));
    }
    if matches!(role, Role::Source | Role::ForcedSource) {
        warnings.extend(image_in(&opened.buffered).map(|format| {
            format!("{locator}: the contents begin like a {format} image; it is treated as raw here")
        }));
    }
    let keep = opened.buffered.try_clone().map_err(|error| refused(errno_of(&error)))?;
    let identity = Identity::of(path, &opened.buffered, &opened.metadata, Length(length), is_device);
    let metadata = Some((keep, opened.metadata.clone()));
    let storage = opened.into_storage(operation, locator)?;
    warnings.extend(warn_of_buffered(locator, storage.as_ref()));
    Ok(OpenedSource { storage, identity, metadata, warnings })
}

/// Let others know what a disk is opened for, unless they exclude it. `None` where the file system has no locks.
fn take(
    operation: Operation,
    locator: &Locator,
    opened: &OpenedPair,
    role: Role,
) -> Result<Option<Announced>> {
    let name = locator.as_str();
    sharing::refuse_used_beneath(operation, name, Node::of(&opened.metadata), role)?;
    match sharing::take(&opened.buffered, role) {
        Ok(Taken::Held(announced)) => Ok(Some(announced)),
        Ok(Taken::Unsupported) => Ok(None),
        Ok(Taken::Refused(conflict)) => Err(sharing::refusal(operation, name, role, conflict)),
        Err(errno) => Err(Error::refused_by_system(operation, name, errno)),
    }
}

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
    /// Reading and writing a block device that nobody else has claimed.
    Claim,
}

/// A disk with both descriptors open.
#[derive(Debug)]
pub(super) struct OpenedPair {
    pub(super) buffered: File,
    pub(super) direct: Option<File>,
    pub(super) metadata: Metadata,
    /// How others know that it is in use.
    pub(super) announced: Option<Announced>,
}

impl OpenedPair {
    /// The same descriptions a second time, for as long as the first is there: claims last until both are closed, locks until the
    /// first one is.
    pub(super) fn try_clone(&self) -> std::result::Result<Self, Errno> {
        let again = |file: &File| file.try_clone().map_err(|error| errno_of(&error));
        Ok(Self {
            buffered: again(&self.buffered)?,
            direct: self.direct.as_ref().map(again).transpose()?,
            metadata: self.metadata.clone(),
            announced: None,
        })
    }

    pub(super) fn into_storage(self, operation: Operation, locator: &Locator) -> Result<Arc<dyn Storage>> {
        let name = locator.as_str();
        let refused = |errno| Error::refused_by_system(operation, name, errno);
        Ok(if self.metadata.file_type().is_block_device() {
            let storage = BlockStorage::from_files(name, self.buffered, self.direct).map_err(refused)?;
            Arc::new(storage.announced(self.announced))
        } else {
            let storage = FileStorage::from_files(name, self.buffered, self.direct).map_err(refused)?;
            Arc::new(storage.announced(self.announced))
        })
    }
}

/// Open what was `seen` at `path`, twice, and check that it is that.
pub(super) fn open_both(
    operation: Operation,
    locator: &Locator,
    path: &Path,
    seen: &Metadata,
    access: Access,
) -> Result<OpenedPair> {
    let refused = |errno| Error::refused_by_system(operation, locator.as_str(), errno);
    let open = |flags: i32| {
        OpenOptions::new()
            .read(true)
            .write(access != Access::Read)
            .custom_flags(flags | libc::O_NOCTTY)
            .open(path)
            .map_err(|error| errno_of(&error))
    };
    let claim = if access == Access::Claim { libc::O_EXCL } else { 0 };
    let claimed =
        |outcome: &std::result::Result<File, Errno>| claim != 0 && matches!(outcome, Err(Errno::EBUSY));
    let buffered = lock::patiently(|| open(claim), claimed).map_err(refused)?;
    let direct = match open(libc::O_DIRECT) {
        Ok(file) => Some(file),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => None,
        Err(errno) => return Err(refused(errno)),
    };
    let metadata = buffered.metadata().map_err(|error| refused(errno_of(&error)))?;
    for file in [Some(&buffered), direct.as_ref()].into_iter().flatten() {
        let opened = file.metadata().map_err(|error| refused(errno_of(&error)))?;
        if (opened.dev(), opened.ino(), opened.rdev()) != (seen.dev(), seen.ino(), seen.rdev()) {
            return Err(Error::refused(
                Refusal::InUse,
                operation,
                locator.as_str(),
                "it was replaced by another file while it was being opened",
            )
            .advise("try again"));
        }
    }
    Ok(OpenedPair { buffered, direct, metadata, announced: None })
}

/// Refuse what holds no disk.
pub(super) fn refuse_non_disk(operation: Operation, locator: &Locator, metadata: &Metadata) -> Result<()> {
    let kind = metadata.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "it is a directory"
    } else if kind.is_char_device() {
        "it is a character device"
    } else if kind.is_fifo() {
        "it is a FIFO"
    } else if kind.is_socket() {
        "it is a socket"
    } else {
        "it is neither a file nor a block device"
    };
    Err(Error::refused(Refusal::NotADisk, operation, locator.as_str(), what)
        .advise("name a regular file or a block device"))
}

/// The refusal of a block device of no length: a loop or network device that is attached to nothing, a drive without a medium. A copy of it would
/// make an old backup empty, and call that complete. (A file may be empty.)
pub(super) fn no_length(operation: Operation, locator: &Locator) -> Error {
    let reason = "the device has no length: nothing is attached to it, or no medium is in it";
    Error::refused(Refusal::NotFound, operation, locator.as_str(), reason)
        .advise("see with lsblk which device it is that holds the disk, and attach it")
}

/// Refuse a format that this version does not read or write.
pub(super) fn refuse_format(operation: Operation, locator: &Locator, format: Format) -> Result<()> {
    match format {
        Format::Raw => Ok(()),
        Format::Qcow2 => {
            let advice = if operation == Operation::OpenSource {
                "convert it with `qemu-img convert -O raw` first"
            } else {
                "copy to a raw target and convert that with `qemu-img convert -O qcow2`"
            };
            Err(Error::refused(
                Refusal::Unsupported,
                operation,
                locator.as_str(),
                "the format qcow2 is not supported yet",
            )
            .advise(advice))
        }
    }
}

/// Length of an open file or block device.
pub(super) fn length_of(file: &File, metadata: &Metadata) -> std::result::Result<u64, Errno> {
    if metadata.file_type().is_block_device() { sys::device_length(file.as_fd()) } else { Ok(metadata.len()) }
}

/// The image format whose mark stands at the beginning of what is open as raw. A hint for people and nothing else: a guest can write any mark
/// into its disk. What cannot be read begins like nothing; whoever copies it will be told.
pub(super) fn image_in(file: &File) -> Option<&'static str> {
    let mut mark = [0; QCOW2_MARK.len()];
    (file.read_exact_at(&mut mark, 0).is_ok() && mark == *QCOW2_MARK).then_some("qcow2")
}

/// A line for a disk without direct I/O.
pub(super) fn warn_of_buffered(locator: &Locator, storage: &dyn Storage) -> Option<String> {
    storage.limits().direct_alignment.is_none().then(|| {
        format!("{locator}: direct I/O is refused here; using the page cache and dropping it behind the copy")
    })
}

/// The system's number of an error of the standard library.
pub(crate) fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw)
}
