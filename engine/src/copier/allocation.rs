//! Reserving space on a target file ahead of the data.
//!
//! Direct writes that append to a file or fill a hole take its inode lock exclusively; writes into reserved space share it. So
//! space is reserved in windows over the data extents that lie ahead of the sweep. Two things limit that. Reserved space that turns
//! out to be zeros must be given back, so a window begins only after a streak of data, starts small, doubles while it
//! holds nothing but data, and zeros switch the whole thing off until the next streak. And reserving waits for direct I/O in
//! flight, so the next window is asked for when half of the last is used, and all its extents go into one request.
//! Reserving is an optimisation: when it fails (no space, not supported) it is given up, and the write says what is wrong. What was
//! reserved of a window before it failed is not told, so all of it counts as reserved. Nor is it told what an earlier run had reserved and not
//! used when it was cut off: a run that goes on from there takes everything for reserved that is not done, and reserves nothing over what is.

use super::plan::{Limits, Plan};
use crate::job::TargetHolds;
use crate::units::ByteRange;

/// See the module's header.
#[derive(Debug)]
pub(super) struct AllocateAhead {
    enabled: bool,
    /// An earlier run may have reserved anything.
    goes_on: bool,
    /// Bytes of data seen since the last zeros.
    streak: u64,
    /// Next window, in bytes of data.
    window: u64,
    /// Everything before this was decided on.
    decided_to: u64,
    /// Size of the last window, to see when half of it is used.
    last_window: u64,
    /// Span of the request under way; its data is not written yet.
    pending: Option<ByteRange>,
    /// Spans reserved in this run, ascending and merged; zeros within them are given back.
    reserved: Vec<ByteRange>,
    limits: Limits,
}

/// How a request to reserve space has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reserved {
    /// All of it is reserved.
    Whole,
    /// It failed: a part may be reserved.
    InPart,
    /// There is no such operation.
    Nothing,
}

/// Most separate spans remembered as reserved; zeros in older ones stay reserved.
const MAX_RESERVED_SPANS: usize = 1024;

impl AllocateAhead {
    /// For a copy by `plan`.
    pub(super) fn of(plan: &Plan) -> Self {
        // Only of a file that an earlier run has worked on nobody knows what it holds.
        Self::new(plan.allocate_ahead, plan.target_before == TargetHolds::Unknown, plan.limits)
    }

    /// `goes_on`: an earlier run may have reserved anything.
    fn new(enabled: bool, goes_on: bool, limits: Limits) -> Self {
        Self {
            enabled,
            goes_on: enabled && goes_on,
            streak: 0,
            window: limits.allocation_window_min,
            decided_to: 0,
            last_window: 0,
            pending: None,
            reserved: Vec::new(),
            limits,
        }
    }

    /// Data was found.
    pub(super) fn on_data(&mut self, bytes: u64) {
        self.streak = self.streak.saturating_add(bytes);
    }

    /// Zeros were found where data was expected.
    pub(super) fn on_zeros(&mut self) {
        self.streak = 0;
        self.window = self.limits.allocation_window_min;
    }

    /// How far ahead of `position` to reserve now, in bytes of data; `None`: nothing is due.
    pub(super) fn due(&self, position: u64) -> Option<(u64, u64)> {
        let on =
            self.enabled && self.pending.is_none() && self.streak >= self.limits.allocation_window_min / 4;
        let used_half = position + self.last_window / 2 >= self.decided_to;
        (on && used_half).then(|| (position.max(self.decided_to), self.window))
    }

    /// `ranges` (ascending, not empty) are being reserved.
    pub(super) fn begin(&mut self, ranges: &[ByteRange]) {
        let (first, last) = (ranges[0], ranges[ranges.len() - 1]);
        assert!(self.pending.is_none() && first.offset >= self.decided_to, "windows follow each other");
        let span = ByteRange::between(first.offset, last.end());
        self.last_window = span.length;
        self.decided_to = span.end();
        self.pending = Some(span);
        self.window = (self.window * 2).min(self.limits.allocation_window_max);
    }

    /// Nothing ahead to reserve up to `position`.
    pub(super) fn skip_to(&mut self, position: u64) {
        self.decided_to = self.decided_to.max(position);
    }

    /// The request has ended.
    pub(super) fn end(&mut self, reserved: Reserved) {
        let span = self.pending.take().expect("a request was under way");
        self.enabled &= reserved == Reserved::Whole;
        if reserved == Reserved::Nothing {
            return;
        }
        match self.reserved.last_mut() {
            Some(last) if last.end() == span.offset => last.length += span.length,
            _ => {
                if self.reserved.len() == MAX_RESERVED_SPANS {
                    self.reserved.remove(0);
                }
                self.reserved.push(span);
            }
        }
    }

    /// Whether writes to `range` wait for the request under way.
    pub(super) fn holds(&self, range: ByteRange) -> bool {
        self.pending.is_some_and(|span| span.intersection(range).is_some())
    }

    /// Whether any of `range` may be reserved.
    pub(super) fn covers(&self, range: ByteRange) -> bool {
        if self.goes_on {
            return true;
        }
        let at = self.reserved.partition_point(|span| span.end() <= range.offset);
        self.reserved.get(at).is_some_and(|span| span.offset < range.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { allocation_window_min: 1000, allocation_window_max: 4000, ..Limits::default() }
    }

    #[test]
    fn whoever_goes_on_may_find_anything_reserved() {
        let range = ByteRange::new(0, 1);
        assert!(AllocateAhead::new(true, true, limits()).covers(range));
        assert!(!AllocateAhead::new(true, false, limits()).covers(range));
        assert!(
            !AllocateAhead::new(false, true, limits()).covers(range),
            "no run of such a copy reserves anything"
        );
    }

    #[test]
    fn windows_begin_after_a_streak_and_grow_while_there_is_data() {
        let mut ahead = AllocateAhead::new(true, false, limits());
        assert_eq!(ahead.due(0), None, "no data seen yet");
        ahead.on_data(250);
        assert_eq!(ahead.due(250), Some((250, 1000)));
        ahead.begin(&[ByteRange::between(250, 1250)]);
        assert!(ahead.holds(ByteRange::between(1249, 1300)) && !ahead.holds(ByteRange::between(1250, 1300)));
        assert_eq!(ahead.due(1250), None, "one request at a time");
        ahead.end(Reserved::Whole);
        assert_eq!(ahead.due(500), None, "less than half is used");
        assert_eq!(ahead.due(750), Some((1250, 2000)));
        assert!(
            ahead.covers(ByteRange::between(1000, 5000)) && !ahead.covers(ByteRange::between(1250, 5000))
        );
    }

    #[test]
    fn zeros_switch_it_off_until_the_next_streak() {
        let mut ahead = AllocateAhead::new(true, false, limits());
        ahead.on_data(5000);
        ahead.on_zeros();
        assert_eq!(ahead.due(0), None);
        ahead.on_data(250);
        assert_eq!(ahead.due(0), Some((0, 1000)));
    }

    #[test]
    fn a_failure_gives_it_up_and_what_it_may_have_reserved_is_given_back() {
        for (outcome, covered) in [(Reserved::Nothing, false), (Reserved::InPart, true)] {
            let mut ahead = AllocateAhead::new(true, false, limits());
            ahead.on_data(5000);
            ahead.begin(&[ByteRange::between(0, 1000)]);
            ahead.end(outcome);
            assert_eq!(ahead.due(1000), None);
            assert_eq!(ahead.covers(ByteRange::between(0, 1000)), covered, "{outcome:?}");
        }
    }
}
