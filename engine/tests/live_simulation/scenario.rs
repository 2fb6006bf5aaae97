//! Which disks, which guests, which jobs, and what goes wrong: chosen by a seed (`random`), or by hand.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use engine::copier::plan::{Limits, LivePlan, Plan, PlantedBug, Side, WriteBackLimits};
use engine::copy::{ErrorPolicy, SyncMode};
use engine::job::TargetHolds;
use engine::live::carrier::CarrierLimits;
use engine::live::sim::{SimDisk, SimFleece, SimJob};
use engine::live::{GroupFailure, SweepDepth};
use engine::modes::CbwErrorPolicy;
use engine::ring::sim::{Disk, DiskTraits, FaultPlan, SharedWorld, World};
use engine::ring::{BufferRange, FileId};
use engine::units::{ByteRange, ClusterSize, Geometry, Length, Speed};
use fastrand::Rng;

pub(crate) const BLOCK: u64 = 4096;
/// See [`Limits::guest_retries`].
pub(crate) const GUEST_RETRIES: usize = 3;

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

/// A fleece file of a copy.
#[derive(Clone, Debug)]
pub(crate) struct FleeceSpec {
    /// Clusters that it takes.
    pub(crate) slots: u32,
    pub(crate) direct_alignment: Option<u32>,
    pub(crate) slowness: u64,
    /// It comes free again.
    pub(crate) stuck: Option<Stuck>,
    pub(crate) bad: Vec<ByteRange>,
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
    pub(crate) fleece: Option<FleeceSpec>,
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
    /// How long an error has paused a job before the operator mends everything and lets it go on.
    pub(crate) mends_after: Duration,
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

impl FleeceSpec {
    pub(crate) fn plain(slots: u32) -> Self {
        Self { slots, direct_alignment: Some(512), slowness: 1, stuck: None, bad: Vec::new() }
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
            fleece: None,
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

    pub(crate) fn geometry(&self, disks: &[DiskSpec]) -> Geometry {
        Geometry::new(Length(disks[self.disk].length), ClusterSize::new(self.cluster).unwrap())
    }

    /// Whether it goes on without what cannot be copied.
    pub(crate) fn leaves_out(&self) -> bool {
        self.source_policy == ErrorPolicy::Ignore || self.target_policy == ErrorPolicy::Ignore
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

    /// Its fleece file, of no bytes if it has none. Old data is in it that is nobody's.
    fn fleece_disk(&self) -> Disk {
        let bytes = self.fleece.as_ref().map_or(0, |fleece| u64::from(fleece.slots) * self.cluster);
        let direct_alignment = self.fleece.as_ref().and_then(|fleece| fleece.direct_alignment);
        let traits = DiskTraits { direct_alignment, fixed_length: true, ..DiskTraits::default() };
        let mut disk = Disk::new(vec![0xFE; usize::try_from(bytes).unwrap()], traits);
        if let Some(fleece) = &self.fleece {
            fleece.bad.iter().for_each(|&range| disk.set_bad(range));
            disk.set_slowness(fleece.slowness);
        }
        disk
    }

    /// The same for the engine, as file `file`.
    pub(crate) fn fleece(&self, file: usize) -> Option<SimFleece> {
        let fleece = self.fleece.as_ref()?;
        let FleeceSpec { slots, direct_alignment, .. } = *fleece;
        Some(SimFleece { file, direct_alignment, slots })
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
                remote: false,
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
                guest_retries: GUEST_RETRIES,
                zero_run_bytes: 6 * spec.cluster,
                extents: 3,
                unanswered_bytes: 6 * spec.cluster,
                drop_step: 5 * spec.cluster,
                write_back: WriteBackLimits {
                    start_bytes: 6 * spec.cluster,
                    min_bytes: spec.cluster,
                    max_bytes: 40 * spec.cluster,
                },
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
            mends_after: Duration::ZERO,
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
        let bad = |job: &JobSpec| {
            !job.bad_target.is_empty() || job.fleece.as_ref().is_some_and(|fleece| !fleece.bad.is_empty())
        };
        sums == 0
            && self.faults.exact.is_empty()
            && self.disks.iter().all(|disk| disk.bad.is_empty())
            && !self.jobs().any(bad)
    }

    /// Number of the target of the job `number` in the world.
    pub(crate) fn target_of(&self, number: usize) -> usize {
        self.disks.len() + number
    }

    /// Number of its fleece file.
    pub(crate) fn fleece_of(&self, number: usize) -> usize {
        self.disks.len() + self.jobs().count() + number
    }

    /// How many disks the world has.
    pub(crate) fn files(&self) -> usize {
        self.fleece_of(self.jobs().count())
    }

    /// Bytes of the arena.
    pub(crate) fn arena(&self) -> usize {
        let job = |job: &JobSpec| (u64::from(job.slots) * job.cluster).next_multiple_of(65_536);
        let jobs: u64 = self.jobs().map(job).sum();
        let all = self.disks.len() * self.carrier_bytes as usize + usize::try_from(jobs).unwrap();
        if self.tight { all - 65_536 } else { all }
    }

    /// The disks at the start: the live ones, then the targets in the order of the jobs, then their fleece files.
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
        for job in self.jobs() {
            inner.add_disk(job.fleece_disk());
        }
        drop(inner);
        world
    }
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
