//! Jobs that start, copy before guests write, and end; and permits that are counted.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use engine::error::{Error, Operation};
use engine::live::JobId;
use engine::live::carrier::{AdmissionHost, Attempt, CopyWait, DiscardRule};
use engine::units::{ByteRange, ClusterIndex, ClusterRange, Geometry};
use fastrand::Rng;
use nix::errno::Errno;

/// Permits that are out, by their number.
pub(crate) type Ledger = Rc<RefCell<BTreeMap<u64, ByteRange>>>;

/// Leave to change a range.
pub(crate) struct Permit {
    ledger: Ledger,
    number: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        assert!(self.ledger.borrow_mut().remove(&self.number).is_some(), "a permit is dropped once");
    }
}

/// What has happened, over all runs: a test in which nothing happens proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) granted: u64,
    pub(crate) at_barrier: u64,
    pub(crate) copies: u64,
    pub(crate) jobs: u64,
    pub(crate) cancelled: u64,
    pub(crate) discarded_late: u64,
    pub(crate) failed: u64,
    pub(crate) read_back: u64,
    pub(crate) durable: u64,
}

struct Job {
    id: JobId,
    done: Vec<bool>,
    /// The disk at the job's t0.
    t0: Vec<u8>,
}

struct Asked {
    job: JobId,
    clusters: ClusterRange,
    wait: CopyWait,
}

/// How a copy that a guest waited for has ended.
pub(crate) type Answer = (CopyWait, Result<(), Arc<Error>>);

/// See the module's header.
pub(crate) struct Host {
    pub(crate) ledger: Ledger,
    pub(crate) barrier: bool,
    pub(crate) seen: Seen,
    geometry: Geometry,
    rng: Rng,
    jobs: Vec<Job>,
    asked: Vec<Asked>,
    next: u64,
    /// One in so many copies fails; 0: none.
    failing: u8,
}

impl Host {
    pub(crate) fn new(geometry: Geometry, seed: u64, failing: u8) -> Self {
        Self {
            ledger: Ledger::default(),
            barrier: false,
            seen: Seen::default(),
            geometry,
            rng: Rng::with_seed(seed),
            jobs: Vec::new(),
            asked: Vec::new(),
            next: 0,
            failing,
        }
    }

    /// Whether a guest waits for a copy.
    pub(crate) fn is_asked(&self) -> bool {
        !self.asked.is_empty()
    }

    /// t0: every permit is back. A job starts that copies what `view` is now.
    pub(crate) fn start_job(&mut self, view: &[u8]) {
        assert!(self.ledger.borrow().is_empty() && self.barrier, "t0 is when all permits are back");
        if self.jobs.len() == 2 {
            let gone = self.rng.usize(..2);
            self.jobs.remove(gone);
        }
        let clusters = usize::try_from(self.geometry.clusters().0).unwrap();
        self.seen.jobs += 1;
        self.next += 1;
        let id = JobId(self.next);
        self.jobs.push(Job { id, done: vec![false; clusters], t0: view.to_vec() });
    }

    pub(crate) fn end_jobs(&mut self) {
        self.jobs.clear();
    }

    /// The sweep of some job copies a cluster.
    pub(crate) fn sweep(&mut self, view: &[u8]) -> Result<(), String> {
        if self.jobs.is_empty() {
            return Ok(());
        }
        let job = self.rng.usize(..self.jobs.len());
        let undone: Vec<usize> =
            (0..self.jobs[job].done.len()).filter(|&cluster| !self.jobs[job].done[cluster]).collect();
        if undone.is_empty() {
            self.jobs.remove(job);
            return Ok(());
        }
        let cluster = undone[self.rng.usize(..undone.len())];
        self.copy_cluster(job, cluster, view)
    }

    /// Copy one cluster: it must still be as it was at t0.
    fn copy_cluster(&mut self, job: usize, cluster: usize, view: &[u8]) -> Result<(), String> {
        let start = cluster as u64;
        let bytes = self.geometry.bytes_of(ClusterRange::new(start, start + 1));
        let bytes = usize::try_from(bytes.offset).unwrap()..usize::try_from(bytes.end()).unwrap();
        let job = &mut self.jobs[job];
        if !std::mem::replace(&mut job.done[cluster], true) && view[bytes.clone()] != job.t0[bytes] {
            return Err(format!("cluster {cluster} was changed before {:?} had copied it", job.id));
        }
        Ok(())
    }

    /// Answer one of the copies that guests wait for.
    pub(crate) fn answer(&mut self, view: &[u8]) -> Result<Option<Answer>, String> {
        if self.asked.is_empty() {
            return Ok(None);
        }
        let Asked { job, clusters, wait } = self.asked.swap_remove(self.rng.usize(..self.asked.len()));
        if self.failing > 0 && self.rng.u8(..self.failing) == 0 {
            let range = self.geometry.bytes_of(clusters);
            let error = Error::io(Operation::Write, "target", Some(range), Errno::EIO);
            return Ok(Some((wait, Err(Arc::new(error)))));
        }
        // A job may be gone by now; or it says that all is done when only some is.
        if let Some(job) = self.jobs.iter().position(|other| other.id == job) {
            let partly = self.rng.u8(..4) == 0;
            for cluster in clusters.iter() {
                self.copy_cluster(job, usize::try_from(cluster.0).unwrap(), view)?;
                if partly {
                    break;
                }
            }
        }
        Ok(Some((wait, Ok(()))))
    }

    fn is_done(job: &Job, cluster: ClusterIndex) -> bool {
        job.done[usize::try_from(cluster.0).unwrap()]
    }
}

impl AdmissionHost for Host {
    type Permit = Permit;

    fn attempt(&mut self, range: ByteRange) -> Attempt<Permit> {
        assert!(!range.is_empty() && range.end() <= self.geometry.length().0, "{range} is not on the disk");
        if self.barrier {
            self.seen.at_barrier += 1;
            return Attempt::AtBarrier;
        }
        let clusters = self.geometry.covering(range);
        for job in &self.jobs {
            let first = clusters.iter().find(|&cluster| !Self::is_done(job, cluster));
            // Sometimes for no reason at all: a job may be slow to notice.
            let first = first.or_else(|| (self.rng.u8(..30) == 0).then_some(clusters.start));
            if let Some(first) = first {
                return Attempt::Copy(job.id, ClusterRange { start: first, end: clusters.end });
            }
        }
        self.next += 1;
        self.seen.granted += 1;
        self.ledger.borrow_mut().insert(self.next, range);
        Attempt::Granted(Permit { ledger: Rc::clone(&self.ledger), number: self.next })
    }

    fn copy(&mut self, job: JobId, clusters: ClusterRange, _range: ByteRange, wait: CopyWait) {
        assert!(self.asked.iter().all(|asked| asked.wait != wait), "every wait has a name of its own");
        self.seen.copies += 1;
        self.asked.push(Asked { job, clusters, wait });
    }

    fn discards(&mut self, range: ByteRange) -> DiscardRule {
        let clusters = self.geometry.covering(range);
        let free = |&cluster: &ClusterIndex| self.jobs.iter().all(|job| Self::is_done(job, cluster));
        let Some(start) = clusters.iter().find(free) else { return DiscardRule { now: None } };
        let run =
            (start.0..clusters.end.0).take_while(|&cluster| free(&ClusterIndex(cluster))).count() as u64;
        let bytes = self.geometry.bytes_of(ClusterRange::new(start.0, start.0 + run));
        DiscardRule { now: bytes.intersection(range) }
    }
}
