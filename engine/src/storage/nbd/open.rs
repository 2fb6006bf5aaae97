//! Reaching an export: connecting, the handshake, and what can be refused about it as a source or a target.
//!
//! An export as a target is treated like a device: it always exists, needs no `--force`, must take writes and be large enough, and keeps what lies beyond the
//! source's end. Who else uses it nobody can ask; whether it is the disk under the source neither, unless both are the same export by name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::connection::Connection;
use super::stream::{ConnectError, Found, Inbox, Stream};
use super::{NbdStorage, Storage};
use crate::error::{Error, Operation, Refusal, Result, describe};
use crate::nbd::client::negotiation::Next;
use crate::nbd::client::{Address, Agreement, NbdUri, Negotiation, NegotiationError};
use crate::storage::identity::{DiskId, Identity};
use crate::storage::locator::Locator;
use crate::storage::open::{OpenedSource, refuse_format};
use crate::storage::target::{TargetOptions, TargetPlan};
use crate::units::{Length, MAX_LENGTH};

/// How long connecting and the handshake may take together.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same, for one connection more: a server that takes no more of them keeps it waiting.
const PATIENCE_FOR_MORE: Duration = Duration::from_secs(3);

/// Whether it is asked in which layer an export is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::storage) enum Layers {
    Asked,
    NotAsked,
}

impl Layers {
    pub(in crate::storage) fn of(asked: bool) -> Self {
        if asked { Self::Asked } else { Self::NotAsked }
    }
}

/// Why there is no connection with an export.
#[derive(Clone, Debug)]
enum Unreachable {
    Connect(ConnectError),
    Negotiation(NegotiationError),
}

impl From<Errno> for Unreachable {
    /// `EAGAIN` is what the system says when a limit of time has passed.
    fn from(errno: Errno) -> Self {
        let errno = if errno == Errno::EAGAIN { Errno::ETIMEDOUT } else { errno };
        Self::Connect(ConnectError::System(errno))
    }
}

/// Open an export.
///
/// # Errors
/// Refusals only.
pub(in crate::storage) fn open_nbd(
    operation: Operation,
    locator: &Locator,
    uri: &NbdUri,
    layers: Layers,
) -> Result<NbdStorage> {
    let name = locator.as_str();
    let reached = reach(uri, layers, Instant::now() + PATIENCE);
    let (connection, agreement, found) = reached.map_err(|why| refusal(operation, name, uri, &why))?;
    if agreement.length > MAX_LENGTH {
        let length = agreement.length;
        let reason = format!(
            "its {length} bytes are more than the largest disk that can be copied ({MAX_LENGTH} bytes)"
        );
        return Err(Error::refused(Refusal::TooLarge, operation, name, reason));
    }
    Ok(NbdStorage::new(name, (&uri.export, found), agreement, connection))
}

/// One connection more to `export` of the server that was found; `None` where there is none to be had.
pub(super) fn another(export: &str, found: &Found, first: &Agreement) -> Option<Connection> {
    let deadline = Instant::now() + PATIENCE_FOR_MORE;
    let connected = Stream::connect(found, deadline).map_err(Unreachable::Connect);
    let layers = Layers::of(first.depth.is_some());
    match connected.and_then(|stream| agree(stream, export, layers, deadline)) {
        Ok((connection, agreement)) => {
            let alike = |agreement: &Agreement| Agreement {
                // Each connection has its own number for it.
                allocation: agreement.allocation.map(|_| 0),
                depth: agreement.depth.map(|_| 0),
                ..*agreement
            };
            (alike(&agreement) == alike(first)).then_some(connection)
        }
        Err(why) => {
            tracing::debug!(?why, "no further connection to the NBD server");
            None
        }
    }
}

type Reached<T> = std::result::Result<T, Unreachable>;

fn reach(uri: &NbdUri, layers: Layers, deadline: Instant) -> Reached<(Connection, Agreement, Found)> {
    let (stream, found) = Stream::find(&uri.address, deadline).map_err(Unreachable::Connect)?;
    let (connection, agreement) = agree(stream, &uri.export, layers, deadline)?;
    Ok((connection, agreement, found))
}

fn agree(
    stream: Stream,
    export: &str,
    layers: Layers,
    deadline: Instant,
) -> Reached<(Connection, Agreement)> {
    let mut inbox = Inbox::new();
    let negotiation = match layers {
        Layers::Asked => Negotiation::new(export).with_layers(),
        Layers::NotAsked => Negotiation::new(export),
    };
    let agreement = negotiate(&stream, &mut inbox, negotiation, deadline)?;
    stream.unlimited()?;
    tracing::debug!(?agreement, "an NBD server has agreed");
    Ok((Connection::new(stream, inbox, &agreement), agreement))
}

