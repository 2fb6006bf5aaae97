use proptest::prelude::*;

use super::*;

/// What a session makes of `pieces` when every request is answered with its own name; the greeting is left out.
fn talk<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Value> {
    let mut session = Session::new();
    session.sent(session.output().len());
    for piece in pieces {
        session.receive(piece);
        while let Some(request) = session.next_request() {
            let name = json!(request.name);
            session.answer(&request, Ok(name));
        }
    }
    lines(&session)
}

fn lines(session: &Session) -> Vec<Value> {
    let text = std::str::from_utf8(session.output()).expect("UTF-8");
    text.split_terminator("\r\n").map(|line| serde_json::from_str(line).expect("a value a line")).collect()
}

fn generic(text: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": text } })
}

const READY: &str = r#"{"execute":"qmp_capabilities"}"#;

#[test]
fn begins_with_a_greeting() {
    let session = Session::new();
    let greeting = &lines(&session)[0]["QMP"];
    assert_eq!(greeting["version"]["qemu"]["major"], 10);
    assert_eq!(greeting["capabilities"], json!([]));
}

#[test]
fn negotiation_comes_first_and_once() {
    let not_yet = "Expecting capabilities negotiation with 'qmp_capabilities'";
    let too_late = "Capabilities negotiation is already complete, command ignored";
    let script = format!(r#"{{"execute":"quit","id":1}}{READY}{READY}{{"execute":"quit"}}"#);
    assert_eq!(
        talk([script.as_bytes()]),
        [
            json!({ "error": { "class": "CommandNotFound", "desc": not_yet }, "id": 1 }),
            json!({ "return": {} }),
            json!({ "error": { "class": "CommandNotFound", "desc": too_late } }),
            json!({ "return": "quit" }),
        ]
    );
    let enable = br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#;
    assert_eq!(talk([&enable[..]])[0]["error"]["class"], "GenericError");
    let enable = br#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#;
    assert_eq!(talk([&enable[..]]), [json!({ "return": {} })]);
}

#[test]
fn any_id_comes_back() {
    for id in ["1", "\"x\"", "null", "[1,{\"a\":null}]", "1.5", "-9223372036854775808", "\"\\u0000\""] {
        let script = format!(r#"{READY}{{"execute":"x","id":{id}}}{{"id":{id}}}"#);
        let id: Value = serde_json::from_str(id).expect("JSON");
        let told = talk([script.as_bytes()]);
        assert_eq!(told[1], json!({ "return": "x", "id": id }));
        assert_eq!(told[2]["id"], id);
        assert_eq!(told[2]["error"]["desc"], "QMP input lacks member 'execute'");
    }
}

#[test]
fn messages_that_are_no_commands() {
    for (message, told) in [
        ("[]", "QMP input must be a JSON object"),
        ("\"x\"", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        (r#"{"execute":1}"#, "QMP input member 'execute' must be a string"),
        (r#"{"execute":"x","arguments":[]}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":"x","arguments":null}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute":"x","foo":1}"#, "QMP input member 'foo' is unexpected"),
        (r#"{"exec-oob":"x"}"#, "QMP input member 'exec-oob' is unexpected"),
        (r#"{"exec-oob":"x","execute":"x"}"#, "QMP input member 'exec-oob' is unexpected"),
        ("{\"execute\":\"x\",}", "JSON parse error, expecting value"),
    ] {
        assert_eq!(talk([message.as_bytes()]), [generic(told)], "{message}");
    }
}

#[test]
fn events_go_to_those_who_have_negotiated() {
    let mut session = Session::new();
    session.sent(session.output().len());
    session.event(&json!({ "event": "A" }));
    assert!(session.output().is_empty());
    session.receive(READY.as_bytes());
    assert_eq!(session.next_request(), None);
    session.event(&json!({ "event": "B" }));
    assert_eq!(lines(&session), [json!({ "return": {} }), json!({ "event": "B" })]);
}

#[test]
fn one_that_never_reads_is_not_listened_to_and_given_up_at_last() {
    let mut session = Session::new();
    session.receive(READY.as_bytes());
    let mut sent = 0;
    while session.wants_input() {
        session.receive(b"[][][][][][][][][][]");
        assert_eq!(session.next_request(), None);
        sent += 20;
        assert!(sent < 10 * MAX_REPLIES, "it wants input for ever");
    }
    assert!(session.output().len() < 2 * MAX_REPLIES && !session.is_overrun());
    // What was looked at goes on once it reads.
    let waiting = session.output().len();
    session.receive(&b"[]".repeat(100));
    assert_eq!(session.next_request(), None);
    assert_eq!(session.output().len(), waiting);
    session.sent(waiting);
    assert_eq!(session.next_request(), None);
    let told = lines(&session).len();
    assert!((100..120).contains(&told), "{told}: those that waited, and a few from before");

    let event = json!({ "event": "x".repeat(1000) });
    let replies = session.output().len();
    for _ in 0..=MAX_EVENTS / 1000 {
        session.event(&event);
        assert!(session.output().len() <= replies + MAX_EVENTS + 2);
    }
    assert!(session.is_overrun());
    assert!(session.output().is_empty(), "its memory is given back");
}

#[test]
fn who_asks_for_much_gets_it_and_the_events_meanwhile() {
    let mut session = Session::new();
    session.receive(READY.as_bytes());
    session.receive(br#"{"execute":"x"}"#);
    let request = session.next_request().expect("one");
    let event = json!({ "event": "x".repeat(1000) });
    let most = MAX_EVENTS / 1100;
    (0..most).for_each(|_| session.event(&event));
    session.answer(&request, Ok(json!("y".repeat(MAX_REPLY - 100))));
    (0..most).for_each(|_| session.event(&event));
    assert!(!session.is_overrun() && session.output().len() > MAX_REPLY + MAX_EVENTS);
    assert!(!session.takes_requests() && !session.wants_input());
    // It reads, a part at a time; nothing is lost.
    let mut told = Vec::new();
    while !session.output().is_empty() {
        let part = session.output().len().min(200_000);
        told.extend_from_slice(&session.output()[..part]);
        session.sent(part);
    }
    let told = std::str::from_utf8(&told).expect("UTF-8");
    let lines: Vec<&str> = told.split_terminator("\r\n").collect();
    assert_eq!(lines.len(), 2 + most + 1 + most);
    assert!(lines.iter().all(|line| line.starts_with('{') && line.ends_with('}')));
    assert!(lines[2 + most].contains("yyy"), "in order");
    assert!(session.takes_requests());
    // Events alone are bounded as before.
    (0..=MAX_EVENTS / 1000).for_each(|_| session.event(&event));
    assert!(session.is_overrun());
}

fn messages() -> impl Strategy<Value = Vec<u8>> {
    let one = prop_oneof![
        Just(READY.as_bytes().to_vec()),
        Just(br#"{"execute":"query-jobs","id":7}"#.to_vec()),
        Just(br#"{'execute':'a','arguments':{'b':[1,{}]}}"#.to_vec()),
        Just(b"[]".to_vec()),
        Just(b"{\"a\":\x1b".to_vec()),
        prop::collection::vec(any::<u8>(), 0..20),
    ];
    prop::collection::vec(one, 0..12).prop_map(|messages| messages.concat())
}

proptest! {
    #[test]
    fn pieces_do_not_matter(bytes in messages(), size in 1_usize..20) {
        prop_assert_eq!(talk(bytes.chunks(size)), talk([&bytes[..]]));
    }
}
