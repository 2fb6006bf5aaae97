//! The ring thread turn by turn, over the simulated ring: what must not keep it, and what must not be lost between two turns.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crossbeam::channel::RecvTimeoutError;

use super::admission::Attempt;
use super::ask::{ask, ask_with};
use super::carrier::{CarrierLimits, IoOutcome, IoRequest};
use super::command::{Command, Inbox};
use super::disk::read;
use super::hosted::IoAsker;
use super::jobs::JobId;
use super::sim::{Pending, SimDisk, SimEngine, SimJob};
use super::{GroupFailure, NbdOptions, SweepDepth};
use crate::copier::plan::{Limits, LivePlan, Plan, Side};
use crate::error::Error;
use crate::job::{IoStatus, JobHandle, Outcome, Status, TargetHolds, Verb};
use crate::modes::{CbwErrorPolicy, ErrorPolicy, SyncMode};
use crate::ring::sim::{Disk, DiskTraits, FaultPlan, SharedWorld, SimRing, SimSocket, World};
use crate::ring::{BufferRange, FileId, Wait};
use crate::units::{ByteRange, ClusterRange, ClusterSize, Geometry, Length};

pub(super) const CLUSTER: u64 = 8192;
pub(super) const LENGTH: u64 = 20 * CLUSTER;
const SLOTS: u32 = 4;
/// How long anything may take that should take a moment.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A disk and a target.
pub(super) struct Bench {
    pub(super) world: SharedWorld,
    pub(super) engine: SimEngine,
    pub(super) disk: SimDisk,
    pub(super) length: u64,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::of(LENGTH)
    }

    /// With disks of that many bytes.
    pub(super) fn of(bytes: u64) -> Self {
        let world = World::shared();
        let length = usize::try_from(bytes).unwrap();
        let traits = DiskTraits { fixed_length: true, ..DiskTraits::default() };
        world.borrow_mut().add_disk(Disk::new(vec![7; length], traits));
        world.borrow_mut().add_disk(Disk::sparse(length, DiskTraits::default()));
        let ring = SimRing::new(world.clone(), 8 << 16, 32, 1, FaultPlan::default()).with_sockets(4);
        let mut engine = SimEngine::new(ring);
        let limits = CarrierLimits {
            requests: 8,
            slot_bytes: 4096,
            window_bytes: 16_384,
            wide_window_bytes: 65_536,
            ..CarrierLimits::default()
        };
        engine.set_carrier(limits, 65_536);
        let (disk, added) = engine.add_disk(0, Length(bytes), Some(512));
        let mut bench = Self { world, engine, disk, length: bytes };
        bench.turn();
        assert!(added.take().unwrap().is_ok());
        bench
    }

    /// A turn that waits for a millisecond at most.
    pub(super) fn turn(&mut self) {
        let wait = self.engine.act().expect("it has not ended");
        let soon = self.engine.now().after(Duration::from_millis(1));
        self.engine.wait(match wait {
            Wait::Poll => Wait::Poll,
            Wait::Until(until) => Wait::Until(until.min(soon)),
            Wait::Forever => Wait::Until(soon),
        });
    }

    pub(super) fn turn_until<T>(&mut self, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        for _ in 0..100_000 {
            if let Some(found) = found(self) {
                return found;
            }
            self.turn();
        }
        panic!("it never comes")
    }

    /// The same with half a turn of one's own.
    pub(super) fn turn_until_with<T>(&mut self, mut act: impl FnMut(&mut Self) -> Option<T>) -> T {
        for _ in 0..100_000 {
            if let Some(found) = act(self) {
                return found;
            }
            let soon = self.engine.now().after(Duration::from_millis(1));
            self.engine.wait(Wait::Until(soon));
        }
        panic!("it never comes")
    }

    pub(super) fn turn_for(&mut self, time: Duration) {
        let until = self.engine.now().after(time);
        self.turn_until(|bench| (bench.engine.now() >= until).then_some(()));
    }

    pub(super) fn job(&self, policy: ErrorPolicy, cbw_timeout: Option<Duration>) -> SimJob {
        let geometry = Geometry::new(Length(self.length), ClusterSize::new(CLUSTER).unwrap());
        let plan = move |source: Side, file: FileId, memory: BufferRange| Plan {
            geometry,
            source,
            target: Side { file, name: Arc::from("target"), direct_alignment: Some(512), remote: false },
            sync: SyncMode::Full,
            zero_detect: true,
            target_is_zero: true,
            allocate_ahead: false,
            target_shows_holes: false,
            target_before: TargetHolds::Zeros,
            slots: SLOTS,
            arena_start: memory.start,
            max_run: 2,
            on_source_error: policy,
            on_target_error: policy,
            speed: None,
            verify: false,
            map: None,
            resumed: Vec::new(),
            postponed: Vec::new(),
            live: Some(LivePlan {
                on_cbw_error: CbwErrorPolicy::BreakSnapshot,
                cbw_timeout,
                reserved_slots: 1,
                space_reserved: false,
                may_unmap: true,
            }),
            limits: Limits::default(),
            planted: None,
        };
        let (disk, depth) = (self.disk.clone(), SweepDepth::Auto);
        SimJob { disk, target: 1, geometry, slots: SLOTS, depth, plan: Box::new(plan) }
    }

    /// Turn, but for what concludes jobs, until that is all that is left to be done for one.
    fn turn_to_the_verdict(&mut self, handle: &JobHandle) {
        self.turn_until_with(|bench| {
            let now = bench.engine.now();
            bench.engine.reactor_mut().poll_jobs(now);
            (handle.status() == Status::Pending).then_some(())
        });
    }

    /// Conclude the jobs that may.
    fn conclude(&mut self) {
        let now = self.engine.now();
        self.engine.reactor_mut().conclude_jobs(now);
    }

    pub(super) fn ask_for(
        &mut self,
        job: SimJob,
        timeout: Duration,
    ) -> (JobHandle, Pending<Result<Vec<JobId>, Error>>) {
        let (mut handles, started) = self.engine.start(vec![job], GroupFailure::GoOn, timeout);
        (handles.pop().unwrap(), started)
    }

    fn start(&mut self, job: SimJob) -> (JobHandle, JobId) {
        let (handle, started) = self.ask_for(job, PATIENCE);
        let ids = self.turn_until(|_| started.take()).unwrap();
        (handle, ids[0])
    }

    /// Somebody who writes by himself tries.
    fn attempt(&mut self) -> Attempt {
        self.engine.attempt(&self.disk, ByteRange::new(0, 1))
    }
}

