//! Regular files, and what is neither a file nor a device.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use engine::copy::Format;
use engine::error::{ErrorKind, Refusal};
use engine::ring::IoPath;
use engine::storage::{
    DiskKind, Locator, Permission, SourceOptions, TargetOptions, info, open_source, plan_target,
    source_unchanged,
};
use engine::units::Length;
use nix::sys::stat::Mode;
use nix::unistd::{Uid, mkfifo, setfsuid};

use crate::support::*;

fn null(text: &str) -> engine::storage::OpenedSource {
    open_source(&Locator::parse(text).expect("locator"), &SourceOptions::default()).expect("null source")
}

#[test]
fn a_source_that_is_missing_or_no_disk_is_refused() {
    let place = Place::new();
    refused(source(place.path("nothing")), Refusal::NotFound, "no such file");
    place.file("file", 1);
    refused(source(place.path("file/below")), Refusal::NotFound, "not a directory");
    refused(source(place.path("")), Refusal::NotADisk, "it is a directory");
    refused(source("/dev/null"), Refusal::NotADisk, "it is a character device");
    mkfifo(&place.path("fifo"), Mode::S_IRWXU).expect("fifo");
    refused(source(place.path("fifo")), Refusal::NotADisk, "it is a FIFO");
    let _listener = UnixListener::bind(place.path("socket")).expect("socket");
    refused(source(place.path("socket")), Refusal::NotADisk, "it is a socket");
    symlink(place.path("nothing"), place.path("dangling")).expect("symlink");
    refused(source(place.path("dangling")), Refusal::NotFound, "no such file");
}

#[test]
fn what_this_version_does_not_support_is_refused_by_name() {
    let place = Place::new();
    let path = Locator::path(place.file("disk", MIB));
    let qcow2 = SourceOptions { format: Format::Qcow2, ..SourceOptions::default() };
    refused(open_source(&path, &qcow2), Refusal::Unsupported, "qemu-img convert -O raw");
    let from = source(place.path("disk")).expect("source");
    let qcow2 = TargetOptions { format: Format::Qcow2, ..TargetOptions::default() };
    refused(plan(place.path("new"), &from, &qcow2), Refusal::Unsupported, "not supported yet");
    refused(Locator::parse("nbds://localhost/disk"), Refusal::Unsupported, "NBD over TLS is not supported");
    // Nobody is asked: a live disk's target is planned in this way.
    let export = Locator::parse("nbd+unix:///x?socket=nowhere").expect("a URI");
    refused(plan_target(&export, &from, &TargetOptions::default()), Refusal::Unsupported, "live disks");
    let plain = Locator::parse("null:").expect("null");
    refused(open_source(&plain, &SourceOptions::default()), Refusal::BadArgument, "null:SIZE");
}

#[test]
fn a_source_or_target_without_permission_is_refused() {
    let place = Place::new();
    fs::set_permissions(place.path(""), fs::Permissions::from_mode(0o755)).expect("chmod");
    let from = source(place.file("readable", MIB)).expect("source");
    for name in ["closed", "target"] {
        let path = place.file(name, MIB);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    }
    let paths = (place.path("closed"), place.path("target"), place.path("new"));
    // The file system's user is one of the thread alone.
    let worker = std::thread::spawn(move || {
        if nix::unistd::geteuid().is_root() {
            setfsuid(Uid::from_raw(65534));
        } else {
            fs::set_permissions(&paths.0, fs::Permissions::from_mode(0o000)).expect("chmod");
            fs::set_permissions(&paths.1, fs::Permissions::from_mode(0o000)).expect("chmod");
        }
        refused(source(&paths.0), Refusal::PermissionDenied, "permission denied");
        refused(plan(&paths.1, &from, &forced()), Refusal::PermissionDenied, "permission denied");
        if nix::unistd::geteuid().is_root() {
            refused(target(&paths.2, &from, &forced()), Refusal::PermissionDenied, "permission denied");
        }
    });
    worker.join().expect("refusals");
    assert_eq!(place.names(), ["closed", "readable", "target"]);
}

