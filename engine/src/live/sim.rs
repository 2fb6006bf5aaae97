//! A live engine over the simulated ring, turned by hand: for tests.
//!
//! It is the product's own reactor; the only difference is that whoever drives it stands between its turns, where guests come
//! and go, and between the two halves of a turn, where t0 can be observed before any later write has completed.

use std::sync::Arc;
use std::time::Duration;

use super::DiskId;
use super::admission::{Attempt, attempt_unnested};
use super::ask::{Answer, Asked, ask, ask_noting};
use super::asks::{Copied, Waited, Wish};
use super::carrier::{CarrierLimits, IoOutcome, IoRequest};
use super::command::{Command, GroupFailure, Inbox, NewFleece, NewGroup, NewJob};
use super::controller::SweepDepth;
use super::disk::DiskShared;
use super::exports::{Backend, ExportCommand, ExportId, NbdOptions, NewExport, Removal, ServerId};
use super::jobs::JobId;
use super::reactor::{CARRIER_BYTES, Reactor};
use super::sim_writers::Writers;
pub use super::sim_writers::{SimBeginWrite, SimSteps};
use crate::copier::plan::{Plan, PlantedBug, Side};
use crate::error::{Error, Operation};
use crate::interval_set::IntervalSet;
use crate::job::handle::Shared;
use crate::job::runner::{AtEnd, empty_progress};
use crate::job::{JobHandle, JobResult, Lifecycle};
use crate::ring::sim::{SimRing, SimSocket};
use crate::ring::{BufferRange, FileId, Ring, Wait};
use crate::units::{ByteRange, ClusterRange, Geometry, Length, Timestamp};

/// A disk of a [`SimEngine`].
#[derive(Clone)]
pub struct SimDisk(pub(super) Arc<DiskShared>);

/// A job for a [`SimEngine`].
pub struct SimJob {
    /// The live disk.
    pub disk: SimDisk,
    /// The target's number in the world.
    pub target: usize,
    /// Length and cluster size.
    pub geometry: Geometry,
    /// Slots that the plan asks for.
    pub slots: u32,
    /// What the sweep may have in flight.
    pub depth: SweepDepth,
    /// The plan, given its source, the target's place on the ring, and its part of the arena.
    pub plan: Box<dyn FnOnce(Side, FileId, BufferRange) -> Plan + Send>,
}

/// What is to be seen of a job under way.
#[derive(Clone, Copy, Debug)]
pub struct SimJobState {
    /// Its target's number in the world.
    pub target: usize,
    /// Clusters that its sweep has in flight.
    pub sweep: u32,
    /// Runs of zeros that it has in flight.
    pub zero_runs: u32,
    /// Whether guests still copy for it before they write.
    pub attached: bool,
    /// Whether its end is decided.
    pub ends: bool,
    /// Whether it is decided that it does not succeed.
    pub fails: bool,
    /// Clusters in its list of those to try again.
    pub to_retry: usize,
}

/// A fleece file for a [`SimJob`].
#[derive(Clone, Copy, Debug)]
pub struct SimFleece {
    /// Its number in the world.
    pub file: usize,
    /// Alignment of direct I/O.
    pub direct_alignment: Option<u32>,
    /// Clusters that it takes.
    pub slots: u32,
}

/// A server of a [`SimEngine`].
#[derive(Clone, Copy, Debug)]
pub struct SimServer(ServerId);

/// An export of a [`SimEngine`].
#[derive(Clone, Copy, Debug)]
pub struct SimExport(ExportId);

/// Something asked for, whose answer comes in a later turn.
pub struct Pending<T>(Asked<T>);

impl<T> Pending<T> {
    /// The answer, once.
    #[must_use]
    pub fn take(&self) -> Option<T> {
        self.0.try_take()
    }
}

/// Copies that were asked for, whose outcome comes in a later turn.
pub struct PendingCopy(Asked<Copied>);

