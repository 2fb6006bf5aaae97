//! An engine: a ring thread with its memory, and the handles to it.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::DiskId;
use super::ask::{ask, may_wait};
use super::backup::{self, Backup, BackupOptions};
use super::call_off::CallOff;
use super::command::{Command, GroupFailure, NewGroup, NewJob};
use super::disk::{DiskShared, File, Inner, LiveDisk, LiveInbox};
use super::exports::{MAX_CLIENTS, MAX_SERVERS, NbdListener, NbdOptions, NbdServer, ServerId};
use super::jobs::JobId;
use super::listing::RunningJob;
use super::opened::Registry;
use super::reactor::{CARRIER_BYTES, Reactor};
use super::room::Room;
use crate::copy::IoEngine;
use crate::error::{Error, Operation, Refusal};
use crate::ring::select::{self, OpenedRing, RingConfig};
use crate::ring::{Ring, Wake};
use crate::storage::{LiveAccess, Locator, alignment_of, keep_is_fast, node_at, open_live};

/// How to set an engine up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Which ring.
    pub io_engine: IoEngine,
    /// Bytes of all buffers together, 16 MiB to 1 GiB: each disk that the engine carries takes 4 MiB of it, each job 5 MiB (with clusters of
    /// 64 KiB). What finds no room is refused when it is started.
    pub memory: u64,
    /// Most clients of exports at a time, 0 to 1,024. Each takes a descriptor of the process: see [`RingConfig::descriptors`].
    pub clients: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { io_engine: IoEngine::Auto, memory: 32 << 20, clients: 0 }
    }
}

/// How to open a live disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// A file or a block device, raw.
    pub path: String,
    /// Whether the engine carries writes to it. An embedder with an I/O path of its own opens it for reading and takes permits.
    ///
    /// Either way other programs are kept off it, as far as they look at QEMU's locks: none may write to it, or read from it what must make
    /// sense as a whole. What this program does with descriptors of its own is its own affair, unless it locks them: see
    /// [`Engine::open_disk_that_is_locked`].
    pub writable: bool,
}

