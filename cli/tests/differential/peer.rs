//! The two daemons behind one face, and what they said in a form that can be compared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::support::qmp::{Daemon, Qmp};
use crate::support::{PATIENCE, Running, directory, has, heeding};

/// Length of the disks, unless a script wants another.
pub(crate) const LENGTH: usize = 4 << 20;

/// Where exports are, beside the images.
const SOCKET: &str = "nbd.sock";

/// What the disk `s` holds at first: data without zeros.
pub(crate) fn contents(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from(at % 251).expect("small") | 1).collect()
}

/// Which daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Qemu,
    Ours,
}

/// A daemon with disks `s` (full of data), `t` and `u` (full of sevens) of one length and `small` of another, and what it has said so far.
pub(crate) struct Peer {
    pub(crate) which: Which,
    pub(crate) there: TempDir,
    running: Option<Running>,
    pub(crate) qmp: Qmp,
    replies: Vec<Value>,
    /// For each job, in order.
    events: BTreeMap<String, Vec<Value>>,
    /// Whether pauses are noted, and that they are over: where nobody but the script causes any.
    notes_pauses: bool,
}

/// What a script made a daemon say and do.
#[derive(Debug, PartialEq)]
pub(crate) struct Transcript {
    replies: Vec<Value>,
    events: BTreeMap<String, Vec<Value>>,
    images: BTreeMap<String, Vec<u8>>,
}

/// Run `script` against both daemons; they must tell the same.
#[track_caller]
pub(crate) fn compare(script: impl Fn(&mut Peer)) {
    compare_with(LENGTH, script);
}

/// The same with disks of another length.
#[track_caller]
pub(crate) fn compare_with(length: usize, script: impl Fn(&mut Peer)) {
    if !has("qemu-storage-daemon") {
        return;
    }
    let [theirs, ours] = [Which::Qemu, Which::Ours].map(|which| {
        let mut peer = Peer::start(which, length);
        script(&mut peer);
        peer.end(length)
    });
    assert_eq!(ours.replies, theirs.replies, "left is ours");
    assert_eq!(ours.events, theirs.events, "left is ours");
    for (name, image) in &ours.images {
        assert!(*image == theirs.images[name], "{name} differs");
    }
}

impl Peer {
    /// A daemon with its disks.
    pub(crate) fn start(which: Which, length: usize) -> Self {
        let there = directory();
        let (running, qmp) = match which {
            Which::Ours => {
                let daemon = Daemon::start(there.path(), &[]);
                let client = daemon.client();
                (daemon.running, client)
            }
            Which::Qemu => start_qemu(there.path()),
        };
        let events = BTreeMap::new();
        let (running, replies) = (Some(running), Vec::new());
        let mut peer = Self { which, there, running, qmp, replies, events, notes_pauses: false };
        let seven = vec![7; length];
        for (name, contents) in
            [("s", contents(length)), ("t", seven.clone()), ("u", seven), ("small", vec![7; 64 << 10])]
        {
            std::fs::write(peer.path(name), contents).expect("written");
            peer.add(name, json!({}));
        }
        peer.replies.clear();
        peer
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.there.path().join(name)
    }

    pub(crate) fn id(&self) -> u32 {
        self.running.as_ref().expect("it runs").id()
    }

    /// Add a raw node over the file of that name.
    pub(crate) fn add(&mut self, name: &str, more: Value) -> Value {
        let file = json!({ "driver": "file", "filename": self.path(name).display().to_string() });
        let mut node = json!({ "driver": "raw", "node-name": name, "file": file });
        extend(&mut node, more);
        self.say("blockdev-add", node)
    }

    /// Have a command carried out; the reply is noted.
    pub(crate) fn say(&mut self, command: &str, arguments: Value) -> Value {
        let reply = self.qmp.execute(command, arguments);
        let mut noted = normal(reply.clone());
        // What stands there is another directory for each.
        replace(&mut noted, &self.there.path().display().to_string());
        self.replies.push(json!({ command: noted }));
        reply
    }

    /// Serve a node for writing, under its own name.
    pub(crate) fn export(&mut self, node: &str) {
        let address = json!({ "type": "unix", "data": { "path": self.path(SOCKET) } });
        self.say("nbd-server-start", json!({ "addr": address }));
        let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": node, "writable": true });
        self.say("block-export-add", export);
    }

