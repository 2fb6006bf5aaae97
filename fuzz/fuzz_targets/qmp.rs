//! What clients of QMP send: whatever the bytes and however they are cut, nothing panics, memory stays within its limits, every
//! message gets one reply that is JSON, and the pieces do not matter.

#![no_main]

use engine_cli::qmp::commands::find;
use engine_cli::qmp::session::{MAX_REPLY, Session};
use engine_cli::qmp::{QmpError, check};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

/// What a session says to `bytes`, which come in pieces of `size`. Commands are checked against the table and not carried out.
fn talk(bytes: &[u8], size: usize) -> Vec<u8> {
    let mut session = Session::new();
    let mut said = Vec::new();
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
            assert!(session.output().len() <= MAX_REPLY);
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
    for line in text.split_terminator("\r\n") {
        // Deeper than that parser goes by itself is no fault of the reply.
        let reply: Result<Value, _> = serde_json::from_str(line);
        assert!(reply.is_ok_and(|reply| reply.is_object()) || line.len() > 128, "{line}");
    }
});
