//! `backup`: a backup of a disk of a running daemon, watched to its end.
//!
//! # Order
//! A new target file is made here, of the disk's length, and given to the daemon as a node; then the job is started, and shown until it has
//! ended; then the node goes. A new file goes, too, if there is no use for it. So the daemon never creates a file by order of a client,
//! and any daemon that speaks QMP as QEMU does would do.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::job::{look, snapshot_of};
use super::{Client, ClientError};
use crate::args::BackupArgs;
use crate::keys::Keys;
use crate::out;
use crate::progress::{Meter, Snapshot};
use crate::report::latencies::words;
use crate::report::units::{bytes, span};
use crate::report::{DONE, FAILED, INCOMPLETE, REFUSED, deliver};
use crate::signals::Signalled;

/// How often the job is looked at.
const TICK: Duration = Duration::from_millis(100);

/// How it ended.
#[derive(Default)]
struct Ended {
    result: &'static str,
    code: u8,
    error: Option<String>,
    /// The data of the job's last event.
    last: Value,
    /// How many of the job's notices were told while it ran.
    told: usize,
}

/// Carry out `backup`; gives the exit code.
pub(crate) fn run(args: &BackupArgs, logging: bool) -> u8 {
    let signalled = match Signalled::install() {
        Ok(signalled) => signalled,
        Err(error) => {
            out::say(format_args!("cannot take signals: {}", crate::out::reason(&error)));
            return FAILED;
        }
    };
    let mut meter = Meter::new(args.output.progress, logging);
    let mut last = None;
    let ended = back_up(args, &signalled, &mut meter, &mut last).unwrap_or_else(|error| {
        let refused = matches!(error, ClientError::Refused(_));
        let (result, code) = if refused { ("refused", REFUSED) } else { ("failed", FAILED) };
        Ended { result, code, error: Some(error.to_string()), ..Ended::default() }
    });
    meter.finish(last.map(Snapshot::at_the_end).as_ref());
    if let Some(error) = &ended.error {
        out::complain(out::one_line(error));
    }
    for line in lines(args, &ended) {
        out::say(line);
    }
    if !args.output.json {
        return ended.code;
    }
    let object = json!({
        "command": "backup", "result": ended.result, "disk": args.disk, "target": args.target,
        "bytes": ended.last["len"], "report": ended.last["x-report"], "error": ended.error,
        "exit_code": ended.code,
    });
    deliver(&object, ended.code)
}

fn lines(args: &BackupArgs, ended: &Ended) -> Vec<String> {
    let mut lines = Vec::new();
    let report = &ended.last["x-report"];
    let count = |name: &str| report[name].as_u64().unwrap_or(0);
    if args.keeps_partial() && matches!(ended.result, "complete" | "cancelled") {
        let (target, disk) = (&args.target, &args.disk);
        let held = bytes(count("done"));
        lines.push(format!("{target} keeps the old contents of {held} of {disk}, which guests changed"));
    } else if ended.result == "complete" || ended.result == "skipped" {
        let time = span(Duration::from_secs_f64(report["seconds"].as_f64().unwrap_or(0.0)));
        lines.push(format!("{}: {} of {} backed up in {time}", args.target, bytes(count("done")), args.disk));
    }
    if count("skipped-bytes") > 0 {
        let ranges = count("skipped-ranges");
        lines.push(format!("{} in {ranges} ranges were left out", bytes(count("skipped-bytes"))));
    }
    lines.extend(report["guests"]["line"].as_str().map(|line| format!("guests: {}", out::one_line(line))));
    lines.extend(notices_from(report, ended.told));
    lines
}

fn refused(text: impl Into<String>) -> ClientError {
    ClientError::Refused(text.into())
}

fn back_up(
    args: &BackupArgs,
    signalled: &Signalled,
    meter: &mut Meter,
    last: &mut Option<Snapshot>,
) -> Result<Ended, ClientError> {
    let mut client = Client::connect(&args.socket.path)?;
    let length = length_of(&mut client, &args.disk)?;
    let target = Target::prepare(&args.target, length, args.force)?;
    let name = format!("backup-{}", std::process::id());
    let driver = if target.is_device { "host_device" } else { "file" };
    let node = json!({ "driver": driver, "node-name": name, "filename": target.path, "discard": "unmap" });
    let done = client.execute("blockdev-add", node).and_then(|_| {
        let mut done = follow(&mut client, args, &name, signalled, meter, last);
        if let Ok(ended) = &mut done
            && matches!(ended.result, "complete" | "skipped")
        {
            watch_after(&mut client, args, signalled, ended);
        }
        // If it cannot be had any more there is nothing to remove it from.
        client.execute("blockdev-del", json!({ "node-name": name })).ok();
        done
    });
    let keep = match &done {
        Ok(ended) => matches!(ended.result, "complete" | "skipped") || args.keeps_partial(),
        // The daemon may be at work on it yet.
        Err(ClientError::Lost(_)) => true,
        Err(ClientError::Refused(_)) => false,
    };
    if !keep {
        target.discard();
    }
    done
}

