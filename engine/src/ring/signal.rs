//! How other threads get the ring thread's attention: the wake-up handle, and helper threads with a result.
//!
//! # Model
//! One atomic word with three bits. The ring thread sets [`ASLEEP`] just before it waits, and only if the word is 0; whoever
//! has news sets [`PENDING`] and kicks (a system call) only if it was the first to do so and the ring thread is asleep.
//! So a busy ring costs its producers one atomic instruction, and of many producers one pays for the kick.
//!
//! # Why no wake-up is lost
//! Every access is a read-modify-write, so all of them stand in one order. Either the producer's comes before the ring's
//! attempt to fall asleep, which then fails, or after it: then the producer sees [`ASLEEP`] and kicks. [`Signal::take`]
//! clears the word before the ring looks at its queues; being acquire, it makes all that the producers queued visible.
//! A kick may come late, after the ring woke for another reason: the ring then wakes once for nothing and looks again.

use std::sync::atomic::{AtomicU32, Ordering};

use crossbeam::sync::Unparker;
use crossbeam::utils::CachePadded;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::Wake;

/// The ring thread waits, or is about to.
const ASLEEP: u32 = 1;
/// There is news.
const PENDING: u32 = 2;
/// The news is (also) a wake-up through [`Wake`].
const WOKEN: u32 = 4;

/// How a sleeping ring thread is roused.
pub(crate) enum Kick {
    /// It has a poll on this descriptor in its ring.
    Event(EventFd),
    /// It is parked.
    Parked(Unparker),
}

/// See the module's header.
pub(crate) struct Signal {
    word: CachePadded<AtomicU32>,
    kick: Kick,
}

impl Signal {
    /// A signal that rouses by `kick`.
    pub(crate) fn new(kick: Kick) -> Self {
        Self { word: CachePadded::new(AtomicU32::new(0)), kick }
    }

    /// Tell the ring thread that there is something in its queues.
    pub(crate) fn notify(&self) {
        self.raise(PENDING);
    }

    /// For the ring thread: announce that it is going to wait. `false`: there is news, do not.
    pub(crate) fn fall_asleep(&self) -> bool {
        self.word.compare_exchange(0, ASLEEP, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// For the ring thread: awake again, consume the news; look at the queues after this. Says whether [`Wake`] was used.
    pub(crate) fn take(&self) -> bool {
        self.word.swap(0, Ordering::AcqRel) & WOKEN != 0
    }

    /// The descriptor to poll, if it rouses by one.
    pub(crate) fn event(&self) -> Option<&EventFd> {
        match &self.kick {
            Kick::Event(event) => Some(event),
            Kick::Parked(_) => None,
        }
    }

    fn raise(&self, bits: u32) {
        let before = self.word.fetch_or(bits, Ordering::AcqRel);
        if before & (ASLEEP | PENDING) != ASLEEP {
            return;
        }
        match &self.kick {
            // The counter is never read: the poll is edge-triggered, so each write is an event.
            Kick::Event(event) => loop {
                match event.write(1) {
                    Ok(_) => break,
                    Err(Errno::EINTR) => {}
                    // 2^64 - 2 kicks: centuries. Anything else cannot happen to a descriptor that we own.
                    Err(errno) => panic!("writing to our own eventfd: {errno}"),
                }
            },
            Kick::Parked(unparker) => unparker.unpark(),
        }
    }
}

impl Wake for Signal {
    fn wake(&self) {
        self.raise(PENDING | WOKEN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam::sync::Parker;

    #[test]
    fn news_keeps_the_ring_from_falling_asleep_and_is_consumed_once() {
        let signal = Signal::new(Kick::Parked(Parker::new().unparker().clone()));
        signal.notify();
        assert!(!signal.fall_asleep());
        assert!(!signal.take(), "news from a helper is not a wake-up");
        signal.wake();
        signal.wake();
        assert!(!signal.fall_asleep());
        assert!(signal.take());
        assert!(signal.fall_asleep());
        assert!(!signal.take());
    }
}
