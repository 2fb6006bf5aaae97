//! A connection turned by hand: what it is given, what it asks for, and what it has sent, as the client takes it apart.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use engine::nbd::{
    Action, CloseReason, Connection, ConnectionLimits, Export, Exports, IoId, IoKind, Outcome, Receive,
    SharedBytes, StatusExtent,
};
use engine::units::Length;

use crate::client::{self, OptionReply, Parser, Reply, Request};

pub(crate) const DISK: u64 = 1 << 20;

/// Exports by name; the empty name means the first.
#[derive(Clone, Default)]
pub(crate) struct Shelf(pub(crate) Vec<Arc<Export>>);

impl Exports for Shelf {
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        self.0.iter().find(|export| name.is_empty() || **export.name() == *name).cloned()
    }

    fn after(&self, previous: Option<&str>) -> Option<Arc<Export>> {
        let behind = |export: &&Arc<Export>| previous.is_none_or(|previous| &**export.name() > previous);
        self.0.iter().filter(behind).min_by_key(|export| Arc::clone(export.name())).cloned()
    }
}

pub(crate) fn shelf() -> Shelf {
    Shelf(vec![
        Arc::new(Export::new("disk", Length(DISK), false).unwrap()),
        Arc::new(Export::new("snapshot", Length(DISK), true).unwrap()),
    ])
}

/// See the module's header.
pub(crate) struct Session {
    pub(crate) connection: Connection,
    pub(crate) shelf: Shelf,
    pub(crate) shared: SharedBytes,
    pub(crate) ios: VecDeque<(IoId, IoKind)>,
    pub(crate) attached: Option<Arc<Export>>,
    pub(crate) closed: Option<CloseReason>,
    pub(crate) parser: Parser,
    /// A send that was not said to have left.
    pub(crate) sending: bool,
    /// Whether sends leave at once.
    pub(crate) drains: bool,
    pub(crate) requests: BTreeMap<u64, Request>,
    /// Replies of which something has come, and not the end.
    pub(crate) partial: BTreeMap<u64, Reply>,
}

impl Session {
    pub(crate) fn new() -> Self {
        Self::with(ConnectionLimits::default(), shelf(), 64 << 20)
    }

    pub(crate) fn with(limits: ConnectionLimits, shelf: Shelf, shared: usize) -> Self {
        let shared = SharedBytes::new(shared);
        let mut session = Self {
            connection: Connection::new(limits, shared.clone()),
            shelf,
            shared,
            ios: VecDeque::new(),
            attached: None,
            closed: None,
            parser: Parser::default(),
            sending: false,
            drains: true,
            requests: BTreeMap::new(),
            partial: BTreeMap::new(),
        };
        session.turn();
        assert_eq!(session.parser.greeting(), Some(3));
        session
    }

    /// A session that has chosen `export` already.
    pub(crate) fn open(export: &str, structured: bool, contexts: &[&str]) -> Self {
        let mut session = Self::new();
        session.choose(export, structured, contexts);
        session
    }

    pub(crate) fn choose(&mut self, export: &str, structured: bool, contexts: &[&str]) {
        self.feed(&client::client_flags(3));
        if structured {
            assert_eq!(self.ask(client::OPT_STRUCTURED_REPLY, &[]).unwrap().kind, client::REP_ACK);
        }
        if !contexts.is_empty() {
            let replies = self.ask_all(client::OPT_SET_META_CONTEXT, &client::context_data(export, contexts));
            assert_eq!(replies.len(), contexts.len() + 1, "{replies:?}");
        }
        let replies = self.ask_all(client::OPT_GO, &client::info_data(export, &[]));
        assert_eq!(replies.last().unwrap().kind, client::REP_ACK);
        assert_eq!(**self.attached.as_ref().unwrap().name(), *export);
    }

    /// Do all that can be done without new bytes or outcomes.
    pub(crate) fn turn(&mut self) {
        while let Some(action) = self.connection.poll(&self.shelf) {
            match action {
                Action::Attach(export) => assert!(self.attached.replace(export).is_none()),
                Action::Io { id, kind } => {
                    assert!(self.attached.is_some());
                    self.ios.push_back((id, kind));
                }
                Action::Send(parts) => {
                    assert!(!self.sending && !parts.is_empty() && parts.len() <= 64);
                    for part in &parts {
                        assert!(!part.is_empty());
                        self.parser.push(part);
                    }
                    self.sending = true;
                    if self.drains {
                        self.sent();
                    }
                }
                Action::Close(reason) => assert!(self.closed.replace(reason).is_none()),
            }
        }
    }

