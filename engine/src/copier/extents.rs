//! A window on how a storage describes its ranges, kept a little ahead of the sweep.
//!
//! The question (`SEEK_HOLE` and its like) may block, so it is asked through the ring and the sweep goes on with what
//! is known. Answers are used for clusters that the sweep then claims free: such a cluster has not been written to by a guest
//! since the answer was given, so the answer still holds under the claim. A question that fails counts as "there is data", which costs
//! a needless read at worst.

use std::collections::VecDeque;

use nix::errno::Errno;

use crate::ring::{Extent, ExtentQuery, FileId, Op, Output};
use crate::units::ByteRange;

/// What lies at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// Not asked yet.
    Unknown,
    /// The same up to `until`, where something else begins (or is unknown).
    Until {
        /// Data, or allocated.
        present: bool,
        /// Where it ends.
        until: u64,
    },
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct ExtentWindow {
    query: ExtentQuery,
    end: u64,
    limit: usize,
    /// Contiguous, ascending; neighbours differ in `present`.
    known: VecDeque<Extent>,
    /// End of what is known, or where to ask next.
    known_to: u64,
    /// The sweep cannot go on before this is known, however many extents are known already.
    needed_to: u64,
    /// Question under way, by its start.
    asked_from: Option<u64>,
}

impl ExtentWindow {
    /// Nothing known yet about a storage of `end` bytes.
    pub(super) fn new(query: ExtentQuery, end: u64, limit: usize) -> Self {
        assert!(limit > 0, "a question has room for an answer");
        Self { query, end, limit, known: VecDeque::new(), known_to: 0, needed_to: 0, asked_from: None }
    }

    /// Forget everything and go on at `position`.
    pub(super) fn seek(&mut self, position: u64) {
        self.known.clear();
        self.known_to = position;
        self.needed_to = position;
    }

    /// The sweep waits until everything up to `position` is known.
    pub(super) fn need(&mut self, position: u64) {
        self.needed_to = self.needed_to.max(position.min(self.end));
    }

    /// The next question to ask, if one is due and none is under way.
    pub(super) fn question(&mut self, file: FileId) -> Option<Op> {
        let enough = self.known.len() > self.limit / 2 && self.known_to >= self.needed_to;
        if self.asked_from.is_some() || self.known_to >= self.end || enough {
            return None;
        }
        self.asked_from = Some(self.known_to);
        let range = ByteRange::between(self.known_to, self.end);
        Some(Op::Extents { file, range, query: self.query, limit: self.limit })
    }

    /// Take in the answer.
    pub(super) fn on_answer(&mut self, result: Result<Output, Errno>) {
        let from = self.asked_from.take().expect("an answer follows a question");
        if from != self.known_to {
            return; // The window was moved meanwhile.
        }
        match result {
            Ok(Output::Extents(extents)) if !extents.is_empty() => {
                for extent in extents {
                    self.append(extent);
                }
            }
            Ok(Output::Extents(_)) | Err(_) => {
                let rest = ByteRange::between(self.known_to, self.end);
                tracing::warn!(query = ?self.query, ?rest, "extent query failed; taken as present");
                self.append(Extent { range: rest, present: true });
            }
            Ok(other) => panic!("an extent query completes with extents, not {other:?}"),
        }
    }

    fn append(&mut self, extent: Extent) {
        assert_eq!(extent.range.offset, self.known_to, "extents come without gaps");
        let end = extent.range.end().min(self.end);
        if end <= self.known_to {
            return;
        }
        match self.known.back_mut() {
            Some(last) if last.present == extent.present => last.range.length = end - last.range.offset,
            _ => {
                let range = ByteRange::between(self.known_to, end);
                self.known.push_back(Extent { range, present: extent.present });
            }
        }
        self.known_to = end;
    }

    /// Forget what ends at or before `position`: the sweep has passed it.
    pub(super) fn passed(&mut self, position: u64) {
        while self.known.front().is_some_and(|first| first.range.end() <= position) {
            self.known.pop_front();
        }
        if self.known.is_empty() && self.known_to < position {
            self.known_to = position;
        }
    }

