//! Copies at the same time, and right after each other.

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::kernel::{LoopDevice, is_root};
use crate::support::{Running, code, dense, directory, same, stderr};
use crate::{MIB, assert_refused, copied, copy};

/// A copy that has begun to copy and takes seconds.
fn begun(place: &Path, arguments: &[&str]) -> Running {
    let slow = ["copy", "--speed", "512K", "--progress", "json", "--map", "m"];
    let mut running = Running::program(place, &[&slow, arguments].concat());
    running.progress(|progress| progress["done"].as_u64() > Some(0));
    running
}

/// The slow copy is interrupted, and goes on at full speed.
#[track_caller]
fn ends_well(place: &Path, first: Running, arguments: &[&str]) {
    first.signal("INT");
    let (code, _, messages) = first.end();
    assert_eq!(code, 130, "{messages}");
    let messages = copied(place, arguments);
    assert!(messages.contains("by earlier runs"), "{messages}");
}

#[track_caller]
fn second_is_refused(place: &Path, arguments: &[&str], words: &[&str]) {
    let names = || fs::read_dir(place).expect("directory").count();
    let before = names();
    assert_refused(&copy(place, arguments), arguments, words);
    assert_eq!(names(), before);
}

#[test]
fn one_target_has_one_copy() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 12 * MIB, 0);
    dense(&place.join("a2"), 12 * MIB, 5);
    let mut first = begun(place, &["a", "b"]);
    second_is_refused(place, &["--force", "a2", "b"], &["open target b", "another copy", "wait until"]);
    second_is_refused(
        place,
        &["--map", "m", "a", "b"],
        &["map file m", "another copy is using it", "wait until"],
    );
    second_is_refused(place, &["--map", "m", "a2", "b2"], &["map file m", "another copy is using it"]);
    second_is_refused(place, &["b", "c"], &["open source b", "another copy is writing to it", "wait until"]);
    second_is_refused(place, &["--force", "a2", "a"], &["open target a", "locked"]);
    // Reading a source twice is fine.
    copied(place, &["a", "b2"]);
    assert!(first.is_running(), "it was there all the time");
    ends_well(place, first, &["--map", "m", "a", "b"]);
    assert!(same(&place.join("a"), &place.join("b")) && same(&place.join("a"), &place.join("b2")));
}

#[test]
fn one_device_has_one_copy() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 12 * MIB, 0);
    dense(&place.join("disk"), 12 * MIB, 3);
    let device = LoopDevice::over(&place.join("disk"));
    let mut first = begun(place, &["a", device.text()]);
    second_is_refused(place, &["a", device.text()], &[device.text(), "in use", "lsblk"]);
    second_is_refused(place, &["--force", "a", "disk"], &["open target disk", device.text(), "attached"]);
    assert!(first.is_running(), "it was there all the time");
    ends_well(place, first, &["--map", "m", "a", device.text()]);
    assert!(same(&place.join("a"), &place.join("disk")));
}

#[test]
fn both_disks_are_free_when_the_program_has_ended() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), MIB, 0);
    for engine in ["io_uring", "threads"] {
        for _ in 0..5 {
            let started = std::time::Instant::now();
            let output = copy(place, &["--force", "--io-engine", engine, "a", "b"]);
            assert_eq!(code(&output), 0, "{}", stderr(&output));
            let output = copy(place, &["--force", "--io-engine", engine, "b", "a2"]);
            assert_eq!(code(&output), 0, "{}", stderr(&output));
            println!("two copies in {:?}", started.elapsed());
        }
    }
    if !is_root() {
        return;
    }
    let device = LoopDevice::over(&place.join("a2"));
    for engine in ["io_uring", "threads"] {
        for _ in 0..5 {
            copied(place, &["--io-engine", engine, "a", device.text()]);
            let claimed = File::options().write(true).custom_flags(0o200).open(device.path());
            assert!(claimed.is_ok(), "{engine}: mounting it would fail: {claimed:?}");
        }
    }
}
