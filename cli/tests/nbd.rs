//! Exports of other people's NBD servers as sides of `copy`, `compare` and `info`: `qemu-nbd`, `nbdkit` with its filters, and our own daemon.

mod support;

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::qmp::Daemon;
use support::{PATIENCE, Running, code, dense, directory, has, json, run_in, same, sparse, stderr, stdout};

const LENGTH: usize = (9 << 20) + 512;
const SOCKET: &str = "nbd.sock";
const URI: &str = "nbd+unix:///disk?socket=nbd.sock";

/// A server that goes with the test.
struct Server(Child);

impl Server {
    /// Start it in `there`, and wait for its socket.
    fn start(there: &Path, arguments: &[&str]) -> Self {
        let socket = there.join(SOCKET);
        fs::remove_file(&socket).ok();
        let mut child = Command::new(arguments[0])
            .args(&arguments[1..])
            .current_dir(there)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("it starts");
        let deadline = Instant::now() + PATIENCE;
        while !socket.exists() {
            assert!(Instant::now() < deadline, "{arguments:?} has no socket");
            assert!(child.try_wait().expect("waited").is_none(), "{arguments:?} has ended");
            thread::sleep(Duration::from_millis(10));
        }
        Self(child)
    }

    /// `qemu-nbd` on a raw file, for so many clients at a time.
    fn qemu(there: &Path, image: &str, clients: &str, more: &[&str]) -> Self {
        let socket = there.join(SOCKET);
        let socket = socket.to_str().expect("text");
        let fixed = ["qemu-nbd", "--persistent", "--format", "raw", "--socket", socket, "-x", "disk"];
        Self::start(there, &[&fixed[..], &["--shared", clients], more, &[image]].concat())
    }

    /// `nbdkit` with filters before, and parameters behind its plugin.
    fn nbdkit(there: &Path, filters: &[&str], plugin: &[&str]) -> Self {
        let filters: Vec<_> = filters.iter().map(|filter| format!("--filter={filter}")).collect();
        let filters: Vec<_> = filters.iter().map(String::as_str).collect();
        let fixed = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", SOCKET];
        Self::start(there, &[&fixed[..], &filters, plugin].concat())
    }

    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("waited");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[track_caller]
fn ok(output: &Output) {
    assert_eq!(code(output), 0, "{}", stderr(output));
}

/// There and back again, over both rings: what the server keeps in `kept` is the source, and what is read from it too.
#[track_caller]
fn there_and_back(there: &Path, uri: &str, kept: &str) {
    for (engine, seed) in [("auto", 1), ("threads", 2)] {
        dense(&there.join("a"), LENGTH, seed);
        ok(&run_in(there, &["copy", "--verify", "--io-engine", engine, "a", uri]));
        assert!(same(&there.join("a"), &there.join(kept)), "{engine}");
        fs::remove_file(there.join("b")).ok();
        ok(&run_in(there, &["copy", "--io-engine", engine, uri, "b"]));
        assert!(same(&there.join("a"), &there.join("b")), "{engine}");
        let object = json(&run_in(there, &["compare", "--json", "a", uri]));
        assert_eq!(object["result"], "equal");
    }
    File::options().write(true).open(there.join("b")).expect("open").set_len(LENGTH as u64 - 1).expect("set");
    assert_eq!(code(&run_in(there, &["compare", uri, "b"])), 3);
}

#[test]
fn there_and_back_with_qemu_nbd() {
    if !has("qemu-nbd") {
        return;
    }
    for clients in ["1", "8"] {
        let there = directory();
        dense(&there.path().join("kept.img"), LENGTH, 99);
        let _server = Server::qemu(there.path(), "kept.img", clients, &[]);
        there_and_back(there.path(), URI, "kept.img");
    }
}

#[test]
fn there_and_back_with_nbdkit() {
    if !has("nbdkit") {
        return;
    }
    let policy = [
        "file",
        "kept.img",
        "blocksize-minimum=512",
        "blocksize-preferred=64K",
        "blocksize-maximum=128K",
        "blocksize-error-policy=error",
    ];
    for (filters, plugin) in [
        (&[][..], &["file", "kept.img"][..]),
        (&["nozero", "noextents"], &["file", "kept.img"]),
        (&["noparallel", "fua"], &["file", "kept.img", "fuamode=emulate"]),
        (&["blocksize-policy"], &policy),
    ] {
        let there = directory();
        dense(&there.path().join("kept.img"), LENGTH, 99);
        let _server = Server::nbdkit(there.path(), filters, plugin);
        there_and_back(there.path(), URI, "kept.img");
    }
}

#[test]
fn there_and_back_with_our_daemon_and_over_tcp() {
    let there = directory();
    dense(&there.path().join("kept.img"), LENGTH, 99);
    let daemon = Daemon::start(there.path(), &["--nbd", "unix:nbd.sock", "--disk", "disk=kept.img"]);
    there_and_back(there.path(), URI, "kept.img");
    drop(daemon);
    if !has("nbdkit") {
        return;
    }
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let listens = ["--ipaddr", "127.0.0.1", "--port", &port.to_string(), "file", "kept.img"];
    let mut server = Command::new("nbdkit")
        .args([&["--foreground", "--exit-with-parent"], &listens[..]].concat())
        .current_dir(there.path())
        .spawn()
        .map(Server)
        .expect("it starts");
    let deadline = Instant::now() + PATIENCE;
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline && server.0.try_wait().expect("waited").is_none());
        thread::sleep(Duration::from_millis(10));
    }
    there_and_back(there.path(), &format!("nbd://127.0.0.1:{port}"), "kept.img");
    there_and_back(there.path(), &format!("nbd://localhost:{port}/any/name"), "kept.img");
}

