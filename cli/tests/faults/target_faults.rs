//! A target that runs full, or into a limit, in the middle of a copy.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::kernel::{LoopDevice, Mount, is_root, tool};
use crate::support::{Running, code, dense, directory, has, same, stderr};
use crate::{MIB, copied, copy, error_line, json, limit_file_size, refused};

const LENGTH: usize = 12 * MIB;

/// A file system with room for about half of the source.
struct Small {
    // In the order in which they go away.
    mount: Mount,
    _device: Option<LoopDevice>,
    there: TempDir,
}

impl Small {
    fn tmpfs() -> Option<Self> {
        Self::with(|place| (Mount::tmpfs(&place.join("fs"), 6 << 20), None))
    }

    /// xfs has no file systems as small as that, so a file takes most of one up.
    fn xfs() -> Option<Self> {
        if !has("mkfs.xfs") || !has("fallocate") {
            return None;
        }
        let small = Self::with(|place| {
            let image = place.join("image");
            fs::File::create(&image).expect("created").set_len(400 << 20).expect("set");
            tool("mkfs.xfs", &["-q", image.to_str().expect("text")]);
            let device = LoopDevice::over(&image);
            (Mount::new("xfs", device.text(), "rw", &place.join("fs")), Some(device))
        })?;
        let ballast = small.path("fs/ballast");
        let free = tool("stat", &["-f", "-c", "%a %S", small.mount.path().to_str().expect("text")]);
        let (blocks, size) = free.split_once(' ').expect("two numbers");
        let free = blocks.parse::<u64>().expect("a number") * size.parse::<u64>().expect("a number");
        let length = (free - (6 << 20)).to_string();
        tool("fallocate", &["--length", &length, ballast.to_str().expect("text")]);
        Some(small)
    }

    fn with(make: impl FnOnce(&Path) -> (Mount, Option<LoopDevice>)) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let there = directory();
        dense(&there.path().join("a"), LENGTH, 0);
        let (mount, device) = make(there.path());
        Some(Self { mount, _device: device, there })
    }

    fn place(&self) -> &Path {
        self.there.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place().join(name)
    }

    /// Make room for the rest.
    fn make_room(&self) {
        if self.path("fs/ballast").exists() {
            // Removed, it would give its blocks back in its own time.
            fs::File::create(self.path("fs/ballast")).expect("emptied").sync_all().expect("synced");
        } else {
            self.mount.remount("size=20M");
        }
    }

    /// Everything but the ranges left out is the source's, and those are zero.
    fn assert_equal_but_for(&self, skipped: &Value) {
        let (source, target) =
            (fs::read(self.path("a")).expect("read"), fs::read(self.path("fs/b")).expect("read"));
        assert_eq!(source.len(), target.len());
        let mut expected = source;
        for range in skipped.as_array().expect("a list") {
            let number =
                |name: &str| usize::try_from(range[name].as_u64().expect("a number")).expect("small");
            expected[number("offset")..][..number("length")].fill(0);
        }
        assert!(expected == target, "equal but for {skipped}");
    }
}

fn reports_and_removes(small: &Small) {
    let output = copy(small.place(), &["a", "fs/b"]);
    let messages = stderr(&output);
    assert_eq!(code(&output), 1, "{messages}");
    assert!(
        messages.starts_with("engine-cli: fs/b: the copy takes about 12.0 MiB and there is room for "),
        "{messages}"
    );
    let error = error_line(&messages);
    assert!(error.contains("fs/b, bytes ") && error.contains("no space left on device (ENOSPC)"), "{error}");
    assert!(error.contains("; free some space"), "{error}");
    assert!(messages.contains("the partial file fs/b was removed"), "{messages}");
    assert!(!small.path("fs/b").exists());
}

fn stops_and_goes_on(small: &Small, policy: &str) {
    let arguments =
        ["copy", "--on-target-error", policy, "--progress", "json", "--json", "--force", "a", "fs/b"];
    let mut running = Running::program(small.place(), &arguments);
    let reason = running.expect("engine-cli: paused: ");
    assert!(reason.contains("fs/b, bytes ") && reason.contains("ENOSPC"), "{reason}");
    running.progress(|progress| progress["status"] == "paused");
    running.signal("CONT");
    running.expect("engine-cli: paused: ");
    small.make_room();
    running.signal("CONT");
    let (code, output, messages) = running.end();
    assert_eq!(code, 0, "{messages}");
    assert!(output.contains("\"result\":\"complete\""), "{output}");
    assert!(same(&small.path("a"), &small.path("fs/b")));
}

