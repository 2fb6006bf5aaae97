//! A client of an export, with a part of the disk to itself: what it asks for, and what it may be told.
//!
//! It never has two requests on the same bytes in flight, so it knows what each byte reads as: what it wrote last, unless that failed or nobody told.
//! What was in flight when it died is not known for ever: it may still come about.

use std::collections::{BTreeMap, VecDeque};
use std::net::Shutdown;
use std::ops::Range;

use engine::ring::sim::{SimAddress, SimPeer};
use fastrand::Rng;
use nix::errno::Errno;

use crate::client::{
    self, BLOCK_STATUS, CACHE, DF, DISC, FAST_ZERO, FLUSH, FUA, Message, NO_HOLE, Parser, READ, REQ_ONE,
    Reply, Request, TRIM, WRITE, WRITE_ZEROES,
};
use crate::run::Seen;

/// What a byte reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Byte {
    Known(u8),
    /// A write of it failed, or it was trimmed.
    Unknown,
    /// A client that is gone has asked for it to be changed, and that may come about at any time.
    Never,
}

/// A part of the disk, as those know it who have it.
pub(crate) struct Stripe {
    pub(crate) start: u64,
    pub(crate) bytes: Vec<Byte>,
}

impl Stripe {
    fn part(&mut self, request: &Request) -> &mut [Byte] {
        let start = usize::try_from(request.offset - self.start).unwrap();
        &mut self.bytes[start..start + request.length as usize]
    }

    fn set(&mut self, request: &Request, value: impl Fn(usize) -> Byte) {
        for (index, byte) in self.part(request).iter_mut().enumerate() {
            if *byte != Byte::Never {
                *byte = value(index);
            }
        }
    }

    /// What reads as zeros by a block status is zero; whether there was any.
    fn compare_holes(&mut self, request: &Request, reply: &Reply) -> Result<bool, String> {
        const ZERO: u32 = 2;
        let (mut at, mut any) = (0, false);
        let part = self.part(request);
        for &(length, flags) in reply.status.iter().flat_map(|(_, extents)| extents) {
            let end = (at + length as usize).min(part.len());
            if flags & ZERO != 0 {
                any = true;
                if let Some(index) = part[at..end].iter().position(|byte| matches!(byte, Byte::Known(1..))) {
                    return Err(format!("byte {} of {request:?} is no zero", at + index));
                }
            }
            at = end;
        }
        Ok(any)
    }

    pub(crate) fn compare(&mut self, request: &Request, data: &[u8]) -> Result<(), String> {
        for (index, (byte, &is)) in self.part(request).iter().zip(data).enumerate() {
            if let Byte::Known(expected) = *byte
                && expected != is
            {
                return Err(format!("byte {index} of {request:?} is {is}, not {expected}"));
            }
        }
        Ok(())
    }
}

/// How far it has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Greeting,
    Structured,
    Contexts,
    Choice,
    Transmission,
}

/// How it behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Temper {
    pub(crate) structured: bool,
    pub(crate) at_a_time: usize,
    pub(crate) requests: u32,
    /// Most bytes of a request.
    pub(crate) longest: u32,
    /// Of 1,024 acts, in how many it goes away for no reason.
    pub(crate) dies: u16,
    /// Of 1,024 acts, in how many it reads.
    pub(crate) reads: u16,
}

/// See the module's header.
pub(crate) struct Client {
    peer: SimPeer,
    temper: Temper,
    parser: Parser,
    out: VecDeque<u8>,
    stage: Stage,
    export: &'static str,
    left: u32,
    requests: BTreeMap<u64, Request>,
    partial: BTreeMap<u64, Reply>,
    cookie: u64,
    leaving: bool,
}

/// Whether a client is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Still {
    Here,
    Gone,
}

impl Client {
    pub(crate) fn connect(address: &SimAddress, export: &'static str, temper: Temper) -> Option<Self> {
        let peer = address.connect().ok()?;
        Some(Self {
            peer,
            temper,
            parser: Parser::default(),
            out: VecDeque::new(),
            stage: Stage::Greeting,
            export,
            left: temper.requests,
            requests: BTreeMap::new(),
            partial: BTreeMap::new(),
            cookie: 0,
            leaving: false,
        })
    }

