//! The jobs of a disk as its guests see them: what is still to be copied before a write.
//!
//! # Model
//!
//! The ring thread attaches a job to the disk at t0 and detaches it at its end. A guest that has its pass asks for the
//! first job that lacks one of the clusters it is going to write. That is a load where there is no job, and loads only,
//! besides the pin of the thread's epoch, where there are some.
//!
//! # Ordering, and why
//!
//! - *A job that starts is seen by every guest that writes after t0.* The list alone does not give this: a guest may
//!   look at an old list. The gate does. A job is attached while the barrier is up and the gate drained; `lower`
//!   releases and the entry acquires, so a guest that enters after t0 **and then looks** sees the list with the job in it.
//!   A guest that entered before t0 holds its pass until its data is on the source, which is before t0. A guest
//!   that looked first and then entered could look before t0 and write after it, without a copy.
//! - *A set is seen as it was made.* Replacing the list releases and looking acquires (`sync::Published`).
//! - *Done is done.* A look at the set acquires what the copier did before it completed the clusters.
//! - *A job that ends* is detached at any time. A guest may still find it for the moment of its look; then it asks for a copy
//!   that is refused, and begins again.

use std::fmt;
use std::sync::Arc;

use crate::interval_set::{ClusterState, IntervalSet};
use crate::sync::{Mutex, Published};
use crate::units::{ByteRange, ClusterIndex, ClusterRange, Geometry};

/// Names a job, for as long as the engine lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// Most bytes that a guest has copied at a time before a write: more are asked for piece by piece, so that a write of any length does not
/// keep others waiting for long.
pub(super) const MOST_AT_A_TIME: u64 = 16 << 20;

/// What guests need of a job: its number, and what it has copied.
#[derive(Debug)]
pub struct Watch {
    id: JobId,
    set: Arc<IntervalSet>,
    geometry: Geometry,
}

impl Watch {
    /// The job `id` over a disk of `geometry`, whose copied clusters are those done in `set`.
    ///
    /// # Panics
    /// If the set has another number of clusters than the disk.
    #[must_use]
    pub fn new(id: JobId, set: Arc<IntervalSet>, geometry: Geometry) -> Self {
        assert_eq!(set.clusters(), geometry.clusters(), "a set of another disk");
        Self { id, set, geometry }
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> JobId {
        self.id
    }

    /// What it has copied.
    #[must_use]
    pub fn set(&self) -> &Arc<IntervalSet> {
        &self.set
    }

    /// The beginning of `range` that lies in clusters which are all copied, or all not: its length, and whether it is the latter.
    pub(super) fn untouched_part(&self, range: ByteRange) -> (u64, bool) {
        let clusters = self.geometry.covering(range);
        let end = clusters.end.min(self.set.all().end);
        if clusters.start >= end {
            return (range.length, false);
        }
        let clusters = ClusterRange { start: clusters.start, end };
        let untouched = self.set.state(clusters.start) != ClusterState::Done;
        let first = if untouched { self.set.first_done(clusters) } else { self.set.first_not_done(clusters) };
        let end = first.map_or(range.end(), |first| self.geometry.offset_of(first));
        (end.min(range.end()) - range.offset, untouched)
    }

    /// Of the clusters that `range` touches the first that are to be copied, if they are not all done; some of these may be done as well. What
    /// lies beyond the disk as it was at t0 is no part of the copy.
    #[inline]
    pub(super) fn undone(&self, range: ByteRange) -> Option<ClusterRange> {
        let ClusterRange { start, end } = self.geometry.covering(range);
        let end = ClusterIndex(end.0.min(self.set.clusters().0));
        if start >= end {
            return None;
        }
        let touched = ClusterRange { start, end };
        if self.set.is_done(touched) {
            return None;
        }
        self.first_undone(touched)
    }

    #[cold]
    fn first_undone(&self, touched: ClusterRange) -> Option<ClusterRange> {
        let start = self.set.first_not_done(touched)?;
        let most = (MOST_AT_A_TIME / self.geometry.cluster_size().bytes()).max(1);
        Some(ClusterRange { start, end: ClusterIndex(touched.end.0.min(start.0 + most)) })
    }

    /// Up to where everything from the start of `range` on is done; or, if its first cluster is not, where the next done one begins. Nothing
    /// beyond the end of `range` is looked at.
    fn done_from(&self, range: ByteRange) -> Result<u64, u64> {
        let ClusterRange { start, end } = self.geometry.covering(range);
        let end = ClusterIndex(end.0.min(self.set.clusters().0));
        if start >= end {
            return Ok(u64::MAX);
        }
        let offset_of = |cluster: Option<ClusterIndex>| {
            cluster.map_or(u64::MAX, |cluster| self.geometry.offset_of(cluster))
        };
        let touched = ClusterRange { start, end };
        match self.set.first_not_done(touched) {
            Some(first) if first == start => {
                let rest = ClusterRange { start: ClusterIndex(start.0 + 1), end };
                Err(offset_of(self.set.first_done(rest)))
            }
            undone => Ok(offset_of(undone)),
        }
    }
}

/// The jobs of a disk: changed by the ring thread, looked at by every guest write.
pub struct JobList {
    /// Those attached, in order, for whoever changes the list.
    attached: Mutex<Vec<Arc<Watch>>>,
    /// The same for guests; nothing where it is empty.
    published: Published<Vec<Arc<Watch>>>,
}

impl JobList {
    /// No jobs.
    #[must_use]
    pub fn new() -> Self {
        Self { attached: Mutex::new(Vec::new()), published: Published::none() }
    }

