//! The daemon as a process: its sockets, its clients, its signals and its end.

mod support;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;
use support::qmp::{Daemon, Qmp};
use support::{PATIENCE, code, dense, directory, run_in, stderr};

/// Waits for the end of a daemon that was told to end; its exit code.
fn end(daemon: Daemon) -> (i32, String) {
    let (code, _, messages) = daemon.running.end();
    (code, messages)
}

#[test]
fn serves_several_clients_and_ends_by_command() {
    let there = directory();
    let daemon = Daemon::start(there.path(), &[]);
    let mut first = daemon.client();
    assert_eq!(first.greeting["QMP"]["capabilities"], json!([]));
    let mode = std::fs::metadata(&daemon.socket).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut second = daemon.client();
    let version = first.ok("query-version", json!({}));
    assert_eq!(version["qemu"], json!({ "major": 10, "minor": 0, "micro": 2 }));
    let schema = second.ok("query-qmp-schema", json!({}));
    assert!(schema.as_array().is_some_and(|entries| entries.len() > 50));
    // Both hear of a job that one has started.
    dense(&there.path().join("a"), 1 << 20, 1);
    dense(&there.path().join("b"), 1 << 20, 2);
    first.add_file("a", &there.path().join("a"));
    first.add_file("b", &there.path().join("b"));
    second.ok("blockdev-backup", json!({ "job-id": "j", "device": "a", "target": "b", "sync": "full" }));
    let wanted = ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"];
    assert_eq!(first.until("j", "null"), wanted);
    assert_eq!(second.until("j", "null"), wanted);
    first.ok("quit", json!({}));
    assert!(first.receive().is_none() && second.receive().is_none());
    let socket = daemon.socket.clone();
    assert_eq!(end(daemon).0, 0);
    assert!(!socket.exists());
}

#[test]
fn a_socket_on_which_nobody_answers_is_taken_over_and_no_other() {
    let there = directory();
    let daemon = Daemon::start(there.path(), &[]);
    drop(daemon.client());
    let socket = format!("unix:{}", daemon.socket.display());
    let second = run_in(there.path(), &["daemon", "--qmp", &socket]);
    assert_eq!(code(&second), 2);
    assert!(stderr(&second).contains("another program"), "{}", stderr(&second));
    assert!(daemon.socket.exists());
    let (killed, _) = daemon.running.kill();
    assert!(killed);
    let third = Daemon::start(there.path(), &[]);
    let mut client = third.client();
    client.ok("quit", json!({}));
    assert_eq!(end(third).0, 0);

    std::fs::write(there.path().join("qmp.sock"), "mine").expect("written");
    let fourth = run_in(there.path(), &["daemon", "--qmp", &socket]);
    assert_eq!(code(&fourth), 2);
    assert_eq!(std::fs::read(there.path().join("qmp.sock")).expect("still there"), b"mine");
}

#[test]
fn a_signal_cancels_jobs_with_their_events() {
    for signal in ["TERM", "INT"] {
        let there = directory();
        let daemon = Daemon::start(there.path(), &[]);
        let mut client = daemon.client();
        for (name, seed) in [("a", 1), ("b", 2)] {
            dense(&there.path().join(name), 1 << 20, seed);
            client.add_file(name, &there.path().join(name));
        }
        let slow = json!({ "job-id": "j", "device": "a", "target": "b", "sync": "full", "speed": 65536 });
        client.ok("blockdev-backup", slow);
        daemon.running.signal(signal);
        let told = client.until("j", "null");
        assert_eq!(
            told[told.len() - 4..],
            ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"],
            "{signal}"
        );
        assert!(client.receive().is_none());
        let socket = daemon.socket.clone();
        let (code, messages) = end(daemon);
        assert_eq!(code, 0, "{messages}");
        assert!(!socket.exists());
    }
}

