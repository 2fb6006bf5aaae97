//! What differs on purpose, with both sides shown.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::errors::limit_files;
use crate::peer::{LENGTH, Peer, Which, contents};
use crate::support::has;

/// What `script` makes of either daemon.
fn both<T>(script: impl Fn(&mut Peer) -> T) -> Option<[T; 2]> {
    if !has("qemu-storage-daemon") {
        return None;
    }
    Some([Which::Qemu, Which::Ours].map(|which| {
        let mut peer = Peer::start(which, LENGTH);
        let made = script(&mut peer);
        peer.qmp.ok("quit", json!({}));
        made
    }))
}

#[test]
fn holes_stay_holes() {
    let made = both(|peer| {
        for name in ["holes", "copy"] {
            std::fs::File::create(peer.path(name))
                .and_then(|file| file.set_len(LENGTH as u64))
                .expect("made");
            peer.add(name, json!({}));
        }
        let arguments = json!({ "job-id": "j", "device": "holes", "target": "copy", "sync": "full" });
        peer.say("blockdev-backup", arguments);
        peer.until("j", "null");
        let copy = std::fs::read(peer.path("copy")).expect("read");
        assert!(copy == vec![0; LENGTH], "{:?}", peer.which);
        std::fs::metadata(peer.path("copy")).expect("there").blocks()
    });
    let Some([theirs, ours]) = made else { return };
    assert_eq!(ours, 0, "nothing is stored");
    assert!(theirs > 0, "QEMU has learnt it; the document may say so");
}

/// The target is dense, and every node on the way to it passes discards on.
#[test]
fn holes_are_made_on_a_target_whose_space_may_be_given_back() {
    let made = both(|peer| {
        std::fs::File::create(peer.path("holes")).and_then(|file| file.set_len(LENGTH as u64)).expect("made");
        peer.add("holes", json!({}));
        add_with_discard(peer, "d");
        peer.backup("j", "d", json!({ "device": "holes" }));
        peer.until("j", "null");
        assert!(std::fs::read(peer.path("d")).expect("read") == vec![0; LENGTH], "{:?}", peer.which);
        allocated(peer, "d")
    });
    let Some([theirs, ours]) = made else { return };
    assert_eq!(ours, 0, "nothing is stored");
    assert!(theirs > 0, "QEMU has learnt it; the document may say so");
}

#[test]
fn a_speed_limit_is_kept_from_the_first_moment() {
    let made = both(|peer| {
        peer.backup("j", "t", json!({ "speed": 65536 }));
        peer.until("j", "running");
        std::thread::sleep(std::time::Duration::from_millis(300));
        let offset = peer.qmp.ok("query-block-jobs", json!({}))[0]["offset"].as_u64().expect("a number");
        peer.say("job-cancel", json!({ "id": "j" }));
        peer.until("j", "null");
        offset
    });
    let Some([theirs, ours]) = made else { return };
    assert!(ours <= 4 * 65536, "{ours} bytes in a moment, at 64 KiB a second");
    assert!(theirs >= 1 << 20, "QEMU has learnt it; the document may say so");
}

/// A node of whose file guests may free parts, in the words of either daemon.
fn add_with_discard(peer: &mut Peer, name: &str) {
    std::fs::write(peer.path(name), contents(LENGTH)).expect("written");
    let path = peer.path(name).display().to_string();
    let file = json!({ "driver": "file", "filename": path, "discard": "unmap" });
    peer.add(name, json!({ "discard": "unmap", "file": file }));
}

fn allocated(peer: &Peer, name: &str) -> u64 {
    std::fs::metadata(peer.path(name)).expect("there").blocks() * 512
}

