//! The gate under real threads: guests that come and go, nest, hand passes to each other and wait at the barrier, and a
//! starter that takes one t0 after the other and looks whether anybody is inside.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use engine::interval_set::{Cancellation, IntervalSet, Waiter};
use engine::live::{Attempt, Entry, Gate, JobId, JobList, Pass, Permit, Watch, attempt};
use engine::ring::Wake;
use engine::units::{ByteRange, ClusterSize, Geometry, Length};

const GUESTS: u64 = 8;
const STARTS: u64 = 1500;
/// So many at least, however long it takes on a machine that is busy with other things.
const FEW_STARTS: u64 = 20;
const BUDGET: Duration = Duration::from_millis(600);

/// A stuck thread fails the test by this rather than hang it; never reached when all is well.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether to take one more t0. `seen`: whether all that a test wants to see has happened.
fn goes_on(starts: u64, began: Instant, seen: bool) -> bool {
    let enough = starts >= FEW_STARTS && seen;
    (!enough || (starts < STARTS && began.elapsed() < BUDGET)) && began.elapsed() < PATIENCE
}

/// xorshift: the threads' choices need be neither good nor the same from run to run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Wakes the starter as a ring is woken: a call while it is awake is kept.
struct Starter(Thread);

impl Wake for Starter {
    fn wake(&self) {
        self.0.unpark();
    }
}

/// Raises the barrier and sleeps until the gate is drained. It sleeps for as long as nobody wakes it, so a wake-up that
/// is lost is seen.
fn take_t0(gate: &Gate) {
    gate.raise();
    let began = Instant::now();
    while !gate.is_drained() {
        assert!(began.elapsed() < PATIENCE, "the gate is not drained, or nobody said so");
        thread::park_timeout(PATIENCE);
    }
}

/// A pass, counted among those inside from just after it was given until just before it is given back.
struct Inside<'a> {
    count: &'a AtomicUsize,
    _pass: Pass,
}

impl<'a> Inside<'a> {
    fn new(count: &'a AtomicUsize, pass: Pass) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self { count, _pass: pass }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Yard {
    gate: Arc<Gate>,
    inside: AtomicUsize,
    over: AtomicBool,
    entries: AtomicU64,
    nested: AtomicU64,
    waits: AtomicU64,
    cancelled: AtomicU64,
    woken: Arc<AtomicU64>,
}

impl Yard {
    /// Entries, nested entries, waits.
    fn counts(&self) -> [u64; 3] {
        [&self.entries, &self.nested, &self.waits].map(|count| count.load(Ordering::Relaxed))
    }

    fn guest<'a>(
        &'a self,
        number: u64,
        give: &mpsc::SyncSender<Inside<'a>>,
        take: &Mutex<mpsc::Receiver<Inside<'a>>>,
    ) {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ (number + 1));
        while !self.over.load(Ordering::Relaxed) {
            let Entry::Admitted(pass) = self.gate.enter() else {
                self.wait(&mut dice);
                continue;
            };
            let outer = Inside::new(&self.inside, pass);
            self.entries.fetch_add(1, Ordering::Relaxed);
            if dice.roll(4) == 0 {
                let Entry::Admitted(pass) = self.gate.enter() else { panic!("a pass of this thread is out") };
                let inner = Inside::new(&self.inside, pass);
                self.nested.fetch_add(1, Ordering::Relaxed);
                if dice.roll(2) == 0 {
                    drop(outer);
                    thread::yield_now();
                    continue;
                }
                drop(inner);
            }
            match dice.roll(16) {
                0 => thread::yield_now(),
                // For another thread to drop.
                1 => drop(give.try_send(outer)),
                2 => drop(take.lock().unwrap().try_recv()),
                _ => {}
            }
        }
    }

    fn wait(&self, dice: &mut Dice) {
        if dice.roll(3) > 0 {
            assert!(self.gate.wait_blocking(Some(PATIENCE)), "lowered, and nobody said so");
            self.waits.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let woken = self.woken.clone();
        let waiter = Waiter::callback(move || {
            woken.fetch_add(1, Ordering::Relaxed);
        });
        let Ok(ticket) = self.gate.wait(waiter) else { return };
        self.waits.fetch_add(1, Ordering::Relaxed);
        thread::yield_now();
        match self.gate.cancel(ticket) {
            Cancellation::Removed => self.cancelled.fetch_add(1, Ordering::Relaxed),
            Cancellation::AlreadyWoken => 0,
        };
    }
}

