//! Errors of either side. A limit on the sizes of files makes writes beyond it fail, a small file system is full, a device lies on a file that was cut
//! short: each until it is mended again.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::jobs::transaction;
use crate::kernel::{LoopDevice, Mount, is_root};
use crate::peer::{LENGTH, Peer, action, compare, contents};
use crate::support::has;

/// Have writes to files beyond `bytes` fail; `None`: no longer.
pub(crate) fn limit_files(peer: &Peer, bytes: Option<u64>) {
    let limit = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    let process = peer.id().to_string();
    // The soft limit alone, so that it can be lifted.
    let status = Command::new("prlimit").args(["--pid", &process, &format!("--fsize={limit}:")]).status();
    assert!(status.expect("prlimit runs").success());
}

/// A job that meets an error after half of the disk.
fn start(peer: &mut Peer, policy: &str) {
    peer.backup("j", "t", json!({ "on-target-error": policy, "speed": 1 }));
    peer.until("j", "running");
    limit_files(peer, Some(2 << 20));
    peer.say("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
}

#[test]
fn reported_errors_fail_the_job() {
    for policy in ["report", "enospc", "auto"] {
        if !has("prlimit") {
            return;
        }
        compare(|peer| {
            start(peer, policy);
            peer.until("j", "null");
            limit_files(peer, None);
            peer.backup("whole", "t", json!({}));
            peer.until("whole", "null");
        });
    }
}

/// One is done and waits, one is at work, and one fails.
#[test]
fn a_failure_takes_its_group_along() {
    if !has("prlimit") {
        return;
    }
    compare(|peer| {
        std::fs::write(peer.path("v"), vec![7; LENGTH]).expect("written");
        peer.add("v", json!({}));
        let actions = [
            action("done", "v", json!({})),
            action("at-work", "u", json!({ "sync": "none" })),
            action("fails", "t", json!({ "speed": 1 })),
        ];
        transaction(peer, json!(actions), Some("grouped"));
        peer.until("done", "waiting");
        peer.until("at-work", "running");
        peer.until("fails", "running");
        limit_files(peer, Some(2 << 20));
        peer.say("block-job-set-speed", json!({ "device": "fails", "speed": 0 }));
        for job in ["done", "at-work", "fails"] {
            peer.until(job, "null");
        }
        peer.say("query-jobs", json!({}));
        let told = ["done", "at-work", "fails"].map(|job| peer.end_of(job)["error"].is_string());
        assert_eq!(told, [false, false, true], "{:?}", peer.which);
        limit_files(peer, None);
        // What was half copied is made whole, so that the images can be compared.
        peer.backup("whole", "t", json!({}));
        peer.until("whole", "null");
    });
}

#[test]
fn one_that_stops_is_resumed_and_completes() {
    if !has("prlimit") {
        return;
    }
    compare(|peer| {
        start(peer, "stop");
        peer.until("j", "BLOCK_JOB_ERROR");
        let jobs = peer.await_reply("query-block-jobs", |jobs| jobs[0]["status"] == "paused");
        assert_eq!(jobs[0]["io-status"], "failed", "{:?}", peer.which);
        peer.say("query-block-jobs", json!({}));
        peer.say("block-job-cancel", json!({ "device": "j" }));
        limit_files(peer, None);
        peer.say("block-job-resume", json!({ "device": "j" }));
        peer.until("j", "null");
    });
}

fn set_length(path: &Path, bytes: usize) {
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .expect("open")
        .set_len(bytes as u64)
        .expect("set");
}

/// Wait until the job has stopped on an error, with that io-status; what it shows then is noted.
fn await_stop(peer: &mut Peer, io_status: &str) {
    peer.until("j", "BLOCK_JOB_ERROR");
    let jobs = peer.await_reply("query-block-jobs", |jobs| jobs[0]["status"] == "paused");
    assert_eq!(jobs[0]["io-status"], io_status, "{:?}", peer.which);
    peer.say("query-block-jobs", json!({}));
}

#[test]
fn one_whose_target_is_full_stops_and_completes_once_there_is_space() {
    if !is_root() {
        return;
    }
    for policy in ["enospc", "stop"] {
        compare(|peer| {
            let full = Mount::tmpfs(&peer.path("full"), LENGTH as u64 / 2);
            set_length(&peer.path("full/copy"), LENGTH);
            peer.add("full/copy", json!({ "node-name": "copy" }));
            peer.backup("j", "copy", json!({ "on-target-error": policy }));
            await_stop(peer, "nospace");
            full.remount("size=64M");
            peer.say("block-job-resume", json!({ "device": "j" }));
            peer.until("j", "null");
            let copy = std::fs::read(peer.path("full/copy")).expect("read");
            peer.note_that("copy", json!(copy == contents(LENGTH)));
            peer.say("blockdev-del", json!({ "node-name": "copy" }));
        });
    }
}

/// A disk of which the second half cannot be read, as the node `bad`.
fn half_a_disk(peer: &mut Peer) -> LoopDevice {
    std::fs::write(peer.path("beneath"), contents(LENGTH)).expect("written");
    let device = LoopDevice::over(&peer.path("beneath"));
    set_length(&peer.path("beneath"), LENGTH / 2);
    let file = json!({ "driver": "host_device", "filename": device.text() });
    peer.say("blockdev-add", json!({ "driver": "raw", "node-name": "bad", "file": file }));
    device
}

#[test]
fn a_source_that_cannot_be_read_fails_the_job() {
    if !is_root() {
        return;
    }
    for policy in ["report", "enospc"] {
        compare(|peer| {
            let _device = half_a_disk(peer);
            peer.backup("j", "t", json!({ "device": "bad", "on-source-error": policy }));
            peer.until("j", "null");
            peer.say("blockdev-del", json!({ "node-name": "bad" }));
            // How far it has come by then is nobody's business.
            peer.backup("whole", "t", json!({}));
            peer.until("whole", "null");
        });
    }
}

#[test]
fn one_whose_source_cannot_be_read_stops_and_completes_once_it_can() {
    if !is_root() {
        return;
    }
    compare(|peer| {
        let _device = half_a_disk(peer);
        peer.backup("j", "t", json!({ "device": "bad", "on-source-error": "stop" }));
        await_stop(peer, "failed");
        set_length(&peer.path("beneath"), LENGTH);
        peer.say("block-job-resume", json!({ "device": "j" }));
        peer.until("j", "null");
        peer.say("blockdev-del", json!({ "node-name": "bad" }));
    });
}
