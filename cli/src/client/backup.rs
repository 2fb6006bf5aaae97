//! `backup`: a backup of a disk of a running daemon, watched to its end.
//!
//! # Order
//! The daemon makes the target (`x-backup`): whether the file may be used at all, only it can tell, and nothing of one that is refused may have changed.
//! Then the job is shown until it has ended.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::job::{has_only_skipped, look, snapshot_of};
use super::{Client, ClientError, REPLY_TIMEOUT, no_answer};
use crate::args::BackupArgs;
use crate::keys::Keys;
use crate::out;
use crate::progress::{Meter, Snapshot};
use crate::report::latencies::words;
use crate::report::units::{bytes, span};
use crate::report::{DONE, FAILED, INCOMPLETE, REFUSED, backup, deliver};
use crate::signals::{Ending, Signalled};

/// How the JSON object of a copy calls it.
const SKIPPED: &str = "complete_with_skipped";
/// How often the job is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long a second connection may take for its greeting before signals have their turn again.
const CANCEL_PATIENCE: Duration = Duration::from_secs(1);

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
    let by_signal = signalled.ending().filter(|_| ended.result == "cancelled");
    let object = backup::json(&backup::Ended {
        disk: &args.disk,
        target: &args.target,
        result: ended.result,
        error: ended.error.as_deref(),
        signal: by_signal.map(Ending::name),
        last: &ended.last,
        exit_code: ended.code,
    });
    deliver(&object, ended.code)
}

