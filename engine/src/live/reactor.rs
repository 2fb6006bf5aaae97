//! The loop of the ring thread of an engine with live disks: any number of disks and jobs on one ring.
//!
//! # Model
//! Disks and jobs are state machines that take completions and give operations; each has its part of the arena, and its number in the
//! upper half of every token of its operations. A turn takes the commands of other threads, moves a start that is under way
//! (`starts`), lets the disks act (guests first), then the jobs, submits everything as one batch, waits, and hands the
//! completions out. It never blocks but in that one wait.
//!
//! # Ordering
//! A job that is ending is detached from its disk before its guests are answered, so a guest that looks again does not find it. A
//! job's files are let go before its result is told; what may take its time about that is done elsewhere (`ends`).
//! How it ends when it breaks: `death`.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;

use crossbeam::channel::Sender;
use crossbeam::queue::SegQueue;
use nix::errno::Errno;
use slab::Slab;

use super::DiskId;
use super::asks::{Asker, Asks, Copied, TICK, forget_beside, stand_still, stop_clocks};
use super::carrier::{CarrierLimits, CopyWait, IoOutcome, IoRequest};
use super::command::{Command, GroupFailure, Inbox, NewGroup};
use super::controller::Controller;
use super::disks::Carried;
use super::ends::End;
use super::exports::{Backend, Hub, Wanted};
use super::groups::{Look, Looked};
use super::hosted::{HostedDisk, IoAsker, too_many};
use super::jobs::{JobId, Watch};
use super::latency::GuestLatencies;
use super::places::{Division, Taken};
#[cfg(feature = "sim")]
use super::planted::Planted;
use super::reads::{MAX_READ_BYTES, Reads, Refused};
use super::room::{Room, Share};
use super::starts::Raised;
use super::token::{Owner, owner_of, token_of};
use super::waits::ForgetWait;
use crate::copier::guests::CbwId;
use crate::error::{Error, ErrorKind, Operation};
use crate::job::runner::Runner;
use crate::ring::{Completion, FileId, Op, Ring, RingFailure, Token, Wait};
use crate::units::{ByteRange, Timestamp};

pub(super) struct Job {
    pub(super) disk: DiskId,
    pub(super) runner: Runner,
    pub(super) target: FileId,
    pub(super) target_name: Arc<str>,
    pub(super) fleece: Option<FileId>,
    pub(super) share: Share,
    pub(super) watch: Arc<Watch>,
    pub(super) controller: Controller,
    pub(super) attached: bool,
    /// What guests felt before it and during it.
    pub(super) guests: Box<GuestLatencies>,
    pub(super) group: u64,
    pub(super) on_failure: GroupFailure,
    pub(super) look: Look,
    pub(super) asks: Asks,
    pub(super) reads: Reads,
    pub(super) next_ask: u64,
}

/// See the module's header.
pub(super) struct Reactor<R: Ring> {
    pub(super) ring: R,
    pub(super) inbox: Arc<Inbox<R::File, R::Socket>>,
    room: Arc<Room>,
    pub(super) disks: BTreeMap<DiskId, HostedDisk>,
    /// Which of them is the first to act in the next turn.
    pub(super) first_disk: DiskId,
    pub(super) jobs: Slab<Job>,
    /// Which of them is the first to act: the one after the last that was given one of the common places on the ring.
    first_job: usize,
    /// When the last turn began.
    acted_at: Timestamp,
    pub(super) waiting: VecDeque<NewGroup<R::File>>,
    pub(super) raised: Option<Raised>,
    /// Disks whose barrier was up, and until when it stays down.
    pub(super) rests: BTreeMap<DiskId, Timestamp>,
    pub(super) forgetting: Vec<ForgetWait>,
    pub(super) next_group: u64,
    /// What last looks at targets have found.
    pub(super) looked: Arc<SegQueue<Looked>>,
    pub(super) next_job: u64,
    pub(super) exports: Hub,
    completions: Vec<Completion>,
    pub(super) ops: Vec<(Token, Op)>,
    quit: bool,
    /// Dropped with the last of it, the ends of jobs included.
    pub(super) ending: Option<Sender<Infallible>>,
    /// Bounds of the carriers of disks to come.
    pub(super) carrier_limits: CarrierLimits,
    /// A bug put in on purpose, to see that the tests catch it.
    #[cfg(feature = "sim")]
    pub(super) planted: Planted,
}

