//! `job`: the jobs of a running daemon.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Client, ClientError};
use crate::args::{JobAction, JobArgs};
use crate::out;
use crate::progress::{Meter, Snapshot};
use crate::report::units::{bytes, rate};
use crate::report::{DONE, FAILED, INCOMPLETE, REFUSED};

/// How often a job is looked at.
const TICK: Duration = Duration::from_millis(200);

/// Carry out `job`; gives the exit code.
pub(crate) fn run(args: &JobArgs, logging: bool) -> u8 {
    let done = Client::connect(args.action.socket()).and_then(|mut client| act(&mut client, args, logging));
    done.unwrap_or_else(|error| {
        out::complain(&error);
        match error {
            ClientError::Refused(_) => REFUSED,
            ClientError::Lost(_) => FAILED,
        }
    })
}

fn act(client: &mut Client, args: &JobArgs, logging: bool) -> Result<u8, ClientError> {
    let done = carry_out(client, args, logging);
    match (&done, args.action.job()) {
        // In words that say more than the daemon's.
        (Err(ClientError::Refused(_)), Some(id)) if look(client, id)?.is_none() => {
            let socket = args.action.socket().display();
            let list = format!("'engine-cli job list --qmp unix:{socket}' shows those that there are");
            Err(ClientError::Refused(format!("there is no job {id}; {list}")))
        }
        _ => done,
    }
}

fn carry_out(client: &mut Client, args: &JobArgs, logging: bool) -> Result<u8, ClientError> {
    let mut verb = |verb: &str, id: &str| client.execute(verb, json!({ "id": id })).map(|_| DONE);
    match &args.action {
        JobAction::Pause(which) => verb("job-pause", &which.job),
        JobAction::Resume(which) => verb("job-resume", &which.job),
        JobAction::Cancel(which) => verb("job-cancel", &which.job),
        JobAction::Finalize(which) => verb("job-finalize", &which.job),
        JobAction::Dismiss(which) => verb("job-dismiss", &which.job),
        JobAction::SetSpeed { which, speed } => {
            let limit = json!({ "device": which.job, "speed": speed.bytes() });
            client.execute("block-job-set-speed", limit).map(|_| DONE)
        }
        JobAction::List { json, .. } => list(client, *json),
        JobAction::Watch { which, progress } => {
            let mut meter = Meter::new(*progress, logging);
            let watched = watch(client, &which.job, &mut meter);
            meter.finish(None);
            watched
        }
    }
}

fn list(client: &mut Client, as_json: bool) -> Result<u8, ClientError> {
    let jobs = client.execute("query-block-jobs", json!({}))?;
    if jobs.as_array().is_some_and(Vec::is_empty) {
        out::say("no jobs");
    }
    let text = if as_json { format!("{jobs}\n") } else { table(&jobs) };
    Ok(match out::print(text.as_bytes()) {
        Ok(()) => DONE,
        Err(undelivered) => {
            out::say(undelivered);
            FAILED
        }
    })
}

/// A line for each job.
fn table(jobs: &Value) -> String {
    let count = |job: &Value, name: &str| job[name].as_u64().unwrap_or(0);
    let line = |job: &Value| {
        let (done, all) = (count(job, "offset"), count(job, "len"));
        let percent = (u128::from(done) * 100).checked_div(u128::from(all)).unwrap_or(100);
        let limit = match count(job, "speed") {
            0 => String::new(),
            speed => format!(", at most {}", rate(speed)),
        };
        let stopped = match job["io-status"].as_str() {
            Some("nospace") if job["status"] == "paused" => ", for there is no space left",
            Some("failed") if job["status"] == "paused" => ", on an error",
            _ => "",
        };
        let error = job["error"].as_str().map(|error| format!(", {error}")).unwrap_or_default();
        format!(
            "{}: {}{stopped}, {percent}%, {} of {}{limit}{error}\n",
            out::one_line(job["device"].as_str().unwrap_or("?")),
            job["status"].as_str().unwrap_or("?"),
            bytes(done),
            bytes(all),
        )
    };
    jobs.as_array().map(|jobs| jobs.iter().rev().map(line).collect()).unwrap_or_default()
}