fn lines(args: &BackupArgs, ended: &Ended) -> Vec<String> {
    let mut lines = Vec::new();
    let report = &ended.last["x-report"];
    let count = |name: &str| report[name].as_u64().unwrap_or(0);
    // Without a report it has not begun.
    let has_begun = report.is_object();
    if args.keeps_partial() && has_begun && matches!(ended.result, "complete" | SKIPPED | "cancelled") {
        let (target, disk) = (&args.target, &args.disk);
        let held = bytes(count("done"));
        lines.push(format!("{target} keeps the old contents of {held} of {disk}, which guests changed"));
    } else if matches!(ended.result, "complete" | SKIPPED) {
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
    check_disk(&mut client, &args.disk)?;
    let mut ended = follow(&mut client, args, signalled, meter, last)?;
    if matches!(ended.result, "complete" | SKIPPED) {
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
    let names: Vec<&str> = nodes.iter().filter_map(name_of_disk).collect();
    let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Err(refused(format!("the daemon has no disk {disk}; it has: {}", out::one_line(&known))))
}

/// The name of a node that can be backed up; `None` for a job's filter and for a node without a name.
fn name_of_disk(node: &Value) -> Option<&str> {
    let name = node["node-name"].as_str()?;
    (!name.starts_with('#') && node["drv"] != "copy-before-write").then_some(name)
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
    signalled: &Signalled,
    meter: &mut Meter,
    last: &mut Option<Snapshot>,
) -> Result<Ended, ClientError> {
    let id = args.job_id.clone().unwrap_or_else(|| format!("backup-{}", std::process::id()));
    let request = args.request(&id)?;
    let lost = |error, if_it_lives: &str| match error {
        ClientError::Lost(why) => ClientError::Lost(format!(
            "{why}; what becomes of {} is not known: if the daemon was killed it is incomplete, so delete it{if_it_lives}",
            args.target
        )),
        error => error,
    };
    let socket = args.socket.path.display();
    let may_begin =
        format!("; if not, the job may still begin: 'engine-cli job list --qmp unix:{socket}' shows it then");
    let mut cancel = Cancel::default();
    match start(client, args, &id, request, signalled, meter, &mut cancel) {
        Ok(()) => {}
        // It did what it was asked for. How far the start had come is for the daemon to say.
        Err(ClientError::Refused(why)) if cancel.accepted => {
            meter.say(why);
            return Ok(was_cancelled(&json!({}), args, signalled));
        }
        Err(ClientError::Lost(why)) if cancel.accepted => {
            let target = &args.target;
            meter.say(format_args!(
                "{why}; the job is cancelled: it copies nothing once {target} can be opened"
            ));
            return Ok(was_cancelled(&json!({}), args, signalled));
        }
        Err(error) => return Err(lost(error, &may_begin)),
    }
    watch(client, args, &id, signalled, meter, last, cancel).map_err(|error| lost(error, ""))
}

/// What has become of a signal.
#[derive(Default)]
struct Cancel {
    /// It was announced.
    told: bool,
    /// The job is cancelled for it.
    accepted: bool,
}

impl Cancel {
    /// Once, however often it takes to reach the job.
    fn announce(&mut self, ending: Ending, meter: &Meter) {
        if !std::mem::replace(&mut self.told, true) {
            meter.say(format_args!("{}: cancelling the job; a second one ends at once", ending.name()));
        }
    }
}

/// Have the job started. A signal that comes meanwhile cancels it, by a connection of its own: this one waits for the path of the target.
fn start(
    client: &mut Client,
    args: &BackupArgs,
    id: &str,
    request: Value,
    signalled: &Signalled,
    meter: &Meter,
    cancel: &mut Cancel,
) -> Result<(), ClientError> {
    let deadline = Instant::now() + REPLY_TIMEOUT;
    client.ask("x-backup", request)?;
    while client.reply("x-backup", Instant::now() + TICK)?.is_none() {
        if Instant::now() >= deadline {
            return Err(no_answer("x-backup"));
        }
        let Some(ending) = signalled.ending().filter(|_| !cancel.accepted) else { continue };
        cancel.announce(ending, meter);
        // The daemon may not have read of the job yet, or be busy: then once more.
        cancel.accepted = cancel_start(args, id).unwrap_or(false);
    }
    client.forget_before_creation(id)
}

/// Cancel a job that is about to start; `false`: there is none. One that runs under that id may be another's.
fn cancel_start(args: &BackupArgs, id: &str) -> Result<bool, ClientError> {
    let mut second = Client::connect_within(&args.socket.path, CANCEL_PATIENCE)?;
    match look(&mut second, id)? {
        Some(job) if job["status"] == "created" => {
            second.execute("job-cancel", json!({ "id": id })).map(|_| true)
        }
        Some(_) | None => Ok(false),
    }
}

/// Show the job to its end; `cancel`: what has become of a signal by then.
fn watch(
    client: &mut Client,
    args: &BackupArgs,
    id: &str,
    signalled: &Signalled,
    meter: &mut Meter,
    last: &mut Option<Snapshot>,
    mut cancel: Cancel,
) -> Result<Ended, ClientError> {
    let mut told = 0;
    let mut ended: Option<Ended> = None;
    let mut pauses = Pauses::default();
    loop {
        // First of all: what the start had to say comes before what happens then.
        let mut lost = match look(client, id) {
            Ok(Some(job)) => {
                told = show(&job, told, meter, last);
                None
            }
            Ok(None) => None,
            Err(error) => Some(error),
        };
        // However many come: signals and keys have their turn. What a daemon has told before it went is true.
        let deadline = Instant::now() + if lost.is_some() { Duration::ZERO } else { TICK };
        loop {
            let event = match client.next_event(deadline) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => {
                    lost.get_or_insert(error);
                    break;
                }
            };
            let data = &event["data"];
            match event["event"].as_str().unwrap_or_default() {
                "BLOCK_JOB_ERROR" if data["device"] == id && data["action"] == "stop" => {
                    pauses.on_error(data, id, args, signalled, meter);
                }
                "BLOCK_JOB_COMPLETED" if data["device"] == id => ended = Some(completed(data)),
                "BLOCK_JOB_CANCELLED" if data["device"] == id => {
                    ended = Some(was_cancelled(data, args, signalled));
                }
                "JOB_STATUS_CHANGE" if data["id"] == id && data["status"] == "null" => {
                    let gone = || ClientError::Lost(format!("job {id} is gone"));
                    return ended.map(|ended| whole(ended, told, last)).ok_or_else(gone);
                }
                "JOB_STATUS_CHANGE" if data["id"] == *id && data["status"] == "running" => pauses.lifted(),
                _ => {}
            }
        }
        if let Some(error) = lost {
            return ended.map(|ended| whole(ended, told, last)).ok_or(error);
        }
        if let (false, Some(ending)) = (cancel.accepted, signalled.ending()) {
            cancel.accepted = true;
            cancel.announce(ending, meter);
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

/// Show how far the job is, and what it has to say beyond the first `told` notices; gives how many that are now.
fn show(job: &Value, told: usize, meter: &mut Meter, last: &mut Option<Snapshot>) -> usize {
    let mut count = told;
    for notice in notices_from(&job["x-progress"], told) {
        meter.say(notice);
        count += 1;
    }
    let snapshot = snapshot_of(job);
    meter.update(&snapshot);
    *last = Some(snapshot);
    count
}

/// The end, with what was told of it before.
fn whole(ended: Ended, told: usize, last: &mut Option<Snapshot>) -> Ended {
    *last = Some(snapshot_of(&concluded(&ended.last, last.as_ref())));
    Ended { told, ..ended }
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
        let until_then = if args.breaks_on_guests() {
            "; a guest that writes to what is not copied yet ends the backup before that (--on-cbw-error)"
        } else {
            ""
        };
        meter.say(format_args!(
            "to try again {enter}engine-cli job resume --qmp unix:{socket} {id}{until_then}"
        ));
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
    let (result, code) = match &error {
        None => ("complete", DONE),
        Some(_) if has_only_skipped(data) => (SKIPPED, INCOMPLETE),
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
        let id = data["device"].as_str().map(|id| format!(" {}", out::one_line(id))).unwrap_or_default();
        let error = Some(format!("the job{id} was cancelled, by somebody else or with its daemon"));
        return Ended { result: "cancelled", code: FAILED, error, last, told: 0 };
    }
    // There is no other end to it, and the daemon has flushed the target; that of what it has not kept as well is another.
    let left_out = data["x-report"]["skipped-bytes"].as_u64().unwrap_or(0) > 0;
    let (result, code) = if left_out { (SKIPPED, INCOMPLETE) } else { ("complete", DONE) };
    Ended { result, code, error: None, last, told: 0 }
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
