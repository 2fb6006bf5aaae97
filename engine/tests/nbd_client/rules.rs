//! Replies, rule by rule: what they bring, and what no server may send.

use engine::nbd::client::{Agreement, Answer, Request, Transmission};
use engine::nbd::{StatusExtent, WireError};
use engine::units::ByteRange;

use crate::driver::{Session, agreement};
use crate::server::*;

const CONTEXT_ID: u32 = 7;

fn session() -> Session {
    Session::new(&agreement(true, Some(CONTEXT_ID)))
}

fn read(offset: u64, length: u64) -> Request {
    Request::Read(ByteRange::new(offset, length))
}

fn about(length: u64, most: usize) -> Request {
    Request::Status { range: ByteRange::new(4096, length), most }
}

fn all(mut session: Session, stream: &[u8]) -> Session {
    session.feed(stream, || usize::MAX / 2);
    session
}

fn contents(session: &Session, cookie: u64) -> Vec<u8> {
    session.asked[&cookie].contents.iter().map(|byte| byte.expect("it has come")).collect()
}

fn result(session: &Session, cookie: u64) -> Option<Result<Answer, WireError>> {
    session.asked[&cookie].result.clone()
}

#[test]
fn requests_as_they_are_sent() {
    let mut machine = Transmission::new(&agreement(true, None));
    let range = ByteRange::new(0x0102_0304_0506, 0x0a0b);
    for (request, flags, command) in [
        (Request::Read(range), 0, 0),
        (Request::Write { range, fua: false }, 0, 1),
        (Request::Write { range, fua: true }, 1, 1),
        (Request::Trim(range), 0, 4),
        (Request::WriteZeroes { range, no_hole: false, fua: false }, 0, 6),
        (Request::WriteZeroes { range, no_hole: true, fua: true }, 3, 6),
        (Request::Status { range, most: 1 }, 0, 7),
    ] {
        let (cookie, header) = machine.begin(request);
        let expected =
            bytes().u32(0x25609513).u16(flags).u16(command).u64(cookie).u64(range.offset).u32(0x0a0b).0;
        assert_eq!(header[..], expected, "{request:?}");
    }
    let (cookie, header) = machine.begin(Request::Flush);
    assert_eq!(header[..], bytes().u32(0x25609513).u16(0).u16(3).u64(cookie).u64(0).u32(0).0);
    assert_eq!(Transmission::farewell()[..8], bytes().u32(0x25609513).u16(0).u16(2).0);
    assert_eq!(machine.in_flight(), 8);
}

/// A session with one of everything, and the replies to it, chunks of one among those of others.
fn everything() -> (Session, Vec<u8>) {
    let mut session = session();
    let first = session.ask(read(0, 10));
    let write = session.ask(Request::Write { range: ByteRange::new(0, 512), fua: false });
    let second = session.ask(read(1000, 6));
    let about = session.ask(about(1000, 2));
    let flush = session.ask(Request::Flush);
    let failed = session.ask(read(5, 5));
    let zeroes =
        session.ask(Request::WriteZeroes { range: ByteRange::new(0, 9), no_hole: false, fua: false });
    let stream = [
        data(second, false, 1003, b"xyz"),
        data(first, false, 0, b"0123"),
        simple(write, 28),
        hole(first, false, 6, 4),
        status(about, false, CONTEXT_ID, &[(100, 0), (100, 0), (300, 3), (400, 0), (4000, 3)]),
        data(failed, false, 5, b"ab"),
        simple(flush, 0),
        chunk(zeroes, true, NONE, &[]),
        data(second, true, 1000, b"uvw"),
        error(failed, false, 5, "bad sector"),
        chunk(failed, true, ERROR_OFFSET, &bytes().u32(12).u16(1).all(b"m").u64(7).0),
        data(first, true, 4, b"45"),
        chunk(about, true, NONE, &[]),
    ];
    (session, stream.concat())
}

#[test]
fn one_of_everything() {
    let (session, stream) = everything();
    let session = all(session, &stream);
    assert_eq!(session.broken, None);
    assert_eq!(contents(&session, 1), b"012345\0\0\0\0");
    assert_eq!(contents(&session, 3), b"uvwxyz");
    let extents = vec![StatusExtent { length: 200, flags: 0 }, StatusExtent { length: 300, flags: 3 }];
    for (cookie, expected) in [
        (1, Ok(Answer::Done)),
        (2, Err(WireError::NoSpace)),
        (3, Ok(Answer::Done)),
        (4, Ok(Answer::Extents(extents))),
        (5, Ok(Answer::Done)),
        (6, Err(WireError::Io)),
        (7, Ok(Answer::Done)),
    ] {
        assert_eq!(result(&session, cookie), Some(expected), "{cookie}");
    }
}

