//! How much of the sweep is in flight: enough to keep the device near its best, less while guests wait.
//!
//! # Model
//! Whatever is in flight at a device is ahead of the guest's next request there, so the sweep's bytes in flight are the guest's latency.
//! Beyond some amount more of them give no more throughput, only more waiting. The controller looks for the fewest that do: it keeps a
//! limit for some time, notes what was copied, tries a neighbour, and stays with the smaller one unless the larger is clearly
//! faster. Disks change their speed all the time, so it never stops trying.
//!
//! While guests are about (one came within the last [`GUEST_LINGER`]) the limit is at most [`GUEST_LIMIT_BYTES`], and
//! [`GUEST_SHARE_BYTES`] more for each further request that they keep waiting at a time: a guest with many requests in flight waits for its own as
//! well, and takes the device from a sweep that has few. Requests are a part of that limit ([`GUEST_RUNS`]): one under way cannot be overtaken.
//! Of runs of zeros, which take no memory and so are not in that limit, there is one at a time then.
//!
//! Guests with an I/O path of their own are seen by their writes, which pass the gate: [`Passers`] looks now and then. Their reads are not
//! seen by anybody here.

use std::time::Duration;

use super::gate::Gate;
use crate::units::Timestamp;

/// What the sweep may have in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SweepDepth {
    /// As the controller finds best.
    #[default]
    Auto,
    /// Always that many clusters, at most those that a job has.
    Fixed(u32),
}

/// How long a guest counts as being about after a request.
const GUEST_LINGER: Duration = Duration::from_millis(100);
/// Most bytes of the sweep in flight while a guest with one request at a time is about.
const GUEST_LIMIT_BYTES: u64 = 896 << 10;
/// That much more for each further request at a time, up to [`MAX_BYTES`].
const GUEST_SHARE_BYTES: u64 = 80 << 10;
/// Fewest requests that the sweep's bytes are cut into while guests are about.
const GUEST_RUNS: u64 = 4;
/// Fewest and most bytes of the sweep in flight without guests.
const MIN_BYTES: u64 = 512 << 10;
const MAX_BYTES: u64 = 4 << 20;
const START_BYTES: u64 = 2 << 20;
/// Most runs of zeros at a time without guests.
const ZERO_RUNS: u32 = 4;
/// How long a flush of the target may take with guests, and without any: one may come any time.
const GUEST_FLUSH: Duration = Duration::from_millis(5);
const FLUSH: Duration = Duration::from_millis(100);
/// How often it is looked for guests with an I/O path of their own.
const LOOK: Duration = Duration::from_millis(10);
/// How long a limit is kept before it is judged.
const WINDOW: Duration = Duration::from_millis(100);
/// A larger limit must be this much faster, a smaller one may be this much slower, in percent.
const MARGIN: u64 = 3;

/// What the sweep may do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowance {
    /// Most clusters in flight.
    pub(super) clusters: u32,
    /// Most clusters in one request.
    pub(super) run: u32,
    /// Most runs of zeros in flight.
    pub(super) zero_runs: u32,
    /// How long a flush of the target may take.
    pub(super) flush: Option<Duration>,
}

/// Guests with an I/O path of their own, as far as they are seen.
#[derive(Debug, Default)]
pub(super) struct Passers {
    next: Timestamp,
    entries: u64,
}

