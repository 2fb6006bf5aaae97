//! Exports: disks and snapshots served over NBD, on the ring thread.
//!
//! # Model
//! A *server* is a listener with a table of exports (`table`) and its *clients* (`client`). All of them live in the [`Hub`], which is a part of the
//! reactor: it takes the completions of sockets and the outcomes of requests, and gives operations for the ring and requests for disks
//! ([`Wanted`]). A turn of the reactor lets the clients act, then the disks and jobs, then the clients again, so that a reply to what
//! has just ended leaves with the same submission.
//!
//! Only clients with news are looked at: an idle one costs nothing but its memory and its receive on the ring.
//!
//! # Bounds
//! Clients: [`NbdOptions::clients`]; who comes beyond that waits in the backlog (but is closed where other servers of the engine have taken its
//! places). Memory: [`ConnectionLimits`] for each client, and what all
//! of a server share. Time: a client that has not chosen an export within [`HANDSHAKE_TIME`] is closed, and so is one that has not left
//! [`DRAIN_TIME`] after its export was closed; requests that it has on a disk are carried out even so.
//!
//! # The end of an export
//! New clients do not find it, those that are there are answered with `ESHUTDOWN`, and it is gone when the last one has left, whose
//! requests have all ended by then: nothing of it is in flight any more.

mod client;
mod handles;
mod status;
mod table;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use nix::errno::Errno;
use slab::Slab;

use super::DiskId;
use super::ask::Answer;
use super::carrier::IoOutcome;
use super::jobs::{JobId, Watch};
use super::token::{Owner, token_of};
use crate::error::{Error, Operation, Refusal};
use crate::nbd::connection::Connection;
use crate::nbd::limits::{ConnectionLimits, SharedBytes};
use crate::ring::{Completion, Op, Output, Ring, SocketId, Token};
use crate::units::Timestamp;
use client::{Client, Effects};
use table::Table;

pub(super) use client::{Question, ServedIo, Wanted};
#[cfg(feature = "sim")]
pub(super) use handles::NewExport;
pub(super) use handles::{Backend, ExportCommand, ExportId, ServerId};
pub use handles::{
    Export, ExportOptions, ExportSource, NbdListener, NbdOptions, NbdServer, NotAccepted, Removal,
};

/// How long a client may take to choose an export.
const HANDSHAKE_TIME: Duration = Duration::from_secs(30);
/// How long a client of an export that was closed may take to leave.
const DRAIN_TIME: Duration = Duration::from_secs(5);
/// Pause after an accept that failed: what the host lacks does not come back at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Most listeners of an engine.
pub(super) const MAX_SERVERS: usize = 8;
/// Most clients of an engine.
pub(super) const MAX_CLIENTS: usize = 1024;

type Told = Answer<Result<(), Error>>;

struct Server {
    id: ServerId,
    listener: SocketId,
    accepting: bool,
    /// It takes nobody before it is opened.
    closed: bool,
    /// No accept before this.
    accept_after: Timestamp,
    /// The last accept has failed, which was told.
    in_trouble: bool,
    on_not_accepted: Option<NotAccepted>,
    table: Table,
    clients: usize,
    most_clients: usize,
    shared: SharedBytes,
    /// It is going: whom to tell when it is gone.
    stopping: Option<Vec<Told>>,
}

/// All servers, exports and clients of an engine. See the module's header.
#[derive(Default)]
pub(super) struct Hub {
    servers: Slab<Server>,
    clients: Slab<Client>,
    /// Clients with news.
    dirty: VecDeque<usize>,
    /// When to look at whom again.
    deadlines: BTreeSet<(Timestamp, usize)>,
    /// Exports were closed since the last turn.
    closing: bool,
    ops: Vec<(Token, Op)>,
    wanted: Vec<Wanted>,
    shut: Vec<SocketId>,
}

