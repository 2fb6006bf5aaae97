//! Errors of the target. A limit on the sizes of files makes writes beyond it fail, until it is lifted again.

use std::process::Command;

use serde_json::json;

use crate::peer::{Peer, compare};
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
