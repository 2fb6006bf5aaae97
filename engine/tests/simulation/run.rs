//! Running a scenario, with an operator at the console.

use std::sync::Arc;

use engine::copier::Copier;
use engine::copier::plan::Plan;
use engine::interval_set::IntervalSet;
use engine::job::driver::Driver;
use engine::job::{IoStatus, JobHandle, JobResult, Lifecycle, Status};
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
    let (resumed, blank_is_zero) = world.borrow().document(0).map_or((Vec::new(), true), decode);
    let plan = scenario.plan(resumed, blank_is_zero);
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
    let crashed =
        loop {
            if script.cancel_at == Some(turns) {
                let _too_late = handle.cancel();
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
                handle.resume().unwrap();
            }
            if driver.turn().unwrap() {
                break false;
            }
            turns += 1;
            assert!(
                turns < MAX_TURNS,
                "{} hangs: {:?}\n{:#?}",
                scenario.seed,
                handle.progress(),
                driver.copier()
            );
        };
    let operations = driver.ring().pushed();
    let written = driver.counters().written;
    if crashed {
        driver.into_ring().crash();
        return Run { end: End::Crashed, operations, turns, written };
    }
    assert_eq!(driver.ring().in_flight(), 0, "nothing is in flight at the end");
    Run { end: End::Over(handle.wait()), operations, turns, written }
}
