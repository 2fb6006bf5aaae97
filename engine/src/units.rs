//! The distinct types in which the engine counts: bytes, clusters, times. Never bare integers across a module border.
//!
//! A disk of [`Geometry`] has `length` bytes in clusters of one size; the last cluster may be shorter. Cluster ranges
//! are half open. All arithmetic is checked: an overflow is a bug and panics rather than wrapping, and everything
//! that comes from outside is bounded before it gets here (a disk has at most [`MAX_LENGTH`] bytes).

use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

/// Largest disk length in bytes: what a signed file offset holds, less one cluster of slack for rounding up.
pub const MAX_LENGTH: u64 = i64::MAX as u64 - ClusterSize::MAX_BYTES;

/// Number of a cluster on a disk, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterIndex(pub u64);

/// How many clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterCount(pub u64);

/// Length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Length(pub u64);

/// As people read it: `512 B`, `4.0 GiB`, `931 MiB`. Powers of 1024, two significant places at least, no false precision.
impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        // Tenths of a unit, rounded to nearest, so that 1023.96 KiB moves on to 1.0 MiB.
        let tenths_in = |place: usize| {
            let unit = 1_u128 << (10 * place);
            (u128::from(self.0) * 10 + unit / 2) / unit
        };
        let place = (0..UNITS.len() - 1).find(|&place| tenths_in(place) < 10_240).unwrap_or(UNITS.len() - 1);
        let tenths = tenths_in(place);
        match place {
            0 => write!(f, "{} B", self.0),
            _ if tenths >= 1000 => write!(f, "{} {}", (tenths + 5) / 10, UNITS[place]),
            _ => write!(f, "{}.{} {}", tenths / 10, tenths % 10, UNITS[place]),
        }
    }
}

/// Half-open range of clusters, `start <= end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterRange {
    /// First cluster.
    pub start: ClusterIndex,
    /// One past the last cluster.
    pub end: ClusterIndex,
}

impl ClusterRange {
    /// The range `start..end`.
    ///
    /// # Panics
    /// If `start > end`.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Self {
        assert!(start <= end, "cluster range {start}..{end} runs backwards");
        Self { start: ClusterIndex(start), end: ClusterIndex(end) }
    }

    /// Number of clusters.
    #[must_use]
    pub fn count(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether it holds no cluster.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `cluster` lies in it.
    #[must_use]
    pub fn contains(self, cluster: ClusterIndex) -> bool {
        self.start <= cluster && cluster < self.end
    }

    /// The clusters in order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = ClusterIndex> {
        (self.start.0..self.end.0).map(ClusterIndex)
    }
}

impl fmt::Debug for ClusterRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "clusters {}..{}", self.start.0, self.end.0)
    }
}

/// Half-open range of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    /// Offset of the first byte.
    pub offset: u64,
    /// Number of bytes; may be 0.
    pub length: u64,
}

impl ByteRange {
    /// The range of `length` bytes at `offset`.
    #[must_use]
    pub const fn new(offset: u64, length: u64) -> Self {
        Self { offset, length }
    }

    /// The range from `start` up to but not including `end`.
    ///
    /// # Panics
    /// If `start > end`.
    #[must_use]
    pub fn between(start: u64, end: u64) -> Self {
        assert!(start <= end, "byte range {start}..{end} runs backwards");
        Self { offset: start, length: end - start }
    }

    /// One past the last byte.
    ///
    /// # Panics
    /// If that cannot be counted: a range from outside is checked before ([`Self::checked_end`]).
    #[inline]
    #[must_use]
    pub fn end(self) -> u64 {
        self.checked_end().expect("a range ends within what can be counted")
    }

    /// One past the last byte; `None` if that cannot be counted.
    #[inline]
    #[must_use]
    pub fn checked_end(self) -> Option<u64> {
        self.offset.checked_add(self.length)
    }

    /// Whether it holds no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.length == 0
    }

    /// What both ranges share, if anything.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::between(start, end))
    }
}

/// As users read it: first byte and one past the last, in bytes.
impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A range that somebody made up is to be told of as well.
        write!(f, "bytes {}..{}", self.offset, u128::from(self.offset) + u128::from(self.length))
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The unit of copying: a power of two from 4 KiB to 4 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClusterSize {
    shift: u32,
}

impl ClusterSize {
    /// Smallest cluster, in bytes.
    pub const MIN_BYTES: u64 = 4 << 10;
    /// Largest cluster, in bytes.
    pub const MAX_BYTES: u64 = 4 << 20;
    /// 64 KiB, the default.
    pub const DEFAULT: Self = Self { shift: 16 };

    /// The cluster size of `bytes` bytes; `None` unless it is a power of two within the bounds.
    #[must_use]
    pub fn new(bytes: u64) -> Option<Self> {
        (bytes.is_power_of_two() && (Self::MIN_BYTES..=Self::MAX_BYTES).contains(&bytes))
            .then(|| Self { shift: bytes.trailing_zeros() })
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.shift
    }
}

/// A disk's length cut into clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    length: Length,
    cluster: ClusterSize,
}

