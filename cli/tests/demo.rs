//! `demo`: it proves what it says, refuses what does not fit, and leaves nothing behind.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{PATIENCE, Running, code, directory, json, program, stderr, stdout};

/// The program with its temporary files in `directory`.
fn demo(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", directory)
        .env_remove("ENGINE_LOG")
        .stdin(Stdio::null());
    command
}

fn run(directory: &Path, arguments: &[&str]) -> Output {
    demo(directory, arguments).output().expect("the program runs")
}

#[track_caller]
fn nothing_left(directory: &Path) {
    assert_eq!(fs::read_dir(directory).expect("read").count(), 0, "files are left");
}

#[test]
fn tells_what_it_did_and_proves_it() {
    let there = directory();
    let output = run(there.path(), &["--size", "8M", "--seconds", "1"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let text = stdout(&output);
    for part in [
        "disk     8.0 MiB of random data",
        "backup   8.0 MiB in ",
        "128 clusters of 64.0 KiB",
        "\n  before ",
        "\n  during ",
        "\n  after ",
        "corrected for coordinated omission",
        "proved   the backup is the disk after exactly ",
        "in all 2,048 blocks",
        "proved   the disk holds the last acknowledged version of all 2,048 blocks",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    assert_eq!(stderr(&output), "", "no messages and no bar");
    nothing_left(there.path());
}

#[test]
fn the_object_has_all_of_it() {
    let there = directory();
    let output = run(there.path(), &["--size", "4M", "--seconds", "1", "--json"]);
    let object = json(&output);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let count = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value} is no count"));
    assert_eq!(object["command"], "demo");
    assert_eq!(object["result"], "proved");
    assert_eq!(object["bytes"], 4 << 20);
    assert_eq!((&object["blocks"], &object["block_bytes"]), (&1024.into(), &4096.into()));
    assert_eq!(object["backup"]["bytes"], 4 << 20);
    assert_eq!(object["backup"]["clusters"], 64);
    assert!(count(&object["backup"]["rate"]) > 0);
    for phase in ["before", "during", "after"] {
        let felt = &object["guest"][phase];
        for field in ["seconds", "writes", "writes_per_second", "worst_wait_seconds"] {
            assert!(felt[field].is_number(), "{phase} {field} in {object}");
        }
        for kind in ["corrected_wait_seconds", "plain_wait_seconds"] {
            for share in ["p50", "p99", "p99.9"] {
                assert!(felt[kind][share].is_number(), "{phase} {kind} {share} in {object}");
            }
        }
    }
    let (backup, disk) = (&object["proof"]["backup"], &object["proof"]["disk"]);
    assert_eq!((&backup["holds"], &disk["holds"]), (&true.into(), &true.into()));
    let shown = count(&backup["writes"]);
    assert!(count(&backup["acknowledged_at_call"]) <= shown);
    assert!(shown <= count(&backup["acknowledged_at_return"]) + 1);
    let all: u64 =
        ["before", "during", "after"].map(|phase| count(&object["guest"][phase]["writes"])).iter().sum();
    assert_eq!(count(&disk["writes"]), all);
    assert!(shown < all, "it wrote on");
    for field in ["notices", "signal", "error", "directory"] {
        assert!(object.get(field).is_some(), "{field} in {object}");
    }
    assert_eq!(object["exit_code"], 0);
    nothing_left(there.path());
}

#[test]
fn sizes_and_times_out_of_range_are_refused() {
    let there = directory();
    for (option, value, expected) in [
        ("--size", "512K", "choose 1M to 64G"),
        ("--size", "65G", "choose 1M to 64G"),
        ("--size", "1025K", "multiple of 4K"),
        ("--size", "large", "write it like"),
        ("--seconds", "0", "choose 1 to 3600"),
        ("--seconds", "3601", "choose 1 to 3600"),
        ("--seconds", "1.5", "no whole number"),
    ] {
        let output = run(there.path(), &["--json", option, value]);
        assert_eq!(code(&output), 2, "{option} {value}");
        assert!(stderr(&output).contains(expected), "{option} {value}: {}", stderr(&output));
        assert_eq!(json(&output)["result"], "refused");
    }
    nothing_left(there.path());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let there = directory();
    let space = nix::sys::statvfs::statvfs(there.path()).expect("asked");
    let free = space.blocks_available() * space.fragment_size();
    // A disk of three quarters and a backup of as much: whatever others free or take meanwhile, it does not fit.
    let size = (free / 4 * 3).clamp(1 << 20, 64 << 30) >> 12 << 12;
    if size * 3 / 2 < free {
        eprintln!("SKIPPED: there is space for all sizes");
        return;
    }
    let output = run(there.path(), &["--json", "--size", &size.to_string()]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    assert!(stderr(&output).contains("no space for a disk of "), "{}", stderr(&output));
    assert!(stderr(&output).contains("TMPDIR"), "{}", stderr(&output));
    let object = json(&output);
    assert_eq!((&object["result"], &object["directory"]), (&"refused".into(), &Value::Null));
    nothing_left(there.path());
}

#[test]
fn without_a_directory_it_is_refused() {
    let output = run(Path::new("/nonexistent"), &[]);
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("/nonexistent"), "{}", stderr(&output));
    assert_eq!(stderr(&output).lines().count(), 1);
}

/// A demo that has come so far that its file `name` is there.
fn with_file(directory: &Path, arguments: &[&str], name: &str) -> Running {
    let running = Running::start(&mut demo(directory, arguments));
    let deadline = Instant::now() + PATIENCE;
    let there = || {
        let mut entries = fs::read_dir(directory).expect("read").flatten();
        entries.any(|entry| entry.path().join(name).exists())
    };
    while !there() {
        assert!(Instant::now() < deadline, "no {name} came");
        thread::sleep(Duration::from_millis(5));
    }
    running
}

#[test]
fn a_signal_ends_it_and_removes_the_directory() {
    for (signal, expected) in [("INT", 130), ("TERM", 143)] {
        let there = directory();
        let running = with_file(there.path(), &["--size", "4M", "--seconds", "600", "--json"], "disk.img");
        thread::sleep(Duration::from_millis(300));
        running.signal(signal);
        let (code, output, messages) = running.end();
        assert_eq!(code, expected, "{messages}");
        assert!(messages.contains(&format!("ended by SIG{signal}")), "{messages}");
        let object: Value = serde_json::from_str(&output).expect("JSON");
        assert_eq!(object["result"], "cancelled");
        assert_eq!(object["signal"], format!("SIG{signal}"));
        assert_eq!(object["exit_code"], expected);
        nothing_left(there.path());
    }
}

#[test]
fn a_signal_during_the_making_or_the_backup_removes_the_directory() {
    for name in ["disk.img", "backup.img"] {
        let there = directory();
        let running = with_file(there.path(), &["--size", "512M", "--seconds", "1"], name);
        running.signal("INT");
        let (code, _, messages) = running.end();
        assert_eq!(code, 130, "{messages}");
        nothing_left(there.path());
    }
}

#[test]
fn a_bar_on_a_terminal() {
    if !support::has("script") {
        return;
    }
    let there = directory();
    let command = format!("exec {} demo --size 64M --seconds 1", program().display());
    let output = Command::new("script")
        .args(["-qfec", &command, "/dev/null"])
        .env("TMPDIR", there.path())
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .output()
        .expect("script runs");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in ["%, ", "of 64.0 MiB", "proved   the backup"] {
        assert!(shown.contains(part), "{part} in {shown:?}");
    }
}
