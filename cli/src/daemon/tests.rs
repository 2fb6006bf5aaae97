//! Commands on a control with a real engine and an NBD server that only keeps books.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use engine::live::{Engine, EngineOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::Signals;
use super::control::Control;
use super::errands::{Carried, MAX_ERRANDS, Purpose};
use super::exports::{ExportOptions, Exported, Exports, Gone, NbdOptions, StillInUse};
use super::listen::Listener;
use super::mailbox::Happening;
use super::monitors::Monitors;
use super::nodes::NodeOptions;
use crate::qmp::QmpError;

mod limits;
mod options;
mod starting;
mod turns;

const LENGTH: usize = 1 << 20;

/// What the books say.
#[derive(Default)]
struct Books {
    listener: Option<Listener>,
    /// Name, whether clients may write, whether a client is connected, and whom to tell when it is gone.
    exports: Vec<(String, bool, bool, Option<Gone>)>,
    /// What is removed takes its time to go.
    slow: bool,
    most_connections: u32,
}

#[derive(Clone, Default)]
struct Bookkeeper(Rc<RefCell<Books>>);

struct Entry(Bookkeeper, String);

impl Exported for Entry {
    fn remove(&self, hard: bool) -> Result<(), StillInUse> {
        let mut books = self.0.0.borrow_mut();
        let books = &mut *books;
        let entry = books.exports.iter_mut().find(|(name, ..)| *name == self.1).expect("in the books");
        if entry.2 && !hard {
            return Err(StillInUse);
        }
        let gone = if books.slow { None } else { Some(entry.3.take().expect("removed once")) };
        gone.into_iter().for_each(|gone| gone());
        Ok(())
    }
}

impl Exports for Bookkeeper {
    fn start(&mut self, listener: Listener, options: &NbdOptions) -> Result<(), String> {
        let mut books = self.0.borrow_mut();
        (books.listener, books.most_connections) = (Some(listener), options.max_connections);
        Ok(())
    }

    fn open(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn add(&mut self, export: ExportOptions, gone: Gone) -> Result<Box<dyn Exported>, String> {
        self.0.borrow_mut().exports.push((export.name.clone(), export.writable, false, Some(gone)));
        Ok(Box::new(Entry(self.clone(), export.name)))
    }

    fn stop(&mut self) {
        let mut books = self.0.borrow_mut();
        books.listener = None;
        books.exports.iter_mut().filter_map(|entry| entry.3.take()).for_each(|gone| gone());
    }
}

struct Fixture {
    there: TempDir,
    control: Control,
    books: Bookkeeper,
    events: Vec<Value>,
}

impl Fixture {
    /// Nodes s, t, u of one length and small of another, each a raw node over a file.
    fn new() -> Self {
        let there = tempfile::tempdir().expect("a directory");
        let engine = Engine::start(&EngineOptions::default()).expect("an engine");
        let books = Bookkeeper::default();
        let control = Control::new(engine, Box::new(books.clone()), 40).expect("a control");
        let mut fixture = Self { there, control, books, events: Vec::new() };
        for (name, length, byte) in
            [("s", LENGTH, 7), ("t", LENGTH, 0), ("u", LENGTH, 0), ("small", LENGTH / 2, 0)]
        {
            let path = fixture.there.path().join(name);
            std::fs::write(&path, vec![byte; length]).expect("written");
            let file = json!({ "driver": "file", "filename": path.display().to_string() });
            fixture.ok("blockdev-add", json!({ "driver": "raw", "node-name": name, "file": file }));
        }
        fixture
    }

    fn run(&mut self, command: &str, arguments: Value) -> Result<Value, (String, String)> {
        let arguments = arguments.as_object().expect("an object").clone();
        let begun = self.control.execute(command, &arguments);
        let done = begun.and_then(|carried| self.control.finish(carried));
        self.events.extend(self.control.take_events());
        done.map_err(|error| (error.class.as_str().to_owned(), error.text))
    }

    #[track_caller]
    fn ok(&mut self, command: &str, arguments: Value) -> Value {
        self.run(command, arguments).expect(command)
    }

