//! An engine: a ring thread with its memory, and the handles to it.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};

use super::DiskId;
use super::ask::ask;
use super::backup::{self, Backup, BackupOptions};
use super::command::{Command, GroupFailure, Inbox, NewGroup, NewJob};
use super::disk::{DiskShared, File, Inner, LiveDisk};
use super::jobs::JobId;
use super::listing::RunningJob;
use super::opened::Registry;
use super::reactor::{CARRIER_BYTES, Reactor};
use super::room::Room;
use crate::copy::IoEngine;
use crate::error::{Error, Operation, Refusal};
use crate::ring::select::{self, OpenedRing, RingConfig};
use crate::ring::{Ring, Wake};
use crate::storage::{Locator, alignment_of, open_live};

/// How to set an engine up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Which ring.
    pub io_engine: IoEngine,
    /// Bytes of all buffers together, 16 MiB to 1 GiB: each disk that the engine carries takes 4 MiB of it, each job 5 MiB (with clusters of
    /// 64 KiB). What finds no room is refused when it is started.
    pub memory: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { io_engine: IoEngine::Auto, memory: 32 << 20 }
    }
}

/// How to open a live disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// A file or a block device, raw.
    pub path: String,
    /// Whether the engine carries writes to it. An embedder with an I/O path of its own opens it for reading and takes permits.
    pub writable: bool,
}

struct Handle {
    inbox: Arc<Inbox<File>>,
    waker: Arc<dyn Wake>,
    next_disk: AtomicU64,
    room: Arc<Room>,
    registry: Registry,
    memory: u64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inbox.send(Command::Quit);
    }
}

/// A ring thread that carries disks and jobs. Cheap to clone. With the last clone gone it ends, after its disks and jobs: a job runs on to
/// its end whether or not anybody has a handle of it, so one that does not end by itself (mode `none`, or a pause) is cancelled first; [`Self::jobs`]
/// has them all.
#[derive(Clone)]
pub struct Engine {
    handle: Arc<Handle>,
    notice: Option<Arc<str>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("memory", &self.handle.memory).finish_non_exhaustive()
    }
}

impl Engine {
    /// Start one.
    ///
    /// # Errors
    /// When the ring that was asked for is refused, or memory or a thread cannot be had.
    pub fn start(options: &EngineOptions) -> Result<Self, Error> {
        let refused =
            |reason: String| Error::refused(Refusal::BadArgument, Operation::Parse, "memory", reason);
        if !(16 << 20..=1 << 30).contains(&options.memory) {
            return Err(
                refused(format!("{} bytes are out of range", options.memory)).advise("choose 16M to 1G")
            );
        }
        let options = options.clone();
        let (started, outcome) = bounded(1);
        std::thread::Builder::new()
            .name("engine-ring".into())
            .spawn(move || carry(&options, &started))
            .map_err(|error| {
                Error::refused(Refusal::Unavailable, Operation::Copy, "engine", "cannot start a thread")
                    .because(error)
            })?;
        outcome.recv().unwrap_or_else(|_| Err(super::command::gone()))
    }

    /// What the user should know, if anything: that io_uring was refused.
    #[must_use]
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// Open a disk on this engine.
    ///
    /// # Errors
    /// Refusals: no such disk, no permission, in use, no memory left.
    pub fn open_disk(&self, options: &DiskOptions) -> Result<LiveDisk, Error> {
        let source = open_live(&Locator::parse(&options.path)?, options.writable)?;
        let id = DiskId(self.handle.next_disk.fetch_add(1, Ordering::Relaxed));
        let storage = source.storage();
        let enter = |node| self.handle.registry.enter(node, storage.name());
        let opened = source.node().map(enter).transpose()?;
        let share = self.handle.room.take(CARRIER_BYTES, 1, Operation::OpenSource, storage.name())?;
        let shared =
            DiskShared::new(id, Arc::from(storage.name()), source.length(), Arc::clone(&self.handle.waker));
        let (answer, asked) = ask();
        self.handle.inbox.send(Command::AddDisk {
            direct_alignment: alignment_of(storage.as_ref()),
            file: storage,
            disk: Arc::clone(&shared),
            opened: opened.clone(),
            share,
            answer,
        });
        asked.wait()?;
        let inbox = Arc::clone(&self.handle.inbox);
        let writable = options.writable;
        Ok(LiveDisk { inner: Arc::new(Inner { shared, inbox, source, opened, writable }) })
    }

    /// The jobs that run, those included of which nobody has a handle any more.
    ///
    /// # Errors
    /// When the engine is gone, and its jobs with it.
    pub fn jobs(&self) -> Result<Vec<RunningJob>, Error> {
        let (answer, asked) = ask();
        self.handle.inbox.send(Command::Jobs { answer });
        asked.wait()
    }

    /// Start a copy of `disk` as it is at one instant from now on. `disk` is one of this engine.
    ///
    /// # Errors
    /// Refusals, with nothing touched, and a start that found no instant without writes within its timeout.
    pub fn start_backup(&self, disk: &LiveDisk, options: &BackupOptions) -> Result<Backup, Error> {
        let timeout = options.start_timeout;
        let mut backups =
            self.start_group(&[(disk.clone(), options.clone())], GroupFailure::GoOn, timeout)?;
        Ok(backups.pop().expect("one for each disk"))
    }

