//! The style of messages: what a person reads of typical mistakes and failures, looked through for what should not be there.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use support::{code, dense, directory, program, run_in, stderr};

/// One message a line, each with the program's name, and none of what betrays an error that was passed on as it came.
#[track_caller]
fn look_through(arguments: &[&str], messages: &str) {
    for line in messages.lines() {
        let text = line.strip_prefix("engine-cli: ").unwrap_or_else(|| panic!("{arguments:?}: {line}"));
        for bad in ["os error", "::", "  ", ";;", "; ;", ". ", "Error", "Os {", "Some(", "kind:", "failed to"]
        {
            assert!(
                !text.replace("e.g. ", "").replace("engine::copy=trace", "").contains(bad),
                "{arguments:?}: {bad:?} in {line}"
            );
        }
        assert!(!text.ends_with(['.', ':', ';', ' ']), "{arguments:?}: {line}");
        let first = text.chars().next().expect("it says something");
        assert!(!first.is_uppercase() || text.starts_with("SIG"), "{arguments:?}: {line}");
        // What the system said stands there once, with its name behind.
        for (said, named) in
            [("o such file", "ENOENT"), ("o space left", "ENOSPC"), ("ermission denied", "EACCES")]
        {
            assert!(!text.contains(said) || text.matches(named).count() == 1, "{arguments:?}: {line}");
        }
        // No piece of advice twice.
        let parts: Vec<&str> = text.split("; ").collect();
        assert!((1..parts.len()).all(|at| !parts[..at].contains(&parts[at])), "{arguments:?}: {line}");
    }
}

#[track_caller]
fn refused(there: &Path, arguments: &[&str]) {
    let output = run_in(there, arguments);
    assert_eq!(code(&output), 2, "{arguments:?}: {}", stderr(&output));
    look_through(arguments, &stderr(&output));
}

#[test]
fn refusals_read_alike() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 100_000, 0);
    dense(&place.join("b"), 10, 0);
    fs::write(place.join("junk"), "no map").expect("written");
    fs::create_dir(place.join("d")).expect("created");
    std::os::unix::fs::symlink("nowhere", place.join("link")).expect("linked");
    for rest in [
        &["missing", "c"][..],
        &["a", "b"],
        &["a", "a"],
        &["a", "d"],
        &["d", "c"],
        &["a", "nowhere/c"],
        &["a", "link"],
        &["a", "-"],
        &["", "c"],
        &["null:", "c"],
        &["null:0x", "c"],
        &["null:1.5", "c"],
        &["null:64K", "null:4K"],
        &["a", "null:", "--verify"],
        &["a", "null:", "--map", "m"],
        &["/dev/null", "c"],
        &["a", "/dev/null"],
        &["a", "/dev/no-such-disk"],
        &["nbds://host/x", "c"],
        &["nbd://host/x?y", "c"],
        &["nbd+unix:///x?socket=nowhere", "c"],
        &["a", "nbd+unix:///x?socket=a"],
        &["http://host/x", "c"],
        &["a", "c", "--map", "junk"],
        &["a", "c", "--map", "d"],
        &["a", "c", "--map", "a"],
        &["a", "c", "--map", "nowhere/m"],
        &["a", "c", "--map", "/proc/m"],
        &["a", "c", "--source-format", "qcow2"],
        &["a", "c", "--cluster-size", "3K"],
        &["a", "c", "--cluster-size", "8M"],
        &["a", "c", "--cluster-size", "x"],
        &["a", "c", "--queue-depth", "0"],
        &["a", "c", "--queue-depth", "100000"],
        &["a", "c", "--speed", "0"],
        &["a", "c", "--speed", "-1"],
        &["a", "c", "--sync", "none"],
        &["a", "c", "--log", "a=b=c"],
        &["a", "c", "d"],
        &["a"],
        &["a\nb", "c"],
    ] {
        refused(place, &[&["copy"], rest].concat());
    }
    for arguments in [
        &["info", "missing"][..],
        &["info", "null:"],
        &["info", "d"],
        &["info", "/dev/null"],
        &["info", "nbd+unix:///x?socket=nowhere"],
        &["compare", "a", "missing"],
        &["compare", "a", "d"],
        &["compare", "null:", "a"],
        &["demo", "--size", "3"],
        &["demo", "--size", "0x"],
        &["demo", "--seconds", "0"],
        &["frob"],
        &[],
    ] {
        refused(place, arguments);
    }
}

#[test]
fn failures_and_successes_read_alike() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 100_000, 0);
    for (arguments, expected) in [
        (&["copy", "a", "b", "--map", "m"][..], 0),
        (&["copy", "a", "c\u{1b}[31m\nd", "--io-engine", "threads"], 0),
        (&["man", "/proc/x"], 1),
        (&["man", "man"], 0),
    ] {
        let output = run_in(place, arguments);
        assert_eq!(code(&output), expected, "{arguments:?}: {}", stderr(&output));
        look_through(arguments, &stderr(&output));
    }
    for arguments in [&["copy", "a", "e", "--json"][..], &["compare", "a", "b"], &["info", "a"], &["--help"]]
    {
        let full = fs::File::options().write(true).open("/dev/full").expect("open");
        let output = Command::new(program())
            .args(arguments)
            .current_dir(place)
            .stdout(Stdio::from(full))
            .output()
            .expect("runs");
        assert_eq!(code(&output), 1, "{arguments:?}: {}", stderr(&output));
        assert!(
            stderr(&output).contains("cannot write to standard output: no space left on device (ENOSPC)")
        );
        look_through(arguments, &stderr(&output));
    }
}
