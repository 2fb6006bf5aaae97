//! The table of sockets that the two real rings share, and what all rings ask of operations on sockets.
//!
//! # Model
//! A socket has two [`Place`]s for operations in flight, one each way. A place is taken from the push to the return of the
//! completion, and the descriptor stays open as long as a place is taken: so its number cannot come to mean another file while the kernel
//! still looks at it.
//!
//! # Listeners
//! A listener may be shared with whoever started the program, so it is never shut down: it is only accepted from no more.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::sockopt::{AcceptConn, KeepAlive, SockType, TcpNoDelay};
use nix::sys::socket::{Shutdown, SockFlag, accept4, getsockopt, setsockopt, shutdown};

use super::{MAX_SOCKET_BYTES, Op, SocketId};

/// Most sockets of a ring.
pub(crate) const MAX_SOCKETS: usize = 4096;

/// Which way an operation on a socket goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Accepts and receives.
    In,
    /// Sends.
    Out,
}

/// A place for an operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// On which socket.
    pub(crate) socket: SocketId,
    /// Which of its two.
    pub(crate) way: Way,
}

/// The place that `op` takes, if it works on a socket.
pub(crate) fn place_of(op: &Op) -> Option<Place> {
    let (socket, way) = match op {
        Op::Accept { listener } => (*listener, Way::In),
        Op::Receive { socket, .. } => (*socket, Way::In),
        Op::Send { socket, .. } => (*socket, Way::Out),
        _ => return None,
    };
    Some(Place { socket, way })
}

/// Check that a receive has something to fill and a send something to send, and neither too much.
///
/// # Panics
/// If not.
pub(crate) fn check_bytes(op: &Op) {
    let (left, what) = match op {
        Op::Receive { buffer, filled, .. } => (buffer.len().checked_sub(*filled), "receive into"),
        Op::Send { parts, skip, .. } => {
            let total = parts.iter().fold(0_usize, |sum, part| sum.saturating_add(part.len()));
            (total.checked_sub(*skip), "send")
        }
        _ => return,
    };
    let fits = left.is_some_and(|left| (1..=MAX_SOCKET_BYTES).contains(&left));
    assert!(fits, "{left:?} bytes to {what}");
}

/// What of `parts` lies behind the first `skip` bytes, empty slices left out.
pub(crate) fn rest(parts: &[Vec<u8>], skip: usize) -> impl Iterator<Item = &[u8]> {
    let mut skip = skip;
    parts.iter().filter_map(move |part| {
        let from = skip.min(part.len());
        skip -= from;
        Some(&part[from..]).filter(|slice| !slice.is_empty())
    })
}

/// How the kernel is to treat calls that would have to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// `O_NONBLOCK` is off: io_uring waits by itself, and takes the flag for a wish not to.
    InKernel,
    /// `O_NONBLOCK` is on: `EAGAIN`.
    Never,
}

/// Who uses a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Nobody,
    /// An operation whose end is known and was not returned yet, or which is just being pushed.
    Taken,
    /// An operation in the record of those in flight, under this key.
    InFlight(u64),
}

/// A socket in a ring's table.
struct Entry {
    descriptor: OwnedFd,
    listens: bool,
    /// Takes `TCP_NODELAY`.
    tcp: bool,
    /// [`Sockets::shut_down`] was called.
    shut: bool,
    uses: [Use; 2],
}

/// See the module's header.
pub(crate) struct Sockets {
    entries: Vec<Option<Entry>>,
    limit: usize,
    waiting: Waiting,
}

impl Sockets {
    /// An empty table for `limit` sockets.
    ///
    /// # Panics
    /// If `limit` is beyond [`MAX_SOCKETS`].
    pub(crate) fn new(limit: usize, waiting: Waiting) -> Self {
        assert!(limit <= MAX_SOCKETS, "a ring for {limit} sockets");
        Self { entries: Vec::new(), limit, waiting }
    }

