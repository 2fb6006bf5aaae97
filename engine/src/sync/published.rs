//! A value that is replaced as a whole now and then, and looked at all the time by threads that take no lock.
//!
//! The real one is a pointer under crossbeam-epoch: a look is one load where there is no value, else a pin of the
//! thread's epoch and a load. Who replaces the value hands the old one to the epoch, which drops it when every thread
//! that may have seen it has looked away. Replacing releases, looking acquires, and that is all the order it gives: a
//! look may still see the old value *after* a replacement unless something else orders the two.
//!
//! Under loom and shuttle the values are kept in a list until the end, and the pointer is the modelled number of the current one:
//! what is modelled is what a look may see. That memory is not freed too early is crossbeam's part.

#[cfg(any(feature = "loom", feature = "shuttle"))]
pub(crate) use self::modelled::Published;
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) use self::real::Published;

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
mod real {
    use std::sync::atomic::Ordering;

    use crossbeam::epoch::{self, Atomic, Owned, Shared};

    /// How often an epoch is tried to be ended in order to free what was replaced: garbage is two epochs old before it
    /// goes, and its own has to end as well.
    const EPOCHS: u32 = 4;

    /// See the module.
    pub(crate) struct Published<T>(Atomic<T>);

    impl<T: Send + Sync + 'static> Published<T> {
        pub(crate) fn none() -> Self {
            Self(Atomic::null())
        }

        /// Looks at the value there is. `look` must be quick: while it runs, nothing that is replaced anywhere is freed.
        #[inline]
        pub(crate) fn with<R>(&self, look: impl FnOnce(Option<&T>) -> R) -> R {
            // SAFETY: what is loaded under this guard is compared with null and never followed.
            let unprotected = unsafe { epoch::unprotected() };
            if self.0.load(Ordering::Acquire, unprotected).is_null() {
                return look(None);
            }
            let guard = epoch::pin();
            let current = self.0.load(Ordering::Acquire, &guard);
            // SAFETY: it is null or came from `Owned::new` in `replace`, whose release the load has acquired; it is
            // dropped only after every guard that was live when it was replaced, so it outlives this one.
            look(unsafe { current.as_ref() })
        }

        /// Puts another value in place, or none.
        pub(crate) fn replace(&self, value: Option<T>) {
            let guard = epoch::pin();
            let new = value.map_or_else(Shared::null, |value| Owned::new(value).into_shared(&guard));
            let old = self.0.swap(new, Ordering::AcqRel, &guard);
            if !old.is_null() {
                // SAFETY: `old` came from `Owned::new`; the swap took it out of the only place where it can be found,
                // and gave it to this call alone. `T: Send`, since any thread may drop it.
                unsafe { guard.defer_destroy(old) };
            }
            drop(guard);
            Self::collect();
        }

        /// Frees what was replaced and is not looked at any more.
        pub(crate) fn collect() {
            for _ in 0..EPOCHS {
                epoch::pin().flush();
            }
        }
    }

    impl<T> Drop for Published<T> {
        fn drop(&mut self) {
            let last = std::mem::replace(&mut self.0, Atomic::null());
            // SAFETY: `&mut self` proves that nobody looks or replaces, and the pointer is null or from `Owned::new`.
            drop(unsafe { last.try_into_owned() });
        }
    }
}

#[cfg(any(feature = "loom", feature = "shuttle"))]
mod modelled {
    use std::sync::{Arc, Mutex};

    use super::super::{AtomicU64, Ordering};

    /// See the module.
    pub(crate) struct Published<T> {
        /// Number of the value in `values`, counted from 1; 0 for none.
        current: AtomicU64,
        values: Mutex<Vec<Arc<T>>>,
    }

    impl<T: Send + Sync + 'static> Published<T> {
        pub(crate) fn none() -> Self {
            Self { current: AtomicU64::new(0), values: Mutex::new(Vec::new()) }
        }

        pub(crate) fn with<R>(&self, look: impl FnOnce(Option<&T>) -> R) -> R {
            let number = usize::try_from(self.current.load(Ordering::Acquire)).expect("64 bits");
            let index = number.checked_sub(1);
            let value = index.map(|index| self.values.lock().expect("no panic under it")[index].clone());
            look(value.as_deref())
        }

        pub(crate) fn replace(&self, value: Option<T>) {
            let number = value.map_or(0, |value| {
                let mut values = self.values.lock().expect("no panic under it");
                values.push(Arc::new(value));
                values.len() as u64
            });
            self.current.swap(number, Ordering::AcqRel);
        }

        pub(crate) fn collect() {}
    }
}