fn negotiate(
    stream: &Stream,
    inbox: &mut Inbox,
    mut negotiation: Negotiation,
    deadline: Instant,
) -> Reached<Agreement> {
    loop {
        let (taken, next) = negotiation.advance(inbox.waiting()).map_err(Unreachable::Negotiation)?;
        inbox.take(taken);
        match next {
            Next::Need(count) => {
                // Also with a server that sends byte by byte the time is limited as a whole.
                let arrived = match inbox.fill_until(stream, count, Some(deadline)) {
                    Err(Errno::ECONNRESET) => false,
                    result => result?,
                };
                if !arrived {
                    return Err(Unreachable::Negotiation(negotiation.end_of_stream()));
                }
            }
            Next::Send(bytes) => {
                stream.limit_until(deadline)?;
                match stream.send_all(&bytes, &[]) {
                    Err(Errno::EPIPE | Errno::ECONNRESET) => {
                        return Err(Unreachable::Negotiation(negotiation.end_of_stream()));
                    }
                    result => result?,
                }
            }
            Next::Agreed(agreement) => return Ok(agreement),
        }
    }
}

fn refusal(operation: Operation, name: &str, uri: &NbdUri, why: &Unreachable) -> Error {
    const LISTENS: &str = "see that the NBD server runs, and listens there";
    const NO_TLS: &str = "let it serve without TLS, on a unix socket or to a tunnel, since TLS is not supported by this version";
    let refused = |refusal, reason: String, advice: &'static str| {
        Error::refused(refusal, operation, name, reason).advise(advice)
    };
    match why {
        Unreachable::Connect(ConnectError::Resolver(error)) => {
            let reason = format!("its host cannot be looked up: {error}");
            refused(Refusal::NotFound, reason, "check its name, and that names are resolved here")
                .because(Arc::clone(error))
        }
        Unreachable::Connect(ConnectError::System(errno)) => {
            let (kind, reason, advice) = match (errno, &uri.address) {
                (Errno::ENOENT, Address::Unix(path)) => {
                    (Refusal::NotFound, format!("there is no socket {}", path.display()), LISTENS)
                }
                (Errno::ETIMEDOUT, _) => (
                    Refusal::Unavailable,
                    format!("the NBD server does not answer within {} s", PATIENCE.as_secs()),
                    "see that it runs, and whether it takes one client at a time and has one",
                ),
                (Errno::EACCES | Errno::EPERM, _) => (
                    Refusal::PermissionDenied,
                    describe(*errno),
                    "check the permissions of the socket, or run as a user that may",
                ),
                _ => (Refusal::Unavailable, describe(*errno), LISTENS),
            };
            refused(kind, reason, advice).because(*errno)
        }
        Unreachable::Negotiation(why) => {
            let (kind, advice) = match why {
                NegotiationError::NoSuchExport(_) => (
                    Refusal::NotFound,
                    "see what it has with `nbdinfo --list`, and write the name behind the slash",
                ),
                NegotiationError::TlsRequired(_) => (Refusal::Unsupported, NO_TLS),
                NegotiationError::OldStyle => (Refusal::Unsupported, "use a newer server"),
                NegotiationError::NotNbd => (Refusal::NotADisk, "check the address and the port"),
                NegotiationError::Refused(_) => (Refusal::Unavailable, "see the server's settings"),
                NegotiationError::Closed => {
                    (Refusal::Unavailable, "see the server's log, and whether it takes one client at a time")
                }
                NegotiationError::Violation(_) => (Refusal::Unavailable, "use another server"),
            };
            refused(kind, why.to_string(), advice)
        }
    }
}

/// The export as a source.
///
/// # Errors
/// Refusals only.
pub(in crate::storage) fn open_nbd_source(
    locator: &Locator,
    uri: &NbdUri,
    layers: Layers,
) -> Result<OpenedSource> {
    let storage = open_nbd(Operation::OpenSource, locator, uri, layers)?;
    let identity = identity(locator, uri, &storage);
    let mut warnings = Vec::new();
    if layers == Layers::Asked && !storage.tells_layers() {
        warnings.push(format!(
            "{locator}: the server does not tell what is in the top layer (qemu:allocation-depth): all of it counts as that, and is copied"
        ));
    }
    Ok(OpenedSource::remote(Arc::new(storage), identity, warnings))
}

