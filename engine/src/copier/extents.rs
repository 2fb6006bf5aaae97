//! A window on how a storage describes its ranges, kept a little ahead of the sweep.
//!
//! The question (`SEEK_HOLE` and its like) may block, so it is asked through the ring and the sweep goes on with what
//! is known. Answers are used for clusters that the sweep then claims free: such a cluster has not been written to by a guest
//! since the answer was given, so the answer still holds under the claim.
//!
//! # Without an answer
//! A question that fails, or is answered with nothing, counts as "there is data", which costs a needless read at worst: for a bounded stretch
//! ([`Limits::unanswered_bytes`](super::plan::Limits::unanswered_bytes)), so that a server or a file system that is short of memory for a moment does
//! not make a disk of holes one of data. It is asked again when the sweep has passed half of that stretch: a storage that never answers is asked
//! once a stretch, and one that fails for some time has that time to come back. The first such question of a job is told of.

use std::collections::VecDeque;

use nix::errno::Errno;

use super::{Copier, Event};
use crate::error::{describe, is_lost_connection};
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
    /// Bytes that count as present where there was no answer.
    unanswered: u64,
    /// Where the sweep is.
    position: u64,
    /// The last question was not answered: the next is asked from here on.
    ask_at: u64,
    /// That there was no answer was told.
    told: bool,
}

/// The first question without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unanswered {
    /// What counts as present for want of it.
    pub(super) range: ByteRange,
    /// Why; `None`: the answer was empty.
    pub(super) errno: Option<Errno>,
}

impl ExtentWindow {
    /// Nothing known yet about a storage of `end` bytes. `limit`: most extents of an answer. `unanswered`: bytes that count as present where there
    /// is none.
    pub(super) fn new(query: ExtentQuery, end: u64, limit: usize, unanswered: u64) -> Self {
        assert!(limit > 0 && unanswered > 0, "a question has room for an answer, and leads on without one");
        Self {
            query,
            end,
            limit,
            known: VecDeque::new(),
            known_to: 0,
            needed_to: 0,
            asked_from: None,
            unanswered,
            position: 0,
            ask_at: 0,
            told: false,
        }
    }

    /// Forget everything and go on at `position`.
    pub(super) fn seek(&mut self, position: u64) {
        self.known.clear();
        self.known_to = position;
        self.needed_to = position;
        self.position = position;
        self.ask_at = position;
    }

    /// The sweep waits until everything up to `position` is known.
    pub(super) fn need(&mut self, position: u64) {
        self.needed_to = self.needed_to.max(position.min(self.end));
    }

    /// The next question to ask, if one is due and none is under way.
    pub(super) fn question(&mut self, file: FileId) -> Option<Op> {
        let may_wait = self.known.len() > self.limit / 2 || self.position < self.ask_at;
        let enough = may_wait && self.known_to >= self.needed_to;
        if self.asked_from.is_some() || self.known_to >= self.end || enough {
            return None;
        }
        self.asked_from = Some(self.known_to);
        let range = ByteRange::between(self.known_to, self.end);
        Some(Op::Extents { file, range, query: self.query, limit: self.limit })
    }

