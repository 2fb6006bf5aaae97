//! Real files, loop devices and mounts that go away by themselves.

use std::fmt::Debug;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use engine::error::{Error, ErrorKind, Refusal, Result};
use engine::storage::{
    Locator, OpenedSource, OpenedTarget, SourceOptions, TargetOptions, TargetPlan, open_source, plan_target,
};
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;

/// A directory with some files.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("text").to_owned()
    }

    /// A file of `length` bytes that begins with its name.
    pub(crate) fn file(&self, name: &str, length: u64) -> PathBuf {
        let path = self.path(name);
        let file = fs::File::create(&path).expect("create");
        file.set_len(length).expect("length");
        let mark = &name.as_bytes()[..name.len().min(usize::try_from(length).expect("small"))];
        file.write_all_at(mark, 0).expect("write");
        path
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.0.path())
            .expect("directory")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names
    }
}

/// Try for a moment while a map is in use: a command that another test starts holds, between its fork and its exec, a copy
/// of every descriptor of this process, and with it locks that are dropped already. (Disks are waited for anyway.)
pub(crate) fn patiently<T>(attempt: impl Fn() -> Result<T>) -> Result<T> {
    for _ in 0..20 {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::Refused(Refusal::InUse) => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
    attempt()
}

pub(crate) fn source(path: impl AsRef<Path>) -> Result<OpenedSource> {
    open_source(&Locator::path(&path), &SourceOptions::default())
}

pub(crate) fn plan(
    path: impl AsRef<Path>,
    source: &OpenedSource,
    options: &TargetOptions<'_>,
) -> Result<TargetPlan> {
    plan_target(&Locator::path(&path), source, options)
}

pub(crate) fn target(
    path: impl AsRef<Path>,
    source: &OpenedSource,
    options: &TargetOptions<'_>,
) -> Result<OpenedTarget> {
    plan(path, source, options)?.prepare()
}

pub(crate) fn forced() -> TargetOptions<'static> {
    TargetOptions { force: true, ..TargetOptions::default() }
}

/// A refusal as every refusal must be: one line with the path, the reason and what to do.
pub(crate) fn refused<T: Debug>(result: Result<T>, refusal: Refusal, words: &str) -> Error {
    let error = result.expect_err(words);
    let line = error.to_string();
    println!("{line}");
    assert_eq!(error.kind(), ErrorKind::Refused(refusal), "{line}");
    check_line(&error, words);
    error
}

pub(crate) fn map_refused<T: Debug>(result: Result<T>, words: &str) {
    let error = result.expect_err(words);
    println!("{error}");
    assert_eq!(error.kind(), ErrorKind::MapRefused, "{error}");
    check_line(&error, words);
}

fn check_line(error: &Error, words: &str) {
    let line = error.to_string();
    assert!(error.is_refusal(), "{line}");
    assert!(line.starts_with("cannot ") && line.contains(error.path()) && !error.path().is_empty(), "{line}");
    assert!(line.contains(words), "{line}");
    assert!(error.advice().is_some_and(|advice| !advice.is_empty()), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
}

/// Everything about a file that a refused copy must leave alone.
pub(crate) fn fingerprint(path: impl AsRef<Path>) -> (Vec<u8>, u64, i64, i64, i64, i64) {
    let metadata = fs::metadata(&path).expect("metadata");
    let times = (metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec());
    (fs::read(&path).expect("read"), metadata.ino(), times.0, times.1, times.2, times.3)
}

/// Whether loop devices and mounts can be had; says so where they cannot.
pub(crate) fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    if !root {
        println!("{test} skipped: needs root and loop devices");
    }
    root
}

/// Run a command that must succeed and give what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect(program);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device; detached at the end.
pub(crate) struct LoopDevice(pub(crate) PathBuf);

impl LoopDevice {
    pub(crate) fn over(file: &Path, options: &[&str]) -> Self {
        let mut arguments = vec!["--find", "--show"];
        arguments.extend(options);
        arguments.push(file.to_str().expect("text"));
        Self(run("losetup", &arguments).into())
    }

    /// The same device over another file; `None`, with a word about it, where somebody else took the device meanwhile.
    pub(crate) fn moved_to(self, file: &Path, options: &[&str]) -> Option<Self> {
        let losetup = |arguments: &[&str]| {
            Command::new("losetup").args(arguments).output().expect("losetup").status.success()
        };
        // From here on it is nobody's: not to be detached once more.
        let path = std::mem::take(&mut std::mem::ManuallyDrop::new(self).0);
        let text = path.to_str().expect("text");
        assert!(losetup(&["--detach", text]), "it was ours");
        let arguments = [options, &[text, file.to_str().expect("text")]].concat();
        for _ in 0..100 {
            if losetup(&arguments) {
                return Some(Self(path));
            }
            // It goes once whoever looks at new devices has let go of it.
            std::thread::sleep(Duration::from_millis(20));
        }
        println!("skipped: somebody else has taken {text}");
        None
    }

    pub(crate) fn text(&self) -> &str {
        self.0.to_str().expect("text")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(Command::new("losetup").arg("--detach").arg(&self.0).output());
    }
}

/// A mounted file system; unmounted at the end.
pub(crate) struct Mount(pub(crate) PathBuf);

impl Mount {
    pub(crate) fn of(device: &LoopDevice, directory: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&directory).expect("mount point");
        run("mount", &["-o", options, device.text(), directory.to_str().expect("text")]);
        Self(directory)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("--lazy").arg(&self.0).output());
    }
}
