//! Exports as embedders have them: a server that listens, and the disks and snapshots that it serves.

use std::any::Any;
use std::fmt;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::super::DiskId;
use super::super::ask::{Answer, ask, may_wait};
use super::super::backup::Snapshot;
use super::super::command::Command;
use super::super::disk::{LiveDisk, LiveInbox};
use super::super::jobs::JobId;
use crate::error::Error;
use crate::units::Length;

/// Names a server on an engine, for as long as that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::live) struct ServerId(pub(in crate::live) u64);

/// Names an export on an engine, for as long as that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::live) struct ExportId(pub(in crate::live) u64);

/// Bounds of a server.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Most clients at a time, 1 to 1,024. Whoever comes then waits in the listener's backlog until one leaves. With 1 nobody is offered to come in
    /// several times (`NBD_FLAG_CAN_MULTI_CONN`); with 2 or 3 a tool that does, as nbdcopy does four times, waits for itself.
    pub clients: usize,
    /// Bytes that the clients' payloads may take together, at least 256 KiB. Beyond that each has a little of its own, so that
    /// one who does not read what it asked for keeps nobody else waiting: see [`crate::nbd::ConnectionLimits`].
    pub memory: u64,
    /// The export for those who ask for none by name. `None`: the one without a name, or the only one.
    pub default_export: Option<String>,
    /// Take no clients before [`NbdServer::open`]: whoever comes earlier waits, rather than miss the exports that are still to be added.
    pub closed: bool,
    /// Who hears of it when a client cannot be accepted, as where the host has no descriptor left: he waits then, or is closed.
    pub on_not_accepted: Option<NotAccepted>,
}

/// Called on the ring thread when a client cannot be accepted; once, until one is accepted again.
#[derive(Clone)]
pub struct NotAccepted(Arc<dyn Fn(&Error) + Send + Sync>);

impl NotAccepted {
    /// `call` must not block.
    #[must_use]
    pub fn new(call: impl Fn(&Error) + Send + Sync + 'static) -> Self {
        Self(Arc::new(call))
    }

    pub(super) fn tell(&self, error: &Error) {
        crate::foreign::call("a callback", || (self.0)(error));
    }
}

impl fmt::Debug for NotAccepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NotAccepted").finish_non_exhaustive()
    }
}

impl Default for NbdOptions {
    /// 1,024 clients, 64 MiB.
    fn default() -> Self {
        Self { clients: 1024, memory: 64 << 20, default_export: None, closed: false, on_not_accepted: None }
    }
}

/// A bound socket on which clients come in.
#[derive(Debug)]
pub enum NbdListener {
    /// A Unix socket.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

impl From<NbdListener> for OwnedFd {
    fn from(listener: NbdListener) -> Self {
        match listener {
            NbdListener::Unix(listener) => listener.into(),
            NbdListener::Tcp(listener) => listener.into(),
        }
    }
}

/// What an export shows.
#[derive(Debug)]
pub enum ExportSource {
    /// A live disk.
    Disk(LiveDisk),
    /// A disk as of the t0 of a job, for reading, while the job runs.
    Snapshot(Snapshot),
}

/// A disk or snapshot to serve.
pub struct ExportOptions {
    /// The name by which clients ask for it, at most 4096 bytes; empty: the one that is served to whoever asks for no name.
    pub name: String,
    /// For people, at most 4096 bytes.
    pub description: String,
    /// What it shows.
    pub source: ExportSource,
    /// Clients may write to it. Needs a disk that was opened writable.
    pub writable: bool,
    /// Clients may give space back: discard, and have zeros stored as holes.
    pub trim: bool,
    /// Called on the ring thread once the export is gone, for whatever reason.
    pub on_gone: Option<Box<dyn FnOnce() + Send>>,
}

impl fmt::Debug for ExportOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExportOptions")
            .field("name", &self.name)
            .field("source", &self.source)
            .field("writable", &self.writable)
            .finish_non_exhaustive()
    }
}

/// Where the data of an export comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::live) enum Backend {
    Disk(DiskId),
    /// Of a job, and the disk that it copies.
    Snapshot(JobId, DiskId),
}

/// An export as the ring thread gets it.
pub(in crate::live) struct NewExport {
    pub(in crate::live) id: ExportId,
    pub(in crate::live) name: String,
    pub(in crate::live) description: String,
    pub(in crate::live) length: Length,
    pub(in crate::live) writable: bool,
    pub(in crate::live) trim: bool,
    pub(in crate::live) backend: Backend,
    /// Keeps the disk open.
    pub(in crate::live) hold: Option<Arc<dyn Any + Send + Sync>>,
    pub(in crate::live) on_gone: Option<Box<dyn FnOnce() + Send>>,
}

/// How an export goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Not while it has clients.
    IfUnused,
    /// Its clients are disconnected; what they have in flight is carried out.
    Disconnect,
}