#[test]
fn the_end_of_a_job_keeps_nobody_waiting() {
    let mut bench = Bench::new();
    let (let_go, held) = mpsc::channel::<()>();
    let held = parking_lot::Mutex::new(held);
    bench.engine.set_at_end(move || {
        // Hangs, as a server may.
        assert!(held.lock().recv_timeout(2 * PATIENCE).is_ok());
    });
    let (handle, _) = bench.start(bench.job(ErrorPolicy::Report, None));
    let before = Instant::now();
    bench.turn_until(|bench| (bench.engine.jobs().count() == 0).then_some(()));
    let request = bench.engine.io(&bench.disk, read(0, 10));
    assert_eq!(bench.turn_until(|_| request.take()).result.unwrap(), [7; 10]);
    assert!(before.elapsed() < PATIENCE, "the ring thread was held up");
    assert!(handle.wait_timeout(Duration::from_millis(50)).is_none(), "told before its end");
    assert_eq!(bench.engine.taken(), (2, 1), "its share of the memory is its own to its end");
    let_go.send(()).unwrap();
    let result = handle.wait_timeout(PATIENCE).expect("it is told now");
    assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
    assert_eq!(bench.engine.taken(), (1, 1));
}

std::thread_local! {
    /// Of the engine that is turned on this thread: simulated sockets do not leave it, so that a callback cannot own it.
    static INBOX: RefCell<Option<Arc<Inbox<usize, SimSocket>>>> = const { RefCell::new(None) };
}

