//! What other threads ask of the ring thread, and the box in which they leave it.
//!
//! A command that needs an answer carries one half of an [`super::ask`] cell. A box that is closed (the ring thread has gone) drops
//! what is put into it, and dropping an [`Answer`] answers it, so nobody waits for a thread that does not exist.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crossbeam::queue::SegQueue;

use super::DiskId;
use super::ask::{Answer, Lost};
use super::asks::{Copied, Waited, Wish};
use super::carrier::{IoOutcome, IoRequest};
use super::controller::SweepDepth;
use super::disk::DiskShared;
use super::ends::{LastLook, run_aside};
use super::exports::ExportCommand;
use super::jobs::JobId;
use super::latency::Latencies;
use super::listing::RunningJob;
use super::opened::Opened;
use super::own_write::Writer;
use super::room::Share;
use crate::copier::plan::{Plan, Side};
use crate::error::Error;
use crate::interval_set::IntervalSet;
use crate::job::handle::Shared;
use crate::job::runner::AtEnd;
use crate::ring::{BufferRange, FileId, Wake};
use crate::storage::OpenedSource;
use crate::units::{ByteRange, Geometry};

/// Makes the plan of a job, once its place on the ring is known: the live disk as its source, its target, its part of the arena.
pub(super) type MakePlan = Box<dyn FnOnce(Side, FileId, BufferRange) -> Plan + Send>;

/// A fleece file for a job.
pub(super) struct NewFleece<F> {
    pub(super) file: F,
    /// How messages name it.
    pub(super) name: Arc<str>,
    /// Of direct I/O; `None`: buffered.
    pub(super) direct_alignment: Option<u32>,
    /// Clusters that it takes.
    pub(super) slots: u32,
}

/// A job to start.
pub(super) struct NewJob<F> {
    pub(super) disk: DiskId,
    pub(super) target: F,
    pub(super) fleece: Option<NewFleece<F>>,
    pub(super) geometry: Geometry,
    pub(super) set: Arc<IntervalSet>,
    pub(super) shared: Arc<Shared>,
    /// Of the engine's room.
    pub(super) share: Share,
    pub(super) depth: SweepDepth,
    pub(super) plan: MakePlan,
    pub(super) at_end: Option<AtEnd>,
    /// For groups that stand and fall together.
    pub(super) last_look: Option<LastLook>,
}

/// What becomes of the others when a job of a group does not succeed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GroupFailure {
    /// They are cancelled: the group is worth something as a whole only. None is complete before the work of all is done and each target
    /// was seen to be still there under its name. (One that is renamed or removed after that look, in the moment in which all end, is that job's
    /// failure alone.) One that has left something out under policy `ignore` is complete here: that was chosen for it, and its own result says so. Whoever
    /// wants none of the group then chooses [`ErrorPolicy::Report`](crate::modes::ErrorPolicy::Report).
    #[default]
    FailAll,
    /// They go on.
    GoOn,
}

/// Jobs to start at one instant.
pub(super) struct NewGroup<F> {
    pub(super) jobs: Vec<NewJob<F>>,
    /// More disks at which the barrier is raised. Without jobs this is a rehearsal: it shows whether an instant can be found.
    pub(super) more_disks: Vec<DiskId>,
    pub(super) on_failure: GroupFailure,
    /// How long guests may be kept waiting for those whose writes are under way.
    pub(super) timeout: Duration,
    /// Their numbers, in order.
    pub(super) answer: Answer<Result<Vec<JobId>, Error>>,
}

impl<F> NewGroup<F> {
    /// At which the barrier is raised; some may be named more than once.
    pub(super) fn disks(&self) -> impl Iterator<Item = DiskId> {
        self.jobs.iter().map(|job| job.disk).chain(self.more_disks.iter().copied())
    }
}