    #[track_caller]
    fn refused(&mut self, command: &str, arguments: Value, text: &str) {
        let told = self.run(command, arguments.clone());
        assert_eq!(told, Err(("GenericError".into(), text.into())), "{command} {arguments}");
    }

    fn backup(id: &str, target: &str, more: Value) -> Value {
        let mut arguments = json!({ "job-id": id, "device": "s", "target": target, "sync": "full" });
        arguments.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        arguments
    }

    /// Wait until an event like this has come; everything up to then, short.
    #[track_caller]
    fn until(&mut self, wanted: &str) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let told: Vec<String> = self.events.iter().map(short).collect();
            if told.iter().any(|event| event == wanted) {
                self.events.clear();
                return told;
            }
            assert!(Instant::now() < deadline, "{wanted} does not come after {told:?}");
            self.control.look_into_mailbox();
            self.events.extend(self.control.take_events());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn contents(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.there.path().join(name)).expect("read")
    }
}

/// An event in a few words.
fn short(event: &Value) -> String {
    let data = &event["data"];
    let id = data["id"].as_str().or_else(|| data["device"].as_str()).expect("whose");
    match event["event"].as_str().expect("named") {
        "JOB_STATUS_CHANGE" => format!("{id} {}", data["status"].as_str().expect("a status")),
        name => format!("{id} {name}{}", if data["error"].is_null() { "" } else { " error" }),
    }
}

#[test]
fn a_backup_from_its_start_to_its_end() {
    let mut fixture = Fixture::new();
    fixture.ok("blockdev-backup", Fixture::backup("j", "t", json!({})));
    let told = fixture.until("j null");
    let wanted = [
        "j created",
        "j running",
        "j waiting",
        "j pending",
        "j BLOCK_JOB_COMPLETED",
        "j concluded",
        "j null",
    ];
    assert_eq!(told, wanted);
    assert!(fixture.contents("t") == fixture.contents("s"));
    assert_eq!(fixture.ok("query-jobs", json!({})), json!([]));
    // The disks are free again, and the target may be the source of the next.
    let back = json!({ "job-id": "j", "device": "t", "target": "u", "sync": "full" });
    fixture.ok("blockdev-backup", back);
    fixture.until("j null");
    assert!(fixture.contents("u") == fixture.contents("s"));
}

#[test]
fn without_the_automatics_a_job_waits_to_be_told() {
    let mut fixture = Fixture::new();
    let manual = json!({ "auto-finalize": false, "auto-dismiss": false });
    fixture.ok("blockdev-backup", Fixture::backup("j", "t", manual));
    let told = fixture.until("j BLOCK_JOB_PENDING");
    assert_eq!(told[told.len() - 2..], ["j pending", "j BLOCK_JOB_PENDING"]);
    let state =
        |verb: &str, state: &str| format!("Job 'j' in state '{state}' cannot accept command verb '{verb}'");
    let id = || json!({ "id": "j" });
    fixture.refused("job-dismiss", id(), &state("dismiss", "pending"));
    fixture.refused("job-pause", id(), &state("pause", "pending"));
    fixture.refused("job-complete", id(), &state("complete", "pending"));
    fixture.refused("job-resume", id(), "Can't resume a job that was not paused");
    fixture.refused(
        "block-job-set-speed",
        json!({ "device": "j", "speed": 1 }),
        &state("set-speed", "pending"),
    );
    fixture.ok("job-finalize", id());
    assert_eq!(fixture.until("j concluded"), ["j BLOCK_JOB_COMPLETED", "j concluded"]);
    fixture.refused("block-job-finalize", id(), &state("finalize", "concluded"));
    fixture.refused("job-cancel", id(), &state("cancel", "concluded"));
    let job = &fixture.ok("query-block-jobs", json!({}))[0];
    assert_eq!(
        (&job["status"], &job["offset"], &job["len"]),
        (&json!("concluded"), &json!(LENGTH), &json!(LENGTH))
    );
    // Its disks are free, its id is not.
    fixture.refused("blockdev-backup", Fixture::backup("j", "t", json!({})), "Job ID 'j' already in use");
    fixture.ok("blockdev-del", json!({ "node-name": "t" }));
    fixture.ok("block-job-dismiss", id());
    assert_eq!(fixture.until("j null"), ["j null"]);
}

