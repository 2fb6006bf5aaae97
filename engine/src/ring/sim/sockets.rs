//! Sockets of the simulated ring.
//!
//! # Model
//! An operation that would have to wait is stuck until the network says that it would not; then it takes its time like any other, and takes effect at the
//! instant it completes. How much a receive gives and a send takes is up to the seed, within what is there and what there is room for; a receive of the
//! whole goes on until it has it, unless the [`FaultPlan`](super::FaultPlan) makes it short. One that is cancelled may have moved bytes.

use fastrand::Rng;
use nix::errno::Errno;

use super::ends::{Kind, SimSocket};
use super::world::{SharedWorld, World};
use super::{Fault, InFlight, SimRing};
use crate::ring::socket::{MAX_SOCKETS, Place, rest};
use crate::ring::{Op, Output, RingFailure, SocketId};

struct Entry {
    socket: SimSocket,
    shut: bool,
    taken: [bool; 2],
}

/// The table.
pub(super) struct Sockets {
    entries: Vec<Option<Entry>>,
    limit: usize,
}

impl Sockets {
    /// # Panics
    /// If `limit` is beyond what a ring may be made for.
    pub(super) fn new(limit: usize) -> Self {
        assert!(limit <= MAX_SOCKETS, "a ring for {limit} sockets");
        Self { entries: Vec::new(), limit }
    }

    pub(super) fn add(&mut self, socket: SimSocket) -> Result<SocketId, Errno> {
        let place = self.entries.iter().position(Option::is_none).unwrap_or(self.entries.len());
        if place == self.limit {
            return Err(Errno::ENFILE);
        }
        if place == self.entries.len() {
            self.entries.push(None);
        }
        self.entries[place] = Some(Entry { socket, shut: false, taken: [false; 2] });
        Ok(SocketId(u16::try_from(place).expect("at most MAX_SOCKETS")))
    }

    fn entry(&self, socket: SocketId) -> &Entry {
        self.entries[usize::from(socket.0)].as_ref().expect("the socket is in the table")
    }

    fn entry_mut(&mut self, socket: SocketId) -> &mut Entry {
        self.entries[usize::from(socket.0)].as_mut().expect("the socket is in the table")
    }

    /// Take a place.
    pub(super) fn begin(&mut self, place: Place) {
        let taken = &mut self.entry_mut(place.socket).taken[place.way as usize];
        assert!(!std::mem::replace(taken, true), "{place:?} is taken");
    }

    /// Give it back.
    pub(super) fn end(&mut self, place: Place) {
        self.entry_mut(place.socket).taken[place.way as usize] = false;
    }

    pub(super) fn remove(&mut self, socket: SocketId) {
        assert_eq!(self.entry(socket).taken, [false; 2], "operations on {socket:?} are in flight");
        self.entries[usize::from(socket.0)] = None;
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.entries.iter().flatten().count()
    }

    /// Whether `op`, which takes `place`, has to wait.
    pub(super) fn is_stuck(&self, place: Place, op: &Op, world: &mut World) -> bool {
        let entry = self.entry(place.socket);
        let network = &mut world.network;
        match (entry.socket.kind(), op) {
            (Kind::Listener(listener), Op::Accept { .. }) => !entry.shut && !network.has_backlog(listener),
            (Kind::Stream(end), Op::Receive { .. }) => !network.is_readable(end),
            (Kind::Stream(end), Op::Send { .. }) => !network.is_writable(end),
            // An error at once.
            _ => false,
        }
    }
}

/// How much of `most` bytes, of which there are some, a receive or a send moves.
fn portion(rng: &mut Rng, most: usize, short: bool) -> usize {
    match rng.u8(..8) {
        0 => 1,
        1 | 2 => rng.usize(1..=most),
        _ if short => rng.usize(1..=most),
        _ => most,
    }
}

impl SimRing {
    /// A ring that takes so many sockets; without this, it takes none.
    #[must_use]
    pub fn with_sockets(mut self, limit: usize) -> Self {
        self.sockets = Sockets::new(limit);
        self
    }

    /// Sockets that were added or accepted and not removed.
    #[must_use]
    pub fn sockets(&self) -> usize {
        self.sockets.count()
    }

    pub(super) fn insert_socket(&mut self, socket: SimSocket) -> Result<SocketId, RingFailure> {
        self.sockets.add(socket).map_err(|errno| RingFailure { ring: "sim", errno })
    }

