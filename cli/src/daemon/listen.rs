//! Sockets that the daemon listens on: made with mode 0600, taken over when nobody answers on them, removed at the end.
//!
//! # Order
//! A socket has its mode before it is bound, so there is no moment at which others may connect. (A file mode mask would be the whole process's, and
//! other threads create files.) A path where something stands is tried first: a socket on which nobody answers is left over and goes, anything else
//! is refused. Trying never waits: where the backlog is full somebody listens.
//!
//! A socket that is bound and not listened on yet looks like one that is left over, and of two daemons that find the same one left over, the
//! second would remove what the first has made. So each has a [`Claim`] on the path from its first look until it listens.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, bind, connect,
    getsockname, listen as listen_on, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// The port of NBD.
pub(crate) const NBD_PORT: u16 = 10809;

/// How long the claim of another daemon on a path may last, and how often it is looked at.
const CLAIM_PATIENCE: Duration = Duration::from_secs(2);
const CLAIM_PAUSE: Duration = Duration::from_millis(5);
/// How long it may last when a socket is removed.
const DROP_PATIENCE: Duration = Duration::from_millis(100);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `tcp:[HOST:]PORT`
    Tcp {
        /// A name or an address.
        host: String,
        /// 0: any.
        port: u16,
    },
}

impl Endpoint {
    /// As users write it.
    ///
    /// # Errors
    /// What is wrong with it, in one line.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("there is no path; write it as unix:PATH".into()),
                _ => Ok(Self::Unix(path.into())),
            };
        }
        let Some(address) = text.strip_prefix("tcp:") else {
            return Err("it names no kind of socket; write it as unix:PATH or tcp:[HOST:]PORT".into());
        };
        let (host, port) = match address.rsplit_once(':') {
            Some((host, port)) => (host.trim_start_matches('[').trim_end_matches(']'), port),
            None => ("", address),
        };
        let port = match port {
            "" => NBD_PORT,
            _ => port.parse().map_err(|_| format!("'{port}' is no port; choose 0 to 65535"))?,
        };
        // Whoever wants to be reached from elsewhere says so.
        let host = if host.is_empty() { Ipv4Addr::LOCALHOST.to_string() } else { host.to_owned() };
        Ok(Self::Tcp { host, port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// A bound socket of either kind.
#[derive(Debug)]
pub(crate) enum Listener {
    /// On a path.
    Unix(UnixListener),
    /// On a port.
    Tcp(TcpListener),
}

/// The right to take a path over, among daemons: a lock on the file `PATH.lock`, which is there for as long as that, for moments.
#[derive(Debug)]
struct Claim {
    /// Closed after the file is removed: whoever waits for the lock finds that it is no more.
    _lock: Flock<File>,
    path: PathBuf,
}

impl Claim {
    /// Have it within `patience`.
    fn take(socket: &Path, patience: Duration) -> io::Result<Self> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let deadline = Instant::now() + patience;
        loop {
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(flags)
                .open(&path)?;
            let opened = file.metadata()?;
            if !opened.is_file() || opened.len() > 0 {
                return Err(io::Error::other(format!("{} is no lock file of a daemon", path.display())));
            }
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // The one before may have removed it meanwhile: then there is nothing that the lock is on.
                let ours = std::fs::symlink_metadata(&path)
                    .is_ok_and(|found| (found.dev(), found.ino()) == (opened.dev(), opened.ino()));
                if ours {
                    return Ok(Self { _lock: lock, path });
                }
            }
            if Instant::now() >= deadline {
                let reason = format!("another program has locked {}; try again", path.display());
                return Err(io::Error::other(reason));
            }
            std::thread::sleep(CLAIM_PAUSE);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // It stays where that fails, which does no harm.
        std::fs::remove_file(&self.path).ok();
    }
}

/// A path that is removed with this, if it still is the socket that was bound there.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Lest another takes it over between the look and the removal. Without it that is unlikely enough.
        let _claim = Claim::take(&self.path, DROP_PATIENCE);
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours {
            // Gone already, or not ours to remove: nothing is left to do.
            std::fs::remove_file(&self.path).ok();
        }
    }
}

