//! Which operations fail, and how.

use std::collections::BTreeMap;

use fastrand::Rng;
use nix::errno::Errno;

use crate::ring::Op;

/// What goes wrong with one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this error.
    Errno(Errno),
    /// It does less than was asked for (reads and writes, receives and sends; a removal of a document is not durable; others are not affected).
    Short,
    /// It reports success but changes one bit of what it writes.
    Corrupt,
}

impl Fault {
    pub(super) fn errno(self) -> Errno {
        match self {
            Self::Errno(errno) => errno,
            Self::Short | Self::Corrupt => Errno::EIO,
        }
    }
}

/// How often which fault happens, in parts of 1024 of all operations that it fits.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// Short reads and writes.
    pub short: u16,
    /// `EAGAIN`, `EINTR`, `ECANCELED`.
    pub passing: u16,
    /// `EIO`.
    pub eio: u16,
    /// `ENOSPC`, of writes and reservations.
    pub nospace: u16,
    /// Of flushes, and of page caches that are written back and dropped.
    pub flush: u16,
    /// Of page caches that are written back and dropped, on top.
    pub drop_cache: u16,
    /// Of documents that are replaced or removed.
    pub publish: u16,
    /// `EOPNOTSUPP`, of zero operations, discards and reservations.
    pub unsupported: u16,
}

/// How often which fault happens to operations on sockets, in parts of 1024 of all that it fits.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketRates {
    /// Sends shorter than there is room for, and receives of a whole that is not whole. (Other receives are short anyway.)
    pub short: u16,
    /// `EAGAIN`, `EINTR` of receives and sends: nothing was moved.
    pub passing: u16,
    /// Of receives and sends: the connection breaks.
    pub reset: u16,
    /// Of accepts: `ECONNABORTED`, `EMFILE`, `ENOMEM`. The connection stays in the backlog.
    pub accept: u16,
}

/// See the module's header.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    /// At random.
    pub rates: Rates,
    /// At random, of sockets.
    pub sockets: SocketRates,
    /// By the number of the operation, counted from 0 in the order of pushing.
    pub exact: BTreeMap<u64, Fault>,
    /// No random faults from this operation on.
    pub quiet_from: Option<u64>,
}

impl FaultPlan {
    /// Exactly one fault.
    #[must_use]
    pub fn single(operation: u64, fault: Fault) -> Self {
        Self { exact: BTreeMap::from([(operation, fault)]), ..Self::default() }
    }

    pub(super) fn decide(&self, number: u64, op: &Op, rng: &mut Rng) -> Option<Fault> {
        if let Some(fault) = self.exact.get(&number) {
            return Some(*fault);
        }
        if self.quiet_from.is_some_and(|from| number >= from) {
            return None;
        }
        let mut hit = |rate: u16| rng.u16(..1024) < rate;
        let rates = &self.rates;
        match op {
            Op::Read { .. } | Op::Write { .. } => {
                if hit(rates.short) {
                    return Some(Fault::Short);
                }
                if hit(rates.passing) {
                    let passing = [Errno::EAGAIN, Errno::EINTR, Errno::ECANCELED];
                    return Some(Fault::Errno(passing[rng.usize(..passing.len())]));
                }
                if matches!(op, Op::Write { .. }) && hit(rates.nospace) {
                    return Some(Fault::Errno(Errno::ENOSPC));
                }
                hit(rates.eio).then_some(Fault::Errno(Errno::EIO))
            }
            Op::Receive { .. } | Op::Send { .. } | Op::Accept { .. } => self.sockets.decide(op, rng),
            Op::Flush { .. } => hit(rates.flush).then_some(Fault::Errno(Errno::EIO)),
            Op::DropCache { .. } => {
                (hit(rates.flush) || hit(rates.drop_cache)).then_some(Fault::Errno(Errno::EIO))
            }
            Op::WriteZeroes { .. } | Op::Discard { .. } | Op::Allocate { .. } => {
                if hit(rates.unsupported) {
                    return Some(Fault::Errno(Errno::EOPNOTSUPP));
                }
                hit(rates.eio).then_some(Fault::Errno(Errno::EIO))
            }
            Op::Extents { .. } => hit(rates.eio).then_some(Fault::Errno(Errno::EIO)),
            Op::Publish { contents, .. } => {
                let fails = hit(rates.eio) || hit(rates.publish);
                let done_all_the_same = fails && contents.is_none() && rng.bool();
                let fault = if done_all_the_same { Fault::Short } else { Fault::Errno(Errno::EIO) };
                fails.then_some(fault)
            }
            Op::Digest { .. } | Op::Cancel { .. } => None,
        }
    }
}

impl SocketRates {
    fn decide(&self, op: &Op, rng: &mut Rng) -> Option<Fault> {
        let mut hit = |rate: u16| rng.u16(..1024) < rate;
        let errors: &[Errno] = if matches!(op, Op::Accept { .. }) {
            if !hit(self.accept) {
                return None;
            }
            &[Errno::ECONNABORTED, Errno::EMFILE, Errno::ENOMEM]
        } else if hit(self.short) {
            return Some(Fault::Short);
        } else if hit(self.passing) {
            &[Errno::EAGAIN, Errno::EINTR]
        } else if hit(self.reset) {
            &[Errno::ECONNRESET, Errno::ETIMEDOUT, Errno::EHOSTUNREACH]
        } else {
            return None;
        };
        Some(Fault::Errno(errors[rng.usize(..errors.len())]))
    }
}
