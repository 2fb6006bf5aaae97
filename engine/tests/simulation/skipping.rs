//! Policy `ignore`: what is left out, how much of it may be, and when a later run tries it again.

use engine::copy::ErrorPolicy;
use engine::job::{Outcome, TargetHolds};
use engine::ring::sim::{FaultPlan, SharedWorld};
use engine::units::ByteRange;

use crate::oracle::{Before, check};
use crate::run::{Script, run};
use crate::scenario::{Scenario, decode};

const CLUSTER: u64 = 8192;

const CLUSTERS: u64 = 240;

/// A disk full of data, of which `bad` cannot be read; at most 20 ranges may be left out.
fn failing(seed: u64, bad: impl Iterator<Item = u64>) -> (Scenario, SharedWorld) {
    let scenario = Scenario {
        length: CLUSTERS * CLUSTER,
        most_skipped: 20,
        bad_source: bad.map(|cluster| ByteRange::new(cluster * CLUSTER, CLUSTER)).collect(),
        source_policy: ErrorPolicy::Ignore,
        ..Scenario::plain(seed)
    };
    let world = scenario.world();
    let contents = vec![7; usize::try_from(scenario.length).unwrap()];
    world.borrow_mut().disk(0).fill(0, &contents);
    (scenario, world)
}

/// It is ranges that are bounded, not what lies in them.
#[test]
fn a_dead_zone_is_one_range_however_large_it_is() {
    let (scenario, world) = failing(41, 10..70);
    let before = Before::of(&world);
    let run = run(&scenario, &world, FaultPlan::default(), Script::default());
    assert!(matches!(run.result().outcome, Outcome::CompleteWithSkipped), "{:?}", run.result());
    check(&scenario, &world, &before, run.result()).unwrap();
    let [zone] = run.result().skipped.as_slice() else { panic!("{:?}", run.result().skipped) };
    assert_eq!(zone.range, ByteRange::new(10 * CLUSTER, 60 * CLUSTER));
}

#[test]
fn too_many_ranges_fail_the_copy() {
    let (scenario, world) = failing(42, (10..70).step_by(2));
    let run = run(&scenario, &world, FaultPlan::default(), Script::default());
    let Outcome::Failed(error) = &run.result().outcome else { panic!("{:?}", run.result()) };
    assert!(error.to_string().contains("more than 20 ranges"), "{error}");
}

/// A run that goes on copies all that can be copied before it tries again what an earlier one has left out, even if it
/// is interrupted once more.
#[test]
fn what_was_left_out_is_tried_last() {
    let mut tried = 0;
    for cancel_at in (50..600).step_by(3) {
        let (mut scenario, world) = failing(43, 4..44);
        scenario.map = true;
        let before = Before::of(&world);
        let skipped = || world.borrow().document(0).map(|map| decode(map).skipped).unwrap_or_default();
        let script = Script { cancel_at: Some(cancel_at), ..Script::default() };
        let first = run(&scenario, &world, FaultPlan::default(), script);
        let zone = skipped();
        let whole = zone.iter().map(|range| range.count()).sum::<u64>() == 40;
        let much_left = first.result().progress.done < (CLUSTERS - 60) * CLUSTER;
        if !whole || !much_left || !matches!(first.result().outcome, Outcome::Cancelled) {
            continue;
        }
        tried += 1;
        if tried > 20 {
            break;
        }
        scenario.source_policy = ErrorPolicy::Report;
        let again = run(&scenario, &world, FaultPlan::default(), Script { cancel_at: Some(2), ..script });
        assert!(matches!(again.result().outcome, Outcome::Cancelled));
        assert_eq!(skipped(), zone, "a run that did not come to it keeps it on the list");
        let second = run(&scenario, &world, FaultPlan::default(), Script::default());
        assert!(matches!(second.result().outcome, Outcome::Failed(_)));
        assert_eq!(second.result().progress.done, (CLUSTERS - 40) * CLUSTER, "all else was copied first");
        world.borrow_mut().disk(0).repair();
        let third = run(&scenario, &world, FaultPlan::default(), Script::default());
        assert!(matches!(third.result().outcome, Outcome::Complete));
        check(&scenario, &world, &before, third.result()).unwrap();
    }
    assert!(tried > 0, "a cancel came after the zone and before the end");
}

/// What cannot be read was never written: the target holds there what it held before, and that is said. Where a write has failed nothing is
/// said.
#[test]
fn what_the_target_holds_where_a_range_was_left_out_is_told() {
    for target_is_zero in [true, false] {
        let (mut scenario, world) = failing(44, 10..20);
        scenario.target_is_zero = target_is_zero;
        scenario.target_policy = ErrorPolicy::Ignore;
        scenario.bad_target =
            vec![ByteRange::new(15 * CLUSTER, CLUSTER), ByteRange::new(40 * CLUSTER, CLUSTER)];
        drop(world);
        let target = scenario.world();
        target.borrow_mut().disk(0).fill(0, &vec![7; usize::try_from(scenario.length).unwrap()]);
        let before = Before::of(&target);
        let run = run(&scenario, &target, FaultPlan::default(), Script::default());
        check(&scenario, &target, &before, run.result()).unwrap();
        let told: Vec<_> = run
            .result()
            .skipped
            .iter()
            .map(|skipped| (skipped.range.offset / CLUSTER, skipped.range.length / CLUSTER, skipped.target))
            .collect();
        let untouched = if target_is_zero { TargetHolds::Zeros } else { TargetHolds::Unchanged };
        assert_eq!(told, [(10, 10, untouched), (40, 1, TargetHolds::Unknown)]);
    }
}

/// A cluster that fails alone is tried again so many times, and as many retries are counted; to look for it in the request that failed is
/// none.
#[test]
fn retries_are_those_of_clusters() {
    let (scenario, world) = failing(45, 10..13);
    let ignored = run(&scenario, &world, FaultPlan::default(), Script::default());
    let limit = u64::from(scenario.plan(decode(&[[1].as_slice(), &[0; 8]].concat())).limits.retries);
    assert_eq!(ignored.result().progress.retries, 3 * limit);
    // Stopped: the console mends the disk, and what failed is tried once more.
    let (scenario, world) = failing(45, 10..11);
    let scenario = Scenario { source_policy: ErrorPolicy::Stop, ..scenario };
    let stopped = run(&scenario, &world, FaultPlan::default(), Script::default());
    assert!(matches!(stopped.result().outcome, Outcome::Complete));
    assert_eq!(stopped.result().progress.retries, 1);
}
