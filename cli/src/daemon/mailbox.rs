//! What other threads tell the control thread, in order, and how it wakes up for it.
//!
//! Senders never wait: the ring thread is one of them. What is sent is bounded by what the control thread has asked for (states of jobs,
//! exports that are gone, errands that are back), but for errors under the policy `ignore`; of these at most [`MAX_ERRORS`] wait, and more are only counted.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use crossbeam::channel::{Receiver, Sender, unbounded};
use engine::error::Error;
use engine::job::{ErrorAction, JobEvent, JobResult, Observer, Status};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::errands::{ErrandSerial, Found};
use crate::qmp::QmpError;

/// Most errors that wait to be told.
const MAX_ERRORS: usize = 1024;

/// Names a job for as long as the daemon lives; its id may be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct JobSerial(pub(super) u64);

/// Names an export for as long as the daemon lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ExportSerial(pub(super) u64);

/// Something that has happened.
#[derive(Debug)]
pub(super) enum Happening {
    /// A job has entered a state.
    Status(JobSerial, Status),
    /// The sweep of a job has met an error.
    JobError { job: JobSerial, error: Arc<Error>, action: ErrorAction },
    /// A job has ended.
    Ended(JobSerial, Box<JobResult>),
    /// An export is gone.
    ExportGone(ExportSerial),
    /// An errand is back.
    Back(ErrandSerial, Box<Result<Found, QmpError>>),
    /// An NBD client could not be accepted, for this reason; told once until one is accepted again.
    NotAccepted(String),
    /// The engine has died, for this reason: it carries nothing any more. Its jobs and exports are told of besides, then or later.
    EngineDied(String),
}

impl Happening {
    /// Whose it is, if it is a job's.
    pub(super) fn job(&self) -> Option<JobSerial> {
        match self {
            Self::Status(job, _) | Self::JobError { job, .. } | Self::Ended(job, _) => Some(*job),
            Self::ExportGone(_) | Self::Back(..) | Self::NotAccepted(_) | Self::EngineDied(_) => None,
        }
    }
}

/// A happening and when it was.
pub(super) struct Letter {
    pub(super) at: SystemTime,
    pub(super) what: Happening,
}

struct Shared {
    sender: Sender<Letter>,
    wake: EventFd,
    errors: AtomicUsize,
    lost: AtomicUsize,
}

/// Where other threads put what has happened.
#[derive(Clone)]
pub(crate) struct Post(Arc<Shared>);

impl Post {
    pub(super) fn send(&self, what: Happening) {
        let is_error = matches!(what, Happening::JobError { .. });
        if is_error && self.0.errors.fetch_add(1, Ordering::Relaxed) >= MAX_ERRORS {
            self.0.errors.fetch_sub(1, Ordering::Relaxed);
            self.0.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // Both fail only when nobody listens any more, or when a wake-up is waiting already.
        self.0.sender.send(Letter { at: SystemTime::now(), what }).ok();
        self.0.wake.write(1).ok();
    }

    /// An observer that reports on `job`.
    pub(super) fn observer(&self, job: JobSerial) -> Observer {
        let post = self.clone();
        Observer::new(move |event| {
            post.send(match event {
                JobEvent::Status(status) => Happening::Status(job, status),
                JobEvent::Error { error, action } => {
                    Happening::JobError { job, error: Arc::clone(error), action }
                }
                JobEvent::Ended(result) => Happening::Ended(job, Box::new(result.clone())),
            });
        })
    }
}

/// What has happened and was not looked at yet.
pub(super) struct Mailbox {
    letters: Receiver<Letter>,
    shared: Arc<Shared>,
}

impl Mailbox {
    pub(super) fn new() -> std::io::Result<Self> {
        let (sender, letters) = unbounded();
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let (errors, lost) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Ok(Self { letters, shared: Arc::new(Shared { sender, wake, errors, lost }) })
    }

    pub(super) fn post(&self) -> Post {
        Post(Arc::clone(&self.shared))
    }

    /// Readable when something has come.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    /// Before what has come is taken out: what comes from now on wakes again.
    pub(super) fn rearm(&self) {
        // Fails where there was no wake-up.
        self.shared.wake.read().ok();
    }

    pub(super) fn take(&self) -> Option<Letter> {
        self.taken(self.letters.try_recv().ok())
    }

    /// The next within `patience`.
    pub(super) fn wait(&self, patience: Duration) -> Option<Letter> {
        self.taken(self.letters.recv_timeout(patience).ok())
    }

    /// How many errors were not told, since this was last asked.
    pub(super) fn lost(&self) -> usize {
        self.shared.lost.swap(0, Ordering::Relaxed)
    }

    /// One more error is not told.
    pub(super) fn lose(&self) {
        self.shared.lost.fetch_add(1, Ordering::Relaxed);
    }

    fn taken(&self, letter: Option<Letter>) -> Option<Letter> {
        if matches!(letter, Some(Letter { what: Happening::JobError { .. }, .. })) {
            self.shared.errors.fetch_sub(1, Ordering::Relaxed);
        }
        letter
    }
}

#[cfg(test)]
mod tests {
    use engine::error::Operation;
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn letters_come_in_order_and_wake() {
        let mailbox = Mailbox::new().expect("an eventfd");
        let post = mailbox.post();
        for serial in 0..10 {
            post.send(Happening::ExportGone(ExportSerial(serial)));
        }
        assert_eq!(mailbox.shared.wake.read(), Ok(10));
        for serial in 0..10 {
            let letter = mailbox.take().expect("a letter");
            assert!(matches!(letter.what, Happening::ExportGone(ExportSerial(s)) if s == serial));
        }
        assert!(mailbox.take().is_none() && mailbox.wait(Duration::from_millis(1)).is_none());
    }

    #[test]
    fn errors_that_nobody_takes_are_bounded() {
        let mailbox = Mailbox::new().expect("an eventfd");
        let post = mailbox.post();
        let error = Arc::new(Error::io(Operation::Write, "target", None, Errno::EIO));
        let tell = || {
            let (job, error, action) = (JobSerial(1), Arc::clone(&error), ErrorAction::Ignore);
            post.send(Happening::JobError { job, error, action });
        };
        (0..MAX_ERRORS + 5).for_each(|_| tell());
        post.send(Happening::Status(JobSerial(1), Status::Null));
        assert_eq!((mailbox.lost(), mailbox.lost()), (5, 0));
        assert_eq!(std::iter::from_fn(|| mailbox.take()).count(), MAX_ERRORS + 1);
        tell();
        assert!(mailbox.take().is_some() && mailbox.lost() == 0);
    }
}
