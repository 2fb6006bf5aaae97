//! A source that fails, shrinks or changes in the middle of a copy.
//!
//! A loop device over a file that was cut fails direct reads beyond the cut; growing the file again mends it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use serde_json::json;
use tempfile::TempDir;

use crate::kernel::{LoopDevice, is_root};
use crate::support::{Running, code, dense, directory, has, same, stderr};
use crate::{KIB, MIB, copied, copy, error_line, json as copy_json, limit_file_size, same_start};

const LENGTH: usize = 4 * MIB;
/// Within a cluster, so that only a part of it can be read.
const CUT: usize = 3 * MIB + 4 * KIB;
/// First byte of the first cluster that cannot be read as a whole.
const BAD: usize = 3 * MIB;

/// A device whose last megabyte cannot be read.
struct BadDevice {
    device: LoopDevice,
    there: TempDir,
}

impl BadDevice {
    fn new() -> Option<Self> {
        if !is_root() {
            return None;
        }
        let there = directory();
        dense(&there.path().join("good"), LENGTH, 0);
        fs::copy(there.path().join("good"), there.path().join("cut")).expect("copied");
        let device = LoopDevice::over(&there.path().join("cut"));
        File::options()
            .write(true)
            .open(there.path().join("cut"))
            .expect("open")
            .set_len(CUT as u64)
            .expect("cut");
        Some(Self { device, there })
    }

    fn place(&self) -> &Path {
        self.there.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place().join(name)
    }

    /// Put back what was cut off.
    fn repair(&self) {
        let good = fs::read(self.path("good")).expect("read");
        let file = File::options().write(true).open(self.path("cut")).expect("open");
        file.write_all_at(&good[CUT..], CUT as u64).expect("written");
        file.sync_all().expect("synced");
    }
}

#[test]
fn report_enospc_and_auto_fail_with_the_range() {
    for policy in ["report", "enospc", "auto"] {
        let Some(bad) = BadDevice::new() else { return };
        let device = bad.device.text();
        let output = copy(bad.place(), &["--on-source-error", policy, device, "b"]);
        let messages = stderr(&output);
        assert_eq!(code(&output), 1, "{messages}");
        let error = error_line(&messages);
        assert!(error.contains(&format!("cannot read {device}, bytes 3")), "{messages}");
        assert!(error.contains("I/O error (EIO); the device or its connection is failing"), "{messages}");
        assert_eq!(messages.matches("b was removed").count(), 1, "{messages}");
        assert!(messages.starts_with(error), "the error comes first: {messages}");
        assert!(!bad.path("b").exists());
    }
}

#[test]
fn a_target_that_was_there_is_kept_and_called_incomplete() {
    let Some(bad) = BadDevice::new() else { return };
    fs::write(bad.path("b"), "old").expect("written");
    let output = copy(bad.place(), &["--force", bad.device.text(), "b"]);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("b is not a complete copy"), "{}", stderr(&output));
    assert!(bad.path("b").exists());
}

#[test]
fn with_a_map_the_copy_goes_on_after_the_repair() {
    let Some(bad) = BadDevice::new() else { return };
    let arguments = ["--map", "m", bad.device.text(), "b"];
    let output = copy(bad.place(), &arguments);
    let messages = stderr(&output);
    assert_eq!(code(&output), 1, "{messages}");
    assert!(messages.contains("to go on where it stopped, repeat: "), "{messages}");
    assert!(bad.path("b").exists() && bad.path("m").exists());
    let object = copy_json(bad.place(), &arguments, 1);
    assert_eq!(object["resumable"], true);
    assert_eq!(object["error"]["errno"], "EIO");
    assert!(object["error"]["range"]["offset"].as_u64() >= Some(BAD as u64), "{object}");
    bad.repair();
    let object = copy_json(bad.place(), &arguments, 0);
    assert!(object["resumed"].as_u64() > Some(0), "what was copied before the error counts: {object}");
    assert!(same(&bad.path("good"), &bad.path("b")));
    assert!(!bad.path("m").exists());
}

