//! What programs read: one object on standard output, whatever happens; JSON lines on standard error.

mod support;

use std::time::Duration;

use serde_json::Value;
use support::{Running, code, dense, directory, json, run_in, sparse, stderr};

/// Every object of `copy` has these.
const FIELDS: [&str; 26] = [
    "command",
    "result",
    "source",
    "target",
    "map",
    "bytes",
    "done",
    "copied",
    "zeros",
    "holes",
    "uncovered",
    "resumed",
    "skipped_bytes",
    "skipped",
    "verified",
    "verified_bytes",
    "retries",
    "seconds",
    "rate",
    "engine",
    "resumable",
    "resumable_bytes",
    "signal",
    "notices",
    "error",
    "exit_code",
];

#[track_caller]
fn has_all_fields(object: &Value) {
    for field in FIELDS {
        assert!(object.get(field).is_some(), "{field} in {object}");
    }
}

#[test]
fn of_a_copy() {
    let there = directory();
    sparse(&there.path().join("a"), (64 << 20) + 5);
    let output = run_in(there.path(), &["copy", "--json", "--verify", "a", "b"]);
    let object = json(&output);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    has_all_fields(&object);
    assert_eq!(object["result"], "complete");
    assert_eq!(object["bytes"], (64 << 20) + 5);
    assert_eq!(object["done"], object["bytes"]);
    assert_eq!(object["verified"], true);
    assert_eq!(object["error"], Value::Null);
    assert_eq!(object["exit_code"], 0);
    let count = |field: &str| object[field].as_u64().expect("a number");
    let parts: u64 =
        ["copied", "zeros", "holes", "uncovered", "resumed"].iter().map(|field| count(field)).sum();
    assert_eq!(parts, count("bytes"), "{object}");
    assert!(["io_uring", "threads"].contains(&object["engine"].as_str().expect("a name")));
}

#[test]
fn of_a_refusal() {
    let there = directory();
    dense(&there.path().join("a"), 1000, 0);
    let output = run_in(there.path(), &["copy", "--json", "missing", "b"]);
    let object = json(&output);
    assert_eq!(code(&output), 2);
    has_all_fields(&object);
    assert_eq!(object["result"], "refused");
    assert_eq!(object["exit_code"], 2);
    assert_eq!(object["error"]["kind"], "not_found");
    assert_eq!(object["error"]["path"], "missing");
    assert_eq!(object["error"]["errno"], "ENOENT");
    let output = run_in(there.path(), &["copy", "--json", "a", "."]);
    assert_eq!(json(&output)["error"]["kind"], "not_a_disk");
}

#[test]
fn of_an_interruption() {
    let there = directory();
    dense(&there.path().join("a"), 32 << 20, 0);
    let arguments = ["copy", "--json", "--speed", "2M", "--progress", "json", "a", "b"];
    let mut running = Running::program(there.path(), &arguments);
    running.expect("\"progress\"");
    running.signal("INT");
    let (code, output, messages) = running.end();
    assert_eq!(code, 130, "{messages}");
    let object: Value = serde_json::from_str(&output).expect("one object");
    has_all_fields(&object);
    assert_eq!(object["result"], "cancelled");
    assert_eq!(object["signal"], "SIGINT");
    assert_eq!(object["exit_code"], 130);
}

#[test]
fn progress_lines_are_few_and_the_last_one_is_final() {
    let there = directory();
    dense(&there.path().join("a"), 6 << 20, 0);
    let output = run_in(there.path(), &["copy", "--speed", "3M", "--progress", "json", "a", "b"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let lines: Vec<Value> = stderr(&output)
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
        .filter(|line| line["event"] == "progress")
        .collect();
    let (last, others) = lines.split_last().expect("lines");
    assert_eq!(last["final"], true);
    assert_eq!(last["done"], 6 << 20);
    assert!(!others.is_empty() && others.iter().all(|line| line["final"] == false));
    let seconds = last["seconds"].as_f64().expect("a number");
    let most = 2 + (Duration::from_secs_f64(seconds).as_millis() / 500) as usize;
    assert!(lines.len() <= most, "{} lines in {seconds} s", lines.len());
    assert!(lines.windows(2).all(|pair| pair[0]["done"].as_u64() <= pair[1]["done"].as_u64()));
}

#[test]
fn messages_do_not_mix_with_the_object() {
    let there = directory();
    dense(&there.path().join("a"), 1000, 0);
    let output = run_in(there.path(), &["copy", "--json", "-vvv", "a", "b"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(json(&output)["result"], "complete");
}

/// Every line of standard error is an object with an event.
#[track_caller]
fn events(messages: &str) -> Vec<Value> {
    let line =
        |line: &str| serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let lines: Vec<Value> = messages.lines().map(line).collect();
    assert!(lines.iter().all(|line| line["event"].is_string()), "{messages}");
    lines
}

#[track_caller]
fn message(lines: &[Value], level: &str, text: &str) {
    let fits = |line: &&Value| {
        line["event"] == "message"
            && line["level"] == level
            && line["message"].as_str().expect("text").contains(text)
    };
    assert_eq!(lines.iter().filter(fits).count(), 1, "{level} {text:?} in {lines:#?}");
}

#[test]
fn with_json_progress_standard_error_is_json_whatever_happens() {
    let there = directory();
    dense(&there.path().join("a"), 1 << 20, 0);
    let lines = |arguments: &[&str], expected: i32| {
        let output = run_in(there.path(), arguments);
        assert_eq!(code(&output), expected, "{arguments:?}: {}", stderr(&output));
        events(&stderr(&output))
    };
    let copied = lines(&["copy", "--progress", "json", "-vvv", "a", "b"], 0);
    message(&copied, "notice", "copied 1.0 MiB in ");
    assert!(copied.iter().any(|line| line["event"] == "log" && line["message"].is_string()), "{copied:?}");
    assert!(copied.iter().any(|line| line["event"] == "progress" && line["final"] == true));
    message(&lines(&["copy", "--progress", "json", "a", "b"], 2), "error", "cannot open target b: it exists");
    message(
        &lines(&["copy", "--progress=json", "--bad", "a", "b"], 2),
        "error",
        "unexpected argument '--bad'",
    );
    message(&lines(&["copy", "--progress", "json", "--speed", "x", "a", "b"], 2), "notice", "--help");
    message(&lines(&["compare", "--progress", "json", "a", "missing"], 2), "error", "cannot open missing: ");
    lines(&["compare", "--progress", "json", "a", "b"], 0);
    message(
        &lines(&["demo", "--progress", "json", "--size", "1M", "--seconds", "0"], 2),
        "error",
        "out of range",
    );
    // Without it, they are for people.
    let people = run_in(there.path(), &["copy", "a", "b"]);
    assert!(stderr(&people).starts_with("engine-cli: cannot open target b"), "{}", stderr(&people));
}

#[test]
fn with_json_progress_a_failure_and_an_interruption_are_json_too() {
    let there = directory();
    dense(&there.path().join("a"), 8 << 20, 0);
    let arguments = ["copy", "--speed", "4M", "--progress", "json", "a", "b"];
    let child = support::heeding(support::program())
        .args(arguments)
        .current_dir(there.path())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("starts");
    std::thread::sleep(Duration::from_millis(700));
    let source = std::fs::File::options().write(true).open(there.path().join("a")).expect("open");
    source.set_len(1).expect("cut");
    let output = child.wait_with_output().expect("ended");
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    let lines = events(&stderr(&output));
    message(&lines, "error", "has become shorter");
    message(&lines, "notice", "b was removed");
}
