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
        Ended { result, code, error: Some(error.to_string()), last: Value::Null }
    });
    meter.finish(last.map(Snapshot::at_the_end).as_ref());
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
    if let Some(error) = &ended.error {
        lines.push(out::one_line(error));
    }
    let report = &ended.last["x-report"];
    let count = |name: &str| report[name].as_u64().unwrap_or(0);
    if ended.result == "complete" || ended.result == "skipped" {
        let time = span(Duration::from_secs_f64(report["seconds"].as_f64().unwrap_or(0.0)));
        lines.push(format!("{}: {} of {} backed up in {time}", args.target, bytes(count("done")), args.disk));
    }
    if count("skipped-bytes") > 0 {
        let ranges = count("skipped-ranges");
        lines.push(format!("{} in {ranges} ranges were left out", bytes(count("skipped-bytes"))));
    }
    lines.extend(report["guests"]["line"].as_str().map(|line| format!("guests: {}", out::one_line(line))));
    for notice in report["notices"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        lines.push(out::one_line(notice));
    }
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
    let names: Vec<&str> = nodes
        .iter()
        .filter_map(|node| node["node-name"].as_str())
        .filter(|name| !name.starts_with('#'))
        .collect();
    let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(refused(format!("the daemon has no disk {disk}; it has: {}", out::one_line(&known))))
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
    let mut ended = None;
    loop {
        while let Some(event) = client.next_event(TICK)? {
            let data = &event["data"];
            match event["event"].as_str().unwrap_or_default() {
                "BLOCK_JOB_ERROR" if data["device"] == *id => tell_error(data, &id, args, meter),
                "BLOCK_JOB_COMPLETED" if data["device"] == *id => ended = Some(completed(data)),
                "BLOCK_JOB_CANCELLED" if data["device"] == *id => {
                    ended = Some(was_cancelled(data, signalled));
                }
                "JOB_STATUS_CHANGE" if data["id"] == *id && data["status"] == "null" => {
                    return ended.ok_or_else(|| ClientError::Lost(format!("job {id} is gone")));
                }
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
        if let Some(job) = look(client, &id)? {
            let snapshot = snapshot_of(&job);
            meter.update(&snapshot);
            *last = Some(snapshot);
        }
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

fn tell_error(data: &Value, id: &str, args: &BackupArgs, meter: &Meter) {
    let detail = data["x-detail"].as_str().unwrap_or("an error");
    if data["action"] == "stop" {
        meter.say(format_args!("paused: {}", out::one_line(detail)));
        let socket = args.socket.path.display();
        meter.say(format_args!("to try again run: engine-cli job resume --qmp unix:{socket} {id}"));
    }
}

fn completed(data: &Value) -> Ended {
    let error = data["x-detail"].as_str().or_else(|| data["error"].as_str()).map(str::to_owned);
    let left_out = data["x-report"]["skipped-bytes"].as_u64().unwrap_or(0) > 0;
    let (result, code) = match &error {
        None => ("complete", DONE),
        Some(_) if left_out => ("skipped", INCOMPLETE),
        Some(_) => ("failed", FAILED),
    };
    Ended { result, code, error: error.filter(|_| code == FAILED), last: data.clone() }
}

fn was_cancelled(data: &Value, signalled: &Signalled) -> Ended {
    let code = signalled.ending().map_or(FAILED, |ending| ending.exit_code());
    let error = signalled.ending().is_none().then(|| "the job was cancelled".to_owned());
    Ended { result: "cancelled", code, error, last: data.clone() }
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
