//! What the demo did, felt and proved: lines for people as it goes on, and the JSON object.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine::error::Error;
use engine::job::JobResult;
use engine::live::Latencies;
use engine::units::ClusterSize;
use serde_json::{Map, Value, json};

use super::units::{average, bytes, rate, span};
use super::{DONE, FAILED, REFUSED, error_value};
use crate::args::DemoArgs;
use crate::demo::{BLOCK, Felt, FeltByPhase, Phase, Stop};
use crate::out::{self, Message};
use crate::signals::Ending;

/// The instant that the backup shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    /// The disk was like that after so many of the guest's writes.
    pub(crate) writes: u64,
    /// Acknowledged when the backup's start was called.
    pub(crate) at_call: u64,
    /// Acknowledged when it returned.
    pub(crate) at_return: u64,
}

/// What has happened.
pub(crate) struct Account<'a> {
    args: &'a DemoArgs,
    pub(crate) directory: Option<PathBuf>,
    pub(crate) notices: Vec<String>,
    pub(crate) backup: Option<Arc<JobResult>>,
    pub(crate) felt: Option<FeltByPhase>,
    /// The first proof: the backup is of one instant.
    pub(crate) shown: Option<Result<Shown, Error>>,
    /// The second: the disk has all of so many acknowledged writes.
    pub(crate) kept: Option<Result<u64, Error>>,
    /// Why it ended before its end.
    pub(crate) stop: Option<Stop>,
    /// Why its files are still there, if they are.
    pub(crate) left: Option<Error>,
}

impl<'a> Account<'a> {
    pub(crate) fn new(args: &'a DemoArgs) -> Self {
        Self {
            args,
            directory: None,
            notices: Vec::new(),
            backup: None,
            felt: None,
            shown: None,
            kept: None,
            stop: None,
            left: None,
        }
    }

    /// Writes of the guest that were acknowledged, once it has stopped.
    pub(crate) fn writes(&self) -> u64 {
        self.felt.as_ref().map_or(0, |felt| felt.iter().map(|felt| felt.waits.count()).sum())
    }

    pub(crate) fn making(&self) -> String {
        let directory = self.directory.as_deref().unwrap_or(Path::new("")).display().to_string();
        format!("disk     {} of random data, in {}", bytes(self.args.size.0), out::one_line(&directory))
    }

    pub(crate) fn exercise(&self) -> String {
        let seconds = self.args.seconds;
        format!(
            "guest    writes random blocks of 4 KiB, one at a time, without pause: \
             {seconds} s, then while a backup runs, then {seconds} s more"
        )
    }

    pub(crate) fn backed_up(&self) -> String {
        let Some(result) = &self.backup else { return String::new() };
        format!(
            "backup   {} in {} ({}): {} clusters of {}, flushed",
            bytes(result.progress.total),
            span(result.elapsed),
            rate(speed(result)),
            grouped(clusters(result)),
            bytes(ClusterSize::DEFAULT.bytes()),
        )
    }

    /// The table of waits.
    pub(crate) fn waits(&self) -> String {
        let mut lines = vec![format!(
            "\n{:<14}{:>12}{:>11}{:>11}{:>11}{:>11}",
            "guest's waits", "writes/s", "p50", "p99", "p99.9", "worst"
        )];
        for (phase, felt) in Phase::ALL.iter().zip(self.felt.iter().flatten()) {
            let waits = [0.5, 0.99, 0.999].map(|share| felt.waits.corrected(share));
            let cells: String = waits
                .into_iter()
                .chain([felt.waits.longest()])
                .map(|wait| format!("{:>11}", short(wait)))
                .collect();
            lines.push(format!("  {:<12}{:>12}{cells}", phase.name(), grouped(writes_a_second(felt))));
        }
        lines.push(
            "  percentiles: the wait that a write arriving at a random instant would see (corrected for \
             coordinated omission)\n"
                .to_owned(),
        );
        lines.join("\n")
    }

    /// The first proof, if it holds.
    pub(crate) fn shown_line(&self) -> Option<String> {
        let Some(Ok(shown)) = &self.shown else { return None };
        let under_way = if shown.writes > shown.at_return { ", and one under way" } else { "" };
        Some(format!(
            "proved   the backup is the disk after exactly {} of the guest's writes, in all {} blocks, byte for byte\n         \
             (acknowledged when the backup was asked for: {}; when it had started: {}{under_way})",
            grouped(shown.writes),
            grouped(u64::from(self.args.blocks())),
            grouped(shown.at_call),
            grouped(shown.at_return),
        ))
    }

    /// The second, if it holds.
    pub(crate) fn kept_line(&self) -> Option<String> {
        let Some(Ok(writes)) = &self.kept else { return None };
        Some(format!(
            "proved   the disk holds the last acknowledged version of all {} blocks: none of {} writes was lost",
            grouped(u64::from(self.args.blocks())),
            grouped(*writes),
        ))
    }

    /// Messages on standard error.
    pub(crate) fn messages(&self) -> Vec<Message> {
        let mut messages: Vec<Message> = self.notices.iter().map(Message::from).collect();
        messages.extend(self.flaws().map(Message::error));
        match &self.stop {
            Some(Stop::Error(error, _)) => messages.push(Message::error(error)),
            Some(Stop::Signal(ending)) if self.left.is_none() => {
                messages.push(format!("ended by {}; its files were removed", ending.name()).into());
            }
            Some(Stop::Signal(ending)) => messages.push(format!("ended by {}", ending.name()).into()),
            None => {}
        }
        messages.extend(self.left.as_ref().map(Message::error));
        messages
    }

