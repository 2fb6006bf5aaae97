//! Jobs that are about to start: their disks and targets are being opened in a thread of its own (see `errands`).
//!
//! # Model
//! From the command on their ids, disks and filters are taken, and clients see them as `created`. When the thread is back they are jobs, or there was
//! never anything: a client that hears of no `created` by an event has no job. What the engine tells of jobs before the control thread knows that
//! they have started is kept for then. A job that is starting takes a cancel and nothing else; with one, all that start at the same instant are called
//! off. Where that comes before their targets are touched, these stay as they are; where it comes later, the jobs have it, before their t0 or behind
//! it, or it is refused: one that was accepted is no job that completes.

use std::sync::Arc;
use std::time::SystemTime;

use engine::error::ErrorKind;
use engine::job::{Refusal, Status};
use engine::live::{Backup, BackupOptions, CallOff, Engine, GroupFailure};
use serde_json::{Value, json};

use super::backup::{Planned, START_TIMEOUT};
use super::control::Control;
use super::doors::{Claims, Door, Site};
use super::errands::{Carried, Found, Purpose};
use super::jobs::Job;
use super::mailbox::{Happening, JobSerial, Letter};
use crate::qmp::QmpError;

/// Most errors of jobs that are kept until it is known that these have started.
const MAX_KEPT: usize = 1024;

/// Jobs that start at one instant.
pub(super) struct Start {
    planned: Vec<Planned>,
    began: SystemTime,
    call_off: Arc<CallOff>,
    kept: Vec<Letter>,
}

impl Start {
    pub(super) fn has(&self, serial: JobSerial) -> bool {
        self.planned.iter().any(|job| job.serial == serial)
    }

    /// Nobody wants it any more.
    pub(super) fn call_off(&self) {
        self.call_off.all();
    }

    /// The same, asked for by its job `id`: refused where that is ending already, which clients cannot know yet.
    pub(super) fn cancel(&self, id: &str) -> Result<(), Refusal> {
        let place = self.planned.iter().position(|job| job.asked.job_id == id);
        self.call_off.with(place.expect("one of its jobs"))
    }

    /// Keep what one of its jobs tells. `false`: there is too much of it.
    pub(super) fn keep(&mut self, letter: Letter) -> bool {
        let is_error = matches!(letter.what, Happening::JobError { .. });
        let room = !is_error || self.kept.len() < MAX_KEPT;
        if room {
            self.kept.push(letter);
        }
        room
    }
}

/// What the thread needs to open and to start one job.
struct Way {
    door: Arc<Door>,
    /// Of a target that is a node.
    site: Option<Site>,
    options: BackupOptions,
}

impl Way {
    /// What the engine cannot know of paths that are no nodes.
    fn check(&self, claims: &Claims) -> Result<(), QmpError> {
        match &self.site {
            Some(site) => site.check()?,
            None => claims.check(&self.options.target, "target")?,
        }
        match &self.options.fleece {
            Some(fleece) => claims.check(&fleece.path, "fleece file"),
            None => Ok(()),
        }
    }
}

/// Open the disks, then start the jobs, all or none.
fn start_all(
    engine: &Engine,
    ways: &[Way],
    claims: &Claims,
    on_failure: GroupFailure,
    call_off: &CallOff,
) -> Result<Vec<Backup>, QmpError> {
    ways.iter().try_for_each(|way| way.check(claims))?;
    let mut disks = Vec::new();
    for way in ways {
        disks.push((way.door.open(engine)?, way.options.clone()));
    }
    engine.start_group_unless(&disks, on_failure, START_TIMEOUT, call_off).map_err(|error| {
        if error.kind() == ErrorKind::Cancelled {
            return QmpError::generic("The backup was cancelled before it started; nothing was touched");
        }
        QmpError::generic(error.to_string())
    })
}