#[test]
fn what_was_readable_once_does_not_keep_a_copy_from_going_on() {
    let Some(bad) = BadDevice::new() else { return };
    let arguments = ["--map", "m", bad.device.text(), "b"];
    let done = copy_json(bad.place(), &arguments, 1)["done"].clone();
    // Nothing of it can be read any more, so nothing can be compared with what the map says.
    let cut = File::options().write(true).open(bad.path("cut")).expect("open");
    cut.set_len(0).expect("cut");
    let object = copy_json(bad.place(), &arguments, 1);
    assert_eq!((&object["error"]["errno"], &object["resumed"]), (&json!("EIO"), &done), "{object}");
    assert_eq!(object["resumable"], true);
    let notices = object["notices"].to_string();
    assert!(notices.contains("could be compared: cannot read /dev/loop"), "{notices}");
    cut.write_all_at(&fs::read(bad.path("good")).expect("read"), 0).expect("written");
    cut.sync_all().expect("synced");
    let object = copy_json(bad.place(), &arguments, 0);
    assert_eq!(object["resumed"], done);
    assert!(!object["notices"].to_string().contains("compared"), "{object}");
    assert!(same(&bad.path("good"), &bad.path("b")));
}

#[test]
fn stop_pauses_until_the_device_is_mended() {
    let Some(bad) = BadDevice::new() else { return };
    let arguments =
        ["copy", "--on-source-error", "stop", "--progress", "json", "--json", bad.device.text(), "b"];
    let mut running = Running::program(bad.place(), &arguments);
    let reason = running.expect("engine-cli: paused: ");
    assert!(reason.contains(&format!("cannot read {}, bytes 3", bad.device.text())), "{reason}");
    assert!(reason.contains("EIO"), "{reason}");
    let line = running.progress(|progress| progress["status"] == "paused");
    assert_eq!(line["skipped"], 0);
    assert!(line["done"].as_u64() <= Some(BAD as u64), "{line}");
    // Not mended yet: it says so again.
    running.signal("CONT");
    running.expect("engine-cli: paused: ");
    bad.repair();
    running.signal("CONT");
    let (code, output, messages) = running.end();
    assert_eq!(code, 0, "{messages}");
    assert!(output.contains("\"result\":\"complete\""), "{output}");
    assert!(same(&bad.path("good"), &bad.path("b")));
}

#[test]
fn ignore_leaves_out_exactly_the_bad_clusters_and_the_next_run_completes_them() {
    let Some(bad) = BadDevice::new() else { return };
    let arguments = ["--on-source-error", "ignore", "--map", "m", bad.device.text(), "b"];
    let object = copy_json(bad.place(), &arguments, 3);
    assert_eq!(object["result"], "complete_with_skipped");
    let skipped = object["skipped"].as_array().expect("a list");
    assert_eq!(skipped.len(), 1, "neighbours are one range: {object}");
    assert_eq!(skipped[0]["offset"], BAD);
    assert_eq!(skipped[0]["length"], LENGTH - BAD);
    let error = skipped[0]["error"].as_str().expect("text");
    assert!(error.contains("EIO") && error.contains(&format!("bytes {BAD}..{LENGTH}")), "{error}");
    assert_eq!(object["skipped_bytes"], LENGTH - BAD);
    assert_eq!(object["done"], BAD);
    assert_eq!(skipped[0]["target"], "zeros", "{object}");
    assert_eq!(object["retries"], 5 * 16, "five times each of the clusters: {object}");
    assert_eq!(fs::metadata(bad.path("b")).expect("stat").len(), LENGTH as u64, "the exact length");
    assert!(same_start(&bad.path("good"), &bad.path("b"), BAD));
    let left_out = &fs::read(bad.path("b")).expect("read")[BAD..];
    assert!(left_out.iter().all(|&byte| byte == 0), "what was left out is a hole");
    bad.repair();
    let output = copy(bad.place(), &arguments);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stderr(&output).contains("1 range that was left out is tried again"), "{}", stderr(&output));
    assert!(same(&bad.path("good"), &bad.path("b")));
    assert!(!bad.path("m").exists());
}

