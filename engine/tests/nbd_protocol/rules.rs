//! Requests that are refused, or answered without I/O, and those that are one I/O.

use std::sync::Arc;

use engine::nbd::{
    CloseReason, ConnectionLimits, Export, Features, IoKind, MetaContext, Outcome, StatusExtent, WireError,
};
use engine::units::{ByteRange, Length};
use nix::errno::Errno;

use crate::client::*;
use crate::session::{DISK, Session, Shelf};

const RANGED: [u16; 6] = [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS];

fn open(structured: bool) -> Session {
    let contexts: &[&str] = if structured { &["base:allocation"] } else { &[] };
    Session::open("disk", structured, contexts)
}

/// A request on 512 bytes, with the payload if it has one.
fn some(command: u16, flags: u16, cookie: u64, offset: u64) -> Request {
    match command {
        WRITE => Request::write(flags, cookie, offset, vec![1; 512]),
        FLUSH | DISC => Request::new(command, flags, cookie, 0, 0),
        _ => Request::new(command, flags, cookie, offset, 512),
    }
}

#[test]
fn unknown_commands_are_refused_and_it_goes_on() {
    for structured in [false, true] {
        let mut session = open(structured);
        for (cookie, command) in [8, 9, 100, u16::MAX].into_iter().enumerate() {
            // Whatever they say of a length, no payload follows.
            let request = Request::new(command, 0, cookie as u64, 3, 1 << 31);
            assert_eq!(session.error_of(request), EINVAL);
        }
        assert_eq!(session.reply_to(some(READ, 0, 99, 0)).errors, []);
    }
}

#[test]
fn flags_that_are_not_the_commands_are_refused() {
    let allowed = |command: u16, structured: bool| {
        FUA | match command {
            READ if structured => DF,
            WRITE_ZEROES => NO_HOLE | FAST_ZERO,
            BLOCK_STATUS => REQ_ONE,
            _ => 0,
        }
    };
    for structured in [false, true] {
        let mut session = open(structured);
        for command in
            RANGED.into_iter().chain([FLUSH]).filter(|&command| structured || command != BLOCK_STATUS)
        {
            for bit in 0..16 {
                let (flag, cookie) = (1 << bit, u64::from(command) << 16 | bit);
                let request = some(command, flag, cookie, 0);
                if allowed(command, structured) & flag == 0 {
                    assert_eq!(session.error_of(request), EINVAL, "{command} {flag}");
                } else {
                    assert_eq!(session.reply_to(request).errors, [], "{command} {flag}");
                }
            }
        }
    }
}

#[test]
fn requests_across_and_beyond_the_end() {
    let mut session = open(true);
    let mut cookie = 0;
    for command in RANGED {
        let error = if matches!(command, WRITE | WRITE_ZEROES) { ENOSPC } else { EINVAL };
        for offset in [DISK - 511, DISK - 1, DISK, DISK + 1, u64::MAX - 511, u64::MAX] {
            cookie += 1;
            assert_eq!(session.error_of(some(command, 0, cookie, offset)), error, "{command} {offset}");
        }
        cookie += 1;
        assert_eq!(session.reply_to(some(command, 0, cookie, DISK - 512)).errors, [], "{command} at the end");
    }
}

#[test]
fn a_length_that_overflows_the_offset_is_beyond() {
    let mut session = open(true);
    assert_eq!(session.error_of(Request::new(TRIM, 0, 1, u64::MAX, u32::MAX)), EINVAL);
    assert_eq!(session.error_of(Request::new(WRITE_ZEROES, 0, 2, u64::MAX, u32::MAX)), ENOSPC);
    assert_eq!(session.error_of(Request::new(READ, 0, 3, 0, u32::MAX)), EINVAL);
}

