//! What tests and rings hold of the simulated network: sockets for rings, and the peers that tests play.

use std::net::Shutdown;

use nix::errno::Errno;

use super::network::{End, ListenerId};
use super::world::SharedWorld;

/// What a [`SimSocket`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Accepts.
    Listener(ListenerId),
    /// Receives and sends.
    Stream(End),
}

/// A socket that a simulated ring takes. Closed when it is dropped.
pub struct SimSocket {
    world: SharedWorld,
    kind: Kind,
}

impl SimSocket {
    /// A listening socket, and where to connect to it.
    #[must_use]
    pub fn listen(world: &SharedWorld) -> (Self, SimAddress) {
        let listener = world.borrow_mut().network.listen();
        let socket = Self { world: world.clone(), kind: Kind::Listener(listener) };
        (socket, SimAddress { world: world.clone(), listener })
    }

    /// A connected socket, and its peer.
    #[must_use]
    pub fn pair(world: &SharedWorld) -> (Self, SimPeer) {
        let [one, other] = world.borrow_mut().network.pair();
        (Self::stream(world, one), SimPeer::new(world, other))
    }

    pub(super) fn stream(world: &SharedWorld, end: End) -> Self {
        Self { world: world.clone(), kind: Kind::Stream(end) }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }
}

impl Drop for SimSocket {
    fn drop(&mut self) {
        // Not while a panic unwinds out of the world.
        let Ok(mut world) = self.world.try_borrow_mut() else { return };
        match self.kind {
            Kind::Listener(listener) => world.network.close_listener(listener),
            Kind::Stream(end) => world.network.close(end),
        }
    }
}

/// Where a [`SimSocket`] listens.
#[derive(Clone)]
pub struct SimAddress {
    world: SharedWorld,
    listener: ListenerId,
}

impl SimAddress {
    /// Connect; the connection waits to be accepted, and can be written to meanwhile.
    ///
    /// # Errors
    /// `ECONNREFUSED` when nobody listens any more, `EAGAIN` when too many wait already.
    pub fn connect(&self) -> Result<SimPeer, Errno> {
        let end = self.world.borrow_mut().network.connect(self.listener)?;
        Ok(SimPeer::new(&self.world, end))
    }
}

/// The end of a connection that a test plays by hand. Nothing it does takes time. A peer that is dropped has died: the connection is reset.
pub struct SimPeer {
    world: SharedWorld,
    /// `None`: it was closed, or made a socket.
    end: Option<End>,
}

impl SimPeer {
    fn new(world: &SharedWorld, end: End) -> Self {
        Self { world: world.clone(), end: Some(end) }
    }

    fn end(&self) -> End {
        self.end.expect("what takes it away consumes the peer")
    }

    /// Write what of `bytes`, of which there must be some, there is room for; gives how many that was.
    ///
    /// # Errors
    /// `EAGAIN` when there is no room, `EPIPE` or `ECONNRESET` when the ring's end is gone.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        self.world.borrow_mut().network.write(self.end(), bytes)
    }

    /// Read at most `limit` bytes, which must not be 0; none: the ring's end has ended.
    ///
    /// # Errors
    /// `EAGAIN` when there is nothing yet, `ECONNRESET` when the ring's end is gone and left something unread.
    pub fn read(&self, limit: usize) -> Result<Vec<u8>, Errno> {
        self.world.borrow_mut().network.read(self.end(), limit)
    }

    /// Bytes there are to read.
    #[must_use]
    pub fn available(&self) -> usize {
        self.world.borrow_mut().network.available(self.end())
    }

    /// End writing (the ring receives what is there, then the end), reading (the ring's sends fail), or both.
    pub fn shut_down(&self, how: Shutdown) {
        self.world.borrow_mut().network.shut_down(self.end(), how);
    }

    /// Go away as a program that closes its socket does. The ring's end is reset if something is left unread.
    pub fn close(mut self) {
        if let Some(end) = self.end.take() {
            self.world.borrow_mut().network.close(end);
        }
    }

    /// Give this end to a ring as well.
    #[must_use]
    pub fn into_socket(mut self) -> SimSocket {
        let end = self.end.take().expect("what takes it away consumes the peer");
        SimSocket::stream(&self.world, end)
    }
}

impl Drop for SimPeer {
    fn drop(&mut self) {
        if let Some(end) = self.end
            && let Ok(mut world) = self.world.try_borrow_mut()
        {
            world.network.reset(end);
        }
    }
}
