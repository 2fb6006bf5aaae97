//! The reads of one job's snapshot: those under way, and those of clients of exports that wait for their turn.
//!
//! # Bounds
//! What is read is kept until it is handed over. Those who call the library may send as much as they like, so of theirs there are
//! [`MAX_READS`] and [`MAX_READ_BYTES`] at a time, and one more is refused. What clients of exports ask for is bounded by their connections, in
//! number and in bytes ([`crate::nbd::limits`]), and none of them can be told to come again: beyond [`MAX_READS`] they wait here, in the
//! order in which they came. Neither counts for the other, so a crowd of clients takes nothing from the callers.

use std::collections::{BTreeMap, VecDeque};

use super::hosted::IoAsker;
use crate::copier::snapshot::SnapshotId;
use crate::units::ByteRange;

/// Most reads of callers at a time, and most of clients that are under way.
pub(super) const MAX_READS: usize = 4096;
/// Most bytes of the reads of callers together.
pub(super) const MAX_READ_BYTES: u64 = 256 << 20;

/// A caller's read that is one too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is larger than what is read at a time.
    TooLarge,
    /// So many are under way.
    TooMany(usize),
}

/// A read that is under way.
struct Running {
    /// Of a caller's read; a client's are counted elsewhere.
    bytes: u64,
    asker: IoAsker,
}

/// See the module's header.
#[derive(Default)]
pub(super) struct Reads {
    running: BTreeMap<SnapshotId, Running>,
    /// Of clients alone.
    waiting: VecDeque<(ByteRange, IoAsker)>,
    /// Of those under way the callers', and their bytes.
    of_callers: usize,
    caller_bytes: u64,
    next: u64,
}

impl Reads {
    /// Take in a read. Gives its name if it is to be begun now; one that waits comes from [`Self::next`].
    ///
    /// # Errors
    /// When a caller asks for more than there is room for.
    pub(super) fn add(
        &mut self,
        range: ByteRange,
        asker: IoAsker,
    ) -> Result<Option<SnapshotId>, (IoAsker, Refused)> {
        match asker {
            IoAsker::Client(_) if self.clients() < MAX_READS => Ok(Some(self.begin(0, asker))),
            IoAsker::Client(_) => {
                self.waiting.push_back((range, asker));
                Ok(None)
            }
            IoAsker::Caller(_) => {
                let bytes = self.caller_bytes.saturating_add(range.length);
                if self.of_callers < MAX_READS && bytes <= MAX_READ_BYTES {
                    self.of_callers += 1;
                    self.caller_bytes = bytes;
                    return Ok(Some(self.begin(range.length, asker)));
                }
                let refused = match self.of_callers {
                    0 => Refused::TooLarge,
                    count => Refused::TooMany(count),
                };
                Err((asker, refused))
            }
        }
    }

    fn clients(&self) -> usize {
        self.running.len() - self.of_callers
    }

    fn begin(&mut self, bytes: u64, asker: IoAsker) -> SnapshotId {
        let id = SnapshotId(self.next);
        self.next += 1;
        self.running.insert(id, Running { bytes, asker });
        id
    }

    /// The next of those that wait, if it may be begun now.
    pub(super) fn next(&mut self) -> Option<(SnapshotId, ByteRange)> {
        if self.clients() >= MAX_READS {
            return None;
        }
        let (range, asker) = self.waiting.pop_front()?;
        Some((self.begin(0, asker), range))
    }

    /// One that was begun has ended: who waits for it.
    ///
    /// # Panics
    /// If it was not begun.
    pub(super) fn ended(&mut self, id: SnapshotId) -> IoAsker {
        let Running { bytes, asker } = self.running.remove(&id).expect("every read has its asker");
        if matches!(asker, IoAsker::Caller(_)) {
            self.of_callers -= 1;
            self.caller_bytes -= bytes;
        }
        asker
    }

    /// One of those that wait, whatever is under way: there is no snapshot any more.
    pub(super) fn give_up(&mut self) -> Option<(ByteRange, IoAsker)> {
        self.waiting.pop_front()
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Drop them all: whoever waits is answered so.
    pub(super) fn clear(&mut self) {
        self.running.clear();
        self.waiting.clear();
        (self.of_callers, self.caller_bytes) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::ask::ask;
    use crate::live::exports::ServedIo;

    fn client() -> IoAsker {
        IoAsker::Client(ServedIo::of_test())
    }

    fn caller() -> IoAsker {
        IoAsker::Caller(ask().0)
    }

    fn range(length: u64) -> ByteRange {
        ByteRange::new(0, length)
    }

    #[test]
    fn callers_are_bounded_and_told_so() {
        let mut reads = Reads::default();
        let told = |added: Result<_, (IoAsker, Refused)>| added.map_err(|(_, refused)| refused);
        assert_eq!(told(reads.add(range(MAX_READ_BYTES + 1), caller())), Err(Refused::TooLarge));
        let first = told(reads.add(range(MAX_READ_BYTES), caller())).unwrap().unwrap();
        assert_eq!(told(reads.add(range(1), caller())), Err(Refused::TooMany(1)));
        assert!(matches!(reads.ended(first), IoAsker::Caller(_)) && reads.is_empty());
        let ids: Vec<_> =
            (0..MAX_READS).map(|_| told(reads.add(range(1), caller())).unwrap().unwrap()).collect();
        assert_eq!(told(reads.add(range(1), caller())), Err(Refused::TooMany(MAX_READS)));
        // They take nothing from the clients.
        assert!(told(reads.add(range(1 << 40), client())).unwrap().is_some());
        reads.ended(ids[7]);
        assert!(told(reads.add(range(1), caller())).unwrap().is_some());
    }

    #[test]
    fn clients_wait_for_their_turn_and_keep_no_caller_out() {
        let mut reads = Reads::default();
        let begun: Vec<_> =
            (0..MAX_READS as u64).map(|at| reads.add(range(at), client()).ok().unwrap().unwrap()).collect();
        for at in [7, 8] {
            assert_eq!(reads.add(range(at), client()).ok(), Some(None));
        }
        assert!(reads.next().is_none() && reads.add(range(1), caller()).ok().unwrap().is_some());
        reads.ended(begun[3]);
        assert_eq!(reads.next().map(|(_, range)| range), Some(range(7)));
        assert!(reads.next().is_none());
        assert_eq!(reads.give_up().map(|(range, _)| range), Some(range(8)));
        assert!(reads.give_up().is_none() && !reads.is_empty());
    }
}
