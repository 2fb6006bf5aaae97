//! What a copy says while it works: an event wherever something happens that a person may look for.

use std::collections::BTreeMap;
use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};

use engine::copy::ErrorPolicy;
use engine::job::Outcome;
use engine::ring::sim::FaultPlan;
use engine::units::ByteRange;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::run::{Script, run};
use crate::scenario::Scenario;

/// Counts events by their messages.
#[derive(Clone, Default)]
struct Counting(Arc<Mutex<BTreeMap<String, u32>>>);

/// The message among an event's fields.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            write!(self.0, "{value:?}").expect("text");
        }
    }
}

impl Subscriber for Counting {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Message::default();
        event.record(&mut message);
        *self.0.lock().expect("nobody panics").entry(message.0).or_default() += 1;
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn a_copy_tells_what_it_does() {
    let scenario = Scenario {
        map: true,
        source_policy: ErrorPolicy::Ignore,
        bad_source: vec![ByteRange::new(8192, 20 * 8192)],
        ..Scenario::plain(45)
    };
    // With a single subscriber, what another test meets first in its own thread would never be heard of here.
    let _other = tracing::Dispatch::new(Counting::default());
    let counting = Counting::default();
    let ended = tracing::subscriber::with_default(counting.clone(), || {
        run(&scenario, &scenario.world(), FaultPlan::default(), Script::default())
    });
    assert!(matches!(ended.result().outcome, Outcome::CompleteWithSkipped), "{:?}", ended.result());
    let seen = counting.0.lock().expect("nobody panics");
    for message in
        ["claim", "read", "write", "skip", "failed", "cluster failed", "retry", "checkpoint", "job state"]
    {
        assert!(seen.contains_key(message), "{message}: {seen:?}");
    }
    let retries = ended.result().progress.retries;
    assert!(u64::from(seen["retry"]) >= retries && retries > 0, "{retries} retries, {seen:?}");
}
