//! A thread's place at a gate: how many of its passes are out, and whether the gate holds it back, in one word.
//!
//! ```text
//!      63 … 40          39 … 3               2          1          0
//!     ┌────────────────┬────────────────────┬──────────┬──────────┬──────────┐
//!     │ entries so far │ passes that are out│ closed   │ orphaned │ raised   │
//!     └────────────────┴────────────────────┴──────────┴──────────┴──────────┘
//! ```
//!
//! | bit, count | changed by | says |
//! |---|---|---|
//! | raised | the gate, under its lock | no pass without a pass: the barrier is up |
//! | orphaned | the thread, when it ends | nobody will enter here any more: forget it once its passes are back |
//! | closed | the gate, when it is dropped | the thread may forget it |
//! | passes | up: the thread that owns the slot, by compare-and-swap; down: whoever drops a pass | |
//! | entries | up, and beyond the top to 0 again: together with the passes | that somebody has come since it was last looked at |
//!
//! Every change is a read-modify-write, so all of them stand in one order; what that gives is in [`gate`](super::gate).
//!
//! A slot is reached through three kinds of `Arc`: the gate's list, the list of the thread that owns it, and its passes.
//! So each of them may end first: a pass may be dropped on another thread, after its thread, or after its gate.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use crossbeam::utils::CachePadded;

use crate::ring::Wake;
use crate::sync::{AtomicU64, Ordering};

const RAISED: u64 = 1;
const ORPHANED: u64 = 1 << 1;
const CLOSED: u64 = 1 << 2;
/// One pass.
const PASS: u64 = 1 << 3;
/// One entry.
const ENTRY: u64 = 1 << 40;
/// The passes.
const PASSES: u64 = (ENTRY - 1) & !(PASS - 1);

/// Tells gates apart, for as long as the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GateId(pub(super) u64);

/// Who is let through a raised barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nesting {
    /// A thread of which a pass is out.
    OfThread,
    /// Nobody.
    None,
}

/// Whose a new slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A thread, which keeps it in its list.
    Thread,
    /// The pass alone that it is made with.
    Pass,
}

/// Shared by a gate, a thread and its passes.
pub(super) type SharedSlot = Arc<Slot>;

/// See the module.
pub(super) struct Slot {
    /// Padded: nobody else's word is near, nor the counts of its `Arc`.
    word: CachePadded<AtomicU64>,
    /// The gate's, to tell the ring thread that the last pass is back.
    waker: Arc<dyn Wake>,
}

impl Slot {
    /// A slot without passes.
    pub(super) fn new(owner: Owner, raised: bool, waker: Arc<dyn Wake>) -> SharedSlot {
        let word = if raised { RAISED } else { 0 };
        let word = match owner {
            Owner::Thread => word,
            Owner::Pass => word | ORPHANED,
        };
        Arc::new(Self { word: CachePadded::new(AtomicU64::new(word)), waker })
    }

    /// Takes a pass, by the thread that owns the slot; `None` if the barrier is up and holds it back.
    ///
    /// Acquire: what happened before the barrier was lowered is visible to whoever gets the pass. The look before may be
    /// at an old value. That only picks the operand, or sends the caller to wait, which looks again under the lock.
    #[inline]
    pub(super) fn enter(self: &Arc<Self>, nesting: Nesting) -> Option<Pass> {
        let mut seen = self.word.load(Ordering::Relaxed);
        loop {
            let is_nested = nesting == Nesting::OfThread && seen & PASSES != 0;
            if seen & RAISED != 0 && !is_nested {
                return None;
            }
            let new = seen.wrapping_add(PASS + ENTRY);
            match self.word.compare_exchange_weak(seen, new, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Pass { slot: Arc::clone(self) }),
                Err(now) => seen = now,
            }
        }
    }

    /// For the gate, under its lock. It publishes nothing, and the change need not be seen at once: whoever enters by a
    /// compare-and-swap sees it.
    pub(super) fn raise(&self) {
        let before = self.word.fetch_or(RAISED, Ordering::Relaxed);
        assert!(before & (RAISED | CLOSED) == 0, "raised twice, or at a gate that is gone");
    }

    /// For the gate, under its lock. Release: see [`enter`](Self::enter).
    pub(super) fn lower(&self) {
        let before = self.word.fetch_and(!RAISED, Ordering::Release);
        assert!(before & RAISED != 0, "lowered twice");
    }

    /// Whether all its passes are back. Acquire: then what their holders did is visible.
    pub(super) fn is_empty(&self) -> bool {
        self.word.load(Ordering::Acquire) & PASSES == 0
    }

    /// Whether its thread has ended and all its passes are back: nobody will ever enter here again.
    pub(super) fn is_gone(&self) -> bool {
        let seen = self.word.load(Ordering::Acquire);
        seen & ORPHANED != 0 && seen & PASSES == 0
    }

    /// Entries so far, modulo 2^24, and passes that are out. A hint, which orders nothing.
    pub(super) fn traffic(&self) -> (u64, u64) {
        let seen = self.word.load(Ordering::Relaxed);
        (seen / ENTRY, (seen & PASSES) / PASS)
    }

    /// For the gate, when it is dropped.
    pub(super) fn close(&self) {
        self.word.fetch_or(CLOSED, Ordering::Relaxed);
    }

    fn is_closed(&self) -> bool {
        self.word.load(Ordering::Relaxed) & CLOSED != 0
    }

    fn disown(&self) {
        let before = self.word.fetch_or(ORPHANED, Ordering::Relaxed);
        debug_assert!(before & ORPHANED == 0, "a thread ends once");
    }
}