/// One who is told no, and asks again at once.
fn ask_again(count: Arc<AtomicUsize>) {
    let Some(inbox) = INBOX.with_borrow(Option::clone) else { return };
    let answer = ask_with(move |_: IoOutcome| {
        if count.fetch_add(1, Ordering::Relaxed) < 100_000 {
            ask_again(count);
        }
    });
    inbox.send(Command::Snapshot { job: JobId(99), range: ByteRange::new(0, 1), answer });
}

#[test]
fn one_who_does_not_stop_asking_does_not_keep_the_others_from_the_ring() {
    let mut bench = Bench::new();
    let count = Arc::new(AtomicUsize::new(0));
    INBOX.set(Some(bench.engine.inbox()));
    ask_again(Arc::clone(&count));
    let wait = bench.engine.act();
    let asked = count.load(Ordering::Relaxed);
    assert!((1..5000).contains(&asked), "{asked} in one turn");
    assert_eq!(wait, Some(Wait::Poll), "there is more to do");
    bench.engine.wait(Wait::Poll);
    INBOX.take();
}

#[test]
fn after_a_barrier_guests_have_as_long_as_it_was_up() {
    let mut bench = Bench::new();
    let Attempt::Granted(forgotten) = bench.attempt() else { panic!("nothing is in the way") };
    let timeout = Duration::from_millis(100);
    let first = bench.ask_for(bench.job(ErrorPolicy::Report, None), timeout);
    let second = bench.ask_for(bench.job(ErrorPolicy::Report, None), timeout);
    bench.turn();
    assert!(matches!(bench.attempt(), Attempt::AtBarrier));
    let refused = bench.turn_until(|_| first.1.take()).unwrap_err();
    assert!(refused.to_string().contains("no point in time"), "{refused}");
    let lowered = bench.engine.now();
    assert!(matches!(bench.attempt(), Attempt::Granted(_)), "the next start was there first");
    bench.turn_until(|bench| matches!(bench.attempt(), Attempt::AtBarrier).then_some(()));
    let rested = bench.engine.now().since(lowered);
    assert!(rested + Duration::from_millis(5) >= timeout, "{rested:?}");
    drop(forgotten);
    assert!(bench.turn_until(|_| second.1.take()).is_ok(), "it was not lost");
}

/// An error that does not come again: a job that stops for it stays so, whatever is asked for in the turn in which it comes.
#[test]
fn a_verb_that_meets_an_error_does_not_resume_the_job() {
    let (mut stopped, mut complete) = (0, 0);
    for turn in 0..60 {
        let mut bench = Bench::new();
        bench.world.borrow_mut().disk(1).set_bad(ByteRange::new(5 * CLUSTER, 512));
        let (handle, _) = bench.start(bench.job(ErrorPolicy::Stop, None));
        for _ in 0..turn {
            bench.turn();
        }
        bench.world.borrow_mut().disk(1).repair();
        handle.set_speed(None).unwrap();
        bench.turn_for(Duration::from_millis(500));
        let progress = handle.progress();
        let told = (progress.status, progress.io_status, progress.paused_on.is_some());
        if told == (Status::Paused, IoStatus::Failed, true) {
            stopped += 1;
            // Another changes nothing either.
            handle.set_speed(None).unwrap();
            bench.turn_for(Duration::from_millis(20));
            assert_eq!(handle.status(), Status::Paused);
            assert!(bench.engine.jobs().all(|job| job.sweep == 0));
        } else {
            assert_eq!(told, (Status::Concluded, IoStatus::Ok, false), "set_speed before turn {turn}");
            complete += 1;
        }
    }
    assert!(stopped > 2 && complete > 2, "{stopped} stopped, {complete} complete");
}