    /// Most sockets at a time.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Add a listening or connected stream socket.
    ///
    /// # Errors
    /// `ENFILE` when the table is full, `ESOCKTNOSUPPORT` for another kind of socket, or what the kernel says.
    pub(crate) fn add(&mut self, descriptor: OwnedFd) -> Result<SocketId, Errno> {
        if getsockopt(&descriptor, SockType)? != nix::sys::socket::SockType::Stream {
            return Err(Errno::ESOCKTNOSUPPORT);
        }
        fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL)?);
        let wanted = match self.waiting {
            Waiting::InKernel => flags.difference(OFlag::O_NONBLOCK),
            Waiting::Never => flags.union(OFlag::O_NONBLOCK),
        };
        if wanted != flags {
            fcntl(&descriptor, FcntlArg::F_SETFL(wanted))?;
        }
        let listens = getsockopt(&descriptor, AcceptConn)?;
        let tcp = getsockopt(&descriptor, TcpNoDelay).is_ok();
        self.insert(descriptor, listens, tcp)
    }

    /// Add a connection that `listener` has accepted, which is as [`Sockets::accept`] makes it.
    ///
    /// # Errors
    /// `ENFILE` when the table is full.
    pub(crate) fn add_accepted(
        &mut self,
        listener: SocketId,
        descriptor: OwnedFd,
    ) -> Result<SocketId, Errno> {
        let tcp = self.entry(listener).tcp;
        self.insert(descriptor, false, tcp)
    }

    fn insert(&mut self, descriptor: OwnedFd, listens: bool, tcp: bool) -> Result<SocketId, Errno> {
        let place = self.entries.iter().position(Option::is_none).unwrap_or(self.entries.len());
        if place == self.limit {
            return Err(Errno::ENFILE);
        }
        if tcp && !listens {
            // A reply that is not a full segment must not wait for the peer's acknowledgement of the one before.
            if let Err(errno) = setsockopt(&descriptor, TcpNoDelay, &true) {
                tracing::debug!(%errno, "TCP_NODELAY was refused");
            }
            // A peer whose host has vanished is missed in the end, by the system's settings, and does not keep its place for ever.
            if let Err(errno) = setsockopt(&descriptor, KeepAlive, &true) {
                tracing::debug!(%errno, "SO_KEEPALIVE was refused");
            }
        }
        let entry = Some(Entry { descriptor, listens, tcp, shut: false, uses: [Use::Nobody; 2] });
        if place == self.entries.len() {
            self.entries.push(entry);
        } else {
            self.entries[place] = entry;
        }
        Ok(SocketId(u16::try_from(place).expect("at most MAX_SOCKETS")))
    }

    /// Take one connection from the backlog of `listener`, without waiting, and add it.
    ///
    /// # Errors
    /// `EAGAIN` when there is none, `ENFILE` when the table is full, or what the kernel says.
    pub(crate) fn accept(&mut self, listener: SocketId) -> Result<SocketId, Errno> {
        let descriptor = self.descriptor(listener).as_raw_fd();
        let raw = accept4(descriptor, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows of it.
        let connection = unsafe { OwnedFd::from_raw_fd(raw) };
        self.add_accepted(listener, connection)
    }

    fn entry(&self, socket: SocketId) -> &Entry {
        self.entries.get(usize::from(socket.0)).and_then(Option::as_ref).expect("the socket is in the table")
    }

    fn entry_mut(&mut self, socket: SocketId) -> &mut Entry {
        self.entries
            .get_mut(usize::from(socket.0))
            .and_then(Option::as_mut)
            .expect("the socket is in the table")
    }

    /// The descriptor of a socket.
    ///
    /// # Panics
    /// If it is not in the table.
    pub(crate) fn descriptor(&self, socket: SocketId) -> BorrowedFd<'_> {
        self.entry(socket).descriptor.as_fd()
    }

    fn place_mut(&mut self, place: Place) -> &mut Use {
        &mut self.entry_mut(place.socket).uses[place.way as usize]
    }

    /// Take a place.
    ///
    /// # Panics
    /// If it is taken, or the socket is not in the table.
    pub(crate) fn begin(&mut self, place: Place) {
        let before = std::mem::replace(self.place_mut(place), Use::Taken);
        if before != Use::Nobody {
            *self.place_mut(place) = before;
            panic!("{place:?} is taken");
        }
    }

    /// What has taken the place is in flight under `key`.
    pub(crate) fn fly(&mut self, place: Place, key: u64) {
        *self.place_mut(place) = Use::InFlight(key);
    }

    /// What was in flight has ended; the place is taken until that is returned.
    pub(crate) fn land(&mut self, place: Place) {
        *self.place_mut(place) = Use::Taken;
    }

    /// The completion of what had the place is being returned.
    ///
    /// # Panics
    /// If it was free.
    pub(crate) fn end(&mut self, place: Place) {
        let before = std::mem::replace(self.place_mut(place), Use::Nobody);
        assert_ne!(before, Use::Nobody, "{place:?} was free");
    }

    /// What is in flight on a place; nothing on a socket that is not in the table.
    pub(crate) fn key(&self, place: Place) -> Option<u64> {
        let entry = self.entries.get(usize::from(place.socket.0))?.as_ref()?;
        match entry.uses[place.way as usize] {
            Use::InFlight(key) => Some(key),
            Use::Nobody | Use::Taken => None,
        }
    }

    /// Whether nothing is accepted from this listener any more.
    pub(crate) fn is_closed_listener(&self, socket: SocketId) -> bool {
        let entry = self.entry(socket);
        entry.listens && entry.shut
    }

    /// End a connection both ways, by which whatever is in flight on it ends. From a listener, accept no more: gives the accept that
    /// is in flight and now to be cancelled, once.
    ///
    /// # Panics
    /// If it is not in the table.
    pub(crate) fn shut_down(&mut self, socket: SocketId) -> Option<u64> {
        let entry = self.entry_mut(socket);
        if std::mem::replace(&mut entry.shut, true) {
            return None;
        }
        if entry.listens {
            return self.key(Place { socket, way: Way::In });
        }
        if let Err(errno) = shutdown(entry.descriptor.as_raw_fd(), Shutdown::Both) {
            // It is not connected any more, and what is in flight ends by that.
            tracing::debug!(%errno, ?socket, "shutdown");
        }
        None
    }

    /// Take a socket out of the table; dropping it closes it.
    ///
    /// # Panics
    /// If it is not in the table, or a place of it is taken.
    pub(crate) fn remove(&mut self, socket: SocketId) -> OwnedFd {
        let uses = self.entry(socket).uses;
        assert_eq!(uses, [Use::Nobody; 2], "operations on {socket:?} are in flight");
        self.entries[usize::from(socket.0)].take().expect("it is in the table: checked above").descriptor
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    #[test]
    fn the_rest_is_what_lies_behind_the_skipped_bytes() {
        let parts = [b"abc".to_vec(), Vec::new(), b"d".to_vec(), b"efgh".to_vec()];
        let whole = parts.concat();
        for skip in 0..=whole.len() {
            let slices: Vec<&[u8]> = rest(&parts, skip).collect();
            assert_eq!(slices.concat(), whole[skip..], "{skip}");
            assert!(slices.iter().all(|slice| !slice.is_empty()), "{skip}");
        }
    }

    #[test]
    fn the_table_is_bounded_and_places_are_used_again() {
        let mut sockets = Sockets::new(2, Waiting::InKernel);
        let (one, other) = UnixStream::pair().unwrap();
        let (third, _peer) = UnixStream::pair().unwrap();
        let first = sockets.add(one.into()).unwrap();
        assert_eq!(sockets.add(other.into()), Ok(SocketId(1)));
        assert_eq!(sockets.add(third.try_clone().unwrap().into()), Err(Errno::ENFILE));
        drop(sockets.remove(first));
        assert_eq!(sockets.add(third.into()), Ok(first));
    }

    #[test]
    fn only_streams_are_taken() {
        let mut sockets = Sockets::new(2, Waiting::Never);
        let datagram = UnixDatagram::unbound().unwrap();
        assert_eq!(sockets.add(datagram.into()), Err(Errno::ESOCKTNOSUPPORT));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(sockets.add(file.into()), Err(Errno::ENOTSOCK));
    }

    #[test]
    fn connections_over_tcp_are_set_up_for_replies_and_for_peers_that_vanish() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut sockets = Sockets::new(4, Waiting::Never);
        let listener = sockets.add(listener.into()).unwrap();
        let peer = std::net::TcpStream::connect(address).unwrap();
        let accepted = sockets.accept(listener).unwrap();
        let connected = sockets.add(peer.into()).unwrap();
        for socket in [accepted, connected] {
            let descriptor = sockets.descriptor(socket);
            assert_eq!(getsockopt(&descriptor, TcpNoDelay), Ok(true));
            assert_eq!(getsockopt(&descriptor, KeepAlive), Ok(true));
        }
        // Others are taken as they are.
        assert!(sockets.add(UnixStream::pair().unwrap().0.into()).is_ok());
    }

    #[test]
    #[should_panic(expected = "is taken")]
    fn a_place_is_taken_once() {
        let mut sockets = Sockets::new(1, Waiting::Never);
        let socket = sockets.add(UnixStream::pair().unwrap().0.into()).unwrap();
        sockets.begin(Place { socket, way: Way::In });
        sockets.begin(Place { socket, way: Way::Out });
        sockets.begin(Place { socket, way: Way::In });
    }

    #[test]
    #[should_panic(expected = "are in flight")]
    fn a_socket_in_use_is_not_removed() {
        let mut sockets = Sockets::new(1, Waiting::Never);
        let socket = sockets.add(UnixStream::pair().unwrap().0.into()).unwrap();
        sockets.begin(Place { socket, way: Way::Out });
        drop(sockets.remove(socket));
    }
}
