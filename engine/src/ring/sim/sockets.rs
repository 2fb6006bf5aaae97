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

#[cfg(test)]
mod tests {
    use super::super::{FaultPlan, SimPeer, SocketRates};
    use super::*;
    use crate::ring::{Completion, Ring, Token, Wait};

    const RECEIVE: Token = Token(1);
    const SEND: Token = Token(2);
    const BYTES: usize = 20_000;

    /// What a run of [`echo`] came to.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct Run {
        /// Each completion, without its buffer.
        results: Vec<Result<u32, Errno>>,
        /// What the peer got back.
        read: Vec<u8>,
        broken: bool,
    }

    fn sent() -> Vec<u8> {
        (0..BYTES).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect()
    }

    fn moved(result: &Result<Output, Errno>) -> Result<u32, Errno> {
        match result {
            Ok(Output::Received { bytes, .. } | Output::Sent { bytes, .. }) => Ok(*bytes),
            Ok(other) => panic!("{other:?}"),
            Err(errno) => Err(*errno),
        }
    }

    /// A ring that sends back what it receives, until the end or a broken connection; the peer writes and reads at random.
    fn echo(seed: u64, sockets: SocketRates) -> Run {
        let world = World::shared();
        world.borrow_mut().set_pipe_bytes(700);
        let (socket, peer) = SimSocket::pair(&world);
        let plan = FaultPlan { sockets, ..FaultPlan::default() };
        let mut ring = SimRing::new(world, 4096, 1, seed, plan).with_sockets(1);
        let socket = ring.add_socket(socket).unwrap();
        let receive = |whole| Op::Receive { socket, buffer: vec![0; 512], filled: 0, whole };
        let (bytes, mut rng) = (sent(), Rng::with_seed(!seed));
        let (mut run, mut written, mut echoed) = (Run::default(), 0, Vec::new());
        ring.push(RECEIVE, receive(true));
        let mut completions = Vec::new();
        while run.read.len() < BYTES && !run.broken {
            play(&peer, &bytes, &mut written, &mut run, &mut rng);
            let step = ring.now().after(std::time::Duration::from_micros(200));
            ring.wait(Wait::Until(step), &mut completions).unwrap();
            for Completion { token, result } in completions.drain(..) {
                run.results.push(moved(&result));
                match (token, result) {
                    (RECEIVE, Ok(Output::Received { buffer, bytes: count })) if count > 0 => {
                        let parts = vec![buffer[..count as usize].to_vec()];
                        echoed.extend_from_slice(&parts[0]);
                        assert_eq!(echoed, bytes[..echoed.len()], "seed {seed}");
                        ring.push(SEND, Op::Send { socket, parts, skip: 0 });
                    }
                    (SEND, Ok(Output::Sent { parts, bytes: count })) => {
                        let rest = parts[0][count as usize..].to_vec();
                        if rest.is_empty() {
                            ring.push(RECEIVE, receive(rng.bool()));
                        } else {
                            ring.push(SEND, Op::Send { socket, parts: vec![rest], skip: 0 });
                        }
                    }
                    (RECEIVE, Err(Errno::EINTR | Errno::EAGAIN)) => ring.push(RECEIVE, receive(rng.bool())),
                    // The end: what was received before is on its way back.
                    (RECEIVE, Ok(Output::Received { .. })) => {}
                    // Its buffer is gone with it.
                    _ => run.broken = true,
                }
            }
        }
        assert_eq!(run.read, bytes[..run.read.len()], "seed {seed}");
        run
    }

    fn play(peer: &SimPeer, bytes: &[u8], written: &mut usize, run: &mut Run, rng: &mut Rng) {
        if *written < bytes.len() && rng.bool() {
            let end = (*written + rng.usize(1..300)).min(bytes.len());
            *written += peer.write(&bytes[*written..end]).unwrap_or(0);
            if *written == bytes.len() {
                peer.shut_down(std::net::Shutdown::Write);
            }
        }
        if rng.bool() {
            run.read.extend(peer.read(rng.usize(1..300)).unwrap_or_default());
        }
    }

    #[test]
    fn streams_keep_their_bytes_in_order_in_pieces_of_all_sizes() {
        let mut sizes = std::collections::BTreeSet::new();
        for seed in 0..20 {
            let run = echo(seed, SocketRates { short: 200, ..SocketRates::default() });
            assert_eq!(run.read.len(), BYTES, "seed {seed}");
            sizes.extend(run.results.into_iter().map(Result::unwrap));
        }
        assert!(sizes.contains(&1) && sizes.contains(&512) && sizes.len() > 200, "{}", sizes.len());
    }

    #[test]
    fn the_same_seed_gives_the_same_run() {
        let rates = SocketRates { short: 100, passing: 20, reset: 5, accept: 0 };
        for seed in 0..20 {
            assert_eq!(echo(seed, rates), echo(seed, rates));
        }
        assert_ne!(echo(1, rates).results, echo(2, rates).results);
    }

    #[test]
    fn faults_of_each_kind_happen_and_break_what_they_should() {
        let mut seen = Vec::new();
        for seed in 0..100 {
            let run = echo(seed, SocketRates { passing: 5, reset: 5, ..SocketRates::default() });
            seen.extend(run.results.iter().filter_map(|result| result.err()));
        }
        let wanted = [Errno::EINTR, Errno::EAGAIN, Errno::ECONNRESET, Errno::ETIMEDOUT, Errno::EHOSTUNREACH];
        assert!(wanted.iter().all(|errno| seen.contains(errno)), "{seen:?}");
    }

    #[test]
    fn a_broken_connection_is_broken_for_the_peer_and_an_accept_that_fails_takes_nothing() {
        let world = World::shared();
        let (listener, address) = SimSocket::listen(&world);
        let plan = FaultPlan {
            exact: [(0, Fault::Errno(Errno::EMFILE)), (2, Fault::Errno(Errno::ETIMEDOUT))].into(),
            ..FaultPlan::default()
        };
        let mut ring = SimRing::new(world, 4096, 1, 1, plan).with_sockets(2);
        let listener = ring.add_socket(listener).unwrap();
        let peer = address.connect().unwrap();
        let run = |ring: &mut SimRing, op| {
            let mut completions = Vec::new();
            ring.push(Token(1), op);
            while completions.is_empty() {
                ring.wait(Wait::Forever, &mut completions).unwrap();
            }
            completions.remove(0).result
        };
        assert_eq!(run(&mut ring, Op::Accept { listener }), Err(Errno::EMFILE));
        let Ok(Output::Accepted(socket)) = run(&mut ring, Op::Accept { listener }) else {
            panic!("an accept")
        };
        assert_eq!(ring.sockets(), 2);
        // It fails although nothing has come: a network that is down makes itself felt at any time.
        let receive = Op::Receive { socket, buffer: vec![0; 10], filled: 0, whole: false };
        assert_eq!(run(&mut ring, receive), Err(Errno::ETIMEDOUT));
        assert_eq!(peer.read(1), Err(Errno::ECONNRESET));
    }

    #[test]
    fn what_is_cancelled_under_way_may_be_lost() {
        let lost = |seed| {
            let world = World::shared();
            let (socket, peer) = SimSocket::pair(&world);
            let mut ring = SimRing::new(world, 4096, 1, seed, FaultPlan::default()).with_sockets(1);
            let socket = ring.add_socket(socket).unwrap();
            peer.write(b"0123456789").unwrap();
            ring.push(RECEIVE, Op::Receive { socket, buffer: vec![0; 20], filled: 0, whole: true });
            ring.push(Token(9), Op::Cancel { target: RECEIVE });
            let mut completions = Vec::new();
            for _ in 0..20 {
                ring.wait(Wait::Forever, &mut completions).unwrap();
            }
            let cancelled = completions.iter().any(|one| one.result == Err(Errno::ECANCELED));
            drop(ring);
            // The ring's end is reset if its program left something unread.
            cancelled && peer.read(1) == Ok(Vec::new())
        };
        let count = (0..100).filter(|&seed| lost(seed)).count();
        assert!((5..95).contains(&count), "{count} of 100");
    }

    #[test]
    fn a_host_that_dies_resets_its_connections() {
        let world = World::shared();
        let (socket, peer) = SimSocket::pair(&world);
        let (listener, address) = SimSocket::listen(&world);
        let mut ring = SimRing::new(world, 4096, 1, 1, FaultPlan::default()).with_sockets(2);
        let socket = ring.add_socket(socket).unwrap();
        let listener = ring.add_socket(listener).unwrap();
        ring.push(RECEIVE, Op::Receive { socket, buffer: vec![0; 20], filled: 0, whole: true });
        ring.push(SEND, Op::Accept { listener });
        ring.crash();
        assert_eq!(peer.read(1), Err(Errno::ECONNRESET));
        assert!(address.connect().is_err());
    }
}
