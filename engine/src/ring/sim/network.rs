//! Connections of the simulation: two pipes each, bounded, with ends that can go away.
//!
//! # Model
//! A connection has two ends, each of which reads from one pipe and writes into the other. Whoever ends the writing lets the other read what is there, and
//! then the end. An end that is closed with bytes unread, or that is reset, breaks the connection for the other: it reads what it has, then
//! finds `ECONNRESET` once, and after that the end and `EPIPE`, as Linux has it. Nothing here waits: `EAGAIN` says that
//! there is nothing to read, or no room.

use std::collections::VecDeque;
use std::net::Shutdown;

use nix::errno::Errno;

/// Connections that wait for a listener to accept them; more are refused.
const BACKLOG: usize = 128;

/// Bytes that are under way in one direction, unless it is set otherwise.
const PIPE_BYTES: usize = 64 << 10;

/// Number of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ListenerId(usize);

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    connection: usize,
    side: usize,
}

impl End {
    /// The other end.
    fn other(self) -> Self {
        Self { side: 1 - self.side, ..self }
    }
}

/// One direction.
#[derive(Clone, Debug, Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    /// Nothing more is written.
    ended: bool,
    /// Nobody reads what is written from now on.
    unread: bool,
}

#[derive(Clone, Debug)]
struct Connection {
    /// By the side that reads from it.
    pipes: [Pipe; 2],
    /// By side: it finds `ECONNRESET` when it has read what it has.
    resets: [bool; 2],
    capacity: usize,
}

#[derive(Clone, Debug, Default)]
struct Listener {
    backlog: VecDeque<End>,
    closed: bool,
}

/// See the module's header.
#[derive(Clone, Debug)]
pub(super) struct Network {
    listeners: Vec<Listener>,
    connections: Vec<Connection>,
    /// Bytes in a direction, of connections to come.
    pub(super) pipe_bytes: usize,
}

impl Default for Network {
    fn default() -> Self {
        Self { listeners: Vec::new(), connections: Vec::new(), pipe_bytes: PIPE_BYTES }
    }
}

impl Network {
    /// A new listener.
    pub(super) fn listen(&mut self) -> ListenerId {
        self.listeners.push(Listener::default());
        ListenerId(self.listeners.len() - 1)
    }

    /// A new connection.
    pub(super) fn pair(&mut self) -> [End; 2] {
        let connection = self.connections.len();
        let capacity = self.pipe_bytes;
        self.connections.push(Connection { pipes: Default::default(), resets: [false; 2], capacity });
        [0, 1].map(|side| End { connection, side })
    }

    /// A new connection whose other end a listener will accept.
    pub(super) fn connect(&mut self, listener: ListenerId) -> Result<End, Errno> {
        let Listener { backlog, closed } = &self.listeners[listener.0];
        if *closed {
            return Err(Errno::ECONNREFUSED);
        }
        if backlog.len() == BACKLOG {
            return Err(Errno::EAGAIN);
        }
        let [one, other] = self.pair();
        self.listeners[listener.0].backlog.push_back(one);
        Ok(other)
    }

    /// Whether there is a connection to accept.
    pub(super) fn has_backlog(&self, listener: ListenerId) -> bool {
        !self.listeners[listener.0].backlog.is_empty()
    }

    /// Take the connection that has waited longest.
    pub(super) fn accept(&mut self, listener: ListenerId) -> Option<End> {
        self.listeners[listener.0].backlog.pop_front()
    }

    /// Listen no more; who waits to be accepted is reset.
    pub(super) fn close_listener(&mut self, listener: ListenerId) {
        let listener = &mut self.listeners[listener.0];
        listener.closed = true;
        for end in std::mem::take(&mut listener.backlog) {
            self.reset(end);
        }
    }

    /// What `end` reads from.
    fn source(&mut self, end: End) -> &mut Pipe {
        &mut self.connections[end.connection].pipes[end.side]
    }

    /// What `end` writes into.
    fn sink(&mut self, end: End) -> &mut Pipe {
        self.source(end.other())
    }

    /// Whether a read would not find `EAGAIN`.
    pub(super) fn is_readable(&mut self, end: End) -> bool {
        let source = self.source(end);
        !source.bytes.is_empty() || source.ended || source.unread || self.is_reset(end)
    }

    /// Whether a write would not find `EAGAIN`.
    pub(super) fn is_writable(&mut self, end: End) -> bool {
        let sink = self.sink(end);
        sink.ended || sink.unread || self.room(end) > 0 || self.is_reset(end)
    }

    fn is_reset(&self, end: End) -> bool {
        self.connections[end.connection].resets[end.side]
    }

    /// Bytes to read.
    pub(super) fn available(&mut self, end: End) -> usize {
        self.source(end).bytes.len()
    }

    /// Bytes for which there is room.
    pub(super) fn room(&mut self, end: End) -> usize {
        let capacity = self.connections[end.connection].capacity;
        capacity.saturating_sub(self.sink(end).bytes.len())
    }

    /// Read at most `limit` bytes, which is not 0. Nothing: the other has ended.
    pub(super) fn read(&mut self, end: End, limit: usize) -> Result<Vec<u8>, Errno> {
        let source = self.source(end);
        if !source.bytes.is_empty() {
            let count = limit.min(source.bytes.len());
            return Ok(source.bytes.drain(..count).collect());
        }
        let over = source.ended || source.unread;
        if std::mem::take(&mut self.connections[end.connection].resets[end.side]) {
            return Err(Errno::ECONNRESET);
        }
        if over { Ok(Vec::new()) } else { Err(Errno::EAGAIN) }
    }

