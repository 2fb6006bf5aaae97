//! Running a scenario: the engine's turns, and between them guests, starts, and the operator at the console.

mod observe;

use std::num::NonZeroU64;
use std::time::Duration;

use engine::error::Error;
use engine::job::{IoStatus, Refusal, Status};
use engine::live::sim::{Pending, SimEngine};
use engine::live::{GroupFailure, JobId};
use engine::ring::Wait;
use engine::ring::sim::{SharedWorld, SimRing};
use engine::units::{Length, Speed, Timestamp};
use fastrand::Rng;

use crate::blame::Blame;
use crate::guests::Guests;
use crate::oracle::Job;
use crate::readers::Readers;
use crate::scenario::{Operator, Scenario};
use crate::seen::Seen;

/// More turns than any run takes.
const MAX_TURNS: u64 = 300_000;
/// More turns than any takes during which nothing at all happens.
const MAX_IDLE_TURNS: u64 = 200;
/// More than any run takes in the engine's time.
const MAX_TIME: Duration = Duration::from_secs(600);
/// More than anything makes a guest wait that is made to happen here: slow disks, stuck targets, starts.
pub(crate) const MAX_WAIT: Duration = Duration::from_secs(4);
/// One in so many turns all of a job is looked at.
const LOOKS: u8 = 12;
/// How late the ring thread may be.
const SLACK: Duration = Duration::from_millis(50);

/// Jobs that were asked for together.
struct Start {
    /// Which jobs, in the list of all.
    jobs: std::ops::Range<usize>,
    pending: Option<Pending<Result<Vec<JobId>, Error>>>,
    answer_by: Timestamp,
}

/// What the operator does at given points, for exhaustive runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Script {
    /// Cancel the first job before this turn.
    pub(crate) cancel_at: Option<u64>,
    /// The ring thread dies before this turn.
    pub(crate) die_at: Option<u64>,
}

/// A run's end.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) seen: Seen,
    pub(crate) operations: u64,
    pub(crate) turns: u64,
    /// Longest wait of a guest.
    pub(crate) longest: Duration,
    /// The same of each disk.
    pub(crate) waits: Vec<Duration>,
}

struct Run<'a> {
    scenario: &'a Scenario,
    script: Script,
    rng: Rng,
    world: SharedWorld,
    engine: SimEngine,
    guests: Vec<Guests>,
    added: Vec<Pending<Result<(), Error>>>,
    starts: Vec<Start>,
    jobs: Vec<Job>,
    /// Of each job.
    readers: Vec<Readers>,
    removed: Vec<bool>,
    fidget_at: Timestamp,
    mended: bool,
    /// Since when no operation is made to fail.
    quiet_since: Option<Timestamp>,
    seen: Seen,
    turns: u64,
    /// Since which turn nothing has happened, and how it stood then: the time, operations pushed.
    idle: (u64, Timestamp, u64),
    operations: u64,
}

/// Run `scenario` to its end.
pub(crate) fn run(scenario: &Scenario) -> Result<Ended, String> {
    run_script(scenario, Script::default())
}

/// Run `scenario` to its end, with `script`.
pub(crate) fn run_script(scenario: &Scenario, script: Script) -> Result<Ended, String> {
    let mut run = Run::new(scenario, script);
    run.go().map_err(|wrong| {
        let guests: Vec<String> = run.guests.iter().map(Guests::tell).collect();
        let jobs: Vec<_> = run.jobs.iter().filter(|job| job.runs()).map(|job| &job.handle).collect();
        format!("{wrong}\nturn {}, {guests:?}, {jobs:?}\n{scenario:?}", run.turns)
    })
}

