//! A ring that dies in mid-copy: whoever waits learns of it, what is of no use is gone, what a map holds goes on.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, unbounded};
use nix::errno::Errno;

use super::*;
use crate::copy::IoEngine;
use crate::error::describe;
use crate::job::{JobResult, Outcome, Refusal as VerbRefused, Status};
use crate::ring::{Completion, Op, RingFailure, SocketId, Token, Wait, Wake};
use crate::units::{ClusterSize, Timestamp};

const LENGTH: usize = 40 * 65536 + 7;
/// How long anything may take that should take a moment.
const PATIENCE: Duration = Duration::from_secs(30);

/// How a ring dies.
#[derive(Clone, Copy, Debug)]
enum Death {
    /// It says that it is broken.
    Failure,
    /// Its thread panics.
    Panic,
}

/// A ring that works for so many waits, then for as long as the test wants, and then no more.
struct Dying<R> {
    ring: R,
    waits_left: usize,
    /// Dies once the other end is dropped.
    go: Receiver<()>,
    death: Death,
    /// Takes so many files.
    files_left: usize,
    /// Takes documents.
    takes_documents: bool,
}

impl<R: Ring> Ring for Dying<R> {
    type File = R::File;
    type Document = R::Document;
    type Socket = R::Socket;

    fn name(&self) -> &'static str {
        self.ring.name()
    }
    fn arena(&self) -> &Arena {
        self.ring.arena()
    }
    fn arena_mut(&mut self) -> &mut Arena {
        self.ring.arena_mut()
    }
    fn add_file(&mut self, file: R::File) -> Result<FileId, RingFailure> {
        let Some(left) = self.files_left.checked_sub(1) else {
            return Err(RingFailure { ring: self.ring.name(), errno: Errno::ENOMEM });
        };
        self.files_left = left;
        self.ring.add_file(file)
    }
    fn add_document(&mut self, document: R::Document) -> Result<DocumentId, RingFailure> {
        if !self.takes_documents {
            return Err(RingFailure { ring: self.ring.name(), errno: Errno::ENOMEM });
        }
        self.ring.add_document(document)
    }
    fn remove_file(&mut self, file: FileId) -> R::File {
        self.ring.remove_file(file)
    }
    fn add_socket(&mut self, socket: R::Socket) -> Result<SocketId, RingFailure> {
        self.ring.add_socket(socket)
    }
    fn remove_socket(&mut self, socket: SocketId) {
        self.ring.remove_socket(socket);
    }
    fn shutdown_socket(&mut self, socket: SocketId) {
        self.ring.shutdown_socket(socket);
    }

    fn release_files(&mut self) {
        self.ring.release_files();
    }
    fn capacity(&self) -> usize {
        self.ring.capacity()
    }
    fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }
    fn push(&mut self, token: Token, op: Op) {
        self.ring.push(token, op);
    }
    fn now(&self) -> Timestamp {
        self.ring.now()
    }
    fn waker(&self) -> Arc<dyn Wake> {
        self.ring.waker()
    }

    fn wait(&mut self, until: Wait, completions: &mut Vec<Completion>) -> Result<(), RingFailure> {
        if let Some(left) = self.waits_left.checked_sub(1) {
            self.waits_left = left;
            return self.ring.wait(until, completions);
        }
        // What was pushed last is in flight, and lost.
        self.ring.wait(Wait::Poll, &mut Vec::new())?;
        assert!(self.go.recv().is_err(), "nothing is ever sent");
        match self.death {
            Death::Failure => Err(RingFailure { ring: self.ring.name(), errno: Errno::EBADF }),
            Death::Panic => panic!("the ring is to die now"),
        }
    }
}

