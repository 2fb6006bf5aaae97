//! A client of a server: its connection, its socket, and what is in flight for the two.
//!
//! # Model
//! The protocol is in [`Connection`], which knows of no socket and no disk. This is its driver: it turns what the connection wants into
//! operations on the socket and requests to a disk, and their ends into calls of the connection. One receive and one send are in flight at
//! most, and any number of requests, which the connection bounds.
//!
//! A client whose connection is over stays until all of its requests and operations have ended, so what it asked of a disk finds it.

use nix::errno::Errno;
use slab::Slab;

use super::handles::{Backend, ExportId};
use super::status;
use super::table::Table;
use crate::error::ErrorKind;
use crate::live::asks::Waited;
use crate::live::carrier::{IoOutcome, IoRequest};
use crate::live::jobs::Watch;
use crate::live::token::{Owner, token_of};
use crate::live::{DiskId, JobId};
use crate::nbd::connection::{
    Action, CloseReason, Connection, IoId, IoKind, Outcome, PayloadBuffer, Receive, RequestId,
};
use crate::nbd::wire::WireError;
use crate::ring::{Completion, ExtentQuery, FileId, Op, Output, SocketId, Token};
use crate::units::{ByteRange, Timestamp};

/// Tokens of its operations: these two, and the queries from there on.
const RECEIVE: Token = Token(0);
const SEND: Token = Token(1);
const FIRST_QUERY: u64 = 2;

/// Receives of a client that may be interrupted one after the other before it is given up.
const MAX_INTERRUPTIONS: u32 = 16;

/// A request that a client has under way on a disk or a snapshot.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::live) struct ServedIo {
    /// Its place in the table of clients.
    pub(super) client: usize,
    io: IoId,
    then: Then,
    /// What other parts of the same request have spent of the time of jobs.
    pub(in crate::live) waited: Waited,
}

#[cfg(test)]
impl ServedIo {
    /// One that is never told anything.
    pub(in crate::live) fn of_test() -> Self {
        Self { client: 0, io: IoId(0), then: Then::Done, waited: Waited::default() }
    }
}

/// What follows when a request has succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// Its data is the answer.
    Data,
    /// It is done.
    Done,
    /// It has to reach stable storage first.
    Flush,
}

/// Something to ask a disk or a snapshot for.
#[derive(Debug)]
pub(in crate::live) enum Wanted {
    Request {
        backend: Backend,
        request: IoRequest,
        io: ServedIo,
    },
    /// Where that disk has data.
    Extents(DiskId, Question),
}

/// A question of a client, where a disk has data.
#[derive(Debug)]
pub(in crate::live) struct Question {
    /// Its place in the table of clients.
    pub(super) client: usize,
    /// Its number there.
    pub(super) number: usize,
    range: ByteRange,
    limit: usize,
}

impl Question {
    /// As an operation on `file`.
    pub(in crate::live) fn op(&self, file: FileId) -> (Token, Op) {
        let (range, limit) = (self.range, self.limit);
        let token = token_of(Owner::Client(self.client), Token(FIRST_QUERY + self.number as u64));
        (token, Op::Extents { file, range, query: ExtentQuery::Data, limit })
    }
}

/// Where the data of an export is, as its clients see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attached {
    pub(super) export: ExportId,
    backend: Backend,
    /// Whether they may give space back.
    trim: bool,
}

/// What becomes of a question that is under way.
#[derive(Debug)]
struct Query {
    io: IoId,
    disk: DiskId,
    /// How it was at the t0 of this job.
    t0: Option<JobId>,
    range: ByteRange,
    limit: usize,
}

/// What is received at the moment, if anything.
#[derive(Debug)]
enum Receiving {
    Nothing,
    Requests,
    Payload { filled: usize },
}

/// See the module's header.
pub(super) struct Client {
    pub(super) server: usize,
    pub(super) socket: SocketId,
    pub(super) attached: Option<Attached>,
    /// When it is given up, if it has not got on by then.
    pub(super) deadline: Option<Timestamp>,
    index: usize,
    connection: Connection,
    receiving: Receiving,
    /// Sent so far of what is being sent.
    sent: Option<usize>,
    /// The buffer of the last receive of requests.
    buffer: Vec<u8>,
    queries: Slab<Query>,
    /// What was spent of the time of jobs for requests that are under way.
    waited: Vec<(RequestId, Waited)>,
    /// Receives in a row that gave nothing.
    interruptions: u32,
    draining: bool,
    closed: bool,
}

