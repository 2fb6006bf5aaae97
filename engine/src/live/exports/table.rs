//! The exports of a server, by name: what clients find, and what keeps an export until its last client has left.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::handles::{Backend, ExportId, NewExport, Removal};
use crate::error::{Error, Operation, Refusal};
use crate::nbd::export::{Export, Exports};

/// An export and those who use it.
pub(super) struct Entry {
    id: ExportId,
    export: Arc<Export>,
    backend: Backend,
    clients: usize,
    /// New clients do not find it; it goes with its last one.
    closing: bool,
    /// Keeps the disk open.
    _hold: Option<Arc<dyn Any + Send + Sync>>,
    /// The last field: called when all else of it is gone.
    _on_gone: OnGone,
}

/// Calls when it is dropped.
struct OnGone(Option<Box<dyn FnOnce() + Send>>);

impl Drop for OnGone {
    fn drop(&mut self) {
        if let Some(call) = self.0.take() {
            crate::foreign::call("a callback", call);
        }
    }
}

/// See the module's header.
pub(super) struct Table {
    entries: BTreeMap<Arc<str>, Entry>,
    /// The export for those who ask for none by name.
    default: Option<String>,
    /// Whether a client may come in more than once.
    many: bool,
}

impl Table {
    /// An empty one, of a server that takes so many clients at a time. Where that is one, nobody is told that he may come in again: he would
    /// wait for himself to leave.
    pub(super) fn new(default: Option<String>, most_clients: usize) -> Self {
        Self { entries: BTreeMap::new(), default, many: most_clients > 1 }
    }

    /// Add one.
    ///
    /// # Errors
    /// When its name is taken, or no name.
    pub(super) fn add(&mut self, new: NewExport) -> Result<(), Error> {
        let NewExport { id, name, description, length, writable, trim, backend, hold, on_gone } = new;
        let mut export = Export::new(name, length, !writable)?.describe(description)?;
        export.features.trim = trim;
        export.features.multi_conn &= self.many;
        let name = Arc::clone(export.name());
        if self.entries.contains_key(&name) {
            let reason = "an export of that name is there already";
            return Err(Error::refused(Refusal::Exists, Operation::Export, name.to_string(), reason)
                .advise("choose another name, or remove that one first"));
        }
        let export = Arc::new(export);
        let (_hold, _on_gone) = (hold, OnGone(on_gone));
        let entry = Entry { id, export, backend, clients: 0, closing: false, _hold, _on_gone };
        self.entries.insert(name, entry);
        Ok(())
    }

    /// Take one out of the hands of new clients. Gives whether it is there.
    ///
    /// # Errors
    /// When it has clients that may stay.
    pub(super) fn close(&mut self, id: ExportId, removal: Removal) -> Result<bool, Error> {
        let Some(entry) = self.entries.values_mut().find(|entry| entry.id == id) else { return Ok(false) };
        if removal == Removal::IfUnused && entry.clients > 0 {
            let (name, reason) =
                (entry.export.name().to_string(), format!("{} clients use it", entry.clients));
            return Err(Error::refused(Refusal::InUse, Operation::Export, name, reason)
                .advise("disconnect them first, or remove it together with its clients"));
        }
        entry.closing = true;
        Ok(true)
    }

    /// Take all out of the hands of new clients.
    pub(super) fn close_all(&mut self) {
        self.entries.values_mut().for_each(|entry| entry.closing = true);
    }

    /// One more client uses an export that was found.
    pub(super) fn attach(&mut self, name: &str) -> (ExportId, Backend) {
        let entry = self.entries.get_mut(name).expect("it was just found");
        entry.clients += 1;
        (entry.id, entry.backend)
    }

    /// A client of an export has left.
    pub(super) fn detach(&mut self, id: ExportId) {
        let entry = self.entries.values_mut().find(|entry| entry.id == id);
        entry.expect("an export stays until its clients have left").clients -= 1;
    }

    /// Let go of what is closing and has no clients.
    pub(super) fn sweep(&mut self) {
        self.entries.retain(|_, entry| !entry.closing || entry.clients > 0);
    }

    /// Whether `id` is being closed.
    pub(super) fn is_closing(&self, id: ExportId) -> bool {
        self.entries.values().any(|entry| entry.id == id && entry.closing)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl Exports for Table {
    /// By name; the empty name means the default one, the one of that name, or the only one.
    fn find(&self, name: &str) -> Option<Arc<Export>> {
        let default = self.default.as_deref().filter(|_| name.is_empty());
        let named = self.entries.get(default.unwrap_or(name));
        let entry = match named {
            None if name.is_empty() && self.entries.len() == 1 => self.entries.values().next(),
            other => other,
        };
        entry.filter(|entry| !entry.closing).map(|entry| Arc::clone(&entry.export))
    }

    fn after(&self, previous: Option<&str>) -> Option<Arc<Export>> {
        let start = previous.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = self.entries.range::<str, _>((start, Bound::Unbounded));
        rest.find(|(_, entry)| !entry.closing).map(|(_, entry)| Arc::clone(&entry.export))
    }
}