/// Listen at `endpoint`; the file stands for as long as what is returned beside the socket.
///
/// # Errors
/// Why not, in one line.
pub(crate) fn listen(endpoint: &Endpoint) -> Result<(Listener, Option<SocketFile>), String> {
    match endpoint {
        Endpoint::Unix(path) => {
            let (listener, file) = listen_unix(path)?;
            Ok((Listener::Unix(listener), Some(file)))
        }
        Endpoint::Tcp { host, port } => listen_tcp(host, *port).map(|tcp| (Listener::Tcp(tcp), None)),
    }
}

/// Listen on a path.
///
/// # Errors
/// Why not, in one line.
pub(crate) fn listen_unix(path: &Path) -> Result<(UnixListener, SocketFile), String> {
    let failed = |error: io::Error| {
        let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
        match directory.filter(|directory| error.kind() == ErrorKind::NotFound && !directory.exists()) {
            Some(directory) => {
                let (path, directory) = (path.display(), directory.display());
                format!("cannot listen on {path}: the directory {directory} does not exist; create it first")
            }
            None => {
                // It is not the system that finds it too long.
                let advice = match error.kind() {
                    ErrorKind::InvalidInput => "; choose a path of 107 bytes at most",
                    _ => "",
                };
                format!("cannot listen on {}: {}{advice}", path.display(), crate::out::reason(&error))
            }
        }
    };
    let claim = Claim::take(path, CLAIM_PATIENCE).map_err(failed)?;
    let listener = match bind_unix(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            remove_left_over(path)?;
            bind_unix(path).map_err(failed)?
        }
        bound => bound.map_err(failed)?,
    };
    let made = std::fs::symlink_metadata(path).map_err(failed)?;
    drop(claim);
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    Ok((listener, SocketFile { path, device: made.dev(), inode: made.ino() }))
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen_on(&socket, Backlog::MAXALLOWABLE)?;
    Ok(socket.into())
}

/// Remove a socket on which nobody answers.
fn remove_left_over(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let found = std::fs::symlink_metadata(path)
        .map_err(|error| format!("cannot look at {shown}: {}", crate::out::reason(&error)))?;
    if !found.file_type().is_socket() {
        return Err(format!("cannot listen on {shown}: something other than a socket stands there"));
    }
    match is_answered(path) {
        Ok(false) => std::fs::remove_file(path).map_err(|error| {
            format!("cannot remove {shown}, on which nobody answers: {}", crate::out::reason(&error))
        }),
        Err(error) => {
            Err(format!("cannot tell whether somebody answers on {shown}: {}", crate::out::reason(&error)))
        }
        Ok(true) => {
            Err(format!("cannot listen on {shown}: another program does; stop it, or choose another path"))
        }
    }
}

/// Whether somebody listens on a socket, without waiting for him.
fn is_answered(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        // He has more to accept than he does.
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn listen_tcp(host: &str, port: u16) -> Result<TcpListener, String> {
    let shown = Endpoint::Tcp { host: host.to_owned(), port };
    let addresses: Vec<SocketAddr> = match host.parse::<IpAddr>() {
        Ok(address) => vec![(address, port).into()],
        Err(_) => {
            let found = (host, port).to_socket_addrs();
            found
                .map_err(|error| {
                    format!("address resolution failed for {host}:{port}: {}", crate::out::reason(&error))
                })?
                .collect()
        }
    };
    TcpListener::bind(&addresses[..]).map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => "; stop the program that does, or choose another port",
            ErrorKind::AddrNotAvailable => "; name an address of this host",
            _ => "",
        };
        format!("cannot listen on {shown}: {}{advice}", crate::out::reason(&error))
    })
}

/// The first descriptor that a service manager hands over.
const FIRST_DESCRIPTOR: RawFd = 3;

