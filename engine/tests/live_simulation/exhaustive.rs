//! One fault at every single operation, one cancel or death at every single turn, with guests writing.

use std::time::Duration;

use engine::copy::{ErrorPolicy, SyncMode};
use engine::modes::CbwErrorPolicy;
use engine::ring::sim::{Fault, FaultPlan};
use nix::errno::Errno;

use crate::run::{Ended, Script, run, run_script};
use crate::scenario::{FleeceSpec, Layers, Path, Scenario};

const FAULTS: [Fault; 7] = [
    Fault::Short,
    Fault::Errno(Errno::EIO),
    Fault::Errno(Errno::ENOSPC),
    Fault::Errno(Errno::EAGAIN),
    Fault::Errno(Errno::EINTR),
    Fault::Errno(Errno::ECANCELED),
    Fault::Errno(Errno::EOPNOTSUPP),
];

/// A small disk under guests, and a copy that starts early.
fn small(path: Path, seed: u64) -> Scenario {
    let mut scenario = Scenario::plain(seed, path);
    scenario.disks[0].requests = 14;
    scenario.disks[0].pace = Duration::from_micros(200);
    scenario.disks[0].length = 20 * 8192 + 1536 + 7;
    scenario.starts[0].at = Duration::from_micros(500);
    scenario
}

fn scenarios() -> Vec<Scenario> {
    let mut all =
        vec![small(Path::Carried, 31), small(Path::Own, 32), small(Path::Both, 33), small(Path::Both, 34)];
    all[0].starts[0].jobs[0].target_is_zero = false;
    all[0].starts[0].jobs[0].target.fixed_length = true;
    all[1].starts[0].jobs[0].target.direct_alignment = None;
    let second = all[2].starts[0].jobs[0].clone();
    all[2].starts[0].jobs.push(second);
    all[3].disks[0].layers = Layers::Some;
    all[3].starts[0].jobs[0].sync = SyncMode::Top;
    all
}

/// Of a copy of what guests are about to change alone, cancelled among their writes: it drains and flushes, from its fleece file, too. Its snapshot is read
/// meanwhile.
fn of_changes() -> [Scenario; 2] {
    [(36, None), (42, Some(FleeceSpec::plain(6)))].map(|(seed, fleece)| {
        let mut scenario = small(Path::Both, seed);
        scenario.disks[0].requests = 30;
        let job = &mut scenario.starts[0].jobs[0];
        job.sync = SyncMode::None;
        job.cancel_at = Some(Duration::from_millis(5));
        job.reads = 20;
        job.fleece = fleece;
        scenario
    })
}

/// With readers of the snapshot, before the sweep and behind it.
fn read() -> Scenario {
    let mut scenario = small(Path::Both, 39);
    scenario.starts[0].jobs[0].reads = 40;
    scenario
}

/// With a fleece file that is full now and then. A test of its own, which runs beside the others.
fn fleeced() -> Scenario {
    let mut scenario = small(Path::Both, 35);
    scenario.disks[0].length = 10 * 8192 + 7;
    scenario.disks[0].requests = 10;
    scenario.starts[0].jobs[0].fleece = Some(FleeceSpec::plain(3));
    scenario
}

fn all() -> impl Iterator<Item = Scenario> {
    scenarios().into_iter().chain(of_changes()).chain([read(), fleeced()])
}

fn calm(scenario: &Scenario) -> Ended {
    let ended = run(scenario).unwrap_or_else(|wrong| panic!("{wrong}"));
    let of_changes = scenario.starts[0].jobs[0].sync == SyncMode::None;
    let over = if of_changes { ended.seen.cancelled } else { ended.seen.complete_late };
    assert!(ended.operations > 20 && over > 0, "a run of some substance: {ended:?}");
    ended
}

fn every_single_fault(scenario: &Scenario) {
    let operations = calm(scenario).operations;
    let policies = [
        (ErrorPolicy::Report, CbwErrorPolicy::BreakSnapshot),
        (ErrorPolicy::Stop, CbwErrorPolicy::BreakGuestWrite),
        (ErrorPolicy::Ignore, CbwErrorPolicy::BreakGuestWrite),
    ];
    for (policy, on_cbw_error) in policies {
        for (operation, fault) in (0..operations).flat_map(|at| FAULTS.map(|fault| (at, fault))) {
            let mut scenario = scenario.clone();
            for job in &mut scenario.starts[0].jobs {
                job.source_policy = policy;
                job.target_policy = policy;
                job.on_cbw_error = on_cbw_error;
            }
            scenario.faults = FaultPlan::single(operation, fault);
            let ended = run(&scenario);
            let ended = ended.unwrap_or_else(|wrong| panic!("{fault:?} at {operation}: {wrong}"));
            let failed = ended.seen.failed_jobs + ended.seen.failed + ended.seen.refused;
            assert!(failed <= 2, "{fault:?} at {operation}: one fault, {:?}", ended.seen);
        }
    }
}

#[test]
fn every_single_fault_at_every_operation() {
    scenarios().iter().for_each(every_single_fault);
}

#[test]
fn every_single_fault_of_a_copy_of_changes() {
    let calm = of_changes().map(|scenario| calm(&scenario).seen);
    assert!(calm.iter().all(|seen| seen.copies > 3 && seen.snapshot > 5), "{calm:?}");
    assert!(calm[1].fleeced > 1, "{calm:?}");
    of_changes().iter().for_each(every_single_fault);
}

#[test]
fn every_single_fault_with_readers_of_the_snapshot() {
    assert!(calm(&read()).seen.snapshot > 15);
    every_single_fault(&read());
}

#[test]
fn every_single_fault_with_a_fleece_file() {
    every_single_fault(&fleeced());
}

#[test]
fn a_cancel_at_every_turn() {
    for scenario in all() {
        let Ended { turns, operations, .. } = calm(&scenario);
        let mut cancelled = 0;
        for turn in 0..turns {
            let script = Script { cancel_at: Some(turn), ..Script::default() };
            let ended = run_script(&scenario, script);
            let ended = ended.unwrap_or_else(|wrong| panic!("cancelled at {turn}: {wrong}"));
            // Some are cancelled in any case, and later.
            cancelled += ended.seen.cancelled * u64::from(ended.operations < operations);
        }
        assert!(cancelled > 20, "{cancelled} of {turns}");
    }
}

#[test]
fn a_death_at_every_turn() {
    for scenario in all() {
        let turns = calm(&scenario).turns;
        for turn in 0..turns {
            let script = Script { die_at: Some(turn), ..Script::default() };
            run_script(&scenario, script).unwrap_or_else(|wrong| panic!("dead at {turn}: {wrong}"));
        }
    }
}
