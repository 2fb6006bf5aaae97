//! Which disks, which guests, which jobs, and what goes wrong: chosen by a seed, or by hand.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use engine::copier::plan::{Limits, LivePlan, Plan, PlantedBug, Side};
use engine::copy::{ErrorPolicy, SyncMode};
use engine::job::TargetHolds;
use engine::live::carrier::CarrierLimits;
use engine::live::sim::{SimDisk, SimJob};
use engine::live::{GroupFailure, SweepDepth};
use engine::modes::CbwErrorPolicy;
use engine::ring::sim::{Disk, DiskTraits, FaultPlan, Rates, SharedWorld, World};
use engine::ring::{BufferRange, FileId};
use engine::units::{ByteRange, ClusterSize, Geometry, Length, Speed};
use fastrand::Rng;

pub(crate) const BLOCK: u64 = 4096;

/// How guests get at a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// The engine carries their I/O.
    Carried,
    /// They take permits and write by themselves.
    Own,
    /// The former to the first half of the disk, the latter to the second.
    Both,
    /// They write by themselves, and have the engine carry discards, reads and flushes of the same bytes.
    Mixed,
}

/// What the top layer of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layers {
    /// There is one layer.
    One,
    /// Some blocks are in the top layer.
    Some,
    /// None is.
    Empty,
}

/// A live disk and its guests.
#[derive(Clone, Debug)]
pub(crate) struct DiskSpec {
    pub(crate) length: u64,
    pub(crate) traits: DiskTraits,
    pub(crate) bad: Vec<ByteRange>,
    pub(crate) path: Path,
    /// Requests of its guests, over all.
    pub(crate) requests: u64,
    pub(crate) at_a_time: usize,
    /// Mean time between requests.
    pub(crate) pace: Duration,
    /// Longest time for which a permit is held.
    pub(crate) hold: Duration,
    /// Every second block is a hole.
    pub(crate) crumbled: bool,
    /// Of what its top layer holds at the start; what guests write comes to be there.
    pub(crate) layers: Layers,
    /// Everybody waits for his answer.
    pub(crate) patient: bool,
    /// Its last handle goes as soon as its guests are gone, whatever its jobs do.
    pub(crate) leaves_early: bool,
}

/// A target that does not answer for a while.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stuck {
    pub(crate) from: Duration,
    /// `None`: never comes free.
    pub(crate) until: Option<Duration>,
}

/// A copy.
#[derive(Clone, Debug)]
pub(crate) struct JobSpec {
    pub(crate) disk: usize,
    pub(crate) cluster: u64,
    pub(crate) slots: u32,
    pub(crate) reserved: u32,
    pub(crate) max_run: u32,
    pub(crate) depth: SweepDepth,
    pub(crate) zero_detect: bool,
    /// A new file, which reads as zeros; else a device full of old data.
    pub(crate) target_is_zero: bool,
    /// Space was reserved for all of it.
    pub(crate) space_reserved: bool,
    pub(crate) target: DiskTraits,
    pub(crate) slowness: u64,
    pub(crate) stuck: Option<Stuck>,
    pub(crate) bad_target: Vec<ByteRange>,
    pub(crate) source_policy: ErrorPolicy,
    pub(crate) target_policy: ErrorPolicy,
    pub(crate) on_cbw_error: CbwErrorPolicy,
    pub(crate) cbw_timeout: Option<Duration>,
    pub(crate) speed: Option<u64>,
    pub(crate) cancel_at: Option<Duration>,
    pub(crate) sync: SyncMode,
    /// How often the disk as of t0 is read while it runs.
    pub(crate) reads: u64,
}

/// Jobs that start at one instant.
#[derive(Clone, Debug)]
pub(crate) struct StartSpec {
    pub(crate) at: Duration,
    pub(crate) timeout: Duration,
    pub(crate) on_failure: GroupFailure,
    pub(crate) jobs: Vec<JobSpec>,
}

/// What the operator does of their own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operator {
    /// Nothing.
    Watches,
    /// Pauses, resumes and sets the speed now and then.
    Fidgets,
    /// Pauses every job when it has started, until the guests are gone.
    Pauses,
    /// Pauses a job that has left out so many bytes, until the guests are gone.
    PausesWithout(u64),
}

