//! The carrier over the simulated ring: guests with requests of every alignment and length, jobs that start and copy before
//! they write, and a disk that does less than it was asked for, fails, or cannot do what others can.
//!
//! What is checked all the time: nothing changes the disk without a permit for all of it; a cluster that a job has not copied is as it was at
//! that job's t0; a read finds what the requests before it left; a flush has brought to the medium what was acknowledged; nothing fails but
//! what was made to; permits come back while nobody answers; and every request ends.
//!
//! `SIM_SEEDS=100000 SIM_FIRST=0 cargo test --release -p engine --test carrier_simulation` runs more seeds; a failure
//! names its seed, and `SIM_FIRST=<seed> SIM_SEEDS=1` repeats it.

mod host;
mod planted;
mod run;
#[path = "../support/shadow.rs"]
mod shadow;

use host::Seen;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn seeded() {
    let first = from_environment("SIM_FIRST", 0);
    let count = from_environment("SIM_SEEDS", 2000);
    let mut all = Seen::default();
    for seed in first..first + count {
        match std::panic::catch_unwind(|| run::one_seed(seed, None)) {
            Ok(Ok(seen)) => add(&mut all, seen),
            Ok(Err(wrong)) => panic!("seed {seed}: {wrong}"),
            Err(panic) => {
                eprintln!("seed {seed} failed");
                std::panic::resume_unwind(panic);
            }
        }
    }
    if count >= 1000 {
        let Seen { granted, at_barrier, copies, jobs, cancelled, discarded_late, failed, read_back, durable } =
            all;
        let counts =
            [granted, at_barrier, copies, jobs, cancelled, discarded_late, failed, read_back, durable];
        assert!(counts.iter().all(|&count| count > 100), "the runs do too little: {all:?}");
    }
}

fn add(all: &mut Seen, seen: Seen) {
    all.granted += seen.granted;
    all.at_barrier += seen.at_barrier;
    all.copies += seen.copies;
    all.jobs += seen.jobs;
    all.cancelled += seen.cancelled;
    all.discarded_late += seen.discarded_late;
    all.failed += seen.failed;
    all.read_back += seen.read_back;
    all.durable += seen.durable;
}
