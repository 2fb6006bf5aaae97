//! The daemon's exports, with the programs that use them: `qemu-io` is the guest, `nbdcopy` the backup tool.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::qmp::{Daemon, Qmp};
use support::{PATIENCE, code, dense, directory, has, run_in, same, stderr, stdout};

const LENGTH: usize = (8 << 20) + 512;

fn with_disk(there: &Path) -> Daemon {
    dense(&there.join("disk.img"), LENGTH, 3);
    Daemon::start(there, &["--nbd", "unix:nbd.sock", "--disk", "vda=disk.img"])
}

fn uri(export: &str) -> String {
    format!("nbd+unix:///{export}?socket=nbd.sock")
}

/// Run a program that gives up rather than hang.
fn tool(there: &Path, arguments: &[&str]) -> Output {
    Command::new("timeout").arg("60").args(arguments).current_dir(there).output().expect("runs")
}

/// A guest does what `commands` say to an export.
fn guest(there: &Path, export: &str, commands: &[&str]) -> Output {
    let uri = uri(export);
    let mut arguments = vec!["qemu-io", "-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&uri);
    tool(there, &arguments)
}

#[track_caller]
fn guest_does(there: &Path, export: &str, commands: &[&str]) {
    let output = guest(there, export, commands);
    let said = stdout(&output) + &stderr(&output);
    assert!(output.status.success() && !said.contains("failed"), "{commands:?}: {said}");
}

fn exports(client: &mut Qmp) -> Vec<String> {
    let exports = client.ok("query-block-exports", json!({}));
    let ids = exports.as_array().expect("a list").iter();
    ids.map(|export| export["id"].as_str().expect("an id").to_owned()).collect()
}

/// The next event of this name.
fn event(client: &mut Qmp, name: &str) -> Value {
    loop {
        let event = client.event();
        if event["event"] == name {
            return event["data"].clone();
        }
    }
}

#[test]
fn a_backup_shows_t0_while_a_guest_writes_and_a_tool_pulls_the_snapshot() {
    if !has("qemu-io") || !has("nbdcopy") {
        return;
    }
    let there = directory();
    let daemon = with_disk(there.path());
    let mut client = daemon.client();
    guest_does(there.path(), "vda", &["write -P 1 4096 100000", "flush"]);
    fs::copy(there.path().join("disk.img"), there.path().join("t0.img")).expect("copied");
    dense(&there.path().join("target.img"), LENGTH, 9);
    client.add_file("target", &there.path().join("target.img"));
    let backup =
        json!({ "job-id": "job", "device": "vda", "target": "target", "sync": "full", "speed": 1 << 20 });
    client.ok("blockdev-backup", backup);
    let snapshot =
        json!({ "type": "nbd", "id": "t0", "node-name": "vda", "name": "t0", "x-snapshot": "job" });
    client.ok("block-export-add", snapshot);
    guest_does(there.path(), "vda", &["write -P 2 0 3M", "write -z 5M 1M", "write -f -P 3 8388608 512"]);
    guest_does(there.path(), "vda", &["read -P 2 0 3M", "read -P 0 5M 1M", "read -P 3 8388608 512"]);
    let pulled = tool(there.path(), &["nbdcopy", &uri("t0"), "pulled.img"]);
    assert!(pulled.status.success(), "{}", stderr(&pulled));
    client.ok("block-job-set-speed", json!({ "device": "job", "speed": 0 }));
    client.until("job", "null");
    for copy in ["pulled.img", "target.img"] {
        assert!(same(&there.path().join("t0.img"), &there.path().join(copy)), "{copy} shows t0");
    }
    assert!(!same(&there.path().join("t0.img"), &there.path().join("disk.img")));
    // The snapshot went with its job.
    assert_eq!(exports(&mut client), ["vda"]);
    // Nothing can be written to what is for reading.
    client.ok("block-export-add", json!({ "type": "nbd", "id": "r", "node-name": "vda", "name": "r" }));
    assert!(!guest(there.path(), "r", &["write 0 512"]).status.success());
}

/// A client reads the disk as a whole by TCP, and writes to it.
#[track_caller]
fn is_served_by_tcp(there: &Path, port: u16) {
    let uri = format!("nbd://127.0.0.1:{port}/vda");
    let pulled = run_in(there, &["copy", &uri, "pulled.img", "--force"]);
    assert_eq!(code(&pulled), 0, "{}", stderr(&pulled));
    assert!(same(&there.join("disk.img"), &there.join("pulled.img")));
    if !has("qemu-io") {
        return;
    }
    let commands = ["write -P 7 4096 100000", "flush", "read -P 7 4096 100000"];
    let arguments = commands.iter().flat_map(|command| ["-c", command]);
    let arguments: Vec<&str> = ["qemu-io", "-f", "raw"].into_iter().chain(arguments).chain([&*uri]).collect();
    let output = tool(there, &arguments);
    let said = stdout(&output) + &stderr(&output);
    assert!(output.status.success() && !said.contains("failed"), "{said}");
    assert_eq!(fs::read(there.join("disk.img")).expect("read")[4096..104_096], [7; 100_000]);
}

#[test]
fn a_disk_is_served_by_tcp_as_the_command_line_wants_it() {
    let there = directory();
    dense(&there.path().join("disk.img"), LENGTH, 3);
    let mut daemon = Daemon::start(there.path(), &["--nbd", "tcp:0", "--disk", "vda=disk.img"]);
    let line = daemon.running.expect("NBD is served on tcp:127.0.0.1:");
    let port = line.rsplit_once(':').expect("a port").1.parse().expect("a number");
    is_served_by_tcp(there.path(), port);
}

#[test]
fn a_disk_is_served_by_tcp_as_a_client_of_qmp_wants_it() {
    let there = directory();
    dense(&there.path().join("disk.img"), LENGTH, 3);
    let daemon = Daemon::start(there.path(), &["--disk", "vda=disk.img"]);
    let mut client = daemon.client();
    // Of ports that were free a moment ago one is free still.
    let port = (0..20).find_map(|_| {
        let free = TcpListener::bind(("127.0.0.1", 0)).expect("a port").local_addr().expect("bound").port();
        let address = json!({ "type": "inet", "data": { "host": "127.0.0.1", "port": free.to_string() } });
        let reply = client.execute("nbd-server-start", json!({ "addr": address }));
        let taken = reply["error"]["desc"].as_str().is_some_and(|why| why.contains("EADDRINUSE"));
        assert!(taken || reply == json!({ "return": {} }), "{reply}");
        (!taken).then_some(free)
    });
    client.ok(
        "block-export-add",
        json!({ "type": "nbd", "id": "e", "node-name": "vda", "name": "vda", "writable": true }),
    );
    is_served_by_tcp(there.path(), port.expect("one of them"));
    client.ok("nbd-server-stop", json!({}));
}

#[test]
fn exports_come_and_go() {
    if !has("qemu-io") {
        return;
    }
    let there = directory();
    let daemon = with_disk(there.path());
    let mut client = daemon.client();
    assert_eq!(exports(&mut client), ["vda"]);
    // A guest that stays: it reads, then waits for what it is told next.
    let mut stays = Command::new("qemu-io")
        .args(["-f", "raw", &uri("vda")])
        .current_dir(there.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("runs");
    stays.stdin.as_mut().expect("piped").write_all(b"read 0 512\n").expect("told");
    until_said(stays.stdout.take().expect("piped"), "512/512");
    assert!(client.refused("block-export-del", json!({ "id": "vda" })).contains("still in use"));
    client.ok("block-export-del", json!({ "id": "vda", "mode": "hard" }));
    assert_eq!(event(&mut client, "BLOCK_EXPORT_DELETED"), json!({ "id": "vda" }));
    drop(stays.stdin.take());
    assert!(stays.wait().is_ok());
    assert!(!guest(there.path(), "vda", &["read 0 512"]).status.success(), "it is gone");
    client.ok(
        "block-export-add",
        json!({ "type": "nbd", "id": "again", "node-name": "vda", "writable": true }),
    );
    guest_does(there.path(), "vda", &["write -P 7 0 512"]);
    client.ok("nbd-server-stop", json!({}));
    assert_eq!(event(&mut client, "BLOCK_EXPORT_DELETED"), json!({ "id": "again" }));
    assert!(!there.path().join("nbd.sock").exists());
    let address = json!({ "type": "unix", "data": { "path": there.path().join("nbd.sock") } });
    client.ok("nbd-server-start", json!({ "addr": address }));
    client.ok(
        "block-export-add",
        json!({ "type": "nbd", "id": "third", "node-name": "vda", "name": "vda", "writable": true }),
    );
    guest_does(there.path(), "vda", &["read -P 7 0 512"]);
    client.ok("quit", json!({}));
    assert!(!there.path().join("nbd.sock").exists());
}

/// It is not told that it may come in several times, for then it would wait for itself.
#[test]
fn a_tool_that_may_come_in_once_copies_all_the_same() {
    if !has("nbdcopy") || !has("nbdinfo") {
        return;
    }
    let there = directory();
    let there = there.path();
    dense(&there.join("disk.img"), LENGTH, 3);
    let arguments = ["--nbd", "unix:nbd.sock", "--disk", "vda=disk.img", "--max-connections", "1"];
    let daemon = Daemon::start(there, &arguments);
    drop(daemon.client());
    let output = tool(there, &["nbdcopy", &uri("vda"), "out.img"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(same(&there.join("disk.img"), &there.join("out.img")));
    // Whoever starts the server by QMP chooses among what there is.
    daemon.running.signal("TERM");
    assert_eq!(daemon.running.end().0, 0);
    let daemon = Daemon::start(there, &["--disk", "vda=disk.img", "--max-connections", "4"]);
    let mut client = daemon.client();
    let start = |most: u32| {
        let address = json!({ "type": "unix", "data": { "path": there.join("nbd.sock") } });
        json!({ "addr": address, "max-connections": most })
    };
    assert!(client.refused("nbd-server-start", start(5)).contains("4 is the most"));
    for (most, many) in [(1, false), (4, true), (0, true)] {
        client.ok("nbd-server-start", start(most));
        client.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "vda" }));
        let said = tool_says(there, &["nbdinfo", &uri("vda")]);
        assert!(said.contains(&format!("can_multi_conn: {many}")), "{most}: {said}");
        client.ok("nbd-server-stop", json!({}));
        assert_eq!(event(&mut client, "BLOCK_EXPORT_DELETED"), json!({ "id": "e" }));
    }
}

/// Read what a program prints until it has said this.
fn until_said(mut output: impl Read, words: &str) {
    let (mut said, mut byte) = (Vec::new(), [0]);
    while !said.ends_with(words.as_bytes()) {
        output.read_exact(&mut byte).unwrap_or_else(|_| panic!("only {}", String::from_utf8_lossy(&said)));
        said.push(byte[0]);
    }
}

/// What the kernel does behind a program that has ended must not be left to it: whoever takes the disk over finds it free.
#[test]
fn a_daemon_that_has_ended_holds_its_disks_no_more() {
    if !has("qemu-io") {
        return;
    }
    let there = directory();
    for _ in 0..8 {
        let daemon = with_disk(there.path());
        drop(daemon.client());
        guest_does(there.path(), "vda", &["write -P 1 0 1M"]);
        daemon.running.signal("TERM");
        assert_eq!(daemon.running.end().0, 0);
        let output = tool(there.path(), &["qemu-io", "-f", "raw", "-c", "read -P 1 0 1M", "disk.img"]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
}

/// A tool starts the daemon by itself and hands its socket over.
#[test]
fn a_tool_that_hands_its_socket_over_copies_the_disk() {
    if !has("nbdcopy") {
        return;
    }
    let there = directory();
    dense(&there.path().join("disk.img"), LENGTH, 3);
    let program = support::program();
    let program = program.to_str().expect("text");
    let daemon = ["--", "[", program, "daemon", "--disk", "vda=disk.img", "]", "out.img"];
    let output = tool(there.path(), &[&["nbdcopy"][..], &daemon].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(same(&there.path().join("disk.img"), &there.path().join("out.img")));
}

#[track_caller]
fn tool_says(there: &Path, arguments: &[&str]) -> String {
    let output = tool(there, arguments);
    assert!(output.status.success(), "{arguments:?}: {}{}", stdout(&output), stderr(&output));
    stdout(&output)
}

/// QEMU's tools list exports, look at one, and copy out of it and into it, also while a job shows t0.
#[test]
fn tools_of_qemu_as_clients() {
    if !has("qemu-img") || !has("qemu-nbd") {
        return;
    }
    let there = directory();
    let there = there.path();
    let daemon = with_disk(there);
    let mut client = daemon.client();
    let socket = there.join("nbd.sock");
    let list = ["qemu-nbd", "--list", "--socket", socket.to_str().expect("text")];
    let listed = tool_says(there, &list);
    for expected in ["'vda'", &format!("size:  {LENGTH}"), "multi", "fast-zero", "base:allocation"] {
        assert!(listed.contains(expected), "no {expected:?} in {listed}");
    }
    let info = tool_says(there, &["qemu-img", "info", "--output=json", "-f", "raw", &uri("vda")]);
    let info: Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!(info["virtual-size"], LENGTH);
    tool_says(there, &["qemu-img", "convert", "-f", "raw", "-O", "raw", &uri("vda"), "out.img"]);
    assert!(same(&there.join("disk.img"), &there.join("out.img")), "copied out");
    tool_says(there, &["qemu-img", "compare", "-f", "raw", "-F", "raw", &uri("vda"), "out.img"]);

    // A job, whose t0 is exported; then another disk is copied in, with holes.
    dense(&there.join("target.img"), LENGTH, 9);
    client.add_file("target", &there.join("target.img"));
    let backup = json!({ "job-id": "job", "device": "vda", "target": "target", "sync": "none" });
    client.ok("blockdev-backup", backup);
    let snapshot =
        json!({ "type": "nbd", "id": "t0", "node-name": "vda", "name": "t0", "x-snapshot": "job" });
    client.ok("block-export-add", snapshot);
    support::sparse(&there.join("in.img"), LENGTH as u64);
    tool_says(there, &["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "in.img", &uri("vda")]);
    tool_says(there, &["qemu-img", "compare", "-f", "raw", "-F", "raw", &uri("vda"), "in.img"]);
    tool_says(there, &["qemu-img", "convert", "-f", "raw", "-O", "qcow2", &uri("t0"), "t0.qcow2"]);
    tool_says(there, &["qemu-img", "compare", "-f", "qcow2", "-F", "raw", "t0.qcow2", "out.img"]);
    let listed = tool_says(there, &list);
    assert!(listed.contains("'t0'") && listed.contains("readonly"), "{listed}");
    client.ok("job-cancel", json!({ "id": "job" }));
    client.until("job", "null");
    assert!(same(&there.join("disk.img"), &there.join("in.img")), "copied in");
}

#[test]
fn the_operator_hears_what_guests_felt() {
    if !has("qemu-io") {
        return;
    }
    let there = directory();
    let daemon = with_disk(there.path());
    drop(daemon.client());
    guest_does(there.path(), "vda", &["write -P 1 0 4096", "write -P 2 4096 4096"]);
    fs::copy(there.path().join("disk.img"), there.path().join("t0.img")).expect("copied");
    let arguments = [
        &["backup", "--qmp", "unix:qmp.sock", "--disk", "vda", "--target", "copy.img", "--json"][..],
        &["--speed", "4M", "--after", "3"],
    ];
    let over = AtomicBool::new(false);
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                // The same again, so t0 is the same whenever it comes.
                guest_does(there.path(), "vda", &["write -P 1 0 4096", "write -P 2 4096 4096"]);
            }
        });
        let output = run_in(there.path(), &arguments.concat());
        over.store(true, Ordering::Relaxed);
        output
    });
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let told = support::json(&output);
    let guests = &told["guests"];
    for phase in ["before", "during", "after"] {
        let felt = &guests[phase];
        let requests = felt["requests"].as_u64().expect("a number");
        assert!(requests >= 2, "{phase}: {told}");
        let octaves = felt["histogram"].as_array().expect("a list").iter();
        assert_eq!(
            octaves.map(|octave| octave["requests"].as_u64().expect("a number")).sum::<u64>(),
            requests
        );
        assert!(guests["line"].as_str().is_some_and(|line| line.contains(&format!("{phase}: "))), "{told}");
    }
    assert!(same(&there.path().join("t0.img"), &there.path().join("copy.img")));
}

/// What a client says who chooses the export `vda`, writes, and reads.
fn conversation() -> Vec<u8> {
    let option = [&3_u32.to_be_bytes()[..], b"vda", &0_u16.to_be_bytes()].concat();
    let request = |command: u16, length: u32| {
        let (magic, cookie, offset) = (0x2560_9513_u32, 7_u64, 4096_u64);
        [
            &magic.to_be_bytes()[..],
            &0_u16.to_be_bytes(),
            &command.to_be_bytes(),
            &cookie.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat()
    };
    [
        &3_u32.to_be_bytes()[..],
        b"IHAVEOPT",
        &7_u32.to_be_bytes(),
        &u32::try_from(option.len()).expect("short").to_be_bytes(),
        &option,
        &request(1, 5000),
        &[9; 5000],
        &request(0, 1 << 20),
        &request(3, 0),
    ]
    .concat()
}

/// Descriptors that a process has, and bytes of it in memory.
fn held_by(id: u32) -> (usize, u64) {
    let open = fs::read_dir(format!("/proc/{id}/fd")).expect("there").count();
    // What `statm` tells may be off by half a MiB.
    let told = fs::read_to_string(format!("/proc/{id}/smaps_rollup")).expect("there");
    let line = told.lines().find(|line| line.starts_with("Rss:")).expect("all of it");
    let kib: u64 = line.split_whitespace().nth(1).expect("a number").parse().expect("a number");
    (open, kib << 10)
}

/// During a backup, and in any state of their conversation.
#[test]
fn a_thousand_guests_that_come_and_go_leave_nothing_in_the_daemon() {
    /// Bytes by which memory may grow while 900 of them do: much less than a KiB for each.
    const MOST_GROWN: u64 = 256 << 10;
    let there = directory();
    let daemon = with_disk(there.path());
    let mut client = daemon.client();
    let copy = there.path().join("copy.img");
    let slow = json!({ "job-id": "slow", "device": "vda", "path": copy, "sync": "full", "speed": 65536 });
    client.ok("x-backup", slow);
    let id = daemon.running.id();
    let during = held_by(id).0;
    let settled = |what: &str| {
        let deadline = Instant::now() + PATIENCE;
        while held_by(id).0 > during {
            assert!(Instant::now() < deadline, "{what}: {during} before, {} now", held_by(id).0);
            std::thread::sleep(Duration::from_millis(10));
        }
        held_by(id).1
    };
    let said = conversation();
    // What is there for whoever comes first is there from here on.
    let mut first = UnixStream::connect(there.path().join("nbd.sock")).expect("connected");
    first.write_all(&said).expect("taken");
    first.shutdown(std::net::Shutdown::Write).expect("half closed");
    first.read_to_end(&mut Vec::new()).expect("replies");
    let mut after_some = 0;
    for round in 0..1000 {
        let mut guest = UnixStream::connect(there.path().join("nbd.sock")).expect("connected");
        guest.read_exact(&mut [0; 18]).expect("a greeting");
        guest.write_all(&said[..(round * 7919) % (said.len() + 1)]).expect("taken");
        drop(guest);
        if round == 100 {
            after_some = settled("after a hundred");
        }
    }
    let grown = settled("after a thousand").saturating_sub(after_some);
    assert!(grown < MOST_GROWN, "{grown} bytes more after 1000 guests than after 100");
    client.ok("block-job-set-speed", json!({ "device": "slow", "speed": 0 }));
    let told = client.until("slow", "null");
    assert!(told.contains(&"BLOCK_JOB_COMPLETED".to_owned()), "{told:?}");
}
