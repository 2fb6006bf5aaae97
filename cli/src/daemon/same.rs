//! Disks of the command line that are one and the same, whatever path leads there, or share bytes: a partition and its whole device, a loop
//! device and the file under it.
//!
//! The engine opens a disk once and refuses it then; a daemon that exports nothing would open neither before the first job. So this is
//! looked at before anything is opened. What cannot be looked at is refused by whoever opens it.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use engine::storage::share_bytes;

use crate::args::DiskArg;

/// What tells disks apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// A device, by its number.
    Device(u64),
    /// A file, by its file system and its number there.
    File(u64, u64),
}

/// What tells the file or device that was `found` from others.
pub(super) fn identity(found: &Metadata) -> Identity {
    if found.file_type().is_block_device() {
        Identity::Device(found.rdev())
    } else {
        Identity::File(found.dev(), found.ino())
    }
}

/// What is wrong with the first two of `disks` that are the same or share bytes, in one line.
pub(super) fn refuse_same(disks: &[DiskArg]) -> Result<(), String> {
    let mut seen: Vec<(&str, Metadata)> = Vec::new();
    for disk in disks {
        let Ok(found) = std::fs::metadata(&disk.path) else { continue };
        let own = &disk.name;
        // Names given twice are refused as such.
        for (other, before) in seen.iter().filter(|(other, _)| other != own) {
            if identity(before) == identity(&found) {
                return Err(format!("--disk {other} and --disk {own} are the same disk; give it once"));
            }
            if share_bytes(before, &found) {
                return Err(format!("--disk {other} and --disk {own} share their bytes; give one of them"));
            }
        }
        seen.push((own, found));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_same_by_any_path() {
        let there = tempfile::tempdir().expect("a directory");
        let path = |name: &str| there.path().join(name).display().to_string();
        std::fs::write(path("a"), "a").expect("written");
        std::fs::write(path("b"), "b").expect("written");
        std::fs::hard_link(path("a"), path("hard")).expect("linked");
        std::os::unix::fs::symlink("a", path("soft")).expect("linked");
        let disk = |name: &str, file: &str| DiskArg { name: name.into(), path: path(file) };
        let disks = |second: &str| [disk("vda", "a"), disk("none", "missing"), disk("vdb", second)];
        let told = "--disk vda and --disk vdb are the same disk; give it once";
        for second in ["a", "hard", "soft"] {
            assert_eq!(refuse_same(&disks(second)), Err(told.into()), "{second}");
        }
        assert_eq!(refuse_same(&disks("b")), Ok(()));
        assert_eq!(refuse_same(&[disk("vda", "a"), disk("vda", "a")]), Ok(()));
    }
}
