//! Backups of a daemon that pause on errors, are told once a pause, and go on; and what else their operator hears while they run.

#[path = "support/kernel.rs"]
#[allow(dead_code, reason = "every test program uses its own part of this")]
mod kernel;
mod support;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::qmp::Daemon;
use support::{Running, dense, directory, has, run_in, same};

const LENGTH: usize = 24 << 20;

fn with_disk(there: &Path) -> Daemon {
    dense(&there.join("disk.img"), LENGTH, 3);
    let daemon = Daemon::start(there, &["--disk", "vda=disk.img"]);
    drop(daemon.client());
    daemon
}

/// Limit the size of the files that the daemon may write, as a disk that fills up.
fn limit(daemon: &Daemon, bytes: &str) {
    let status = Command::new("prlimit")
        .args(["--pid", &daemon.running.id().to_string(), &format!("--fsize={bytes}:")])
        .status()
        .expect("prlimit runs");
    assert!(status.success());
}

const BACKUP: [&str; 11] = [
    "backup",
    "--qmp",
    "qmp.sock",
    "--disk",
    "vda",
    "--target",
    "copy.img",
    "--job-id",
    "nightly",
    "--on-target-error",
    "stop",
];

fn count(messages: &str, text: &str) -> usize {
    messages.lines().filter(|line| line.contains(text)).count()
}

#[test]
fn a_pause_is_told_once_and_lifted_by_a_signal_or_by_the_job_command() {
    if !has("prlimit") {
        return;
    }
    let there = directory();
    let daemon = with_disk(there.path());
    let slow = [&BACKUP[..], &["--speed", "1M", "--progress", "json"]].concat();
    let mut running = Running::program(there.path(), &slow);
    running.progress(|line| line["status"] == "running");
    limit(&daemon, "1048576");
    // All that is in flight then fails, and is one pause.
    let fast = run_in(there.path(), &["job", "set-speed", "--qmp", "qmp.sock", "nightly", "none"]);
    assert_eq!(support::code(&fast), 0, "{}", support::stderr(&fast));
    let reason = running.expect("engine-cli: paused: ");
    assert!(reason.contains("EFBIG"), "{reason}");
    let advice = running.expect("to try again ");
    assert!(
        advice.contains("run: engine-cli job resume --qmp unix:qmp.sock nightly; a guest that writes"),
        "{advice}"
    );
    running.progress(|line| line["status"] == "paused");
    running.progress(|line| line["status"] == "paused");
    // Nothing has changed: it pauses again, and says so again.
    running.signal("CONT");
    running.expect("engine-cli: paused: ");
    running.expect("to try again ");
    running.progress(|line| line["status"] == "paused");
    let resumed = run_in(there.path(), &["job", "resume", "--qmp", "qmp.sock", "nightly"]);
    assert_eq!(support::code(&resumed), 0, "{}", support::stderr(&resumed));
    running.expect("engine-cli: paused: ");
    running.progress(|line| line["status"] == "paused");
    limit(&daemon, "unlimited");
    running.signal("CONT");
    let (code, _, messages) = running.end();
    assert_eq!(code, 0, "{messages}");
    assert_eq!((count(&messages, "paused: "), count(&messages, "to try again ")), (3, 3), "{messages}");
    assert!(same(&there.path().join("disk.img"), &there.path().join("copy.img")));
    let (_, told) = daemon.running.kill();
    assert_eq!(count(&told.join("\n"), "EFBIG"), 3, "{told:#?}");
}

