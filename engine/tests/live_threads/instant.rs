//! Whether a backup is the disk at one instant.
//!
//! Of each part it is known in which order it was changed. So the requests of its guest can be played back, and after some of them the part
//! is as the backup has it: t0 was between the beginning of the last request that it has and the end of the first that it lacks. There must be
//! an instant for which that holds of all parts.

use engine::units::ByteRange;

use crate::guest::Entry;
use crate::shadow::Shadow;

/// Between which times t0 was, both excluded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    after: u64,
    before: u64,
}

/// A part of the disk as it was a while ago.
pub(crate) struct Replay {
    shadow: Shadow,
}

impl Replay {
    pub(crate) fn new(part: ByteRange, initial: &[u8]) -> Self {
        Self { shadow: Shadow::new(part, initial) }
    }

    /// Play `log` back: when, of the time from `start` to `end`, the part was as `copy`, a backup of the whole disk, has it.
    pub(crate) fn candidates(&mut self, log: Vec<Entry>, start: u64, end: u64, copy: &[u8]) -> Vec<Span> {
        let found = |range: ByteRange| {
            let from = usize::try_from(range.offset).unwrap();
            &copy[from..from + usize::try_from(range.length).unwrap()]
        };
        let part = self.shadow.part;
        let first = log.partition_point(|entry| entry.ended < start);
        for entry in &log[..first] {
            self.shadow.apply(entry.range, entry.content);
        }
        let mut wrong = self.shadow.differences(part, found(part));
        let mut spans = Vec::new();
        let mut after = 0;
        for entry in &log[first..] {
            if wrong == 0 && after < end {
                spans.push(Span { after, before: entry.ended });
            }
            wrong -= self.shadow.differences(entry.range, found(entry.range));
            self.shadow.apply(entry.range, entry.content);
            wrong += self.shadow.differences(entry.range, found(entry.range));
            after = entry.began;
        }
        if wrong == 0 && after < end {
            spans.push(Span { after, before: u64::MAX });
        }
        assert!(
            !spans.is_empty(),
            "{part} of the backup is not what it ever was; {wrong} bytes differ at the end"
        );
        spans
    }
}

/// Whether there is an instant for all parts.
pub(crate) fn check(parts: &[Vec<Span>]) {
    let fits = |time: u64| {
        parts.iter().all(|spans| spans.iter().any(|span| span.after <= time && time < span.before))
    };
    let mut starts = parts.iter().flatten().map(|span| span.after);
    assert!(starts.any(fits), "no instant at which every part was as the backup has it: {parts:?}");
}

#[test]
fn parts_of_different_instants_are_found_out() {
    let span = |after, before| Span { after, before };
    check(&[vec![span(0, 5), span(7, 12)], vec![span(8, 9)]]);
    let apart = [vec![span(0, 5), span(9, 12)], vec![span(6, 8)]];
    assert!(std::panic::catch_unwind(|| check(&apart)).is_err());
}
