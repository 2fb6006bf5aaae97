//! What clients of a daemon make of its events: whose they are, and that they keep nobody from being heard. The daemon is the test's.

mod support;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use serde_json::{Deserializer, Value, json};
use support::{Running, code, directory, run_in, stderr};

/// Tells a client something.
#[derive(Clone)]
struct Teller(Arc<Mutex<UnixStream>>);

impl Teller {
    /// `false`: it has hung up.
    fn send(&self, message: &Value) -> bool {
        self.0.lock().expect("unharmed").write_all(format!("{message}\r\n").as_bytes()).is_ok()
    }

    fn event(&self, name: &str, data: Value) -> bool {
        let timestamp = json!({ "seconds": 0, "microseconds": 0 });
        self.send(&json!({ "timestamp": timestamp, "event": name, "data": data }))
    }

    fn reply(&self, value: Value) {
        self.send(&json!({ "return": value }));
    }

    fn status(&self, job: &str, status: &str) {
        self.event("JOB_STATUS_CHANGE", json!({ "id": job, "status": status }));
    }

    /// All about a job's end; `error`: how it failed.
    fn end(&self, job: &str, error: Option<&str>) {
        let report = json!({ "total": 100, "done": 100, "seconds": 1.0 });
        let mut data = json!({ "type": "backup", "device": job, "len": 100, "offset": 100, "speed": 0, "x-report": report });
        if let Some(error) = error {
            data["error"] = error.into();
        }
        self.event("BLOCK_JOB_COMPLETED", data);
        self.status(job, "concluded");
        self.status(job, "null");
    }
}

/// A daemon with a disk `vda` and one client, on `qmp.sock`. `act` carries out a command, its reply included; `false`: it hangs up.
fn daemon(there: &Path, mut act: impl FnMut(&str, &Teller) -> bool + Send + 'static) {
    let listener = UnixListener::bind(there.join("qmp.sock")).expect("bound");
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a client");
        let teller = Teller(Arc::new(Mutex::new(stream.try_clone().expect("cloned"))));
        teller.send(&json!({ "QMP": { "version": {}, "capabilities": [] } }));
        for request in Deserializer::from_reader(&stream).into_iter::<Value>().map_while(Result::ok) {
            match request["execute"].as_str().expect("a command") {
                "qmp_capabilities" => teller.reply(json!({})),
                "query-named-block-nodes" => teller.reply(json!([{ "node-name": "vda", "drv": "raw" }])),
                command => {
                    if !act(command, &teller) {
                        break;
                    }
                }
            }
        }
        // There may be copies of it.
        stream.shutdown(Shutdown::Both).ok();
    });
}

fn job(status: &str) -> Value {
    json!([{ "id": "nightly", "type": "backup", "status": status, "current-progress": 0, "total-progress": 100 }])
}

const BACKUP: [&str; 11] = [
    "backup", "--qmp", "qmp.sock", "--disk", "vda", "--target", "copy.img", "--job-id", "nightly", "--after",
    "0",
];

/// Back up with a daemon that tells of older jobs of the same id, then of the new one's creation, before its reply or after it. The new one
/// fails a while later, and that is what the client has to tell.
#[track_caller]
fn hears_its_own_end(older: fn(&Teller), created_late: bool) {
    let there = directory();
    let mut looks = 0;
    daemon(there.path(), move |command, teller| {
        match command {
            "x-backup" => {
                older(teller);
                if created_late {
                    teller.reply(json!({}));
                    teller.status("nightly", "created");
                } else {
                    teller.status("nightly", "created");
                    teller.reply(json!({}));
                }
            }
            _ => {
                looks += 1;
                if looks == 2 {
                    teller.end("nightly", Some("Input/output error"));
                }
                teller.reply(job("running"));
            }
        }
        true
    });
    let output = run_in(there.path(), &BACKUP);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert!(stderr(&output).contains("Input/output error"), "{}", stderr(&output));
}

#[test]
fn the_end_of_an_older_job_of_the_same_id_is_not_its_own() {
    for created_late in [false, true] {
        hears_its_own_end(|teller| teller.end("nightly", None), created_late);
    }
    // One that has begun since the client listens.
    let whole = |teller: &Teller| {
        teller.status("nightly", "created");
        teller.status("nightly", "running");
        teller.end("nightly", None);
    };
    hears_its_own_end(whole, false);
}