/// What the ring thread is asked for about exports.
pub(in crate::live) enum ExportCommand<S> {
    Listen { server: ServerId, socket: S, options: NbdOptions, answer: Answer<Result<(), Error>> },
    Add { server: ServerId, export: NewExport, answer: Answer<Result<(), Error>> },
    Remove { export: ExportId, removal: Removal, answer: Answer<Result<(), Error>> },
    Open { server: ServerId, answer: Answer<Result<(), Error>> },
    Stop { server: ServerId, answer: Answer<Result<(), Error>> },
}

struct Handle {
    server: ServerId,
    inbox: Arc<LiveInbox>,
    next_export: Arc<AtomicU64>,
}

impl Handle {
    fn ask(
        &self,
        command: impl FnOnce(Answer<Result<(), Error>>) -> ExportCommand<OwnedFd>,
    ) -> Result<(), Error> {
        may_wait();
        let (answer, asked) = ask();
        self.inbox.send(Command::Exports(command(answer)));
        asked.wait()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let (answer, _) = ask();
        self.inbox.send(Command::Exports(ExportCommand::Stop { server: self.server, answer }));
    }
}

/// A server of the NBD protocol on an engine's ring thread. Cheap to clone; it stops with its last clone, and that of its exports.
#[derive(Clone)]
pub struct NbdServer(Arc<Handle>);

impl fmt::Debug for NbdServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NbdServer").field(&self.0.server).finish()
    }
}

impl NbdServer {
    pub(in crate::live) fn start(
        server: ServerId,
        inbox: Arc<LiveInbox>,
        next_export: Arc<AtomicU64>,
        listener: NbdListener,
        options: NbdOptions,
    ) -> Result<Self, Error> {
        let handle = Handle { server, inbox, next_export };
        let socket = listener.into();
        handle.ask(|answer| ExportCommand::Listen { server, socket, options, answer })?;
        Ok(Self(Arc::new(handle)))
    }

    /// Serve a disk or a snapshot.
    ///
    /// # Errors
    /// Refusals: a name that is taken or too long, a writable export of something that takes no writes.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn add_export(&self, options: ExportOptions) -> Result<Export, Error> {
        may_wait();
        let ExportOptions { name, description, source, writable, trim, on_gone } = options;
        super::check(&name, &source, writable)?;
        let id = ExportId(self.0.next_export.fetch_add(1, Ordering::Relaxed));
        let (length, backend, hold): (_, _, Option<Arc<dyn Any + Send + Sync>>) = match source {
            ExportSource::Disk(disk) => {
                (disk.length(), Backend::Disk(disk.inner.shared.id()), Some(disk.inner))
            }
            ExportSource::Snapshot(snapshot) => {
                (snapshot.length(), Backend::Snapshot(snapshot.job(), snapshot.disk()), None)
            }
        };
        let export = NewExport { id, name, description, length, writable, trim, backend, hold, on_gone };
        self.0.ask(|answer| ExportCommand::Add { server: self.0.server, export, answer })?;
        Ok(Export { server: self.clone(), id })
    }

    /// Take clients, where it was begun [closed](NbdOptions::closed).
    ///
    /// # Errors
    /// When it was stopped, or the engine has died.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn open(&self) -> Result<(), Error> {
        self.0.ask(|answer| ExportCommand::Open { server: self.0.server, answer })
    }

    /// Take no more clients, disconnect those that are there, once what they have in flight is carried out, and give up all
    /// exports. Returns when that is done.
    ///
    /// # Errors
    /// When the engine has died.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn stop(&self) -> Result<(), Error> {
        self.0.ask(|answer| ExportCommand::Stop { server: self.0.server, answer })
    }

    /// As [`Self::stop`], but returns after `limit` at the latest; `false`: it is still going, and will be gone when those of its
    /// clients have left that take their time, or whose requests do.
    ///
    /// # Errors
    /// When the engine has died.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn stop_within(&self, limit: Duration) -> Result<bool, Error> {
        may_wait();
        let (answer, asked) = ask();
        let server = self.0.server;
        self.0.inbox.send(Command::Exports(ExportCommand::Stop { server, answer }));
        asked.wait_for(limit).transpose().map(|stopped| stopped.is_some())
    }
}

/// A disk or snapshot that is served. It stays when this is dropped; see [`Export::remove`].
#[derive(Clone, Debug)]
pub struct Export {
    server: NbdServer,
    id: ExportId,
}

impl Export {
    /// Serve it no more. Returns when that is decided; it is gone when [`ExportOptions::on_gone`] is called. One that is gone already
    /// is no error.
    ///
    /// # Errors
    /// With [`Removal::IfUnused`], when it has clients.
    ///
    /// # Panics
    /// In a callback on the ring thread, before anything is done: it would wait for itself.
    pub fn remove(&self, removal: Removal) -> Result<(), Error> {
        self.server.0.ask(|answer| ExportCommand::Remove { export: self.id, removal, answer })
    }
}
