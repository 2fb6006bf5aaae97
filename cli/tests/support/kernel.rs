//! Real devices and file systems that go away by themselves, and the look of a directory before and after.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// Of `/dev/loop-control`, from `linux/loop.h`.
const LOOP_CTL_ADD: libc::Ioctl = 0x4C80;
const LOOP_CTL_REMOVE: libc::Ioctl = 0x4C81;

/// Whether devices and mounts can be had; says so where a test is skipped for that.
pub(crate) fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let root =
        status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"));
    let root = root && Path::new("/dev/loop-control").exists();
    if !root {
        eprintln!("SKIPPED: needs root and loop devices");
    }
    root
}

/// Run a tool that must succeed; gives what it printed.
#[track_caller]
pub(crate) fn tool(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).args(arguments).output().expect(name);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// A loop device; detached at the end.
pub(crate) struct LoopDevice(PathBuf);

impl LoopDevice {
    pub(crate) fn over(file: &Path) -> Self {
        Self::with(file, &[])
    }

    pub(crate) fn with(file: &Path, options: &[&str]) -> Self {
        let _turn = lock(FlockArg::LockShared);
        Self(tool("losetup", &[&["--find", "--show"], options, &[text(file)]].concat()).into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn text(&self) -> &str {
        text(&self.0)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        Command::new("losetup").arg("--detach").arg(&self.0).output().ok();
    }
}

/// Who wants any free device is given one of those that are there, so none is asked for while one is there that has to stay free.
fn lock(how: FlockArg) -> Flock<File> {
    let control = File::open("/dev/loop-control").expect("open");
    Flock::lock(control, how).map_err(|(_, errno)| errno).expect("a lock")
}

/// A loop device to which nothing is attached, by a node of its own.
pub(crate) struct Unattached {
    node: PathBuf,
    control: Flock<File>,
    number: libc::c_ulong,
}

impl Unattached {
    /// `None`, with a word about it, where there can be none.
    pub(crate) fn new(node: &Path) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let control = lock(FlockArg::LockExclusive);
        // So many tests of this kind may run side by side, in all builds of this machine.
        let number = (4000..4032).find(|&number: &libc::c_ulong| {
            // SAFETY: a number is handed over, and no memory.
            unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_ADD, number) >= 0 }
        });
        let Some(number) = number else {
            eprintln!("SKIPPED: no loop device can be added");
            return None;
        };
        let added = Self { node: node.to_owned(), control, number };
        let told = fs::read_to_string(format!("/sys/block/loop{number}/dev")).expect("its device number");
        let (major, minor) = told.trim().split_once(':').expect("two numbers");
        let device = makedev(major.parse().expect("a number"), minor.parse().expect("a number"));
        mknod(node, SFlag::S_IFBLK, Mode::S_IRWXU, device).expect("a node");
        Some(added)
    }

    pub(crate) fn text(&self) -> &str {
        text(&self.node)
    }
}

impl Drop for Unattached {
    fn drop(&mut self) {
        // Whoever looks at new devices may still have it open.
        for _ in 0..50 {
            // SAFETY: as above.
            if unsafe { libc::ioctl(self.control.as_raw_fd(), LOOP_CTL_REMOVE, self.number) } >= 0 {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        eprintln!("loop{} stays behind: {}", self.number, std::io::Error::last_os_error());
    }
}

/// A mounted file system; unmounted at the end.
pub(crate) struct Mount(PathBuf);

impl Mount {
    /// `kind` on `what` at the new directory `at`.
    pub(crate) fn new(kind: &str, what: &str, options: &str, at: &Path) -> Self {
        fs::create_dir(at).expect("mount point");
        tool("mount", &["-t", kind, "-o", options, what, text(at)]);
        Self(at.to_owned())
    }

    /// A small file system in memory.
    pub(crate) fn tmpfs(at: &Path, bytes: u64) -> Self {
        Self::new("tmpfs", "none", &format!("size={bytes}"), at)
    }

    /// Change its options.
    pub(crate) fn remount(&self, options: &str) {
        tool("mount", &["-o", &format!("remount,{options}"), text(&self.0)]);
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(&self.0).output().ok();
    }
}

/// A command that runs the program as an ordinary user in `directory`, which is opened to it; `None`, with a reason, where
/// that cannot be.
pub(crate) fn as_nobody(directory: &Path, before: &[&str]) -> Option<Command> {
    if !is_root() || !crate::support::has("setpriv") {
        return None;
    }
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).expect("opened to others");
    let command = || {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(before)
            .arg(crate::support::program());
        command.current_dir(directory).env_remove("ENGINE_LOG");
        command
    };
    let may_run = command().arg("--version").output().is_ok_and(|output| output.status.success());
    if !may_run {
        eprintln!("SKIPPED: the program lies where an ordinary user may not run it");
        return None;
    }
    Some(command())
}

/// Everything in a directory that a refused copy must leave alone: contents, lengths, times, inodes, names.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Look(BTreeMap<PathBuf, (Vec<i64>, Vec<u8>)>);

impl Look {
    pub(crate) fn at(directory: &Path) -> Self {
        let mut seen = BTreeMap::new();
        let mut directories = vec![directory.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).expect("directory") {
                let path = entry.expect("entry").path();
                let about = fs::symlink_metadata(&path).expect("metadata");
                let mut numbers = vec![about.ino().cast_signed(), i64::from(about.mode())];
                let mut contents = Vec::new();
                if about.is_dir() {
                    directories.push(path.clone());
                } else {
                    numbers.extend([about.len().cast_signed(), about.blocks().cast_signed()]);
                    numbers.extend([about.mtime(), about.mtime_nsec(), about.ctime(), about.ctime_nsec()]);
                    if about.is_file() && about.len() <= 64 << 20 {
                        contents = fs::read(&path).expect("read");
                    }
                }
                seen.insert(path, (numbers, contents));
            }
        }
        Self(seen)
    }
}
