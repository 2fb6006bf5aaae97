use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::qmp::{Limits, Reader};

fn there() -> TempDir {
    let there = tempfile::tempdir().expect("a directory");
    for (name, length) in [("a.img", 1 << 20), ("b.img", 4097)] {
        std::fs::write(there.path().join(name), vec![1; length]).expect("written");
    }
    there
}

fn path(there: &TempDir, name: &str) -> String {
    there.path().join(name).display().to_string()
}

fn add(nodes: &mut Nodes, options: Value) -> Result<(), String> {
    let options = NodeOptions::of(options.as_object().expect("an object"));
    options.and_then(|options| nodes.open_and_add(&options)).map_err(|error| error.text)
}

fn file(there: &TempDir, name: &str, node: &str) -> Value {
    json!({ "driver": "file", "filename": path(there, name), "node-name": node })
}

#[test]
fn raw_nodes_stand_on_others_by_name_or_along_with_them() {
    let there = there();
    let mut nodes = Nodes::default();
    add(&mut nodes, file(&there, "a.img", "a")).expect("added");
    add(&mut nodes, json!({ "driver": "raw", "node-name": "ra", "file": "a" })).expect("added");
    let below = json!({ "driver": "file", "filename": path(&there, "b.img") });
    add(&mut nodes, json!({ "driver": "raw", "node-name": "rb", "file": below })).expect("added");
    assert_eq!(nodes.bottom_of("ra").as_deref(), Ok("a"));
    assert_eq!(nodes.length_of("rb"), Ok(4097));
    let told = nodes.query();
    let names: Vec<&str> =
        told.as_array().expect("an array").iter().map(|n| n["node-name"].as_str().expect("named")).collect();
    assert_eq!(names, ["rb", "#block001", "ra", "a"]);
    assert_eq!(told[0]["image"]["virtual-size"], 4097);
    assert_eq!(told[0]["drv"], "raw");

    let error = nodes.remove("a").expect_err("something stands on it");
    assert_eq!(error.text, "Block device a is in use");
    nodes.remove("ra").expect("removed");
    nodes.remove("a").expect("removed");
    nodes.remove("rb").expect("removed");
    assert_eq!(nodes.query(), json!([]), "the one made along with it is gone, too");
    assert_eq!(nodes.remove("a").expect_err("gone").text, "Failed to find node with node-name='a'");
}

fn names(nodes: &Nodes) -> Vec<String> {
    let told = nodes.query();
    let name = |node: &Value| node["node-name"].as_str().expect("named").to_owned();
    told.as_array().expect("an array").iter().map(name).collect()
}

#[test]
fn what_was_made_along_with_a_node_stays_while_another_stands_on_it() {
    let there = there();
    let mut nodes = Nodes::default();
    let below = json!({ "driver": "file", "filename": path(&there, "a.img") });
    let raw = |name: &str, file: Value| json!({ "driver": "raw", "node-name": name, "file": file });
    add(&mut nodes, raw("first", below.clone())).expect("added");
    add(&mut nodes, raw("second", json!("#block001"))).expect("added");
    nodes.remove("first").expect("removed");
    assert_eq!(names(&nodes), ["second", "#block001"]);
    assert_eq!(nodes.length_of("second"), Ok(1 << 20));
    nodes.remove("second").expect("removed");
    assert_eq!(names(&nodes), [""; 0], "it goes with the last");
    // All that was made along with it, one on the other.
    let between = json!({ "driver": "raw", "file": below });
    add(&mut nodes, raw("top", between.clone())).expect("added");
    assert_eq!(names(&nodes), ["top", "#block003", "#block002"]);
    nodes.remove("top").expect("removed");
    assert_eq!(names(&nodes), [""; 0]);
    add(&mut nodes, raw("top", between)).expect("added");
    add(&mut nodes, raw("beside", json!("#block004"))).expect("added");
    nodes.remove("top").expect("removed");
    assert_eq!(names(&nodes), ["beside", "#block004"]);
}

