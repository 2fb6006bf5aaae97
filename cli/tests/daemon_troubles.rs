//! A daemon in trouble: nothing answers, nothing is left, the engine is dead. It is told, and the daemon ends or goes on.

mod support;

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::qmp::{Daemon, Qmp};
use support::{PATIENCE, Running, dense, directory, has};

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

/// A file system in user space that answers, or does not. It knows one file, of 4 MiB of zeros, called disk.img.
const SERVER: &str = r#"
import ctypes, os, signal, struct, sys

def say(text):
    sys.stderr.write(text + '\n')
    sys.stderr.flush()

# A file system that knows one file of 4 MiB of zeros, called disk.img, and answers until it is told not to.
where, silent = sys.argv[1], sys.argv[2] == 'silent'
signal.signal(signal.SIGUSR1, lambda *_: hush())
def hush():
    global silent
    silent = True
    say('silent')

try:
    device = os.open('/dev/fuse', os.O_RDWR)
except OSError as error:
    say(f'no mount: {error}')
    sys.exit()
libc = ctypes.CDLL(None, use_errno=True)
options = f'fd={device},rootmode=40000,user_id=0,group_id=0'.encode()
if libc.mount(b'silent', where.encode(), b'fuse.silent', 0, options) != 0:
    say(f'no mount: {os.strerror(ctypes.get_errno())}')
    sys.exit()
say('ready')

SIZE = 4 << 20
def attributes(node):
    mode, size, links = (0o40755, 0, 2) if node == 1 else (0o100644, SIZE, 1)
    return struct.pack('<6Q10I', node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0)

def answer(operation, node, body):
    if operation == 26:
        return struct.pack('<4I2H2I2HI7I', 7, 31, 65536, 0, 16, 12, 65536, 1, 0, 0, 0, *[0] * 7)
    if operation == 1:
        if body.rstrip(b'\0') != b'disk.img':
            return -2
        return struct.pack('<4Q2I', 2, 0, 0, 0, 0, 0) + attributes(2)
    if operation == 3:
        return struct.pack('<Q2I', 0, 0, 0) + attributes(node)
    if operation in (14, 27):
        return struct.pack('<Q2I', 1, 0, 0)
    if operation == 15:
        offset, size = struct.unpack_from('<QI', body, 8)
        return bytes(min(size, max(0, SIZE - offset)))
    if operation in (18, 29):
        return b''
    return -38

while True:
    if silent:
        signal.pause()
        continue
    request = os.read(device, 1 << 20)
    length, operation, unique, node = struct.unpack_from('<2I2Q', request)
    if silent or operation in (2, 36, 42):
        continue
    told = answer(operation, node, request[40:])
    error, body = (told, b'') if isinstance(told, int) else (0, told)
    os.write(device, struct.pack('<IiQ', 16 + len(body), error, unique) + body)
"#;

/// Where [`SERVER`] is mounted; gone at the end, which lets go who waits for it.
struct Mounted {
    server: Running,
    at: PathBuf,
}

impl Mounted {
    /// At `mnt` in `there`; `None`, with a reason, where that cannot be.
    fn new(there: &Path, mode: &str) -> Option<Self> {
        if !has("python3") {
            return None;
        }
        let at = there.join("mnt");
        fs::create_dir(&at).expect("made");
        let mut server = Running::start(Command::new("python3").args(["-c", SERVER]).arg(&at).arg(mode));
        if server.expect("").contains("no mount") {
            eprintln!("SKIPPED: needs root and FUSE");
            return None;
        }
        Some(Self { server, at })
    }

    fn path(&self, name: &str) -> String {
        self.at.join(name).display().to_string()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.server.signal("KILL");
        Command::new("umount").arg("--lazy").arg(&self.at).output().ok();
    }
}

fn x_backup(id: &str, path: &str) -> Value {
    json!({ "job-id": id, "device": "vda", "path": path, "sync": "full" })
}

fn ask(client: &mut Qmp, command: &str, arguments: &Value) {
    client.send(json!({ "execute": command, "arguments": arguments }).to_string().as_bytes());
}

