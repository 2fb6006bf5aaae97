//! A question to the ring thread with one answer: how guest threads, callbacks and futures wait for it.
//!
//! The two sides share the cell by counted reference and neither needs the other: an asker that goes away leaves a cell that the
//! ring thread answers to nobody, and a ring thread that goes away answers what it still has (an [`Answer`] that is dropped
//! says so). So whoever waits always wakes. An asker may leave word when it goes ([`ask_noting`]), so that what nobody waits for any
//! more need not be done. A callback or a waker that panics harms nobody but itself.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

enum State<T> {
    /// No answer yet; whom to tell.
    Open(Listener<T>),
    Answered(T),
    /// The answer was taken, or its receiver is gone.
    Over,
}

enum Listener<T> {
    Nobody,
    Task(Waker),
    Callback(Box<dyn FnOnce(T) + Send>),
}

struct Shared<T> {
    state: Mutex<State<T>>,
    answered: Condvar,
    /// Set when the asker goes before it has its answer.
    gone: Option<Arc<AtomicBool>>,
}

impl<T> Shared<T> {
    fn new(listener: Listener<T>, gone: Option<Arc<AtomicBool>>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::Open(listener)), answered: Condvar::new(), gone })
    }
}

/// The side that answers, once. Dropped without an answer it gives `T::lost()`.
pub(super) struct Answer<T: Lost>(Option<Arc<Shared<T>>>);

/// The side that waits: blocking, or as a future. Dropped, the answer is dropped too.
pub(super) struct Asked<T>(Arc<Shared<T>>);

/// What an answer is when the ring thread is gone.
pub(super) trait Lost {
    /// See the trait.
    fn lost() -> Self;
}

/// A question with one who waits for the answer.
pub(super) fn ask<T: Lost>() -> (Answer<T>, Asked<T>) {
    let shared = Shared::new(Listener::Nobody, None);
    (Answer(Some(Arc::clone(&shared))), Asked(shared))
}

/// The same, and `gone` is set if the one who waits goes before the answer is there.
pub(super) fn ask_noting<T: Lost>(gone: &Arc<AtomicBool>) -> (Answer<T>, Asked<T>) {
    let shared = Shared::new(Listener::Nobody, Some(Arc::clone(gone)));
    (Answer(Some(Arc::clone(&shared))), Asked(shared))
}

/// A question whose answer goes to a callback, on the ring thread.
pub(super) fn ask_with<T: Lost>(call: impl FnOnce(T) + Send + 'static) -> Answer<T> {
    Answer(Some(Shared::new(Listener::Callback(Box::new(call)), None)))
}

impl<T: Lost> Answer<T> {
    pub(super) fn give(mut self, answer: T) {
        self.put(answer);
    }

    /// Whether somebody waits for it, or may look for it.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.as_ref().is_some_and(|cell| !matches!(*cell.state.lock(), State::Over))
    }

    fn put(&mut self, answer: T) {
        let Some(cell) = self.0.take() else { return };
        let mut state = cell.state.lock();
        match std::mem::replace(&mut *state, State::Over) {
            State::Open(Listener::Callback(call)) => {
                drop(state);
                crate::foreign::call("a callback", || call(answer));
            }
            State::Open(listener) => {
                *state = State::Answered(answer);
                cell.answered.notify_all();
                drop(state);
                if let Listener::Task(waker) = listener {
                    crate::foreign::call("a waker", || waker.wake());
                }
            }
            // Nobody wants it any more; dropped outside the lock.
            State::Answered(_) | State::Over => drop(state),
        }
    }
}

impl<T: Lost> Drop for Answer<T> {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.put(T::lost());
        }
    }
}

std::thread_local! {
    static ON_RING_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// This thread answers: it must not wait for an answer.
pub(super) fn this_is_a_ring_thread() {
    ON_RING_THREAD.set(true);
}

/// Whoever is called here may sleep. Asked before anything is touched or sent: what was asked for in a call that panics would come to be all the same, and
/// nobody would have its handle.
///
/// # Panics
/// On a ring thread (in a callback, that is): it would wait for itself, and everybody for it.
pub(crate) fn may_wait() {
    assert!(
        !ON_RING_THREAD.get(),
        "a call that waits, within a callback: the engine's thread would wait for itself. Use a form that does not wait"
    );
}

impl<T> Asked<T> {
    /// Sleep until the answer is there.
    ///
    /// # Panics
    /// See [`may_wait`].
    pub(super) fn wait(self) -> T {
        may_wait();
        let mut state = self.0.state.lock();
        loop {
            match std::mem::replace(&mut *state, State::Over) {
                State::Answered(answer) => return answer,
                open => *state = open,
            }
            self.0.answered.wait(&mut state);
        }
    }

    /// Sleep until the answer is there, or for `limit`.
    pub(super) fn wait_for(self, limit: Duration) -> Option<T> {
        may_wait();
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.0.state.lock();
        loop {
            match std::mem::replace(&mut *state, State::Over) {
                State::Answered(answer) => return Some(answer),
                open => *state = open,
            }
            let Some(deadline) = deadline else {
                self.0.answered.wait(&mut state);
                continue;
            };
            if self.0.answered.wait_until(&mut state, deadline).timed_out() {
                return match std::mem::replace(&mut *state, State::Over) {
                    State::Answered(answer) => Some(answer),
                    _ => None,
                };
            }
        }
    }

    /// The answer, if it is there.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn try_take(&self) -> Option<T> {
        let mut state = self.0.state.lock();
        match std::mem::replace(&mut *state, State::Over) {
            State::Answered(answer) => Some(answer),
            open => {
                *state = open;
                None
            }
        }
    }
}

