//! Runs a scenario: the engine's turns, and between them clients who come, ask, and go.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use engine::copier::plan::Limits;
use engine::error::Error;
use engine::job::{JobHandle, TargetHolds};
use engine::live::carrier::CarrierLimits;
use engine::live::sim::{Pending, SimDisk, SimEngine, SimExport, SimJob, SimServer};
use engine::live::{GroupFailure, JobId, NbdOptions, Removal};
use engine::modes::{ErrorPolicy, SyncMode};
use engine::ring::Wait;
use engine::ring::sim::{
    Disk, DiskTraits, FaultPlan, Rates, SharedWorld, SimAddress, SimRing, SimSocket, SocketRates, World,
};
use engine::units::{ClusterSize, Geometry, Length, Speed};
use fastrand::Rng;

use crate::client::Request;
use crate::jobs::job;
use crate::peer::{Byte, Client, Still, Stripe, Temper};

const CLUSTER: u64 = 16 << 10;
const SLOTS: u32 = 8;
/// Of the ring. One disk has an eighth of it at most.
const CAPACITY: usize = 512;
/// More turns than any run takes.
const MAX_TURNS: u64 = 400_000;
const MAX_TIME: Duration = Duration::from_secs(600);

/// What has happened, over all runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) replies: u64,
    pub(crate) errors: u64,
    pub(crate) deaths: u64,
    pub(crate) farewells: u64,
    pub(crate) queries: u64,
    /// Answers with a hole, of a disk and of a snapshot.
    pub(crate) holes: u64,
    pub(crate) t0_holes: u64,
    pub(crate) long: u64,
    pub(crate) flushed: u64,
    pub(crate) removals: u64,
    pub(crate) snapshots: u64,
    pub(crate) backups: u64,
}

impl Seen {
    pub(crate) fn add(&mut self, other: &Self) {
        for (mine, more) in self.all().into_iter().zip(other.clone().all()) {
            *mine += *more;
        }
    }

    fn all(&mut self) -> [&mut u64; 12] {
        let Self { replies, errors, deaths, farewells, queries, holes, t0_holes, .. } = self;
        let Self { long, flushed, removals, snapshots, backups, .. } = self;
        [
            replies, errors, deaths, farewells, queries, holes, t0_holes, long, flushed, removals, snapshots,
            backups,
        ]
    }

    pub(crate) fn least(mut self) -> u64 {
        self.all().into_iter().map(|count| *count).min().unwrap_or_default()
    }
}

/// What a seed has decided.
#[derive(Debug)]
pub(crate) struct Scenario {
    seed: u64,
    stripe_bytes: u64,
    tempers: Vec<Temper>,
    traits: DiskTraits,
    faults: FaultPlan,
    pipe: usize,
    memory: u64,
    most_clients: usize,
    /// Clients to come in all, after which it ends.
    visits: u32,
    /// When a backup starts, and whether the snapshot is served, too.
    backup_at: Option<Duration>,
    removes_at: Option<Duration>,
}

impl Scenario {
    pub(crate) fn random(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let faulty = rng.bool();
        let mut rate = |most: u16| if faulty { rng.u16(0..most) } else { 0 };
        let rates = Rates {
            short: rate(200),
            passing: rate(40),
            eio: rate(10),
            unsupported: rate(200),
            ..Rates::default()
        };
        let sockets = SocketRates { short: rate(200), passing: rate(40), reset: rate(6), accept: rate(300) };
        let stripe_bytes = rng.u64(1..40) * 16_384 + [0, 1, 511, 4097][rng.usize(..4)];
        let longest = [600, 5000, 100_000, 1 << 20][rng.usize(..4)];
        let count = rng.usize(1..5);
        let temper = |rng: &mut Rng| Temper {
            structured: rng.bool(),
            at_a_time: rng.usize(1..20),
            requests: rng.u32(0..25),
            longest: rng.u32(1..=longest),
            dies: [0, 0, 5, 60][rng.usize(..4)],
            reads: [1000, 900, 300, 60][rng.usize(..4)],
        };
        let moment = |rng: &mut Rng| rng.bool().then(|| Duration::from_micros(rng.u64(1..200_000)));
        Self {
            seed,
            stripe_bytes,
            tempers: (0..count).map(|_| temper(&mut rng)).collect(),
            traits: DiskTraits {
                direct_alignment: [None, Some(512), Some(4096)][rng.usize(..3)],
                unmaps: rng.bool(),
                zeroes: rng.bool(),
                fixed_length: rng.bool(),
            },
            faults: FaultPlan { rates, sockets, ..FaultPlan::default() },
            pipe: [700, 9000, 200_000][rng.usize(..3)],
            memory: [256 << 10, 1 << 20, 64 << 20][rng.usize(..3)],
            most_clients: rng.usize(1..6),
            visits: rng.u32(1..12),
            backup_at: moment(&mut rng),
            removes_at: moment(&mut rng),
        }
    }
}

