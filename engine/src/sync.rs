//! What the lock-free parts synchronise with: the standard atomics and parking_lot, or loom's models of them.
//!
//! Model checking needs every atomic, lock and park of the checked code to go through loom, so the code under test
//! imports from here and nowhere else. Built with `--cfg loom`, such a type works only inside `loom::model`.

#[cfg(loom)]
pub(crate) use self::modelled::{Mutex, MutexGuard, Parking};
#[cfg(not(loom))]
pub(crate) use self::real::{Mutex, MutexGuard, Parking};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

#[cfg(not(loom))]
mod real {
    use std::thread::Thread;
    use std::time::Duration;

    pub(crate) use parking_lot::{Mutex, MutexGuard};

    /// The thread that made it, to be woken by another.
    pub(crate) struct Parking(Thread);

    impl Parking {
        pub(crate) fn current() -> Self {
            Self(std::thread::current())
        }

        pub(crate) fn unpark(&self) {
            self.0.unpark();
        }

        /// Sleeps until unparked or `timeout` is over; may return early, so the caller looks at its own flag.
        pub(crate) fn park(timeout: Option<Duration>) {
            match timeout {
                None => std::thread::park(),
                Some(timeout) => std::thread::park_timeout(timeout),
            }
        }
    }
}

#[cfg(loom)]
mod modelled {
    use std::time::Duration;

    use loom::thread::Thread;

    pub(crate) use loom::sync::MutexGuard;

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
}
