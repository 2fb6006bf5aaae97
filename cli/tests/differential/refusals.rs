//! What cannot be is refused in the same words, and changes nothing.

use serde_json::json;

use crate::peer::{action, backup, compare};

#[test]
fn commands_and_arguments() {
    compare(|peer| {
        peer.say("frobnicate", json!({}));
        for (command, arguments) in [
            ("query-jobs", json!({ "a": 1 })),
            ("blockdev-backup", json!({})),
            ("blockdev-backup", json!({ "job-id": "j", "device": 1 })),
            ("blockdev-backup", json!({ "job-id": "j", "device": "s", "target": "t" })),
            ("blockdev-backup", backup("j", "t", json!({ "sync": "weird" }))),
            ("blockdev-backup", backup("j", "t", json!({ "speed": "x" }))),
            ("blockdev-backup", backup("j", "t", json!({ "speed": 1.5 }))),
            ("blockdev-backup", backup("j", "t", json!({ "on-source-error": "weird" }))),
            ("blockdev-backup", backup("j", "t", json!({ "foo": 1 }))),
            ("blockdev-backup", backup("j", "t", json!({ "x-perf": { "max_workers": 1 } }))),
            ("blockdev-del", json!({})),
            ("blockdev-del", json!({ "node-name": "none" })),
            ("job-cancel", json!({ "id": "j", "force": true })),
            ("block-export-del", json!({})),
            ("block-export-del", json!({ "id": "none" })),
            ("block-export-del", json!({ "id": "none", "mode": "weird" })),
            ("block-export-add", json!({})),
            ("block-export-add", json!({ "type": "weird" })),
            ("block-export-add", json!({ "type": "nbd", "id": "e" })),
            ("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "s" })),
            ("block-export-add", json!({ "type": "nbd", "id": "1", "node-name": "s" })),
            ("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "none" })),
            ("nbd-server-stop", json!({})),
            ("nbd-server-start", json!({})),
            ("nbd-server-start", json!({ "addr": { "type": "weird", "data": {} } })),
            ("nbd-server-start", json!({ "addr": { "type": "unix", "data": {} } })),
            ("nbd-server-start", json!({ "addr": { "type": "inet", "data": { "host": "127.0.0.1" } } })),
            (
                "nbd-server-start",
                json!({ "addr": { "type": "unix", "data": { "path": "x" } }, "max-connections": -1 }),
            ),
            (
                "nbd-server-start",
                json!({ "addr": { "type": "unix", "data": { "path": "x" } }, "max-connections": "x" }),
            ),
        ] {
            peer.say(command, arguments);
        }
    });
}

#[test]
fn nodes() {
    compare(|peer| {
        let path = |name: &str| peer.path(name).display().to_string();
        let file =
            |name: &str, node: &str| json!({ "driver": "file", "filename": path(name), "node-name": node });
        let aio = |aio: &str, direct: bool| json!({ "driver": "file", "filename": path("s"), "node-name": "x", "aio": aio, "cache": { "direct": direct } });
        let nodes = [
            json!({}),
            json!({ "driver": "weird" }),
            json!({ "driver": 1 }),
            json!({ "driver": "file" }),
            json!({ "driver": "file", "filename": path("s") }),
            file("none", "x"),
            file("s", "1bad"),
            file("s", ""),
            file("s", &"x".repeat(32)),
            file("s", "s"),
            file(".", "x"),
            json!({ "driver": "file", "filename": "/dev/null", "node-name": "x" }),
            json!({ "driver": "host_device", "filename": path("s"), "node-name": "x" }),
            json!({ "driver": "file", "filename": path("s"), "node-name": "x", "discard": "weird" }),
            json!({ "driver": "file", "filename": path("s"), "node-name": "x", "cache": { "direct": "x" } }),
            json!({ "driver": "file", "filename": path("s"), "node-name": "x", "cache": { "foo": true } }),
            json!({ "driver": "file", "filename": path("s"), "node-name": "x", "cache": 1 }),
            aio("weird", true),
            aio("native", false),
            json!({ "driver": "raw", "node-name": "x" }),
            json!({ "driver": "raw", "node-name": "x", "file": "none" }),
            json!({ "driver": "raw", "node-name": "x", "file": 1 }),
            json!({ "driver": "raw", "node-name": "x", "file": { "driver": "file", "filename": 1 } }),
            // And some that can be.
            file("small", "again"),
            json!({ "driver": "raw", "node-name": "over", "file": "again" }),
            json!({ "driver": "null-co", "node-name": "null", "size": 65536, "read-zeroes": true }),
            aio("threads", false),
        ];
        for node in nodes {
            peer.say("blockdev-add", node);
        }
        for node in ["again", "over", "again", "null", "null"] {
            peer.say("blockdev-del", json!({ "node-name": node }));
        }
    });
}

#[test]
fn backups() {
    compare(|peer| {
        for arguments in [
            json!({ "job-id": "j", "device": "none", "target": "t", "sync": "full" }),
            backup("j", "none", json!({})),
            backup("j", "s", json!({})),
            backup("j", "small", json!({})),
            backup("1", "t", json!({})),
            backup("", "t", json!({})),
            json!({ "device": "s", "target": "t", "sync": "full" }),
            backup("j", "t", json!({ "speed": -1 })),
            backup("j", "t", json!({ "filter-node-name": "1x" })),
            backup("j", "t", json!({ "filter-node-name": "s" })),
            backup("j", "t", json!({ "x-perf": { "max-workers": 0 } })),
            backup("j", "t", json!({ "x-perf": { "max-workers": -1 } })),
            backup("j", "t", json!({ "x-perf": { "max-chunk": 1 } })),
            backup("j", "t", json!({ "x-perf": { "max-chunk": -1 } })),
            backup("j", "t", json!({ "x-perf": { "min-cluster-size": 100 } })),
        ] {
            peer.say("blockdev-backup", arguments);
        }
        peer.say("query-jobs", json!({}));
    });
}

#[test]
fn jobs_that_are_not_there() {
    compare(|peer| {
        for verb in ["pause", "resume", "cancel", "complete", "finalize", "dismiss"] {
            peer.say(&format!("job-{verb}"), json!({ "id": "none" }));
            let name = if matches!(verb, "finalize" | "dismiss") { "id" } else { "device" };
            peer.say(&format!("block-job-{verb}"), json!({ name: "none" }));
        }
        peer.say("block-job-set-speed", json!({ "device": "none", "speed": 1 }));
    });
}

#[test]
fn what_a_job_uses_is_busy() {
    compare(|peer| {
        peer.backup("j", "t", json!({ "sync": "none" }));
        peer.until("j", "running");
        peer.backup("j", "u", json!({}));
        peer.backup("k", "t", json!({}));
        peer.say("blockdev-backup", json!({ "job-id": "k", "device": "t", "target": "u", "sync": "full" }));
        peer.say("blockdev-del", json!({ "node-name": "t" }));
        peer.say("blockdev-del", json!({ "node-name": "s" }));
        // A second job on the same source is fine.
        peer.backup("k", "u", json!({ "sync": "none" }));
        peer.say("query-jobs", json!({}));
        peer.say("query-block-jobs", json!({}));
        for job in ["j", "k"] {
            peer.say("job-cancel", json!({ "id": job }));
            peer.until(job, "null");
        }
        peer.say("blockdev-del", json!({ "node-name": "t" }));
    });
}

#[test]
fn transactions() {
    compare(|peer| {
        let abort = || json!({ "type": "abort", "data": {} });
        let plain = |id: &str, target: &str| action(id, target, json!({}));
        for actions in [
            json!(1),
            json!([1]),
            json!([{}]),
            json!([{ "type": "weird" }]),
            json!([{ "type": "abort" }]),
            json!([{ "type": "abort", "data": { "x": 1 } }]),
            json!([]),
            json!([abort()]),
            json!([plain("a", "t"), abort()]),
            json!([plain("b", "t"), plain("b2", "small")]),
            json!([plain("c", "t"), plain("c2", "t")]),
            json!([plain("d", "t"), plain("d", "u")]),
            json!([action("e", "t", json!({ "foo": 1 }))]),
        ] {
            peer.say("transaction", json!({ "actions": actions }));
        }
        peer.say("transaction", json!({ "actions": [], "properties": { "completion-mode": "weird" } }));
        peer.say("transaction", json!({}));
        peer.say("query-jobs", json!({}));
    });
}