#[test]
fn nothing_is_done_with_nothing() {
    for structured in [false, true] {
        let mut session = open(structured);
        for (cookie, command) in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES].into_iter().enumerate() {
            for (more, offset) in [(0, 0), (100, DISK)] {
                let request = Request::new(command, 0, cookie as u64 + more, offset, 0);
                session.request(request);
                assert!(session.ios.is_empty());
                let replies = session.replies();
                let reply = &replies[&(cookie as u64 + more)];
                assert!(reply.errors.is_empty());
                assert_eq!(reply.simple, !(structured && command == READ), "reads are structured");
            }
            let beyond = Request::new(command, 0, cookie as u64 + 200, DISK + 1, 0);
            let error = if matches!(command, WRITE | WRITE_ZEROES) { ENOSPC } else { EINVAL };
            assert_eq!(session.error_of(beyond), error);
        }
    }
    assert_eq!(open(true).error_of(Request::new(BLOCK_STATUS, 0, 1, 0, 0)), EINVAL);
}

#[test]
fn every_reply_to_a_read_is_structured_once_negotiated() {
    let mut session = open(true);
    for (cookie, request) in [
        Request::new(READ, 0, 0, DISK, 1),
        Request::new(READ, NO_HOLE, 1, 0, 512),
        Request::new(READ, 0, 2, 0, 0),
        Request::new(READ, DF, 3, 0, 512),
    ]
    .into_iter()
    .enumerate()
    {
        session.request(request);
        session.answer_all();
        let reply = session.replies().remove(&(cookie as u64)).unwrap();
        assert!(!reply.simple, "{cookie}");
        assert_eq!(reply.chunks, 1);
    }
    let mut session = open(false);
    assert!(session.reply_to(some(READ, 0, 1, 0)).simple);
}

#[test]
fn a_read_only_export_is_not_changed() {
    for structured in [false, true] {
        let mut session = Session::open("snapshot", structured, &[]);
        for (cookie, command) in [WRITE, TRIM, WRITE_ZEROES].into_iter().enumerate() {
            assert_eq!(session.error_of(some(command, FUA, cookie as u64, 0)), EPERM);
            assert_eq!(session.error_of(some(command, 0, cookie as u64 + 10, DISK)), EPERM);
        }
        assert_eq!(session.error_of(Request::new(FLUSH, 0, 98, 0, 0)), 0);
        assert_eq!(session.reply_to(some(READ, FUA, 99, 0)).errors, []);
    }
}

#[test]
fn what_is_not_offered_is_refused_and_caching_is_not() {
    let mut export = Export::new("disk", Length(DISK), false).unwrap();
    let none = Features { flush: false, trim: false, write_zeroes: false, ..Features::ALL };
    export.features = Features { fast_zero: false, cache: false, multi_conn: false, ..none };
    assert_eq!(export.transmission_flags(true), 0x81);
    let mut session = Session::with(ConnectionLimits::default(), Shelf(vec![Arc::new(export)]), 1 << 20);
    session.choose("disk", true, &[]);
    for (cookie, command) in [FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS].into_iter().enumerate() {
        assert_eq!(session.error_of(some(command, 0, cookie as u64, 0)), EINVAL, "{command}");
    }
    assert_eq!(session.error_of(some(WRITE, FUA, 10, 0)), EINVAL);
    assert_eq!(session.error_of(some(CACHE, 0, 11, 0)), 0);
    assert_eq!(session.error_of(some(CACHE, FUA, 12, 0)), EINVAL);
}

#[test]
fn fast_zeros_are_offered_with_zeros_only() {
    let mut export = Export::new("disk", Length(DISK), false).unwrap();
    export.features.write_zeroes = false;
    assert_eq!(export.transmission_flags(false) & 0x840, 0);
    export.features = Features { fast_zero: false, rotational: true, ..Features::ALL };
    assert_eq!(export.transmission_flags(false), 0x57d);
    let mut session = Session::with(ConnectionLimits::default(), Shelf(vec![Arc::new(export)]), 1 << 20);
    session.choose("disk", true, &[]);
    assert_eq!(session.error_of(some(WRITE_ZEROES, FAST_ZERO, 1, 0)), EINVAL);
}

