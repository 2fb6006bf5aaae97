//! Writes: payloads in pieces, refused ones, and durability.

use std::sync::Arc;

use engine::nbd::{CloseReason, ConnectionLimits, Export, IoKind, Outcome, Receive, WireError};
use engine::units::Length;

use crate::client::*;
use crate::session::{DISK, Session, Shelf, contents};

const PIECE: usize = 256 << 10;

fn open_long(shared: usize) -> Session {
    let export = Export::new("disk", Length(64 << 20), false).unwrap();
    let mut session = Session::with(ConnectionLimits::default(), Shelf(vec![Arc::new(export)]), shared);
    session.choose("disk", true, &[]);
    session
}

/// Feed a request, answering I/O as it stops for it; the largest number of bytes that were held.
fn feed_all(session: &mut Session, request: Request) -> (usize, Vec<IoKind>) {
    let bytes = request.bytes();
    session.requests.insert(request.cookie, request);
    let (mut rest, mut most, mut kinds) = (&bytes[..], 0, Vec::new());
    loop {
        rest = session.feed(rest);
        most = most.max(session.connection.buffered().incoming);
        if rest.is_empty() {
            kinds.extend(session.answer_all());
            return (most, kinds);
        }
        kinds.push(session.answer_next(|_| Outcome::Done));
    }
}

fn put_together(kinds: &[IoKind]) -> Vec<u8> {
    let mut parts: Vec<_> = kinds
        .iter()
        .map(|kind| match kind {
            IoKind::Write { offset, data, .. } => (*offset, data.clone()),
            other => panic!("{other:?}"),
        })
        .collect();
    parts.sort();
    parts.into_iter().flat_map(|(_, data)| data).collect()
}

#[test]
fn pieces_are_told_to_be_of_one_request_and_the_next_one_in_its_place_is_another() {
    let mut session = open_long(64 << 20);
    let mut before = None;
    for cookie in 0..3 {
        let data = contents(0, 2 * PIECE as u64);
        session.request(Request::write(0, cookie, 0, data));
        let ids: Vec<_> = session.ios.iter().map(|&(id, _)| id).collect();
        let request = session.connection.request_of(ids[0]).unwrap();
        assert_eq!((ids.len(), session.connection.request_of(ids[1])), (2, Some(request)));
        assert!(session.connection.has_request(request) && before != Some(request));
        session.answer_next(|_| Outcome::Done);
        assert!(session.connection.has_request(request), "a piece is under way");
        session.answer_next(|_| Outcome::Done);
        assert!(!session.connection.has_request(request));
        before = Some(request);
    }
    // Everything is abandoned.
    session.request(Request::write(0, 9, 0, contents(0, 512)));
    let (id, _) = session.ios[0];
    session.connection.lost();
    session.turn();
    assert_eq!(session.connection.request_of(id), None);
}

#[test]
fn a_long_write_never_is_in_memory_as_a_whole() {
    let mut session = open_long(64 << 20);
    let data = contents(77, 32 << 20);
    let (most, kinds) = feed_all(&mut session, Request::write(0, 1, 77, data.clone()));
    assert!(put_together(&kinds) == data);
    assert_eq!(kinds.len(), 129);
    assert!((1 << 20..=2 << 20).contains(&most), "{most}");
    assert_eq!(session.replies()[&1].errors, []);
    assert_eq!(session.connection.buffered().incoming, 0);
}

#[test]
fn a_write_goes_on_when_others_have_all_that_is_shared() {
    let mut session = open_long(0);
    let data = contents(5000, 1 << 20);
    let (most, kinds) = feed_all(&mut session, Request::write(0, 1, 5000, data.clone()));
    assert!(put_together(&kinds) == data);
    assert!(most <= 64 << 10, "{most}");
}

#[test]
fn the_first_piece_is_on_the_disk_before_the_last_has_come() {
    let mut session = open_long(64 << 20);
    let bytes = Request::write(0, 1, 0, vec![9; 3 * PIECE]).bytes();
    session.feed(&bytes[..28 + PIECE]);
    assert_eq!(session.ios.len(), 1);
    session.feed(&bytes[28 + PIECE..28 + 2 * PIECE]);
    assert_eq!(session.ios.len(), 2);
}

