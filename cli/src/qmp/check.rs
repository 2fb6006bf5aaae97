//! Whether arguments fit the table; the first mistake, in the order of the table, as QEMU tells it.
//!
//! The table is as deep as it is, but for nodes that are made along with the node over them: of these there are [`MAX_NODES_DEEP`] one below
//! the other. What passes here may be decoded by code that takes memory or stack for each level.

use serde_json::Value;

use super::schema::{Harmless, Kind, Member, Object, Words};
use super::{Arguments, QmpError};

/// Most nodes that are made at once, one below the other.
const MAX_NODES_DEEP: usize = 8;

/// Check `arguments` against `object`.
///
/// # Errors
/// The first mistake: something missing, of the wrong type, refused, or unexpected.
pub fn check(object: &'static Object, arguments: &Arguments) -> Result<(), QmpError> {
    check_object(object, arguments, "", 1)
}

/// `nodes`: how many nodes it is deep, itself included, if it is one.
fn check_object(
    object: &'static Object,
    given: &Arguments,
    path: &str,
    nodes: usize,
) -> Result<(), QmpError> {
    let mut known: Vec<&str> = Vec::new();
    check_members(object.members, given, path, nodes, &mut known)?;
    if let Some(variants) = &object.variants {
        let tag = given.get(variants.tag).and_then(Value::as_str);
        let case = variants.cases.iter().find(|(word, _)| Some(*word) == tag);
        if let Some((_, case)) = case {
            check_members(case.members, given, path, nodes, &mut known)?;
        }
    }
    match given.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(QmpError::generic(format!("Parameter '{}' is unexpected", join(path, name)))),
    }
}

fn check_members(
    members: &'static [Member],
    given: &Arguments,
    path: &str,
    nodes: usize,
    known: &mut Vec<&'static str>,
) -> Result<(), QmpError> {
    for member in members {
        known.push(member.name);
        let path = join(path, member.name);
        match given.get(member.name) {
            None if member.required => {
                return Err(QmpError::generic(format!("Parameter '{path}' is missing")));
            }
            None => {}
            Some(value) => {
                check_value(member.kind, value, &path, nodes)?;
                if member.refused.is_some_and(|harmless| !is_harmless(harmless, value)) {
                    return Err(not_supported(&path, value));
                }
            }
        }
    }
    Ok(())
}

fn check_value(kind: Kind, value: &Value, path: &str, nodes: usize) -> Result<(), QmpError> {
    let expected = match (kind, value) {
        (Kind::Text, Value::String(_)) | (Kind::Bool, Value::Bool(_)) | (Kind::Any, _) => return Ok(()),
        (Kind::NodeOrName(_), Value::String(_)) => return Ok(()),
        (Kind::Int, value) if value.as_i64().is_some() => return Ok(()),
        (Kind::UInt32, value) if value.as_u64().is_some_and(|number| u32::try_from(number).is_ok()) => {
            return Ok(());
        }
        (Kind::Word(words), Value::String(word)) => return check_word(words, word, path),
        (Kind::NodeOrName(_), Value::Object(_)) if nodes == MAX_NODES_DEEP => {
            let text = format!(
                "Parameter '{path}': {MAX_NODES_DEEP} nodes are the most that are made at once; add the lower ones first"
            );
            return Err(QmpError::generic(text));
        }
        (Kind::NodeOrName(object), Value::Object(given)) => {
            return check_object(object, given, path, nodes + 1);
        }
        (Kind::Object(object), Value::Object(given)) => return check_object(object, given, path, nodes),
        (Kind::Array(kind), Value::Array(values)) => {
            let mut values = values.iter().enumerate();
            return values
                .try_for_each(|(at, value)| check_value(*kind, value, &format!("{path}[{at}]"), nodes));
        }
        (Kind::UInt32, Value::Number(_)) => {
            return Err(QmpError::generic(format!("Parameter '{}' expects uint32_t", leaf(path))));
        }
        (Kind::UInt32, _) => {
            return Err(QmpError::generic(format!("Parameter '{}' expects uint64", leaf(path))));
        }
        (Kind::Text | Kind::Word(_), _) => "string",
        (Kind::Int, _) => "integer",
        (Kind::Bool, _) => "boolean",
        (Kind::Object(_), _) => "object",
        (Kind::NodeOrName(_), _) => "BlockdevRef",
        (Kind::Array(_), _) => "array",
    };
    Err(QmpError::generic(format!("Invalid parameter type for '{path}', expected: {expected}")))
}

fn check_word(words: &Words, word: &str, path: &str) -> Result<(), QmpError> {
    if words.words.contains(&word) {
        return Ok(());
    }
    if words.refused.contains(&word) {
        return Err(QmpError::generic(format!("Parameter '{path}': '{word}' is not supported")));
    }
    Err(QmpError::generic(format!("Parameter '{}' does not accept value '{word}'", leaf(path))))
}

fn is_harmless(harmless: Harmless, value: &Value) -> bool {
    match harmless {
        Harmless::Nothing => false,
        Harmless::Bool(harmless) => value.as_bool() == Some(harmless),
        Harmless::Word(harmless) => value.as_str() == Some(harmless),
    }
}