#[test]
fn nothing_stands_on_the_filter_of_a_job() {
    let there = there();
    let mut nodes = Nodes::default();
    add(&mut nodes, file(&there, "a.img", "a")).expect("added");
    nodes.add_filter("filter", "a");
    let over = json!({ "driver": "raw", "node-name": "over", "file": "filter" });
    assert_eq!(add(&mut nodes, over).expect_err("it goes with its job"), busy("filter").text);
    nodes.remove_filter("filter");
    assert_eq!(names(&nodes), ["a"]);
}

/// A path in `there` of some 4,000 letters, and what is below it made; a file with quotes in its name.
fn long_path(there: &TempDir, letter: &str) -> String {
    let part = letter.repeat(200);
    let parts = (4000 - there.path().as_os_str().len()) / 201;
    let directory = there.path().join(vec![part; parts - 1].join("/"));
    std::fs::create_dir_all(&directory).expect("made");
    let file = directory.join("\"".repeat(200));
    std::fs::write(&file, [1; 4096]).expect("written");
    file.display().to_string()
}

#[test]
fn a_path_that_takes_too_much_to_tell_is_refused() {
    let there = there();
    let mut nodes = Nodes::default();
    let file =
        |letter: &str| json!({ "driver": "file", "filename": long_path(&there, letter), "node-name": "a" });
    let told = add(&mut nodes, file("\u{1}")).expect_err("six bytes for each letter");
    assert!(told.ends_with("the path is too long to be told"), "{told}");
    add(&mut nodes, file("x")).expect("added");
    let told = nodes.query().to_string();
    assert!((8000..2 * MAX_PATH_TEXT + MAX_NODE_TEXT).contains(&told.len()), "{}", told.len());
}

/// The answer to `query-named-block-nodes` of as many nodes as there may be.
#[test]
fn our_client_reads_what_all_nodes_come_to() {
    let there = there();
    let mut nodes = Nodes::default();
    let below = json!({ "driver": "file", "filename": long_path(&there, "x") });
    let name = "n".repeat(MAX_NODE_NAME);
    add(&mut nodes, json!({ "driver": "raw", "node-name": name, "file": below })).expect("added");
    let two = nodes.query();
    let all: Vec<Value> = two.as_array().expect("an array").iter().cycle().take(MAX_NODES).cloned().collect();
    let answer = json!({ "return": all });
    let text = answer.to_string();
    let read = Reader::new(Limits::REPLY).next(&mut text.as_bytes());
    assert!(read == Some(Ok(answer)), "{} bytes", text.len());
    // Twice as many would do as well, and no client may ask for as much.
    assert!(text.matches([',', ':', '{', '}', '[', ']']).count() * 2 * 2 < Limits::REPLY.tokens);
    assert!(Reader::new(Limits::REQUEST).next(&mut text.as_bytes()).is_some_and(|read| read.is_err()));
}