#[test]
fn ignore_says_what_the_target_holds_where_something_was_left_out() {
    let Some(bad) = BadDevice::new() else { return };
    // An existing file is emptied first.
    fs::write(bad.path("b"), vec![0xee; LENGTH + 5]).expect("written");
    let policy = ["--on-source-error", "ignore"];
    let left_out = |target: &Path| fs::read(target).expect("read")[BAD..LENGTH].to_vec();
    let object = copy_json(
        bad.place(),
        &[&policy[..], &["--force", "--map", "m", bad.device.text(), "b"]].concat(),
        3,
    );
    assert_eq!(object["skipped"][0]["target"], "zeros", "{object}");
    assert!(left_out(&bad.path("b")).iter().all(|&byte| byte == 0));
    // A run that goes on does not know what the one before it may have written.
    let object = copy_json(bad.place(), &[&policy[..], &["--map", "m", bad.device.text(), "b"]].concat(), 3);
    assert_eq!(object["skipped"][0]["target"], "unknown", "{object}");
    // A device keeps what it held.
    fs::write(bad.path("old"), vec![0xee; LENGTH]).expect("written");
    let target = LoopDevice::over(&bad.path("old"));
    let output = copy(bad.place(), &[&policy[..], &[bad.device.text(), target.text()]].concat());
    assert_eq!(code(&output), 3, "{}", stderr(&output));
    let told = format!("; {} holds there what it held before", target.text());
    assert!(stderr(&output).lines().next().is_some_and(|line| line.ends_with(&told)), "{}", stderr(&output));
    let device = Path::new(target.text());
    assert!(left_out(device).iter().all(|&byte| byte == 0xee));
    assert!(same_start(&bad.path("good"), device, BAD));
}

#[test]
fn ignore_says_what_it_left_out_and_how_to_try_again() {
    let Some(bad) = BadDevice::new() else { return };
    let output = copy(bad.place(), &["--on-source-error", "ignore", bad.device.text(), "b"]);
    let messages = stderr(&output);
    assert_eq!(code(&output), 3, "{messages}");
    let lines: Vec<_> = messages.lines().collect();
    assert_eq!(lines.len(), 2, "{messages}");
    assert!(lines[0].starts_with(&format!("engine-cli: skipped bytes {BAD}..{LENGTH}: ")), "{messages}");
    assert!(lines[0].ends_with("; b holds zeros there"), "{messages}");
    assert!(lines[1].starts_with("engine-cli: copied all but 1.0 MiB of 4.0 MiB in "), "{messages}");
}

/// A copy of `a` (16 MiB) to `b` that has begun and takes seconds.
fn begun(place: &Path, options: &[&str]) -> Running {
    dense(&place.join("a"), 16 * MIB, 0);
    let slow = ["copy", "--speed", "8M", "--progress", "json", "--json", "a", "b"];
    let mut running = Running::program(place, &[&slow, options].concat());
    running.progress(|_| true);
    running
}

#[test]
fn a_source_that_shrinks_fails_the_copy() {
    let there = directory();
    let running = begun(there.path(), &[]);
    File::options().write(true).open(there.path().join("a")).expect("open").set_len(12 << 20).expect("cut");
    let (code, _, messages) = running.end();
    assert_eq!(code, 1, "{messages}");
    let error = error_line(&messages);
    assert!(
        error.contains("cannot read a, bytes 12") || error.contains("cannot read a, bytes 13"),
        "{error}"
    );
    assert!(error.contains("has become shorter"), "{error}");
    assert!(error.contains("; copy again while nothing truncates it"), "{error}");
    assert!(!there.path().join("b").exists(), "{messages}");
}

