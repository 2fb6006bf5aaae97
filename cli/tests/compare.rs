//! `compare`: equal, different, unequal lengths, holes, errors, interruption; in words and as JSON.

mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use support::{Running, code, dense, directory, json, run_in, sparse, stderr, stdout};

fn poke(path: &Path, offset: u64, byte: u8) {
    OpenOptions::new().write(true).open(path).expect("open").write_all_at(&[byte], offset).expect("written");
}

#[test]
fn equal_and_different() {
    let there = directory();
    let (a, b) = (there.path().join("a"), there.path().join("b"));
    dense(&a, 5_000_001, 0);
    fs::copy(&a, &b).expect("copied");
    let output = run_in(there.path(), &["compare", "a", "b"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stdout(&output).starts_with("a and b are equal: 4.8 MiB"), "{}", stdout(&output));
    assert_eq!(stderr(&output), "");

    poke(&b, 5_000_000, 0);
    poke(&b, 4_321_000, 0);
    let output = run_in(there.path(), &["compare", "a", "b"]);
    assert_eq!(code(&output), 3);
    assert!(stdout(&output).contains("first at byte 4321000 (0x41eee8): 0x"), "{}", stdout(&output));

    let object = json(&run_in(there.path(), &["compare", "--json", "a", "b"]));
    assert_eq!(object["result"], "different");
    assert_eq!(object["equal"], false);
    assert_eq!(object["first_difference"], 4_321_000);
    assert_eq!(object["byte_b"], 0);
    assert_eq!(object["exit_code"], 3);
    assert_eq!(object["error"], serde_json::Value::Null);
}

#[test]
fn different_lengths_differ() {
    let there = directory();
    dense(&there.path().join("a"), 70_000, 0);
    dense(&there.path().join("b"), 70_001, 0);
    fs::write(there.path().join("empty"), "").expect("written");
    let output = run_in(there.path(), &["compare", "a", "b"]);
    assert_eq!(code(&output), 3);
    assert!(stdout(&output).contains("lengths 70000 and 70001 bytes"), "{}", stdout(&output));
    let object = json(&run_in(there.path(), &["compare", "a", "b", "--json"]));
    assert_eq!((&object["length_a"], &object["length_b"]), (&70_000.into(), &70_001.into()));
    assert_eq!(object["first_difference"], 70_000);
    assert_eq!(code(&run_in(there.path(), &["compare", "empty", "b"])), 3);
    assert_eq!(code(&run_in(there.path(), &["compare", "empty", "empty"])), 0);
}

#[test]
fn holes_count_as_zeros() {
    let there = directory();
    let (a, b) = (there.path().join("a"), there.path().join("b"));
    sparse(&a, (40 << 20) + 513);
    let bytes = fs::read(&a).expect("read");
    fs::write(&b, bytes).expect("written");
    let object = json(&run_in(there.path(), &["compare", "--json", "a", "b"]));
    assert_eq!(object["equal"], true, "{object}");
    assert_eq!(object["bytes"], (40 << 20) + 513);
    poke(&b, 30 << 20, 1);
    let object = json(&run_in(there.path(), &["compare", "--json", "a", "b"]));
    assert_eq!(object["first_difference"], 30 << 20);
    assert_eq!((&object["byte_a"], &object["byte_b"]), (&0.into(), &1.into()));
}

#[test]
fn holes_of_both_are_not_read() {
    let there = directory();
    for name in ["a", "b"] {
        let file = fs::File::create(there.path().join(name)).expect("created");
        file.set_len(1 << 40).expect("set");
        file.write_all_at(b"end", (1 << 40) - 3).expect("written");
    }
    // A TiB that were read would not end within the test's patience.
    let object = json(&run_in(there.path(), &["compare", "--json", "a", "b"]));
    assert_eq!(object["result"], "equal");
    assert!(object["holes"].as_u64().is_some_and(|holes| holes > (1 << 40) - (1 << 20)), "{object}");
}

#[test]
fn refusals() {
    let there = directory();
    dense(&there.path().join("a"), 10, 0);
    for (other, expected) in
        [("missing", "missing"), (".", "directory"), ("/dev/zero", "character device"), ("nbds://h/x", "NBD")]
    {
        let output = run_in(there.path(), &["compare", "a", other]);
        assert_eq!(code(&output), 2, "{other}");
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
        let object = json(&run_in(there.path(), &["compare", "--json", "a", other]));
        assert_eq!(object["result"], "refused");
        assert_eq!(object["exit_code"], 2);
        assert!(object["error"]["message"].as_str().is_some_and(|message| message.contains(expected)));
    }
}

#[test]
fn progress_as_json_lines() {
    let there = directory();
    dense(&there.path().join("a"), 3 << 20, 0);
    let output = run_in(there.path(), &["compare", "--progress", "json", "a", "a"]);
    let last = stderr(&output).lines().last().map(str::to_owned).expect("a last line");
    let line: serde_json::Value = serde_json::from_str(&last).expect("JSON");
    assert_eq!(line["event"], "progress");
    assert_eq!(line["final"], true);
    assert_eq!(line["done"], 3 << 20);
}

#[test]
fn interrupted() {
    let there = directory();
    // A null disk of this size keeps the comparison busy for longer than anybody waits.
    for (signal, expected) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let mut running = Running::program(
            there.path(),
            &["compare", "--json", "--progress", "json", "null:1P", "null:1P"],
        );
        running.expect("progress");
        running.signal(signal);
        let (code, output, messages) = running.end();
        assert_eq!(code, expected, "{messages}");
        assert!(messages.contains(&format!("ended by SIG{signal}")), "{messages}");
        let object: serde_json::Value = serde_json::from_str(&output).expect("JSON");
        assert_eq!(object["result"], "cancelled");
        assert_eq!(object["exit_code"], expected);
    }
}