/// The guest goes on, for what it changes is in the fleece file; on the way from there to the target there is no room.
#[test]
fn a_pause_on_the_way_from_the_fleece_file_is_told_and_lifted_by_a_signal() {
    const CHANGED: usize = 8 << 20;
    if !kernel::is_root() || !has("qemu-io") {
        return;
    }
    let there = directory();
    let disk = there.path().join("disk.img");
    dense(&disk, LENGTH, 3);
    let daemon = Daemon::start(there.path(), &["--nbd", "unix:nbd.sock", "--disk", "vda=disk.img"]);
    drop(daemon.client());
    let before = std::fs::read(&disk).expect("read");
    let small = there.path().join("small");
    let _mount = kernel::Mount::tmpfs(&small, 4 << 20);
    let mut arguments = BACKUP;
    arguments[6] = "small/copy.img";
    let fleece = ["--sync", "none", "--fleece", "fleece.img", "--fleece-size", "16M", "--progress", "json"];
    let mut running = Running::program(there.path(), &[&arguments[..], &fleece].concat());
    running.progress(|line| line["status"] == "running");
    let guest = Command::new("timeout")
        .args(["60", "qemu-io", "-f", "raw", "-c", "write -P 9 0 8M", "nbd+unix:///vda?socket=nbd.sock"])
        .current_dir(there.path())
        .output()
        .expect("qemu-io runs");
    assert!(guest.status.success() && !support::stdout(&guest).contains("failed"), "{guest:?}");
    let reason = running.expect("engine-cli: paused: ");
    assert!(reason.contains("ENOSPC") && reason.contains("copy.img"), "{reason}");
    running.expect("to try again ");
    running.progress(|line| line["status"] == "paused");
    let remounted = Command::new("mount").args(["-o", "remount,size=32m"]).arg(&small).status();
    assert!(remounted.expect("mount runs").success());
    running.signal("CONT");
    running.progress(|line| {
        line["status"] == "running"
            && line["x-progress"]["done"] == CHANGED
            && line["x-progress"]["fleeced"] == 0
    });
    running.signal("INT");
    let (code, _, messages) = running.end();
    assert_eq!(code, 130, "{messages}");
    let copy = std::fs::read(small.join("copy.img")).expect("read");
    assert!(copy[..CHANGED] == before[..CHANGED], "the old contents are there");
}

#[test]
fn the_last_line_of_progress_is_the_end() {
    let there = directory();
    let _daemon = with_disk(there.path());
    let running = Running::program(there.path(), &[&BACKUP[..], &["--progress", "json"]].concat());
    let (code, _, messages) = running.end();
    assert_eq!(code, 0, "{messages}");
    let mut lines = messages.lines().filter(|line| line.contains("\"event\":\"progress\""));
    let last: Value = serde_json::from_str(lines.next_back().expect("a line")).expect("JSON");
    assert_eq!(last["final"], true, "{last}");
    assert_eq!((&last["status"], &last["id"]), (&"concluded".into(), &"nightly".into()), "{last}");
    assert_eq!((&last["x-progress"]["done"], &last["x-progress"]["total"]), (&LENGTH.into(), &LENGTH.into()));
    assert_eq!(last["current-progress"], last["total-progress"], "{last}");
}

#[test]
fn a_target_that_may_become_too_small_is_told_to_the_operator() {
    if !kernel::is_root() {
        return;
    }
    let there = directory();
    let mut daemon = with_disk(there.path());
    let _mount = kernel::Mount::tmpfs(&there.path().join("small"), 4 << 20);
    let mut arguments = BACKUP;
    arguments[6] = "small/copy.img";
    let mut running = Running::program(there.path(), &arguments);
    let notice = running.expect("the copy takes about 24.0 MiB and there is room for ");
    assert_eq!(
        daemon.running.expect("the copy takes about ").split_once("the copy").expect("cut").1,
        notice.split_once("the copy").expect("cut").1
    );
    running.expect("engine-cli: paused: ");
    running.signal("INT");
    let (code, _, messages) = running.end();
    assert_eq!(code, 130, "{messages}");
    assert_eq!(count(&messages, "the copy takes about"), 1, "{messages}");
}

#[test]
fn a_read_only_device_is_exported_read_only() {
    if !kernel::is_root() || !has("nbdinfo") {
        return;
    }
    let there = directory();
    dense(&there.path().join("disk.img"), 4 << 20, 3);
    let device = kernel::LoopDevice::with(&there.path().join("disk.img"), &["--read-only"]);
    let disk = format!("vda={}", device.text());
    let mut daemon = Daemon::start(there.path(), &["--nbd", "unix:nbd.sock", "--disk", &disk]);
    daemon.running.expect(&format!(
        "engine-cli: --disk {disk} cannot be opened for writing, so guests may only read it"
    ));
    let nodes = daemon.client().ok("query-named-block-nodes", serde_json::json!({}));
    for node in nodes.as_array().expect("nodes") {
        assert_eq!(node["ro"], true, "{node}");
    }
    let uri = "nbd+unix:///vda?socket=nbd.sock";
    let is_read_only = Command::new("nbdinfo")
        .args(["--is", "read-only", uri])
        .current_dir(there.path())
        .status()
        .expect("nbdinfo runs");
    assert!(is_read_only.success());
    // What has to be writable is refused as a file without the permission is.
    let node = serde_json::json!({ "driver": "host_device", "node-name": "x", "filename": device.text() });
    let why = daemon.client().refused("blockdev-add", node);
    assert!(why.ends_with("Permission denied"), "{why}");
}
