//! A live disk with guests, its copy, and a fleece file between them.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use engine::copier::plan::{Limits, LivePlan, Plan, PlantedBug, Side};
use engine::copy::{ErrorPolicy, SyncMode};
use engine::error::Error;
use engine::job::{JobHandle, JobResult, Outcome, Status, TargetHolds};
use engine::live::sim::{Pending, SimDisk, SimEngine, SimFleece, SimJob};
use engine::live::{CbwErrorPolicy, GroupFailure, IoRequest, JobId, SweepDepth};
use engine::ring::sim::{Disk, DiskTraits, FaultPlan, SharedWorld, SimRing, World};
use engine::ring::{BufferRange, FileId, Wait};
use engine::units::{ByteRange, ClusterSize, Geometry, Length, Speed, Timestamp};
use fastrand::Rng;

pub(crate) const CLUSTER: u64 = 8192;
pub(crate) const CLUSTERS: u64 = 60;
pub(crate) const LENGTH: u64 = (CLUSTERS - 1) * CLUSTER + 5000;
pub(crate) const SLOTS: u32 = 20;
/// More than any request takes that waits for disks which answer.
pub(crate) const PROMPT: Duration = Duration::from_millis(300);
pub(crate) const CARRIER_BYTES: usize = 4 << 20;

/// Blocks of 4 KiB of the source that are holes.
const HOLES: [u64; 9] = [0, 7, 24, 26, 27, 38, 81, 100, 103];

/// Clusters of zeros; the last one is a hole.
pub(crate) const ZEROS: [u64; 4] = [7, 8, 31, 13];

/// Numbers of the disks in the world.
pub(crate) const SOURCE: usize = 0;
pub(crate) const TARGET: usize = 1;
pub(crate) const FLEECE: usize = 2;

#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) seed: u64,
    pub(crate) sync: SyncMode,
    pub(crate) fleece_slots: u32,
    pub(crate) on_cbw_error: CbwErrorPolicy,
    pub(crate) cbw_timeout: Option<Duration>,
    pub(crate) on_target_error: ErrorPolicy,
    pub(crate) speed: Option<u64>,
    pub(crate) planted: Option<PlantedBug>,
    pub(crate) faults: FaultPlan,
    pub(crate) target_is_zero: bool,
    /// Clusters that the target has room for.
    pub(crate) room: u64,
    pub(crate) alignment: Option<u32>,
    /// Every second block of the source is a hole.
    pub(crate) crumbled: bool,
    /// Places on the ring.
    pub(crate) capacity: usize,
}

impl Setup {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            sync: SyncMode::Full,
            fleece_slots: 64,
            on_cbw_error: CbwErrorPolicy::BreakSnapshot,
            cbw_timeout: Some(Duration::from_secs(30)),
            on_target_error: ErrorPolicy::Report,
            speed: None,
            planted: None,
            faults: FaultPlan::default(),
            target_is_zero: true,
            room: CLUSTERS,
            alignment: Some(512),
            crumbled: false,
            capacity: 256,
        }
    }

    /// Of a disk of which nothing is copied but what guests change.
    pub(crate) fn of_changes(seed: u64) -> Self {
        Self { sync: SyncMode::None, ..Self::new(seed) }
    }

    pub(crate) fn plan(&self, source: Side, file: FileId, memory: BufferRange) -> Plan {
        Plan {
            geometry: geometry(),
            source,
            target: Side { file, name: Arc::from("target"), direct_alignment: self.alignment, remote: false },
            sync: self.sync,
            zero_detect: true,
            target_is_zero: self.target_is_zero,
            allocate_ahead: false,
            slots: SLOTS,
            arena_start: memory.start,
            max_run: 4,
            on_source_error: ErrorPolicy::Report,
            on_target_error: self.on_target_error,
            speed: None,
            verify: false,
            map: None,
            target_shows_holes: false,
            target_before: TargetHolds::Unknown,
            postponed: Vec::new(),
            resumed: Vec::new(),
            live: Some(LivePlan {
                on_cbw_error: self.on_cbw_error,
                cbw_timeout: self.cbw_timeout,
                reserved_slots: 6,
                space_reserved: false,
                may_unmap: true,
            }),
            limits: Limits { retries: 2, retry_pause: Duration::from_millis(2), ..Limits::default() },
            planted: self.planted,
        }
    }
}

pub(crate) fn geometry() -> Geometry {
    Geometry::new(Length(LENGTH), ClusterSize::new(CLUSTER).unwrap())
}

pub(crate) fn bytes_of(cluster: u64) -> std::ops::Range<usize> {
    let start = usize::try_from(cluster * CLUSTER).unwrap();
    start..usize::try_from((cluster + 1) * CLUSTER).unwrap().min(usize::try_from(LENGTH).unwrap())
}

