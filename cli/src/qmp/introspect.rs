//! The table of commands as `query-commands` and `query-qmp-schema` show it.
//!
//! Types other than the built-in ones have numbers for names, as QEMU has them: a client finds its way from a command or an event by the
//! references alone.

use serde_json::{Value, json};

use super::commands::{COMMANDS, EVENTS};
use super::schema::{Kind, Member, Object, Words};

/// The reply to `query-commands`.
#[must_use]
pub fn query_commands() -> Value {
    COMMANDS.iter().map(|command| json!({ "name": command.name })).collect()
}

/// The reply to `query-qmp-schema`.
#[must_use]
pub fn query_qmp_schema() -> Value {
    let mut listing = Listing::default();
    for (name, json_type) in
        [("str", "string"), ("int", "int"), ("bool", "boolean"), ("any", "value"), ("null", "null")]
    {
        listing.entries.push(json!({ "name": name, "meta-type": "builtin", "json-type": json_type }));
    }
    for command in COMMANDS {
        let arguments = listing.object(command.arguments);
        let returns = listing.kind(command.returns);
        listing.entries.push(json!({
            "name": command.name, "meta-type": "command", "arg-type": arguments, "ret-type": returns,
        }));
    }
    for event in EVENTS {
        let data = listing.object(event.data);
        listing.entries.push(json!({ "name": event.name, "meta-type": "event", "arg-type": data }));
    }
    Value::Array(listing.entries)
}

#[derive(Default)]
struct Listing {
    entries: Vec<Value>,
    /// Where what was listed is in the table, and its name.
    objects: Vec<(*const Object, String)>,
    words: Vec<(*const Words, String)>,
    arrays: Vec<String>,
    references: Vec<(*const Object, String)>,
    next: usize,
}

impl Listing {
    fn number(&mut self) -> String {
        self.next += 1;
        self.next.to_string()
    }

    /// The name of a type, which is listed with all that it refers to.
    fn kind(&mut self, kind: Kind) -> String {
        match kind {
            Kind::Text => "str".into(),
            Kind::Int | Kind::UInt32 => "int".into(),
            Kind::Bool => "bool".into(),
            Kind::Any => "any".into(),
            Kind::Word(words) => self.words(words),
            Kind::Object(object) => self.object(object),
            Kind::Array(of) => {
                let element = self.kind(*of);
                let name = format!("[{element}]");
                if !self.arrays.contains(&name) {
                    self.entries.push(json!({ "name": name, "meta-type": "array", "element-type": element }));
                    self.arrays.push(name.clone());
                }
                name
            }
            Kind::NodeOrName(object) => self.reference(object),
        }
    }

    fn words(&mut self, words: &'static Words) -> String {
        let found = self.words.iter().find(|(seen, _)| std::ptr::eq(*seen, words));
        if let Some((_, name)) = found {
            return name.clone();
        }
        let name = self.number();
        self.words.push((words, name.clone()));
        let members: Vec<Value> = words.words.iter().map(|word| json!({ "name": word })).collect();
        self.entries.push(json!({
            "name": name, "meta-type": "enum", "members": members, "values": words.words,
        }));
        name
    }

    fn reference(&mut self, object: &'static Object) -> String {
        let found = self.references.iter().find(|(seen, _)| std::ptr::eq(*seen, object));
        if let Some((_, name)) = found {
            return name.clone();
        }
        let name = self.number();
        self.references.push((object, name.clone()));
        let made = self.object(object);
        self.entries.push(json!({
            "name": name, "meta-type": "alternate", "members": [{ "type": made }, { "type": "str" }],
        }));
        name
    }

    fn object(&mut self, object: &'static Object) -> String {
        let found = self.objects.iter().find(|(seen, _)| std::ptr::eq(*seen, object));
        if let Some((_, name)) = found {
            return name.clone();
        }
        let name = self.number();
        // Named before its members are listed: it may hold itself.
        self.objects.push((object, name.clone()));
        let members: Vec<Value> =
            object.members.iter().filter(|member| member.refused.is_none()).map(|m| self.member(m)).collect();
        let mut entry = json!({ "name": name, "meta-type": "object", "members": members });
        if let Some(variants) = &object.variants {
            let cases: Vec<Value> = variants
                .cases
                .iter()
                .map(|(word, case)| json!({ "case": word, "type": self.object(case) }))
                .collect();
            entry["tag"] = variants.tag.into();
            entry["variants"] = cases.into();
        }
        self.entries.push(entry);
        name
    }

    fn member(&mut self, member: &Member) -> Value {
        let mut entry = json!({ "name": member.name, "type": self.kind(member.kind) });
        if !member.required {
            entry["default"] = Value::Null;
        }
        if member.name.starts_with("x-") {
            entry["features"] = json!(["unstable"]);
        }
        entry
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_reference_leads_somewhere() {
        let schema = query_qmp_schema();
        let entries = schema.as_array().expect("an array");
        let by_name: BTreeMap<&str, &Value> =
            entries.iter().map(|entry| (entry["name"].as_str().expect("named"), entry)).collect();
        assert_eq!(by_name.len(), entries.len(), "names are there once");
        let mut references = 0;
        for entry in entries {
            let direct = ["arg-type", "ret-type", "element-type"].map(|name| &entry[name]);
            let members = ["members", "variants"].map(|list| entry[list].as_array()).into_iter().flatten();
            for reference in direct.into_iter().chain(members.flatten().map(|member| &member["type"])) {
                if let Some(name) = reference.as_str() {
                    assert!(by_name.contains_key(name), "{name} in {entry}");
                    references += 1;
                }
            }
            if let Some(tag) = entry.get("tag") {
                let tagged = entry["members"].as_array().expect("members").iter().find(|m| m["name"] == *tag);
                let words = by_name[tagged.expect("the tag is a member")["type"].as_str().expect("a type")];
                for case in entry["variants"].as_array().expect("variants") {
                    assert!(words["values"].as_array().expect("words").contains(&case["case"]), "{case}");
                }
            }
        }
        assert!(references > 100, "{references}");
    }

    #[test]
    fn shows_what_clients_look_for() {
        let schema = query_qmp_schema();
        let entry = |name: &str| {
            let mut entries = schema.as_array().expect("an array").iter();
            entries.find(|entry| entry["name"] == name).unwrap_or_else(|| panic!("{name} is missing"))
        };
        let arguments = entry(entry("blockdev-backup")["arg-type"].as_str().expect("a type"));
        let has =
            |name: &str| arguments["members"].as_array().expect("members").iter().any(|m| m["name"] == name);
        assert!(has("target") && has("on-cbw-error") && has("auto-dismiss"));
        // A client that finds them would use them.
        assert!(!has("bitmap") && !has("compress"));
        let completed = entry(entry("BLOCK_JOB_COMPLETED")["arg-type"].as_str().expect("a type"));
        assert!(completed["members"].to_string().contains("offset"));
        let names = query_commands();
        assert!(names.as_array().expect("an array").contains(&json!({ "name": "query-qmp-schema" })));
    }
}
