//! Advisory locks, so that two copies never write one target, and a target is never a source at the same time.
//!
//! A target holds an exclusive lock over all of its bytes; a source holds a shared lock on one byte far beyond any disk.
//! They are locks of the open file description, so they end with the descriptor, also when the process is killed. QEMU
//! uses the same kind on single bytes near the start: a target that a machine runs on is thereby refused, while a
//! source is not. A block device has an exclusive `flock` in addition, which tells udev not to probe it meanwhile.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::sys;

/// The byte that a source locks.
const SOURCE_BYTE: i64 = 1 << 62;
/// The byte on which QEMU holds a lock while it has an image open for writing.
const QEMU_WRITER_BYTE: i64 = 101;
/// How long a disk may stay locked or claimed before it counts as in use: udev probes devices for a moment, and the kernel
/// lets go of the descriptors in a killed program's ring some time after the program has ended.
const PATIENCE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(20);

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
    set(file, libc::F_WRLCK, 0, 0)
}

/// As [`exclusive`], for a disk that a program which has just ended may have had.
pub(super) fn exclusive_patiently(file: &File) -> Result<Lock, Errno> {
    patiently(|| exclusive(file), |outcome| *outcome == Ok(Lock::Busy))
}

/// Lock a disk that is read from.
pub(super) fn shared(file: &File) -> Result<Lock, Errno> {
    patiently(|| set(file, libc::F_RDLCK, SOURCE_BYTE, 1), |outcome| *outcome == Ok(Lock::Busy))
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

/// Whether a program that locks as QEMU does has the file open for writing.
pub(super) fn has_writer(file: &File) -> bool {
    let mut probe = description(libc::F_WRLCK, QEMU_WRITER_BYTE, 1);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).is_ok() && i32::from(probe.l_type) != libc::F_UNLCK
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
        let mut probe = description(libc::F_RDLCK, 0, 0);
        fcntl(&self.0, FcntlArg::F_OFD_GETLK(&mut probe)).is_ok() && i32::from(probe.l_type) != libc::F_UNLCK
    }
}

fn set(file: &File, kind: i32, start: i64, length: i64) -> Result<Lock, Errno> {
    outcome(fcntl(file, FcntlArg::F_OFD_SETLK(&description(kind, start, length))).map(drop))
}

fn outcome(result: Result<(), Errno>) -> Result<Lock, Errno> {
    match result {
        Ok(()) => Ok(Lock::Held),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(Lock::Busy),
        Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => Ok(Lock::Unsupported),
        Err(error) => Err(error),
    }
}

fn description(kind: i32, start: i64, length: i64) -> libc::flock {
    let small = |value: i32| i16::try_from(value).expect("lock kinds are small numbers");
    libc::flock {
        l_type: small(kind),
        l_whence: small(libc::SEEK_SET),
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_excludes_all_and_sources_share() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let open = || file.reopen().expect("reopen");
        let (first, second, third) = (open(), open(), open());
        assert_eq!(shared(&first), Ok(Lock::Held));
        assert_eq!(shared(&second), Ok(Lock::Held));
        assert_eq!(exclusive(&third), Ok(Lock::Busy));
        drop((first, second));
        assert_eq!(exclusive(&third), Ok(Lock::Held));
        assert_eq!(exclusive(&open()), Ok(Lock::Busy));
        assert_eq!(shared(&open()), Ok(Lock::Busy));
    }

    #[test]
    fn a_running_machine_is_seen_and_excludes_a_target_alone() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let open = || file.reopen().expect("reopen");
        assert!(!has_writer(&open()));
        let machine = open();
        assert_eq!(set(&machine, libc::F_RDLCK, QEMU_WRITER_BYTE, 1), Ok(Lock::Held));
        assert!(has_writer(&open()));
        assert_eq!(shared(&open()), Ok(Lock::Held));
        assert_eq!(exclusive(&open()), Ok(Lock::Busy));
    }
}
