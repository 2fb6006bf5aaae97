//! Progress for programs: one JSON object a line on standard error, at most two a second, and one at the end.
//!
//! Every line has `"event":"progress"` and `"final"`, which is true for the last one. Between them stand the messages, which are JSON lines
//! too (`"event":"message"`).

use std::time::{Duration, Instant};

use serde_json::Value;

use super::Snapshot;
use crate::out;

/// Least time between two lines.
const LINE_EVERY: Duration = Duration::from_millis(500);

/// The lines.
#[derive(Default)]
pub(crate) struct Lines {
    last: Option<Instant>,
}

impl Lines {
    pub(crate) fn update(&mut self, snapshot: &Snapshot) {
        if self.last.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
            self.last = Some(Instant::now());
            print(snapshot, false);
        }
    }

    pub(crate) fn finish(self, snapshot: &Snapshot) {
        print(snapshot, true);
    }
}

fn print(snapshot: &Snapshot, last: bool) {
    let mut line = snapshot.counters.clone();
    if let Value::Object(fields) = &mut line {
        fields.insert("event".into(), "progress".into());
        fields.insert("final".into(), last.into());
    }
    out::raw(&line.to_string());
}
