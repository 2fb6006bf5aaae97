//! Signals, pauses and the terminal: a first signal ends cleanly, a second at once; a pause is told and lifted.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{Running, dense, directory, program, run_in, same, stderr};

/// A copy that takes long enough to be interrupted.
fn slow(directory: &Path, options: &[&str]) -> Running {
    dense(&directory.join("a"), 64 << 20, 0);
    let slow = ["copy", "--speed", "4M", "--progress", "json", "a", "b"];
    let mut running = Running::program(directory, &[&slow, options].concat());
    running.expect("\"progress\"");
    running
}

#[test]
fn each_signal_has_its_exit_code_and_the_partial_file_goes() {
    for (signal, expected) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let there = directory();
        let running = slow(there.path(), &[]);
        running.signal(signal);
        let (code, output, messages) = running.end();
        assert_eq!(code, expected, "{messages}");
        assert!(output.is_empty());
        assert!(messages.contains(&format!("ended by SIG{signal} after ")), "{messages}");
        assert!(messages.contains("the partial file b was removed"), "{messages}");
        assert!(messages.contains("--map FILE"), "{messages}");
        assert!(!there.path().join("b").exists());
    }
}

#[test]
fn with_a_map_the_command_to_go_on_is_told_and_works() {
    let there = directory();
    let mut running = slow(there.path(), &["--map", "the map"]);
    let deadline = Instant::now() + support::PATIENCE;
    while !there.path().join("the map").exists() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(50));
    }
    assert!(running.is_running(), "no map came while the copy ran");
    running.signal("TERM");
    let (code, _, messages) = running.end();
    assert_eq!(code, 143, "{messages}");
    let line =
        messages.lines().find(|line| line.contains("to go on where it stopped, repeat: ")).expect("advice");
    let command = line.split_once("repeat: ").expect("a command").1.replace("--speed 4M ", "");
    assert!(command.contains("'the map'"), "{command}");
    let output =
        Command::new("sh").args(["-c", &command]).current_dir(there.path()).output().expect("sh runs");
    assert_eq!(output.status.code(), Some(0), "{command}: {}", stderr(&output));
    assert!(stderr(&output).contains("by earlier runs"), "{}", stderr(&output));
    assert!(same(&there.path().join("a"), &there.path().join("b")));
    assert!(!there.path().join("the map").exists(), "nothing is left to go on with");
}

#[test]
fn the_same_request_delivered_twice_is_one() {
    let there = directory();
    let running = slow(there.path(), &[]);
    running.signal("TERM");
    running.signal("TERM");
    let (code, _, messages) = running.end();
    assert_eq!(code, 143, "{messages}");
    assert!(messages.contains("ended by SIGTERM after "), "ended cleanly: {messages}");
}

#[test]
fn stop_and_continue_by_the_shell_do_no_harm() {
    let there = directory();
    dense(&there.path().join("a"), 8 << 20, 0);
    let mut running =
        Running::program(there.path(), &["copy", "--speed", "4M", "--progress", "json", "a", "b"]);
    running.expect("\"progress\"");
    running.signal("TSTP");
    thread::sleep(Duration::from_millis(300));
    running.signal("CONT");
    running.signal("CONT");
    let (code, _, messages) = running.end();
    assert_eq!(code, 0, "{messages}");
    assert!(same(&there.path().join("a"), &there.path().join("b")));
}

/// Limit the size of the files that the process may write, as a disk that fills up.
fn limit(id: u32, bytes: &str) {
    let status = Command::new("prlimit")
        .args(["--pid", &id.to_string(), &format!("--fsize={bytes}:")])
        .status()
        .expect("prlimit runs");
    assert!(status.success());
}

