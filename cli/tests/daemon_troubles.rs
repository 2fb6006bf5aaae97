//! A daemon in trouble: nothing answers, nothing is left, the engine is dead. It is told, and the daemon ends or goes on.

mod support;

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;
use support::qmp::{Daemon, Qmp};
use support::{Running, dense, directory, has};

const LENGTH: usize = 4 << 20;

fn with_disk(there: &Path, more: &[&str]) -> Daemon {
    dense(&there.join("disk.img"), LENGTH, 3);
    let daemon = Daemon::start(there, &[&["--disk", "vda=disk.img"], more].concat());
    drop(daemon.client());
    daemon
}

fn count(messages: &str, text: &str) -> usize {
    messages.lines().filter(|line| line.contains(text)).count()
}

/// Holds a lease on a file: who opens it has to wait until it is given back, or for 45 seconds.
const LEASE: &str = "
import fcntl, os, signal, sys
def say(text):
    sys.stderr.write(text + '\\n')
    sys.stderr.flush()
signal.signal(signal.SIGIO, lambda *_: say('somebody waits'))
held = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
except OSError as error:
    say(f'no lease: {error}')
say('ready')
while True:
    signal.pause()
";

#[test]
fn a_second_signal_ends_a_daemon_that_waits_for_a_path() {
    if !has("python3") {
        return;
    }
    let there = directory();
    let mut daemon = with_disk(there.path(), &[]);
    dense(&there.path().join("copy.img"), LENGTH, 9);
    let mut holder =
        Running::start(Command::new("python3").args(["-c", LEASE, "copy.img"]).current_dir(there.path()));
    if holder.expect("").contains("no lease") {
        eprintln!("SKIPPED: the file system has no leases");
        return;
    }
    let path = there.path().join("copy.img").display().to_string();
    let backup = json!({ "job-id": "nightly", "device": "vda", "path": path, "sync": "full", "force": true });
    let mut client = daemon.client();
    client.send(json!({ "execute": "x-backup", "arguments": backup }).to_string().as_bytes());
    holder.expect("somebody waits");
    daemon.running.signal("TERM");
    daemon.running.expect("ending has to wait for what is under way; a second signal ends at once");
    assert!(daemon.running.is_running());
    daemon.running.signal("TERM");
    let (code, _, messages) = daemon.running.end();
    assert_eq!(code, 143, "{messages}");
}

/// Have the process open no more files than it has open now; what the limit was.
fn allow_no_more_files(id: &str) -> String {
    let limits = fs::read_to_string(format!("/proc/{id}/limits")).expect("limits");
    let files = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
    let before = files.split_whitespace().nth(3).expect("the soft one").to_owned();
    let is_open = |number: &u32| fs::symlink_metadata(format!("/proc/{id}/fd/{number}")).is_ok();
    let free = (0..).find(|number| !is_open(number)).expect("some are free");
    allow_files(id, &free.to_string());
    before
}

fn allow_files(id: &str, soft: &str) {
    let status = Command::new("prlimit").args(["--pid", id, &format!("--nofile={soft}:")]).status();
    assert!(status.expect("prlimit runs").success());
}

#[test]
fn a_daemon_without_descriptors_tells_once_and_goes_on() {
    if !has("prlimit") {
        return;
    }
    let there = directory();
    let mut daemon = Daemon::start(there.path(), &[]);
    let id = daemon.running.id().to_string();
    let mut first = daemon.client();
    first.ok("query-version", json!({}));
    let before = allow_no_more_files(&id);
    let second = UnixStream::connect(&daemon.socket).expect("connected");
    daemon.running.expect("cannot accept a QMP client: ");
    // It is tried again meanwhile.
    thread::sleep(Duration::from_millis(300));
    first.ok("query-version", json!({}));
    allow_files(&id, &before);
    Qmp::connect(&daemon.socket).ok("quit", json!({}));
    drop(second);
    let (code, _, messages) = daemon.running.end();
    assert_eq!((code, count(&messages, "cannot accept")), (0, 1), "{messages}");
}

#[test]
fn guests_for_whom_there_are_no_descriptors_are_told_of_once_and_served_later() {
    if !has("prlimit") {
        return;
    }
    let there = directory();
    let mut daemon = with_disk(there.path(), &["--nbd", "unix:nbd.sock"]);
    let id = daemon.running.id().to_string();
    let mut client = daemon.client();
    client.ok("query-version", json!({}));
    let before = allow_no_more_files(&id);
    // The first may find the way that was open before.
    let connect = || UnixStream::connect(there.path().join("nbd.sock")).expect("connected");
    let guests = [connect(), connect(), connect()];
    daemon.running.expect("cannot accept an NBD client: ");
    thread::sleep(Duration::from_millis(300));
    allow_files(&id, &before);
    for mut guest in guests {
        let mut greeting = [0; 8];
        guest.set_read_timeout(Some(Duration::from_secs(30))).expect("set");
        guest.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting, b"NBDMAGIC");
    }
    client.ok("quit", json!({}));
    let (code, _, messages) = daemon.running.end();
    assert_eq!((code, count(&messages, "cannot accept")), (0, 1), "{messages}");
}

/// What was its ring is something else of a sudden: a debugger sees to it, so that the program need not have a way.
#[test]
fn a_daemon_whose_engine_has_died_tells_and_ends() {
    if !has("gdb") {
        return;
    }
    let there = directory();
    let mut daemon = with_disk(there.path(), &["--nbd", "unix:nbd.sock"]);
    let id = daemon.running.id().to_string();
    let mut client = daemon.client();
    let slow = json!({ "job-id": "slow", "device": "vda", "path": there.path().join("copy.img"), "sync": "full", "speed": 65536 });
    client.ok("x-backup", slow);
    let rings = fs::read_dir(format!("/proc/{id}/fd")).expect("descriptors").filter_map(|entry| {
        let entry = entry.expect("one");
        let is_ring = fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("[io_uring]"));
        is_ring.then(|| format!("call (int)dup2(0, {})", entry.file_name().to_string_lossy()))
    });
    let calls: Vec<String> = rings.flat_map(|call| ["-ex".to_owned(), call]).collect();
    if calls.is_empty() {
        eprintln!("SKIPPED: there is no io_uring");
        return;
    }
    let output = Command::new("gdb")
        .args(["-nx", "-batch", "-ex", "set language c", "-p", &id])
        .args(&calls)
        .output()
        .expect("runs");
    let told = support::stderr(&output);
    if told.contains("not permitted") {
        eprintln!("SKIPPED: gdb may not attach to a daemon");
        return;
    }
    assert!(output.status.success(), "{told}");
    daemon.running.expect("the engine has died: ");
    let told = client.until("slow", "null");
    assert_eq!(told[told.len() - 3..], ["BLOCK_JOB_COMPLETED", "concluded", "null"], "{told:?}");
    let (code, _, messages) = daemon.running.end();
    assert_eq!((code, count(&messages, "the engine has died")), (1, 1), "{messages}");
    assert!(!messages.contains("its ring thread has ended"), "told once: {messages}");
    assert!(!there.path().join("copy.img").exists());
}