/// See the module's header.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) disks: Vec<DiskSpec>,
    pub(crate) starts: Vec<StartSpec>,
    pub(crate) operator: Operator,
    pub(crate) capacity: usize,
    /// Not everything fits in the arena.
    pub(crate) tight: bool,
    pub(crate) carrier: CarrierLimits,
    pub(crate) carrier_bytes: u32,
    pub(crate) faults: FaultPlan,
    /// Nothing fails any more after this, by itself or by bad sectors.
    pub(crate) mended_at: Duration,
    pub(crate) die_at: Option<Duration>,
    pub(crate) planted: Option<PlantedBug>,
}

fn micros(rng: &mut Rng, most: u64) -> Duration {
    Duration::from_micros(rng.u64(0..most.max(1)))
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.usize(..from.len())]
}

impl DiskSpec {
    pub(crate) fn plain(length: u64, path: Path) -> Self {
        Self {
            length,
            traits: DiskTraits { fixed_length: true, ..DiskTraits::default() },
            bad: Vec::new(),
            path,
            requests: 40,
            at_a_time: 6,
            pace: Duration::from_micros(300),
            hold: Duration::from_micros(600),
            crumbled: false,
            layers: Layers::One,
            patient: true,
            leaves_early: false,
        }
    }

    fn random(rng: &mut Rng, faulty: bool) -> Self {
        let odd = pick(rng, &[0, 0, 0, 1, 511, 512, 513, 4095, 4097, 9000]);
        let blocks = pick(rng, &[3, 20, 60, 120]);
        let length = rng.u64(0..blocks) * BLOCK + odd;
        let length = if length == 0 { BLOCK } else { length };
        let mut pace = pick(rng, &[30, 300, 3000]);
        if faulty && rng.bool() {
            // Some are there when the sweep has given up.
            pace = 20_000;
        }
        Self {
            length,
            traits: DiskTraits {
                direct_alignment: pick(rng, &[None, Some(512), Some(512), Some(4096)]),
                unmaps: rng.u8(..4) > 0,
                zeroes: rng.u8(..4) > 0,
                fixed_length: rng.bool(),
            },
            bad: if faulty { bad(rng, length) } else { Vec::new() },
            path: pick(rng, &[Path::Carried, Path::Carried, Path::Own, Path::Both, Path::Mixed]),
            requests: if rng.u8(..10) == 0 { 0 } else { rng.u64(5..60) },
            at_a_time: rng.usize(1..10),
            pace: Duration::from_micros(rng.u64(1..pace)),
            hold: Duration::from_micros(pick(rng, &[1, 100, 1000, 30_000])),
            crumbled: rng.u8(..8) == 0,
            layers: pick(rng, &[Layers::One, Layers::Some, Layers::Some, Layers::Empty]),
            patient: rng.bool(),
            leaves_early: rng.u8(..4) == 0,
        }
    }

    fn contents(&self, rng: &mut Rng) -> Disk {
        let mut bytes = vec![0; usize::try_from(self.length).unwrap()];
        rng.fill(&mut bytes);
        let blocks = self.length.div_ceil(BLOCK);
        for block in runs(rng, blocks) {
            let start = usize::try_from(block * BLOCK).unwrap();
            let end = (start + 4096).min(bytes.len());
            bytes[start..end].fill(0);
        }
        let mut disk = Disk::new(bytes, self.traits);
        if self.crumbled {
            disk.punch((0..blocks).filter(|block| block % 2 == 1));
        } else {
            disk.punch(runs(rng, blocks));
        }
        match self.layers {
            Layers::One => {}
            Layers::Some => disk.set_top_layer(runs(rng, blocks)),
            Layers::Empty => disk.set_top_layer([]),
        }
        for &range in &self.bad {
            disk.set_bad(range);
        }
        disk
    }
}

impl JobSpec {
    pub(crate) fn plain(disk: usize, cluster: u64) -> Self {
        Self {
            disk,
            cluster,
            slots: 4,
            reserved: 1,
            max_run: 2,
            depth: SweepDepth::Auto,
            zero_detect: true,
            target_is_zero: true,
            space_reserved: true,
            target: DiskTraits::default(),
            slowness: 1,
            stuck: None,
            bad_target: Vec::new(),
            source_policy: ErrorPolicy::Report,
            target_policy: ErrorPolicy::Report,
            on_cbw_error: CbwErrorPolicy::BreakSnapshot,
            cbw_timeout: None,
            speed: None,
            cancel_at: None,
            sync: SyncMode::Full,
            reads: 0,
        }
    }