/// Check everything about an export as the target of a copy of `source`. Changes nothing.
///
/// # Errors
/// Refusals only; see the module's header.
pub fn plan_nbd(
    locator: &Locator,
    uri: &NbdUri,
    source: &OpenedSource,
    options: &TargetOptions<'_>,
) -> Result<TargetPlan> {
    refuse_format(Operation::OpenTarget, locator, options.format)?;
    let storage = open_nbd(Operation::OpenTarget, locator, uri, Layers::NotAsked)?;
    let refused =
        |refusal, reason: String| Error::refused(refusal, Operation::OpenTarget, locator.as_str(), reason);
    let identity = identity(locator, uri, &storage);
    if identity.disk == source.identity().disk {
        let reason = format!("it is the same export as the source {}", source.storage().name());
        return Err(refused(Refusal::SameDisk, reason).advise("name two different disks"));
    }
    if storage.is_read_only() {
        let reason = "the server exports it read-only".to_owned();
        return Err(refused(Refusal::ReadOnly, reason)
            .advise("have it exported for writing, or choose another target"));
    }
    let (has, needs) = (storage.limits().length.0, source.length().0);
    if has < needs {
        let reason = format!("its {has} bytes are fewer than the source's {needs}");
        return Err(refused(Refusal::TooSmall, reason).advise("choose a larger target"));
    }
    let mut warnings = Vec::new();
    if has > needs {
        let rest = Length(has - needs);
        warnings.push(format!("{locator}: it is larger than the source; its last {rest} stay as they are"));
    }
    if !storage.can_be_flushed() {
        warnings.push(format!(
            "{locator}: the server offers no flush: that the copy survives a power loss there cannot be promised"
        ));
    }
    if options.verify {
        warnings.push(format!(
            "{locator}: what is read back comes from the server, which may have it in memory: that is compared, and not the medium"
        ));
    }
    TargetPlan::remote(locator, source, options, (Arc::new(storage), identity), warnings)
}

/// An export is known by where its server listens, its name and its length. That cannot tell whether its contents have changed, nor whether the
/// server has another disk under that name.
fn identity(locator: &Locator, uri: &NbdUri, storage: &NbdStorage) -> Identity {
    let server = match &uri.address {
        Address::Tcp { host, port } => format!("{host}:{port}"),
        Address::Unix(path) => {
            let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            resolved.to_string_lossy().into_owned()
        }
        Address::Abstract(name) => format!("@{}", String::from_utf8_lossy(name)),
    };
    let disk = DiskId::Nbd { server, export: uri.export.clone() };
    Identity { path: locator.as_str().to_owned(), length: storage.limits().length.0, disk }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::storage::{LiveAccess, open_live};

    #[test]
    fn an_export_is_no_live_disk() {
        let export = Locator::parse("nbd+unix:///x?socket=nowhere").unwrap();
        for access in [LiveAccess::Carried, LiveAccess::Permits, LiveAccess::PermitsAndLocks] {
            let error = open_live(&export, access).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused(Refusal::Unsupported), "{error}");
        }
    }

    #[test]
    fn why_nobody_is_reached() {
        let fails = |text: &str| {
            let Ok(uri) = NbdUri::parse(text) else { panic!("{text}") };
            let why = reach(&uri, Layers::NotAsked, Instant::now() + Duration::from_secs(5)).unwrap_err();
            refusal(Operation::OpenSource, text, &uri, &why)
        };
        let nowhere = fails("nbd+unix:///x?socket=/nowhere/at/all");
        assert_eq!(nowhere.kind(), ErrorKind::Refused(Refusal::NotFound));
        assert!(nowhere.to_string().contains("there is no socket /nowhere/at/all"), "{nowhere}");
        let hidden = fails("nbd+unix:///x?socket=%00nobody-listens-here");
        assert!(hidden.to_string().contains("ECONNREFUSED"), "{hidden}");
        let unknown = fails("nbd://no-such-host.invalid/x");
        let cause = std::error::Error::source(&unknown).expect("what the resolver says");
        assert!(unknown.to_string().contains(&cause.to_string()), "{unknown}");
    }

    /// A server that sends a byte now and then is given up in time as well.
    #[test]
    fn a_server_that_trickles_is_not_waited_for() {
        let there = tempfile::tempdir().unwrap();
        let socket = there.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // Until the client has gone.
            while std::io::Write::write_all(&mut stream, b"N").is_ok() {
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let uri = NbdUri { address: Address::Unix(socket), export: String::new() };
        let start = Instant::now();
        let why = reach(&uri, Layers::NotAsked, start + Duration::from_millis(300)).unwrap_err();
        let late = matches!(why, Unreachable::Connect(ConnectError::System(Errno::ETIMEDOUT)));
        // Not what the bytes would come to, were they all waited for.
        assert!(late, "{why:?}");
        // On a busy machine the time may have gone by before anybody was called.
        drop(std::os::unix::net::UnixStream::connect(there.path().join("socket")));
        server.join().unwrap();
    }

    /// A server that accepts and is silent is given up in time.
    #[test]
    fn a_server_that_is_silent_is_not_waited_for() {
        let there = tempfile::tempdir().unwrap();
        let socket = there.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let uri = NbdUri { address: Address::Unix(socket), export: String::new() };
        let start = Instant::now();
        let why = reach(&uri, Layers::NotAsked, start + Duration::from_millis(200)).unwrap_err();
        let late = matches!(why, Unreachable::Connect(ConnectError::System(Errno::ETIMEDOUT)));
        assert!(late, "{why:?}");
        assert!(start.elapsed() >= Duration::from_millis(200));
        let error = refusal(Operation::OpenSource, "x", &uri, &why);
        assert!(error.to_string().contains("does not answer within 30 s"), "{error}");
        drop(listener);
    }
}