#[test]
fn a_target_that_is_no_disk_or_nowhere_is_refused() {
    let place = Place::new();
    let from = source(place.file("source", MIB)).expect("source");
    let before = place.names();
    refused(plan(place.path(""), &from, &forced()), Refusal::NotADisk, "it is a directory");
    refused(plan("/dev/null", &from, &forced()), Refusal::NotADisk, "it is a character device");
    refused(plan(place.path("no/where"), &from, &forced()), Refusal::NotFound, "does not exist");
    refused(plan(place.path("source/x"), &from, &forced()), Refusal::NotFound, "not a directory");
    let slash = Locator::path(format!("{}/", place.text("new")));
    refused(plan_target(&slash, &from, &forced()), Refusal::NotFound, "directory is no target");
    let long = place.path(&"x".repeat(256));
    refused(plan(long, &from, &forced()), Refusal::BadArgument, "file name too long");
    assert_eq!(place.names(), before);
    symlink(place.path("nothing"), place.path("dangling")).expect("symlink");
    refused(plan(place.path("dangling"), &from, &forced()), Refusal::NotFound, "symbolic link to nothing");
    mkfifo(&place.path("fifo"), Mode::S_IRWXU).expect("fifo");
    refused(plan(place.path("fifo"), &from, &forced()), Refusal::NotADisk, "it is a FIFO");
    assert!(!place.path("nothing").exists());
}

#[test]
fn source_and_target_that_are_one_file_are_refused() {
    let place = Place::new();
    let path = place.file("source", MIB);
    symlink(&path, place.path("symlink")).expect("symlink");
    fs::hard_link(&path, place.path("hardlink")).expect("hard link");
    let before = fingerprint(&path);
    let from = source(&path).expect("source");
    for name in ["source", "symlink", "hardlink", "../source"] {
        let other = if name.starts_with("..") {
            place.path("").join("..").join(place.path("").file_name().expect("name")).join("source")
        } else {
            place.path(name)
        };
        refused(plan(other, &from, &forced()), Refusal::SameDisk, "same disk as the source");
    }
    assert_eq!(fingerprint(&path), before);
}

#[test]
fn an_existing_file_needs_force_and_is_then_emptied() {
    let place = Place::new();
    let from = source(place.file("source", MIB + 1)).expect("source");
    for (name, length) in [("empty", 0), ("shorter", 100), ("longer", 3 * MIB)] {
        let path = place.file(name, length);
        let before = fingerprint(&path);
        refused(plan(&path, &from, &TargetOptions::default()), Refusal::Exists, "--force");
        drop(plan(&path, &from, &forced()).expect("a plan"));
        assert_eq!(fingerprint(&path), before, "a plan changes nothing");
        let to = target(&path, &from, &forced()).expect("target");
        assert!(to.known_zero() && !to.is_new_file());
        assert_eq!(to.storage().limits().length, Length(MIB + 1));
        let metadata = fs::metadata(&path).expect("metadata");
        assert_eq!((metadata.len(), metadata.ino()), (MIB + 1, before.1));
        assert!(fs::read(&path).expect("read").iter().all(|&byte| byte == 0));
        assert!(!to.discard_new_file().expect("discard"), "it existed before");
        assert!(path.exists());
    }
}

#[test]
fn a_new_file_has_the_exact_length_and_can_be_taken_back() {
    let place = Place::new();
    for length in [0, 1, 511, 65537] {
        let path = place.file("source", length);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod");
        let from = source(&path).expect("source");
        let planned = plan(place.path("new"), &from, &TargetOptions::default()).expect("plan");
        assert!(planned.identity().is_none() && !place.path("new").exists(), "a plan creates nothing");
        let to = planned.prepare().expect("target");
        assert!(to.known_zero() && to.is_new_file());
        let metadata = fs::metadata(place.path("new")).expect("metadata");
        assert_eq!((metadata.len(), to.identity().length), (length, length));
        assert_eq!(metadata.mode() & 0o137, 0, "no more open than the source");
        let storage = to.storage();
        assert_eq!(storage.write_at(IoPath::Buffered, 0, b"x"), Ok(1));
        storage.flush().expect("flush");
        assert!(to.discard_new_file().expect("discard"));
        assert_eq!(place.names(), ["source"]);
        assert!(!to.discard_new_file().expect("again"), "gone already");
    }
}