/// A live disk under guests, and its copy.
pub(crate) struct Bench {
    pub(crate) world: SharedWorld,
    pub(crate) engine: SimEngine,
    pub(crate) disk: SimDisk,
    pub(crate) job: JobHandle,
    pub(crate) id: JobId,
    pub(crate) sync: SyncMode,
    pub(crate) t0: Vec<u8>,
    /// What guests have made of it.
    pub(crate) now: Vec<u8>,
    pub(crate) rng: Rng,
    /// Watch where the old contents are.
    pub(crate) watched: bool,
    pub(crate) lost: Option<u64>,
}

impl Bench {
    /// Everything set up, t0 just taken.
    pub(crate) fn start(setup: &Setup) -> Self {
        let mut rng = Rng::with_seed(setup.seed);
        let mut contents = vec![0; usize::try_from(LENGTH).unwrap()];
        rng.fill(&mut contents);
        for &cluster in &ZEROS[..3] {
            contents[bytes_of(cluster)].fill(0);
        }
        // Holes of a cluster, and in clusters.
        let holes: Vec<u64> =
            if setup.crumbled { (1..LENGTH / 4096).step_by(2).collect() } else { HOLES.to_vec() };
        for &block in &holes {
            let start = usize::try_from(block * 4096).unwrap();
            contents[start..start + 4096].fill(0);
        }
        let world = World::shared();
        let traits = DiskTraits { direct_alignment: setup.alignment, ..DiskTraits::default() };
        let room = setup.room.min(CLUSTERS) * CLUSTER;
        let mut target = Disk::sparse(
            usize::try_from(room.min(LENGTH)).unwrap(),
            DiskTraits { fixed_length: true, ..traits },
        );
        if !setup.target_is_zero {
            target.stain(&(0..room.min(LENGTH) / 4096).collect::<Vec<_>>());
        }
        let fleece = u64::from(setup.fleece_slots) * CLUSTER;
        let fleece = Disk::new(vec![0xFE; usize::try_from(fleece).unwrap()], traits);
        let mut source = Disk::new(contents.clone(), traits);
        source.punch(holes);
        for disk in [source, target, fleece] {
            world.borrow_mut().add_disk(disk);
        }
        let arena = CARRIER_BYTES + (SLOTS as usize * 8192).next_multiple_of(65_536);
        let ring = SimRing::new(world.clone(), arena, setup.capacity, setup.seed, setup.faults.clone());
        let mut engine = SimEngine::new(ring);
        let (disk, _added) = engine.add_disk(SOURCE, Length(LENGTH), setup.alignment);
        let plan = setup.clone();
        let job = SimJob {
            disk: disk.clone(),
            target: TARGET,
            geometry: geometry(),
            slots: SLOTS,
            depth: SweepDepth::Fixed(8),
            plan: Box::new(move |source, file, memory| plan.plan(source, file, memory)),
        };
        let fleece = SimFleece { file: FLEECE, direct_alignment: setup.alignment, slots: setup.fleece_slots };
        let timeout = Duration::from_secs(1);
        let (mut jobs, started) =
            engine.start_fleeced(vec![(job, Some(fleece))], GroupFailure::GoOn, timeout);
        let job = jobs.pop().unwrap();
        job.set_speed(setup.speed.and_then(NonZeroU64::new).map(Speed)).unwrap();
        let id = loop {
            let wait = engine.act().unwrap();
            if let Some(started) = started.take() {
                engine.wait(Wait::Poll);
                break started.unwrap()[0];
            }
            engine.wait(wait);
        };
        let now = contents.clone();
        let sync = setup.sync;
        Self { world, engine, disk, job, id, sync, t0: contents, now, rng, watched: false, lost: None }
    }

    pub(crate) fn turn(&mut self, until: Timestamp) {
        let nothing = self.turn_for(until, |_| None::<()>);
        assert!(nothing.is_none());
    }

    /// A turn that does not wait when `look`, asked in its midst, finds something.
    fn turn_for<T>(&mut self, until: Timestamp, look: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        let wait = self.engine.act().expect("the engine goes on");
        let found = look(self);
        let wait = match wait {
            _ if found.is_some() => Wait::Poll,
            Wait::Poll => Wait::Poll,
            Wait::Until(at) => Wait::Until(at.min(until)),
            Wait::Forever => Wait::Until(until),
        };
        self.engine.wait(wait);
        if self.watched && self.lost.is_none() {
            self.lost = self.find_lost();
        }
        found
    }

