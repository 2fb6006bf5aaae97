//! What differs on purpose, with both sides shown.

use std::os::unix::fs::MetadataExt;

use serde_json::json;

use crate::peer::{LENGTH, Peer, Which};
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