/// The right to write to the disk: as long as it lives, no t0 is taken at its gate.
///
/// It may be dropped on any thread. One that is never dropped (`mem::forget`) holds every start of a job up until its
/// timeout.
#[must_use = "dropped at once it protects nothing"]
pub struct Pass {
    slot: SharedSlot,
}

/// Release: what the holder did is visible to whoever finds the gate drained.
impl Drop for Pass {
    #[inline]
    fn drop(&mut self) {
        let before = self.slot.word.fetch_sub(PASS, Ordering::Release);
        debug_assert!(before & PASSES != 0, "a pass is counted once");
        if before & RAISED != 0 && before & PASSES < 2 * PASS {
            self.slot.waker.wake();
        }
    }
}

impl fmt::Debug for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pass").finish_non_exhaustive()
    }
}

/// Slots looked through before one that is found is moved to the front: they share a cache line.
const NEAR: usize = 4;

/// The slots of a thread, one for each gate that it has entered.
struct Here {
    slots: Vec<(GateId, SharedSlot)>,
}

impl Here {
    const fn new() -> Self {
        Self { slots: Vec::new() }
    }

    #[inline]
    fn find(&mut self, gate: GateId) -> Option<&SharedSlot> {
        let mut at = self.slots.iter().position(|&(id, _)| id == gate)?;
        if at >= NEAR {
            // Half way to the front each time: a thread at many gates soon finds those that it uses.
            self.slots.swap(at, at / 2);
            at /= 2;
        }
        Some(&self.slots[at].1)
    }

    /// Adds a slot, and takes those out whose gates are gone: so the list is as long as the number of gates that lived
    /// when it last grew.
    fn add(&mut self, gate: GateId, slot: SharedSlot) -> Vec<(GateId, SharedSlot)> {
        debug_assert!(self.slots.iter().all(|&(id, _)| id != gate), "one slot for each gate");
        let closed = self.slots.extract_if(.., |(_, slot)| slot.is_closed()).collect();
        self.slots.push((gate, slot));
        closed
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        for (_, slot) in self.slots.drain(..) {
            slot.disown();
        }
    }
}

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
std::thread_local! {
    static HERE: RefCell<Here> = const { RefCell::new(Here::new()) };
}
#[cfg(feature = "loom")]
loom::thread_local! {
    static HERE: RefCell<Here> = RefCell::new(Here::new());
}
#[cfg(feature = "shuttle")]
shuttle::thread_local! {
    static HERE: RefCell<Here> = RefCell::new(Here::new());
}

/// How a thread stands to a gate.
pub(super) enum Standing {
    /// It has a slot there and has tried to enter.
    Known(Option<Pass>),
    /// It has none.
    Unknown,
    /// It is ending, and its list is gone. (It may still run destructors that write to a disk.)
    Ending,
}

/// Enters `gate` by this thread's slot, if there is one.
#[inline]
pub(super) fn enter(gate: GateId, nesting: Nesting) -> Standing {
    // Nothing that is foreign to this module runs while the list is borrowed.
    let entered = HERE.try_with(|here| here.borrow_mut().find(gate).map(|slot| slot.enter(nesting)));
    match entered {
        Ok(Some(entered)) => Standing::Known(entered),
        Ok(None) => Standing::Unknown,
        Err(_) => Standing::Ending,
    }
}

/// Makes `slot` this thread's at `gate`.
pub(super) fn keep(gate: GateId, slot: SharedSlot) {
    let closed = HERE.with(|here| here.borrow_mut().add(gate, slot));
    // Not before the list is free again: the last reference to a waker runs a destructor that is not ours.
    drop(closed);
}

/// How many slots this thread keeps.
#[cfg(test)]
pub(super) fn kept() -> usize {
    HERE.with(|here| here.borrow().slots.len())
}
