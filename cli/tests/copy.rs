//! `copy`: what a person gets who copies files: the copy, the summary, refusals that touch nothing.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use support::{code, dense, directory, run_in, same, sparse, stderr};

/// Copy `a` to `b` with `options`; gives the messages.
#[track_caller]
fn copied(directory: &Path, options: &[&str]) -> String {
    let output = run_in(directory, &[&["copy", "a", "b"], options].concat());
    assert_eq!(code(&output), 0, "{options:?}: {}", stderr(&output));
    assert!(output.stdout.is_empty());
    assert!(same(&directory.join("a"), &directory.join("b")), "{options:?}");
    stderr(&output)
}

/// Refused with exit code 2 and a message with `expected`; `b` stays what it was.
#[track_caller]
fn refused(directory: &Path, arguments: &[&str], expected: &str) -> String {
    let before = fs::read(directory.join("b")).ok();
    let output = run_in(directory, &[&["copy"], arguments].concat());
    let messages = stderr(&output);
    assert_eq!(code(&output), 2, "{arguments:?}: {messages}");
    assert!(messages.starts_with("engine-cli: "), "{messages}");
    assert!(messages.contains(expected), "{arguments:?}: {expected:?} in {messages}");
    assert_eq!(fs::read(directory.join("b")).ok(), before, "{arguments:?}: the target was touched");
    messages
}

#[test]
fn plain() {
    let there = directory();
    dense(&there.path().join("a"), 5_000_001, 0);
    let messages = copied(there.path(), &[]);
    let summary = messages.lines().last().expect("a summary");
    assert!(summary.starts_with("engine-cli: copied 4.8 MiB in "), "{messages}");
    assert!(summary.contains("/s): 4.8 MiB data") && summary.ends_with("; flushed"), "{messages}");
}

#[test]
fn with_every_option() {
    for engine in ["auto", "threads"] {
        for options in [
            &["--verify", "--cluster-size", "4k", "--queue-depth", "3"][..],
            &["--sync", "top", "--no-zero-detect", "--cluster-size", "4M"],
            &["--speed", "200M", "--on-source-error", "ignore", "--on-target-error", "enospc"],
            &["--map", "m", "--target-is-zero"],
            &["--source-format", "raw", "--target-format", "raw", "--progress", "none"],
        ] {
            let there = directory();
            sparse(&there.path().join("a"), (20 << 20) + 777);
            let options = [options, &["--io-engine", engine]].concat();
            let messages = copied(there.path(), &options);
            assert_eq!(messages.contains("; verified"), options.contains(&"--verify"), "{messages}");
        }
    }
}

#[test]
fn sizes_at_the_borders() {
    for length in [0, 1, 511, 512, 4095, 65535, 65536, 65537, (1 << 20) + 1] {
        let there = directory();
        dense(&there.path().join("a"), length, 0);
        copied(there.path(), &["--verify"]);
    }
}

#[test]
fn holes_and_zeros_stay_holes() {
    let there = directory();
    sparse(&there.path().join("a"), 256 << 20);
    let messages = copied(there.path(), &[]);
    assert!(
        messages.contains("4.0 MiB data, ") && messages.contains("zeros, ") && messages.contains("holes"),
        "{messages}"
    );
    let allocated = |name: &str| fs::metadata(there.path().join(name)).expect("stat").blocks() * 512;
    assert!(allocated("b") <= allocated("a") * 11 / 10, "{} and {}", allocated("a"), allocated("b"));
}

#[test]
fn an_existing_target_needs_force() {
    let there = directory();
    dense(&there.path().join("a"), 100_000, 0);
    dense(&there.path().join("b"), 200_000, 3);
    refused(there.path(), &["a", "b"], "--force");
    copied(there.path(), &["--force"]);
}

#[test]
fn mistakes_are_refused() {
    let there = directory();
    dense(&there.path().join("a"), 100_000, 0);
    fs::create_dir(there.path().join("d")).expect("made");
    symlink("a", there.path().join("link")).expect("linked");
    fs::hard_link(there.path().join("a"), there.path().join("hard")).expect("linked");
    refused(there.path(), &["missing", "b"], "no such file");
    refused(there.path(), &["d", "b"], "directory");
    refused(there.path(), &["/dev/zero", "b"], "character device");
    refused(there.path(), &["a", "-"], "standard output is no target");
    refused(there.path(), &["a", "d"], "name a file in it, e.g. d/a");
    refused(there.path(), &["a", "nowhere/b"], "nowhere/b");
    for same in ["a", "./a", "link", "hard"] {
        refused(there.path(), &["--force", "a", same], "same");
    }
    refused(there.path(), &["--source-format", "qcow2", "a", "b"], "qcow2");
    refused(there.path(), &["--target-format", "qcow2", "a", "b"], "qcow2");
    refused(there.path(), &["a", "nbds://host/x"], "NBD");
    refused(there.path(), &["--queue-depth", "4000000000", "a", "b"], "");
    refused(there.path(), &["--map", "a", "a", "b"], "");
    assert!(!there.path().join("b").exists());
}

