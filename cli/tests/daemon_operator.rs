//! `engine-cli backup` and `engine-cli job` against a running daemon.

#[path = "support/kernel.rs"]
#[allow(dead_code, reason = "every test program uses its own part of this")]
mod kernel;
mod support;

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kernel::{LoopDevice, is_root};
use serde_json::{Value, json};
use support::qmp::Daemon;
use support::{PATIENCE, Running, code, dense, directory, json as object, run_in, same, stderr, stdout};

const LENGTH: usize = (4 << 20) + 513;

fn with_disk(there: &Path) -> Daemon {
    dense(&there.join("disk.img"), LENGTH, 3);
    let daemon = Daemon::start(there, &["--disk", "vda=disk.img"]);
    drop(daemon.client());
    daemon
}

const QMP: [&str; 2] = ["--qmp", "unix:qmp.sock"];

fn backup<'a>(target: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["backup"][..], &QMP, &["--disk", "vda", "--target", target], more].concat()
}

/// The jobs as `job list --json` shows them.
fn jobs(there: &Path) -> Vec<Value> {
    let output = run_in(there, &["job", "list", "--json", "--qmp", "./qmp.sock"]);
    let jobs: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    jobs.as_array().expect("an array").clone()
}

#[test]
fn a_backup_is_the_disk_and_leaves_nothing_behind() {
    let there = directory();
    let daemon = with_disk(there.path());
    let output = run_in(there.path(), &backup("copy.img", &["--json"]));
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let told = object(&output);
    assert_eq!((&told["result"], &told["exit_code"]), (&json!("complete"), &json!(0)));
    assert_eq!(
        (&told["bytes"], &told["done"], &told["skipped_bytes"]),
        (&json!(LENGTH), &json!(LENGTH), &json!(0))
    );
    assert!(same(&there.path().join("disk.img"), &there.path().join("copy.img")));
    let mut client = daemon.client();
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    assert!(!client.ok("query-named-block-nodes", json!({})).to_string().contains("copy.img"));

    // What exists is overwritten only when told so.
    let output = run_in(there.path(), &backup("copy.img", &[]));
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("--force"), "{}", stderr(&output));
    std::fs::write(there.path().join("copy.img"), b"old").expect("written");
    let output =
        run_in(there.path(), &backup("copy.img", &["--force", "--fleece", "fleece", "--fleece-size", "4M"]));
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(same(&there.path().join("disk.img"), &there.path().join("copy.img")));
    assert!(!there.path().join("fleece").exists());
}

#[test]
fn what_is_refused_leaves_no_target() {
    let there = directory();
    dense(&there.path().join("disk.img"), LENGTH, 3);
    let daemon = Daemon::start(there.path(), &["--nbd", "unix:nbd.sock", "--disk", "vda=disk.img"]);
    drop(daemon.client());
    for (arguments, told) in [
        (
            [&["backup"][..], &QMP, &["--disk", "none", "--target", "x"]].concat(),
            "the daemon has no disk none; it has: vda",
        ),
        (
            vec!["backup", "--qmp", "nbd.sock", "--disk", "vda", "--target", "x"],
            "nbd.sock is a socket of NBD",
        ),
        (backup("x", &["--job-id", "1"]), "Invalid job ID '1'"),
        (backup("none/x", &[]), "none does not exist; create it first"),
        (backup("/dev/vg0/x", &[]), "there is no such device; check the name with lsblk"),
        (backup("x", &["--fleece", "disk.img"]), "disk.img"),
        (
            vec!["backup", "--qmp", "unix:none", "--disk", "vda", "--target", "x"],
            "is engine-cli daemon running?",
        ),
    ] {
        let output = run_in(there.path(), &arguments);
        assert_ne!(code(&output), 0, "{arguments:?}");
        assert!(stderr(&output).contains(told), "{arguments:?}: {}", stderr(&output));
        assert!(!there.path().join("x").exists(), "{arguments:?}");
    }
}