#[test]
fn flags_reach_the_disk() {
    let mut session = open(true);
    let range = ByteRange::new(512, 512);
    for (cookie, command, flags, wanted) in [
        (1, TRIM, 0, IoKind::Discard { range, fua: false }),
        (2, TRIM, FUA, IoKind::Discard { range, fua: true }),
        (3, WRITE_ZEROES, 0, IoKind::WriteZeroes { range, no_hole: false, fast: false, fua: false }),
        (4, WRITE_ZEROES, NO_HOLE, IoKind::WriteZeroes { range, no_hole: true, fast: false, fua: false }),
        (
            5,
            WRITE_ZEROES,
            FAST_ZERO | FUA,
            IoKind::WriteZeroes { range, no_hole: false, fast: true, fua: true },
        ),
        (6, CACHE, FUA, IoKind::Cache { range }),
        (7, FLUSH, FUA, IoKind::Flush),
        (8, WRITE, 0, IoKind::Write { offset: 512, data: vec![1; 512], fua: false }),
        (9, WRITE, FUA, IoKind::Write { offset: 512, data: vec![1; 512], fua: true }),
        (10, READ, FUA, IoKind::Read { range }),
    ] {
        session.request(some(command, flags, cookie, 512));
        let kinds = session.answer_all();
        assert_eq!(kinds, [wanted]);
        assert_eq!(session.replies()[&cookie].errors, []);
    }
}

#[test]
fn long_ranges_without_payload_are_one_io() {
    let export = Export::new("disk", Length(1 << 40), false).unwrap();
    let mut session = Session::with(ConnectionLimits::default(), Shelf(vec![Arc::new(export)]), 0);
    session.choose("disk", true, &["base:allocation"]);
    for (cookie, command) in [TRIM, WRITE_ZEROES, CACHE, BLOCK_STATUS].into_iter().enumerate() {
        session.request(Request::new(command, 0, cookie as u64, 1 << 39, u32::MAX));
        assert_eq!(session.answer_all().len(), 1);
        assert_eq!(session.replies()[&(cookie as u64)].errors, []);
    }
}

#[test]
fn errors_of_the_disk_become_those_of_the_wire() {
    for structured in [false, true] {
        let mut session = open(structured);
        let mut cookie = 0;
        for (errno, code) in [
            (Errno::EIO, EIO),
            (Errno::ENOSPC, ENOSPC),
            (Errno::EDQUOT, ENOSPC),
            (Errno::EFBIG, ENOSPC),
            (Errno::EROFS, EPERM),
            (Errno::EINVAL, EINVAL),
            (Errno::ESHUTDOWN, ESHUTDOWN),
            (Errno::ENOMEM, 12),
            (Errno::ETIMEDOUT, EIO),
            // Only for fast zeros.
            (Errno::EOPNOTSUPP, EIO),
        ] {
            for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES, FLUSH, BLOCK_STATUS] {
                if command == BLOCK_STATUS && !structured {
                    continue;
                }
                cookie += 1;
                session.request(some(command, 0, cookie, 512));
                session.answer_next(|_| Outcome::errno(errno));
                let reply = session.replies().remove(&cookie).unwrap();
                let offset = (structured && command != FLUSH).then_some(512);
                assert_eq!(reply.errors, [(code, offset)], "{errno} of {command}");
                assert_eq!((reply.simple, reply.data.len()), (!structured, 0));
            }
        }
    }
}

#[test]
fn only_fast_zeros_may_be_not_supported() {
    let mut session = open(true);
    session.request(some(WRITE_ZEROES, FAST_ZERO, 1, 0));
    session.answer_next(|_| Outcome::errno(Errno::EOPNOTSUPP));
    assert_eq!(session.replies()[&1].errors, [(ENOTSUP, None)]);
    session.request(some(WRITE_ZEROES, 0, 2, 0));
    session.answer_next(|_| Outcome::errno(Errno::EOPNOTSUPP));
    assert_eq!(session.replies()[&2].errors[0].0, EIO);
}

#[test]
fn answers_to_another_question_are_errors() {
    let mut session = open(true);
    let extents = || Outcome::Extents(vec![vec![StatusExtent { length: 512, flags: 0 }]]);
    let cases: [(u16, Vec<Outcome>); 4] = [
        (READ, vec![Outcome::Done, Outcome::Data(vec![0; 511]), Outcome::Data(vec![0; 513]), extents()]),
        (WRITE, vec![Outcome::Zero, Outcome::Data(vec![0; 512]), extents()]),
        (TRIM, vec![Outcome::Zero, extents()]),
        (
            BLOCK_STATUS,
            vec![
                Outcome::Done,
                Outcome::Zero,
                Outcome::Extents(vec![]),
                Outcome::Extents(vec![vec![]]),
                Outcome::Extents(vec![vec![StatusExtent { length: 0, flags: 0 }]]),
                Outcome::Extents(vec![vec![StatusExtent { length: 1, flags: 0 }]; 2]),
            ],
        ),
    ];
    let mut cookie = 0;
    for (command, outcomes) in cases {
        for outcome in outcomes {
            cookie += 1;
            session.request(some(command, 0, cookie, 0));
            session.answer_next(|_| outcome);
            assert_eq!(session.replies()[&cookie].errors[0].0, EIO, "{command}");
        }
    }
}

