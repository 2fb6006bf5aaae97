//! Scenarios of which a seed decides everything.

use std::time::Duration;

use engine::copy::{ErrorPolicy, SyncMode};
use engine::live::carrier::CarrierLimits;
use engine::live::{GroupFailure, SweepDepth};
use engine::modes::CbwErrorPolicy;
use engine::ring::sim::{DiskTraits, FaultPlan, Rates};
use engine::units::ByteRange;
use fastrand::Rng;

use crate::scenario::{
    BLOCK, DiskSpec, FleeceSpec, JobSpec, Layers, Operator, Path, Scenario, StartSpec, Stuck,
};

/// A time-out of a copy that nothing which is made to happen here takes, in microseconds.
const LONG_TIMEOUT: u64 = 5_000_000;

fn micros(rng: &mut Rng, most: u64) -> Duration {
    Duration::from_micros(rng.u64(0..most.max(1)))
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.usize(..from.len())]
}

impl DiskSpec {
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
}

impl FleeceSpec {
    fn random(rng: &mut Rng, cluster: u64, faulty: bool) -> Self {
        let slots = pick(rng, &[1, 2, 4, 8, 16, 60]);
        let stuck = (rng.u8(..8) == 0).then(|| {
            let from = micros(rng, 20_000);
            Stuck { from, until: Some(from + micros(rng, 100_000)) }
        });
        Self {
            slots,
            direct_alignment: pick(rng, &[None, Some(512), Some(4096)]),
            slowness: if rng.u8(..5) == 0 { rng.u64(2..10) } else { 1 },
            stuck,
            bad: if faulty { bad(rng, u64::from(slots) * cluster) } else { Vec::new() },
        }
    }
}

impl JobSpec {
    /// `hurried`: guests may not wait for long.
    fn random(rng: &mut Rng, disks: &[DiskSpec], faulty: bool, hurried: bool) -> Self {
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
        // The last of the patient ones goes by only if its clock is wrong.
        let timeouts: &[_] = if hurried {
            &[Some(500_000), Some(100_000), Some(10_000), Some(300)]
        } else {
            &[None, Some(LONG_TIMEOUT)]
        };
        let sync = match rng.u8(..8) {
            0 => SyncMode::None,
            1..4 => SyncMode::Top,
            _ => SyncMode::Full,
        };
        let mut cancel_at = (rng.u8(..8) == 0).then(|| micros(rng, 60_000));
        if forever || sync == SyncMode::None {
            cancel_at = cancel_at.or(Some(micros(rng, 400_000)));
        }
        let cluster = 4096 << rng.u32(0..5);
        let mut job = Self {
            disk,
            cluster,
            fleece: (rng.u8(..3) == 0).then(|| FleeceSpec::random(rng, cluster, faulty)),
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
            cbw_timeout: pick(rng, timeouts).map(Duration::from_micros),
            speed: (rng.u8(..4) == 0).then(|| rng.u64(100_000..50_000_000)),
            cancel_at,
            sync,
            reads: if rng.u8(..3) == 0 { rng.u64(1..40) } else { 0 },
        };
        if let Some(fleece) = job.fleece.as_mut().filter(|_| faulty && rng.bool()) {
            // It stops, perhaps for long enough to have its fleece file filled.
            fleece.slots = rng.u32(1..5);
            job.target_policy = ErrorPolicy::Stop;
            job.bad_target = some_bad(rng, disks[disk].length);
        }
        job
    }
}

impl Scenario {
    /// Anything.
    pub(crate) fn random(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed ^ 0x11FE);
        let rng = &mut rng;
        let faulty = rng.u8(..5) < 2;
        let hurried = rng.u8(..4) == 0;
        let disks: Vec<_> = (0..rng.usize(1..3)).map(|_| DiskSpec::random(rng, faulty)).collect();
        let starts: Vec<_> =
            (0..rng.usize(1..4)).map(|_| random_start(rng, &disks, faulty, hurried)).collect();
        let window = 4096 << rng.u32(0..3);
        let mut operators = vec![Operator::Watches, Operator::Fidgets, Operator::Fidgets, Operator::Pauses];
        if starts.iter().flat_map(|start| &start.jobs).any(JobSpec::leaves_out) {
            operators.extend([Operator::PausesWithout(1); 4]);
        }
        let stuck = starts.iter().flat_map(|start| &start.jobs).any(|job| job.stuck.is_some());
        Self {
            seed,
            operator: pick(rng, &operators),
            mends_after: Duration::from_micros(pick(rng, &[0, 0, 1000, 20_000, 100_000])),
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
}

fn random_start(rng: &mut Rng, disks: &[DiskSpec], faulty: bool, hurried: bool) -> StartSpec {
    let jobs = pick(rng, &[1, 1, 1, 2, 2, 3]);
    StartSpec {
        at: micros(rng, 20_000),
        timeout: Duration::from_micros(pick(rng, &[200, 5_000, 200_000, 200_000])),
        on_failure: pick(rng, &[GroupFailure::FailAll, GroupFailure::GoOn]),
        jobs: (0..jobs).map(|_| JobSpec::random(rng, disks, faulty, hurried)).collect(),
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
    if rng.u8(0..3) > 0 { Vec::new() } else { some_bad(rng, length) }
}

fn some_bad(rng: &mut Rng, length: u64) -> Vec<ByteRange> {
    (0..rng.usize(1..4)).map(|_| ByteRange::new(rng.u64(0..length), rng.u64(1..5000))).collect()
}