#[test]
fn what_is_refused_changes_nothing() {
    let mut fixture = Fixture::new();
    let job = Fixture::backup;
    for (arguments, text) in [
        (
            json!({ "job-id": "j", "device": "none", "target": "t", "sync": "full" }),
            "Cannot find device='none' nor node-name='none'",
        ),
        (job("j", "none", json!({})), "Cannot find device='none' nor node-name='none'"),
        (job("j", "s", json!({})), "Source and target cannot be the same"),
        (job("j", "small", json!({})), "Source and target image have different sizes"),
        (job("1", "t", json!({})), "Invalid job ID '1'"),
        (json!({ "device": "s", "target": "t", "sync": "full" }), "Invalid job ID ''"),
        (
            job("j", "t", json!({ "filter-node-name": "1x" })),
            "Could not create node: Invalid node-name: '1x'",
        ),
        (
            job("j", "t", json!({ "filter-node-name": "u" })),
            "Could not create node: Duplicate nodes with node-name='u'",
        ),
        (job("j", "t", json!({ "sync": "incremental" })), "Parameter 'sync': 'incremental' is not supported"),
    ] {
        fixture.refused("blockdev-backup", arguments, text);
    }
    assert!(fixture.events.is_empty(), "{:?}", fixture.events);
    let text = "Parameter 'speed' expects a non-negative value";
    fixture.refused("blockdev-backup", job("j", "t", json!({ "speed": -1 })), text);
    assert_eq!(fixture.until("j null"), ["j created", "j null"]);
    for command in ["job-pause", "job-resume", "job-cancel", "job-finalize", "job-dismiss", "job-complete"] {
        fixture.refused(command, json!({ "id": "none" }), "Job not found");
    }
    let told = fixture.run("block-job-pause", json!({ "device": "none" }));
    assert_eq!(told, Err(("DeviceNotActive".into(), "Block job 'none' not found".into())));
    let told = fixture.run("frobnicate", json!({}));
    assert_eq!(told, Err(("CommandNotFound".into(), "The command frobnicate has not been found".into())));
    assert_eq!(fixture.contents("t"), vec![0; LENGTH]);
}

#[test]
fn a_slow_job_is_steered() {
    let mut fixture = Fixture::new();
    let slow = || json!({ "speed": 65536, "filter-node-name": "filter" });
    fixture.ok("blockdev-backup", Fixture::backup("j", "t", slow()));
    let busy = "Node 't' is busy: block device is in use by block job: backup";
    fixture.refused("blockdev-backup", Fixture::backup("k", "t", json!({})), busy);
    fixture.refused("blockdev-del", json!({ "node-name": "t" }), busy);
    fixture.refused("blockdev-del", json!({ "node-name": "s" }), "Block device s is in use");
    let from_target = json!({ "job-id": "k", "device": "t", "target": "u", "sync": "full" });
    fixture.refused("blockdev-backup", from_target, busy);
    let nodes = fixture.ok("query-named-block-nodes", json!({})).to_string();
    assert!(nodes.contains("copy-before-write"), "{nodes}");
    fixture.refused("blockdev-del", json!({ "node-name": "filter" }), "Node filter is in use");

    let device = || json!({ "device": "j" });
    fixture.ok("block-job-pause", device());
    assert_eq!(fixture.ok("query-block-jobs", json!({}))[0]["paused"], true);
    fixture.refused("job-pause", json!({ "id": "j" }), "Job is already paused");
    fixture.refused("block-job-cancel", device(), "The block job for device 'j' is currently paused");
    let before = fixture.ok("query-block-jobs", json!({}))[0]["offset"].clone();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(fixture.ok("query-block-jobs", json!({}))[0]["offset"], before);
    fixture.ok("job-resume", json!({ "id": "j" }));
    fixture.refused("job-resume", json!({ "id": "j" }), "Can't resume a job that was not paused");
    let speed = |speed: i64| json!({ "device": "j", "speed": speed });
    fixture.refused("block-job-set-speed", speed(-1), "Parameter 'speed' expects a non-negative value");
    fixture.ok("block-job-set-speed", speed(131_072));
    assert_eq!(fixture.ok("query-block-jobs", json!({}))[0]["speed"], 131_072);
    fixture.events.clear();
    fixture.ok("job-pause", json!({ "id": "j" }));
    fixture.ok("block-job-cancel", json!({ "device": "j", "force": true }));
    let told = fixture.until("j null");
    assert_eq!(told[told.len() - 4..], ["j aborting", "j BLOCK_JOB_CANCELLED", "j concluded", "j null"]);
    let nodes = fixture.ok("query-named-block-nodes", json!({})).to_string();
    assert!(!nodes.contains("copy-before-write"), "{nodes}");
}