#[test]
fn a_request_that_is_none_ends_it() {
    for at in 0..4 {
        let mut session = open(true);
        let mut bytes = some(READ, 0, 1, 0).bytes();
        bytes[at] ^= 0x80;
        session.feed(&bytes);
        assert!(matches!(session.closed, Some(CloseReason::Violation(_))));
        assert!(session.connection.is_finished());
    }
}

#[test]
fn status_needs_a_context() {
    for structured in [false, true] {
        let mut session = Session::open("disk", structured, &[]);
        assert_eq!(session.error_of(some(BLOCK_STATUS, 0, 1, 0)), EINVAL);
    }
}

fn extents(list: &[(u64, u32)]) -> Vec<StatusExtent> {
    list.iter().map(|&(length, flags)| StatusExtent { length, flags }).collect()
}

#[test]
fn status_is_one_chunk_for_each_context() {
    let contexts =
        vec![MetaContext::Allocation, MetaContext::AllocationDepth, MetaContext::DirtyBitmap("b".into())];
    let export = Export::new("disk", Length(DISK), false).unwrap().with_contexts(contexts.clone()).unwrap();
    let mut session = Session::with(ConnectionLimits::default(), Shelf(vec![Arc::new(export)]), 0);
    session.choose("disk", true, &["qemu:dirty-bitmap:b", "base:allocation"]);
    session.request(Request::new(BLOCK_STATUS, 0, 1, 4096, 8192));
    let kind = session.answer_next(|_| {
        Outcome::Extents(vec![
            // In the order in which they were asked; beyond the range; equal neighbours.
            extents(&[(4096, 0), (1 << 30, 3)]),
            extents(&[(100, 1), (100, 1), (50, 0)]),
        ])
    });
    let IoKind::BlockStatus { range, contexts: asked, extents: most } = kind else { panic!() };
    assert_eq!(range, ByteRange::new(4096, 8192));
    assert_eq!(asked, [contexts[0].clone(), contexts[2].clone()]);
    assert!(most > 1000);
    let reply = session.replies().remove(&1).unwrap();
    assert_eq!(reply.chunks, 2);
    assert_eq!(reply.status, [(1, vec![(4096, 0), (4096, 3)]), (2, vec![(200, 1), (50, 0)])]);
}

#[test]
fn one_extent_if_one_was_asked_for() {
    let mut session = open(true);
    session.request(Request::new(BLOCK_STATUS, REQ_ONE, 1, 0, 8192));
    let kind = session.answer_next(|_| Outcome::Extents(vec![extents(&[(4096, 0), (4096, 3)])]));
    assert!(matches!(kind, IoKind::BlockStatus { extents: 1, .. }));
    assert_eq!(session.replies()[&1].status, [(1, vec![(4096, 0)])]);
}

#[test]
fn the_reply_to_a_status_request_is_bounded() {
    let mut session = open(true);
    session.request(Request::new(BLOCK_STATUS, 0, 1, 0, 1 << 20));
    session.answer_next(|kind| {
        let IoKind::BlockStatus { extents, .. } = kind else { panic!() };
        assert_eq!(*extents, 4096);
        let list = (0..1 << 20).map(|number| StatusExtent { length: 1, flags: number % 2 }).collect();
        Outcome::Extents(vec![list])
    });
    assert_eq!(session.replies()[&1].status[0].1.len(), 4096);
}

#[test]
fn failures_that_the_driver_makes_itself() {
    let mut session = open(true);
    session.request(some(WRITE, 0, 1, 0));
    session.answer_next(|_| Outcome::Failed(WireError::Shutdown));
    assert_eq!(session.replies()[&1].errors[0].0, ESHUTDOWN);
}
