//! What the daemon knows and does: nodes, jobs, exports, and the commands on them.
//!
//! # Model
//! Everything here happens on the control thread, one command after the other, so nothing needs a lock. What other threads have to say comes by
//! the [`Mailbox`] and becomes events; it is looked into before each command, so a command sees what its client could have heard of.
//! What a command has to open is opened in a thread of its own, and the command finished when that is back (`errands`): a path that does not
//! answer keeps nobody but its own client.
//!
//! # Waiting
//! A few commands take hold on the ring thread a moment later: a pause, a cancel, a finalize. Their replies wait for that as QEMU's do, but
//! [`PATIENCE`] at most: a job whose target does not answer keeps nobody from the other jobs. After a command that has waited it is another client's turn, so
//! nobody is kept longer than that by each of the others.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use engine::job::{JobHandle, Refusal, Status};
use engine::live::Engine;
use engine::units::Speed;
use serde_json::{Value, json};

use super::errands::{Carried, Errands};
use super::exports::Exports;
use super::jobs::{Job, Jobs, log_error, refusal_of};
use super::mailbox::{Happening, JobSerial, Letter, Mailbox};
use super::nodes::Nodes;
use super::serving::Serving;
use crate::out;
use crate::qmp::commands::find;
use crate::qmp::{Arguments, QmpError, check, query_commands, query_qmp_schema, version};
use crate::report::latencies::numbers;

/// How long the reply to a command waits for it to take hold.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);
/// How long the end of the daemon waits for its jobs.
const QUIT_PATIENCE: Duration = Duration::from_secs(30);
/// How long it waits for paths that are being opened. A start that nothing hinders takes no longer: its instant is looked for twice at most.
const PATHS_PATIENCE: Duration = Duration::from_secs(10);

/// See the module's header.
pub(super) struct Control {
    pub(super) engine: Engine,
    pub(super) nodes: Nodes,
    pub(super) jobs: Jobs,
    pub(super) serving: Serving,
    pub(super) mailbox: Mailbox,
    pub(super) errands: Errands,
    /// Events that were not sent yet.
    events: Vec<Value>,
    quitting: bool,
    /// A command has waited to take hold since this was last asked.
    waited: bool,
    death: Option<String>,
}

impl Control {
    /// `most_connections`: how many clients of NBD the engine has places for.
    pub(super) fn new(
        engine: Engine,
        exports: Box<dyn Exports>,
        most_connections: u32,
    ) -> std::io::Result<Self> {
        Ok(Self {
            engine,
            nodes: Nodes::default(),
            jobs: Jobs::default(),
            serving: Serving::new(exports, most_connections),
            mailbox: Mailbox::new()?,
            errands: Errands::default(),
            events: Vec::new(),
            quitting: false,
            waited: false,
            death: None,
        })
    }

    /// Why the engine has died, if it has: nothing is left to control then.
    pub(super) fn death(&self) -> Option<&str> {
        self.death.as_deref()
    }

    /// Whether the daemon is to end; all jobs have ended then.
    pub(super) fn is_quitting(&self) -> bool {
        self.quitting
    }

    /// What has happened and was not sent yet, in order.
    pub(super) fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// Whether a command has waited since this was last asked: then it is somebody else's turn.
    pub(super) fn has_waited(&mut self) -> bool {
        std::mem::take(&mut self.waited)
    }

    /// The next letter, for which a command waits until `deadline`.
    pub(super) fn await_letter(&mut self, deadline: Instant) -> Option<Letter> {
        self.waited = true;
        self.mailbox.wait(deadline.saturating_duration_since(Instant::now()))
    }

    /// Carry out a command, or begin to.
    pub(super) fn execute(&mut self, name: &str, arguments: &Arguments) -> Result<Carried, QmpError> {
        let Some(command) = find(name) else {
            return Err(QmpError::not_found(format!("The command {name} has not been found")));
        };
        check(command.arguments, arguments)?;
        self.look_into_mailbox();
        let text = |name: &str| arguments.get(name).and_then(Value::as_str).unwrap_or_default();
        let nothing = |done: Result<(), QmpError>| done.map(|()| json!({}));
        let done = match name {
            "blockdev-add" => return self.add_node(arguments),
            "block-export-add" => return self.add_export(arguments),
            "blockdev-backup" | "x-backup" => return self.backup(arguments),
            "transaction" => return self.transaction(arguments),
            "query-version" => Ok(version()),
            "query-commands" => Ok(query_commands()),
            "query-qmp-schema" => Ok(query_qmp_schema()),
            "quit" => {
                self.quit();
                Ok(json!({}))
            }
            "blockdev-del" => nothing(self.nodes.remove(text("node-name"))),
            "query-named-block-nodes" => Ok(self.nodes.query()),
            "nbd-server-start" => nothing(self.start_server(arguments)),
            "nbd-server-stop" => nothing(self.stop_server()),
            "block-export-del" => nothing(self.remove_export(text("id"), text("mode") == "hard")),
            "query-block-exports" => Ok(self.serving.query()),
            "query-jobs" => {
                Ok(self.query_starting(false).chain(self.jobs.newest_first().map(Job::query)).collect())
            }
            "query-block-jobs" => {
                let started = self.jobs.newest_first().map(Job::query_block);
                Ok(self.query_starting(true).chain(started).collect())
            }
            "x-query-latencies" => self.nodes.latencies(text("node-name")).map(|felt| numbers(&felt)),
            _ => nothing(self.verb(name, arguments)),
        };
        done.map(Carried::Out)
    }