fn not_supported(path: &str, value: &Value) -> QmpError {
    QmpError::generic(match value {
        Value::Bool(_) | Value::String(_) => format!("Parameter '{path}': {value} is not supported"),
        _ => format!("Parameter '{path}' is not supported"),
    })
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// The last member of a path, which is all that some messages name.
fn leaf(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::commands::find;
    use super::*;

    fn mistake(command: &str, arguments: Value) -> String {
        let Value::Object(arguments) = arguments else { panic!("an object") };
        let command = find(command).expect("a command");
        check(command.arguments, &arguments).expect_err("a mistake").text
    }

    #[test]
    fn the_first_mistake_in_the_order_of_the_table() {
        for (arguments, told) in [
            (json!({}), "Parameter 'device' is missing"),
            (json!({ "device": "s", "target": "t" }), "Parameter 'sync' is missing"),
            (json!({ "device": 1 }), "Invalid parameter type for 'device', expected: string"),
            (json!({ "device": "s", "sync": "weird" }), "Parameter 'sync' does not accept value 'weird'"),
            (
                json!({ "device": "s", "sync": "full", "speed": 1.5 }),
                "Invalid parameter type for 'speed', expected: integer",
            ),
            (json!({ "device": "s", "sync": "full" }), "Parameter 'target' is missing"),
            (
                json!({ "device": "s", "sync": "full", "target": "t", "foo": 1 }),
                "Parameter 'foo' is unexpected",
            ),
            (
                json!({ "device": "s", "sync": "full", "target": "t", "x-perf": { "max_workers": 1 } }),
                "Parameter 'x-perf.max_workers' is unexpected",
            ),
        ] {
            assert_eq!(mistake("blockdev-backup", arguments), told);
        }
    }

    #[test]
    fn what_qemu_knows_and_we_do_not_is_refused_by_name() {
        let backup = |more: Value| {
            let mut arguments = json!({ "device": "s", "sync": "full", "target": "t" });
            let more = more.as_object().expect("an object").clone();
            arguments.as_object_mut().expect("an object").extend(more);
            arguments
        };
        for (arguments, told) in [
            (json!({ "sync": "bitmap" }), "Parameter 'sync': 'bitmap' is not supported"),
            (json!({ "compress": true }), "Parameter 'compress': true is not supported"),
            (json!({ "discard-source": true }), "Parameter 'discard-source': true is not supported"),
            (json!({ "bitmap": "b" }), "Parameter 'bitmap': \"b\" is not supported"),
            (
                json!({ "x-perf": { "use-copy-range": true } }),
                "Parameter 'x-perf.use-copy-range': true is not supported",
            ),
        ] {
            assert_eq!(mistake("blockdev-backup", backup(arguments)), told);
        }
        let Value::Object(fine) = backup(json!({ "compress": false, "discard-source": false })) else {
            panic!()
        };
        assert_eq!(check(find("blockdev-backup").expect("there").arguments, &fine), Ok(()));
    }

    /// A node over so many others.
    fn tower(nodes: usize) -> Value {
        (1..nodes).fold(json!({ "driver": "null-co" }), |below, _| json!({ "driver": "raw", "file": below }))
    }

    #[test]
    fn nodes_are_made_a_few_at_a_time() {
        let Value::Object(fine) = tower(MAX_NODES_DEEP) else { panic!("an object") };
        assert_eq!(check(find("blockdev-add").expect("there").arguments, &fine), Ok(()));
        let told = format!(
            "Parameter '{}': 8 nodes are the most that are made at once; add the lower ones first",
            ["file"; 8].join(".")
        );
        for nodes in [MAX_NODES_DEEP + 1, 1020] {
            assert_eq!(mistake("blockdev-add", tower(nodes)), told, "{nodes}");
        }
    }

    #[test]
    fn paths_and_variants() {
        for (arguments, told) in [
            (json!({ "actions": 1 }), "Invalid parameter type for 'actions', expected: array"),
            (json!({ "actions": [1] }), "Invalid parameter type for 'actions[0]', expected: object"),
            (json!({ "actions": [{}] }), "Parameter 'actions[0].type' is missing"),
            (json!({ "actions": [{ "type": "weird" }] }), "Parameter 'type' does not accept value 'weird'"),
            (json!({ "actions": [{ "type": "abort" }] }), "Parameter 'actions[0].data' is missing"),
            (
                json!({ "actions": [{ "type": "abort", "data": { "x": 1 } }] }),
                "Parameter 'actions[0].data.x' is unexpected",
            ),
        ] {
            assert_eq!(mistake("transaction", arguments), told);
        }
        assert_eq!(mistake("blockdev-add", json!({ "driver": "file" })), "Parameter 'filename' is missing");
        let null = json!({ "driver": "null-co", "filename": "x" });
        assert_eq!(mistake("blockdev-add", null), "Parameter 'filename' is unexpected");
        let nested = json!({ "driver": "raw", "file": { "driver": "file", "filename": 1 } });
        let told = "Invalid parameter type for 'file.filename', expected: string";
        assert_eq!(mistake("blockdev-add", nested), told);
        let number = json!({ "driver": "raw", "file": 1 });
        assert_eq!(
            mistake("blockdev-add", number),
            "Invalid parameter type for 'file', expected: BlockdevRef"
        );
        let many = json!({ "addr": { "type": "unix", "data": { "path": "x" } }, "max-connections": -1 });
        assert_eq!(mistake("nbd-server-start", many), "Parameter 'max-connections' expects uint32_t");
    }
}
