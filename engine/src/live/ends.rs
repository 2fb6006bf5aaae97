//! The last steps of a job, and of a disk, off the ring thread.
//!
//! # Model
//! When a job is over and has left its disk and the ring, what is left to do may take its time: to ask for the target's name and to remove a
//! partial file (on a server that does not answer, for ever), to close files (the last close of one without a name gives its space
//! back), to unmap what told of its clusters. The ring thread serves everybody else meanwhile. So each job's end is a thread of its own, for as long
//! as that takes, and an end that hangs keeps nobody but those who wait for that very job. Those that hang are bounded: each keeps the job's share
//! of the engine's room until its storages are closed. (What is left then, a wait for guests who look at the set, takes 8 s at most.)
//!
//! Where no thread is to be had, the steps are taken by whoever asks for them, the ring thread that is: somebody waits for them, and there may
//! never be a thread. He never sleeps for it: what only waits for others is left to them.
//!
//! # Order
//! The target is looked at and cleaned up; the storages are closed; the share goes back; then the result is told; then the memory goes.
//!
//! Of a disk, too, what was open is closed in a thread of its own; then its share goes back, and it can be opened again.
//!
//! # The set of clusters
//! A guest that is held up in the midst of its look at the jobs may be the last to let go of it. The thread waits for such guests, a while, so
//! that none of them has to give the memory back. The ring thread does not wait: it looks once, and the last of such guests gives it back.

use std::convert::Infallible;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam::channel::Sender;
use parking_lot::Mutex;

use super::jobs::{JobList, Watch};
use super::room::Share;
use crate::error::{Error, ErrorKind};
use crate::foreign;
use crate::job::runner::{AtEnd, Runner};
use crate::job::{JobResult, Outcome};
use crate::modes::SyncMode;
use crate::storage::{OpenedSource, OpenedTarget, Storage};

/// How long guests that look at a job which is over are waited for: ever longer pauses, 8 s together.
const LOOKS: u32 = 14;

/// A job that has left its disk and the ring.
pub(super) struct End {
    pub(super) runner: Runner,
    pub(super) result: JobResult,
    pub(super) at_end: Option<AtEnd>,
    pub(super) share: Share,
    pub(super) watch: Arc<Watch>,
    /// Dropped once the result is told.
    pub(super) ending: Option<Sender<Infallible>>,
}

impl End {
    /// Take the last steps. At once, where nothing is to be done that may take its time.
    pub(super) fn begin(self) {
        if self.at_end.is_none() {
            drop(self.finish());
        } else {
            run_aside("engine-end", move |place| let_go(self.finish(), place));
        }
    }

    fn finish(self) -> Arc<Watch> {
        let Self { runner, mut result, at_end, share, watch, ending } = self;
        if let Some(at_end) = at_end {
            foreign::call("the end of a job", || at_end(&mut result));
        }
        drop(share);
        runner.conclude(result);
        drop(ending);
        watch
    }
}

/// Where something is done that may take its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In a thread of its own, which may sleep.
    Aside,
    /// In the thread that asked for it, which others wait for.
    Here,
}

/// Run `work` in a thread of its own; here, where none is to be had.
pub(super) fn run_aside(name: &str, work: impl FnOnce(Place) + Send + 'static) {
    run_by(thread::Builder::new().name(name.into()), work);
}

fn run_by(thread: thread::Builder, work: impl FnOnce(Place) + Send + 'static) {
    // The thread that cannot be had must not take the work with it.
    let work = Arc::new(Mutex::new(Some(work)));
    let theirs = Arc::clone(&work);
    let run = move || {
        let work = theirs.lock().take();
        if let Some(work) = work {
            work(Place::Aside);
        }
    };
    if let Err(error) = thread.spawn(run) {
        tracing::warn!(%error, "no thread for what may take its time");
        let work = work.lock().take();
        if let Some(work) = work {
            work(Place::Here);
        }
    }
}

/// Close a disk: what the ring had of it, and what its handles had; then let go of what is `kept` until then. In a thread of its own, unless there is
/// nothing to close (simulated storages are numbers).
pub(super) fn close<F: Send + 'static>(
    storage: F,
    source: Option<Box<OpenedSource>>,
    kept: impl Send + 'static,
    ending: Option<Sender<Infallible>>,
) {
    let aside = std::mem::needs_drop::<F>() || source.is_some();
    let close = move |_: Place| {
        drop((storage, source));
        drop(kept);
        drop(ending);
    };
    if aside { run_aside("engine-close", close) } else { close(Place::Here) }
}