#[test]
fn wrong_usage_is_refused_in_one_line() {
    let there = directory();
    for (arguments, told) in [
        (&["daemon"][..], "no way in"),
        (&["daemon", "--qmp", "tcp:1"], "TCP"),
        (&["daemon", "--qmp", "/x"], "unix:PATH"),
        (&["daemon", "--qmp", "unix:q", "--disk", "x"], "NAME=PATH"),
        (&["daemon", "--qmp", "unix:q", "--disk", "a=none"], "--disk a=none: Could not open 'none'"),
        (&["daemon", "--qmp", "unix:q", "--disk", "1=/dev/null"], "'file' driver requires '/dev/null'"),
        (&["daemon", "--qmp", "unix:q", "--memory", "1M"], "16M to 1G"),
        (&["daemon", "--qmp", "unix:q", "--nbd", "x"], "unix:PATH or tcp:"),
        (&["daemon", "--qmp", "unix:none/q"], "cannot listen on none/q"),
    ] {
        let output = run_in(there.path(), arguments);
        assert_eq!(code(&output), 2, "{arguments:?}");
        let first = stderr(&output).lines().next().unwrap_or_default().to_owned();
        assert!(first.contains(told), "{arguments:?}: {first}");
        assert!(!there.path().join("q").exists(), "{arguments:?} leaves no socket");
    }
}

