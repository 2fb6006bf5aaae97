//! The socket of a connection to an NBD server, and the bytes that have come and were not taken yet.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{
    KeepAlive, ReceiveTimeout, SendTimeout, TcpKeepCount, TcpKeepIdle, TcpKeepInterval, TcpNoDelay,
    TcpUserTimeout,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, connect, recv, sendmsg, setsockopt,
    shutdown, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::nbd::client::{Address, negotiation, transmission};
use crate::storage::open::errno_of;

/// A peer that is silent for so many seconds is asked whether it is still there, so often and with such pauses: one that dropped off the
/// network is noticed after a minute and a half.
const KEEP_ALIVE: [u32; 3] = [30, 10, 6];
/// The same where something was sent that the peer has not acknowledged, in milliseconds: then it is not asked, but sent the same again, which by itself
/// would go on for a quarter of an hour. It ends a connection, too, whose peer is there and has taken nothing for so long: a server whose disk has stood still for
/// minutes is given up like one that has vanished.
const UNACKNOWLEDGED: u32 = 300_000;

/// Why there is no connection.
#[derive(Clone, Debug)]
pub(super) enum ConnectError {
    /// The resolver gives no address for the host.
    Resolver(Arc<io::Error>),
    /// The system said so; `ETIMEDOUT` where nobody answered in time.
    System(Errno),
}

/// Where a server was found: what a name meant then. Asked again, it may mean another server.
#[derive(Clone, Copy, Debug)]
pub(super) enum Found {
    Tcp(SocketAddr),
    Unix(UnixAddr),
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Stream(OwnedFd);

impl Stream {
    /// Find a server and connect to it, until `deadline`. Looking a name up may take longer.
    pub(super) fn find(address: &Address, deadline: Instant) -> Result<(Self, Found), ConnectError> {
        let path = match address {
            Address::Tcp { host, port } => return tcp(host, *port, deadline),
            Address::Unix(path) => UnixAddr::new(path.as_path()),
            Address::Abstract(name) => UnixAddr::new_abstract(name),
        };
        let found = Found::Unix(path.map_err(ConnectError::System)?);
        Ok((Self::connect(&found, deadline)?, found))
    }

    /// Connect to a server that was found, until `deadline`.
    pub(super) fn connect(found: &Found, deadline: Instant) -> Result<Self, ConnectError> {
        match found {
            Found::Tcp(address) => Self::connect_tcp(address, deadline),
            Found::Unix(address) => Self::connect_unix(address, deadline),
        }
    }