/// What the jobs of a turn have met with.
struct Met {
    division: Division,
    taken: Taken,
    failed_groups: Vec<u64>,
    /// What was asked beside copies that were answered.
    beside: Vec<(JobId, CbwId)>,
    /// What has failed that was asked beside others, with those.
    failed_beside: Vec<(JobId, (JobId, CbwId))>,
}

impl Met {
    fn new(division: Division, taken: Taken) -> Self {
        Self { division, taken, failed_groups: Vec::new(), beside: Vec::new(), failed_beside: Vec::new() }
    }
}

/// Most commands taken in one turn: those who do not stop asking must not keep the others from the ring.
const COMMANDS_A_TURN: usize = 512;

/// Bytes of the arena that a carried disk gets.
pub(super) const CARRIER_BYTES: u32 = 4 << 20;

impl<R: Ring> Reactor<R> {
    /// A loop over `ring`, whose arena it hands out to disks and jobs.
    pub(super) fn new(ring: R) -> Self {
        let bytes = u32::try_from(ring.arena().bytes()).expect("at most 1 GiB");
        let inbox = Inbox::new(ring.waker());
        Self {
            ring,
            inbox,
            room: Room::new(bytes),
            disks: BTreeMap::new(),
            first_disk: DiskId(0),
            jobs: Slab::new(),
            first_job: 0,
            acted_at: Timestamp::default(),
            waiting: VecDeque::new(),
            raised: None,
            rests: BTreeMap::new(),
            forgetting: Vec::new(),
            next_group: 0,
            looked: Arc::default(),
            next_job: 0,
            exports: Hub::default(),
            completions: Vec::new(),
            ops: Vec::new(),
            quit: false,
            ending: None,
            carrier_limits: CarrierLimits::default(),
            #[cfg(feature = "sim")]
            planted: Planted::default(),
        }
    }

    /// `ending` is dropped once it is gone, and the ends of its jobs with it.
    pub(super) fn tell_end(&mut self, ending: Sender<Infallible>) {
        self.ending = Some(ending);
    }

    /// Where commands are left.
    pub(super) fn inbox(&self) -> Arc<Inbox<R::File, R::Socket>> {
        Arc::clone(&self.inbox)
    }

    /// What there is room for.
    pub(super) fn room(&self) -> Arc<Room> {
        Arc::clone(&self.room)
    }

    /// The ring.
    #[cfg(feature = "sim")]
    pub(super) fn ring(&self) -> &R {
        &self.ring
    }

    /// Turn until the last handle is gone and everything is settled.
    ///
    /// # Errors
    /// When the ring breaks.
    pub(super) fn run(&mut self) -> Result<(), RingFailure> {
        while !self.turn()? {}
        Ok(())
    }

    /// One iteration; `true`: it is over.
    ///
    /// # Errors
    /// When the ring breaks.
    pub(super) fn turn(&mut self) -> Result<bool, RingFailure> {
        match self.act() {
            None => Ok(true),
            Some(wait) => self.wait(wait).map(|()| false),
        }
    }

    /// The first half of a turn: everything up to the wait, which is returned; `None`: it is over.
    pub(super) fn act(&mut self) -> Option<Wait> {
        let now = self.ring.now();
        let turn = now.since(std::mem::replace(&mut self.acted_at, now));
        if turn >= 2 * TICK {
            // Where it might have slept so long, nobody's time counts.
            stand_still(&mut self.jobs, turn.saturating_sub(TICK));
        }
        let mut more = self.take_commands(now);
        self.forget_those_who_left();
        self.advance_start(now);
        self.serve(now);
        more |= self.poll_disks(now);
        self.answer_forgotten();
        more |= self.poll_jobs(now);
        more |= self.settle_groups();
        // What has just ended is told at once.
        more |= self.serve(now);
        more |= self.exports.has_news();
        self.conclude_jobs(now);
        more |= self.remove_closed_disks();
        if self.quit && self.jobs.is_empty() && self.disks.is_empty() && self.exports.is_empty() {
            return None;
        }
        Some(if more { Wait::Poll } else { self.next_deadline(now).map_or(Wait::Forever, Wait::Until) })
    }

    /// The second half: submit, wait, and hand out what has completed.
    pub(super) fn wait(&mut self, wait: Wait) -> Result<(), RingFailure> {
        let mut completions = std::mem::take(&mut self.completions);
        self.ring.wait(wait, &mut completions)?;
        let now = self.ring.now();
        for completion in completions.drain(..) {
            self.dispatch(completion, now);
        }
        self.completions = completions;
        Ok(())
    }