#[test]
fn holes_stay_holes_both_ways() {
    if !has("qemu-nbd") {
        return;
    }
    let there = directory();
    let length = 64 << 20;
    sparse(&there.path().join("a"), length);
    let blocks = |name: &str| fs::metadata(there.path().join(name)).expect("stat").blocks();
    {
        let _server = Server::qemu(there.path(), "a", "4", &["--read-only"]);
        ok(&run_in(there.path(), &["copy", URI, "b"]));
        let object = json(&run_in(there.path(), &["copy", "--json", "--force", URI, "b"]));
        assert!(object["holes"].as_u64().is_some_and(|holes| holes > length / 2), "{object}");
    }
    assert!(same(&there.path().join("a"), &there.path().join("b")));
    assert!(blocks("b") <= blocks("a") + 64, "{} of {}", blocks("b"), blocks("a"));
    // What the target held before goes, and its space with it.
    dense(&there.path().join("kept.img"), usize::try_from(length).expect("small"), 5);
    let discards = ["--discard=unmap", "--detect-zeroes=unmap"];
    let _server = Server::qemu(there.path(), "kept.img", "4", &discards);
    ok(&run_in(there.path(), &["copy", "a", URI]));
    assert!(same(&there.path().join("a"), &there.path().join("kept.img")));
    assert!(blocks("kept.img") <= blocks("a") + 1024, "{} of {}", blocks("kept.img"), blocks("a"));
}

/// A disk whose length is no multiple of the server's blocks, on a larger one.
#[test]
fn an_odd_end_is_written_within_whole_blocks() {
    if !has("nbdkit") {
        return;
    }
    let there = directory();
    dense(&there.path().join("a"), (1 << 20) + 777, 1);
    dense(&there.path().join("kept.img"), 2 << 20, 9);
    let before = fs::read(there.path().join("kept.img")).expect("read");
    let policy = [
        "file",
        "kept.img",
        "blocksize-minimum=64K",
        "blocksize-preferred=64K",
        "blocksize-maximum=256K",
        "blocksize-error-policy=error",
    ];
    let _server = Server::nbdkit(there.path(), &["blocksize-policy"], &policy);
    let output = run_in(there.path(), &["copy", "--verify", "--cluster-size", "4K", "a", URI]);
    ok(&output);
    assert!(stderr(&output).contains("larger than the source"), "{}", stderr(&output));
    let source = fs::read(there.path().join("a")).expect("read");
    let after = fs::read(there.path().join("kept.img")).expect("read");
    assert!(after[..source.len()] == source && after[source.len()..] == before[source.len()..]);
}

