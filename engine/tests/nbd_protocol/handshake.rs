//! Options: each rule of the handshake.

use std::sync::Arc;

use engine::nbd::{BlockSizes, CloseReason, ConnectionLimits, Export, MetaContext, Receive};
use engine::units::Length;

use crate::client::*;
use crate::session::{DISK, Session, Shelf, shelf};

fn greeted() -> Session {
    let mut session = Session::new();
    session.feed(&client_flags(3));
    session
}

fn kinds(replies: &[OptionReply]) -> Vec<u32> {
    replies.iter().map(|reply| reply.kind).collect()
}

const WRITABLE: u16 = 0x0d6d;
const READ_ONLY: u16 = 0x0503;
const SEND_DF: u16 = 0x80;

#[test]
fn unknown_client_flags_end_it() {
    for flags in [4, 0x8000_0003, 0x1_0000] {
        let mut session = Session::new();
        session.feed(&client_flags(flags));
        assert!(matches!(session.closed, Some(CloseReason::Violation(_))), "{flags}");
    }
}

#[test]
fn export_name_is_answered_with_and_without_zeros() {
    for (flags, zeros) in [(3, 0), (1, 124), (0, 124), (2, 0)] {
        let mut session = Session::new();
        session.feed(&client_flags(flags));
        session.feed(&option(OPT_EXPORT_NAME, b"disk"));
        let bytes = session.parser.rest().to_vec();
        assert_eq!(bytes.len(), 10 + zeros);
        assert_eq!((u64_at(&bytes, 0), u16_at(&bytes, 8)), (DISK, WRITABLE));
        assert!(bytes[10..].iter().all(|&byte| byte == 0));
        assert_eq!(**session.attached.unwrap().name(), *"disk");
    }
}

#[test]
fn export_name_has_no_error_reply() {
    let mut session = greeted();
    session.feed(&option(OPT_EXPORT_NAME, b"other"));
    assert_eq!(session.closed, Some(CloseReason::UnknownExport));
    assert!(session.parser.rest().is_empty() && session.connection.is_finished());
    let mut session = greeted();
    session.feed(&option(OPT_EXPORT_NAME, &[b'a'; 5000]));
    assert_eq!(session.closed, Some(CloseReason::UnknownExport));
    let mut session = greeted();
    session.feed(&option(OPT_EXPORT_NAME, &vec![b'a'; 1 << 20]));
    assert!(matches!(session.closed, Some(CloseReason::Violation(_))));
}

#[test]
fn without_fixed_newstyle_there_is_only_the_name() {
    let mut session = Session::new();
    session.feed(&client_flags(0));
    session.feed(&option(OPT_LIST, &[]));
    assert!(matches!(session.closed, Some(CloseReason::Violation(_))));
}

#[test]
fn an_option_that_is_none_ends_it() {
    let mut session = greeted();
    session.feed(b"IHAVENOT0123456789");
    assert!(matches!(session.closed, Some(CloseReason::Violation(_))));
}

#[test]
fn unknown_options_are_told_and_passed_over() {
    let mut session = greeted();
    for number in [0, 4, OPT_STARTTLS, OPT_EXTENDED_HEADERS, 12, 77, u32::MAX] {
        let reply = session.ask(number, &[]).unwrap();
        assert_eq!(reply.kind, ERR_UNSUP, "{number}");
        assert!(!reply.data.is_empty() && std::str::from_utf8(&reply.data).is_ok());
    }
    assert_eq!(session.ask(99, b"with data").unwrap().kind, ERR_UNSUP);
    assert_eq!(session.ask(OPT_STRUCTURED_REPLY, &[]).unwrap().kind, REP_ACK);
}

#[test]
fn options_without_data_take_none() {
    let mut session = greeted();
    for number in [OPT_LIST, OPT_STARTTLS, OPT_STRUCTURED_REPLY] {
        assert_eq!(session.ask(number, b"x").unwrap().kind, ERR_INVALID, "{number}");
    }
    // And that was no negotiation.
    let data = context_data("disk", &["base:allocation"]);
    assert_eq!(session.ask(OPT_SET_META_CONTEXT, &data).unwrap().kind, ERR_INVALID);
}

#[test]
fn abort_is_acknowledged_with_and_without_data() {
    for data in [&b""[..], b"bye"] {
        let mut session = greeted();
        assert_eq!(session.ask(OPT_ABORT, data).unwrap().kind, REP_ACK);
        assert_eq!(session.closed, Some(CloseReason::Disconnected));
        assert_eq!(session.connection.wants(), None);
    }
}

