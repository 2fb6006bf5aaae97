//! A daemon in trouble: it tells, and goes on.

mod support;

use std::fs;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;
use support::qmp::{Daemon, Qmp};
use support::{directory, has};

fn count(messages: &str, text: &str) -> usize {
    messages.lines().filter(|line| line.contains(text)).count()
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
    let limit = |soft: &str| {
        let status = Command::new("prlimit").args(["--pid", &id, &format!("--nofile={soft}:")]).status();
        assert!(status.expect("prlimit runs").success());
    };
    let limits = fs::read_to_string(format!("/proc/{id}/limits")).expect("limits");
    let files = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
    let before = files.split_whitespace().nth(3).expect("the soft one");
    let is_open = |number: &u32| fs::symlink_metadata(format!("/proc/{id}/fd/{number}")).is_ok();
    let free = (0..).find(|number| !is_open(number)).expect("some are free");
    limit(&free.to_string());
    let second = UnixStream::connect(&daemon.socket).expect("connected");
    daemon.running.expect("cannot accept a QMP client: ");
    // It is tried again meanwhile.
    thread::sleep(Duration::from_millis(300));
    first.ok("query-version", json!({}));
    limit(before);
    Qmp::connect(&daemon.socket).ok("quit", json!({}));
    drop(second);
    let (code, _, messages) = daemon.running.end();
    assert_eq!((code, count(&messages, "cannot accept")), (0, 1), "{messages}");
}