fn leaves_out_and_completes_later(small: &Small) {
    let arguments = ["--on-target-error", "ignore", "--map", "m", "a", "fs/b"];
    let object = json(small.place(), &arguments, 3);
    assert_eq!(object["result"], "complete_with_skipped");
    let skipped = object["skipped_bytes"].as_u64().expect("a number");
    assert_eq!(object["done"].as_u64().expect("a number") + skipped, LENGTH as u64);
    assert!((5 << 20..=8 << 20).contains(&skipped), "what there is room for is copied: {object}");
    small.assert_equal_but_for(&object["skipped"]);
    small.make_room();
    copied(small.place(), &arguments);
    assert!(same(&small.path("a"), &small.path("fs/b")));
    assert!(!small.path("m").exists());
}

#[test]
fn full_tmpfs_report() {
    let Some(small) = Small::tmpfs() else { return };
    reports_and_removes(&small);
}

#[test]
fn full_tmpfs_stop() {
    let Some(small) = Small::tmpfs() else { return };
    stops_and_goes_on(&small, "stop");
}

#[test]
fn full_tmpfs_auto() {
    let Some(small) = Small::tmpfs() else { return };
    stops_and_goes_on(&small, "auto");
}

#[test]
fn full_tmpfs_ignore() {
    let Some(small) = Small::tmpfs() else { return };
    leaves_out_and_completes_later(&small);
}

#[test]
fn full_xfs_report_then_enospc() {
    let Some(small) = Small::xfs() else { return };
    reports_and_removes(&small);
    stops_and_goes_on(&small, "enospc");
}

#[test]
fn full_xfs_ignore() {
    let Some(small) = Small::xfs() else { return };
    leaves_out_and_completes_later(&small);
}

#[test]
fn full_from_the_start() {
    let Some(small) = Small::tmpfs() else { return };
    fs::write(small.path("fs/ballast"), vec![1; 6 << 20]).expect("filled");
    let output = copy(small.place(), &["a", "fs/b"]);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert!(error_line(&stderr(&output)).contains("ENOSPC"), "{}", stderr(&output));
    assert!(!small.path("fs/b").exists());
}

#[test]
fn with_a_map_the_partial_file_is_kept_and_completed() {
    let Some(small) = Small::tmpfs() else { return };
    // Space is reserved 16 MiB ahead at first: the copy fails when it wants more.
    small.mount.remount("size=20M");
    dense(&small.path("a"), 40 * MIB, 0);
    let arguments = ["--map", "m", "a", "fs/b"];
    let output = copy(small.place(), &arguments);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert!(stderr(&output).contains("to go on where it stopped, repeat: "), "{}", stderr(&output));
    assert!(small.path("fs/b").exists() && small.path("m").exists());
    small.mount.remount("size=48M");
    let object = json(small.place(), &arguments, 0);
    assert!(object["resumed"].as_u64() > Some(1 << 20), "{object}");
    assert!(same(&small.path("a"), &small.path("fs/b")));
}