#[test]
fn a_guest_who_is_gone_does_not_break_the_snapshot() {
    for stays in [true, false] {
        let mut bench = Bench::new();
        bench.world.borrow_mut().disk(1).set_stuck();
        let (handle, id) = bench.start(bench.job(ErrorPolicy::Report, Some(Duration::from_millis(100))));
        let asked = bench.engine.copy(id, ClusterRange::new(10, 11));
        bench.turn_for(Duration::from_millis(20));
        assert!(asked.take().is_none(), "the target does not answer");
        if !stays {
            drop(asked);
        }
        bench.turn_for(Duration::from_secs(1));
        assert_eq!(bench.engine.jobs().any(|job| job.fails), stays);
        bench.world.borrow_mut().disk(1).set_free();
        let result = bench.turn_until(|_| handle.wait_timeout(Duration::ZERO));
        assert_eq!(matches!(result.outcome, Outcome::Complete), !stays, "{result:?}");
    }
}

/// His question is behind so many others that it is taken in a later turn than his word.
#[test]
fn one_who_goes_before_his_question_is_taken_does_not_break_the_snapshot() {
    let mut bench = Bench::new();
    bench.world.borrow_mut().disk(1).set_stuck();
    let (handle, id) = bench.start(bench.job(ErrorPolicy::Report, Some(Duration::from_millis(100))));
    for _ in 0..2000 {
        drop(bench.engine.read_snapshot(JobId(99), ByteRange::new(0, 1)));
    }
    drop(bench.engine.copy(id, ClusterRange::new(10, 11)));
    bench.turn_for(Duration::from_secs(1));
    assert!(!bench.engine.jobs().any(|job| job.fails), "it waited for a copy that nobody wants");
    bench.world.borrow_mut().disk(1).set_free();
    let result = bench.turn_until(|_| handle.wait_timeout(Duration::ZERO));
    assert!(matches!(result.outcome, Outcome::Complete), "{result:?}");
}

#[test]
fn what_is_served_goes_with_the_ring_thread() {
    let mut bench = Bench::new();
    let (server, other) = [(); 2]
        .map(|()| {
            let (listener, _address) = SimSocket::listen(&bench.world);
            let (server, listens) = bench.engine.listen(listener, NbdOptions::default());
            assert!(bench.turn_until(|_| listens.take()).is_ok());
            server
        })
        .into();
    let gone = Arc::new(AtomicUsize::new(0));
    for name in ["one", "two"] {
        let gone = Arc::clone(&gone);
        let on_gone = Box::new(move || {
            gone.fetch_add(1, Ordering::Relaxed);
            panic!("as planned");
        });
        let disk = bench.disk.clone();
        let (_, exported) = bench.engine.export(server, name, &disk, None, on_gone);
        assert!(bench.turn_until(|_| exported.take()).is_ok());
    }
    // One who waits for something that is under way, and one whose command is not taken any more.
    let stopping = bench.engine.stop_server(other);
    assert!(bench.engine.act().is_some() && stopping.take().is_none());
    let late = bench.engine.stop_server(server);
    bench.engine.die();
    assert_eq!(gone.load(Ordering::Relaxed), 2);
    assert!([stopping, late].iter().all(|asked| asked.take().expect("he is told").is_err()));
    assert!(matches!(bench.attempt(), Attempt::Granted(_)));
}