impl<T> Future for Asked<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut state = self.0.state.lock();
        match std::mem::replace(&mut *state, State::Over) {
            State::Answered(answer) => Poll::Ready(answer),
            State::Open(_) => {
                *state = State::Open(Listener::Task(context.waker().clone()));
                Poll::Pending
            }
            State::Over => panic!("polled after it was ready"),
        }
    }
}

impl<T> Drop for Asked<T> {
    fn drop(&mut self) {
        let before = std::mem::replace(&mut *self.0.state.lock(), State::Over);
        if let (State::Open(_), Some(gone)) = (&before, &self.0.gone) {
            // After the state: whoever takes the word sees that nobody waits.
            gone.store(true, Ordering::Release);
        }
        // An answer that nobody took may do things when it is dropped (a permit goes back): outside the lock.
        drop(before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Lost for Option<u32> {
        fn lost() -> Self {
            None
        }
    }

    #[test]
    fn an_answer_reaches_a_thread_that_waits_and_one_that_comes_late() {
        let (answer, asked) = ask::<Option<u32>>();
        let waiting = std::thread::spawn(move || asked.wait());
        answer.give(Some(7));
        assert_eq!(waiting.join().unwrap(), Some(7));
        let (answer, asked) = ask::<Option<u32>>();
        answer.give(Some(8));
        assert_eq!(asked.wait(), Some(8));
    }

    #[test]
    fn one_who_waits_for_a_while_gets_the_answer_or_goes() {
        let (answer, asked) = ask::<Option<u32>>();
        let waiting = std::thread::spawn(move || asked.wait_for(Duration::from_secs(60)));
        answer.give(Some(7));
        assert_eq!(waiting.join().unwrap(), Some(Some(7)));
        let (answer, asked) = ask::<Option<u32>>();
        let waiting = std::thread::spawn(move || asked.wait_for(Duration::MAX));
        answer.give(Some(9));
        assert_eq!(waiting.join().unwrap(), Some(Some(9)));
        let (answer, asked) = ask::<Option<u32>>();
        assert_eq!(asked.wait_for(Duration::from_millis(1)), None);
        answer.give(Some(8));
    }

    #[test]
    fn an_answer_that_is_lost_says_so() {
        let (answer, asked) = ask::<Option<u32>>();
        drop(answer);
        assert_eq!(asked.wait(), None);
    }

    #[test]
    fn one_who_went_away_harms_nothing() {
        let (answer, asked) = ask::<Option<u32>>();
        assert!(answer.is_wanted());
        drop(asked);
        assert!(!answer.is_wanted());
        answer.give(Some(1));
    }

    #[test]
    fn one_who_goes_without_his_answer_leaves_word() {
        let gone = Arc::new(AtomicBool::new(false));
        let (answer, asked) = ask_noting::<Option<u32>>(&gone);
        answer.give(Some(1));
        drop(asked);
        let (answer, asked) = ask_noting::<Option<u32>>(&gone);
        answer.give(Some(1));
        assert_eq!(asked.wait(), Some(1));
        assert!(!gone.load(Ordering::Acquire), "both had their answers");
        let (_answer, asked) = ask_noting::<Option<u32>>(&gone);
        drop(asked);
        assert!(gone.load(Ordering::Acquire));
    }

    #[test]
    fn a_callback_is_called_once() {
        let (sender, receiver) = std::sync::mpsc::channel();
        ask_with::<Option<u32>>(move |answer| sender.send(answer).unwrap()).give(Some(3));
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [Some(3)]);
    }

    #[test]
    fn a_callback_or_a_waker_that_panics_harms_nobody() {
        struct Grenade;
        impl std::task::Wake for Grenade {
            fn wake(self: Arc<Self>) {
                panic!("as planned");
            }
        }
        // One that is answered, and one that is dropped while the thread unwinds: two panics at a time would end the process.
        ask_with::<Option<u32>>(|_| panic!("as planned")).give(Some(3));
        let unwound = std::panic::catch_unwind(|| {
            let _lost = ask_with::<Option<u32>>(|_| panic!("as planned"));
            panic!("as planned");
        });
        assert!(unwound.is_err());
        let waker = Waker::from(Arc::new(Grenade));
        let (answer, mut asked) = ask::<Option<u32>>();
        assert!(Pin::new(&mut asked).poll(&mut Context::from_waker(&waker)).is_pending());
        answer.give(Some(5));
        assert_eq!(asked.wait(), Some(5), "the answer is there all the same");
    }

    #[test]
    fn a_future_is_woken() {
        struct Flag(std::sync::atomic::AtomicBool);
        impl std::task::Wake for Flag {
            fn wake(self: Arc<Self>) {
                self.0.store(true, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let flag = Arc::new(Flag(false.into()));
        let waker = Waker::from(Arc::clone(&flag));
        let mut context = Context::from_waker(&waker);
        let (answer, mut asked) = ask::<Option<u32>>();
        assert!(Pin::new(&mut asked).poll(&mut context).is_pending());
        answer.give(Some(5));
        assert!(flag.0.load(std::sync::atomic::Ordering::SeqCst));
        assert_eq!(Pin::new(&mut asked).poll(&mut context), Poll::Ready(Some(5)));
    }
}
