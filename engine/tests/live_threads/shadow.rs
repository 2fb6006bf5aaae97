//! What a part of the disk holds, as its only guest knows it.

use engine::units::ByteRange;

/// What a request leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content {
    /// The bytes that this seed gives.
    Data(u64),
    Zeros,
    /// Anything: it was discarded.
    Undefined,
}

/// The bytes of a seed.
pub(crate) fn data(seed: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// See the module's header.
pub(crate) struct Shadow {
    pub(crate) part: ByteRange,
    bytes: Vec<u8>,
    defined: Vec<bool>,
}

impl Shadow {
    /// Of `part` of a disk that holds `initial`.
    pub(crate) fn new(part: ByteRange, initial: &[u8]) -> Self {
        let start = usize::try_from(part.offset).unwrap();
        let bytes = initial[start..start + usize::try_from(part.length).unwrap()].to_vec();
        Self { part, defined: vec![true; bytes.len()], bytes }
    }

    fn places(&self, range: ByteRange) -> std::ops::Range<usize> {
        let start = usize::try_from(range.offset - self.part.offset).unwrap();
        start..start + usize::try_from(range.length).unwrap()
    }

    pub(crate) fn apply(&mut self, range: ByteRange, content: Content) {
        let places = self.places(range);
        self.defined[places.clone()].fill(!matches!(content, Content::Undefined));
        match content {
            Content::Data(seed) => self.bytes[places].copy_from_slice(&data(seed, range.length)),
            Content::Zeros => self.bytes[places].fill(0),
            Content::Undefined => {}
        }
    }

    /// Bytes of `range` that are not as in `found`.
    pub(crate) fn differences(&self, range: ByteRange, found: &[u8]) -> usize {
        let places = self.places(range);
        assert_eq!(places.len(), found.len());
        let held = self.bytes[places.clone()].iter().zip(&self.defined[places]);
        held.zip(found).filter(|((byte, defined), found)| **defined && byte != found).count()
    }

    /// Where all of it first differs from `found`.
    pub(crate) fn first_difference(&self, found: &[u8]) -> Option<usize> {
        (0..self.bytes.len()).find(|&at| self.defined[at] && self.bytes[at] != found[at])
    }
}