#[test]
fn a_missing_source_gets_a_hint_that_is_safe() {
    let there = directory();
    dense(&there.path().join("a"), 1000, 0);
    let messages = refused(there.path(), &["new", "a"], "the source comes first");
    assert!(!messages.contains("engine-cli copy"), "a command that reverses the copy: {messages}");
    for arguments in [&["new", "newer"][..], &["--force", "new", "a"], &["--map", "m", "new", "a"]] {
        let messages = refused(there.path(), arguments, "no such file");
        assert!(!messages.contains("the source comes first"), "{messages}");
    }
    let messages =
        refused(there.path(), &["/dev/engine-no-such-disk", "a"], "is the device connected? see lsblk");
    assert!(!messages.contains("the source comes first"), "{messages}");
}

#[test]
fn a_mistyped_device_makes_no_file() {
    let there = directory();
    dense(&there.path().join("a"), 1000, 0);
    symlink("/dev", there.path().join("devices")).expect("linked");
    for target in
        ["/dev/engine-no-such-disk", "devices/engine-no-such-disk", "/dev/engine-no-such-group/disk"]
    {
        refused(there.path(), &["a", target], "there is no such device; check the name with lsblk");
        refused(there.path(), &["--force", "a", target], "there is no such device");
    }
    assert!(!Path::new("/dev/engine-no-such-disk").exists());
}

#[test]
fn a_target_in_memory_is_said_to_be_there() {
    let Ok(memory) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED: nothing can be written to /dev/shm");
        return;
    };
    let there = directory();
    dense(&there.path().join("a"), 1000, 0);
    let target = memory.path().join("b");
    let output = run_in(there.path(), &["copy", "a", &target.to_string_lossy()]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stderr(&output).contains("is in memory: it does not survive a restart"), "{}", stderr(&output));
}

/// What somebody does to the target in the middle of the copy makes it a failure; `other` is what stands there then.
#[track_caller]
fn lost_by(deed: impl Fn(&Path), options: &[&str], expected: &str, other: Option<&[u8]>) {
    let there = directory();
    dense(&there.path().join("a"), 4 << 20, 0);
    let arguments = [&["copy", "a", "b", "--speed", "2M", "--progress", "json"], options].concat();
    let mut running = support::Running::program(there.path(), &arguments);
    running.progress(|line| line["copied"].as_u64() > Some(0));
    deed(there.path());
    let (code, _, messages) = running.end();
    assert_eq!(code, 1, "{messages}");
    assert!(messages.contains(expected) && !messages.contains("engine-cli: copied"), "{messages}");
    assert!(!there.path().join("m").exists(), "a map of no use: {messages}");
    assert_eq!(fs::read(there.path().join("b")).ok().as_deref(), other);
}

#[test]
fn a_target_that_is_removed_or_replaced_is_a_failure() {
    let gone = "it was removed or replaced while it was copied; the copy is lost";
    let remove = |there: &Path| fs::remove_file(there.join("b")).expect("removed");
    lost_by(remove, &[], gone, None);
    lost_by(remove, &["--map", "m"], gone, None);
    let replace = |there: &Path| {
        fs::write(there.join("c"), "other").expect("written");
        fs::rename(there.join("c"), there.join("b")).expect("renamed");
    };
    lost_by(replace, &[], gone, Some(b"other"));
    let swap = |there: &Path| {
        fs::rename(there.join("b"), there.join("moved")).expect("renamed");
        fs::write(there.join("b"), "other").expect("written");
    };
    lost_by(swap, &[], "moved away and replaced", Some(b"other"));
}

#[test]
fn a_bad_map_is_refused() {
    let there = directory();
    dense(&there.path().join("a"), 100_000, 0);
    fs::write(there.path().join("m"), "this is no map").expect("written");
    refused(there.path(), &["--map", "m", "a", "b"], "m");
    assert_eq!(fs::read_to_string(there.path().join("m")).expect("read"), "this is no map");
    assert!(!there.path().join("b").exists());
}

#[test]
fn a_map_says_what_becomes_of_it() {
    let there = directory();
    dense(&there.path().join("a"), 4 << 20, 0);
    fs::write(there.path().join("m"), "").expect("written");
    let messages = copied(there.path(), &["--map", "m"]);
    assert!(messages.contains("map file m is empty: starting from the beginning"), "{messages}");
    assert!(messages.ends_with("; flushed; map file removed\n"), "{messages}");
    assert!(!there.path().join("m").exists());
}