#[test]
fn exports_are_listed_in_order_with_their_description() {
    let mut shelf = shelf();
    let described = Export::new("a", Length(1), false).unwrap().describe("the first").unwrap();
    shelf.0.push(Arc::new(described));
    let mut session = Session::with(ConnectionLimits::default(), shelf, 0);
    session.feed(&client_flags(3));
    let replies = session.ask_all(OPT_LIST, &[]);
    assert_eq!(kinds(&replies), [REP_SERVER, REP_SERVER, REP_SERVER, REP_ACK]);
    assert_eq!(replies[0].data, [string(b"a"), b"the first".to_vec()].concat());
    assert_eq!(replies[1].data, string(b"disk"));
    assert_eq!(replies[2].data, string(b"snapshot"));
    // Again is as good.
    assert_eq!(session.ask_all(OPT_LIST, &[]), replies);
}

#[test]
fn a_long_list_waits_for_its_reader() {
    let names = (0..1000).map(|number| format!("{number:04}{}", "x".repeat(4000)));
    let exports = names.map(|name| Arc::new(Export::new(name, Length(1), false).unwrap())).collect();
    let mut session = Session::with(ConnectionLimits::default(), Shelf(exports), 0);
    session.feed(&client_flags(3));
    session.drains = false;
    session.feed(&option(OPT_LIST, &[]));
    let mut most = 0;
    while session.sending {
        // What is being sent, and what is made meanwhile.
        assert_eq!(session.connection.wants(), None);
        let before = session.parser.bytes.len();
        session.sent();
        session.turn();
        most = most.max(session.parser.bytes.len() - before);
    }
    assert!(most <= 24 << 10, "{most} bytes at a time");
    let replies: Vec<_> = std::iter::from_fn(|| session.parser.option_reply()).collect();
    assert_eq!(replies.len(), 1001);
    assert!(session.connection.wants().is_some());
}

#[test]
fn replies_are_bounded_for_one_who_asks_without_reading() {
    let mut session = greeted();
    session.drains = false;
    let request = option(OPT_INFO, &info_data("disk", &[1, 2, 3]));
    let stream: Vec<u8> = std::iter::repeat_n(request, 200).flatten().collect();
    let left = session.feed(&stream).len();
    // 200 replies are 24 KiB; nothing is made of the last ones.
    assert!(left == 0 || session.connection.wants().is_none());
    assert!(session.parser.bytes.len() < 24 << 10, "{}", session.parser.bytes.len());
}

#[test]
fn info_tells_and_go_begins() {
    for structured in [false, true] {
        let mut session = greeted();
        if structured {
            session.ask(OPT_STRUCTURED_REPLY, &[]);
        }
        let replies = session.ask_all(OPT_INFO, &info_data("disk", &[]));
        assert_eq!(kinds(&replies), [REP_INFO, REP_INFO, REP_ACK]);
        let flags = WRITABLE | if structured { SEND_DF } else { 0 };
        let told = [&[0, 0][..], &DISK.to_be_bytes(), &flags.to_be_bytes()].concat();
        assert_eq!(replies[0].data, told);
        assert_eq!(replies[1].data, [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0], "1, 4096, 32 MiB");
        assert!(session.connection.in_handshake() && session.attached.is_none());
        let data = info_data("disk", &[3, 1, 2, 77]);
        let replies = session.ask_all(OPT_GO, &data);
        assert_eq!(kinds(&replies), [REP_INFO, REP_INFO, REP_INFO, REP_ACK]);
        assert_eq!(replies[1].data, b"\0\x01disk");
        assert!(!session.connection.in_handshake() && session.attached.is_some());
    }
}

#[test]
fn a_read_only_export_says_so() {
    let mut session = greeted();
    let replies = session.ask_all(OPT_GO, &info_data("snapshot", &[]));
    assert_eq!(u16_at(&replies[0].data, 10), READ_ONLY);
}

#[test]
fn the_empty_name_is_the_default_export_with_its_own_name() {
    let mut session = greeted();
    let replies = session.ask_all(OPT_GO, &info_data("", &[1]));
    assert_eq!(replies[1].data, b"\0\x01disk");
    assert_eq!(**session.attached.unwrap().name(), *"disk");
}

#[test]
fn descriptions_are_told_where_there_are_any() {
    let export = Export::new("disk", Length(9), false).unwrap().describe("a disk").unwrap();
    let mut session = Session::with(ConnectionLimits::default(), Shelf(vec![Arc::new(export)]), 0);
    session.feed(&client_flags(3));
    let replies = session.ask_all(OPT_INFO, &info_data("disk", &[2]));
    assert_eq!(replies[1].data, b"\0\x02a disk");
}

