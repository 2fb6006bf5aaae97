//! Servers that answer well in any order and any pieces, and such that send anything.

use std::collections::BTreeMap;

use engine::nbd::client::{Answer, Request};
use engine::units::ByteRange;
use proptest::prelude::*;

use crate::driver::{Session, agreement, negotiate};
use crate::server::*;

const CONTEXT_ID: u32 = 3;
const LENGTH: u64 = 3000;

/// The disk: what is at each byte. A third of it are zeros.
fn byte_at(offset: u64) -> u8 {
    if offset % 300 < 100 { 0 } else { (offset % 251) as u8 }
}

fn disk(range: ByteRange) -> Vec<u8> {
    (range.offset..range.end()).map(byte_at).collect()
}

#[derive(Clone, Debug)]
struct Wish {
    kind: u8,
    offset: u64,
    length: u64,
    /// Where its contents are cut, and in which order the pieces come.
    cuts: Vec<u64>,
    turns: Vec<usize>,
    fails: bool,
    code: u32,
}

fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    let cuts = proptest::collection::vec(0..LENGTH, 0..5);
    let turns = proptest::collection::vec(0_usize..8, 6);
    let wish = (0_u8..5, 0..LENGTH - 1, 1..LENGTH, cuts, turns, 0_u8..6, 1_u32..120).prop_map(
        |(kind, offset, length, cuts, turns, fails, code)| {
            let length = length.min(LENGTH - offset);
            Wish { kind, offset, length, cuts, turns, fails: fails == 0, code }
        },
    );
    proptest::collection::vec(wish, 1..12)
}

fn request(wish: &Wish) -> Request {
    let range = ByteRange::new(wish.offset, wish.length);
    match wish.kind {
        0 => Request::Write { range, fua: false },
        1 => Request::Flush,
        2 => Request::Status { range, most: 4 },
        _ => Request::Read(range),
    }
}

/// The pieces of a read's range, in some order.
fn pieces(wish: &Wish) -> Vec<ByteRange> {
    let end = wish.offset + wish.length;
    let mut borders: Vec<_> =
        wish.cuts.iter().copied().filter(|&cut| wish.offset < cut && cut < end).collect();
    borders.extend([wish.offset, end]);
    borders.sort_unstable();
    borders.dedup();
    let mut pieces: Vec<_> = borders.windows(2).map(|pair| ByteRange::between(pair[0], pair[1])).collect();
    for (at, turn) in (0..pieces.len()).zip(&wish.turns) {
        let other = turn % pieces.len();
        pieces.swap(at, other);
    }
    pieces
}

/// The messages of the reply to a request.
fn reply(wish: &Wish, cookie: u64, structured: bool) -> Vec<Vec<u8>> {
    let request = request(wish);
    match request {
        Request::Read(range) if !structured => {
            let failed = simple(cookie, wish.code);
            vec![if wish.fails { failed } else { [simple(cookie, 0), disk(range)].concat() }]
        }
        Request::Read(_) => {
            let pieces = pieces(wish);
            let last = pieces.len() - 1;
            let mut messages: Vec<_> = (0..)
                .zip(&pieces)
                .map(|(number, piece)| {
                    let (contents, done) = (disk(*piece), number == last && !wish.fails);
                    if contents.iter().all(|&byte| byte == 0) {
                        return hole(cookie, done, piece.offset, piece.length as u32);
                    }
                    data(cookie, done, piece.offset, &contents)
                })
                .collect();
            if wish.fails {
                messages.truncate(last);
                messages.push(error(cookie, true, wish.code, "planted"));
            }
            messages
        }
        Request::Status { .. } if structured && !wish.fails => {
            // The last one alone may reach beyond what was asked for.
            let all = [(100_u32, 3), (200, 0), (100, 2), (4000, 0)];
            let ends = all.iter().scan(0, |end, extent| {
                *end += u64::from(extent.0);
                Some(*end)
            });
            let count = 1 + ends.take_while(|&end| end < wish.length).count();
            vec![status(cookie, true, CONTEXT_ID, &all[..count])]
        }
        Request::Status { .. } => vec![simple(cookie, wish.code)],
        _ => vec![simple(cookie, if wish.fails { wish.code } else { 0 })],
    }
}