#[test]
fn payloads_are_received_where_they_stay() {
    let mut session = open_long(64 << 20);
    let data = contents(0, PIECE as u64);
    let request = Request::write(0, 1, 0, data.clone());
    session.requests.insert(1, request.clone());
    let bytes = request.bytes();
    session.connection.received(&bytes[..1000]);
    session.turn();
    assert_eq!(session.connection.wants(), Some(Receive::Payload { missing: PIECE - 972 }));
    let mut lent = session.connection.lend_payload();
    assert_eq!((lent.buffer.len(), lent.filled), (PIECE, 972));
    assert_eq!(session.connection.wants(), None, "one receive at a time");
    // A short receive, and the rest.
    lent.buffer[972..5000].copy_from_slice(&data[972..5000]);
    session.connection.received_payload(lent, 5000 - 972);
    session.turn();
    let mut lent = session.connection.lend_payload();
    assert_eq!(lent.filled, 5000);
    lent.buffer[5000..].copy_from_slice(&data[5000..]);
    let place = lent.buffer.as_ptr();
    session.connection.received_payload(lent, PIECE - 5000);
    session.turn();
    let kind = session.answer_next(|_| Outcome::Done);
    let IoKind::Write { offset: 0, data: written, fua: false } = kind else { panic!() };
    assert!(written == data && written.as_ptr() == place, "it was not copied");
    assert_eq!(session.replies()[&1].errors, []);
}

#[test]
fn many_small_writes_come_in_one_receive() {
    let mut session = open_long(64 << 20);
    let requests: Vec<_> =
        (0..16).map(|cookie| Request::write(0, cookie, cookie * 4096, contents(cookie, 4096))).collect();
    let bytes: Vec<u8> = requests.iter().flat_map(Request::bytes).collect();
    let mut receives = 0;
    let mut rest = &bytes[..];
    // As often as it was done before, it asks for more at a time.
    for round in 0..8 {
        for request in &requests {
            session.requests.insert(request.cookie, request.clone());
        }
        receives = 0;
        rest = &bytes[..];
        while !rest.is_empty() {
            let Some(Receive::Any { most }) = session.connection.wants() else { panic!("round {round}") };
            let (now, later) = rest.split_at(most.min(rest.len()));
            session.connection.received(now);
            session.turn();
            (rest, receives) = (later, receives + 1);
        }
        assert_eq!(session.ios.len(), 16);
        session.answer_all();
        assert_eq!(session.replies().len(), 16);
    }
    assert!(rest.is_empty() && receives <= 2, "{receives}");
}

#[test]
fn the_payload_of_a_refused_write_is_dropped() {
    let mut session = Session::open("disk", true, &[]);
    for (cookie, offset, flags, error) in
        [(1, DISK - 5, 0, ENOSPC), (2, u64::MAX, 0, ENOSPC), (3, 0, DF, EINVAL)]
    {
        // What looks like requests in it is none.
        let bait = Request::new(DISC, 0, 9, 0, 0).bytes().repeat(100_000);
        session.requests.insert(cookie, Request::new(WRITE, flags, cookie, offset, bait.len() as u32));
        let bytes = Request::write(flags, cookie, offset, bait).bytes();
        for chunk in bytes.chunks(50_000) {
            assert!(session.replies().is_empty());
            assert!(session.feed(chunk).is_empty());
            assert_eq!(session.connection.buffered().incoming, 0);
        }
        assert_eq!(session.replies()[&cookie].errors, [(error, None)]);
        assert!(session.ios.is_empty() && session.closed.is_none());
    }
    let mut session = Session::open("snapshot", false, &[]);
    assert_eq!(session.error_of(Request::write(0, 1, 0, vec![0; 1 << 20])), EPERM);
}

#[test]
fn a_payload_beyond_all_measure_ends_it() {
    let mut session = open_long(64 << 20);
    session.feed(&Request::new(WRITE, 0, 1, 0, (32 << 20) + 1).bytes());
    assert!(matches!(session.closed, Some(CloseReason::Violation(_))));
    // 32 MiB are not, even beyond the end.
    let mut session = Session::open("disk", true, &[]);
    assert_eq!(session.error_of(Request::write(0, 1, 0, vec![0; 32 << 20])), ENOSPC);
}

