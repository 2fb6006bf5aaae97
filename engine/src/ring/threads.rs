//! The ring for hosts where io_uring is refused: every operation is carried out, blocking, by a pool of threads.
//!
//! Same semantics as the other rings: operations are submitted in a batch by `wait`, complete once and in any order, and a
//! cancelled one that has not begun comes back with `ECANCELED` at once. One that has begun runs to its end, since a
//! thread in a system call cannot be recalled. The depth that reaches the device is the number of threads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::sync::Parker;
use nix::errno::Errno;

use super::arena::Arena;
use super::base::{Base, file_of};
use super::config::{RingConfig, SetupError};
use super::signal::{Kick, Signal};
use super::{Completion, DocumentId, FileId, Op, Output, Ring, RingFailure, Timestamp, Token, Wait, Wake};
use crate::storage::{Document, Storage};

/// How long a ring that is dropped waits for operations that are running.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);

/// See the module's header.
pub struct ThreadsRing {
    base: Base,
    parker: Parker,
}

impl ThreadsRing {
    /// A ring with `config.threads` threads, started.
    ///
    /// # Errors
    /// When memory or threads cannot be had.
    ///
    /// # Panics
    /// If the configuration is out of the bounds that [`RingConfig`] states.
    pub fn new(config: &RingConfig) -> Result<Self, SetupError> {
        let arena = Arena::new(config.arena_bytes)
            .map_err(|source| SetupError::Memory { bytes: config.arena_bytes, source })?;
        let parker = Parker::new();
        let signal = Arc::new(Signal::new(Kick::Parked(parker.unparker().clone())));
        let mut base = Base::new("threads", arena, config.capacity, config.threads, signal);
        if let Err(source) = base.pool.start_all() {
            base.shut_down(Instant::now() + DROP_TIMEOUT);
            return Err(SetupError::Threads { source });
        }
        Ok(Self { base, parker })
    }

    fn cancel(&mut self, token: Token, target: Token) {
        let found = self.base.flight.find(target).map(|(key, _)| key);
        let result = match found {
            Some(key) => {
                self.base.withdraw(key);
                Ok(Output::Done)
            }
            None if self.base.is_ready(target) => Ok(Output::Done),
            None => Err(Errno::ENOENT),
        };
        self.base.push_ready(Completion { token, result });
    }
}

impl Ring for ThreadsRing {
    type File = Arc<dyn Storage>;
    type Document = Arc<dyn Document>;

    fn name(&self) -> &'static str {
        self.base.name
    }

    fn arena(&self) -> &Arena {
        &self.base.arena
    }

    fn arena_mut(&mut self) -> &mut Arena {
        &mut self.base.arena
    }

    fn add_file(&mut self, file: Self::File) -> Result<FileId, RingFailure> {
        self.base.add_file(file)
    }

    fn add_document(&mut self, document: Self::Document) -> Result<DocumentId, RingFailure> {
        self.base.add_document(document)
    }

    fn remove_file(&mut self, file: FileId) {
        drop(self.base.remove_file(file));
    }

    fn release_files(&mut self) {
        self.base.release_files();
    }

    fn capacity(&self) -> usize {
        self.base.capacity()
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }

    fn push(&mut self, token: Token, op: Op) {
        self.base.admit(token);
        match (file_of(&op), &op) {
            (Some(file), _) if self.base.is_inline(file) => self.base.push_inline(token, &op, file),
            (None, Op::Cancel { target }) => self.cancel(token, *target),
            _ => self.base.push_to_pool(token, op),
        }
    }

    fn wait(&mut self, until: Wait, completions: &mut Vec<Completion>) -> Result<(), RingFailure> {
        self.base.check()?;
        self.base.pool.dispatch().map_err(|errno| self.base.fail(errno))?;
        let before = completions.len();
        let deadline = self.base.deadline(until);
        loop {
            let woken = self.base.signal.take();
            self.base.collect(completions)?;
            let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if completions.len() > before || woken || until == Wait::Poll || late() {
                return Ok(());
            }
            if self.base.signal.fall_asleep() {
                match deadline {
                    Some(deadline) => self.parker.park_deadline(deadline),
                    None => self.parker.park(),
                }
            }
        }
    }

    fn now(&self) -> Timestamp {
        self.base.now()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.base.signal) as Arc<dyn Wake>
    }
}

impl Drop for ThreadsRing {
    fn drop(&mut self) {
        self.base.shut_down(Instant::now() + DROP_TIMEOUT);
    }
}