/// What a client leads to, besides requests.
pub(super) struct Effects<'a> {
    pub(super) ops: &'a mut Vec<(Token, Op)>,
    pub(super) wanted: &'a mut Vec<Wanted>,
    /// Sockets to shut down.
    pub(super) shut: &'a mut Vec<SocketId>,
}

impl Client {
    pub(super) fn new(index: usize, server: usize, socket: SocketId, connection: Connection) -> Self {
        Self {
            server,
            socket,
            attached: None,
            deadline: None,
            index,
            connection,
            receiving: Receiving::Nothing,
            sent: None,
            buffer: Vec::new(),
            queries: Slab::new(),
            waited: Vec::new(),
            interruptions: 0,
            draining: false,
            closed: false,
        }
    }

    /// Whether nothing of it is left to do or in flight.
    pub(super) fn is_over(&self) -> bool {
        self.closed
            && self.connection.is_finished()
            && matches!(self.receiving, Receiving::Nothing)
            && self.sent.is_none()
            && self.queries.is_empty()
    }

    /// Whether it has not chosen an export yet.
    pub(super) fn is_new(&self) -> bool {
        !self.closed && self.attached.is_none()
    }

    /// Take no more requests of it; it is closed when those under way are answered.
    /// `false`: it was told before.
    pub(super) fn drain(&mut self) -> bool {
        let first = !std::mem::replace(&mut self.draining, true) && !self.closed;
        if first {
            self.connection.drain();
        }
        first
    }

    /// It had its time.
    pub(super) fn give_up(&mut self) {
        self.connection.lost();
    }

    /// Do what can be done.
    pub(super) fn poll(&mut self, exports: &mut Table, effects: &mut Effects<'_>) {
        while let Some(action) = self.connection.poll(exports) {
            match action {
                Action::Attach(found) => {
                    let (export, backend) = exports.attach(found.name());
                    self.attached = Some(Attached { export, backend, trim: found.features.trim });
                }
                Action::Io { id, kind } => self.start(id, kind, effects),
                Action::Send(parts) => {
                    self.sent = Some(0);
                    effects.ops.push((SEND, Op::Send { socket: self.socket, parts, skip: 0 }));
                }
                Action::Close(reason) => {
                    self.closed = true;
                    effects.shut.push(self.socket);
                    log_end(reason);
                }
            }
        }
        self.receive(effects);
    }

    fn receive(&mut self, effects: &mut Effects<'_>) {
        if self.closed || !matches!(self.receiving, Receiving::Nothing) {
            return;
        }
        let socket = self.socket;
        match self.connection.wants() {
            None => {}
            Some(Receive::Any { most }) => {
                let mut buffer = std::mem::take(&mut self.buffer);
                if buffer.capacity() > most {
                    // It had much to say, and has not any more: an idle client keeps little.
                    buffer = Vec::with_capacity(most);
                }
                buffer.resize(most, 0);
                self.receiving = Receiving::Requests;
                effects.ops.push((RECEIVE, Op::Receive { socket, buffer, filled: 0, whole: false }));
            }
            Some(Receive::Payload { .. }) => {
                let PayloadBuffer { buffer, filled } = self.connection.lend_payload();
                self.receiving = Receiving::Payload { filled };
                effects.ops.push((RECEIVE, Op::Receive { socket, buffer, filled, whole: true }));
            }
        }
    }

    /// Ask for what an I/O needs.
    fn start(&mut self, io: IoId, kind: IoKind, effects: &mut Effects<'_>) {
        let attached = self.attached.expect("an export is chosen before anything is asked of it");
        let (backend, trim) = (attached.backend, attached.trim);
        let after = |fua: bool| if fua { Then::Flush } else { Then::Done };
        let (request, then) = match kind {
            IoKind::Read { range } => (crate::live::read(range.offset, length_of(range)), Then::Data),
            IoKind::Write { offset, data, fua } => (IoRequest::Write { offset, data }, after(fua)),
            IoKind::Flush => (IoRequest::Flush, Then::Done),
            IoKind::Discard { range, fua } => (IoRequest::Discard { range }, after(fua)),
            IoKind::WriteZeroes { range, no_hole, fast, fua } => {
                // A hole is space given back, however it was asked for.
                let may_unmap = trim && !no_hole;
                (IoRequest::WriteZeroes { range, may_unmap, only_fast: fast }, after(fua))
            }
            IoKind::Cache { .. } => return self.connection.answered(io, Outcome::Done),
            IoKind::BlockStatus { range, contexts, extents } => {
                assert_eq!(contexts.len(), 1, "base:allocation is all that is offered");
                return effects.wanted.push(self.query(io, backend, range, extents));
            }
        };
        let io = ServedIo { client: self.index, io, then, waited: self.waited_for(io) };
        effects.wanted.push(Wanted::Request { backend, request, io });
    }

