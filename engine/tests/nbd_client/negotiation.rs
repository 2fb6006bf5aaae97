//! Handshakes with servers old and new, kind and unkind.

use engine::nbd::BlockSizes;
use engine::nbd::client::{Agreement, Negotiation, NegotiationError};

use crate::driver::{negotiate, negotiate_by};
use crate::server::*;

/// Client flags, or an option with its data, as the client sends them.
fn sends(option: u32, data: &[u8]) -> Vec<u8> {
    bytes().all(b"IHAVEOPT").u32(option).u32(data.len() as u32).all(data).0
}

fn string(text: &str) -> Vec<u8> {
    bytes().u32(text.len() as u32).all(text.as_bytes()).0
}

/// What comes in one piece.
fn whole(export: &str, stream: &[u8]) -> (Vec<Vec<u8>>, Option<Result<Agreement, NegotiationError>>) {
    negotiate(export, stream, || usize::MAX / 2)
}

fn modern() -> Vec<u8> {
    [
        greeting(3),
        option_reply(8, ACK, &[]),
        context(77, "base:allocation"),
        option_reply(10, ACK, &[]),
        export_info(1 << 30, 0x16d),
        block_info(512, 4096, 1 << 20),
        option_reply(7, INFO, &bytes().u16(1).all(b"disk").0),
        option_reply(7, ACK, &[]),
    ]
    .concat()
}

#[test]
fn a_modern_server() {
    let (sent, agreed) = whole("disk", &modern());
    let blocks = BlockSizes::new(512, 4096, 1 << 20).unwrap();
    let expected = Agreement {
        length: 1 << 30,
        flags: 0x16d,
        blocks,
        structured: true,
        allocation: Some(77),
        depth: None,
    };
    assert_eq!(agreed, Some(Ok(expected)));
    let context = [string("disk"), bytes().u32(1).0, string("base:allocation")].concat();
    let go = [string("disk"), bytes().u16(1).u16(3).0].concat();
    let first = [bytes().u32(3).0, sends(8, &[])].concat();
    assert_eq!(sent, [first, sends(10, &context), sends(7, &go)]);
}

/// Of layers a server is asked where they matter; it tells both, one, or none.
#[test]
fn layers_are_asked_about() {
    let with = |contexts: &[(u32, &str)]| {
        let contexts: Vec<_> = contexts.iter().flat_map(|(id, name)| context(*id, name)).collect();
        let stream = [
            greeting(3),
            option_reply(8, ACK, &[]),
            contexts,
            option_reply(10, ACK, &[]),
            export_info(1 << 30, 1),
            option_reply(7, ACK, &[]),
        ];
        negotiate_by(Negotiation::new("disk").with_layers(), &stream.concat(), || usize::MAX / 2)
    };
    let (base, depth) = ("base:allocation", "qemu:allocation-depth");
    let (sent, _) = with(&[]);
    let asked = [string("disk"), bytes().u32(2).0, string(base), string(depth)].concat();
    assert_eq!(sent[1], sends(10, &asked));
    for (contexts, expected) in [
        (&[(7, base), (9, depth)][..], (Some(7), Some(9))),
        (&[(9, depth), (0, base)], (Some(0), Some(9))),
        (&[(9, depth)], (None, Some(9))),
        (&[(7, base)], (Some(7), None)),
        (&[], (None, None)),
    ] {
        let Some(Ok(agreed)) = with(contexts).1 else { panic!("{contexts:?}") };
        assert_eq!((agreed.allocation, agreed.depth), expected);
    }
    for contexts in [&[(7, base), (7, depth)][..], &[(7, depth), (8, depth)], &[(7, "qemu:dirty-bitmap:x")]] {
        assert!(matches!(with(contexts).1, Some(Err(NegotiationError::Violation(_)))), "{contexts:?}");
    }
    let unasked = [greeting(3), option_reply(8, ACK, &[]), context(9, depth)].concat();
    assert!(matches!(whole("disk", &unasked).1, Some(Err(NegotiationError::Violation(_)))));
}

