//! Jobs as clients of QMP know them: by id, with their events, their progress in whole clusters, their errors in the system's words.

use std::borrow::Cow;
use std::sync::Arc;

use engine::error::{Error, ErrorKind, Operation};
use engine::job::{ErrorAction, IoStatus, JobHandle, JobResult, Outcome, Refusal, Status};
use engine::live::Snapshot;
use nix::errno::Errno;
use serde_json::{Value, json};

use super::mailbox::JobSerial;
use super::nodes::MAX_ID;
use super::report::report_of;
use crate::out;
use crate::qmp::session::MAX_REPLY;
use crate::qmp::{ErrorClass, QmpError};

/// Most jobs, those that wait to be dismissed included.
pub(super) const MAX_JOBS: usize = 256;
/// Most bytes of a sentence about a job as it stands in a reply: room for the longest path that the system takes, unless that is full of letters
/// that are written as several.
const MAX_TEXT: usize = 5 << 10;
/// Most notices that are shown while a job runs; there are not as many.
const MAX_NOTICES: usize = 12;
/// Most bytes of what is told of a job, but for its id and such sentences.
const MAX_JOB_TEXT: usize = 1 << 10;
// Its notices, why it is paused, and why it has failed, in the system's words and in ours.
const _: () = assert!(MAX_JOBS * (MAX_ID + (MAX_NOTICES + 3) * MAX_TEXT + MAX_JOB_TEXT) <= MAX_REPLY);

/// Why a job has failed.
#[derive(Clone, Debug)]
pub(super) struct JobFailure {
    /// In the system's words, as QEMU tells it.
    pub(super) text: String,
    /// In ours: where and what to do.
    pub(super) detail: Option<String>,
    /// All is there but what policy `ignore` has left out.
    pub(super) only_skipped: bool,
}

impl JobFailure {
    /// As members of `value`: what is told of its job.
    fn tell(&self, value: &mut Value) {
        value["error"] = bounded(&self.text).into();
        if let Some(detail) = &self.detail {
            value["x-detail"] = bounded(detail).into();
        }
        if self.only_skipped {
            value["x-only-skipped"] = true.into();
        }
    }
}

/// `text`, or as much of its beginning as takes [`MAX_TEXT`] in a reply.
pub(super) fn bounded(text: &str) -> Cow<'_, str> {
    const MORE: char = '…';
    // Without the quotation marks.
    let told = |text: &str| Value::from(text).to_string().len() - 2;
    if told(text) <= MAX_TEXT {
        return Cow::Borrowed(text);
    }
    let (mut bytes, mut buffer) = (MORE.len_utf8(), [0; 4]);
    let fits = |letter: &char| {
        bytes += told(letter.encode_utf8(&mut buffer));
        bytes <= MAX_TEXT
    };
    Cow::Owned(text.chars().take_while(fits).chain([MORE]).collect())
}

/// A job that was started.
pub(super) struct Job {
    pub(super) serial: JobSerial,
    pub(super) id: String,
    pub(super) handle: JobHandle,
    pub(super) snapshot: Snapshot,
    /// The nodes at the bottom of its source and, where that is one, its target.
    pub(super) source: String,
    pub(super) target: Option<String>,
    /// The name that its filter has, if it was given one.
    pub(super) filter: Option<String>,
    /// The last state that was told.
    pub(super) status: Status,
    pub(super) failure: Option<JobFailure>,
    pub(super) cluster: u64,
    /// Bytes a second; 0: no limit.
    pub(super) speed: i64,
    pub(super) auto_finalize: bool,
    pub(super) auto_dismiss: bool,
    /// Whether its disks were given back.
    pub(super) released: bool,
    /// What its start had to say.
    pub(super) notices: Vec<String>,
    /// Whether the error that it has paused on was logged.
    pub(super) pause_logged: bool,
}

impl Job {
    /// Bytes settled and bytes to settle, rounded up to whole clusters.
    fn counts(&self) -> (u64, u64) {
        let progress = self.handle.progress();
        let up = |bytes: u64| bytes.next_multiple_of(self.cluster);
        (up(progress.done + progress.skipped).min(up(progress.total)), up(progress.total))
    }

    /// As `query-jobs` shows it.
    pub(super) fn query(&self) -> Value {
        let (offset, length) = self.counts();
        let progress = self.handle.progress();
        let ran = self.handle.notices(0);
        let notices: Vec<_> =
            self.notices.iter().chain(&ran).take(MAX_NOTICES).map(|text| bounded(text)).collect();
        let paused_on = progress.paused_on.as_deref().map(bounded);
        let mut value = json!({
            "id": self.id, "type": "backup", "status": self.status.as_str(),
            "current-progress": offset, "total-progress": length,
            "x-progress": {
                "total": progress.total, "done": progress.done, "copied": progress.copied,
                "zeros": progress.zeros, "holes": progress.holes, "skipped": progress.skipped,
                "fleeced": progress.fleeced, "rate": progress.rate, "paused-on": paused_on,
                "notices": notices,
            },
        });
        self.failure.iter().for_each(|failure| failure.tell(&mut value));
        value
    }

