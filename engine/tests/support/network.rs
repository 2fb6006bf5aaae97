//! Peers of sockets under test, and how checks drive them: they never wait, so that they and the ring run on one thread.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use engine::ring::sim::{SimAddress, SimPeer};
use engine::ring::{Completion, Op, Output, Ring, SocketId, Token, Wait};
use nix::errno::Errno;
use nix::sys::socket::sockopt::{AcceptConn, Linger};
use nix::sys::socket::{MsgFlags, getsockopt, recv, send, setsockopt, shutdown};

use super::PATIENCE;

/// Kinds of addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Family {
    Unix,
    Tcp,
}

/// The other end of a connection. `EAGAIN` is nothing to read yet, or no room to write now.
pub(crate) trait Peer {
    fn read(&mut self, limit: usize) -> Result<Vec<u8>, Errno>;
    fn write(&mut self, bytes: &[u8]) -> Result<usize, Errno>;
    fn shut_down(&mut self, how: Shutdown);
    /// As a program that closes its socket.
    fn close(self: Box<Self>);
    /// As a program that dies, or a network that does: the connection is reset.
    fn reset(self: Box<Self>);
}

/// Connects to a listener under test.
pub(crate) type Dial = Box<dyn Fn() -> Result<Box<dyn Peer>, Errno>>;

/// A connection of the kernel's.
pub(crate) struct RealPeer(OwnedFd);

impl RealPeer {
    pub(crate) fn new(socket: impl Into<OwnedFd>) -> Self {
        Self(socket.into())
    }
}

impl Peer for RealPeer {
    fn read(&mut self, limit: usize) -> Result<Vec<u8>, Errno> {
        let mut buffer = vec![0; limit];
        let count = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
        buffer.truncate(count);
        Ok(buffer)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
    }

    fn shut_down(&mut self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => nix::sys::socket::Shutdown::Read,
            Shutdown::Write => nix::sys::socket::Shutdown::Write,
            Shutdown::Both => nix::sys::socket::Shutdown::Both,
        };
        shutdown(self.0.as_raw_fd(), how).unwrap();
    }

    fn close(self: Box<Self>) {}

    /// A TCP connection that is closed without lingering is reset. (A unix one is when something is left unread.)
    fn reset(self: Box<Self>) {
        setsockopt(&self.0.as_fd(), Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
    }
}

impl Peer for SimPeer {
    fn read(&mut self, limit: usize) -> Result<Vec<u8>, Errno> {
        Self::read(self, limit)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        Self::write(self, bytes)
    }

    fn shut_down(&mut self, how: Shutdown) {
        Self::shut_down(self, how);
    }

    fn close(self: Box<Self>) {
        Self::close(*self);
    }

    fn reset(self: Box<Self>) {}
}

/// A listener, and how to connect to it.
pub(crate) fn real_listener(family: Family, path: PathBuf) -> (OwnedFd, Dial) {
    fn dialled<S: Into<OwnedFd>>(result: std::io::Result<S>) -> Result<Box<dyn Peer>, Errno> {
        let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap());
        result.map(|stream| Box::new(RealPeer::new(stream)) as Box<dyn Peer>).map_err(errno)
    }
    match family {
        Family::Unix => {
            let listener = UnixListener::bind(&path).unwrap();
            (listener.into(), Box::new(move || dialled(UnixStream::connect(&path))))
        }
        Family::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            (listener.into(), Box::new(move || dialled(TcpStream::connect(address))))
        }
    }
}

/// A connected pair.
pub(crate) fn real_pair(family: Family) -> (OwnedFd, Box<dyn Peer>) {
    match family {
        Family::Unix => {
            let (one, other) = UnixStream::pair().unwrap();
            (one.into(), Box::new(RealPeer::new(other)))
        }
        Family::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let one = OwnedFd::from(listener.accept().unwrap().0);
            assert!(!getsockopt(&one, AcceptConn).unwrap());
            (one, Box::new(RealPeer::new(other)))
        }
    }
}

/// How to connect to a simulated listener.
pub(crate) fn sim_dial(address: SimAddress) -> Dial {
    Box::new(move || address.connect().map(|peer| Box::new(peer) as Box<dyn Peer>))
}

/// Let the ring run for `time`.
pub(crate) fn settle<R: Ring>(ring: &mut R, time: Duration) -> Vec<Completion> {
    let mut completions = Vec::new();
    let until = ring.now().after(time);
    while ring.now() < until {
        ring.wait(Wait::Until(until), &mut completions).unwrap();
    }
    completions
}