#[test]
fn it_makes_no_difference_how_the_stream_is_cut() {
    let stream = modern();
    let expected = whole("disk", &stream);
    assert_eq!(negotiate("disk", &stream, || 1), expected);
    for cut in 1..stream.len() {
        let mut first = Some(cut);
        assert_eq!(negotiate("disk", &stream, || first.take().unwrap_or(usize::MAX / 2)), expected, "{cut}");
        assert_eq!(whole("disk", &stream[..cut]).1, None, "{cut}");
    }
}

#[test]
fn servers_that_know_less() {
    let plain = Agreement {
        length: 5000,
        flags: 1,
        blocks: BlockSizes::DEFAULT,
        structured: false,
        allocation: None,
        depth: None,
    };
    let no_chunks = [
        greeting(1),
        option_reply(8, UNSUPPORTED, b"what?"),
        export_info(5000, 1),
        option_reply(7, ACK, &[]),
    ];
    assert_eq!(whole("", &no_chunks.concat()).1, Some(Ok(plain)));
    let no_contexts = [
        greeting(3),
        option_reply(8, ACK, &[]),
        context(1, "base:allocation"),
        option_reply(10, UNSUPPORTED, &[]),
        export_info(5000, 1),
        option_reply(7, ACK, &[]),
    ];
    assert_eq!(whole("", &no_contexts.concat()).1, Some(Ok(Agreement { structured: true, ..plain })));
    // No GO: by name, with and without the zeros.
    for (flags, zeros) in [(1, 124), (3, 0)] {
        let by_name = [
            greeting(flags),
            option_reply(8, UNSUPPORTED, &[]),
            option_reply(7, UNSUPPORTED, &[]),
            bytes().u64(5000).u16(1).all(&vec![0; zeros]).0,
        ];
        let (sent, agreed) = whole("old", &by_name.concat());
        assert_eq!(agreed, Some(Ok(plain)));
        assert_eq!(sent.last().unwrap(), &sends(1, b"old"));
        assert_eq!(whole("old", &by_name.concat()[..by_name.concat().len() - 1]).1, None);
    }
    // Not even errors: by name at once.
    let newstyle = [greeting(0), bytes().u64(5000).u16(1).all(&[0; 124]).0].concat();
    let (sent, agreed) = whole("old", &newstyle);
    assert_eq!(agreed, Some(Ok(plain)));
    assert_eq!(sent, [[bytes().u32(0).0, sends(1, b"old")].concat()]);
    // Flags that are not said to be there are not.
    let no_flags = [greeting(2), bytes().u64(5000).u16(0xfffe).0].concat();
    assert_eq!(whole("", &no_flags).1, Some(Ok(Agreement { flags: 0, ..plain })));
}

#[test]
fn servers_that_do_not_want_to() {
    let before = [greeting(3), option_reply(8, UNSUPPORTED, &[])].concat();
    let refused = |reply: u32, message: &[u8]| {
        whole("x", &[&before[..], &option_reply(7, reply, message)].concat()).1.unwrap().unwrap_err()
    };
    assert_eq!(
        refused(UNKNOWN, b" not \x1b[31mhere\n"),
        NegotiationError::NoSuchExport("not [31mhere".into())
    );
    assert_eq!(refused(TLS_REQUIRED, b""), NegotiationError::TlsRequired(String::new()));
    assert_eq!(refused(POLICY, b""), NegotiationError::Refused("its policy forbids it".into()));
    assert_eq!(refused(POLICY, b"no"), NegotiationError::Refused("no".into()));
    assert_eq!(refused((1 << 31) + 99, b""), NegotiationError::Refused("error 99".into()));
    let long = refused(UNKNOWN, &[b'm'; 4096]);
    assert_eq!(long, NegotiationError::NoSuchExport("m".repeat(200)));
    let tls = [greeting(3), option_reply(8, TLS_REQUIRED, b"TLS!")].concat();
    assert_eq!(whole("x", &tls).1, Some(Err(NegotiationError::TlsRequired("TLS!".into()))));
}

