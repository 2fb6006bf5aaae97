//! Jobs from their start to their end.

use std::time::Duration;

use serde_json::{Value, json};

use crate::peer::{Peer, action, compare, compare_with};

#[test]
fn a_backup_from_its_start_to_its_end() {
    for sync in ["full", "top"] {
        compare(|peer| {
            peer.backup("j", "t", json!({ "sync": sync }));
            peer.until("j", "null");
            peer.say("query-jobs", json!({}));
            peer.say("query-block-jobs", json!({}));
        });
    }
}

#[test]
fn lengths_that_are_no_multiple_of_anything() {
    for length in [4097, (1 << 20) + 512, 512, 65536] {
        compare_with(length, |peer| {
            peer.backup("j", "t", json!({ "auto-dismiss": false }));
            peer.until("j", "concluded");
            peer.say("query-jobs", json!({}));
            peer.say("job-dismiss", json!({ "id": "j" }));
        });
    }
}

#[test]
fn automatics() {
    for finalize in [true, false] {
        for dismiss in [true, false] {
            compare(|peer| automatic(peer, finalize, dismiss));
        }
    }
}

fn automatic(peer: &mut Peer, finalize: bool, dismiss: bool) {
    let id = || json!({ "id": "j" });
    peer.backup("j", "t", json!({ "auto-finalize": finalize, "auto-dismiss": dismiss }));
    if !finalize {
        peer.until("j", "BLOCK_JOB_PENDING");
        peer.say("query-jobs", json!({}));
        peer.say("query-block-jobs", json!({}));
        for verb in ["job-dismiss", "job-pause", "job-resume", "job-complete", "block-job-dismiss"] {
            peer.say(verb, id());
        }
        peer.say("block-job-set-speed", json!({ "device": "j", "speed": 1 }));
        peer.say("job-finalize", id());
    }
    peer.until("j", "concluded");
    if !dismiss {
        peer.say("query-jobs", json!({}));
        peer.say("query-block-jobs", json!({}));
        for verb in ["job-finalize", "job-cancel", "job-pause", "block-job-finalize"] {
            peer.say(verb, id());
        }
        peer.say("block-job-cancel", json!({ "device": "j" }));
        peer.backup("j", "t", json!({}));
        peer.say("blockdev-del", json!({ "node-name": "t" }));
        peer.say("block-job-dismiss", id());
    }
    peer.until("j", "null");
    peer.say("query-jobs", json!({}));
}

#[test]
fn a_cancel_in_every_state_that_takes_one() {
    compare(|peer| {
        let slow = || json!({ "speed": 65536 });
        peer.backup("running", "t", slow());
        peer.until("running", "running");
        peer.say("block-job-cancel", json!({ "device": "running" }));
        peer.until("running", "null");

        peer.backup("paused", "t", slow());
        peer.say("job-pause", json!({ "id": "paused" }));
        peer.say("block-job-cancel", json!({ "device": "paused" }));
        peer.say("block-job-cancel", json!({ "device": "paused", "force": true }));
        peer.until("paused", "null");

        peer.backup("paused2", "t", slow());
        peer.say("block-job-pause", json!({ "device": "paused2" }));
        peer.say("job-cancel", json!({ "id": "paused2" }));
        peer.until("paused2", "null");

        peer.backup("pending", "t", json!({ "auto-finalize": false, "auto-dismiss": false }));
        peer.until("pending", "BLOCK_JOB_PENDING");
        peer.say("job-cancel", json!({ "id": "pending" }));
        peer.until("pending", "concluded");
        peer.say("query-jobs", json!({}));
        peer.say("job-dismiss", json!({ "id": "pending" }));
        peer.until("pending", "null");
        peer.say("query-jobs", json!({}));
        // What was half copied is made whole, so that the images can be compared.
        peer.backup("whole", "t", json!({}));
        peer.until("whole", "null");
    });
}

