//! Reads: chunks, replies as a whole, and those too long for that.

use std::sync::Arc;

use engine::nbd::{CloseReason, ConnectionLimits, Export, IoKind, Outcome, WireError};
use engine::units::{ByteRange, Length};

use crate::client::*;
use crate::session::{Session, Shelf, contents, well};

const PIECE: u64 = 256 << 10;
const LONG: u64 = 64 << 20;

fn open_long(structured: bool, shared: usize) -> Session {
    open_with(ConnectionLimits::default(), structured, shared)
}

fn open_with(limits: ConnectionLimits, structured: bool, shared: usize) -> Session {
    let export = Export::new("disk", Length(LONG), false).unwrap();
    let mut session = Session::with(limits, Shelf(vec![Arc::new(export)]), shared);
    session.choose("disk", structured, &[]);
    session
}

fn range_of(kind: &IoKind) -> ByteRange {
    match kind {
        IoKind::Read { range } => *range,
        other => panic!("{other:?}"),
    }
}

/// A read that is answered in the order of its I/O, or the other way around.
fn read(session: &mut Session, request: Request, backwards: bool) -> (Reply, Vec<ByteRange>) {
    let cookie = request.cookie;
    session.request(request);
    let mut ranges = Vec::new();
    while let Some((id, kind)) = if backwards { session.ios.pop_back() } else { session.ios.pop_front() } {
        ranges.push(range_of(&kind));
        session.answer(id, well(&kind));
    }
    (session.replies().remove(&cookie).unwrap(), ranges)
}

#[test]
fn a_long_read_is_pieces_that_end_where_the_disk_is_aligned() {
    for backwards in [false, true] {
        let mut session = open_long(true, 64 << 20);
        let request = Request::new(READ, 0, 1, 1000, 32 << 20);
        let (reply, ranges) = read(&mut session, request.clone(), backwards);
        assert_eq!(reply.whole(&request), contents(1000, 32 << 20));
        assert_eq!(reply.chunks, 129);
        assert!(ranges.iter().all(|range| range.length <= PIECE));
        let unaligned = ranges.iter().filter(|range| !range.end().is_multiple_of(PIECE)).count();
        assert_eq!(unaligned, 1, "but the last");
    }
}

#[test]
fn what_is_no_longer_than_a_piece_is_one() {
    let mut session = open_long(true, 64 << 20);
    let request = Request::new(READ, 0, 1, PIECE - 1, PIECE as u32);
    assert_eq!(read(&mut session, request, false).1, [ByteRange::new(PIECE - 1, PIECE)]);
}

#[test]
fn a_request_has_so_many_pieces_on_the_disk_and_others_have_their_turn() {
    let mut session = open_long(true, 64 << 20);
    session.request(Request::new(READ, 0, 1, 0, 8 << 20));
    assert_eq!(session.ios.len(), 4);
    session.request(Request::new(READ, 0, 2, 0, 8 << 20));
    session.request(Request::new(READ, 0, 3, 0, 4096));
    // 8 pieces are what a connection may have: the third has to wait for one.
    assert_eq!(session.ios.len(), 8);
    session.answer_next(well);
    assert_eq!(session.ios.len(), 8);
    assert_eq!(range_of(&session.ios.back().unwrap().1), ByteRange::new(0, 4096));
    let (id, kind) = session.ios.pop_back().unwrap();
    session.answer(id, well(&kind));
    assert!(session.replies().contains_key(&3), "its reply came between theirs");
    session.answer_all();
    assert_eq!(session.replies().len(), 2);
}

#[test]
fn zeros_are_holes_in_chunks_and_zeros_elsewhere() {
    for (structured, flags) in [(true, 0), (true, DF), (false, 0)] {
        let mut session = open_long(structured, 64 << 20);
        let request = Request::new(READ, flags, 1, 0, 3 * PIECE as u32);
        session.request(request.clone());
        while !session.ios.is_empty() {
            session
                .answer_next(|kind| if range_of(kind).offset == PIECE { well(kind) } else { Outcome::Zero });
        }
        let reply = session.replies().remove(&1).unwrap();
        assert_eq!(reply.holes, if structured && flags == 0 { 2 } else { 0 });
        let mut whole = vec![0; 3 * PIECE as usize];
        whole[PIECE as usize..2 * PIECE as usize].copy_from_slice(&contents(PIECE, PIECE));
        assert!(reply.whole(&request) == whole);
        assert_eq!(session.connection.buffered().outgoing, 0);
    }
}