/// What cannot be said on the ring thread, which does not know how a disk was opened.
fn check(name: &str, source: &ExportSource, writable: bool) -> Result<(), Error> {
    let takes_writes = match source {
        ExportSource::Disk(disk) => disk.is_writable(),
        ExportSource::Snapshot(_) => false,
    };
    if writable && !takes_writes {
        let reason = "it takes no writes, so it is exported for reading only";
        return Err(Error::refused(Refusal::ReadOnly, Operation::Export, name.to_owned(), reason)
            .advise("open the disk writable, or export it read-only"));
    }
    Ok(())
}

impl Hub {
    /// Whether nothing is served.
    pub(super) fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.clients.is_empty()
    }

    /// When to look again although nothing has happened.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        let clients = self.deadlines.first().map(|&(when, _)| when);
        let paused = |server: &Server| !server.accepting && server.wants_clients();
        let accepts = self.servers.iter().filter(|(_, server)| paused(server));
        clients.into_iter().chain(accepts.map(|(_, server)| server.accept_after)).min()
    }

    /// Carry out a command.
    pub(super) fn command<R: Ring>(&mut self, command: ExportCommand<R::Socket>, ring: &mut R) {
        match command {
            ExportCommand::Listen { server, socket, options, answer } => {
                answer.give(self.listen(server, socket, options, ring));
            }
            ExportCommand::Add { server, export, answer } => {
                let added = match self.running(server) {
                    Some(server) => server.table.add(export),
                    None => Err(refused(Refusal::NotFound, export.name, "its server has stopped")),
                };
                answer.give(added);
            }
            ExportCommand::Open { server, answer } => {
                let opened = self.running(server).map(|server| server.closed = false);
                answer.give(
                    opened.ok_or_else(|| refused(Refusal::NotFound, "a server".to_owned(), "it has stopped")),
                );
            }
            ExportCommand::Remove { export, removal, answer } => answer.give(self.remove(export, removal)),
            ExportCommand::Stop { server, answer } => self.stop(server, answer, ring),
        }
    }

    /// A server that was not stopped.
    fn running(&mut self, id: ServerId) -> Option<&mut Server> {
        let server = self.servers.iter_mut().find(|(_, server)| server.id == id);
        server.map(|(_, server)| server).filter(|server| server.stopping.is_none())
    }

    fn listen<R: Ring>(
        &mut self,
        id: ServerId,
        socket: R::Socket,
        options: NbdOptions,
        ring: &mut R,
    ) -> Result<(), Error> {
        let NbdOptions { clients, memory, default_export, closed, on_not_accepted } = options;
        let limits = ConnectionLimits::default();
        if !(1..=MAX_CLIENTS).contains(&clients) || memory < limits.piece_bytes as u64 {
            let reason = format!("{clients} clients with {memory} bytes");
            return Err(refused(Refusal::BadArgument, "a server".to_owned(), reason)
                .advise(format!("choose 1 to {MAX_CLIENTS} clients and at least 256K")));
        }
        if self.servers.len() >= MAX_SERVERS {
            let reason = format!("the engine has {MAX_SERVERS} servers already");
            return Err(refused(Refusal::Unavailable, "a server".to_owned(), reason).advise("stop one first"));
        }
        let listener = ring.add_socket(socket).map_err(|failure| {
            refused(Refusal::Unavailable, "a server".to_owned(), "the engine has no place for its socket")
                .advise("start the engine with places for clients")
                .because(failure)
        })?;
        self.servers.insert(Server {
            id,
            listener,
            accepting: false,
            closed,
            accept_after: Timestamp::default(),
            in_trouble: false,
            on_not_accepted,
            table: Table::new(default_export, clients),
            clients: 0,
            most_clients: clients,
            shared: SharedBytes::new(usize::try_from(memory).unwrap_or(usize::MAX)),
            stopping: None,
        });
        Ok(())
    }

    fn remove(&mut self, export: ExportId, removal: Removal) -> Result<(), Error> {
        for (_, server) in &mut self.servers {
            if server.table.close(export, removal)? {
                self.closing = true;
                break;
            }
        }
        Ok(())
    }

    fn stop<R: Ring>(&mut self, id: ServerId, answer: Told, ring: &mut R) {
        let Some((_, server)) = self.servers.iter_mut().find(|(_, server)| server.id == id) else {
            return answer.give(Ok(()));
        };
        if server.stopping.is_none() {
            server.table.close_all();
            ring.shutdown_socket(server.listener);
            self.closing = true;
        }
        server.stopping.get_or_insert_default().push(answer);
    }

    /// Let everybody act who has something to do; requests for disks are in [`Self::take_wanted`] then.
    pub(super) fn turn<R: Ring>(&mut self, now: Timestamp, ring: &mut R) {
        if std::mem::take(&mut self.closing) {
            self.drain_clients(now);
        }
        self.accept(now, ring);
        self.pass_deadlines(now);
        while let Some(index) = self.dirty.pop_front() {
            self.poll_client(index, ring);
        }
        self.remove_servers(ring);
    }

    /// Requests for disks and snapshots, and questions.
    pub(super) fn take_wanted(&mut self) -> Vec<Wanted> {
        std::mem::take(&mut self.wanted)
    }

    /// Tell the clients of exports that are going to leave.
    fn drain_clients(&mut self, now: Timestamp) {
        for (index, client) in &mut self.clients {
            let server = &self.servers[client.server];
            let export = client.attached.map(|attached| attached.export);
            let goes = export.map_or(server.stopping.is_some(), |id| server.table.is_closing(id));
            if goes && client.drain() {
                set_deadline(&mut self.deadlines, index, client, Some(now.after(DRAIN_TIME)));
                self.dirty.push_back(index);
            }
        }
        for (_, server) in &mut self.servers {
            server.table.sweep();
        }
    }

    /// Wait for the next client of every server that takes one.
    fn accept<R: Ring>(&mut self, now: Timestamp, ring: &mut R) {
        for (index, server) in &mut self.servers {
            if !server.accepting && server.wants_clients() && server.accept_after <= now {
                server.accepting = true;
                let op = Op::Accept { listener: server.listener };
                ring.push(token_of(Owner::Listener(index), Token(0)), op);
            }
        }
    }

    /// An accept of a listener has ended.
    pub(super) fn on_accepted<R: Ring>(
        &mut self,
        index: usize,
        completion: Completion,
        now: Timestamp,
        ring: &mut R,
    ) {
        let server = &mut self.servers[index];
        server.accepting = false;
        match completion.result {
            Ok(Output::Accepted(socket)) if server.stopping.is_some() => ring.remove_socket(socket),
            Ok(Output::Accepted(socket)) => {
                server.clients += 1;
                server.in_trouble = false;
                let place = self.clients.vacant_entry();
                let connection = Connection::new(ConnectionLimits::default(), server.shared.clone());
                let client = place.key();
                let added = place.insert(Client::new(client, index, socket, connection));
                set_deadline(&mut self.deadlines, client, added, Some(now.after(HANDSHAKE_TIME)));
                self.dirty.push_back(client);
            }
            Ok(other) => unreachable!("an accept gave {other:?}"),
            Err(errno) => {
                if server.stopping.is_none() {
                    server.not_accepted(errno);
                }
                server.accept_after = now.after(ACCEPT_PAUSE);
            }
        }
    }

    fn pass_deadlines(&mut self, now: Timestamp) {
        while let Some(&(when, index)) = self.deadlines.first()
            && when <= now
        {
            let client = &mut self.clients[index];
            tracing::info!(draining = !client.is_new(), "a client had its time");
            set_deadline(&mut self.deadlines, index, client, None);
            client.give_up();
            self.dirty.push_back(index);
        }
    }

    /// Let a client act, and let go of it once it is over.
    fn poll_client<R: Ring>(&mut self, index: usize, ring: &mut R) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let server = &mut self.servers[client.server];
        let was_new = client.is_new();
        let (ops, wanted, shut) = (&mut self.ops, &mut self.wanted, &mut self.shut);
        client.poll(&mut server.table, &mut Effects { ops, wanted, shut });
        if was_new && !client.is_new() {
            set_deadline(&mut self.deadlines, index, client, None);
        }
        for (token, op) in self.ops.drain(..) {
            ring.push(token_of(Owner::Client(index), token), op);
        }
        // After the operations were pushed: they end by it, too.
        for socket in self.shut.drain(..) {
            ring.shutdown_socket(socket);
        }
        if client.is_over() {
            self.remove_client(index, ring);
        }
    }

    fn remove_client<R: Ring>(&mut self, index: usize, ring: &mut R) {
        set_deadline(&mut self.deadlines, index, &mut self.clients[index], None);
        let client = self.clients.remove(index);
        ring.remove_socket(client.socket);
        let server = &mut self.servers[client.server];
        server.clients -= 1;
        if let Some(attached) = client.attached {
            server.table.detach(attached.export);
            server.table.sweep();
        }
    }

    /// An operation of a client has completed. `running` finds jobs whose snapshot can be read. Gives the disk, if it was a question.
    pub(super) fn on_completion<'a, R: Ring>(
        &mut self,
        index: usize,
        completion: Completion,
        ring: &mut R,
        running: impl Fn(JobId) -> Option<&'a Watch>,
    ) -> Option<DiskId> {
        let client = &mut self.clients[index];
        let asked = client.asked_disk(completion.token);
        if let Some((token, op)) = client.on_completion(completion, running) {
            ring.push(token_of(Owner::Client(index), token), op);
        }
        self.dirty.push_back(index);
        asked
    }

    /// There is no such disk to ask.
    pub(super) fn not_answered(&mut self, question: &Question) {
        self.clients[question.client].not_answered(question.number);
        self.dirty.push_back(question.client);
    }

    /// A request of a client has ended.
    pub(super) fn on_outcome(&mut self, io: ServedIo, outcome: IoOutcome) {
        let client = io.client;
        let more = self.clients[client].on_outcome(io, outcome);
        self.wanted.extend(more);
        self.dirty.push_back(client);
    }

    /// Whether the next turn has something to do that came up since the last one.
    pub(super) fn has_news(&self) -> bool {
        !self.dirty.is_empty() || !self.wanted.is_empty() || self.closing
    }

    fn remove_servers<R: Ring>(&mut self, ring: &mut R) {
        let over = |server: &Server| {
            let idle = !server.accepting && server.clients == 0 && server.table.is_empty();
            server.stopping.is_some() && idle
        };
        while let Some((index, _)) = self.servers.iter().find(|(_, server)| over(server)) {
            let server = self.servers.remove(index);
            ring.remove_socket(server.listener);
            for answer in server.stopping.into_iter().flatten() {
                answer.give(Ok(()));
            }
        }
    }
}

impl Server {
    /// An accept has failed: somebody waits, or was closed.
    fn not_accepted(&mut self, errno: Errno) {
        tracing::warn!(%errno, "cannot accept a client");
        if std::mem::replace(&mut self.in_trouble, true) {
            return;
        }
        let error = Error::io(Operation::Export, "a client", None, errno);
        if let Some(call) = &self.on_not_accepted {
            call.tell(&error);
        }
    }

    fn wants_clients(&self) -> bool {
        !self.closed && self.stopping.is_none() && self.clients < self.most_clients
    }
}

/// Give a client its time, or none.
fn set_deadline(
    deadlines: &mut BTreeSet<(Timestamp, usize)>,
    index: usize,
    client: &mut Client,
    deadline: Option<Timestamp>,
) {
    if let Some(before) = std::mem::replace(&mut client.deadline, deadline) {
        deadlines.remove(&(before, index));
    }
    deadlines.extend(deadline.map(|when| (when, index)));
}

fn refused(refusal: Refusal, name: String, reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::refused(refusal, Operation::Export, name, reason)
}