#[test]
fn once_a_piece_has_failed_the_rest_is_dropped() {
    let mut session = open_long(64 << 20);
    let request = Request::write(FUA, 1, 0, vec![9; 16 * PIECE]);
    let bytes = request.bytes();
    session.requests.insert(1, request);
    let rest = session.feed(&bytes[..28 + 3 * PIECE]);
    assert!(rest.is_empty());
    assert_eq!(session.ios.len(), 3);
    session.answer_next(|_| Outcome::Done);
    session.answer_next(|_| Outcome::Failed(WireError::NoSpace));
    // The piece that is being received may still be received, but not written; for those after it there is not even memory.
    let middle = 28 + 5 * PIECE + 1000;
    assert!(session.feed(&bytes[28 + 3 * PIECE..middle]).is_empty());
    assert_eq!(session.connection.buffered().incoming, PIECE, "that on the disk");
    assert!(session.feed(&bytes[middle..]).is_empty());
    assert_eq!(session.ios.len(), 1);
    assert!(session.replies().is_empty(), "a piece is on the disk");
    session.answer_next(|_| Outcome::Done);
    assert!(session.ios.is_empty(), "no flush");
    assert_eq!(session.replies()[&1].errors, [(ENOSPC, Some(PIECE as u64))]);
    assert_eq!(session.connection.buffered().incoming, 0);
    assert_eq!(session.reply_to(Request::write(0, 2, 0, vec![1; 10])).errors, []);
}

#[test]
fn of_several_failures_the_lowest_is_told() {
    let mut session = open_long(64 << 20);
    session.request(Request::write(0, 1, 0, vec![9; 3 * PIECE]));
    for error in [WireError::NoMemory, WireError::Io, WireError::NoSpace] {
        let (id, _) = session.ios.pop_back().unwrap();
        session.answer(id, Outcome::Failed(error));
    }
    assert_eq!(session.replies()[&1].errors, [(ENOSPC, Some(0))]);
}

#[test]
fn a_long_durable_write_is_flushed_once_after_its_last_piece() {
    let mut session = open_long(64 << 20);
    session.request(Request::write(FUA, 1, 0, vec![9; 3 * PIECE]));
    for _ in 0..3 {
        let kind = session.answer_next(|_| Outcome::Done);
        assert!(matches!(kind, IoKind::Write { fua: false, .. }));
        assert!(session.replies().is_empty());
    }
    assert_eq!(session.answer_next(|_| Outcome::Failed(WireError::Io)), IoKind::Flush);
    assert_eq!(session.replies()[&1].errors, [(EIO, None)]);
    session.request(Request::write(FUA, 2, 0, vec![9; 3 * PIECE]));
    session.answer_all();
    assert_eq!(session.replies()[&2].errors, []);
    // A short one is durable by itself.
    session.request(Request::write(FUA, 3, 0, vec![9; PIECE]));
    assert!(matches!(session.answer_next(|_| Outcome::Done), IoKind::Write { fua: true, .. }));
    assert_eq!(session.replies()[&3].errors, []);
}

#[test]
fn replies_of_writes_come_in_any_order() {
    let mut session = open_long(64 << 20);
    for cookie in 0..10 {
        session.request(Request::write(0, cookie, cookie, vec![1]));
    }
    while let Some((id, _)) = session.ios.pop_back() {
        session.answer(id, Outcome::Done);
        assert_eq!(session.replies().len(), 1);
    }
}

#[test]
fn replies_of_a_turn_leave_together() {
    let mut session = open_long(64 << 20);
    session.drains = false;
    for cookie in 0..50 {
        session.request(Request::write(0, cookie, cookie, vec![1]));
    }
    for (id, _) in std::mem::take(&mut session.ios) {
        session.connection.answered(id, Outcome::Done);
    }
    session.turn();
    assert!(session.sending);
    assert_eq!(session.replies().len(), 50);
}
