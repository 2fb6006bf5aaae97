//! The steps of [`super::TargetPlan::prepare`] that change something, each of which undoes itself where it can.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, Whence, lseek, unlinkat};

use super::identity::{DiskId, Identity};
use super::locator::Locator;
use super::open::{OpenedPair, errno_of};
use super::sharing::{self, Announced, Role, Taken};
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
        if let Err(errno) = sync_directory(&self.directory) {
            tracing::warn!(%errno, "a removed file may come back after a crash");
        }
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

/// Make the names in a directory durable. On a file system that cannot be asked for it, nothing better is to be had than the sync of a file itself.
pub(crate) fn sync_directory(directory: &File) -> std::result::Result<(), Errno> {
    durable_if_it_can(nix::unistd::fsync(directory))
}

fn durable_if_it_can(synced: std::result::Result<(), Errno>) -> std::result::Result<(), Errno> {
    match synced {
        Err(errno @ (Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS)) => {
            tracing::info!(%errno, "the file system does not sync directories");
            Ok(())
        }
        synced => synced,
    }
}

/// See whether the file system takes an existing file of that length, by a question that changes nothing of it, not even its times: a file may
/// be positioned at any length that it may have, and nowhere beyond. (Asking by lengthening it would leave its mark. What else could keep the file
/// from that length, a server with a limit of its own, shows when it is lengthened, which comes before it is emptied.)
pub(super) fn check_length(locator: &Locator, pair: &OpenedPair, length: Length) -> Result<()> {
    let refused = |errno| Error::refused_by_system(Operation::Resize, locator.as_str(), errno);
    let end = i64::try_from(length.0).map_err(|_| refused(Errno::EFBIG))?;
    // The descriptor is the engine's own, and nothing reads or writes at its position.
    match lseek(&pair.buffered, end, Whence::SeekSet) {
        Ok(_) => Ok(()),
        Err(Errno::EINVAL) => Err(refused(Errno::EFBIG)),
        Err(errno) => Err(refused(errno)),
    }
}

/// Empty an existing file and give it its length. It is lengthened first: what the file system cannot hold is refused
/// while the old contents are still there.
pub(super) fn empty(locator: &Locator, pair: &OpenedPair, length: Length) -> Result<()> {
    let file = &pair.buffered;
    empty_by(locator, pair.metadata.len(), length.0, |length| file.set_len(length))?;
    file.sync_all().map_err(|error| Error::io(Operation::Resize, locator.as_str(), None, errno_of(&error)))
}

/// The steps of [`empty`] for a file of `before` bytes. What fails with the old contents at their old length is a refusal.
fn empty_by(
    locator: &Locator,
    before: u64,
    length: u64,
    mut set_length: impl FnMut(u64) -> std::io::Result<()>,
) -> Result<()> {
    let refused = |error: std::io::Error| {
        Error::refused_by_system(Operation::Resize, locator.as_str(), errno_of(&error))
    };
    let failed =
        |error: std::io::Error| Error::io(Operation::Resize, locator.as_str(), None, errno_of(&error));
    let lengthened = length > before;
    if lengthened {
        set_length(length).map_err(refused)?;
    }
    if let Err(error) = set_length(0) {
        let is_as_before = !lengthened || set_length(before).is_ok();
        return Err(if is_as_before { refused(error) } else { failed(error) });
    }
    set_length(length).map_err(failed)
}

/// Whether [`lengthen`] has anything to do.
pub(super) fn will_lengthen(pair: &OpenedPair, length: Length) -> bool {
    pair.metadata.is_file() && pair.metadata.len() < length.0
}

/// Make the last sector of a file that stays where it is whole, if that is missing.
pub(super) fn lengthen(locator: &Locator, pair: &mut OpenedPair, length: Length) -> Result<()> {
    if !will_lengthen(pair, length) {
        return Ok(());
    }
    let refused = |error: std::io::Error| {
        Error::refused_by_system(Operation::Resize, locator.as_str(), errno_of(&error))
    };
    pair.buffered.set_len(length.0).and_then(|()| pair.buffered.sync_all()).map_err(refused)?;
    pair.metadata = pair.buffered.metadata().map_err(refused)?;
    Ok(())
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
    let filled = fill_new(&new_file, &file, length).map_err(refused).and_then(|(direct, announced)| {
        let mut pair = OpenedPair { buffered: file, direct, metadata, announced };
        let identity = identify(locator, &place.path, &mut pair, length)?;
        Ok((pair, identity))
    });
    match filled {
        Ok((pair, identity)) => Ok((pair, identity, new_file)),
        Err(error) => Err(new_file.discard_after(locator, error)),
    }
}

