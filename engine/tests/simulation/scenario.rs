//! What is copied, and how: chosen by a seed, or by hand.

use std::sync::Arc;
use std::time::Duration;

use engine::copier::plan::{Checkpoint, Limits, MapPlan, Plan, PlantedBug, Side, WriteBackLimits};
use engine::copy::{ErrorPolicy, SyncMode};
use engine::job::TargetHolds;
use engine::ring::sim::{Disk, DiskTraits, FaultPlan, Rates, SharedWorld, World};
use engine::ring::{DocumentId, FileId};
use engine::units::{ByteRange, ClusterRange, ClusterSize, Geometry, Length, Speed};
use fastrand::Rng;

const BLOCK: u64 = 4096;

/// One simulated copy.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) length: u64,
    pub(crate) cluster: u64,
    pub(crate) slots: u32,
    pub(crate) max_run: u32,
    pub(crate) capacity: usize,
    pub(crate) sync: SyncMode,
    pub(crate) target: DiskTraits,
    /// A new file, which reads as zeros; else a device full of old data.
    pub(crate) target_is_zero: bool,
    pub(crate) zero_detect: bool,
    pub(crate) verify: bool,
    pub(crate) map: bool,
    pub(crate) source_policy: ErrorPolicy,
    pub(crate) target_policy: ErrorPolicy,
    pub(crate) speed: Option<u64>,
    pub(crate) buffered: bool,
    pub(crate) checkpoint_bytes: u64,
    pub(crate) checkpoint_interval: Duration,
    pub(crate) faults: FaultPlan,
    pub(crate) bad_source: Vec<ByteRange>,
    pub(crate) bad_target: Vec<ByteRange>,
    /// Most ranges left out.
    pub(crate) most_skipped: usize,
    /// Clusters that a verification finds wrong before it gives up the rest.
    pub(crate) most_mismatches: usize,
    pub(crate) planted: Option<PlantedBug>,
    /// A target that is zero, and does not tell where: a blank device.
    pub(crate) opaque: bool,
    /// Blocks of 4 KiB of a target that is said to be zero and is not.
    pub(crate) stained: Vec<u64>,
}

impl Scenario {
    /// A small copy with every kind of content and no faults.
    pub(crate) fn plain(seed: u64) -> Self {
        Self {
            seed,
            length: 80 * 8192 + 1536 + 7,
            cluster: 8192,
            slots: 8,
            max_run: 3,
            capacity: 32,
            sync: SyncMode::Full,
            target: DiskTraits::default(),
            target_is_zero: true,
            zero_detect: true,
            verify: false,
            map: false,
            source_policy: ErrorPolicy::Report,
            target_policy: ErrorPolicy::Report,
            speed: None,
            buffered: false,
            checkpoint_bytes: 10 * 8192,
            checkpoint_interval: Duration::from_millis(20),
            faults: FaultPlan::default(),
            bad_source: Vec::new(),
            bad_target: Vec::new(),
            most_skipped: Limits::default().skipped_ranges,
            most_mismatches: 4,
            planted: None,
            opaque: false,
            stained: Vec::new(),
        }
    }

