//! Who waits for which cluster: the table behind the set's slow path.
//!
//! The table is cut into shards, each under a lock of its own; all clusters of one word belong to one shard, so that a
//! word is released under one lock. The rule that ties it to the words: **while the shard's lock is held, a cluster is
//! in the state *copying with waiters* if and only if the shard holds an entry for it.** The set keeps the rule by
//! entering and leaving that state under the lock only.
//!
//! Entries are a plain `Vec` in order of arrival, searched from the front. The number of entries is the number of guest
//! requests that wait at this moment, which whoever accepts requests bounds; with 64 shards a search is short.

use std::fmt;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;

use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, Parking};
use crate::units::ClusterIndex;

/// A power of two. Models have two, to see both the same and different shards.
const SHARDS: usize = if cfg!(any(feature = "loom", feature = "shuttle")) { 2 } else { 64 };

/// Whom to wake when what it waits for has come: a cluster is released, or a barrier is lowered. Woken at most once, by
/// the thread that releases or lowers.
///
/// It runs on the thread that completes copies, which serves every guest: it must be quick, never block and not panic
/// (should one panic all the same, the others are woken first). It may call into the set: no lock is held.
pub struct Waiter(Kind);

enum Kind {
    Task(Waker),
    Callback(Box<dyn FnOnce() + Send>),
    Thread(Arc<Parker>),
}

impl Waiter {
    /// A task of some executor.
    #[must_use]
    pub fn task(waker: Waker) -> Self {
        Self(Kind::Task(waker))
    }

    /// A function to call.
    #[must_use]
    pub fn callback(call: impl FnOnce() + Send + 'static) -> Self {
        Self(Kind::Callback(Box::new(call)))
    }

    /// The thread that made `parker`.
    pub(crate) fn thread(parker: Arc<Parker>) -> Self {
        Self(Kind::Thread(parker))
    }

    pub(crate) fn wake(self) {
        match self.0 {
            // Somebody else's, and those behind it wait for us.
            Kind::Task(waker) => crate::foreign::call("a waker", || waker.wake()),
            Kind::Callback(call) => call(),
            Kind::Thread(parker) => parker.wake(),
        }
    }
}

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Task(_) => "Waiter::Task",
            Kind::Callback(_) => "Waiter::Callback",
            Kind::Thread(_) => "Waiter::Thread",
        })
    }
}

/// A thread that sleeps until it is woken; made by that thread, for one wait.
pub(crate) struct Parker {
    thread: Parking,
    woken: AtomicBool,
}

impl Parker {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { thread: Parking::current(), woken: AtomicBool::new(false) })
    }

    fn wake(&self) {
        // Release: what happened before the wake is visible to the thread that sees the flag.
        let before = self.woken.swap(true, Ordering::Release);
        assert!(!before, "a waiter is woken once");
        self.thread.unpark();
    }

    /// Whether it was woken before `timeout` was over.
    pub(crate) fn sleep(&self, timeout: Option<Duration>) -> bool {
        // A deadline too far to be told is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        while !self.woken.load(Ordering::Acquire) {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return false;
            }
            Parking::park(left);
        }
        true
    }
}

/// A place in the table, to give it up again.
#[must_use = "without its ticket a registration cannot be cancelled"]
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket {
    pub(super) cluster: ClusterIndex,
    pub(super) number: u64,
}

impl Ticket {
    /// The cluster waited for.
    #[must_use]
    pub fn cluster(&self) -> ClusterIndex {
        self.cluster
    }
}

struct Entry {
    cluster: ClusterIndex,
    number: u64,
    waiter: Waiter,
}

/// The entries of the words that share a lock.
pub(super) struct Shard {
    entries: Vec<Entry>,
    next_number: u64,
    closed: bool,
}

impl Shard {
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn waits_for(&self, cluster: ClusterIndex) -> bool {
        self.entries.iter().any(|entry| entry.cluster == cluster)
    }

    pub(super) fn add(&mut self, cluster: ClusterIndex, waiter: Waiter) -> Ticket {
        assert!(!self.closed, "a closed shard takes no waiters");
        let number = self.next_number;
        self.next_number += 1;
        self.entries.push(Entry { cluster, number, waiter });
        Ticket { cluster, number }
    }

    /// The waiter of that ticket, unless it was taken out already.
    pub(super) fn remove(&mut self, ticket: &Ticket) -> Option<Waiter> {
        assert!(ticket.number < self.next_number, "the ticket is of another set");
        let at = self.entries.iter().position(|entry| entry.number == ticket.number)?;
        assert_eq!(self.entries[at].cluster, ticket.cluster, "the ticket is of another set");
        Some(self.entries.remove(at).waiter)
    }

    /// Takes out all waiters of the clusters that `released` picks, in order of arrival.
    pub(super) fn take(&mut self, released: impl Fn(ClusterIndex) -> bool) -> Woken {
        let taken = self.entries.extract_if(.., |entry| released(entry.cluster)).map(|entry| entry.waiter);
        let taken = Woken::new(taken.collect());
        debug_assert!(!self.entries.iter().any(|entry| released(entry.cluster)));
        taken
    }

    /// Takes out all waiters and refuses new ones; `each` is told every cluster that was waited for, once.
    pub(super) fn close(&mut self, mut each: impl FnMut(ClusterIndex)) -> Woken {
        self.closed = true;
        let mut clusters: Vec<_> = self.entries.iter().map(|entry| entry.cluster).collect();
        clusters.sort_unstable();
        clusters.dedup();
        clusters.into_iter().for_each(&mut each);
        self.take(|_| true)
    }
}

/// Waiters that are out of their table and are owed a wake-up; to be woken after the table's lock is let go.
#[must_use = "these waiters are owed a wake-up"]
pub(crate) struct Woken(std::vec::IntoIter<Waiter>);

impl Woken {
    pub(crate) fn new(waiters: Vec<Waiter>) -> Self {
        Self(waiters.into_iter())
    }

    pub(crate) fn wake(mut self) {
        for waiter in self.0.by_ref() {
            waiter.wake();
        }
    }
}

/// A waiter that panics must not cost the others their wake-up.
impl Drop for Woken {
    fn drop(&mut self) {
        for waiter in self.0.by_ref() {
            waiter.wake();
        }
    }
}

/// All waiters of a set.
pub(super) struct Table {
    shards: Box<[CachePadded<Mutex<Shard>>]>,
}

impl Table {
    pub(super) fn new() -> Self {
        let shard = || Mutex::new(Shard { entries: Vec::new(), next_number: 0, closed: false });
        Self { shards: (0..SHARDS).map(|_| CachePadded::new(shard())).collect() }
    }

    /// Locks the shard of a word.
    pub(super) fn lock(&self, word: usize) -> MutexGuard<'_, Shard> {
        const { assert!(SHARDS.is_power_of_two()) };
        self.shards[word % SHARDS].lock()
    }

    /// Locks one shard after the other.
    pub(super) fn each(&self) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        self.shards.iter().map(|shard| shard.lock())
    }
}
