//! What rings do with sockets that shows in the process as a whole: its descriptors, its limits, its signals. One test at a time.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use engine::ring::select::{RingConfig, SetupError};
use engine::ring::threads::ThreadsRing;
use engine::ring::uring::UringRing;
use engine::ring::{Completion, Op, Output, Ring, SocketId, Token, Wait};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{AcceptConn, SockType, TcpNoDelay};
use parking_lot::{Mutex, MutexGuard};

/// Held by the test that runs.
static ALONE: Mutex<()> = Mutex::new(());

fn config(sockets: usize) -> RingConfig {
    RingConfig { arena_bytes: 1 << 20, capacity: 8, threads: 2, sockets }
}

trait RealRing: Ring<Socket = OwnedFd> + Sized {
    fn open(config: &RingConfig) -> Result<Self, SetupError>;
}

impl RealRing for UringRing {
    fn open(config: &RingConfig) -> Result<Self, SetupError> {
        Self::new(config)
    }
}

impl RealRing for ThreadsRing {
    fn open(config: &RingConfig) -> Result<Self, SetupError> {
        Self::new(config)
    }
}

/// Run a check over both rings, alone in the process.
macro_rules! over_both {
    ($($check:ident),* $(,)?) => {
        $(
            #[test]
            fn $check() {
                let _alone: MutexGuard<'_, ()> = ALONE.lock();
                match UringRing::new(&config(1)) {
                    Ok(ring) => {
                        drop(ring);
                        checks::$check::<UringRing>();
                    }
                    Err(refusal) => eprintln!("skipped: io_uring: {refusal}"),
                }
                checks::$check::<ThreadsRing>();
            }
        )*
    };
}

