//! Which disks an engine has open: each once.
//!
//! A disk that is opened twice has two gates and two lists of jobs, and a writer with a permit of the one is unknown to a job of the other: its
//! copy would be torn, and called complete. So a second handle is refused, by whatever name or device it comes; a clone of the first is as good.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::{Error, Operation, Refusal};
use crate::storage::topology::{self, Node};

/// How long one that is being closed is waited for, unless a job keeps it.
const PATIENCE: Duration = Duration::from_secs(1);

/// A disk that is open, for as long as its handles or the ring thread have it.
pub(super) struct Opened {
    node: Node,
    closing: AtomicBool,
}

impl Opened {
    /// Its last handle is gone.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }
}

/// See the module's header.
#[derive(Default)]
pub(super) struct Registry(Mutex<Vec<Weak<Opened>>>);

impl Registry {
    /// Enter `node`, which messages call `name`.
    ///
    /// # Errors
    /// A refusal where any of its bytes is open already.
    pub(super) fn enter(&self, node: Node, name: &str) -> Result<Arc<Opened>, Error> {
        let deadline = Instant::now() + PATIENCE;
        let refused = |reason: &'static str, advice: &'static str| {
            Error::refused(Refusal::InUse, Operation::OpenSource, name.to_owned(), reason).advise(advice)
        };
        loop {
            {
                let mut open = self.0.lock();
                open.retain(|other| other.strong_count() > 0);
                let same = |other: &Arc<Opened>| other.node == node || topology::overlap(other.node, node);
                let mut others = open.iter().filter_map(Weak::upgrade).filter(same).peekable();
                if others.peek().is_none() {
                    let opened = Arc::new(Opened { node, closing: AtomicBool::new(false) });
                    drop(others);
                    open.push(Arc::downgrade(&opened));
                    return Ok(opened);
                }
                if others.any(|other| !other.closing.load(Ordering::Acquire)) {
                    return Err(refused("the engine has it open already", "use a clone of that handle"));
                }
            }
            if Instant::now() >= deadline {
                let reason = "the engine still carries jobs or requests of a handle that was dropped";
                return Err(refused(reason, "wait until they have ended"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
