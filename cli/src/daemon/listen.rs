//! Sockets that the daemon listens on: made with mode 0600, taken over when nobody answers on them, removed at the end.
//!
//! # Order
//! A socket has its mode before it is bound, so there is no moment at which others may connect. (A file mode mask would be the whole process's, and
//! other threads create files.) A path where something stands is tried first: a socket on which nobody answers is left over and goes, anything else is refused.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, bind, getsockname,
    listen as listen_on, socket,
};
use nix::sys::stat::{Mode, fchmod};

/// The port of NBD.
pub(crate) const NBD_PORT: u16 = 10809;

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

/// A path that is removed with this, if it still is the socket that was bound there.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
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
            None => format!("cannot listen on {}: {}", path.display(), crate::out::reason(&error)),
        }
    };
    let listener = match bind_unix(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            remove_left_over(path)?;
            bind_unix(path).map_err(failed)?
        }
        bound => bound.map_err(failed)?,
    };
    let made = std::fs::symlink_metadata(path).map_err(failed)?;
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
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| {
                format!("cannot remove {shown}, on which nobody answers: {}", crate::out::reason(&error))
            })
        }
        Err(error) => {
            Err(format!("cannot tell whether somebody answers on {shown}: {}", crate::out::reason(&error)))
        }
        Ok(_) => {
            Err(format!("cannot listen on {shown}: another program does; stop it, or choose another path"))
        }
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
    TcpListener::bind(&addresses[..])
        .map_err(|error| format!("cannot listen on {shown}: {}", crate::out::reason(&error)))
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
