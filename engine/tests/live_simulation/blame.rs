//! Who may fail, and for what.
//!
//! Each error tells what failed and on which path. Something must have been made to go wrong there, and it must be the business of whoever fails:
//! of a guest his own disk, or a job that was told to break guests' writes; of a job its own files, by its policies. What nothing can have made to
//! fail is *sure*, and counted: an oracle that allows everything proves nothing.

use engine::error::{Error, ErrorKind, Operation};
use engine::modes::{CbwErrorPolicy, ErrorPolicy};
use engine::ring::sim::Fault;
use engine::units::{ByteRange, Timestamp};
use nix::errno::Errno;

use crate::oracle::Job;
use crate::run::MAX_WAIT;
use crate::scenario::{JobSpec, Scenario};

/// What an error says was the matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Matter {
    /// A guest's time-out.
    TimeOut,
    /// The fleece file was full.
    Full,
    /// A read or a write failed.
    Io,
    /// One did less than was asked for, again and again.
    Short,
    /// There was no space.
    Space,
    /// A flush failed.
    Flush,
}

fn matter_of(error: &Error) -> Option<Matter> {
    let short = ["become shorter", "nothing was written"];
    Some(match (error.kind(), error.operation()) {
        (ErrorKind::Io(Errno::ETIMEDOUT), Operation::CopyBeforeWrite) => Matter::TimeOut,
        (ErrorKind::NoSpace, Operation::CopyBeforeWrite) => Matter::Full,
        (_, Operation::Flush) => Matter::Flush,
        (ErrorKind::NoSpace, _) => Matter::Space,
        (ErrorKind::SourceShrank, _) => Matter::Short,
        _ if short.iter().any(|short| error.reason().contains(short)) => Matter::Short,
        (ErrorKind::Io(_), _) => Matter::Io,
        _ => return None,
    })
}

/// What there may be to blame.
pub(crate) struct Blame<'a> {
    pub(crate) scenario: &'a Scenario,
    /// Since when no operation is made to fail.
    pub(crate) quiet_since: Option<Timestamp>,
    /// The ring thread has died.
    pub(crate) dead: bool,
}

impl JobSpec {
    fn breaks_guests(&self) -> bool {
        self.on_cbw_error == CbwErrorPolicy::BreakGuestWrite
    }

    /// Whether guests may have waited for it for too long.
    fn times_out(&self) -> bool {
        self.cbw_timeout.is_some_and(|timeout| timeout < MAX_WAIT)
    }

    /// Whether `policy` ends it for that.
    fn ends_for(policy: ErrorPolicy, matter: Matter) -> bool {
        match policy {
            ErrorPolicy::Report => true,
            ErrorPolicy::Enospc | ErrorPolicy::Auto => matter != Matter::Space,
            ErrorPolicy::Stop | ErrorPolicy::Ignore => false,
        }
    }

    /// Whether it ends for that, met at its source by the sweep or by a guest's copy.
    fn ends_for_source(&self, matter: Matter) -> bool {
        let for_guests = !self.breaks_guests() && self.source_policy != ErrorPolicy::Ignore;
        matter != Matter::Flush && (for_guests || Self::ends_for(self.source_policy, matter))
    }

    /// The same of its target, of which no flush may fail.
    fn ends_for_target(&self, matter: Matter) -> bool {
        matter == Matter::Flush || !self.breaks_guests() || Self::ends_for(self.target_policy, matter)
    }
}