/// Show a job until it has ended; gives the exit code.
fn watch(client: &mut Client, id: &str, meter: &mut Meter) -> Result<u8, ClientError> {
    let (mut seen, mut began) = (false, false);
    loop {
        let job = look(client, id)?;
        match &job {
            Some(job) => {
                (seen, began) = (true, began || job["status"] != "created");
                meter.update(&snapshot_of(job));
                if job["status"] == "concluded" {
                    return Ok(end(id, job, meter));
                }
            }
            None if !seen => return Err(ClientError::Refused(format!("there is no job {id}"))),
            None => {}
        }
        // However many come: the job is looked at again.
        let deadline = Instant::now() + TICK;
        while let Some(event) = client.next_event(deadline)? {
            let data = &event["data"];
            began |= data["id"] == id && event["event"] == "JOB_STATUS_CHANGE";
            if data["device"] == id && event["event"] == "BLOCK_JOB_COMPLETED" {
                return Ok(end(id, data, meter));
            }
            if data["device"] == id && event["event"] == "BLOCK_JOB_CANCELLED" {
                meter.say(format_args!("job {id} was cancelled"));
                return Ok(FAILED);
            }
            if data["id"] == id && data["status"] == "null" {
                meter.say(format_args!("job {id} is gone"));
                return Ok(FAILED);
            }
        }
        // What is called off or refused while its paths are opened was never a job: no event tells of it.
        if job.is_none() && !began {
            meter.say(format_args!("job {id} did not start"));
            return Ok(FAILED);
        }
    }
}

/// Whether a job that has ended with an error has done all but what it left out. Its counts do not tell: one whose last flush has failed has
/// counted everything.
pub(super) fn has_only_skipped(told: &Value) -> bool {
    told["x-only-skipped"] == true
}

/// `told`: a job that has concluded, or the data of its last event.
fn end(id: &str, told: &Value, meter: &Meter) -> u8 {
    match told["x-detail"].as_str().or_else(|| told["error"].as_str()) {
        None => {
            meter.say(format_args!("job {id} is complete"));
            DONE
        }
        Some(why) if has_only_skipped(told) => {
            meter.say(format_args!("job {id} is complete, but not as a whole: {}", out::one_line(why)));
            INCOMPLETE
        }
        Some(why) => {
            meter.say(format_args!("job {id} has failed: {}", out::one_line(why)));
            FAILED
        }
    }
}

/// A job as `query-jobs` shows it, if it is there.
pub(super) fn look(client: &mut Client, id: &str) -> Result<Option<Value>, ClientError> {
    let mut jobs = client.execute("query-jobs", json!({}))?;
    let jobs = jobs.as_array_mut().map(std::mem::take).unwrap_or_default();
    Ok(jobs.into_iter().find(|job| job["id"] == id))
}

/// How far a job is. A daemon that tells no more than QEMU's gives a bar, too.
pub(super) fn snapshot_of(job: &Value) -> Snapshot {
    let more = &job["x-progress"];
    let count = |name: &str| more[name].as_u64();
    let total = count("total").or_else(|| job["total-progress"].as_u64()).unwrap_or(0);
    let skipped = count("skipped").unwrap_or(0);
    let done = count("done").or_else(|| job["current-progress"].as_u64()).unwrap_or(0);
    let rate = count("rate").unwrap_or(0);
    let left = total.saturating_sub(done + skipped);
    let paused = job["status"] == "paused";
    Snapshot {
        total,
        settled: done + skipped,
        holes: count("holes").unwrap_or(0),
        zeros: count("zeros").unwrap_or(0),
        skipped,
        rate,
        time_left: (u128::from(left) * 1000)
            .checked_div(u128::from(rate))
            .map(|millis| Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX))),
        paused: paused.then(|| more["paused-on"].as_str().unwrap_or("paused").to_owned()),
        counters: job.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_as_lines() {
        let jobs = json!([
            { "device": "b", "status": "running", "offset": 1 << 20, "len": 4 << 20, "speed": 1 << 20 },
            { "device": "c", "status": "paused", "io-status": "nospace", "offset": 0, "len": 4 << 20, "speed": 0 },
            { "device": "a", "status": "concluded", "offset": 0, "len": 0, "speed": 0, "error": "No space left on device" },
        ]);
        let lines = table(&jobs);
        assert_eq!(
            lines,
            "a: concluded, 100%, 0 B of 0 B, No space left on device\n\
             c: paused, for there is no space left, 0%, 0 B of 4.0 MiB\n\
             b: running, 25%, 1.0 MiB of 4.0 MiB, at most 1.0 MiB/s\n"
        );
    }

    #[test]
    fn progress_with_and_without_our_own_counters() {
        let plain = json!({ "status": "running", "current-progress": 10, "total-progress": 40 });
        let snapshot = snapshot_of(&plain);
        assert_eq!((snapshot.settled, snapshot.total, snapshot.time_left), (10, 40, None));
        let ours = json!({
            "status": "paused", "current-progress": 64, "total-progress": 128,
            "x-progress": { "total": 100, "done": 50, "skipped": 10, "rate": 20, "paused-on": "full" },
        });
        let snapshot = snapshot_of(&ours);
        assert_eq!((snapshot.settled, snapshot.total, snapshot.skipped), (60, 100, 10));
        assert_eq!(snapshot.time_left, Some(Duration::from_secs(2)));
        assert_eq!(snapshot.paused.as_deref(), Some("full"));
    }
}