    /// Write what of `bytes`, of which there are some, there is room for.
    pub(super) fn write(&mut self, end: End, bytes: &[u8]) -> Result<usize, Errno> {
        if std::mem::take(&mut self.connections[end.connection].resets[end.side]) {
            return Err(Errno::ECONNRESET);
        }
        let room = self.room(end);
        let sink = self.sink(end);
        if sink.ended || sink.unread {
            return Err(Errno::EPIPE);
        }
        let count = room.min(bytes.len());
        if count == 0 {
            return Err(Errno::EAGAIN);
        }
        sink.bytes.extend(&bytes[..count]);
        Ok(count)
    }

    /// End reading, writing, or both.
    pub(super) fn shut_down(&mut self, end: End, how: Shutdown) {
        if matches!(how, Shutdown::Read | Shutdown::Both) {
            self.source(end).unread = true;
        }
        if matches!(how, Shutdown::Write | Shutdown::Both) {
            self.sink(end).ended = true;
        }
    }

    /// The end goes away.
    pub(super) fn close(&mut self, end: End) {
        if self.available(end) > 0 {
            self.connections[end.connection].resets[end.other().side] = true;
        }
        self.shut_down(end, Shutdown::Both);
        self.source(end).bytes.clear();
    }

    /// The connection breaks: what was under way is lost, and both ends find out.
    pub(super) fn reset(&mut self, end: End) {
        for end in [end, end.other()] {
            self.shut_down(end, Shutdown::Both);
            self.source(end).bytes.clear();
        }
        self.connections[end.connection].resets = [true; 2];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_both_ways_up_to_the_capacity() {
        let mut network = Network { pipe_bytes: 4, ..Network::default() };
        let [one, other] = network.pair();
        assert_eq!(network.read(one, 1), Err(Errno::EAGAIN));
        assert_eq!(network.write(one, b"abcdef"), Ok(4));
        assert_eq!(network.write(one, b"ef"), Err(Errno::EAGAIN));
        assert!(!network.is_writable(one) && network.is_readable(other) && !network.is_readable(one));
        assert_eq!(network.write(other, b"x"), Ok(1), "the other direction has room of its own");
        assert_eq!(network.read(other, 3), Ok(b"abc".to_vec()));
        assert_eq!(network.write(one, b"ef"), Ok(2));
        assert_eq!(network.read(other, 10), Ok(b"def".to_vec()));
        assert_eq!(network.read(one, 10), Ok(b"x".to_vec()));
    }

    #[test]
    fn an_end_lets_the_other_read_what_is_there() {
        let mut network = Network::default();
        let [one, other] = network.pair();
        network.write(one, b"last").unwrap();
        network.shut_down(one, Shutdown::Write);
        assert_eq!(network.write(one, b"more"), Err(Errno::EPIPE));
        assert_eq!(network.read(other, 2), Ok(b"la".to_vec()));
        assert_eq!(network.read(other, 9), Ok(b"st".to_vec()));
        for _ in 0..2 {
            assert_eq!(network.read(other, 9), Ok(Vec::new()));
        }
        assert_eq!(network.write(other, b"still"), Ok(5), "half of it is open");
        network.shut_down(one, Shutdown::Read);
        assert_eq!(network.write(other, b"no"), Err(Errno::EPIPE));
        assert_eq!(network.read(one, 9), Ok(b"still".to_vec()));
        assert_eq!(network.read(one, 9), Ok(Vec::new()));
    }

    #[test]
    fn who_closes_with_something_unread_resets_the_other_once() {
        let mut network = Network::default();
        let [one, other] = network.pair();
        network.write(one, b"unread").unwrap();
        network.write(other, b"read").unwrap();
        network.close(other);
        assert_eq!(network.read(one, 9), Ok(b"read".to_vec()), "what was sent before comes first");
        assert_eq!(network.read(one, 9), Err(Errno::ECONNRESET));
        assert_eq!(network.read(one, 9), Ok(Vec::new()));
        assert_eq!(network.write(one, b"x"), Err(Errno::EPIPE));

        let [one, other] = network.pair();
        network.close(other);
        assert_eq!(network.read(one, 9), Ok(Vec::new()), "nothing was unread");
        let [one, other] = network.pair();
        network.write(other, b"lost").unwrap();
        network.reset(other);
        assert!(network.is_readable(one) && network.is_writable(one));
        assert_eq!(network.write(one, b"x"), Err(Errno::ECONNRESET));
        assert_eq!(network.read(one, 9), Ok(Vec::new()));
    }

    #[test]
    fn a_backlog_is_bounded_kept_in_order_and_reset_with_its_listener() {
        let mut network = Network::default();
        let listener = network.listen();
        let peers: Vec<End> = (0..BACKLOG).map(|_| network.connect(listener).unwrap()).collect();
        assert_eq!(network.connect(listener), Err(Errno::EAGAIN));
        assert_eq!(network.accept(listener).map(End::other), Some(peers[0]));
        assert_eq!(network.accept(listener).map(End::other), Some(peers[1]));
        network.close_listener(listener);
        assert!(!network.has_backlog(listener));
        assert_eq!(network.connect(listener), Err(Errno::ECONNREFUSED));
        assert_eq!(network.read(peers[1], 1), Err(Errno::EAGAIN), "it was accepted");
        assert_eq!(network.read(peers[2], 1), Err(Errno::ECONNRESET));
    }
}
