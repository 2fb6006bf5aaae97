//! The gate of a disk: counts the guest writes that are under way, and holds new ones back while t0 is taken.
//!
//! # Model
//!
//! A guest that wants to write [enters](Gate::enter) and gets a [`Pass`], or finds the barrier up and [waits](Gate::wait).
//! The ring thread, to start a job, [raises](Gate::raise) the barrier, waits until the gate
//! [is drained](Gate::is_drained), does what belongs to t0, and [lowers](Gate::lower) the barrier, which wakes those who
//! wait. The instant at which it found the gate drained is t0: no pass is out, and none is given before `lower`.
//!
//! Each thread has a slot of its own at each gate (`slot`): one word with the number of its passes that are out, and a
//! bit that says that the barrier is up. To enter is one compare-and-swap on that word, to leave one subtraction; no
//! other thread touches its cache line, except one that drops a pass for it and the ring thread when it starts a job.
//! All else is under a lock: the list of slots, the state of the barrier, and those who wait at it.
//!
//! *Nesting.* A thread of which a pass is out may [enter](Gate::enter) while the barrier is up: it would else wait for a barrier
//! that waits for its own pass. A slot counts the passes that its thread *took*, wherever they are now. So a thread that
//! always has a pass out (requests in flight, the next begun before the last one ends) and enters in this way keeps
//! a barrier up until the start gives up. A request that does not block its thread has no need of it, and
//! [enters unnested](Gate::enter_unnested): it waits at the barrier while the requests before it end.
//!
//! # Ordering, and why
//!
//! The usual way is a counter for each thread and one flag for the barrier: the guest counts itself in and then looks at
//! the flag, the ring thread sets the flag and then looks at the counters. Each side stores and then loads something else,
//! which takes a full fence on both sides, at every entry and at every exit. Here the flag is a copy in every counter, so
//! that each question is about a single word, and **there is no pair of a store and a later load of something else that
//! must not be reordered; no SeqCst, and no fence**. A word is changed by read-modify-writes only, which stand in
//! one order and always act on the newest value:
//!
//! - *Entering against raising.* One is first in the order of the slot's word. If it is the entry, then what `raise`
//!   leaves there counts the pass, and `is_drained`, which comes after `raise`, reads that or something later. If it is
//!   the barrier, the compare-and-swap finds it. A slot that is not in the list yet gets in under the lock: before
//!   `raise`, which marks it, or after, when it is made with the mark.
//! - *The last pass back against falling asleep.* The exit that finds the mark wakes the ring thread. One that does not
//!   is before the mark in the word's order, so that `is_drained` counts it as back. No wake-up is lost, and without a
//!   barrier none is made.
//! - *Nested entries.* "A pass is out" is read and acted upon in the same compare-and-swap, so an entry is never let
//!   through by a pass that is back already, and the number of passes of a drained gate stays 0.
//! - *Lowering against waiting.* Under the lock either the waiter is in the list when `lower` empties it, or it finds the
//!   barrier down and is sent back to enter again. Having had the lock after `lower`, its next look at its slot sees the
//!   barrier down: nobody goes round in circles.
//!
//! What travels with it: an exit *releases* and `is_drained` *acquires*, so that at t0 all that guests did under their
//! passes is visible. `lower` *releases* and an entry *acquires*, so that whoever enters after t0 sees what was done at t0,
//! the job in the list above all (`jobs`). Since all changes are read-modify-writes, any of them in between carries
//! this on (release sequences). `raise` and the end of a thread publish nothing and are relaxed.
//!
//! # Lifetimes
//!
//! Slots whose thread has ended and whose passes are back are dropped from the list when it has doubled since the last
//! time, so it is at most twice as long as the number of threads that used the gate at once, and a constant. A thread drops
//! slots of gates that are gone when it enters a new one.
//!
//! The proofs: `tests/live_gate_loom.rs` (every interleaving of small cases), `tests/shuttle` (larger cases in orders chosen at
//! random), `tests/live_gate_stress.rs` (real threads).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Counter;
use std::time::Duration;

use super::slot::{self, GateId, Nesting, Owner, Pass, SharedSlot, Slot, Standing};
use crate::interval_set::{Cancellation, Parker, Waiter, Woken};
use crate::ring::Wake;
use crate::sync::{Mutex, Ordering};

/// The list of slots is not swept before it has this many.
const FEW_SLOTS: usize = 16;