#[test]
fn an_error_in_the_middle_of_chunks_is_told_with_its_offset() {
    let mut session = open_long(true, 64 << 20);
    session.request(Request::new(READ, 0, 1, 0, 32 << 20));
    let fails = |kind: &IoKind| match range_of(kind).offset / PIECE {
        1 => Outcome::Failed(WireError::NoSpace),
        2 => Outcome::Failed(WireError::Io),
        _ => well(kind),
    };
    // The later one is known first.
    let mut ios: Vec<_> = session.ios.drain(..).collect();
    ios.reverse();
    for (id, kind) in ios {
        session.answer(id, fails(&kind));
    }
    assert!(session.ios.len() <= 4);
    while !session.ios.is_empty() {
        session.answer_next(fails);
    }
    let reply = session.replies().remove(&1).unwrap();
    assert_eq!(reply.errors, [(ENOSPC, Some(PIECE))]);
    assert!(reply.data.len() < 10, "the rest is not read");
    assert!(reply.data.iter().all(|(offset, data)| *data == contents(*offset, data.len() as u64)));
    assert_eq!(session.connection.buffered().outgoing, 0);
}

#[test]
fn a_whole_reply_is_one_chunk_whatever_the_order_of_its_pieces() {
    for (structured, flags) in [(true, DF), (false, 0)] {
        for length in [1, 65536, PIECE as u32, PIECE as u32 + 1, 1 << 20, (1 << 20) + 1, 32 << 20] {
            for backwards in [false, true] {
                let mut session = open_long(structured, 64 << 20);
                let request = Request::new(READ, flags, 1, 4095, length);
                let (reply, _) = read(&mut session, request.clone(), backwards);
                assert_eq!((reply.data.len(), reply.errors.len()), (1, 0), "{length}");
                assert!(reply.whole(&request) == contents(4095, u64::from(length)));
                assert_eq!(session.connection.buffered().outgoing, 0);
            }
        }
    }
}

#[test]
fn a_whole_reply_is_read_before_it_is_sent() {
    for (structured, flags) in [(true, DF), (false, 0)] {
        let mut session = open_long(structured, 64 << 20);
        session.request(Request::new(READ, flags, 1, 0, 1 << 20));
        assert_eq!(session.ios.len(), 4);
        for _ in 0..3 {
            session.answer_next(well);
        }
        assert!(session.parser.rest().is_empty(), "nothing has gone");
        session.answer_next(|_| Outcome::Failed(WireError::Io));
        let reply = session.replies().remove(&1).unwrap();
        assert_eq!(reply.errors, [(EIO, structured.then_some(3 * PIECE))]);
        assert!(reply.data.is_empty());
        assert_eq!(session.connection.buffered().outgoing, 0);
    }
}

#[test]
fn a_long_whole_reply_can_still_fail_while_its_window_fills() {
    for (structured, flags) in [(true, DF), (false, 0)] {
        let mut session = open_long(structured, 64 << 20);
        session.request(Request::new(READ, flags, 1, 0, 8 << 20));
        assert_eq!(session.ios.len(), 4);
        session.answer_next(|_| Outcome::Failed(WireError::Io));
        for _ in 0..3 {
            assert!(session.parser.rest().is_empty());
            session.answer_next(well);
        }
        assert_eq!(session.replies()[&1].errors, [(EIO, structured.then_some(0))]);
        assert!(session.ios.is_empty() && session.closed.is_none());
        assert_eq!(session.connection.buffered().outgoing, 0);
        // The next one has its turn.
        let request = Request::new(READ, flags, 2, 0, 2 << 20);
        assert!(read(&mut session, request.clone(), false).0.whole(&request) == contents(0, 2 << 20));
    }
}

#[test]
fn after_its_header_a_simple_reply_can_only_be_cut_off() {
    let mut session = open_long(false, 64 << 20);
    session.request(Request::new(READ, 0, 1, 0, 8 << 20));
    for _ in 0..4 {
        session.answer_next(well);
    }
    assert!(!session.parser.rest().is_empty() && session.closed.is_none());
    session.answer_next(|_| Outcome::Failed(WireError::Io));
    assert_eq!(session.closed, Some(CloseReason::ReadFailed));
    assert!(!session.connection.is_finished(), "its other pieces are on the disk");
    let sent = session.parser.bytes.len();
    session.answer_all();
    assert_eq!(session.parser.bytes.len(), sent, "nothing is sent any more");
    assert!(session.connection.is_finished());
}

#[test]
fn after_its_header_a_structured_reply_is_filled_up_and_then_told() {
    let mut session = open_long(true, 64 << 20);
    let request = Request::new(READ, DF, 1, 0, 8 << 20);
    session.request(request.clone());
    let mut pieces = 0;
    while !session.ios.is_empty() {
        pieces += 1;
        session.answer_next(|kind| match range_of(kind).offset / PIECE {
            20 | 25 => Outcome::Failed(WireError::Io),
            _ => well(kind),
        });
    }
    assert_eq!(pieces, 32);
    let reply = session.replies().remove(&1).unwrap();
    assert_eq!(reply.errors, [(EIO, Some(20 * PIECE))]);
    let whole = reply.whole(&request);
    assert!(whole[..20 * PIECE as usize] == contents(0, 20 * PIECE));
    assert!(whole[20 * PIECE as usize..21 * PIECE as usize].iter().all(|&byte| byte == 0));
    assert_eq!(reply.chunks, 2);
    assert_eq!(session.connection.buffered().outgoing, 0);
}

