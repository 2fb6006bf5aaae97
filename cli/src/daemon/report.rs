//! The end of a job in numbers, for the member `x-report` of its last event.

use std::time::Duration;

use engine::job::JobResult;
use engine::live::{GuestLatencies, Latencies};
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
        "guests": result.guests.as_ref().map(|guests| guests_of(guests)),
    })
}

/// What guests felt: numbers in microseconds, and a line for people.
fn guests_of(guests: &GuestLatencies) -> Value {
    let line = format!("before: {}; during: {}", words(&guests.before), words(&guests.during));
    json!({ "before": numbers(&guests.before), "during": numbers(&guests.during), "line": line })
}

/// As `x-query-latencies` shows them, too.
pub(super) fn numbers(latencies: &Latencies) -> Value {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    json!({
        "requests": latencies.count(), "mean": micros(latencies.mean()), "longest": micros(latencies.longest()),
        "p50": micros(latencies.plain(0.5)), "p99": micros(latencies.plain(0.99)),
        "p99.9": micros(latencies.plain(0.999)),
        "corrected": {
            "p50": micros(latencies.corrected(0.5)), "p99": micros(latencies.corrected(0.99)),
            "p99.9": micros(latencies.corrected(0.999)),
        },
    })
}

fn words(latencies: &Latencies) -> String {
    if latencies.count() == 0 {
        return "no requests".to_owned();
    }
    let millis = |quantile: f64| latencies.corrected(quantile).as_secs_f64() * 1e3;
    format!(
        "{} requests, p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms, longest {:.2} ms",
        latencies.count(),
        millis(0.5),
        millis(0.99),
        millis(0.999),
        latencies.longest().as_secs_f64() * 1e3
    )
}

#[cfg(test)]
mod tests {
    use super::*;

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
