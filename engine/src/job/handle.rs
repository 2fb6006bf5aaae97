//! Steering and watching a job from any thread.
//!
//! The handle and the ring thread share one small state under a lock that is only ever held for a few instructions. A verb is
//! checked and recorded there, the ring thread woken; it acts when it looks. Progress goes the other way: the ring
//! thread writes it once an iteration, whoever asks reads the last one. Waiting for the end uses a condition variable.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::lifecycle::{IoStatus, Lifecycle, Refusal, Verb};
use super::observer::{JobEvent, Observer};
use super::progress::Progress;
use super::{JobResult, Outcome, Status};
use crate::error::Error;
use crate::live::may_wait;
use crate::ring::Wake;
use crate::units::Speed;

/// Called once with the result, after the job has ended and before [`JobHandle::wait`] returns: on the thread that carried it, or, for a job of a
/// live disk, on one of its own. A panic in it changes nothing of the result but for a notice.
pub type CompletionCallback = Box<dyn FnOnce(&JobResult) + Send>;

pub(crate) use crate::foreign::panic_text;

/// What the ring thread is asked to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Requests {
    /// A user or an error wants it paused.
    pub(crate) pause: bool,
    /// It is to be cancelled.
    pub(crate) cancel: bool,
    /// Speed limit in force.
    pub(crate) speed: Option<Speed>,
}

struct State {
    lifecycle: Lifecycle,
    cancel: bool,
    speed: Option<Speed>,
    progress: Progress,
    /// When that was told, if it was.
    told: Option<Instant>,
    notices: Vec<String>,
    result: Option<Arc<JobResult>>,
    callback: Option<CompletionCallback>,
    observer: Option<Observer>,
    waker: Option<Arc<dyn Wake>>,
}

impl State {
    /// Whether a cancel was accepted that the ring thread has not acted upon.
    fn is_cancelled(&self) -> bool {
        self.cancel && self.lifecycle.status() == Status::Pending
    }

    /// After the lifecycle has changed: the progress shows it, and the observer hears of it.
    fn tell_changes(&mut self) {
        self.progress.status = self.lifecycle.status();
        self.progress.io_status = self.lifecycle.io_status();
        let changes = self.lifecycle.take_changes();
        if let Some(observer) = &self.observer {
            changes.into_iter().for_each(|status| observer.tell(JobEvent::Status(status)));
        }
    }
}

/// What the handle and the ring thread share.
pub(crate) struct Shared {
    state: Mutex<State>,
    ended: Condvar,
    /// Counts requests, so that the ring thread sees with one load whether there is anything new.
    version: AtomicU64,
}