/// Whatever the reason, and however long it is.
#[test]
fn what_is_refused_leaves_an_old_target_as_it_was() {
    let there = directory();
    dense(&there.path().join("disk.img"), LENGTH, 3);
    for (name, length) in [("longer.img", 6 << 20), ("shorter.img", 1000)] {
        dense(&there.path().join(name), length, 4);
    }
    let state = |name: &str| {
        let found = std::fs::metadata(there.path().join(name)).expect("it is there");
        let bytes = std::fs::read(there.path().join(name)).expect("read");
        (found.len(), found.modified().expect("a time"), found.ctime(), found.ctime_nsec(), bytes)
    };
    for name in ["longer.img", "shorter.img"] {
        // Nobody uses the other disk of the daemon.
        let disks = ["--disk", "vda=disk.img", "--disk", &format!("vdb={name}")];
        let daemon = Daemon::start(there.path(), &disks);
        drop(daemon.client());
        let before = state(name);
        let output = run_in(there.path(), &backup(name, &["--force"]));
        assert_eq!(code(&output), 2, "{}", stderr(&output));
        assert!(stderr(&output).contains("is the daemon's disk 'vdb'"), "{}", stderr(&output));
        assert!(state(name) == before, "{name}");
        daemon.running.kill();
        let daemon = with_disk(there.path());
        for (more, told) in [
            (&["--job-id", "bad id"][..], "Invalid job ID 'bad id'"),
            (&["--fleece", "none/fleece"], "none/fleece"),
            (&["--fleece", "disk.img"], "disk.img"),
        ] {
            let output = run_in(there.path(), &backup(name, &[&["--force"], more].concat()));
            assert_eq!(code(&output), 2, "{more:?}: {}", stderr(&output));
            assert!(stderr(&output).contains(told), "{more:?}: {}", stderr(&output));
            assert!(state(name) == before, "{name} {more:?}");
        }
        let output = run_in(there.path(), &backup(name, &["--force"]));
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        assert!(same(&there.path().join("disk.img"), &there.path().join(name)));
        daemon.running.kill();
    }
}

/// It need not be as large as the disk, and what lies beyond the disk's end stays.
#[test]
fn a_larger_device_is_a_target() {
    if !is_root() {
        return;
    }
    let there = directory();
    let _daemon = with_disk(there.path());
    let beneath = there.path().join("device.img");
    dense(&beneath, 6 << 20, 5);
    let before = std::fs::read(&beneath).expect("read");
    let device = LoopDevice::over(&beneath);
    let output = run_in(there.path(), &backup(device.text(), &[]));
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    drop(device);
    let (disk, after) =
        (std::fs::read(there.path().join("disk.img")).expect("read"), std::fs::read(&beneath).expect("read"));
    assert!(after[..LENGTH] == disk, "it is the disk");
    assert!(after[LENGTH..] == before[LENGTH..], "and what was there before");
}

