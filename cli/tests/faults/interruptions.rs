//! Signals in the middle of a copy, with and without a map, and what the next run makes of it.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{Running, dense, directory, same};
use crate::{MIB, copied, json, refused};

const LENGTH: usize = 16 * MIB;

/// A copy that has begun to copy and takes seconds.
fn begun(place: &Path, options: &[&str]) -> Running {
    dense(&place.join("a"), LENGTH, 0);
    let slow = ["copy", "--speed", "4M", "--progress", "json", "--json", "a", "b"];
    let mut running = Running::program(place, &[&slow, options].concat());
    running.progress(|progress| progress["done"].as_u64() > Some(MIB as u64));
    running
}

#[test]
fn ended_by_a_signal_with_a_map_nothing_is_copied_twice() {
    for (signal, expected, options) in [
        ("INT", 130, &["--map", "m"][..]),
        ("TERM", 143, &["--map", "m", "--verify", "--io-engine", "threads"]),
    ] {
        let there = directory();
        let place = there.path();
        let running = begun(place, options);
        running.signal(signal);
        let (code, output, messages) = running.end();
        assert_eq!(code, expected, "{messages}");
        let ended: Value = serde_json::from_str(&output).expect("JSON");
        assert_eq!(ended["result"], "cancelled");
        assert_eq!(ended["signal"], format!("SIG{signal}"));
        assert_eq!(ended["resumable"], true);
        // With --verify what was not read back yet does not count: to end would take as long as to read it.
        let verify = options.contains(&"--verify");
        assert!(verify || ended["done"].as_u64() >= Some(MIB as u64), "{ended}");
        assert_eq!(fs::metadata(place.join("b")).expect("kept").len(), LENGTH as u64);
        let again = json(place, &[options, &["a", "b"]].concat(), 0);
        assert_eq!(again["resumed"], ended["done"], "the map holds everything that was called done");
        assert_eq!(again["verified"], verify);
        assert!(same(&place.join("a"), &place.join("b")));
        assert!(!place.join("m").exists());
    }
}

#[test]
fn interrupted_twice_with_a_map() {
    let there = directory();
    let place = there.path();
    let running = begun(place, &["--map", "m"]);
    running.signal("INT");
    assert_eq!(running.end().0, 130);
    let arguments = ["copy", "--speed", "4M", "--progress", "json", "--map", "m", "a", "b"];
    let mut running = Running::program(place, &arguments);
    let first = running.progress(|progress| progress["done"].as_u64() > progress["resumed"].as_u64());
    assert!(first["resumed"].as_u64() >= Some(MIB as u64), "{first}");
    running.signal("TERM");
    let (code, _, messages) = running.end();
    assert_eq!(code, 143, "{messages}");
    let again = json(place, &["--map", "m", "a", "b"], 0);
    assert!(again["resumed"].as_u64() > first["resumed"].as_u64(), "{again}");
    assert!(same(&place.join("a"), &place.join("b")));
}

#[test]
fn killed_without_a_map_the_partial_file_needs_force() {
    let there = directory();
    let place = there.path();
    assert!(begun(place, &[]).kill().0);
    refused(place, &["a", "b"], &["b", "exists", "--force"]);
    copied(place, &["--force", "a", "b"]);
    assert!(same(&place.join("a"), &place.join("b")));
}

#[test]
fn killed_with_a_map_the_next_run_goes_on_at_once() {
    for engine in ["io_uring", "threads"] {
        let there = directory();
        let place = there.path();
        let options = ["--map", "m", "--verify", "--io-engine", engine];
        assert!(begun(place, &options).kill().0);
        assert!(place.join("m").exists() && place.join("b").exists());
        // Whatever the kernel has not closed yet does not stand in its way.
        let again = json(place, &[&options[..], &["a", "b"]].concat(), 0);
        let told = again["notices"][0].as_str().expect("told");
        assert!(
            told.starts_with("going on from map file m: ") && told.contains(" of 16.0 MiB are done"),
            "{told}"
        );
        assert_eq!(again["done"], LENGTH);
        assert!(same(&place.join("a"), &place.join("b")));
        let names: Vec<_> =
            fs::read_dir(place).expect("directory").map(|entry| entry.expect("entry").file_name()).collect();
        assert_eq!(names.len(), 2, "the source and the copy alone: {names:?}");
    }
}

#[test]
fn an_existing_target_is_never_removed() {
    let there = directory();
    fs::write(there.path().join("b"), "old").expect("written");
    let running = begun(there.path(), &["--force"]);
    running.signal("INT");
    let (code, _, messages) = running.end();
    assert_eq!(code, 130);
    assert!(messages.contains("b is not a complete copy"), "{messages}");
    assert!(there.path().join("b").exists());
}