impl Control {
    /// Have checked jobs started.
    pub(super) fn start(
        &mut self,
        planned: Vec<Planned>,
        on_failure: GroupFailure,
    ) -> Result<Carried, QmpError> {
        let claims = self.nodes.claims();
        let mut ways = Vec::new();
        for (at, job) in planned.iter().enumerate() {
            match self.way_of(job) {
                Ok(way) => ways.push(way),
                Err(error) => {
                    self.give_up(&planned[..at]);
                    return Err(error);
                }
            }
        }
        let call_off = Arc::new(CallOff::default());
        let (engine, calls) = (self.engine.clone(), Arc::clone(&call_off));
        let work = move || start_all(&engine, &ways, &claims, on_failure, &calls).map(Found::Backups);
        let start = Start { planned, began: SystemTime::now(), call_off, kept: Vec::new() };
        Ok(self.send_off(Purpose::Start(start), work))
    }

    /// Take what a job uses.
    fn way_of(&mut self, job: &Planned) -> Result<Way, QmpError> {
        let site = job.target.as_ref().map(|target| self.nodes.site_of(target)).transpose()?;
        let door = self.nodes.enter(&job.source)?;
        if let Some(target) = &job.target {
            self.nodes.set_target(target, true);
        }
        if let Some(filter) = &job.asked.filter_node_name {
            self.nodes.add_filter(filter, &job.source);
        }
        let observer = Some(self.mailbox.post().observer(job.serial));
        Ok(Way { door, site, options: BackupOptions { observer, ..job.options.clone() } })
    }

    /// Give back what jobs were to use that do not come about.
    fn give_up(&mut self, planned: &[Planned]) {
        for job in planned {
            self.nodes.release(&job.source);
            if let Some(target) = &job.target {
                self.nodes.set_target(target, false);
            }
            if let Some(filter) = &job.asked.filter_node_name {
                self.nodes.remove_filter(filter);
            }
        }
    }

    /// They have not started.
    pub(super) fn not_started(&mut self, start: Start, why: Result<(), QmpError>) -> Result<(), QmpError> {
        self.give_up(&start.planned);
        if start.planned.len() > 1 {
            self.tell_aborted(&start.planned);
        }
        why
    }

    /// They have started.
    pub(super) fn started(&mut self, start: Start, backups: Vec<Backup>) {
        let Start { planned, began, kept, .. } = start;
        for (job, backup) in planned.into_iter().zip(backups) {
            let Planned { asked, serial, source, target, options } = job;
            for notice in &backup.notices {
                crate::out::say(format_args!("job {}: {notice}", asked.job_id));
            }
            self.tell_status(began, &asked.job_id, Status::Created);
            self.jobs.list.push(Job {
                serial,
                id: asked.job_id,
                handle: backup.job,
                snapshot: backup.snapshot,
                source,
                target,
                filter: asked.filter_node_name,
                status: Status::Created,
                failure: None,
                cluster: options.cluster_size.bytes(),
                speed: asked.speed,
                auto_finalize: asked.auto_finalize,
                auto_dismiss: asked.auto_dismiss,
                released: false,
                notices: backup.notices,
                pause_logged: false,
            });
        }
        for letter in kept {
            self.open(letter);
        }
    }

    /// The start of the job `id`.
    pub(super) fn starting(&self, id: &str) -> Option<&Start> {
        self.errands.starts().find(|start| start.planned.iter().any(|job| job.asked.job_id == id))
    }

    /// How many jobs are starting.
    pub(super) fn count_starting(&self) -> usize {
        self.errands.starts().map(|start| start.planned.len()).sum()
    }

    /// Those that are starting as `query-jobs` shows them, the newest first; `block`: as `query-block-jobs` does.
    pub(super) fn query_starting(&self, block: bool) -> impl Iterator<Item = Value> {
        let planned = self.errands.starts().rev().flat_map(|start| start.planned.iter().rev());
        planned.map(move |job| {
            let (id, status) = (&job.asked.job_id, Status::Created.as_str());
            let length = self.nodes.length_of(&job.source).unwrap_or(0);
            let total = length.next_multiple_of(job.options.cluster_size.bytes());
            if !block {
                return json!({
                    "id": id, "type": "backup", "status": status, "current-progress": 0, "total-progress": total,
                });
            }
            json!({
                "type": "backup", "device": id, "len": total, "offset": 0, "busy": true, "paused": false,
                "speed": job.asked.speed, "io-status": "ok", "ready": false, "status": status,
                "auto-finalize": job.asked.auto_finalize, "auto-dismiss": job.asked.auto_dismiss,
            })
        })
    }
}
