//! The gate of permits, the list of jobs and the sets of these together: guests who write all the time, on two disks, while jobs
//! start one by one and in a group, or give their start up.
//!
//! What a job has copied must be each disk as it was at t0, and t0 of a group one instant: the disks are plain numbers, which the one who starts
//! the jobs looks at while the barriers are up.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use engine::interval_set::{Found, IntervalSet, Waited, Waiter};
use engine::live::{Attempt, Gate, JobId, JobList, Permit, Watch, attempt, attempt_unnested};
use engine::ring::Wake;
use engine::units::{ByteRange, ClusterCount, ClusterRange, ClusterSize, Geometry, Length};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::{self, JoinHandle, Thread};

use crate::check;

/// Clusters of a disk: two words.
const CLUSTERS: u64 = 40;
const CLUSTER: u64 = 4096;

/// Wakes the starter's thread. As with a ring, a call while it is awake is kept.
struct Starter(Thread);

impl Wake for Starter {
    fn wake(&self) {
        self.0.unpark();
    }
}

/// A copy of a disk.
struct Job {
    id: JobId,
    set: Arc<IntervalSet>,
    target: Vec<AtomicU64>,
    t0: Vec<u64>,
}

/// A disk with its guests' door. The thread that makes it is the one that starts jobs.
struct Disk {
    gate: Arc<Gate>,
    jobs: JobList,
    under_way: Mutex<Vec<Arc<Job>>>,
    contents: Vec<AtomicU64>,
    /// Permits that are out.
    out: AtomicU32,
}

fn geometry() -> Geometry {
    Geometry::new(Length(CLUSTERS * CLUSTER), ClusterSize::new(CLUSTER).unwrap())
}

impl Disk {
    fn new() -> Self {
        Self {
            gate: Gate::new(Arc::new(Starter(thread::current()))),
            jobs: JobList::new(),
            under_way: Mutex::default(),
            contents: (0..CLUSTERS).map(AtomicU64::new).collect(),
            out: AtomicU32::new(0),
        }
    }

    fn holds(&self) -> Vec<u64> {
        self.contents.iter().map(|cluster| cluster.load(Ordering::Relaxed)).collect()
    }

    /// Attach a job: this is its t0.
    fn attach(&self, id: JobId) -> Arc<Job> {
        let set = Arc::new(IntervalSet::new(ClusterCount(CLUSTERS)).unwrap());
        let target = (0..CLUSTERS).map(|_| AtomicU64::new(u64::MAX)).collect();
        let job = Arc::new(Job { id, set: Arc::clone(&set), target, t0: self.holds() });
        self.under_way.lock().unwrap().push(Arc::clone(&job));
        self.jobs.attach(Arc::new(Watch::new(id, set, geometry())));
        job
    }

    /// Copy what of `clusters` job `id` has not copied yet.
    fn copy_before_write(&self, id: JobId, clusters: ClusterRange) {
        let job = self.under_way.lock().unwrap().iter().find(|job| job.id == id).cloned();
        // One that has ended meanwhile needs no copy.
        let Some(job) = job else { return };
        while !job.set.is_done(clusters) {
            let mut busy = Vec::new();
            let mut claims = Vec::new();
            job.set.claim_free(clusters, &mut |found| match found {
                Found::Claimed(claim) => claims.push(claim),
                Found::Busy(range) => busy.extend(range.iter()),
            });
            for claim in claims {
                self.copy(&job, claim);
            }
            if let Some(&cluster) = busy.first() {
                assert_eq!(job.set.wait_blocking(cluster, None, || ()), Waited::Released);
            }
        }
    }

    fn copy(&self, job: &Job, claim: engine::interval_set::Claim) {
        for cluster in claim.range().iter() {
            let cluster = usize::try_from(cluster.0).unwrap();
            let old = self.contents[cluster].load(Ordering::Relaxed);
            if thread_rng().gen_bool(0.2) {
                thread::yield_now();
            }
            job.target[cluster].store(old, Ordering::Relaxed);
        }
        job.set.complete(claim);
    }

    /// The rest of a job, and its end.
    fn sweep(&self, job: &Job) {
        while !job.set.is_done(job.set.all()) {
            let max = ClusterCount(thread_rng().gen_range(1..12));
            match job.set.claim_first(job.set.all(), max) {
                Some(claim) => self.copy(job, claim),
                None => thread::yield_now(),
            }
        }
        assert!(self.jobs.detach(job.id).is_some());
        self.under_way.lock().unwrap().retain(|other| other.id != job.id);
        let target: Vec<u64> = job.target.iter().map(|cluster| cluster.load(Ordering::Relaxed)).collect();
        assert_eq!(target, job.t0, "the copy is the disk at t0");
    }

    /// `blocks`: the guest waits in its thread, so its permits nest.
    fn permit(&self, clusters: ClusterRange, blocks: bool) -> Permit {
        let range = ByteRange::between(clusters.start.0 * CLUSTER, clusters.end.0 * CLUSTER);
        loop {
            let found = match blocks {
                true => attempt(&self.gate, &self.jobs, range),
                false => attempt_unnested(&self.gate, &self.jobs, range),
            };
            match found {
                Attempt::Granted(permit) => {
                    self.out.fetch_add(1, Ordering::Relaxed);
                    return permit;
                }
                Attempt::Copy(job, clusters) => self.copy_before_write(job, clusters),
                Attempt::AtBarrier if blocks => assert!(self.gate.wait_blocking(None)),
                Attempt::AtBarrier => self.wait_by_callback(),
            }
        }
    }