    fn random(rng: &mut Rng, disks: &[DiskSpec], faulty: bool) -> Self {
        let policies = [
            ErrorPolicy::Report,
            ErrorPolicy::Stop,
            ErrorPolicy::Enospc,
            ErrorPolicy::Auto,
            ErrorPolicy::Ignore,
        ];
        let ignores = faulty && rng.u8(..3) == 0;
        let disk = rng.usize(..disks.len());
        let most_slots = pick(rng, &[3, 5, 12]);
        let slots = rng.u32(2..most_slots);
        let target_is_zero = rng.bool();
        let stuck = (rng.u8(..8) == 0).then(|| {
            let from = micros(rng, 20_000);
            Stuck { from, until: (rng.u8(..3) > 0).then(|| from + micros(rng, 500_000)) }
        });
        let forever = stuck.is_some_and(|stuck| stuck.until.is_none());
        let timeouts = [None, Some(500_000), Some(100_000), Some(10_000), Some(300)];
        let sync = match rng.u8(..8) {
            0 => SyncMode::None,
            1..4 => SyncMode::Top,
            _ => SyncMode::Full,
        };
        let mut cancel_at = (rng.u8(..8) == 0).then(|| micros(rng, 60_000));
        if forever || sync == SyncMode::None {
            cancel_at = cancel_at.or(Some(micros(rng, 400_000)));
        }
        Self {
            disk,
            cluster: 4096 << rng.u32(0..5),
            slots,
            reserved: rng.u32(1..slots),
            max_run: rng.u32(1..=slots),
            depth: if rng.bool() { SweepDepth::Auto } else { SweepDepth::Fixed(rng.u32(0..6)) },
            zero_detect: rng.u8(0..4) > 0,
            target_is_zero,
            space_reserved: target_is_zero && rng.bool(),
            target: DiskTraits {
                direct_alignment: pick(rng, &[None, Some(512), Some(4096)]),
                unmaps: rng.u8(..4) > 0,
                zeroes: rng.u8(..4) > 0,
                fixed_length: !target_is_zero,
            },
            slowness: if rng.u8(..5) == 0 { rng.u64(2..40) } else { 1 },
            stuck,
            bad_target: if faulty { bad(rng, disks[disk].length) } else { Vec::new() },
            source_policy: if ignores { ErrorPolicy::Ignore } else { pick(rng, &policies) },
            target_policy: if ignores { ErrorPolicy::Ignore } else { pick(rng, &policies) },
            on_cbw_error: pick(rng, &[CbwErrorPolicy::BreakGuestWrite, CbwErrorPolicy::BreakSnapshot]),
            cbw_timeout: pick(rng, &timeouts).map(Duration::from_micros),
            speed: (rng.u8(..4) == 0).then(|| rng.u64(100_000..50_000_000)),
            cancel_at,
            sync,
            reads: if rng.u8(..3) == 0 { rng.u64(1..40) } else { 0 },
        }
    }

    pub(crate) fn geometry(&self, disks: &[DiskSpec]) -> Geometry {
        Geometry::new(Length(disks[self.disk].length), ClusterSize::new(self.cluster).unwrap())
    }

    /// Whether it goes on without what cannot be copied.
    fn leaves_out(&self) -> bool {
        self.source_policy == ErrorPolicy::Ignore || self.target_policy == ErrorPolicy::Ignore
    }

    /// Whether it may fail, or fail its guests, although no disk does.
    pub(crate) fn is_impatient(&self) -> bool {
        self.cbw_timeout.is_some()
    }

    pub(crate) fn target_disk(&self, rng: &mut Rng, length: u64) -> Disk {
        let length = usize::try_from(length).unwrap();
        let mut target = if self.target_is_zero {
            let mut target = Disk::sparse(length, self.target);
            if self.space_reserved {
                target.reserve();
            }
            target
        } else {
            let mut old = vec![0; length.next_multiple_of(4096) + 8192];
            rng.fill(&mut old);
            Disk::new(old, self.target)
        };
        for &range in &self.bad_target {
            target.set_bad(range);
        }
        target.set_slowness(self.slowness);
        target
    }