#[test]
fn policy_stop_pauses_tells_how_to_go_on_and_goes_on() {
    if !support::has("prlimit") {
        return;
    }
    let there = directory();
    dense(&there.path().join("a"), 24 << 20, 0);
    let arguments =
        ["copy", "--speed", "4M", "--on-target-error", "stop", "--progress", "json", "a", "b", "--json"];
    let mut running = Running::program(there.path(), &arguments);
    running.expect("\"progress\"");
    limit(running.id(), "4194304");
    let reason = running.expect("engine-cli: paused: ");
    assert!(reason.contains("EFBIG"), "{reason}");
    let advice = running.expect("kill -CONT");
    assert!(advice.contains(&format!("kill -CONT {}", running.id())), "{advice}");
    assert!(!advice.contains("Enter"), "there is no terminal: {advice}");
    // Nothing has changed: it pauses again, and says so again.
    running.signal("CONT");
    running.expect("engine-cli: paused: ");
    limit(running.id(), "unlimited");
    running.signal("CONT");
    let (code, output, messages) = running.end();
    assert_eq!(code, 0, "{messages}");
    assert!(output.contains("\"complete\""));
    assert!(same(&there.path().join("a"), &there.path().join("b")));
}

#[test]
fn a_paused_copy_can_be_interrupted() {
    if !support::has("prlimit") {
        return;
    }
    let there = directory();
    let mut running = slow(there.path(), &["--on-target-error", "stop"]);
    limit(running.id(), "4194304");
    running.expect("engine-cli: paused: ");
    running.signal("INT");
    assert_eq!(running.end().0, 130);
    assert!(!there.path().join("b").exists());
}

/// The program on a terminal of its own; what is written to its input is typed there.
fn on_a_terminal(directory: &Path, arguments: &str) -> Command {
    let mut command = support::heeding("script");
    command
        .args(["-qfec", &format!("exec {} {arguments}", program().display()), "/dev/null"])
        .current_dir(directory)
        .env("TERM", "xterm")
        .stdin(Stdio::piped());
    command
}

#[test]
fn bar_on_a_terminal() {
    if !support::has("script") {
        return;
    }
    let there = directory();
    dense(&there.path().join("a"), 6 << 20, 0);
    let output =
        on_a_terminal(there.path(), "copy --speed 4M a b").stdin(Stdio::null()).output().expect("runs");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in ["%, ", "of 6.0 MiB", "iB/s", " left", "engine-cli: copied 6.0 MiB"] {
        assert!(shown.contains(part), "{part} in {shown:?}");
    }
    let output = run_in(there.path(), &["copy", "--speed", "4M", "--force", "a", "b"]);
    assert_eq!(stderr(&output).lines().count(), 1, "no bar in a pipe: {}", stderr(&output));
}

#[test]
fn enter_on_the_terminal_lifts_a_pause() {
    use std::io::{Read, Write};
    if !support::has("script") || !support::has("prlimit") {
        return;
    }
    let there = directory();
    dense(&there.path().join("a"), 16 << 20, 0);
    let mut child = on_a_terminal(there.path(), "copy --speed 4M --on-target-error stop a b")
        .stdout(Stdio::piped())
        .spawn()
        .expect("script starts");
    let mut keyboard = child.stdin.take().expect("piped");
    let mut screen = child.stdout.take().expect("piped");
    let mut shown = String::new();
    let mut wait_for = |text: &str| {
        while !shown.contains(text) {
            let mut part = [0; 4096];
            let count = screen.read(&mut part).expect("read");
            assert_ne!(count, 0, "no {text:?} in {shown:?}");
            shown.push_str(&String::from_utf8_lossy(&part[..count]));
        }
    };
    wait_for("of 16.0 MiB");
    let id = child_of(child.id());
    limit(id, "4194304");
    wait_for("press Enter, or run: kill -CONT");
    limit(id, "unlimited");
    keyboard.write_all(b"\n").expect("typed");
    wait_for("engine-cli: copied 16.0 MiB");
    assert_eq!(child.wait().expect("waited").code(), Some(0));
    assert!(same(&there.path().join("a"), &there.path().join("b")));
}

/// The process that `parent` has started.
fn child_of(parent: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).expect("children");
    children.split_whitespace().next().and_then(|child| child.parse().ok()).expect("one child")
}