#[test]
fn a_source_that_shrinks_cannot_be_gone_on_with() {
    let there = directory();
    let running = begun(there.path(), &["--map", "m"]);
    File::options().write(true).open(there.path().join("a")).expect("open").set_len(12 << 20).expect("cut");
    let (code, output, messages) = running.end();
    assert_eq!(code, 1, "{messages}");
    assert!(output.contains("\"resumable\":false"), "{output}");
    assert!(!messages.contains("to go on where it stopped"), "that would be refused: {messages}");
}

#[test]
fn no_policy_makes_a_success_of_a_source_that_shrank() {
    let there = directory();
    let running = begun(there.path(), &["--on-source-error", "ignore"]);
    File::options().write(true).open(there.path().join("a")).expect("open").set_len(12 << 20).expect("cut");
    let (code, _, messages) = running.end();
    assert_eq!(code, 1, "{messages}");
    assert!(error_line(&messages).contains("changed while it was copied"), "{messages}");
}

#[test]
fn a_source_that_changes_fails_the_copy_and_keeps_the_target() {
    for option in [&[][..], &["--map", "m"]] {
        let there = directory();
        let running = begun(there.path(), option);
        File::options()
            .write(true)
            .open(there.path().join("a"))
            .expect("open")
            .write_all_at(b"x", 0)
            .expect("written");
        let (code, output, messages) = running.end();
        assert_eq!(code, 1, "{messages}");
        let error = error_line(&messages);
        assert!(
            error.contains("cannot copy a: its modification time changed while it was copied"),
            "{error}"
        );
        assert!(error.contains("; copy again while nothing writes to it"), "{error}");
        assert!(messages.contains("b is kept, but "), "{messages}");
        assert!(!messages.contains("can go on after an interruption"), "beside the point: {messages}");
        assert!(output.contains("\"source_changed\"") && output.contains("\"resumable\":false"), "{output}");
        assert_eq!(fs::metadata(there.path().join("b")).expect("kept").len(), 16 << 20);
        assert!(!there.path().join("m").exists());
    }
}

#[test]
fn a_source_that_changes_takes_the_map_of_what_was_skipped_with_it() {
    if !has("prlimit") {
        return;
    }
    let there = directory();
    let running = begun(there.path(), &["--map", "m", "--on-target-error", "ignore"]);
    // The last megabyte cannot be written: the copy ends as complete but for that.
    limit_file_size(running.id(), "15728640");
    let source = File::options().write(true).open(there.path().join("a")).expect("open");
    source.write_all_at(b"x", 0).expect("written");
    let (code, output, messages) = running.end();
    assert_eq!(code, 1, "{messages}");
    assert!(output.contains("\"source_changed\"") && output.contains("\"resumable\":false"), "{output}");
    assert!(messages.contains("skipped bytes 15728640..16777216"), "{messages}");
    assert!(messages.contains("no run can go on from map file m: it was removed"), "{messages}");
    assert!(!there.path().join("m").exists());
}

#[test]
fn every_policy_at_once_on_one_device() {
    // Readers do not exclude each other, and one that fails does not disturb the rest.
    let Some(bad) = BadDevice::new() else { return };
    thread::scope(|scope| {
        for (policy, expected) in [("report", 1), ("auto", 1), ("ignore", 3)] {
            let bad = &bad;
            scope.spawn(move || {
                let object = copy_json(
                    bad.place(),
                    &["--on-source-error", policy, bad.device.text(), policy],
                    expected,
                );
                assert_ne!(object["result"], json!("complete"));
            });
        }
    });
    bad.repair();
    copied(bad.place(), &[bad.device.text(), "b"]);
    assert!(same(&bad.path("good"), &bad.path("b")));
}
