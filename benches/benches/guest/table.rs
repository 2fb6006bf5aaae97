//! The trials as a table of medians, and as JSON.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::trial::Trial;

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// One trial, as it ends.
pub(crate) fn line(trial: &Trial) -> String {
    let rate = trial.rate() / f64::from(1 << 20);
    if trial.depth == 0 {
        return format!("round {}  no guest    {:12} {rate:5.0} MiB/s", trial.round + 1, trial.choice);
    }
    format!(
        "round {}  depth {:2}    {:12} {rate:5.0} MiB/s  p50 {:.2}  p99 {:.2}  p99.9 {:.2}  worst {:.2} ms  {:.0} IOPS (before: p99.9 {:.2} ms, {:.0} IOPS)",
        trial.round + 1,
        trial.depth,
        trial.choice,
        milliseconds(trial.during.corrected(0.5)),
        milliseconds(trial.during.corrected(0.99)),
        milliseconds(trial.during.corrected(0.999)),
        milliseconds(trial.during.longest()),
        trial.during.count() as f64 / trial.seconds,
        milliseconds(trial.before.corrected(0.999)),
        trial.before.count() as f64,
    )
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Medians over the rounds; the ratio is to the sweep without a guest of the same round.
pub(crate) fn table(trials: &[Trial]) -> String {
    let mut keys: Vec<(u32, &str)> = Vec::new();
    for trial in trials {
        let key = (trial.depth, trial.choice.as_str());
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let mut text = String::from(
        "| guest's depth | sweep's depth | backup, MiB/s | of the sweep alone | p50, ms | p99, ms | p99.9, ms | worst, ms | guest's IOPS | before: p99.9, ms | before: IOPS |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (depth, choice) in keys {
        let of: Vec<&Trial> =
            trials.iter().filter(|trial| trial.depth == depth && trial.choice == choice).collect();
        let over = |value: &dyn Fn(&Trial) -> f64| median(of.iter().map(|trial| value(trial)).collect());
        let alone = |trial: &Trial| {
            trials
                .iter()
                .find(|other| other.depth == 0 && other.round == trial.round)
                .map_or(f64::NAN, Trial::rate)
        };
        let quantile = |q: f64| over(&|trial| milliseconds(trial.during.corrected(q)));
        let rate = over(&|trial| trial.rate()) / f64::from(1 << 20);
        let ratio = over(&|trial| trial.rate() / alone(trial));
        let row = if depth == 0 {
            writeln!(text, "| no guest | {choice} | {rate:.0} | 1 | | | | | | | |")
        } else {
            writeln!(
                text,
                "| {depth} | {choice} | {rate:.0} | {ratio:.2} | {:.2} | {:.2} | {:.2} | {:.1} | {:.0} | {:.2} | {:.0} |",
                quantile(0.5),
                quantile(0.99),
                quantile(0.999),
                over(&|trial| milliseconds(trial.during.longest())),
                over(&|trial| trial.during.count() as f64 / trial.seconds),
                over(&|trial| milliseconds(trial.before.corrected(0.999))),
                over(&|trial| trial.before.count() as f64),
            )
        };
        row.expect("a string takes it");
    }
    text
}

/// In milliseconds: the median, and what one in 10, 100, 1000 and 10,000 exceeds.
fn quantiles(of: &dyn Fn(f64) -> Duration) -> [f64; 5] {
    [0.5, 0.9, 0.99, 0.999, 0.9999].map(|quantile| milliseconds(of(quantile)))
}

/// Every trial.
pub(crate) fn json(trials: &[Trial]) -> Value {
    let of = |trial: &Trial| {
        json!({
            "choice": trial.choice,
            "depth": trial.depth,
            "round": trial.round,
            "seconds": trial.seconds,
            "bytes": trial.bytes,
            "writes_before": trial.before.count(),
            "writes_during": trial.during.count(),
            "corrected_ms": quantiles(&|q| trial.during.corrected(q)),
            "plain_ms": quantiles(&|q| trial.during.plain(q)),
            "worst_ms": milliseconds(trial.during.longest()),
            "timeline": trial.timeline.iter().map(|sample| (sample.seconds, sample.done, sample.in_flight)).collect::<Vec<_>>(),
        })
    };
    Value::Array(trials.iter().map(of).collect())
}