#[test]
fn hang_up_stays_ignored_under_nohup() {
    let there = directory();
    let script =
        format!("trap '' HUP; exec {} compare --progress json null:1P null:1P", support::program().display());
    let mut running =
        Running::start(std::process::Command::new("sh").args(["-c", &script]).current_dir(there.path()));
    running.expect("progress");
    running.signal("HUP");
    std::thread::sleep(Duration::from_millis(500));
    assert!(running.is_running());
    running.signal("TERM");
    assert_eq!(running.end().0, 143);
}

#[test]
fn bar_on_a_terminal_and_nothing_in_a_pipe() {
    if !support::has("script") {
        return;
    }
    let there = directory();
    let command = format!("{} compare null:200G null:200G", support::program().display());
    let output = support::heeding("timeout")
        .args(["-s", "INT", "3", "script", "-qfec", &command, "/dev/null"])
        .current_dir(there.path())
        .env("TERM", "xterm")
        .output()
        .expect("script runs");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("%, ") && shown.contains("of 200 GiB") && shown.contains("iB/s"), "{shown:?}");
    let running = Running::program(there.path(), &["compare", "null:1P", "null:1P"]);
    std::thread::sleep(Duration::from_millis(800));
    running.signal("TERM");
    let (_, _, messages) = running.end();
    let lines: Vec<_> = messages.lines().collect();
    let [heard, ended] = lines[..] else { panic!("{messages}") };
    assert_eq!(heard, "engine-cli: SIGTERM: ending; a second one ends at once");
    assert!(ended.starts_with("engine-cli: ended by SIGTERM"), "{messages}");
}

#[test]
fn a_second_signal_ends_at_once_even_when_nobody_reads_the_messages() {
    let there = directory();
    // A pipe that is full from the start: the first message blocks whoever writes it.
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    std::io::Write::write_all(&mut writer, &[b'x'; 64 << 10]).expect("filled");
    let mut child = support::heeding(support::program())
        .args(["compare", "--progress", "json", "null:1P", "null:1P"])
        .current_dir(there.path())
        .stderr(writer)
        .spawn()
        .expect("the program starts");
    let kill = || {
        std::thread::sleep(Duration::from_millis(600));
        let status = std::process::Command::new("kill").arg(child.id().to_string()).status();
        assert!(status.expect("kill runs").success());
    };
    kill();
    kill();
    let status = child.wait().expect("waited");
    assert_eq!(support::exit_code(status, "the pipe is full"), 143);
    drop(reader);
}

#[test]
fn neither_disk_is_called_a_source_and_the_shorter_one_is_named() {
    let there = directory();
    dense(&there.path().join("a"), 100_000, 0);
    dense(&there.path().join("b"), 100_000, 0);
    let output = run_in(there.path(), &["compare", "a", "missing"]);
    assert_eq!(code(&output), 2);
    assert!(
        stderr(&output).starts_with("engine-cli: cannot open missing: no such file"),
        "{}",
        stderr(&output)
    );
    std::fs::File::options()
        .write(true)
        .open(there.path().join("b"))
        .and_then(|b| b.set_len(50_000))
        .expect("cut");
    for arguments in [["compare", "a", "b"], ["compare", "b", "a"]] {
        let output = run_in(there.path(), &arguments);
        assert_eq!(code(&output), 3);
        assert!(
            stdout(&output).contains("equal up to byte 50000 (0xc350), where b ends"),
            "{}",
            stdout(&output)
        );
    }
}
