//! What clients of QMP send: whatever the bytes and however they are cut, nothing panics, memory stays within its limits, every
//! reply is JSON with a success or an error, and the pieces do not matter.

#![no_main]

use engine_cli::qmp::commands::find;
use engine_cli::qmp::session::{MAX_REPLIES, Session};
use engine_cli::qmp::{Limits, QmpError, Reader, check};
use libfuzzer_sys::fuzz_target;
use serde::Deserialize;
use serde_json::{Value, json};

/// Bytes of a reply for each of its question: a number may be written as `1e15`, and an `id` full of these comes back with all their zeros.
const GROWTH: usize = 4;
/// Bytes of a reply besides what its question holds.
const FRAME: usize = 1 << 10;

/// What a session says to `bytes`, which come in pieces of `size`. Commands are checked against the table and not carried out.
fn talk(bytes: &[u8], size: usize) -> Vec<u8> {
    let mut session = Session::new();
    let mut said = session.output().to_vec();
    session.sent(said.len());
    for piece in bytes.chunks(size) {
        session.receive(piece);
        loop {
            while let Some(request) = session.next_request() {
                let answer = match find(&request.name) {
                    Some(command) => check(command.arguments, &request.arguments).map(|()| json!({})),
                    None => Err(QmpError::not_found("no such command")),
                };
                session.answer(&request, answer);
            }
            // Those that wait, and one behind them.
            assert!(session.output().len() <= MAX_REPLIES + GROWTH * bytes.len() + FRAME);
            if session.output().is_empty() {
                break;
            }
            said.extend_from_slice(session.output());
            session.sent(session.output().len());
        }
        assert!(!session.has_input(), "everything was looked at");
    }
    assert!(!session.is_overrun());
    said
}

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let at_once = talk(bytes, usize::MAX);
    assert!(at_once == talk(bytes, usize::from(size).max(1)), "the pieces matter");
    let text = std::str::from_utf8(&at_once).expect("UTF-8");
    let mut lines = text.split_terminator("\r\n");
    let greeting = parse(lines.next().expect("a greeting"));
    assert!(greeting["QMP"].is_object());
    for line in lines {
        let reply = parse(line);
        let told = ["return", "error"].map(|member| reply.get(member).is_some());
        assert!(told[0] != told[1], "one of both: {line}");
        // Our own clients understand it, too.
        let mut rest = line.as_bytes();
        let ours = Reader::new(Limits::REPLY).next(&mut rest).expect("whole").expect("well-formed");
        assert!(rest.is_empty() && ours.is_object(), "{line}");
    }
});

/// By a parser that is not ours, however deep it is.
fn parse(line: &str) -> Value {
    let mut parser = serde_json::Deserializer::from_str(line);
    parser.disable_recursion_limit();
    let value = Value::deserialize(&mut parser).expect("JSON");
    parser.end().expect("nothing behind it");
    value
}