#[test]
fn a_file_that_took_the_place_of_the_new_one_is_not_removed() {
    let place = Place::new();
    let from = source(place.file("source", MIB)).expect("source");
    let to = target(place.path("new"), &from, &TargetOptions::default()).expect("target");
    fs::rename(place.path("new"), place.path("kept")).expect("rename");
    place.file("new", 5);
    assert!(!to.discard_new_file().expect("discard"));
    assert_eq!(place.names(), ["kept", "new", "source"]);
}

#[test]
fn a_file_that_appears_between_plan_and_prepare_is_refused() {
    let place = Place::new();
    let from = source(place.file("source", MIB)).expect("source");
    let planned = plan(place.path("new"), &from, &TargetOptions::default()).expect("plan");
    let before = fingerprint(place.file("new", 5));
    refused(planned.prepare(), Refusal::Exists, "meanwhile");
    assert_eq!(fingerprint(place.path("new")), before);
}

#[test]
fn two_copies_never_meet_on_one_file() {
    let place = Place::new();
    let from = source(place.file("source", MIB)).expect("source");
    place.file("target", 10);
    let planned = plan(place.path("target"), &from, &forced()).expect("first");
    let before = fingerprint(place.path("target"));
    refused(plan(place.path("target"), &from, &forced()), Refusal::InUse, "another copy");
    refused(source(place.path("target")), Refusal::InUse, "another copy is writing to it");
    assert_eq!(fingerprint(place.path("target")), before);
    drop(planned);
    let other = source(place.path("target")).expect("free again");
    source(place.path("target")).expect("two readers");
    refused(plan(place.path("source"), &other, &forced()), Refusal::InUse, "another copy");
    let new = target(place.path("new"), &from, &TargetOptions::default()).expect("new");
    refused(plan(place.path("new"), &from, &forced()), Refusal::InUse, "another copy");
    drop(new);
}

#[test]
fn the_disk_of_a_running_machine_is_no_target_and_a_source_only_by_force() {
    let place = Place::new();
    let path = place.file("machine", MIB);
    let from = source(place.file("source", MIB)).expect("source");
    let machine = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn();
    let Ok(mut machine) = machine else {
        println!("the_disk_of_a_running_machine skipped: needs qemu-io");
        return;
    };
    let is_open = || info(&Locator::path(&path)).expect("told").used_by_others.contains(&Permission::Write);
    let locked = (0..1000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(10));
        is_open()
    });
    assert!(locked, "qemu-io locks what it opens for writing");
    let before = fingerprint(&path);
    let began = Instant::now();
    refused(source(&path), Refusal::InUse, "another program has it open for writing");
    assert!(began.elapsed() < std::time::Duration::from_secs(10), "patience ends");
    refused(plan(&path, &from, &forced()), Refusal::InUse, "another program has it open for writing");
    assert_eq!(fingerprint(&path), before);
    let forced_share = SourceOptions { force_share: true, ..SourceOptions::default() };
    let opened = open_source(&Locator::path(&path), &forced_share).expect("by force");
    assert!(opened.warnings().iter().any(|line| line.contains("is in use")), "{:?}", opened.warnings());
    drop(opened);
    drop(machine.stdin.take());
    machine.wait().expect("qemu-io ends with its input");
    assert_eq!(source(&path).expect("free again").warnings(), [""; 0]);
    drop(plan(&path, &from, &forced()).expect("free again"));
}

#[test]
fn a_source_that_changes_is_noticed() {
    let place = Place::new();
    let path = place.file("source", MIB);
    let from = source(&path).expect("source");
    source_unchanged(&from).expect("unchanged");
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::OpenOptions::new().write(true).open(&path).expect("open").write_all_at(b"!", 5).expect("write");
    let error = source_unchanged(&from).expect_err("changed");
    assert_eq!(error.kind(), ErrorKind::SourceChanged);
    assert!(error.to_string().contains("modification time") && !error.is_refusal(), "{error}");
    let from = source(&path).expect("source");
    fs::OpenOptions::new().write(true).open(&path).expect("open").set_len(MIB - 1).expect("shrink");
    assert!(source_unchanged(&from).expect_err("changed").to_string().contains("its length changed"));
    source_unchanged(&null("null:1G")).expect("null never changes");
}

