//! The end of a job in numbers, for the member `x-report` of its last event.

use engine::job::JobResult;
use engine::live::GuestLatencies;
use serde_json::{Value, json};

use super::jobs::bounded;
use crate::report::latencies::{numbers, words};
use crate::report::range_value;

/// Most ranges that are listed; the rest are counted.
const MAX_RANGES: usize = 100;
/// Most bytes of their errors: all clients are told of them.
const MAX_ERRORS_TEXT: usize = 64 << 10;

/// See the module's header. `started`: what the job's start had to say.
pub(super) fn report_of(result: &JobResult, started: &[String]) -> Value {
    let progress = &result.progress;
    let skipped: Vec<Value> = result
        .skipped
        .iter()
        .take(MAX_RANGES)
        .map(|skipped| (skipped.range, bounded(&skipped.error)))
        .scan(0, |bytes, (range, error)| {
            *bytes += error.len();
            (*bytes <= MAX_ERRORS_TEXT).then(|| json!({ "range": range_value(range), "error": error }))
        })
        .collect();
    let notices: Vec<_> = started.iter().chain(&result.notices).map(|text| bounded(text)).collect();
    json!({
        "seconds": result.elapsed.as_secs_f64(),
        "total": progress.total, "done": progress.done, "copied": progress.copied, "zeros": progress.zeros, "holes": progress.holes,
        "skipped-bytes": progress.skipped, "skipped-ranges": result.skipped.len(), "skipped": skipped,
        "retries": progress.retries, "notices": notices,
        "guests": result.guests.as_ref().map(|guests| guests_of(guests)),
    })
}

/// What guests felt: numbers in microseconds, and a line for people.
fn guests_of(guests: &GuestLatencies) -> Value {
    let (before, during) = (numbers(&guests.before), numbers(&guests.during));
    let line = format!("before: {}; during: {}", words(&before), words(&during));
    json!({ "before": before, "during": during, "line": line })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use engine::job::{Outcome, SkippedRange, TargetHolds};
    use engine::units::ByteRange;

    use super::super::jobs::tests::ended;
    use super::*;

    #[test]
    fn what_was_left_out_is_listed_within_bounds() {
        for (error, listed) in [("bad".to_owned(), MAX_RANGES), ("x".repeat(4000), MAX_ERRORS_TEXT / 4000)] {
            let skipped = |at: u64| {
                let (range, error) = (ByteRange::new(at * 10, 5), error.clone());
                SkippedRange { range, error, target: TargetHolds::Unknown }
            };
            let result = ended(Outcome::CompleteWithSkipped, (0..200).map(skipped).collect());
            let told = report_of(&result, &[]);
            assert_eq!(told["skipped"].as_array().map(Vec::len), Some(listed));
            assert_eq!(told["skipped"][1], json!({ "range": { "offset": 10, "length": 5 }, "error": error }));
            assert_eq!(told["skipped-ranges"], 200);
        }
    }

    #[test]
    fn what_guests_felt_in_numbers_and_in_a_line() {
        let mut guests = GuestLatencies::default();
        guests.during.record(Duration::from_millis(4));
        let told = guests_of(&guests);
        assert_eq!((&told["before"]["requests"], &told["during"]["requests"]), (&json!(0), &json!(1)));
        assert_eq!(told["during"]["longest"], 4000.0);
        let line = told["line"].as_str().expect("a line");
        assert!(line.starts_with("before: no requests; during: 1 requests, p50 "), "{line}");
        assert!(line.ends_with("longest 4.00 ms"), "{line}");
    }
}