    /// What was spent by now of the time of jobs for the request that `io` is of.
    fn waited_for(&self, io: IoId) -> Waited {
        if self.waited.is_empty() {
            return Waited::default();
        }
        let request = self.connection.request_of(io);
        let found = self.waited.iter().find(|&&(of, _)| Some(of) == request);
        found.map_or_else(Waited::default, |(_, waited)| waited.clone())
    }

    /// So much was spent for a part of a request. It is kept for the parts to come.
    fn has_waited(&mut self, io: IoId, waited: &Waited) {
        let connection = &self.connection;
        self.waited.retain(|&(of, _)| connection.has_request(of));
        let Some(request) = connection.request_of(io).filter(|_| !waited.is_nothing()) else { return };
        match self.waited.iter_mut().find(|(of, _)| *of == request) {
            Some((_, known)) => known.merge(waited),
            None => self.waited.push((request, waited.clone())),
        }
    }

    fn query(&mut self, io: IoId, backend: Backend, range: ByteRange, limit: usize) -> Wanted {
        let (disk, t0) = match backend {
            Backend::Disk(disk) => (disk, None),
            Backend::Snapshot(job, disk) => (disk, Some(job)),
        };
        let number = self.queries.insert(Query { io, disk, t0, range, limit });
        Wanted::Extents(disk, Question { client: self.index, number, range, limit })
    }

    /// The disk that is asked with `token`, if it is that of a question.
    pub(super) fn asked_disk(&self, token: Token) -> Option<DiskId> {
        let number = token.0.checked_sub(FIRST_QUERY)?;
        Some(self.queries[usize::try_from(number).expect("our own token")].disk)
    }

    /// Question `number` is not answered: the disk of a snapshot may go when its job has ended.
    pub(super) fn not_answered(&mut self, number: usize) {
        let query = self.queries.remove(number);
        self.connection.answered(query.io, status::all_data(query.range));
    }

    /// A request on a disk or a snapshot has ended. Gives what has to follow before its client is told.
    pub(super) fn on_outcome(&mut self, io: ServedIo, outcome: IoOutcome) -> Option<Wanted> {
        self.has_waited(io.io, &outcome.waited);
        let outcome = match (outcome.result, io.then) {
            (Err(error), _) => {
                if error.kind() == ErrorKind::Io(Errno::EOPNOTSUPP) {
                    // The answer to whether zeros are fast here, which a client may ask for all day.
                    tracing::debug!(%error, "a client's request is not supported");
                } else {
                    tracing::warn!(%error, "a client's request failed");
                }
                Outcome::Failed(WireError::from(&error))
            }
            (Ok(data), Then::Data) => Outcome::Data(data),
            (Ok(_), Then::Done) => Outcome::Done,
            (Ok(_), Then::Flush) => {
                let backend = self.attached.expect("it has asked for something").backend;
                let io = ServedIo { then: Then::Done, ..io };
                return Some(Wanted::Request { backend, request: IoRequest::Flush, io });
            }
        };
        self.connection.answered(io.io, outcome);
        None
    }

