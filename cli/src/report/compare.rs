//! The end of a comparison: one line on standard output, or the JSON object there.

use std::time::Duration;

use engine::compare::{Comparison, Difference};
use engine::error::{Error, ErrorKind};
use serde_json::{Value, json};

use super::units::{average, bytes, rate, span};
use super::{DONE, FAILED, INCOMPLETE, error_value, exit_code, result_of};
use crate::args::CompareArgs;
use crate::out;
use crate::signals::Ending;

/// How much was compared.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counters {
    /// Bytes that both disks have.
    pub(crate) total: u64,
    /// Of these, how many were compared.
    pub(crate) settled: u64,
    /// Of these, how many lay in holes of both.
    pub(crate) holes: u64,
    pub(crate) elapsed: Duration,
}

/// A comparison that has ended.
pub(crate) struct Ended<'a> {
    pub(crate) args: &'a CompareArgs,
    pub(crate) found: &'a Result<Comparison, Error>,
    /// The signal that ended it.
    pub(crate) ending: Option<Ending>,
    pub(crate) counters: Counters,
}

impl Ended<'_> {
    /// Exit code of the program.
    pub(crate) fn exit_code(&self) -> u8 {
        match (self.found, self.ending) {
            (Ok(Comparison { difference: None, .. }), _) => DONE,
            (Ok(_), _) => INCOMPLETE,
            (Err(error), ending) if error.kind() == ErrorKind::Cancelled => {
                ending.map_or(FAILED, Ending::exit_code)
            }
            (Err(error), _) => exit_code(error),
        }
    }

    /// Messages on standard error.
    pub(crate) fn tell(&self) {
        match (self.found, self.ending) {
            (Err(error), Some(ending)) if error.kind() == ErrorKind::Cancelled => out::say(format_args!(
                "ended by {} after {} of {}",
                ending.name(),
                bytes(self.counters.settled),
                bytes(self.counters.total)
            )),
            (Err(error), _) => out::complain(error),
            (Ok(_), _) => {}
        }
    }

    /// The result for people; `None` when there is none.
    pub(crate) fn line(&self) -> Option<String> {
        let found = self.found.as_ref().ok()?;
        let (a, b) = (out::one_line(&self.args.a), out::one_line(&self.args.b));
        Some(match found.difference {
            None => {
                let Counters { holes, elapsed, .. } = self.counters;
                let holes = if holes > 0 { format!(", {} of it holes", bytes(holes)) } else { String::new() };
                format!(
                    "{a} and {b} are equal: {}{holes}, in {} ({})",
                    bytes(found.length_a.0),
                    span(elapsed),
                    rate(average(found.length_a.0, elapsed))
                )
            }
            Some(Difference { offset, bytes: Some((byte_a, byte_b)) }) => format!(
                "{a} and {b} differ, first at byte {offset} ({offset:#x}): {byte_a:#04x} and {byte_b:#04x}{}",
                lengths(found)
            ),
            Some(Difference { offset, bytes: None }) => {
                format!(
                    "{a} and {b} differ: equal up to byte {offset} ({offset:#x}), where {} ends{}",
                    if found.length_a < found.length_b { &a } else { &b },
                    lengths(found)
                )
            }
        })
    }

    /// The object for `--json`.
    pub(crate) fn json(&self) -> Value {
        let (result, error) = match self.found {
            Ok(Comparison { difference: None, .. }) => ("equal", None),
            Ok(_) => ("different", None),
            Err(error) if error.kind() == ErrorKind::Cancelled && self.ending.is_some() => {
                ("cancelled", None)
            }
            Err(error) => (result_of(error), Some(error)),
        };
        let found = self.found.as_ref().ok();
        let difference = found.and_then(|found| found.difference);
        let values = difference.and_then(|difference| difference.bytes);
        let Counters { total, settled, holes, elapsed } = self.counters;
        json!({
            "command": "compare",
            "result": result,
            "a": self.args.a,
            "b": self.args.b,
            "equal": found.map(|found| found.difference.is_none()),
            "first_difference": difference.map(|difference| difference.offset),
            "byte_a": values.map(|(a, _)| a),
            "byte_b": values.map(|(_, b)| b),
            "length_a": found.map(|found| found.length_a.0),
            "length_b": found.map(|found| found.length_b.0),
            "bytes": total,
            "done": settled,
            "holes": holes,
            "seconds": elapsed.as_secs_f64(),
            "rate": average(settled, elapsed),
            "signal": self.ending.map(Ending::name),
            "error": error.map(error_value),
            "exit_code": self.exit_code(),
        })
    }
}

/// What to add where the lengths differ.
fn lengths(found: &Comparison) -> String {
    let (a, b) = (found.length_a.0, found.length_b.0);
    if a == b { String::new() } else { format!("; lengths {a} and {b} bytes") }
}