    fn next_deadline(&self, now: Timestamp) -> Option<Timestamp> {
        let jobs = self.jobs.iter().filter_map(|(_, job)| job.runner.copier.next_deadline(now));
        let disks = self.disks.values().filter_map(|disk| disk.carrier.next_deadline(now));
        let start = self.raised.as_ref().map_or_else(|| self.next_start(), |raised| Some(raised.deadline()));
        let counts = self.jobs.iter().any(|(_, job)| job.runner.copier.has_deadlines());
        let tick = counts.then(|| now.after(TICK));
        jobs.chain(disks).chain(start).chain(tick).chain(self.exports.next_deadline()).min()
    }

    /// Take what other threads have left, a bounded part of it: `true`, there may be more. Whoever answers an answer with a new command (one
    /// who is told to come again, and does so at once) is served in the next turn.
    fn take_commands(&mut self, now: Timestamp) -> bool {
        for _ in 0..COMMANDS_A_TURN {
            let Some(command) = self.inbox.take() else { return false };
            self.take_command(command, now);
        }
        true
    }

    fn take_command(&mut self, command: Command<R::File, R::Socket>, now: Timestamp) {
        match command {
            Command::AddDisk { file, direct_alignment, keep_is_fast, disk, opened, share, answer } => {
                let how = Carried { direct_alignment, keep_is_fast };
                answer.give(self.add_disk(file, how, disk, opened, share));
            }
            Command::RemoveDisk { disk, source } => {
                self.disks.get_mut(&disk).expect("it has had a handle until now").close(source);
            }
            Command::Io { disk, request, answer } => {
                self.submit(disk, request, IoAsker::Caller(answer), now);
            }
            Command::Copy { wish, waited, answer } => {
                self.copy_before_write(wish, waited, answer, now);
            }
            Command::ForgetDiscards { disk, range, writer, answer } => {
                self.forget_discards(disk, range, writer, answer);
            }
            Command::Snapshot { job, range, answer } => {
                self.read_snapshot(job, range, IoAsker::Caller(answer));
            }
            Command::Start(group) => self.waiting.push_back(group),
            Command::Exports(command) => self.exports.command(command, &mut self.ring),
            Command::Felt { disk, answer } => answer.give(self.felt(disk, now)),
            Command::Jobs { answer } => answer.give(Ok(self.running_jobs())),
            Command::Quit => self.quit = true,
        }
    }

    /// Let clients of exports act, and hand their requests on; whether there were any.
    fn serve(&mut self, now: Timestamp) -> bool {
        self.exports.turn(now, &mut self.ring);
        let wanted = self.exports.take_wanted();
        let any = !wanted.is_empty();
        for wanted in wanted {
            let (backend, request, io) = match wanted {
                Wanted::Request { backend, request, io } => (backend, request, io),
                Wanted::Extents(disk, question) => {
                    self.ask(disk, question);
                    continue;
                }
            };
            let asker = IoAsker::Client(io);
            match (backend, request) {
                (Backend::Disk(id), request) => self.submit(id, request, asker, now),
                (Backend::Snapshot(job, _), IoRequest::Read { range, .. }) => {
                    self.read_snapshot(job, range, asker);
                }
                // Nothing is ever changed that would have to be brought to stable storage.
                (Backend::Snapshot(..), _) => tell(asker, IoOutcome::nothing(), &mut self.exports),
            }
        }
        any
    }

    pub(super) fn read_snapshot(&mut self, id: JobId, range: ByteRange, asker: IoAsker) {
        // One that is over answers nobody any more.
        let reads = |job: &Job| job.watch.id() == id && !job.runner.copier.is_finished();
        let Some(job) = self.jobs.iter_mut().map(|(_, job)| job).find(|job| reads(job)) else {
            return tell(asker, has_ended(range), &mut self.exports);
        };
        match job.reads.add(range, asker) {
            Ok(Some(read)) => job.runner.copier.read_snapshot(read, range),
            Ok(None) => {}
            Err((asker, refused)) => {
                let name = self.disks[&job.disk].shared.name().to_string();
                let error = match refused {
                    Refused::TooLarge => {
                        let reason = format!("{} bytes are more than are read at a time", range.length);
                        Error::new(ErrorKind::Io(Errno::EINVAL), Operation::ReadSnapshot, name, reason)
                            .advise(format!("read at most {MAX_READ_BYTES} bytes at a time"))
                    }
                    Refused::TooMany(most) => too_many(Operation::ReadSnapshot, name, most),
                };
                tell(asker, IoOutcome::new(Err(error.at(range))), &mut self.exports);
            }
        }
    }