#[test]
fn info_that_makes_no_sense_is_refused() {
    let mut session = greeted();
    for option in [OPT_INFO, OPT_GO] {
        for data in [
            vec![],
            vec![0; 3],
            [&100_u32.to_be_bytes()[..], b"disk", &[0, 0]].concat(),
            [&u32::MAX.to_be_bytes()[..], b"disk", &[0, 0]].concat(),
            [string(b"disk"), vec![0, 2, 0, 0]].concat(),
            [string(b"disk"), vec![0, 0, 0]].concat(),
        ] {
            assert_eq!(session.ask(option, &data).unwrap().kind, ERR_INVALID, "{data:?}");
        }
        assert_eq!(session.ask(option, &info_data("nothing", &[])).unwrap().kind, ERR_UNKNOWN);
        let not_text = [string(&[0xff, 0xfe]), vec![0, 0]].concat();
        assert_eq!(session.ask(option, &not_text).unwrap().kind, ERR_UNKNOWN);
        let long = "x".repeat(4097);
        assert_eq!(session.ask(option, &info_data(&long, &[])).unwrap().kind, ERR_TOO_BIG);
    }
    assert_eq!(session.ask_all(OPT_GO, &info_data("disk", &[])).last().unwrap().kind, REP_ACK);
}

#[test]
fn the_longest_name_is_found() {
    let name = "n".repeat(4096);
    let export = Export::new(name.clone(), Length(9), false).unwrap().describe("d".repeat(4096)).unwrap();
    let mut session = Session::with(ConnectionLimits::default(), Shelf(vec![Arc::new(export)]), 0);
    session.feed(&client_flags(3));
    let replies = session.ask_all(OPT_GO, &info_data(&name, &[1, 2]));
    assert_eq!(kinds(&replies), [REP_INFO, REP_INFO, REP_INFO, REP_INFO, REP_ACK]);
    assert!(Export::new("n".repeat(4097), Length(9), false).is_err());
    assert!(Export::new("a\nb", Length(9), false).is_err());
}

#[test]
fn a_minimum_block_size_has_to_be_asked_for() {
    let mut export = Export::new("disk", Length(1 << 20), false).unwrap();
    export.block_sizes = BlockSizes::new(512, 4096, 1 << 20).unwrap();
    let shelf = Shelf(vec![Arc::new(export)]);
    let mut session = Session::with(ConnectionLimits::default(), shelf.clone(), 1 << 20);
    session.feed(&client_flags(3));
    let replies = session.ask_all(OPT_GO, &info_data("disk", &[]));
    assert_eq!(kinds(&replies), [REP_INFO, REP_INFO, ERR_BLOCK_SIZE_REQD]);
    assert_eq!(replies[1].data, [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 0, 0x10, 0, 0]);
    assert_eq!(session.ask_all(OPT_GO, &info_data("disk", &[3])).last().unwrap().kind, REP_ACK);
    assert_eq!(session.error_of(Request::new(READ, 0, 1, 1, 512)), EINVAL);
    assert_eq!(session.error_of(Request::new(READ, 0, 2, 512, 100)), EINVAL);
    assert_eq!(session.error_of(Request::new(READ, 0, 3, 0, (1 << 20) + 512)), EINVAL);
    assert_eq!(session.reply_to(Request::new(READ, 0, 4, 512, 512)).errors, []);
    let mut session = Session::with(ConnectionLimits::default(), shelf, 1 << 20);
    session.feed(&client_flags(3));
    session.feed(&option(OPT_EXPORT_NAME, b"disk"));
    assert!(matches!(session.closed, Some(CloseReason::Violation(_))));
}

#[test]
fn block_sizes_keep_the_protocols_rules() {
    for (minimum, preferred, maximum) in [
        (0, 4096, 1 << 20),
        (3, 4096, 1 << 20),
        (128 << 10, 128 << 10, 1 << 20),
        (512, 256, 1 << 20),
        (1, 256, 1 << 20),
        (1, 4096, 2048),
        (1, 5000, 1 << 20),
        (512, 4096, (1 << 20) + 1),
        (1, 4096, 33 << 20),
    ] {
        assert_eq!(BlockSizes::new(minimum, preferred, maximum), None);
    }
    assert_eq!(BlockSizes::new(1, 4096, 32 << 20), Some(BlockSizes::DEFAULT));
}

