//! Image locking, both ways: what QEMU's programs have open is refused, and what a copy has open is refused by them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};

use crate::MIB;
use crate::kernel::{Look, LoopDevice, is_root};
use crate::support::{PATIENCE, Running, code, dense, directory, has, json, run_in, same, stderr, stdout};

/// Whether all programs of QEMU that the tests need are there.
pub(crate) fn has_qemu() -> bool {
    has("qemu-io") && has("qemu-img") && has("qemu-storage-daemon")
}

/// A program that has a disk open until this is dropped.
pub(crate) enum Holder {
    Program(Child),
    /// Locks as a virtual machine's are, set by hand.
    #[expect(dead_code, reason = "it only has to be there")]
    Locks(File),
}

impl Holder {
    /// `qemu-io` with `options` on `path`.
    fn qemu_io(path: &Path, options: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(["-f", "raw"])
            .args(options)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io starts");
        // It is open when it answers.
        child.stdin.as_mut().expect("piped").write_all(b"length\n").expect("asked");
        let mut answer = String::new();
        let output = child.stdout.as_mut().expect("piped");
        BufReader::new(output).read_line(&mut answer).expect("answered");
        assert!(answer.contains("MiB"), "qemu-io: {answer:?}");
        Self::Program(child)
    }

    /// `qemu-storage-daemon` with an NBD export of `path`.
    fn export(path: &Path, writable: bool) -> Self {
        let place = directory();
        let (socket, ready) = (place.path().join("socket"), place.path().join("ready"));
        let driver = if path.starts_with("/dev") { "host_device" } else { "file" };
        let writable = if writable { "on" } else { "off" };
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("{driver},filename={},node-name=file", path.display())])
            .args(["--blockdev", &format!("raw,file=file,node-name=disk,read-only={}", opposite(writable))])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", &format!("nbd,id=export,node-name=disk,writable={writable}")])
            .args(["--pidfile", ready.to_str().expect("text")])
            .spawn()
            .expect("qemu-storage-daemon starts");
        let mut holder = Self::Program(child);
        let deadline = Instant::now() + PATIENCE;
        while !ready.exists() {
            let Self::Program(child) = &mut holder else { unreachable!() };
            assert_eq!(child.try_wait().expect("asked"), None, "qemu-storage-daemon has ended");
            assert!(Instant::now() < deadline, "qemu-storage-daemon is not ready");
            thread::sleep(Duration::from_millis(10));
        }
        holder
    }

    /// What a virtual machine holds on its disk: reads and writes, and shares all but writing.
    fn machine(path: &Path) -> Self {
        let file = File::open(path).expect("open");
        for byte in [100, 101, 201] {
            let lock = libc::flock {
                l_type: i16::try_from(libc::F_RDLCK).expect("small"),
                l_whence: i16::try_from(libc::SEEK_SET).expect("small"),
                l_start: byte,
                l_len: 1,
                l_pid: 0,
            };
            fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).expect("locked");
        }
        Self::Locks(file)
    }
}

fn opposite(switch: &str) -> &'static str {
    if switch == "on" { "off" } else { "on" }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Self::Program(child) = self {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// A way of having a disk open.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Use {
    QemuIo,
    QemuIoReadOnly,
    Export,
    ExportReadOnly,
    Machine,
}

impl Use {
    pub(crate) const WRITING: [Self; 3] = [Self::QemuIo, Self::Export, Self::Machine];
    pub(crate) const READING: [Self; 2] = [Self::QemuIoReadOnly, Self::ExportReadOnly];

    pub(crate) fn begin(self, path: &Path) -> Holder {
        println!("--- {self:?} of {}", path.display());
        match self {
            Self::QemuIo => Holder::qemu_io(path, &[]),
            Self::QemuIoReadOnly => Holder::qemu_io(path, &["-r"]),
            Self::Export => Holder::export(path, true),
            Self::ExportReadOnly => Holder::export(path, false),
            Self::Machine => Holder::machine(path),
        }
    }
}

/// Refused in one line with `words`, with nothing in the directory changed.
#[track_caller]
fn refused(place: &Path, arguments: &[&str], words: &[&str]) {
    let before = Look::at(place);
    refused_meanwhile(place, arguments, words);
    assert!(Look::at(place) == before, "{arguments:?}: something was touched");
}