    /// Anything.
    pub(crate) fn random(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed ^ 0x5EED);
        let cluster = 4096 << rng.u32(0..4);
        let clusters = [0, 1, 2, 5, 17, 40, 90][rng.usize(0..7)];
        let odd = [0, 0, 1, 511, 512, 513, 4095, 4096, 4097][rng.usize(0..9)];
        let target_is_zero = rng.bool();
        let policies = [
            ErrorPolicy::Report,
            ErrorPolicy::Stop,
            ErrorPolicy::Enospc,
            ErrorPolicy::Auto,
            ErrorPolicy::Ignore,
        ];
        let slots = rng.u32(1..12);
        let length = clusters * cluster + odd;
        let bad = |rng: &mut Rng| {
            if rng.u8(0..4) > 0 || length == 0 {
                return Vec::new();
            }
            (0..rng.usize(1..4)).map(|_| ByteRange::new(rng.u64(0..length), rng.u64(1..5000))).collect()
        };
        let faulty = rng.u8(0..3) > 0;
        let rates = Rates {
            short: rng.u16(0..200),
            passing: rng.u16(0..60),
            eio: rng.u16(0..40),
            nospace: rng.u16(0..30),
            flush: rng.u16(0..200),
            unsupported: rng.u16(0..300),
            ..Rates::default()
        };
        let bad_source = bad(&mut rng);
        let bad_target = bad(&mut rng);
        Self {
            seed,
            length,
            cluster,
            slots,
            max_run: rng.u32(1..=slots),
            capacity: rng.usize(4..40),
            sync: if rng.u8(0..3) == 0 { SyncMode::Top } else { SyncMode::Full },
            target: DiskTraits {
                direct_alignment: Some(if rng.bool() { 512 } else { 4096 }),
                unmaps: rng.bool(),
                zeroes: rng.bool(),
                fixed_length: !target_is_zero,
            },
            target_is_zero,
            zero_detect: rng.u8(0..4) > 0,
            verify: rng.bool(),
            map: rng.bool(),
            source_policy: policies[rng.usize(0..5)],
            target_policy: policies[rng.usize(0..5)],
            speed: (rng.u8(0..4) == 0).then(|| rng.u64(100_000..50_000_000)),
            buffered: rng.u8(0..4) == 0,
            checkpoint_bytes: rng.u64(1..20) * cluster,
            checkpoint_interval: Duration::from_millis(rng.u64(1..40)),
            faults: if faulty {
                FaultPlan { rates, quiet_from: Some(rng.u64(0..600)), ..FaultPlan::default() }
            } else {
                FaultPlan::default()
            },
            bad_source: if faulty { bad_source } else { Vec::new() },
            bad_target: if faulty { bad_target } else { Vec::new() },
            most_skipped: Limits::default().skipped_ranges,
            most_mismatches: 4,
            planted: None,
            opaque: rng.u8(0..4) == 0,
            stained: Vec::new(),
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        Geometry::new(Length(self.length), ClusterSize::new(self.cluster).unwrap())
    }

    /// What kind of disk the target is: a copy that is to go through the page cache gets one that refuses direct I/O.
    fn target_traits(&self) -> DiskTraits {
        let direct_alignment = self.target.direct_alignment.filter(|_| !self.buffered);
        DiskTraits { direct_alignment, ..self.target }
    }

    /// The disks at the start: source is disk 0, target disk 1, the map document 0.
    pub(crate) fn world(&self) -> SharedWorld {
        let mut rng = Rng::with_seed(self.seed ^ 0xD15C);
        let world = World::shared();
        let length = usize::try_from(self.length).unwrap();
        let mut source = Disk::new(
            self.contents(&mut rng),
            DiskTraits { direct_alignment: Some(512), ..DiskTraits::default() },
        );
        let blocks = self.length.div_ceil(BLOCK);
        source.punch(runs(&mut rng, blocks));
        if self.sync == SyncMode::Top {
            source.set_top_layer(runs(&mut rng, blocks));
        }
        for &range in &self.bad_source {
            source.set_bad(range);
        }
        let mut target = if self.target_is_zero {
            let mut target = if self.opaque {
                Disk::new(vec![0; length], self.target_traits())
            } else {
                Disk::sparse(length, self.target_traits())
            };
            target.stain(&self.stained);
            target
        } else {
            let sectors = length.next_multiple_of(4096) + 8192;
            let mut old = vec![0; sectors];
            rng.fill(&mut old);
            Disk::new(old, self.target_traits())
        };
        for &range in &self.bad_target {
            target.set_bad(range);
        }
        let mut inner = world.borrow_mut();
        inner.add_disk(source);
        inner.add_disk(target);
        inner.add_document();
        drop(inner);
        world
    }