    /// Let the jobs act; `true`: there is more to do at once. Places on the ring that there are not enough of go from one to the next.
    pub(super) fn poll_jobs(&mut self, now: Timestamp) -> bool {
        let mut more = false;
        self.look_for_guests(now);
        let (division, taken) = self.places();
        let mut met = Met::new(division, taken);
        let first = self.first_job;
        for index in (first..self.jobs.capacity()).chain(0..first) {
            if self.jobs.contains(index) {
                more |= self.poll_job(index, &mut met, now);
            }
        }
        stop_clocks(&mut self.jobs, &met.failed_beside, now);
        forget_beside(&mut self.jobs, &met.beside);
        for group in met.failed_groups {
            for (_, job) in &mut self.jobs {
                if job.group == group && !job.runner.copier.is_ending() {
                    more = true;
                    job.runner.cancel();
                }
            }
        }
        more
    }

    fn poll_job(&mut self, index: usize, met: &mut Met, now: Timestamp) -> bool {
        let job = &mut self.jobs[index];
        // Whatever a job's target does not answer leaves places on the ring to the guests and to the other jobs.
        let places = met.division.for_job(Taken { in_flight: self.ring.in_flight(), ..met.taken });
        let before = job.runner.copier.beyond(met.division.own());
        met.taken.of_jobs -= before;
        if job.runner.copier.has_guests() {
            job.controller.on_guest(now, job.asks.len());
        }
        let allowance = job.controller.allowance(now, job.runner.copier.counters().done);
        job.runner.copier.set_sweep_limit(allowance.clusters, allowance.run, allowance.zero_runs);
        job.runner.copier.set_flush_aim(allowance.flush);
        let mut more = job.runner.poll(now, places, &mut self.ops);
        let beyond = job.runner.copier.beyond(met.division.own());
        met.taken.of_jobs += beyond;
        if beyond > before {
            self.first_job = index + 1;
        }
        for (token, op) in self.ops.drain(..) {
            self.ring.push(token_of(Owner::Job(index), token), op);
        }
        let disk = self.disks.get_mut(&job.disk).expect("a job's disk stays until it is over");
        if job.attached && job.runner.copier.is_ending() {
            disk.shared.jobs().detach(job.watch.id());
            job.attached = false;
            if job.on_failure == GroupFailure::FailAll && !job.runner.copier.is_complete() {
                met.failed_groups.push(job.group);
            }
        }
        for (id, result) in job.runner.copier.take_snapshot_outcomes() {
            tell(job.reads.ended(id), IoOutcome::new(result), &mut self.exports);
        }
        more |= job.begin_reads(&mut self.exports);
        for (id, outcome) in job.runner.copier.take_cbw_outcomes() {
            let ask = job.asks.answered(id, &mut met.beside);
            let waited = ask.waited(now);
            match ask.asker {
                Asker::Guest(answer) => answer.give(Copied { outcome, waited }),
                Asker::Beside(with, ask) if outcome.is_err() => {
                    met.failed_beside.push((job.watch.id(), (with, ask)));
                }
                Asker::Beside(..) => {}
                Asker::Carrier(wait) => {
                    disk.carrier.copied(CopyWait { waited, ..wait }, outcome);
                    more = true;
                }
            }
        }
        more
    }