    /// The first cluster that guests have changed and whose old contents a power loss at the target would leave nowhere.
    pub(crate) fn find_lost(&self) -> Option<u64> {
        let mut world = self.world.borrow_mut();
        let source = world.disk(SOURCE).view().to_vec();
        let fleece = world.disk(FLEECE).view().to_vec();
        let target = world.disk(TARGET);
        (0..CLUSTERS).find(|&cluster| {
            let bytes = bytes_of(cluster);
            let old = &self.t0[bytes.clone()];
            source[bytes.clone()] != *old
                && target.medium()[bytes] != *old
                && !fleece.chunks(8192).any(|slot| slot.starts_with(old))
        })
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        let until = self.engine.now().after(time);
        while self.engine.now() < until {
            self.turn(until);
        }
    }

    pub(crate) fn answer<T>(&mut self, pending: &Pending<T>, within: Duration) -> Option<T> {
        let until = self.engine.now().after(within);
        loop {
            if let Some(answer) = self.turn_for(until, |_| pending.take()) {
                return Some(answer);
            }
            if self.engine.now() >= until {
                return pending.take();
            }
        }
    }

    /// A guest changes some bytes; its answer, if that comes promptly.
    pub(crate) fn try_write(&mut self, cluster: u64) -> Option<Result<(), Error>> {
        let bytes = bytes_of(cluster);
        let start = self.rng.usize(bytes.start..bytes.end - 1);
        let end = self.rng.usize(start + 1..=bytes.end);
        let mut data = vec![0; end - start];
        self.rng.fill(&mut data);
        let request = IoRequest::Write { offset: start as u64, data: data.clone() };
        let pending = self.engine.io(&self.disk, request);
        let answer = self.answer(&pending, PROMPT)?.result.map(drop);
        if answer.is_ok() {
            self.now[start..end].copy_from_slice(&data);
        }
        Some(answer)
    }

    #[track_caller]
    pub(crate) fn write(&mut self, cluster: u64) {
        let answer = self.try_write(cluster);
        answer.unwrap_or_else(|| panic!("the guest of cluster {cluster} waits")).unwrap();
    }

    #[track_caller]
    pub(crate) fn end(&mut self) -> Arc<JobResult> {
        let until = self.engine.now().after(Duration::from_secs(60));
        loop {
            if let Some(result) = self.job.wait_timeout(Duration::ZERO) {
                let view = self.world.borrow_mut().disk(SOURCE).view().to_vec();
                assert!(view == self.now, "the disk is as its guests left it");
                return result;
            }
            self.cancel_if_whole();
            assert!(self.engine.now() < until, "the job does not end: {:?}", self.job.progress());
            // No longer: whether it is whole is looked at between turns.
            let soon = self.engine.now().after(Duration::from_millis(100));
            self.turn(if self.sync == SyncMode::None { soon } else { until });
        }
    }

    /// A job of changes alone goes on until it is cancelled: that is done once everything was changed.
    pub(crate) fn cancel_if_whole(&self) {
        let progress = self.job.progress();
        if self.sync == SyncMode::None && progress.done + progress.skipped == progress.total {
            // Refused where it is ending by now.
            self.job.cancel().ok();
        }
    }

    /// Whether everything was copied.
    pub(crate) fn is_whole(&self, result: &JobResult) -> bool {
        match result.outcome {
            Outcome::Complete => self.sync != SyncMode::None,
            Outcome::Cancelled => {
                self.sync == SyncMode::None && result.progress.done == result.progress.total
            }
            _ => false,
        }
    }

    #[track_caller]
    pub(crate) fn end_complete(&mut self) -> Arc<JobResult> {
        let result = self.end();
        assert!(self.is_whole(&result), "{result:?}");
        assert!(self.world.borrow_mut().disk(TARGET).medium() == self.t0, "the target shows t0");
        result
    }

    pub(crate) fn shuffled(&mut self) -> Vec<u64> {
        let mut clusters: Vec<u64> = (0..CLUSTERS).collect();
        self.rng.shuffle(&mut clusters);
        clusters
    }

    pub(crate) fn with_disk(&self, number: usize, act: impl FnOnce(&mut Disk)) {
        act(self.world.borrow_mut().disk(number));
    }

    /// The target is as large as it must be.
    pub(crate) fn enlarge(&self) {
        let mut world = self.world.borrow_mut();
        let target = world.disk(TARGET);
        let mut larger = Disk::sparse(self.t0.len(), DiskTraits::default());
        larger.fill(0, target.view());
        *target = larger;
    }

    pub(crate) fn read_snapshot(&mut self, range: ByteRange) -> Vec<u8> {
        let pending = self.engine.read_snapshot(self.id, range);
        self.answer(&pending, Duration::from_secs(1)).expect("a read as of t0 is answered").result.unwrap()
    }

    pub(crate) fn has_stopped(&mut self) -> bool {
        let until = self.engine.now().after(Duration::from_secs(1));
        let stopped = |bench: &mut Self| (bench.job.status() == Status::Paused).then_some(());
        while self.engine.now() < until {
            if self.turn_for(until, stopped).is_some() {
                return true;
            }
        }
        stopped(self).is_some()
    }
}