impl Blame<'_> {
    /// Whether `matter` was made to happen to operations from `since` on, to those on file `file` of the world.
    fn happens(&self, matter: Matter, file: usize, since: Timestamp) -> bool {
        if self.quiet_since.is_some_and(|quiet| quiet < since) {
            return false;
        }
        let faults = &self.scenario.faults;
        let rates = &faults.rates;
        let exact = |wanted: fn(&Fault) -> bool| faults.exact.values().any(wanted);
        let errno = |fault: &Fault| matches!(fault, Fault::Errno(_));
        match matter {
            Matter::TimeOut | Matter::Full => false,
            Matter::Io => rates.eio > 0 || exact(errno) || !self.bad_of(file).is_empty(),
            Matter::Short => rates.short > 0 || exact(|fault| *fault == Fault::Short),
            Matter::Space => rates.nospace > 0 || exact(|fault| *fault == Fault::Errno(Errno::ENOSPC)),
            Matter::Flush => rates.flush > 0 || rates.drop_cache > 0 || exact(|_| true),
        }
    }

    fn bad_of(&self, file: usize) -> &[ByteRange] {
        let disks = self.scenario.disks.len();
        let jobs = self.scenario.jobs().count();
        let job = |number: usize| self.scenario.jobs().nth(number).expect("so many");
        match file {
            _ if file < disks => &self.scenario.disks[file].bad,
            _ if file < disks + jobs => &job(file - disks).bad_target,
            _ => job(file - disks - jobs).fleece.as_ref().map_or(&[], |fleece| &fleece.bad),
        }
    }

    fn anything_happens(&self, file: usize, since: Timestamp) -> bool {
        let all = [Matter::Io, Matter::Short, Matter::Space, Matter::Flush];
        all.into_iter().any(|matter| self.happens(matter, file, since))
    }

    /// Whether anything happens to a file of `job` that has a say in whether it is copied.
    fn is_troubled(&self, job: &Job, since: Timestamp) -> bool {
        let files = [job.spec.disk, job.target, job.fleece];
        files.into_iter().any(|file| self.anything_happens(file, since))
    }

    /// The number in the world of the file at which `error` happened, among `files`.
    fn file_of(error: &Error, files: &[(&str, usize)]) -> Option<usize> {
        files
            .iter()
            .find(|(name, number)| error.path() == format!("{name}{number}"))
            .map(|&(_, number)| number)
    }

    fn file_of_job(error: &Error, job: &Job) -> Option<usize> {
        let files = [("disk", job.spec.disk), ("target", job.target), ("fleece", job.fleece)];
        Self::file_of(error, &files)
    }

    /// Whether the operation on the target that has stopped `job` may have failed.
    fn may_be_stopped(&self, job: &Job) -> bool {
        let stops = [ErrorPolicy::Stop, ErrorPolicy::Enospc, ErrorPolicy::Auto];
        stops.contains(&job.spec.target_policy) && self.anything_happens(job.target, job.started_at)
    }

    /// Whether `job`, which starts, or has started, at `since`, may fail.
    pub(crate) fn may_fail(&self, job: &Job, since: Timestamp) -> bool {
        let spec = &job.spec;
        let any = |file, ends: &dyn Fn(Matter) -> bool| {
            let matters = [Matter::Io, Matter::Short, Matter::Space, Matter::Flush];
            matters.into_iter().any(|matter| ends(matter) && self.happens(matter, file, since))
        };
        self.dead
            || (spec.times_out() && !spec.breaks_guests())
            || any(spec.disk, &|matter| spec.ends_for_source(matter))
            || any(job.target, &|matter| spec.ends_for_target(matter))
            || (spec.fleece.is_some()
                && any(job.fleece, &|matter| JobSpec::ends_for(spec.target_policy, matter)))
    }

    /// `job` has failed with `error`.
    pub(crate) fn job(&self, job: &Job, error: &Error, now: Timestamp) -> Result<(), String> {
        if self.dead {
            return Ok(());
        }
        let spec = &job.spec;
        let file = Self::file_of_job(error, job);
        let happens = |matter| file.is_some_and(|file| self.happens(matter, file, job.started_at));
        let may = match (matter_of(error), error.operation()) {
            (None, _) => false,
            (Some(Matter::TimeOut), _) => {
                let running = now.since(job.started_at);
                let waited = job.guests_waited.flatten().map_or(running, |waited| waited.min(running));
                let is_due = spec.cbw_timeout.is_some_and(|timeout| waited >= timeout);
                is_due && spec.times_out() && !spec.breaks_guests() && file == Some(job.target)
            }
            (Some(Matter::Full), _) => {
                !spec.breaks_guests() && file == Some(job.fleece) && self.may_be_stopped(job)
            }
            (Some(matter), Operation::Read) => {
                file == Some(spec.disk) && spec.ends_for_source(matter) && happens(matter)
            }
            (Some(matter), Operation::ReadFleece) => {
                let ends = JobSpec::ends_for(spec.target_policy, matter);
                file == Some(job.fleece) && ends && happens(matter)
            }
            (Some(matter), Operation::Write | Operation::Flush) => {
                file == Some(job.target) && spec.ends_for_target(matter) && happens(matter)
            }
            _ => false,
        };
        if may { Ok(()) } else { Err(format!("it failed for no reason: {error}")) }
    }

    /// Whether a request of a guest of disk `disk`, submitted at `since`, which changes it or not, may fail.
    pub(crate) fn may_fail_request(
        &self,
        jobs: &[Job],
        disk: usize,
        changes: bool,
        since: Timestamp,
    ) -> bool {
        let breaks = |job: &Job| {
            job.breaks(disk, since)
                && (job.spec.times_out() || self.is_troubled(job, since) || self.may_be_full(job))
        };
        self.dead || self.anything_happens(disk, since) || (changes && jobs.iter().any(breaks))
    }

    fn may_be_full(&self, job: &Job) -> bool {
        job.spec.fleece.is_some() && self.may_be_stopped(job)
    }

    /// Such a request, `carried` by the engine or only waiting for its copy, has failed with `error` at `now`.
    pub(crate) fn request(
        &self,
        jobs: &[Job],
        (disk, carried, changes): (usize, bool, bool),
        (since, now): (Timestamp, Timestamp),
        error: &Error,
    ) -> Result<(), String> {
        let Some(matter) = matter_of(error).filter(|_| !self.dead) else {
            return if self.dead { Ok(()) } else { Err(format!("failed for no reason: {error}")) };
        };
        let on_disk = Self::file_of(error, &[("disk", disk)]).is_some();
        let own = on_disk && carried && self.happens(matter, disk, since);
        let breaks = |job: &Job| job.breaks(disk, since) && self.breaks_for(job, matter, error, (since, now));
        if own || (changes && jobs.iter().any(breaks)) {
            return Ok(());
        }
        Err(format!("failed for no reason: {error}"))
    }

    /// Whether `job`, which breaks guests' writes, may have broken one with `error`.
    fn breaks_for(
        &self,
        job: &Job,
        matter: Matter,
        error: &Error,
        (since, now): (Timestamp, Timestamp),
    ) -> bool {
        let Some(file) = Self::file_of_job(error, job) else { return false };
        match (matter, error.operation()) {
            (Matter::TimeOut, _) => {
                let waited = now.since(since.max(job.started_at));
                file == job.target
                    && job.spec.cbw_timeout.is_some_and(|timeout| waited >= timeout)
                    && job.spec.times_out()
            }
            (Matter::Full, _) => file == job.fleece && self.may_be_full(job),
            (_, Operation::Read) => {
                let ignored = job.spec.source_policy == ErrorPolicy::Ignore;
                file == job.spec.disk && !ignored && self.happens(matter, file, since)
            }
            (_, Operation::Write) => file == job.target && self.happens(matter, file, since),
            _ => false,
        }
    }

    /// A read of `job`'s snapshot has failed with `error`.
    pub(crate) fn snapshot(&self, job: &Job, error: &Error) -> bool {
        let happens = |file, matter| self.happens(matter, file, job.started_at);
        let file = Self::file_of_job(error, job);
        self.dead || file.is_some_and(|file| happens(file, Matter::Io) || happens(file, Matter::Short))
    }
}

impl Job {
    /// Whether it may break a guest's write to disk `disk` that was submitted at `since`.
    fn breaks(&self, disk: usize, since: Timestamp) -> bool {
        let before = self.ended_at.is_some_and(|ended| ended < since);
        self.spec.disk == disk && self.id.is_some() && self.spec.breaks_guests() && !before
    }
}
