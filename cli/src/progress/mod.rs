//! Progress on standard error while a command works.
//!
//! The commands hand in a [`Snapshot`] ten times a second; a [`Meter`] shows it as a bar, as JSON lines, or not at all. All
//! messages that may come up meanwhile go through [`Meter::say`], which keeps the bar's line apart from theirs.

mod bar;
mod json;

use std::io::IsTerminal;
use std::time::Duration;

use engine::job::Progress;
use serde_json::{Value, json};

use crate::args::ProgressKind;
use crate::out;
use crate::report::units::{bytes, rate, span};

/// How far a command is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    /// Bytes to settle.
    pub(crate) total: u64,
    /// Bytes settled or given up.
    pub(crate) settled: u64,
    /// Bytes in holes.
    pub(crate) holes: u64,
    /// Bytes found to be zero.
    pub(crate) zeros: u64,
    /// Bytes given up.
    pub(crate) skipped: u64,
    /// Bytes a second.
    pub(crate) rate: u64,
    /// Estimate.
    pub(crate) time_left: Option<Duration>,
    /// Why it stands still.
    pub(crate) paused: Option<String>,
    /// All counters, for the JSON lines.
    pub(crate) counters: Value,
}

impl Snapshot {
    /// Of a copy.
    pub(crate) fn of_copy(progress: &Progress) -> Self {
        let paused = progress.status == engine::job::Status::Paused;
        Self {
            total: progress.total,
            settled: progress.done + progress.skipped,
            holes: progress.holes,
            zeros: progress.zeros,
            skipped: progress.skipped,
            rate: progress.rate,
            time_left: progress.time_left,
            paused: paused.then(|| progress.paused_on.clone().unwrap_or_else(|| "paused".to_owned())),
            counters: json!({
                "status": progress.status.as_str(),
                "total": progress.total,
                "done": progress.done,
                "copied": progress.copied,
                "holes": progress.holes,
                "zeros": progress.zeros,
                "uncovered": progress.uncovered,
                "resumed": progress.resumed,
                "skipped": progress.skipped,
                "verified": progress.verified,
                "retries": progress.retries,
                "rate": progress.rate,
                "time_left": progress.time_left.map(|left| left.as_secs_f64()),
                "speed": progress.speed,
                "paused_on": if paused { progress.paused_on.as_deref() } else { None },
                "seconds": progress.elapsed.as_secs_f64(),
            }),
        }
    }

    /// The last one: whatever it ended with, no time is left.
    pub(crate) fn at_the_end(mut self) -> Self {
        self.time_left = None;
        if let Value::Object(fields) = &mut self.counters {
            fields.insert("time_left".into(), Value::Null);
        }
        self
    }

    /// How much of it is settled; a disk without bytes is done as soon as it is looked at.
    fn percent(&self) -> u128 {
        let settled = u128::from(self.settled.min(self.total)) * 100;
        settled.checked_div(u128::from(self.total)).unwrap_or(100)
    }

    /// In words, for a bar's message.
    fn words(&self) -> String {
        let mut words = format!("{} of {}", bytes(self.settled.min(self.total)), bytes(self.total));
        if let Some(reason) = &self.paused {
            words.push_str(", paused: ");
            words.push_str(&out::one_line(reason));
        } else {
            words.push_str(&format!(", {}", rate(self.rate)));
            if let Some(left) = self.time_left {
                words.push_str(&format!(", {} left", span(left)));
            }
        }
        for (count, what) in [(self.zeros, "zeros"), (self.holes, "holes"), (self.skipped, "skipped")] {
            if count > 0 {
                words.push_str(&format!(", {} {what}", bytes(count)));
            }
        }
        words
    }
}

/// Shows progress.
pub(crate) enum Meter {
    /// Not at all.
    Silent,
    /// On a terminal.
    Bar(bar::Bar),
    /// As lines of text, where a bar was asked for and there is no terminal.
    Lines(bar::Lines),
    /// As JSON lines.
    Json(json::Lines),
}

impl Meter {
    /// As `kind` asks; `logging`: trace events go to standard error too, and `auto` leaves it to them.
    pub(crate) fn new(kind: ProgressKind, logging: bool) -> Self {
        let terminal =
            std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        match kind {
            ProgressKind::Bar | ProgressKind::Auto
                if terminal && !(logging && kind == ProgressKind::Auto) =>
            {
                Self::Bar(bar::Bar::new())
            }
            ProgressKind::Bar => Self::Lines(bar::Lines::default()),
            ProgressKind::Json => Self::Json(json::Lines::default()),
            ProgressKind::Auto | ProgressKind::None => Self::Silent,
        }
    }

    /// Show where things stand.
    pub(crate) fn update(&mut self, snapshot: &Snapshot) {
        match self {
            Self::Silent => {}
            Self::Bar(bar) => bar.update(snapshot),
            Self::Lines(lines) => lines.update(snapshot),
            Self::Json(lines) => lines.update(snapshot),
        }
    }

    /// A message beside the progress.
    pub(crate) fn say(&self, message: impl Into<out::Message>) {
        match self {
            Self::Bar(bar) => bar.suspend(|| out::say(message)),
            _ => out::say(message),
        }
    }

    /// The end: the bar goes, the last JSON line comes (`None`: nothing was done).
    pub(crate) fn finish(self, snapshot: Option<&Snapshot>) {
        match self {
            Self::Silent | Self::Lines(_) => {}
            Self::Bar(bar) => bar.finish(),
            Self::Json(lines) => {
                if let Some(snapshot) = snapshot {
                    lines.finish(snapshot);
                }
            }
        }
    }
}
