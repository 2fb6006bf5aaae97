//! One connection to an NBD server, shared by threads that wait for their replies.
//!
//! # Model
//! A thread sends its request and waits. One of those that wait *leads*: it has the inbox, receives, and shows what comes to the protocol's state machine. Contents
//! of its own go straight to where they belong; those of another are put aside for that one. Whose reply is complete is woken; the leader leaves when its
//! own is, and wakes one that leads from then on. So there is no thread of the connection's own, a lone request has no other thread between itself and the
//! socket, and many are under way at a time.
//!
//! # No deadlock
//! A server that stops reading because nobody takes its replies would keep senders for ever if all threads were sending. But a reply is due only
//! for a request whose sender has finished, and that one waits: as long as a reply is due, somebody leads or will when it has the lock.
//!
//! # Loss
//! An error of the socket, its end, or a violation of the protocol is the end of the connection: it is shut down, and every request on it, now and later,
//! fails with the same error, of those that [`is_lost_connection`] knows. What became of them at the server nobody knows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::stream::{Inbox, Stream};
use crate::error::is_lost_connection;
use crate::nbd::WireError;
use crate::nbd::client::{Agreement, Answer, Request, Step, Transmission};

/// Buffers for contents put aside that are kept for the next time.
const SPARE_BUFFERS: usize = 4;

/// How a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// With the connection.
    Lost(Errno),
    /// The server said so.
    Refused(WireError),
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    /// Who has it sends.
    sending: Mutex<()>,
    state: Mutex<State>,
    in_flight: AtomicUsize,
}

#[derive(Debug)]
struct State {
    transmission: Transmission,
    waiting: BTreeMap<u64, Waiting>,
    /// `None`: somebody leads.
    inbox: Option<Inbox>,
    spare: Vec<Vec<u8>>,
    lost: Option<Errno>,
}

/// Whose reply is due.
#[derive(Debug)]
struct Waiting {
    /// Bytes of contents that it brings.
    length: usize,
    /// Put aside by others; empty where there is nothing yet.
    contents: Vec<u8>,
    result: Option<Result<Answer, WireError>>,
    wake: Arc<Condvar>,
    /// It has sent its request, and sleeps.
    asleep: bool,
}

impl Connection {
    /// Over a stream on which an export was chosen; `inbox` has what came behind that.
    pub(super) fn new(stream: Stream, inbox: Inbox, agreement: &Agreement) -> Self {
        let state = State {
            transmission: Transmission::new(agreement),
            waiting: BTreeMap::new(),
            inbox: Some(inbox),
            spare: Vec::new(),
            lost: None,
        };
        Self { stream, sending: Mutex::new(()), state: Mutex::new(state), in_flight: AtomicUsize::new(0) }
    }

    /// Requests under way.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Carry out a request: `contents` is what it writes, `into` takes what it reads. Waits for the reply.
    ///
    /// # Panics
    /// If `contents` or `into` are not as long as the request says.
    pub(super) fn call(&self, request: Request, contents: &[u8], into: &mut [u8]) -> Result<Answer, Failure> {
        let (writes, reads) = match request {
            Request::Write { range, .. } => (range.length, 0),
            Request::Read(range) => (0, range.length),
            _ => (0, 0),
        };
        assert_eq!((contents.len() as u64, into.len() as u64), (writes, reads), "{request:?}");
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let result = self.carry_out(request, contents, into);
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        result
    }

    fn carry_out(&self, request: Request, contents: &[u8], into: &mut [u8]) -> Result<Answer, Failure> {
        let wake = Arc::new(Condvar::new());
        let (cookie, header) = self.state.lock().begin(request, into.len(), &wake)?;
        let sent = {
            let _turn = self.sending.lock();
            self.stream.send_all(&header, contents)
        };
        let mut state = self.state.lock();
        if let Err(errno) = sent {
            self.lose(&mut state, errno);
        }
        loop {
            if let Some(result) = state.take_result(cookie, into) {
                return result;
            }
            match state.inbox.take() {
                Some(inbox) => self.lead(&mut state, inbox, cookie, into),
                None => {
                    state.doze(cookie, true);
                    wake.wait(&mut state);
                    state.doze(cookie, false);
                }
            }
        }
    }

    /// Receive until the reply to `mine` is there, or none will be.
    fn lead(&self, state: &mut MutexGuard<'_, State>, mut inbox: Inbox, mine: u64, into: &mut [u8]) {
        // What others have put aside for it; the rest goes straight to its place.
        let aside = state.take_aside(mine);
        if !aside.is_empty() {
            into.copy_from_slice(&aside);
            state.keep(aside);
        }
        while state.is_due(mine) {
            if let Err(errno) = self.step(state, &mut inbox, mine, into) {
                self.lose(state, errno);
            }
        }
        state.inbox = Some(inbox);
        if let Some(next) = state.waiting.values().find(|waiting| waiting.asleep && waiting.result.is_none())
        {
            next.wake.notify_one();
        }
    }