/// A server is killed in the middle, as source and as target; with a map the same command goes on when there is a server again.
#[test]
fn a_server_that_dies_in_the_middle() {
    if !has("qemu-nbd") {
        return;
    }
    for (source, target, image) in [(URI, "b", "a"), ("a", URI, "kept.img")] {
        let there = directory();
        dense(&there.path().join("a"), LENGTH, 3);
        dense(&there.path().join("kept.img"), LENGTH, 99);
        let mut server = Server::qemu(there.path(), image, "2", &[]);
        let arguments = ["copy", "--map", "m", "--speed", "2M", "--progress", "json", source, target];
        let mut running = Running::program(there.path(), &arguments);
        running.progress(|progress| progress["done"].as_u64().is_some_and(|done| done > 1 << 20));
        server.kill();
        let (exit, _, messages) = running.end();
        assert_eq!(exit, 1, "{messages}");
        let told: Vec<_> = messages.lines().filter(|line| line.starts_with("engine-cli: cannot ")).collect();
        assert_eq!(told.len(), 1, "{messages}");
        for part in [URI, ", bytes ", "the server, or the way to it, is gone"] {
            assert!(told[0].contains(part), "{part} in {}", told[0]);
        }
        assert!(messages.contains("repeat:") || messages.contains("starts anew"), "{messages}");
        let _server = Server::qemu(there.path(), image, "2", &[]);
        let repeated = run_in(there.path(), &["copy", "--map", "m", source, target]);
        ok(&repeated);
        let copy = if target == "b" { "b" } else { "kept.img" };
        assert!(same(&there.path().join("a"), &there.path().join(copy)));
    }
}

/// The same behind the first checkpoint: the next run has less to do. A server that holds something else by then is refused.
#[test]
fn a_server_that_dies_behind_a_checkpoint() {
    if !has("qemu-nbd") {
        return;
    }
    for (source, target, image) in [(URI, "b", "a"), ("a", URI, "kept.img")] {
        let there = directory();
        dense(&there.path().join("a"), LENGTH, 3);
        dense(&there.path().join("kept.img"), LENGTH, 99);
        dense(&there.path().join("other.img"), LENGTH, 77);
        let mut server = Server::qemu(there.path(), image, "2", &[]);
        let map = there.path().join("m");
        let arguments = ["copy", "--map", "m", "--speed", "1M", "--progress", "json", source, target];
        let mut running = Running::program(there.path(), &arguments);
        running.progress(|progress| progress["done"].as_u64().is_some_and(|done| done > 0));
        // Each version of a map is another file.
        let version = || fs::metadata(&map).map(|found| found.ino()).ok();
        let (first, deadline) = (version(), Instant::now() + PATIENCE);
        while version() == first || version().is_none() {
            assert!(Instant::now() < deadline, "no checkpoint");
            thread::sleep(Duration::from_millis(20));
        }
        server.kill();
        let (exit, _, messages) = running.end();
        assert_eq!(exit, 1, "{messages}");
        assert!(messages.contains("repeat:"), "{messages}");
        let again = ["copy", "--map", "m", "--json", source, target];
        let mut other = Server::qemu(there.path(), "other.img", "2", &[]);
        let output = run_in(there.path(), &again);
        assert_eq!(code(&output), 2, "{}", stderr(&output));
        assert!(
            stderr(&output).contains("the target does not hold what the map says"),
            "{}",
            stderr(&output)
        );
        other.kill();
        let _server = Server::qemu(there.path(), image, "2", &[]);
        let output = run_in(there.path(), &again);
        ok(&output);
        let object = json(&output);
        let resumed = object["resumed"].as_u64().expect("a number");
        assert!(resumed > 1 << 20 && resumed < LENGTH as u64, "{object}");
        assert_eq!(object["durable"], true, "{object}");
        let copy = if target == "b" { "b" } else { "kept.img" };
        assert!(same(&there.path().join("a"), &there.path().join(copy)));
    }
}