/// The listening socket that whoever started this process made for it (`LISTEN_PID`, `LISTEN_FDS`), if there is one. To be called before
/// anything else is opened, which might take its number.
///
/// # Errors
/// When what was handed over cannot be used.
pub(crate) fn activated() -> Result<Option<Listener>, String> {
    let variable = |name: &str| std::env::var(name).ok();
    let Some(count) = activated_count(variable, std::process::id())? else { return Ok(None) };
    if count != 1 {
        return Err(format!("{count} sockets were handed over (LISTEN_FDS); one is wanted, for NBD"));
    }
    let refused = |what: &str| format!("descriptor {FIRST_DESCRIPTOR} (LISTEN_FDS) {what}");
    // SAFETY: a number is asked about, whatever it means; nothing is kept.
    let there = unsafe { BorrowedFd::borrow_raw(FIRST_DESCRIPTOR) };
    fcntl(there, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|_| refused("is not open"))?;
    // SAFETY: it is open, and by the protocol of LISTEN_FDS it was opened for this process before that started; nothing else in it has opened
    // anything yet, since this is called once and first of all.
    let fd = unsafe { OwnedFd::from_raw_fd(FIRST_DESCRIPTOR) };
    let listens = nix::sys::socket::getsockopt(&fd, nix::sys::socket::sockopt::AcceptConn);
    if listens != Ok(true) {
        return Err(refused("is no listening socket"));
    }
    let address: SockaddrStorage = getsockname(fd.as_raw_fd())
        .map_err(|errno| refused(&format!("cannot be asked for its address: {errno}")))?;
    match address.family() {
        Some(AddressFamily::Unix) => Ok(Some(Listener::Unix(fd.into()))),
        Some(AddressFamily::Inet | AddressFamily::Inet6) => Ok(Some(Listener::Tcp(fd.into()))),
        _ => Err(refused("is neither a unix nor a TCP socket")),
    }
}

