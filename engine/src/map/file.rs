//! The map file on disk: found, locked, read, replaced.
//!
//! # The lock
//! Two runs must not share a map. A lock belongs to an inode, and every new version of the map is a new inode; so the next
//! version is locked before it gets the map's name, and whoever opens a map checks, once it has the lock, that
//! the name still means what it has locked. For a copy that has no map yet an empty file stands in until the first
//! one is published; it goes again if none ever is. So an empty map file is one of a new copy.
//!
//! # Replacing it
//! Written beside it under another name, synced, renamed, the directory synced. A crash leaves the old map or the new one,
//! and perhaps the other file, which the next run overwrites.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{AccessFlags, UnlinkatFlags, faccessat, fsync, unlinkat};
use parking_lot::Mutex;

use super::{MAX_BYTES, Map, MapError};
use crate::error::{Error, ErrorKind, Operation, Refusal, Result};
use crate::storage::locator::Place;
use crate::storage::lock::{self, Lock};
use crate::storage::open::errno_of;
use crate::storage::prepare::open_directory;
use crate::storage::topology::{self, Node};
use crate::storage::{Document, Locator, OpenedSource};

/// Longest file name of Linux's file systems, in bytes.
const MAX_NAME: usize = 255;
const TEMPORARY_SUFFIX: &str = ".engine-cli-new";
/// How often another run may replace a map between opening and locking it.
const OPEN_ATTEMPTS: usize = 8;

/// A map file in use. See the module's header.
#[derive(Debug)]
pub struct MapFile {
    path: String,
    directory: File,
    name: OsString,
    map: Option<Map>,
    current: Mutex<Current>,
}

/// The version of the file that has the map's name.
#[derive(Debug)]
struct Current {
    /// Open for its lock.
    locked: File,
    /// It is empty, created by this run, and nothing was published yet.
    stands_in: bool,
}

impl MapFile {
    /// Open the map file at `path` for a copy of `source` to `target`: an existing one to go on with the copy that it
    /// tells of, else a new one.
    ///
    /// # Errors
    /// Refusals only: no such directory, not a map, damaged, from a newer version, in use by another run, or the source or
    /// the target itself.
    pub fn open(path: &str, source: &OpenedSource, target: &Locator) -> Result<Self> {
        let wanted = Path::new(path);
        let refused = |errno| Error::refused_by_system(Operation::UseMap, path, errno);
        let (parent, name) = match std::fs::metadata(wanted) {
            Ok(metadata) => {
                refuse_disks(path, &metadata, source, target)?;
                split(&std::fs::canonicalize(wanted).map_err(|error| refused(errno_of(&error)))?)
            }
            Err(error) if errno_of(&error) == Errno::ENOENT => {
                refuse_missing_target(path, target)?;
                split(wanted)
            }
            Err(error) => return Err(refused(errno_of(&error))),
        }
        .filter(|(_, name)| !path.ends_with('/') && name.len() + TEMPORARY_SUFFIX.len() < MAX_NAME)
        .ok_or_else(|| {
            refuse(path, Refusal::BadArgument, "it is no name for a file", "choose another name")
        })?;
        let directory = open_directory(&parent).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR => refuse(
                path,
                Refusal::NotFound,
                &format!("the directory {} does not exist", parent.display()),
                "create it first, or check the path",
            ),
            _ => refused(errno),
        })?;
        let writable = AccessFlags::W_OK | AccessFlags::X_OK;
        faccessat(&directory, ".", writable, AtFlags::AT_EACCESS).map_err(refused)?;
        let current = open_locked(path, &directory, &name)?;
        let map = read_map(path, &current)?;
        let current = Mutex::new(current);
        Ok(Self { path: path.to_owned(), directory, name, map, current })
    }

    /// The map that was found; `None` for a new copy.
    #[must_use]
    pub fn map(&self) -> Option<&Map> {
        self.map.as_ref()
    }

    /// The file, as the user wrote it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    fn temporary(&self) -> OsString {
        temporary_of(&self.name)
    }

    /// Write, sync and lock the next version under its temporary name.
    fn write_next(&self, contents: &[u8]) -> std::result::Result<File, Errno> {
        let name = self.temporary();
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let create = || openat(&self.directory, name.as_os_str(), flags, private());
        let mut file = File::from(match create() {
            Err(Errno::EEXIST) => {
                unlinkat(&self.directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
                create()?
            }
            other => other?,
        });
        if lock::exclusive(&file)? == Lock::Busy {
            return Err(Errno::EBUSY);
        }
        file.write_all(contents).and_then(|()| file.sync_all()).map_err(|error| errno_of(&error))?;
        Ok(file)
    }

    fn replace(&self, contents: &[u8]) -> std::result::Result<(), Errno> {
        let temporary = self.temporary();
        let replaced = self.write_next(contents).and_then(|next| {
            renameat(&self.directory, temporary.as_os_str(), &self.directory, self.name.as_os_str())?;
            Ok(next)
        });
        match replaced {
            Ok(next) => *self.current.lock() = Current { locked: next, stands_in: false },
            Err(errno) => {
                // The failure to report is the first one; a file that stays is overwritten by the next attempt.
                unlinkat(&self.directory, temporary.as_os_str(), UnlinkatFlags::NoRemoveDir).ok();
                return Err(errno);
            }
        }
        // From here on the new map has the name; that this is durable is not sure unless this succeeds.
        fsync(&self.directory)
    }

    fn remove(&self) -> std::result::Result<(), Errno> {
        match unlinkat(&self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
        self.current.lock().stands_in = false;
        fsync(&self.directory)
    }
}

impl Document for MapFile {
    fn publish(&self, contents: Option<&[u8]>) -> std::result::Result<(), Errno> {
        match contents {
            Some(contents) => self.replace(contents),
            None => self.remove(),
        }
    }
}

impl Drop for MapFile {
    fn drop(&mut self) {
        let current = self.current.get_mut();
        if current.stands_in && has_name(&self.directory, &self.name, &current.locked) == Ok(true) {
            // Nothing depends on it: an empty file that stays is taken for a new map.
            unlinkat(&self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir).ok();
        }
    }
}

fn private() -> Mode {
    Mode::S_IRUSR | Mode::S_IWUSR
}

fn temporary_of(name: &OsStr) -> OsString {
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(TEMPORARY_SUFFIX);
    temporary
}

fn refuse(path: &str, refusal: Refusal, reason: &str, advice: &'static str) -> Error {
    Error::refused(refusal, Operation::UseMap, path, reason.to_owned()).advise(advice)
}

/// Directory and name.
fn split(path: &Path) -> Option<(PathBuf, OsString)> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some((parent.to_owned(), path.file_name()?.to_owned()))
}