    pub(super) fn conclude_jobs(&mut self, now: Timestamp) {
        let over: Vec<usize> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.runner.copier.is_finished() && job.asks.is_empty() && job.reads.is_empty())
            .map(|(index, _)| index)
            .collect();
        for index in over {
            let engine = self.ring.name();
            let Some(mut result) = self.jobs[index].runner.verdict(now, engine) else { continue };
            let Job { disk, mut runner, target, fleece, share, watch, guests, .. } = self.jobs.remove(index);
            if let Some(disk) = self.disks.get_mut(&disk) {
                disk.felt.forget(now);
            }
            result.guests = Some(guests);
            for file in [Some(target), fleece].into_iter().flatten() {
                // Its end has it, too, and closes it.
                drop(self.ring.remove_file(file));
            }
            let at_end = runner.take_at_end();
            End { runner, result, at_end, share, watch, ending: self.ending.clone() }.begin();
        }
    }

    fn dispatch(&mut self, completion: Completion, now: Timestamp) {
        let (owner, token) = owner_of(completion.token);
        let completion = Completion { token, result: completion.result };
        match owner {
            Owner::Disk(id) => {
                let disk = self.disks.get_mut(&id).expect("a disk stays until its operations have ended");
                disk.in_flight -= 1;
                disk.carrier.on_completion(completion, self.ring.arena_mut(), now);
            }
            Owner::Job(index) => {
                self.jobs[index].runner.on_completion(completion, self.ring.arena(), now);
            }
            Owner::Listener(index) => self.exports.on_accepted(index, completion, now, &mut self.ring),
            Owner::Client(index) => {
                let jobs = &self.jobs;
                // One that is ending lets guests write to what it has not copied.
                let lives = |job: &Job| job.attached && !job.runner.copier.is_ending();
                let running = |id: JobId| {
                    let job = jobs.iter().find(|(_, job)| job.watch.id() == id && lives(job));
                    job.map(|(_, job)| &*job.watch)
                };
                let asked = self.exports.on_completion(index, completion, &mut self.ring, running);
                if let Some(id) = asked {
                    self.disks.get_mut(&id).expect("a disk stays until it was answered").question_ended();
                }
            }
        }
    }

    /// The barrier of the disks of a start is down again.
    pub(super) fn barrier_lowered(&mut self, disks: &[DiskId]) {
        for id in disks {
            if let Some(disk) = self.disks.get_mut(id) {
                disk.shared.gate().lower();
                disk.carrier.barrier_lowered();
            }
        }
    }

    /// A job that was attached to its disk gets its place.
    pub(super) fn put_job(&mut self, job: NewlyMade, now: Timestamp) {
        let NewlyMade {
            disk,
            runner,
            controller,
            target,
            target_name,
            fleece,
            share,
            watch,
            group,
            on_failure,
            look,
        } = job;
        let before = self.disks.get_mut(&disk).expect("it was found at the start").felt.recent(now);
        let guests = Box::new(GuestLatencies { before, ..GuestLatencies::default() });
        let entry = Job {
            disk,
            runner,
            target,
            target_name,
            fleece,
            share,
            watch,
            controller,
            attached: true,
            guests,
            group,
            on_failure,
            look,
            asks: Asks::default(),
            reads: Reads::default(),
            next_ask: 0,
        };
        self.jobs.insert(entry);
    }

    /// It is over, and nobody has a handle.
    pub(super) fn close(self) {
        self.inbox.close();
    }
}

impl Job {
    /// Begin reads that have waited for their turn; whether there were any. Once the job is ending, there is nothing to wait for.
    fn begin_reads(&mut self, exports: &mut Hub) -> bool {
        let copier = &mut self.runner.copier;
        if copier.is_ending() {
            while let Some((range, asker)) = self.reads.give_up() {
                tell(asker, has_ended(range), exports);
            }
            return false;
        }
        let mut any = false;
        while let Some((read, range)) = self.reads.next() {
            copier.read_snapshot(read, range);
            any = true;
        }
        any
    }
}

/// What becomes of a read of a snapshot that is gone.
fn has_ended(range: ByteRange) -> IoOutcome {
    let reason = "the job has ended, and with it the snapshot";
    let error = Error::new(ErrorKind::Io(Errno::ESTALE), Operation::ReadSnapshot, "the disk", reason);
    IoOutcome::new(Err(error.at(range)))
}

/// Tell whoever waits for a request how it ended.
pub(super) fn tell(asker: IoAsker, outcome: IoOutcome, exports: &mut Hub) {
    match asker {
        IoAsker::Caller(answer) => answer.give(outcome),
        IoAsker::Client(io) => exports.on_outcome(io, outcome),
    }
}

/// A job that was made and has no place yet.
pub(super) struct NewlyMade {
    pub(super) disk: DiskId,
    pub(super) runner: Runner,
    pub(super) controller: Controller,
    pub(super) target: FileId,
    pub(super) target_name: Arc<str>,
    pub(super) fleece: Option<FileId>,
    pub(super) share: Share,
    pub(super) watch: Arc<Watch>,
    pub(super) group: u64,
    pub(super) on_failure: GroupFailure,
    pub(super) look: Look,
}