/// Start a copy whose ring dies after so many waits, once the sender is dropped.
fn start_dying(
    options: &CopyOptions,
    callback: CompletionCallback,
    waits_left: usize,
    death: Death,
) -> (Copy, Sender<()>, std::thread::JoinHandle<()>) {
    let checked = Checked { callback: Some(callback), ..check(options, &StartToken::default()).unwrap() };
    let (keep_alive, go) = unbounded();
    let (started, outcome) = bounded(1);
    let thread = std::thread::spawn(move || {
        let opened = select::open(checked.options.io_engine, &ring_config(&checked)).unwrap();
        match opened.ring {
            OpenedRing::Uring(ring) => {
                let (files_left, takes_documents) = (2, true);
                let ring = Dying { ring, waits_left, go, death, files_left, takes_documents };
                run_on(ring, checked, None, &started);
            }
            OpenedRing::Threads(ring) => {
                let (files_left, takes_documents) = (2, true);
                let ring = Dying { ring, waits_left, go, death, files_left, takes_documents };
                run_on(ring, checked, None, &started);
            }
        }
    });
    (outcome.recv().unwrap().unwrap(), keep_alive, thread)
}

/// Run a copy that dies, with others waiting for its end; gives how it ended.
fn die(options: &CopyOptions, waits: usize, death: Death) -> Arc<JobResult> {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let callback = Box::new(move |_: &JobResult| {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let (copy, keep_alive, thread) = start_dying(options, callback, waits, death);
    let (told, ends) = unbounded();
    for _ in 0..3 {
        let (job, told, calls) = (copy.job.clone(), told.clone(), Arc::clone(&calls));
        std::thread::spawn(move || {
            let result = job.wait();
            told.send((result, calls.load(Ordering::SeqCst))).unwrap();
        });
    }
    assert!(ends.recv_timeout(Duration::from_millis(20)).is_err(), "it is not over");
    drop(keep_alive);
    let results: Vec<_> = (0..3).map(|_| ends.recv_timeout(PATIENCE).expect("whoever waits wakes")).collect();
    assert!(results.iter().all(|(_, calls)| *calls == 1), "the callback comes once, and first");
    refuses_every_verb(&copy.job);
    thread.join().expect("a panic of the ring goes no further");
    Arc::clone(&results[0].0)
}

fn refuses_every_verb(job: &JobHandle) {
    assert_eq!(job.status(), Status::Concluded);
    for refused in [job.pause(), job.resume(), job.cancel(), job.set_speed(None), job.finalize()] {
        assert!(matches!(refused, Err(VerbRefused::State { status: Status::Concluded, .. })), "{refused:?}");
    }
    assert!(job.wait_timeout(Duration::ZERO).is_some());
    job.dismiss().expect("a job that has ended can be forgotten");
    assert!(job.dismiss().is_err() && job.cancel().is_err());
}

fn contents() -> Vec<u8> {
    (0..LENGTH).map(|at| u8::try_from(at / 7 % 251).unwrap() | 1).collect()
}

fn options(directory: &Path, io_engine: IoEngine) -> CopyOptions {
    let text = |name: &str| directory.join(name).display().to_string();
    std::fs::write(text("source"), contents()).unwrap();
    let queue_depth = Some(4);
    let cluster_size = ClusterSize::DEFAULT;
    CopyOptions { io_engine, queue_depth, cluster_size, ..CopyOptions::new(text("source"), text("target")) }
}

/// Every way to die, at once and in mid-copy, on both rings.
fn each_death(test: impl Fn(IoEngine, usize, Death)) {
    for io_engine in [IoEngine::Auto, IoEngine::Threads] {
        for death in [Death::Failure, Death::Panic] {
            for waits in [0, 1, 6] {
                test(io_engine, waits, death);
            }
        }
    }
}

fn check_told(result: &JobResult, death: Death) {
    let Outcome::Failed(error) = &result.outcome else { panic!("{result:?}") };
    assert_eq!(error.kind(), ErrorKind::EngineDied);
    let words = match death {
        Death::Failure => format!("the {} ring failed: {}", result.engine, describe(Errno::EBADF)),
        Death::Panic => "internal error: the ring is to die now".to_owned(),
    };
    assert_eq!(error.reason(), words);
    assert!(result.progress.done < LENGTH as u64, "{result:?}");
}

#[test]
fn without_a_map_the_new_file_is_removed_and_its_place_is_free() {
    each_death(|io_engine, waits, death| {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), io_engine);
        let result = die(&options, waits, death);
        check_told(&result, death);
        assert!(!result.resumable);
        assert!(result.notices.iter().any(|notice| notice.ends_with("target was removed")), "{result:?}");
        assert!(!directory.path().join("target").exists());
        let again = start(&options).expect("nothing is locked").job.wait();
        assert!(matches!(again.outcome, Outcome::Complete));
        assert_eq!(std::fs::read(directory.path().join("target")).unwrap(), contents());
    });
}

