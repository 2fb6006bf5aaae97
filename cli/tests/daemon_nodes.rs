//! The disks of a daemon as an operator has them: many, and none that is overwritten because another path was meant.

#[path = "support/kernel.rs"]
#[allow(dead_code, reason = "every test program uses its own part of this")]
mod kernel;
mod support;

use std::path::Path;
use std::process::Output;

use kernel::LoopDevice;
use serde_json::json;
use support::qmp::Daemon;
use support::{Running, code, dense, directory, run_in, same, stderr};

const LENGTH: usize = 4 << 20;

/// `backup` of the disk `vda`.
fn back_up(there: &Path, more: &[&str]) -> Output {
    let backup = ["backup", "--qmp", "qmp.sock", "--disk", "vda", "--after", "0"];
    run_in(there, &[&backup[..], more].concat())
}

/// A daemon with the disk `vda` and, with nobody who uses it, `vdb`.
fn daemon_with(there: &Path, idle: &str) -> Daemon {
    dense(&there.join("a.img"), LENGTH, 1);
    let daemon = Daemon::start(there, &["--disk", "vda=a.img", "--disk", &format!("vdb={idle}")]);
    drop(daemon.client());
    daemon
}

#[track_caller]
fn refused(output: &Output, told: &str) {
    assert_eq!(code(output), 2, "{}", stderr(output));
    assert!(stderr(output).contains(told), "{told}: {}", stderr(output));
}

#[test]
fn an_idle_device_is_no_fleece_file() {
    if !kernel::is_root() {
        return;
    }
    let there = directory();
    let (idle, before) = (there.path().join("b.img"), there.path().join("before.img"));
    for path in [&idle, &before] {
        dense(path, LENGTH, 2);
    }
    let device = LoopDevice::over(&idle);
    let _daemon = daemon_with(there.path(), device.text());
    let output = back_up(there.path(), &["--target", "copy.img", "--fleece", device.text()]);
    refused(&output, &format!("{} is the daemon's disk 'vdb'; choose another fleece file", device.text()));
    // Nor by what lies under it.
    let output = back_up(there.path(), &["--target", "copy.img", "--fleece", "b.img"]);
    refused(&output, "b.img shares its bytes with the daemon's disk 'vdb'; choose another fleece file");
    assert!(!there.path().join("copy.img").exists());
    assert!(same(&idle, &before));
}