/// Give back the memory of a job that nobody looks at any more.
fn let_go(watch: Arc<Watch>, place: Place) {
    for look in 0..LOOKS {
        if Arc::strong_count(&watch) == 1 && Arc::strong_count(watch.set()) == 1 {
            return;
        }
        JobList::collect();
        if place == Place::Here {
            return;
        }
        thread::sleep(Duration::from_micros(500) * 2_u32.pow(look));
    }
    tracing::debug!(job = ?watch.id(), "a guest has not looked away from a job that is over");
}

/// What is to be done when a copy of a live disk is over: a target whose name does not mean it any more makes it a failure, and a new file of one that
/// did not succeed is no use to anybody. The storages are closed here, and nowhere else.
pub(super) fn at_end(target: Arc<OpenedTarget>, fleece: Option<Arc<dyn Storage>>, sync: SyncMode) -> AtEnd {
    Box::new(move |result: &mut JobResult| {
        // What guests had copied until then is what was asked for.
        let kept = sync == SyncMode::None && matches!(result.outcome, Outcome::Cancelled);
        if kept || matches!(result.outcome, Outcome::Complete | Outcome::CompleteWithSkipped) {
            if let Err(error) = target.still_there() {
                judge(result, error);
            }
        } else {
            match target.discard_new_file() {
                Ok(true) => result.notices.push(format!("{} was removed", target.storage().name())),
                Ok(false) => {}
                Err(error) => result.notices.push(error.to_string()),
            }
        }
        drop((target, fleece));
    })
}

/// A last look at a target whose job is complete, before that is decided: why it is lost, if it is.
pub(super) type LastLook = Box<dyn FnOnce() -> Option<Arc<Error>> + Send>;

/// See [`LastLook`]. Where nobody answers it is not known to be lost: see [`at_end`].
pub(super) fn last_look(target: Arc<OpenedTarget>) -> LastLook {
    Box::new(move || {
        let lost = target.still_there().err().filter(|error| error.kind() == ErrorKind::TargetLost);
        lost.map(Arc::new)
    })
}

/// Make of the result what it is when asking for the target gave `error`.
fn judge(result: &mut JobResult, error: Error) {
    if error.kind() == ErrorKind::TargetLost {
        result.outcome = Outcome::Failed(Arc::new(error));
    } else {
        // Everything was written and flushed. That nobody answers now says nothing about that.
        result.notices.push(format!("cannot tell whether the target is still there: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::super::jobs::JobId;
    use super::*;
    use crate::interval_set::IntervalSet;
    use crate::units::{ClusterSize, Geometry, Length};

    /// What guests know of a job that has ended.
    fn watch() -> Arc<Watch> {
        let geometry = Geometry::new(Length(1 << 20), ClusterSize::DEFAULT);
        let set = Arc::new(IntervalSet::new(geometry.clusters()).unwrap());
        Arc::new(Watch::new(JobId(1), set, geometry))
    }

    #[test]
    fn the_memory_of_a_job_is_not_left_to_a_guest() {
        let watch = watch();
        let (looked_at, gone) = (Arc::clone(&watch), Arc::downgrade(&watch));
        let aside = thread::spawn(move || let_go(watch, Place::Aside));
        thread::sleep(Duration::from_millis(30));
        assert!(!aside.is_finished(), "a guest looks at it yet");
        drop(looked_at);
        aside.join().unwrap();
        assert_eq!(gone.strong_count(), 0);
    }

    #[test]
    fn what_is_run_aside_is_run_once() {
        let (sender, receiver) = std::sync::mpsc::channel();
        run_aside("a-test", move |place| sender.send(place).unwrap());
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [Place::Aside]);
    }

    #[test]
    fn without_a_thread_it_is_run_here_and_nobody_sleeps() {
        let watch = watch();
        let (looked_at, gone) = (Arc::clone(&watch), Arc::downgrade(&watch));
        let (sender, receiver) = std::sync::mpsc::channel();
        // No machine has room for such a stack.
        let none = thread::Builder::new().stack_size(1 << 60);
        let before = std::time::Instant::now();
        run_by(none, move |place| {
            let_go(watch, place);
            sender.send((place, thread::current().id())).unwrap();
        });
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [(Place::Here, thread::current().id())]);
        // Who may sleep waits for 8 s here.
        assert!(before.elapsed() < Duration::from_secs(4), "{:?}", before.elapsed());
        drop(looked_at);
        assert_eq!(gone.strong_count(), 0, "the guest has given it back");
    }
}
