//! Faults and bad input on the real program with real kernel faults: what is refused touches nothing, what fails says
//! where and what to do, what was interrupted goes on, and what succeeds is equal.
//!
//! Devices, mounts and other users take root's rights; a test that lacks them says `SKIPPED` and why.

#[path = "../support/kernel.rs"]
mod kernel;
#[path = "../support/mod.rs"]
mod support;

mod bad_maps;
mod daemon_locks;
mod engines;
mod interruptions;
mod kills;
mod lengths;
mod locks;
mod refusals;
mod source_faults;
mod target_faults;
mod together;
mod zeros;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use kernel::Look;
use support::{code, stderr};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Run `copy` with `arguments` in `directory`.
fn copy(directory: &Path, arguments: &[&str]) -> Output {
    support::run_in(directory, &[&["copy"], arguments].concat())
}

/// A copy that succeeds; gives its messages.
#[track_caller]
fn copied(directory: &Path, arguments: &[&str]) -> String {
    let output = copy(directory, arguments);
    assert_eq!(code(&output), 0, "{arguments:?}: {}", stderr(&output));
    stderr(&output)
}

/// A copy with `--json` that ends with `expected`; gives the object.
#[track_caller]
fn json(directory: &Path, arguments: &[&str], expected: i32) -> Value {
    let output = copy(directory, &[arguments, &["--json"]].concat());
    let object = support::json(&output);
    assert_eq!(code(&output), expected, "{arguments:?}: {object}");
    assert_eq!(object["exit_code"], expected);
    object
}

/// Refused in one line with all of `words`, with nothing in the directory changed.
#[track_caller]
fn refused(directory: &Path, arguments: &[&str], words: &[&str]) {
    let before = Look::at(directory);
    let output = copy(directory, arguments);
    assert_refused(&output, arguments, words);
    assert_eq!(Look::at(directory), before, "{arguments:?}: something was touched");
}

#[track_caller]
fn assert_refused(output: &Output, arguments: &[&str], words: &[&str]) {
    let messages = stderr(output);
    println!("{arguments:?}: {messages}");
    assert_eq!(code(output), 2, "{arguments:?}: {messages}");
    assert!(output.stdout.is_empty());
    let lines: Vec<_> = messages.lines().collect();
    // A mistake on the command line has a second line, which names the help.
    let usage = lines.len() == 2 && lines[1].contains("--help");
    assert!(lines.len() == 1 || usage, "{arguments:?}: {messages}");
    assert!(lines[0].starts_with("engine-cli: cannot ") || usage, "{arguments:?}: {messages}");
    assert!(lines[0].contains(';') || usage, "{arguments:?} says what to do: {messages}");
    for word in words {
        assert!(lines[0].contains(word), "{arguments:?}: {word:?} in {messages}");
    }
}

/// The line of the error that failed a copy, which is the first one that says `cannot`.
#[track_caller]
fn error_line(messages: &str) -> &str {
    messages.lines().find(|line| line.starts_with("engine-cli: cannot ")).expect(messages)
}

/// Whether the first bytes of two files are the same.
fn same_start(a: &Path, b: &Path, length: usize) -> bool {
    fs::read(a).expect("read")[..length] == fs::read(b).expect("read")[..length]
}

/// Limit the size of the files that a running process may write; `unlimited` lifts it.
fn limit_file_size(id: u32, bytes: &str) {
    let status = Command::new("prlimit")
        .args(["--pid", &id.to_string(), &format!("--fsize={bytes}:")])
        .status()
        .expect("prlimit runs");
    assert!(status.success());
}