    /// An operation of it has completed. Gives one that has to follow. `running` finds jobs whose snapshot can be read.
    pub(super) fn on_completion<'a>(
        &mut self,
        completion: Completion,
        running: impl Fn(JobId) -> Option<&'a Watch>,
    ) -> Option<(Token, Op)> {
        match completion.token {
            RECEIVE => self.on_received(completion),
            SEND => return self.on_sent(completion),
            Token(number) => {
                let index = usize::try_from(number - FIRST_QUERY).expect("our own token");
                let query = self.queries.remove(index);
                let outcome = match completion.result {
                    Ok(Output::Extents(extents)) => match query.t0.map(running) {
                        None => status::of_disk(&extents, query.range),
                        Some(Some(job)) => status::at_t0(&extents, query.range, query.limit, job),
                        Some(None) => status::all_data(query.range),
                    },
                    Ok(other) => unreachable!("a question for extents gave {other:?}"),
                    Err(errno) => {
                        tracing::warn!(%errno, "cannot ask a disk for its holes");
                        status::all_data(query.range)
                    }
                };
                self.connection.answered(query.io, outcome);
            }
        }
        None
    }

    fn on_received(&mut self, completion: Completion) {
        let receiving = std::mem::replace(&mut self.receiving, Receiving::Nothing);
        match completion.result {
            Ok(Output::Received { bytes: 0, .. }) => self.connection.end_of_stream(),
            Ok(Output::Received { buffer, bytes }) => match receiving {
                Receiving::Nothing => unreachable!("nothing was being received"),
                Receiving::Requests => {
                    self.connection.received(&buffer[..bytes as usize]);
                    self.buffer = buffer;
                }
                Receiving::Payload { filled } => {
                    self.connection.received_payload(PayloadBuffer { buffer, filled }, bytes as usize);
                }
            },
            Ok(other) => unreachable!("a receive gave {other:?}"),
            Err(Errno::EINTR | Errno::EAGAIN)
                if matches!(receiving, Receiving::Requests) && self.interruptions < MAX_INTERRUPTIONS =>
            {
                // Nothing was received: it is asked for again. (The buffer of a payload is lost with its error.)
                self.interruptions += 1;
                return;
            }
            Err(errno) => {
                tracing::debug!(%errno, "a client was lost while receiving");
                self.connection.lost();
            }
        }
        self.interruptions = 0;
    }

    fn on_sent(&mut self, completion: Completion) -> Option<(Token, Op)> {
        let before = self.sent.take().expect("it was sending");
        match completion.result {
            Ok(Output::Sent { parts, bytes }) => {
                let skip = before + bytes as usize;
                if skip < parts.iter().map(Vec::len).sum() {
                    self.sent = Some(skip);
                    return Some((SEND, Op::Send { socket: self.socket, parts, skip }));
                }
                drop(parts);
                self.connection.sent();
            }
            Ok(other) => unreachable!("a send gave {other:?}"),
            Err(errno) => {
                tracing::debug!(%errno, "a client was lost while sending");
                self.connection.lost();
            }
        }
        None
    }
}

fn length_of(range: ByteRange) -> usize {
    usize::try_from(range.length).expect("a piece")
}

fn log_end(reason: CloseReason) {
    match reason {
        CloseReason::Disconnected | CloseReason::EndOfStream | CloseReason::Drained => {
            tracing::debug!(%reason, "a client has left");
        }
        _ => tracing::info!(%reason, "a client was closed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::limits::{ConnectionLimits, SharedBytes};

    /// What it leads to, and whether its socket is shut down.
    fn polled(client: &mut Client) -> (Vec<Token>, bool) {
        let (mut ops, mut wanted, mut shut) = (Vec::new(), Vec::new(), Vec::new());
        let mut effects = Effects { ops: &mut ops, wanted: &mut wanted, shut: &mut shut };
        client.poll(&mut Table::new(None, 2), &mut effects);
        (ops.into_iter().map(|(token, _)| token).collect(), !shut.is_empty())
    }

    #[test]
    fn a_receive_that_was_interrupted_is_begun_again_but_not_for_ever() {
        let connection = Connection::new(ConnectionLimits::default(), SharedBytes::new(1 << 20));
        let mut client = Client::new(0, 0, SocketId(0), connection);
        assert_eq!(polled(&mut client), (vec![SEND, RECEIVE], false), "the greeting");
        let ended = |result| Completion { token: RECEIVE, result };
        for round in 0..3 {
            for _ in 0..MAX_INTERRUPTIONS {
                assert!(client.on_completion(ended(Err(Errno::EINTR)), |_| None).is_none());
                assert_eq!(polled(&mut client), (vec![RECEIVE], false), "round {round}");
            }
            if round < 2 {
                // Whatever is received ends the row: the first bytes of a client's flags.
                let received = Output::Received { buffer: vec![0; 4096], bytes: 1 };
                assert!(client.on_completion(ended(Ok(received)), |_| None).is_none());
                assert_eq!(polled(&mut client), (vec![RECEIVE], false));
            }
        }
        assert!(client.on_completion(ended(Err(Errno::EAGAIN)), |_| None).is_none());
        assert_eq!(polled(&mut client), (vec![], true), "it is given up");
    }
}
