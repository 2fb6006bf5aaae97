//! Bytes on the wire.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use crate::peer::{LENGTH, Peer, Which};
use crate::support::has;

/// What a daemon answers to `messages` on a new connection: one list of replies for each, without the version's package.
fn answers(peer: &Peer, messages: &[&[u8]]) -> Vec<Vec<Value>> {
    let mut stream = UnixStream::connect(peer.path("qmp.sock")).expect("connects");
    let mut told = Vec::new();
    for message in messages {
        // A command that is always answered shows where the answers to the message end.
        stream.write_all(message).expect("sent");
        stream.write_all(b"\x1b{\"execute\":\"end\",\"id\":\"end\"}").expect("sent");
        told.push(read_to_end_mark(&mut stream));
    }
    told
}

fn read_to_end_mark(stream: &mut UnixStream) -> Vec<Value> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    while !text.contains("\"end\"") || !text.ends_with('\n') {
        let bytes = stream.read(&mut buffer).expect("an answer");
        assert!(bytes > 0, "closed after {text}");
        text.push_str(std::str::from_utf8(&buffer[..bytes]).expect("UTF-8"));
    }
    let mut replies: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("a value a line")).collect();
    for reply in &mut replies {
        if let Some(version) = reply.pointer_mut("/return/package") {
            *version = Value::Null;
        }
        reply.as_object_mut().expect("an object").retain(|name, _| name != "QMP");
    }
    replies
}

fn both(messages: &[&[u8]]) {
    if !has("qemu-storage-daemon") {
        return;
    }
    let [theirs, ours] = [Which::Qemu, Which::Ours].map(|which| {
        let mut peer = Peer::start(which, LENGTH);
        if which == Which::Qemu {
            // It serves one client at a time.
            peer.qmp.hang_up();
        }
        answers(&peer, messages)
    });
    for ((message, ours), theirs) in messages.iter().zip(ours).zip(theirs) {
        assert_eq!(ours, theirs, "left is ours: {}", String::from_utf8_lossy(message));
    }
}

const READY: &[u8] = br#"{"execute":"qmp_capabilities"}"#;

#[test]
fn negotiation() {
    both(&[
        br#"{"execute":"query-version"}"#,
        br#"{"execute":"query-version","foo":1}"#,
        b"[]",
        br#"{"execute":"qmp_capabilities","arguments":{"enable":1}}"#,
        br#"{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":7}"#,
        READY,
        br#"{"execute":"query-version","id":{"a":[null,1.5,"\u00e9"]}}"#,
    ]);
}

#[test]
fn messages_good_and_bad() {
    both(&[
        READY,
        br#"{"execute":"query-version"}{"execute":"query-version","id":1}"#,
        br"{'execute':'query-version','id':'it\'s'}",
        b" \n\t\r{\"execute\" : \"query-version\" }",
        b"\"x\"",
        b"{}",
        br#"{"id":3}"#,
        br#"{"execute":1}"#,
        br#"{"execute":"query-version","arguments":[]}"#,
        br#"{"execute":"query-version","arguments":null}"#,
        br#"{"execute":"query-version","arguments":{"a":1}}"#,
        br#"{"execute":"query-version","foo":1,"id":9}"#,
        br#"{"exec-oob":"query-version","id":1}"#,
        br#"{"execute":"query-version",}"#,
        b"}",
        br#"{"a" 1}"#,
        b"abc\n",
        b"nulltrue{}",
        br#"{"execute":"query-version","id":18446744073709551615}"#,
        br#"{"execute":"query-version","id":-9223372036854775808}"#,
        b"[01]",
        b"[-]",
        b"[+1]",
        b"[1e]",
        b"[1.]",
        b"[.5]",
        b"[0x10]",
        br#"{"a":1,"a":2}"#,
        b"{\"id\":\"a\nb\"}",
        br#"["\x"]"#,
        br#"["\ud834"]"#,
        br#"["\udd1e"]"#,
        br#"["\u12"]"#,
        b"[\"\xed\xa0\x80\"]",
        b"[%d]",
        b"[TRUE]",
        b"[nan]",
        b"{1:2}",
        b"{,}",
        b"[1 2]",
        b"[1,]",
        b"[]]",
        br#"{"a":1 "b":2}"#,
        b"[01 \"x\"]",
        b"[tru\ne]",
        b"[1,2}",
        b"{\"a\":[1,2",
        b"[\"abc",
    ]);
}

#[test]
fn nesting() {
    let nested = |depth: usize| {
        let id = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        format!("{{\"execute\":\"query-version\",\"id\":{id}}}").into_bytes()
    };
    if !has("qemu-storage-daemon") {
        return;
    }
    // Deeper than our own reader goes, so only the number of answers and their beginnings are compared.
    let told = [Which::Qemu, Which::Ours].map(|which| {
        let mut peer = Peer::start(which, LENGTH);
        peer.qmp.hang_up();
        let mut stream = UnixStream::connect(peer.path("qmp.sock")).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
        stream.write_all(READY).expect("sent");
        stream.write_all(&nested(1023)).expect("sent");
        stream.write_all(&nested(1024)).expect("sent");
        stream.write_all(b"\x1b{\"execute\":\"end\",\"id\":\"end\"}").expect("sent");
        let (mut text, mut buffer) = (String::new(), [0; 4096]);
        while !text.contains("\"end\"") {
            let bytes = stream.read(&mut buffer).expect("an answer");
            text.push_str(std::str::from_utf8(&buffer[..bytes]).expect("UTF-8"));
        }
        let count = |what: &str| text.matches(what).count();
        json!([count("nesting depth limit exceeded"), count("expecting value"), count("\"return\"")])
    });
    assert_eq!(told[1], told[0], "left is ours");
}