#[test]
fn it_makes_no_difference_how_the_stream_is_cut() {
    let (session, stream) = everything();
    let expected = all(session.clone(), &stream).asked;
    let mut by_bytes = session.clone();
    by_bytes.feed(&stream, || 1);
    assert_eq!(by_bytes.asked, expected);
    for cut in 1..stream.len() {
        let (mut cut_once, mut first) = (session.clone(), Some(cut));
        cut_once.feed(&stream, || first.take().unwrap_or(usize::MAX / 2));
        assert_eq!(cut_once.asked, expected, "{cut}");
        let cut_off = all(session.clone(), &stream[..cut]);
        assert!(
            cut_off.broken.is_none() && cut_off.asked.values().any(|asked| asked.result.is_none()),
            "{cut}"
        );
    }
}

#[test]
fn simple_replies() {
    let mut session = Session::new(&agreement(false, None));
    let (first, second) = (session.ask(read(0, 5)), session.ask(read(9, 3)));
    let stream = [simple(second, 0), b"xyz".to_vec(), simple(first, 77)].concat();
    let session = all(session, &stream);
    assert_eq!(contents(&session, second), b"xyz");
    assert_eq!(result(&session, first), Some(Err(WireError::Invalid)), "an unknown number is EINVAL");
    assert_eq!(result(&session, second), Some(Ok(Answer::Done)));
}

/// A server tells all contexts that were chosen, in any order; what was asked about is what counts, cut anywhere.
#[test]
fn of_two_contexts_each_request_takes_its_own() {
    const DEPTH_ID: u32 = 8;
    let agreed = Agreement { depth: Some(DEPTH_ID), ..agreement(true, Some(CONTEXT_ID)) };
    let range = ByteRange::new(4096, 100);
    let (first, second) = (&[(40, 3), (60, 0)][..], &[(10, 1), (20, 0), (70, 2)][..]);
    for (request, expected) in
        [(Request::Status { range, most: 9 }, first), (Request::Depth { range, most: 9 }, second)]
    {
        for depth_first in [true, false] {
            for step in [1, usize::MAX / 2] {
                let mut session = Session::new(&agreed);
                let cookie = session.ask(request);
                let told = [
                    status(
                        cookie,
                        false,
                        if depth_first { DEPTH_ID } else { CONTEXT_ID },
                        if depth_first { second } else { first },
                    ),
                    status(
                        cookie,
                        true,
                        if depth_first { CONTEXT_ID } else { DEPTH_ID },
                        if depth_first { first } else { second },
                    ),
                ];
                session.feed(&told.concat(), || step);
                let Some(Ok(Answer::Extents(extents))) = result(&session, cookie) else {
                    panic!("{request:?}: {:?}", session.broken)
                };
                let extents: Vec<_> = extents.iter().map(|extent| (extent.length, extent.flags)).collect();
                let expected: Vec<_> =
                    expected.iter().map(|&(length, flags)| (u64::from(length), flags)).collect();
                assert_eq!(extents, expected, "{request:?}");
            }
        }
        for ids in [[DEPTH_ID, DEPTH_ID], [CONTEXT_ID, CONTEXT_ID], [CONTEXT_ID, 9]] {
            let mut session = Session::new(&agreed);
            let cookie = session.ask(request);
            let told = ids.map(|id| status(cookie, false, id, &[(100, 0)]));
            session.feed(&told.concat(), || usize::MAX / 2);
            assert!(session.broken.is_some(), "{request:?} {ids:?}");
        }
        let mut session = Session::new(&agreed);
        let cookie = session.ask(request);
        let other = if matches!(request, Request::Depth { .. }) { CONTEXT_ID } else { DEPTH_ID };
        session.feed(&status(cookie, true, other, &[(100, 0)]), || usize::MAX / 2);
        assert!(session.broken.is_some(), "not a word of what was asked");
    }
}