impl Geometry {
    /// A disk of `length` bytes in clusters of size `cluster`.
    ///
    /// # Panics
    /// If `length` is beyond [`MAX_LENGTH`]; callers refuse such a disk when they open it.
    #[must_use]
    pub fn new(length: Length, cluster: ClusterSize) -> Self {
        assert!(length.0 <= MAX_LENGTH, "disk of {} bytes is beyond the limit", length.0);
        Self { length, cluster }
    }

    /// Length of the disk.
    #[must_use]
    pub fn length(self) -> Length {
        self.length
    }

    /// Size of a cluster.
    #[must_use]
    pub fn cluster_size(self) -> ClusterSize {
        self.cluster
    }

    /// Number of clusters, a partial last one included.
    #[must_use]
    pub fn clusters(self) -> ClusterCount {
        ClusterCount(self.length.0.div_ceil(self.cluster.bytes()))
    }

    /// All clusters.
    #[must_use]
    pub fn all(self) -> ClusterRange {
        ClusterRange::new(0, self.clusters().0)
    }

    /// The cluster that holds the byte at `offset`.
    #[must_use]
    pub fn cluster_at(self, offset: u64) -> ClusterIndex {
        ClusterIndex(offset >> self.cluster.shift)
    }

    /// Offset of the first byte of `cluster`.
    #[must_use]
    pub fn offset_of(self, cluster: ClusterIndex) -> u64 {
        cluster.0 << self.cluster.shift
    }

    /// The bytes of `clusters`, cut at the end of the disk.
    #[must_use]
    pub fn bytes_of(self, clusters: ClusterRange) -> ByteRange {
        let start = self.offset_of(clusters.start).min(self.length.0);
        let end = self.offset_of(clusters.end).min(self.length.0);
        ByteRange::between(start, end)
    }

    /// The clusters that `bytes` touches, partial ones at both ends included; none for an empty range.
    #[must_use]
    pub fn covering(self, bytes: ByteRange) -> ClusterRange {
        if bytes.is_empty() {
            let at = self.cluster_at(bytes.offset).0;
            return ClusterRange::new(at, at);
        }
        ClusterRange::new(self.cluster_at(bytes.offset).0, self.cluster_at(bytes.end() - 1).0 + 1)
    }

    /// The clusters that lie in `bytes` as a whole; the partial last cluster of the disk counts as whole when `bytes`
    /// reaches the end of the disk.
    #[must_use]
    pub fn within(self, bytes: ByteRange) -> ClusterRange {
        let start = bytes.offset.div_ceil(self.cluster.bytes());
        let end =
            if bytes.end() >= self.length.0 { self.clusters().0 } else { self.cluster_at(bytes.end()).0 };
        ClusterRange::new(start.min(end), end)
    }
}

/// A limit in bytes a second, never 0 (no limit is the absence of one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speed(pub NonZeroU64);

/// A point on the ring's monotonic clock: time since the ring started. Virtual in the simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp(pub Duration);

impl Timestamp {
    /// The moment `delay` later; saturates far in the future.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        Self(self.0.saturating_add(delay))
    }

    /// Time from `earlier` to `self`, 0 if `earlier` is not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(length: u64) -> Geometry {
        Geometry::new(Length(length), ClusterSize::DEFAULT)
    }

    #[test]
    fn lengths_as_people_read_them() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (65536, "64.0 KiB"),
            (931 << 20, "931 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (4 << 30, "4.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(Length(count).to_string(), text);
        }
    }

    #[test]
    fn cluster_size_is_a_bounded_power_of_two() {
        assert_eq!(ClusterSize::new(65536).map(ClusterSize::bytes), Some(65536));
        for refused in [0, 1, 2048, 4095, 12288, 8 << 20, u64::MAX] {
            assert_eq!(ClusterSize::new(refused), None, "{refused}");
        }
    }

    #[test]
    fn partial_last_cluster_is_counted_and_cut() {
        let disk = disk(65536 * 3 + 1);
        assert_eq!(disk.clusters(), ClusterCount(4));
        assert_eq!(disk.bytes_of(ClusterRange::new(2, 4)), ByteRange::between(131_072, 65536 * 3 + 1));
        assert_eq!(disk.within(ByteRange::between(1, 65536 * 3 + 1)), ClusterRange::new(1, 4));
        assert_eq!(disk.within(ByteRange::between(1, 65536 * 2 + 5)), ClusterRange::new(1, 2));
    }

    #[test]
    fn covering_counts_partial_clusters_at_both_ends() {
        let disk = disk(1 << 20);
        assert_eq!(disk.covering(ByteRange::new(65535, 2)), ClusterRange::new(0, 2));
        assert_eq!(disk.covering(ByteRange::new(65536, 65536)), ClusterRange::new(1, 2));
        assert!(disk.covering(ByteRange::new(70000, 0)).is_empty());
    }

    #[test]
    fn an_empty_disk_has_no_clusters() {
        assert!(disk(0).all().is_empty());
        assert!(disk(0).within(ByteRange::new(0, 0)).is_empty());
    }
}
