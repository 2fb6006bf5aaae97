//! How often the target of a live copy is flushed: so often that no flush takes long.
//!
//! # Model
//! A device with a volatile cache of some size (a disk's, a controller's, the page cache of a virtual machine's host) takes writes faster than it
//! stores them, and many a device serves nobody while it flushes. What was written and is not stored is then ahead of a guest's next request, just
//! as what is in flight is: at the latest when the job flushes at its end, or when the cache is full. So it is bounded in the same way. A
//! flush is made whenever so much was written that it will take about as long as is aimed at.
//!
//! How long that is, is learned: the time of a flush is taken to be a fixed part and a part for each byte, by least squares over the last ones, of
//! which the older weigh less. To tell the two apart what is written between two flushes is varied a little. Where the fixed part is
//! large (a disk that turns), flushing more often gains nothing and costs much, so the aim is at least [`FIXED_PARTS`] times that.
//!
//! While a flush is under way the sweep begins nothing beyond what the next one may have: also with a target that takes writes meanwhile there is a
//! bound, but for what is in flight and for guests' copies, which never wait.
//!
//! On a device without such a cache flushes take next to no time, and are soon so far apart that nobody sees them.
//!
//! # Ordering
//! These flushes are the checkpoints of a copy that has no map: captured, submitted, and an error is the end of the job. See `checkpoint`.

use std::time::Duration;

use super::plan::WriteBackLimits;
use crate::units::Timestamp;

/// A flush may take this many times what it takes whatever was written.
const FIXED_PARTS: f64 = 2.0;
/// What an older flush weighs against the one after it.
const FADING: f64 = 0.9;
/// Between two flushes more and less than the limit is written, in turns, by this part of it.
const VARIATION: u64 = 4;

/// See the module's header.
#[derive(Debug)]
pub(super) struct WriteBack {
    limits: WriteBackLimits,
    /// How long a flush may take; `None`: it is nobody's concern.
    aim: Option<Duration>,
    /// Bytes written to the target, as counted by the copier, when the last flush was submitted.
    captured: u64,
    /// Of the flush under way: since when, and how much was written before it.
    under_way: Option<(Timestamp, u64)>,
    past: Past,
    /// Most bytes of those.
    largest: u64,
    limit: u64,
    flushes: u64,
}

/// Sums over past flushes, weighted: x bytes, y seconds.
#[derive(Debug, Default)]
struct Past {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Past {
    fn add(&mut self, bytes: f64, seconds: f64) {
        for sum in [&mut self.weight, &mut self.x, &mut self.y, &mut self.xx, &mut self.xy] {
            *sum *= FADING;
        }
        self.weight += 1.0;
        self.x += bytes;
        self.y += seconds;
        self.xx += bytes * bytes;
        self.xy += bytes * seconds;
    }

    /// Seconds whatever was written, and seconds for each byte; neither is negative.
    fn line(&self) -> (f64, f64) {
        let (mean_x, mean_y) = (self.x / self.weight, self.y / self.weight);
        let variance = self.xx / self.weight - mean_x * mean_x;
        // All alike: a line through the origin.
        if variance <= (mean_x / 32.0).powi(2) {
            return (0.0, mean_y / mean_x);
        }
        let slope = (self.xy / self.weight - mean_x * mean_y) / variance;
        let fixed = mean_y - slope * mean_x;
        match (slope > 0.0, fixed > 0.0) {
            (true, true) => (fixed, slope),
            (true, false) => (0.0, mean_y / mean_x),
            (false, _) => (mean_y, 0.0),
        }
    }
}

impl WriteBack {
    pub(super) fn new(limits: WriteBackLimits) -> Self {
        Self {
            limits,
            aim: None,
            captured: 0,
            under_way: None,
            past: Past::default(),
            largest: 0,
            limit: limits.start_bytes,
            flushes: 0,
        }
    }

    /// A flush may take so long; `None`: as long as it takes.
    pub(super) fn set_aim(&mut self, aim: Option<Duration>) {
        if self.aim != aim {
            self.aim = aim;
            self.limit = self.allowed();
        }
    }

    /// Whether a flush is due, where `written` bytes were written in all.
    pub(super) fn is_due(&self, written: u64) -> bool {
        self.aim.is_some() && written - self.captured >= self.next()
    }

    /// Bytes before the next flush.
    fn next(&self) -> u64 {
        let part = self.limit / VARIATION;
        if self.flushes.is_multiple_of(2) { self.limit + part } else { self.limit - part }
    }

    /// A flush is submitted at `now`, whatever for.
    pub(super) fn begin(&mut self, written: u64, now: Timestamp) {
        self.under_way = Some((now, written - self.captured));
        self.captured = written;
    }

