//! The steps of [`super::TargetPlan::prepare`] that change something, each of which undoes itself where it can.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::identity::{DiskId, Identity};
use super::locator::Locator;
use super::lock::{self, Lock};
use super::open::{OpenedPair, errno_of};
use crate::error::{Error, Operation, Refusal, Result};
use crate::units::Length;

/// Where a new file will be.
#[derive(Debug)]
pub(super) struct NewPlace {
    pub(super) directory: File,
    pub(super) name: OsString,
    pub(super) path: PathBuf,
    pub(super) mode: u32,
}

/// A file that this copy created.
pub(super) struct NewFile {
    directory: File,
    name: OsString,
    device: u64,
    inode: u64,
}

impl NewFile {
    /// Remove it if its name still means it; whether it was removed.
    pub(super) fn discard(&self) -> std::result::Result<bool, Errno> {
        let present = match fstatat(&self.directory, self.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(present) => present,
            Err(Errno::ENOENT) => return Ok(false),
            Err(errno) => return Err(errno),
        };
        if (present.st_dev, present.st_ino) != (self.device, self.inode) {
            return Ok(false);
        }
        unlinkat(&self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
        nix::unistd::fsync(&self.directory)?;
        Ok(true)
    }

    /// The error to report when the file cannot be used after all.
    pub(super) fn discard_after(&self, locator: &Locator, error: Error) -> Error {
        match self.discard() {
            Ok(_) => error,
            Err(errno) => Error::io(Operation::Remove, locator.as_str(), None, errno)
                .advise("remove it by hand: it is new and empty")
                .because(error),
        }
    }
}

pub(crate) fn open_directory(path: &Path) -> std::result::Result<File, Errno> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY).open(path).map_err(|error| errno_of(&error))
}

/// See whether an existing file can have that length; it is as it was afterwards.
pub(super) fn try_length(locator: &Locator, pair: &OpenedPair, length: Length) -> Result<()> {
    let before = pair.metadata.len();
    if length.0 <= before {
        return Ok(());
    }
    let refused = |error: std::io::Error| {
        Error::refused_by_system(Operation::Resize, locator.as_str(), errno_of(&error))
    };
    pair.buffered.set_len(length.0).and_then(|()| pair.buffered.set_len(before)).map_err(refused)
}

/// Empty an existing file and give it its length. It is lengthened first: what the file system cannot hold is refused
/// while the old contents are still there.
pub(super) fn empty(locator: &Locator, pair: &OpenedPair, length: Length) -> Result<()> {
    let file = &pair.buffered;
    let refused = |error: std::io::Error| {
        Error::refused_by_system(Operation::Resize, locator.as_str(), errno_of(&error))
    };
    let failed =
        |error: std::io::Error| Error::io(Operation::Resize, locator.as_str(), None, errno_of(&error));
    if length.0 > pair.metadata.len() {
        file.set_len(length.0).map_err(refused)?;
    }
    file.set_len(0).map_err(refused)?;
    file.set_len(length.0).and_then(|()| file.sync_all()).map_err(failed)
}

/// The identity of a file whose length has just been set.
pub(super) fn identify(
    locator: &Locator,
    path: &Path,
    pair: &mut OpenedPair,
    length: Length,
) -> Result<Identity> {
    let failed = |errno| Error::io(Operation::Inspect, locator.as_str(), None, errno);
    pair.metadata = pair.buffered.metadata().map_err(|error| failed(errno_of(&error)))?;
    if pair.metadata.len() != length.0 {
        return Err(Error::io(Operation::Resize, locator.as_str(), None, Errno::EIO));
    }
    let identity = Identity::of(path, &pair.buffered, &pair.metadata, length, false);
    debug_assert!(matches!(identity.disk, DiskId::File { .. }));
    Ok(identity)
}

/// Create a new file of `length` bytes, durably; whatever fails, nothing is left behind.
pub(super) fn create(
    locator: &Locator,
    place: NewPlace,
    length: Length,
) -> Result<(OpenedPair, Identity, NewFile)> {
    let refused = |errno| match errno {
        Errno::EEXIST => Error::refused(
            Refusal::Exists,
            Operation::Create,
            locator.as_str(),
            "another program has created it meanwhile",
        )
        .advise("choose another name"),
        _ => Error::refused_by_system(Operation::Create, locator.as_str(), errno),
    };
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let mode = Mode::from_bits_truncate(place.mode);
    let file = File::from(openat(&place.directory, place.name.as_os_str(), flags, mode).map_err(refused)?);
    let metadata = file.metadata().map_err(|error| refused(errno_of(&error)))?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let new_file = NewFile { directory: place.directory, name: place.name, device, inode };
    let filled = fill_new(&new_file, &file, length).map_err(refused).and_then(|direct| {
        let mut pair = OpenedPair { buffered: file, direct, metadata };
        let identity = identify(locator, &place.path, &mut pair, length)?;
        Ok((pair, identity))
    });
    match filled {
        Ok((pair, identity)) => Ok((pair, identity, new_file)),
        Err(error) => Err(new_file.discard_after(locator, error)),
    }
}

/// Lock a new file, give it its length, make it and its name durable, and open it for direct I/O.
fn fill_new(new: &NewFile, file: &File, length: Length) -> std::result::Result<Option<File>, Errno> {
    if lock::exclusive(file)? == Lock::Busy {
        return Err(Errno::EBUSY);
    }
    let errno = |error: std::io::Error| errno_of(&error);
    file.set_len(length.0).map_err(errno)?;
    file.sync_all().map_err(errno)?;
    nix::unistd::fsync(&new.directory)?;
    let flags = OFlag::O_RDWR | OFlag::O_DIRECT | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let direct = match openat(&new.directory, new.name.as_os_str(), flags, Mode::empty()) {
        Ok(direct) => File::from(direct),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let metadata = direct.metadata().map_err(errno)?;
    if (metadata.dev(), metadata.ino()) == (new.device, new.inode) {
        Ok(Some(direct))
    } else {
        Err(Errno::EBUSY)
    }
}