    /// Make what is in flight on a socket complete soon. See the trait.
    pub(super) fn shut_down(&mut self, socket: SocketId) {
        let entry = self.sockets.entry_mut(socket);
        entry.shut = true;
        if let Kind::Stream(end) = entry.socket.kind() {
            self.world.borrow_mut().network.shut_down(end, std::net::Shutdown::Both);
        }
    }

    /// The host dies: whoever is connected finds the connection reset, sooner or later.
    pub(super) fn reset_sockets(&mut self, world: &mut World) {
        for entry in self.sockets.entries.iter().flatten() {
            if let Kind::Stream(end) = entry.socket.kind() {
                world.network.reset(end);
            }
        }
    }

    /// Carry out what is in flight on a socket. `None`: it goes on when there is more to receive, or room.
    pub(super) fn carry_out_on_socket(
        &mut self,
        place: Place,
        slot: &mut InFlight,
    ) -> Option<Result<Output, Errno>> {
        let entry = self.sockets.entry(place.socket);
        let (kind, shut) = (entry.socket.kind(), entry.shut);
        let shared = self.world.clone();
        if let (false, Some(Fault::Errno(errno)), Kind::Stream(end)) = (slot.cancelled, slot.fault, kind)
            && !matches!(errno, Errno::EINTR | Errno::EAGAIN)
        {
            shared.borrow_mut().network.reset(end);
        }
        if let (false, Some(Fault::Errno(errno))) = (slot.cancelled, slot.fault) {
            return Some(Err(errno));
        }
        if slot.cancelled {
            if self.rng.bool() {
                // It was under way: what it has moved is lost. Whatever it comes to, it was cancelled.
                drop(self.move_bytes(kind, slot, &shared));
            }
            return Some(Err(Errno::ECANCELED));
        }
        match (kind, &slot.op) {
            (Kind::Listener(_), Op::Accept { .. }) if shut => Some(Err(Errno::ECANCELED)),
            (Kind::Listener(listener), Op::Accept { .. }) => {
                let end = shared.borrow_mut().network.accept(listener)?;
                // The world is not borrowed any more: a connection that finds no place is closed.
                Some(self.sockets.add(SimSocket::stream(&shared, end)).map(Output::Accepted))
            }
            (Kind::Stream(_), Op::Accept { .. }) => Some(Err(Errno::EINVAL)),
            (Kind::Listener(_), _) => Some(Err(Errno::ENOTCONN)),
            (Kind::Stream(_), _) => self.move_bytes(kind, slot, &shared),
        }
    }

    fn move_bytes(
        &mut self,
        kind: Kind,
        slot: &mut InFlight,
        world: &SharedWorld,
    ) -> Option<Result<Output, Errno>> {
        let Kind::Stream(end) = kind else { return None };
        let mut world = world.borrow_mut();
        let network = &mut world.network;
        let short = slot.fault == Some(Fault::Short);
        let result = match &mut slot.op {
            Op::Receive { buffer, filled, whole, .. } => {
                let left = buffer.len() - *filled - slot.moved;
                let there = network.available(end).min(left);
                let limit = if there == 0 {
                    left
                } else if *whole && !short {
                    there
                } else {
                    portion(&mut self.rng, there, short)
                };
                match network.read(end, limit) {
                    Ok(bytes) => {
                        let at = *filled + slot.moved;
                        buffer[at..at + bytes.len()].copy_from_slice(&bytes);
                        slot.moved += bytes.len();
                        if *whole && !short && !bytes.is_empty() && bytes.len() < left {
                            return None;
                        }
                        Ok(slot.moved)
                    }
                    // It is told of what has come; the next finds the end.
                    Err(Errno::ECONNRESET) if slot.moved > 0 => Ok(slot.moved),
                    Err(errno) => Err(errno),
                }
                .map(|moved| Output::Received {
                    buffer: std::mem::take(buffer),
                    bytes: u32::try_from(moved).expect("bounded"),
                })
            }
            Op::Send { parts, skip, .. } => {
                let left = rest(parts, *skip).map(<[u8]>::len).sum::<usize>();
                let room = network.room(end).min(left);
                // Without room, the network says why.
                let count = if room == 0 { 1 } else { portion(&mut self.rng, room, short) };
                let bytes: Vec<u8> = rest(parts, *skip).flatten().copied().take(count).collect();
                network.write(end, &bytes).map(|bytes| Output::Sent {
                    parts: std::mem::take(parts),
                    bytes: u32::try_from(bytes).expect("bounded"),
                })
            }
            _ => return None,
        };
        match result {
            Err(Errno::EAGAIN) => None,
            result => Some(result),
        }
    }
}
