//! What the system's error numbers say of a storage, and what to do about each.
//!
//! With direct I/O the kernel hands on what its block layer was told: `ENODATA` for a medium that cannot be read, `EREMOTEIO` for a device that
//! refuses or has broken down, `ENOLINK` for the way to it, and so on. The texts of these numbers ("no data available", "invalid exchange") are about
//! other things, so they have words of their own here, with the number behind as everywhere.

use nix::errno::Errno;

use super::{Operation, describe};

/// Whether `operation` works on a disk or a file, so that an error number tells of that.
fn is_on_storage(operation: Operation) -> bool {
    !matches!(operation, Operation::Parse | Operation::Queue | Operation::Export)
}

/// Whether what is on the medium is wanted, and not to be put there.
fn reads(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::Read
            | Operation::Verify
            | Operation::ReadSnapshot
            | Operation::ReadFleece
            | Operation::Inspect
            | Operation::Extents
    )
}

/// Why `operation` on a storage of this machine has failed with `errno`.
pub(super) fn reason(operation: Operation, errno: Errno) -> String {
    let words = match errno {
        _ if !is_on_storage(operation) => return describe(errno),
        Errno::ENODATA if reads(operation) => "the medium cannot be read here",
        Errno::ENODATA => "the medium cannot be written here",
        Errno::EREMOTEIO => "the device refuses it or has broken down",
        Errno::ENOLINK => "the connection to the device has failed",
        Errno::EILSEQ => "the data does not match its protection information",
        Errno::ETIMEDOUT => "the device has not answered in time",
        Errno::EBADE => "another host has reserved the device",
        Errno::ENODEV | Errno::ENXIO => "the device is gone",
        Errno::EUCLEAN | Errno::EBADMSG => "its file system is damaged",
        Errno::ESTALE => "its server does not know the file any more",
        _ => return describe(errno),
    };
    format!("{words} ({errno:?})")
}

/// What to do about it.
pub(super) fn advice(operation: Operation, errno: Errno) -> Option<&'static str> {
    if operation == Operation::WriteMap {
        let of_map = match errno {
            Errno::ENOSPC => Some("free some space in its file system"),
            Errno::ENOENT => Some("its directory was removed, and the map with it"),
            Errno::EEXIST => {
                Some("something else has the name under which it is written first: move that away")
            }
            Errno::EACCES | Errno::EPERM => Some("check the permissions of its directory"),
            _ => None,
        };
        if of_map.is_some() {
            return of_map;
        }
    }
    Some(match errno {
        Errno::ENOSPC => "free some space, or choose a larger target",
        Errno::EDQUOT => "raise the quota or free some of it",
        Errno::EFBIG => "raise the limit on file sizes (ulimit -f), or choose another file system",
        Errno::EIO => "the device or its connection is failing: see the kernel's log",
        Errno::EROFS => "the file system has gone read-only: see the kernel's log",
        _ if !is_on_storage(operation) => return None,
        Errno::ENODATA => "the medium is failing: see the kernel's log, and replace the device",
        Errno::EREMOTEIO => "see the kernel's log for what the device says",
        Errno::ENOLINK => "see that its cables, switches and paths work, and the kernel's log",
        Errno::EILSEQ => "the data was damaged on the device or on the way: see the kernel's log",
        Errno::ETIMEDOUT => "the device or the way to it hangs: see the kernel's log",
        Errno::EBADE => "have that host give it up (sg_persist shows who has it)",
        Errno::ENODEV | Errno::ENXIO => {
            "see that it is attached (lsblk), and the kernel's log; then copy again"
        }
        Errno::EUCLEAN | Errno::EBADMSG => "unmount it and run its check (fsck, xfs_repair), then copy again",
        Errno::ESTALE => {
            "it was removed or replaced at the server, or is not exported any more: see there, then copy again"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};

    /// Each number that the block layer and file systems answer with: a reason that is about storage, the number in it, and something to do.
    #[test]
    fn what_a_device_says_is_told_in_its_own_words_and_with_advice() {
        const TABLE: [(Errno, &str, &str); 13] = [
            (Errno::EIO, "I/O error (EIO)", "the device or its connection is failing: see the kernel's log"),
            (Errno::ENODATA, "the medium cannot be read here (ENODATA)", "replace the device"),
            (Errno::EREMOTEIO, "the device refuses it or has broken down (EREMOTEIO)", "kernel's log"),
            (Errno::ENOLINK, "the connection to the device has failed (ENOLINK)", "cables"),
            (Errno::EILSEQ, "does not match its protection information (EILSEQ)", "damaged"),
            (Errno::ETIMEDOUT, "the device has not answered in time (ETIMEDOUT)", "hangs"),
            (Errno::EBADE, "another host has reserved the device (EBADE)", "sg_persist"),
            (Errno::ENODEV, "the device is gone (ENODEV)", "lsblk"),
            (Errno::ENXIO, "the device is gone (ENXIO)", "lsblk"),
            (Errno::EUCLEAN, "its file system is damaged (EUCLEAN)", "fsck"),
            (Errno::EBADMSG, "its file system is damaged (EBADMSG)", "fsck"),
            (Errno::ESTALE, "its server does not know the file any more (ESTALE)", "exported"),
            (Errno::EROFS, "(EROFS)", "read-only"),
        ];
        for (errno, reason, advice) in TABLE {
            for operation in [Operation::Read, Operation::Verify] {
                let error = Error::io(operation, "/dev/sdb", None, errno);
                assert!(error.reason().contains(reason), "{error}");
                assert!(error.advice().is_some_and(|told| told.contains(advice)), "{error}");
                assert_eq!(error.kind(), ErrorKind::Io(errno), "the words change nothing of what it is");
            }
            let flush = Error::io(Operation::Flush, "/dev/sdb", None, errno);
            assert_eq!(flush.kind(), ErrorKind::FlushFailed(errno));
            assert!(flush.advice().is_some(), "{flush}");
        }
    }

    #[test]
    fn a_medium_is_read_or_written() {
        let told = |operation| Error::io(operation, "t", None, Errno::ENODATA).reason().to_owned();
        for operation in [Operation::Read, Operation::Verify, Operation::ReadSnapshot, Operation::ReadFleece]
        {
            assert_eq!(told(operation), "the medium cannot be read here (ENODATA)", "{operation:?}");
        }
        for operation in [Operation::Write, Operation::WriteZeroes, Operation::Flush, Operation::WriteFleece]
        {
            assert_eq!(told(operation), "the medium cannot be written here (ENODATA)", "{operation:?}");
        }
    }

    /// What is not about a disk here has the system's own words.
    #[test]
    fn of_servers_and_clients_the_words_are_the_systems() {
        let lost = Error::io_at_server(Operation::Read, "nbd://h/x", None, Errno::ETIMEDOUT);
        assert_eq!(lost.reason(), "connection timed out (ETIMEDOUT)");
        let client = Error::io(Operation::Export, "a client", None, Errno::ETIMEDOUT);
        assert_eq!((client.reason(), client.advice()), ("connection timed out (ETIMEDOUT)", None));
    }
}
