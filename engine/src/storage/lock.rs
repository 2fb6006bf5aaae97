//! Advisory locks: setting them, asking for them, and waiting for what is locked only for a moment.
//!
//! They are locks of the open file description, so they end with its last descriptor, also when the process is killed, and exclude within
//! a process as between two. Map and fleece files are locked over all of their bytes; what disks hold is in [`super::sharing`]. A
//! block device has an exclusive `flock` in addition, which tells udev not to probe it meanwhile.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::sys;

/// How long a disk may stay locked or claimed before it counts as in use: udev probes devices for a moment, and the kernel
/// lets go of the descriptors in a killed program's ring some time after the program has ended.
const PATIENCE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);

/// To lock or to ask for: bytes `start..start + length`, `length` 0 for all from there on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bytes {
    pub(super) start: i64,
    pub(super) length: i64,
}

impl Bytes {
    /// All there are and ever will be.
    pub(super) const ALL: Self = Self { start: 0, length: 0 };

    /// One of them.
    pub(super) const fn one(at: i64) -> Self {
        Self { start: at, length: 1 }
    }
}

/// How a lock excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Only [`Kind::Exclusive`] ones. Needs a descriptor for reading.
    Shared,
    /// All others. Needs a descriptor for writing.
    Exclusive,
}

impl Kind {
    fn number(self) -> i32 {
        match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
        }
    }
}

/// How an attempt to lock ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// The lock is held until the file is closed.
    Held,
    /// Another program holds a lock that excludes it.
    Busy,
    /// The file system has no locks.
    Unsupported,
}

/// Lock a file of which nobody else may read or write a byte. Needs write access.
pub(crate) fn exclusive(file: &File) -> Result<Lock, Errno> {
    set(file, Kind::Exclusive, Bytes::ALL)
}

/// As [`exclusive`], for a disk that a program which has just ended may have had.
pub(super) fn exclusive_patiently(file: &File) -> Result<Lock, Errno> {
    patiently(|| exclusive(file), |outcome| *outcome == Ok(Lock::Busy))
}

/// Tell udev to keep off a block device.
pub(super) fn keep_udev_off(file: &File) -> Result<Lock, Errno> {
    patiently(|| outcome(sys::flock_exclusive(file.as_fd())), |outcome| *outcome == Ok(Lock::Busy))
}

/// Attempt until the outcome is not `busy`, or patience ends.
pub(super) fn patiently<T>(mut attempt: impl FnMut() -> T, busy: impl Fn(&T) -> bool) -> T {
    for _ in 0..PATIENCE.as_millis() / POLL.as_millis() {
        let outcome = attempt();
        if !busy(&outcome) {
            return outcome;
        }
        sleep(POLL);
    }
    attempt()
}

/// A lock that somebody else holds and that keeps `kind` from being set on `bytes`: which of its bytes, and how. One of them where there are
/// several; nothing where the file system has no locks.
pub(super) fn obstacle(file: &File, kind: Kind, bytes: Bytes) -> Result<Option<(Kind, Bytes)>, Errno> {
    let mut probe = description(kind.number(), bytes);
    let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).map(drop);
    if outcome(asked)? != Lock::Held {
        return Ok(None);
    }
    let found = Bytes { start: probe.l_start, length: probe.l_len };
    Ok(match i32::from(probe.l_type) {
        libc::F_UNLCK => None,
        libc::F_RDLCK => Some((Kind::Shared, found)),
        _ => Some((Kind::Exclusive, found)),
    })
}

/// Looks from outside whether a file or device of this process is still locked as a target.
#[derive(Debug)]
pub(crate) struct Watch(File);

impl Watch {
    /// On the file behind `fd`; `None` where there is no `/proc` to open it a second time.
    pub(crate) fn on(fd: BorrowedFd<'_>) -> Option<Self> {
        let again = format!("/proc/self/fd/{}", fd.as_raw_fd());
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(again).ok().map(Self)
    }

    /// Whether somebody has it locked as a target.
    pub(crate) fn is_locked(&self) -> bool {
        obstacle(&self.0, Kind::Shared, Bytes::ALL).is_ok_and(|found| found.is_some())
    }
}

/// Lock `bytes`, at once or not at all.
pub(super) fn set(file: &File, kind: Kind, bytes: Bytes) -> Result<Lock, Errno> {
    outcome(fcntl(file, FcntlArg::F_OFD_SETLK(&description(kind.number(), bytes))).map(drop))
}

/// Unlock `bytes`, whoever else has descriptors of the same description.
pub(super) fn unset(file: &File, bytes: Bytes) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&description(libc::F_UNLCK, bytes))).map(drop)
}

fn outcome(result: Result<(), Errno>) -> Result<Lock, Errno> {
    match result {
        Ok(()) => Ok(Lock::Held),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(Lock::Busy),
        Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => Ok(Lock::Unsupported),
        Err(error) => Err(error),
    }
}

fn description(kind: i32, bytes: Bytes) -> libc::flock {
    let small = |value: i32| i16::try_from(value).expect("lock kinds are small numbers");
    libc::flock {
        l_type: small(kind),
        l_whence: small(libc::SEEK_SET),
        l_start: bytes.start,
        l_len: bytes.length,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_sees_what_is_locked_for_one_alone_until_it_is_let_go() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let open = || file.reopen().expect("reopen");
        let (mine, reader) = (open(), open());
        let watch = Watch::on(std::os::fd::AsFd::as_fd(&mine)).expect("/proc");
        assert_eq!(set(&reader, Kind::Shared, Bytes::one(7)), Ok(Lock::Held));
        assert!(!watch.is_locked());
        assert_eq!(set(&mine, Kind::Exclusive, Bytes { start: 300, length: 0 }), Ok(Lock::Held));
        assert!(watch.is_locked());
        assert_eq!(exclusive(&open()), Ok(Lock::Busy));
        drop(mine);
        assert!(!watch.is_locked());
        assert_eq!(exclusive(&open()), Ok(Lock::Busy));
        drop(reader);
        assert_eq!(exclusive(&open()), Ok(Lock::Held));
    }

    #[test]
    fn an_obstacle_is_described_and_the_own_description_is_none() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let open = || file.reopen().expect("reopen");
        let (mine, other) = (open(), open());
        let at = Bytes::one(101);
        assert_eq!(set(&mine, Kind::Shared, at), Ok(Lock::Held));
        assert_eq!(obstacle(&mine, Kind::Exclusive, Bytes::ALL), Ok(None));
        assert_eq!(obstacle(&mine.try_clone().expect("dup"), Kind::Exclusive, Bytes::ALL), Ok(None));
        assert_eq!(obstacle(&other, Kind::Exclusive, Bytes::ALL), Ok(Some((Kind::Shared, at))));
        assert_eq!(obstacle(&other, Kind::Shared, Bytes::ALL), Ok(None));
        let copy = mine.try_clone().expect("dup");
        assert_eq!(unset(&mine, at), Ok(()));
        assert_eq!(obstacle(&other, Kind::Exclusive, Bytes::ALL), Ok(None));
        drop(copy);
    }
}