    fn step(
        &self,
        state: &mut MutexGuard<'_, State>,
        inbox: &mut Inbox,
        mine: u64,
        into: &mut [u8],
    ) -> Result<(), Errno> {
        let (taken, step) = state.transmission.advance(inbox.waiting()).map_err(|violation| {
            tracing::warn!(%violation, "the NBD server does not keep to the protocol");
            Errno::EPROTO
        })?;
        inbox.take(taken);
        let arrived = match step {
            Step::Need(count) => MutexGuard::unlocked(state, || inbox.fill(&self.stream, count))?,
            Step::Data { cookie, at, length } if cookie == mine => {
                let place = &mut into[at..at + length];
                MutexGuard::unlocked(state, || inbox.read_exact(&self.stream, place))?
            }
            Step::Data { cookie, at, length } => {
                let mut aside = state.aside_of(cookie);
                let place = &mut aside[at..at + length];
                let arrived = MutexGuard::unlocked(state, || inbox.read_exact(&self.stream, place));
                state.put_aside(cookie, aside);
                arrived?
            }
            Step::Zeros { cookie, at, length } => {
                if cookie == mine {
                    into[at..at + length].fill(0);
                } else {
                    let mut aside = state.aside_of(cookie);
                    aside[at..at + length].fill(0);
                    state.put_aside(cookie, aside);
                }
                true
            }
            Step::Ended { cookie, result } => {
                state.ended(cookie, result);
                true
            }
        };
        // The server went away without a word.
        if arrived { Ok(()) } else { Err(Errno::ECONNRESET) }
    }

    fn lose(&self, state: &mut State, errno: Errno) {
        if state.lost.is_none() {
            // Never to be taken for a server's reply.
            let errno = if is_lost_connection(errno) { errno } else { Errno::ENOTCONN };
            tracing::debug!(%errno, "the connection to the NBD server is lost");
            state.lost = Some(errno);
            self.stream.shut_down();
            state.waiting.values().for_each(|waiting| {
                waiting.wake.notify_one();
            });
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.state.get_mut().lost.is_none() {
            self.stream.try_send(&Transmission::farewell());
        }
    }
}

impl State {
    fn begin(
        &mut self,
        request: Request,
        length: usize,
        wake: &Arc<Condvar>,
    ) -> Result<(u64, [u8; 28]), Failure> {
        if let Some(errno) = self.lost {
            return Err(Failure::Lost(errno));
        }
        let (cookie, header) = self.transmission.begin(request);
        let wake = Arc::clone(wake);
        let waiting = Waiting { length, contents: Vec::new(), result: None, wake, asleep: false };
        self.waiting.insert(cookie, waiting);
        Ok((cookie, header))
    }

    /// How it ended, with what was put aside in its place; `None`: it has not.
    fn take_result(&mut self, cookie: u64, into: &mut [u8]) -> Option<Result<Answer, Failure>> {
        if self.is_due(cookie) {
            return None;
        }
        let waiting = self.waiting.remove(&cookie).expect("it stays until it is asked");
        let result = match (waiting.result, self.lost) {
            (Some(result), _) => result.map_err(Failure::Refused),
            (None, lost) => Err(Failure::Lost(lost.expect("nothing else ends it"))),
        };
        if !waiting.contents.is_empty() {
            into.copy_from_slice(&waiting.contents);
            self.keep(waiting.contents);
        }
        Some(result)
    }

    /// Whether its reply is still due.
    fn is_due(&self, cookie: u64) -> bool {
        self.lost.is_none() && self.waiting.get(&cookie).is_some_and(|waiting| waiting.result.is_none())
    }

    fn doze(&mut self, cookie: u64, asleep: bool) {
        self.waiting.get_mut(&cookie).expect("it stays until it is asked").asleep = asleep;
    }

    fn ended(&mut self, cookie: u64, result: Result<Answer, WireError>) {
        let waiting = self.waiting.get_mut(&cookie).expect("it stays until it has ended, or all are lost");
        waiting.result = Some(result);
        waiting.wake.notify_one();
    }

    fn take_aside(&mut self, cookie: u64) -> Vec<u8> {
        self.waiting.get_mut(&cookie).map(|waiting| std::mem::take(&mut waiting.contents)).unwrap_or_default()
    }

    /// The buffer for the contents of `cookie`, as long as they are.
    fn aside_of(&mut self, cookie: u64) -> Vec<u8> {
        let length = self.waiting.get(&cookie).map_or(0, |waiting| waiting.length);
        let mut aside = self.take_aside(cookie);
        if aside.is_empty() {
            aside = self.spare.pop().unwrap_or_default();
            aside.resize(length, 0);
        }
        aside
    }

    fn put_aside(&mut self, cookie: u64, aside: Vec<u8>) {
        // Where all is lost it may have gone.
        if let Some(waiting) = self.waiting.get_mut(&cookie) {
            waiting.contents = aside;
        }
    }

    fn keep(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE_BUFFERS {
            self.spare.push(buffer);
        }
    }
}