/// The reply to what was asked, whatever events come before it.
fn reply(client: &mut Qmp) -> Value {
    loop {
        let message = client.receive().expect("a reply");
        if message.get("event").is_none() {
            return message;
        }
    }
}

/// Wait until a daemon of one client has taken a command that it cannot finish.
fn until_starting(client: &mut Qmp, id: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = client.ok("query-jobs", json!({}));
        let found = jobs.as_array().expect("a list").iter().find(|job| job["id"] == id);
        if let Some(job) = found {
            assert_eq!(job["status"], "created", "{jobs}");
            return;
        }
        assert!(Instant::now() < deadline, "{id} is not there: {jobs}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_path_that_does_not_answer_keeps_nobody_else_waiting() {
    let there = directory();
    let Some(mounted) = Mounted::new(there.path(), "silent") else { return };
    let daemon = with_disk(there.path(), &[]);
    let (mut waits, mut adds, mut other) = (daemon.client(), daemon.client(), daemon.client());
    ask(&mut waits, "x-backup", &x_backup("hung", &mounted.path("copy.img")));
    until_starting(&mut other, "hung");
    let file = json!({ "driver": "file", "node-name": "far", "filename": mounted.path("disk.img") });
    ask(&mut adds, "blockdev-add", &file);

    // What it is about to use counts as used.
    let copy = there.path().join("copy.img").display().to_string();
    assert_eq!(other.refused("x-backup", x_backup("hung", &copy)), "Job ID 'hung' already in use");
    assert_eq!(other.refused("blockdev-del", json!({ "node-name": "vda" })), "Block device vda is in use");
    assert_eq!(
        other.refused("job-pause", json!({ "id": "hung" })),
        "Job 'hung' in state 'created' cannot accept command verb 'pause'"
    );
    let shown = other.ok("query-block-jobs", json!({}));
    assert_eq!((&shown[0]["device"], &shown[0]["len"]), (&json!("hung"), &json!(LENGTH)));
    // All else goes on, on the same disk, too.
    other.ok("x-backup", x_backup("other", &copy));
    let told = other.until("other", "null");
    assert!(told.contains(&"BLOCK_JOB_COMPLETED".to_owned()), "{told:?}");
    let nodes = other.ok("query-named-block-nodes", json!({}));
    assert!(!nodes.to_string().contains("far"), "{nodes}");
    other.ok("job-cancel", json!({ "id": "hung" }));
    other.ok("job-cancel", json!({ "id": "hung" }));
    assert_eq!(other.ok("query-jobs", json!({})).as_array().map(Vec::len), Some(1));

    // Clients that leave keep no places, and their commands no more than a thread each.
    for number in 0..40 {
        let mut leaves = daemon.client();
        ask(&mut leaves, "x-backup", &x_backup(&format!("left{number}"), &mounted.path("copy.img")));
        until_starting(&mut other, &format!("left{number}"));
        leaves.hang_up();
    }
    drop(mounted);
    for (client, told) in [(&mut waits, "cannot open target"), (&mut adds, "Could not open")] {
        let told_it = reply(client);
        let text = told_it["error"]["desc"].as_str().expect("an error");
        assert!(text.contains(told) || text.contains("was cancelled before it started"), "{told_it}");
    }
    let deadline = Instant::now() + PATIENCE;
    while other.ok("query-jobs", json!({})) != json!([]) {
        assert!(Instant::now() < deadline, "they do not go");
        thread::sleep(Duration::from_millis(10));
    }
    waits.ok("query-version", json!({}));
    other.ok("blockdev-del", json!({ "node-name": "vda" }));
}

/// What a job called off had not touched yet stays as it is.
#[test]
fn a_start_that_was_cancelled_while_its_path_did_not_answer_touches_nothing() {
    if !has("python3") {
        return;
    }
    let there = directory();
    let daemon = with_disk(there.path(), &[]);
    dense(&there.path().join("copy.img"), 1000, 9);
    let before = fs::read(there.path().join("copy.img")).expect("read");
    let Some(holder) = leased(there.path()) else { return };
    let path = there.path().join("copy.img").display().to_string();
    let mut backup = x_backup("nightly", &path);
    backup["force"] = true.into();
    let (mut client, mut other) = (daemon.client(), daemon.client());
    ask(&mut client, "x-backup", &backup);
    let mut holder = holder;
    holder.expect("somebody waits");
    other.ok("job-cancel", json!({ "id": "nightly" }));
    drop(holder);
    let told = reply(&mut client);
    let wanted = "The backup was cancelled before it started; nothing was touched";
    assert_eq!(told["error"]["desc"], wanted, "{told}");
    assert!(fs::read(there.path().join("copy.img")).expect("read") == before);
    assert_eq!(other.ok("query-jobs", json!({})), json!([]));
    // All of it is free again.
    other.ok("x-backup", backup);
    other.until("nightly", "null");
    assert_eq!(fs::metadata(&path).expect("there").len(), LENGTH as u64);
}

#[test]
fn a_disk_whose_server_falls_silent_keeps_nobody_waiting_who_does_not_use_it() {
    let there = directory();
    let Some(mut mounted) = Mounted::new(there.path(), "answering") else { return };
    let daemon = with_disk(there.path(), &["--nbd", "unix:nbd.sock"]);
    let mut other = daemon.client();
    other.add_file("far", Path::new(&mounted.path("disk.img")));
    mounted.server.signal("USR1");
    mounted.server.expect("silent");
    let nodes = other.ok("query-named-block-nodes", json!({}));
    assert!(nodes.to_string().contains("actual-size"), "{nodes}");
    let (mut copies, mut exports) = (daemon.client(), daemon.client());
    let copy = there.path().join("far.img").display().to_string();
    let mut backup = x_backup("far", &copy);
    backup["device"] = "far".into();
    ask(&mut copies, "x-backup", &backup);
    until_starting(&mut other, "far");
    ask(&mut exports, "block-export-add", &json!({ "type": "nbd", "id": "far", "node-name": "far" }));
    let near = there.path().join("copy.img").display().to_string();
    other.ok("x-backup", x_backup("near", &near));
    other.until("near", "null");
    assert_eq!(other.ok("query-block-exports", json!({})).as_array().map(Vec::len), Some(1));
    drop(mounted);
    for client in [&mut copies, &mut exports] {
        let told = reply(client);
        assert!(told["error"]["desc"].as_str().is_some_and(|text| text.contains("disk.img")), "{told}");
    }
    other.ok("blockdev-del", json!({ "node-name": "far" }));
    assert!(!there.path().join("far.img").exists());
}

#[test]
fn a_daemon_ends_without_paths_that_do_not_answer() {
    let there = directory();
    let Some(mounted) = Mounted::new(there.path(), "silent") else { return };
    let mut daemon = with_disk(there.path(), &[]);
    let (mut client, mut other) = (daemon.client(), daemon.client());
    ask(&mut client, "x-backup", &x_backup("hung", &mounted.path("copy.img")));
    until_starting(&mut other, "hung");
    daemon.running.signal("TERM");
    daemon.running.expect("ending: waiting for paths that are being opened; a second signal ends at once");
    let told = reply(&mut client);
    assert_eq!(told["error"]["desc"], "the daemon ends; the path has not answered by then");
    let (code, _, messages) = daemon.running.end();
    assert_eq!((code, count(&messages, "paths that do not answer")), (0, 1), "{messages}");
}

/// Nobody is served by then, so it may wait; but not for ever.
#[test]
fn a_second_signal_ends_a_daemon_whose_first_disk_does_not_answer() {
    let there = directory();
    let Some(mounted) = Mounted::new(there.path(), "silent") else { return };
    let disk = format!("vda={}", mounted.path("disk.img"));
    let mut running = Running::program(there.path(), &["daemon", "--qmp", "unix:qmp.sock", "--disk", &disk]);
    thread::sleep(Duration::from_millis(500));
    running.signal("TERM");
    running.expect("ending has to wait for what is under way; a second signal ends at once");
    assert!(running.is_running());
    running.signal("TERM");
    let (code, _, messages) = running.end();
    assert_eq!(code, 143, "{messages}");
}

/// Somebody who holds a lease on `copy.img` in `there`; `None`, with a reason, where that cannot be.
fn leased(there: &Path) -> Option<Running> {
    let mut holder =
        Running::start(Command::new("python3").args(["-c", LEASE, "copy.img"]).current_dir(there));
    if holder.expect("").contains("no lease") {
        eprintln!("SKIPPED: the file system has no leases");
        return None;
    }
    Some(holder)
}

/// The one who asked may not wait for the answer: the daemon has the cancel by then.
#[test]
fn a_signal_cancels_a_backup_whose_path_does_not_answer() {
    if !has("python3") {
        return;
    }
    for twice in [false, true] {
        let there = directory();
        let daemon = with_disk(there.path(), &[]);
        dense(&there.path().join("copy.img"), 1000, 9);
        let before = fs::read(there.path().join("copy.img")).expect("read");
        let Some(mut holder) = leased(there.path()) else { return };
        let words = [
            "backup",
            "--qmp",
            "unix:qmp.sock",
            "--disk",
            "vda",
            "--target",
            "copy.img",
            "--force",
            "--json",
        ];
        let mut backup = Running::program(there.path(), &words);
        holder.expect("somebody waits");
        backup.signal("INT");
        backup.expect("SIGINT: cancelling the job; a second one ends at once");
        // Nobody tells when the daemon has heard of it.
        thread::sleep(Duration::from_secs(2));
        assert!(backup.is_running());
        if twice {
            backup.signal("INT");
            assert_eq!(backup.end().0, 130);
            drop(holder);
        } else {
            drop(holder);
            let (code, told, messages) = backup.end();
            assert_eq!(code, 130, "{messages}");
            let told: Value = serde_json::from_str(&told).expect("JSON");
            assert_eq!((&told["result"], &told["signal"]), (&json!("cancelled"), &json!("SIGINT")));
        }
        let mut client = daemon.client();
        let deadline = Instant::now() + PATIENCE;
        while client.ok("query-jobs", json!({})) != json!([]) {
            assert!(Instant::now() < deadline, "it is still there");
            thread::sleep(Duration::from_millis(10));
        }
        assert!(fs::read(there.path().join("copy.img")).expect("read") == before, "{twice}");
    }
}

#[test]
fn whoever_watches_a_start_that_does_not_come_about_is_told() {
    if !has("python3") {
        return;
    }
    let there = directory();
    let daemon = with_disk(there.path(), &[]);
    dense(&there.path().join("copy.img"), LENGTH, 9);
    let Some(mut holder) = leased(there.path()) else { return };
    let mut backup = x_backup("nightly", &there.path().join("copy.img").display().to_string());
    backup["force"] = true.into();
    let (mut client, mut other) = (daemon.client(), daemon.client());
    ask(&mut client, "x-backup", &backup);
    holder.expect("somebody waits");
    let words = ["job", "watch", "--progress", "json", "--qmp", "unix:qmp.sock", "nightly"];
    let mut watch = Running::program(there.path(), &words);
    watch.progress(|line| line["status"] == "created");
    other.ok("job-cancel", json!({ "id": "nightly" }));
    drop(holder);
    let (code, _, messages) = watch.end();
    assert_eq!(code, 1, "{messages}");
    assert!(messages.contains("job nightly did not start"), "{messages}");
}

#[test]
fn a_second_signal_ends_a_daemon_that_waits_for_a_path() {
    if !has("python3") {
        return;
    }
    let there = directory();
    let mut daemon = with_disk(there.path(), &[]);
    dense(&there.path().join("copy.img"), LENGTH, 9);
    let Some(mut holder) = leased(there.path()) else { return };
    let mut backup = x_backup("nightly", &there.path().join("copy.img").display().to_string());
    backup["force"] = true.into();
    let mut client = daemon.client();
    ask(&mut client, "x-backup", &backup);
    holder.expect("somebody waits");
    daemon.running.signal("TERM");
    daemon.running.expect("ending: waiting for paths that are being opened; a second signal ends at once");
    // Sooner it would count as the same request.
    thread::sleep(Duration::from_millis(500));
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