    /// What lies at `position`, which has not been passed.
    pub(super) fn at(&self, position: u64) -> Known {
        // The sweep asks at the window's front nearly always; a binary search serves the rest.
        let index = self.known.partition_point(|extent| extent.range.end() <= position);
        match self.known.get(index) {
            Some(extent) if extent.range.offset <= position => {
                Known::Until { present: extent.present, until: extent.range.end() }
            }
            _ => Known::Unknown,
        }
    }

    /// Whether everything up to `position` is known.
    pub(super) fn reaches(&self, position: u64) -> bool {
        self.known_to >= position.min(self.end)
    }

    /// Whether all of `range` is known.
    pub(super) fn knows(&self, range: ByteRange) -> bool {
        // What is known has no gaps.
        self.known.front().is_some_and(|first| first.range.offset <= range.offset)
            && self.reaches(range.end())
    }

    /// The present parts of `range` as far as they are known.
    pub(super) fn present_in(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        let first = self.known.partition_point(|extent| extent.range.end() <= range.offset);
        self.known
            .range(first..)
            .take_while(move |extent| extent.range.offset < range.end())
            .filter(|extent| extent.present)
            .filter_map(move |extent| extent.range.intersection(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64, present: bool) -> Extent {
        Extent { range: ByteRange::between(start, end), present }
    }

    #[test]
    fn answers_are_merged_and_looked_up() {
        let mut window = ExtentWindow::new(ExtentQuery::Data, 100, 4);
        assert_eq!(window.at(0), Known::Unknown);
        assert!(window.question(FileId(0)).is_some());
        assert!(window.question(FileId(0)).is_none(), "one question at a time");
        window.on_answer(Ok(Output::Extents(vec![
            extent(0, 10, true),
            extent(10, 20, true),
            extent(20, 30, false),
        ])));
        assert_eq!(window.at(5), Known::Until { present: true, until: 20 });
        assert_eq!(window.at(20), Known::Until { present: false, until: 30 });
        assert_eq!(window.at(30), Known::Unknown);
        assert!(window.reaches(30) && !window.reaches(31));
        assert!(window.knows(ByteRange::new(0, 30)) && !window.knows(ByteRange::new(29, 2)));
        window.passed(25);
        assert!(window.knows(ByteRange::new(20, 10)) && !window.knows(ByteRange::new(19, 2)));
        assert_eq!(window.at(29), Known::Until { present: false, until: 30 });
        let present: Vec<_> = window.present_in(ByteRange::new(0, 100)).collect();
        assert!(present.is_empty());
    }

    #[test]
    fn a_failed_question_counts_as_data() {
        let mut window = ExtentWindow::new(ExtentQuery::Data, 100, 4);
        let _ = window.question(FileId(0));
        window.on_answer(Err(Errno::EIO));
        assert_eq!(window.at(99), Known::Until { present: true, until: 100 });
        assert!(window.question(FileId(0)).is_none());
    }

    #[test]
    fn a_cluster_in_more_pieces_than_an_answer_holds_is_asked_for_until_it_is_known() {
        let mut window = ExtentWindow::new(ExtentQuery::Data, 100, 2);
        let _ = window.question(FileId(0));
        window.on_answer(Ok(Output::Extents(vec![extent(0, 10, true), extent(10, 20, false)])));
        assert!(window.question(FileId(0)).is_none(), "enough for now");
        window.need(64);
        assert!(window.question(FileId(0)).is_some());
    }

    #[test]
    fn an_answer_to_a_question_from_before_a_seek_is_dropped() {
        let mut window = ExtentWindow::new(ExtentQuery::Data, 100, 4);
        let _ = window.question(FileId(0));
        window.seek(50);
        window.on_answer(Ok(Output::Extents(vec![extent(0, 100, false)])));
        assert_eq!(window.at(60), Known::Unknown);
        assert!(matches!(window.question(FileId(0)), Some(Op::Extents { range, .. }) if range.offset == 50));
    }
}