fn length_of(client: &mut Client, disk: &str) -> Result<u64, ClientError> {
    let nodes = client.execute("query-named-block-nodes", json!({}))?;
    let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
    if let Some(node) = nodes.iter().find(|node| node["node-name"] == disk) {
        let length = node["image"]["virtual-size"].as_u64();
        return length.ok_or_else(|| refused(format!("the daemon does not tell the length of {disk}")));
    }
    let names: Vec<&str> = nodes.iter().filter_map(name_of_disk).collect();
    let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(refused(format!("the daemon has no disk {disk}; it has: {}", out::one_line(&known))))
}

/// The name of a node that can be backed up; `None` for a job's filter, for a target like those made here, and for a node without a name.
fn name_of_disk(node: &Value) -> Option<&str> {
    let name = node["node-name"].as_str()?;
    let number = name.strip_prefix("backup-");
    let is_target = number.is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit()));
    (!is_target && !name.starts_with('#') && node["drv"] != "copy-before-write").then_some(name)
}

/// The notices in `told`, without the first `seen`.
fn notices_from(told: &Value, seen: usize) -> impl Iterator<Item = String> {
    let notices = told["notices"].as_array().into_iter().flatten().skip(seen);
    notices.filter_map(Value::as_str).map(out::one_line)
}

/// Start the job and show it to its end.
fn follow(
    client: &mut Client,
    args: &BackupArgs,
    target: &str,
    signalled: &Signalled,
    meter: &mut Meter,
    last: &mut Option<Snapshot>,
) -> Result<Ended, ClientError> {
    let id = args.job_id.clone().unwrap_or_else(|| target.to_owned());
    client.execute("blockdev-backup", args.request(&id, target))?;
    let mut cancelled = false;
    let mut told = 0;
    let mut ended: Option<Ended> = None;
    let mut pauses = Pauses::default();
    loop {
        // First of all: what the start had to say comes before what happens then.
        if let Some(job) = look(client, &id)? {
            for notice in notices_from(&job["x-progress"], told) {
                meter.say(notice);
                told += 1;
            }
            let snapshot = snapshot_of(&job);
            meter.update(&snapshot);
            *last = Some(snapshot);
        }
        while let Some(event) = client.next_event(TICK)? {
            let data = &event["data"];
            match event["event"].as_str().unwrap_or_default() {
                "BLOCK_JOB_ERROR" if data["device"] == *id && data["action"] == "stop" => {
                    pauses.on_error(data, &id, args, signalled, meter);
                }
                "BLOCK_JOB_COMPLETED" if data["device"] == *id => ended = Some(completed(data)),
                "BLOCK_JOB_CANCELLED" if data["device"] == *id => {
                    ended = Some(was_cancelled(data, args, signalled));
                }
                "JOB_STATUS_CHANGE" if data["id"] == *id && data["status"] == "null" => {
                    let mut ended = ended.ok_or_else(|| ClientError::Lost(format!("job {id} is gone")))?;
                    ended.told = told;
                    *last = Some(snapshot_of(&concluded(&ended.last, last.as_ref())));
                    return Ok(ended);
                }
                "JOB_STATUS_CHANGE" if data["id"] == *id && data["status"] == "running" => pauses.lifted(),
                _ => {}
            }
        }
        if let (false, Some(ending)) = (cancelled, signalled.ending()) {
            cancelled = true;
            meter.say(format_args!("{}: cancelling the job; a second one ends at once", ending.name()));
            let force = json!({ "device": id, "force": true });
            // Refused when it is ending already.
            client.execute("block-job-cancel", force).ok();
        }
        if pauses.is_to_go_on(signalled) {
            // Refused when it was resumed or cancelled meanwhile: nothing is left to do.
            client.execute("job-resume", json!({ "id": id })).ok();
        }
    }
}

