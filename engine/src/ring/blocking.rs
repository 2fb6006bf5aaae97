//! What blocks, off the ring thread: a small pool of threads that carry operations out through [`Storage`] and [`Document`].
//!
//! # Model
//! The ring thread stages jobs, and hands all of them over under one short lock when it next waits. A worker takes one
//! job at a time, runs it, puts the result into a bounded lock-free queue and raises the ring's [`Signal`]. The job queue
//! is a deque under a mutex rather than a channel, so that a job which has not started can be taken out again (cancelled)
//! at once, even if every worker is stuck. It is bounded by the ring's capacity: each job belongs to an operation in flight.
//!
//! # Panics
//! A panic inside an operation is caught, the buffer comes back, and the ring reports itself broken: nothing hangs.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::queue::ArrayQueue;
use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};
use xxhash_rust::xxh3::xxh3_128;

use super::lent::Lent;
use super::signal::Signal;
use super::{Op, Output};
use crate::storage::{Document, Storage};

/// Most threads in a pool.
pub(crate) const MAX_THREADS: usize = 256;

/// What a job works on besides its buffer.
pub(crate) enum Subject {
    /// A disk.
    Storage(Arc<dyn Storage>),
    /// A small file.
    Document(Arc<dyn Document>),
    /// The buffer alone.
    Memory,
}

/// An operation on its way to a worker.
pub(crate) struct Job {
    /// How the ring knows it.
    pub(crate) key: u64,
    /// What to do.
    pub(crate) op: Op,
    /// With what.
    pub(crate) subject: Subject,
    /// Its buffer.
    pub(crate) lent: Option<Lent>,
}

/// A job that has ended.
pub(crate) struct Done {
    /// As in the job.
    pub(crate) key: u64,
    /// The buffer, to be given back.
    pub(crate) lent: Option<Lent>,
    /// How it went; `None`: it panicked.
    pub(crate) result: Option<Result<Output, Errno>>,
}

/// Carry out `op` on `storage`, blocking.
///
/// # Panics
/// If the operation has no place here, lacks its buffer, or the storage reports more bytes than it was asked for.
pub(crate) fn execute_on_storage(
    op: &Op,
    storage: &dyn Storage,
    lent: Option<&mut Lent>,
) -> Result<Output, Errno> {
    match op {
        Op::Read { offset, path, .. } => {
            let buffer = lent.expect("a read has a buffer").fill();
            let asked = buffer.len();
            storage.read_at(*path, *offset, buffer).map(|bytes| counted(bytes, asked))
        }
        Op::Write { offset, path, .. } => {
            let buffer = lent.expect("a write has a buffer").look();
            storage.write_at(*path, *offset, buffer).map(|bytes| counted(bytes, buffer.len()))
        }
        Op::WriteZeroes { range, method, .. } => storage.write_zeroes(*range, *method).map(|()| Output::Done),
        Op::Discard { range, .. } => storage.discard(*range).map(|()| Output::Done),
        Op::Allocate { ranges, .. } => storage.allocate(ranges).map(|()| Output::Done),
        Op::Flush { .. } => storage.flush().map(|()| Output::Done),
        Op::DropCache { range, .. } => storage.drop_cache(*range).map(|()| Output::Done),
        Op::Extents { range, query, limit, .. } => {
            storage.extents(*range, *query, *limit).map(Output::Extents)
        }
        Op::Digest { .. }
        | Op::Publish { .. }
        | Op::Accept { .. }
        | Op::Receive { .. }
        | Op::Send { .. }
        | Op::Cancel { .. } => panic!("{op:?} is not for a storage"),
    }
}

fn counted(bytes: usize, asked: usize) -> Output {
    assert!(bytes <= asked, "a storage moved {bytes} bytes where {asked} were asked for");
    Output::Bytes(u32::try_from(bytes).expect("no buffer is longer than u32::MAX"))
}

/// Carry out a job, blocking.
fn execute(job: &mut Job) -> Result<Output, Errno> {
    match (&job.subject, &job.op) {
        (Subject::Storage(storage), op) => execute_on_storage(op, storage.as_ref(), job.lent.as_mut()),
        (Subject::Document(document), Op::Publish { contents, .. }) => {
            document.publish(contents.as_deref()).map(|()| Output::Done)
        }
        (Subject::Memory, Op::Digest { chunk, .. }) => {
            let bytes = job.lent.as_ref().expect("a digest has a buffer").look();
            Ok(Output::Digests(bytes.chunks(*chunk as usize).map(xxh3_128).collect()))
        }
        (_, op) => panic!("{op:?} does not fit its subject"),
    }
}

struct Queue {
    jobs: VecDeque<Job>,
    /// Workers waiting for a job.
    idle: usize,
    stopping: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    done: ArrayQueue<Done>,
    signal: Arc<Signal>,
}

/// See the module's header.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    /// Not handed over yet.
    staged: Vec<Job>,
    workers: Vec<JoinHandle<()>>,
    limit: usize,
    /// Staged, queued, running, or done and not collected.
    outstanding: usize,
    capacity: usize,
}