#[test]
fn a_filter_goes_with_its_job_and_leaves_nothing_in_the_air() {
    let mut fixture = Fixture::new();
    let slow = json!({ "speed": 65536, "filter-node-name": "filter" });
    fixture.ok("blockdev-backup", Fixture::backup("j", "t", slow));
    let over = json!({ "driver": "raw", "node-name": "over", "file": "filter" });
    let busy = "Node 'filter' is busy: block device is in use by block job: backup";
    fixture.refused("blockdev-add", over, busy);
    let socket = fixture.there.path().join("nbd.sock").display().to_string();
    fixture.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } }));
    fixture.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "filter" }));
    fixture.ok("job-cancel", json!({ "id": "j" }));
    fixture.until("j null");
    let nodes = fixture.ok("query-named-block-nodes", json!({}));
    assert_eq!(nodes.as_array().map(Vec::len), Some(8), "{nodes}");
    // Its export is the disk's, whoever is called so by then.
    fixture.ok("blockdev-add", json!({ "driver": "null-co", "node-name": "filter" }));
    assert_eq!(fixture.ok("query-block-exports", json!({}))[0]["node-name"], "s");
    fixture.refused("blockdev-del", json!({ "node-name": "s" }), "Node s is in use");
    fixture.ok("block-export-del", json!({ "id": "e" }));
    fixture.until("e BLOCK_EXPORT_DELETED");
    for node in ["filter", "s"] {
        fixture.ok("blockdev-del", json!({ "node-name": node }));
    }
}

#[test]
fn a_disk_of_the_daemon_is_no_fleece_file() {
    let mut fixture = Fixture::new();
    let path = |name: &str| fixture.there.path().join(name).display().to_string();
    std::fs::write(path("empty"), "").expect("written");
    std::fs::hard_link(path("empty"), path("linked")).expect("linked");
    let (empty, linked, new) = (path("empty"), path("linked"), path("new"));
    let file = json!({ "driver": "file", "filename": empty });
    fixture.ok("blockdev-add", json!({ "driver": "raw", "node-name": "e", "file": file }));
    for fleece in [&empty, &linked] {
        let text = format!("{fleece} is the daemon's disk 'e'; choose another fleece file");
        let more = json!({ "x-fleece": { "path": fleece } });
        fixture.refused("blockdev-backup", Fixture::backup("j", "t", more.clone()), &text);
        let mut onto_path = Fixture::backup("j", "t", more);
        onto_path.as_object_mut().expect("an object").remove("target");
        onto_path["path"] = new.clone().into();
        fixture.refused("x-backup", onto_path, &text);
    }
    for relative in ["fleece", "./fleece", ""] {
        let text = format!("Parameter 'x-fleece.path' expects an absolute path, not '{relative}'");
        let more = json!({ "x-fleece": { "path": relative } });
        fixture.refused("blockdev-backup", Fixture::backup("j", "t", more), &text);
    }
    assert!(Path::new(&empty).exists() && Path::new(&linked).exists() && !Path::new(&new).exists());
}

