//! The states of a job and what may be asked of it in each.
//!
//! ```text
//! created → running ⇄ paused
//!              │
//!              ├─► waiting → pending → concluded → null      (the work is done)
//!              └─► aborting ──────────► concluded → null     (failure or cancel, from any state before concluded)
//! ```
//! `waiting` is left once the work of a group is done (a job alone does not stay), `pending` by `finalize` (at once with
//! auto-finalize), `concluded` by `dismiss` (at once with auto-dismiss). The verbs allowed in each state are QEMU's.
//!
//! Jobs of a group that stands and falls together wait for each other twice: in `waiting` until the work of all is done, and in `pending`
//! until all may conclude. Each change of state is kept until it was told ([`Lifecycle::take_changes`]).
//!
//! From the moment at which a job's end is decided until that was told, its last steps are taken, which may take their time. It shows `pending`
//! then, but verbs find it as good as `concluded`: what is accepted has its effect, so a cancel that is too late is refused. Of an offline copy it
//! is decided earlier, while it shows `running`: before its map is removed.

use std::fmt;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Made, not started.
    Created,
    /// At work.
    Running,
    /// Not claiming clusters: a user asked, or an error with policy `stop`. Nothing is in flight.
    Paused,
    /// The work is done; others of its group are not.
    Waiting,
    /// The work is done; `finalize` is due.
    Pending,
    /// Failing or being cancelled.
    Aborting,
    /// Ended; the result can be read; `dismiss` is due.
    Concluded,
    /// Gone.
    Null,
}

/// What may be asked of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// End it without a result.
    Cancel,
    /// Stop claiming clusters.
    Pause,
    /// Go on.
    Resume,
    /// Change the speed limit.
    SetSpeed,
    /// Let a job in `pending` conclude.
    Finalize,
    /// Forget a job in `concluded`.
    Dismiss,
    /// For mirrors; never allowed for a copy.
    Complete,
}

/// Whether the sweep has met an error that paused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IoStatus {
    /// No.
    Ok,
    /// The target ran out of space.
    NoSpace,
    /// Any other error.
    Failed,
}

/// Why a verb was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The state does not allow it.
    #[error("a job in state '{status}' cannot accept '{verb}'")]
    State {
        /// Where the job stands.
        status: Status,
        /// What was asked.
        verb: Verb,
    },
    /// It is paused by a user already.
    #[error("the job is already paused")]
    AlreadyPaused,
    /// It is not paused.
    #[error("the job is not paused")]
    NotPaused,
}

impl Status {
    /// As QMP spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether nothing happens any more: `concluded` or `null`.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Concluded | Self::Null)
    }

    /// Whether `verb` is allowed here.
    #[must_use]
    pub fn allows(self, verb: Verb) -> bool {
        match verb {
            Verb::Cancel => {
                matches!(self, Self::Created | Self::Running | Self::Paused | Self::Waiting | Self::Pending)
            }
            Verb::Pause | Verb::Resume | Verb::SetSpeed => {
                matches!(self, Self::Created | Self::Running | Self::Paused)
            }
            Verb::Finalize => self == Self::Pending,
            Verb::Dismiss => self == Self::Concluded,
            Verb::Complete => false,
        }
    }

    /// Whether a job may go from here to `next`.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        use Status::{Aborting, Concluded, Created, Null, Paused, Pending, Running, Waiting};
        matches!(
            (self, next),
            (Created, Running | Aborting)
                | (Running, Paused | Waiting | Aborting)
                | (Paused, Running | Aborting)
                | (Waiting, Pending | Aborting)
                | (Pending | Aborting, Concluded)
                | (Pending, Aborting)
                | (Concluded, Null)
        )
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Complete => "complete",
        })
    }
}

/// A job's state, with the pauses that hold it. See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    status: Status,
    io_status: IoStatus,
    user_paused: bool,
    auto_finalize: bool,
    auto_dismiss: bool,
    finalize_asked: bool,
    /// Whether it concludes with its group only, and whether that may conclude.
    grouped: bool,
    group_concludes: bool,
    /// Nothing changes any more how it ends.
    decided: bool,
    /// It is about to be complete.
    uncancellable: bool,
    /// States that were entered and not told yet.
    changes: Vec<Status>,
}