/// Lock a new file, give it its length, make it and its name durable, and open it for direct I/O.
fn fill_new(
    new: &NewFile,
    file: &File,
    length: Length,
) -> std::result::Result<(Option<File>, Option<Announced>), Errno> {
    let announced = match sharing::take(file, Role::Target)? {
        Taken::Held(announced) => Some(announced),
        Taken::Unsupported => None,
        Taken::Refused(_) => return Err(Errno::EBUSY),
    };
    let errno = |error: std::io::Error| errno_of(&error);
    file.set_len(length.0).map_err(errno)?;
    file.sync_all().map_err(errno)?;
    sync_directory(&new.directory)?;
    let flags = OFlag::O_RDWR | OFlag::O_DIRECT | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let direct = match openat(&new.directory, new.name.as_os_str(), flags, Mode::empty()) {
        Ok(direct) => File::from(direct),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok((None, announced)),
        Err(errno) => return Err(errno),
    };
    let metadata = direct.metadata().map_err(errno)?;
    if (metadata.dev(), metadata.ino()) == (new.device, new.inode) {
        Ok((Some(direct), announced))
    } else {
        Err(Errno::EBUSY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_file_system_that_syncs_no_directories_is_as_good_as_it_gets() {
        for errno in [Errno::EINVAL, Errno::EOPNOTSUPP] {
            assert_eq!(durable_if_it_can(Err(errno)), Ok(()));
        }
        assert_eq!(durable_if_it_can(Err(Errno::EIO)), Err(Errno::EIO));
    }

    /// Empty a file of `before` bytes for a copy of `length`, where setting some lengths fails the given number of times later; gives the
    /// file's length then and whether it was a refusal.
    fn empty_with(before: u64, length: u64, fails: impl Fn(usize, u64) -> bool) -> (u64, Option<bool>) {
        let (mut now, mut calls) = (before, 0);
        let result = empty_by(&Locator::path("b"), before, length, |wanted| {
            calls += 1;
            if fails(calls, wanted) {
                return Err(Errno::EIO.into());
            }
            now = wanted;
            Ok(())
        });
        (now, result.err().map(|error| error.is_refusal()))
    }

    #[test]
    fn what_cannot_be_emptied_is_refused_at_its_old_length_only() {
        assert_eq!(empty_with(10, 5, |_, _| false), (5, None));
        assert_eq!(empty_with(10, 50, |_, _| false), (50, None));
        assert_eq!(empty_with(10, 50, |call, _| call == 1), (10, Some(true)));
        assert_eq!(empty_with(10, 5, |_, length| length == 0), (10, Some(true)));
        assert_eq!(empty_with(10, 50, |_, length| length == 0), (10, Some(true)));
        assert_eq!(empty_with(10, 50, |call, _| call > 1), (50, Some(false)), "it is longer than it was");
        assert_eq!(empty_with(10, 5, |_, length| length == 5), (0, Some(false)));
    }

    #[test]
    fn a_length_is_asked_for_as_the_file_system_answers_and_leaves_no_mark() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("old");
        std::fs::write(&path, b"old contents").unwrap();
        let buffered = File::options().read(true).write(true).open(&path).unwrap();
        let metadata = buffered.metadata().unwrap();
        let pair = OpenedPair { buffered, direct: None, metadata, announced: None };
        let looks = || {
            let now = pair.buffered.metadata().unwrap();
            let times = (now.mtime(), now.mtime_nsec(), now.ctime(), now.ctime_nsec());
            (times, now.blocks(), std::fs::read(&path).unwrap())
        };
        let before = looks();
        // A clock that has gone on would show.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let scratch = tempfile::tempfile_in(directory.path()).unwrap();
        for length in [0, 12, 13, 1 << 30, (16 << 40) - 4096, 16 << 40, 1 << 60, 7 << 60, u64::MAX] {
            let checked = check_length(&Locator::path(&path), &pair, Length(length));
            assert_eq!(checked.is_ok(), scratch.set_len(length).is_ok(), "{length}: {checked:?}");
            assert!(checked.is_ok() || checked.unwrap_err().kind() == ErrorKind::Refused(Refusal::TooLarge));
            assert_eq!(looks(), before, "{length}");
        }
    }
}