#[test]
fn what_is_no_server() {
    assert_eq!(whole("x", b"SSH-2.0-OpenSSH_9.2 Debian").1, Some(Err(NegotiationError::NotNbd)));
    let old = bytes().all(b"NBDMAGIC").u64(0x420281861253).u64(1 << 30).u32(0).all(&[0; 124]).0;
    assert_eq!(whole("x", &old).1, Some(Err(NegotiationError::OldStyle)));
}

#[test]
fn violations() {
    let modern = |replies: &[Vec<u8>]| [&[greeting(3), option_reply(8, ACK, &[])], replies].concat().concat();
    let go = |replies: &[Vec<u8>]| {
        let before = [option_reply(10, ACK, &[])];
        modern(&[&before, replies].concat())
    };
    let endless: Vec<_> = (0..65).map(|_| option_reply(7, INFO, &bytes().u16(9).0)).collect();
    let mut wrong_magic = option_reply(8, ACK, &[]);
    wrong_magic[7] ^= 1;
    for (stream, expected) in [
        ([greeting(3), wrong_magic].concat(), "a reply to an option that was not asked"),
        ([greeting(3), option_reply(7, ACK, &[])].concat(), "a reply to an option that was not asked"),
        ([greeting(3), option_reply(8, INFO, &[])].concat(), "does not go with its option"),
        (
            [greeting(3), bytes().u64(0x3e889045565a9).u32(8).u32(ACK).u32(u32::MAX).0].concat(),
            "a reply to an option that is too long",
        ),
        (modern(&[context(1, "qemu:x")]), "a meta context that was not asked for"),
        (
            modern(&[context(1, "base:allocation"), context(2, "base:allocation")]),
            "a meta context that was not asked for",
        ),
        (modern(&[option_reply(10, CONTEXT, &[0; 3])]), "a meta context without a number"),
        (go(&[option_reply(7, ACK, &[])]), "an export without a length"),
        (go(&[option_reply(7, INFO, &[0])]), "cut off"),
        (go(&[option_reply(7, INFO, &bytes().u16(0).u64(1).0)]), "cut off"),
        (go(&[option_reply(7, INFO, &bytes().u16(3).u64(1).0)]), "cut off"),
        (go(&endless), "replies to an option without end"),
        (go(&[block_info(0, 4096, 1 << 20)]), "block sizes that make no sense"),
        (go(&[block_info(3, 4096, 1 << 20)]), "block sizes that make no sense"),
        (go(&[block_info(1 << 17, 1 << 17, 1 << 20)]), "block sizes that make no sense"),
        (go(&[block_info(4096, 512, 1 << 20)]), "block sizes that make no sense"),
        (go(&[block_info(512, 4096, 1000)]), "block sizes that make no sense"),
    ] {
        match whole("x", &stream).1 {
            Some(Err(NegotiationError::Violation(violation))) => {
                assert!(violation.0.contains(expected), "{violation} for {expected}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn sizes_are_cut_to_what_is_ever_sent() {
    let stream = |sizes| {
        [greeting(3), option_reply(8, UNSUPPORTED, &[]), export_info(1, 1), sizes, option_reply(7, ACK, &[])]
            .concat()
    };
    let blocks = |sizes| whole("x", &stream(sizes)).1.unwrap().unwrap().blocks;
    assert_eq!(blocks(block_info(1, 4096, u32::MAX)), BlockSizes::DEFAULT);
    assert_eq!(
        blocks(block_info(65536, 1 << 27, u32::MAX)),
        BlockSizes::new(65536, 32 << 20, 32 << 20).unwrap()
    );
}
