//! The slow path: waiting for a cluster that somebody else is copying, and waking those who do.

use std::time::Duration;

use super::waiters::Parker;
use super::{ClusterState, IntervalSet, Mask, Ordering, Outcome, Span, Ticket, Waiter, Word, word_of};
use crate::sync::fence;
use crate::units::ClusterIndex;

/// How [`IntervalSet::wait_for`] went.
#[must_use = "only a registered waiter will be woken"]
#[derive(Debug)]
pub enum Registration {
    /// The waiter will be woken when the cluster is released.
    Registered {
        /// To cancel it.
        ticket: Ticket,
        /// Whether nobody waited for this cluster before: the caller tells the holder to hurry.
        first: bool,
    },
    /// The cluster is not busy (any more): look again. The waiter is handed back and was not woken.
    AlreadyReleased(Waiter),
    /// The set is closed: nobody waits on it any more. The waiter is handed back and was not woken.
    Closed(Waiter),
}

/// How [`IntervalSet::cancel`] went.
#[must_use = "a waiter that is not removed is woken"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancellation {
    /// The waiter was not woken and will not be.
    Removed,
    /// Too late: the waiter was woken, or another thread is about to do it.
    AlreadyWoken,
}

/// How [`IntervalSet::wait_blocking`] ended.
#[must_use = "the cluster may not be released"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The cluster was released: look again.
    Released,
    /// The time is over. The caller waits no longer.
    TimedOut,
    /// The set was closed.
    Closed,
}

impl IntervalSet {
    /// Has `waiter` woken when `cluster`, which somebody is copying, is completed or released: once, by the thread that
    /// does so. When the cluster is not busy it says so instead.
    ///
    /// Never call it on a cluster that the caller itself has claimed and then sleep, nor while holding any claim: that
    /// is how a deadlock is made.
    ///
    /// # Panics
    /// If the set has no such cluster.
    pub fn wait_for(&self, cluster: ClusterIndex, waiter: Waiter) -> Registration {
        // A look without the lock first; it also checks the bound.
        if matches!(self.state(cluster), ClusterState::ToCopy | ClusterState::Done) {
            return Registration::AlreadyReleased(waiter);
        }
        let mut shard = self.table.lock(word_of(cluster.0));
        if shard.is_closed() {
            return Registration::Closed(waiter);
        }
        let Some(first) = self.promote(cluster) else {
            return Registration::AlreadyReleased(waiter);
        };
        assert_eq!(first, !shard.waits_for(cluster), "the state and the table disagree on {cluster:?}");
        let ticket = shard.add(cluster, waiter);
        drop(shard);
        // Orders the state before the caller's look at whether the holder sleeps; see the module.
        fence(Ordering::SeqCst);
        Registration::Registered { ticket, first }
    }

    /// Copying → copying with waiters, under the shard's lock; whether it was this call that changed it, or `None` if
    /// the cluster is not busy.
    fn promote(&self, cluster: ClusterIndex) -> Option<bool> {
        let word = &self.words[word_of(cluster.0)];
        let mut seen = Word(word.load(Ordering::Acquire));
        loop {
            match seen.state(cluster) {
                ClusterState::ToCopy | ClusterState::Done => return None,
                ClusterState::CopyingWithWaiters => return Some(false),
                ClusterState::Copying => {}
            }
            let new = seen.promoted(Mask::of(cluster));
            debug_assert_eq!(new.state(cluster), ClusterState::CopyingWithWaiters);
            match word.compare_exchange_weak(seen.0, new.0, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(true),
                Err(now) => seen = Word(now),
            }
        }
    }

    /// Copying with waiters → copying, under the shard's lock, when the last one is gone.
    fn demote(&self, cluster: ClusterIndex) {
        // The state cannot change under the lock, so flipping both bits is right whatever the rest of the word does.
        let before = self.words[word_of(cluster.0)].fetch_xor(Mask::of(cluster).both(), Ordering::Relaxed);
        assert_eq!(Word(before).state(cluster), ClusterState::CopyingWithWaiters, "{cluster:?}");
    }

    /// The holder's release of part of a word in which somebody waits.
    #[cold]
    pub(super) fn leave_waited_for(&self, span: Span, outcome: Outcome) {
        let word = &self.words[span.word];
        let mut shard = self.table.lock(span.word);
        let before = Word(match outcome {
            Outcome::Done => word.fetch_or(span.mask.both(), Ordering::Release),
            Outcome::ToCopy => word.fetch_and(!span.mask.both(), Ordering::Release),
        });
        assert!(before.busy().covers(span.mask), "a claim on clusters that are not busy");
        let waited_for = before.waited_for() & span.mask;
        let woken =
            shard.take(|cluster| word_of(cluster.0) == span.word && waited_for.covers(Mask::of(cluster)));
        drop(shard);
        woken.wake();
    }

    /// Gives up a registration: either the waiter is removed and will not be woken, or it was woken already (or is just
    /// being woken) and it is too late.
    pub fn cancel(&self, ticket: Ticket) -> Cancellation {
        let cluster = ticket.cluster();
        let mut shard = self.table.lock(word_of(cluster.0));
        let removed = shard.remove(&ticket);
        if removed.is_some() && !shard.waits_for(cluster) {
            self.demote(cluster);
        }
        // Before the waiter is dropped, whose destructor is not ours.
        drop(shard);
        match removed {
            Some(_) => Cancellation::Removed,
            None => Cancellation::AlreadyWoken,
        }
    }

    /// Ends all waiting, at the end of a job or when its ring has died: wakes every waiter and refuses new ones. Claims
    /// stay what they are. Idempotent.
    pub fn close(&self) {
        for mut shard in self.table.each() {
            let woken = shard.close(|cluster| self.demote(cluster));
            debug_assert!(shard.is_closed());
            drop(shard);
            woken.wake();
        }
    }

    /// Sleeps until `cluster` is released, the set is closed or `timeout` is over. When it is the first to wait for this
    /// cluster it calls `promote` before it sleeps, to have the holder told.
    ///
    /// # Panics
    /// If the set has no such cluster.
    pub fn wait_blocking(
        &self,
        cluster: ClusterIndex,
        timeout: Option<Duration>,
        promote: impl FnOnce(),
    ) -> Waited {
        let parker = Parker::new();
        let ticket = match self.wait_for(cluster, Waiter::thread(parker.clone())) {
            Registration::Registered { ticket, first } => {
                if first {
                    promote();
                }
                ticket
            }
            Registration::AlreadyReleased(_) => return Waited::Released,
            Registration::Closed(_) => return Waited::Closed,
        };
        if !parker.sleep(timeout) && self.cancel(ticket) == Cancellation::Removed {
            return Waited::TimedOut;
        }
        if self.table.lock(word_of(cluster.0)).is_closed() { Waited::Closed } else { Waited::Released }
    }
}
