//! A bit for each cluster of a disk, in memory that is handed out when it is first touched.

use crate::units::{ClusterCount, ClusterIndex, ClusterRange};

const BITS: u64 = u64::BITS as u64;

/// See the module's header.
#[derive(Debug)]
pub(super) struct ClusterBits {
    words: Vec<u64>,
    clusters: ClusterCount,
}

impl ClusterBits {
    /// No bit set, for `clusters` clusters.
    pub(super) fn new(clusters: ClusterCount) -> Self {
        let words = usize::try_from(clusters.0.div_ceil(BITS)).expect("the interval set has as many");
        Self { words: vec![0; words], clusters }
    }

    fn place(cluster: u64) -> (usize, u64) {
        (usize::try_from(cluster / BITS).expect("within the disk"), cluster % BITS)
    }

    pub(super) fn set(&mut self, clusters: ClusterRange) {
        let mut at = clusters.start.0;
        while at < clusters.end.0 {
            let (word, first) = Self::place(at);
            let count = (BITS - first).min(clusters.end.0 - at);
            self.words[word] |= (u64::MAX >> (BITS - count)) << first;
            at += count;
        }
    }

    pub(super) fn contains(&self, cluster: ClusterIndex) -> bool {
        let (word, bit) = Self::place(cluster.0);
        self.words[word] >> bit & 1 != 0
    }

    /// The first run of clusters at or after `from` whose bits are not set, at most `max` of them.
    pub(super) fn next_clear(&self, from: ClusterIndex, max: ClusterCount) -> Option<ClusterRange> {
        let start = self.find(from.0, false)?;
        let end = self.find(start, true).unwrap_or(self.clusters.0);
        Some(ClusterRange::new(start, end.min(start.saturating_add(max.0))))
    }

    /// The first cluster at or after `from` whose bit is as `set` says.
    fn find(&self, from: u64, set: bool) -> Option<u64> {
        let mut at = from;
        while at < self.clusters.0 {
            let (word, first) = Self::place(at);
            let wanted = if set { self.words[word] } else { !self.words[word] } >> first;
            if wanted != 0 {
                let found = at + u64::from(wanted.trailing_zeros());
                return (found < self.clusters.0).then_some(found);
            }
            at += BITS - first;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_a_naive_list() {
        let mut random = fastrand::Rng::with_seed(5);
        for clusters in [1, 63, 64, 65, 300] {
            let mut bits = ClusterBits::new(ClusterCount(clusters));
            let mut naive = vec![false; usize::try_from(clusters).unwrap()];
            for _ in 0..12 {
                let start = random.u64(0..=clusters);
                let end = random.u64(start..=clusters).min(start + random.u64(0..100));
                bits.set(ClusterRange::new(start, end));
                naive[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(true);
                for at in 0..clusters {
                    let index = usize::try_from(at).unwrap();
                    assert_eq!(bits.contains(ClusterIndex(at)), naive[index]);
                    let start = (index..naive.len()).find(|&at| !naive[at]);
                    let run = start.map(|start| {
                        let end = (start..naive.len()).find(|&at| naive[at]).unwrap_or(naive.len());
                        ClusterRange::new(start as u64, end.min(start + 70) as u64)
                    });
                    assert_eq!(bits.next_clear(ClusterIndex(at), ClusterCount(70)), run);
                }
            }
        }
    }
}