/// What the ring thread is asked for.
pub(super) enum Command<F, S> {
    /// A disk to carry.
    AddDisk {
        file: F,
        /// Of direct I/O; `None`: buffered.
        direct_alignment: Option<u32>,
        /// Whether zeros that keep their space are never written one by one.
        keep_is_fast: bool,
        disk: Arc<DiskShared>,
        opened: Option<Arc<Opened>>,
        share: Share,
        answer: Answer<Result<(), Error>>,
    },
    /// The last handle of a disk is gone. What it had open is closed with the rest.
    RemoveDisk { disk: DiskId, source: Option<Box<OpenedSource>> },
    /// A guest's request on a disk that the engine carries.
    Io { disk: DiskId, request: IoRequest, answer: Answer<IoOutcome> },
    /// A guest is about to change clusters that jobs have not copied, and jobs were asked for him before.
    Copy { wish: Wish, waited: Waited, answer: Answer<Copied> },
    /// A guest is about to write by himself: discards of that range that were put off are not to come after it, nor any that come as long as he lives.
    ForgetDiscards {
        disk: DiskId,
        range: ByteRange,
        writer: Weak<Writer>,
        answer: Answer<Result<(), Arc<Error>>>,
    },
    /// A read of a range as it was at the t0 of a job.
    Snapshot { job: JobId, range: ByteRange, answer: Answer<IoOutcome> },
    /// Jobs to start.
    Start(NewGroup<F>),
    /// Something about exports.
    Exports(ExportCommand<S>),
    /// What the guests of a disk have felt lately.
    Felt { disk: DiskId, answer: Answer<Result<Latencies, Error>> },
    /// Which jobs there are.
    Jobs { answer: Answer<Result<Vec<RunningJob>, Error>> },
    /// Nothing comes any more: the last handle of the engine is gone.
    Quit,
}

impl Lost for Result<(), Error> {
    fn lost() -> Self {
        Err(gone())
    }
}

impl Lost for Result<Vec<JobId>, Error> {
    fn lost() -> Self {
        Err(gone())
    }
}

impl Lost for Result<(), Arc<Error>> {
    /// Without a ring thread nothing that was put off is carried out any more.
    fn lost() -> Self {
        Ok(())
    }
}

impl Lost for IoOutcome {
    fn lost() -> Self {
        Self::new(Err(gone()))
    }
}

/// What is said when the ring thread is gone.
pub(super) fn gone() -> Error {
    Error::engine_died("engine", "its ring thread has ended")
}

/// See the module's header.
pub(super) struct Inbox<F, S> {
    commands: SegQueue<Command<F, S>>,
    closed: AtomicBool,
    /// Somebody who waited for a copy has gone.
    left: Arc<AtomicBool>,
    waker: Arc<dyn Wake>,
}

impl<F, S> Inbox<F, S> {
    pub(super) fn new(waker: Arc<dyn Wake>) -> Arc<Self> {
        Arc::new(Self {
            commands: SegQueue::new(),
            closed: AtomicBool::new(false),
            left: Arc::default(),
            waker,
        })
    }

    /// Set by one who waits for a copy and goes before the answer is there: he does not want it any more.
    pub(super) fn left(&self) -> &Arc<AtomicBool> {
        &self.left
    }

    /// Whether somebody who waited for a copy has gone since the last call. Nobody is woken for that: what has not begun by the next turn
    /// does not begin, and what is late by then is no failure.
    pub(super) fn has_someone_left(&self) -> bool {
        self.left.load(Ordering::Relaxed) && self.left.swap(false, Ordering::Acquire)
    }

    pub(super) fn send(&self, command: Command<F, S>) {
        self.commands.push(command);
        // Either the ring thread, which closes first and empties then, sees the command, or this thread sees it closed.
        if self.closed.load(Ordering::SeqCst) {
            self.drop_all();
        } else {
            self.waker.wake();
        }
    }

    pub(super) fn take(&self) -> Option<Command<F, S>> {
        self.commands.pop()
    }

    /// The ring thread is going.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.drop_all();
    }

    fn drop_all(&self) {
        while let Some(command) = self.commands.pop() {
            // A close may take its time, and those behind it wait to be let go.
            if let Command::RemoveDisk { source: Some(source), .. } = command {
                run_aside("engine-close", move |_| drop(source));
            }
        }
    }
}