    /// Start copies of several disks as they all are at the same instant: all of them, or none. One start is under way at a time: `timeout` counts
    /// from its turn, and holds for all of them ([`BackupOptions::start_timeout`] is for one alone).
    ///
    /// An existing file that is to be overwritten is emptied before the start, but not before an instant without writes was found, for a
    /// trial: a write that hangs leaves the old contents as they are.
    ///
    /// # Errors
    /// As [`Self::start_backup`].
    pub fn start_group(
        &self,
        disks: &[(LiveDisk, BackupOptions)],
        on_failure: GroupFailure,
        timeout: Duration,
    ) -> Result<Vec<Backup>, Error> {
        // All that can be refused before anything of any target is touched.
        for (disk, _) in disks {
            if !Arc::ptr_eq(&disk.inner.inbox, &self.handle.inbox) {
                let (name, reason) = (disk.name().to_owned(), "it was opened on another engine");
                return Err(Error::refused(Refusal::BadArgument, Operation::Copy, name, reason)
                    .advise("start its backup there, or open it here"));
            }
        }
        let room = &self.handle.room;
        let checked: Result<Vec<_>, Error> =
            disks.iter().map(|(disk, options)| backup::check(disk, options, room)).collect();
        let checked = checked?;
        if checked.iter().any(backup::Checked::destroys) {
            let more_disks = disks.iter().map(|(disk, _)| disk.inner.shared.id()).collect();
            self.ask_to_start(Vec::new(), more_disks, on_failure, timeout)?;
        }
        let (mut jobs, mut backups) = (Vec::new(), Vec::new());
        for prepared in backup::prepare_all(checked)? {
            let (job, backup) = prepared.split();
            jobs.push(job);
            backups.push(backup);
        }
        match self.ask_to_start(jobs, Vec::new(), on_failure, timeout) {
            Ok(numbers) => {
                let inbox = &self.handle.inbox;
                let started = backups.into_iter().zip(numbers);
                Ok(started.map(|(backup, job)| backup.started(job, Arc::clone(inbox))).collect())
            }
            Err(error) => {
                backups.into_iter().for_each(backup::Starting::undo);
                Err(error)
            }
        }
    }

    fn ask_to_start(
        &self,
        jobs: Vec<NewJob<File>>,
        more_disks: Vec<DiskId>,
        on_failure: GroupFailure,
        timeout: Duration,
    ) -> Result<Vec<JobId>, Error> {
        let (answer, asked) = ask();
        let group = NewGroup { jobs, more_disks, on_failure, timeout, answer };
        self.handle.inbox.send(Command::Start(group));
        asked.wait()
    }
}

/// The ring thread's life.
fn carry(options: &EngineOptions, started: &Sender<Result<Engine, Error>>) {
    let bytes = usize::try_from(options.memory).expect("at most 1 GiB");
    let config = RingConfig {
        arena_bytes: bytes,
        capacity: RingConfig::MAX_CAPACITY.min(1024),
        threads: RingConfig::DEFAULT_THREADS,
    };
    let told = match select::open(options.io_engine, &config) {
        Ok(opened) => {
            let notice = opened.notice.map(Arc::from);
            return match opened.ring {
                OpenedRing::Uring(ring) => carry_on(ring, options, notice, started),
                OpenedRing::Threads(ring) => carry_on(ring, options, notice, started),
            };
        }
        Err(error) => {
            let refused = Error::refused(Refusal::Unavailable, Operation::Copy, "engine", error.to_string());
            started.send(Err(refused.because(error)))
        }
    };
    if told.is_err() {
        tracing::debug!("nobody waits for the engine to start");
    }
}

fn carry_on<R: Ring<File = File>>(
    ring: R,
    options: &EngineOptions,
    notice: Option<Arc<str>>,
    started: &Sender<Result<Engine, Error>>,
) {
    let waker = ring.waker();
    let mut reactor = Reactor::new(ring);
    super::ask::this_is_a_ring_thread();
    let handle = Handle {
        inbox: reactor.inbox(),
        waker,
        next_disk: AtomicU64::new(0),
        room: reactor.room(),
        registry: Registry::default(),
        memory: options.memory,
    };
    let engine = Engine { handle: Arc::new(handle), notice };
    if started.send(Ok(engine)).is_err() {
        tracing::debug!("nobody waits for the engine to start");
    }
    let ran = std::panic::catch_unwind(AssertUnwindSafe(|| reactor.run()));
    let reason = match ran {
        Ok(Ok(())) => return reactor.close(),
        Ok(Err(failure)) => failure.to_string(),
        Err(panic) => format!("internal error: {}", crate::job::handle::panic_text(panic.as_ref())),
    };
    tracing::error!(reason, "the engine has died");
    if std::panic::catch_unwind(AssertUnwindSafe(|| reactor.die(&reason))).is_err() {
        tracing::error!("the engine could not be taken down");
    }
}
