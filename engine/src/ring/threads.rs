//! The ring for hosts where io_uring is refused: every operation is carried out, blocking, by a pool of threads.
//!
//! Same semantics as the other rings: operations are submitted in a batch by `wait`, complete once and in any order, and a
//! cancelled one that has not begun comes back with `ECANCELED` at once. One that has begun runs to its end, since a
//! thread in a system call cannot be recalled. The depth that reaches the devices is the number of threads; one
//! device has three quarters of it, so that one that does not answer leaves threads to the others (`blocking`).
//!
//! Sockets take none of these threads: what cannot be done at once waits in `poller`, whatever the number of connections.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::sync::Parker;
use nix::errno::Errno;

use super::arena::Arena;
use super::base::{Base, Task, file_of};
use super::config::{RingConfig, SetupError};
use super::poller::{Attempt, Poller, both_places};
use super::signal::{Kick, Signal};
use super::socket::{Place, Waiting, Way, check_bytes, place_of};
use super::{
    Completion, DocumentId, FileId, Op, Output, Ring, RingFailure, SocketId, Timestamp, Token, Wait, Wake,
};
use crate::storage::{Document, Storage};

/// How long a ring that is dropped waits for operations that are running.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);

/// See the module's header.
pub struct ThreadsRing {
    base: Base,
    parker: Parker,
    /// `None`: the ring is for no sockets.
    poller: Option<Poller>,
}

impl ThreadsRing {
    /// A ring with `config.threads` threads, started.
    ///
    /// # Errors
    /// When memory or threads cannot be had.
    ///
    /// # Panics
    /// If the configuration is out of the bounds that [`RingConfig`] states.
    pub fn new(config: &RingConfig) -> Result<Self, SetupError> {
        let arena = Arena::new(config.arena_bytes)
            .map_err(|source| SetupError::Memory { bytes: config.arena_bytes, source })?;
        let parker = Parker::new();
        let signal = Arc::new(Signal::new(Kick::Parked(parker.unparker().clone())));
        let mut base = Base::new("threads", arena, config, Waiting::Never, signal);
        let started = base.pool.start_all().and_then(|()| {
            let limit = base.sockets.limit();
            (limit > 0).then(|| Poller::new(limit, Arc::clone(&base.signal))).transpose()
        });
        match started {
            Ok(poller) => Ok(Self { base, parker, poller }),
            Err(source) => {
                base.shut_down(Instant::now() + DROP_TIMEOUT);
                Err(SetupError::Threads { source })
            }
        }
    }

    fn cancel(&mut self, token: Token, target: Token) {
        let found = self.base.flight.find(target).map(|(key, task)| (key, task.place()));
        let result = match found {
            Some((key, None)) => {
                self.base.withdraw(key);
                Ok(Output::Done)
            }
            Some((key, Some(place))) => {
                self.end_on(place, key, Err(Errno::ECANCELED));
                Ok(Output::Done)
            }
            None if self.base.is_ready(target) => Ok(Output::Done),
            None => Err(Errno::ENOENT),
        };
        self.base.push_ready(Completion { token, result });
    }

    fn poller(&self) -> &Poller {
        self.poller.as_ref().expect("a ring with sockets has its poller")
    }

    fn push_on_socket(&mut self, token: Token, op: Op, place: Place) {
        self.base.admit_on_socket(token);
        check_bytes(&op);
        self.base.sockets.begin(place);
        if matches!(op, Op::Accept { .. }) && self.base.sockets.is_closed_listener(place.socket) {
            let completion = Completion { token, result: Err(Errno::ECANCELED) };
            return self.base.push_ready_on(place, completion);
        }
        let mut attempt = Attempt::new(op);
        match attempt.run(&mut self.base.sockets, place.socket) {
            Some(result) => self.base.push_ready_on(place, Completion { token, result }),
            None => {
                let key = self.base.flight.insert(token, Task::Unready(place, attempt));
                self.base.sockets.fly(place, key);
                self.watch(place.socket);
            }
        }
    }

    /// What has `place` is over.
    fn end_on(&mut self, place: Place, key: u64, result: Result<Output, Errno>) {
        let (token, _) = self.base.flight.remove(key);
        self.base.sockets.land(place);
        self.base.push_ready_on(place, Completion { token, result });
    }