over_both! {
    nothing_is_left_open,
    as_many_connections_as_there_are_places,
    descriptors_are_not_inherited_and_do_not_delay,
    a_process_without_descriptors_left_accepts_later,
    no_signal_for_a_peer_that_has_gone,
    sockets_that_do_not_wait_are_taken,
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The kernel closes what belonged to a ring a moment after the ring.
fn settles(mut done: impl FnMut() -> bool) -> bool {
    (0..500).any(|_| {
        if !done() {
            std::thread::sleep(Duration::from_millis(10));
            return false;
        }
        true
    })
}

fn complete<R: Ring>(ring: &mut R, count: usize) -> Vec<Completion> {
    let mut completions = Vec::new();
    let deadline = ring.now().after(Duration::from_secs(30));
    while completions.len() < count {
        assert!(ring.now() < deadline, "hung with {} of {count}", completions.len());
        ring.wait(Wait::Until(deadline), &mut completions).unwrap();
    }
    completions
}

fn run<R: Ring>(ring: &mut R, op: Op) -> Result<Output, Errno> {
    ring.push(Token(1), op);
    complete(ring, 1).remove(0).result
}

fn accept<R: Ring>(ring: &mut R, listener: SocketId) -> SocketId {
    match run(ring, Op::Accept { listener }) {
        Ok(Output::Accepted(socket)) => socket,
        other => panic!("{other:?}"),
    }
}

mod checks {
    use super::*;

    /// Thousands of connections come and go, by all ways to go; a ring that is dropped lets go of the others.
    pub(super) fn nothing_is_left_open<R: RealRing>() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let before = descriptors();
        let mut ring = R::open(&config(8)).unwrap();
        let listener = ring.add_socket(UnixListener::bind(&path).unwrap().into()).unwrap();
        let with_ring = descriptors();
        for round in 0..1000 {
            let mut peer = UnixStream::connect(&path).unwrap();
            let socket = accept(&mut ring, listener);
            ring.push(
                Token(2),
                Op::Receive { socket, buffer: vec![0; 100], filled: 0, whole: round % 2 == 0 },
            );
            ring.wait(Wait::Poll, &mut Vec::new()).unwrap();
            match round % 4 {
                0 => ring.shutdown_socket(socket),
                1 => drop(peer),
                2 => ring.push(Token(3), Op::Cancel { target: Token(2) }),
                _ => peer.write_all(&[1; 1000]).unwrap(),
            }
            complete(&mut ring, if round % 4 == 2 { 2 } else { 1 });
            ring.remove_socket(socket);
        }
        assert!(settles(|| descriptors() == with_ring), "{} and {with_ring}", descriptors());
        let _peers: Vec<UnixStream> = (0..5)
            .map(|token| {
                let peer = UnixStream::connect(&path).unwrap();
                let socket = accept(&mut ring, listener);
                ring.push(
                    Token(10 + token),
                    Op::Receive { socket, buffer: vec![0; 100], filled: 0, whole: true },
                );
                peer
            })
            .collect();
        ring.push(Token(2), Op::Accept { listener });
        ring.wait(Wait::Poll, &mut Vec::new()).unwrap();
        // Accepted, perhaps, and never asked for.
        let _last = UnixStream::connect(&path).unwrap();
        drop(ring);
        assert!(settles(|| descriptors() == before + 6), "{} and {before}", descriptors());
    }

    /// The configuration says how many descriptors it takes to have a connection in every place.
    pub(super) fn as_many_connections_as_there_are_places<R: RealRing>() {
        const PLACES: usize = 1026;
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // Those of the peers are in this process, too.
        let needed = config(PLACES).descriptors() + PLACES as u64;
        if hard < needed {
            eprintln!("skipped: {PLACES} connections: the limit on open files is {hard}");
            return;
        }
        setrlimit(Resource::RLIMIT_NOFILE, needed, hard).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut ring = R::open(&config(PLACES)).unwrap();
        let paths = ["one", "other"].map(|name| directory.path().join(name));
        let listeners =
            paths.clone().map(|path| ring.add_socket(UnixListener::bind(path).unwrap().into()).unwrap());
        let mut peers = Vec::new();
        for index in 2..PLACES {
            peers.push(UnixStream::connect(&paths[index % 2]).unwrap());
            let socket = accept(&mut ring, listeners[index % 2]);
            assert_eq!(usize::from(socket.0), index);
            let take = Op::Receive { socket, buffer: vec![0; 64], filled: 0, whole: true };
            ring.push(Token(u64::from(socket.0)), take);
        }
        for listener in listeners {
            ring.push(Token(u64::from(listener.0)), Op::Accept { listener });
        }
        // All of them at once: every place is in use, and everything completes in one go.
        ring.wait(Wait::Poll, &mut Vec::new()).unwrap();
        for index in 2..PLACES {
            let socket = SocketId(u16::try_from(index).unwrap());
            let answer = Op::Send { socket, parts: vec![vec![1; 64]], skip: 0 };
            ring.push(Token(1 << 32 | index as u64), answer);
        }
        for peer in &mut peers {
            peer.write_all(&[2; 64]).unwrap();
        }
        let completions = complete(&mut ring, 2 * (PLACES - 2));
        assert!(completions.iter().all(|completion| completion.result.is_ok()));
        for peer in &mut peers {
            let mut answer = [0; 64];
            peer.read_exact(&mut answer).unwrap();
            assert_eq!(answer, [1; 64]);
        }
        drop(ring);
        drop(peers);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    }

    /// Sockets, those that come from elsewhere too, are closed when another program is executed; TCP ones send at once.
    pub(super) fn descriptors_are_not_inherited_and_do_not_delay<R: RealRing>() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut ring = R::open(&config(8)).unwrap();
        let inherited = |socket: OwnedFd| {
            fcntl(&socket, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
            socket
        };
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let unix = ring.add_socket(inherited(UnixListener::bind(&path).unwrap().into())).unwrap();
        let tcp = ring.add_socket(inherited(tcp.into())).unwrap();
        let before = sockets();
        let peers = (
            UnixStream::connect(&path).unwrap(),
            std::net::TcpStream::connect(address).unwrap(),
            std::net::TcpStream::connect(address).unwrap(),
        );
        peers.1.set_nodelay(true).unwrap();
        peers.2.set_nodelay(true).unwrap();
        accept(&mut ring, unix);
        accept(&mut ring, tcp);
        // One that comes from elsewhere.
        let connector = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let given = std::net::TcpStream::connect(connector.local_addr().unwrap()).unwrap();
        ring.add_socket(inherited(given.into())).unwrap();
        drop(connector);
        let (listening, connected): (Vec<_>, Vec<_>) = sockets().into_iter().partition(|fd| {
            // SAFETY: just listed, and nobody closes it meanwhile: tests run one at a time.
            getsockopt(&unsafe { BorrowedFd::borrow_raw(*fd) }, AcceptConn).unwrap()
        });
        assert_eq!((listening.len(), connected.len()), (before.len(), 6));
        for fd in listening.into_iter().chain(connected.clone()) {
            // SAFETY: as above.
            let socket = unsafe { BorrowedFd::borrow_raw(fd) };
            assert_eq!(fcntl(socket, FcntlArg::F_GETFD), Ok(libc::FD_CLOEXEC));
        }
        let delays = |fd: &i32| {
            // SAFETY: as above.
            getsockopt(&unsafe { BorrowedFd::borrow_raw(*fd) }, TcpNoDelay) == Ok(false)
        };
        assert_eq!(connected.iter().filter(|fd| delays(fd)).count(), 0);
        drop(peers);
    }

    /// Numbers of all stream sockets of the process.
    fn sockets() -> Vec<i32> {
        let names = std::fs::read_dir("/proc/self/fd").unwrap();
        let numbers: Vec<i32> =
            names.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
        numbers
            .into_iter()
            .filter(|fd| {
                // SAFETY: used for one question, which does no harm if it was closed.
                let descriptor = unsafe { BorrowedFd::borrow_raw(*fd) };
                getsockopt(&descriptor, SockType) == Ok(nix::sys::socket::SockType::Stream)
            })
            .collect()
    }

    /// Without a descriptor left, an accept fails and the connection waits: it is accepted when there is one.
    pub(super) fn a_process_without_descriptors_left_accepts_later<R: RealRing>() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let mut ring = R::open(&config(8)).unwrap();
        let listener = ring.add_socket(UnixListener::bind(&path).unwrap().into()).unwrap();
        let mut peer = UnixStream::connect(&path).unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // The lowest free number is beyond the limit.
        let highest = peer.as_raw_fd().max(ring_highest());
        setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(highest).unwrap() + 1, hard).unwrap();
        let mut fillers = Vec::new();
        while let Ok(filler) = std::fs::File::open("/dev/null") {
            fillers.push(filler);
        }
        let refused = [0, 1].map(|_| run(&mut ring, Op::Accept { listener }));
        drop(fillers);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert_eq!(refused, [Err(Errno::EMFILE), Err(Errno::EMFILE)]);
        let socket = accept(&mut ring, listener);
        peer.write_all(b"hello").unwrap();
        let take = Op::Receive { socket, buffer: vec![0; 5], filled: 0, whole: true };
        assert_eq!(run(&mut ring, take), Ok(Output::Received { buffer: b"hello".to_vec(), bytes: 5 }));
    }

    fn ring_highest() -> i32 {
        let names = std::fs::read_dir("/proc/self/fd").unwrap();
        names.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).max().unwrap()
    }

    /// A program that does not ignore `SIGPIPE` lives on.
    pub(super) fn no_signal_for_a_peer_that_has_gone<R: RealRing>() {
        static PIPES: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn count(_: libc::c_int) {
            PIPES.fetch_add(1, Ordering::SeqCst);
        }
        let handler: extern "C" fn(libc::c_int) = count;
        // SAFETY: all-zero is a valid `sigaction`: no flags, nothing masked.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as usize;
        // SAFETY: `action` is initialised, the handler counts and does nothing else.
        assert_eq!(unsafe { libc::sigaction(libc::SIGPIPE, &raw const action, std::ptr::null_mut()) }, 0);
        let mut ring = R::open(&config(2)).unwrap();
        let (socket, peer) = UnixStream::pair().unwrap();
        let socket = ring.add_socket(socket.into()).unwrap();
        drop(peer);
        for parts in [vec![vec![1; 10]], vec![vec![1; 10], vec![2; 10]]] {
            assert_eq!(run(&mut ring, Op::Send { socket, parts, skip: 0 }), Err(Errno::EPIPE));
        }
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(PIPES.load(Ordering::SeqCst), 0);
    }

    /// It does not matter in which mode a socket is given to a ring.
    pub(super) fn sockets_that_do_not_wait_are_taken<R: RealRing>() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        for nonblocking in [true, false] {
            let mut ring = R::open(&config(4)).unwrap();
            let listener = UnixListener::bind(&path).unwrap();
            listener.set_nonblocking(nonblocking).unwrap();
            let listener = ring.add_socket(listener.into()).unwrap();
            let (socket, mut peer) = UnixStream::pair().unwrap();
            socket.set_nonblocking(nonblocking).unwrap();
            let socket = ring.add_socket(socket.into()).unwrap();
            ring.push(Token(1), Op::Accept { listener });
            ring.push(Token(2), Op::Receive { socket, buffer: vec![0; 1], filled: 0, whole: false });
            ring.push(Token(3), Op::Send { socket, parts: vec![vec![7; 32 << 20]], skip: 0 });
            let mut completions = Vec::new();
            let until = ring.now().after(Duration::from_millis(50));
            while ring.now() < until {
                ring.wait(Wait::Until(until), &mut completions).unwrap();
            }
            // The send may be short, but must not fail.
            assert!(completions.iter().all(|one| one.token == Token(3) && one.result.is_ok()), "they wait");
            let sends = completions.len();
            let _other = UnixStream::connect(&path).unwrap();
            peer.write_all(b"x").unwrap();
            let reader = std::thread::spawn(move || std::io::copy(&mut peer, &mut std::io::sink()).unwrap());
            for completion in complete(&mut ring, 3 - sends) {
                assert!(completion.result.is_ok(), "{:?}", completion.result.map(drop));
            }
            drop(ring);
            assert!(reader.join().unwrap() > 0);
            std::fs::remove_file(&path).unwrap();
        }
    }
}