    /// Do something, or nothing.
    pub(crate) fn act(
        &mut self,
        stripe: &mut Stripe,
        rng: &mut Rng,
        seen: &mut Seen,
    ) -> Result<Still, String> {
        if rng.u16(..1024) < self.temper.dies {
            seen.deaths += 1;
            match rng.u8(..3) {
                0 => self.peer.shut_down(Shutdown::Write),
                1 => self.peer.shut_down(Shutdown::Both),
                _ => {}
            }
            return Ok(self.gone(stripe));
        }
        while rng.u16(..1024) < self.temper.reads {
            match self.peer.read(rng.usize(1..70_000)) {
                Ok(bytes) if bytes.is_empty() => return Ok(self.gone(stripe)),
                Ok(bytes) => {
                    self.parser.push(&bytes);
                    self.understand(stripe, seen)?;
                }
                Err(Errno::EAGAIN) => break,
                Err(_) => return Ok(self.gone(stripe)),
            }
        }
        match self.stage {
            Stage::Transmission => self.ask(stripe, rng, seen),
            // There is no such export, or none any more.
            _ if self.leaving => return Ok(self.gone(stripe)),
            _ => {}
        }
        while !self.out.is_empty() {
            let most = if rng.bool() { self.out.len() } else { rng.usize(1..=self.out.len().min(600)) };
            let bytes: Vec<u8> = self.out.iter().take(most).copied().collect();
            match self.peer.write(&bytes) {
                Ok(written) => drop(self.out.drain(..written)),
                Err(Errno::EAGAIN) => break,
                Err(_) => return Ok(self.gone(stripe)),
            }
        }
        Ok(Still::Here)
    }

    /// How it stands.
    pub(crate) fn tell(&self) -> String {
        let Self { stage, left, requests, partial, out, leaving, .. } = self;
        format!(
            "{stage:?}, {left} left, {requests:?}, {} begun, {} to say, {leaving}",
            partial.len(),
            out.len()
        )
    }

    /// What it had in flight may come about, or not.
    fn gone(&mut self, stripe: &mut Stripe) -> Still {
        for request in self.requests.values().filter(|request| changes(request.command)) {
            stripe.part(request).fill(Byte::Never);
        }
        self.requests.clear();
        Still::Gone
    }

