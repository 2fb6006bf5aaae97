//! Random scenarios.

use crate::run::run;
use crate::scenario::Scenario;
use crate::seeds::seeds;
use crate::seen::Seen;

/// So many failures are told of at most.
const TOLD: usize = 5;

#[test]
fn seeded() {
    let chosen = seeds("LIVE_SIM_", 1000);
    let mut all = Seen::default();
    let mut failed = Vec::new();
    for seed in chosen.clone() {
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
    if chosen.count() >= 1000 {
        assert!(all.least() > 10, "the runs do too little: {all:?}");
        // What may fail for a hundred reasons tells nothing when it does.
        assert!(2 * all.sure_answers > all.answers, "guests may fail too often: {all:?}");
        assert!(2 * all.sure_jobs > all.jobs, "jobs may fail too often: {all:?}");
    }
    println!("{all:?}");
}