#[test]
fn null_disks() {
    let from = null("null:3G");
    assert_eq!(from.length(), Length(3 << 30));
    let to = |text: &str, options: &TargetOptions<'_>| {
        plan_target(&Locator::parse(text).expect("locator"), &from, options)
    };
    let opened = to("null:", &TargetOptions::default()).expect("plan").prepare().expect("target");
    assert_eq!(opened.storage().limits().length, Length(3 << 30));
    assert!(opened.storage().descriptors().is_none());
    refused(to("null:2G", &TargetOptions::default()), Refusal::TooSmall, "fewer than the source's");
    let verify = TargetOptions { verify: true, ..TargetOptions::default() };
    refused(to("null:", &verify), Refusal::Unsupported, "could be verified");
}

#[test]
fn a_length_that_the_file_system_cannot_hold_is_refused_and_leaves_everything() {
    let place = Place::new();
    let from = null("null:7E");
    let path = place.file("target", 100);
    let before = fingerprint(&path);
    match target(&path, &from, &forced()) {
        Ok(_) => println!("skipped: this file system holds files of 7 EiB"),
        Err(error) => {
            refused::<()>(Err(error), Refusal::TooLarge, "file too large");
            assert_eq!(fingerprint(&path).0, before.0);
            refused(target(place.path("new"), &from, &forced()), Refusal::TooLarge, "file too large");
            assert_eq!(place.names(), ["target"]);
        }
    }
}

#[test]
fn a_sparse_source_is_not_taken_for_a_full_one() {
    let place = Place::new();
    let from = source(place.file("source", 1 << 40)).expect("a sparse source");
    let planned = plan(place.path("new"), &from, &TargetOptions::default()).expect("plan");
    assert!(!planned.warnings().iter().any(|line| line.contains("room")), "{:?}", planned.warnings());
}

/// The limit belongs to the process: this test runs itself again in a child that has one.
#[test]
fn a_limit_on_file_sizes_is_noticed_before_anything_is_touched() {
    const IN_CHILD: &str = "ENGINE_TEST_UNDER_LIMIT";
    if std::env::var_os(IN_CHILD).is_none() {
        let myself = std::env::current_exe().expect("test program");
        let name = "files::a_limit_on_file_sizes_is_noticed_before_anything_is_touched";
        let output = Command::new("sh")
            .args(["-c", "ulimit -f 100; exec \"$0\" --exact --nocapture \"$1\""])
            .arg(myself)
            .arg(name)
            .env(IN_CHILD, "1")
            .output()
            .expect("child");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let place = Place::new();
    let from = null("null:1G");
    refused(plan(place.path("new"), &from, &forced()), Refusal::TooLarge, "ulimit -f");
    let path = place.file("target", 100);
    let before = fingerprint(&path);
    refused(plan(&path, &from, &forced()), Refusal::TooLarge, "ulimit -f");
    assert_eq!(fingerprint(&path), before);
    assert_eq!(place.names(), ["target"]);
}

#[test]
fn info_describes_a_file() {
    let place = Place::new();
    let path = place.file("disk", 5 * MIB);
    let found = info(&Locator::path(&path)).expect("info");
    assert_eq!((found.kind, found.length), (DiskKind::File, 5 * MIB));
    assert!(found.allocated_bytes.is_some_and(|bytes| bytes < MIB));
    assert_eq!(Path::new(&found.path), fs::canonicalize(&path).expect("path"));
    let json = serde_json::to_value(&found).expect("JSON");
    assert_eq!(json["kind"], "file");
    refused(info(&Locator::path(place.path(""))), Refusal::NotADisk, "cannot inspect");
    refused(info(&Locator::parse("null:1M").expect("null")), Refusal::NotADisk, "null disk");
}