    /// As `query-block-jobs` shows it.
    pub(super) fn query_block(&self) -> Value {
        let (offset, length) = self.counts();
        let io_status = match self.handle.progress().io_status {
            IoStatus::Ok => "ok",
            IoStatus::NoSpace => "nospace",
            IoStatus::Failed => "failed",
        };
        let mut value = json!({
            "type": "backup", "device": self.id, "len": length, "offset": offset,
            "busy": self.status == Status::Running, "paused": self.handle.wants_pause(), "speed": self.speed,
            "io-status": io_status, "ready": false, "status": self.status.as_str(),
            "auto-finalize": self.auto_finalize, "auto-dismiss": self.auto_dismiss,
        });
        if let Some(failure) = &self.failure {
            value["error"] = bounded(&failure.text).into();
        }
        value
    }

    /// Its end as an event: the name, and the data.
    pub(super) fn ended(&mut self, result: &JobResult) -> (&'static str, Value) {
        self.failure = failure_of(result);
        let up = |bytes: u64| bytes.next_multiple_of(self.cluster);
        let length = up(result.progress.total);
        let offset = up(result.progress.done + result.progress.skipped).min(length);
        let mut data = json!({
            "type": "backup", "device": self.id, "len": length, "offset": offset, "speed": self.speed,
            "x-report": report_of(result, &self.notices),
        });
        if matches!(result.outcome, Outcome::Cancelled) {
            return ("BLOCK_JOB_CANCELLED", data);
        }
        self.failure.iter().for_each(|failure| failure.tell(&mut data));
        ("BLOCK_JOB_COMPLETED", data)
    }

    /// Whether an error is worth a line in the log: of those that one pause is for, the first alone.
    pub(super) fn is_news(&mut self, action: ErrorAction) -> bool {
        action != ErrorAction::Stop || !std::mem::replace(&mut self.pause_logged, true)
    }

    /// It has entered a state.
    pub(super) fn enter(&mut self, status: Status) {
        self.status = status;
        if status == Status::Running {
            self.pause_logged = false;
        }
    }

    /// An error of its sweep as the data of an event.
    pub(super) fn met(&self, error: &Error, action: ErrorAction) -> Value {
        let operation = if error.operation() == Operation::Read { "read" } else { "write" };
        let action = match action {
            ErrorAction::Report => "report",
            ErrorAction::Stop => "stop",
            ErrorAction::Ignore => "ignore",
        };
        json!({
            "device": self.id, "operation": operation, "action": action, "x-detail": bounded(&error.to_string()),
        })
    }

    /// The refusal of a verb as QEMU words it.
    pub(super) fn refusal(&self, refusal: Refusal) -> QmpError {
        refusal_of(&self.id, refusal)
    }
}

/// The refusal of a verb on the job `id` as QEMU words it.
pub(super) fn refusal_of(id: &str, refusal: Refusal) -> QmpError {
    QmpError::generic(match refusal {
        Refusal::State { status, verb } => {
            format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")
        }
        Refusal::AlreadyPaused => "Job is already paused".to_owned(),
        Refusal::NotPaused => "Can't resume a job that was not paused".to_owned(),
    })
}

/// Why the job did not succeed, if so.
fn failure_of(result: &JobResult) -> Option<JobFailure> {
    let failure = |text: String, detail: Option<String>| JobFailure { text, detail, only_skipped: false };
    match &result.outcome {
        Outcome::Complete => None,
        Outcome::Cancelled => Some(failure(out::strerror(Errno::ECANCELED), None)),
        Outcome::Failed(error) => Some(failure(system_words(error), Some(error.to_string()))),
        Outcome::CompleteWithSkipped => {
            let ranges = result.skipped.len();
            let detail = format!("{} bytes in {ranges} ranges were left out", result.progress.skipped);
            Some(JobFailure { only_skipped: true, ..failure(out::strerror(Errno::EIO), Some(detail)) })
        }
    }
}

/// What the system calls an error.
pub(super) fn system_words(error: &Error) -> String {
    match error.kind() {
        ErrorKind::Io(errno) | ErrorKind::FlushFailed(errno) => out::strerror(errno),
        ErrorKind::NoSpace => out::strerror(Errno::ENOSPC),
        ErrorKind::TimedOut => out::strerror(Errno::ETIMEDOUT),
        _ => error.reason().to_owned(),
    }
}

/// The jobs, in the order in which they were started.
#[derive(Default)]
pub(super) struct Jobs {
    pub(super) list: Vec<Job>,
    next: u64,
}

impl Jobs {
    /// A name for a job to come.
    pub(super) fn next_serial(&mut self) -> JobSerial {
        self.next += 1;
        JobSerial(self.next)
    }

    pub(super) fn get(&self, serial: JobSerial) -> Option<&Job> {
        self.list.iter().find(|job| job.serial == serial)
    }