/// A backup that was asked for.
struct Backup {
    handle: JobHandle,
    pending: Option<Pending<Result<Vec<JobId>, Error>>>,
    /// What the disk held, as far as the clients know, when it was asked for; nobody had anything in flight in these stripes.
    quiet: Vec<(usize, Vec<Byte>)>,
}

struct Run<'a> {
    scenario: &'a Scenario,
    rng: Rng,
    world: SharedWorld,
    engine: SimEngine,
    disk: SimDisk,
    server: SimServer,
    address: SimAddress,
    export: SimExport,
    gone: Arc<AtomicU32>,
    exports: u32,
    asked: Vec<Pending<Result<(), Error>>>,
    clients: Vec<Option<Client>>,
    stripes: Vec<Stripe>,
    /// A reader of the snapshot.
    reader: Option<Client>,
    frozen: Option<Stripe>,
    visits: u32,
    backup: Option<Backup>,
    removed: bool,
    seen: Seen,
}

/// Run `scenario` to its end.
pub(crate) fn run(scenario: &Scenario) -> Result<Seen, String> {
    Run::new(scenario).go().map_err(|wrong| format!("{wrong}\n{scenario:?}"))
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        let mut rng = Rng::with_seed(scenario.seed ^ 0xE59);
        let world = World::shared();
        let count = scenario.tempers.len() as u64;
        let length = scenario.stripe_bytes * count;
        let mut contents = vec![0; usize::try_from(length).unwrap()];
        // One hole at first, or none.
        let sparse = scenario.seed.is_multiple_of(2);
        if !sparse {
            rng.fill(&mut contents);
        }
        {
            let mut inner = world.borrow_mut();
            let disk = if sparse {
                Disk::sparse(contents.len(), scenario.traits)
            } else {
                Disk::new(contents.clone(), scenario.traits)
            };
            inner.add_disk(disk);
            inner.add_disk(Disk::sparse(contents.len(), DiskTraits::default()));
            inner.set_pipe_bytes(scenario.pipe);
        }
        let arena = (2 << 20) + (u64::from(SLOTS) * CLUSTER).next_multiple_of(65_536);
        let arena = usize::try_from(arena).unwrap();
        let ring =
            SimRing::new(world.clone(), arena, CAPACITY, scenario.seed ^ 0x1217, scenario.faults.clone());
        let mut engine = SimEngine::new(ring.with_sockets(scenario.most_clients + 1));
        engine.set_carrier(CarrierLimits::default(), 2 << 20);
        let (disk, added) = engine.add_disk(0, Length(length), scenario.traits.direct_alignment);
        let (listener, address) = SimSocket::listen(&world);
        let options =
            NbdOptions { clients: scenario.most_clients, memory: scenario.memory, ..NbdOptions::default() };
        let (server, listens) = engine.listen(listener, options);
        let gone = Arc::new(AtomicU32::new(0));
        let (export, exported) = engine.export(server, "disk", &disk, None, counts(&gone));
        let stripes = contents.chunks(usize::try_from(scenario.stripe_bytes).unwrap()).enumerate();
        let stripes = stripes.map(|(number, bytes)| Stripe {
            start: number as u64 * scenario.stripe_bytes,
            bytes: bytes.iter().map(|&byte| Byte::Known(byte)).collect(),
        });
        Self {
            scenario,
            rng,
            engine,
            disk,
            server,
            address,
            export,
            gone,
            exports: 1,
            asked: vec![added, listens, exported],
            clients: scenario.tempers.iter().map(|_| None).collect(),
            stripes: stripes.collect(),
            reader: None,
            frozen: None,
            visits: 0,
            backup: None,
            removed: false,
            seen: Seen::default(),
            world,
        }
    }

    fn go(&mut self) -> Result<Seen, String> {
        for turn in 0.. {
            if turn > MAX_TURNS || self.engine.now().0 > MAX_TIME {
                let clients: Vec<_> = self.clients.iter().flatten().map(Client::tell).collect();
                let (now, asked) = (self.engine.now(), self.asked.len());
                return Err(format!("never ends: {now:?}, {asked} asked, {clients:?}"));
            }
            self.answers()?;
            self.backup()?;
            self.remove();
            self.clients()?;
            if self.is_over() {
                break;
            }
            self.turn()?;
        }
        self.finish()?;
        Ok(self.seen)
    }

    fn turn(&mut self) -> Result<(), String> {
        let Some(wait) = self.engine.act() else { return Err("the engine has ended by itself".into()) };
        let soon = self.engine.now().after(Duration::from_micros(self.rng.u64(1..300)));
        self.engine.wait(match wait {
            Wait::Poll => Wait::Poll,
            Wait::Until(until) => Wait::Until(until.min(soon)),
            Wait::Forever => Wait::Until(soon),
        });
        Ok(())
    }

    /// Whatever was asked for goes well.
    fn answers(&mut self) -> Result<(), String> {
        let mut wrong = None;
        self.asked.retain(|pending| match pending.take() {
            None => true,
            Some(Ok(())) => false,
            Some(Err(error)) => {
                wrong = Some(format!("refused: {error}"));
                false
            }
        });
        wrong.map_or(Ok(()), Err)
    }

    fn clients(&mut self) -> Result<(), String> {
        for (number, place) in self.clients.iter_mut().enumerate() {
            let stripe = &mut self.stripes[number];
            match place {
                Some(client) => {
                    let still = client.act(stripe, &mut self.rng, &mut self.seen)?;
                    if still == Still::Gone {
                        *place = None;
                    }
                }
                None if self.visits < self.scenario.visits && self.rng.u8(..20) == 0 => {
                    *place = Client::connect(&self.address, "disk", self.scenario.tempers[number]);
                    self.visits += u32::from(place.is_some());
                }
                None => {}
            }
        }
        if let (Some(reader), Some(frozen)) = (&mut self.reader, &mut self.frozen)
            && reader.act(frozen, &mut self.rng, &mut self.seen)? == Still::Gone
        {
            self.reader = None;
        }
        Ok(())
    }

    /// Close the export under its clients, once, and open it again.
    fn remove(&mut self) {
        let due = self.scenario.removes_at.is_some_and(|at| at <= self.engine.now().0);
        if due && !self.removed {
            self.removed = true;
            self.seen.removals += 1;
            self.asked.push(self.engine.remove_export(self.export, Removal::Disconnect));
        }
        if self.removed && self.exports == 1 && self.gone.load(Ordering::Relaxed) == 1 {
            self.exports = 2;
            let (export, pending) =
                self.engine.export(self.server, "disk", &self.disk, None, counts(&self.gone));
            self.export = export;
            self.asked.push(pending);
        }
    }

    fn backup(&mut self) -> Result<(), String> {
        let due = self.scenario.backup_at.is_some_and(|at| at <= self.engine.now().0);
        if due && self.backup.is_none() {
            let quiet = (0..self.stripes.len()).filter(|&number| self.clients[number].is_none());
            let quiet = quiet.map(|number| (number, self.stripes[number].bytes.clone())).collect();
            let (mut handles, pending) =
                self.engine.start(vec![self.job()], GroupFailure::GoOn, Duration::from_secs(5));
            let handle = handles.pop().expect("one");
            self.backup = Some(Backup { handle, pending: Some(pending), quiet });
        }
        let Some(backup) = &mut self.backup else { return Ok(()) };
        let Some(started) = backup.pending.as_ref().and_then(Pending::take) else { return Ok(()) };
        backup.pending = None;
        let Ok(jobs) = started else { return Ok(()) };
        self.seen.backups += 1;
        // What a client who came since has asked for may be in it, or not.
        backup.quiet.retain(|&(number, _)| self.clients[number].is_none());
        let (_, pending) =
            self.engine.export(self.server, "t0", &self.disk, Some(jobs[0]), counts(&self.gone));
        self.exports += 1;
        self.asked.push(pending);
        let unknown = |stripe: &Stripe| vec![Byte::Never; stripe.bytes.len()];
        let mut bytes: Vec<Byte> = self.stripes.iter().flat_map(unknown).collect();
        for (number, known) in &backup.quiet {
            let start = usize::try_from(self.stripes[*number].start).unwrap();
            bytes[start..start + known.len()].copy_from_slice(known);
        }
        self.frozen = Some(Stripe { start: 0, bytes });
        let temper =
            Temper { structured: true, dies: 0, reads: 900, requests: 200, ..self.scenario.tempers[0] };
        self.reader = Client::connect(&self.address, "t0", temper);
        self.seen.snapshots += u64::from(self.reader.is_some());
        Ok(())
    }

    fn job(&self) -> SimJob {
        let length = self.stripes.iter().map(|stripe| stripe.bytes.len() as u64).sum();
        let geometry = Geometry::new(Length(length), ClusterSize::new(CLUSTER).unwrap());
        // Where the sweep has been, nothing is known of holes any more: one without a sweep, and one that takes its time.
        let sync = if self.scenario.seed.is_multiple_of(4) { SyncMode::None } else { SyncMode::Full };
        let slow = (self.scenario.seed % 4 < 2).then_some(Speed(NonZeroU64::new(256 << 10).unwrap()));
        job(self.disk.clone(), geometry, SLOTS, move |plan| {
            plan.sync = sync;
            plan.speed = slow;
            plan.target_before = TargetHolds::Unknown;
            plan.on_source_error = ErrorPolicy::Ignore;
            plan.on_target_error = ErrorPolicy::Ignore;
            plan.limits = Limits { retries: 3, retry_pause: Duration::from_millis(2), ..Limits::default() };
        })
    }

    fn is_over(&self) -> bool {
        let leaves = self.visits == self.scenario.visits && self.clients.iter().all(Option::is_none);
        if let (true, Some(backup)) = (leaves, &self.backup) {
            // One without a sweep does not end by itself, and any other is over soon.
            if self.scenario.seed.is_multiple_of(4) {
                backup.handle.cancel().ok();
            }
        }
        let job_runs = self.backup.as_ref().is_some_and(|backup| {
            backup.pending.is_some() || backup.handle.wait_timeout(Duration::ZERO).is_none()
        });
        let removing = self.removed && self.exports == 1;
        self.visits == self.scenario.visits
            && self.clients.iter().all(Option::is_none)
            && self.asked.is_empty()
            && !job_runs
            && !removing
    }

    /// All is closed, and nothing is left; the disk and the backup hold what they must.
    fn finish(&mut self) -> Result<(), String> {
        self.reader = None;
        let stopped = self.engine.stop_server(self.server);
        self.engine.remove_disk(&self.disk);
        let deadline = self.engine.now().after(Duration::from_secs(60));
        let mut told = false;
        while !told || self.engine.sockets() > 0 || self.engine.taken() != (0, 0) {
            if self.engine.now() > deadline {
                let (taken, sockets) = (self.engine.taken(), self.engine.sockets());
                return Err(format!("left behind: {taken:?}, {sockets} sockets, told: {told}"));
            }
            self.turn()?;
            told |= stopped.take().is_some();
        }
        if self.gone.load(Ordering::Relaxed) != self.exports {
            return Err(format!(
                "{} of {} exports are gone",
                self.gone.load(Ordering::Relaxed),
                self.exports
            ));
        }
        self.engine.quit();
        if self.engine.act().is_some() {
            return Err("the engine does not end".into());
        }
        let view = self.world.borrow_mut().disk(0).view().to_vec();
        for stripe in &mut self.stripes {
            let whole = Request::new(0, 0, 0, stripe.start, u32::try_from(stripe.bytes.len()).unwrap());
            let start = usize::try_from(stripe.start).unwrap();
            stripe.compare(&whole, &view[start..]).map_err(|wrong| format!("at the end: {wrong}"))?;
        }
        self.check_backup()
    }

    fn check_backup(&mut self) -> Result<(), String> {
        let complete = |backup: &Backup| {
            let result = backup.handle.wait_timeout(Duration::ZERO);
            result.is_some_and(|result| matches!(result.outcome, engine::job::Outcome::Complete))
        };
        let (Some(backup), Some(frozen)) = (&self.backup, &mut self.frozen) else { return Ok(()) };
        if !complete(backup) {
            return Ok(());
        }
        let target = self.world.borrow_mut().disk(1).medium().to_vec();
        let whole = Request::new(0, 0, 0, 0, u32::try_from(target.len()).unwrap());
        frozen.compare(&whole, &target).map_err(|wrong| format!("in the backup: {wrong}"))
    }
}

fn counts(gone: &Arc<AtomicU32>) -> Box<dyn FnOnce() + Send> {
    let gone = Arc::clone(gone);
    Box::new(move || {
        gone.fetch_add(1, Ordering::Relaxed);
    })
}