#[test]
fn nobody_is_inside_at_t0() {
    let yard = Yard {
        gate: Gate::new(Arc::new(Starter(thread::current()))),
        inside: AtomicUsize::new(0),
        over: AtomicBool::new(false),
        entries: AtomicU64::new(0),
        nested: AtomicU64::new(0),
        waits: AtomicU64::new(0),
        cancelled: AtomicU64::new(0),
        woken: Arc::default(),
    };
    let began = Instant::now();
    let mut starts = 0;
    thread::scope(|scope| {
        let (give, take) = mpsc::sync_channel(4);
        let take = Arc::new(Mutex::new(take));
        for number in 0..GUESTS {
            let (yard, give, take) = (&yard, give.clone(), take.clone());
            scope.spawn(move || yard.guest(number, &give, &take));
        }
        // Passes that nobody takes are to come back, too.
        let drain = |take: &Mutex<mpsc::Receiver<Inside<'_>>>| take.lock().unwrap().try_iter().for_each(drop);
        while goes_on(starts, began, yard.counts().iter().all(|&count| count > 0)) {
            yard.gate.raise();
            while !yard.gate.is_drained() {
                drain(&take);
                assert!(began.elapsed() < PATIENCE, "the gate is not drained");
                thread::park_timeout(Duration::from_micros(50));
            }
            for _ in 0..3 {
                assert_eq!(yard.inside.load(Ordering::Relaxed), 0, "somebody is inside at t0");
                thread::yield_now();
            }
            yard.gate.lower();
            starts += 1;
            if starts % 4 == 0 {
                thread::yield_now();
            }
        }
        yard.over.store(true, Ordering::Relaxed);
        drain(&take);
    });
    let counts = yard.counts();
    assert!(counts.iter().all(|&count| count > 0), "{starts} starts, {counts:?}");
    assert_eq!(yard.inside.load(Ordering::Relaxed), 0);
}

/// Guests that wait for nothing but the barrier, and a starter that sleeps until it is woken: a wake-up that is lost on
/// either side stops them.
#[test]
fn no_wake_up_is_lost_on_either_side() {
    let gate = Gate::new(Arc::new(Starter(thread::current())));
    let over = AtomicBool::new(false);
    let inside = AtomicUsize::new(0);
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..GUESTS {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    match gate.enter() {
                        Entry::Admitted(pass) => drop(Inside::new(&inside, pass)),
                        Entry::AtBarrier => {
                            assert!(gate.wait_blocking(Some(PATIENCE)), "nobody woke this guest")
                        }
                    }
                }
            });
        }
        let mut starts = 0;
        while goes_on(starts, began, true) {
            take_t0(&gate);
            assert_eq!(inside.load(Ordering::Relaxed), 0, "somebody is inside at t0");
            gate.lower();
            thread::yield_now();
            starts += 1;
        }
        over.store(true, Ordering::Relaxed);
    });
}

/// Many jobs come and go; a write that was granted after a job's t0 was granted by that job, too.
#[test]
fn no_write_passes_a_job_by() {
    const BYTES: ByteRange = ByteRange::new(0, 4096);
    let gate = Gate::new(Arc::new(Starter(thread::current())));
    let jobs = JobList::new();
    // The job whose t0 is past and which has copied nothing; 0 if there is none.
    let live = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let [granted, refused] = [AtomicU64::new(0), AtomicU64::new(0)];
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    match attempt(&gate, &jobs, BYTES) {
                        Attempt::Granted(permit) => check(&live, permit, &granted),
                        Attempt::Copy(..) => {
                            refused.fetch_add(1, Ordering::Relaxed);
                            thread::yield_now();
                        }
                        Attempt::AtBarrier => assert!(gate.wait_blocking(Some(PATIENCE))),
                    }
                }
            });
        }
        let geometry = Geometry::new(Length(1 << 20), ClusterSize::DEFAULT);
        let mut starts = 0;
        while goes_on(
            starts,
            began,
            [&granted, &refused].iter().all(|count| count.load(Ordering::Relaxed) > 0),
        ) {
            starts += 1;
            let set = Arc::new(IntervalSet::new(geometry.clusters()).unwrap());
            take_t0(&gate);
            live.store(starts, Ordering::Relaxed);
            jobs.attach(Arc::new(Watch::new(JobId(starts), set, geometry)));
            gate.lower();
            thread::yield_now();
            live.store(0, Ordering::Relaxed);
            drop(jobs.detach(JobId(starts)));
            thread::yield_now();
        }
        over.store(true, Ordering::Relaxed);
    });
    let [granted, refused] = [granted, refused].map(AtomicU64::into_inner);
    assert!(granted > 0 && refused > 0, "{granted} granted, {refused} refused");
}

/// While the permit lives: no t0 is taken, so no job that was not seen can have had its t0.
fn check(live: &AtomicU64, permit: Permit, granted: &AtomicU64) {
    assert_eq!(live.load(Ordering::SeqCst), 0, "a write that a live job has not copied");
    granted.fetch_add(1, Ordering::Relaxed);
    drop(permit);
}