#[test]
fn jobs_are_listed_steered_and_watched() {
    let there = directory();
    let _daemon = with_disk(there.path());
    let job = |verb: &str, more: &[&str]| run_in(there.path(), &[&["job", verb][..], &QMP, more].concat());
    let slow = backup("copy.img", &["--speed", "64K", "--job-id", "nightly", "--progress", "json"]);
    let mut running = Running::program(there.path(), &slow);
    running.progress(|line| line["status"] == "running");
    assert_eq!(jobs(there.path())[0]["device"], "nightly");
    let listed = stdout(&job("list", &[]));
    assert!(listed.starts_with("nightly: running, ") && listed.contains("at most 64.0 KiB/s"), "{listed}");
    assert_eq!(code(&job("pause", &["nightly"])), 0);
    assert_eq!(jobs(there.path())[0]["status"], "paused");
    running.progress(|line| line["status"] == "paused");
    let twice = job("pause", &["nightly"]);
    assert_eq!((code(&twice), stderr(&twice).contains("Job is already paused")), (2, true));
    assert_eq!(code(&job("set-speed", &["nightly", "1M"])), 0);
    assert_eq!(jobs(there.path())[0]["speed"], 1 << 20);
    assert_eq!(code(&job("resume", &["nightly"])), 0);
    let mut watching = Running::program(
        there.path(),
        &["job", "watch", "--qmp", "unix:qmp.sock", "nightly", "--progress", "json"],
    );
    watching.progress(|_| true);
    assert_eq!(code(&job("set-speed", &["nightly", "none"])), 0);
    let (code_of_backup, _, messages) = running.end();
    assert_eq!(code_of_backup, 0, "{messages}");
    let (code_of_watch, _, messages) = watching.end();
    assert_eq!(code_of_watch, 0, "{messages}");
    assert!(same(&there.path().join("disk.img"), &there.path().join("copy.img")));
    let gone = job("cancel", &["nightly"]);
    let told =
        "there is no job nightly; 'engine-cli job list --qmp unix:qmp.sock' shows those that there are";
    assert!(code(&gone) == 2 && stderr(&gone).contains(told), "{}", stderr(&gone));
    let none = job("list", &[]);
    assert_eq!(
        (code(&none), stdout(&none), stderr(&none)),
        (0, String::new(), "engine-cli: no jobs\n".into())
    );
}

#[test]
fn a_signal_or_somebody_else_cancels() {
    let there = directory();
    let _daemon = with_disk(there.path());
    let slow = backup("copy.img", &["--speed", "64K", "--json", "--progress", "json"]);
    for (signal, wanted) in [(Some("INT"), 130), (Some("TERM"), 143), (None, 1)] {
        let mut running = Running::program(there.path(), &slow);
        running.progress(|line| line["status"] == "running");
        match signal {
            Some(signal) => running.signal(signal),
            None => {
                let id = jobs(there.path())[0]["device"].as_str().expect("an id").to_owned();
                let output = run_in(there.path(), &["job", "cancel", "--qmp", "unix:qmp.sock", &id]);
                assert_eq!(code(&output), 0, "{}", stderr(&output));
            }
        }
        let (code, output, messages) = running.end();
        assert_eq!(code, wanted, "{messages}");
        let told: Value = serde_json::from_str(&output).expect("JSON");
        assert_eq!(told["result"], "cancelled");
        assert_eq!(told["signal"], signal.map_or(Value::Null, |name| json!(format!("SIG{name}"))));
        let error = if signal.is_some() { Value::Null } else { json!("cancelled") };
        assert_eq!(told["error"]["kind"], error);
        assert!(!there.path().join("copy.img").exists(), "{messages}");
        assert!(jobs(there.path()).is_empty());
    }
}

#[test]
fn a_refusal_is_an_error_in_json_lines() {
    let there = directory();
    let _daemon = with_disk(there.path());
    let output = run_in(there.path(), &backup("x", &["--job-id", "1", "--progress", "json"]));
    assert_eq!(code(&output), 2);
    let lines = stderr(&output);
    let mut lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let why = lines.find(|line| line["message"].as_str().is_some_and(|text| text.contains("Invalid job ID")));
    assert_eq!(why.expect("told")["level"], "error");
}

#[test]
fn only_old_contents_are_kept_until_a_cancel() {
    let there = directory();
    let _daemon = with_disk(there.path());
    let arguments =
        backup("old.img", &["--sync", "none", "--job-id", "old", "--json", "--progress", "json", "--force"]);
    let told = "old.img keeps the old contents of 0 B of vda, which guests changed";
    for (signal, wanted, result) in [(None, 0, "complete"), (Some("INT"), 130, "cancelled")] {
        let mut running = Running::program(there.path(), &arguments);
        running.progress(|line| line["status"] == "running");
        match signal {
            Some(signal) => running.signal(signal),
            None => {
                let output = run_in(there.path(), &["job", "cancel", "--qmp", "qmp.sock", "old"]);
                assert_eq!(code(&output), 0, "{}", stderr(&output));
            }
        }
        let (code, output, messages) = running.end();
        assert_eq!(code, wanted, "{messages}");
        assert!(messages.contains(told) && !messages.contains("was cancelled"), "{messages}");
        let object: Value = serde_json::from_str(&output).expect("JSON");
        assert_eq!((&object["result"], &object["exit_code"]), (&json!(result), &json!(wanted)));
        assert_eq!(object["error"], json!(null));
        assert!(there.path().join("old.img").exists());
    }
}

