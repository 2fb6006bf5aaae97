//! shuttle's models of what the parent names. Its atomics are used as they are.

use std::time::Duration;

pub(crate) use shuttle::sync::MutexGuard;
use shuttle::thread::Thread;

/// shuttle's lock with the interface of parking_lot's, which knows no poison.
pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().expect("a case panicked while it held the lock")
    }
}

/// The thread that made it, to be woken by another.
pub(crate) struct Parking(Thread);

impl Parking {
    pub(crate) fn current() -> Self {
        Self(shuttle::thread::current())
    }

    pub(crate) fn unpark(&self) {
        self.0.unpark();
    }

    pub(crate) fn park(timeout: Option<Duration>) {
        assert!(timeout.is_none(), "shuttle has no time, so a case cannot wait for it");
        shuttle::thread::park();
    }
}
