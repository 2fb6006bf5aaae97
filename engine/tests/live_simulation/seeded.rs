//! Random scenarios.

use crate::run::run;
use crate::scenario::Scenario;
use crate::seen::Seen;

/// So many failures are told of at most.
const TOLD: usize = 5;

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn seeded() {
    let first = from_environment("LIVE_SIM_FIRST", 0);
    let count = from_environment("LIVE_SIM_SEEDS", 1500);
    let mut all = Seen::default();
    let mut failed = Vec::new();
    for seed in first..first + count {
        match std::panic::catch_unwind(|| run(&Scenario::random(seed))) {
            Ok(Ok(run)) => all.add(run.seen),
            Ok(Err(wrong)) => {
                eprintln!("seed {seed}: {wrong}");
                failed.push(seed);
            }
            Err(_) => {
                eprintln!("seed {seed} panicked");
                failed.push(seed);
            }
        }
        assert!(failed.len() < TOLD, "seeds failed: {failed:?} and perhaps more");
    }
    assert!(failed.is_empty(), "seeds failed: {failed:?}");
    if count >= 1000 {
        assert!(all.least() > 10, "the runs do too little: {all:?}");
    }
    println!("{all:?}");
}