struct Handle {
    inbox: Arc<LiveInbox>,
    waker: Arc<dyn Wake>,
    next_disk: AtomicU64,
    next_server: AtomicU64,
    next_export: Arc<AtomicU64>,
    room: Arc<Room>,
    registry: Registry,
    memory: u64,
    end: EngineEnd,
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

/// Tells when an engine is gone.
#[derive(Clone, Debug)]
pub struct EngineEnd {
    /// Disconnected once all of it is gone.
    gone: Receiver<Infallible>,
    /// Disconnected once the ring thread works no more, which is sooner.
    stopped: Receiver<Infallible>,
    /// Why, if that was not its end.
    death: Arc<OnceLock<String>>,
}

impl EngineEnd {
    /// Wait for that, at most `limit`: `false`, it is not yet. It is gone once the last handle of it, of its disks and of its servers is, and all
    /// jobs and requests have ended; its disks and targets are closed then, and nobody finds them locked any more.
    ///
    /// # Panics
    /// In a callback on the ring thread, which would wait for itself.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        may_wait();
        self.gone.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected)
    }

    /// Wait until the engine carries nothing any more, which may be for as long as the program runs: why it has died, or `None` if it has
    /// come to its end. One that has died is not gone yet: its jobs are told that they have failed, each with its last steps.
    ///
    /// # Panics
    /// In a callback on the ring thread, which would wait for itself.
    #[must_use]
    pub fn wait_for_death(&self) -> Option<String> {
        may_wait();
        match self.stopped.recv() {
            Ok(never) => match never {},
            Err(_) => self.death.get().cloned(),
        }
    }
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
        if options.clients > MAX_CLIENTS {
            let reason = format!("{} are too many", options.clients);
            return Err(Error::refused(Refusal::BadArgument, Operation::Parse, "clients", reason)
                .advise(format!("choose up to {MAX_CLIENTS}")));
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

    /// To hear of when it is gone: a program that ends before that leaves its disks locked for a moment, which is as long as the
    /// kernel takes to clean up behind it.
    #[must_use]
    pub fn end(&self) -> EngineEnd {
        self.handle.end.clone()
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
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn open_disk(&self, options: &DiskOptions) -> Result<LiveDisk, Error> {
        self.open(&options.path, if options.writable { LiveAccess::Carried } else { LiveAccess::Permits })
    }

    /// Open a disk for permits alone, as with [`DiskOptions::writable`] unset, for an embedder that keeps other programs off it by
    /// locks of its own, as hypervisors do. Those of [`Self::open_disk`] would exclude them.
    ///
    /// # Errors
    /// As [`Self::open_disk`]; in use only if somebody says that nobody may read it.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn open_disk_that_is_locked(&self, path: &str) -> Result<LiveDisk, Error> {
        self.open(path, LiveAccess::PermitsAndLocks)
    }

    fn open(&self, path: &str, access: LiveAccess) -> Result<LiveDisk, Error> {
        may_wait();
        let locator = Locator::parse(path)?;
        // Before it is opened: the locks of a handle that is going would say that somebody else has it.
        let node = node_at(&locator);
        let enter = |node| self.handle.registry.enter(node, locator.as_str());
        let opened = node.map(enter).transpose()?;
        let source = open_live(&locator, access)?;
        if source.node() != node {
            let reason = "it was replaced by another file while it was being opened";
            return Err(Error::refused(
                Refusal::InUse,
                Operation::OpenSource,
                locator.as_str().to_owned(),
                reason,
            )
            .advise("try again"));
        }
        let id = DiskId(self.handle.next_disk.fetch_add(1, Ordering::Relaxed));
        let storage = source.storage();
        let share = self.handle.room.take(CARRIER_BYTES, 1, Operation::OpenSource, storage.name())?;
        let shared =
            DiskShared::new(id, Arc::from(storage.name()), source.length(), Arc::clone(&self.handle.waker));
        let (answer, asked) = ask();
        self.handle.inbox.send(Command::AddDisk {
            direct_alignment: alignment_of(storage.as_ref()),
            keep_is_fast: keep_is_fast(storage.as_ref()),
            file: storage,
            disk: Arc::clone(&shared),
            opened: opened.clone(),
            share,
            answer,
        });
        asked.wait()?;
        let inbox = Arc::clone(&self.handle.inbox);
        let writable = access == LiveAccess::Carried;
        let source = Some(Box::new(source));
        Ok(LiveDisk { inner: Arc::new(Inner { shared, inbox, source, opened, writable }) })
    }

    /// Serve disks and snapshots over NBD to those who come in by `listener`. There are none yet: see [`NbdServer::add_export`].
    ///
    /// # Errors
    /// Refusals: options out of range, an engine that was started without places for clients.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn start_nbd(&self, listener: NbdListener, options: NbdOptions) -> Result<NbdServer, Error> {
        may_wait();
        let server = ServerId(self.handle.next_server.fetch_add(1, Ordering::Relaxed));
        let inbox = Arc::clone(&self.handle.inbox);
        NbdServer::start(server, inbox, Arc::clone(&self.handle.next_export), listener, options)
    }

    /// The jobs that run, those included of which nobody has a handle any more.
    ///
    /// # Errors
    /// When the engine is gone, and its jobs with it.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn jobs(&self) -> Result<Vec<RunningJob>, Error> {
        may_wait();
        let (answer, asked) = ask();
        self.handle.inbox.send(Command::Jobs { answer });
        asked.wait()
    }

    /// Start a copy of `disk` as it is at one instant from now on. `disk` is one of this engine.
    ///
    /// # Errors
    /// Refusals, with nothing touched, and a start that found no instant without writes within its timeout.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
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
    /// Paths of targets and fleece files are opened in the caller's thread, for as long as that takes: `timeout` does not count it.
    ///
    /// # Errors
    /// As [`Self::start_backup`].
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn start_group(
        &self,
        disks: &[(LiveDisk, BackupOptions)],
        on_failure: GroupFailure,
        timeout: Duration,
    ) -> Result<Vec<Backup>, Error> {
        self.start_group_unless(disks, on_failure, timeout, &CallOff::default())
    }

    /// As [`Self::start_group`], for those whose paths may take long to answer: another thread may call it off. Where that comes before a target
    /// is touched, or while all that was touched can be undone, the start fails with everything as it was. Later it goes on, and its jobs are
    /// cancelled as jobs are, before anything is copied unless they have begun by then; a notice says so where old contents are gone.
    ///
    /// # Errors
    /// As [`Self::start_backup`], and [`ErrorKind::Cancelled`](crate::error::ErrorKind::Cancelled).
    ///
    /// # Panics
    /// As [`Self::start_group`].
    pub fn start_group_unless(
        &self,
        disks: &[(LiveDisk, BackupOptions)],
        on_failure: GroupFailure,
        timeout: Duration,
        call_off: &CallOff,
    ) -> Result<Vec<Backup>, Error> {
        may_wait();
        let cancelled = || Error::cancelled(disks.first().map_or("", |(disk, _)| disk.name()));
        let still_wanted = || if call_off.was_called() { Err(cancelled()) } else { Ok(()) };
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
        still_wanted()?;
        if checked.iter().any(backup::Checked::destroys) {
            let more_disks = disks.iter().map(|(disk, _)| disk.inner.shared.id()).collect();
            self.ask_to_start(Vec::new(), more_disks, on_failure, timeout)?;
            still_wanted()?;
        }
        let can_be_undone = !checked.iter().any(backup::Checked::leaves_a_mark);
        let (mut jobs, mut backups) = (Vec::new(), Vec::new());
        for prepared in backup::prepare_all(checked)? {
            let (job, backup) = prepared.split();
            jobs.push(job);
            backups.push(backup);
        }
        let wanted = call_off.hand_over(backups.iter().map(backup::Starting::job).collect());
        let started = if !wanted && can_be_undone {
            Err(cancelled())
        } else {
            self.ask_to_start(jobs, Vec::new(), on_failure, timeout)
        };
        match started {
            Ok(numbers) => {
                for (place, backup) in backups.iter_mut().enumerate() {
                    if call_off.has_cancelled(place) {
                        backup.called_off();
                    }
                }
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
        sockets: if options.clients > 0 { options.clients + MAX_SERVERS } else { 0 },
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

fn carry_on<R: Ring<File = File, Socket = OwnedFd>>(
    ring: R,
    options: &EngineOptions,
    notice: Option<Arc<str>>,
    started: &Sender<Result<Engine, Error>>,
) {
    let waker = ring.waker();
    // Declared first: dropped last, whatever becomes of the rest.
    let (ending, gone) = bounded(0);
    let (working, stopped) = bounded(0);
    let death = Arc::new(OnceLock::new());
    let mut reactor = Reactor::new(ring);
    reactor.tell_end(ending.clone());
    super::ask::this_is_a_ring_thread();
    let handle = Handle {
        inbox: reactor.inbox(),
        waker,
        next_disk: AtomicU64::new(0),
        next_server: AtomicU64::new(0),
        next_export: Arc::default(),
        room: reactor.room(),
        registry: Registry::default(),
        memory: options.memory,
        end: EngineEnd { gone, stopped, death: Arc::clone(&death) },
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
    // First of all: what comes now may take its time.
    death.set(reason.clone()).expect("nobody else sets it");
    drop(working);
    if std::panic::catch_unwind(AssertUnwindSafe(|| reactor.die(&reason))).is_err() {
        tracing::error!("the engine could not be taken down");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_is_told_with_its_reason_and_an_end_is_none() {
        let options = EngineOptions { io_engine: IoEngine::Threads, memory: 16 << 20, clients: 0 };
        let engine = Engine::start(&options).expect("an engine");
        let end = engine.end();
        drop(engine);
        assert_eq!(end.wait_for_death(), None);

        let engine = Engine::start(&options).expect("an engine");
        let end = engine.end();
        // A bug of ours: there is no such disk.
        engine.handle.inbox.send(Command::RemoveDisk { disk: DiskId(7), source: None });
        let why = end.wait_for_death().expect("it has died");
        assert!(why.starts_with("internal error: "), "{why}");
        assert!(end.wait(Duration::from_secs(60)));
        assert!(engine.jobs().is_err() && end.wait_for_death() == Some(why));
    }
}
