//! Random scenarios under random faults, with pauses, cancels and crashes, resumed until they end.

use engine::job::Outcome;
use engine::ring::sim::FaultPlan;
use fastrand::Rng;

use crate::oracle::{Before, check};
use crate::run::{End, Script, run};
use crate::scenario::Scenario;
use crate::seeds::seeds;

/// Run one seed to its end; panics with the seed when the job's word is not true.
pub(crate) fn one_seed(seed: u64) {
    let scenario = Scenario::random(seed);
    let mut rng = Rng::with_seed(seed ^ 0xC4A5);
    let world = scenario.world();
    let before = Before::of(&world);
    let mut faults = scenario.faults.clone();
    for attempt in 0.. {
        assert!(attempt < 50, "seed {seed} never ends");
        let script = Script {
            cancel_at: (attempt < 3 && rng.u8(0..6) == 0).then(|| rng.u64(0..300)),
            crash_at: (attempt < 6 && rng.u8(0..3) == 0).then(|| rng.u64(0..400)),
            fidget: rng.bool().then(|| rng.u64(..)),
        };
        let end = run(&scenario, &world, faults.clone(), script).end;
        if let End::Over(result) = end {
            if let Err(wrong) = check(&scenario, &world, &before, &result) {
                panic!("seed {seed}, attempt {attempt}: {wrong}\n{result:?}\n{scenario:?}");
            }
            if matches!(result.outcome, Outcome::Complete) {
                return;
            }
            if !scenario.map {
                return; // It said that it failed, or what is missing; nothing goes on without a map.
            }
        } else if !scenario.map {
            return;
        }
        // The next run meets a mended world.
        if attempt >= 2 {
            faults = FaultPlan::default();
            world.borrow_mut().disk(0).repair();
            world.borrow_mut().disk(1).repair();
        }
    }
}

#[test]
fn seeded() {
    for seed in seeds("SIM_", 2000) {
        if let Err(panic) = std::panic::catch_unwind(|| one_seed(seed)) {
            eprintln!("seed {seed} failed");
            std::panic::resume_unwind(panic);
        }
    }
}