/// Have events of another job come for as long as the client is there.
fn keep_telling(teller: &Teller) {
    let teller = teller.clone();
    thread::spawn(move || {
        while teller
            .event("BLOCK_JOB_ERROR", json!({ "device": "other", "operation": "read", "action": "ignore" }))
        {
            thread::sleep(Duration::from_millis(20));
        }
    });
}

#[test]
fn a_signal_is_heard_while_events_keep_coming() {
    let there = directory();
    daemon(there.path(), |command, teller| {
        match command {
            "x-backup" => {
                teller.status("nightly", "created");
                keep_telling(teller);
                teller.reply(json!({}));
            }
            "block-job-cancel" => {
                teller.event("BLOCK_JOB_CANCELLED", json!({ "type": "backup", "device": "nightly" }));
                teller.status("nightly", "null");
                teller.reply(json!({}));
            }
            _ => teller.reply(job("running")),
        }
        true
    });
    let mut running = Running::program(there.path(), &[&BACKUP[..], &["--progress", "json"]].concat());
    running.progress(|line| line["status"] == "running");
    running.signal("INT");
    let (code, _, messages) = running.end();
    assert_eq!(code, 130, "{messages}");
    assert!(messages.contains("SIGINT: cancelling the job"), "{messages}");
}

/// The daemon is busy with the start, and takes no second client for the cancel meanwhile.
#[test]
fn a_signal_that_reaches_the_job_only_once_it_has_started_is_told_once() {
    let there = directory();
    let ((asked, is_asked), (go_on, goes_on)) = (mpsc::channel(), mpsc::channel());
    daemon(there.path(), move |command, teller| {
        match command {
            "x-backup" => {
                asked.send(()).expect("somebody waits");
                goes_on.recv().expect("told to");
                teller.status("nightly", "created");
                teller.reply(json!({}));
            }
            "block-job-cancel" => {
                teller.event("BLOCK_JOB_CANCELLED", json!({ "type": "backup", "device": "nightly" }));
                teller.status("nightly", "null");
                teller.reply(json!({}));
            }
            _ => teller.reply(job("running")),
        }
        true
    });
    let mut running = Running::program(there.path(), &BACKUP);
    is_asked.recv().expect("it asks");
    running.signal("INT");
    running.expect("SIGINT: cancelling the job");
    go_on.send(()).expect("it waits");
    let (code, _, messages) = running.end();
    assert_eq!(code, 130, "{messages}");
    assert_eq!(messages.matches("cancelling the job").count(), 1, "{messages}");
}

#[test]
fn a_job_is_watched_while_events_keep_coming() {
    let there = directory();
    let mut looks = 0;
    daemon(there.path(), move |_, teller| {
        looks += 1;
        if looks == 1 {
            keep_telling(teller);
        }
        teller.reply(job(if looks < 3 { "running" } else { "concluded" }));
        true
    });
    let watch = Running::program(there.path(), &["job", "watch", "--qmp", "qmp.sock", "nightly"]);
    let (code, _, messages) = watch.end();
    assert_eq!(code, 0, "{messages}");
    assert!(messages.contains("job nightly is complete"), "{messages}");
}

/// However its end comes to be known.
#[test]
fn a_job_that_has_left_something_out_is_no_failure() {
    // What has left something out may have failed after all was counted.
    for (by_event, only, expected) in [(false, true, 3), (true, true, 3), (false, false, 1), (true, false, 1)]
    {
        let there = directory();
        let mut looks = 0;
        daemon(there.path(), move |_, teller| {
            looks += 1;
            let mut jobs = job(if by_event { "running" } else { "concluded" });
            if by_event && looks == 2 {
                let report = json!({ "total": 100, "done": 90, "skipped-bytes": 10 });
                let mut data = json!({ "device": "nightly", "error": "Input/output error", "x-detail": "why", "x-report": report });
                if only {
                    data["x-only-skipped"] = true.into();
                }
                teller.event("BLOCK_JOB_COMPLETED", data);
            } else if !by_event {
                jobs[0]["error"] = "Input/output error".into();
                jobs[0]["x-detail"] = "why".into();
                jobs[0]["x-progress"] = json!({ "total": 100, "done": 90, "skipped": 10 });
                if only {
                    jobs[0]["x-only-skipped"] = true.into();
                }
            }
            teller.reply(jobs);
            true
        });
        let watch = Running::program(there.path(), &["job", "watch", "--qmp", "qmp.sock", "nightly"]);
        let (code, _, messages) = watch.end();
        assert_eq!(code, expected, "{messages}");
        let told = if expected == 3 { "is complete, but not as a whole: why" } else { "has failed: why" };
        assert!(messages.contains(&format!("job nightly {told}")), "{messages}");
    }
}

