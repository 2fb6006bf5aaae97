//! Exports under the simulated ring: clients of every temper against the product's own reactor, with faults, from a seed.
//!
//! `EXPORTS_SIM_FIRST` and `EXPORTS_SIM_SEEDS` choose the seeds.

#[allow(dead_code, clippy::cast_possible_truncation, reason = "shared with the tests of the protocol")]
#[path = "../nbd_protocol/client.rs"]
mod client;
mod crowds;
mod jobs;
mod patience;
mod peer;
mod questions;
mod run;
#[path = "../support/seeds.rs"]
mod seeds;

use run::{Scenario, Seen, run};
use seeds::seeds;

#[test]
fn seeded() {
    let chosen = seeds("EXPORTS_SIM_", 400);
    let mut all = Seen::default();
    let mut failed = Vec::new();
    for seed in chosen.clone() {
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
    if chosen.count() >= 400 {
        assert!(all.least() > 10, "the runs do too little: {all:?}");
    }
}