/// Refuse an existing path that is no regular file, or is one of the disks.
fn refuse_disks(path: &str, metadata: &Metadata, source: &OpenedSource, target: &Locator) -> Result<()> {
    if !metadata.is_file() {
        return Err(refuse(
            path,
            Refusal::BadArgument,
            "it is not a regular file",
            "name a file, or one that does not exist yet",
        ));
    }
    let target = match target.place() {
        Place::Path(target) => std::fs::metadata(target).ok().map(|metadata| Node::of(&metadata)),
        Place::Null { .. } => None,
    };
    for (side, node) in [("source", source.node()), ("target", target)] {
        if node.is_some_and(|node| topology::overlap(node, Node::of(metadata))) {
            return Err(refuse(
                path,
                Refusal::SameDisk,
                &format!("it is the {side} of the copy"),
                "choose another name",
            ));
        }
    }
    Ok(())
}

/// Refuse a map of the very name that the target will have, when neither exists.
fn refuse_missing_target(path: &str, target: &Locator) -> Result<()> {
    let Place::Path(target) = target.place() else { return Ok(()) };
    let resolved = |path: &Path| {
        let (parent, name) = split(path)?;
        Some((std::fs::canonicalize(parent).ok()?, name))
    };
    match (resolved(Path::new(path)), resolved(target)) {
        (Some(map), Some(target)) if map == target => {
            Err(refuse(path, Refusal::SameDisk, "it is the target of the copy", "choose another name"))
        }
        _ => Ok(()),
    }
}

/// Open or create the file and lock it. See the module's header.
fn open_locked(path: &str, directory: &File, name: &OsStr) -> Result<Current> {
    let refused = |errno| match errno {
        Errno::ELOOP => {
            refuse(path, Refusal::NotFound, "it is a symbolic link to nothing", "remove the link")
        }
        _ => Error::refused_by_system(Operation::UseMap, path, errno),
    };
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    for _ in 0..OPEN_ATTEMPTS {
        let (opened, stands_in) = match openat(directory, name, flags, Mode::empty()) {
            Err(Errno::ENOENT) => {
                (openat(directory, name, flags | OFlag::O_CREAT | OFlag::O_EXCL, private()), true)
            }
            other => (other, false),
        };
        let locked = match opened {
            Ok(file) => File::from(file),
            Err(Errno::EEXIST) => continue,
            Err(errno) => return Err(refused(errno)),
        };
        let lock = lock::exclusive(&locked).map_err(refused)?;
        if !has_name(directory, name, &locked).map_err(refused)? {
            continue;
        }
        if lock == Lock::Busy {
            break;
        }
        return Ok(Current { locked, stands_in });
    }
    Err(refuse(
        path,
        Refusal::InUse,
        "another copy is using it",
        "wait until that has ended, or name another map file",
    ))
}

/// Whether the name still means this file.
fn has_name(directory: &File, name: &OsStr, file: &File) -> std::result::Result<bool, Errno> {
    let open = file.metadata().map_err(|error| errno_of(&error))?;
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(named) => Ok((named.st_dev, named.st_ino) == (open.dev(), open.ino())),
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The map in a file; `None` where it is empty.
fn read_map(path: &str, current: &Current) -> Result<Option<Map>> {
    let mut bytes = Vec::new();
    let limit = MAX_BYTES as u64 + 1;
    (&current.locked)
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::refused_by_system(Operation::UseMap, path, errno_of(&error)))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    Map::decode(&bytes).map(Some).map_err(|error| {
        let advice = match &error {
            MapError::NotAMap | MapError::TooLarge => "name a map file, or one that does not exist yet",
            MapError::NewerVersion(_) => {
                "go on with the version that wrote it, or remove it to copy everything again"
            }
            MapError::Damaged(_) | MapError::Invalid(_) => "remove it to copy everything again",
        };
        Error::new(ErrorKind::MapRefused, Operation::UseMap, path, error.to_string())
            .advise(advice)
            .because(error)
    })
}
