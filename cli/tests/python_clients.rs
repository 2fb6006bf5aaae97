//! Clients in Python, as people write them: libnbd's module, a socket by hand, and the package `qemu.qmp`. The scripts are in `python/`.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;
use support::qmp::Daemon;
use support::{dense, directory, stderr, stdout};

/// Python as the distribution has it: its modules come with packages.
const PYTHON: &str = "/usr/bin/python3";

/// Run a script that gives up rather than hang.
fn script(python: &str, name: &str, arguments: &[&str]) -> Output {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(name);
    Command::new("timeout").args(["300", python]).arg(path).args(arguments).output().expect("runs")
}

#[track_caller]
fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}{}", stdout(output), stderr(output));
}

/// Whether the module is there; says so when the test is skipped for that.
fn has_module(name: &str) -> bool {
    let imported = Command::new(PYTHON).args(["-c", &format!("import {name}")]).output();
    let found = imported.is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: {PYTHON} has no module {name}");
    }
    found
}

fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

#[test]
fn requests_one_by_one_legal_and_illegal() {
    if !has_module("nbd") {
        return;
    }
    const LENGTH: usize = (40 << 20) + 1;
    let there = directory();
    dense(&there.path().join("disk.img"), LENGTH, 3);
    let daemon = Daemon::start(there.path(), &["--nbd", "unix:nbd.sock", "--disk", "vda=disk.img"]);
    let mut client = daemon.client();
    client.ok("block-export-add", json!({ "type": "nbd", "id": "r", "node-name": "vda", "name": "r" }));
    let socket = there.path().join("nbd.sock");
    succeeds(&script(PYTHON, "nbd_requests.py", &[text(&socket), &LENGTH.to_string()]));
    client.ok("quit", json!({}));
    assert_eq!(daemon.running.end().0, 0);
}

/// What it checks: five hundred clients that ask for nothing, then the same ones asking for all and reading nothing, and clients that die at every
/// byte of a request. Memory keeps to what README.md says; nothing is left; a backup starts afterwards, so no permit is out.
#[test]
fn clients_in_numbers_and_clients_that_die() {
    if !Path::new(PYTHON).exists() {
        eprintln!("SKIPPED: {PYTHON} is not installed");
        return;
    }
    let there = directory();
    dense(&there.path().join("disk.img"), 64 << 20, 3);
    let daemon = Daemon::start(there.path(), &["--nbd", "unix:nbd.sock", "--disk", "vda=disk.img"]);
    let mut client = daemon.client();
    let socket = there.path().join("nbd.sock");
    let output = script(PYTHON, "nbd_crowd.py", &[text(&socket), &daemon.running.id().to_string()]);
    succeeds(&output);
    println!("{}", stdout(&output));
    dense(&there.path().join("target.img"), 64 << 20, 9);
    client.add_file("target", &there.path().join("target.img"));
    let backup = json!({ "job-id": "job", "device": "vda", "target": "target", "sync": "full" });
    client.ok("blockdev-backup", backup);
    assert!(client.until("job", "null").iter().any(|word| word == "BLOCK_JOB_COMPLETED"));
    assert!(support::same(&there.path().join("disk.img"), &there.path().join("target.img")));
}

/// A Python that has `qemu.qmp`, in a place of its own below the target directory; says so when the test is skipped for want of it.
fn python_with_qmp() -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target directory");
    let output = Command::new(root.join(".ci/python")).arg(place.join("python")).output().expect("runs");
    if !output.status.success() {
        eprintln!("SKIPPED: no Python with qemu.qmp: {}", stderr(&output));
        return None;
    }
    Some(stdout(&output).trim().to_owned())
}

#[test]
fn the_package_qemu_qmp_as_client() {
    let Some(python) = python_with_qmp() else { return };
    let there = directory();
    dense(&there.path().join("disk.img"), 4 << 20, 3);
    std::fs::write(there.path().join("target.img"), vec![7; 4 << 20]).expect("written");
    let daemon = Daemon::start(there.path(), &["--disk", "vda=disk.img"]);
    drop(daemon.client());
    let target = there.path().join("target.img");
    succeeds(&script(&python, "qmp_client.py", &[text(&daemon.socket), "vda", text(&target)]));
    assert!(support::same(&there.path().join("disk.img"), &target));
    assert_eq!(daemon.running.end().0, 0, "it was told to quit");
}
