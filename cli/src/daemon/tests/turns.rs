//! Whose turn it is among clients.

use super::*;

/// A client that has negotiated, and what it is told.
fn connect(socket: &Path) -> (UnixStream, impl Iterator<Item = Value>) {
    let mut stream = UnixStream::connect(socket).expect("connected");
    stream.write_all(br#"{"execute":"qmp_capabilities"}"#).expect("sent");
    let lines = BufReader::new(stream.try_clone().expect("cloned")).lines();
    let told = lines.map(|line| serde_json::from_str(&line.expect("read")).expect("JSON"));
    (stream, told.filter(|message: &Value| message.get("return").is_some() || message.get("error").is_some()))
}

#[test]
fn who_asks_for_much_that_has_to_wait_does_not_keep_the_others() {
    const MANY: usize = 30;
    let mut fixture = Fixture::new();
    let socket = fixture.there.path().join("qmp.sock");
    let nbd = fixture.there.path().join("nbd.sock").display().to_string();
    fixture.ok("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": nbd } } }));
    for number in 0..MANY {
        let export = json!({ "type": "nbd", "id": format!("e{number}"), "name": format!("e{number}"), "node-name": "s" });
        fixture.ok("block-export-add", export);
    }
    // Whoever removes one waits as long as a reply waits at most.
    fixture.books.0.borrow_mut().slow = true;
    let listener = UnixListener::bind(&socket).expect("bound");
    let (signals, _write) = Signals::unsignalled().expect("a pipe");
    let clients = thread::spawn(move || {
        let ((mut first, told_first), (mut second, mut told_second)) = (connect(&socket), connect(&socket));
        assert!(told_second.next().is_some(), "negotiated");
        let removals = (0..MANY).map(|number| {
            json!({ "execute": "block-export-del", "arguments": { "id": format!("e{number}") } }).to_string()
        });
        first.write_all(removals.collect::<String>().as_bytes()).expect("sent");
        let start = Instant::now();
        for _ in 0..3 {
            second.write_all(br#"{"execute":"query-version"}"#).expect("sent");
            assert!(told_second.next().is_some(), "answered");
        }
        let waited = start.elapsed();
        // Those of the first are answered all the same.
        assert_eq!(told_first.take(1 + MANY).filter(|told| told.get("return").is_some()).count(), 1 + MANY);
        second.write_all(br#"{"execute":"quit"}"#).expect("sent");
        waited
    });
    Monitors::new(Some(&listener), &signals).expect("monitors").run(&mut fixture.control).expect("it runs");
    let waited = clients.join().expect("unharmed");
    assert!(waited < Duration::from_millis(2500), "{waited:?}");
}
