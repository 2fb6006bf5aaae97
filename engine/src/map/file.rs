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
//! and perhaps the other file, which the next run removes. It removes nothing else that has that name: what is not the beginning
//! of a map, or is one of the disks, is refused. A map that somebody has removed is written anew, but not where another run has put
//! one meanwhile.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{AccessFlags, UnlinkatFlags, faccessat, unlinkat};
use parking_lot::Mutex;

use super::{MAGIC, MAX_BYTES, Map, MapError};
use crate::error::{Error, ErrorKind, Operation, Refusal, Result};
use crate::storage::locator::Place;
use crate::storage::lock::{self, Lock};
use crate::storage::open::errno_of;
use crate::storage::prepare::{open_directory, sync_directory};
use crate::storage::topology::{self, Node};
use crate::storage::{Document, Locator, OpenedSource, Published};

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
    found_empty: bool,
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
    /// Open the map file `wanted` for a copy of `source` to `target`: an existing one to go on with the copy that it
    /// tells of, else a new one.
    ///
    /// # Errors
    /// Refusals only: no such directory, not a map, damaged, from a newer version, in use by another run, or the source or
    /// the target itself, also by the name under which its next version is written.
    pub fn open(wanted: &Path, source: &OpenedSource, target: &Locator) -> Result<Self> {
        let text = wanted.to_string_lossy();
        let path = &*text;
        let refused = |errno| Error::refused_by_system(Operation::UseMap, path, errno);
        let (parent, name) = match std::fs::metadata(wanted) {
            Ok(metadata) => {
                refuse_disks(path, &metadata, &Disks { source, target })?;
                split(&std::fs::canonicalize(wanted).map_err(|error| refused(errno_of(&error)))?)
            }
            Err(error) if errno_of(&error) == Errno::ENOENT => {
                if is_name_of(wanted, target) {
                    return Err(same_disk(path, "it", "target"));
                }
                split(wanted)
            }
            Err(error) => return Err(refused(errno_of(&error))),
        }
        .filter(|(_, name)| {
            !path.ends_with('/') && !is_temporary(name) && name.len() + TEMPORARY_SUFFIX.len() < MAX_NAME
        })
        .ok_or_else(|| {
            refuse(path, Refusal::BadArgument, "it is no name for a map file", "choose another name")
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
        refuse_temporary(path, &parent, (&directory, &temporary_of(&name)), &Disks { source, target })?;
        let current = open_locked(path, &directory, &name)?;
        let map = read_map(path, &current)?;
        let found_empty = map.is_none() && !current.stands_in;
        let current = Mutex::new(current);
        Ok(Self { path: path.to_owned(), directory, name, map, found_empty, current })
    }

    /// The map that was found; `None` for a new copy.
    #[must_use]
    pub fn map(&self) -> Option<&Map> {
        self.map.as_ref()
    }

    /// Whether the file existed without anything in it: that of a copy that was killed early, or one cut off by something else.
    pub(crate) fn was_found_empty(&self) -> bool {
        self.found_empty
    }

    /// The file, as the user wrote it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    fn temporary(&self) -> OsString {
        temporary_of(&self.name)
    }

    /// Write, sync and lock the next version under its temporary name. Where that fails the name is free again, unless it belongs to
    /// something else.
    fn write_next(&self, contents: &[u8]) -> std::result::Result<File, Errno> {
        let name = self.temporary();
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let create = || openat(&self.directory, name.as_os_str(), flags, private());
        let file = File::from(match create() {
            Err(Errno::EEXIST) => {
                if !is_leftover(&self.directory, &name)? {
                    return Err(Errno::EEXIST);
                }
                unlinkat(&self.directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
                create()?
            }
            other => other?,
        });
        match fill(&file, contents) {
            Ok(()) => Ok(file),
            Err(errno) => {
                self.remove_temporary();
                Err(errno)
            }
        }
    }

    /// The failure to report is the one that made it useless; a file that stays is overwritten by the next attempt.
    fn remove_temporary(&self) {
        unlinkat(&self.directory, self.temporary().as_os_str(), UnlinkatFlags::NoRemoveDir).ok();
    }

    /// Whether a version like `contents` could be published: it is written and synced as for that, and goes again.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn rehearse(&self, contents: &[u8]) -> std::result::Result<(), Errno> {
        self.write_next(contents)?;
        unlinkat(&self.directory, self.temporary().as_os_str(), UnlinkatFlags::NoRemoveDir)
    }

    fn replace(&self, contents: &[u8]) -> std::result::Result<(), Errno> {
        if self.is_anothers()? {
            return Err(Errno::EEXIST);
        }
        let next = self.write_next(contents)?;
        if let Err(errno) = self.give_name() {
            self.remove_temporary();
            return Err(errno);
        }
        *self.current.lock() = Current { locked: next, stands_in: false };
        // From here on the new map has the name; that this is durable is not sure unless this succeeds.
        sync_directory(&self.directory)
    }

    /// Put the next version in the place of the last one, and in nobody else's: writing it took its time.
    fn give_name(&self) -> std::result::Result<(), Errno> {
        let (temporary, name) = (self.temporary(), self.name.as_os_str());
        let is_free = name_of(&self.directory, &self.name)?.is_none();
        if !is_free && self.is_anothers()? {
            return Err(Errno::EEXIST);
        }
        let flags = if is_free { RenameFlags::RENAME_NOREPLACE } else { RenameFlags::empty() };
        match renameat2(&self.directory, temporary.as_os_str(), &self.directory, name, flags) {
            // File systems without it (NFS, some of FUSE).
            Err(Errno::EINVAL | Errno::ENOSYS) if is_free => {
                renameat(&self.directory, temporary.as_os_str(), &self.directory, name)
            }
            other => other,
        }
    }

    /// Whether its name means another file by now: somebody has removed the map, and another run has one there.
    fn is_anothers(&self) -> std::result::Result<bool, Errno> {
        let Some(named) = name_of(&self.directory, &self.name)? else { return Ok(false) };
        let ours = self.current.lock().locked.metadata().map_err(|error| errno_of(&error))?;
        Ok(named != (ours.dev(), ours.ino()))
    }

    /// Whether its name still means the version that was published last. What cannot be asked is there.
    pub(crate) fn is_there(&self) -> bool {
        has_name(&self.directory, &self.name, &self.current.lock().locked) != Ok(false)
    }

    /// Remove the empty file that stands in for a first map, if it still does.
    pub(crate) fn remove_stand_in(&self) {
        let mut current = self.current.lock();
        if current.stands_in && has_name(&self.directory, &self.name, &current.locked) == Ok(true) {
            // Nothing depends on it: an empty file that stays is taken for a new map.
            unlinkat(&self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir).ok();
        }
        current.stands_in = false;
    }

    fn remove(&self) -> std::result::Result<Published, Errno> {
        if self.is_anothers()? {
            return Err(Errno::EEXIST);
        }
        match unlinkat(&self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
        self.current.lock().stands_in = false;
        Ok(sync_directory(&self.directory).map_or_else(Published::Unsynced, |()| Published::Durably))
    }
}

impl Document for MapFile {
    fn publish(&self, contents: Option<&[u8]>) -> std::result::Result<Published, Errno> {
        match contents {
            Some(contents) => self.replace(contents).map(|()| Published::Durably),
            None => self.remove(),
        }
    }
}

impl Drop for MapFile {
    fn drop(&mut self) {
        self.remove_stand_in();
    }
}

/// Lock a new file, write its contents and bring them to the disk.
fn fill(mut file: &File, contents: &[u8]) -> std::result::Result<(), Errno> {
    if lock::exclusive(file)? == Lock::Busy {
        return Err(Errno::EBUSY);
    }
    file.write_all(contents).and_then(|()| file.sync_all()).map_err(|error| errno_of(&error))
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

/// Whether some map's next version is written under this name.
fn is_temporary(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b".") && name.ends_with(TEMPORARY_SUFFIX.as_bytes())
}

fn refuse(path: &str, refusal: Refusal, reason: &str, advice: &'static str) -> Error {
    Error::refused(refusal, Operation::UseMap, path, reason.to_owned()).advise(advice)
}

/// Directory and name.
fn split(path: &Path) -> Option<(PathBuf, OsString)> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some((parent.to_owned(), path.file_name()?.to_owned()))
}