impl Passers {
    /// How many of their writes are under way at `now`, at least one if any was since the last look. `None`: there are none, or it is
    /// not time to look.
    pub(super) fn look(&mut self, now: Timestamp, gate: &Gate) -> Option<usize> {
        if now < self.next {
            return None;
        }
        self.next = now.after(LOOK);
        let (entries, out) = gate.traffic();
        let before = std::mem::replace(&mut self.entries, entries);
        (entries != before || out > 0).then(|| usize::try_from(out).unwrap_or(usize::MAX).max(1))
    }
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Controller {
    depth: SweepDepth,
    cluster_bytes: u64,
    /// Bytes in flight that have proved best so far.
    base: u64,
    /// Being tried.
    trial: Trial,
    /// Rate at `base`, in bytes a second, of the last window there.
    base_rate: u64,
    window: Option<(Timestamp, u64)>,
    guest_until: Timestamp,
    /// Most requests of guests at a time since they are about.
    guests: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    Base,
    Larger,
    Smaller,
}

impl Controller {
    pub(super) fn new(depth: SweepDepth, cluster_bytes: u64) -> Self {
        Self {
            depth,
            cluster_bytes,
            base: START_BYTES,
            trial: Trial::Base,
            base_rate: 0,
            window: None,
            guest_until: Timestamp::default(),
            guests: 0,
        }
    }

    /// A guest has asked for something at `now`, or still waits then, as one of `together` requests. Times may come out of order.
    pub(super) fn on_guest(&mut self, now: Timestamp, together: usize) {
        let together = u64::try_from(together).unwrap_or(u64::MAX);
        self.guests = if now < self.guest_until { self.guests.max(together) } else { together };
        self.guest_until = self.guest_until.max(now.after(GUEST_LINGER));
    }

    /// Most bytes in flight beside the guests that are about.
    fn beside_guests(&self) -> u64 {
        let more = GUEST_SHARE_BYTES.saturating_mul(self.guests.saturating_sub(1));
        GUEST_LIMIT_BYTES.saturating_add(more).min(MAX_BYTES)
    }

    fn tried(&self) -> u64 {
        match self.trial {
            Trial::Base => self.base,
            Trial::Larger => (self.base + self.base / 2).min(MAX_BYTES),
            Trial::Smaller => (self.base * 2 / 3).max(MIN_BYTES),
        }
    }

    /// What the sweep may do at `now`, when it has copied `bytes` since its start.
    pub(super) fn allowance(&mut self, now: Timestamp, bytes: u64) -> Allowance {
        let clusters = |bytes: u64| u32::try_from((bytes / self.cluster_bytes).max(1)).unwrap_or(u32::MAX);
        if let SweepDepth::Fixed(fixed) = self.depth {
            return Allowance { clusters: fixed.max(1), run: u32::MAX, zero_runs: ZERO_RUNS, flush: None };
        }
        if now < self.guest_until {
            // What is measured now tells nothing of a quiet disk.
            self.window = None;
            let bytes = self.beside_guests();
            let run = clusters(bytes / GUEST_RUNS);
            return Allowance { clusters: clusters(bytes), run, zero_runs: 1, flush: Some(GUEST_FLUSH) };
        }
        let tried = clusters(self.tried());
        match self.window {
            None => self.window = Some((now, bytes)),
            Some((start, before)) if now.since(start) >= WINDOW => {
                let nanos = now.since(start).as_nanos().max(1);
                let rate = u128::from(bytes.saturating_sub(before)) * 1_000_000_000 / nanos;
                self.judge(u64::try_from(rate).unwrap_or(u64::MAX));
                self.window = Some((now, bytes));
            }
            Some(_) => {}
        }
        Allowance { clusters: tried, run: u32::MAX, zero_runs: ZERO_RUNS, flush: Some(FLUSH) }
    }