/// A server that takes a connection and says nothing: whoever does not wait for it has touched nothing, and is told so.
#[test]
fn a_signal_ends_a_start_that_waits_for_a_server() {
    let there = directory();
    dense(&there.path().join("a"), LENGTH, 3);
    let _silent = std::os::unix::net::UnixListener::bind(there.path().join(SOCKET)).expect("bound");
    for (arguments, signal, exit) in [
        (&["copy", "--json", URI, "b"][..], "INT", 130),
        (&["copy", "--json", "a", URI], "TERM", 143),
        (&["copy", "--json", "--map", "m", "a", URI], "INT", 130),
        (&["compare", "--json", "a", URI], "INT", 130),
    ] {
        let running = Running::program(there.path(), arguments);
        running.wait_for_handler(signal);
        let start = Instant::now();
        running.signal(signal);
        let (found, output, messages) = running.end();
        assert_eq!(found, exit, "{messages}");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        assert!(messages.contains(&format!("ended by SIG{signal}")), "{messages}");
        let object: serde_json::Value = serde_json::from_str(&output).expect("JSON");
        assert_eq!(
            (&object["result"], &object["exit_code"]),
            (&"cancelled".into(), &exit.into()),
            "{object}"
        );
        assert_eq!(object["signal"], format!("SIG{signal}"));
        // A map of nothing neither, which stands in until there is a first one.
        for name in ["b", "m"] {
            assert!(!there.path().join(name).exists(), "{arguments:?} leaves {name}");
        }
    }
}