    /// Have a socket watched for what is in flight on it.
    fn watch(&mut self, socket: SocketId) {
        let waits = both_places(socket).map(|place| self.base.sockets.key(place));
        let [outgoing, incoming] = waits.map(|key| key.is_some());
        if !incoming && !outgoing {
            return;
        }
        let watched = self.poller().watch(socket, self.base.sockets.descriptor(socket), incoming, outgoing);
        if let Err(errno) = watched {
            for (place, key) in both_places(socket).into_iter().zip(waits) {
                if let Some(key) = key {
                    self.end_on(place, key, Err(errno));
                }
            }
        }
    }

    /// Attempt what is in flight on a socket once more.
    fn attempt_again(&mut self, socket: SocketId) {
        for place in both_places(socket) {
            let Some(key) = self.base.sockets.key(place) else { continue };
            let Base { flight, sockets, .. } = &mut self.base;
            let Some((_, Task::Unready(_, attempt))) = flight.get_mut(key) else {
                unreachable!("it was just found")
            };
            if let Some(result) = attempt.run(sockets, socket) {
                self.end_on(place, key, result);
            }
        }
        self.watch(socket);
    }

    /// Attempt what is in flight on all sockets that have become ready.
    fn attempt_ready(&mut self) -> Result<(), RingFailure> {
        while let Some(poller) = &self.poller {
            match poller.take() {
                Ok(Some(socket)) => self.attempt_again(socket),
                Ok(None) => break,
                Err(errno) => return Err(self.base.fail(errno)),
            }
        }
        Ok(())
    }
}

impl Ring for ThreadsRing {
    type File = Arc<dyn Storage>;
    type Document = Arc<dyn Document>;
    type Socket = OwnedFd;

    fn name(&self) -> &'static str {
        self.base.name
    }

    fn arena(&self) -> &Arena {
        &self.base.arena
    }

    fn arena_mut(&mut self) -> &mut Arena {
        &mut self.base.arena
    }

    fn add_file(&mut self, file: Self::File) -> Result<FileId, RingFailure> {
        self.base.add_file(file)
    }

    fn add_document(&mut self, document: Self::Document) -> Result<DocumentId, RingFailure> {
        self.base.add_document(document)
    }

    fn remove_file(&mut self, file: FileId) -> Self::File {
        self.base.remove_file(file).storage
    }

    fn add_socket(&mut self, socket: OwnedFd) -> Result<SocketId, RingFailure> {
        self.base.add_socket(socket)
    }

    fn remove_socket(&mut self, socket: SocketId) {
        let descriptor = self.base.sockets.remove(socket);
        self.poller().forget(descriptor.as_fd());
    }

    fn shutdown_socket(&mut self, socket: SocketId) {
        let place = Place { socket, way: Way::In };
        if let Some(key) = self.base.sockets.shut_down(socket) {
            self.end_on(place, key, Err(Errno::ECANCELED));
        }
        self.attempt_again(socket);
    }

    fn release_files(&mut self) {
        self.base.release_files();
    }

    fn capacity(&self) -> usize {
        self.base.capacity()
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }

    fn push(&mut self, token: Token, op: Op) {
        if let Some(place) = place_of(&op) {
            return self.push_on_socket(token, op, place);
        }
        self.base.admit(token);
        match (file_of(&op), &op) {
            (Some(file), _) if self.base.is_inline(file) => self.base.push_inline(token, &op, file),
            (None, Op::Cancel { target }) => self.cancel(token, *target),
            _ => self.base.push_to_pool(token, op),
        }
    }

    fn wait(&mut self, until: Wait, completions: &mut Vec<Completion>) -> Result<(), RingFailure> {
        self.base.check()?;
        self.base.pool.dispatch().map_err(|errno| self.base.fail(errno))?;
        let before = completions.len();
        let deadline = self.base.deadline(until);
        loop {
            let woken = self.base.signal.take();
            self.attempt_ready()?;
            self.base.collect(completions)?;
            let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if completions.len() > before || woken || until == Wait::Poll || late() {
                return Ok(());
            }
            if self.base.signal.fall_asleep() {
                match deadline {
                    Some(deadline) => self.parker.park_deadline(deadline),
                    None => self.parker.park(),
                }
            }
        }
    }

    fn now(&self) -> Timestamp {
        self.base.now()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.base.signal) as Arc<dyn Wake>
    }
}

impl Drop for ThreadsRing {
    fn drop(&mut self) {
        self.poller = None;
        self.base.shut_down(Instant::now() + DROP_TIMEOUT);
    }
}