/// How many sockets are for the process `own`.
fn activated_count(variable: impl Fn(&str) -> Option<String>, own: u32) -> Result<Option<u32>, String> {
    let (Some(process), Some(count)) = (variable("LISTEN_PID"), variable("LISTEN_FDS")) else {
        return Ok(None);
    };
    let process: u32 =
        process.parse().map_err(|_| format!("LISTEN_PID is '{process}', which is no number"))?;
    if process != own {
        // For another process, from which they were inherited.
        return Ok(None);
    }
    count.parse().map(Some).map_err(|_| format!("LISTEN_FDS is '{count}', which is no number"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn endpoints_as_users_write_them() {
        let tcp = |host: &str, port| Ok(Endpoint::Tcp { host: host.into(), port });
        assert_eq!(Endpoint::parse("unix:/run/x"), Ok(Endpoint::Unix("/run/x".into())));
        assert_eq!(Endpoint::parse("tcp:10809"), tcp("127.0.0.1", 10809));
        assert_eq!(Endpoint::parse("tcp::0"), tcp("127.0.0.1", 0));
        assert_eq!(Endpoint::parse("tcp:"), tcp("127.0.0.1", 10809));
        assert_eq!(Endpoint::parse("tcp:0.0.0.0:7"), tcp("0.0.0.0", 7));
        assert_eq!(Endpoint::parse("tcp:[::1]:7"), tcp("::1", 7));
        assert_eq!(Endpoint::parse("tcp:[::1]:7").expect("an endpoint").to_string(), "tcp:[::1]:7");
        for wrong in ["", "/run/x", "unix:", "tcp:host:port", "tcp:70000"] {
            assert!(Endpoint::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sockets_are_the_owners_alone_and_go_with_their_listener() {
        let there = tempfile::tempdir().expect("a directory");
        let path = there.path().join("socket");
        let (_listener, file) = listen_unix(&path).expect("listens");
        assert_eq!(std::fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_is_missing_is_named() {
        let there = tempfile::tempdir().expect("a directory");
        let directory = there.path().join("missing");
        let why = listen_unix(&directory.join("socket")).expect_err("no directory");
        let told = format!("the directory {} does not exist; create it first", directory.display());
        assert!(why.ends_with(&told), "{why}");
    }

    #[test]
    fn only_sockets_on_which_nobody_answers_are_taken_over() {
        let there = tempfile::tempdir().expect("a directory");
        let path = there.path().join("socket");
        let (listener, file) = listen_unix(&path).expect("listens");
        assert!(listen_unix(&path).expect_err("somebody answers").contains("another program"));
        std::mem::forget(file);
        drop(listener);
        let (_second, second_file) = listen_unix(&path).expect("nobody answers any more");

        // What took its place stays.
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "mine").expect("written");
        drop(second_file);
        assert!(listen_unix(&path).expect_err("a file").contains("other than a socket"));
        assert_eq!(std::fs::read(&path).expect("still there"), b"mine");
    }

    /// Each finds the one that is left over, and one of them has it in the end.
    #[test]
    fn of_those_who_take_over_the_same_socket_one_has_it() {
        const MANY: usize = 4;
        let there = tempfile::tempdir().expect("a directory");
        let path = there.path().join("socket");
        for round in 0..50 {
            drop(UnixListener::bind(&path).expect("left over"));
            let start = Barrier::new(MANY);
            let listens = || {
                start.wait();
                listen_unix(&path)
            };
            let results: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..MANY).map(|_| scope.spawn(listens)).collect();
                threads.into_iter().map(|thread| thread.join().expect("unharmed")).collect()
            });
            let (listening, refused): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
            assert_eq!(listening.len(), 1, "round {round}: {refused:?}");
            for refused in refused {
                assert!(refused.expect_err("refused").contains("another program does"));
            }
            assert!(is_answered(&path).expect("it can be tried"), "round {round}: his socket is gone");
            drop(listening);
            let left = std::fs::read_dir(there.path()).expect("read").count();
            assert_eq!(left, 0, "round {round}");
        }
    }

    /// Until it listens, what it has made looks left over.
    #[test]
    fn whoever_is_about_to_listen_is_waited_for() {
        let there = tempfile::tempdir().expect("a directory");
        let path = there.path().join("socket");
        let made = UnixListener::bind(&path).expect("bound");
        drop(made);
        let held = Claim::take(&path, Duration::ZERO).expect("free");
        let (sender, told) = std::sync::mpsc::channel();
        let other = path.clone();
        std::thread::spawn(move || sender.send(listen_unix(&other)));
        assert!(told.recv_timeout(Duration::from_millis(100)).is_err(), "it waits");
        drop(held);
        let listening = told.recv_timeout(Duration::from_secs(10)).expect("it goes on").expect("it listens");
        assert!(is_answered(&path).expect("it can be tried"));
        drop(listening);
    }

    #[test]
    fn somebody_who_does_not_accept_is_there_and_nobody_waits_for_him() {
        let there = tempfile::tempdir().expect("a directory");
        let path = there.path().join("socket");
        let busy = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("one");
        bind(busy.as_raw_fd(), &UnixAddr::new(&path).expect("an address")).expect("bound");
        listen_on(&busy, Backlog::new(1).expect("small")).expect("listens");
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let mut waiting = Vec::new();
        loop {
            let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).expect("one");
            match connect(client.as_raw_fd(), &UnixAddr::new(&path).expect("an address")) {
                Ok(()) => waiting.push(client),
                Err(errno) => break assert_eq!(errno, Errno::EAGAIN),
            }
            assert!(waiting.len() < 100, "its backlog has an end");
        }
        let (sender, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(listen_unix(&path).map(drop)));
        let told = told.recv_timeout(Duration::from_secs(10)).expect("nobody waits");
        assert!(told.expect_err("somebody is there").contains("another program does"));
    }

    #[test]
    fn what_looks_like_a_lock_and_is_none_stays() {
        let there = tempfile::tempdir().expect("a directory");
        let (path, lock) = (there.path().join("socket"), there.path().join("socket.lock"));
        std::fs::write(&lock, "mine").expect("written");
        let told = listen_unix(&path).expect_err("no lock file");
        assert!(told.ends_with("socket.lock is no lock file of a daemon"), "{told}");
        assert_eq!(std::fs::read(&lock).expect("still there"), b"mine");
        // One that was left behind, or that another has.
        std::fs::write(&lock, "").expect("written");
        let held = Claim::take(&path, Duration::ZERO).expect("free");
        assert!(Claim::take(&path, Duration::ZERO).expect_err("held").to_string().contains("has locked"));
        drop(held);
        assert!(listen_unix(&path).is_ok() && !lock.exists());
    }

    #[test]
    fn sockets_handed_over_are_for_the_process_that_is_named() {
        let count = |process: Option<&str>, sockets: Option<&str>| {
            let variable = |name: &str| match name {
                "LISTEN_PID" => process.map(str::to_owned),
                _ => sockets.map(str::to_owned),
            };
            activated_count(variable, 7)
        };
        assert_eq!(count(Some("7"), Some("1")), Ok(Some(1)));
        assert_eq!(count(Some("8"), Some("1")), Ok(None));
        assert_eq!(count(None, Some("1")), Ok(None));
        assert_eq!(count(Some("7"), None), Ok(None));
        assert!(count(Some("x"), Some("1")).is_err() && count(Some("7"), Some("x")).is_err());
    }
}
