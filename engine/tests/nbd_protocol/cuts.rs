//! Streams that are cut anywhere: into other chunks, or off.

use std::sync::Arc;

use engine::nbd::{CloseReason, ConnectionLimits, Export, IoKind, Receive};
use engine::units::Length;
use proptest::prelude::*;

use crate::client::*;
use crate::session::{Session, Shelf, contents, shelf, well};

fn handshake(structured: bool) -> Vec<u8> {
    let mut stream = client_flags(3);
    stream.extend(option(OPT_LIST, &[]));
    stream.extend(option(OPT_INFO, &info_data("nothing", &[])));
    if structured {
        stream.extend(option(OPT_STRUCTURED_REPLY, &[]));
        stream.extend(option(OPT_LIST_META_CONTEXT, &context_data("disk", &["base:"])));
        stream.extend(option(OPT_SET_META_CONTEXT, &context_data("disk", &["base:allocation"])));
    }
    stream.extend(option(OPT_STARTTLS, &[]));
    stream.extend(option(OPT_GO, &info_data("disk", &[3, 1])));
    stream
}

/// One of everything.
fn requests() -> Vec<Request> {
    vec![
        Request::write(0, 1, 100, contents(7, 700)),
        Request::new(READ, 0, 2, 0, 1000),
        Request::new(FLUSH, 0, 3, 0, 0),
        Request::write(0, 4, u64::MAX, vec![5; 90]),
        Request::new(77, 0, 5, 0, 3),
        Request::new(WRITE_ZEROES, NO_HOLE, 6, 512, 512),
        Request::new(BLOCK_STATUS, 0, 7, 0, 4096),
        Request::write(FUA, 8, 5000, contents(9, 40_000)),
        Request::new(TRIM, FUA, 9, 0, 512),
        Request::new(READ, DF, 10, 4096, 20_000),
        Request::write(0, 11, 0, vec![]),
        Request::new(CACHE, 0, 12, 0, 512),
    ]
}

/// What came of a stream: the I/O in its order, what was sent, and how it ended.
type Trace = (Vec<IoKind>, Vec<u8>, Option<CloseReason>);

/// Feed `stream` in chunks of `sizes` (over and over), and then answer.
fn trace(stream: &[u8], sizes: &[usize], owned: bool) -> Trace {
    let mut session = Session::with(ConnectionLimits::default(), shelf(), 64 << 20);
    let mut rest = stream;
    for size in sizes.iter().cycle() {
        session.turn();
        let most = match session.connection.wants() {
            None => break,
            Some(Receive::Payload { .. }) if owned => {
                let mut lent = session.connection.lend_payload();
                let free = &mut lent.buffer[lent.filled..];
                let count = free.len().min(rest.len()).min(*size);
                free[..count].copy_from_slice(&rest[..count]);
                session.connection.received_payload(lent, count);
                rest = &rest[count..];
                continue;
            }
            Some(Receive::Any { most } | Receive::Payload { missing: most }) => most,
        };
        if rest.is_empty() {
            break;
        }
        let (now, later) = rest.split_at((*size).min(most).min(rest.len()));
        session.connection.received(now);
        rest = later;
    }
    session.turn();
    let kinds: Vec<_> = session.ios.iter().map(|(_, kind)| kind.clone()).collect();
    session.connection.end_of_stream();
    session.answer_all();
    assert!(session.connection.is_finished());
    (kinds, session.parser.bytes, session.closed)
}

