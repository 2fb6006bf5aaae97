//! The end of a copy: the summary line, the list of what was skipped, how to go on, and the JSON object.

use std::io;
use std::path::Path;

use engine::error::{Error, ErrorKind};
use engine::job::{JobResult, Outcome, Progress, SkippedRange, TargetHolds};
use engine::storage::locator::{Locator, Place};
use serde_json::{Map, Value, json};

use super::units::{average, bytes, rate, span};
use super::{DONE, FAILED, INCOMPLETE, error_value, range_value, result_of};
use crate::args::CopyArgs;
use crate::out::{self, Message};
use crate::signals::Ending;

/// Most skipped ranges that are listed for people; all stand in the JSON object.
const SKIPPED_LISTED: usize = 20;

/// A copy that has ended.
pub(crate) struct Ended<'a> {
    pub(crate) args: &'a CopyArgs,
    pub(crate) result: &'a JobResult,
    /// What was told already.
    pub(crate) told: &'a [String],
    /// The signal that ended it.
    pub(crate) ending: Option<Ending>,
    /// The command line, to repeat it.
    pub(crate) command_line: &'a [String],
}

impl Ended<'_> {
    /// Exit code of the program.
    pub(crate) fn exit_code(&self) -> u8 {
        match &self.result.outcome {
            Outcome::Complete => DONE,
            Outcome::CompleteWithSkipped => INCOMPLETE,
            // The target was touched by now, whatever kind of error it is.
            Outcome::Failed(_) => FAILED,
            Outcome::Cancelled => self.ending.map_or(FAILED, Ending::exit_code),
        }
    }

    /// All messages for people.
    pub(crate) fn messages(&self) -> Vec<Message> {
        let (error, lines) = match &self.result.outcome {
            Outcome::Complete => (None, self.complete()),
            Outcome::CompleteWithSkipped => (None, self.complete_but_for()),
            Outcome::Failed(error) => (Some(Message::error(error)), self.failed(error)),
            Outcome::Cancelled => (None, self.cancelled()),
        };
        error.into_iter().chain(lines.into_iter().map(Message::from)).collect()
    }

    fn complete(&self) -> Vec<String> {
        let mut lines = self.later_notices();
        // One that could not be removed stands among the notices.
        let map = if self.result.map_removed { "; map file removed" } else { "" };
        lines.push(format!("copied {}{map}", self.summary()));
        lines
    }

    fn complete_but_for(&self) -> Vec<String> {
        let mut lines = self.later_notices();
        lines.extend(self.skipped_lines());
        lines.push(format!("copied all but {} of {}", bytes(self.result.progress.skipped), self.summary()));
        if self.result.resumable {
            lines.push(format!("to try the skipped ranges again, repeat: {}", self.repeat()));
        }
        lines
    }

    /// What follows the error.
    fn failed(&self, error: &Error) -> Vec<String> {
        let mut lines = vec![format!("failed after {}", how_far(&self.result.progress))];
        lines.extend(self.skipped_lines());
        lines.extend(self.later_notices());
        // A source that changed was copied to its end, and of a target that is gone nothing is left: there is nothing to go on with.
        if !matches!(error.kind(), ErrorKind::SourceChanged | ErrorKind::TargetLost) {
            lines.extend(self.how_to_go_on());
        }
        lines
    }

    fn cancelled(&self) -> Vec<String> {
        let signal = self.ending.map_or("a request", Ending::name);
        let mut lines = vec![format!("ended by {signal} after {}", how_far(&self.result.progress))];
        lines.extend(self.later_notices());
        lines.extend(self.how_to_go_on());
        lines
    }

    /// What the job noted beyond what was told while it ran.
    fn later_notices(&self) -> Vec<String> {
        self.result.notices.iter().filter(|notice| !self.told.contains(notice)).cloned().collect()
    }

    fn skipped_lines(&self) -> Vec<String> {
        skipped_lines(&self.result.skipped, &out::one_line(&self.args.target))
    }

    /// `4.0 GiB in 4.4 s (931 MiB/s): 3.1 GiB data, 512 MiB zeros, 400 MiB holes; verified; flushed`.
    fn summary(&self) -> String {
        let progress = &self.result.progress;
        let parts: Vec<_> = [
            (progress.copied, "data"),
            (progress.zeros, "zeros"),
            (progress.holes, "holes"),
            (progress.uncovered, "not covered"),
            (progress.resumed, "by earlier runs"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{} {what}", bytes(count)))
        .collect();
        let parts = if parts.is_empty() { String::new() } else { format!(": {}", parts.join(", ")) };
        format!(
            "{} in {} ({}){parts}{}{}",
            bytes(progress.total),
            span(self.result.elapsed),
            rate(self.rate()),
            if self.result.verified { "; verified" } else { "" },
            if self.result.durable { "; flushed" } else { "; not flushed, which the target does not offer" },
        )
    }

    /// Bytes a second settled by this run.
    fn rate(&self) -> u64 {
        let progress = &self.result.progress;
        average(progress.done.saturating_sub(progress.resumed), self.result.elapsed)
    }

    fn how_to_go_on(&self) -> Vec<String> {
        if self.result.resumable {
            let (mapped, done) = (self.result.resumable_bytes, self.result.progress.done);
            let from = if mapped < done {
                format!("from {} of {}", bytes(mapped), bytes(self.result.progress.total))
            } else {
                "where it stopped".to_owned()
            };
            return vec![format!("to go on {from}, repeat: {}", self.repeat())];
        }
        let target = out::one_line(&self.args.target);
        let mut messages = vec![];
        // That a new file was removed stands among the notices.
        if !target.starts_with("null:") && !is_missing(&self.args.target) {
            messages.push(format!("{target} is not a complete copy"));
        }
        let shrank =
            matches!(&self.result.outcome, Outcome::Failed(error) if error.kind() == ErrorKind::SourceShrank);
        if !shrank {
            messages.push(if self.args.map.is_some() {
                "the map file holds nothing to go on from; the next run starts anew".to_owned()
            } else {
                "with --map FILE a copy can go on after an interruption".to_owned()
            });
        }
        messages
    }

    fn repeat(&self) -> String {
        self.command_line.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }

    /// The object for `--json`.
    pub(crate) fn json(&self) -> Value {
        let result = self.result;
        let progress = &result.progress;
        let (name, error) = match &result.outcome {
            Outcome::Complete => ("complete", Value::Null),
            Outcome::CompleteWithSkipped => ("complete_with_skipped", Value::Null),
            Outcome::Failed(error) => ("failed", error_value(error)),
            Outcome::Cancelled => ("cancelled", Value::Null),
        };
        let mut notices = self.told.to_vec();
        notices.extend(self.later_notices());
        let mut object = head(self.args, name);
        let fields = json!({
            "bytes": progress.total,
            "done": progress.done,
            "copied": progress.copied,
            "zeros": progress.zeros,
            "holes": progress.holes,
            "uncovered": progress.uncovered,
            "resumed": progress.resumed,
            "skipped_bytes": progress.skipped,
            "skipped": result.skipped.iter().map(skipped_value).collect::<Vec<_>>(),
            "verified": result.verified,
            "verified_bytes": progress.verified,
            "durable": matches!(result.outcome, Outcome::Complete | Outcome::CompleteWithSkipped) && result.durable,
            "retries": progress.retries,
            "seconds": result.elapsed.as_secs_f64(),
            "rate": self.rate(),
            "engine": result.engine,
            "resumable": result.resumable,
            "resumable_bytes": result.resumable_bytes,
            "signal": self.ending.map(Ending::name),
            "notices": notices,
            "error": error,
            "exit_code": self.exit_code(),
        });
        if let Value::Object(fields) = fields {
            object.extend(fields);
        }
        Value::Object(object)
    }
}

/// The object for `--json` of a copy that did not start: the same fields, with nothing done.
/// `ending`: a signal that came before that.
pub(crate) fn not_started_json(
    args: &CopyArgs,
    error: &Error,
    ending: Option<Ending>,
    exit_code: u8,
) -> Value {
    let given_up = ending.is_some() && error.kind() == ErrorKind::Cancelled;
    let mut object = head(args, if given_up { "cancelled" } else { result_of(error) });
    let fields = json!({
        "bytes": 0, "done": 0, "copied": 0, "zeros": 0, "holes": 0, "uncovered": 0, "resumed": 0,
        "skipped_bytes": 0, "skipped": [], "verified": false, "verified_bytes": 0, "durable": false, "retries": 0,
        "seconds": 0.0, "rate": 0, "engine": null, "resumable": false, "resumable_bytes": 0,
        "signal": ending.map(Ending::name), "notices": [],
        "error": if given_up { Value::Null } else { error_value(error) },
        "exit_code": exit_code,
    });
    if let Value::Object(fields) = fields {
        object.extend(fields);
    }
    Value::Object(object)
}

/// A hint for a copy that did not start because its source is missing. It names no command to run: where the arguments
/// are right and the source's disk has dropped out, the reversed command would overwrite the backup's disk.
pub(crate) fn missing_hint(args: &CopyArgs) -> Option<String> {
    let (source, target) = (&args.source, &args.target);
    if !is_missing(source) {
        return None;
    }
    if std::path::absolute(source).is_ok_and(|path| path.starts_with("/dev")) {
        return Some("is the device connected? see lsblk".to_owned());
    }
    let meant_to_be_there = args.map.is_some() || args.force();
    let target_is_file = std::fs::metadata(target).is_ok_and(|found| found.is_file());
    (target_is_file && !meant_to_be_there).then(|| {
        let (target, source) = (out::one_line(target), out::one_line(source));
        format!("{target} exists and {source} does not: the source comes first")
    })
}

fn head(args: &CopyArgs, result: &str) -> Map<String, Value> {
    let fields = json!({
        "command": "copy",
        "result": result,
        "source": args.source,
        "target": args.target,
        "map": args.map.as_ref().map(|map| map.to_string_lossy().into_owned()),
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// Whether there is no file of that name; what is no name of a file is not missing.
fn is_missing(path: &str) -> bool {
    let is_path = Locator::parse(path).is_ok_and(|locator| matches!(locator.place(), Place::Path(_)));
    is_path && Path::new(path).symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

fn how_far(progress: &Progress) -> String {
    format!("{} of {} in {}", bytes(progress.done), bytes(progress.total), span(progress.elapsed))
}

fn skipped_lines(skipped: &[SkippedRange], target: &str) -> Vec<String> {
    let line = |skipped: &SkippedRange| {
        // The error tells the range as well; in JSON it stands alone.
        let error = skipped.error.replacen(&format!(", {}", skipped.range), "", 1);
        let holds = match skipped.target {
            TargetHolds::Zeros => format!("{target} holds zeros there"),
            TargetHolds::Unchanged => format!("{target} holds there what it held before"),
            TargetHolds::Unknown => format!("what {target} holds there is not known"),
        };
        format!("skipped {}: {}; {holds}", skipped.range, out::one_line(&error))
    };
    let mut lines: Vec<_> = skipped.iter().take(SKIPPED_LISTED).map(line).collect();
    if let Some(more) = skipped.len().checked_sub(SKIPPED_LISTED).filter(|&more| more > 0) {
        lines.push(format!("and {more} more skipped ranges; --json lists all"));
    }
    lines
}

fn skipped_value(skipped: &SkippedRange) -> Value {
    let mut value = range_value(skipped.range);
    if let Value::Object(fields) = &mut value {
        fields.insert("error".into(), skipped.error.clone().into());
        let holds = match skipped.target {
            TargetHolds::Zeros => "zeros",
            TargetHolds::Unchanged => "unchanged",
            TargetHolds::Unknown => "unknown",
        };
        fields.insert("target".into(), holds.into());
    }
    value
}

/// `word` as a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_-./:=,@%+".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    if word.chars().any(char::is_control) {
        // Only the $'…' form takes escapes, and keeps the message on its line.
        let mut text = String::new();
        for letter in word.chars() {
            match letter {
                '\\' | '\'' => text.extend(['\\', letter]),
                _ if letter.is_control() => text.push_str(&format!("\\u{:04x}", u32::from(letter))),
                _ => text.push(letter),
            }
        }
        return format!("$'{text}'");
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::units::ByteRange;

    #[test]
    fn words_come_back_from_a_shell() {
        for (word, text) in [
            ("a.img", "a.img"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
            ("a\n'", r"$'a\u000a\''"),
        ] {
            assert_eq!(quoted(word), text);
        }
    }

    #[test]
    fn list_of_skipped_ranges_is_bounded() {
        let skipped: Vec<_> = (0..25)
            .map(|place| ByteRange::new(place << 20, 65536))
            .map(|range| SkippedRange {
                range,
                error: format!("cannot read a, {range}: bad"),
                target: TargetHolds::Zeros,
            })
            .collect();
        let lines = skipped_lines(&skipped, "b");
        assert_eq!(lines.len(), SKIPPED_LISTED + 1);
        assert_eq!(lines[0], "skipped bytes 0..65536: cannot read a: bad; b holds zeros there");
        assert!(lines[SKIPPED_LISTED].contains("5 more"));
        assert_eq!(skipped_lines(&skipped[..SKIPPED_LISTED], "b").len(), SKIPPED_LISTED);
    }
}
