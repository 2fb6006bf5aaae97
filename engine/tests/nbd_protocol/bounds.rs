//! What a connection may have, whatever its peer does or leaves undone.

use std::sync::Arc;

use engine::nbd::{Connection, ConnectionLimits, Export, Outcome, Receive, SharedBytes, WireError};
use engine::units::Length;

use crate::client::*;
use crate::session::{Session, Shelf, well};

fn open_with(limits: ConnectionLimits, structured: bool, shared: usize) -> Session {
    let export = Export::new("disk", Length(64 << 20), false).unwrap();
    let mut session = Session::with(limits, Shelf(vec![Arc::new(export)]), shared);
    session.choose("disk", structured, &["base:allocation"][..usize::from(structured)]);
    session
}

#[test]
fn a_reader_that_never_drains_is_not_read_from_any_more() {
    let limits = ConnectionLimits::default();
    for (structured, length) in [(true, 32 << 20), (false, 32 << 20), (true, 4096), (false, 100_000)] {
        let mut session = open_with(limits, structured, 64 << 20);
        session.drains = false;
        let requests = (0..10_000).map(|cookie| Request::new(READ, 0, cookie, 0, length));
        let stream: Vec<u8> = requests.flat_map(|request| request.bytes()).collect();
        let mut rest = &stream[..];
        loop {
            let before = (rest.len(), session.ios.len());
            rest = session.feed(rest);
            let buffered = session.connection.buffered();
            assert!(buffered.requests <= limits.requests, "{buffered:?}");
            assert!(buffered.outgoing <= limits.outgoing_bytes + limits.stream_bytes, "{buffered:?}");
            assert!(buffered.backlog <= limits.read_ahead, "{buffered:?}");
            while !session.ios.is_empty() {
                session.answer_next(well);
            }
            if before == (rest.len(), 0) {
                break;
            }
        }
        assert!(rest.len() > stream.len() / 2);
        assert_eq!(session.connection.wants(), None);
        // Once it drains, it goes on.
        session.sent();
        session.turn();
        assert!(!session.ios.is_empty() || session.sending || session.connection.wants().is_some());
    }
}

#[test]
fn a_disk_that_does_not_answer_stops_the_writer() {
    let limits = ConnectionLimits::default();
    let mut session = open_with(limits, true, 64 << 20);
    let stream: Vec<u8> =
        (0..100).flat_map(|cookie| Request::write(0, cookie, 0, vec![1; 100_000]).bytes()).collect();
    let rest = session.feed(&stream).len();
    let buffered = session.connection.buffered();
    assert!(buffered.incoming <= limits.incoming_bytes && buffered.backlog <= limits.read_ahead);
    assert!(rest > stream.len() / 2);
    assert_eq!(session.connection.wants(), None);
    session.answer_next(|_| Outcome::Done);
    assert!(session.connection.wants().is_some() || session.connection.buffered().backlog > 0);
}

#[test]
fn requests_are_counted_until_their_reply_has_left() {
    let limits = ConnectionLimits { requests: 5, ..ConnectionLimits::default() };
    let mut session = open_with(limits, true, 64 << 20);
    session.drains = false;
    let stream: Vec<u8> = (0..8).flat_map(|cookie| Request::new(FLUSH, 0, cookie, 0, 0).bytes()).collect();
    assert!(session.feed(&stream).is_empty(), "they come at once");
    assert_eq!(session.ios.len(), 5);
    session.answer_next(well);
    assert_eq!((session.ios.len(), session.connection.wants()), (4, None));
    session.sent();
    session.turn();
    assert_eq!(session.ios.len(), 5);
    // Refused ones count as well.
    let mut session = open_with(limits, true, 64 << 20);
    session.drains = false;
    let stream: Vec<u8> = (0..8).flat_map(|cookie| Request::new(99, 0, cookie, 0, 0).bytes()).collect();
    session.feed(&stream);
    assert_eq!(session.connection.buffered().requests, 5);
}

#[test]
fn the_depths_of_usual_clients_are_not_throttled() {
    // 64 requests of 4 KiB at a time, of 256 KiB at a time (nbdcopy), both ways.
    for (length, on_disk) in [(4096, 64), (256 << 10, 8)] {
        let mut session = open_with(ConnectionLimits::default(), true, 64 << 20);
        for cookie in 0..64 {
            session.request(Request::new(READ, 0, cookie, 0, length));
        }
        assert_eq!(session.ios.len(), on_disk);
        assert!(session.connection.wants().is_some());
    }
    let mut session = open_with(ConnectionLimits::default(), true, 64 << 20);
    for cookie in 0..64 {
        session.request(Request::write(0, cookie, 0, vec![0; 4096]));
    }
    assert_eq!(session.ios.len(), 64);
}

