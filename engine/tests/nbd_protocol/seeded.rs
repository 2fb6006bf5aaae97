//! Random sessions: a naive client with legal and illegal requests, a naive disk that is bad in places and answers in any order, streams
//! that are cut anywhere, limits that are small.
//!
//! What is checked: each request has one final reply, with the error that the rules give it, or with data that was on the disk at some time between
//! request and reply; each change of the disk is a part of one request, as that has it, made once, before its success is told, and durable if
//! that was asked for; what the connection holds stays within its limits; in the end everything has been given back.

mod verdict;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use engine::nbd::{
    Action, CloseReason, Connection, ConnectionLimits, Export, IoId, IoKind, Outcome, Receive, SharedBytes,
    StatusExtent,
};
use engine::units::{ByteRange, Length};
use fastrand::Rng;
use nix::errno::Errno;

use crate::client::*;
use crate::seeds::seeds;
use crate::session::Shelf;

const LENGTH: u64 = 300_001;
/// Many times what the longest session takes.
const MAX_STEPS: u64 = 1_000_000;
const CONTEXTS: [&str; 2] = ["base:allocation", "qemu:allocation-depth"];

/// A request that has no final reply yet.
struct Open {
    request: Request,
    /// When it may first have had an effect.
    since: u64,
    /// The disk then; for reads only.
    disk: Vec<u8>,
    reply: Reply,
    /// What of it was given to the disk, and whether each was durable by itself.
    parts: Vec<(ByteRange, bool)>,
    failed: bool,
    /// When the last of its parts was answered.
    settled: u64,
}

struct Change {
    at: u64,
    range: ByteRange,
    bytes: Vec<u8>,
}

/// What a run has seen, so that a run that sees nothing does not pass.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    good_reads: u64,
    holes: u64,
    good_writes: u64,
    refused: u64,
    failed: u64,
    durable_long: u64,
    cut_off: u64,
    waited: u64,
}

struct World {
    rng: Rng,
    connection: Connection,
    limits: ConnectionLimits,
    shelf: Shelf,
    structured: bool,
    read_only: bool,
    time: u64,
    disk: Vec<u8>,
    changes: Vec<Change>,
    flushes: Vec<(u64, u64)>,
    bad: Vec<ByteRange>,
    open: BTreeMap<u64, Open>,
    /// I/O under way: since when, and of which request, if it changes something.
    ios: Vec<(IoId, IoKind, u64, Option<u64>)>,
    /// What the client has still to send.
    stream: VecDeque<u8>,
    /// Requests in it, with the number of the byte after them.
    to_come: VecDeque<(u64, Request)>,
    made: u64,
    fed: u64,
    parser: Parser,
    sending: Option<Vec<Vec<u8>>>,
    closed: Option<CloseReason>,
    next_cookie: u64,
    goodbye: bool,
    seen: Seen,
}

fn overlap(a: ByteRange, b: ByteRange) -> bool {
    a.intersection(b).is_some()
}