    /// A window at the limit that is being tried has given `rate`.
    fn judge(&mut self, rate: u64) {
        let enough = self.base_rate / 100 * (100 - MARGIN);
        let better = self.base_rate / 100 * (100 + MARGIN);
        let taken = match self.trial {
            Trial::Base => {
                self.base_rate = rate;
                self.trial = Trial::Larger;
                return;
            }
            Trial::Larger => rate > better,
            Trial::Smaller => rate >= enough,
        };
        let next = if self.trial == Trial::Larger && !taken { Trial::Smaller } else { Trial::Base };
        if taken {
            self.base = self.tried();
            self.base_rate = rate;
        }
        self.trial = next;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::gate::Entry;
    use super::*;
    use crate::ring::Wake;

    struct Nobody;

    impl Wake for Nobody {
        fn wake(&self) {}
    }

    #[test]
    fn guests_who_write_by_themselves_are_seen() {
        let gate = Gate::new(Arc::new(Nobody));
        let mut passers = Passers::default();
        let mut now = Timestamp::default();
        let mut look = || {
            now = now.after(LOOK);
            passers.look(now, &gate)
        };
        assert_eq!(look(), None);
        // Over before it is looked for.
        drop(gate.enter());
        assert_eq!(look(), Some(1));
        assert_eq!(look(), None);
        let (Entry::Admitted(first), Entry::Admitted(second)) = (gate.enter(), gate.enter()) else {
            panic!()
        };
        assert_eq!(look(), Some(2));
        assert_eq!(look(), Some(2), "they take long");
        drop((first, second));
        assert_eq!(look(), None);
        // Not too often.
        drop(gate.enter());
        assert_eq!(passers.look(now, &gate), None);
        assert_eq!(passers.look(now.after(LOOK), &gate), Some(1));
    }

    /// Runs the controller against a device that gives `rate(bytes in flight)`; the bytes in flight at the end.
    fn settle(rate: impl Fn(u64) -> u64) -> u64 {
        let mut controller = Controller::new(SweepDepth::Auto, 65_536);
        let (mut now, mut bytes) = (Timestamp::default(), 0);
        let mut allowed = 0;
        for _ in 0..2_000 {
            allowed = u64::from(controller.allowance(now, bytes).clusters) * 65_536;
            now = now.after(Duration::from_millis(10));
            bytes += rate(allowed) / 100;
        }
        let _ = allowed;
        controller.base
    }

    #[test]
    fn it_finds_the_fewest_bytes_that_keep_the_device_busy() {
        // Full speed from 1 MiB on.
        let found = settle(|bytes| 1_000_000_000 * bytes.min(1 << 20) / (1 << 20));
        assert!((900 << 10..=1600 << 10).contains(&found), "{found}");
        // The more the better.
        assert_eq!(settle(|bytes| 500 * bytes), MAX_BYTES);
        // It makes no difference.
        assert_eq!(settle(|_| 1_000_000_000), MIN_BYTES);
    }

    #[test]
    fn guests_make_it_small_for_a_while() {
        let mut controller = Controller::new(SweepDepth::Auto, 65_536);
        let quiet = controller.allowance(Timestamp::default(), 0);
        controller.on_guest(Timestamp::default(), 1);
        let held = controller.allowance(Timestamp::default(), 0);
        assert!(held.clusters < quiet.clusters && held.run < quiet.run && held.zero_runs < quiet.zero_runs);
        // One that has asked before is heard of later.
        controller.on_guest(Timestamp::default().after(GUEST_LINGER), 1);
        controller.on_guest(Timestamp::default(), 1);
        assert_eq!(controller.allowance(Timestamp::default().after(GUEST_LINGER), 0), held);
        assert_eq!(controller.allowance(Timestamp::default().after(2 * GUEST_LINGER), 0), quiet);
    }

    #[test]
    fn a_guest_with_many_requests_leaves_the_sweep_more() {
        let at = |together| {
            let mut controller = Controller::new(SweepDepth::Auto, 65_536);
            controller.on_guest(Timestamp::default(), 1);
            controller.on_guest(Timestamp::default(), together);
            controller.on_guest(Timestamp::default(), 1);
            u64::from(controller.allowance(Timestamp::default(), 0).clusters) * 65_536
        };
        assert_eq!((at(1), at(1000)), (GUEST_LIMIT_BYTES, MAX_BYTES));
        assert!(at(16) > 2 * at(1) && at(16) < MAX_BYTES);
    }

    #[test]
    fn a_fixed_depth_is_kept() {
        let mut controller = Controller::new(SweepDepth::Fixed(3), 65_536);
        controller.on_guest(Timestamp::default(), 1);
        assert_eq!(controller.allowance(Timestamp::default(), 0).clusters, 3);
    }
}
