//! A cancel that comes between the copier's question whether it may be complete and the answer. Nothing else in a simulated run happens
//! there, so it is put there by whoever listens to the events of `tracing`.

use engine::job::{JobHandle, Outcome};
use engine::ring::Ring;
use engine::ring::sim::FaultPlan;
use std::sync::Mutex;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::oracle::{Before, check};
use crate::run::{Script, driver_of, run};
use crate::scenario::Scenario;

/// Cancels a job once, when it asks.
struct CancelsWhenAsked {
    job: Mutex<Option<JobHandle>>,
}

struct IsTheQuestion(bool);

impl Visit for IsTheQuestion {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0 |=
            field.name() == "message" && format!("{value:?}") == "complete, if whoever carries it agrees";
    }
}

impl Subscriber for CancelsWhenAsked {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut question = IsTheQuestion(false);
        event.record(&mut question);
        if question.0
            && let Some(job) = self.job.lock().unwrap().take()
        {
            job.cancel().expect("it is not decided yet");
        }
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn a_cancel_between_question_and_answer_has_its_effect() {
    for (map, verify) in [(false, false), (true, false), (true, true)] {
        let scenario = Scenario { map, verify, ..Scenario::plain(51) };
        let world = scenario.world();
        let before = Before::of(&world);
        let target_before = scenario.target_before(&world);
        let nothing =
            engine::copier::plan::Checkpoint { done: Vec::new(), skipped: Vec::new(), blank_is_zero: true };
        let plan = engine::copier::plan::Plan { target_before, ..scenario.plan(nothing) };
        let (mut driver, job) = driver_of(&scenario, plan, &world, FaultPlan::default());
        let listener = tracing::Dispatch::new(CancelsWhenAsked { job: Mutex::new(Some(job.clone())) });
        tracing::dispatcher::with_default(&listener, || driver.run().unwrap());
        let listener = listener.downcast_ref::<CancelsWhenAsked>().unwrap();
        assert!(listener.job.lock().unwrap().is_none(), "it has asked");
        assert_eq!(driver.ring().in_flight(), 0);
        let result = job.wait();
        assert!(matches!(result.outcome, Outcome::Cancelled), "{:?}", result.outcome);
        assert_eq!(result.resumable, map);
        if map {
            let second = run(&scenario, &world, FaultPlan::default(), Script::default());
            assert!(matches!(second.result().outcome, Outcome::Complete));
            check(&scenario, &world, &before, second.result()).unwrap();
        }
    }
}
