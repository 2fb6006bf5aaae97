//! What a client is told who asks where data is.
//!
//! # Snapshots
//! The disk is asked for its holes of now. What is a hole now was one at t0, too, if its cluster is not copied *when the answer has come*: guests
//! change a cluster only once it is copied, so until then none of them had, and the answer is of before that. Of a
//! cluster that is copied the disk of now says nothing: it counts as data.

use crate::live::jobs::Watch;
use crate::nbd::connection::{Outcome, StatusExtent};
use crate::ring::Extent;
use crate::units::ByteRange;

/// It says nothing of itself, so that it has to be read.
pub(super) fn all_data(range: ByteRange) -> Outcome {
    outcome(vec![extent(range.length, false)])
}

/// What a disk says of `range`, as `base:allocation` has it.
pub(super) fn of_disk(extents: &[Extent], range: ByteRange) -> Outcome {
    if extents.is_empty() {
        return all_data(range);
    }
    outcome(extents.iter().map(|told| extent(told.range.length, !told.present)).collect())
}

/// What was at t0 of a job where its disk says so now: at most `limit` extents. See the module's header.
pub(super) fn at_t0(extents: &[Extent], range: ByteRange, limit: usize, job: &Watch) -> Outcome {
    let mut list: Vec<StatusExtent> = Vec::new();
    for told in extents {
        let mut left = told.range;
        while !left.is_empty() {
            let (length, hole) = if told.present { (left.length, false) } else { job.untouched_part(left) };
            let next = extent(length, hole);
            let full = list.len() == limit;
            match list.last_mut() {
                Some(last) if last.flags == next.flags => last.length += length,
                _ if full => return outcome(list),
                _ => list.push(next),
            }
            left = ByteRange::between(left.offset + length, left.end());
        }
    }
    if list.is_empty() { all_data(range) } else { outcome(list) }
}

fn outcome(list: Vec<StatusExtent>) -> Outcome {
    Outcome::Extents(vec![list])
}

fn extent(length: u64, hole: bool) -> StatusExtent {
    StatusExtent { length, flags: if hole { StatusExtent::HOLE | StatusExtent::ZERO } else { 0 } }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::interval_set::IntervalSet;
    use crate::live::JobId;
    use crate::units::{ClusterRange, ClusterSize, Geometry, Length};

    /// Eight clusters, the last of 100 bytes; those of `done` are copied.
    fn job(done: &[u64]) -> Watch {
        let geometry = Geometry::new(Length((7 << 16) + 100), ClusterSize::DEFAULT);
        let set = IntervalSet::new(geometry.clusters()).unwrap();
        for &cluster in done {
            set.mark_done(ClusterRange::new(cluster, cluster + 1));
        }
        Watch::new(JobId(1), Arc::new(set), geometry)
    }

    fn told(job: &Watch, limit: usize, extents: &[(u64, u64, bool)]) -> Vec<(u64, bool)> {
        let extent = |&(offset, length, present)| Extent { range: ByteRange::new(offset, length), present };
        let extents: Vec<Extent> = extents.iter().map(extent).collect();
        let Outcome::Extents(lists) = at_t0(&extents, ByteRange::new(0, 9), limit, job) else {
            panic!("no extents")
        };
        lists[0].iter().map(|extent| (extent.length, extent.flags != 0)).collect()
    }

    #[test]
    fn a_hole_of_now_is_one_of_t0_where_nothing_is_copied() {
        let all = [(0, (7 << 16) + 100, false)];
        assert_eq!(told(&job(&[]), 9, &all), [((7 << 16) + 100, true)]);
        let parts = [(65536, false), (65536, true), (65536, false), ((4 << 16) + 100, true)];
        assert_eq!(told(&job(&[0, 2]), 9, &all), parts);
        assert_eq!(told(&job(&[0, 2]), 2, &all), parts[..2]);
        assert_eq!(told(&job(&[0, 1, 2, 3, 4, 5, 6, 7]), 9, &all), [((7 << 16) + 100, false)]);
    }

    #[test]
    fn extents_need_no_clusters_and_data_is_data() {
        // The second cluster is copied; holes begin and end in the midst of clusters.
        let extents = [(10, 65536 - 10 + 5, false), (65541, 95, true), (65636, 70000, false)];
        assert_eq!(told(&job(&[1]), 9, &extents), [(65526, true), (65536, false), (135_636 - 131_072, true)]);
        assert_eq!(told(&job(&[1]), 9, &[]), [(9, false)]);
    }
}