    /// Exit code of the program.
    pub(crate) fn exit_code(&self) -> u8 {
        match &self.stop {
            _ if self.flaws().next().is_some() => FAILED,
            Some(Stop::Error(_, code)) => *code,
            Some(Stop::Signal(ending)) => ending.exit_code(),
            None if self.left.is_some() => FAILED,
            None => DONE,
        }
    }

    /// Where a proof failed.
    fn flaws(&self) -> impl Iterator<Item = &Error> {
        let shown = self.shown.as_ref().and_then(|shown| shown.as_ref().err());
        let kept = self.kept.as_ref().and_then(|kept| kept.as_ref().err());
        shown.into_iter().chain(kept)
    }

    /// The object for `--json`.
    pub(crate) fn json(&self) -> Value {
        let error = self.flaws().next().or(match &self.stop {
            Some(Stop::Error(error, _)) => Some(error),
            Some(Stop::Signal(_)) => None,
            None => self.left.as_ref(),
        });
        let ending = match &self.stop {
            Some(Stop::Signal(ending)) => Some(*ending),
            _ => None,
        };
        let result = match (self.exit_code(), ending) {
            (DONE, _) => "proved",
            (REFUSED, _) => "refused",
            (_, Some(_)) if error.is_none() => "cancelled",
            _ => "failed",
        };
        json!({
            "command": "demo",
            "result": result,
            "bytes": self.args.size.0,
            "blocks": self.args.blocks(),
            "block_bytes": BLOCK,
            "seconds": self.args.seconds,
            "directory": self.directory.as_ref().map(|path| path.to_string_lossy()),
            "backup": self.backup.as_ref().map(|result| backup_value(result)),
            "guest": self.felt.as_ref().map(guest_value),
            "proof": {
                "backup": self.shown.as_ref().map(shown_value),
                "disk": self.kept.as_ref().map(kept_value),
            },
            "notices": self.notices,
            "signal": ending.map(Ending::name),
            "error": error.map(error_value),
            "exit_code": self.exit_code(),
        })
    }
}

fn backup_value(result: &JobResult) -> Value {
    json!({
        "bytes": result.progress.total,
        "cluster_bytes": ClusterSize::DEFAULT.bytes(),
        "clusters": clusters(result),
        "seconds": result.elapsed.as_secs_f64(),
        "rate": speed(result),
        "engine": result.engine,
    })
}

fn guest_value(felt: &FeltByPhase) -> Value {
    let phases = Phase::ALL.iter().zip(felt);
    Value::Object(phases.map(|(phase, felt)| (phase.name().to_owned(), felt_value(felt))).collect())
}

fn felt_value(felt: &Felt) -> Value {
    let waits = &felt.waits;
    json!({
        "seconds": felt.time.as_secs_f64(),
        "writes": waits.count(),
        "writes_per_second": writes_a_second(felt),
        "corrected_wait_seconds": percentiles(waits, Latencies::corrected),
        "plain_wait_seconds": percentiles(waits, Latencies::plain),
        "worst_wait_seconds": waits.longest().as_secs_f64(),
    })
}

fn percentiles(waits: &Latencies, of: impl Fn(&Latencies, f64) -> Duration) -> Map<String, Value> {
    let shares = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];
    shares.map(|(name, share)| (name.to_owned(), of(waits, share).as_secs_f64().into())).into_iter().collect()
}

fn shown_value(shown: &Result<Shown, Error>) -> Value {
    match shown {
        Ok(shown) => json!({
            "holds": true,
            "writes": shown.writes,
            "acknowledged_at_call": shown.at_call,
            "acknowledged_at_return": shown.at_return,
            "error": null,
        }),
        Err(error) => json!({ "holds": false, "error": error.to_string() }),
    }
}

fn kept_value(kept: &Result<u64, Error>) -> Value {
    match kept {
        Ok(writes) => json!({ "holds": true, "writes": writes, "error": null }),
        Err(error) => json!({ "holds": false, "error": error.to_string() }),
    }
}

fn clusters(result: &JobResult) -> u64 {
    result.progress.copied.div_ceil(ClusterSize::DEFAULT.bytes())
}

/// Bytes a second of the backup.
fn speed(result: &JobResult) -> u64 {
    average(result.progress.done, result.elapsed)
}

fn writes_a_second(felt: &Felt) -> u64 {
    average(felt.waits.count(), felt.time)
}

/// `1,234,567`.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `85 µs`, `1.24 ms`, `31.0 ms`, `1.02 s`.
fn short(time: Duration) -> String {
    let micros = time.as_secs_f64() * 1e6;
    match micros {
        ..999.5 => format!("{micros:.0} µs"),
        ..9_995.0 => format!("{:.2} ms", micros / 1e3),
        ..999_500.0 => format!("{:.1} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_in_groups() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(count), text);
        }
    }

    #[test]
    fn waits_as_people_read_them() {
        for (micros, text) in [(0, "0 µs"), (85, "85 µs"), (999, "999 µs"), (1240, "1.24 ms")] {
            assert_eq!(short(Duration::from_micros(micros)), text);
        }
        assert_eq!(short(Duration::from_millis(31)), "31.0 ms");
        assert_eq!(short(Duration::from_millis(1020)), "1.02 s");
    }
}