    pub(crate) fn sent(&mut self) {
        assert!(std::mem::take(&mut self.sending));
        self.connection.sent();
    }

    /// Give it bytes as it wants them; what it does not take.
    pub(crate) fn feed<'a>(&mut self, mut bytes: &'a [u8]) -> &'a [u8] {
        while !bytes.is_empty() {
            self.turn();
            let most = match self.connection.wants() {
                None => break,
                Some(Receive::Any { most } | Receive::Payload { missing: most }) => most,
            };
            let (now, later) = bytes.split_at(most.min(bytes.len()));
            self.connection.received(now);
            bytes = later;
        }
        self.turn();
        bytes
    }

    /// Send an option and take all its replies.
    pub(crate) fn ask_all(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.feed(&client::option(option, data));
        let replies: Vec<_> = std::iter::from_fn(|| self.parser.option_reply()).collect();
        assert!(replies.iter().all(|reply| reply.option == option));
        replies
    }

    /// The same, for options with one reply.
    pub(crate) fn ask(&mut self, option: u32, data: &[u8]) -> Option<OptionReply> {
        let mut replies = self.ask_all(option, data);
        assert!(replies.len() <= 1, "{replies:?}");
        replies.pop()
    }

    /// Send a request.
    pub(crate) fn request(&mut self, request: Request) {
        let bytes = request.bytes();
        assert!(self.requests.insert(request.cookie, request).is_none());
        assert!(self.feed(&bytes).is_empty(), "it does not take the request");
    }

    pub(crate) fn answer(&mut self, id: IoId, outcome: Outcome) {
        self.connection.answered(id, outcome);
        self.turn();
    }

    /// Answer the oldest I/O, and say what it was.
    pub(crate) fn answer_next(&mut self, outcome: impl FnOnce(&IoKind) -> Outcome) -> IoKind {
        let (id, kind) = self.ios.pop_front().expect("there is I/O");
        self.answer(id, outcome(&kind));
        kind
    }

    /// Answer all I/O well until there is none.
    pub(crate) fn answer_all(&mut self) -> Vec<IoKind> {
        let mut kinds = Vec::new();
        while !self.ios.is_empty() {
            kinds.push(self.answer_next(well));
        }
        kinds
    }

    /// The replies that have come as a whole since the last call, by cookie.
    pub(crate) fn replies(&mut self) -> BTreeMap<u64, Reply> {
        let requests = &self.requests;
        let length = |cookie: u64| match requests.get(&cookie) {
            Some(request) if request.command == client::READ => request.length as usize,
            _ => 0,
        };
        while let Some(message) = self.parser.message(length) {
            let request = requests.get(&message.cookie()).expect("a reply to a request");
            self.partial.entry(message.cookie()).or_default().add(request, &message);
        }
        let all = std::mem::take(&mut self.partial).into_iter();
        let (done, partial): (BTreeMap<u64, Reply>, _) = all.partition(|(_, reply)| reply.done);
        self.partial = partial;
        done.keys().for_each(|cookie| drop(self.requests.remove(cookie)));
        done
    }

    /// Do one request that needs no I/O, or whose I/O all goes well, and take its reply.
    pub(crate) fn reply_to(&mut self, request: Request) -> Reply {
        let cookie = request.cookie;
        self.request(request);
        self.answer_all();
        let mut replies = self.replies();
        assert_eq!(replies.len(), 1, "{replies:?}");
        replies.remove(&cookie).unwrap()
    }

    /// The error that a request is answered with, without I/O.
    pub(crate) fn error_of(&mut self, request: Request) -> u32 {
        let bytes = request.bytes();
        let cookie = request.cookie;
        self.requests.insert(cookie, request);
        assert!(self.feed(&bytes).is_empty());
        assert!(self.ios.is_empty(), "{:?}", self.ios);
        let reply = self.replies().remove(&cookie).expect("an answer at once");
        reply.errors.first().map_or(0, |error| error.0)
    }
}

/// What the byte at `offset` of the made-up disk is.
pub(crate) fn byte_at(offset: u64) -> u8 {
    (offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

pub(crate) fn contents(offset: u64, length: u64) -> Vec<u8> {
    (offset..offset + length).map(byte_at).collect()
}

/// An outcome without errors, of a disk that is all data.
pub(crate) fn well(kind: &IoKind) -> Outcome {
    match kind {
        IoKind::Read { range } => Outcome::Data(contents(range.offset, range.length)),
        IoKind::BlockStatus { range, contexts, .. } => {
            let extent = StatusExtent { length: range.length, flags: 0 };
            Outcome::Extents(vec![vec![extent]; contexts.len()])
        }
        _ => Outcome::Done,
    }
}
