//! Running a scenario, with an operator at the console.

use std::sync::Arc;

use engine::copier::plan::{Checkpoint, Plan};
use engine::copier::{Copier, Counters};
use engine::interval_set::IntervalSet;
use engine::job::driver::Driver;
use engine::job::{IoStatus, JobHandle, JobResult, Lifecycle, Outcome, Status};
use engine::ring::Ring;
use engine::ring::sim::{FaultPlan, SharedWorld, SimRing};
use fastrand::Rng;

use crate::scenario::{Scenario, decode};

/// More turns than any run takes: beyond it, a job hangs.
const MAX_TURNS: u64 = 200_000;

/// What the operator does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Script {
    /// Cancel before this turn.
    pub(crate) cancel_at: Option<u64>,
    /// The power goes as soon as so many operations were pushed.
    pub(crate) crash_at: Option<u64>,
    /// Pause, resume and change the speed now and then, by this seed.
    pub(crate) fidget: Option<u64>,
}

/// How a run ended.
pub(crate) enum End {
    Over(Arc<JobResult>),
    Crashed,
}

/// A run's end, and how many operations it took.
pub(crate) struct Run {
    pub(crate) end: End,
    pub(crate) operations: u64,
    pub(crate) turns: u64,
    /// Operations that were pushed after the cancel.
    pub(crate) after_cancel: u64,
    pub(crate) written: u64,
}

impl Run {
    pub(crate) fn result(&self) -> &JobResult {
        match &self.end {
            End::Over(result) => result,
            End::Crashed => panic!("the run has crashed"),
        }
    }
}

/// Run `scenario` over `world` from the beginning, or from the map in it.
pub(crate) fn run(scenario: &Scenario, world: &SharedWorld, faults: FaultPlan, script: Script) -> Run {
    let nothing = Checkpoint { done: Vec::new(), skipped: Vec::new(), blank_is_zero: true };
    let target_before = scenario.target_before(world);
    let plan = Plan { target_before, ..scenario.plan(world.borrow().document(0).map_or(nothing, decode)) };
    run_plan(scenario, plan, world, faults, script)
}

/// A driver that is to carry out `plan` over `world`, and the handle of its job.
pub(crate) fn driver_of(
    scenario: &Scenario,
    plan: Plan,
    world: &SharedWorld,
    faults: FaultPlan,
) -> (Driver<SimRing>, JobHandle) {
    let arena = usize::try_from(u64::from(scenario.slots) * scenario.cluster).unwrap();
    let mut ring = SimRing::new(world.clone(), arena, scenario.capacity, scenario.seed ^ 0x1217, faults);
    ring.add_file(0).unwrap();
    ring.add_file(1).unwrap();
    ring.add_document(0).unwrap();
    let set = Arc::new(IntervalSet::new(scenario.geometry().clusters()).unwrap());
    let copier = Copier::new(plan, set);
    Driver::new(ring, copier, Lifecycle::new(true, false), scenario.speed())
}

fn run_plan(scenario: &Scenario, plan: Plan, world: &SharedWorld, faults: FaultPlan, script: Script) -> Run {
    let (mut driver, handle) = driver_of(scenario, plan, world, faults);
    let mut rng = Rng::with_seed(script.fidget.unwrap_or(0));
    let mut turns = 0;
    let (mut cancelled_at, mut accepted) = (None, false);
    let crashed =
        loop {
            if script.cancel_at == Some(turns) {
                accepted = handle.cancel().is_ok();
                cancelled_at = Some(driver.ring().pushed());
            }
            if script.crash_at.is_some_and(|at| driver.ring().pushed() >= at) {
                break true;
            }
            if script.fidget.is_some() && rng.u8(0..30) == 0 {
                match rng.u8(0..3) {
                    0 => drop(handle.pause()),
                    1 => drop(handle.resume()),
                    _ => drop(handle.set_speed(
                        std::num::NonZeroU64::new(rng.u64(0..40_000_000)).map(engine::units::Speed),
                    )),
                }
            }
            if handle.status() == Status::Paused {
                if handle.progress().io_status != IoStatus::Ok {
                    // The operator mends what is broken before going on.
                    assert!(handle.progress().paused_on.is_some(), "a pause on an error is explained");
                    let mut world = world.borrow_mut();
                    world.disk(0).repair();
                    world.disk(1).repair();
                }
                if script.cancel_at != Some(turns) {
                    nothing_happens(&mut driver);
                }
                handle.resume().unwrap();
            }
            if driver.turn().unwrap() {
                break false;
            }
            turns += 1;
            check_window(scenario, &driver.counters());
            assert!(
                turns < MAX_TURNS,
                "{} hangs: {:?}\n{:#?}",
                scenario.seed,
                handle.progress(),
                driver.copier()
            );
        };
    let operations = driver.ring().pushed();
    let after_cancel = cancelled_at.map_or(0, |at| operations - at);
    let written = driver.counters().written;
    if crashed {
        driver.into_ring().crash();
        return Run { end: End::Crashed, operations, turns, after_cancel, written };
    }
    assert_eq!(driver.ring().in_flight(), 0, "nothing is in flight at the end");
    let result = handle.wait();
    let complete = matches!(result.outcome, Outcome::Complete | Outcome::CompleteWithSkipped);
    assert!(!(accepted && complete), "{}: a cancel that was accepted has its effect", scenario.seed);
    Run { end: End::Over(result), operations, turns, after_cancel, written }
}

/// What waits to be read back is bounded, whatever it is.
fn check_window(scenario: &Scenario, counters: &Counters) {
    if !scenario.verify || !scenario.opaque {
        return;
    }
    let waiting = (counters.copied + counters.holes + counters.zeros).saturating_sub(counters.verified);
    // One window is filled while the other is compared; what was in flight when one became full goes beyond it.
    let in_flight = u64::from(scenario.slots) + 4 * 6;
    let most = 4 * scenario.checkpoint_bytes + 2 * in_flight * scenario.cluster;
    assert!(
        waiting <= most,
        "{}: {waiting} bytes wait to be read back, at most {most} should",
        scenario.seed
    );
}

/// A paused job has nothing in flight and begins nothing, however long it is left alone.
fn nothing_happens(driver: &mut Driver<SimRing>) {
    let (before, waited_from) = (driver.ring().pushed(), driver.ring().now());
    for _ in 0..4 {
        assert_eq!(driver.ring().in_flight(), 0, "a paused job has nothing in flight");
        assert!(!driver.turn().unwrap(), "a paused job does not end by itself");
    }
    let waited = driver.ring().now().since(waited_from);
    assert_eq!(driver.ring().pushed(), before, "a paused job began something in {waited:?}");
}