fn with_contexts() -> Shelf {
    let all = || {
        vec![
            MetaContext::Allocation,
            MetaContext::AllocationDepth,
            MetaContext::DirtyBitmap("b0".into()),
            MetaContext::DirtyBitmap("b1".into()),
        ]
    };
    let export = |name: &str| Export::new(name, Length(DISK), false).unwrap();
    Shelf(vec![Arc::new(export("disk").with_contexts(all()).unwrap()), Arc::new(export("other"))])
}

fn with_contexts_greeted() -> Session {
    let mut session = Session::with(ConnectionLimits::default(), with_contexts(), 1 << 20);
    session.feed(&client_flags(3));
    session.ask(OPT_STRUCTURED_REPLY, &[]);
    session
}

fn names(replies: &[OptionReply]) -> Vec<(u32, String)> {
    let (last, contexts) = replies.split_last().unwrap();
    assert_eq!(last.kind, REP_ACK);
    let name = |reply: &OptionReply| {
        assert_eq!(reply.kind, REP_META_CONTEXT);
        (u32_at(&reply.data, 0), String::from_utf8(reply.data[4..].to_vec()).unwrap())
    };
    contexts.iter().map(name).collect()
}

#[test]
fn contexts_are_listed_by_wildcards_and_by_name() {
    let mut session = with_contexts_greeted();
    let all = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"];
    for (queries, listed) in [
        (&[][..], &all[..]),
        (&["base:"], &all[..1]),
        (&["qemu:"], &all[1..]),
        (&["qemu:dirty-bitmap:"], &all[2..]),
        (&["base:allocation", "base:", "base:allocation"], &all[..1]),
        (&["qemu:dirty-bitmap:b1", "x-other:thing"], &all[3..]),
        (&["base", "base:alloc", "nothing:", "", ":", "base:allocation "], &[]),
    ] {
        let replies = session.ask_all(OPT_LIST_META_CONTEXT, &context_data("disk", queries));
        let listed: Vec<_> = listed.iter().map(|name| (0, (*name).to_owned())).collect();
        assert_eq!(names(&replies), listed, "{queries:?}");
    }
}

#[test]
fn contexts_are_selected_by_name_only() {
    let mut session = with_contexts_greeted();
    for (queries, selected) in [
        (&[][..], &[][..]),
        (&["base:"], &[]),
        (&["qemu:", "qemu:dirty-bitmap:", "x-new:what"], &[]),
        (&["base:allocation"], &["base:allocation"]),
        (&["base:allocation", "base:allocation"], &["base:allocation"]),
        (
            &["qemu:dirty-bitmap:b1", "qemu:allocation-depth"],
            &["qemu:allocation-depth", "qemu:dirty-bitmap:b1"],
        ),
    ] {
        let replies = session.ask_all(OPT_SET_META_CONTEXT, &context_data("disk", queries));
        let found = names(&replies);
        assert_eq!(found.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>(), selected);
        let mut ids: Vec<u32> = found.iter().map(|(id, _)| *id).collect();
        ids.dedup();
        assert_eq!(ids.len(), selected.len(), "ids are unique");
    }
}

#[test]
fn context_options_that_make_no_sense_are_refused() {
    for option in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        let mut session = Session::with(ConnectionLimits::default(), with_contexts(), 0);
        session.feed(&client_flags(3));
        let good = context_data("disk", &["base:allocation"]);
        assert_eq!(session.ask(option, &good).unwrap().kind, ERR_INVALID, "no structured replies");
        session.ask(OPT_STRUCTURED_REPLY, &[]);
        for data in [
            vec![],
            string(b"disk"),
            [string(b"disk"), vec![0, 0, 0, 2], string(b"base:")].concat(),
            [string(b"disk"), vec![0xff; 4]].concat(),
            [string(b"disk"), vec![0, 0, 0, 1, 0, 0, 0, 9, 1]].concat(),
            [good.clone(), vec![0]].concat(),
        ] {
            assert_eq!(session.ask(option, &data).unwrap().kind, ERR_INVALID, "{data:?}");
        }
        assert_eq!(session.ask(option, &context_data("nothing", &[])).unwrap().kind, ERR_UNKNOWN);
        let long = "x".repeat(4097);
        assert_eq!(session.ask(option, &context_data(&long, &[])).unwrap().kind, ERR_TOO_BIG);
        assert_eq!(session.ask(option, &context_data("disk", &[&long])).unwrap().kind, ERR_TOO_BIG);
    }
}