fn at(bytes: &[u8], range: ByteRange) -> &[u8] {
    &bytes[range.offset as usize..range.end() as usize]
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let small = ConnectionLimits {
            requests: rng.usize(1..12),
            piece_bytes: 4096 * rng.usize(2..6),
            reserve_bytes: 8192,
            incoming_bytes: 20_480 + rng.usize(0..40_000),
            outgoing_bytes: 20_480 + rng.usize(0..40_000),
            stream_bytes: 20_480 + rng.usize(0..20_000),
            pieces_a_request: rng.usize(1..4),
            read_ahead: 4096 << rng.usize(0..3),
            ..ConnectionLimits::default()
        };
        let limits = if rng.u8(..8) == 0 { ConnectionLimits::default() } else { small };
        let shared = SharedBytes::new(if rng.bool() { 1 << 20 } else { rng.usize(0..30_000) });
        let read_only = rng.u8(..8) == 0;
        let export = Export::new("disk", Length(LENGTH), read_only).unwrap();
        let contexts = vec![engine::nbd::MetaContext::Allocation, engine::nbd::MetaContext::AllocationDepth];
        let shelf = Shelf(vec![Arc::new(export.with_contexts(contexts).unwrap())]);
        let bad = (0..rng.usize(0..3)).map(|_| ByteRange::new(rng.u64(0..LENGTH), 1)).collect();
        let mut disk = vec![0; LENGTH as usize];
        disk[..200_000].fill_with(|| rng.u8(..));
        let mut world = Self {
            connection: Connection::new(limits, shared),
            limits,
            shelf,
            structured: rng.bool(),
            read_only,
            time: 0,
            disk,
            changes: Vec::new(),
            flushes: Vec::new(),
            bad,
            open: BTreeMap::new(),
            ios: Vec::new(),
            stream: VecDeque::new(),
            to_come: VecDeque::new(),
            made: 0,
            fed: 0,
            parser: Parser::default(),
            sending: None,
            closed: None,
            next_cookie: rng.u64(..),
            goodbye: false,
            seen: Seen::default(),
            rng,
        };
        world.shake_hands();
        world
    }

    fn shake_hands(&mut self) {
        let mut stream = client_flags(3);
        if self.structured {
            stream.extend(option(OPT_STRUCTURED_REPLY, &[]));
            stream.extend(option(OPT_SET_META_CONTEXT, &context_data("disk", &CONTEXTS)));
        }
        stream.extend(option(OPT_GO, &info_data("disk", &[])));
        self.connection.received(&stream);
        while let Some(action) = self.connection.poll(&self.shelf) {
            match action {
                Action::Attach(_) => {}
                Action::Send(parts) => {
                    parts.iter().for_each(|part| self.parser.push(part));
                    self.connection.sent();
                }
                other => panic!("{other:?}"),
            }
        }
        self.parser.greeting().unwrap();
        while self.parser.option_reply().unwrap().kind != REP_ACK || !self.parser.rest().is_empty() {}
    }

    /// A request of any kind, most of them legal.
    fn make_request(&mut self) {
        let rng = &mut self.rng;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let cookie = self.next_cookie;
        let command = match rng.u8(..20) {
            0..7 => READ,
            7..13 => WRITE,
            13 => FLUSH,
            14 => TRIM,
            15 | 16 => WRITE_ZEROES,
            17 => BLOCK_STATUS,
            18 => CACHE,
            _ => rng.u16(7..20),
        };
        let mut flags = match command {
            READ => *rng.choice([0, 0, DF].iter()).unwrap(),
            WRITE => *rng.choice([0, FUA].iter()).unwrap(),
            WRITE_ZEROES => *rng.choice([0, FUA, NO_HOLE, FAST_ZERO].iter()).unwrap(),
            BLOCK_STATUS => *rng.choice([0, REQ_ONE].iter()).unwrap(),
            _ => 0,
        };
        if rng.u8(..30) == 0 {
            flags |= 1 << rng.u8(..16);
        }
        let length = match rng.u8(..10) {
            0..4 => rng.u32(0..5000),
            4..8 => 4096 * rng.u32(1..8),
            8 => rng.u32(0..100_000),
            _ => rng.u32(0..LENGTH as u32 + 1),
        };
        let offset = match rng.u8(..20) {
            0..9 => rng.u64(0..LENGTH) / 4096 * 4096,
            9..18 => rng.u64(0..LENGTH),
            18 => LENGTH - u64::from(length).min(LENGTH),
            _ => rng.u64(..),
        };
        let room = if rng.u8(..15) == 0 { u64::from(length) } else { LENGTH.saturating_sub(offset) };
        let length = length.min(u32::try_from(room).unwrap());
        let request = if command == WRITE {
            Request::write(flags, cookie, offset, (0..length).map(|_| rng.u8(1..)).collect())
        } else if command == FLUSH {
            Request::new(FLUSH, flags, cookie, 0, 0)
        } else {
            Request::new(command, flags, cookie, offset, length)
        };
        self.queue(request);
    }

    fn queue(&mut self, request: Request) {
        let bytes = request.bytes();
        self.made += bytes.len() as u64;
        self.stream.extend(bytes);
        if request.command != DISC {
            self.to_come.push_back((self.made, request));
        }
    }

    fn is_bad(&self, range: ByteRange) -> bool {
        self.bad.iter().any(|&bad| overlap(bad, range))
    }

    /// Give the connection some bytes, as it wants them.
    fn feed(&mut self) {
        let wants = match self.connection.wants() {
            None => {
                self.seen.waited += 1;
                return;
            }
            Some(wants) => wants,
        };
        let most = match wants {
            Receive::Any { most } => most,
            Receive::Payload { missing } => missing,
        };
        let count = most.min(self.stream.len());
        let count = if self.rng.u8(..4) == 0 { self.rng.usize(0..=count) } else { count };
        if count == 0 {
            return;
        }
        let bytes: Vec<u8> = self.stream.drain(..count).collect();
        // From now on they may have an effect.
        self.fed += count as u64;
        while let Some((end, _)) = self.to_come.front()
            && end - 28 < self.fed + self.payload_of_first()
        {
            let (_, request) = self.to_come.pop_front().unwrap();
            let disk = if request.command == READ { self.disk.clone() } else { Vec::new() };
            let open = Open {
                since: self.time,
                disk,
                reply: Reply::default(),
                parts: Vec::new(),
                failed: false,
                settled: self.time,
                request,
            };
            assert!(self.open.insert(open.request.cookie, open).is_none());
        }
        if matches!(wants, Receive::Payload { .. }) && self.rng.bool() {
            let mut lent = self.connection.lend_payload();
            assert_eq!(lent.buffer.len() - lent.filled, most);
            lent.buffer[lent.filled..lent.filled + count].copy_from_slice(&bytes);
            self.connection.received_payload(lent, count);
        } else {
            self.connection.received(&bytes);
        }
    }

    fn payload_of_first(&self) -> u64 {
        self.to_come.front().map_or(0, |(_, request)| request.payload.len() as u64)
    }

    fn poll(&mut self) -> bool {
        let Some(action) = self.connection.poll(&self.shelf) else { return false };
        match action {
            Action::Attach(_) => panic!("it has an export"),
            Action::Io { id, kind } => {
                let owner = self.note(&kind);
                self.ios.push((id, kind, self.time, owner));
            }
            Action::Send(parts) => {
                assert!(self.sending.replace(parts).is_none(), "one at a time");
            }
            Action::Close(reason) => assert!(self.closed.replace(reason).is_none()),
        }
        true
    }

    /// Every I/O that changes something is a part of one request.
    fn note(&mut self, kind: &IoKind) -> Option<u64> {
        let (range, durable) = match kind {
            IoKind::Read { range } => {
                assert!(range.length > 0 && range.length <= self.limits.piece_bytes as u64);
                return None;
            }
            IoKind::Write { offset, data, fua } => {
                assert!(!data.is_empty() && data.len() <= self.limits.piece_bytes);
                (ByteRange::new(*offset, data.len() as u64), *fua)
            }
            IoKind::Discard { range, fua } | IoKind::WriteZeroes { range, fua, .. } => (*range, *fua),
            _ => return None,
        };
        assert!(!self.read_only && range.end() <= LENGTH);
        let of = |open: &Open| {
            let request = &open.request;
            let whole = range == ByteRange::new(request.offset, u64::from(request.length));
            let fresh = open.parts.iter().all(|(part, _)| !overlap(*part, range));
            let has = |flag| request.flags & flag != 0;
            fresh
                && match kind {
                    IoKind::Write { data, .. } => {
                        let start = range.offset.wrapping_sub(request.offset) as usize;
                        request.command == WRITE
                            && request.payload.get(start..).is_some_and(|rest| rest.starts_with(data))
                    }
                    IoKind::Discard { .. } => request.command == TRIM && whole && durable == has(FUA),
                    IoKind::WriteZeroes { no_hole, fast, .. } => {
                        let flags = (durable, *no_hole, *fast);
                        request.command == WRITE_ZEROES
                            && whole
                            && flags == (has(FUA), has(NO_HOLE), has(FAST_ZERO))
                    }
                    _ => false,
                }
        };
        let owner = self.open.values_mut().find(|open| of(open)).expect("a change that nobody asked for");
        owner.parts.push((range, durable));
        Some(owner.request.cookie)
    }

    /// Do an I/O and answer it.
    fn answer(&mut self) {
        if self.ios.is_empty() {
            return;
        }
        let index = self.rng.usize(..self.ios.len());
        let (id, kind, issued, owner) = self.ios.swap_remove(index);
        self.time += 1;
        let outcome = self.carry_out(&kind, issued);
        let failed = matches!(outcome, Outcome::Failed(_));
        if let Some(open) = owner.and_then(|cookie| self.open.get_mut(&cookie)) {
            open.failed |= failed;
            open.settled = self.time;
        }
        self.connection.answered(id, outcome);
    }

    fn carry_out(&mut self, kind: &IoKind, issued: u64) -> Outcome {
        let fails = |errno: Errno| Outcome::errno(errno);
        match kind {
            IoKind::Read { range } => {
                if self.is_bad(*range) {
                    return fails(Errno::EIO);
                }
                let bytes = at(&self.disk, *range).to_vec();
                let zero = bytes.iter().all(|&byte| byte == 0);
                if zero && self.rng.bool() { Outcome::Zero } else { Outcome::Data(bytes) }
            }
            IoKind::Write { offset, data, .. } => {
                let range = ByteRange::new(*offset, data.len() as u64);
                if self.is_bad(range) {
                    return fails(Errno::EDQUOT);
                }
                self.change(range, data.clone());
                Outcome::Done
            }
            IoKind::Discard { range, .. } | IoKind::WriteZeroes { range, fast: false, .. } => {
                if self.is_bad(*range) {
                    return fails(Errno::EOPNOTSUPP);
                }
                self.change(*range, vec![0; range.length as usize]);
                Outcome::Done
            }
            IoKind::WriteZeroes { .. } => fails(Errno::EOPNOTSUPP),
            IoKind::Flush => {
                self.flushes.push((issued, self.time));
                Outcome::Done
            }
            IoKind::Cache { .. } => Outcome::Done,
            IoKind::BlockStatus { range, contexts, extents } => {
                assert_eq!(contexts.len(), 2);
                let list = (0..*extents as u32 + 1)
                    .map(|number| StatusExtent { length: range.length.min(512), flags: number % 4 })
                    .collect();
                Outcome::Extents(vec![list, vec![StatusExtent { length: 1 << 40, flags: 1 }]])
            }
        }
    }

    fn change(&mut self, range: ByteRange, bytes: Vec<u8>) {
        self.disk[range.offset as usize..range.end() as usize].copy_from_slice(&bytes);
        self.changes.push(Change { at: self.time, range, bytes });
    }

    /// The last send has left: take it apart.
    fn sent(&mut self) {
        let Some(parts) = self.sending.take() else { return };
        assert!(!parts.is_empty() && parts.len() <= 64 && parts.iter().all(|part| !part.is_empty()));
        parts.iter().for_each(|part| self.parser.push(part));
        self.connection.sent();
        let open = &self.open;
        let length = |cookie: u64| match open.get(&cookie) {
            Some(open) if open.request.command == READ => open.request.length as usize,
            _ => 0,
        };
        let messages: Vec<_> = std::iter::from_fn(|| self.parser.message(length)).collect();
        for message in messages {
            let open = self.open.get_mut(&message.cookie()).expect("one final reply to every request");
            let request = open.request.clone();
            open.reply.add(&request, &message);
            if open.reply.done {
                let open = self.open.remove(&request.cookie).unwrap();
                self.check_reply(open);
            }
        }
    }

    fn check_bounds(&self) {
        let limits = &self.limits;
        let buffered = self.connection.buffered();
        assert!(buffered.requests <= limits.requests, "{buffered:?}");
        assert!(buffered.incoming <= limits.incoming_bytes, "{buffered:?}");
        assert!(buffered.stream <= limits.stream_bytes, "{buffered:?}");
        assert!(buffered.outgoing <= limits.outgoing_bytes + buffered.stream, "{buffered:?}");
        assert!(buffered.backlog <= limits.read_ahead, "{buffered:?}");
        let (mut read, mut written) = (0, 0);
        for (_, kind, _, _) in &self.ios {
            match kind {
                IoKind::Read { range } => read += range.length as usize,
                IoKind::Write { data, .. } => written += data.len(),
                _ => {}
            }
        }
        assert!(read <= buffered.outgoing && written <= buffered.incoming, "what is out is accounted for");
    }

    /// Run to the end.
    fn run(mut self) -> Seen {
        let shared = self.connection_shared();
        let mut left = self.rng.usize(1..60);
        let eager = self.rng.u8(1..8);
        let mut steps = 0;
        while self.closed.is_none() {
            steps += 1;
            assert!(steps < MAX_STEPS, "it stands still");
            match self.rng.u8(..10) {
                0..2 if left > 0 && self.stream.len() < 200_000 => {
                    left -= 1;
                    self.make_request();
                }
                2..5 => self.feed(),
                5..7 if self.rng.u8(..8) <= eager => self.answer(),
                7 => self.sent(),
                _ => while self.poll() {},
            }
            if left == 0 && !self.goodbye {
                self.goodbye = true;
                self.queue(Request::new(DISC, 0, 0, 0, 0));
            }
            self.check_bounds();
        }
        if self.closed == Some(CloseReason::ReadFailed) {
            self.check_cut_off();
        } else {
            assert_eq!(self.closed, Some(CloseReason::Disconnected));
            assert!(self.open.is_empty() && self.ios.is_empty() && self.stream.is_empty());
            assert!(self.parser.rest().is_empty(), "something behind the last reply");
        }
        while !self.ios.is_empty() {
            self.answer();
        }
        assert!(!self.poll() && self.connection.is_finished());
        drop(self.connection);
        assert_eq!(shared.0.left(), shared.1);
        self.seen
    }

    fn connection_shared(&self) -> (SharedBytes, usize) {
        let shared = self.connection.shared_bytes().clone();
        let left = shared.left();
        (shared, left)
    }
}

#[test]
fn random_sessions() {
    let chosen = seeds("", 400);
    let mut all = Seen::default();
    for seed in chosen.clone() {
        let seen = std::panic::catch_unwind(|| World::new(seed).run()).unwrap_or_else(|panic| {
            eprintln!("seed {seed} failed");
            std::panic::resume_unwind(panic)
        });
        all.good_reads += seen.good_reads;
        all.holes += seen.holes;
        all.good_writes += seen.good_writes;
        all.refused += seen.refused;
        all.failed += seen.failed;
        all.durable_long += seen.durable_long;
        all.cut_off += seen.cut_off;
        all.waited += seen.waited;
    }
    if chosen.count() >= 400 {
        let Seen { good_reads, holes, good_writes, refused, failed, durable_long, cut_off, waited } = all;
        let counts = [good_reads, holes, good_writes, refused, failed, durable_long, cut_off, waited];
        assert!(counts.iter().all(|&count| count > 0), "not everything was seen: {all:?}");
    }
}