#[test]
fn jobs_that_wait_are_finalized_and_dismissed() {
    let there = directory();
    let daemon = with_disk(there.path());
    dense(&there.path().join("copy.img"), LENGTH, 9);
    let mut client = daemon.client();
    client.add_file("target", &there.path().join("copy.img"));
    let waits = json!({
        "job-id": "waits", "device": "vda", "target": "target", "sync": "full",
        "auto-finalize": false, "auto-dismiss": false,
    });
    client.ok("blockdev-backup", waits);
    client.until("waits", "BLOCK_JOB_PENDING");
    let job = |verb: &str| run_in(there.path(), &["job", verb, "--qmp", "qmp.sock", "waits"]);
    let early = job("dismiss");
    assert_eq!(code(&early), 2, "{}", stderr(&early));
    assert_eq!(code(&job("finalize")), 0);
    client.until("waits", "concluded");
    assert_eq!(jobs(there.path())[0]["status"], "concluded");
    assert_eq!(code(&job("dismiss")), 0);
    assert!(jobs(there.path()).is_empty());
    assert!(same(&there.path().join("disk.img"), &there.path().join("copy.img")));
}

#[test]
fn what_a_daemon_cannot_begin_with_is_named() {
    let there = directory();
    dense(&there.path().join("disk.img"), LENGTH, 3);
    for (arguments, told) in [
        (
            vec!["--qmp", "unix:q", "--disk", "vda=disk.img", "--disk", "vdb=./disk.img"],
            "--disk vda and --disk vdb are the same disk; give it once",
        ),
        (vec!["--qmp", "unix:q", "--nbd", "unix:q"], "--qmp and --nbd are the same socket"),
        (vec!["--qmp", "unix:none/q"], "the directory none does not exist; create it first"),
        (vec!["--nbd", "tcp:0", "--max-connections", "0"], "it is out of range; choose 1 to 1024"),
    ] {
        // One that begins all the same would not end.
        let (code, _, messages) =
            Running::program(there.path(), &[&["daemon"][..], &arguments].concat()).end();
        assert_eq!(code, 2, "{arguments:?}");
        assert!(messages.contains(told), "{arguments:?}: {messages}");
        assert!(!there.path().join("q").exists());
    }
}

#[test]
fn a_free_port_is_told_and_an_end_without_jobs_speaks_of_none() {
    let there = directory();
    let mut daemon = Daemon::start(there.path(), &["--nbd", "tcp:0"]);
    let line = daemon.running.expect("NBD is served on tcp:127.0.0.1:");
    let port = line.rsplit_once(':').expect("a port").1.parse().expect("a number");
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut greeting = [0; 16];
    stream.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT");
    drop((stream, daemon.client()));
    daemon.running.signal("TERM");
    let (code, _, messages) = daemon.running.end();
    assert_eq!(code, 0, "{messages}");
    assert!(messages.contains("ending; a second") && !messages.contains("jobs"), "{messages}");
}

#[test]
fn a_daemon_that_goes_away_is_told() {
    let there = directory();
    let daemon = with_disk(there.path());
    let slow = backup("copy.img", &["--speed", "64K", "--progress", "json"]);
    let mut running = Running::program(there.path(), &slow);
    running.progress(|line| line["status"] == "running");
    let (killed, _) = daemon.running.kill();
    assert!(killed);
    let (code, _, messages) = running.end();
    assert_eq!(code, 1, "{messages}");
    assert!(
        messages.contains("the daemon has closed the connection") || messages.contains("lost"),
        "{messages}"
    );
    assert!(messages.contains("if the daemon was killed it is incomplete, so delete it"), "{messages}");
}
