//! Who drives the state machines: shows them a stream piece by piece, moves contents to where they belong, and checks what must hold whatever comes.

use std::collections::BTreeMap;

use engine::nbd::client::negotiation::{self, Next};
use engine::nbd::client::{
    Agreement, Answer, Negotiation, NegotiationError, Request, Step, Transmission, Violation, transmission,
};
use engine::nbd::{BlockSizes, WireError};

/// An agreement as modern servers make it.
pub(crate) fn agreement(structured: bool, allocation: Option<u32>) -> Agreement {
    let (length, blocks) = (1 << 40, BlockSizes::DEFAULT);
    Agreement { length, flags: 0xffff, blocks, structured, allocation, depth: None }
}

/// A request as its maker sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) request: Request,
    /// Of a read: what has come of each byte.
    pub(crate) contents: Vec<Option<u8>>,
    pub(crate) result: Option<Result<Answer, WireError>>,
}

/// A connection in which requests are answered.
#[derive(Clone)]
pub(crate) struct Session {
    machine: Transmission,
    pub(crate) asked: BTreeMap<u64, Asked>,
    pub(crate) broken: Option<Violation>,
}

impl Session {
    pub(crate) fn new(agreement: &Agreement) -> Self {
        Self { machine: Transmission::new(agreement), asked: BTreeMap::new(), broken: None }
    }

    /// Make a request; gives its cookie.
    pub(crate) fn ask(&mut self, request: Request) -> u64 {
        let (cookie, header) = self.machine.begin(request);
        assert_eq!(header[8..16], cookie.to_be_bytes());
        let length = if let Request::Read(range) = request { range.length as usize } else { 0 };
        let asked = Asked { request, contents: vec![None; length], result: None };
        assert!(self.asked.insert(cookie, asked).is_none(), "a cookie twice");
        cookie
    }

    /// Show `stream` to the machine, `more` bytes more each time it has not enough. Ends with the stream, or when it is broken.
    pub(crate) fn feed(&mut self, stream: &[u8], mut more: impl FnMut() -> usize) {
        let (mut at, mut there) = (0, 0);
        loop {
            let (taken, step) = match self.machine.advance(&stream[at..there]) {
                Ok(moved) => moved,
                Err(violation) => {
                    assert_eq!(
                        self.machine.advance(&[0; 64]),
                        Err(violation),
                        "broken once, broken for ever"
                    );
                    self.broken = Some(violation);
                    return;
                }
            };
            assert!(taken <= there - at);
            at += taken;
            match step {
                Step::Need(needed) => {
                    assert!(needed > there - at && needed <= transmission::MAX_NEEDED, "{needed}");
                    if there == stream.len() {
                        return;
                    }
                    there = stream.len().min(there + more().max(1));
                }
                Step::Data { cookie, at: place, length } => {
                    let Some(contents) = stream.get(at..at + length) else { return };
                    self.place(cookie, place, contents);
                    at += length;
                    there = there.max(at);
                }
                Step::Zeros { cookie, at: place, length } => {
                    assert!(length > 0);
                    self.place(cookie, place, &vec![0; length]);
                }
                Step::Ended { cookie, result } => self.end(cookie, result),
            }
            assert_eq!(
                self.machine.in_flight(),
                self.asked.values().filter(|asked| asked.result.is_none()).count()
            );
        }
    }

    fn place(&mut self, cookie: u64, at: usize, contents: &[u8]) {
        let asked = self.asked.get_mut(&cookie).expect("a request that was made");
        assert!(asked.result.is_none(), "contents after the end");
        for (place, byte) in asked.contents[at..at + contents.len()].iter_mut().zip(contents) {
            assert_eq!(place.replace(*byte), None, "a byte twice");
        }
    }

    fn end(&mut self, cookie: u64, result: Result<Answer, WireError>) {
        let asked = self.asked.get_mut(&cookie).expect("a request that was made");
        if result.is_ok() {
            assert!(asked.contents.iter().all(Option::is_some), "a read without all of its bytes");
        }
        match (&asked.request, &result) {
            (
                Request::Status { range, most } | Request::Depth { range, most },
                Ok(Answer::Extents(extents)),
            ) => {
                assert!((1..=*most).contains(&extents.len()));
                assert!(extents.iter().all(|extent| extent.length > 0));
                assert!(extents.windows(2).all(|pair| pair[0].flags != pair[1].flags));
                assert!(extents.iter().map(|extent| extent.length).sum::<u64>() <= range.length);
            }
            (Request::Status { .. } | Request::Depth { .. }, answer) => assert!(answer.is_err()),
            (_, answer) => assert!(matches!(answer, Ok(Answer::Done) | Err(_)), "{answer:?}"),
        }
        assert!(asked.result.replace(result).is_none(), "ended twice");
    }
}

/// What came of a handshake: what the client sent, and how it ended. `None`: the stream ended before.
pub(crate) type Handshake = (Vec<Vec<u8>>, Option<Result<Agreement, NegotiationError>>);

/// Show `stream` to a client that asks for `export`, as [`Session::feed`].
pub(crate) fn negotiate(export: &str, stream: &[u8], more: impl FnMut() -> usize) -> Handshake {
    negotiate_by(Negotiation::new(export), stream, more)
}

/// The same of a client that was told more.
pub(crate) fn negotiate_by(
    mut machine: Negotiation,
    stream: &[u8],
    mut more: impl FnMut() -> usize,
) -> Handshake {
    let mut sent = Vec::new();
    let (mut at, mut there) = (0, 0);
    loop {
        let (taken, next) = match machine.advance(&stream[at..there]) {
            Ok(moved) => moved,
            Err(error) => return (sent, Some(Err(error))),
        };
        assert!(taken <= there - at);
        at += taken;
        match next {
            Next::Need(needed) => {
                assert!(needed <= negotiation::MAX_NEEDED, "{needed}");
                if needed <= there - at {
                    continue;
                }
                if there == stream.len() {
                    return (sent, None);
                }
                there = stream.len().min(there + more().max(1));
            }
            Next::Send(bytes) => sent.push(bytes),
            Next::Agreed(agreement) => return (sent, Some(Ok(agreement))),
        }
    }
}