impl Lifecycle {
    /// A job in `created`.
    #[must_use]
    pub fn new(auto_finalize: bool, auto_dismiss: bool) -> Self {
        Self {
            status: Status::Created,
            io_status: IoStatus::Ok,
            user_paused: false,
            auto_finalize,
            auto_dismiss,
            finalize_asked: false,
            grouped: false,
            group_concludes: false,
            decided: false,
            uncancellable: false,
            changes: Vec::new(),
        }
    }

    /// It concludes together with others, or not at all.
    pub fn join_group(&mut self) {
        self.grouped = true;
    }

    /// The states that were entered since this was last called, in order.
    pub fn take_changes(&mut self) -> Vec<Status> {
        std::mem::take(&mut self.changes)
    }

    /// Where the job stands.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    /// Whether it is paused on an error.
    #[must_use]
    pub fn io_status(&self) -> IoStatus {
        self.io_status
    }

    /// Whether anything (a user or an error) wants it paused.
    #[must_use]
    pub fn wants_pause(&self) -> bool {
        self.user_paused || self.io_status != IoStatus::Ok
    }

    /// Check `verb` against the state.
    ///
    /// # Errors
    /// The refusal.
    pub fn check(&self, verb: Verb) -> Result<(), Refusal> {
        let over =
            self.decided && self.status == Status::Pending && matches!(verb, Verb::Cancel | Verb::Finalize);
        let too_late = over || (self.uncancellable && verb == Verb::Cancel);
        let status = if too_late { Status::Concluded } else { self.status };
        if status.allows(verb) { Ok(()) } else { Err(Refusal::State { status, verb }) }
    }

    /// A user asks for a pause. The job is `paused` once [`Self::drained`] is told.
    ///
    /// # Errors
    /// The refusal.
    pub fn pause(&mut self) -> Result<(), Refusal> {
        self.check(Verb::Pause)?;
        if self.user_paused {
            return Err(Refusal::AlreadyPaused);
        }
        self.user_paused = true;
        Ok(())
    }

    /// A user asks to go on; lifts a pause on an error too.
    ///
    /// # Errors
    /// The refusal.
    pub fn resume(&mut self) -> Result<(), Refusal> {
        self.check(Verb::Resume)?;
        if !self.wants_pause() {
            return Err(Refusal::NotPaused);
        }
        self.user_paused = false;
        self.io_status = IoStatus::Ok;
        if self.status == Status::Paused {
            self.become_(Status::Running);
        }
        Ok(())
    }

    /// The sweep met an error that pauses it.
    pub fn stopped_on_error(&mut self, io_status: IoStatus) {
        assert_ne!(io_status, IoStatus::Ok, "a pause on an error needs one");
        self.io_status = io_status;
    }

    /// Nothing is in flight: a job that wants to be paused is.
    pub fn drained(&mut self) {
        if self.wants_pause() && self.status == Status::Running {
            self.become_(Status::Paused);
        }
    }

    /// The job starts.
    pub fn start(&mut self) {
        self.become_(Status::Running);
    }

    /// It is about to be complete, and cannot be cancelled any more.
    pub fn refuse_cancels(&mut self) {
        self.uncancellable = true;
    }

    /// The work is done, and flushed. Goes to `waiting`, and on to `pending` unless there is a group to wait for.
    pub fn finished(&mut self) {
        self.user_paused = false;
        if self.status == Status::Paused {
            self.become_(Status::Running);
        }
        self.become_(Status::Waiting);
        if !self.grouped {
            self.become_(Status::Pending);
        }
    }

    /// The work of the whole group is done. Goes to `pending`.
    pub fn group_finished(&mut self) {
        self.become_(Status::Pending);
    }

    /// Whether it would conclude if it were alone: automatically, or on request.
    #[must_use]
    pub fn is_finalized(&self) -> bool {
        self.auto_finalize || self.finalize_asked
    }