#[test]
fn transactions_come_about_as_a_whole() {
    let mut fixture = Fixture::new();
    let action = |arguments: Value| json!({ "type": "blockdev-backup", "data": arguments });
    let backup = |id: &str, target: &str| action(Fixture::backup(id, target, json!({})));
    let abort = json!({ "type": "abort", "data": {} });
    assert_eq!(fixture.ok("transaction", json!({ "actions": [] })), json!({}));
    let aborted = ["a created", "a aborting", "a concluded", "a null"];
    for (second, text) in [
        (abort, "Transaction aborted using Abort action"),
        (backup("b", "small"), "Source and target image have different sizes"),
        (backup("b", "t"), "Node 't' is busy: block device is in use by block job: backup"),
        (backup("a", "u"), "Job ID 'a' already in use"),
    ] {
        fixture.refused("transaction", json!({ "actions": [backup("a", "t"), second] }), text);
        assert_eq!(fixture.until("a null"), aborted, "{text}");
    }
    assert_eq!(fixture.contents("t"), vec![0; LENGTH]);
    fixture.ok("transaction", json!({ "actions": [backup("a", "t"), backup("b", "u")] }));
    let mut told = fixture.until("a null");
    if !told.contains(&"b null".to_owned()) {
        told.extend(fixture.until("b null"));
    }
    assert!(fixture.contents("t") == fixture.contents("s") && fixture.contents("u") == fixture.contents("s"));
}

#[test]
fn jobs_that_are_grouped_end_together() {
    let mut fixture = Fixture::new();
    let action = |id: &str, target: &str, more: Value| json!({ "type": "blockdev-backup", "data": Fixture::backup(id, target, more) });
    let grouped =
        |actions: Value| json!({ "actions": actions, "properties": { "completion-mode": "grouped" } });
    // One is done and waits; the other is slow.
    let slow = json!({ "speed": 65536 });
    fixture.ok("transaction", grouped(json!([action("a", "t", json!({})), action("b", "u", slow)])));
    let told = fixture.until("a waiting");
    assert!(!told.contains(&"a pending".to_owned()), "{told:?}");
    fixture.ok("job-cancel", json!({ "id": "b" }));
    let mut told = fixture.until("b null");
    if !told.contains(&"a null".to_owned()) {
        told.extend(fixture.until("a null"));
    }
    for event in ["a BLOCK_JOB_CANCELLED", "b BLOCK_JOB_CANCELLED", "a aborting"] {
        assert!(told.contains(&event.to_owned()), "{event} in {told:?}");
    }
    // One that is to be asked keeps both from concluding; asking either lets both.
    let manual = json!({ "auto-finalize": false });
    fixture.ok("transaction", grouped(json!([action("a", "t", manual), action("b", "u", json!({}))])));
    fixture.until("a BLOCK_JOB_PENDING");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(fixture.ok("query-jobs", json!({})).as_array().map(Vec::len), Some(2));
    fixture.ok("job-finalize", json!({ "id": "b" }));
    let mut told = fixture.until("a null");
    if !told.contains(&"b null".to_owned()) {
        told.extend(fixture.until("b null"));
    }
    assert!(
        told.contains(&"a BLOCK_JOB_COMPLETED".to_owned())
            && told.contains(&"b BLOCK_JOB_COMPLETED".to_owned())
    );
}

#[test]
fn quitting_cancels_jobs_with_their_events() {
    let mut fixture = Fixture::new();
    let slow = |more: Value| {
        let mut slow = json!({ "speed": 65536 });
        slow.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        slow
    };
    fixture.ok("blockdev-backup", Fixture::backup("a", "t", slow(json!({}))));
    fixture.ok("blockdev-backup", Fixture::backup("b", "u", slow(json!({ "auto-dismiss": false }))));
    fixture.ok("job-pause", json!({ "id": "a" }));
    fixture.events.clear();
    fixture.ok("quit", json!({}));
    assert!(fixture.control.is_quitting());
    let told: Vec<String> = fixture.events.iter().map(short).collect();
    for id in ["a", "b"] {
        let own: Vec<&String> = told.iter().filter(|event| event.starts_with(id)).collect();
        let last: Vec<String> = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
            .map(|what| format!("{id} {what}"))
            .into();
        assert_eq!(own[own.len() - 4..], last.iter().collect::<Vec<_>>()[..], "{told:?}");
    }
}