/// The same while the directory changes.
#[track_caller]
fn refused_meanwhile(place: &Path, arguments: &[&str], words: &[&str]) {
    let output = run_in(place, arguments);
    let message = stderr(&output);
    println!("{arguments:?}: {message}");
    assert_eq!(code(&output), 2, "{arguments:?}: {message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} in {message}");
    }
}

#[track_caller]
fn succeeds(place: &Path, arguments: &[&str]) -> Output {
    let output = run_in(place, arguments);
    assert_eq!(code(&output), 0, "{arguments:?}: {}", stderr(&output));
    output
}

/// Run a program of QEMU; whether it succeeded, and what it said.
fn qemu(place: &Path, program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).current_dir(place).output().expect("runs");
    println!("{program} {arguments:?}: {}", stderr(&output));
    (output.status.success(), stderr(&output))
}

/// It opens the disk, or is kept from it by the lock on `permission`.
#[track_caller]
pub(crate) fn qemu_opens(place: &Path, program: &str, arguments: &[&str], kept_from: Option<&str>) {
    let (opened, messages) = qemu(place, program, arguments);
    match kept_from {
        None => assert!(opened, "{program} {arguments:?}: {messages}"),
        Some(permission) => {
            assert!(!opened, "{program} {arguments:?} has opened it");
            let said =
                messages.contains("Failed to get") && messages.contains(&format!("\"{permission}\" lock"));
            assert!(said, "{program} {arguments:?}: {messages}");
        }
    }
}

/// A copy that has begun to copy and takes seconds.
fn begun(place: &Path, arguments: &[&str]) -> Running {
    let slow = ["copy", "--speed", "512K", "--progress", "json"];
    let mut running = Running::program(place, &[&slow, arguments].concat());
    running.progress(|progress| progress["done"].as_u64() > Some(0));
    running
}

#[test]
fn a_source_that_others_write_to_is_refused_unless_forced() {
    if !has_qemu() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), MIB, 0);
    fs::copy(place.join("a"), place.join("same")).expect("copied");
    symlink("a", place.join("link")).expect("linked");
    fs::hard_link(place.join("a"), place.join("hard")).expect("linked");
    for its in Use::WRITING {
        let holder = its.begin(&place.join("a"));
        for source in ["a", "link", "hard"] {
            let words = [
                &format!("cannot open source {source}"),
                "another program has it open for writing, a running virtual machine for example",
                "add --force-share",
            ];
            refused(place, &["copy", source, "b"], &words);
        }
        refused(place, &["compare", "same", "a"], &["cannot open a", "open for writing", "--force-share"]);
        let messages = stderr(&succeeds(place, &["copy", "--force-share", "a", "b"]));
        assert!(messages.contains("a is in use"), "{messages}");
        assert!(same(&place.join("a"), &place.join("b")));
        succeeds(place, &["compare", "--force-share", "same", "a"]);
        let told = stdout(&succeeds(place, &["info", "a"]));
        assert!(told.contains("by others, who write and read it"), "{told}");
        let object = json(&succeeds(place, &["info", "--json", "a"]));
        assert_eq!(object["used_by_others"], serde_json::json!(["write", "consistent_read"]), "{object}");
        drop(holder);
        let messages = stderr(&succeeds(place, &["copy", "--force", "a", "b"]));
        assert!(!messages.contains("in use"), "{messages}");
        fs::remove_file(place.join("b")).expect("removed");
    }
    let told = stdout(&succeeds(place, &["info", "a"]));
    assert!(!told.contains("in use"), "{told}");
}

#[test]
fn a_source_that_others_read_is_copied() {
    if !has_qemu() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), MIB, 0);
    for its in Use::READING {
        let _holder = its.begin(&place.join("a"));
        let messages = stderr(&succeeds(place, &["copy", "--force", "a", "b"]));
        assert!(!messages.contains("in use"), "{messages}");
        succeeds(place, &["compare", "a", "b"]);
    }
}

#[test]
fn a_target_that_others_have_open_is_refused() {
    if !has_qemu() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), MIB, 0);
    dense(&place.join("b"), MIB, 3);
    for its in Use::WRITING.into_iter().chain(Use::READING) {
        let _holder = its.begin(&place.join("b"));
        for arguments in [&["copy", "--force", "a", "b"][..], &["copy", "--force", "--force-share", "a", "b"]]
        {
            refused(place, arguments, &["cannot open target b", "another program", "choose another target"]);
        }
    }
    succeeds(place, &["copy", "--force", "a", "b"]);
}