/// How an entry went.
#[must_use = "without its pass a guest must not write"]
#[derive(Debug)]
pub enum Entry {
    /// The guest may write until it drops the pass.
    Admitted(Pass),
    /// The barrier is up: wait for it, then try again.
    AtBarrier,
}

/// A place among those who wait at the barrier, to give it up again.
#[must_use = "without its ticket a waiter cannot be cancelled"]
#[derive(Debug, PartialEq, Eq)]
pub struct WaitTicket {
    gate: GateId,
    number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Barrier {
    Down,
    Up,
    /// Down for ever.
    Poisoned,
}

struct State {
    barrier: Barrier,
    slots: Vec<SharedSlot>,
    /// Length of `slots` at which those that are gone are dropped.
    sweep_at: usize,
    /// In order of arrival. As many as guest requests wait, which whoever accepts requests bounds.
    waiters: Vec<(u64, Waiter)>,
    next_number: u64,
}

impl State {
    fn sweep(&mut self) {
        self.slots.retain(|slot| !slot.is_gone());
        self.sweep_at = FEW_SLOTS.max(2 * self.slots.len());
    }

    fn add(&mut self, slot: SharedSlot) {
        if self.slots.len() >= self.sweep_at {
            self.sweep();
        }
        self.slots.push(slot);
        debug_assert!(self.slots.len() <= self.sweep_at);
    }

    /// Takes the barrier down for the time being or for ever.
    fn take_down(&mut self, to: Barrier) -> Woken {
        if self.barrier == Barrier::Up {
            self.slots.iter().for_each(|slot| slot.lower());
        }
        self.barrier = to;
        Woken::new(self.waiters.drain(..).map(|(_, waiter)| waiter).collect())
    }
}

/// Counts the guest writes of a disk that are under way, and holds new ones back while t0 is taken.
pub struct Gate {
    id: GateId,
    waker: Arc<dyn Wake>,
    state: Mutex<State>,
}

impl Gate {
    /// A gate with the barrier down. `waker` is used when a pass comes back while the barrier is up, and is the last
    /// one of its thread.
    #[must_use]
    pub fn new(waker: Arc<dyn Wake>) -> Arc<Self> {
        // Only ever told apart from each other, so no part of any model.
        static NEXT: Counter = Counter::new(0);
        let state = State {
            barrier: Barrier::Down,
            slots: Vec::new(),
            sweep_at: FEW_SLOTS,
            waiters: Vec::new(),
            next_number: 0,
        };
        Arc::new(Self { id: GateId(NEXT.fetch_add(1, Ordering::Relaxed)), waker, state: Mutex::new(state) })
    }

    /// Enters, for a request that may block its thread: one of which a pass is out already is let through the barrier.
    #[inline]
    pub fn enter(&self) -> Entry {
        self.admit(Nesting::OfThread)
    }

    /// Enters, for a request that does not block its thread (a callback, a future, the ring thread's own): held back
    /// by the barrier whatever passes are out.
    #[inline]
    pub fn enter_unnested(&self) -> Entry {
        self.admit(Nesting::None)
    }

    #[inline]
    fn admit(&self, nesting: Nesting) -> Entry {
        let pass = match slot::enter(self.id, nesting) {
            Standing::Known(pass) => pass,
            Standing::Unknown => self.enter_first(nesting),
            Standing::Ending => self.enter_last(),
        };
        pass.map_or(Entry::AtBarrier, Entry::Admitted)
    }

    /// The first entry of a thread.
    #[cold]
    fn enter_first(&self, nesting: Nesting) -> Option<Pass> {
        let mut state = self.state.lock();
        let slot = Slot::new(Owner::Thread, state.barrier == Barrier::Up, Arc::clone(&self.waker));
        state.add(Arc::clone(&slot));
        drop(state);
        slot::keep(self.id, Arc::clone(&slot));
        slot.enter(nesting)
    }

    /// An entry of a thread that has no list of slots any more: its pass has a slot of its own.
    #[cold]
    fn enter_last(&self) -> Option<Pass> {
        let mut state = self.state.lock();
        let slot = Slot::new(Owner::Pass, state.barrier == Barrier::Up, Arc::clone(&self.waker));
        // Under the lock, and before it is in the list: without a pass it counts as gone.
        let pass = slot.enter(Nesting::None)?;
        state.add(slot);
        Some(pass)
    }