impl Shared {
    pub(crate) fn new(lifecycle: Lifecycle, progress: Progress, speed: Option<Speed>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                lifecycle,
                cancel: false,
                speed,
                progress,
                told: None,
                notices: Vec::new(),
                result: None,
                callback: None,
                observer: None,
                waker: None,
            }),
            ended: Condvar::new(),
            version: AtomicU64::new(0),
        })
    }

    /// Number of requests made so far.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    pub(crate) fn set_waker(&self, waker: Arc<dyn Wake>) {
        self.state.lock().waker = Some(waker);
    }

    /// From now on `observer` hears of what happens.
    pub(crate) fn set_observer(&self, observer: Observer) {
        self.state.lock().observer = Some(observer);
    }

    /// Something other than a change of state has happened.
    pub(crate) fn tell(&self, event: JobEvent<'_>) {
        if let Some(observer) = &self.state.lock().observer {
            observer.tell(event);
        }
    }

    pub(crate) fn set_callback(&self, callback: CompletionCallback) {
        self.state.lock().callback = Some(callback);
    }

    /// What is asked now.
    pub(crate) fn requests(&self) -> Requests {
        let state = self.state.lock();
        Requests { pause: state.lifecycle.wants_pause(), cancel: state.cancel, speed: state.speed }
    }

    /// Change the lifecycle from the ring thread; gives the status after it.
    pub(crate) fn with_lifecycle<T>(&self, change: impl FnOnce(&mut Lifecycle) -> T) -> T {
        let mut state = self.state.lock();
        let result = change(&mut state.lifecycle);
        state.tell_changes();
        result
    }

    /// An error pauses the job: the state and the reason show at the same time.
    pub(crate) fn stopped(&self, io_status: IoStatus, reason: String) {
        let mut state = self.state.lock();
        state.lifecycle.stopped_on_error(io_status);
        state.progress.io_status = io_status;
        state.progress.paused_on = Some(reason);
    }

    /// Something worth telling a person has happened.
    pub(crate) fn notice(&self, notice: String) {
        self.state.lock().notices.push(notice);
    }

    /// What [`Self::notice`] was given so far.
    pub(crate) fn notices(&self) -> Vec<String> {
        self.state.lock().notices.clone()
    }

    /// Publish progress; status, io-status and speed are filled in here.
    pub(crate) fn publish(&self, mut progress: Progress) {
        let mut state = self.state.lock();
        progress.status = state.lifecycle.status();
        progress.io_status = state.lifecycle.io_status();
        progress.speed = state.speed.map(|speed| speed.0.get());
        state.progress = progress;
        state.told = Some(Instant::now());
    }

    /// The ring thread is dying: the job fails with `error`, if it has not ended. `finish` cleans up and adds to the result.
    pub(crate) fn died(&self, engine: &'static str, error: Arc<Error>, finish: impl FnOnce(&mut JobResult)) {
        let progress = {
            let mut state = self.state.lock();
            if state.result.is_some() {
                return;
            }
            state.lifecycle.abort();
            state.tell_changes();
            state.progress.clone()
        };
        let mut result = JobResult {
            outcome: Outcome::Failed(error),
            elapsed: progress.elapsed,
            progress,
            skipped: Vec::new(),
            verified: false,
            durable: true,
            engine,
            resumable: false,
            resumable_bytes: 0,
            map_removed: false,
            guests: None,
            notices: self.notices(),
        };
        finish(&mut result);
        self.end(result);
    }

    /// If the job may conclude it will: whatever is asked for from now on is refused. `false`: it may not, or was cancelled before and the ring
    /// thread has not looked yet.
    pub(crate) fn decide(&self) -> bool {
        let mut state = self.state.lock();
        !state.is_cancelled() && state.lifecycle.decide()
    }

    /// The same for one of a group that concludes as a whole; `false`: it was cancelled before.
    pub(crate) fn conclude_with_group(&self) -> bool {
        let mut state = self.state.lock();
        let concludes = !state.is_cancelled();
        if concludes {
            state.lifecycle.conclude_with_group();
        }
        concludes
    }

    /// The job is about to be complete: a cancel is refused from now on. `false`: one was accepted before.
    pub(crate) fn refuse_cancels(&self) -> bool {
        let mut state = self.state.lock();
        if !state.cancel {
            state.lifecycle.refuse_cancels();
        }
        !state.cancel
    }

    /// The job has ended and released everything: calls the callback, then concludes and lets the waiters go.
    pub(crate) fn end(&self, mut result: JobResult) {
        let callback = {
            let mut state = self.state.lock();
            assert!(state.result.is_none(), "a job ends once");
            result.progress.status = Status::Concluded;
            result.progress.io_status = state.lifecycle.io_status();
            result.progress.speed = state.speed.map(|speed| speed.0.get());
            state.callback.take()
        };
        // The copy is what it is, whatever becomes of those who hear of it: a panic there is theirs.
        let called = callback.map(|callback| catch_unwind(AssertUnwindSafe(|| callback(&result))));
        if let Some(Err(panic)) = called {
            let text = panic_text(panic.as_ref());
            tracing::error!(panic = text, "the completion callback panicked");
            result.notices.push(format!("the completion callback panicked: {text}"));
        }
        let mut state = self.state.lock();
        if let Some(observer) = &state.observer {
            observer.tell(JobEvent::Ended(&result));
        }
        state.lifecycle.conclude();
        state.progress = result.progress.clone();
        state.tell_changes();
        state.result = Some(Arc::new(result));
        state.waker = None;
        self.ended.notify_all();
    }
}

/// Steers and watches a job. Cheap to clone; may outlive the job.
#[derive(Clone)]
pub struct JobHandle {
    shared: Arc<Shared>,
}

impl fmt::Debug for JobHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobHandle").field("progress", &self.progress()).finish()
    }
}