/// The job as `query-jobs` would show it at its end, made of the data of its last event.
fn concluded(data: &Value, last: Option<&Snapshot>) -> Value {
    let mut job = last.map_or_else(|| json!({}), |last| last.counters.clone());
    (job["id"], job["type"]) = (data["device"].clone(), data["type"].clone());
    job["status"] = json!("concluded");
    job["current-progress"] = data["offset"].clone();
    job["total-progress"] = data["len"].clone();
    let report = &data["x-report"];
    if report.is_object() {
        let counter = |name: &str| report[name].as_u64().unwrap_or(0);
        let progress = &mut job["x-progress"];
        for name in ["total", "done", "copied", "zeros", "holes"] {
            progress[name] = json!(counter(name));
        }
        progress["skipped"] = json!(counter("skipped-bytes"));
        (progress["rate"], progress["paused-on"]) = (json!(0), Value::Null);
    }
    job
}

/// Announces pauses on an error, once each, and takes what ends them: SIGCONT, or Enter where somebody sits at the terminal.
///
/// All that is in flight may fail for the same reason, each with an event; they belong to one pause until the job runs again.
#[derive(Default)]
struct Pauses {
    announced: bool,
    keys: Keys,
}

impl Pauses {
    fn on_error(&mut self, data: &Value, id: &str, args: &BackupArgs, signalled: &Signalled, meter: &Meter) {
        if std::mem::replace(&mut self.announced, true) {
            return;
        }
        // One that came before was meant for something else.
        signalled.take_continue();
        let enter = if self.keys.begin() { "press Enter, or run: " } else { "run: " };
        let detail = data["x-detail"].as_str().unwrap_or("an error");
        meter.say(out::Message::error(format_args!("paused: {}", out::one_line(detail))));
        let socket = args.socket.path.display();
        meter.say(format_args!("to try again {enter}engine-cli job resume --qmp unix:{socket} {id}"));
    }

    /// The job runs again.
    fn lifted(&mut self) {
        self.announced = false;
    }

    fn is_to_go_on(&mut self, signalled: &Signalled) -> bool {
        self.announced && (signalled.take_continue() || self.keys.pressed())
    }
}

/// Add to the report what guests feel once it is over. They are still being served when the job has ended, so this takes its time.
fn watch_after(client: &mut Client, args: &BackupArgs, signalled: &Signalled, ended: &mut Ended) {
    let Some(guests) = guests_of(&mut ended.last).filter(|_| args.after > 0) else { return };
    let until = Instant::now() + Duration::from_secs(args.after.into());
    while Instant::now() < until && signalled.ending().is_none() {
        std::thread::sleep(TICK);
    }
    // A daemon that does not know of such a thing has told the rest.
    let Ok(after) = client.execute("x-query-latencies", json!({ "node-name": args.disk })) else { return };
    if let Some(line) = guests["line"].as_str() {
        guests["line"] = json!(format!("{line}; after: {}", words(&after)));
    }
    guests["after"] = after;
}

/// What is told of the guests, where there were any. (Another daemon tells no such thing.)
fn guests_of(last: &mut Value) -> Option<&mut Value> {
    let guests = last.pointer_mut("/x-report/guests").filter(|guests| guests.is_object())?;
    let were_there = |phase: &str| guests[phase]["requests"].as_u64().is_some_and(|requests| requests > 0);
    (were_there("before") || were_there("during")).then_some(guests)
}

fn completed(data: &Value) -> Ended {
    let error = data["x-detail"].as_str().or_else(|| data["error"].as_str()).map(str::to_owned);
    let left_out = data["x-report"]["skipped-bytes"].as_u64().unwrap_or(0) > 0;
    let (result, code) = match &error {
        None => ("complete", DONE),
        Some(_) if left_out => ("skipped", INCOMPLETE),
        Some(_) => ("failed", FAILED),
    };
    Ended { result, code, error: error.filter(|_| code == FAILED), last: data.clone(), told: 0 }
}

fn was_cancelled(data: &Value, args: &BackupArgs, signalled: &Signalled) -> Ended {
    let last = data.clone();
    if let Some(ending) = signalled.ending() {
        return Ended { result: "cancelled", code: ending.exit_code(), error: None, last, told: 0 };
    }
    if !args.keeps_partial() {
        let error = Some("the job was cancelled".to_owned());
        return Ended { result: "cancelled", code: FAILED, error, last, told: 0 };
    }
    // There is no other end to it. What the job has written by then is nobody's to flush but ours.
    match File::open(&args.target).and_then(|target| target.sync_all()) {
        Ok(()) => Ended { result: "complete", code: DONE, error: None, last, told: 0 },
        Err(error) => {
            let error = Some(format!("cannot flush {}: {}", args.target, out::reason(&error)));
            Ended { result: "failed", code: FAILED, error, last, told: 0 }
        }
    }
}