#[test]
fn programs_of_qemu_are_kept_from_both_disks_of_a_copy() {
    if !has_qemu() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 12 * MIB, 0);
    let mut copy = begun(place, &["a", "b"]);
    let read = ["-f", "raw", "-c", "read 0 4k"];
    let read_only = [&read[..], &["-r"]].concat();
    qemu_opens(place, "qemu-io", &[&read[..], &["a"]].concat(), Some("write"));
    qemu_opens(place, "qemu-io", &[&read_only[..], &["a"]].concat(), None);
    qemu_opens(place, "qemu-img", &["convert", "-f", "raw", "-O", "raw", "a", "converted"], None);
    qemu_opens(place, "qemu-img", &["info", "-f", "raw", "a"], None);
    qemu_opens(place, "qemu-img", &["resize", "-f", "raw", "a", "13M"], Some("write"));
    qemu_opens(place, "qemu-io", &[&read[..], &["b"]].concat(), Some("consistent read"));
    qemu_opens(place, "qemu-io", &[&read_only[..], &["b"]].concat(), Some("consistent read"));
    qemu_opens(place, "qemu-img", &["convert", "-f", "raw", "-O", "raw", "b", "c"], Some("consistent read"));
    let export = "nbd,id=export,node-name=disk,writable=on";
    let server = "addr.type=unix,addr.path=socket";
    for (disk, what) in [("a", "write"), ("b", "consistent read")] {
        let node = format!("file,filename={disk},node-name=disk");
        let arguments = ["--blockdev", &node, "--nbd-server", server, "--export", export];
        qemu_opens(place, "qemu-storage-daemon", &arguments, Some(what));
    }
    // What is half written is no source of ours either, forced or not.
    for arguments in [&["copy", "b", "d"][..], &["copy", "--force-share", "b", "d"]] {
        refused_meanwhile(place, arguments, &["cannot open source b", "another copy is writing to it"]);
    }
    assert!(!place.join("d").exists());
    assert!(copy.is_running(), "it was there all the time");
    copy.signal("INT");
    assert_eq!(copy.end().0, 130);
}

#[test]
fn both_disks_are_free_at_once_when_a_copy_has_ended() {
    if !has_qemu() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), MIB, 0);
    for engine in ["io_uring", "threads"] {
        for _ in 0..5 {
            succeeds(place, &["copy", "--force", "--io-engine", engine, "a", "b"]);
            for disk in ["a", "b"] {
                qemu_opens(place, "qemu-io", &["-f", "raw", "-c", "write 0 4k", disk], None);
            }
        }
    }
}

#[test]
fn a_device_and_what_it_lies_on_are_looked_at() {
    if !has_qemu() || !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 4 * MIB, 0);
    dense(&place.join("disk"), 4 * MIB, 3);
    let device = LoopDevice::over(&place.join("disk"));
    let text = device.text();
    for at in [device.path().to_owned(), place.join("disk")] {
        let beneath: &[&str] = if at == device.path() { &[] } else { &["on which it lies", "disk"] };
        for its in Use::WRITING {
            let _holder = its.begin(&at);
            let expected =
                [&["cannot open source", text, "open for writing", "--force-share"], beneath].concat();
            refused(place, &["copy", text, "b"], &expected);
            let expected = [&["cannot open target", text, "open for writing"], beneath].concat();
            refused(place, &["copy", "a", text], &expected);
            succeeds(place, &["copy", "--force-share", text, "b"]);
            fs::remove_file(place.join("b")).expect("removed");
        }
    }
    let copy = begun(place, &["a", text]);
    qemu_opens(place, "qemu-io", &["-f", "raw", "-r", "-c", "read 0 4k", text], Some("consistent read"));
    copy.signal("INT");
    assert_eq!(copy.end().0, 130);
    let copy = begun(place, &[text, "null:"]);
    qemu_opens(place, "qemu-io", &["-f", "raw", "-c", "read 0 4k", text], Some("write"));
    copy.signal("INT");
    assert_eq!(copy.end().0, 130);
}

/// Two partitions of one disk, here two loop devices on parts of one file, are no obstacle to each other.
#[test]
fn disks_side_by_side_on_one_file_are_copied() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("disk"), 4 * MIB, 3);
    let size = (2 * MIB).to_string();
    let first = LoopDevice::with(&place.join("disk"), &["--sizelimit", &size]);
    let second = LoopDevice::with(&place.join("disk"), &["--offset", &size]);
    succeeds(place, &["copy", first.text(), second.text()]);
    succeeds(place, &["compare", first.text(), second.text()]);
}