    pub(super) fn get_mut(&mut self, serial: JobSerial) -> Option<&mut Job> {
        self.list.iter_mut().find(|job| job.serial == serial)
    }

    /// For a `job-*` command.
    pub(super) fn by_id(&self, id: &str) -> Result<&Job, QmpError> {
        let found = self.list.iter().find(|job| job.id == id);
        found.ok_or_else(|| QmpError::generic("Job not found"))
    }

    /// For a `block-job-*` command.
    pub(super) fn by_device(&self, id: &str) -> Result<&Job, QmpError> {
        self.by_id(id).map_err(|_| QmpError {
            class: ErrorClass::DeviceNotActive,
            text: format!("Block job '{id}' not found"),
        })
    }

    /// The newest first.
    pub(super) fn newest_first(&self) -> impl Iterator<Item = &Job> {
        self.list.iter().rev()
    }

    /// The handles of those that have not ended.
    pub(super) fn running(&self) -> Vec<(JobSerial, JobHandle)> {
        let running = self.list.iter().filter(|job| !matches!(job.status, Status::Concluded | Status::Null));
        running.map(|job| (job.serial, job.handle.clone())).collect()
    }
}

/// An error shared by the event and the log.
pub(super) fn log_error(id: &str, error: &Arc<Error>) {
    out::say(format_args!("job {id}: {error}"));
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use engine::job::{Progress, SkippedRange};

    use super::*;
    use crate::qmp::commands::{EVENTS, find};
    use crate::qmp::schema::{Kind, Object};

    #[test]
    fn texts_about_a_job_are_bounded_as_they_are_told() {
        let told = |text: &str| Value::from(text).to_string().len() - 2;
        let path = format!("cannot write /{}: no space left on device", "x".repeat(4095));
        assert_eq!(bounded(&path), path);
        for (letter, most) in
            [("x", MAX_TEXT), ("\u{1}", MAX_TEXT / 6), ("\"", MAX_TEXT / 2), ("ü", MAX_TEXT / 2)]
        {
            let whole = letter.repeat(most);
            assert_eq!(bounded(&whole), whole);
            let longer = letter.repeat(most + 1);
            let cut = bounded(&longer);
            assert!(cut.ends_with('…') && longer.starts_with(cut.trim_end_matches('…')), "{letter}");
            assert!((MAX_TEXT - 12..=MAX_TEXT).contains(&told(&cut)), "{letter}: {}", told(&cut));
        }
    }

    #[test]
    fn clients_find_in_the_schema_how_a_failure_is_told() {
        let detail = Some("10 bytes were left out".to_owned());
        let failure = JobFailure { text: "Input/output error".into(), detail, only_skipped: true };
        let mut value = json!({});
        failure.tell(&mut value);
        assert_eq!(value.as_object().map(serde_json::Map::len), Some(3), "{value}");
        let completed = EVENTS.iter().find(|event| event.name == "BLOCK_JOB_COMPLETED").expect("it is there");
        let Kind::Array(Kind::Object(job)) = find("query-jobs").expect("it is there").returns else {
            panic!("an array of jobs")
        };
        let has = |object: &Object, name: &str| object.members.iter().any(|member| member.name == name);
        for (name, _) in value.as_object().expect("an object") {
            assert!(has(completed.data, name) && has(job, name), "{name}");
        }
    }

    /// A job of 100 bytes has ended so.
    pub(in super::super) fn ended(outcome: Outcome, skipped: Vec<SkippedRange>) -> JobResult {
        let progress = Progress {
            status: Status::Concluded,
            io_status: IoStatus::Ok,
            total: 100,
            done: 90,
            copied: 90,
            holes: 0,
            zeros: 0,
            uncovered: 0,
            resumed: 0,
            skipped: 10,
            verified: 0,
            retries: 0,
            in_flight: 0,
            fleeced: 0,
            rate: 0,
            time_left: None,
            speed: None,
            paused_on: None,
            elapsed: Duration::ZERO,
        };
        JobResult {
            outcome,
            progress,
            skipped,
            verified: false,
            durable: true,
            elapsed: Duration::ZERO,
            engine: "threads",
            resumable: false,
            resumable_bytes: 0,
            map_removed: false,
            guests: None,
            notices: Vec::new(),
        }
    }

    #[test]
    fn what_has_only_left_something_out_is_told_from_what_has_failed() {
        let only_skipped =
            |outcome| failure_of(&ended(outcome, Vec::new())).map(|failure| failure.only_skipped);
        let error = Error::new(ErrorKind::Io(Errno::EIO), Operation::Flush, "target", "it failed");
        assert_eq!(only_skipped(Outcome::CompleteWithSkipped), Some(true));
        assert_eq!(only_skipped(Outcome::Failed(Arc::new(error))), Some(false));
        assert_eq!(only_skipped(Outcome::Cancelled), Some(false));
        assert_eq!(only_skipped(Outcome::Complete), None);
    }
}