#[test]
fn block_status_is_cut_where_it_is_asked_to_be() {
    let answer = |length, most, extents: &[(u32, u32)]| {
        let mut session = session();
        let cookie = session.ask(about(length, most));
        match result(&all(session, &status(cookie, true, CONTEXT_ID, extents)), cookie) {
            Some(Ok(Answer::Extents(extents))) => {
                extents.iter().map(|extent| (extent.length, extent.flags)).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(answer(100, 9, &[(u32::MAX, 3)]), [(100, 3)]);
    assert_eq!(answer(100, 9, &[(10, 0)]), [(10, 0)], "it may tell of less");
    assert_eq!(answer(100, 1, &[(10, 0), (20, 0), (5, 1), (5, 0)]), [(30, 0)]);
    // What follows a gap is not merged with what is before it.
    assert_eq!(answer(100, 2, &[(1, 0), (1, 1), (1, 0), (1, 1)]), [(1, 0), (1, 1)]);
    assert_eq!(answer(1 << 31, 9, &[(1 << 31, 2)]), [(1 << 31, 2)]);
}

/// What is said of `stream`, which is sent to a client with a read of 10 bytes at 100 (1), block status (2), a flush (3).
fn broken(agreed: (bool, Option<u32>), stream: &[Vec<u8>]) -> String {
    let mut session = Session::new(&agreement(agreed.0, agreed.1));
    session.ask(read(100, 10));
    session.ask(about(100, 4));
    session.ask(Request::Flush);
    let session = all(session, &stream.concat());
    session.broken.map_or_else(|| format!("{:?}", session.asked), |violation| violation.to_string())
}

#[test]
fn violations() {
    let modern = (true, Some(CONTEXT_ID));
    let scattered: Vec<_> = (0..300).map(|number| data(4, false, 2 * number, &[1])).collect();
    let mut many = session();
    for _ in 0..3 {
        many.ask(Request::Flush);
    }
    many.ask(read(0, 1000));
    assert_eq!(all(many, &scattered.concat()).broken.unwrap().0, "contents in too many pieces");
    for (stream, expected) in [
        (vec![vec![0; 20]], "no reply where one was due"),
        (vec![simple(9, 0)], "a request that was not made"),
        (vec![simple(3, 0), simple(3, 0)], "a request that was not made"),
        (vec![data(9, true, 100, b"x")], "a request that was not made"),
        (vec![simple(1, 0)], "in one piece"),
        (vec![data(1, true, 100, b"123456789")], "without all of its bytes"),
        (vec![chunk(1, true, NONE, &[])], "without all of its bytes"),
        (vec![data(1, false, 100, b"12"), data(1, false, 101, b"2")], "the same contents twice"),
        (vec![hole(1, false, 100, 5), hole(1, false, 104, 5)], "the same contents twice"),
        (vec![data(1, false, 99, b"1")], "beyond what was asked for"),
        (vec![data(1, false, 105, b"123456")], "beyond what was asked for"),
        (vec![data(1, false, u64::MAX, b"1")], "beyond what was asked for"),
        (vec![hole(1, false, 100, 11)], "beyond what was asked for"),
        (vec![hole(1, false, 100, 0)], "an empty chunk"),
        (vec![data(1, false, 100, b"")], "does not go with its request"),
        (vec![data(1, false, 100, b"12345678901")], "does not go with its request"),
        (vec![data(2, false, 100, b"1")], "does not go with its request"),
        (vec![hole(3, false, 100, 1)], "does not go with its request"),
        (vec![status(1, true, CONTEXT_ID, &[(1, 0)])], "does not go with its request"),
        (vec![chunk(1, false, NONE, &[])], "does not go with its request"),
        (vec![chunk(1, true, NONE, &[0])], "does not go with its request"),
        (vec![chunk(1, true, 77, &[0; 8])], "does not go with its request"),
        (vec![chunk(1, true, ERROR, &[0; 5])], "does not go with its request"),
        (vec![chunk(1, true, ERROR, &[1; 4111])], "does not go with its request"),
        (vec![error(1, true, 0, "fine")], "an error that is none"),
        (vec![chunk(1, true, ERROR, &bytes().u32(5).u16(9).all(b"short").0)], "a message that is cut off"),
        (vec![error(1, false, 5, ""); 17], "errors without end"),
        (vec![status(2, true, 8, &[(1, 0)])], "a context that was not chosen"),
        (vec![status(2, true, CONTEXT_ID, &[])], "a strange length"),
        (vec![chunk(2, true, STATUS, &[0; 13])], "a strange length"),
        (vec![status(2, true, CONTEXT_ID, &[(0, 0)])], "beyond what was asked for"),
        (vec![status(2, true, CONTEXT_ID, &[(100, 0), (1, 0)])], "beyond what was asked for"),
        (vec![status(2, false, CONTEXT_ID, &[(9, 0)]); 2], "block status of one context twice"),
        (vec![chunk(2, true, NONE, &[])], "block status that ended without any"),
        (vec![simple(2, 0)], "block status that ended without any"),
    ] {
        let said = broken(modern, &stream);
        assert!(said.contains(expected), "{said} for {expected}");
    }
    let huge = bytes().u32(0x668e33ef).u16(1).u16(STATUS).u64(2).u32(4 + 8 * ((1 << 20) + 1)).0;
    assert!(broken(modern, &[huge]).contains("a strange length"));
    assert!(broken((false, None), &[data(1, true, 100, b"x")]).contains("no chunks were agreed on"));
    assert!(broken((true, None), &[status(2, true, 0, &[(1, 0)])]).contains("was not chosen"));
}

#[test]
fn errors_of_any_kind_and_length() {
    for kind in [ERROR, ERROR_OFFSET, (1 << 15) + 500] {
        for message in [0, 1, 4096] {
            let mut session = session();
            let cookie = session.ask(read(0, 4));
            let payload = bytes().u32(28).u16(message).all(&vec![b'm'; usize::from(message)]);
            let payload = if kind == ERROR_OFFSET { payload.u64(3) } else { payload };
            let session = all(
                session,
                &[chunk(cookie, false, kind, &payload.0), data(cookie, true, 0, b"1234")].concat(),
            );
            assert_eq!(result(&session, cookie), Some(Err(WireError::NoSpace)), "{kind} {message}");
        }
    }
}

#[test]
#[should_panic(expected = "are in flight already")]
fn requests_are_bounded() {
    let mut session = session();
    for _ in 0..1025 {
        session.ask(Request::Flush);
    }
}
