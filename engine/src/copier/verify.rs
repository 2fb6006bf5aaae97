//! Reading back what reached the target, window by window.
//!
//! # Model
//! While clusters are copied, their checksums are noted in the *window* that is being filled. A checkpoint closes it: its clusters
//! were written before the flush was submitted, so after the flush they are what the medium holds. They are then read back with direct I/O
//! and compared, and only what compared equal is claimed. Windows are bounded (the sweep waits when one is full while the last one is
//! still being compared), so memory does not grow with the disk. Clusters of zeros are noted as ranges; where the target says that
//! such a range is a hole, that is the proof, and only the rest is read. What cannot be claimed is kept as ranges as well, and once
//! too many clusters have failed the rest of the window is not looked at any more. A target without direct I/O has its page cache dropped
//! first, so that the medium answers.

use std::collections::VecDeque;

use super::tally::Was;
use super::transfer::{Expected, Failure};
use crate::ring::{Extent, ExtentQuery, FileId, Op};
use crate::units::{ClusterIndex, ClusterRange, Geometry};

/// A cluster that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Noted {
    cluster: ClusterIndex,
    digest: u128,
    written: u32,
}

/// What was copied since the last checkpoint.
#[derive(Debug, Default)]
pub(super) struct Window {
    data: Vec<Noted>,
    zeros: Vec<(ClusterRange, Was)>,
}

impl Window {
    /// `cluster` holds what has the checksum `digest`; `written` bytes of it were written.
    pub(super) fn note_data(&mut self, cluster: ClusterIndex, digest: u128, written: u32) {
        self.data.push(Noted { cluster, digest, written });
    }

    /// `clusters` read as zeros.
    pub(super) fn note_zeros(&mut self, clusters: ClusterRange, was: Was) {
        match self.zeros.last_mut() {
            Some((last, kind)) if *kind == was && last.end == clusters.start => last.end = clusters.end,
            _ => self.zeros.push((clusters, was)),
        }
    }
}

/// Clusters that did not compare equal, or were not compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unverified {
    pub(super) clusters: ClusterRange,
    /// As what each was counted.
    pub(super) was: Was,
    /// What is wrong with them; `None`: they were not looked at.
    pub(super) failure: Option<Failure>,
}

/// A run to read back.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ReadBack {
    pub(super) clusters: ClusterRange,
    pub(super) expected: Vec<Expected>,
}

/// Compares one closed window. See the module's header.
#[derive(Debug)]
pub(super) struct Verification {
    geometry: Geometry,
    data: Vec<Noted>,
    /// How many of `data` were taken out.
    next_data: usize,
    /// Zero ranges to ask the target about.
    to_ask: VecDeque<(ClusterRange, Was)>,
    asked: Option<(ClusterRange, Was)>,
    /// Zero ranges that are no holes on the target.
    to_read: VecDeque<(ClusterRange, Was)>,
    /// The page cache still holds what was written: nothing is read back before it was dropped.
    pub(super) cached: bool,
    /// Runs being read back.
    pub(super) running: u32,
    /// What cannot be claimed: clusters that failed, one by one, and ranges that were not looked at any more.
    unverified: Vec<Unverified>,
    /// Clusters that failed.
    failures: usize,
    /// Clusters of a run that could not be read, to be read one by one.
    alone: VecDeque<(ClusterIndex, Expected)>,
    /// What is not in flight is not looked at any more.
    abandoned: bool,
}

impl Verification {
    pub(super) fn new(mut window: Window, geometry: Geometry, cached: bool) -> Self {
        window.data.sort_unstable_by_key(|noted| noted.cluster);
        Self {
            geometry,
            data: window.data,
            next_data: 0,
            to_ask: window.zeros.into(),
            asked: None,
            to_read: VecDeque::new(),
            cached,
            running: 0,
            unverified: Vec::new(),
            failures: 0,
            alone: VecDeque::new(),
            abandoned: false,
        }
    }

    /// Whether everything was compared, or will not be any more.
    pub(super) fn is_done(&mut self) -> bool {
        if self.abandoned {
            self.pass_over_rest();
        }
        self.next_data == self.data.len()
            && !self.cached
            && self.alone.is_empty()
            && self.to_ask.is_empty()
            && self.asked.is_none()
            && self.to_read.is_empty()
            && self.running == 0
    }