/// What the operator asks for may be refused: too late, or done already.
fn perhaps(_: Result<(), Refusal>) {}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario, script: Script) -> Self {
        let world = scenario.world();
        let seed = scenario.seed;
        let ring = SimRing::new(
            world.clone(),
            scenario.arena(),
            scenario.capacity,
            seed ^ 0x1217,
            scenario.faults.clone(),
        );
        let mut engine = SimEngine::new(ring);
        engine.set_carrier(scenario.carrier, scenario.carrier_bytes);
        engine.plant(scenario.planted);
        let mut guests = Vec::new();
        let mut added = Vec::new();
        for (number, spec) in scenario.disks.iter().enumerate() {
            let alignment = spec.traits.direct_alignment;
            let (disk, pending) = engine.add_disk(number, Length(spec.length), alignment);
            let initial = world.borrow_mut().disk(number).view().to_vec();
            let mut guest = Guests::new(disk, number, spec, initial, seed ^ (0x6E57 + number as u64));
            let flushes = &scenario.faults;
            guest.flushes_hold = flushes.rates.flush == 0 && flushes.exact.is_empty();
            guests.push(guest);
            added.push(pending);
        }
        Self {
            scenario,
            script,
            rng: Rng::with_seed(seed ^ 0x09E7),
            world,
            engine,
            removed: vec![false; guests.len()],
            guests,
            added,
            starts: Vec::new(),
            jobs: Vec::new(),
            readers: Vec::new(),
            fidget_at: Timestamp::default(),
            mended: false,
            quiet_since: None,
            seen: Seen::default(),
            turns: 0,
            idle: (0, Timestamp::default(), 0),
            operations: 0,
        }
    }

    fn go(&mut self) -> Result<Ended, String> {
        loop {
            let now = self.engine.now();
            let dies =
                self.scenario.die_at.is_some_and(|at| at <= now.0) || self.script.die_at == Some(self.turns);
            if dies {
                self.die()?;
                break;
            }
            self.events(now)?;
            if self.is_over(now) {
                self.finish()?;
                break;
            }
            self.turn()?;
        }
        for guests in &mut self.guests {
            guests.check(&self.world)?;
        }
        let waits: Vec<Duration> = self.guests.iter().map(|guests| guests.longest).collect();
        let longest = waits.iter().copied().max().unwrap_or_default();
        if longest > MAX_WAIT {
            return Err(format!("a guest has waited for {longest:?}"));
        }
        Ok(Ended { seen: self.seen, operations: self.operations, turns: self.turns, longest, waits })
    }

    fn blame(&self) -> Blame<'a> {
        Blame { scenario: self.scenario, quiet_since: self.quiet_since, dead: false }
    }

    fn guests_are_gone(&self) -> bool {
        self.guests.iter().all(Guests::are_gone)
    }

    fn is_over(&self, now: Timestamp) -> bool {
        self.starts.len() == self.scenario.starts.len()
            && self.starts.iter().all(|start| start.pending.is_none())
            && self.guests_are_gone()
            && self.jobs.iter().all(|job| job.is_over(now))
            && self.readers.iter().all(Readers::are_gone)
    }

    /// Everything that happens between two turns.
    fn events(&mut self, now: Timestamp) -> Result<(), String> {
        if !self.mended && now.0 >= self.scenario.mended_at {
            self.mended = true;
            self.mend();
        }
        if self.quiet_since.is_none() && self.is_quiet() {
            self.quiet_since = Some(now);
        }
        self.stick(now);
        self.start(now);
        self.operate(now);
        for (readers, job) in self.readers.iter_mut().zip(&self.jobs) {
            readers.act(job, &self.engine, now, &mut self.rng);
        }
        for guests in &mut self.guests {
            guests.act(&mut self.engine, &self.world, &self.jobs, now, &mut self.seen)?;
        }
        for (number, spec) in self.scenario.disks.iter().enumerate() {
            let leaves = spec.leaves_early && self.guests[number].need_no_disk();
            if leaves && !self.removed[number] && self.all_asked(number) {
                self.removed[number] = true;
                self.engine.remove_disk(&self.guests[number].disk);
            }
        }
        Ok(())
    }

    /// Whether every start with a job on disk `number` was asked for.
    fn all_asked(&self, number: usize) -> bool {
        let left = &self.scenario.starts[self.starts.len()..];
        left.iter().flat_map(|start| &start.jobs).all(|job| job.disk != number)
    }

    /// Nothing is broken any more.
    fn mend(&mut self) {
        let mut world = self.world.borrow_mut();
        for disk in 0..self.scenario.files() {
            world.disk(disk).repair();
        }
    }

    /// Whether no operation is made to fail any more.
    fn is_quiet(&self) -> bool {
        let faults = &self.scenario.faults;
        let pushed = self.engine.pushed();
        let random = faults.quiet_from.is_none_or(|from| from > pushed);
        let exact = faults.exact.keys().any(|&number| number >= pushed);
        self.scenario.is_sound() || (self.mended && !random && !exact)
    }

    /// Targets and fleece files get stuck and come free.
    fn stick(&mut self, now: Timestamp) {
        let scenario = self.scenario;
        let targets = scenario.jobs().map(|job| job.stuck);
        let fleeces = scenario.jobs().map(|job| job.fleece.as_ref().and_then(|fleece| fleece.stuck));
        let mut world = self.world.borrow_mut();
        for (file, stuck) in (scenario.target_of(0)..).zip(targets.chain(fleeces)) {
            let Some(stuck) = stuck else { continue };
            if stuck.until.is_some_and(|until| until <= now.0) {
                world.disk(file).set_free();
            } else if stuck.from <= now.0 {
                world.disk(file).set_stuck();
            }
        }
    }

    fn start(&mut self, now: Timestamp) {
        while let Some(spec) = self.scenario.starts.get(self.starts.len()).filter(|spec| spec.at <= now.0) {
            let first = self.jobs.len();
            let mut asked = Vec::new();
            let mut befores = Vec::new();
            for (number, job) in spec.jobs.iter().enumerate() {
                let target = self.scenario.target_of(first + number);
                let fleece = self.scenario.fleece_of(first + number);
                befores.push(((target, fleece), self.world.borrow_mut().disk(target).view().to_vec()));
                let disk = self.guests[job.disk].disk.clone();
                asked.push((job.job(self.scenario, disk, target), job.fleece(fleece)));
            }
            let (handles, pending) = self.engine.start_fleeced(asked, spec.on_failure, spec.timeout);
            for ((job, handle), (files, before)) in spec.jobs.iter().zip(handles).zip(befores) {
                handle.set_speed(job.speed()).expect("not started yet");
                self.readers.push(Readers::new(job.reads, &mut self.rng));
                self.jobs.push(Job::new(job.clone(), handle, files, before));
            }
            if spec.on_failure == GroupFailure::FailAll {
                let blame = self.blame();
                let one_fails = self.jobs[first..].iter().any(|job| blame.may_fail(job, now));
                self.jobs[first..].iter_mut().for_each(|job| job.may_be_taken_along = one_fails);
            }
            // One after the other.
            let waits =
                self.starts.iter().filter(|start| start.pending.is_some()).map(|start| start.answer_by);
            // As long as its barrier was up, the disks rest.
            let answer_by = waits.max().unwrap_or(now).max(now).after(2 * spec.timeout + SLACK);
            let jobs = first..self.jobs.len();
            self.starts.push(Start { jobs, pending: Some(pending), answer_by });
        }
    }

    /// What the operator does.
    fn operate(&mut self, now: Timestamp) {
        if self.script.cancel_at == Some(self.turns) && !self.jobs.is_empty() {
            self.cancel(0);
        }
        let fidgets = self.scenario.operator == Operator::Fidgets && self.fidget_at <= now;
        let gone = self.guests_are_gone();
        for number in 0..self.jobs.len() {
            let job = &self.jobs[number];
            if !job.runs() {
                continue;
            }
            if job.spec.cancel_at.is_some_and(|at| at <= now.0) && !job.cancel_asked {
                self.cancel(number);
                continue;
            }
            let progress = job.handle.progress();
            if progress.status == Status::Paused && progress.io_status != IoStatus::Ok {
                let since = *self.jobs[number].stopped_at.get_or_insert(now);
                if since.after(self.scenario.mends_after) <= now {
                    // The operator mends what is broken before going on.
                    self.jobs[number].stopped_at = None;
                    self.mend();
                    perhaps(self.jobs[number].handle.resume());
                }
            } else if gone {
                perhaps(job.handle.resume());
            } else if fidgets {
                self.fidget(number);
            } else if let Operator::PausesWithout(skipped) = self.scenario.operator
                && progress.skipped >= skipped
            {
                perhaps(job.handle.pause());
            }
        }
        if fidgets {
            self.fidget_at = now.after(Duration::from_micros(self.rng.u64(100..8000)));
        }
    }

    fn fidget(&mut self, number: usize) {
        let handle = &self.jobs[number].handle;
        match self.rng.u8(0..6) {
            0 => perhaps(handle.pause()),
            1 | 2 => perhaps(handle.resume()),
            3 => perhaps(handle.set_speed(NonZeroU64::new(self.rng.u64(0..40_000_000)).map(Speed))),
            _ => {}
        }
    }

    fn cancel(&mut self, number: usize) {
        perhaps(self.jobs[number].handle.cancel());
        self.jobs[number].cancel_asked = true;
        let start =
            self.starts.iter().position(|start| start.jobs.contains(&number)).expect("it was asked for");
        if self.scenario.starts[start].on_failure == GroupFailure::FailAll {
            for other in self.starts[start].jobs.clone() {
                self.jobs[other].may_be_taken_along = true;
            }
        }
    }

    /// When something happens next that the engine does not know of.
    fn next_event(&self) -> Option<Timestamp> {
        let scenario = self.scenario;
        let start = scenario.starts.get(self.starts.len()).map(|start| start.at);
        let mend = (!self.mended).then_some(scenario.mended_at);
        let now = self.engine.now();
        let jobs = scenario.jobs().flat_map(|job| {
            let fleece = job.fleece.as_ref().and_then(|fleece| fleece.stuck);
            let stuck = job.stuck.into_iter().chain(fleece);
            let stuck = stuck.flat_map(|stuck| [Some(stuck.from), stuck.until]);
            stuck.flatten().chain(job.cancel_at)
        });
        let fixed = start.into_iter().chain(mend).chain(scenario.die_at).chain(jobs);
        let fixed = fixed.filter(|&at| at > now.0).map(Timestamp);
        let fidgets = scenario.operator == Operator::Fidgets && self.jobs.iter().any(Job::runs);
        let fidget = (fidgets && !self.guests_are_gone()).then_some(self.fidget_at);
        let guests = self.guests.iter().filter_map(Guests::next_event);
        let readers =
            self.readers.iter().zip(&self.jobs).filter_map(|(readers, job)| readers.next_event(job));
        let stopped = self.jobs.iter().filter(|job| job.runs()).filter_map(|job| job.stopped_at);
        let mended = stopped.map(|at| at.after(scenario.mends_after)).filter(|&at| at > now);
        fixed.chain(fidget).chain(guests).chain(readers).chain(mended).min()
    }

    fn turn(&mut self) -> Result<(), String> {
        let wait = self.engine.act();
        self.observe()?;
        let Some(wait) = wait else { return Err("the engine has ended by itself".into()) };
        let now = self.engine.now();
        let wait = match (wait, self.next_event()) {
            (Wait::Poll, _) => Wait::Poll,
            (wait, None) => wait,
            (_, Some(event)) if event <= now => Wait::Poll,
            (Wait::Until(until), Some(event)) => Wait::Until(until.min(event)),
            (Wait::Forever, Some(event)) => Wait::Until(event),
        };
        self.engine.wait(wait);
        self.turns += 1;
        self.operations = self.engine.pushed();
        let (since, at, pushed) = self.idle;
        if at != self.engine.now() || pushed != self.engine.pushed() {
            self.idle = (self.turns, self.engine.now(), self.engine.pushed());
        } else if self.turns - since > MAX_IDLE_TURNS {
            return Err(format!("hangs in {wait:?}"));
        }
        if self.turns > MAX_TURNS || self.engine.now().0 > MAX_TIME {
            return Err(format!("never ends: {:?}", self.engine.now()));
        }
        Ok(())
    }

    /// All is over but what never ends: close everything.
    fn finish(&mut self) -> Result<(), String> {
        if self.jobs.iter().any(|job| !job.refused && !job.ended) {
            self.seen.lost += 1;
            return self.die();
        }
        self.check_taken_along()?;
        for (number, guests) in self.guests.iter().enumerate() {
            if !self.removed[number] {
                self.engine.remove_disk(&guests.disk);
            }
        }
        self.engine.quit();
        for _ in 0..10_000 {
            let Some(wait) = self.engine.act() else {
                let left = (self.engine.in_flight(), self.engine.taken());
                return if left == (0, (0, 0)) { Ok(()) } else { Err(format!("{left:?} are left behind")) };
            };
            self.engine.wait(wait);
        }
        Err("an engine that nobody uses does not end".into())
    }

    /// The ring thread dies: everybody is told.
    fn die(&mut self) -> Result<(), String> {
        let now = self.engine.now();
        self.engine.die();
        self.seen.died += 1;
        for (number, start) in self.starts.iter_mut().enumerate() {
            if let Some(pending) = start.pending.take()
                && !matches!(pending.take(), Some(Err(_)))
            {
                return Err(format!("start {number} does not know that the engine has died"));
            }
        }
        let blame = Blame { dead: true, ..self.blame() };
        for job in &mut self.jobs {
            job.check_ended(&blame, now, None, &self.world, &mut self.seen)?;
            if job.runs() {
                return Err("a job does not know that the engine has died".into());
            }
        }
        self.observe_reads(&blame)?;
        if !self.readers.iter().all(Readers::are_gone) {
            return Err("a read of a snapshot waits for the dead".into());
        }
        for guests in &mut self.guests {
            let judges = (&blame, &self.jobs[..]);
            guests.outlive(&mut self.engine, &self.world, now, judges, &mut self.seen)?;
        }
        Ok(())
    }
}