    /// A command on one job.
    fn verb(&mut self, name: &str, arguments: &Arguments) -> Result<(), QmpError> {
        let text = |name: &str| arguments.get(name).and_then(Value::as_str);
        let id = text("device").or_else(|| text("id")).unwrap_or_default();
        if let Some(start) = self.starting(id) {
            // With another verb it would have to be remembered.
            let verb = name.trim_start_matches("block-").trim_start_matches("job-");
            return match verb {
                "cancel" => start.cancel(id).map_err(|refusal| refusal_of(id, refusal)),
                "resume" => Err(QmpError::generic("Can't resume a job that was not paused")),
                _ => {
                    let state = Status::Created;
                    let text = format!("Job '{id}' in state '{state}' cannot accept command verb '{verb}'");
                    Err(QmpError::generic(text))
                }
            };
        }
        let (verb, job) = match name.strip_prefix("block-job-") {
            Some(verb) => (verb, self.jobs.by_device(id)?),
            None => (name.strip_prefix("job-").unwrap_or(name), self.jobs.by_id(id)?),
        };
        let (serial, handle) = (job.serial, job.handle.clone());
        if verb == "set-speed" {
            return self.set_speed(serial, arguments["speed"].as_i64().unwrap_or(-1));
        }
        let forced = arguments.get("force").and_then(Value::as_bool).unwrap_or(false);
        if name == "block-job-cancel" && !forced && handle.wants_pause() && !job.status.is_over() {
            return Err(QmpError::generic(format!("The block job for device '{id}' is currently paused")));
        }
        if verb == "resume" && !handle.wants_pause() {
            // Whatever its state: QEMU looks at this first.
            return Err(job.refusal(Refusal::NotPaused));
        }
        type Call = fn(&JobHandle) -> Result<(), Refusal>;
        let (call, until): (Call, fn(Status) -> bool) = match verb {
            "pause" => (JobHandle::pause, |status| status == Status::Paused),
            "resume" => (JobHandle::resume, |_| true),
            "cancel" => (JobHandle::cancel, Status::is_over),
            "finalize" => (JobHandle::finalize, Status::is_over),
            "dismiss" => (JobHandle::dismiss, |status| status == Status::Null),
            _ => (JobHandle::complete, |_| true),
        };
        call(&handle).map_err(|refusal| job.refusal(refusal))?;
        self.await_status(serial, until);
        Ok(())
    }

    fn set_speed(&mut self, serial: JobSerial, speed: i64) -> Result<(), QmpError> {
        let job = self.jobs.get_mut(serial).expect("found before");
        let Ok(limit) = u64::try_from(speed) else {
            return Err(QmpError::generic("Parameter 'speed' expects a non-negative value"));
        };
        let limit = std::num::NonZeroU64::new(limit).map(Speed);
        job.handle.set_speed(limit).map_err(|refusal| job.refusal(refusal))?;
        job.speed = speed;
        Ok(())
    }

    /// Wait until the job was told to be in a state that `enough` takes, or for [`PATIENCE`].
    fn await_status(&mut self, serial: JobSerial, enough: fn(Status) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        self.look_into_mailbox();
        while self.jobs.get(serial).is_some_and(|job| !enough(job.status) && !job.status.is_over()) {
            let Some(letter) = self.await_letter(deadline) else { return };
            self.open(letter);
        }
        self.look_into_mailbox();
    }

