//! loom's models of what the parent names.

use std::time::Duration;

use loom::thread::Thread;

use super::Ordering;
pub(crate) use loom::sync::MutexGuard;

/// loom's atomic, so wrapped that loom tries every order of its accesses.
///
/// For each object loom 0.7 remembers the last access alone when it decides which orders are worth a try. A thread
/// that loads and then swaps, as every compare-and-swap loop does, thereby hides a load that another thread made
/// before: loom never tries that other load after the swap (tokio-rs/loom#166 and #392; one load against one such
/// loop is run in a single order). So every access first touches a companion by a read-modify-write, which is
/// in conflict with every other: all orders are tried, and the load that follows may still return any old value
/// that its ordering allows. Relaxed, the companion orders nothing by itself.
pub(crate) struct AtomicU64 {
    turn: loom::sync::atomic::AtomicU64,
    value: loom::sync::atomic::AtomicU64,
}

impl AtomicU64 {
    pub(crate) fn new(value: u64) -> Self {
        use loom::sync::atomic::AtomicU64 as Model;
        Self { turn: Model::new(0), value: Model::new(value) }
    }

    fn take_turn(&self) -> &loom::sync::atomic::AtomicU64 {
        self.turn.fetch_or(0, Ordering::Relaxed);
        &self.value
    }

    pub(crate) fn load(&self, order: Ordering) -> u64 {
        self.take_turn().load(order)
    }

    pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.take_turn().swap(value, order)
    }

    pub(crate) fn compare_exchange_weak(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.take_turn().compare_exchange(current, new, success, failure)
    }

    pub(crate) fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        self.take_turn().fetch_or(bits, order)
    }

    pub(crate) fn fetch_and(&self, bits: u64, order: Ordering) -> u64 {
        self.take_turn().fetch_and(bits, order)
    }

    pub(crate) fn fetch_sub(&self, amount: u64, order: Ordering) -> u64 {
        self.take_turn().fetch_sub(amount, order)
    }

    pub(crate) fn fetch_xor(&self, bits: u64, order: Ordering) -> u64 {
        self.take_turn().fetch_xor(bits, order)
    }
}

/// loom's lock with the interface of parking_lot's, which knows no poison.
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect("a model panicked while it held the lock")
    }
}

/// The thread that made it, to be woken by another.
pub(crate) struct Parking(Thread);

impl Parking {
    pub(crate) fn current() -> Self {
        Self(loom::thread::current())
    }

    pub(crate) fn unpark(&self) {
        self.0.unpark();
    }

    pub(crate) fn park(timeout: Option<Duration>) {
        assert!(timeout.is_none(), "loom has no time, so a model cannot wait for it");
        loom::thread::park();
    }
}
