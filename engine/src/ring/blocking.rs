//! What blocks, off the ring thread: a small pool of threads that carry operations out through [`Storage`] and [`Document`].
//!
//! # Model
//! The ring thread stages jobs, and hands all of them over under one short lock when it next waits. A worker takes one
//! job at a time, runs it, puts the result into a bounded lock-free queue and raises the ring's [`Signal`]. The job queue
//! is a deque under a mutex rather than a channel, so that a job which has not started can be taken out again (cancelled)
//! at once, even if every worker is stuck. It is bounded by the ring's capacity: each job belongs to an operation in flight.
//!
//! # Lanes
//! A storage that does not answer keeps every worker that it was given, and a thread in a system call cannot be recalled. So jobs
//! queue by what they work on, in *lanes*, whose heads take turns. Some workers are each lane's own; the others are common, and one lane has at most three
//! quarters of the pool. Threads beyond those that the pool was made for are started only when a lane lacks its own because others have
//! kept theirs: at most as many as there are lanes, times what is a lane's own.
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
use super::{FileId, Op, Output};
use crate::storage::{Document, Published, Storage};

/// Most threads that a pool is made for.
pub(crate) const MAX_THREADS: usize = 256;

/// Of a pool's threads each lane has this part of its own, but no more than so many.
const OWN_PART: usize = 8;
const MOST_OWN: usize = 2;
/// And this part is kept from each lane.
const KEPT_PART: usize = 4;

/// Where a job queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LaneId {
    /// With those that need the processor alone.
    Memory,
    /// With those on small files.
    Documents,
    /// With those on the same storage.
    File(FileId),
}

impl LaneId {
    fn index(self) -> usize {
        match self {
            Self::Memory => 0,
            Self::Documents => 1,
            Self::File(file) => 2 + usize::from(file.0),
        }
    }
}

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
    /// Where it queues.
    pub(crate) lane: LaneId,
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
            document.publish(contents.as_deref()).map(|published| match published {
                Published::Durably => Output::Done,
                Published::Unsynced(errno) => Output::Unsynced(errno),
            })
        }
        (Subject::Memory, Op::Digest { chunk, .. }) => {
            let bytes = job.lent.as_ref().expect("a digest has a buffer").look();
            Ok(Output::Digests(bytes.chunks(*chunk as usize).map(xxh3_128).collect()))
        }
        (_, op) => panic!("{op:?} does not fit its subject"),
    }
}

#[derive(Default)]
struct Lane {
    jobs: VecDeque<Job>,
    running: usize,
}

struct Queue {
    /// By index; as many as were used.
    lanes: Vec<Lane>,
    /// Whose turn it is.
    next: usize,
    /// Workers that each lane has of its own.
    own: usize,
    /// Those in common, and how many of them run something.
    common: usize,
    beyond: usize,
    /// Most that a lane has.
    most: usize,
    /// Workers waiting for a job.
    idle: usize,
    stopping: bool,
}

impl Queue {
    fn new(threads: usize) -> Self {
        let own = (threads / OWN_PART).clamp(1, MOST_OWN);
        let common = (threads - own).max(1);
        let most = threads - threads / KEPT_PART;
        Self { lanes: Vec::new(), next: 0, own, common, beyond: 0, most, idle: 0, stopping: false }
    }

    /// Share as a pool of so many threads does.
    fn widen(&mut self, threads: usize) {
        let Self { own, common, most, .. } = Self::new(threads);
        (self.own, self.common, self.most) = (own, common, most);
        self.beyond = self.lanes.iter().map(|lane| lane.running.saturating_sub(own)).sum();
    }

    fn push(&mut self, job: Job) {
        let index = job.lane.index();
        while self.lanes.len() <= index {
            self.lanes.push(Lane::default());
        }
        self.lanes[index].jobs.push_back(job);
    }

    /// The next job for which there may be a worker.
    fn take(&mut self) -> Option<Job> {
        let count = self.lanes.len();
        for index in (self.next..count).chain(0..self.next.min(count)) {
            let lane = &mut self.lanes[index];
            let own = lane.running < self.own;
            if !own && (self.beyond >= self.common || lane.running >= self.most) {
                continue;
            }
            let Some(job) = lane.jobs.pop_front() else { continue };
            lane.running += 1;
            self.beyond += usize::from(!own);
            self.next = index + 1;
            return Some(job);
        }
        None
    }

    /// A job of `lane` has ended.
    fn end(&mut self, lane: LaneId) {
        let lane = &mut self.lanes[lane.index()];
        lane.running -= 1;
        self.beyond -= usize::from(lane.running >= self.own);
    }