impl JobHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// What it shares with the ring thread.
    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// From now on `observer` hears of what happens.
    #[cfg(feature = "sim")]
    pub fn observe(&self, observer: Observer) {
        self.shared.set_observer(observer);
    }

    /// The last counters that the ring thread published. It does when something happens: time goes on, and a rate falls, without.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let state = self.shared.state.lock();
        let mut progress = state.progress.clone();
        if let Some(told) = state.told.filter(|_| !state.lifecycle.status().is_over()) {
            progress.age(told.elapsed());
        }
        progress
    }

    /// What was worth telling a person while the job ran, but for the first `seen` of it; a line each. The result has all of it.
    #[must_use]
    pub fn notices(&self, seen: usize) -> Vec<String> {
        self.shared.state.lock().notices.get(seen..).unwrap_or_default().to_vec()
    }

    /// Where the job stands.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.state.lock().lifecycle.status()
    }

    /// Whether it is paused, or will be once nothing is in flight any more: a user has asked, or an error stops it.
    #[must_use]
    pub fn wants_pause(&self) -> bool {
        self.shared.state.lock().lifecycle.wants_pause()
    }

    /// Ask for a pause; the job is [`Status::Paused`] once nothing is in flight any more.
    ///
    /// # Errors
    /// When the state does not allow it, or it is paused already.
    pub fn pause(&self) -> Result<(), Refusal> {
        self.request(|state| state.lifecycle.pause())
    }

    /// Go on after a pause, asked for or on an error; what failed is tried again.
    ///
    /// # Errors
    /// When the state does not allow it, or it is not paused.
    pub fn resume(&self) -> Result<(), Refusal> {
        self.request(|state| state.lifecycle.resume())
    }

    /// End the job without a result. Returns at once; [`Self::wait`] tells when it has ended.
    ///
    /// # Errors
    /// When it is ending already: nothing changes any more how. A job that has accepted it is not complete; it may have failed meanwhile.
    pub fn cancel(&self) -> Result<(), Refusal> {
        self.request(|state| {
            state.lifecycle.check(Verb::Cancel)?;
            state.cancel = true;
            Ok(())
        })
    }

    /// Change the speed limit; `None` lifts it. In force within one cluster or 100 ms.
    ///
    /// # Errors
    /// When the state does not allow it.
    pub fn set_speed(&self, speed: Option<Speed>) -> Result<(), Refusal> {
        self.request(|state| {
            state.lifecycle.check(Verb::SetSpeed)?;
            state.speed = speed;
            Ok(())
        })
    }

    /// Let a job in `pending` conclude.
    ///
    /// # Errors
    /// When it is not pending.
    pub fn finalize(&self) -> Result<(), Refusal> {
        self.request(|state| state.lifecycle.finalize())
    }

    /// For mirrors, which a copy is not.
    ///
    /// # Errors
    /// Always.
    pub fn complete(&self) -> Result<(), Refusal> {
        self.request(|state| state.lifecycle.check(Verb::Complete))
    }

    /// Forget a job in `concluded`.
    ///
    /// # Errors
    /// When it is not concluded.
    pub fn dismiss(&self) -> Result<(), Refusal> {
        self.request(|state| state.lifecycle.dismiss())
    }

    /// Wait for the end.
    ///
    /// # Panics
    /// In a callback on the ring thread of an engine with live disks, if it has not ended: that thread would wait for itself.
    #[must_use]
    pub fn wait(&self) -> Arc<JobResult> {
        if let Some(result) = &self.shared.state.lock().result {
            return Arc::clone(result);
        }
        may_wait();
        let mut state = self.shared.state.lock();
        loop {
            if let Some(result) = &state.result {
                return Arc::clone(result);
            }
            self.shared.ended.wait(&mut state);
        }
    }

    /// Wait for the end, at most `timeout`.
    ///
    /// # Panics
    /// As [`Self::wait`], unless `timeout` is zero.
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Arc<JobResult>> {
        let ended = self.shared.state.lock().result.clone();
        if ended.is_some() || timeout.is_zero() {
            return ended;
        }
        may_wait();
        let Some(deadline) = Instant::now().checked_add(timeout) else { return Some(self.wait()) };
        let mut state = self.shared.state.lock();
        while state.result.is_none() {
            if self.shared.ended.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.result.clone()
    }

    fn request(&self, change: impl FnOnce(&mut State) -> Result<(), Refusal>) -> Result<(), Refusal> {
        let waker = {
            let mut state = self.shared.state.lock();
            change(&mut state)?;
            state.tell_changes();
            self.shared.version.fetch_add(1, Ordering::Release);
            state.waker.clone()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }
}
