//! How a command ended, in words for people and as one JSON object for programs.
//!
//! Both are made from the same result by the module of the command; here is what they share.

pub(crate) mod backup;
pub(crate) mod compare;
pub(crate) mod copy;
pub(crate) mod demo;
pub(crate) mod info;
pub(crate) mod latencies;
pub(crate) mod units;

use engine::error::{Error, ErrorKind, Refusal};
use engine::units::ByteRange;
use nix::errno::Errno;
use serde_json::{Value, json};

use crate::out;

/// Done.
pub(crate) const DONE: u8 = 0;
/// Failed.
pub(crate) const FAILED: u8 = 1;
/// Wrong usage, or refused before anything was touched.
pub(crate) const REFUSED: u8 = 2;
/// Complete but for skipped ranges; or a comparison found a difference.
pub(crate) const INCOMPLETE: u8 = 3;

/// Exit code of an error.
pub(crate) fn exit_code(error: &Error) -> u8 {
    if error.is_refusal() { REFUSED } else { FAILED }
}

/// `result` of an error.
pub(crate) fn result_of(error: &Error) -> &'static str {
    if error.is_refusal() { "refused" } else { "failed" }
}

/// Print `object` on standard output; gives the exit code, which is a failure when it cannot be delivered.
pub(crate) fn deliver(object: &Value, exit_code: u8) -> u8 {
    match out::print(format!("{object}\n").as_bytes()) {
        Ok(()) => exit_code,
        Err(undelivered) => {
            out::complain(undelivered);
            exit_code.max(FAILED)
        }
    }
}

/// An error with all its parts.
pub(crate) fn error_value(error: &Error) -> Value {
    let cause = std::error::Error::source(error);
    json!({
        "message": error.to_string(),
        "kind": kind_name(error.kind()),
        "operation": error.operation().verb(),
        "path": error.path(),
        "range": error.range().map(range_value),
        "reason": error.reason(),
        "advice": error.advice(),
        "errno": cause.and_then(|cause| cause.downcast_ref::<Errno>()).map(|errno| format!("{errno:?}")),
    })
}

/// A range of bytes.
pub(crate) fn range_value(range: ByteRange) -> Value {
    json!({ "offset": range.offset, "length": range.length })
}

fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Refused(refusal) => refusal_name(refusal),
        ErrorKind::MapRefused => "map_refused",
        ErrorKind::Io(_) => "io",
        ErrorKind::NoSpace => "no_space",
        ErrorKind::SourceShrank => "source_shrank",
        ErrorKind::SourceChanged => "source_changed",
        ErrorKind::TargetLost => "target_lost",
        ErrorKind::VerifyMismatch => "verify_mismatch",
        ErrorKind::FlushFailed(_) => "flush_failed",
        ErrorKind::Cancelled => "cancelled",
        ErrorKind::TimedOut => "timed_out",
        ErrorKind::EngineDied => "engine_died",
        _ => "other",
    }
}

fn refusal_name(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::BadArgument => "bad_argument",
        Refusal::NotFound => "not_found",
        Refusal::PermissionDenied => "permission_denied",
        Refusal::NotADisk => "not_a_disk",
        Refusal::Exists => "exists",
        Refusal::SameDisk => "same_disk",
        Refusal::TooSmall => "too_small",
        Refusal::TooLarge => "too_large",
        Refusal::InUse => "in_use",
        Refusal::ReadOnly => "read_only",
        Refusal::Unsupported => "unsupported",
        Refusal::Unavailable => "unavailable",
        _ => "refused",
    }
}