/// Where the backup goes.
struct Target {
    path: PathBuf,
    is_device: bool,
    is_new: bool,
}

impl Target {
    fn prepare(text: &str, length: u64, force: bool) -> Result<Self, ClientError> {
        // The daemon may be in another directory.
        let path = std::path::absolute(text)
            .map_err(|error| refused(format!("{text}: {}", crate::out::reason(&error))))?;
        let failed = |what: &str, error: std::io::Error| {
            refused(format!("cannot {what} {text}: {}", crate::out::reason(&error)))
        };
        match fs::metadata(&path) {
            Ok(found) if found.file_type().is_block_device() => {
                Ok(Self { path, is_device: true, is_new: false })
            }
            Ok(found) if !found.is_file() => Err(refused(format!("{text} is no file and no block device"))),
            Ok(_) if !force => Err(refused(format!(
                "{text} exists already; overwrite it with --force, or choose another name"
            ))),
            Ok(_) => {
                let resized =
                    OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(length));
                resized.map_err(|error| failed("resize", error))?;
                Ok(Self { path, is_device: false, is_new: false })
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let made = create(&path, length).map_err(|error| failed("create", error));
                made.map(|()| Self { path, is_device: false, is_new: true })
            }
            Err(error) => Err(failed("look at", error)),
        }
    }

    /// There is no use for it.
    fn discard(&self) {
        if self.is_new {
            match fs::remove_file(&self.path) {
                Ok(()) => out::say(format_args!("{} was removed", self.path.display())),
                Err(error) => out::say(format_args!(
                    "cannot remove {}: {}",
                    self.path.display(),
                    crate::out::reason(&error)
                )),
            }
        }
    }
}

fn create(path: &Path, length: u64) -> std::io::Result<()> {
    let file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.set_len(length).inspect_err(|_| {
        // The error says enough.
        fs::remove_file(path).ok();
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_disks_are_offered() {
        let node = |name: &str, driver: &str| json!({ "node-name": name, "drv": driver });
        let nodes = [
            node("vda", "raw"),
            node("#block001", "file"),
            node("backup-4711", "file"),
            node("backup-disk", "raw"),
            node("filter", "copy-before-write"),
            json!({ "drv": "raw" }),
        ];
        let names: Vec<_> = nodes.iter().filter_map(name_of_disk).collect();
        assert_eq!(names, ["vda", "backup-disk"]);
    }

    #[test]
    fn the_last_line_is_the_end() {
        let before = json!({ "id": "j", "status": "running", "x-progress": { "total": 100, "done": 95, "rate": 7, "fleeced": 3 } });
        let before = snapshot_of(&before);
        let data = json!({ "device": "j", "offset": 128, "len": 128, "x-report": { "total": 100, "done": 90, "skipped-bytes": 10 } });
        let snapshot = snapshot_of(&concluded(&data, Some(&before)));
        assert_eq!((snapshot.settled, snapshot.total, snapshot.skipped, snapshot.rate), (100, 100, 10, 0));
        let counters = &snapshot.counters;
        assert_eq!((&counters["id"], &counters["status"]), (&json!("j"), &json!("concluded")));
        assert_eq!(counters["x-progress"]["fleeced"], 3);
        // Another daemon tells no more than QEMU's.
        let plain = snapshot_of(&concluded(&json!({ "offset": 128, "len": 128 }), None));
        assert_eq!((plain.settled, plain.total), (128, 128));
    }

    #[test]
    fn nothing_is_read_into_the_report_of_another_daemon() {
        let strange = [
            json!(null),
            json!({ "len": 1 }),
            json!({ "x-report": "none" }),
            json!({ "x-report": { "guests": null } }),
            json!({ "x-report": { "guests": { "during": 7 } } }),
            json!({ "x-report": { "guests": { "before": { "requests": 0 } } } }),
        ];
        for told in strange {
            let mut last = told.clone();
            assert!(guests_of(&mut last).is_none(), "{told}");
            assert_eq!(last, told);
        }
        let mut ours = json!({ "x-report": { "guests": { "during": { "requests": 3 } } } });
        assert!(guests_of(&mut ours).is_some());
    }
}