#[test]
fn what_cannot_be_a_node() {
    let there = there();
    let mut nodes = Nodes::default();
    add(&mut nodes, file(&there, "a.img", "a")).expect("added");
    let directory = there.path().display().to_string();
    let with = |mut options: Value, name: &str, value: Value| {
        options[name] = value;
        options
    };
    let good = || file(&there, "a.img", "x");
    for (options, told) in [
        (
            json!({ "driver": "file", "filename": path(&there, "a.img") }),
            "'node-name' must be specified for the root node".into(),
        ),
        (
            file(&there, "none", "x"),
            format!("Could not open '{}': No such file or directory", path(&there, "none")),
        ),
        (file(&there, "a.img", "a"), "Duplicate nodes with node-name='a'".into()),
        (file(&there, "a.img", "1bad"), "Invalid node-name: '1bad'".into()),
        (file(&there, "a.img", ""), "Invalid node-name: ''".into()),
        (file(&there, "a.img", &"x".repeat(32)), "Node name too long".into()),
        (with(good(), "filename", json!(directory)), format!("Could not open '{directory}': Is a directory")),
        (
            with(good(), "filename", json!("/dev/null")),
            "'file' driver requires '/dev/null' to be a regular file".into(),
        ),
        (
            with(good(), "driver", json!("host_device")),
            format!(
                "'host_device' driver requires '{}' to be either a character or block device",
                path(&there, "a.img")
            ),
        ),
        (
            with(good(), "aio", json!("native")),
            "aio=native was specified, but it requires cache.direct=on, which was not specified.".into(),
        ),
        (with(good(), "locking", json!("off")), "Parameter 'locking': \"off\" is not supported".into()),
        (
            json!({ "driver": "raw", "node-name": "x", "file": "none" }),
            "Cannot find device='none' nor node-name='none'".into(),
        ),
        (
            json!({ "driver": "raw", "node-name": "a", "file": file(&there, "b.img", "below") }),
            "Duplicate nodes with node-name='a'".into(),
        ),
        (
            json!({ "driver": "null-co", "node-name": "x", "size": -1 }),
            "Parameter 'size' expects a non-negative value".into(),
        ),
    ] {
        assert_eq!(add(&mut nodes, options.clone()), Err(told), "{options}");
        assert_eq!(nodes.nodes.len(), 1, "nothing is left of what failed: {options}");
    }
    let native = with(with(good(), "aio", json!("native")), "cache", json!({ "direct": true }));
    add(&mut nodes, native).expect("added");
}

#[test]
fn null_and_read_only() {
    let there = there();
    let mut nodes = Nodes::default();
    add(&mut nodes, json!({ "driver": "null-co", "node-name": "n" })).expect("added");
    assert_eq!(nodes.length_of("n"), Ok(1 << 30));
    let mut options = file(&there, "a.img", "ro");
    options["read-only"] = true.into();
    add(&mut nodes, options).expect("added");
    assert_eq!(nodes.is_read_only("ro"), Ok(true));
    let above = json!({ "driver": "raw", "node-name": "x", "file": "ro" });
    assert_eq!(add(&mut nodes, above), Err("Block node is read-only".into()));
    let above = json!({ "driver": "raw", "node-name": "x", "file": "ro", "auto-read-only": true });
    add(&mut nodes, above).expect("added");
    assert_eq!(nodes.is_read_only("x"), Ok(true));
}

#[test]
fn discards_are_passed_on_unless_they_are_to_be_ignored() {
    let there = there();
    let mut nodes = Nodes::default();
    for (name, above, below, trim) in [
        ("a", None, None, true),
        ("b", Some("unmap"), Some("unmap"), true),
        ("c", Some("ignore"), None, false),
        ("d", Some("ignore"), Some("unmap"), false),
        ("e", Some("unmap"), Some("ignore"), false),
    ] {
        let with = |mut options: Value, discard: Option<&str>| {
            if let Some(discard) = discard {
                options["discard"] = discard.into();
            }
            options
        };
        let file = with(json!({ "driver": "file", "filename": path(&there, "a.img") }), below);
        let raw = json!({ "driver": "raw", "node-name": name, "file": file });
        add(&mut nodes, with(raw, above)).expect("added");
        assert_eq!(nodes.may_trim(name), Ok(trim), "{name}");
    }
    // It is each node's own: one over the same disk may do what another may not.
    let beside = json!({ "driver": "raw", "node-name": "beside", "file": "#block004" });
    add(&mut nodes, beside).expect("added");
    assert_eq!((nodes.may_trim("d"), nodes.may_trim("beside")), (Ok(false), Ok(true)));
}

#[test]
fn a_disk_that_was_replaced_is_not_taken_for_the_one_that_was_added() {
    let there = there();
    let mut nodes = Nodes::default();
    add(&mut nodes, file(&there, "a.img", "a")).expect("added");
    std::fs::rename(there.path().join("b.img"), there.path().join("a.img")).expect("renamed");
    let error = nodes.site_of("a").expect("there").check().expect_err("it is another file");
    assert!(error.text.contains("another file has taken its place"), "{error}");
}