#[test]
fn errands_are_bounded_and_always_come_back() {
    let mut fixture = Fixture::new();
    let purpose = || Purpose::Node(NodeOptions::of_path("x", "/none").expect("options"));
    let gate = Arc::new(Mutex::new(()));
    let shut = gate.lock().expect("not poisoned");
    let mut send = || {
        let gate = Arc::clone(&gate);
        let work = move || {
            drop(gate.lock());
            Err(QmpError::generic("back"))
        };
        fixture.control.send_off(purpose(), work)
    };
    let waiting: Vec<Carried> = (0..MAX_ERRANDS).map(|_| send()).collect();
    let one_more = send();
    let told = |told: Result<Value, QmpError>| told.expect_err("no success").text;
    let refused = told(fixture.control.finish(one_more));
    assert!(refused.starts_with("128 commands wait for paths to be opened"), "{refused}");
    // Others are served meanwhile.
    fixture.ok("query-jobs", json!({}));
    drop(shut);
    for carried in waiting {
        assert_eq!(told(fixture.control.finish(carried)), "back");
    }
    let panics = fixture.control.send_off(purpose(), || panic!("planted"));
    assert_eq!(told(fixture.control.finish(panics)), "internal error: see the log");
    assert!(fixture.control.errands.is_empty());
}

#[test]
fn exports_are_added_and_go() {
    let mut fixture = Fixture::new();
    let export = |id: &str, node: &str, more: Value| {
        let mut arguments = json!({ "type": "nbd", "id": id, "node-name": node });
        arguments.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        arguments
    };
    let nothing = || json!({});
    fixture.refused("block-export-add", export("e", "s", nothing()), "NBD server not running");
    fixture.refused("nbd-server-stop", nothing(), "NBD server not running");
    let socket = fixture.there.path().join("nbd.sock");
    let addr = json!({ "addr": { "type": "unix", "data": { "path": socket.display().to_string() } } });
    fixture.ok("nbd-server-start", addr.clone());
    assert!(socket.exists());
    fixture.refused("nbd-server-start", addr, "NBD server already running");
    for (arguments, text) in [
        (export("1", "s", nothing()), "Invalid block export id"),
        (export("e", "none", nothing()), "Cannot find device='' nor node-name='none'"),
        (export("e", "s", json!({ "x-snapshot": "none" })), "Job not found"),
    ] {
        fixture.refused("block-export-add", arguments, text);
    }
    fixture.ok("block-export-add", export("e", "s", json!({ "name": "disk", "writable": true })));
    fixture.refused("block-export-add", export("e", "s", nothing()), "Block export id 'e' is already in use");
    let taken = "NBD server already has export named 'disk'";
    fixture.refused("block-export-add", export("f", "s", json!({ "name": "disk" })), taken);
    fixture.refused("blockdev-del", json!({ "node-name": "s" }), "Node s is in use");
    let shown = json!([{ "id": "e", "type": "nbd", "node-name": "s", "shutting-down": false }]);
    assert_eq!(fixture.ok("query-block-exports", nothing()), shown);
    // A disk that is exported is no target.
    let onto = json!({ "job-id": "j", "device": "u", "target": "s", "sync": "full" });
    fixture.refused("blockdev-backup", onto, "Node 's' is busy: it is the source of a job, or exported");

    // A snapshot goes with its job.
    fixture.ok("blockdev-backup", Fixture::backup("j", "t", json!({ "speed": 65536 })));
    fixture.ok("block-export-add", export("snap", "s", json!({ "x-snapshot": "j" })));
    let writable = export("w", "s", json!({ "x-snapshot": "j", "name": "w", "writable": true }));
    fixture.refused("block-export-add", writable, "Cannot export read-only node as writable");
    fixture.refused(
        "block-export-add",
        export("x", "t", nothing()),
        "Node 't' is busy: block device is in use by block job: backup",
    );
    fixture.ok("job-cancel", json!({ "id": "j" }));
    fixture.until("snap BLOCK_EXPORT_DELETED");

    fixture.books.0.borrow_mut().exports[0].2 = true;
    fixture.refused("block-export-del", json!({ "id": "e" }), "export 'e' still in use");
    fixture.refused("block-export-del", json!({ "id": "none" }), "Export 'none' is not found");
    fixture.ok("block-export-del", json!({ "id": "e", "mode": "hard" }));
    assert_eq!(fixture.until("e BLOCK_EXPORT_DELETED"), ["e BLOCK_EXPORT_DELETED"]);
    fixture.ok("block-export-add", export("e", "u", nothing()));
    fixture.ok("nbd-server-stop", nothing());
    assert_eq!(fixture.until("e BLOCK_EXPORT_DELETED"), ["e BLOCK_EXPORT_DELETED"]);
    assert!(!socket.exists() && fixture.books.0.borrow().listener.is_none());
    fixture.ok("blockdev-del", json!({ "node-name": "u" }));
}