    /// How many jobs could begin, had they workers.
    fn startable(&self) -> usize {
        let mut common = self.common.saturating_sub(self.beyond);
        let mut count = 0;
        for Lane { jobs, running } in &self.lanes {
            let own = jobs.len().min(self.own.saturating_sub(*running));
            let more = (jobs.len() - own).min(self.most.saturating_sub(running + own)).min(common);
            common -= more;
            count += own + more;
        }
        count
    }
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
        Self {
            shared: Arc::new(Shared {
                queue: Mutex::new(Queue::new(threads)),
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

    /// Have at least so many threads from now on, started as they are needed.
    ///
    /// # Panics
    /// If they are more than [`MAX_THREADS`].
    pub(crate) fn widen(&mut self, threads: usize) {
        assert!(threads <= MAX_THREADS, "a pool of {threads} threads");
        if threads > self.limit {
            self.limit = threads;
            self.shared.queue.lock().widen(threads);
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
    /// When there is no thread and none can be had; the jobs stay queued.
    pub(crate) fn dispatch(&mut self) -> Result<(), Errno> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let count = self.staged.len();
        let (wanted, most) = {
            let mut queue = self.shared.queue.lock();
            self.staged.drain(..).for_each(|job| queue.push(job));
            (queue.startable().saturating_sub(queue.idle), self.limit + queue.own * queue.lanes.len())
        };
        for _ in 0..wanted.min(most - self.workers.len()) {
            match self.start_one() {
                Ok(()) => {}
                // Fewer threads are slower, not wrong.
                Err(_) if !self.workers.is_empty() => break,
                Err(error) => return Err(errno_of(&error)),
            }
        }
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
            let found = |lane: &mut Lane| {
                let index = lane.jobs.iter().position(|job| job.key == key)?;
                lane.jobs.remove(index)
            };
            queue.lanes.iter_mut().find_map(found)?
        };
        self.outstanding -= 1;
        Some(job)
    }

    /// Take back everything that no worker has begun, and tell the workers to end.
    pub(crate) fn stop(&mut self) -> Vec<Job> {
        let mut jobs = std::mem::take(&mut self.staged);
        let mut queue = self.shared.queue.lock();
        queue.stopping = true;
        jobs.extend(queue.lanes.iter_mut().flat_map(|lane| lane.jobs.drain(..)));
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
    let mut ended = None;
    while let Some(mut job) = next_job(shared, ended) {
        ended = Some(job.lane);
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

/// Waits for a job, after one of the lane `ended`.
fn next_job(shared: &Shared, ended: Option<LaneId>) -> Option<Job> {
    let mut queue = shared.queue.lock();
    // For what this allows to begin there is this worker.
    ended.into_iter().for_each(|lane| queue.end(lane));
    loop {
        if let Some(job) = queue.take() {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::signal::Kick;
    use super::*;
    use crate::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
    use crate::storage::{Descriptors, Limits};
    use crate::units::{ByteRange, Length};

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A storage that flushes when it is let go.
    struct Stuck(Mutex<bool>, Condvar);

    impl Stuck {
        fn new(stuck: bool) -> Arc<Self> {
            Arc::new(Self(Mutex::new(stuck), Condvar::new()))
        }

        fn let_go(&self) {
            *self.0.lock() = false;
            self.1.notify_all();
        }
    }

    impl Storage for Stuck {
        fn name(&self) -> &'static str {
            "stuck"
        }

        fn limits(&self) -> Limits {
            Limits { length: Length(1), direct_alignment: None }
        }

        fn descriptors(&self) -> Option<Descriptors<'_>> {
            None
        }

        fn read_at(&self, _: IoPath, _: u64, _: &mut [u8]) -> Result<usize, Errno> {
            Err(Errno::EIO)
        }

        fn write_at(&self, _: IoPath, _: u64, _: &[u8]) -> Result<usize, Errno> {
            Err(Errno::EIO)
        }

        fn write_zeroes(&self, _: ByteRange, _: ZeroMethod) -> Result<(), Errno> {
            Err(Errno::EIO)
        }

        fn discard(&self, _: ByteRange) -> Result<(), Errno> {
            Err(Errno::EIO)
        }

        fn allocate(&self, _: &[ByteRange]) -> Result<(), Errno> {
            Err(Errno::EIO)
        }

        fn flush(&self) -> Result<(), Errno> {
            let mut stuck = self.0.lock();
            while *stuck {
                self.1.wait(&mut stuck);
            }
            Ok(())
        }

        fn drop_cache(&self, _: ByteRange) -> Result<(), Errno> {
            Err(Errno::EIO)
        }

        fn extents(&self, _: ByteRange, _: ExtentQuery, _: usize) -> Result<Vec<Extent>, Errno> {
            Err(Errno::EIO)
        }
    }

    fn pool(threads: usize) -> Pool {
        let parker = crossbeam::sync::Parker::new();
        Pool::new(threads, 1024, Arc::new(Signal::new(Kick::Parked(parker.unparker().clone()))))
    }

    fn flush(pool: &mut Pool, key: u64, file: u16, storage: &Arc<Stuck>) {
        let (file, subject) = (FileId(file), Subject::Storage(Arc::clone(storage) as Arc<dyn Storage>));
        pool.stage(Job { key, op: Op::Flush { file }, lane: LaneId::File(file), subject, lent: None });
        pool.dispatch().unwrap();
    }

    /// The keys of so many jobs that have ended.
    fn ended(pool: &mut Pool, count: usize) -> Vec<u64> {
        let deadline = Instant::now() + PATIENCE;
        let mut keys = Vec::new();
        while keys.len() < count {
            assert!(Instant::now() < deadline, "{keys:?} of {count} have ended");
            match pool.collect() {
                Some(done) => keys.push(done.key),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        keys
    }

    #[test]
    fn storages_that_are_stuck_leave_workers_to_the_others() {
        for threads in [1, 2, 3, 16] {
            let mut pool = pool(threads);
            let stuck: Vec<_> = (0..5).map(|_| Stuck::new(true)).collect();
            for key in 0..100 {
                let file = u16::try_from(key % 5).unwrap();
                flush(&mut pool, key, file, &stuck[usize::from(file)]);
            }
            let healthy = Stuck::new(false);
            for key in 100..200 {
                flush(&mut pool, key, 10 + u16::try_from(key % 3).unwrap(), &healthy);
            }
            let mut keys = ended(&mut pool, 100);
            keys.sort_unstable();
            assert_eq!(keys, (100..200).collect::<Vec<u64>>(), "{threads} threads");
            assert!(pool.workers.len() <= threads + 2 * (LaneId::File(FileId(12)).index() + 1));
            // One that waits can be taken back; the others go on.
            assert_eq!(pool.withdraw(99).map(|job| job.key), Some(99));
            stuck.iter().for_each(|stuck| stuck.let_go());
            ended(&mut pool, 99);
            assert!(pool.stop().is_empty());
            pool.join(Instant::now() + PATIENCE);
        }
    }

    #[test]
    fn one_storage_has_nearly_all_workers_and_no_more_than_the_pool_was_made_for() {
        for (threads, most) in [(1, 1), (2, 2), (3, 3), (16, 12), (256, 192)] {
            let mut queue = Queue::new(threads);
            let storage = Stuck::new(false);
            for key in 0..1000 {
                let subject = Subject::Storage(Arc::clone(&storage) as Arc<dyn Storage>);
                let (file, lane) = (FileId(0), LaneId::File(FileId(u16::from(key >= 500))));
                queue.push(Job { key, op: Op::Flush { file }, lane, subject, lent: None });
            }
            let both = queue.startable();
            assert!((threads..=threads + 2).contains(&both), "{both} of {threads}");
            queue.lanes[LaneId::File(FileId(1)).index()].jobs.clear();
            assert_eq!(queue.startable(), most);
            let taken: Vec<Job> = std::iter::from_fn(|| queue.take()).collect();
            assert_eq!((taken.len(), queue.startable()), (most, 0));
            taken.iter().for_each(|job| queue.end(job.lane));
            assert_eq!((queue.beyond, queue.startable()), (0, most));
        }
    }

    #[test]
    fn a_pool_that_is_widened_shares_as_one_that_was_made_so() {
        let (mut widened, made) = (Queue::new(2), Queue::new(16));
        let storage = Stuck::new(false);
        let job = |key| {
            let subject = Subject::Storage(Arc::clone(&storage) as Arc<dyn Storage>);
            Job { key, op: Op::Flush { file: FileId(0) }, lane: LaneId::File(FileId(0)), subject, lent: None }
        };
        (0..100).for_each(|key| widened.push(job(key)));
        let running: Vec<Job> = std::iter::from_fn(|| widened.take()).collect();
        widened.widen(16);
        assert_eq!((widened.own, widened.common, widened.most), (made.own, made.common, made.most));
        let more: Vec<Job> = std::iter::from_fn(|| widened.take()).collect();
        assert_eq!((running.len() + more.len(), widened.startable()), (made.most, 0));
        running.iter().chain(&more).for_each(|job| widened.end(job.lane));
        assert_eq!((widened.beyond, widened.startable()), (0, made.most));
    }

    #[test]
    fn lanes_take_turns() {
        let mut queue = Queue::new(16);
        let storage = Stuck::new(false);
        for key in 0..9 {
            let subject = Subject::Storage(Arc::clone(&storage) as Arc<dyn Storage>);
            let (file, lane) = (FileId(0), LaneId::File(FileId(u16::from(key >= 6))));
            queue.push(Job { key, op: Op::Flush { file }, lane, subject, lent: None });
        }
        let keys: Vec<u64> = std::iter::from_fn(|| queue.take()).map(|job| job.key).collect();
        assert_eq!(keys, [0, 6, 1, 7, 2, 8, 3, 4, 5]);
    }
}
