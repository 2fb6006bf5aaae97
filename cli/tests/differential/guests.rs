//! Guests that write through an export while a job runs. Whatever they do, the target shows t0.

use std::os::unix::fs::MetadataExt;
use std::process::{Child, Stdio};

use serde_json::json;

use crate::errors::limit_files;
use crate::peer::{LENGTH, Peer, compare, compare_with, contents};
use crate::support::has;

/// Writes of every kind to a disk of [`LENGTH`] bytes: whole clusters, the right and the left part of one, across several,
/// beside each other, single bytes, the same place again, with FUA, zeros, the last bytes.
const EVERY_KIND: [&str; 14] = [
    "write -P 2 0 128k",
    "write -P 3 160k 32k",
    "write -P 4 192k 4k",
    "write -P 5 1000000 300000",
    "write -P 6 1300000 300000",
    "write -P 7 2000001 1",
    "write -P 8 2000003 513",
    "write -f -P 9 0 4k",
    "write -z 2560k 192k",
    "write -z -u 3001k 70k",
    "write -P 11 3100k 64k",
    "write -P 12 3100k 64k",
    "write -P 13 4194303 1",
    "flush",
];

/// A disk holds what `s` held at first.
#[track_caller]
fn shows_t0(peer: &Peer, disk: &str, length: usize) {
    let found = std::fs::read(peer.path(disk)).expect("read");
    // QEMU makes a last sector whole.
    assert!(found[..length] == contents(length), "{:?}: {disk} does not show t0", peer.which);
}

/// A job that goes no further than its first clusters until it is told to.
fn begin(peer: &mut Peer) {
    peer.export("s");
    peer.backup("j", "t", json!({ "speed": 1 }));
    peer.until("j", "running");
    peer.await_reply("query-block-jobs", |jobs| jobs[0]["offset"].as_u64() >= Some(65536));
}

