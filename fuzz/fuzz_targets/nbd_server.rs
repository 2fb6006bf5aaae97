//! A peer of the NBD server that sends anything: whatever comes, in whatever chunks, there is no panic, memory stays within its limits, I/O stays on the
//! disk, and each request that came as a whole has one final reply (if the peer kept to the protocol's framing).
//!
//! The first byte chooses the limits and what comes before the input: nothing, or a handshake that has chosen an export. The next four are the seed
//! of everything that a machine leaves to chance. The rest is what the peer sends.

#![no_main]

#[allow(dead_code, reason = "it is that of the engine's tests, which use more of it")]
#[path = "../../engine/tests/nbd_protocol/client.rs"]
mod client;

use std::collections::BTreeMap;
use std::sync::Arc;

use client::{
    OPT_GO, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, READ, REP_ACK, Reply, Request, WRITE, client_flags,
    context_data, info_data, option,
};
use engine::nbd::{
    Action, CloseReason, Connection, ConnectionLimits, Export, Exports, IoId, IoKind, Outcome, Receive,
    SharedBytes, StatusExtent, WireError,
};
use engine::units::Length;
use libfuzzer_sys::fuzz_target;

const LENGTH: u64 = 40_001;

struct Only(Arc<Export>);

impl Exports for Only {
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        (name.is_empty() || name == "d").then(|| Arc::clone(&self.0))
    }

    fn after(&self, previous: Option<&str>) -> Option<Arc<Export>> {
        previous.is_none().then(|| Arc::clone(&self.0))
    }
}

/// What a machine leaves to chance.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound.max(1)
    }
}

fn limits(choice: u8) -> ConnectionLimits {
    if choice & 4 == 0 {
        return ConnectionLimits::default();
    }
    ConnectionLimits {
        requests: 3,
        piece_bytes: 8192,
        reserve_bytes: 8192,
        incoming_bytes: 10_000,
        outgoing_bytes: 20_000,
        stream_bytes: 9000,
        pieces_a_request: 2,
        read_ahead: 4096,
        ..ConnectionLimits::default()
    }
}

fn prefix(choice: u8) -> Vec<u8> {
    let mut stream = Vec::new();
    if choice & 3 != 0 {
        stream.extend(client_flags(3));
        if choice & 3 > 1 {
            stream.extend(option(OPT_STRUCTURED_REPLY, &[]));
            stream.extend(option(OPT_SET_META_CONTEXT, &context_data("d", &["base:allocation"])));
        }
        stream.extend(option(OPT_GO, &info_data("d", &[])));
    }
    stream
}

fn outcome(kind: &IoKind, limits: &ConnectionLimits, chance: &mut Chance) -> Outcome {
    let on_disk = |offset: u64, length: u64| {
        assert!(length > 0 && offset.checked_add(length).is_some_and(|end| end <= LENGTH), "{kind:?}");
    };
    let piece = limits.piece_bytes as u64;
    match kind {
        IoKind::Read { range } => {
            on_disk(range.offset, range.length);
            assert!(range.length <= piece);
        }
        IoKind::Write { offset, data, .. } => {
            on_disk(*offset, data.len() as u64);
            assert!(data.len() as u64 <= piece);
        }
        IoKind::Flush => {}
        IoKind::Discard { range, .. }
        | IoKind::WriteZeroes { range, .. }
        | IoKind::Cache { range }
        | IoKind::BlockStatus { range, .. } => on_disk(range.offset, range.length),
    }
    match (chance.below(12), kind) {
        (0, _) => Outcome::Failed(WireError::ALL[chance.below(8)]),
        (1, _) => Outcome::Done,
        (2, IoKind::Read { .. }) => Outcome::Zero,
        (_, IoKind::Read { range }) => Outcome::Data(vec![7; range.length as usize]),
        (_, IoKind::BlockStatus { contexts, .. }) => {
            let list =
                (0..chance.below(6000)).map(|number| StatusExtent { length: 512, flags: number as u32 % 2 });
            Outcome::Extents(vec![list.collect(); contexts.len()])
        }
        _ => Outcome::Done,
    }
}

/// What a session has given out.
struct Seen {
    sent: Vec<u8>,
    attached: bool,
    closed: CloseReason,
}