    /// The first job of whose clusters those that `range` touches (in part, too) are not all done, and the first of these clusters, from one on
    /// that is not done: as many as are copied at a time.
    ///
    /// For a guest that holds its pass, and takes the answer `None` for the permission to write to `range`.
    #[inline]
    #[must_use]
    pub fn first_undone(&self, range: ByteRange) -> Option<(JobId, ClusterRange)> {
        self.published.with(|jobs| {
            let undone = |job: &Arc<Watch>| Some((job.id, job.undone(range)?));
            jobs.and_then(|jobs| jobs.iter().find_map(undone))
        })
    }

    /// The first run of bytes of `range` of which every cluster touched is done in all jobs.
    #[must_use]
    pub fn first_done(&self, range: ByteRange) -> Option<ByteRange> {
        self.published.with(|jobs| {
            let jobs = jobs.map_or(&[][..], Vec::as_slice);
            let mut at = range.offset;
            'search: while at < range.end() {
                let mut end = range.end();
                for job in jobs {
                    match job.done_from(ByteRange::between(at, range.end())) {
                        Ok(done_to) => end = end.min(done_to),
                        Err(next) => {
                            at = next;
                            continue 'search;
                        }
                    }
                }
                return Some(ByteRange::between(at, end));
            }
            None
        })
    }

    /// Adds a job: while the barrier of the disk's gate is up and the gate is drained.
    ///
    /// # Panics
    /// If a job of that number is attached.
    pub fn attach(&self, watch: Arc<Watch>) {
        let mut attached = self.attached.lock();
        assert!(attached.iter().all(|other| other.id != watch.id), "{:?} is attached already", watch.id);
        attached.push(watch);
        self.publish(&attached);
    }

    /// Takes a job out, at any time; `None` if it is not there.
    ///
    /// Guests may be looking at it for a moment yet. Whoever wants its memory back, and not have it given back by
    /// whichever guest looks away last, keeps what is returned until no other reference to it is left, with a
    /// [`collect`](Self::collect) now and then.
    pub fn detach(&self, job: JobId) -> Option<Arc<Watch>> {
        let mut attached = self.attached.lock();
        let at = attached.iter().position(|watch| watch.id == job)?;
        let watch = attached.remove(at);
        self.publish(&attached);
        Some(watch)
    }

    /// Lets go of lists that were replaced and are not looked at any more.
    pub fn collect() {
        Published::<Vec<Arc<Watch>>>::collect();
    }

    fn publish(&self, attached: &[Arc<Watch>]) {
        self.published.replace((!attached.is_empty()).then(|| attached.to_vec()));
    }
}

impl Default for JobList {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for JobList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.attached.lock().iter().map(|watch| watch.id)).finish()
    }
}