#[test]
fn what_shares_its_bytes_with_an_idle_disk_is_no_target() {
    if !kernel::is_root() {
        return;
    }
    let there = directory();
    let (idle, before) = (there.path().join("b.img"), there.path().join("before.img"));
    for path in [&idle, &before] {
        dense(path, 2 * LENGTH, 2);
    }
    // As a disk with two partitions: the second and the whole are the daemon's, the first is not.
    let (first, second) = (
        LoopDevice::with(&idle, &["--sizelimit", &LENGTH.to_string()]),
        LoopDevice::with(&idle, &["--offset", &LENGTH.to_string()]),
    );
    let daemon = daemon_with(there.path(), second.text());
    let client = || daemon.client();
    for target in ["b.img", second.text()] {
        for force in [&[][..], &["--force"]] {
            let output = back_up(there.path(), &[&["--target", target][..], force].concat());
            refused(&output, "the daemon's disk 'vdb'; choose another target");
        }
    }
    assert!(same(&idle, &before));
    let whole = json!({ "driver": "file", "node-name": "whole", "filename": idle.display().to_string() });
    client().ok("blockdev-add", whole);
    let output = back_up(there.path(), &["--target", first.text(), "--force"]);
    let told = format!("{} shares its bytes with the daemon's disk 'whole'; choose another", first.text());
    refused(&output, &told);
    assert!(same(&idle, &before));
    // What lies beside an idle disk is free.
    client().ok("blockdev-del", json!({ "node-name": "whole" }));
    let output = back_up(there.path(), &["--target", first.text(), "--force"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let (a, b) = (std::fs::read(there.path().join("a.img")), std::fs::read(&idle));
    let (a, b) = (a.expect("read"), b.expect("read"));
    assert!(a == b[..LENGTH], "the first is the copy");
    assert!(b[LENGTH..] == std::fs::read(&before).expect("read")[LENGTH..], "the second is as it was");
}

#[test]
fn disks_that_share_bytes_are_refused_at_the_start() {
    if !kernel::is_root() {
        return;
    }
    let there = directory();
    let file = there.path().join("a.img");
    dense(&file, 2 * LENGTH, 1);
    // As a disk with two partitions.
    let (first, second) = (
        LoopDevice::with(&file, &["--sizelimit", &LENGTH.to_string()]),
        LoopDevice::with(&file, &["--offset", &LENGTH.to_string()]),
    );
    // One that begins all the same would not end.
    let start = |a: &str, b: &str| {
        let (a, b) = (format!("vda={a}"), format!("vdb={b}"));
        let arguments = ["daemon", "--qmp", "unix:qmp.sock", "--disk", &a, "--disk", &b];
        Running::program(there.path(), &arguments).end()
    };
    for part in [first.text(), second.text()] {
        for (a, b) in [("a.img", part), (part, "a.img")] {
            let (code, _, messages) = start(a, b);
            let told = "--disk vda and --disk vdb share their bytes; give one of them";
            assert!(code == 2 && messages.contains(told), "{a} {b}: {messages}");
        }
    }
    // What lies side by side shares nothing.
    let disks = ["--disk", &format!("vda={}", first.text()), "--disk", &format!("vdb={}", second.text())];
    let daemon = Daemon::start(there.path(), &disks);
    daemon.client().ok("quit", json!({}));
}

/// Nobody is disconnected for an honest question.
#[test]
fn all_nodes_are_told_however_long_their_paths_are() {
    let there = directory();
    let directory = there.path().join(vec!["x".repeat(200); 18].join("/"));
    std::fs::create_dir_all(&directory).expect("made");
    let disk = directory.join("disk.img");
    dense(&disk, 4096, 1);
    let daemon = Daemon::start(there.path(), &[]);
    let mut client = daemon.client();
    let file = json!({ "driver": "file", "node-name": "disk", "filename": disk.display().to_string() });
    client.ok("blockdev-add", file);
    for number in 1..1024 {
        let name = format!("over{number}");
        client.ok("blockdev-add", json!({ "driver": "raw", "node-name": name, "file": "disk" }));
    }
    let nodes = client.ok("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().map(Vec::len), Some(1024));
    assert!(nodes.to_string().len() > 7 << 20, "more than may wait of events");
    client.ok("query-version", json!({}));
    let output =
        run_in(there.path(), &["backup", "--qmp", "qmp.sock", "--disk", "none", "--target", "y.img"]);
    refused(&output, "the daemon has no disk none; it has: ");
}

#[test]
fn a_daemon_with_many_disks_is_understood() {
    let there = directory();
    let mut arguments = Vec::new();
    for number in 0..180 {
        let path = there.path().join(format!("{number}.img"));
        std::fs::File::create(path).and_then(|file| file.set_len(1 << 20)).expect("made");
        arguments.extend(["--disk".to_owned(), format!("vd{number}={number}.img")]);
    }
    dense(&there.path().join("a.img"), LENGTH, 1);
    arguments.extend(["--disk".to_owned(), "vda=a.img".to_owned()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let daemon = Daemon::start(there.path(), &arguments);
    drop(daemon.client());
    let output = back_up(there.path(), &["--target", "copy.img"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(same(&there.path().join("a.img"), &there.path().join("copy.img")));
    // And where the name is wrong, all of them are told.
    let output = run_in(there.path(), &["backup", "--qmp", "qmp.sock", "--disk", "x", "--target", "y.img"]);
    refused(&output, "the daemon has no disk x; it has: ");
}