    /// End: exports first, then jobs, each with its events.
    pub(super) fn quit(&mut self) {
        if self.quitting {
            return;
        }
        self.quitting = true;
        self.look_into_mailbox();
        self.call_errands_back();
        self.shut_serving_down();
        for (_, handle) in self.jobs.running() {
            // One that is ending already needs no telling.
            handle.cancel().ok();
        }
        let deadline = Instant::now() + QUIT_PATIENCE;
        let paths_deadline = Instant::now() + PATHS_PATIENCE;
        loop {
            let running = self.jobs.running();
            let paths = !self.errands.is_empty() && Instant::now() < paths_deadline;
            if running.is_empty() && self.serving.is_empty() && !paths {
                break;
            }
            // A cancel that came while the end was being written down was too late; then the job waits to be finalized, at most.
            for (_, handle) in running.iter().filter(|(_, handle)| handle.status() == Status::Pending) {
                handle.cancel().ok();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = if running.is_empty() { "exports" } else { "jobs" };
                out::say(format_args!("there are {what} that do not end; leaving them"));
                break;
            }
            if let Some(letter) = self.mailbox.wait(left.min(PATIENCE)) {
                self.open(letter);
            }
        }
        if !self.errands.is_empty() {
            out::say("there are paths that do not answer; leaving what was to be opened there");
            self.leave_errands();
        }
        let concluded: Vec<JobHandle> = self.jobs.list.iter().map(|job| job.handle.clone()).collect();
        for handle in concluded {
            handle.dismiss().ok();
        }
        self.look_into_mailbox();
    }

    /// Make events of what has happened.
    pub(super) fn look_into_mailbox(&mut self) {
        self.mailbox.rearm();
        while let Some(letter) = self.mailbox.take() {
            self.open(letter);
        }
        let lost = self.mailbox.lost();
        if lost > 0 {
            out::say(format_args!("{lost} errors of jobs were not told one by one"));
        }
    }

    pub(super) fn open(&mut self, letter: Letter) {
        if let Some(start) = letter.what.job().and_then(|job| self.errands.start_of(job)) {
            if !start.keep(letter) {
                self.mailbox.lose();
            }
            return;
        }
        let Letter { at, what } = letter;
        match what {
            Happening::Status(serial, status) => self.on_status(serial, status, at),
            Happening::JobError { job, error, action } => {
                let Some(job) = self.jobs.get_mut(job) else { return };
                if job.is_news(action) {
                    log_error(&job.id, &error);
                }
                let data = job.met(&error, action);
                self.push(at, "BLOCK_JOB_ERROR", data);
            }
            Happening::Ended(serial, result) => {
                let Some(job) = self.jobs.get_mut(serial) else { return };
                let (event, data) = job.ended(&result);
                self.push(at, event, data);
            }
            Happening::ExportGone(serial) => {
                if let Some(id) = self.forget_export(serial) {
                    self.push(at, "BLOCK_EXPORT_DELETED", json!({ "id": id }));
                }
            }
            Happening::Back(serial, found) => self.on_back(serial, *found),
            Happening::NotAccepted(why) => {
                out::say(format_args!(
                    "cannot accept an NBD client: {why}; who comes waits until that is over"
                ));
            }
            Happening::EngineDied(why) => self.death = Some(why),
        }
    }

    fn on_status(&mut self, serial: JobSerial, status: Status, at: SystemTime) {
        let Some(job) = self.jobs.get_mut(serial) else { return };
        job.enter(status);
        let (id, asks) = (job.id.clone(), status == Status::Pending && !job.auto_finalize);
        self.tell_status(at, &id, status);
        if asks {
            self.push(at, "BLOCK_JOB_PENDING", json!({ "type": "backup", "id": id }));
        }
        if status.is_over() {
            self.give_back(serial);
        }
        if status == Status::Null {
            self.jobs.list.retain(|job| job.serial != serial);
        }
    }

    /// The disks of a job that is over are free again.
    fn give_back(&mut self, serial: JobSerial) {
        let Some(job) = self.jobs.get_mut(serial) else { return };
        if std::mem::replace(&mut job.released, true) {
            return;
        }
        let (source, target, filter) = (job.source.clone(), job.target.clone(), job.filter.take());
        self.nodes.release(&source);
        if let Some(target) = target {
            self.nodes.set_target(&target, false);
        }
        if let Some(filter) = filter {
            self.nodes.remove_filter(&filter);
        }
        self.remove_snapshots_of(serial);
    }

    /// Tell that a job has entered a state.
    pub(super) fn tell_status(&mut self, at: SystemTime, id: &str, status: Status) {
        self.push(at, "JOB_STATUS_CHANGE", json!({ "id": id, "status": status.as_str() }));
    }

    fn push(&mut self, at: SystemTime, event: &str, data: Value) {
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({ "seconds": since.as_secs(), "microseconds": since.subsec_micros() });
        self.events.push(json!({ "timestamp": timestamp, "event": event, "data": data }));
    }
}
