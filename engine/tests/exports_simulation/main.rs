//! Exports under the simulated ring: clients of every temper against the product's own reactor, with faults, from a seed.
//!
//! `EXPORTS_SIM_FIRST` and `EXPORTS_SIM_SEEDS` choose the seeds.

#[allow(dead_code, clippy::cast_possible_truncation, reason = "shared with the tests of the protocol")]
#[path = "../nbd_protocol/client.rs"]
mod client;
mod peer;
mod questions;
mod run;

use run::{Scenario, Seen, run};

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn seeded() {
    let first = from_environment("EXPORTS_SIM_FIRST", 0);
    let count = from_environment("EXPORTS_SIM_SEEDS", 400);
    let mut all = Seen::default();
    let mut failed = Vec::new();
    for seed in first..first + count {
        match std::panic::catch_unwind(|| run(&Scenario::random(seed))) {
            Ok(Ok(seen)) => all.add(&seen),
            Ok(Err(wrong)) => {
                eprintln!("seed {seed}: {wrong}");
                failed.push(seed);
            }
            Err(_) => {
                eprintln!("seed {seed} panicked");
                failed.push(seed);
            }
        }
        assert!(failed.len() < 5, "seeds failed: {failed:?} and perhaps more");
    }
    assert!(failed.is_empty(), "seeds failed: {failed:?}");
    println!("{all:?}");
    if count >= 400 {
        assert!(all.least() > 10, "the runs do too little: {all:?}");
    }
}