    /// Data, with runs of zeros that are no holes.
    fn contents(&self, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.length).unwrap()];
        rng.fill(&mut bytes);
        for block in runs(rng, self.length.div_ceil(BLOCK)) {
            let start = usize::try_from(block * BLOCK).unwrap();
            let end = (start + 4096).min(bytes.len());
            bytes[start..end].fill(0);
        }
        bytes
    }

    /// What the target holds where nothing is written, as the job is to know it: `world` was not written to yet.
    pub(crate) fn target_before(&self, world: &SharedWorld) -> TargetHolds {
        if ![self.source_policy, self.target_policy].contains(&ErrorPolicy::Ignore) {
            return TargetHolds::Unknown; // Nothing is left out.
        }
        let fresh = self.world();
        let (mut fresh, mut world) = (fresh.borrow_mut(), world.borrow_mut());
        let untouched =
            fresh.disk(1).view() == world.disk(1).view() && fresh.disk(1).medium() == world.disk(1).medium();
        match (untouched, self.target_is_zero && self.stained.is_empty()) {
            (false, _) => TargetHolds::Unknown,
            (true, true) => TargetHolds::Zeros,
            (true, false) => TargetHolds::Unchanged,
        }
    }

    /// The plan for a run that goes on from `map`.
    pub(crate) fn plan(&self, map: Checkpoint) -> Plan {
        let limits = Limits {
            checkpoint_interval: self.checkpoint_interval,
            checkpoint_bytes: self.checkpoint_bytes,
            retries: 3,
            retry_pause: Duration::from_millis(2),
            guest_retries: 0,
            skipped_ranges: self.most_skipped,
            mismatches: self.most_mismatches,
            zeroing_failures: 2,
            zero_run_bytes: 6 * self.cluster,
            allocation_window_min: 4 * self.cluster,
            allocation_window_max: 16 * self.cluster,
            extents: 3,
            unanswered_bytes: 6 * self.cluster,
            drop_step: 5 * self.cluster,
            write_back: WriteBackLimits::DEFAULT,
        };
        Plan {
            geometry: self.geometry(),
            source: Side {
                file: FileId(0),
                name: Arc::from("source"),
                direct_alignment: Some(512),
                remote: false,
            },
            target: Side {
                file: FileId(1),
                name: Arc::from("target"),
                direct_alignment: self.target_traits().direct_alignment,
                remote: false,
            },
            sync: self.sync,
            zero_detect: self.zero_detect,
            target_is_zero: self.target_is_zero && map.blank_is_zero,
            allocate_ahead: self.target_is_zero,
            target_shows_holes: self.target_is_zero && !self.opaque,
            target_before: TargetHolds::Unknown, // See `run`.
            slots: self.slots,
            max_run: self.max_run,
            on_source_error: self.source_policy,
            on_target_error: self.target_policy,
            speed: self.speed(),
            verify: self.verify,
            map: self.map.then(|| MapPlan {
                document: DocumentId(0),
                name: Arc::from("map"),
                encode: Box::new(encode),
            }),
            live: None,
            arena_start: 0,
            resumed: map.done,
            postponed: map.skipped,
            limits,
            planted: self.planted,
        }
    }

    pub(crate) fn speed(&self) -> Option<Speed> {
        self.speed.and_then(std::num::NonZeroU64::new).map(Speed)
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

/// A map for the simulation: whether blanks are zero, how many ranges are done, then pairs of numbers.
fn encode(checkpoint: &Checkpoint) -> Vec<u8> {
    let pair = |range: &ClusterRange| [range.start.0.to_le_bytes(), range.end.0.to_le_bytes()].concat();
    let count = checkpoint.done.len() as u64;
    let ranges = checkpoint.done.iter().chain(&checkpoint.skipped).flat_map(pair);
    std::iter::once(u8::from(checkpoint.blank_is_zero)).chain(count.to_le_bytes()).chain(ranges).collect()
}

/// What a map tells.
pub(crate) fn decode(map: &[u8]) -> Checkpoint {
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let mut done: Vec<ClusterRange> =
        map[9..].chunks(16).map(|pair| ClusterRange::new(number(&pair[..8]), number(&pair[8..]))).collect();
    let skipped = done.split_off(usize::try_from(number(&map[1..9])).unwrap());
    Checkpoint { done, skipped, blank_is_zero: map[0] != 0 }
}