    /// A guest does what `commands` of `qemu-io` say to the export of a node, one after the other. What failed is noted.
    pub(crate) fn guest(&mut self, node: &str, commands: &[&str]) {
        let output = self.guest_command(node, commands).output().expect("it runs");
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).expect("text")).concat();
        assert!(matches!(output.status.code(), Some(0 | 1)), "{:?}, {commands:?}: {said}", self.which);
        let failed: Vec<&str> = said.lines().filter(|line| line.contains("ailed")).collect();
        assert!(output.status.success() || !failed.is_empty(), "{:?}, {commands:?}: {said}", self.which);
        self.replies.push(json!({ "guest": commands, "failed": failed }));
    }

    /// The program that does so; it gives up rather than hang.
    pub(crate) fn guest_command(&self, node: &str, commands: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["60", "qemu-io", "-f", "raw"]);
        command.args(commands.iter().flat_map(|command| ["-c", command]));
        command.arg(format!("nbd+unix:///{node}?socket={}", self.path(SOCKET).display()));
        command
    }

    /// How far a job says that it is, in bytes.
    pub(crate) fn offset(&mut self) -> u64 {
        self.qmp.ok("query-block-jobs", json!({}))[0]["offset"].as_u64().expect("a number")
    }

    /// Have something else compared as well.
    pub(crate) fn note_that(&mut self, what: &str, value: Value) {
        self.replies.push(json!({ what: value }));
    }

    /// `blockdev-backup` of `s`.
    pub(crate) fn backup(&mut self, id: &str, target: &str, more: Value) -> Value {
        self.say("blockdev-backup", backup(id, target, more))
    }

    /// Wait for an event of a job: a state that it enters, or the name of another event.
    #[track_caller]
    pub(crate) fn until(&mut self, job: &str, wanted: &str) {
        while !self.has(job, wanted) {
            let event = self.qmp.event();
            self.note(&event);
        }
    }

    fn has(&self, job: &str, wanted: &str) -> bool {
        let told = self.events.get(job).map(Vec::as_slice).unwrap_or_default();
        told.iter().any(|event| event["event"] == wanted || event["data"]["status"] == wanted)
    }

    /// What a job was told to have ended with: the data of its event.
    pub(crate) fn end_of(&self, job: &str) -> Value {
        let ended = |event: &&Value| {
            event["event"] == "BLOCK_JOB_COMPLETED" || event["event"] == "BLOCK_JOB_CANCELLED"
        };
        let told = self.events.get(job).and_then(|told| told.iter().find(ended));
        told.expect("it has ended")["data"].clone()
    }

    fn note(&mut self, event: &Value) {
        let data = &event["data"];
        let job = data["device"].as_str().or_else(|| data["id"].as_str()).expect("whose").to_owned();
        let told = self.events.entry(job).or_default();
        let event = normal_event(event);
        let status = event["data"]["status"].as_str();
        // A graph that changes pauses jobs; only the first time that it runs is the same.
        let goes_on = status == Some("running") && told.iter().any(|e| e["data"]["status"] == "running");
        let drained = !self.notes_pauses && (status == Some("paused") || goes_on);
        // Several workers meet the same error.
        let repeated = event["event"] == "BLOCK_JOB_ERROR" && told.last() == Some(&event);
        if !drained && !repeated {
            told.push(event);
        }
    }

    /// Note pauses from now on, or not any more. What has come so far is noted as before.
    pub(crate) fn note_pauses(&mut self, notes: bool) {
        while let Some(event) = self.qmp.pending() {
            self.note(&event);
        }
        self.notes_pauses = notes;
    }

    /// Wait until the last that was noted of a job is that it has entered a state.
    #[track_caller]
    pub(crate) fn until_it_is(&mut self, job: &str, status: &str) {
        let is = |told: &BTreeMap<String, Vec<Value>>| {
            told[job].last().is_some_and(|event| event["data"]["status"] == status)
        };
        while !is(&self.events) {
            let event = self.qmp.event();
            self.note(&event);
        }
    }

    /// The reply to a query without anything that depends on the moment, once `fits` likes it.
    #[track_caller]
    pub(crate) fn await_reply(&mut self, command: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let reply = self.qmp.ok(command, json!({}));
            if fits(&reply) {
                return reply;
            }
            assert!(Instant::now() < deadline, "{command}: {reply}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// End it, if the script has not; what it said, and what its images hold.
    fn end(mut self, length: usize) -> Transcript {
        let running = self.running.take().expect("it runs");
        if !self.replies.iter().any(|reply| reply.get("quit").is_some()) {
            self.qmp.send(br#"{"execute":"quit"}"#);
        }
        while let Some(message) = self.qmp.pending_or_receive() {
            if message.get("event").is_some() {
                self.note(&message);
            }
        }
        assert_eq!(running.end().0, 0, "{:?}", self.which);
        let image = |name: &str| {
            let mut bytes = std::fs::read(self.path(name)).expect("read");
            // QEMU makes a last sector whole.
            assert!(bytes.len() <= length.next_multiple_of(512).max(64 << 10), "{name}");
            bytes.resize(length.next_multiple_of(512).max(bytes.len()), 0);
            (name.to_owned(), bytes)
        };
        let images = ["s", "t", "u", "small"].map(image).into();
        Transcript { replies: self.replies, events: self.events, images }
    }
}

/// The arguments of a backup of `s`.
pub(crate) fn backup(id: &str, target: &str, more: Value) -> Value {
    let mut arguments = json!({ "job-id": id, "device": "s", "target": target, "sync": "full" });
    extend(&mut arguments, more);
    arguments
}

/// An action of a transaction.
pub(crate) fn action(id: &str, target: &str, more: Value) -> Value {
    json!({ "type": "blockdev-backup", "data": backup(id, target, more) })
}

fn extend(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

/// Times that `qemu-storage-daemon` is started before it is given up.
const STARTS: usize = 10;

/// It may greet its first client twice, and forget what was negotiated between, where that one comes before its monitor's thread has
/// settled; and it may crash where a client leaves at that moment. So it is met once it has said that it is up, and started anew if
/// it stumbles all the same.
fn start_qemu(there: &Path) -> (Running, Qmp) {
    let (socket, pid) = (there.join("qmp.sock"), there.join("pid"));
    let chardev = format!("socket,id=qmp,path={},server=on,wait=off", socket.display());
    // A write beyond a limit is to fail, not to kill.
    let program = format!("exec qemu-storage-daemon --chardev {chardev} --monitor chardev=qmp --pidfile pid");
    for _ in 0..STARTS {
        let mut command: Command = heeding("sh");
        command.args(["-c", &format!("trap '' XFSZ; {program}")]).current_dir(there).stdin(Stdio::null());
        let mut running = Running::start(&mut command);
        let deadline = Instant::now() + PATIENCE;
        while !pid.exists() && running.is_running() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Some(client) = Qmp::try_connect(&socket, Duration::from_secs(5)) {
            return (running, client);
        }
        running.kill();
        for left in [&socket, &pid] {
            std::fs::remove_file(left).ok();
        }
    }
    panic!("qemu-storage-daemon does not answer");
}

/// A reply without what is different on purpose, or by the moment.
pub(crate) fn normal(mut value: Value) -> Value {
    strip(&mut value);
    value
}

fn strip(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(strip),
        Value::Object(members) => {
            members.retain(|name, _| !name.starts_with("x-") && name != "busy" && name != "timestamp");
            strip_progress(members);
            members.values_mut().for_each(strip);
        }
        _ => {}
    }
}

/// How far a job is that is at work, or was stopped, depends on the moment.
fn strip_progress(members: &mut Map<String, Value>) {
    let stopped = members.get("error").is_some_and(Value::is_string);
    let at_work = matches!(members.get("status").and_then(Value::as_str), Some("running" | "paused"));
    if at_work || stopped {
        members.remove("offset");
        members.remove("current-progress");
    }
    if at_work && members.contains_key("type") {
        // It may have been paused for a moment.
        members.remove("status");
    }
}

fn normal_event(event: &Value) -> Value {
    let mut event = normal(event.clone());
    let name = event["event"].as_str().unwrap_or_default().to_owned();
    if let Some(data) = event["data"].as_object_mut()
        && name == "BLOCK_JOB_CANCELLED"
        && data.get("offset") != data.get("len")
    {
        data.remove("offset");
    }
    event
}

fn replace(value: &mut Value, directory: &str) {
    match value {
        Value::String(text) => *text = text.replace(directory, "THERE"),
        Value::Array(values) => values.iter_mut().for_each(|value| replace(value, directory)),
        Value::Object(members) => members.values_mut().for_each(|value| replace(value, directory)),
        _ => {}
    }
}
