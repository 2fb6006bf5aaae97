//! Opening a fleece file: a place of its own for the old contents of what guests change while a job runs.
//!
//! # Rules
//! - A path that does not exist becomes a new file, which loses its name at once: nothing is left of it however the program ends. An empty
//!   regular file is taken as well, and loses its name when the job has started. Anything else that exists is refused, but a block
//!   device: that must be free as a target must be.
//! - It shares no byte with the disk or the target, by whatever name.
//! - The space of a file is reserved before the job starts: a fleece file that runs out of space would hold up the guests that it is there
//!   for.
//! - When it is refused nothing is changed; what was created is gone.

use std::borrow::Cow;
use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::fstatvfs;

use super::locator::{Locator, Place};
use super::lock::{self, Lock};
use super::open::{
    Access, OpenedPair, OpenedSource, errno_of, length_of, no_length, open_both, refuse_non_disk,
};
use super::topology::{self, Node};
use super::{Storage, TargetPlan};
use crate::error::{Error, Operation, Refusal, Result};
use crate::units::Length;

const OPERATION: Operation = Operation::OpenFleece;

/// A fleece file that may be used. Until [`Self::keep`], dropping it leaves everything as it was.
pub(crate) struct OpenedFleece {
    storage: Arc<dyn Storage>,
    /// An existing file that was taken: it, and its name.
    taken: Option<(File, Locator)>,
    length: Length,
}

impl OpenedFleece {
    /// To use it.
    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }

    /// Bytes of it to be used.
    pub(crate) fn length(&self) -> Length {
        self.length
    }

    /// The job has started: an existing file that was taken loses its name.
    ///
    /// # Errors
    /// The system's, with nothing changed.
    pub(crate) fn keep(&mut self) -> Result<()> {
        let Some((file, locator)) = self.taken.take() else { return Ok(()) };
        let Place::Path(path) = locator.place() else { unreachable!("a file has a path") };
        match remove_if_same(path, &file) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let reason = "another file is there by now; that one stays";
                Err(Error::refused(Refusal::InUse, OPERATION, locator.as_str(), reason))
            }
            Err(error) => {
                let errno = errno_of(&error);
                self.taken = Some((file, locator.clone()));
                Err(Error::refused_by_system(OPERATION, locator.as_str(), errno))
            }
        }
    }
}

/// Remove the name `path` of `file`. `false`: it is that of another one.
fn remove_if_same(path: &Path, file: &File) -> std::io::Result<bool> {
    let (now, ours) = (std::fs::metadata(path)?, file.metadata()?);
    let same = (now.dev(), now.ino()) == (ours.dev(), ours.ino());
    if same {
        std::fs::remove_file(path)?;
    }
    Ok(same)
}

impl OpenedFleece {
    /// The job runs: whatever becomes of its name, the file is in use.
    pub(crate) fn in_use(&mut self) {
        self.taken = None;
    }
}

impl Drop for OpenedFleece {
    fn drop(&mut self) {
        if let Some((file, locator)) = &self.taken
            && let Err(error) = file.set_len(0)
        {
            tracing::warn!(%locator, %error, "the fleece file was not emptied again");
        }
    }
}

/// Open a fleece file of `size` bytes (of a device, at most that many) for a copy of `source` to `target`.
///
/// # Errors
/// Refusals only; see the module's header.
pub(crate) fn open_fleece(
    locator: &Locator,
    size: u64,
    source: &OpenedSource,
    target: &TargetPlan,
) -> Result<OpenedFleece> {
    let Place::Path(path) = locator.place() else {
        let reason = "a null disk keeps nothing";
        return Err(Error::refused(Refusal::NotADisk, OPERATION, locator.as_str(), reason)
            .advise("name a file or a block device"));
    };
    match std::fs::metadata(path) {
        Ok(seen) => {
            refuse_non_disk(OPERATION, locator, &seen)?;
            refuse_overlap(locator, &seen, source.node(), "disk")?;
            refuse_overlap(locator, &seen, target.node(), "target")?;
            if seen.file_type().is_block_device() {
                open_device(locator, path, &seen, size)
            } else {
                open_empty(locator, path, &seen, size)
            }
        }
        Err(error) if errno_of(&error) == Errno::ENOENT => {
            if target.will_be_at(path) {
                return Err(same_disk(locator, "it is the target of the copy"));
            }
            create(locator, path, size)
        }
        Err(error) => Err(Error::refused_by_system(OPERATION, locator.as_str(), errno_of(&error))),
    }
}

fn refuse_overlap(locator: &Locator, seen: &Metadata, other: Option<Node>, what: &str) -> Result<()> {
    let node = Node::of(seen);
    let Some(other) = other.filter(|&other| other == node || topology::overlap(other, node)) else {
        return Ok(());
    };
    let is = if other == node { "it is the" } else { "it shares its bytes with the" };
    Err(same_disk(locator, format!("{is} {what} of the copy")))
}

fn same_disk(locator: &Locator, reason: impl Into<Cow<'static, str>>) -> Error {
    Error::refused(Refusal::SameDisk, OPERATION, locator.as_str(), reason)
        .advise("name a file or a device of its own")
}

