//! What clients may make the daemon tell of.

use serde_json::json;

use super::super::nodes::MAX_ID;
use super::Fixture;

#[test]
fn ids_of_jobs_have_a_longest() {
    let mut fixture = Fixture::new();
    let (longest, longer) = ("j".repeat(MAX_ID), "j".repeat(MAX_ID + 1));
    let backup = |id: &str, target: &str| Fixture::backup(id, target, json!({}));
    fixture.refused("blockdev-backup", backup(&longer, "t"), "Job ID too long");
    let path = fixture.there.path().join("new").display().to_string();
    let onto_path = json!({ "job-id": longer, "device": "s", "path": path, "sync": "full" });
    fixture.refused("x-backup", onto_path, "Job ID too long");
    assert!(fixture.events.is_empty(), "nobody hears of it: {:?}", fixture.events);
    let action = |id: &str, target: &str| json!({ "type": "blockdev-backup", "data": backup(id, target) });
    let actions = json!([action("a", "t"), action(&longer, "u")]);
    fixture.refused("transaction", json!({ "actions": actions }), "Job ID too long");
    assert_eq!(fixture.until("a null"), ["a created", "a aborting", "a concluded", "a null"]);
    fixture.ok("blockdev-backup", backup(&longest, "t"));
    fixture.until(&format!("{longest} null"));
    assert!(fixture.contents("t") == fixture.contents("s"));
}

#[test]
fn ids_of_exports_have_a_longest() {
    let mut fixture = Fixture::new();
    let socket = fixture.there.path().join("nbd.sock").display().to_string();
    fixture.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } }));
    let export = |bytes: usize| json!({ "type": "nbd", "id": "e".repeat(bytes), "node-name": "s" });
    fixture.refused("block-export-add", export(MAX_ID + 1), "Block export id too long");
    assert_eq!(fixture.ok("query-block-exports", json!({})), json!([]));
    fixture.ok("block-export-add", export(MAX_ID));
    let shown = fixture.ok("query-block-exports", json!({}));
    assert_eq!(shown[0]["id"].as_str().map(str::len), Some(MAX_ID));
}
