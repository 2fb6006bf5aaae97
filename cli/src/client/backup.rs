//! `backup`: a backup of a disk of a running daemon, watched to its end.
//!
//! # Order
//! The daemon makes the target (`x-backup`): whether the file may be used at all, only it can tell, and nothing of one that is refused may have changed.
//! Then the job is shown until it has ended.

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
    check_disk(&mut client, &args.disk)?;
    let mut ended = follow(&mut client, args, signalled, meter, last)?;
    if matches!(ended.result, "complete" | "skipped") {
        watch_after(&mut client, args, signalled, &mut ended);
    }
    Ok(ended)
}

fn check_disk(client: &mut Client, disk: &str) -> Result<(), ClientError> {
    let nodes = client.execute("query-named-block-nodes", json!({}))?;
    let nodes = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
    if nodes.iter().any(|node| node["node-name"] == disk) {
        return Ok(());
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
    signalled: &Signalled,
    meter: &mut Meter,
    last: &mut Option<Snapshot>,
) -> Result<Ended, ClientError> {
    let id = args.job_id.clone().unwrap_or_else(|| format!("backup-{}", std::process::id()));
    client.execute("x-backup", args.request(&id)?)?;
    watch(client, args, &id, signalled, meter, last).map_err(|error| match error {
        ClientError::Lost(why) => ClientError::Lost(format!(
            "{why}; what becomes of {} is not known: if the daemon was killed it is incomplete, so delete it",
            args.target
        )),
        error => error,
    })
}

/// Show the job to its end.
fn watch(
    client: &mut Client,
    args: &BackupArgs,
    id: &str,
    signalled: &Signalled,
    meter: &mut Meter,
    last: &mut Option<Snapshot>,
) -> Result<Ended, ClientError> {
    let mut cancelled = false;
    let mut ended = None;
    loop {
        while let Some(event) = client.next_event(TICK)? {
            let data = &event["data"];
            match event["event"].as_str().unwrap_or_default() {
                "BLOCK_JOB_ERROR" if data["device"] == id => tell_error(data, id, args, meter),
                "BLOCK_JOB_COMPLETED" if data["device"] == id => ended = Some(completed(data)),
                "BLOCK_JOB_CANCELLED" if data["device"] == id => {
                    ended = Some(was_cancelled(data, signalled));
                }
                "JOB_STATUS_CHANGE" if data["id"] == id && data["status"] == "null" => {
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
        if let Some(job) = look(client, id)? {
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
