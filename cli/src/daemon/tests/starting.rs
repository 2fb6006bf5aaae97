//! What comes while a job or an export is about to start.

use std::sync::atomic::{AtomicBool, Ordering};

use engine::live::LiveDisk;
use engine::units::ByteRange;

use super::*;

/// Begin a command, whose errand is under way then.
#[track_caller]
fn begin(fixture: &mut Fixture, command: &str, arguments: &Value) -> Carried {
    let arguments = arguments.as_object().expect("an object").clone();
    fixture.control.execute(command, &arguments).expect(command)
}

/// Wait until guests are held back: a start has prepared its targets, and looks for its instant.
#[track_caller]
fn await_barrier(disk: &LiveDisk) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let let_in = Arc::new(AtomicBool::new(false));
        let teller = Arc::clone(&let_in);
        disk.begin_write_with(ByteRange::new(0, 1), move |_permit| teller.store(true, Ordering::Relaxed));
        if !let_in.load(Ordering::Relaxed) {
            return;
        }
        assert!(Instant::now() < deadline, "no barrier");
    }
}

#[test]
fn a_cancel_that_was_accepted_is_no_job_that_completes() {
    let mut fixture = Fixture::new();
    let door = fixture.control.nodes.enter("s").expect("a reader more");
    let disk = door.open(&fixture.control.engine).expect("opened");
    let permit = disk.begin_write(ByteRange::new(0, 1)).expect("a permit");
    let started = begin(&mut fixture, "blockdev-backup", &Fixture::backup("j", "t", json!({})));
    await_barrier(&disk);
    fixture.ok("job-cancel", json!({ "id": "j" }));
    drop(permit);
    // It has time to complete before anybody hears that it has started.
    thread::sleep(Duration::from_millis(300));
    fixture.control.finish(started).expect("it has started");
    let told = fixture.until("j null");
    let wanted = ["j created", "j running", "j aborting", "j BLOCK_JOB_CANCELLED", "j concluded", "j null"];
    assert_eq!(told, wanted);
    assert!(fixture.contents("t") == vec![0; LENGTH], "it has copied");
}

#[test]
fn a_cancel_that_comes_too_late_for_a_job_that_seems_to_start_is_refused() {
    let mut fixture = Fixture::new();
    let started = begin(&mut fixture, "blockdev-backup", &Fixture::backup("j", "t", json!({})));
    let deadline = Instant::now() + Duration::from_secs(60);
    while fixture.contents("t") != fixture.contents("s") {
        assert!(Instant::now() < deadline, "nothing is copied");
    }
    while !fixture.control.engine.jobs().expect("it lives").is_empty() {
        assert!(Instant::now() < deadline, "it does not end");
    }
    // What the mailbox holds is not looked into.
    let start = fixture.control.starting("j").expect("as clients see it");
    start.cancel("j").expect_err("it has completed");
    fixture.control.finish(started).expect("it has started");
    let told = fixture.until("j null");
    assert!(told.contains(&"j BLOCK_JOB_COMPLETED".to_owned()), "{told:?}");
}

fn serve(fixture: &mut Fixture) {
    let socket = fixture.there.path().join("nbd.sock").display().to_string();
    fixture.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } }));
}

/// Each a raw node over the file node of `s`.
fn two_over_one(fixture: &mut Fixture) -> (Value, Value) {
    let path = |name: &str| fixture.there.path().join(name).display().to_string();
    let bottom = json!({ "driver": "file", "node-name": "f0", "filename": path("s") });
    let other =
        json!({ "driver": "raw", "node-name": "A", "file": { "driver": "file", "filename": path("u") } });
    fixture.ok("blockdev-add", bottom);
    for name in ["A", "B"] {
        fixture.ok("blockdev-add", json!({ "driver": "raw", "node-name": name, "file": "f0" }));
    }
    (json!({ "type": "nbd", "id": "e", "node-name": "A" }), other)
}

#[test]
fn a_node_that_is_about_to_be_exported_stays() {
    let mut fixture = Fixture::new();
    serve(&mut fixture);
    let (export, other) = two_over_one(&mut fixture);
    let under_way = begin(&mut fixture, "block-export-add", &export);
    // The mailbox is not looked into.
    let refused = fixture.control.nodes.remove("A").expect_err("it is about to be exported");
    assert_eq!(refused.text, "Node A is in use");
    fixture.control.finish(under_way).expect("it is exported");
    fixture.ok("block-export-del", json!({ "id": "e" }));
    fixture.until("e BLOCK_EXPORT_DELETED");
    fixture.ok("blockdev-del", json!({ "node-name": "A" }));
    fixture.ok("blockdev-add", other);
    // One that comes to nothing holds nothing.
    let under_way = begin(&mut fixture, "block-export-add", &export);
    fixture.control.stop_server().expect("it runs");
    fixture.control.finish(under_way).expect_err("there is no server");
    fixture.ok("blockdev-del", json!({ "node-name": "A" }));
}

#[test]
fn a_filter_that_goes_while_it_is_about_to_be_exported_is_not_taken_for_another_node() {
    let mut fixture = Fixture::new();
    serve(&mut fixture);
    fixture.control.nodes.add_filter("F", "s");
    let export = json!({ "type": "nbd", "id": "e", "node-name": "F" });
    let under_way = begin(&mut fixture, "block-export-add", &export);
    fixture.control.nodes.remove_filter("F");
    let other = json!({ "driver": "null-co", "node-name": "F" });
    let other = NodeOptions::of(other.as_object().expect("an object")).expect("options");
    fixture.control.nodes.add(&other, None).expect("added");
    let refused = fixture.control.finish(under_way).expect_err("it is not what was asked for");
    assert_eq!(refused.text, "Cannot find device='' nor node-name='F'");
    assert!(fixture.books.0.borrow().exports.is_empty());
    fixture.ok("blockdev-del", json!({ "node-name": "s" }));
}