#[test]
fn a_pause_freezes_the_job_and_a_resume_completes_it() {
    compare(|peer| {
        peer.backup("j", "t", json!({ "speed": 1 << 20 }));
        let id = || json!({ "id": "j" });
        peer.say("job-resume", id());
        peer.say("job-pause", id());
        peer.await_reply("query-jobs", |jobs| jobs[0]["status"] == "paused");
        peer.say("job-pause", id());
        peer.say("block-job-pause", json!({ "device": "j" }));
        let offset = |peer: &mut Peer| peer.qmp.ok("query-block-jobs", json!({}))[0]["offset"].clone();
        let before = offset(peer);
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(offset(peer), before, "{:?}", peer.which);
        peer.say("query-block-jobs", json!({}));
        peer.say("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
        peer.say("block-job-resume", json!({ "device": "j" }));
        peer.until("j", "null");
    });
}

/// QEMU pauses jobs by itself, too, but not while nothing else happens.
#[test]
fn a_pause_and_a_resume_are_told() {
    compare(|peer| {
        peer.backup("j", "t", json!({ "speed": 65536 }));
        peer.until("j", "running");
        peer.say("query-jobs", json!({}));
        peer.note_pauses(true);
        for (verb, status) in [
            ("job-pause", "paused"),
            ("job-resume", "running"),
            ("job-pause", "paused"),
            ("job-resume", "running"),
        ] {
            peer.say(verb, json!({ "id": "j" }));
            peer.until_it_is("j", status);
        }
        peer.note_pauses(false);
        peer.say("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
        peer.until("j", "null");
    });
}

#[test]
fn speeds_are_seen_and_change() {
    compare(|peer| {
        peer.backup("j", "t", json!({ "speed": 65536 }));
        // At full speed it would soon be over.
        peer.say("job-pause", json!({ "id": "j" }));
        peer.await_reply("query-jobs", |jobs| jobs[0]["status"] == "paused");
        let speed = |speed: i64| json!({ "device": "j", "speed": speed });
        for value in [-1, 131_072, i64::MAX, 65536] {
            peer.say("block-job-set-speed", speed(value));
            peer.say("query-block-jobs", json!({}));
        }
        for verb in ["job-finalize", "job-dismiss", "job-complete", "block-job-dismiss"] {
            peer.say(verb, json!({ "id": "j" }));
        }
        peer.say("block-job-set-speed", speed(0));
        peer.say("job-resume", json!({ "id": "j" }));
        peer.until("j", "null");
    });
}

#[test]
fn without_a_guest_sync_none_copies_nothing_until_it_is_cancelled() {
    compare(|peer| {
        peer.backup("j", "t", json!({ "sync": "none" }));
        peer.until("j", "running");
        std::thread::sleep(Duration::from_millis(200));
        peer.say("query-block-jobs", json!({}));
        peer.say("block-job-cancel", json!({ "device": "j" }));
        peer.until("j", "null");
    });
}

#[test]
fn quit_in_the_middle_of_jobs() {
    compare(|peer| {
        peer.backup("j", "t", json!({ "sync": "none" }));
        peer.backup("k", "u", json!({ "sync": "none", "auto-dismiss": false }));
        peer.until("k", "running");
        peer.say("job-pause", json!({ "id": "k" }));
        peer.say("quit", json!({}));
    });
}

/// Several jobs at one instant.
pub(crate) fn transaction(peer: &mut Peer, actions: Value, mode: Option<&str>) {
    let properties = mode.map_or(json!({}), |mode| json!({ "completion-mode": mode }));
    peer.say("transaction", json!({ "actions": actions, "properties": properties }));
}

#[test]
fn transactions_that_complete() {
    for mode in [None, Some("individual"), Some("grouped")] {
        compare(|peer| {
            transaction(peer, json!([action("a", "t", json!({})), action("b", "u", json!({}))]), mode);
            peer.until("a", "null");
            peer.until("b", "null");
        });
    }
}

#[test]
fn grouped_jobs_are_cancelled_together() {
    compare(|peer| {
        // Both at work.
        let none = || json!({ "sync": "none" });
        let both = json!([action("a", "t", none()), action("b", "u", none())]);
        transaction(peer, both, Some("grouped"));
        peer.until("b", "running");
        peer.say("job-cancel", json!({ "id": "b" }));
        peer.until("a", "null");
        peer.until("b", "null");
        // One is done, and waits for the other.
        let one = json!([action("c", "t", json!({})), action("d", "u", none())]);
        transaction(peer, one, Some("grouped"));
        peer.until("c", "waiting");
        peer.say("query-jobs", json!({}));
        peer.say("job-cancel", json!({ "id": "c" }));
        peer.until("c", "null");
        peer.until("d", "null");
        // Individually, the other goes on.
        let one = json!([action("e", "t", json!({})), action("f", "u", none())]);
        transaction(peer, one, None);
        peer.say("job-cancel", json!({ "id": "f" }));
        peer.until("e", "null");
        peer.until("f", "null");
    });
}

#[test]
fn grouped_jobs_conclude_together() {
    compare(|peer| {
        let manual = || json!({ "auto-finalize": false });
        let one = json!([action("a", "t", manual()), action("b", "u", json!({}))]);
        transaction(peer, one, Some("grouped"));
        peer.until("a", "BLOCK_JOB_PENDING");
        peer.until("b", "pending");
        peer.say("job-finalize", json!({ "id": "b" }));
        peer.until("a", "null");
        peer.until("b", "null");
        peer.say("job-finalize", json!({ "id": "a" }));
        let both = json!([action("c", "t", manual()), action("d", "u", manual())]);
        transaction(peer, both, Some("grouped"));
        peer.until("c", "BLOCK_JOB_PENDING");
        peer.until("d", "BLOCK_JOB_PENDING");
        peer.say("job-finalize", json!({ "id": "c" }));
        peer.until("c", "null");
        peer.until("d", "null");
        peer.say("query-jobs", json!({}));
    });
}