fn some_request() -> impl Strategy<Value = Request> {
    let command = prop_oneof![3 => Just(READ), 3 => Just(WRITE), 1 => 2..10_u16];
    let flags = prop_oneof![6 => Just(0), 1 => 0..64_u16];
    let offset = prop_oneof![8 => 0..(1_u64 << 20), 1 => any::<u64>()];
    let length = prop_oneof![3 => 0..5000_u32, 1 => 0..50_000_u32];
    (command, flags, offset, length).prop_map(|(command, flags, offset, length)| {
        let cookie = offset ^ u64::from(length);
        match command {
            WRITE => Request::write(flags, cookie, offset, contents(offset, u64::from(length))),
            _ => Request::new(command, flags, cookie, offset, length),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn how_a_stream_is_cut_makes_no_difference(
        structured in any::<bool>(),
        owned in any::<bool>(),
        requests in prop::collection::vec(some_request(), 0..20),
        junk in prop::collection::vec(any::<u8>(), 0..40),
        sizes in prop::collection::vec(1..20_000_usize, 1..30),
        small in prop::collection::vec(1..40_usize, 1..10),
    ) {
        let mut stream = handshake(structured);
        requests.iter().for_each(|request| stream.extend(request.bytes()));
        stream.extend(junk);
        let whole = trace(&stream, &[usize::MAX], false);
        prop_assert!(trace(&stream, &sizes, owned) == whole);
        prop_assert!(trace(&stream, &small, owned) == whole);
    }
}

#[test]
fn a_stream_may_end_after_every_byte() {
    for structured in [false, true] {
        let mut stream = handshake(structured);
        let begins = stream.len();
        let requests = requests();
        let ends: Vec<usize> = requests
            .iter()
            .map(|request| {
                stream.extend(request.bytes());
                stream.len()
            })
            .collect();
        for cut in 0..=stream.len() {
            let mut session = Session::with(ConnectionLimits::default(), shelf(), 64 << 20);
            assert!(session.feed(&stream[..cut]).is_empty());
            session.connection.end_of_stream();
            session.turn();
            for (_, kind) in &session.ios {
                if let IoKind::Write { offset, data, .. } = kind {
                    let whole = requests.iter().any(|r| r.offset == *offset && r.payload == *data);
                    assert!(whole, "half a write was written, cut at {cut}");
                }
            }
            session.answer_all();
            assert_eq!(session.closed, Some(CloseReason::EndOfStream), "cut at {cut}");
            assert!(session.connection.is_finished());
            assert_eq!(session.attached.is_some(), cut >= begins);
            if cut >= begins {
                while session.parser.option_reply().is_some_and(|r| r.option != OPT_GO || r.kind != REP_ACK) {
                }
                session.requests = requests.iter().map(|r| (r.cookie, r.clone())).collect();
                let answered: Vec<u64> = session.replies().into_keys().collect();
                let whole = ends.iter().filter(|&&end| end <= cut).count();
                assert_eq!(answered, (1..=whole as u64).collect::<Vec<_>>(), "cut at {cut}");
            }
            let shared = session.shared.clone();
            drop(session);
            assert_eq!(shared.left(), 64 << 20);
        }
    }
}

#[test]
fn a_connection_may_be_lost_after_every_byte_of_a_reply() {
    let export = Export::new("disk", Length(16 << 20), false).unwrap();
    let shelf = Shelf(vec![Arc::new(export)]);
    // After so many sends, with so many outcomes missing.
    for sends in 0..12 {
        for missing in 0..5 {
            let mut session = Session::with(ConnectionLimits::default(), shelf.clone(), 64 << 20);
            session.choose("disk", true, &["base:allocation"]);
            session.drains = false;
            for request in [
                Request::new(READ, DF, 1, 0, 3 << 20),
                Request::new(READ, 0, 2, 0, 3 << 20),
                Request::new(READ, DF, 3, 0, 1 << 20),
                Request::new(BLOCK_STATUS, 0, 4, 0, 1 << 20),
                Request::write(FUA, 5, 0, vec![1; 600_000]),
            ] {
                session.request(request);
            }
            for _ in 0..sends {
                while session.ios.len() > missing {
                    session.answer_next(well);
                }
                if session.sending {
                    session.sent();
                    session.turn();
                }
            }
            session.connection.lost();
            session.turn();
            assert_eq!(session.closed, Some(CloseReason::Lost));
            session.answer_all();
            assert!(session.connection.is_finished());
            let shared = session.shared.clone();
            drop(session);
            assert_eq!(shared.left(), 64 << 20);
        }
    }
}
