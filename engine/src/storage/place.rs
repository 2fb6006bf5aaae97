//! What the directory of a new target tells: that its file would stand in for a device, or would be in memory only.
//!
//! A mistyped device name is a file name like any other, and below `/dev` a file of that name is one in memory: the copy would
//! succeed and be gone with the next restart. So no target is created there. (`/dev/shm` is a place for files.)

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{major, minor};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};

/// Of ramfs.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Whether `directory`, by the name of a path that may not exist, is one for devices.
pub(super) fn is_named_for_devices(directory: &Path) -> bool {
    // What does not exist cannot be resolved beyond its name.
    let resolved = std::fs::canonicalize(directory).or_else(|_| std::path::absolute(directory));
    resolved.is_ok_and(|path| path.starts_with("/dev") && !path.starts_with("/dev/shm"))
}

/// Whether the file system of an open directory holds the system's devices, wherever it is mounted.
pub(super) fn holds_devices(directory: &File) -> bool {
    let Ok(metadata) = directory.metadata() else { return false };
    let number = format!("{}:{}", major(metadata.dev()), minor(metadata.dev()));
    std::fs::read_to_string("/proc/self/mountinfo")
        .is_ok_and(|mounts| type_of(&mounts, &number) == Some("devtmpfs"))
}

/// Whether files in an open directory are in memory only.
pub(super) fn is_in_memory(directory: &File) -> bool {
    fstatfs(directory).is_ok_and(|found| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&found.filesystem_type()))
}

/// The type of the file system with this device number, in the lines of `mountinfo`.
fn type_of<'a>(mounts: &'a str, number: &str) -> Option<&'a str> {
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some(number))?;
    // Optional fields end with a dash; then come type, source and options.
    line.split_once(" - ")?.1.split(' ').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        for (directory, devices) in [
            ("/dev", true),
            ("/dev/no-such-directory", true),
            ("/dev/../dev", true),
            ("/dev/shm", false),
            ("/tmp", false),
            ("/developer", false),
        ] {
            assert_eq!(is_named_for_devices(Path::new(directory)), devices, "{directory}");
        }
    }

    #[test]
    fn types_of_mounts() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
                      23 22 0:5 / /dev rw,nosuid shared:2 master:1 - devtmpfs udev rw,size=4k\n";
        assert_eq!(type_of(mounts, "0:5"), Some("devtmpfs"));
        assert_eq!(type_of(mounts, "254:0"), Some("ext4"));
        assert_eq!(type_of(mounts, "0:6"), None);
    }
}