fn go_on(peer: &mut Peer) {
    peer.say("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    peer.until("j", "null");
}

#[test]
fn the_target_shows_t0_whatever_guests_write_where() {
    compare(|peer| {
        begin(peer);
        peer.guest("s", &EVERY_KIND);
        peer.guest("s", &["read -P 9 0 4k", "read -P 0 2560k 192k", "read -P 12 3100k 64k"]);
        go_on(peer);
        shows_t0(peer, "t", LENGTH);
        peer.guest("s", &["write -P 14 0 1M"]);
        shows_t0(peer, "t", LENGTH);
    });
}

#[test]
fn a_pause_holds_up_the_sweep_and_no_guest() {
    compare(|peer| {
        begin(peer);
        peer.say("job-pause", json!({ "id": "j" }));
        peer.await_reply("query-jobs", |jobs| jobs[0]["status"] == "paused");
        let before = peer.offset();
        // What is copied, what is not, and what is by now: three clusters, one of them twice.
        peer.guest("s", &["write -P 2 0 64k", "write -P 3 3000k 100k", "write -P 4 3008k 4k"]);
        let grown = peer.offset() - before;
        peer.note_that("copied for the guest", json!(grown));
        assert!(grown >= 100 << 10, "{grown}");
        peer.say("job-resume", json!({ "id": "j" }));
        go_on(peer);
        shows_t0(peer, "t", LENGTH);
    });
}

#[test]
fn sync_none_has_the_old_data_of_what_guests_changed_and_nothing_else() {
    compare(|peer| {
        peer.export("s");
        peer.backup("j", "t", json!({ "sync": "none" }));
        peer.until("j", "running");
        peer.guest("s", &["read 0 4M", "flush", "write -P 2 70000 10", "write -P 3 70010 10"]);
        peer.guest("s", &["write -P 4 196608 65537", "write -z 1M 64k"]);
        peer.guest("s", &["write -f -P 5 4194303 1"]);
        let offset = peer.offset();
        peer.note_that("offset", json!(offset));
        peer.say("query-block-jobs", json!({}));
        peer.say("block-job-cancel", json!({ "device": "j" }));
        peer.until("j", "null");
        let mut expected = vec![7; LENGTH];
        let old = contents(LENGTH);
        for cluster in [1, 3, 4, 16, 63] {
            let range = cluster << 16..(cluster + 1) << 16;
            expected[range.clone()].copy_from_slice(&old[range]);
        }
        assert!(std::fs::read(peer.path("t")).expect("read") == expected, "{:?}", peer.which);
        // It is over: nothing more is copied.
        peer.guest("s", &["write -P 6 2M 64k"]);
        assert!(std::fs::read(peer.path("t")).expect("read") == expected, "{:?}", peer.which);
    });
}

#[test]
fn ends_of_disks_that_are_no_multiple_of_a_cluster() {
    for length in [(1 << 20) + 512, (1 << 20) + 65536 - 512, 512] {
        compare_with(length, |peer| {
            none_and_full(peer, length);
        });
    }
}

/// Two jobs: the one has what guests changed of the end, the other everything.
fn none_and_full(peer: &mut Peer, length: usize) {
    peer.export("s");
    peer.backup("n", "u", json!({ "sync": "none" }));
    peer.backup("j", "t", json!({ "speed": 1 }));
    peer.until("n", "running");
    peer.until("j", "running");
    let last = |bytes: usize| format!("write -P 2 {} {bytes}", length - bytes);
    peer.guest("s", &[&last(1), &last(300), &last(512), "write -P 3 0 512"]);
    peer.guest("s", &[&format!("write -z {} 100", length - 400)]);
    // Beyond the end is nothing.
    peer.guest("s", &[&format!("read {} 2", length - 1), &format!("write {length} 1")]);
    go_on(peer);
    shows_t0(peer, "t", length);
    peer.say("job-cancel", json!({ "id": "n" }));
    peer.until("n", "null");
    let found = std::fs::read(peer.path("u")).expect("read");
    let touched = (length - 512) / 65536 * 65536;
    assert!(found[touched..] == contents(length)[touched..], "{:?}: the end", peer.which);
}

#[test]
fn two_jobs_show_an_instant_each() {
    compare(|peer| {
        begin(peer);
        peer.guest("s", &["write -P 2 1M 1M", "write -P 3 70000 1"]);
        peer.backup("k", "u", json!({ "speed": 1 }));
        peer.until("k", "running");
        let second = std::fs::read(peer.path("s")).expect("read");
        peer.guest("s", &["write -P 4 1500k 1M", "write -P 5 70001 1", "write -z 0 4k"]);
        go_on(peer);
        peer.say("block-job-set-speed", json!({ "device": "k", "speed": 0 }));
        peer.until("k", "null");
        shows_t0(peer, "t", LENGTH);
        assert!(std::fs::read(peer.path("u")).expect("read") == second, "{:?}", peer.which);
    });
}

/// Writes at places that depend on `seed`, many of them in flight at a time but none over another.
fn crowd(seed: usize) -> Vec<String> {
    let mut commands = Vec::new();
    for block in 0..256 {
        // 167 and 256 have no divisor in common: every block once.
        let at = (block * 167 + seed) % 256 * 16384 + seed % 7;
        commands.push(format!("aio_write -q -P {} {at} {}", 1 + block % 250, 4096 + block * 31 % 9000));
    }
    commands.push("aio_flush".to_owned());
    commands
}

fn start_crowd(peer: &Peer, seed: usize) -> Child {
    let commands = crowd(seed);
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    peer.guest_command("s", &commands).stdout(Stdio::null()).spawn().expect("it runs")
}

#[test]
fn a_crowd_of_writes_while_a_job_is_at_work() {
    compare(|peer| {
        peer.export("s");
        for round in 0..4 {
            let before = std::fs::read(peer.path("s")).expect("read");
            let id = format!("j{round}");
            // Half a second for the sweep; they take less, all of it after t0.
            peer.backup(&id, "t", json!({ "speed": 8 << 20 }));
            let mut crowd = start_crowd(peer, round);
            peer.until(&id, "null");
            assert!(crowd.wait().expect("waited").success(), "{:?}", peer.which);
            assert!(std::fs::read(peer.path("t")).expect("read") == before, "{:?}, {id}", peer.which);
        }
    });
}

#[test]
fn jobs_of_a_transaction_beside_guests() {
    compare(|peer| {
        peer.export("s");
        let slow = || json!({ "speed": 1 });
        let actions = json!([crate::peer::action("a", "t", slow()), crate::peer::action("b", "u", slow())]);
        let properties = json!({ "completion-mode": "grouped" });
        peer.say("transaction", json!({ "actions": actions, "properties": properties }));
        peer.until("b", "running");
        peer.guest("s", &EVERY_KIND);
        for id in ["a", "b"] {
            peer.say("block-job-set-speed", json!({ "device": id, "speed": 0 }));
        }
        peer.until("a", "null");
        peer.until("b", "null");
        shows_t0(peer, "t", LENGTH);
        shows_t0(peer, "u", LENGTH);
    });
}

#[test]
fn a_disk_stays_as_its_guests_left_it_when_a_job_is_cancelled() {
    compare(|peer| {
        begin(peer);
        peer.guest("s", &EVERY_KIND);
        peer.say("job-cancel", json!({ "id": "j" }));
        peer.until("j", "null");
        peer.guest("s", &["read -P 9 0 4k", "read -P 2 4k 124k", "read -P 12 3100k 64k"]);
        // How much of it was copied differs; so that the images can be compared.
        peer.backup("whole", "t", json!({}));
        peer.until("whole", "null");
    });
}

/// Bytes beyond which files cannot grow, or be written: in the middle of cluster 32.
const LIMIT: u64 = (2 << 20) + (32 << 10);

/// What it checks: where the old contents cannot be copied, the guest's write fails, with the error of the copy; the job lives, and says nothing. Why:
/// that is what `break-guest-write` is, QEMU's default.
#[test]
fn a_copy_for_a_guest_that_fails_fails_the_guests_write() {
    if !has("prlimit") {
        return;
    }
    compare(|peer| {
        peer.export("s");
        peer.backup("j", "t", json!({ "sync": "none" }));
        peer.until("j", "running");
        limit_files(peer, Some(LIMIT));
        // The write itself would be below the limit; of its cluster the upper half is not.
        peer.guest("s", &["write -P 2 2M 4k", "write -P 3 1M 4k", "write -z 2M 4k", "write -P 2 2000k 100k"]);
        peer.guest("s", &["read -P 3 1M 4k", "read 2M 4k"]);
        let s = std::fs::read(peer.path("s")).expect("read");
        assert!(
            s[2 << 20..] == contents(LENGTH)[2 << 20..],
            "{:?}: the guest's write took place",
            peer.which
        );
        peer.say("query-block-jobs", json!({}));
        limit_files(peer, None);
        peer.guest("s", &["write -P 4 2M 4k", "read -P 4 2M 4k"]);
        peer.say("block-job-cancel", json!({ "device": "j" }));
        peer.until("j", "null");
        let t = std::fs::read(peer.path("t")).expect("read");
        let range = 2 << 20..(2 << 20) + 65536;
        assert!(t[range.clone()] == contents(LENGTH)[range], "{:?}", peer.which);
    });
}

#[test]
fn a_job_that_has_stopped_on_an_error_and_guests() {
    if !has("prlimit") {
        return;
    }
    compare(|peer| {
        begin(peer);
        peer.say("job-pause", json!({ "id": "j" }));
        limit_files(peer, Some(LIMIT));
        peer.say("job-resume", json!({ "id": "j" }));
        peer.say("job-cancel", json!({ "id": "j" }));
        peer.until("j", "null");
        limit_files(peer, None);

        peer.backup("k", "u", json!({ "on-target-error": "stop", "speed": 1 }));
        peer.until("k", "running");
        limit_files(peer, Some(LIMIT));
        peer.say("block-job-set-speed", json!({ "device": "k", "speed": 0 }));
        peer.until("k", "BLOCK_JOB_ERROR");
        peer.await_reply("query-block-jobs", |jobs| jobs[0]["status"] == "paused");
        // Copied; to be copied, which works; to be copied, which does not.
        peer.guest("s", &["write -P 2 0 4k", "write -P 3 1984k 4k", "write -P 4 2M 4k", "write -z 2M 32k"]);
        peer.say("query-block-jobs", json!({}));
        limit_files(peer, None);
        peer.guest("s", &["write -P 5 3M 4k"]);
        peer.say("block-job-resume", json!({ "device": "k" }));
        peer.until("k", "null");
        shows_t0(peer, "u", LENGTH);
        peer.backup("whole", "t", json!({}));
        peer.until("whole", "null");
    });
}

#[test]
fn guests_go_on_when_a_job_has_failed() {
    if !has("prlimit") {
        return;
    }
    for policy in ["report", "enospc"] {
        compare(|peer| {
            peer.export("s");
            peer.backup("j", "t", json!({ "on-target-error": policy, "speed": 1 }));
            peer.until("j", "running");
            peer.guest("s", &["write -P 2 1M 4k"]);
            limit_files(peer, Some(LIMIT));
            peer.say("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
            peer.until("j", "null");
            peer.guest("s", &["write -P 3 2M 4k", "read -P 2 1M 4k"]);
            limit_files(peer, None);
            peer.backup("whole", "t", json!({}));
            peer.until("whole", "null");
        });
    }
}

#[test]
fn exports_under_a_job() {
    compare(|peer| {
        begin(peer);
        peer.guest("s", &["write -P 2 3M 64k"]);
        peer.say("blockdev-del", json!({ "node-name": "s" }));
        // Either may not have noticed yet that the guest is gone.
        peer.say("block-export-del", json!({ "id": "s", "mode": "hard" }));
        peer.until("s", "BLOCK_EXPORT_DELETED");
        peer.say("query-block-exports", json!({}));
        peer.say("nbd-server-stop", json!({}));
        go_on(peer);
        shows_t0(peer, "t", LENGTH);
    });
}

/// A hole is space given back, be it asked for as a discard or as zeros.
#[test]
fn space_is_given_back_where_every_node_passes_that_on() {
    compare(|peer| {
        peer.export("s");
        for (name, above, below) in
            [("d", "unmap", "unmap"), ("above", "ignore", "unmap"), ("below", "unmap", "ignore")]
        {
            std::fs::write(peer.path(name), contents(LENGTH)).expect("written");
            let filename = peer.path(name).display().to_string();
            let file = json!({ "driver": "file", "filename": filename, "discard": below });
            peer.add(name, json!({ "discard": above, "file": file }));
            peer.say(
                "block-export-add",
                json!({ "type": "nbd", "id": name, "node-name": name, "writable": true }),
            );
            let allocated = |peer: &Peer| std::fs::metadata(peer.path(name)).expect("there").blocks() * 512;
            let before = allocated(peer);
            peer.guest(name, &["write -z -u 1M 1M"]);
            let zeros = before - allocated(peer);
            peer.guest(name, &["discard 2M 1M"]);
            let both = before - allocated(peer);
            peer.note_that("freed", json!([name, zeros, both]));
            let freed = if name == "d" { 1 << 20 } else { 0 };
            assert_eq!((zeros, both), (freed, 2 * freed), "{:?}: {name}", peer.which);
            peer.guest(name, &["read -P 0 1M 1M"]);
        }
    });
}

/// Nor does a job free what it copies holes to.
#[test]
fn space_of_a_target_is_kept_where_a_node_ignores_discards() {
    compare(|peer| {
        std::fs::File::create(peer.path("holes")).and_then(|file| file.set_len(LENGTH as u64)).expect("made");
        peer.add("holes", json!({}));
        for (name, above, below) in [("above", "ignore", "unmap"), ("below", "unmap", "ignore")] {
            std::fs::write(peer.path(name), contents(LENGTH)).expect("written");
            let filename = peer.path(name).display().to_string();
            let file = json!({ "driver": "file", "filename": filename, "discard": below });
            peer.add(name, json!({ "discard": above, "file": file }));
            let allocated = |peer: &Peer| std::fs::metadata(peer.path(name)).expect("there").blocks() * 512;
            let before = allocated(peer);
            peer.backup(name, name, json!({ "device": "holes" }));
            peer.until(name, "null");
            let after = allocated(peer);
            assert!(after >= before, "{:?}: {name}: {before} bytes, then {after}", peer.which);
            assert!(std::fs::read(peer.path(name)).expect("read") == vec![0; LENGTH], "{:?}", peer.which);
        }
    });
}
