//! What stands in the blocks of the disk, and the order in which the guest writes them.
//!
//! Both follow from a number drawn for each run, its *seed*. So whatever lies in a block tells which version of which block of which
//! run it is, and every byte of it can be checked; and the guest's writes need no log: their order can be repeated.

/// Bytes of a block, the guest's unit of writing.
pub(crate) const BLOCK: usize = 4096;
/// The head of a block: seed, number, version.
const HEAD: usize = 8 + 8 + 8;

/// Says what stands in the blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Content {
    seed: u64,
}

/// What is wrong with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Its head is of another run, or of none.
    Foreign,
    /// It belongs to that place.
    Misplaced(u64),
    /// Its head is right and its bytes are not: torn, or damaged.
    Torn,
}

impl Content {
    pub(super) const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// Make `bytes` the version `version` of block `block`; version 0 is what it held before the guest came.
    pub(super) fn fill(self, block: u64, version: u32, bytes: &mut [u8; BLOCK]) {
        let words = [self.seed, block, u64::from(version)];
        for (place, word) in bytes[..HEAD].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        // Any two heads begin far apart in the generator's cycle.
        let mixed = words.iter().fold(0, |mixed, &word| fastrand::Rng::with_seed(mixed ^ word).u64(..));
        fastrand::Rng::with_seed(mixed).fill(&mut bytes[HEAD..]);
    }

    /// Which version of block `block` stands in `bytes`, after a look at each byte.
    pub(super) fn version(self, block: u64, bytes: &[u8; BLOCK]) -> Result<u32, Wrong> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let (seed, place, version) = (word(0), word(8), word(16));
        if seed != self.seed {
            return Err(Wrong::Foreign);
        }
        if place != block {
            return Err(Wrong::Misplaced(place));
        }
        let version = u32::try_from(version).map_err(|_| Wrong::Torn)?;
        let mut right = [0; BLOCK];
        self.fill(block, version, &mut right);
        if *bytes == right { Ok(version) } else { Err(Wrong::Torn) }
    }

    /// The blocks that the guest writes, in order, without an end; of a disk of `blocks` blocks.
    pub(super) fn order(self, blocks: u32) -> impl Iterator<Item = u32> + Send + use<> {
        let mut random = fastrand::Rng::with_seed(!self.seed);
        std::iter::repeat_with(move || random.u32(0..blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_its_version_and_shows_every_damage() {
        let content = Content::new(7);
        let mut bytes = [0; BLOCK];
        content.fill(5, 3, &mut bytes);
        assert_eq!(content.version(5, &bytes), Ok(3));
        assert_eq!(content.version(6, &bytes), Err(Wrong::Misplaced(5)));
        assert_eq!(Content::new(8).version(5, &bytes), Err(Wrong::Foreign));
        assert_eq!(content.version(5, &[0; BLOCK]), Err(Wrong::Foreign));
        for at in [16, 23, HEAD, BLOCK / 2, BLOCK - 1] {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert_eq!(content.version(5, &damaged), Err(Wrong::Torn), "byte {at}");
        }
    }

    #[test]
    fn versions_and_blocks_differ_in_all_their_parts() {
        let content = Content::new(7);
        let mut all = Vec::new();
        for block in 0..8 {
            for version in 0..8 {
                let mut bytes = [0; BLOCK];
                content.fill(block, version, &mut bytes);
                all.push(bytes);
            }
        }
        for (at, one) in all.iter().enumerate() {
            for other in &all[at + 1..] {
                let equal = one[HEAD..].chunks(8).zip(other[HEAD..].chunks(8)).filter(|(a, b)| a == b);
                assert_eq!(equal.count(), 0);
            }
        }
    }

    #[test]
    fn the_order_can_be_repeated_and_stays_on_the_disk() {
        let content = Content::new(9);
        let order: Vec<u32> = content.order(10).take(1000).collect();
        assert_eq!(order, content.order(10).take(1000).collect::<Vec<_>>());
        assert!((0..10).all(|block| order.contains(&block)) && order.iter().all(|&block| block < 10));
    }
}