    /// What the engine is asked for.
    pub(crate) fn job(&self, scenario: &Scenario, disk: SimDisk, target: usize) -> SimJob {
        let spec = self.clone();
        let geometry = spec.geometry(&scenario.disks);
        let planted = scenario.planted;
        let plan = move |source: Side, file: FileId, memory: BufferRange| Plan {
            geometry,
            source,
            target: Side {
                file,
                name: Arc::from(format!("target{target}")),
                direct_alignment: spec.target.direct_alignment,
            },
            sync: spec.sync,
            zero_detect: spec.zero_detect,
            target_is_zero: spec.target_is_zero,
            allocate_ahead: false,
            target_shows_holes: false,
            target_before: TargetHolds::Unknown,
            slots: spec.slots,
            arena_start: memory.start,
            max_run: spec.max_run,
            on_source_error: spec.source_policy,
            on_target_error: spec.target_policy,
            speed: None,
            verify: false,
            map: None,
            resumed: Vec::new(),
            postponed: Vec::new(),
            live: Some(LivePlan {
                on_cbw_error: spec.on_cbw_error,
                cbw_timeout: spec.cbw_timeout,
                reserved_slots: spec.reserved,
                space_reserved: spec.space_reserved && spec.target_is_zero,
                may_unmap: true,
            }),
            limits: Limits {
                retries: 3,
                retry_pause: Duration::from_millis(2),
                zero_run_bytes: 6 * spec.cluster,
                extents: 3,
                drop_step: 5 * spec.cluster,
                ..Limits::default()
            },
            planted,
        };
        SimJob { disk, target, geometry, slots: self.slots, depth: self.depth, plan: Box::new(plan) }
    }

    pub(crate) fn speed(&self) -> Option<Speed> {
        self.speed.and_then(NonZeroU64::new).map(Speed)
    }
}

impl Scenario {
    /// One disk, its guests, and one copy that starts in their midst; nothing fails.
    pub(crate) fn plain(seed: u64, path: Path) -> Self {
        let start = StartSpec {
            at: Duration::from_millis(2),
            timeout: Duration::from_secs(1),
            on_failure: GroupFailure::GoOn,
            jobs: vec![JobSpec::plain(0, 8192)],
        };
        Self {
            seed,
            disks: vec![DiskSpec::plain(20 * 8192 + 1536 + 7, path)],
            starts: vec![start],
            operator: Operator::Watches,
            capacity: 32,
            tight: false,
            carrier: CarrierLimits {
                requests: 8,
                slot_bytes: 4096,
                window_bytes: 16_384,
                wide_window_bytes: 65_536,
                deferred_ranges: 100,
                deferred_grain: 4096,
                discard_checks: 4,
                discard_pause: Duration::from_millis(1),
                steps_a_poll: 16,
            },
            carrier_bytes: 65_536,
            faults: FaultPlan::default(),
            mended_at: Duration::ZERO,
            die_at: None,
            planted: None,
        }
    }