#[test]
fn a_disk_leaves_the_engine_with_its_last_reader() {
    let there = there();
    let engine = engine::live::Engine::start(&engine::live::EngineOptions::default()).expect("an engine");
    let mut nodes = Nodes::default();
    let options = NodeOptions::of_path("a", &path(&there, "a.img")).expect("options");
    nodes.open_and_add(&options).expect("added");
    let bottom = nodes.bottom_of("a").expect("there");
    let door = nodes.enter("a").expect("used");
    assert!(door.opened().is_none());
    door.open(&engine).expect("opened");
    let again = nodes.enter("a").expect("used again");
    assert!(again.opened().is_some(), "it is opened once");
    drop((door, again));
    assert_eq!(nodes.remove("a").expect_err("in use").text, "Block device a is in use");
    nodes.release(&bottom);
    assert_eq!(nodes.is_read("a"), Ok(true));
    nodes.release(&bottom);
    assert_eq!(nodes.is_read("a"), Ok(false));
    nodes.set_target(&bottom, true);
    assert_eq!(nodes.enter("a").expect_err("a target").text, busy("a").text);
    assert_eq!(nodes.remove("a").expect_err("a target").text, busy("a").text);
    nodes.set_target(&bottom, false);
    nodes.remove("a").expect("removed");
    assert!(Path::new(&path(&there, "a.img")).exists());
}

/// Stands for a file whose server does not answer: a socket that is not closed before what was sent is there, or for ten seconds.
fn slow_to_close() -> (std::net::TcpStream, std::fs::File) {
    use std::io::Write;

    use nix::sys::socket::{setsockopt, sockopt};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let mut ours =
        std::net::TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
    let (theirs, _) = listener.accept().expect("accepted");
    ours.set_nonblocking(true).expect("set");
    while ours.write(&[0; 1 << 16]).is_ok() {}
    setsockopt(&ours, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 10 }).expect("set");
    (theirs, std::os::fd::OwnedFd::from(ours).into())
}

#[test]
fn what_is_not_added_is_closed_aside() {
    let mut nodes = Nodes::default();
    let there = there();
    add(&mut nodes, file(&there, "a.img", "a")).expect("added");
    let below = json!({ "driver": "file", "filename": path(&there, "b.img") });
    for options in [file(&there, "b.img", "a"), json!({ "driver": "raw", "node-name": "a", "file": below })] {
        let (_reader, file) = slow_to_close();
        let opened = Opened { site: Site::null(7), length: 7, file: Kept::new(file), read_only: false };
        let options = NodeOptions::of(options.as_object().expect("an object")).expect("options");
        let start = std::time::Instant::now();
        let refused = nodes.add(&options, Some(opened)).expect_err("its name is taken");
        assert_eq!(refused.text, "Duplicate nodes with node-name='a'");
        assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
        // Nor is it opened, where that is known before.
        assert_eq!(nodes.may_add(&options).expect_err("known").text, refused.text);
    }
}

#[test]
fn room_for_all_of_a_node_is_looked_for_before_it_is_opened() {
    let mut nodes = Nodes::default();
    for number in 0..MAX_NODES - 1 {
        add(&mut nodes, json!({ "driver": "null-co", "node-name": format!("n{number}") })).expect("room");
    }
    let of = |options: Value| NodeOptions::of(options.as_object().expect("an object")).expect("options");
    let below = json!({ "driver": "file", "filename": "/none" });
    let two = of(json!({ "driver": "raw", "node-name": "two", "file": below }));
    assert_eq!(nodes.may_add(&two).expect_err("too many").text, "1024 nodes are the most; delete some");
    nodes.may_add(&of(json!({ "driver": "raw", "node-name": "one", "file": "n0" }))).expect("room for one");
}