    fn understand(&mut self, stripe: &mut Stripe, seen: &mut Seen) -> Result<(), String> {
        loop {
            match self.stage {
                Stage::Greeting => {
                    if self.parser.greeting().is_none() {
                        return Ok(());
                    }
                    self.out.extend(client::client_flags(3));
                    if self.temper.structured {
                        self.option(client::OPT_STRUCTURED_REPLY, &[], Stage::Structured);
                    } else {
                        self.choose();
                    }
                }
                Stage::Structured | Stage::Contexts | Stage::Choice => {
                    let Some(reply) = self.parser.option_reply() else { return Ok(()) };
                    if reply.kind >> 31 == 1 {
                        // The export is going: it leaves.
                        self.leaving = true;
                        return Ok(());
                    }
                    match (self.stage, reply.kind) {
                        (_, client::REP_INFO | client::REP_META_CONTEXT) => {}
                        (Stage::Structured, _) => {
                            let data = client::context_data(self.export, &["base:allocation"]);
                            self.option(client::OPT_SET_META_CONTEXT, &data, Stage::Contexts);
                        }
                        (Stage::Contexts, _) => self.choose(),
                        _ => self.stage = Stage::Transmission,
                    }
                }
                Stage::Transmission => {
                    let requests = &self.requests;
                    let length = |cookie| {
                        requests.get(&cookie).map_or(0, |request| match request.command {
                            READ => request.length as usize,
                            _ => 0,
                        })
                    };
                    let Some(message) = self.parser.message(length) else { return Ok(()) };
                    self.message(&message, stripe, seen)?;
                }
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8], then: Stage) {
        self.out.extend(client::option(option, data));
        self.stage = then;
    }

    fn choose(&mut self) {
        let data = client::info_data(self.export, &[]);
        self.option(client::OPT_GO, &data, Stage::Choice);
    }

    fn message(&mut self, message: &Message, stripe: &mut Stripe, seen: &mut Seen) -> Result<(), String> {
        let cookie = message.cookie();
        let request = self.requests.get(&cookie).ok_or_else(|| format!("a reply to nothing: {cookie}"))?;
        let reply = self.partial.entry(cookie).or_default();
        reply.add(request, message);
        if !reply.done {
            return Ok(());
        }
        let reply = self.partial.remove(&cookie).expect("it was just there");
        let request = self.requests.remove(&cookie).expect("it was just there");
        seen.replies += 1;
        if !reply.errors.is_empty() {
            seen.errors += 1;
            return Ok(());
        }
        match request.command {
            READ => stripe.compare(&request, &reply.whole(&request))?,
            WRITE => stripe.set(&request, |index| Byte::Known(request.payload[index])),
            WRITE_ZEROES => stripe.set(&request, |_| Byte::Known(0)),
            BLOCK_STATUS => {
                seen.queries += 1;
                let told = if self.export == "t0" { &mut seen.t0_holes } else { &mut seen.holes };
                *told += u64::from(stripe.compare_holes(&request, &reply)?);
            }
            _ => {}
        }
        seen.long += u64::from(request.length > 300_000);
        seen.flushed += u64::from(request.flags & FUA != 0);
        Ok(())
    }

    fn ask(&mut self, stripe: &mut Stripe, rng: &mut Rng, seen: &mut Seen) {
        while self.requests.len() < self.temper.at_a_time && self.left > 0 && !self.leaving {
            self.left -= 1;
            let Some(range) = self.free_range(stripe, rng) else { continue };
            self.cookie += 1;
            let request = self.request(&range, rng);
            if changes(request.command) {
                stripe.set(&request, |_| Byte::Unknown);
            }
            self.out.extend(request.bytes());
            self.requests.insert(self.cookie, request);
        }
        if self.requests.is_empty() && self.left == 0 && !self.leaving {
            self.leaving = true;
            seen.farewells += 1;
            self.out.extend(Request::new(DISC, 0, 0, 0, 0).bytes());
        }
    }

    /// A range on which nothing is in flight.
    fn free_range(&self, stripe: &Stripe, rng: &mut Rng) -> Option<Range<u64>> {
        let length = u64::from(rng.u32(1..=self.temper.longest)).min(stripe.bytes.len() as u64);
        let start = stripe.start + rng.u64(0..=stripe.bytes.len() as u64 - length);
        let range = start..start + length;
        let meets = |other: &Request| {
            other.offset < range.end && range.start < other.offset + u64::from(other.length)
        };
        (!self.requests.values().any(meets)).then_some(range)
    }

    fn request(&self, range: &Range<u64>, rng: &mut Rng) -> Request {
        let fua = if rng.u8(..4) == 0 { FUA } else { 0 };
        let df = if self.temper.structured && rng.u8(..4) == 0 { DF } else { 0 };
        let (offset, length) = (range.start, u32::try_from(range.end - range.start).unwrap());
        let new = |command, flags| Request::new(command, flags, self.cookie, offset, length);
        let read_only = self.export == "t0";
        match rng.u8(..20) {
            0..8 if read_only && self.temper.structured => new(BLOCK_STATUS, 0),
            _ if read_only => new(READ, df),
            0..8 => {
                let mut data = vec![0; length as usize];
                rng.fill(&mut data);
                Request::write(fua, self.cookie, offset, data)
            }
            8..14 => new(READ, df),
            14 => Request::new(FLUSH, 0, self.cookie, 0, 0),
            15 => new(TRIM, fua),
            16 | 17 => {
                let flags = [0, NO_HOLE, FAST_ZERO, NO_HOLE | FAST_ZERO][rng.usize(..4)];
                new(WRITE_ZEROES, fua | flags)
            }
            18 if self.temper.structured => new(BLOCK_STATUS, if rng.bool() { REQ_ONE } else { 0 }),
            _ => new(CACHE, 0),
        }
    }
}

fn changes(command: u16) -> bool {
    matches!(command, WRITE | TRIM | WRITE_ZEROES)
}