fn open_device(locator: &Locator, path: &Path, seen: &Metadata, size: u64) -> Result<OpenedFleece> {
    let pair = open_both(OPERATION, locator, path, seen, Access::Claim)?;
    lock_it(locator, &pair.buffered)?;
    let refused = |errno| Error::refused_by_system(OPERATION, locator.as_str(), errno);
    let length = length_of(&pair.buffered, &pair.metadata).map_err(refused)?;
    if length == 0 {
        return Err(no_length(OPERATION, locator));
    }
    let storage = pair.into_storage(OPERATION, locator)?;
    Ok(OpenedFleece { storage, taken: None, length: Length(length.min(size)) })
}

fn open_empty(locator: &Locator, path: &Path, seen: &Metadata, size: u64) -> Result<OpenedFleece> {
    if seen.len() > 0 {
        return Err(Error::refused(Refusal::Exists, OPERATION, locator.as_str(), "it exists already")
            .advise("choose another name: a fleece file is made for one job, and holds nothing afterwards"));
    }
    let pair = open_both(OPERATION, locator, path, seen, Access::Write)?;
    lock_it(locator, &pair.buffered)?;
    let refused =
        |error: std::io::Error| Error::refused_by_system(OPERATION, locator.as_str(), errno_of(&error));
    let file = pair.buffered.try_clone().map_err(refused)?;
    if let Err(error) = reserve(locator, &pair.buffered, size) {
        pair.buffered.set_len(0).map_err(refused)?;
        return Err(error);
    }
    let storage = pair.into_storage(OPERATION, locator)?;
    Ok(OpenedFleece { storage, taken: Some((file, locator.clone())), length: Length(size) })
}

/// A new file, whose name is gone when this returns.
fn create(locator: &Locator, path: &Path, size: u64) -> Result<OpenedFleece> {
    let refused =
        |error: std::io::Error| Error::refused_by_system(OPERATION, locator.as_str(), errno_of(&error));
    let flags = libc::O_CLOEXEC | libc::O_NOFOLLOW;
    let buffered = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)
        .map_err(refused)?;
    let direct = match File::options().read(true).write(true).custom_flags(flags | libc::O_DIRECT).open(path)
    {
        Ok(direct) => Ok(Some(direct)),
        Err(error) if matches!(errno_of(&error), Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(error),
    };
    // Whatever comes now, nothing is left.
    std::fs::remove_file(path).map_err(refused)?;
    let direct = direct.map_err(refused)?;
    let metadata = buffered.metadata().map_err(refused)?;
    if let Some(direct) = &direct {
        let other = direct.metadata().map_err(refused)?;
        if (other.dev(), other.ino()) != (metadata.dev(), metadata.ino()) {
            let reason = "it was replaced by another file while it was being opened";
            return Err(Error::refused(Refusal::InUse, OPERATION, locator.as_str(), reason));
        }
    }
    reserve(locator, &buffered, size)?;
    let storage =
        OpenedPair { buffered, direct, metadata, announced: None }.into_storage(OPERATION, locator)?;
    Ok(OpenedFleece { storage, taken: None, length: Length(size) })
}

fn lock_it(locator: &Locator, file: &File) -> Result<()> {
    match lock::exclusive_patiently(file) {
        Ok(Lock::Held | Lock::Unsupported) => Ok(()),
        Ok(Lock::Busy) => {
            let reason = "another copy or a running machine has it locked";
            Err(Error::refused(Refusal::InUse, OPERATION, locator.as_str(), reason)
                .advise("wait until that has ended, or name another file"))
        }
        Err(errno) => Err(Error::refused_by_system(OPERATION, locator.as_str(), errno)),
    }
}

/// Give an empty file its length, and its space where the file system can.
fn reserve(locator: &Locator, file: &File, size: u64) -> Result<()> {
    let refused = |errno: Errno| {
        let error = Error::refused_by_system(OPERATION, locator.as_str(), errno);
        match errno {
            Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => Error::refused(
                Refusal::Unavailable,
                OPERATION,
                locator.as_str(),
                format!("its {} do not fit its file system", Length(size)),
            )
            .advise("free some space, ask for a smaller one, or name another place")
            .because(error),
            _ => error,
        }
    };
    // Reaching for more than this raises a signal.
    let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE).map_err(refused)?;
    if limit < size {
        return Err(refused(Errno::EFBIG));
    }
    // Asked first: a reservation that fails half-way has filled the file system for a moment, for everybody else on it.
    if fstatvfs(file).is_ok_and(|system| system.blocks_available() * system.fragment_size() < size) {
        return Err(refused(Errno::ENOSPC));
    }
    let length = libc::off_t::try_from(size).map_err(|_| refused(Errno::EFBIG))?;
    match fallocate(file.as_fd(), FallocateFlags::empty(), 0, length) {
        Ok(()) => Ok(()),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
            file.set_len(size).map_err(|error| refused(errno_of(&error)))
        }
        Err(errno) => Err(refused(errno)),
    }
}