    /// Stop: what is not in flight will not be compared.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
        self.pass_over_rest();
    }

    fn pass_over_rest(&mut self) {
        let data = self.data[self.next_data..]
            .iter()
            .map(|noted| (super::one(noted.cluster), Was::Data { written: noted.written }));
        let alone = self.alone.drain(..).map(|(cluster, expected)| (super::one(cluster), expected.was()));
        let zeros = self.to_ask.drain(..).chain(self.to_read.drain(..));
        for (clusters, was) in data.chain(alone).chain(zeros) {
            match self.unverified.last_mut() {
                Some(last)
                    if last.failure.is_none() && last.was == was && last.clusters.end == clusters.start =>
                {
                    last.clusters.end = clusters.end;
                }
                _ => self.unverified.push(Unverified { clusters, was, failure: None }),
            }
        }
        self.next_data = self.data.len();
    }

    /// `clusters` did not compare equal, or could not be read. Gives how many have failed so far.
    pub(super) fn failed(
        &mut self,
        clusters: impl Iterator<Item = (ClusterIndex, Expected)>,
        failure: Failure,
    ) -> usize {
        let before = self.unverified.len();
        self.unverified.extend(clusters.map(|(cluster, expected)| Unverified {
            clusters: super::one(cluster),
            was: expected.was(),
            failure: Some(failure),
        }));
        self.failures += self.unverified.len() - before;
        self.failures
    }

    /// Whether there is something that cannot be claimed.
    pub(super) fn has_unverified(&self) -> bool {
        !self.unverified.is_empty()
    }

    /// What cannot be claimed, ascending.
    pub(super) fn take_unverified(&mut self) -> Vec<Unverified> {
        let mut unverified = std::mem::take(&mut self.unverified);
        unverified.sort_unstable_by_key(|unverified| unverified.clusters.start);
        unverified
    }

    /// A run could not be read: read its clusters one by one.
    pub(super) fn take_apart(&mut self, clusters: impl Iterator<Item = (ClusterIndex, Expected)>) {
        self.alone.extend(clusters);
    }

    /// The next question about a zero range, if one is due.
    pub(super) fn question(&mut self, file: FileId, limit: usize) -> Option<Op> {
        if self.asked.is_some() {
            return None;
        }
        let (clusters, was) = self.to_ask.pop_front()?;
        self.asked = Some((clusters, was));
        let range = self.geometry.bytes_of(clusters);
        Some(Op::Extents { file, range, query: ExtentQuery::Data, limit })
    }

    /// The answer; an error counts as "there is data". Gives the bytes proven to be zeros.
    pub(super) fn on_answer(&mut self, extents: Option<Vec<Extent>>) -> u64 {
        let (clusters, was) = self.asked.take().expect("an answer follows a question");
        let range = self.geometry.bytes_of(clusters);
        let Some(extents) = extents.filter(|extents| !extents.is_empty()) else {
            self.to_read.push_back((clusters, was));
            return 0;
        };
        let reached =
            extents.iter().map(|extent| extent.range.end()).max().unwrap_or(range.offset).min(range.end());
        let mut next = clusters.start;
        let mut proven = 0;
        for extent in extents.iter().filter(|extent| extent.present) {
            let Some(data) = extent.range.intersection(range) else { continue };
            let touched = self.geometry.covering(data);
            let start = touched.start.max(next);
            if touched.end > start {
                proven += self.geometry.bytes_of(ClusterRange { start: next, end: start }).length;
                self.to_read.push_back((ClusterRange { start, end: touched.end }, was));
                next = touched.end;
            }
        }
        // What lies beyond the answer is asked again, from the first cluster that it does not cover.
        let rest =
            if reached == range.end() { clusters.end } else { self.geometry.cluster_at(reached).max(next) };
        if rest == clusters.start {
            // The first cluster is in more pieces than one answer holds: read it rather than ask for ever.
            let end = ClusterIndex(rest.0 + 1);
            self.to_read.push_back((ClusterRange { start: rest, end }, was));
            next = end;
        }
        let rest = rest.max(next);
        if next < rest {
            proven += self.geometry.bytes_of(ClusterRange { start: next, end: rest }).length;
        }
        if rest < clusters.end {
            self.to_ask.push_front((ClusterRange { start: rest, end: clusters.end }, was));
        }
        proven
    }

    /// The next run of at most `max` clusters to read back.
    pub(super) fn next(&mut self, max: u64) -> Option<ReadBack> {
        if let Some((cluster, expected)) = self.alone.pop_front() {
            return Some(ReadBack { clusters: super::one(cluster), expected: vec![expected] });
        }
        if let Some((first, was)) = self.to_read.front_mut() {
            let was = *was;
            let end = first.end.0.min(first.start.0 + max);
            let clusters = ClusterRange::new(first.start.0, end);
            first.start = clusters.end;
            if first.is_empty() {
                self.to_read.pop_front();
            }
            let count = usize::try_from(clusters.count()).expect("bounded by the slots");
            return Some(ReadBack { clusters, expected: vec![Expected::Zeros(was); count] });
        }
        let rest = &self.data[self.next_data..];
        let start = rest.first()?.cluster;
        let run = (start.0..)
            .zip(rest)
            .take_while(|(cluster, noted)| noted.cluster.0 == *cluster && cluster - start.0 < max);
        let expected: Vec<Expected> =
            run.map(|(_, noted)| Expected::Digest { digest: noted.digest, written: noted.written }).collect();
        self.next_data += expected.len();
        let end = start.0 + expected.len() as u64;
        Some(ReadBack { clusters: ClusterRange::new(start.0, end), expected })
    }

    /// Whether [`Self::next`] would give a run.
    pub(super) fn has_next(&self) -> bool {
        !self.alone.is_empty() || !self.to_read.is_empty() || self.next_data < self.data.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{ByteRange, ClusterSize, Length};

    fn geometry() -> Geometry {
        Geometry::new(Length((64 << 16) - 100), ClusterSize::DEFAULT)
    }

    #[test]
    fn data_is_read_back_in_runs_in_order() {
        let mut window = Window::default();
        for cluster in [5, 3, 4, 9] {
            window.note_data(ClusterIndex(cluster), u128::from(cluster), 65536);
        }
        let mut verification = Verification::new(window, geometry(), false);
        let first = verification.next(2).unwrap();
        assert_eq!(first.clusters, ClusterRange::new(3, 5));
        let expected = |digest| Expected::Digest { digest, written: 65536 };
        assert_eq!(first.expected, [expected(3), expected(4)]);
        assert_eq!(verification.next(2).unwrap().clusters, ClusterRange::new(5, 6));
        assert_eq!(verification.next(2).unwrap().clusters, ClusterRange::new(9, 10));
        assert!(verification.is_done());
    }

    #[test]
    fn holes_prove_zeros_and_the_rest_is_read() {
        let mut window = Window::default();
        window.note_zeros(ClusterRange::new(0, 10), Was::Hole);
        window.note_zeros(ClusterRange::new(10, 64), Was::Hole);
        let mut verification = Verification::new(window, geometry(), false);
        assert!(verification.question(FileId(0), 8).is_some());
        let extent = |start: u64, end, present| Extent { range: ByteRange::between(start, end), present };
        // Data in the middle of clusters 2 and 3; the answer ends within cluster 20.
        let answer = vec![
            extent(0, (2 << 16) + 4096, false),
            extent((2 << 16) + 4096, (3 << 16) + 8192, true),
            extent((3 << 16) + 8192, (20 << 16) + 1, false),
        ];
        assert_eq!(verification.on_answer(Some(answer)), (2 + 16) << 16);
        assert_eq!(verification.next(8).unwrap().clusters, ClusterRange::new(2, 4));
        assert!(!verification.is_done());
        assert!(verification.question(FileId(0), 8).is_some());
        let rest = ((64u64 - 20) << 16) - 100;
        assert_eq!(verification.on_answer(Some(vec![extent(20 << 16, (64 << 16) - 100, false)])), rest);
        assert!(verification.is_done());
    }

    #[test]
    fn what_is_abandoned_takes_no_more_room_than_what_was_noted() {
        let length = crate::units::MAX_LENGTH;
        let geometry = Geometry::new(Length(length), ClusterSize::new(4096).unwrap());
        let all = geometry.all();
        let mut window = Window::default();
        window.note_zeros(ClusterRange { start: ClusterIndex(1000), ..all }, Was::Hole);
        for cluster in 0..1000 {
            window.note_data(ClusterIndex(cluster), 0, 4096);
        }
        let mut verification = Verification::new(window, geometry, false);
        let run = verification.next(3).unwrap();
        let failure = Failure {
            fault: super::super::piece::Fault::Mismatch,
            operation: crate::error::Operation::Verify,
            range: geometry.bytes_of(run.clusters),
        };
        assert_eq!(verification.failed(run.clusters.iter().zip(run.expected), failure), 3);
        assert!(!verification.is_done());
        verification.abandon();
        assert!(verification.is_done());
        let unverified = verification.take_unverified();
        assert_eq!(unverified.len(), 3 + 2);
        assert!(unverified.windows(2).all(|pair| pair[0].clusters.end == pair[1].clusters.start));
        assert_eq!(unverified.iter().map(|unverified| unverified.clusters.count()).sum::<u64>(), all.count());
    }
}
