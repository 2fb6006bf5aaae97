//! What a guest write pays before it may go ahead: its permit.
//!
//! `begin_write` is to enter the gate, to look whether every job has copied the clusters, and to leave again. Beside it
//! the gate alone, and the gate for a thread that writes to many disks in turn.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use engine::interval_set::IntervalSet;
use engine::live::{Attempt, Entry, Gate, JobId, JobList, Pass, Permit, Watch, attempt};
use engine::ring::Wake;
use engine::units::{ByteRange, ClusterSize, Geometry, Length};

/// Length of the disk: its claim map stays in the cache.
const DISK: Length = Length(64 << 30);
/// Where the guest writes.
const WRITE: ByteRange = ByteRange::new(1 << 30, 4096);

/// Nobody takes t0 here.
struct Asleep;

impl Wake for Asleep {
    fn wake(&self) {}
}

fn gate() -> Arc<Gate> {
    Gate::new(Arc::new(Asleep))
}

fn enter(gate: &Gate) -> Pass {
    match gate.enter() {
        Entry::Admitted(pass) => pass,
        Entry::AtBarrier => unreachable!("nobody raises the barrier"),
    }
}

fn begin_write(gate: &Gate, jobs: &JobList, range: ByteRange) -> Permit {
    match attempt(gate, jobs, range) {
        Attempt::Granted(permit) => permit,
        other => unreachable!("nothing is in the way, yet {other:?}"),
    }
}

/// Jobs that have copied everything.
fn jobs(count: u64) -> JobList {
    let jobs = JobList::new();
    let geometry = Geometry::new(DISK, ClusterSize::DEFAULT);
    for number in 0..count {
        let set = Arc::new(IntervalSet::new(geometry.clusters()).expect("a small map"));
        set.mark_done(set.all());
        jobs.attach(Arc::new(Watch::new(JobId(number), set, geometry)));
    }
    jobs
}

fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("begin_write");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for (name, count) in [("no job", 0), ("one job", 1), ("three jobs", 3)] {
        let (gate, jobs) = (gate(), jobs(count));
        group.bench_function(name, |b| b.iter(|| drop(begin_write(&gate, &jobs, black_box(WRITE)))));
    }
    let (gate, jobs) = (gate(), jobs(1));
    let outer = begin_write(&gate, &jobs, WRITE);
    group.bench_function("one job, nested", |b| {
        b.iter(|| drop(begin_write(&gate, &jobs, black_box(WRITE))));
    });
    drop(outer);
    group.finish();

    let mut group = criterion.benchmark_group("gate");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for count in [1, 16] {
        let gates: Vec<_> = (0..count).map(|_| self::gate()).collect();
        let mut turn = gates.iter().cycle();
        group.bench_function(format!("enter and leave/{count} disks in turn"), |b| {
            b.iter(|| drop(enter(turn.next().expect("without end"))));
        });
    }
    group.finish();
}

criterion_group!(benches, all);
criterion_main!(benches);