    /// Anything.
    pub(crate) fn random(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed ^ 0x11FE);
        let rng = &mut rng;
        let faulty = rng.u8(..5) < 2;
        let disks: Vec<_> = (0..rng.usize(1..3)).map(|_| DiskSpec::random(rng, faulty)).collect();
        let starts: Vec<_> = (0..rng.usize(1..4)).map(|_| random_start(rng, &disks, faulty)).collect();
        let window = 4096 << rng.u32(0..3);
        let mut operators = vec![Operator::Watches, Operator::Fidgets, Operator::Fidgets, Operator::Pauses];
        if starts.iter().flat_map(|start| &start.jobs).any(JobSpec::leaves_out) {
            operators.extend([Operator::PausesWithout(1); 4]);
        }
        let stuck = starts.iter().flat_map(|start| &start.jobs).any(|job| job.stuck.is_some());
        Self {
            seed,
            operator: pick(rng, &operators),
            // What never ends must leave room for the rest.
            capacity: if stuck { 1024 } else { pick(rng, &[2, 7, 30, 100, 500]) },
            tight: rng.u8(..20) == 0,
            carrier: CarrierLimits {
                requests: rng.usize(1..12),
                slot_bytes: 4096,
                window_bytes: window,
                wide_window_bytes: window * 4,
                deferred_ranges: pick(rng, &[1, 3, 100]),
                deferred_grain: 4096,
                discard_checks: rng.u32(1..4),
                discard_pause: Duration::from_micros(rng.u64(100..3000)),
                steps_a_poll: rng.usize(1..8),
            },
            carrier_bytes: 65_536,
            faults: if faulty { random_faults(rng) } else { FaultPlan::default() },
            mended_at: micros(rng, 100_000),
            die_at: (rng.u8(..12) == 0).then(|| micros(rng, 60_000)),
            disks,
            starts,
            planted: None,
        }
    }

    /// Whether every question about a disk is answered.
    pub(crate) fn is_told(&self) -> bool {
        self.faults.rates.eio == 0 && self.faults.exact.is_empty()
    }

    pub(crate) fn jobs(&self) -> impl Iterator<Item = &JobSpec> {
        self.starts.iter().flat_map(|start| &start.jobs)
    }

    /// Whether nothing was made to fail.
    pub(crate) fn is_sound(&self) -> bool {
        let rates = &self.faults.rates;
        let sums = rates.short
            + rates.passing
            + rates.eio
            + rates.nospace
            + rates.flush
            + rates.unsupported
            + rates.drop_cache;
        sums == 0
            && self.faults.exact.is_empty()
            && self.disks.iter().all(|disk| disk.bad.is_empty())
            && self.jobs().all(|job| job.bad_target.is_empty())
    }

    /// Bytes of the arena.
    pub(crate) fn arena(&self) -> usize {
        let job = |job: &JobSpec| (u64::from(job.slots) * job.cluster).next_multiple_of(65_536);
        let jobs: u64 = self.jobs().map(job).sum();
        let all = self.disks.len() * self.carrier_bytes as usize + usize::try_from(jobs).unwrap();
        if self.tight { all - 65_536 } else { all }
    }

    /// The disks at the start: the live ones, then the targets in the order of the jobs.
    pub(crate) fn world(&self) -> SharedWorld {
        let mut rng = Rng::with_seed(self.seed ^ 0xD15C);
        let world = World::shared();
        let mut inner = world.borrow_mut();
        for disk in &self.disks {
            inner.add_disk(disk.contents(&mut rng));
        }
        for job in self.jobs() {
            inner.add_disk(job.target_disk(&mut rng, self.disks[job.disk].length));
        }
        drop(inner);
        world
    }
}

fn random_start(rng: &mut Rng, disks: &[DiskSpec], faulty: bool) -> StartSpec {
    let jobs = pick(rng, &[1, 1, 1, 2, 2, 3]);
    StartSpec {
        at: micros(rng, 20_000),
        timeout: Duration::from_micros(pick(rng, &[200, 5_000, 200_000, 200_000])),
        on_failure: pick(rng, &[GroupFailure::FailAll, GroupFailure::GoOn]),
        jobs: (0..jobs).map(|_| JobSpec::random(rng, disks, faulty)).collect(),
    }
}

fn random_faults(rng: &mut Rng) -> FaultPlan {
    let mut rate = |most: u16| if rng.bool() { rng.u16(0..most) } else { 0 };
    let rates = Rates {
        short: rate(200),
        passing: rate(60),
        eio: rate(40),
        nospace: rate(30),
        flush: rate(200),
        unsupported: rate(300),
        drop_cache: rate(100),
        publish: 0,
    };
    FaultPlan { rates, quiet_from: Some(rng.u64(0..600)), ..FaultPlan::default() }
}

fn bad(rng: &mut Rng, length: u64) -> Vec<ByteRange> {
    if rng.u8(0..3) > 0 {
        return Vec::new();
    }
    (0..rng.usize(1..4)).map(|_| ByteRange::new(rng.u64(0..length), rng.u64(1..5000))).collect()
}

/// Some runs of numbers below `end`, about a third of them.
fn runs(rng: &mut Rng, end: u64) -> Vec<u64> {
    let mut chosen = Vec::new();
    let mut at = 0;
    while at < end {
        let skip = rng.u64(0..12);
        let run = rng.u64(0..8);
        chosen.extend((at + skip..at + skip + run).filter(|&block| block < end));
        at += skip + run + 1;
    }
    chosen
}