#[test]
fn a_stuck_reader_does_not_keep_its_own_writes_from_going_on() {
    let mut session = open_with(ConnectionLimits::default(), true, 0);
    session.drains = false;
    session.request(Request::new(READ, 0, 1, 0, 32 << 20));
    session.answer_all();
    // A client that sends all of its next request before it reads.
    let bytes = Request::write(0, 2, 0, vec![1; 8 << 20]).bytes();
    let mut rest = session.feed(&bytes);
    while !rest.is_empty() {
        session.answer_next(|_| Outcome::Done);
        rest = session.feed(rest);
    }
}

#[test]
fn connections_that_take_all_that_is_shared_leave_each_other_a_part() {
    let shared = SharedBytes::new(1 << 20);
    let export = Export::new("disk", Length(64 << 20), false).unwrap();
    let shelf = Shelf(vec![Arc::new(export)]);
    let mut sessions: Vec<Session> = (0..20)
        .map(|_| {
            let mut session = Session::with(ConnectionLimits::default(), shelf.clone(), 0);
            session.connection = Connection::new(ConnectionLimits::default(), shared.clone());
            session.parser = Parser::default();
            session.turn();
            session.parser.greeting();
            session.choose("disk", true, &[]);
            session.drains = false;
            session
        })
        .collect();
    for session in &mut sessions {
        session.request(Request::new(READ, 0, 1, 0, 32 << 20));
        session.answer_all();
        assert!(session.sending, "everyone gets something");
    }
    let all: usize = sessions.iter().map(|session| session.connection.buffered().outgoing).sum();
    assert!(all <= (1 << 20) + 20 * (64 << 10), "{all}");
    assert!(shared.left() < 64 << 10);
    sessions.truncate(1);
    // What the others had is there for the one that is left.
    sessions[0].drains = true;
    sessions[0].sent();
    sessions[0].turn();
    sessions[0].answer_all();
    assert!(sessions[0].replies().contains_key(&1));
    drop(sessions);
    assert_eq!(shared.left(), 1 << 20);
}

#[test]
fn an_idle_connection_is_small() {
    let mut session = open_with(ConnectionLimits::default(), true, 64 << 20);
    for round in 0..3 {
        for cookie in 0..100 {
            let cookie = cookie + round * 100;
            session.request(Request::write(0, cookie, 0, vec![1; 10_000]));
        }
        session.answer_all();
        session.replies();
    }
    // So much later that it asks for little again.
    for cookie in 1000..1010 {
        session.reply_to(Request::new(FLUSH, 0, cookie, 0, 0));
    }
    assert_eq!(session.connection.wants(), Some(Receive::Any { most: 4096 }));
    assert_eq!(session.connection.buffered(), Default::default());
    let idle = session.connection.heap_bytes() + size_of::<Connection>();
    assert!(idle <= 6 << 10, "{idle}");
}

#[test]
fn what_a_request_takes_besides_its_payload_is_as_documented() {
    let limits = ConnectionLimits::default();
    // All that there may be, in the way that takes the most: each under way, then each answered with an error and not sent.
    for command in [FLUSH, READ, BLOCK_STATUS] {
        let mut session = open_with(limits, true, 64 << 20);
        session.drains = false;
        let length = if command == FLUSH { 0 } else { 512 };
        for cookie in 0..limits.requests as u64 {
            session.connection.received(&Request::new(command, 0, cookie, 0, length).bytes());
        }
        let held = session.connection.heap_bytes() + size_of::<Connection>();
        assert!(held <= limits.requests * 512 + (4 << 10), "{held}");
        session.turn();
        for (id, _) in std::mem::take(&mut session.ios) {
            session.connection.answered(id, Outcome::Failed(WireError::Io));
        }
        let held = session.connection.heap_bytes() + size_of::<Connection>();
        assert!(held <= limits.requests * 512 + (4 << 10), "{held}");
    }
}

#[test]
fn a_header_that_announces_much_takes_one_piece() {
    let limits = ConnectionLimits::default();
    let mut session = open_with(limits, true, 64 << 20);
    session.feed(&Request::new(WRITE, 0, 1, 0, 32 << 20).bytes());
    assert_eq!(session.connection.buffered().incoming, limits.piece_bytes);
}
