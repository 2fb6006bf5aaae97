//! What the lock-free parts synchronise with: the standard atomics and parking_lot, or loom's or shuttle's models of them.
//!
//! Model checking needs every atomic, lock and park of the checked code to go through the checker, so the code under test
//! imports from here and nowhere else. With the feature `loom`, such a type works only inside `loom::model`; with `shuttle`, only
//! inside a run of shuttle.
//!
//! The two see different things. loom tries every order of small cases, and every value that the memory model lets a load return.
//! shuttle tries orders at random, of cases as large as one likes, and takes every atomic for sequentially consistent.

mod published;

#[cfg(feature = "loom")]
mod looms;
#[cfg(feature = "shuttle")]
mod shuttles;

#[cfg(feature = "loom")]
pub(crate) use self::looms::{AtomicU64, Mutex, MutexGuard, Parking};
pub(crate) use self::published::Published;
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) use self::real::{Mutex, MutexGuard, Parking};
#[cfg(feature = "shuttle")]
pub(crate) use self::shuttles::{Mutex, MutexGuard, Parking};
#[cfg(feature = "loom")]
pub(crate) use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
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
