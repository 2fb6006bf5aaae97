//! What the tests of the program share: running it, making disks, reading its output.
#![allow(dead_code, reason = "every test program uses its own part of this")]

pub(crate) mod qmp;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take that should take a moment; generous, since test machines are busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The program.
pub(crate) fn program() -> PathBuf {
    assert_cmd::cargo::cargo_bin("engine-cli")
}

/// A command that heeds the signals which a test sends it. Under `nohup` or in the background of a script the tests themselves ignore
/// some, and what they start would too.
pub(crate) fn heeding(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP,INT,QUIT,TERM").arg(program);
    command
}

/// Run the program with `arguments` in `directory` to its end.
pub(crate) fn run_in(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(program())
        .args(arguments)
        .current_dir(directory)
        .env_remove("ENGINE_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the program runs")
}

/// Run the program with `arguments` to its end.
pub(crate) fn run(arguments: &[&str]) -> Output {
    run_in(Path::new("/"), arguments)
}

/// Standard output as text.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// Standard error as text.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

/// Exit code; fails the test when a signal ended the program.
pub(crate) fn code(output: &Output) -> i32 {
    exit_code(output.status, &stderr(output))
}

/// The same for a status alone.
pub(crate) fn exit_code(status: ExitStatus, messages: &str) -> i32 {
    assert_eq!(status.signal(), None, "killed by a signal: {messages}");
    let code = status.code().expect("exited");
    assert_ne!(code, 101, "panicked: {messages}");
    code
}

/// The only thing on standard output: one JSON object on one line.
pub(crate) fn json(output: &Output) -> Value {
    let text = stdout(output);
    assert_eq!(text.lines().count(), 1, "one line: {text:?}; {}", stderr(output));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert!(value.is_object());
    value
}

/// A directory for one test.
pub(crate) fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// A file of `length` bytes without zeros, different for each `seed`.
pub(crate) fn dense(path: &Path, length: usize, seed: u8) {
    let byte = |at: usize| u8::try_from((at / 7 + at / 4093) % 251).expect("below 251") ^ seed | 1;
    let bytes: Vec<u8> = (0..length).map(byte).collect();
    fs::write(path, bytes).expect("written");
}

/// A file of `length` bytes with 64 KiB of data every 4 MiB, one cluster of written zeros behind the first, and holes.
pub(crate) fn sparse(path: &Path, length: u64) {
    let mut file = File::create(path).expect("created");
    file.set_len(length).expect("set");
    for start in (0..length).step_by(4 << 20) {
        file.seek(SeekFrom::Start(start)).expect("sought");
        let room = usize::try_from((length - start).min(64 << 10)).expect("small");
        file.write_all(&vec![0xa5; room]).expect("written");
        if start == 0 && length > 256 << 10 {
            file.write_all(&[0; 128 << 10]).expect("written");
        }
    }
}

/// Whether two files hold the same bytes.
pub(crate) fn same(a: &Path, b: &Path) -> bool {
    let (mut a, mut b) = (File::open(a).expect("open"), File::open(b).expect("open"));
    if a.metadata().expect("stat").len() != b.metadata().expect("stat").len() {
        return false;
    }
    let (mut part_a, mut part_b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let count = a.read(&mut part_a).expect("read");
        if count == 0 {
            return true;
        }
        b.read_exact(&mut part_b[..count]).expect("read");
        if part_a[..count] != part_b[..count] {
            return false;
        }
    }
}

/// With `--progress json` messages are JSON too: as they would be without it.
fn as_people_read(line: String) -> String {
    let value: Option<Value> = serde_json::from_str(&line).ok();
    let message = value.filter(|value| value["event"] == "message");
    message.map_or(line, |value| format!("engine-cli: {}", value["message"].as_str().expect("text")))
}

/// The program at work, its messages as they come.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Running {
    /// Start `command` with its standard error and standard output watched.
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command
            .env_remove("ENGINE_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let messages = BufReader::new(child.stderr.take().expect("piped"));
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in messages.lines().map_while(Result::ok) {
                if sender.send(as_people_read(line)).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, seen: vec![] }
    }

    /// Start the program.
    pub(crate) fn program(directory: &Path, arguments: &[&str]) -> Self {
        Self::start(heeding(program()).args(arguments).current_dir(directory).stdin(Stdio::null()))
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Send a signal by name, as a user does.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.id().to_string()])
            .status()
            .expect("kill runs");
        assert!(status.success(), "kill -{name}");
    }

    /// Wait until it catches the signal of that name.
    pub(crate) fn wait_for_handler(&self, name: &str) {
        let number = match name {
            "HUP" => 1,
            "INT" => 2,
            "TERM" => 15,
            _ => panic!("SIG{name}"),
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("it runs");
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("a line of it");
            if u64::from_str_radix(caught.trim(), 16).expect("a mask") >> (number - 1) & 1 == 1 {
                return;
            }
            assert!(Instant::now() < deadline, "SIG{name} is not caught");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Wait for a message that contains `text`.
    pub(crate) fn expect(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(error) => {
                    self.child.kill().ok();
                    panic!("no message with {text:?} ({error}): {:#?}", self.seen);
                }
            }
        }
    }

    /// Wait for a line of `--progress json` that `fits`.
    pub(crate) fn progress(&mut self, fits: impl Fn(&Value) -> bool) -> Value {
        loop {
            let line = self.expect("\"event\":\"progress\"");
            let value: Value = serde_json::from_str(&line).expect("JSON");
            if fits(&value) {
                return value;
            }
        }
    }

    /// End it by SIGKILL, if it still runs; all messages, and whether the signal ended it.
    pub(crate) fn kill(mut self) -> (bool, Vec<String>) {
        self.child.kill().expect("killed");
        let status = self.child.wait().expect("waited");
        self.seen.extend(self.lines.iter());
        (status.signal() == Some(9), std::mem::take(&mut self.seen))
    }

    /// Whether it has not ended.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("waited").is_none()
    }

    /// Wait for the end: exit code, standard output, all messages.
    pub(crate) fn end(mut self) -> (i32, String, String) {
        let deadline = Instant::now() + PATIENCE;
        let mut output = String::new();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waited") {
                break status;
            }
            if Instant::now() > deadline {
                self.child.kill().ok();
                panic!("does not end: {:#?}", self.seen);
            }
            thread::sleep(Duration::from_millis(10));
        };
        self.child.stdout.take().expect("piped").read_to_string(&mut output).expect("text");
        self.seen.extend(self.lines.iter());
        let messages = self.seen.join("\n");
        (exit_code(status, &messages), output, messages)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail where it has ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Whether `tool` is installed; says so when the test is skipped for that.
pub(crate) fn has(tool: &str) -> bool {
    let found = Command::new(tool).arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}