    fn connect_tcp(address: &SocketAddr, deadline: Instant) -> Result<Self, ConnectError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ConnectError::System(Errno::ETIMEDOUT));
        }
        match TcpStream::connect_timeout(address, left) {
            Ok(stream) => {
                let stream = OwnedFd::from(stream);
                set_up(&stream).map_err(ConnectError::System)?;
                Ok(Self(stream))
            }
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                Err(ConnectError::System(Errno::ETIMEDOUT))
            }
            Err(error) => Err(ConnectError::System(errno_of(&error))),
        }
    }

    fn connect_unix(address: &UnixAddr, deadline: Instant) -> Result<Self, ConnectError> {
        let made = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        let stream = Self(made.map_err(ConnectError::System)?);
        // It bounds the time that a full backlog takes, too.
        stream.limit_until(deadline).map_err(ConnectError::System)?;
        match connect(stream.0.as_raw_fd(), address) {
            Ok(()) => Ok(stream),
            Err(Errno::EAGAIN) => Err(ConnectError::System(Errno::ETIMEDOUT)),
            Err(errno) => Err(ConnectError::System(errno)),
        }
    }

    /// Sending and receiving fail with `EAGAIN` when they wait beyond `deadline`.
    pub(super) fn limit_until(&self, deadline: Instant) -> Result<(), Errno> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::ETIMEDOUT);
        }
        self.limit(left.max(Duration::from_millis(1)))
    }

    /// From here on sending and receiving take as long as they take.
    pub(super) fn unlimited(&self) -> Result<(), Errno> {
        self.limit(Duration::ZERO)
    }

    fn limit(&self, time: Duration) -> Result<(), Errno> {
        let time = TimeVal::microseconds(i64::try_from(time.as_micros()).unwrap_or(i64::MAX));
        setsockopt(&self.0, ReceiveTimeout, &time)?;
        setsockopt(&self.0, SendTimeout, &time)
    }

    /// Send `header`, and `contents` behind it.
    pub(super) fn send_all(&self, header: &[u8], contents: &[u8]) -> Result<(), Errno> {
        let all = header.len() + contents.len();
        let mut sent = 0;
        while sent < all {
            let parts = [
                std::io::IoSlice::new(header.get(sent..).unwrap_or(&[])),
                std::io::IoSlice::new(&contents[sent.saturating_sub(header.len())..]),
            ];
            match sendmsg::<()>(self.0.as_raw_fd(), &parts, &[], MsgFlags::MSG_NOSIGNAL, None) {
                Ok(count) => sent += count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Send it if that is possible at once: for a farewell, which nobody answers.
    pub(super) fn try_send(&self, bytes: &[u8]) {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        if let Err(errno) = nix::sys::socket::send(self.0.as_raw_fd(), bytes, flags) {
            tracing::debug!(%errno, "no farewell");
        }
    }

    /// Receive some bytes; 0: the peer has ended. `whole`: rather all of them than some.
    fn receive(&self, into: &mut [u8], whole: bool) -> Result<usize, Errno> {
        let flags = if whole { MsgFlags::MSG_WAITALL } else { MsgFlags::empty() };
        loop {
            match recv(self.0.as_raw_fd(), into, flags) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }

    /// Both ways are over, for whoever waits on them as well.
    pub(super) fn shut_down(&self) {
        if let Err(errno) = shutdown(self.0.as_raw_fd(), Shutdown::Both) {
            tracing::debug!(%errno, "the connection had ended");
        }
    }
}

fn tcp(host: &str, port: u16, deadline: Instant) -> Result<(Stream, Found), ConnectError> {
    let unresolved = |error| ConnectError::Resolver(Arc::new(error));
    let addresses: Vec<_> = (host, port).to_socket_addrs().map_err(unresolved)?.collect();
    first_of(&addresses, deadline)
        .unwrap_or_else(|| Err(unresolved(io::Error::new(io::ErrorKind::NotFound, "it has no address"))))
}

/// Connect to the first of `addresses` that answers; `None`: there are none. Each has its share of the time that is left: one where packets vanish leaves
/// some for the others.
fn first_of(addresses: &[SocketAddr], deadline: Instant) -> Option<Result<(Stream, Found), ConnectError>> {
    let mut failed = None;
    for (tried, address) in addresses.iter().enumerate() {
        let now = Instant::now();
        let still_to_try = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        let share = deadline.saturating_duration_since(now) / still_to_try;
        match Stream::connect_tcp(address, now + share) {
            Ok(stream) => return Some(Ok((stream, Found::Tcp(*address)))),
            Err(error) => failed = Some(Err(error)),
        }
    }
    failed
}

fn set_up(stream: &OwnedFd) -> Result<(), Errno> {
    let [idle, interval, count] = KEEP_ALIVE;
    setsockopt(stream, TcpNoDelay, &true)?;
    setsockopt(stream, KeepAlive, &true)?;
    setsockopt(stream, TcpKeepIdle, &idle)?;
    setsockopt(stream, TcpKeepInterval, &interval)?;
    setsockopt(stream, TcpKeepCount, &count)?;
    setsockopt(stream, TcpUserTimeout, &UNACKNOWLEDGED)
}

/// Bytes of an inbox: what the machines need to see at once, and enough that small replies take few system calls. More would be copied
/// needlessly, where contents follow.
const INBOX_BYTES: usize = 8192;
const _: () = assert!(INBOX_BYTES >= negotiation::MAX_NEEDED && INBOX_BYTES >= transmission::MAX_NEEDED);

/// What has come and was not taken yet.
#[derive(Debug)]
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; INBOX_BYTES].into(), start: 0, end: 0 }
    }

    /// What has come.
    pub(super) fn waiting(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// So many bytes were taken.
    pub(super) fn take(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end, "took what had not come");
    }

    /// Receive until `needed` bytes are waiting, as long as that takes. `false`: the peer has ended before.
    pub(super) fn fill(&mut self, stream: &Stream, needed: usize) -> Result<bool, Errno> {
        self.fill_until(stream, needed, None)
    }

    /// As [`Self::fill`], until `deadline` if there is one: `ETIMEDOUT` or `EAGAIN` then, also with a peer that sends a byte now and then.
    pub(super) fn fill_until(
        &mut self,
        stream: &Stream,
        needed: usize,
        deadline: Option<Instant>,
    ) -> Result<bool, Errno> {
        assert!(needed <= self.bytes.len(), "{needed} bytes at once");
        while self.end - self.start < needed {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            deadline.map_or(Ok(()), |deadline| stream.limit_until(deadline))?;
            match stream.receive(&mut self.bytes[self.end..], false)? {
                0 => return Ok(false),
                count => self.end += count,
            }
        }
        Ok(true)
    }

    /// Move the next bytes of the stream to `into`, all of it. `false`: the peer has ended before.
    pub(super) fn read_exact(&mut self, stream: &Stream, into: &mut [u8]) -> Result<bool, Errno> {
        let mut filled = into.len().min(self.end - self.start);
        into[..filled].copy_from_slice(&self.bytes[self.start..self.start + filled]);
        self.take(filled);
        while filled < into.len() {
            match stream.receive(&mut into[filled..], true)? {
                0 => return Ok(false),
                count => filled += count,
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::sys::socket::{Backlog, getsockopt, listen};

    use super::*;

    /// An address where nobody accepts, and the backlog is full: packets vanish. With what keeps it so.
    fn black_hole() -> (SocketAddr, TcpListener, Vec<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let short = Duration::from_millis(200);
        let mut kept = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, short) {
            assert!(kept.len() < 64, "its backlog is never full");
            kept.push(stream);
        }
        (address, listener, kept)
    }

    #[test]
    fn an_address_that_does_not_answer_leaves_time_for_the_others() {
        let (nowhere, _listener, _kept) = black_hole();
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = here.local_addr().unwrap();
        let start = Instant::now();
        let found = first_of(&[nowhere, address], start + Duration::from_secs(10)).unwrap();
        let Ok((_, Found::Tcp(found))) = found else { panic!("{found:?}") };
        assert_eq!(found, address);
        assert!(start.elapsed() >= Duration::from_millis(4900), "half of the time: {:?}", start.elapsed());
        let start = Instant::now();
        let failed = first_of(&[nowhere, nowhere], start + Duration::from_millis(400)).unwrap();
        assert!(matches!(failed, Err(ConnectError::System(Errno::ETIMEDOUT))), "{failed:?}");
        assert!(start.elapsed() >= Duration::from_millis(390));
        assert!(first_of(&[], start).is_none());
    }

    /// No test can make packets vanish here; this is what the system is told.
    #[test]
    fn what_was_sent_and_is_not_acknowledged_is_given_up_in_time() {
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        let stream = Stream::connect_tcp(&here.local_addr().unwrap(), deadline).unwrap();
        assert_eq!(getsockopt(&stream.0, TcpUserTimeout), Ok(300_000));
        assert_eq!(getsockopt(&stream.0, TcpKeepIdle), Ok(30));
    }
}