/// The target shows t0 with both. What a guest gives back during a job, QEMU keeps; here it is freed, once it is copied.
#[test]
fn discards_of_guests_during_a_job() {
    const GIVEN_BACK: u64 = 1 << 20;
    let made = both(|peer| {
        add_with_discard(peer, "d");
        peer.export("d");
        let arguments = json!({ "job-id": "j", "device": "d", "target": "t", "sync": "full", "speed": 1 });
        peer.say("blockdev-backup", arguments);
        peer.until("j", "running");
        let before = allocated(peer, "d");
        peer.guest("d", &["discard 2M 1M", "write -P 3 2100k 4k"]);
        peer.say("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
        peer.until("j", "null");
        let deadline = Instant::now() + Duration::from_secs(if peer.which == Which::Ours { 30 } else { 1 });
        let mut freed = 0;
        while freed < GIVEN_BACK - (64 << 10) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            freed = before.saturating_sub(allocated(peer, "d"));
        }
        let t = std::fs::read(peer.path("t")).expect("read");
        assert!(t == contents(LENGTH), "{:?}: the target does not show t0", peer.which);
        // Without a job they do the same.
        peer.guest("d", &["discard 3M 1M"]);
        assert!(before - allocated(peer, "d") >= freed + GIVEN_BACK, "{:?}", peer.which);
        freed
    });
    let Some([theirs, ours]) = made else { return };
    assert!((GIVEN_BACK - (64 << 10)..GIVEN_BACK).contains(&ours), "all but what was written again: {ours}");
    assert_eq!(theirs, 0, "QEMU has learnt it; the document may say so");
}

/// QEMU 10.0 has `break-snapshot` only of the filter that its backup puts in, so the filter stands alone there. What guests see is the same:
/// their write succeeds, and t0 is lost.
#[test]
fn a_snapshot_may_be_given_up_for_the_guest() {
    if !has("prlimit") {
        return;
    }
    let made = both(|peer| {
        let exported = match peer.which {
            Which::Ours => {
                peer.export("s");
                peer.backup("j", "t", json!({ "sync": "none", "on-cbw-error": "break-snapshot" }));
                peer.until("j", "running");
                "s"
            }
            Which::Qemu => {
                let filter = json!({ "driver": "copy-before-write", "node-name": "filter", "file": "s",
                                     "target": "t", "on-cbw-error": "break-snapshot" });
                peer.qmp.ok("blockdev-add", filter);
                peer.export("filter");
                "filter"
            }
        };
        limit_files(peer, Some((2 << 20) + (32 << 10)));
        peer.guest(exported, &["write -P 2 1M 4k", "write -P 3 2M 4k", "write -P 4 512k 4k"]);
        if peer.which == Which::Ours {
            peer.until("j", "null");
        }
        let s = std::fs::read(peer.path("s")).expect("read");
        let t = std::fs::read(peer.path("t")).expect("read");
        (s, t[1 << 20..(1 << 20) + 65536] == contents(LENGTH)[1 << 20..(1 << 20) + 65536], t[512 << 10])
    });
    let Some([theirs, ours]) = made else { return };
    for (s, copied, later) in [&theirs, &ours] {
        assert_eq!((s[1 << 20], s[2 << 20], s[512 << 10]), (2, 3, 4), "the guest's writes");
        assert!(copied, "what was copied before");
        assert_eq!(*later, 7, "nothing is copied any more");
    }
    assert!(theirs == ours);
}

/// QEMU tries until it succeeds, if ever. Here what cannot be written is left out, and the job says so.
#[test]
fn what_is_ignored_is_tried_a_few_times_and_then_left_out() {
    if !has("prlimit") {
        return;
    }
    let made = both(|peer| {
        peer.backup("j", "t", json!({ "on-target-error": "ignore", "speed": 1 }));
        peer.until("j", "running");
        limit_files(peer, Some(2 << 20));
        peer.say("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
        peer.until("j", "BLOCK_JOB_ERROR");
        if peer.which == Which::Qemu {
            // It still tries, and has what it could not write once it can.
            std::thread::sleep(Duration::from_millis(200));
            limit_files(peer, None);
        }
        peer.until("j", "null");
        limit_files(peer, None);
        let t = std::fs::read(peer.path("t")).expect("read");
        (peer.end_of("j"), t)
    });
    let Some([(theirs, their_copy), (ours, our_copy)]) = made else { return };
    assert!(theirs["error"].is_null() && their_copy == contents(LENGTH), "{theirs}");
    assert_eq!(ours["error"], "Input/output error");
    assert!(our_copy[..2 << 20] == contents(LENGTH)[..2 << 20], "what could be written");
    assert!(our_copy[2 << 20..] == vec![7; LENGTH - (2 << 20)], "what could not");
}