#[test]
fn callbacks_that_panic_do_not_keep_anybody_from_hearing_of_the_end() {
    let mut bench = Bench::new();
    let (sender, told) = mpsc::channel();
    let sender = parking_lot::Mutex::new(sender);
    bench.engine.set_at_end(move || sender.lock().send(()).unwrap());
    bench.world.borrow_mut().disk(1).set_stuck();
    let (handle, _) = bench.start(bench.job(ErrorPolicy::Report, None));
    let Attempt::Copy(id, clusters) = bench.engine.attempt(&bench.disk, ByteRange::new(15 * CLUSTER, 1))
    else {
        panic!("nothing is copied there")
    };
    let asked = bench.engine.copy(id, clusters);
    for _ in 0..20 {
        let answer = ask_with(|_: IoOutcome| panic!("as planned"));
        let request = IoRequest::Write { offset: 12 * CLUSTER, data: vec![1; 10] };
        bench.engine.send(Command::Io { disk: bench.disk.0.id(), request, answer });
    }
    bench.turn();
    let inbox = bench.engine.inbox();
    bench.engine.die();
    let result = handle.wait_timeout(PATIENCE).expect("its waiters are told");
    assert!(matches!(result.outcome, Outcome::Failed(_)), "{result:?}");
    assert!(told.recv_timeout(PATIENCE).is_ok(), "it was cleaned up after");
    assert!(asked.take().expect("guests are told").is_ok());
    assert!(matches!(bench.attempt(), Attempt::Granted(_)));
    // Whoever comes later is told at once.
    let (sender, told) = mpsc::channel();
    let answer = ask_with(move |outcome: IoOutcome| sender.send(outcome.result.is_err()).unwrap());
    inbox.send(Command::Snapshot { job: id, range: ByteRange::new(0, 1), answer });
    assert_eq!(told.try_recv(), Ok(true));
}

fn too_late() -> crate::job::Refusal {
    crate::job::Refusal::State { status: Status::Concluded, verb: Verb::Cancel }
}

#[test]
fn a_cancel_that_comes_during_the_last_steps_is_refused() {
    let mut bench = Bench::new();
    let (let_go, held) = mpsc::channel::<()>();
    let held = parking_lot::Mutex::new(held);
    bench.engine.set_at_end(move || held.lock().recv_timeout(2 * PATIENCE).unwrap());
    let (handle, _) = bench.start(bench.job(ErrorPolicy::Report, None));
    bench.turn_until(|bench| (bench.engine.jobs().count() == 0).then_some(()));
    assert_eq!((handle.status(), handle.cancel()), (Status::Pending, Err(too_late())));
    let_go.send(()).unwrap();
    assert!(matches!(handle.wait_timeout(PATIENCE).unwrap().outcome, Outcome::Complete));
}

#[test]
fn a_cancel_that_is_accepted_before_the_verdict_is_the_verdict() {
    let mut bench = Bench::new();
    let (handle, _) = bench.start(bench.job(ErrorPolicy::Report, None));
    bench.turn_to_the_verdict(&handle);
    handle.cancel().unwrap();
    bench.conclude();
    let result = bench.turn_until(|_| handle.wait_timeout(Duration::ZERO));
    assert!(matches!(result.outcome, Outcome::Cancelled), "{result:?}");
}

/// A group that stands and falls together, of two jobs; the second's target is another.
fn start_two(bench: &mut Bench) -> (Vec<JobHandle>, Vec<JobId>) {
    let target = Disk::sparse(usize::try_from(LENGTH).unwrap(), DiskTraits::default());
    bench.world.borrow_mut().add_disk(target);
    let second = SimJob { target: 2, ..bench.job(ErrorPolicy::Report, None) };
    let jobs = vec![bench.job(ErrorPolicy::Report, None), second];
    let (handles, started) = bench.engine.start(jobs, GroupFailure::FailAll, PATIENCE);
    let ids = bench.turn_until(|_| started.take()).unwrap();
    (handles, ids)
}