/// How a backup ends whose job has left out 10 bytes, and that by `event`, with `more` in its data.
fn end_without_some(sync: &str, event: &'static str, more: Value) -> (i32, String, String) {
    let there = directory();
    let mut looks = 0;
    daemon(there.path(), move |command, teller| {
        if command == "x-backup" {
            teller.status("nightly", "created");
            teller.reply(json!({}));
            return true;
        }
        looks += 1;
        if looks == 2 {
            let report = json!({ "total": 100, "done": 90, "skipped-bytes": 10, "skipped-ranges": 1 });
            let mut data = json!({ "type": "backup", "device": "nightly", "len": 100, "offset": 100, "x-report": report });
            data.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
            teller.event(event, data);
            teller.status("nightly", "null");
        }
        teller.reply(job("running"));
        true
    });
    let output = run_in(there.path(), &[&BACKUP[..], &["--sync", sync, "--json"]].concat());
    let object: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    (code(&output), object["result"].as_str().expect("a word").to_owned(), stderr(&output))
}

#[test]
fn a_backup_without_some_of_it_is_no_plain_success() {
    let (code, result, told) = end_without_some("none", "BLOCK_JOB_CANCELLED", json!({}));
    assert_eq!((code, result.as_str()), (3, "complete_with_skipped"), "{told}");
    assert!(told.contains("copy.img keeps the old contents of 90 B of vda"), "{told}");
    assert!(told.contains("10 B in 1 ranges were left out"), "{told}");
    // It has left something out, and failed.
    let error = json!({ "error": "Input/output error" });
    for sync in ["full", "none"] {
        let (code, result, told) = end_without_some(sync, "BLOCK_JOB_COMPLETED", error.clone());
        assert_eq!((code, result.as_str()), (1, "failed"), "{told}");
    }
    let only = json!({ "error": "Input/output error", "x-only-skipped": true });
    let (code, result, told) = end_without_some("full", "BLOCK_JOB_COMPLETED", only);
    assert_eq!((code, result.as_str()), (3, "complete_with_skipped"), "{told}");
}

#[test]
fn a_target_is_in_doubt_when_the_start_is_not_answered() {
    let there = directory();
    daemon(there.path(), |command, _| command != "x-backup");
    let output = run_in(there.path(), &BACKUP);
    assert_eq!(code(&output), 1);
    let told = stderr(&output);
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.contains("; what becomes of copy.img is not known: if the daemon was killed"), "{told}");
    assert!(told.contains("'engine-cli job list --qmp unix:qmp.sock'"), "{told}");
}

/// A daemon that ends tells how its jobs have ended, and goes: what has come of that is true, whatever the connection says then.
#[test]
fn an_end_that_was_told_before_the_daemon_went_is_the_end() {
    for (sync, expected) in [("full", (1, "cancelled")), ("none", (0, "complete"))] {
        let there = directory();
        let mut looks = 0;
        daemon(there.path(), move |command, teller| {
            if command == "x-backup" {
                teller.status("nightly", "created");
                teller.reply(json!({}));
                return true;
            }
            looks += 1;
            if looks < 2 {
                teller.reply(job("running"));
                return true;
            }
            let report = json!({ "total": 100, "done": 60 });
            teller.event("BLOCK_JOB_CANCELLED", json!({ "type": "backup", "device": "nightly", "len": 100, "offset": 60, "x-report": report }));
            false
        });
        let output = run_in(there.path(), &[&BACKUP[..], &["--sync", sync, "--json"]].concat());
        let object: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let told = stderr(&output);
        assert_eq!((code(&output), object["result"].as_str().expect("a word")), expected, "{told}");
        assert!(!told.contains("is not known"), "{told}");
    }
}