/// All messages, those of one reply in their order, chosen by `turns`.
fn interleaved(mut replies: Vec<Vec<Vec<u8>>>, turns: &[usize]) -> Vec<u8> {
    replies.iter_mut().for_each(|reply| reply.reverse());
    let mut stream = Vec::new();
    let mut turns = turns.iter().cycle();
    while !replies.is_empty() {
        let chosen = turns.next().expect("endless") % replies.len();
        match replies[chosen].pop() {
            Some(message) => stream.extend(message),
            None => drop(replies.swap_remove(chosen)),
        }
    }
    stream
}

/// Sizes of what arrives at a time, over and over.
fn sizes() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(prop_oneof![1_usize..40, 1_usize..5000], 1..20)
}

fn fed(mut session: Session, stream: &[u8], sizes: &[usize]) -> Session {
    let mut sizes = sizes.iter().cycle();
    session.feed(stream, || *sizes.next().expect("endless"));
    session
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn replies_in_any_order_and_any_pieces(
        wishes in wishes(),
        turns in proptest::collection::vec(0_usize..64, 1..40),
        structured: bool,
        sizes in sizes(),
        flip in proptest::option::of((0_usize..20_000, 1_u8..)),
    ) {
        let mut session = Session::new(&agreement(structured, structured.then_some(CONTEXT_ID)));
        let by_cookie: BTreeMap<u64, &Wish> =
            wishes.iter().map(|wish| (session.ask(request(wish)), wish)).collect();
        let replies = by_cookie.iter().map(|(cookie, wish)| reply(wish, *cookie, structured)).collect();
        let mut stream = interleaved(replies, &turns);
        if let Some((at, bits)) = flip.filter(|(at, _)| *at < stream.len()) {
            // Whatever it means now: nothing that `driver` checks breaks.
            stream[at] ^= bits;
            fed(session, &stream, &sizes);
            return Ok(());
        }
        let session = fed(session, &stream, &sizes);
        prop_assert_eq!(session.broken, None);
        for (cookie, wish) in by_cookie {
            let asked = &session.asked[&cookie];
            let without_status = matches!(asked.request, Request::Status { .. }) && !structured;
            let result = asked.result.as_ref().expect("answered");
            prop_assert_eq!(result.is_err(), wish.fails || without_status);
            if let (Request::Read(range), Ok(Answer::Done)) = (asked.request, result) {
                let contents: Vec<_> = asked.contents.iter().map(|byte| byte.expect("it has come")).collect();
                prop_assert_eq!(contents, disk(range));
            }
        }
    }

    #[test]
    fn anything_at_all(
        bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        sizes in sizes(),
        structured: bool,
    ) {
        let mut session = Session::new(&agreement(structured, None));
        session.ask(Request::Read(ByteRange::new(0, 100)));
        fed(session, &bytes, &sizes);
        negotiate("x", &bytes, || sizes[0]);
        negotiate("x", &[greeting(3), bytes].concat(), || sizes[0]);
    }

    /// Replies to options that are nearly right.
    #[test]
    fn options_answered_anyhow(
        replies in proptest::collection::vec(
            (0_u32..12, prop_oneof![0_u32..6, (1_u32 << 31)..(1 << 31) + 10],
             proptest::collection::vec(any::<u8>(), 0..20)),
            0..12,
        ),
        right: bool,
    ) {
        let mut stream = greeting(3);
        for (number, (option, kind, data)) in (0_u32..).zip(replies) {
            let option = if right { [8, 10, 7][number.min(2) as usize] } else { option };
            stream.extend(option_reply(option, kind, &data));
        }
        let whole = negotiate("x", &stream, || usize::MAX / 2);
        prop_assert_eq!(negotiate("x", &stream, || 1), whole);
    }
}