#[test]
fn an_export_that_is_going_is_not_removed_again() {
    let mut fixture = Fixture::new();
    let socket = fixture.there.path().join("nbd.sock").display().to_string();
    fixture.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } }));
    fixture.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "s" }));
    fixture.books.0.borrow_mut().slow = true;
    fixture.ok("block-export-del", json!({ "id": "e" }));
    assert_eq!(fixture.ok("query-block-exports", json!({}))[0]["shutting-down"], true);
    for mode in ["safe", "hard"] {
        let again = json!({ "id": "e", "mode": mode });
        fixture.refused("block-export-del", again, "Export 'e' is already shutting down");
    }
    let gone = fixture.books.0.borrow_mut().exports[0].3.take();
    gone.expect("it was not called")();
    assert_eq!(fixture.until("e BLOCK_EXPORT_DELETED"), ["e BLOCK_EXPORT_DELETED"]);
    fixture.refused("block-export-del", json!({ "id": "e" }), "Export 'e' is not found");
}

#[test]
fn a_server_takes_no_more_clients_than_the_engine_has_places_for() {
    let mut fixture = Fixture::new();
    let socket = fixture.there.path().join("nbd.sock").display().to_string();
    let start = |most: Option<u32>| {
        let mut start = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
        most.into_iter().for_each(|most| start["max-connections"] = most.into());
        start
    };
    for (asked, most) in [(None, 40), (Some(0), 40), (Some(1), 1), (Some(40), 40)] {
        fixture.ok("nbd-server-start", start(asked));
        assert_eq!(fixture.books.0.borrow().most_connections, most, "{asked:?}");
        fixture.ok("nbd-server-stop", json!({}));
    }
    let text = "max-connections: 41 is not supported; 40 is the most (--max-connections of the daemon)";
    fixture.refused("nbd-server-start", start(Some(41)), text);
    assert!(!Path::new(&socket).exists());
}

#[test]
fn an_engine_that_has_died_ends_the_loop_with_the_events_of_its_jobs() {
    let mut fixture = Fixture::new();
    let socket = fixture.there.path().join("qmp.sock");
    let listener = UnixListener::bind(&socket).expect("bound");
    let (signals, _write) = Signals::unsignalled().expect("a pipe");
    let (greeted, go_on) = mpsc::channel();
    let client = thread::spawn(move || {
        let mut stream = UnixStream::connect(socket).expect("connected");
        stream.write_all(br#"{"execute":"qmp_capabilities"}"#).expect("sent");
        let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
        let negotiated = lines.by_ref().take(2).last().expect("two lines");
        assert!(negotiated.contains("return"), "{negotiated}");
        greeted.send(()).expect("somebody waits");
        lines.collect::<Vec<_>>()
    });
    fixture.ok("blockdev-backup", Fixture::backup("j", "t", json!({ "speed": 65536 })));
    let post = fixture.control.mailbox.post();
    let death = thread::spawn(move || {
        go_on.recv().expect("greeted");
        post.send(Happening::EngineDied("the ring broke".into()));
    });
    Monitors::new(Some(&listener), &signals).expect("monitors").run(&mut fixture.control).expect("it runs");
    death.join().expect("told");
    assert_eq!(fixture.control.death(), Some("the ring broke"));
    assert!(fixture.control.is_quitting() && fixture.control.jobs.running().is_empty());
    let told = client.join().expect("unharmed");
    let last: Value = serde_json::from_str(told.last().expect("events")).expect("JSON");
    assert_eq!(short(&last), "j null", "{told:?}");
}