#[test]
fn replies_wait_behind_one_that_goes_as_a_whole() {
    let mut session = open_long(true, 64 << 20);
    let long = Request::new(READ, DF, 1, 0, 4 << 20);
    session.request(long.clone());
    for _ in 0..4 {
        session.answer_next(well);
    }
    session.request(Request::new(READ, 0, 2, 0, 4096));
    session.request(Request::new(FLUSH, 0, 3, 0, 0));
    // They are on the disk at once, and answered.
    for _ in 0..2 {
        let (id, kind) = session.ios.pop_back().unwrap();
        assert!(matches!(kind, IoKind::Flush) || range_of(&kind).length == 4096);
        session.answer(id, well(&kind));
    }
    assert!(session.replies().is_empty());
    session.answer_all();
    let replies = session.replies();
    assert_eq!(replies.len(), 3);
    assert!(replies[&1].whole(&long) == contents(0, 4 << 20));
}

#[test]
fn whole_replies_go_on_when_others_have_all_that_is_shared() {
    for (structured, flags) in [(true, DF), (false, 0), (true, 0)] {
        let mut session = open_long(structured, 0);
        let mut wanted = Vec::new();
        for (cookie, length) in [64 << 10, 100_000, 1 << 20, 5 << 20, 4096, 300_000].into_iter().enumerate() {
            let request = Request::new(READ, flags, cookie as u64, 12_345, length);
            session.request(request.clone());
            wanted.push(request);
        }
        while !session.ios.is_empty() {
            session.answer_next(well);
            let buffered = session.connection.buffered();
            assert!(buffered.outgoing <= 128 << 10, "{buffered:?}");
        }
        let replies = session.replies();
        for request in wanted {
            let whole = replies[&request.cookie].whole(&request);
            assert!(whole == contents(12_345, u64::from(request.length)));
        }
    }
}

#[test]
fn several_long_whole_replies_take_turns() {
    for drains in [true, false] {
        let mut session = open_long(false, 64 << 20);
        session.drains = drains;
        let requests: Vec<_> =
            (0..5).map(|cookie| Request::new(READ, 0, cookie, cookie * 999, 3 << 20)).collect();
        for request in &requests {
            session.request(request.clone());
        }
        while session.requests.len() > session.partial.len() && (!session.ios.is_empty() || session.sending) {
            if session.sending && (session.ios.is_empty() || fastrand::bool()) {
                session.sent();
                session.turn();
            } else {
                session.answer_next(well);
            }
            let buffered = session.connection.buffered();
            assert!(buffered.stream <= 1 << 20, "{buffered:?}");
        }
        let replies = session.replies();
        for request in &requests {
            assert!(replies[&request.cookie].whole(request) == contents(request.offset, 3 << 20));
        }
    }
}

#[test]
fn a_window_is_filled_before_the_header_also_behind_another_reply() {
    for seed in 0..200 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut session = open_long(false, 64 << 20);
        session.drains = false;
        session.request(Request::new(READ, 0, 1, 0, 2 << 20));
        session.request(Request::new(READ, 0, 2, 4 << 20, 2 << 20));
        // The first fails nowhere, the second in its first window.
        let bad = (16 + rng.u64(0..4)) * PIECE;
        let (mut failed, mut begun_after) = (false, 0);
        while !session.ios.is_empty() || session.sending {
            let (known_to_fail, mut left) = (failed, session.ios.len());
            if session.sending && (session.ios.is_empty() || rng.u8(..4) == 0) {
                session.sent();
                session.turn();
            } else {
                let (id, kind) = session.ios.swap_remove_back(rng.usize(..session.ios.len())).unwrap();
                let fails = range_of(&kind).offset == bad;
                failed |= fails;
                left -= 1;
                session.answer(id, if fails { Outcome::Failed(WireError::Io) } else { well(&kind) });
            }
            if known_to_fail {
                begun_after += session.ios.len() - left;
            }
            assert_eq!(session.closed, None, "seed {seed}");
        }
        let replies = session.replies();
        assert_eq!((replies[&1].errors.len(), &replies[&2].errors[..]), (0, &[(EIO, None)][..]));
        assert_eq!(begun_after, 0, "seed {seed}: nothing is read for a reply that has failed");
    }
}

#[test]
fn long_reads_take_turns_piece_by_piece() {
    let mut session = open_long(true, 64 << 20);
    // Two that fill what a connection may have, and two that wait.
    for (cookie, length) in [(0, 1 << 20), (1, 1 << 20), (2, 8 << 20), (3, 8 << 20)] {
        session.request(Request::new(READ, 0, cookie, cookie << 23, length));
    }
    assert_eq!(session.ios.len(), 8);
    for _ in 0..4 {
        session.answer_next(well);
    }
    let turns: Vec<u64> = session.ios.iter().skip(4).map(|(_, kind)| range_of(kind).offset >> 23).collect();
    assert_eq!(turns, [2, 3, 2, 3]);
}