/// Let the ring run in small steps until `done`; gives what has completed.
pub(crate) fn turn<R: Ring>(ring: &mut R, mut done: impl FnMut(&[Completion]) -> bool) -> Vec<Completion> {
    let mut completions = Vec::new();
    let deadline = ring.now().after(PATIENCE);
    while !done(&completions) {
        assert!(ring.now() < deadline, "hung; so far {} have completed", completions.len());
        let step = ring.now().after(Duration::from_millis(1));
        ring.wait(Wait::Until(step), &mut completions).unwrap();
    }
    completions
}

/// The one that is to complete.
pub(crate) fn one<R: Ring>(ring: &mut R, token: u64) -> Result<Output, Errno> {
    let mut completions = super::complete(ring, 1);
    let completion = completions.remove(0);
    assert_eq!(completion.token, Token(token));
    completion.result
}

/// Have the ring receive until it has `count` bytes or the end.
pub(crate) fn receive<R: Ring>(ring: &mut R, socket: SocketId, count: usize, whole: bool) -> Vec<u8> {
    let mut buffer = vec![0xee; count];
    let mut filled = 0;
    while filled < count {
        ring.push(Token(900), Op::Receive { socket, buffer, filled, whole });
        let Ok(Output::Received { buffer: back, bytes }) = one(ring, 900) else { panic!("a receive") };
        buffer = back;
        filled += bytes as usize;
        if bytes == 0 {
            break;
        }
    }
    buffer.truncate(filled);
    buffer
}

/// Have the ring send all of `parts`, with `peer` reading.
pub(crate) fn send_all<R: Ring>(
    ring: &mut R,
    socket: SocketId,
    parts: Vec<Vec<u8>>,
    skip: usize,
    peer: &mut dyn Peer,
) -> Vec<u8> {
    let total: usize = parts.iter().map(Vec::len).sum();
    let (mut skip, mut parts, mut read) = (skip, parts, Vec::new());
    let wanted = total - skip;
    while skip < total {
        let before = (total < 1 << 16).then(|| parts.clone());
        ring.push(Token(901), Op::Send { socket, parts, skip });
        let mut completions = turn(ring, |completions| {
            drain(peer, &mut read);
            !completions.is_empty()
        });
        let Ok(Output::Sent { parts: back, bytes }) = completions.remove(0).result else { panic!("a send") };
        assert!(bytes > 0 && before.is_none_or(|before| before == back), "{bytes}");
        skip += bytes as usize;
        parts = back;
    }
    turn(ring, |_| {
        drain(peer, &mut read);
        read.len() >= wanted
    });
    read
}

/// Read what is there; `true`: and there will be no more.
pub(crate) fn drain(peer: &mut dyn Peer, read: &mut Vec<u8>) -> bool {
    loop {
        match peer.read(1 << 20) {
            Ok(bytes) if bytes.is_empty() => return true,
            Ok(bytes) => read.extend(bytes),
            Err(Errno::EAGAIN) => return false,
            Err(Errno::ECONNRESET) => return true,
            Err(errno) => panic!("{errno}"),
        }
    }
}

/// Write all of `bytes`, the ring running meanwhile; gives what has completed.
pub(crate) fn write_all<R: Ring>(ring: &mut R, peer: &mut dyn Peer, bytes: &[u8]) -> Vec<Completion> {
    let mut at = 0;
    turn(ring, |_| {
        while at < bytes.len() {
            match peer.write(&bytes[at..]) {
                Ok(count) => at += count,
                Err(Errno::EAGAIN) => return false,
                Err(errno) => panic!("{errno}"),
            }
        }
        true
    })
}

/// Fill the connection until a send is stuck; it is in flight under token 902. Gives how many bytes are under way for sure.
pub(crate) fn stall<R: Ring>(ring: &mut R, socket: SocketId, bytes: &[u8]) -> usize {
    let mut skip = 0;
    loop {
        ring.push(Token(902), Op::Send { socket, parts: vec![bytes.to_vec()], skip });
        match settle(ring, Duration::from_millis(60)).pop() {
            None => return skip,
            Some(Completion { result: Ok(Output::Sent { bytes, .. }), .. }) => skip += bytes as usize,
            Some(other) => panic!("{:?}", other.result.map(drop)),
        }
        assert!(skip < bytes.len(), "the peer takes it all unread");
    }
}

/// Wait until `peer` finds that the connection is over.
pub(crate) fn ends<R: Ring>(ring: &mut R, peer: &mut dyn Peer) {
    turn(ring, |_| drain(peer, &mut Vec::new()));
}
