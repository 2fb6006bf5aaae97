//! The NBD server as the daemon uses it.
//!
//! [`Exports`] is the seam: the daemon decides what is exported and when, the engine serves it. There is one server at a time.

use engine::live::{LiveDisk, Snapshot};

use super::listen::Listener;
use super::mailbox::Post;

/// What an export shows.
#[derive(Debug)]
pub(crate) enum ExportSource {
    /// A disk, as it is now.
    Disk(LiveDisk),
    /// A disk as it was at the start of a job, while that runs.
    Snapshot(Snapshot),
}

/// What to export.
#[derive(Debug)]
pub(crate) struct ExportOptions {
    /// The name that clients ask for, at most [`MAX_NAME`] bytes.
    pub(crate) name: String,
    /// For people, at most [`MAX_NAME`] bytes.
    pub(crate) description: Option<String>,
    /// What it shows.
    pub(crate) source: ExportSource,
    /// Whether clients may write.
    pub(crate) writable: bool,
    /// Whether clients may give space back; if not, trim is not offered, and zeros take the space that they are written to.
    pub(crate) trim: bool,
}

/// How to serve.
pub(crate) struct NbdOptions {
    /// Most connections at a time.
    pub(crate) max_connections: u32,
    /// The name of the export that clients get which ask for the empty name.
    pub(crate) default_export: Option<String>,
    /// Where trouble is told.
    pub(crate) post: Post,
}

/// Most bytes of an export's name or description, by the protocol.
pub(crate) const MAX_NAME: usize = 4096;

/// Called once, on any thread, when an export is gone: no connection uses it any more.
pub(crate) type Gone = Box<dyn FnOnce() + Send>;

/// An export that clients still use, and that was to be removed only if they do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StillInUse;

/// A disk that is being exported.
pub(crate) trait Exported {
    /// Take no more connections to it, and have it gone once the last is closed; `hard`: close those that there are.
    ///
    /// # Errors
    /// Without `hard`, when there are some; then nothing has changed.
    fn remove(&self, hard: bool) -> Result<(), StillInUse>;
}

/// The NBD server.
pub(crate) trait Exports {
    /// Accept connections on `listener`, from [`Self::open`] on.
    ///
    /// # Errors
    /// Why not, in one line.
    fn start(&mut self, listener: Listener, options: &NbdOptions) -> Result<(), String>;

    /// Accept connections from now on. Not before everything is there that clients may ask for at once.
    ///
    /// # Errors
    /// Why not, in one line.
    fn open(&mut self) -> Result<(), String>;

    /// Add an export to the running server.
    ///
    /// # Errors
    /// Why not, in one line; `gone` is not called then.
    fn add(&mut self, export: ExportOptions, gone: Gone) -> Result<Box<dyn Exported>, String>;

    /// Close the socket and all connections. Exports go with it.
    fn stop(&mut self);
}