/// A layer over another one: what the upper one holds is copied, if the server says what that is. If not, that is said, and all is copied.
#[test]
fn the_top_layer_of_an_export() {
    if !has("qemu-nbd") || !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let there = directory();
    let there = there.path();
    dense(&there.join("base.img"), LENGTH, 3);
    let tool = |command: &[&str]| {
        let status =
            Command::new(command[0]).args(&command[1..]).current_dir(there).stdout(Stdio::null()).status();
        assert!(status.expect("it starts").success(), "{command:?}");
    };
    tool(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", "top.qcow2"]);
    tool(&["qemu-io", "-f", "qcow2", "-c", "write -P 85 1M 1M", "-c", "write -z 4M 64k", "top.qcow2"]);
    let mut expected = vec![0; LENGTH];
    expected[1 << 20..2 << 20].fill(85);
    let mut whole = fs::read(there.join("base.img")).expect("read");
    whole[1 << 20..2 << 20].fill(85);
    whole[4 << 20..(4 << 20) + 65536].fill(0);
    let socket = there.join(SOCKET);
    let serve = |more: &[&str]| {
        let fixed =
            ["qemu-nbd", "--persistent", "--shared", "8", "--read-only", "--format", "qcow2", "-x", "disk"];
        let socket = ["--socket", socket.to_str().expect("text"), "top.qcow2"];
        Server::start(there, &[&fixed[..], more, &socket].concat())
    };
    {
        let _server = serve(&["--allocation-depth"]);
        let output = run_in(there, &["copy", "--json", "--sync", "top", URI, "b"]);
        ok(&output);
        let object = json(&output);
        assert_eq!(object["uncovered"], LENGTH - (1 << 20) - 65536, "{object}");
        assert!(!stderr(&output).contains("allocation-depth"), "{}", stderr(&output));
        assert!(fs::read(there.join("b")).expect("read") == expected);
        // What the top layer does not hold is done and differs: no reason to refuse the map.
        let command = ["copy", "--json", "--sync", "top", "--map", "m", URI, "c"];
        let running = Running::program(there, &[&command[..], &["--speed", "64K"]].concat());
        let deadline = Instant::now() + PATIENCE;
        while !fs::metadata(there.join("c")).is_ok_and(|found| found.blocks() > 0) {
            assert!(Instant::now() < deadline, "nothing is copied");
            thread::sleep(Duration::from_millis(20));
        }
        running.signal("INT");
        let (exit, _, messages) = running.end();
        assert_eq!(exit, 130, "{messages}");
        let output = run_in(there, &command);
        ok(&output);
        assert!(json(&output)["resumed"].as_u64().expect("bytes") >= 1 << 20, "{}", json(&output));
        assert!(fs::read(there.join("c")).expect("read") == expected);
    }
    let _server = serve(&[]);
    let output = run_in(there, &["copy", "--json", "--force", "--sync", "top", URI, "b"]);
    ok(&output);
    assert!(stderr(&output).contains("does not tell what is in the top layer"), "{}", stderr(&output));
    assert_eq!(json(&output)["uncovered"], 0);
    assert!(fs::read(there.join("b")).expect("read") == whole);
}

/// What nobody can promise is neither said nor claimed.
#[test]
fn a_server_without_a_flush() {
    if !has("nbdkit") {
        return;
    }
    let there = directory();
    dense(&there.path().join("a"), LENGTH, 3);
    dense(&there.path().join("kept.img"), LENGTH, 99);
    let plugin = [
        "eval",
        "get_size=echo 16777216",
        "pread=head -c $3 /dev/zero",
        "pwrite=cat > /dev/null",
        "can_write=exit 0",
    ];
    let _server = Server::nbdkit(there.path(), &[], &plugin);
    refused(there.path(), &["copy", "--map", "m", "a", URI], "neither flush nor FUA");
    assert!(!there.path().join("m").exists());
    let output = run_in(there.path(), &["copy", "--json", "a", URI]);
    ok(&output);
    assert!(
        stderr(&output).contains("; not flushed, which the target does not offer"),
        "{}",
        stderr(&output)
    );
    assert!(!stderr(&output).contains("; flushed"));
    assert_eq!(json(&output)["durable"], false);
}

#[track_caller]
fn refused(there: &Path, arguments: &[&str], expected: &str) {
    let output = run_in(there, arguments);
    let messages = stderr(&output);
    assert_eq!(code(&output), 2, "{arguments:?}: {messages}");
    assert_eq!(messages.lines().count(), 1, "{messages}");
    assert!(messages.contains(expected), "{arguments:?}: {expected:?} in {messages}");
}

#[test]
fn refusals() {
    let there = directory();
    let there = there.path();
    dense(&there.join("a"), LENGTH, 3);
    dense(&there.join("kept.img"), LENGTH, 99);
    refused(there, &["copy", URI, "b"], "there is no socket nbd.sock");
    refused(there, &["info", "nbd://no-such-host.invalid/x"], "its host cannot be looked up: ");
    refused(there, &["info", "nbd://h/x?tls-hostname=y"], "TLS");
    refused(there, &["copy", "--source-format", "qcow2", URI, "b"], "qcow2");
    if has("qemu-nbd") {
        let _server = Server::qemu(there, "kept.img", "2", &["--read-only"]);
        refused(there, &["copy", "a", URI], "read-only");
        refused(there, &["copy", "nbd+unix:///other?socket=nbd.sock", "b"], "no such export");
        refused(there, &["copy", URI, URI], "the same export");
        refused(there, &["copy", "--map", "kept.img", URI, "b"], "map file");
    }
    if has("nbdkit") {
        let _server = Server::nbdkit(there, &[], &["memory", "1M"]);
        refused(there, &["copy", "a", URI], "fewer than the source's");
        drop(_server);
        fs::write(there.join("keys"), "me:0123456789abcdef0123456789abcdef\n").expect("written");
        let _server = Server::nbdkit(there, &[], &["--tls=require", "--tls-psk=keys", "memory", "1M"]);
        refused(there, &["info", URI], "TLS");
    }
    assert!(!there.join("b").exists());
}

/// One read in a hundred fails: the copy fails with it, or, by the policy, tries again.
#[test]
fn errors_of_the_server_go_by_the_policy() {
    if !has("nbdkit") {
        return;
    }
    let there = directory();
    dense(&there.path().join("kept.img"), LENGTH, 3);
    {
        let failing = ["file", "kept.img", "error=EIO", "error-pread-rate=100%"];
        let _server = Server::nbdkit(there.path(), &["error"], &failing);
        let output = run_in(there.path(), &["copy", URI, "b"]);
        assert_eq!(code(&output), 1, "{}", stderr(&output));
        let said = stderr(&output);
        assert!(said.contains(URI) && said.contains("(EIO)") && said.contains(", bytes "), "{said}");
        assert!(!there.path().join("b").exists(), "the partial file is removed");
    }
    let failing = ["file", "kept.img", "error=EIO", "error-pread-rate=10%"];
    let _server = Server::nbdkit(there.path(), &["error"], &failing);
    ok(&run_in(there.path(), &["copy", "--on-source-error", "ignore", URI, "b"]));
    assert!(same(&there.path().join("kept.img"), &there.path().join("b")));
}

/// What was written is not what is read back: told as that, with where; or left out and listed, by the policy. Never a success.
#[test]
fn a_target_that_forgets_what_is_written_fails_its_verification() {
    if !has("nbdkit") {
        return;
    }
    let there = directory();
    let length = 512 << 10;
    dense(&there.path().join("a"), length, 3);
    // It takes writes, and reads as zeros.
    let _server = Server::nbdkit(there.path(), &[], &["null", "512K"]);
    for engine in ["auto", "threads"] {
        let verified = ["copy", "--verify", "--json", "--io-engine", engine];
        let output = run_in(there.path(), &[&verified[..], &["a", URI]].concat());
        assert_eq!(code(&output), 1, "{engine}: {}", stderr(&output));
        let object = json(&output);
        assert_eq!((&object["result"], &object["verified"]), (&"failed".into(), &false.into()), "{object}");
        let error = &object["error"];
        assert_eq!((&error["kind"], &error["path"]), (&"verify_mismatch".into(), &URI.into()), "{object}");
        let number = |value: &serde_json::Value| value.as_u64().expect("a number");
        let (offset, count) = (number(&error["range"]["offset"]), number(&error["range"]["length"]));
        assert!(count > 0 && offset + count <= length as u64, "{object}");
        let said = stderr(&output);
        assert!(said.contains("what was read back differs from what was written; do not trust"), "{said}");

        let ignored = [&verified[..], &["--on-target-error", "ignore", "a", URI]].concat();
        let output = run_in(there.path(), &ignored);
        assert_eq!(code(&output), 3, "{engine}: {}", stderr(&output));
        let object = json(&output);
        assert_eq!(object["result"], "complete_with_skipped", "{object}");
        assert_eq!((number(&object["skipped_bytes"]), number(&object["done"])), (length as u64, 0));
        let skipped = object["skipped"].as_array().expect("a list");
        let listed: u64 = skipped.iter().map(|range| number(&range["length"])).sum();
        assert_eq!((number(&skipped[0]["offset"]), listed), (0, length as u64), "{object}");
    }
}

#[test]
fn what_info_tells() {
    if !has("qemu-nbd") {
        return;
    }
    let there = directory();
    dense(&there.path().join("kept.img"), LENGTH, 3);
    let _server = Server::qemu(there.path(), "kept.img", "2", &["--read-only"]);
    let output = run_in(there.path(), &["info", URI]);
    ok(&output);
    let text = stdout(&output);
    for part in
        ["kind:               nbd", "export:             'disk'", "read-only:          yes", "block status"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let object = json(&run_in(there.path(), &["info", "--json", URI]));
    assert_eq!((&object["kind"], &object["length"]), (&"nbd".into(), &LENGTH.into()));
    assert_eq!(
        (&object["nbd"]["export"], &object["nbd"]["structured_replies"]),
        (&"disk".into(), &true.into())
    );
}