/// What is copied, and where to.
struct Disks<'a> {
    source: &'a OpenedSource,
    target: &'a Locator,
}

impl Disks<'_> {
    /// Which of the two lies in the file, if one does.
    fn in_file(&self, metadata: &Metadata) -> Option<&'static str> {
        let target = match self.target.place() {
            Place::Path(target) => std::fs::metadata(target).ok().map(|metadata| Node::of(&metadata)),
            Place::Null { .. } | Place::Nbd(_) => None,
        };
        let file = Node::of(metadata);
        let lies_in = |disk: Option<Node>| disk.is_some_and(|disk| topology::overlap(disk, file));
        let sides = [("source", self.source.node()), ("target", target)];
        sides.into_iter().find_map(|(side, disk)| lies_in(disk).then_some(side))
    }
}

fn same_disk(path: &str, what: &str, side: &str) -> Error {
    refuse(path, Refusal::SameDisk, &format!("{what} is the {side} of the copy"), "choose another name")
}

/// Refuse an existing path that is no regular file, or is one of the disks.
fn refuse_disks(path: &str, metadata: &Metadata, disks: &Disks<'_>) -> Result<()> {
    if !metadata.is_file() {
        return Err(refuse(
            path,
            Refusal::BadArgument,
            "it is not a regular file",
            "name a file, or one that does not exist yet",
        ));
    }
    match disks.in_file(metadata) {
        Some(side) => Err(same_disk(path, "it", side)),
        None => Ok(()),
    }
}

