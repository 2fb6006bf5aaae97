//! Signals: the first one ends the work cleanly, the second one at once.
//!
//! # How
//! One thread takes the signals from a pipe; it never prints, so a terminal or a pipe that is stuck cannot keep it from
//! the next signal. The first SIGINT, SIGTERM or SIGHUP cancels the job. [`SAME_SIGNAL`] later a second one
//! ends the process inside the signal handler, whatever the threads are doing. (Not sooner: `timeout` and some terminals
//! deliver one request twice.) SIGCONT resumes a job that has paused on an error and is harmless otherwise, as
//! after Ctrl-Z and `fg`. A job of another process is not resumed here: that SIGCONT came is kept for whoever watches it ([`Signalled::take_continue`]).
//!
//! SIGXFSZ is caught so that a write beyond the limit fails with `EFBIG`. SIGPIPE is ignored by Rust's start-up code. SIGHUP
//! stays ignored where it was at the start (`nohup`).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use engine::job::{IoStatus, JobHandle, Status};
use nix::sys::signal::Signal;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;

/// Signals within this time after the first one count as the same request.
const SAME_SIGNAL: Duration = Duration::from_millis(200);

#[derive(Default)]
struct State {
    /// Number of the first ending signal, 0 before.
    first: AtomicI32,
    /// SIGCONT has come since this was last asked.
    continued: AtomicBool,
    /// Pauses that were lifted, by SIGCONT or by a key.
    resumes: AtomicU64,
    /// The job to steer, once there is one.
    job: Mutex<Option<JobHandle>>,
}

/// What the signals asked for so far.
#[derive(Clone)]
pub(crate) struct Signalled {
    state: Arc<State>,
}

/// An ending signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ending(i32);

impl Ending {
    /// As a shell shows it: 128 and the signal's number.
    pub(crate) fn exit_code(self) -> u8 {
        u8::try_from(128 + self.0).unwrap_or(u8::MAX)
    }

    /// `SIGINT`, …
    pub(crate) fn name(self) -> &'static str {
        Signal::try_from(self.0).map_or("a signal", Signal::as_str)
    }
}

impl Signalled {
    /// Take over the signals.
    pub(crate) fn install() -> io::Result<Self> {
        let state = Arc::new(State::default());
        let armed = Arc::new(AtomicBool::new(false));
        let mut ending = vec![SIGINT, SIGTERM];
        if !is_ignored(SIGHUP) {
            ending.push(SIGHUP);
        }
        for &signal in &ending {
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&armed))?;
        }
        flag::register(SIGXFSZ, Arc::default())?;
        let mut signals = Signals::new(ending.iter().chain([&SIGCONT]))?;
        let shared = Arc::clone(&state);
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                if signal == SIGCONT {
                    shared.continued.store(true, Ordering::SeqCst);
                    shared.go_on();
                } else if shared.first.swap(signal, Ordering::SeqCst) == 0 {
                    shared.end();
                    thread::sleep(SAME_SIGNAL);
                    armed.store(true, Ordering::SeqCst);
                }
            }
        })?;
        Ok(Self { state })
    }

    /// Cancel `job` at the first ending signal, at once if there was one; resume it at SIGCONT if it has paused on an error.
    pub(crate) fn steer(&self, job: &JobHandle) {
        *self.state.job() = Some(job.clone());
        // Both sides write first and look at the other's then: one of them sees both.
        if self.ending().is_some() {
            self.state.end();
        }
    }

    /// The first ending signal, if there was one.
    pub(crate) fn ending(&self) -> Option<Ending> {
        match self.state.first.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(Ending(signal)),
        }
    }

    /// Whether SIGCONT has come since this was last asked.
    pub(crate) fn take_continue(&self) -> bool {
        self.state.continued.swap(false, Ordering::SeqCst)
    }

    /// How many pauses were lifted so far.
    pub(crate) fn resumes(&self) -> u64 {
        self.state.resumes.load(Ordering::SeqCst)
    }

    /// Nobody is asked for any.
    #[cfg(test)]
    pub(crate) fn without_signals() -> Self {
        Self { state: Arc::default() }
    }

    /// See [`State::lift`].
    #[cfg(test)]
    pub(crate) fn lift(&self, resume: impl FnOnce() -> bool) {
        self.state.lift(resume);
    }

    /// As SIGCONT.
    pub(crate) fn go_on(&self) {
        self.state.go_on();
    }
}

impl State {
    fn job(&self) -> MutexGuard<'_, Option<JobHandle>> {
        // A handle is replaced as a whole: a panic elsewhere leaves it as good as before.
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        if let Some(job) = &*self.job() {
            // Refused when it is ending already, which is what was asked for.
            job.cancel().ok();
        }
    }

    fn go_on(&self) {
        if let Some(job) = &*self.job() {
            let progress = job.progress();
            if progress.status == Status::Paused && progress.io_status != IoStatus::Ok {
                // Refused when it was resumed or cancelled meanwhile: nothing is left to do.
                self.lift(|| job.resume().is_ok());
            }
        }
    }

    /// Lift a pause by `resume`, and count it if that was granted. After it: whoever sees the count does not see that pause any more.
    fn lift(&self, resume: impl FnOnce() -> bool) {
        if resume() {
            self.resumes.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Whether `signal` was ignored when the program started, from `SigIgn` of `/proc/self/status`.
pub(crate) fn is_ignored(signal: i32) -> bool {
    std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| ignored_mask(&status).is_some_and(|mask| mask >> (signal - 1) & 1 == 1))
}

fn ignored_mask(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_of_ignored_signals() {
        assert_eq!(ignored_mask("Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n"), Some(0x1001));
        assert_eq!(ignored_mask("Name:\tx\n"), None);
    }

    #[test]
    fn exit_codes_are_the_shells() {
        assert_eq!((Ending(SIGINT).exit_code(), Ending(SIGINT).name()), (130, "SIGINT"));
        assert_eq!(Ending(SIGTERM).exit_code(), 143);
        assert_eq!(Ending(SIGHUP).exit_code(), 129);
    }
}
