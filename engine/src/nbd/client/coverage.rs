//! Which bytes of a read have come: chunks of a structured reply may come in any order, but each byte once.

/// Most separate pieces of a read; servers send theirs in order, or nearly so.
const MAX_PIECES: usize = 256;

/// Why a piece is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It lies beyond what was asked for.
    Beyond,
    /// Some of it came before.
    Twice,
    /// There are too many holes between what has come.
    Scattered,
}

/// See the module's header.
#[derive(Clone, Debug)]
pub(super) struct Coverage {
    length: u64,
    /// First byte and end of what has come, ascending; no two touch.
    pieces: Vec<(u64, u64)>,
}

impl Coverage {
    /// Nothing of `length` bytes has come.
    pub(super) fn new(length: u32) -> Self {
        Self { length: u64::from(length), pieces: Vec::new() }
    }

    /// `length` bytes at `start` have come, at least 1.
    pub(super) fn add(&mut self, start: u64, length: u64) -> Result<(), Refused> {
        let end = start.checked_add(length).filter(|&end| end <= self.length).ok_or(Refused::Beyond)?;
        let next = self.pieces.partition_point(|piece| piece.1 <= start);
        if self.pieces.get(next).is_some_and(|piece| piece.0 < end) {
            return Err(Refused::Twice);
        }
        let joins_next = self.pieces.get(next).is_some_and(|piece| piece.0 == end);
        let joins_last = next > 0 && self.pieces[next - 1].1 == start;
        match (joins_last, joins_next) {
            (true, true) => {
                self.pieces[next - 1].1 = self.pieces[next].1;
                self.pieces.remove(next);
            }
            (true, false) => self.pieces[next - 1].1 = end,
            (false, true) => self.pieces[next].0 = start,
            (false, false) if self.pieces.len() == MAX_PIECES => return Err(Refused::Scattered),
            (false, false) => self.pieces.insert(next, (start, end)),
        }
        Ok(())
    }

    /// Whether every byte has come.
    pub(super) fn is_complete(&self) -> bool {
        self.length == 0 || self.pieces == [(0, self.length)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pieces_in_any_order_make_the_whole() {
        let mut all = Coverage::new(100);
        for (start, length) in [(40, 20), (0, 10), (90, 10), (10, 30), (61, 29)] {
            assert_eq!(all.add(start, length), Ok(()));
            assert!(!all.is_complete());
        }
        assert_eq!(all.add(60, 1), Ok(()));
        assert!(all.is_complete());
        assert!(Coverage::new(0).is_complete());
    }

    #[test]
    fn what_is_too_much_is_refused() {
        let mut all = Coverage::new(100);
        assert_eq!(all.add(90, 11), Err(Refused::Beyond));
        assert_eq!(all.add(u64::MAX, 2), Err(Refused::Beyond));
        assert_eq!(all.add(10, 10), Ok(()));
        for (start, length) in [(10, 10), (0, 11), (19, 1), (0, 100), (15, 3)] {
            assert_eq!(all.add(start, length), Err(Refused::Twice), "{start} {length}");
        }
        let mut scattered = Coverage::new(10_000);
        for piece in 0..MAX_PIECES as u64 {
            assert_eq!(scattered.add(2 * piece, 1), Ok(()));
        }
        assert_eq!(scattered.add(9000, 1), Err(Refused::Scattered));
        assert_eq!(scattered.add(1, 1), Ok(()));
    }

    proptest! {
        /// Against a flag for each byte.
        #[test]
        fn as_one_by_one(pieces in proptest::collection::vec((0_u64..70, 1_u64..20), 0..40)) {
            let mut all = Coverage::new(64);
            let mut bytes = [false; 64];
            for (start, length) in pieces {
                let range = usize::try_from(start).unwrap()..usize::try_from(start + length).unwrap();
                let expected = match bytes.get(range.clone()) {
                    None => Err(Refused::Beyond),
                    Some(bytes) if bytes.contains(&true) => Err(Refused::Twice),
                    Some(_) => Ok(()),
                };
                prop_assert_eq!(all.add(start, length), expected);
                if expected.is_ok() {
                    bytes[range].fill(true);
                }
                prop_assert_eq!(all.is_complete(), !bytes.contains(&false));
            }
        }
    }
}