#[test]
fn tells_the_service_manager() {
    let there = directory();
    let manager = UnixDatagram::bind(there.path().join("notify")).expect("bound");
    manager.set_read_timeout(Some(PATIENCE)).expect("set");
    let path = there.path().join("notify");
    let daemon = Daemon::start_with(there.path(), &[], |command| {
        command.env("NOTIFY_SOCKET", path);
    });
    let mut buffer = [0; 64];
    let mut told = || {
        let length = manager.recv(&mut buffer).expect("told");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert_eq!(told(), "READY=1");
    // What listens is there by then.
    UnixStream::connect(&daemon.socket).expect("listens");
    daemon.running.signal("TERM");
    assert_eq!(told(), "STOPPING=1");
    assert_eq!(end(daemon).0, 0);
}

/// Hands `socket` over as descriptor 3, as service managers do.
fn hand_over(command: &mut std::process::Command, socket: &UnixListener) {
    let fd = socket.as_raw_fd();
    // SAFETY: between fork and exec nothing but two system calls is made.
    unsafe {
        command.pre_exec(move || {
            // Where it has that number already, it must only not be closed.
            let done = if fd == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(fd, 3) };
            if done == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
}

#[test]
fn a_socket_that_is_handed_over_must_be_one_and_listen() {
    let there = directory();
    let program = support::program();
    let start = |sockets: &str, arguments: &str| {
        let socket =
            UnixListener::bind(there.path().join(format!("nbd{sockets}{}", arguments.len()))).expect("bound");
        let script =
            format!("LISTEN_PID=$$ LISTEN_FDS={sockets} exec {} daemon {arguments}", program.display());
        let mut command = std::process::Command::new("sh");
        command.arg("-c").arg(script).current_dir(there.path()).stdin(Stdio::null());
        hand_over(&mut command, &socket);
        command.output().expect("runs")
    };
    let told = |output: &std::process::Output| stderr(output).lines().next().unwrap_or_default().to_owned();
    let two = start("2", "");
    assert_eq!((code(&two), told(&two).contains("2 sockets were handed over")), (2, true), "{}", told(&two));
    let both = start("1", "--nbd unix:other");
    assert_eq!((code(&both), told(&both).contains("choose one")), (2, true), "{}", told(&both));
    assert!(!there.path().join("other").exists());
    // Told of a socket that nobody has handed over.
    let script = format!("exec 3<&-; LISTEN_PID=$$ LISTEN_FDS=1 exec {} daemon", program.display());
    let none = std::process::Command::new("sh").arg("-c").arg(script).output().expect("runs");
    assert_eq!(
        (code(&none), told(&none).contains("descriptor 3 (LISTEN_FDS) is not open")),
        (2, true),
        "{}",
        told(&none)
    );
    let script = format!("exec 3</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec {} daemon", program.display());
    let file = std::process::Command::new("sh").arg("-c").arg(script).output().expect("runs");
    assert_eq!((code(&file), told(&file).contains("is no listening socket")), (2, true), "{}", told(&file));
}

#[test]
fn a_client_that_never_reads_is_left_behind_and_harms_nobody() {
    let there = directory();
    let daemon = Daemon::start(there.path(), &[]);
    let mut deaf = daemon.client();
    // Commands whose replies it does not read: it is not listened to any more at some time, and no memory is lost to it.
    let greedy = br#"{"execute":"query-qmp-schema"}"#.repeat(100);
    let mut stream = UnixStream::connect(&daemon.socket).expect("connects");
    stream.set_nonblocking(true).expect("set");
    stream.write_all(br#"{"execute":"qmp_capabilities"}"#).expect("sent");
    let mut sent = 0;
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until && sent < 64 << 20 {
        match stream.write(&greedy) {
            Ok(bytes) => sent += bytes,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    assert!(sent < 2 << 20, "{sent} bytes were taken from one that does not read");

    // Events: the other clients see all of them.
    let mut busy = daemon.client();
    for (name, seed) in [("a", 1), ("b", 2)] {
        dense(&there.path().join(name), 64 << 10, seed);
        busy.add_file(name, &there.path().join(name));
    }
    for _ in 0..40 {
        busy.ok("blockdev-backup", json!({ "job-id": "j", "device": "a", "target": "b", "sync": "full" }));
        busy.until("j", "null");
    }
    let memory = resident(daemon.running.id());
    assert!(memory < 160 << 20, "{memory} bytes");
    busy.ok("quit", json!({}));
    // The deaf one gets what was waiting, if it listens now.
    assert_eq!(deaf.until("j", "null").len(), 7);
    assert_eq!(end(daemon).0, 0);
}

/// Resident bytes of a process.
fn resident(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().expect("a number") << 10
}

#[test]
fn more_clients_than_there_is_room_for_wait() {
    let there = directory();
    let daemon = Daemon::start(there.path(), &[]);
    let mut clients: Vec<Qmp> = (0..32).map(|_| daemon.client()).collect();
    let mut waiting = UnixStream::connect(&daemon.socket).expect("queued");
    waiting.set_read_timeout(Some(Duration::from_millis(300))).expect("set");
    let mut buffer = [0; 1000];
    assert!(waiting.read(&mut buffer).is_err(), "it is not greeted yet");
    drop(clients.pop());
    waiting.set_read_timeout(Some(PATIENCE)).expect("set");
    assert!(waiting.read(&mut buffer).is_ok_and(|bytes| bytes > 0));
    clients[0].ok("quit", json!({}));
    assert_eq!(end(daemon).0, 0);
}

#[test]
fn garbage_is_answered_and_the_connection_goes_on() {
    let there = directory();
    let daemon = Daemon::start(there.path(), &[]);
    let mut client = daemon.client();
    client.send(b"{\"execute\":\"query-version\",}\xff[nan]");
    for why in ["expecting value", "stray", "invalid keyword"] {
        let told = client.receive().expect("an answer").to_string();
        assert!(told.contains(why), "{why}: {told}");
    }
    client.send(&b"[".repeat(5000));
    let told = client.receive().expect("an answer").to_string();
    assert!(told.contains("nesting"), "{told}");
    // Half a message, and away.
    let mut leaver = UnixStream::connect(&daemon.socket).expect("connects");
    leaver.write_all(b"{\"execute\":\"qmp_cap").expect("sent");
    drop(leaver);
    // One that sends everything, hangs up its side and waits.
    let mut hasty = UnixStream::connect(&daemon.socket).expect("connects");
    hasty.write_all(br#"{"execute":"qmp_capabilities"}{"execute":"query-jobs","id":5}"#).expect("sent");
    hasty.shutdown(std::net::Shutdown::Write).expect("shut");
    let mut told = String::new();
    hasty.read_to_string(&mut told).expect("read");
    assert!(told.contains("\"id\":5"), "{told}");
    daemon.client().ok("quit", json!({}));
    assert_eq!(end(daemon).0, 0);
}

#[test]
fn disks_of_the_command_line_are_nodes() {
    let there = directory();
    dense(&there.path().join("a.img"), 100_000, 1);
    let daemon = Daemon::start(there.path(), &["--disk", "vda=a.img", "--io-engine", "threads"]);
    let mut client = daemon.client();
    let nodes = client.ok("query-named-block-nodes", json!({}));
    assert_eq!(
        (&nodes[0]["node-name"], &nodes[0]["image"]["virtual-size"]),
        (&json!("vda"), &json!(100_000))
    );
    let file = nodes[0]["file"].as_str().expect("a path");
    assert!(Path::new(file).is_absolute(), "{file}");
    client.ok("quit", json!({}));
    assert_eq!(end(daemon).0, 0);
}
