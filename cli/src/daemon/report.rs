//! The end of a job in numbers, for the member `x-report` of its last event.

use engine::job::JobResult;
use serde_json::{Value, json};

use crate::report::range_value;

/// Most ranges that are listed; the rest are counted.
const MAX_RANGES: usize = 100;

/// See the module's header.
pub(super) fn report_of(result: &JobResult) -> Value {
    let progress = &result.progress;
    let skipped: Vec<Value> = result
        .skipped
        .iter()
        .take(MAX_RANGES)
        .map(|skipped| json!({ "range": range_value(skipped.range), "error": skipped.error }))
        .collect();
    json!({
        "seconds": result.elapsed.as_secs_f64(),
        "done": progress.done, "copied": progress.copied, "zeros": progress.zeros, "holes": progress.holes,
        "skipped-bytes": progress.skipped, "skipped-ranges": result.skipped.len(), "skipped": skipped,
        "retries": progress.retries, "notices": result.notices,
    })
}