impl PendingCopy {
    /// The outcome, once.
    #[must_use]
    pub fn take(&self) -> Option<Result<(), Arc<Error>>> {
        self.0.try_take().map(|copied| copied.outcome)
    }
}

/// See the module's header.
pub struct SimEngine {
    reactor: Option<Reactor<SimRing>>,
    next_disk: u64,
    carrier_bytes: u32,
    writers: Arc<Writers>,
    at_end: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl SimEngine {
    /// An engine over `ring`.
    #[must_use]
    pub fn new(ring: SimRing) -> Self {
        let waker = ring.waker();
        let reactor = Reactor::new(ring);
        let writers = Writers::new(Arc::clone(reactor.inbox().left()), waker);
        let reactor = Some(reactor);
        Self { reactor, next_disk: 0, carrier_bytes: CARRIER_BYTES, writers, at_end: None }
    }

    /// What is to be done, off the ring thread, at the end of each job that is asked for from now on.
    pub fn set_at_end(&mut self, at_end: impl Fn() + Send + Sync + 'static) {
        self.at_end = Some(Arc::new(at_end));
    }

    /// Put a bug in, or none.
    pub fn plant(&mut self, bug: Option<PlantedBug>) {
        self.reactor_mut().planted.bug = bug;
        self.writers.plant(bug);
    }

    /// Bounds, and bytes of the arena, of the carriers of disks to come.
    pub fn set_carrier(&mut self, limits: CarrierLimits, bytes: u32) {
        self.reactor_mut().carrier_limits = limits;
        self.carrier_bytes = bytes;
    }

    /// Its parts, for a look at what happens within a turn.
    pub(super) fn reactor_mut(&mut self) -> &mut Reactor<SimRing> {
        self.reactor.as_mut().expect("it has not died")
    }

    fn reactor(&self) -> &Reactor<SimRing> {
        self.reactor.as_ref().expect("it has not died")
    }

    pub(super) fn send(&self, command: Command<usize, SimSocket>) {
        self.inbox().send(command);
    }

    pub(super) fn inbox(&self) -> Arc<Inbox<usize, SimSocket>> {
        self.reactor().inbox()
    }

    /// Carry disk `file` of the world.
    pub fn add_disk(
        &mut self,
        file: usize,
        length: Length,
        direct_alignment: Option<u32>,
    ) -> (SimDisk, Pending<Result<(), Error>>) {
        let id = DiskId(self.next_disk);
        self.next_disk += 1;
        let waker = self.reactor().ring().waker();
        let disk = DiskShared::new(id, Arc::from(format!("disk{file}")), length, waker);
        let (answer, asked) = ask();
        let bytes = self.carrier_bytes;
        match self.reactor().room().take(bytes, 1, Operation::OpenSource, &disk.name()) {
            Ok(share) => {
                let (disk, opened, keep_is_fast) = (Arc::clone(&disk), None, true);
                self.send(Command::AddDisk {
                    file,
                    direct_alignment,
                    keep_is_fast,
                    disk,
                    opened,
                    share,
                    answer,
                });
            }
            Err(error) => answer.give(Err(error)),
        }
        (SimDisk(disk), Pending(asked))
    }

    /// Start jobs at one instant.
    pub fn start(
        &mut self,
        jobs: Vec<SimJob>,
        on_failure: GroupFailure,
        timeout: Duration,
    ) -> (Vec<JobHandle>, Pending<Result<Vec<JobId>, Error>>) {
        self.start_fleeced(jobs.into_iter().map(|job| (job, None)).collect(), on_failure, timeout)
    }

    /// Start jobs at one instant, each with its fleece file, if it has one.
    pub fn start_fleeced(
        &mut self,
        jobs: Vec<(SimJob, Option<SimFleece>)>,
        on_failure: GroupFailure,
        timeout: Duration,
    ) -> (Vec<JobHandle>, Pending<Result<Vec<JobId>, Error>>) {
        let mut handles = Vec::new();
        let room = self.reactor().room();
        let at_end = &self.at_end;
        let make = |(job, fleece): (SimJob, Option<SimFleece>)| {
            let SimJob { disk, target, geometry, slots, depth, plan } = job;
            let shared = Shared::new(Lifecycle::new(true, false), empty_progress(geometry.length().0), None);
            handles.push(JobHandle::new(Arc::clone(&shared)));
            let set = Arc::new(IntervalSet::new(geometry.clusters()).expect("memory for a test"));
            let memory = u64::from(slots) * geometry.cluster_size().bytes();
            let memory = u32::try_from(memory).expect("a small test");
            let places = 1 + usize::from(fleece.is_some());
            let share = room.take(memory, places, Operation::Copy, &disk.0.name())?;
            let fleece = fleece.map(|SimFleece { file, direct_alignment, slots }| NewFleece {
                file,
                name: Arc::from(format!("fleece{file}")),
                direct_alignment,
                slots,
            });
            let at_end = at_end.clone().map(|at_end| Box::new(move |_: &mut JobResult| at_end()) as AtEnd);
            Ok(NewJob {
                disk: disk.0.id(),
                target,
                fleece,
                geometry,
                set,
                shared,
                share,
                depth,
                plan,
                at_end,
                last_look: None,
            })
        };
        let made: Vec<Result<_, Error>> = jobs.into_iter().map(make).collect();
        let (answer, asked) = ask();
        match made.into_iter().collect() {
            Ok(jobs) => {
                let more_disks = Vec::new();
                self.send(Command::Start(NewGroup { jobs, more_disks, on_failure, timeout, answer }));
            }
            Err(error) => answer.give(Err(error)),
        }
        (handles, Pending(asked))
    }

    /// A guest's request that the engine carries.
    #[must_use]
    pub fn io(&self, disk: &SimDisk, request: IoRequest) -> Pending<IoOutcome> {
        let (answer, asked) = ask();
        self.send(Command::Io { disk: disk.0.id(), request, answer });
        Pending(asked)
    }

    /// A guest with an I/O path of its own tries to get its permit, and does not wait for it.
    pub fn attempt(&self, disk: &SimDisk, range: ByteRange) -> Attempt {
        attempt_unnested(disk.0.gate(), disk.0.jobs(), range)
    }

    pub(super) fn writers(&self) -> &Arc<Writers> {
        &self.writers
    }

    /// The last handle of a disk is gone.
    pub fn remove_disk(&self, disk: &SimDisk) {
        self.send(Command::RemoveDisk { disk: disk.0.id(), source: None });
    }

    /// The last handle of the engine is gone.
    pub fn quit(&self) {
        self.send(Command::Quit);
    }

    /// Serve those who come in by `listener`.
    pub fn listen(
        &mut self,
        listener: SimSocket,
        options: NbdOptions,
    ) -> (SimServer, Pending<Result<(), Error>>) {
        let server = ServerId(self.next_name());
        let ask = |answer| ExportCommand::Listen { server, socket: listener, options, answer };
        (SimServer(server), self.ask_exports(ask))
    }

    /// Serve a disk, or, given a job, that disk as it was at its t0.
    pub fn export(
        &mut self,
        server: SimServer,
        name: &str,
        disk: &SimDisk,
        snapshot: Option<JobId>,
        on_gone: Box<dyn FnOnce() + Send>,
    ) -> (SimExport, Pending<Result<(), Error>>) {
        let id = ExportId(self.next_name());
        let export = NewExport {
            id,
            name: name.to_owned(),
            description: String::new(),
            length: disk.0.length(),
            writable: snapshot.is_none(),
            trim: true,
            backend: snapshot.map_or(Backend::Disk(disk.0.id()), |job| Backend::Snapshot(job, disk.0.id())),
            hold: None,
            on_gone: Some(on_gone),
        };
        let ask = |answer| ExportCommand::Add { server: server.0, export, answer };
        (SimExport(id), self.ask_exports(ask))
    }

    /// Serve it no more.
    pub fn remove_export(&mut self, export: SimExport, removal: Removal) -> Pending<Result<(), Error>> {
        self.ask_exports(|answer| ExportCommand::Remove { export: export.0, removal, answer })
    }

    /// Stop a server with all its exports.
    pub fn stop_server(&mut self, server: SimServer) -> Pending<Result<(), Error>> {
        self.ask_exports(|answer| ExportCommand::Stop { server: server.0, answer })
    }

    fn next_name(&mut self) -> u64 {
        self.next_disk += 1;
        self.next_disk
    }

    fn ask_exports(
        &self,
        command: impl FnOnce(Answer<Result<(), Error>>) -> ExportCommand<SimSocket>,
    ) -> Pending<Result<(), Error>> {
        let (answer, asked) = ask();
        self.send(Command::Exports(command(answer)));
        Pending(asked)
    }

    /// Sockets that the ring has.
    #[must_use]
    pub fn sockets(&self) -> usize {
        self.reactor().ring().sockets()
    }

    /// The jobs under way.
    pub fn jobs(&self) -> impl Iterator<Item = SimJobState> {
        self.reactor().job_states()
    }

    /// Parts of the arena and places on the ring that are taken.
    #[must_use]
    pub fn taken(&self) -> (usize, usize) {
        (self.reactor().room().parts(), self.reactor().ring.files())
    }

    /// Which disk is the first to act in the next turn.
    #[cfg(test)]
    pub(super) fn first_disk(&self) -> DiskId {
        self.reactor().first_disk
    }

    /// A guest with an I/O path of its own has clusters copied, by that job alone.
    #[must_use]
    pub fn copy(&self, job: JobId, clusters: ClusterRange) -> PendingCopy {
        let inbox = self.inbox();
        let (answer, asked) = ask_noting(inbox.left());
        let wish = Wish { job, clusters, range: ByteRange::new(0, 0) };
        inbox.send(Command::Copy { wish, waited: Waited::default(), answer });
        PendingCopy(asked)
    }

    /// Read a range as it was at the t0 of a job.
    #[must_use]
    pub fn read_snapshot(&self, job: JobId, range: ByteRange) -> Pending<IoOutcome> {
        let (answer, asked) = ask();
        self.send(Command::Snapshot { job, range, answer });
        Pending(asked)
    }

    /// The first half of a turn: everything up to the wait.
    #[must_use]
    pub fn act(&mut self) -> Option<Wait> {
        while let Some(command) = self.writers.take() {
            self.send(command);
        }
        self.reactor_mut().act()
    }

    /// The second half.
    pub fn wait(&mut self, wait: Wait) {
        self.reactor_mut().wait(wait).expect("a simulated ring does not break");
    }

    /// The ring thread stands still for so long. See [`SimRing::stand_still`].
    pub fn stand_still(&mut self, time: Duration) {
        self.reactor_mut().ring.stand_still(time);
    }

    /// The ring's clock.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.reactor().ring().now()
    }

    /// Operations pushed so far.
    #[must_use]
    pub fn pushed(&self) -> u64 {
        self.reactor().ring().pushed()
    }

    /// Operations in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.reactor().ring().in_flight()
    }

    /// The ring thread dies.
    pub fn die(&mut self) {
        self.reactor.take().expect("it dies once").die("killed by a test");
        self.writers.die();
    }
}

impl Reactor<SimRing> {
    fn job_states(&self) -> impl Iterator<Item = SimJobState> {
        self.jobs.iter().map(|(_, job)| SimJobState {
            target: self.ring.disk_of(job.target),
            sweep: job.runner.copier.sweep_in_flight(),
            zero_runs: job.runner.copier.zero_runs_in_flight(),
            attached: job.attached,
            ends: job.runner.copier.is_ending(),
            fails: job.runner.copier.is_ending() && !job.runner.copier.is_complete(),
            to_retry: job.runner.copier.to_retry(),
        })
    }
}
