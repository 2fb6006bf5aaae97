//! A failed flush: what of it the target may hold, and what a later run may believe.

use std::collections::BTreeSet;

use engine::copy::ErrorPolicy;
use engine::error::Operation;
use engine::job::Outcome;
use engine::ring::sim::{DiskTraits, Fault, FaultPlan, Rates, SharedWorld};
use nix::errno::Errno;

use crate::oracle::{Before, check};
use crate::run::{End, Script, run};
use crate::scenario::{Scenario, decode};

const BLOCK: u64 = 4096;

/// Every other cluster is zeros between two holes, and the target, a new file, cannot make zeros but by writing them.
fn patchy(seed: u64) -> (Scenario, SharedWorld) {
    let scenario = Scenario {
        length: 24 * 4 * BLOCK,
        cluster: 4 * BLOCK,
        slots: 6,
        max_run: 2,
        map: true,
        checkpoint_bytes: 16 * BLOCK,
        source_policy: ErrorPolicy::Ignore,
        target_policy: ErrorPolicy::Ignore,
        target: DiskTraits { unmaps: false, zeroes: false, ..DiskTraits::default() },
        ..Scenario::plain(seed)
    };
    let world = scenario.world();
    let mut contents = vec![0x11; 4 * 4096];
    for cluster in 0..24 {
        let offset = cluster * scenario.cluster;
        if cluster % 2 == 0 {
            contents.fill(u8::try_from(cluster).unwrap() + 1);
            world.borrow_mut().disk(0).fill(offset, &contents);
        } else {
            contents.fill(0);
            world.borrow_mut().disk(0).fill(offset, &contents);
        }
    }
    world.borrow_mut().disk(0).punch(holes());
    (scenario, world)
}

/// The holes of the source, in blocks.
fn holes() -> impl Iterator<Item = u64> {
    (0..24).filter(|cluster| cluster % 2 == 1).flat_map(|cluster| [4 * cluster, 4 * cluster + 3])
}

/// A cluster that was read without its holes, before a flush failed, is not written with what its slot held before.
#[test]
fn what_was_not_read_is_never_written() {
    let mut crashed = 0;
    for seed in 0..40 {
        for crash_at in (10..140).step_by(5) {
            let (scenario, world) = patchy(seed);
            let before = Before::of(&world);
            let faults =
                FaultPlan { rates: Rates { flush: 400, ..Rates::default() }, ..FaultPlan::default() };
            let script = Script { crash_at: Some(crash_at), ..Script::default() };
            let first = run(&scenario, &world, faults, script);
            if matches!(first.end, End::Crashed) {
                crashed += 1;
                let mut world = world.borrow_mut();
                let target = world.disk(1).view();
                for block in holes() {
                    let start = usize::try_from(block * BLOCK).unwrap();
                    let untouched = target[start..start + 4096].iter().all(|&byte| byte == 0);
                    assert!(untouched, "block {block} was written to: seed {seed}, crash at {crash_at}");
                }
            }
            if matches!(&first.end, End::Over(result) if matches!(result.outcome, Outcome::Complete)) {
                continue;
            }
            let second = run(&scenario, &world, FaultPlan::default(), Script::default());
            assert!(matches!(second.result().outcome, Outcome::Complete), "{:?}", second.result());
            check(&scenario, &world, &before, second.result())
                .unwrap_or_else(|wrong| panic!("{wrong}: seed {seed}, crash at operation {crash_at}"));
        }
    }
    assert!(crashed > 500, "{crashed} runs crashed");
}

/// Whatever ends a copy after a failed flush: its map says that the target's blanks are not known to be zero.
#[test]
fn a_map_remembers_that_a_flush_has_failed() {
    let mut endings = BTreeSet::new();
    for cancel_at in [None, Some(12), Some(24)] {
        for operation in 0..120 {
            let scenario = Scenario { map: true, ..Scenario::plain(31) };
            let world = scenario.world();
            let faults = FaultPlan::single(operation, Fault::Errno(Errno::EIO));
            let script = Script { cancel_at, ..Script::default() };
            let run = run(&scenario, &world, faults, script);
            let lost = match &run.result().outcome {
                Outcome::Failed(error) => error.operation() == Operation::Flush,
                _ => run.result().notices.iter().any(|notice| notice.contains("is lost")),
            };
            if lost {
                endings.insert(cancel_at);
                let map = decode(world.borrow().document(0).expect("a map"));
                assert!(!map.blank_is_zero, "cancelled at {cancel_at:?}, failed at {operation}");
            }
        }
    }
    assert_eq!(endings.len(), 3, "a flush failed in mid-copy, and the last one after a cancel: {endings:?}");
}