    /// Take in the answer. Gives the first time that there is none.
    pub(super) fn on_answer(&mut self, result: Result<Output, Errno>) -> Option<Unanswered> {
        let from = self.asked_from.take().expect("an answer follows a question");
        if from != self.known_to {
            return None; // The window was moved meanwhile.
        }
        let errno = match result {
            Ok(Output::Extents(extents)) if !extents.is_empty() => {
                for extent in extents {
                    self.append(extent);
                }
                return None;
            }
            Ok(Output::Extents(_)) => None,
            Err(errno) => Some(errno),
            Ok(other) => panic!("an extent query completes with extents, not {other:?}"),
        };
        let range = ByteRange::between(from, self.end.min(from.saturating_add(self.unanswered)));
        tracing::warn!(query = ?self.query, %range, ?errno, "extent query failed; taken as present");
        self.append(Extent { range, present: true });
        self.ask_at = from + range.length / 2;
        (!std::mem::replace(&mut self.told, true)).then_some(Unanswered { range, errno })
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
        self.position = position;
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

impl Copier {
    /// The answer to a question about the source's holes, or about what its top layer holds.
    pub(super) fn on_described(&mut self, query: ExtentQuery, result: Result<Output, Errno>) {
        let window = match query {
            ExtentQuery::Data => &mut self.holes,
            ExtentQuery::TopLayer => self.layers.as_mut().expect("asked about layers"),
        };
        let Some(Unanswered { range, errno }) = window.on_answer(result) else { return };
        let source = &self.plan.source;
        // Of a connection that is lost the copy's own error tells.
        let is_lost = source.remote && errno.is_some_and(is_lost_connection);
        if self.ending.is_some() || is_lost {
            return;
        }
        let why = errno.map_or_else(|| "the answer is empty".to_owned(), describe);
        let (what, so) = match query {
            ExtentQuery::Data => ("where its holes are", "it is read as if it held data, which takes longer"),
            ExtentQuery::TopLayer => ("what its top layer holds", "all of it is copied"),
        };
        let name = &source.name;
        self.events.push(Event::Notice(format!(
            "{name}: {what} cannot be found out for {range}: {why}; {so}, there and wherever this comes again"
        )));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(limit: usize) -> ExtentWindow {
        ExtentWindow::new(ExtentQuery::Data, 100, limit, 40)
    }

    fn extent(start: u64, end: u64, present: bool) -> Extent {
        Extent { range: ByteRange::between(start, end), present }
    }

    #[test]
    fn answers_are_merged_and_looked_up() {
        let mut window = window(4);
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
    fn a_failed_question_counts_as_data_for_a_stretch_and_is_asked_again() {
        for nothing in [Err(Errno::EIO), Ok(Output::Extents(Vec::new()))] {
            let mut window = window(4);
            let _ = window.question(FileId(0));
            let errno = nothing.as_ref().err().copied();
            let told = window.on_answer(nothing.clone());
            assert_eq!(told, Some(Unanswered { range: ByteRange::new(0, 40), errno }));
            assert_eq!(window.at(39), Known::Until { present: true, until: 40 });
            assert_eq!(window.at(40), Known::Unknown);
            window.passed(19);
            assert!(window.question(FileId(0)).is_none(), "not before half of it is passed");
            window.passed(20);
            let again = window.question(FileId(0));
            assert!(matches!(again, Some(Op::Extents { range, .. }) if range == ByteRange::between(40, 100)));
            assert_eq!(window.on_answer(nothing.clone()), None, "it is told once");
            assert_eq!(window.at(79), Known::Until { present: true, until: 80 });
            // The sweep cannot go on without: it is asked at once.
            window.need(90);
            assert!(window.question(FileId(0)).is_some());
            window.on_answer(Ok(Output::Extents(vec![extent(80, 100, false)])));
            assert_eq!(window.at(80), Known::Until { present: false, until: 100 });
            assert!(window.question(FileId(0)).is_none());
        }
    }

    #[test]
    fn a_storage_that_never_answers_is_asked_once_a_stretch() {
        let mut window = ExtentWindow::new(ExtentQuery::TopLayer, 1000, 4, 40);
        let mut asked = 0;
        for position in 0..1000 {
            window.passed(position);
            while window.question(FileId(0)).is_some() {
                asked += 1;
                window.on_answer(Err(Errno::EOPNOTSUPP));
            }
            assert!(matches!(window.at(position), Known::Until { present: true, .. }), "{position}");
        }
        assert_eq!(asked, 25);
    }

    #[test]
    fn a_cluster_in_more_pieces_than_an_answer_holds_is_asked_for_until_it_is_known() {
        let mut window = window(2);
        let _ = window.question(FileId(0));
        window.on_answer(Ok(Output::Extents(vec![extent(0, 10, true), extent(10, 20, false)])));
        assert!(window.question(FileId(0)).is_none(), "enough for now");
        window.need(64);
        assert!(window.question(FileId(0)).is_some());
    }

    #[test]
    fn an_answer_to_a_question_from_before_a_seek_is_dropped() {
        let mut window = window(4);
        let _ = window.question(FileId(0));
        window.seek(50);
        window.on_answer(Ok(Output::Extents(vec![extent(0, 100, false)])));
        assert_eq!(window.at(60), Known::Unknown);
        assert!(matches!(window.question(FileId(0)), Some(Op::Extents { range, .. }) if range.offset == 50));
    }
}