    /// It has succeeded at `now`.
    pub(super) fn end(&mut self, now: Timestamp) {
        let Some((start, bytes)) = self.under_way.take() else { return };
        if bytes == 0 {
            return;
        }
        self.flushes += 1;
        // The first one stores what others had written before, the guests not least.
        if self.flushes == 1 {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        self.past.add(bytes as f64, now.since(start).as_secs_f64());
        self.largest = self.largest.max(bytes);
        self.limit = self.allowed();
    }

    /// What is believed of larger flushes than there were is tried in steps: it may be chance.
    fn allowed(&self) -> u64 {
        self.best().min((self.largest + self.largest / 4).max(self.limits.start_bytes))
    }

    /// Bytes after which a flush takes as long as it may, by what is known.
    fn best(&self) -> u64 {
        let Some(aim) = self.aim.filter(|_| self.past.weight > 0.0) else { return self.limits.start_bytes };
        let (fixed, slope) = self.past.line();
        let most = aim.as_secs_f64().max(fixed * FIXED_PARTS);
        let bytes = (most - fixed) / slope;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "saturates, and is clamped"
        )]
        (bytes as u64).clamp(self.limits.min_bytes, self.limits.max_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AIM: Duration = Duration::from_millis(5);
    const LIMITS: WriteBackLimits = WriteBackLimits::DEFAULT;

    /// Bytes between flushes in the end, and how long the last one took, on a device whose flushes take `time(bytes)`.
    fn settle(aim: Duration, time: impl Fn(u64) -> Duration) -> (u64, Duration) {
        let mut write_back = WriteBack::new(LIMITS);
        write_back.set_aim(Some(aim));
        let (mut now, mut written, mut last) = (Timestamp::default(), 0, Duration::ZERO);
        for _ in 0..200 {
            let before = written;
            while !write_back.is_due(written) {
                written += 64 << 10;
            }
            write_back.begin(written, now);
            last = time(written - before);
            now = now.after(last);
            write_back.end(now);
        }
        (write_back.limit, last)
    }

    fn per_mib(micros: u64, bytes: u64) -> Duration {
        Duration::from_micros(micros * (bytes >> 10) / 1024)
    }

    #[test]
    fn a_cache_that_takes_time_is_emptied_as_often_as_is_aimed_at() {
        let (limit, last) = settle(AIM, |bytes| per_mib(1000, bytes));
        assert!((4 << 20..=6 << 20).contains(&limit), "{limit}");
        assert!(last > AIM * 2 / 3 && last < AIM * 4 / 3, "{last:?}");
        let (limit, _) = settle(20 * AIM, |bytes| per_mib(1000, bytes));
        assert!((80 << 20..=120 << 20).contains(&limit), "{limit}");
    }

    #[test]
    fn what_takes_no_time_is_done_seldom() {
        assert_eq!(settle(AIM, |_| Duration::from_micros(200)).0, LIMITS.max_bytes);
        assert_eq!(settle(AIM, |_| Duration::ZERO).0, LIMITS.max_bytes);
    }

    #[test]
    fn more_flushes_than_gain_something_are_not_made() {
        // 20 ms, and 5 for each MiB: at twice the fixed part.
        let (limit, _) = settle(AIM, |bytes| Duration::from_millis(20) + per_mib(5000, bytes));
        assert!((3 << 20..=5 << 20).contains(&limit), "{limit}");
        // It makes no difference how much is written.
        assert_eq!(settle(AIM, |_| Duration::from_millis(50)).0, LIMITS.max_bytes);
        // Slower than that cannot be helped.
        assert_eq!(settle(AIM, |bytes| per_mib(50_000, bytes)).0, LIMITS.min_bytes);
    }

    #[test]
    fn one_that_took_long_is_forgotten() {
        let mut write_back = WriteBack::new(LIMITS);
        write_back.set_aim(Some(AIM));
        let (mut now, mut written) = (Timestamp::default(), 0);
        let mut flush = |took: Duration| {
            while !write_back.is_due(written) {
                written += 64 << 10;
            }
            write_back.begin(written, now);
            now = now.after(took);
            write_back.end(now);
            write_back.limit
        };
        flush(Duration::from_millis(900));
        assert!((0..40).any(|_| flush(Duration::from_micros(200)) > 256 << 20), "it grows again");
    }

    #[test]
    fn what_there_was_by_chance_is_not_believed_far() {
        let mut write_back = WriteBack::new(LIMITS);
        write_back.set_aim(Some(AIM));
        let (mut now, mut written) = (Timestamp::default(), 0);
        // The larger one took less time.
        for (mib, millis) in [(4, 9), (5, 12), (3, 14)] {
            written += mib << 20;
            write_back.begin(written, now);
            now = now.after(Duration::from_millis(millis));
            write_back.end(now);
        }
        write_back.set_aim(Some(20 * AIM));
        assert!(write_back.limit <= 7 << 20, "{}", write_back.limit);
        write_back.set_aim(Some(AIM));
        assert!(write_back.limit <= 7 << 20, "{}", write_back.limit);
    }

    #[test]
    fn without_an_aim_nothing_is_due() {
        let mut write_back = WriteBack::new(LIMITS);
        assert!(!write_back.is_due(u64::MAX));
        write_back.set_aim(Some(AIM));
        assert!(write_back.is_due(LIMITS.start_bytes * 2) && !write_back.is_due(LIMITS.start_bytes / 2));
        write_back.set_aim(None);
        assert!(!write_back.is_due(u64::MAX));
        // What others flush counts as well.
        write_back.set_aim(Some(AIM));
        write_back.begin(LIMITS.start_bytes * 2, Timestamp::default());
        assert!(!write_back.is_due(LIMITS.start_bytes * 2));
        // One that never ended, since it failed, tells nothing.
        write_back.begin(LIMITS.start_bytes * 3, Timestamp::default());
        assert_eq!(write_back.limit, LIMITS.start_bytes);
    }
}