    /// Whether `finalize` was asked for, which is for the whole group.
    #[must_use]
    pub fn finalize_asked(&self) -> bool {
        self.finalize_asked
    }

    /// The whole group may conclude: how it ends is decided.
    pub fn conclude_with_group(&mut self) {
        self.group_concludes = true;
        self.decided = true;
    }

    /// Another of the group was cancelled before [`Self::conclude_with_group`] came to all of them.
    pub fn conclude_not_yet(&mut self) {
        self.group_concludes = false;
        self.decided = false;
    }

    /// If it may conclude it will, and as it stands: `false`, it may not.
    pub fn decide(&mut self) -> bool {
        self.decided |= self.may_conclude();
        self.decided
    }

    /// `finalize`: a job in `pending` may conclude; it does when [`Self::conclude`] is told.
    ///
    /// # Errors
    /// The refusal.
    pub fn finalize(&mut self) -> Result<(), Refusal> {
        self.check(Verb::Finalize)?;
        self.finalize_asked = true;
        Ok(())
    }

    /// The job fails or is cancelled. No effect once it is aborting or has ended.
    pub fn abort(&mut self) {
        if self.status.may_become(Status::Aborting) {
            self.become_(Status::Aborting);
        }
    }

    /// Whether nothing keeps the job from concluding: it aborts, or it is pending and (automatically or on request) finalized.
    #[must_use]
    pub fn may_conclude(&self) -> bool {
        match self.status {
            Status::Aborting => true,
            Status::Pending if self.grouped => self.group_concludes,
            Status::Pending => self.is_finalized(),
            _ => false,
        }
    }

    /// The end of an abort, or of `pending`: everything of the job is released.
    pub fn conclude(&mut self) {
        self.become_(Status::Concluded);
        if self.auto_dismiss {
            self.become_(Status::Null);
        }
    }

    /// `dismiss`: from `concluded` to `null`.
    ///
    /// # Errors
    /// The refusal.
    pub fn dismiss(&mut self) -> Result<(), Refusal> {
        self.check(Verb::Dismiss)?;
        self.become_(Status::Null);
        Ok(())
    }