    /// Wait to be called, or lose patience and look again.
    fn wait_by_callback(&self) {
        let called = Arc::new(AtomicBool::new(false));
        let (flag, me) = (Arc::clone(&called), thread::current());
        let waiter = Waiter::callback(move || {
            assert!(!flag.swap(true, Ordering::Relaxed), "called twice");
            me.unpark();
        });
        let Ok(ticket) = self.gate.wait(waiter) else { return };
        if thread_rng().gen_bool(0.3) {
            thread::yield_now();
            let cancelled = self.gate.cancel(ticket);
            let removed = cancelled == engine::interval_set::Cancellation::Removed;
            assert!(!removed || !called.load(Ordering::Relaxed), "called, and taken out");
            return;
        }
        while !called.load(Ordering::Relaxed) {
            thread::park();
        }
    }

    fn give_back(&self, permit: Permit) {
        self.out.fetch_sub(1, Ordering::Relaxed);
        drop(permit);
    }

    fn write(&self, clusters: ClusterRange, value: u64) {
        for cluster in clusters.iter() {
            self.contents[usize::try_from(cluster.0).unwrap()].store(value, Ordering::Relaxed);
        }
    }
}

struct Host {
    disks: [Disk; 2],
    values: AtomicU64,
}

fn some_clusters() -> ClusterRange {
    let start = thread_rng().gen_range(0..CLUSTERS);
    ClusterRange::new(start, CLUSTERS.min(start + thread_rng().gen_range(1..8)))
}

/// A few writes, some with another one nested in them, some whose permit ends elsewhere.
fn guest(host: &Arc<Host>) {
    let mut elsewhere: Vec<JoinHandle<()>> = Vec::new();
    for _ in 0..3 {
        let number = thread_rng().gen_range(0..2_usize);
        let disk = &host.disks[number];
        let blocks = thread_rng().gen_bool(0.5);
        let clusters = some_clusters();
        let permit = disk.permit(clusters, blocks);
        let value = host.values.fetch_add(1, Ordering::Relaxed);
        disk.write(clusters, value);
        if blocks && thread_rng().gen_bool(0.3) {
            let clusters = some_clusters();
            let inner = disk.permit(clusters, true);
            disk.write(clusters, value);
            disk.give_back(inner);
        }
        thread::yield_now();
        if thread_rng().gen_bool(0.2) {
            let host = Arc::clone(host);
            elsewhere.push(thread::spawn(move || host.disks[number].give_back(permit)));
        } else {
            disk.give_back(permit);
        }
    }
    elsewhere.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Start a job on each of `disks` at one instant; or give up, when the permits are not back after so many looks.
fn start(host: &Arc<Host>, disks: &[usize], first: u64, patience: Option<u32>) -> Vec<JoinHandle<()>> {
    let of = |number: &usize| &host.disks[*number];
    disks.iter().map(of).for_each(|disk| disk.gate.raise());
    let mut looks = 0;
    let drained = loop {
        if disks.iter().map(of).all(|disk| disk.gate.is_drained()) {
            break true;
        }
        looks += 1;
        match patience {
            None => thread::park(),
            Some(patience) if looks > patience => break false,
            Some(_) => thread::yield_now(),
        }
    };
    let mut jobs = Vec::new();
    if drained {
        let before: Vec<Vec<u64>> = disks.iter().map(|number| of(number).holds()).collect();
        for (id, number) in (first..).zip(disks) {
            jobs.push((*number, of(number).attach(JobId(id))));
            thread::yield_now();
        }
        // Whatever else has run by now: nobody may write before the barriers are down.
        for ((number, job), before) in jobs.iter().zip(before) {
            assert_eq!(host.disks[*number].out.load(Ordering::Relaxed), 0, "a permit is out at t0");
            assert_eq!(job.t0, before, "t0 is one instant");
        }
    }
    disks.iter().map(of).for_each(|disk| disk.gate.lower());
    let sweep = |(number, job): (usize, Arc<Job>)| {
        let host = Arc::clone(host);
        thread::spawn(move || host.disks[number].sweep(&job))
    };
    jobs.into_iter().map(sweep).collect()
}

fn case() {
    let host = Arc::new(Host { disks: [Disk::new(), Disk::new()], values: AtomicU64::new(1000) });
    let guests: Vec<_> = (0..3)
        .map(|_| {
            let host = Arc::clone(&host);
            thread::spawn(move || guest(&host))
        })
        .collect();
    let mut sweeps = start(&host, &[0, 1], 1, None);
    sweeps.extend(start(&host, &[1], 3, Some(3)));
    sweeps.extend(start(&host, &[0], 4, None));
    guests.into_iter().chain(sweeps).for_each(|thread| thread.join().unwrap());
    for disk in &host.disks {
        assert_eq!(disk.out.load(Ordering::Relaxed), 0);
        assert!(disk.under_way.lock().unwrap().is_empty());
    }
}

#[test]
fn copies_are_of_one_instant_however_guests_and_starts_meet() {
    check(8000, case);
}

/// The engine dies while guests write and a start waits for them: everybody goes on.
fn poisoned_case() {
    let host = Arc::new(Host { disks: [Disk::new(), Disk::new()], values: AtomicU64::new(1000) });
    let guests: Vec<_> = (0..3)
        .map(|_| {
            let host = Arc::clone(&host);
            thread::spawn(move || guest(&host))
        })
        .collect();
    host.disks.iter().for_each(|disk| disk.gate.raise());
    thread::yield_now();
    for disk in &host.disks {
        disk.gate.poison();
        assert!(!disk.gate.is_drained(), "there is no t0 at a gate that is poisoned");
    }
    guests.into_iter().for_each(|guest| guest.join().unwrap());
}

#[test]
fn a_gate_that_is_poisoned_lets_everybody_go() {
    check(4000, poisoned_case);
}
