//! The end of a backup as the JSON object: the fields of a copy's, as far as the daemon tells them, and what guests felt.
//!
//! QMP's names have dashes; here they have what all our objects have.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::units::average;

/// A backup that has ended, or did not begin.
#[derive(Clone, Copy)]
pub(crate) struct Ended<'a> {
    pub(crate) disk: &'a str,
    pub(crate) target: &'a str,
    pub(crate) result: &'a str,
    /// Why it is no success.
    pub(crate) error: Option<&'a str>,
    /// The signal that ended it.
    pub(crate) signal: Option<&'a str>,
    /// The data of the job's last event; `null` where there was none.
    pub(crate) last: &'a Value,
    pub(crate) exit_code: u8,
}

/// The object for `--json`.
pub(crate) fn json(ended: &Ended<'_>) -> Value {
    let report = &ended.last["x-report"];
    let count = |name: &str| report[name].as_u64().unwrap_or(0);
    let seconds = report["seconds"].as_f64().unwrap_or(0.0);
    // Another daemon tells no more than whole clusters.
    let bytes = report["total"].as_u64().or_else(|| ended.last["len"].as_u64()).unwrap_or(0);
    let time = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    json!({
        "command": "backup", "result": ended.result, "disk": ended.disk, "target": ended.target,
        "bytes": bytes, "done": count("done"), "copied": count("copied"), "zeros": count("zeros"),
        "holes": count("holes"), "skipped_bytes": count("skipped-bytes"),
        "skipped_ranges": count("skipped-ranges"), "skipped": skipped_of(&report["skipped"]),
        "retries": count("retries"), "seconds": seconds, "rate": average(count("done"), time),
        "signal": ended.signal, "notices": list(&report["notices"]), "guests": in_our_style(&report["guests"]),
        "error": ended.error.map(|message| error_of(message, ended.result)),
        "exit_code": ended.exit_code,
    })
}

/// An error with all the parts of a copy's: the daemon tells it in one line.
fn error_of(message: &str, result: &str) -> Value {
    let kind = match result {
        "refused" | "cancelled" => result,
        _ => "other",
    };
    json!({
        "message": message, "kind": kind, "operation": null, "path": null, "range": null, "reason": null,
        "advice": null, "errno": null,
    })
}

fn list(told: &Value) -> Value {
    if told.is_array() { told.clone() } else { json!([]) }
}

/// Ranges as a copy lists them.
fn skipped_of(told: &Value) -> Value {
    let one = |skipped: &Value| {
        let range = &skipped["range"];
        json!({ "offset": range["offset"], "length": range["length"], "error": skipped["error"] })
    };
    told.as_array().into_iter().flatten().map(one).collect()
}

/// The same with other names.
fn in_our_style(told: &Value) -> Value {
    match told {
        Value::Object(members) => {
            let renamed = members.iter().map(|(name, value)| (name.replace('-', "_"), in_our_style(value)));
            Value::Object(renamed.collect::<Map<_, _>>())
        }
        Value::Array(values) => values.iter().map(in_our_style).collect(),
        plain => plain.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(last: &Value) -> Ended<'_> {
        Ended { disk: "vda", target: "b", result: "complete", error: None, signal: None, last, exit_code: 0 }
    }

    #[test]
    fn names_are_those_of_a_copy() {
        let last = json!({ "len": 131_072, "x-report": {
            "total": 100_000, "done": 90_000, "skipped-bytes": 10_000, "skipped-ranges": 1, "seconds": 2.0,
            "skipped": [{ "range": { "offset": 4096, "length": 10_000 }, "error": "cannot read it" }],
            "guests": { "before": { "histogram": [{ "up-to": 4.0, "requests": 1 }] } },
        } });
        let object = json(&ended(&last));
        assert_eq!((&object["bytes"], &object["skipped_bytes"]), (&json!(100_000), &json!(10_000)));
        let skipped = json!([{ "offset": 4096, "length": 10_000, "error": "cannot read it" }]);
        assert_eq!((&object["skipped"], &object["rate"]), (&skipped, &json!(45_000)));
        assert_eq!(object["guests"]["before"]["histogram"][0]["up_to"], 4.0);
        assert!(!object.to_string().contains("up-to") && object.get("report").is_none(), "{object}");
    }

    #[test]
    fn an_error_has_all_its_parts_and_another_daemon_tells_less() {
        let nothing = Value::Null;
        let refused = Ended { result: "refused", error: Some("no"), exit_code: 2, ..ended(&nothing) };
        let error = &json(&refused)["error"];
        assert_eq!((&error["message"], &error["kind"]), (&json!("no"), &json!("refused")));
        for part in ["operation", "path", "range", "reason", "advice", "errno"] {
            assert_eq!(error.get(part), Some(&Value::Null), "{part}");
        }
        for strange in [
            json!({ "len": 1 }),
            json!({ "x-report": "none" }),
            json!({ "x-report": { "skipped": 3, "seconds": -1 } }),
        ] {
            let object = json(&ended(&strange));
            assert_eq!((&object["skipped"], &object["error"]), (&json!([]), &Value::Null), "{strange}");
        }
    }
}