#[test]
fn a_map_on_a_full_file_system_is_told_and_costs_nothing_but_itself() {
    let Some(small) = Small::tmpfs() else { return };
    let output = copy(small.place(), &["--map", "fs/m", "a", "b"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    fs::remove_file(small.path("b")).expect("removed");
    fs::write(small.path("fs/ballast"), vec![1; 6 << 20]).expect("filled");
    // There is no room for its first version: nothing was promised, nothing is left, and a target that exists is as it was.
    fs::write(small.path("c"), "old").expect("written");
    for target in ["b", "c"] {
        let words = ["cannot write map file fs/m: no space left on device (ENOSPC)"];
        refused(small.place(), &["--force", "--map", "fs/m", "a", target], &words);
    }
    assert!(!small.path("b").exists() && !small.path("fs/m").exists());
    assert_eq!(fs::read_dir(small.path("fs")).expect("directory").count(), 1, "the ballast alone");
}

/// A copy of 24 MiB with the map `fs/m` that has begun and takes seconds.
fn with_map_in(small: &Small) -> Running {
    dense(&small.path("a"), 24 * MIB, 0);
    let arguments = ["copy", "--speed", "3M", "--map", "fs/m", "--progress", "json", "--json", "a", "b"];
    let mut running = Running::program(small.place(), &arguments);
    running.progress(|progress| progress["done"].as_u64() > Some(0));
    running
}

#[test]
fn a_map_that_cannot_be_written_any_more_is_told_at_once_and_what_a_repeat_starts_from() {
    let Some(small) = Small::tmpfs() else { return };
    let mut running = with_map_in(&small);
    fs::write(small.path("fs/ballast"), vec![1; 6 << 20]).expect_err("filled to the last page");
    let notice = running.expect("cannot write map file fs/m: no space left on device (ENOSPC)");
    assert!(notice.contains("a repeat would go on from 0 B of 24.0 MiB"), "{notice}");
    assert!(running.is_running(), "the copy goes on");
    running.signal("INT");
    let (code, output, messages) = running.end();
    assert_eq!(code, 130, "{messages}");
    assert!(output.contains("\"resumable\":true") && output.contains("\"resumable_bytes\":0"), "{output}");
    assert!(messages.contains("to go on from 0 B of 24.0 MiB, repeat: "), "{messages}");
    assert_eq!(messages.matches("cannot write map file").count(), 1, "{messages}");
    fs::remove_file(small.path("fs/ballast")).expect("removed");
    copied(small.place(), &["--map", "fs/m", "a", "b"]);
    assert!(same(&small.path("a"), &small.path("b")));
}

#[test]
fn a_map_that_is_gone_with_its_directory_promises_nothing() {
    let Some(small) = Small::tmpfs() else { return };
    fs::create_dir(small.path("maps")).expect("created");
    dense(&small.path("a"), 24 * MIB, 0);
    let arguments = ["copy", "--speed", "3M", "--map", "maps/m", "--progress", "json", "--json", "a", "b"];
    let mut running = Running::program(small.place(), &arguments);
    running.progress(|progress| progress["done"].as_u64() > Some(0));
    fs::remove_dir_all(small.path("maps")).expect("removed");
    running.signal("INT");
    let (code, output, messages) = running.end();
    assert_eq!(code, 130, "{messages}");
    assert!(
        messages.contains(
            "cannot write map file maps/m: no such file or directory (ENOENT); its directory was removed, and the map with it"
        ),
        "{messages}"
    );
    assert!(messages.contains("map file maps/m is gone"), "{messages}");
    assert!(output.contains("\"resumable\":false") && !messages.contains("repeat"), "{messages}");
    assert!(!small.path("b").exists(), "{messages}");
}

#[test]
fn a_map_that_another_run_has_put_there_is_left_alone() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 24 * MIB, 0);
    let arguments = ["copy", "--speed", "12M", "--map", "m", "--progress", "json", "a", "b"];
    let mut running = Running::program(place, &arguments);
    running.progress(|progress| progress["done"].as_u64() > Some(0));
    fs::write(place.join("other"), "of another run").expect("written");
    fs::rename(place.join("other"), place.join("m")).expect("renamed");
    let (code, _, messages) = running.end();
    assert_eq!(code, 0, "{messages}");
    assert!(messages.contains("map file m is another run's by now: it was left alone"), "{messages}");
    assert!(!messages.contains("map file removed") && !messages.contains("is gone"), "{messages}");
    assert_eq!(fs::read(place.join("m")).expect("there"), b"of another run");
}

#[test]
fn a_limit_on_file_sizes_in_the_middle() {
    if !has("prlimit") {
        return;
    }
    for (policy, expected) in [("report", 1), ("auto", 1), ("ignore", 3)] {
        let there = directory();
        dense(&there.path().join("a"), LENGTH, 0);
        let arguments =
            ["copy", "--on-target-error", policy, "--speed", "8M", "--progress", "json", "--json", "a", "b"];
        let mut running = Running::program(there.path(), &arguments);
        running.progress(|_| true);
        limit_file_size(running.id(), "11534336");
        let (code, output, messages) = running.end();
        assert_eq!(code, expected, "{policy}: {messages}");
        let object: Value = serde_json::from_str(&output).expect("JSON");
        if expected == 1 {
            assert!(error_line(&messages).contains("cannot write b, bytes 11"), "{messages}");
            assert!(error_line(&messages).contains("EFBIG); raise the limit"), "{messages}");
            assert!(!there.path().join("b").exists());
        } else {
            assert_eq!(object["skipped"][0]["offset"], 11_534_336, "{object}");
            assert_eq!(object["skipped_bytes"], LENGTH - 11_534_336, "{object}");
        }
    }
}