    /// Raises the barrier: from now on who enters has to wait. Nothing happens at a gate that is poisoned.
    ///
    /// # Panics
    /// If it is up already.
    pub fn raise(&self) {
        let mut state = self.state.lock();
        match state.barrier {
            Barrier::Up => panic!("the barrier is up already"),
            Barrier::Poisoned => return,
            Barrier::Down => state.barrier = Barrier::Up,
        }
        state.sweep();
        state.slots.iter().for_each(|slot| slot.raise());
    }

    /// Whether every pass is back; once true, it stays so until the barrier is lowered. Never true at a gate that is poisoned.
    ///
    /// What guests did under their passes is visible then. As long as it is false the waker will be used again, so the
    /// caller may sleep.
    ///
    /// # Panics
    /// If the barrier is down.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        let state = self.state.lock();
        assert_ne!(state.barrier, Barrier::Down, "a gate drains at its barrier");
        state.barrier == Barrier::Up && state.slots.iter().all(|slot| slot.is_empty())
    }

    /// A number that has changed if anybody has entered since it was last asked for, and how many passes are out about now. For those
    /// who want to know whether there are guests: it takes the lines of their words from their caches, so it is not to be asked often.
    pub(super) fn traffic(&self) -> (u64, u64) {
        let state = self.state.lock();
        let sums = state.slots.iter().map(|slot| slot.traffic());
        sums.fold((0, 0), |(entries, out), (more, more_out)| (entries + more, out + more_out))
    }

    /// Lowers the barrier and wakes everybody who waits at it, on this thread. Nothing happens at a gate that is poisoned.
    ///
    /// # Panics
    /// If it is down.
    pub fn lower(&self) {
        let mut state = self.state.lock();
        match state.barrier {
            Barrier::Down => panic!("the barrier is down already"),
            Barrier::Poisoned => return,
            Barrier::Up => {}
        }
        let woken = state.take_down(Barrier::Down);
        drop(state);
        woken.wake();
    }

    /// Takes the barrier down for ever and wakes everybody who waits at it: the engine is dead, and guests go on without
    /// it. Idempotent; from any thread.
    pub fn poison(&self) {
        let woken = self.state.lock().take_down(Barrier::Poisoned);
        woken.wake();
    }

    /// Has `waiter` woken when the barrier is lowered: once, by the thread that lowers it.
    ///
    /// # Errors
    /// If the barrier is down (again): enter. The waiter is handed back and was not woken.
    pub fn wait(&self, waiter: Waiter) -> Result<WaitTicket, Waiter> {
        let mut state = self.state.lock();
        if state.barrier != Barrier::Up {
            return Err(waiter);
        }
        let number = state.next_number;
        state.next_number += 1;
        state.waiters.push((number, waiter));
        Ok(WaitTicket { gate: self.id, number })
    }

    /// Gives up waiting: either the waiter is removed and will not be woken, or it was woken already (or is just being
    /// woken) and it is too late.
    ///
    /// # Panics
    /// If the ticket is of another gate.
    pub fn cancel(&self, ticket: WaitTicket) -> Cancellation {
        let WaitTicket { gate, number } = ticket;
        assert_eq!(gate, self.id, "the ticket is of another gate");
        let mut state = self.state.lock();
        let at = state.waiters.iter().position(|&(other, _)| other == number);
        let removed = at.map(|at| state.waiters.remove(at));
        // Before the waiter is dropped, whose destructor is not ours.
        drop(state);
        match removed {
            Some(_) => Cancellation::Removed,
            None => Cancellation::AlreadyWoken,
        }
    }

    /// Sleeps until the barrier is down or `timeout` is over; whether it is the former.
    #[must_use]
    pub fn wait_blocking(&self, timeout: Option<Duration>) -> bool {
        let parker = Parker::new();
        let Ok(ticket) = self.wait(Waiter::thread(Arc::clone(&parker))) else {
            return true;
        };
        parker.sleep(timeout) || self.cancel(ticket) == Cancellation::AlreadyWoken
    }

    /// How many slots it has listed.
    #[cfg(test)]
    pub(super) fn slots(&self) -> usize {
        self.state.lock().slots.len()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        state.slots.iter().for_each(|slot| slot.close());
        let woken = state.take_down(Barrier::Poisoned);
        drop(state);
        woken.wake();
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("id", &self.id.0).finish_non_exhaustive()
    }
}
