//! What guests felt, for programs and for people.

use std::time::Duration;

use engine::live::Latencies;
use serde_json::{Value, json};

/// Numbers in microseconds. `corrected`: the wait of a request that arrives at a random instant.
pub(crate) fn numbers(latencies: &Latencies) -> Value {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let octave = |(up_to, count)| json!({ "up-to": micros(up_to), "requests": count });
    let histogram: Vec<Value> = latencies.histogram().map(octave).collect();
    json!({
        "requests": latencies.count(), "mean": micros(latencies.mean()), "longest": micros(latencies.longest()),
        "p50": micros(latencies.plain(0.5)), "p99": micros(latencies.plain(0.99)),
        "p99.9": micros(latencies.plain(0.999)),
        "corrected": {
            "p50": micros(latencies.corrected(0.5)), "p99": micros(latencies.corrected(0.99)),
            "p99.9": micros(latencies.corrected(0.999)),
        },
        "histogram": histogram,
    })
}

/// The same, from [`numbers`], in a line.
pub(crate) fn words(numbers: &Value) -> String {
    let requests = numbers["requests"].as_u64().unwrap_or(0);
    if requests == 0 {
        return "no requests".to_owned();
    }
    let millis = |micros: &Value| micros.as_f64().unwrap_or(0.0) / 1e3;
    let corrected = |quantile: &str| millis(&numbers["corrected"][quantile]);
    let (p50, p99, p999) = (corrected("p50"), corrected("p99"), corrected("p99.9"));
    let longest = millis(&numbers["longest"]);
    format!(
        "{requests} requests, p50 {p50:.2} ms, p99 {p99:.2} ms, p99.9 {p999:.2} ms, longest {longest:.2} ms"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_of_one_request_and_of_none() {
        let mut latencies = Latencies::default();
        assert_eq!(words(&numbers(&latencies)), "no requests");
        latencies.record(Duration::from_millis(4));
        let told = numbers(&latencies);
        assert_eq!(told["histogram"], json!([{ "up-to": 4096.0, "requests": 1 }]));
        let line = words(&told);
        assert!(line.starts_with("1 requests, p50 2.0") && line.ends_with("longest 4.00 ms"), "{line}");
    }
}
