//! A daemon, and a client of QMP, for the tests.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{PATIENCE, Running, heeding, program};

/// A client that has negotiated.
pub(crate) struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    pub(crate) greeting: Value,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connect to a socket that is there, or is about to be.
    pub(crate) fn connect(path: &Path) -> Self {
        let mut client = Self::greeted(path);
        client.ok("qmp_capabilities", json!({}));
        client
    }

    /// Connect, but negotiate nothing yet.
    pub(crate) fn greeted(path: &Path) -> Self {
        let mut client = Self::connected(path);
        client.greeting = client.receive().expect("a greeting");
        client
    }

    /// Connect to a socket that is there; `None`: the daemon does not answer as it should, for `patience` each time.
    pub(crate) fn try_connect(path: &Path, patience: Duration) -> Option<Self> {
        let mut client = Self::over(UnixStream::connect(path).ok()?);
        client.stream.set_read_timeout(Some(patience)).expect("set");
        client.greeting = client.try_receive().ok()??;
        for command in [&br#"{"execute":"qmp_capabilities"}"#[..], br#"{"execute":"query-version"}"#] {
            client.stream.write_all(command).ok()?;
            let reply = client.try_receive().ok()??;
            reply.get("return")?;
        }
        client.stream.set_read_timeout(Some(PATIENCE)).expect("set");
        Some(client)
    }

    fn connected(path: &Path) -> Self {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self::over(stream),
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let lines = BufReader::new(stream.try_clone().expect("cloned"));
        Self { stream, lines, greeting: Value::Null, events: VecDeque::new() }
    }

    /// The next message; `None`: the connection was closed.
    pub(crate) fn receive(&mut self) -> Option<Value> {
        self.try_receive().unwrap_or_else(|error| panic!("nothing comes: {error}"))
    }

    fn try_receive(&mut self) -> std::io::Result<Option<Value>> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(Some(serde_json::from_str(&line).expect("a value a line"))),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The next message, one that was kept for later first.
    pub(crate) fn pending_or_receive(&mut self) -> Option<Value> {
        self.events.pop_front().or_else(|| self.receive())
    }

    /// The next message of those that were kept for later.
    pub(crate) fn pending(&mut self) -> Option<Value> {
        self.events.pop_front()
    }

    /// Close the connection.
    pub(crate) fn hang_up(&mut self) {
        self.stream.shutdown(std::net::Shutdown::Both).expect("shut");
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sent");
    }

    /// Have a command carried out; the whole reply.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        self.send(request.to_string().as_bytes());
        loop {
            let message = self.receive().unwrap_or_else(|| panic!("closed before a reply to {command}"));
            if message.get("event").is_none() {
                return message;
            }
            self.events.push_back(message);
        }
    }

    #[track_caller]
    pub(crate) fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let mut reply = self.execute(command, arguments);
        assert!(reply.get("return").is_some(), "{command}: {reply}");
        reply["return"].take()
    }

    #[track_caller]
    pub(crate) fn refused(&mut self, command: &str, arguments: Value) -> String {
        let reply = self.execute(command, arguments);
        let text = reply["error"]["desc"].as_str();
        text.unwrap_or_else(|| panic!("{command} was not refused: {reply}")).to_owned()
    }

    /// The next event.
    #[track_caller]
    pub(crate) fn event(&mut self) -> Value {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        let event = self.receive().expect("an event");
        assert!(event.get("event").is_some(), "{event}");
        event
    }

    /// The states and the end of a job, up to the state `last`, in a word each.
    #[track_caller]
    pub(crate) fn until(&mut self, job: &str, last: &str) -> Vec<String> {
        let mut told = Vec::new();
        loop {
            let event = self.event();
            let data = &event["data"];
            if data["device"] != job && data["id"] != job {
                continue;
            }
            let word = match event["event"].as_str().expect("named") {
                "JOB_STATUS_CHANGE" => data["status"].as_str().expect("a state").to_owned(),
                name => name.to_owned(),
            };
            told.push(word.clone());
            if word == last {
                return told;
            }
        }
    }

    /// Add a raw node over a file.
    #[track_caller]
    pub(crate) fn add_file(&mut self, node: &str, path: &Path) {
        let file = json!({ "driver": "file", "filename": path.display().to_string() });
        self.ok("blockdev-add", json!({ "driver": "raw", "node-name": node, "file": file }));
    }
}

/// A daemon of ours, which ends with the test.
pub(crate) struct Daemon {
    pub(crate) running: Running,
    pub(crate) socket: PathBuf,
}

impl Daemon {
    /// Start one whose sockets are in `directory`, with more arguments.
    pub(crate) fn start(directory: &Path, more: &[&str]) -> Self {
        Self::start_with(directory, more, |_| {})
    }

    /// The same, with something done to its command line first.
    pub(crate) fn start_with(directory: &Path, more: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let socket = directory.join("qmp.sock");
        let mut command = heeding(program());
        command.arg("daemon").arg("--qmp").arg(format!("unix:{}", socket.display()));
        command.args(more).current_dir(directory).stdin(std::process::Stdio::null());
        change(&mut command);
        Self { running: Running::start(&mut command), socket }
    }

    pub(crate) fn client(&self) -> Qmp {
        Qmp::connect(&self.socket)
    }
}