/// Whether block status may be asked for after these options and a GO for `disk`.
fn status_after(options: &[(u32, Vec<u8>)], go: &str) -> bool {
    let mut session = with_contexts_greeted();
    for (option, data) in options {
        session.ask_all(*option, data);
    }
    session.ask_all(OPT_GO, &info_data(go, &[]));
    let request = Request::new(BLOCK_STATUS, 0, 1, 0, 4096);
    session.request(request);
    !session.ios.is_empty()
}

#[test]
fn the_last_selection_counts_if_it_names_the_export() {
    let set = |name: &str, queries: &[&str]| (OPT_SET_META_CONTEXT, context_data(name, queries));
    let select = || set("disk", &["base:allocation"]);
    assert!(status_after(&[select()], "disk"));
    assert!(!status_after(&[], "disk"));
    assert!(!status_after(&[select()], "other"), "another export");
    assert!(!status_after(&[select()], ""), "the same export, by another name");
    assert!(!status_after(&[select(), set("disk", &[])], "disk"), "replaced by nothing");
    assert!(!status_after(&[select(), set("nothing", &["base:allocation"])], "disk"), "failed: unknown");
    assert!(!status_after(&[select(), (OPT_SET_META_CONTEXT, vec![1])], "disk"), "failed: malformed");
    let too_long = (OPT_SET_META_CONTEXT, vec![0; 20 << 10]);
    assert!(!status_after(&[select(), too_long], "disk"), "failed: too long");
    let list = (OPT_LIST_META_CONTEXT, context_data("disk", &[]));
    assert!(status_after(&[select(), list], "disk"), "a list changes nothing");
    assert!(status_after(&[select(), (OPT_STARTTLS, vec![])], "disk"), "a refused STARTTLS changes nothing");
    assert!(status_after(&[set("other", &["base:allocation"]), select()], "disk"));
}

#[test]
fn an_option_that_is_too_long_is_dropped_and_told() {
    let mut session = greeted();
    for number in [OPT_GO, OPT_INFO, OPT_SET_META_CONTEXT, 99] {
        assert_eq!(session.ask(number, &vec![7; 1 << 20]).unwrap().kind, ERR_TOO_BIG);
        assert!(session.connection.buffered().backlog == 0);
    }
    assert_eq!(session.ask_all(OPT_GO, &info_data("disk", &[])).last().unwrap().kind, REP_ACK);
    let mut session = greeted();
    let mut header = option(OPT_GO, &[]);
    header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    session.feed(&header);
    assert!(matches!(session.closed, Some(CloseReason::Violation(_))));
}

#[test]
fn an_option_that_is_not_dropped_is_not_kept_before_it_is_there() {
    let mut session = greeted();
    let mut header = option(99, &[]);
    header[12..].copy_from_slice(&(32_u32 << 20).to_be_bytes());
    session.feed(&header);
    for _ in 0..100 {
        session.feed(&[0; 4096]);
        assert_eq!(session.connection.buffered().backlog, 0);
    }
}

#[test]
fn options_are_counted() {
    let limits = ConnectionLimits { options: 10, ..ConnectionLimits::default() };
    let mut session = Session::with(limits, shelf(), 0);
    session.feed(&client_flags(3));
    for _ in 0..10 {
        assert_eq!(session.ask(99, &[]).unwrap().kind, ERR_UNSUP);
    }
    session.feed(&option(99, &[]));
    assert!(matches!(session.closed, Some(CloseReason::Violation(_))));
}

#[test]
fn requests_may_follow_go_at_once() {
    let mut session = Session::new();
    let read = Request::new(READ, 0, 7, 0, 512);
    session.requests.insert(7, read.clone());
    let stream = [client_flags(3), option(OPT_GO, &info_data("disk", &[])), read.bytes()].concat();
    assert!(session.feed(&stream).is_empty());
    while let Some(reply) = session.parser.option_reply() {
        if reply.kind == REP_ACK {
            break;
        }
    }
    session.answer_all();
    assert_eq!(session.replies()[&7].errors, []);
}

#[test]
fn draining_before_an_export_was_chosen_is_the_end() {
    let mut session = greeted();
    session.connection.drain();
    session.turn();
    assert_eq!(session.closed, Some(CloseReason::Drained));
    assert_eq!(session.connection.wants(), None);
}

#[test]
fn the_first_receives_are_small() {
    let session = Session::new();
    assert_eq!(session.connection.wants(), Some(Receive::Any { most: 4096 }));
}
