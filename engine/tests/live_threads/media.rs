//! What the guests' disk is made of.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A disk full of random bytes, with some zeros and holes, in a directory for all that is made beside it. Gone when dropped.
pub(crate) struct Medium {
    path: PathBuf,
    directory: TempDir,
    is_loop: bool,
}

impl std::fmt::Debug for Medium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_loop { "loop device" } else { "file" })
    }
}

fn fill(path: &Path, bytes: u64) {
    let mut contents = vec![0; usize::try_from(bytes).unwrap()];
    let mut random = fastrand::Rng::with_seed(3);
    for chunk in contents.chunks_mut(96 << 10) {
        if random.u8(..4) > 0 {
            random.fill(chunk);
        }
    }
    std::fs::write(path, contents).unwrap();
}

impl Medium {
    pub(crate) fn file(bytes: u64) -> Self {
        // Not a file system in memory, if there is a choice.
        let directory = tempfile::tempdir_in(std::env::var("TMPDIR").unwrap_or_else(|_| "/var/tmp".into()));
        let directory = directory.unwrap();
        let path = directory.path().join("disk.img");
        fill(&path, bytes);
        Self { path, directory, is_loop: false }
    }

    /// Over such a file; `None`, and a word why, where there are none to be had.
    pub(crate) fn loop_device(bytes: u64) -> Option<Self> {
        let mut medium = Self::file(bytes);
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&medium.path).output();
        match output {
            Ok(output) if output.status.success() => {
                medium.path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
                medium.is_loop = true;
                Some(medium)
            }
            failed => {
                eprintln!("skipped: no loop device to be had here: {failed:?}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        if self.is_loop {
            let status = Command::new("losetup").arg("--detach").arg(&self.path).status();
            let is_gone = status.is_ok_and(|status| status.success());
            assert!(is_gone || std::thread::panicking(), "{} is left behind", self.path.display());
        }
    }
}