/// Whether a file that does not exist has the very name that the target will have.
fn is_name_of(path: &Path, target: &Locator) -> bool {
    let Place::Path(target) = target.place() else { return false };
    let resolved = |path: &Path| {
        let (parent, name) = split(path)?;
        Some((std::fs::canonicalize(parent).ok()?, name))
    };
    resolved(path).is_some_and(|path| resolved(target) == Some(path))
}

/// Refuse a map whose next version would be written over something else: what has its temporary name is removed for that.
fn refuse_temporary(
    path: &str,
    parent: &Path,
    (directory, name): (&File, &OsStr),
    disks: &Disks<'_>,
) -> Result<()> {
    let what = format!("its next version is written as {}, which", name.to_string_lossy());
    let refused = |errno| Error::refused_by_system(Operation::UseMap, path, errno);
    let temporary = parent.join(name);
    match std::fs::symlink_metadata(&temporary) {
        Ok(metadata) => {
            if let Some(side) = disks.in_file(&metadata) {
                return Err(same_disk(path, &what, side));
            }
            if is_leftover(directory, name).map_err(refused)? {
                return Ok(());
            }
            let advice = "choose another name, or move that file away";
            Err(refuse(path, Refusal::Exists, &format!("{what} exists and is no part of a map"), advice))
        }
        Err(error) if errno_of(&error) == Errno::ENOENT => {
            if is_name_of(&temporary, disks.target) {
                Err(same_disk(path, &what, "target"))
            } else {
                Ok(())
            }
        }
        Err(error) => Err(refused(errno_of(&error))),
    }
}

/// Whether what has a temporary name is what was left of a version that did not get its map's name: the beginning of a map, however
/// short. (No map has such a name, so it is none that is needed.)
fn is_leftover(directory: &File, name: &OsStr) -> std::result::Result<bool, Errno> {
    let kind = match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(found) => found.st_mode & libc::S_IFMT,
        // Another run has just given it its map's name.
        Err(Errno::ENOENT) => return Ok(true),
        Err(errno) => return Err(errno),
    };
    if kind != libc::S_IFREG {
        return Ok(false);
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match openat(directory, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT) => return Ok(true),
        Err(errno) => return Err(errno),
    };
    let mut start = Vec::new();
    file.take(MAGIC.len() as u64).read_to_end(&mut start).map_err(|error| errno_of(&error))?;
    Ok(MAGIC.as_bytes().starts_with(&start))
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
    Ok(name_of(directory, name)? == Some((open.dev(), open.ino())))
}

/// Device and inode of what has the name; `None`: nothing has.
fn name_of(directory: &File, name: &OsStr) -> std::result::Result<Option<(u64, u64)>, Errno> {
    match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(named) => Ok(Some((named.st_dev, named.st_ino))),
        Err(Errno::ENOENT) => Ok(None),
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
                "go on with the version that wrote it, or remove the map file and add --force to copy everything again"
            }
            MapError::Damaged(_) | MapError::Invalid(_) => "remove the map file and add --force to copy everything again",
        };
        Error::new(ErrorKind::MapRefused, Operation::UseMap, path, error.to_string())
            .advise(advice)
            .because(error)
    })
}