    fn become_(&mut self, next: Status) {
        assert!(self.status.may_become(next), "a job cannot go from {} to {next}", self.status);
        tracing::debug!(from = self.status.as_str(), to = next.as_str(), "job state");
        self.status = next;
        self.changes.push(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Status; 8] = [
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Waiting,
        Status::Pending,
        Status::Aborting,
        Status::Concluded,
        Status::Null,
    ];

    #[test]
    fn verbs_are_allowed_where_the_table_says() {
        let allowed = |verb| ALL.iter().filter(|s| s.allows(verb)).map(|s| s.as_str()).collect::<Vec<_>>();
        assert_eq!(allowed(Verb::Cancel), ["created", "running", "paused", "waiting", "pending"]);
        for verb in [Verb::Pause, Verb::Resume, Verb::SetSpeed] {
            assert_eq!(allowed(verb), ["created", "running", "paused"]);
        }
        assert_eq!(allowed(Verb::Finalize), ["pending"]);
        assert_eq!(allowed(Verb::Dismiss), ["concluded"]);
        assert!(allowed(Verb::Complete).is_empty());
    }

    #[test]
    fn a_pause_takes_hold_once_drained_and_is_lifted_once() {
        let mut job = Lifecycle::new(true, true);
        job.start();
        job.pause().unwrap();
        assert_eq!(job.status(), Status::Running);
        assert_eq!(job.pause(), Err(Refusal::AlreadyPaused));
        job.drained();
        assert_eq!(job.status(), Status::Paused);
        job.resume().unwrap();
        assert_eq!(job.status(), Status::Running);
        assert_eq!(job.resume(), Err(Refusal::NotPaused));
    }

    #[test]
    fn resume_lifts_a_pause_on_an_error() {
        let mut job = Lifecycle::new(true, true);
        job.start();
        job.stopped_on_error(IoStatus::NoSpace);
        job.drained();
        assert_eq!((job.status(), job.io_status()), (Status::Paused, IoStatus::NoSpace));
        job.resume().unwrap();
        assert_eq!((job.status(), job.io_status()), (Status::Running, IoStatus::Ok));
    }

    #[test]
    fn without_the_automatics_a_job_waits_to_be_finalized_and_dismissed() {
        let mut job = Lifecycle::new(false, false);
        job.start();
        job.finished();
        assert_eq!(job.status(), Status::Pending);
        assert!(job.dismiss().is_err() && !job.may_conclude());
        job.finalize().unwrap();
        assert!(job.may_conclude());
        job.conclude();
        assert_eq!(job.status(), Status::Concluded);
        assert!(job.finalize().is_err());
        job.dismiss().unwrap();
        assert_eq!(job.status(), Status::Null);
    }

    #[test]
    fn one_of_a_group_waits_for_the_others() {
        let mut job = Lifecycle::new(true, true);
        job.join_group();
        job.start();
        job.finished();
        assert_eq!((job.status(), job.may_conclude()), (Status::Waiting, false));
        job.group_finished();
        assert_eq!((job.status(), job.may_conclude()), (Status::Pending, false));
        assert!(job.is_finalized() && !job.finalize_asked());
        job.conclude_with_group();
        assert!(job.may_conclude());
        job.conclude();
        let told = [Status::Running, Status::Waiting, Status::Pending, Status::Concluded, Status::Null];
        assert_eq!(job.take_changes(), told);
        assert!(job.take_changes().is_empty(), "each is told once");
    }

    #[test]
    fn what_comes_after_the_end_was_decided_is_too_late() {
        let mut job = Lifecycle::new(false, true);
        job.start();
        assert!(!job.decide());
        job.finished();
        assert!(!job.decide(), "it waits to be finalized");
        assert_eq!(job.check(Verb::Cancel), Ok(()));
        job.finalize().unwrap();
        assert!(job.decide() && job.status() == Status::Pending);
        for verb in [Verb::Cancel, Verb::Finalize] {
            assert_eq!(job.check(verb), Err(Refusal::State { status: Status::Concluded, verb }));
        }
        assert!(job.dismiss().is_err(), "its end was not told yet");
        job.conclude();
        let mut failing = Lifecycle::new(true, true);
        failing.abort();
        assert!(failing.decide());
        let refused = Refusal::State { status: Status::Aborting, verb: Verb::Cancel };
        assert_eq!(failing.check(Verb::Cancel), Err(refused));
    }

    #[test]
    fn a_copy_that_is_about_to_be_complete_cannot_be_cancelled() {
        let mut job = Lifecycle::new(false, true);
        job.start();
        assert_eq!(job.check(Verb::Cancel), Ok(()));
        job.refuse_cancels();
        let refused = Refusal::State { status: Status::Concluded, verb: Verb::Cancel };
        assert_eq!(job.check(Verb::Cancel), Err(refused));
        assert_eq!(job.check(Verb::Pause), Ok(()));
        job.finished();
        assert_eq!(job.check(Verb::Cancel), Err(refused));
        assert_eq!(job.check(Verb::Finalize), Ok(()));
    }

    #[test]
    fn a_group_that_cannot_conclude_after_all_can_be_cancelled() {
        let mut job = Lifecycle::new(true, true);
        job.join_group();
        job.start();
        job.finished();
        job.group_finished();
        job.conclude_with_group();
        assert!(job.check(Verb::Cancel).is_err());
        job.conclude_not_yet();
        assert!(job.check(Verb::Cancel).is_ok() && !job.decide());
    }

    #[test]
    fn an_abort_ends_from_every_state_before_concluded() {
        for prepare in [0, 1, 2] {
            let mut job = Lifecycle::new(true, false);
            if prepare > 0 {
                job.start();
            }
            if prepare > 1 {
                job.pause().unwrap();
                job.drained();
            }
            job.abort();
            job.abort();
            assert!(job.check(Verb::Cancel).is_err());
            job.conclude();
            job.dismiss().unwrap();
        }
    }
}