fn run(choice: u8, chance: &mut Chance, stream: &[u8]) -> Seen {
    let limits = limits(choice);
    let shared = SharedBytes::new(if choice & 8 == 0 { 1 << 20 } else { 5000 });
    let all = shared.left();
    let exports = Only(Arc::new(Export::new("d", Length(LENGTH), choice & 16 != 0).unwrap()));
    let mut connection = Connection::new(limits, shared.clone());
    let (mut rest, mut ended, mut sending) = (stream, false, false);
    let (mut ios, mut sent, mut attached): (Vec<(IoId, IoKind)>, _, _) = (Vec::new(), Vec::new(), false);
    let mut closed = None;
    while closed.is_none() || !ios.is_empty() {
        while let Some(action) = connection.poll(&exports) {
            match action {
                Action::Attach(_) => attached = true,
                Action::Io { id, kind } => ios.push((id, kind)),
                Action::Send(parts) => {
                    assert!(!std::mem::replace(&mut sending, true));
                    parts.iter().for_each(|part| sent.extend_from_slice(part));
                }
                Action::Close(reason) => closed = Some(reason),
            }
        }
        let held = connection.buffered();
        assert!(held.requests <= limits.requests && held.incoming <= limits.incoming_bytes);
        assert!(held.outgoing <= limits.outgoing_bytes + limits.stream_bytes);
        assert!(held.backlog <= limits.read_ahead + limits.option_bytes + 4096);
        if chance.below(3) == 0 && sending {
            sending = false;
            connection.sent();
        }
        if chance.below(2) == 0 && !ios.is_empty() {
            let (id, kind) = ios.swap_remove(chance.below(ios.len()));
            connection.answered(id, outcome(&kind, &limits, chance));
        }
        match connection.wants() {
            Some(_) if rest.is_empty() && !ended => {
                ended = true;
                connection.end_of_stream();
            }
            Some(Receive::Payload { missing }) if chance.below(2) == 0 => {
                let mut lent = connection.lend_payload();
                let count = missing.min(rest.len()).min(1 + chance.below(missing));
                lent.buffer[lent.filled..lent.filled + count].copy_from_slice(&rest[..count]);
                rest = &rest[count..];
                connection.received_payload(lent, count);
            }
            Some(Receive::Any { most } | Receive::Payload { missing: most }) => {
                let count = most.min(rest.len());
                let count = if chance.below(2) == 0 { count } else { count.min(1 + chance.below(100)) };
                connection.received(&rest[..count]);
                rest = &rest[count..];
            }
            None => {}
        }
    }
    assert!(connection.is_finished());
    drop(connection);
    assert_eq!(shared.left(), all);
    Seen { sent, attached, closed: closed.unwrap() }
}

/// The requests in what a peer sent after its handshake, up to its goodbye. `None`: it uses a cookie twice.
fn requests_in(mut bytes: &[u8]) -> Option<BTreeMap<u64, Request>> {
    let mut requests = BTreeMap::new();
    while let Some((header, rest)) = bytes.split_at_checked(28) {
        assert_eq!(header[..4], [0x25, 0x60, 0x95, 0x13], "it would not have ended orderly");
        let (flags, command) = (client::u16_at(header, 4), client::u16_at(header, 6));
        let (cookie, offset) = (client::u64_at(header, 8), client::u64_at(header, 16));
        let length = client::u32_at(header, 24);
        bytes = rest;
        if command == client::DISC {
            break;
        }
        if command == WRITE {
            assert!(length <= 32 << 20, "nor so");
            let Some((_, rest)) = bytes.split_at_checked(length as usize) else { break };
            bytes = rest;
        }
        if requests.insert(cookie, Request::new(command, flags, cookie, offset, length)).is_some() {
            return None;
        }
    }
    Some(requests)
}

fn check_replies(seen: &Seen, requests: &BTreeMap<u64, Request>) {
    let mut parser = client::Parser::default();
    parser.push(&seen.sent);
    parser.greeting().expect("a greeting");
    while parser.option_reply().expect("replies to options").kind != REP_ACK
        || parser.rest().starts_with(&[0, 3, 0xe8, 0x89])
    {}
    let length = |cookie: u64| match requests.get(&cookie) {
        Some(request) if request.command == READ => request.length as usize,
        _ => 0,
    };
    let mut replies: BTreeMap<u64, Reply> = BTreeMap::new();
    while let Some(message) = parser.message(length) {
        let request = requests.get(&message.cookie()).expect("a reply to a request");
        replies.entry(message.cookie()).or_default().add(request, &message);
    }
    assert!(parser.rest().is_empty(), "something that is no reply");
    assert_eq!(replies.len(), requests.len(), "every request has its reply");
    assert!(replies.values().all(|reply| reply.done));
}

fuzz_target!(|input: &[u8]| {
    let Some((head, rest)) = input.split_at_checked(5) else { return };
    let mut chance = Chance(u64::from(u32::from_be_bytes(head[1..].try_into().unwrap())));
    let prefix = prefix(head[0]);
    let stream = [&prefix, rest].concat();
    let seen = run(head[0], &mut chance, &stream);
    let orderly = matches!(seen.closed, CloseReason::Disconnected | CloseReason::EndOfStream);
    if !prefix.is_empty() && orderly {
        assert!(seen.attached);
        if let Some(requests) = requests_in(rest) {
            check_replies(&seen, &requests);
        }
    }
});