#[test]
fn with_a_map_the_file_stays_and_a_later_run_goes_on() {
    each_death(|io_engine, waits, death| {
        let directory = tempfile::tempdir().unwrap();
        let map = directory.path().join("map");
        let options = CopyOptions { map: Some(map.clone()), ..options(directory.path(), io_engine) };
        let result = die(&options, waits, death);
        check_told(&result, death);
        assert!(result.resumable && map.exists() && directory.path().join("target").exists());
        let again = start(&options).expect("nothing is locked");
        assert!(again.notices.iter().any(|notice| notice.contains("0 B of 2.5 MiB are done")), "{again:?}");
        assert!(matches!(again.job.wait().outcome, Outcome::Complete));
        assert_eq!(std::fs::read(directory.path().join("target")).unwrap(), contents());
        assert!(!map.exists());
    });
}

/// The end of the job still looks whether the source has changed: a map that no run can use does not stay.
#[test]
fn a_source_that_has_changed_meanwhile_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let map = directory.path().join("map");
    let options = CopyOptions { map: Some(map.clone()), ..options(directory.path(), IoEngine::Threads) };
    let (copy, keep_alive, thread) = start_dying(&options, Box::new(|_| {}), 0, Death::Panic);
    std::fs::write(directory.path().join("source"), "something else").unwrap();
    drop(keep_alive);
    let result = copy.job.wait_timeout(PATIENCE).expect("it is over");
    check_told(&result, Death::Panic);
    assert!(!result.resumable && !map.exists(), "{result:?}");
    assert!(!directory.path().join("target").exists(), "a new file that nobody goes on with is removed");
    thread.join().unwrap();
}

/// A ring that does not take the files of a copy, which are prepared by then: nothing new is left behind, and a map that was there stays.
#[test]
fn what_was_made_for_a_copy_that_cannot_begin_goes_again() {
    for (files_left, takes_documents) in [(0, true), (1, true), (2, false)] {
        for (exists, with_map) in [(false, false), (false, true), (true, true)] {
            if !with_map && !takes_documents {
                continue; // It begins.
            }
            let directory = tempfile::tempdir().unwrap();
            let (target, map) = (directory.path().join("target"), directory.path().join("map"));
            let mut options = options(directory.path(), IoEngine::Threads);
            options.map = with_map.then(|| map.clone());
            options.force = exists;
            if exists {
                std::fs::write(&target, "old").unwrap();
            }
            let checked = check(&options, &StartToken::default()).unwrap();
            let opened = select::open(IoEngine::Threads, &ring_config(&checked)).unwrap();
            let OpenedRing::Threads(ring) = opened.ring else { panic!("not threads") };
            let (_keep_alive, go) = unbounded();
            let ring = Dying { ring, waits_left: 0, go, death: Death::Failure, files_left, takes_documents };
            let (started, outcome) = bounded(1);
            run_on(ring, checked, None, &started);
            let error = outcome.recv().unwrap().expect_err("it cannot begin");
            assert_eq!(error.kind(), ErrorKind::EngineDied, "{error}");
            assert!(!map.exists(), "{error}");
            assert_eq!(target.exists(), exists, "{error}");
        }
    }
}