impl Pool {
    /// A pool of up to `threads` threads, none started, for at most `capacity` jobs at a time.
    ///
    /// # Panics
    /// If `threads` is 0 or beyond [`MAX_THREADS`].
    pub(crate) fn new(threads: usize, capacity: usize, signal: Arc<Signal>) -> Self {
        assert!((1..=MAX_THREADS).contains(&threads), "a pool of {threads} threads");
        let queue = Queue { jobs: VecDeque::with_capacity(capacity), idle: 0, stopping: false };
        Self {
            shared: Arc::new(Shared {
                queue: Mutex::new(queue),
                arrived: Condvar::new(),
                done: ArrayQueue::new(capacity),
                signal,
            }),
            staged: Vec::new(),
            workers: Vec::new(),
            limit: threads,
            outstanding: 0,
            capacity,
        }
    }

    /// Start all threads now rather than when they are needed.
    ///
    /// # Errors
    /// When a thread cannot be had.
    pub(crate) fn start_all(&mut self) -> io::Result<()> {
        while self.workers.len() < self.limit {
            self.start_one()?;
        }
        Ok(())
    }

    /// Queue a job for the next [`Pool::dispatch`].
    ///
    /// # Panics
    /// If there are as many jobs already as the pool was made for.
    pub(crate) fn stage(&mut self, job: Job) {
        assert!(self.outstanding < self.capacity, "the pool has {} jobs already", self.outstanding);
        self.outstanding += 1;
        self.staged.push(job);
    }

    /// Hand over what was staged. Starts threads as they are needed.
    ///
    /// # Errors
    /// When there is no thread and none can be had; the jobs stay staged.
    pub(crate) fn dispatch(&mut self) -> Result<(), Errno> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let wanted = {
            let queue = self.shared.queue.lock();
            (queue.jobs.len() + self.staged.len()).saturating_sub(queue.idle)
        };
        for _ in 0..wanted.min(self.limit - self.workers.len()) {
            match self.start_one() {
                Ok(()) => {}
                // Fewer threads are slower, not wrong.
                Err(_) if !self.workers.is_empty() => break,
                Err(error) => return Err(errno_of(&error)),
            }
        }
        let count = self.staged.len();
        self.shared.queue.lock().jobs.extend(self.staged.drain(..));
        for _ in 0..count.min(self.workers.len()) {
            self.shared.arrived.notify_one();
        }
        Ok(())
    }

    /// A job that has ended, if any.
    pub(crate) fn collect(&mut self) -> Option<Done> {
        if self.outstanding == 0 {
            return None;
        }
        let done = self.shared.done.pop()?;
        self.outstanding -= 1;
        Some(done)
    }

    /// Take the job `key` back, if no worker has begun it.
    pub(crate) fn withdraw(&mut self, key: u64) -> Option<Job> {
        let staged = self.staged.iter().position(|job| job.key == key);
        let job = if let Some(index) = staged {
            self.staged.remove(index)
        } else {
            let mut queue = self.shared.queue.lock();
            let index = queue.jobs.iter().position(|job| job.key == key)?;
            queue.jobs.remove(index)?
        };
        self.outstanding -= 1;
        Some(job)
    }

    /// Take back everything that no worker has begun, and tell the workers to end.
    pub(crate) fn stop(&mut self) -> Vec<Job> {
        let mut jobs = std::mem::take(&mut self.staged);
        let mut queue = self.shared.queue.lock();
        queue.stopping = true;
        jobs.extend(queue.jobs.drain(..));
        drop(queue);
        self.shared.arrived.notify_all();
        self.outstanding -= jobs.len();
        jobs
    }

    /// After [`Pool::stop`]: wait for the workers until `deadline`; those that are stuck beyond it are left behind.
    pub(crate) fn join(&mut self, deadline: Instant) {
        for worker in self.workers.drain(..) {
            while !worker.is_finished() && Instant::now() < deadline {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            if worker.is_finished() {
                // Workers catch the panics of their jobs; one of their own has been printed by the hook, and we are going.
                worker.join().ok();
            }
        }
    }

    fn start_one(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let worker = std::thread::Builder::new()
            .name(format!("ring-helper-{}", self.workers.len()))
            .stack_size(512 << 10)
            .spawn(move || work(&shared))?;
        self.workers.push(worker);
        Ok(())
    }
}

/// The errno behind an error of the standard library.
pub(crate) fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn work(shared: &Shared) {
    while let Some(mut job) = next_job(shared) {
        let result = catch_unwind(AssertUnwindSafe(|| execute(&mut job))).ok();
        let Job { key, lent, subject, .. } = job;
        // Before the ring hears of it: who waits for the operation may rely on the storage being let go.
        drop(subject);
        let done = Done { key, lent, result };
        // Room for all: the queue holds as many as there may be jobs.
        assert!(shared.done.push(done).is_ok(), "more jobs ended than were begun");
        shared.signal.notify();
    }
}

fn next_job(shared: &Shared) -> Option<Job> {
    let mut queue = shared.queue.lock();
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            return Some(job);
        }
        if queue.stopping {
            return None;
        }
        queue.idle += 1;
        shared.arrived.wait(&mut queue);
        queue.idle -= 1;
    }
}
