//! Image locking of the daemon, both ways: what QEMU's programs have open is refused, and what the daemon uses is refused by them.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::MIB;
use crate::locks::{Use, has_qemu, qemu_opens};
use crate::support::qmp::{Daemon, Qmp};
use crate::support::{Running, dense, directory};

const READ: [&str; 4] = ["-f", "raw", "-c", "read 0 4k"];

/// Programs of QEMU are kept from `disk`, by the lock on `permission`, or not at all; for reading alone, by that on `reading`.
#[track_caller]
fn programs_open(place: &Path, disk: &str, permission: Option<&str>, reading: Option<&str>) {
    qemu_opens(place, "qemu-io", &[&READ[..], &[disk]].concat(), permission);
    qemu_opens(place, "qemu-io", &[&READ[..], &["-r", disk]].concat(), reading);
    if permission.is_some() {
        let node = format!("file,filename={disk},node-name=disk");
        let server = "addr.type=unix,addr.path=socket";
        let export = "nbd,id=export,node-name=disk,writable=on";
        let arguments = ["--blockdev", &node, "--nbd-server", server, "--export", export];
        qemu_opens(place, "qemu-storage-daemon", &arguments, permission);
    }
}

fn x_backup(place: &Path, more: Value) -> Value {
    let path = place.join("copy").display().to_string();
    let mut backup = json!({ "job-id": "j", "device": "vda", "path": path, "sync": "full" });
    backup.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    backup
}

#[test]
fn programs_of_qemu_are_kept_from_the_disks_that_a_daemon_uses() {
    if !has_qemu() {
        return;
    }
    let there = directory();
    let place = there.path();
    for disk in ["a", "b", "idle"] {
        dense(&place.join(disk), MIB, 0);
    }
    let daemon = Daemon::start(place, &["--nbd", "unix:nbd.sock", "--disk", "vda=a"]);
    let mut client = daemon.client();
    for (node, name) in [("b", "b"), ("idle", "idle")] {
        client.add_file(node, &place.join(name));
    }
    programs_open(place, "a", Some("write"), None);
    // What has to make sense as a whole is not read from it either.
    let convert = ["convert", "-f", "raw", "-O", "raw", "a", "converted"];
    qemu_opens(place, "qemu-img", &convert, Some("write"));
    // What nobody uses is anybody's.
    programs_open(place, "b", None, None);
    let onto = json!({ "job-id": "j", "device": "vda", "target": "b", "sync": "full", "speed": 1 });
    client.ok("blockdev-backup", onto);
    programs_open(place, "b", Some("consistent read"), Some("consistent read"));
    programs_open(place, "idle", None, None);
    client.ok("job-cancel", json!({ "id": "j" }));
    client.until("j", "null");
    programs_open(place, "b", None, None);
    client.ok("nbd-server-stop", json!({}));
    programs_open(place, "a", None, None);
}

#[test]
fn a_daemon_does_not_start_with_a_disk_that_others_write_to() {
    if !has_qemu() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), MIB, 0);
    for its in Use::WRITING {
        let _holder = its.begin(&place.join("a"));
        let arguments = ["daemon", "--qmp", "unix:qmp.sock", "--nbd", "unix:nbd.sock", "--disk", "vda=a"];
        let (code, _, messages) = Running::program(place, &arguments).end();
        assert_eq!(code, 2, "{messages}");
        assert!(messages.contains("another program has it open for writing"), "{messages}");
        assert!(!place.join("qmp.sock").exists() && !place.join("nbd.sock").exists());
    }
}

/// The command is refused, in words that name the file.
#[track_caller]
fn refused(client: &mut Qmp, command: &str, arguments: Value, path: &Path) {
    let told = client.refused(command, arguments);
    assert!(told.contains("another program") && told.contains(&path.display().to_string()), "{told}");
}

#[test]
fn a_daemon_uses_no_disk_that_others_use_in_a_way_that_excludes_it() {
    if !has_qemu() {
        return;
    }
    let there = directory();
    let place = there.path();
    for (disk, seed) in [("a", 0), ("b", 3), ("copy", 5)] {
        dense(&place.join(disk), MIB, seed);
    }
    let daemon = Daemon::start(place, &["--disk", "vda=a"]);
    let mut client = daemon.client();
    let socket = json!({ "type": "unix", "data": { "path": place.join("nbd.sock") } });
    client.ok("nbd-server-start", json!({ "addr": socket }));
    client.add_file("b", &place.join("b"));
    let before = ["a", "b", "copy"].map(|name| fs::read(place.join(name)).expect("read"));
    let export = |node: &str| json!({ "type": "nbd", "id": "e", "node-name": node, "writable": true });
    let onto = || json!({ "job-id": "j", "device": "vda", "target": "b", "sync": "full" });
    for its in Use::WRITING {
        let _holder = its.begin(&place.join("a"));
        refused(&mut client, "block-export-add", export("vda"), &place.join("a"));
        refused(&mut client, "blockdev-backup", onto(), &place.join("a"));
        refused(&mut client, "x-backup", x_backup(place, json!({ "force": true })), &place.join("a"));
        // A node is but a name: it may be added and taken away meanwhile.
        client.add_file("again", &place.join("a"));
        client.ok("blockdev-del", json!({ "node-name": "again" }));
    }
    // A target is nobody else's, not even for reading.
    for its in Use::WRITING.into_iter().chain(Use::READING) {
        for (name, command, arguments) in [
            ("b", "blockdev-backup", onto()),
            ("copy", "x-backup", x_backup(place, json!({ "force": true }))),
        ] {
            let _holder = its.begin(&place.join(name));
            refused(&mut client, command, arguments, &place.join(name));
        }
    }
    let now = ["a", "b", "copy"].map(|name| fs::read(place.join(name)).expect("read"));
    assert!(now == before, "something was touched");
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    assert_eq!(client.ok("query-block-exports", json!({})), json!([]));
    // All of it is free, and of use.
    client.ok("block-export-add", export("vda"));
    client.ok("blockdev-backup", onto());
    client.until("j", "null");
    assert!(fs::read(place.join("b")).expect("read") == before[0]);
}
