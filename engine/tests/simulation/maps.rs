//! A map file that cannot be written, or not removed.

use engine::job::Outcome;
use engine::ring::sim::{FaultPlan, Rates};

use crate::oracle::{Before, check};
use crate::run::{Script, run};
use crate::scenario::Scenario;

/// However often it fails, one notice says so; and one more if it stays behind after a copy that is complete.
#[test]
fn a_map_that_fails_now_and_then_is_told_of_once() {
    let (mut stayed_behind, mut mended_after_all, mut not_durable) = (0, 0, 0);
    for publish in [300, 700, 1024] {
        for seed in 0..40 {
            let scenario = Scenario { map: true, checkpoint_bytes: 8192, ..Scenario::plain(seed) };
            let world = scenario.world();
            let before = Before::of(&world);
            let rates = Rates { publish, ..Rates::default() };
            let faults = FaultPlan { rates, ..FaultPlan::default() };
            let run = run(&scenario, &world, faults, Script::default());
            assert!(matches!(run.result().outcome, Outcome::Complete));
            check(&scenario, &world, &before, run.result()).unwrap();
            let told = |what| run.result().notices.iter().filter(|notice| notice.contains(what)).count();
            assert!(told("cannot write map file map: ") <= 1, "{:?}", run.result().notices);
            let mended = told("map file map can be written again");
            assert!(mended <= told("a repeat would go on from"), "{:?}", run.result().notices);
            mended_after_all += mended;
            // A map that was never written does not stay behind.
            let stays = world.borrow().document(0).is_some();
            let unsynced = told("map file map was removed, but its directory could not be synced: ");
            assert!(unsynced == 0 || !stays, "{:?}", run.result().notices);
            not_durable += unsynced;
            let removal_failed = told("cannot be removed");
            assert!(removal_failed <= 1 && (!stays || removal_failed == 1), "{:?}", run.result().notices);
            stayed_behind += usize::from(stays && told("cannot write map file map: ") == 1);
        }
    }
    assert!(stayed_behind > 10, "both failures met {stayed_behind} times");
    assert!(not_durable > 10, "removed, but not durably, {not_durable} times");
    assert!(mended_after_all > 10, "written again {mended_after_all} times");
}