#[test]
fn a_source_that_was_modified_between_two_runs_is_named() {
    let there = directory();
    dense(&there.path().join("a"), 8 << 20, 0);
    let arguments = ["copy", "a", "b", "--map", "m", "--speed", "2M", "--progress", "json"];
    let mut running = support::Running::program(there.path(), &arguments);
    running.progress(|line| line["copied"].as_u64() > Some(0));
    running.kill();
    File::options()
        .write(true)
        .open(there.path().join("a"))
        .and_then(|a| a.write_all_at(b"x", 9))
        .expect("written");
    let messages = refused(
        there.path(),
        &["a", "b", "--map", "m"],
        "/a was modified since: its modification time was 20",
    );
    assert!(messages.contains(" UTC and is now 20"), "{messages}");
    assert!(messages.contains("remove the map file and add --force to copy everything again"), "{messages}");
}

#[test]
fn no_time_is_left_at_the_end() {
    let there = directory();
    dense(&there.path().join("a"), 8 << 20, 0);
    let arguments = ["copy", "a", "b", "--speed", "2M", "--progress", "json"];
    let mut running = support::Running::program(there.path(), &arguments);
    running.progress(|line| line["time_left"].is_number());
    running.signal("INT");
    let (_, _, messages) = running.end();
    let last = messages.lines().rfind(|line| line.starts_with('{')).expect("a last line");
    assert!(last.contains("\"final\":true") && last.contains("\"time_left\":null"), "{last}");
}

#[test]
fn null_disks() {
    let there = directory();
    dense(&there.path().join("a"), 1_000_000, 0);
    for arguments in [["copy", "a", "null:"], ["copy", "null:64M", "null:"]] {
        let output = run_in(there.path(), &arguments);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        assert!(stderr(&output).contains("copied "), "{}", stderr(&output));
    }
    assert!(!there.path().join("null:").exists());
}

#[test]
fn a_file_size_limit_is_an_error_not_the_end() {
    if !support::has("prlimit") {
        return;
    }
    let there = directory();
    dense(&there.path().join("a"), 4 << 20, 0);
    let output = Command::new("prlimit")
        .arg("--fsize=1048576")
        .arg(support::program())
        .args(["copy", "a", "b"])
        .current_dir(there.path())
        .output()
        .expect("prlimit runs");
    assert!(matches!(code(&output), 1 | 2), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("too large") || stderr(&output).contains("limit"),
        "{}",
        stderr(&output)
    );
    assert!(!there.path().join("b").exists(), "the partial file is removed");
}

#[test]
fn skipped_ranges_are_listed() {
    let there = directory();
    let Some(bad) = BadDevice::new(there.path()) else { return };
    let output = run_in(there.path(), &["copy", &bad.device, "b", "--on-source-error", "ignore"]);
    assert_eq!(code(&output), 3, "{}", stderr(&output));
    assert!(stderr(&output).contains("skipped bytes "), "{}", stderr(&output));
    assert!(stderr(&output).contains("copied all but "), "{}", stderr(&output));
    let object = support::json(&run_in(
        there.path(),
        &["copy", &bad.device, "b", "--force", "--on-source-error", "ignore", "--json"],
    ));
    assert_eq!(object["result"], "complete_with_skipped");
    assert_eq!(object["exit_code"], 3);
    let skipped = object["skipped"].as_array().expect("a list");
    assert!(!skipped.is_empty());
    assert!(skipped[0]["error"].as_str().is_some_and(|error| error.contains("EIO")), "{object}");
    let total: u64 = skipped.iter().filter_map(|range| range["length"].as_u64()).sum();
    assert_eq!(object["skipped_bytes"], total);
    let output = run_in(there.path(), &["copy", &bad.device, "c"]);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert!(stderr(&output).contains(&bad.device) && stderr(&output).contains("EIO"), "{}", stderr(&output));
}

/// A loop device over a file that was cut: reads beyond the cut fail.
struct BadDevice {
    device: String,
}

impl BadDevice {
    fn new(directory: &Path) -> Option<Self> {
        let path = directory.join("cut");
        dense(&path, 2 << 20, 0);
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&path).output();
        let Some(output) = output.ok().filter(|output| output.status.success()) else {
            eprintln!("SKIPPED: no loop device to be had (needs root)");
            return None;
        };
        let file = File::options().write(true).open(&path).expect("open");
        file.set_len((1 << 20) + 4096).expect("cut");
        file.write_all_at(b"x", 0).expect("written");
        Some(Self { device: support::stdout(&output).trim().to_owned() })
    }
}

impl Drop for BadDevice {
    fn drop(&mut self) {
        Command::new("losetup").args(["--detach", &self.device]).status().ok();
    }
}
