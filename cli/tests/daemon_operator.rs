//! `engine-cli backup` and `engine-cli job` against a running daemon.

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};
use support::qmp::Daemon;
use support::{Running, code, dense, directory, json as object, run_in, same, stderr, stdout};

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
    assert_eq!(told["report"]["done"], LENGTH);
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
    let _daemon = with_disk(there.path());
    for (arguments, told) in [
        (
            [&["backup"][..], &QMP, &["--disk", "none", "--target", "x"]].concat(),
            "the daemon has no disk none; it has: vda",
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
    assert_eq!((code(&gone), stderr(&gone).contains("Job not found")), (2, true));
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
        assert!(!there.path().join("copy.img").exists(), "{messages}");
        assert!(jobs(there.path()).is_empty());
    }
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