#[test]
fn a_cancel_that_is_accepted_while_a_group_concludes_is_that_of_all() {
    for cancelled in [0, 1] {
        let mut bench = Bench::new();
        let (handles, _) = start_two(&mut bench);
        bench.turn_until(|_| handles.iter().all(|handle| handle.status() == Status::Pending).then_some(()));
        let now = bench.engine.now();
        bench.engine.reactor_mut().poll_jobs(now);
        handles[cancelled].cancel().unwrap();
        assert!(bench.engine.reactor_mut().settle_groups(), "there is more to do");
        bench.conclude();
        for handle in &handles {
            let result = bench.turn_until(|_| handle.wait_timeout(Duration::ZERO));
            assert!(matches!(result.outcome, Outcome::Cancelled), "{result:?}");
        }
    }
}

/// As by a client whose earlier request was answered because of that end.
#[test]
fn a_read_of_a_snapshot_that_comes_in_the_turn_in_which_its_job_ends_is_answered() {
    let mut bench = Bench::new();
    let (handle, id) = bench.start(bench.job(ErrorPolicy::Report, None));
    bench.turn_to_the_verdict(&handle);
    let (answer, asked) = ask::<IoOutcome>();
    bench.engine.reactor_mut().read_snapshot(id, ByteRange::new(0, 1), IoAsker::Caller(answer));
    bench.conclude();
    let outcome = asked.try_take().or_else(|| {
        bench.turn();
        asked.try_take()
    });
    let error = outcome.expect("it is answered").result.unwrap_err();
    assert!(error.to_string().contains("the job has ended"), "{error}");
    assert!(matches!(handle.wait_timeout(Duration::ZERO).unwrap().outcome, Outcome::Complete));
}

/// With the ring thread alive to its end, and with one that dies.
#[test]
fn an_engine_is_not_gone_before_the_ends_of_its_jobs_are() {
    for dies in [false, true] {
        let mut bench = Bench::new();
        let (ending, ended) = crossbeam::channel::bounded(0);
        bench.engine.reactor_mut().tell_end(ending);
        let (let_go, held) = mpsc::channel::<()>();
        let held = parking_lot::Mutex::new(held);
        bench.engine.set_at_end(move || held.lock().recv_timeout(2 * PATIENCE).unwrap());
        let (handle, _) = bench.start(bench.job(ErrorPolicy::Report, None));
        if dies {
            bench.engine.die();
        } else {
            bench.turn_until(|bench| (bench.engine.jobs().count() == 0).then_some(()));
            bench.engine.remove_disk(&bench.disk);
            bench.engine.quit();
            while let Some(wait) = bench.engine.act() {
                bench.engine.wait(wait);
            }
        }
        drop(bench);
        let soon = Duration::from_millis(50);
        assert_eq!(ended.recv_timeout(soon), Err(RecvTimeoutError::Timeout), "dies: {dies}");
        let_go.send(()).unwrap();
        assert_eq!(ended.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
        assert!(handle.wait_timeout(Duration::ZERO).is_some(), "its waiters are told before");
    }
}

/// Nobody knows how long those take who hear of the end of a job.
#[test]
fn when_the_ring_thread_dies_those_who_wait_for_jobs_wake_first() {
    let mut bench = Bench::new();
    bench.world.borrow_mut().disk(1).set_stuck();
    let (handle, id) = bench.start(bench.job(ErrorPolicy::Report, None));
    let copied = bench.engine.copy(id, ClusterRange::new(10, 11));
    let read = bench.engine.read_snapshot(id, ByteRange::new(15 * CLUSTER, 10 * CLUSTER / 2));
    let request = bench.engine.io(&bench.disk, IoRequest::Write { offset: 12 * CLUSTER, data: vec![1; 10] });
    bench.turn();
    assert!(copied.take().is_none() && read.take().is_none() && request.take().is_none());
    let (sender, told) = mpsc::channel();
    handle.shared().set_callback(Box::new(move |_| {
        sender.send([copied.take().is_some(), read.take().is_some(), request.take().is_some()]).unwrap();
    }));
    bench.engine.die();
    assert_eq!(told.recv_timeout(PATIENCE), Ok([true; 3]));
}
