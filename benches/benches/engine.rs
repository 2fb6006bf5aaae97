//! The engine without a disk: looking for zeros, and whole copies from nothing to nothing.
//!
//! A copy over null storage shows what the engine itself costs for each cluster: the claim, the slot, two operations
//! through the ring, the counters. Its time runs from `start` to the result, so the ring's setup is in it.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::copier::inspect::is_zero;
use engine::copy::{CopyOptions, start};
use engine::job::Outcome;
use engine::units::ClusterSize;

const CLUSTER: usize = 64 << 10;

fn zero_detection(criterion: &mut Criterion) {
    let mut random = vec![0; CLUSTER];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in random.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        word.copy_from_slice(&state.to_ne_bytes());
    }
    let mut last_byte = vec![0; CLUSTER];
    last_byte[CLUSTER - 1] = 1;
    let mut group = criterion.benchmark_group("engine/is_zero-64K");
    group.throughput(Throughput::Bytes(CLUSTER as u64));
    for (name, bytes) in [("zeros", vec![0; CLUSTER]), ("random", random), ("last-byte", last_byte)] {
        group.bench_function(name, |bencher| bencher.iter(|| is_zero(black_box(&bytes))));
    }
    group.finish();
}

/// One whole copy.
fn copy(length: &str, cluster: ClusterSize, zero_detect: bool) {
    let mut options = CopyOptions::new(format!("null:{length}"), "null:");
    options.cluster_size = cluster;
    options.zero_detect = zero_detect;
    let copy = start(&options).expect("nothing stands in the way of copying nothing");
    let result = copy.job.wait();
    assert!(matches!(result.outcome, Outcome::Complete), "{:?}", result.outcome);
}

fn null_copies(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engine/null-copy");
    group.sample_size(10);
    // The last of them reads every byte of memory that a copy of such a disk would move; hence the smaller disk.
    for (name, length, gib, cluster, zero_detect) in [
        ("64K-clusters", "64G", 64, 64 << 10, false),
        ("4K-clusters", "4G", 4, 4 << 10, false),
        ("64K-clusters-zero-detection", "8G", 8, 64 << 10, true),
    ] {
        let cluster = ClusterSize::new(cluster).expect("a power of two");
        group.throughput(Throughput::Elements((gib << 30) / cluster.bytes()));
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| copy(length, cluster, zero_detect));
        });
    }
    group.finish();
}

criterion_group!(benches, zero_detection, null_copies);
criterion_main!(benches);
