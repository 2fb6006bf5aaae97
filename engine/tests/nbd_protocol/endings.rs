//! How connections end, and what becomes of what is under way.

use engine::nbd::{CloseReason, ConnectionLimits, IoKind, Outcome, Receive};

use crate::client::*;
use crate::session::{Session, shelf, well};

/// A session with a long write half received, one on the disk, and a read.
fn busy() -> Session {
    let mut session = Session::open("disk", true, &[]);
    session.request(Request::write(0, 1, 0, vec![1; 512]));
    session.request(Request::new(READ, 0, 2, 0, 4096));
    let long = Request::write(0, 3, 0, vec![2; 700_000]);
    session.requests.insert(3, long.clone());
    session.feed(&long.bytes()[..300_000]);
    assert_eq!(session.ios.len(), 3);
    session
}

#[test]
fn a_goodbye_lets_what_is_under_way_end() {
    let mut session = Session::open("disk", true, &[]);
    session.request(Request::write(FUA, 1, 0, vec![1; 600_000]));
    session.request(Request::new(READ, 0, 2, 0, 1 << 20));
    session.request(Request::new(FLUSH, 0, 3, 0, 0));
    session.drains = false;
    let goodbye = Request::new(DISC, 0xffff, 4, 1, 1).bytes();
    // Nothing that comes after it is looked at.
    session.feed(&[goodbye, vec![0xee; 100]].concat());
    assert_eq!((session.closed, session.connection.wants()), (None, None));
    session.answer_all();
    assert_eq!(session.closed, None, "the replies have not left");
    while session.sending {
        session.sent();
        session.turn();
    }
    let replies = session.replies();
    assert_eq!(replies.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    assert!(replies.values().all(|reply| reply.errors.is_empty()));
    assert_eq!(session.closed, Some(CloseReason::Disconnected));
    assert!(session.connection.is_finished());
}

#[test]
fn a_goodbye_of_an_idle_client_is_the_end_at_once() {
    let mut session = Session::open("disk", true, &[]);
    session.feed(&Request::new(DISC, 0, 1, 0, 0).bytes());
    assert_eq!(session.closed, Some(CloseReason::Disconnected));
    assert!(session.connection.is_finished());
}

#[test]
fn an_end_of_stream_lets_what_is_whole_end() {
    let mut session = busy();
    session.connection.end_of_stream();
    session.turn();
    assert_eq!(session.closed, None);
    session.answer_all();
    let replies = session.replies();
    assert_eq!(replies.keys().copied().collect::<Vec<_>>(), [1, 2], "half a write has no reply");
    assert_eq!(session.closed, Some(CloseReason::EndOfStream));
    assert!(session.connection.is_finished());
    assert_eq!(session.connection.buffered().incoming, 0);
}

#[test]
fn a_lost_connection_does_nothing_more_and_waits_for_the_disk() {
    let mut session = busy();
    let shared = session.shared.clone();
    session.connection.lost();
    session.turn();
    assert_eq!(session.closed, Some(CloseReason::Lost));
    assert!(!session.connection.is_finished());
    let sent = session.parser.bytes.len();
    for (id, kind) in std::mem::take(&mut session.ios) {
        assert!(!session.connection.is_finished());
        session.answer(id, well(&kind));
    }
    assert!(session.connection.is_finished() && session.ios.is_empty());
    assert_eq!(session.parser.bytes.len(), sent);
    drop(session);
    assert_eq!(shared.left(), 64 << 20);
}

#[test]
fn io_that_nobody_was_given_is_not_done_for_a_lost_connection() {
    let mut session = Session::open("disk", true, &[]);
    session.connection.received(&Request::write(0, 1, 0, vec![1; 512]).bytes());
    session.connection.lost();
    session.turn();
    assert!(session.ios.is_empty() && session.connection.is_finished());
}

#[test]
fn a_send_under_way_needs_not_come_back_from_a_lost_connection() {
    let mut session = Session::open("disk", true, &[]);
    session.drains = false;
    session.request(Request::new(READ, 0, 1, 0, 4096));
    session.answer_all();
    assert!(session.sending);
    session.connection.lost();
    session.turn();
    assert!(session.connection.is_finished());
    session.sent();
    session.turn();
}

#[test]
fn a_buffer_that_is_lent_may_come_back_too_late() {
    for lost in [true, false] {
        let mut session = busy();
        assert!(matches!(session.connection.wants(), Some(Receive::Payload { .. })));
        let lent = session.connection.lend_payload();
        if lost {
            session.connection.lost();
        } else {
            session.connection.end_of_stream();
        }
        session.turn();
        session.connection.received_payload(lent, 100);
        session.answer_all();
        assert!(session.connection.is_finished());
    }
}

#[test]
fn draining_refuses_what_is_new_and_ends_when_the_rest_is_done() {
    let mut session = busy();
    session.connection.drain();
    session.turn();
    assert_eq!(session.closed, None);
    // The payload under way is of a request under way.
    session.feed(&vec![2; 700_000 - 300_000 + 28]);
    for (cookie, command) in [(10, READ), (11, FLUSH), (12, BLOCK_STATUS), (13, 99)] {
        let request = Request::new(command, 0, cookie, 0, if command == FLUSH { 0 } else { 512 });
        session.request(request);
        assert_eq!(session.replies()[&cookie].errors, [(ESHUTDOWN, None)]);
    }
    session.request(Request::write(0, 14, 0, vec![1; 100_000]));
    assert_eq!(session.replies()[&14].errors, [(ESHUTDOWN, None)]);
    assert_eq!(session.closed, None);
    session.answer_all();
    assert_eq!(session.replies().len(), 3);
    assert_eq!(session.closed, Some(CloseReason::Drained));
    assert!(session.connection.is_finished());
}

#[test]
fn an_idle_connection_is_drained_at_once() {
    let mut session = Session::open("disk", true, &[]);
    session.connection.drain();
    session.turn();
    assert_eq!(session.closed, Some(CloseReason::Drained));
    assert!(session.connection.is_finished());
}

#[test]
fn a_client_that_never_stops_asking_does_not_hold_up_a_drain() {
    let mut session = Session::open("disk", true, &[]);
    session.request(Request::new(FLUSH, 0, 1, 0, 0));
    session.drains = false;
    session.connection.drain();
    session.turn();
    for cookie in 2..50 {
        session.request(Request::new(READ, 0, cookie, 0, 512));
    }
    session.answer_all();
    assert_eq!(session.connection.wants(), None);
    while session.sending {
        session.sent();
        session.turn();
    }
    assert_eq!(session.replies().len(), 49);
    assert_eq!(session.closed, Some(CloseReason::Drained));
}

#[test]
fn the_reason_is_the_first_one() {
    let mut session = Session::open("disk", true, &[]);
    session.request(Request::new(FLUSH, 0, 1, 0, 0));
    session.feed(&Request::new(DISC, 0, 2, 0, 0).bytes());
    session.connection.drain();
    session.connection.end_of_stream();
    session.turn();
    session.answer_all();
    assert_eq!(session.closed, Some(CloseReason::Disconnected));
}

#[test]
fn an_end_before_the_handshake_is_over() {
    for bytes in [&b""[..], &[0], &[0, 0, 0, 3], b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x20abc"] {
        let mut session = Session::with(ConnectionLimits::default(), shelf(), 0);
        session.feed(bytes);
        session.connection.end_of_stream();
        session.turn();
        assert_eq!(session.closed, Some(CloseReason::EndOfStream));
        assert!(session.connection.is_finished());
    }
}

#[test]
#[should_panic(expected = "not under way")]
fn an_answer_counts_once() {
    let mut session = Session::open("disk", true, &[]);
    session.request(Request::new(FLUSH, 0, 1, 0, 0));
    session.request(Request::new(FLUSH, 0, 2, 0, 0));
    let (id, kind) = session.ios.pop_front().unwrap();
    assert_eq!(kind, IoKind::Flush);
    session.connection.answered(id, Outcome::Done);
    session.connection.answered(id, Outcome::Done);
}
