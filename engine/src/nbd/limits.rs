//! How much of everything a connection may have, and the bytes that all connections share.
//!
//! # Model
//! Payloads wait in memory in three places: writes on their way to the disk (*incoming*), reads and block status on their way to the
//! peer (*outgoing*), and the window of one long reply that goes out as a whole (*stream*). Each is an `Account`: it has a small
//! reserve that nobody can take from it, and takes what is beyond that from [`SharedBytes`], which all connections of a server share, up
//! to a limit of its own.
//!
//! # Why a reserve
//! A peer that never drains its replies keeps what it has. It may so use up the shared bytes, and others are slower for it; but nothing ever
//! stands still for another connection: an account that holds nothing can always take its reserve, and one that holds something hears of
//! it again when that has left. So no connection has to be told that another one gave bytes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Offsets at which pieces are cut short are multiples of this.
pub(super) const GRAIN: u64 = 4096;

/// What one connection may have. Its memory is at most
///
/// ```text
/// incoming_bytes + outgoing_bytes + stream_bytes      payloads; 3 × reserve_bytes of it are its own, the rest is shared
/// + 2 × read_ahead                                    what was received and could not be done yet, and the receive under way
/// + requests × 512 B                                  the table of requests, their I/O, and the headers of their replies
/// + 4 KiB                                             itself
/// ```
///
/// (before an export is chosen: options and their replies, at most 96 KiB). So *n* connections have at most the shared bytes and
/// *n* × (3 × `reserve_bytes` + 2 × `read_ahead` + `requests` × 512 B + 4 KiB): with the defaults 388 KiB each. One that is idle has less than
/// 6 KiB, and the receive of 4 KiB that waits for its next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Most requests whose reply has not left yet. The default is 128: fio and guests send up to 64 at a time on a connection, nbdcopy too,
    /// so that nobody is throttled; and it bounds what a peer that sends without reading can have.
    pub requests: usize,
    /// Most bytes of a piece: what is received, given to the disk, read from it and sent at a time. A multiple of 4 KiB.
    pub piece_bytes: usize,
    /// Bytes that each of the three accounts has to itself, at least 8 KiB and at most `piece_bytes`.
    pub reserve_bytes: usize,
    /// Most bytes of writes that are being received or written.
    pub incoming_bytes: usize,
    /// Most bytes of reads and block status that are being read or sent.
    pub outgoing_bytes: usize,
    /// A reply that has to go out as a whole is read first, if it is no longer than this, so that an error can still be told. Also the window
    /// of a longer one.
    pub stream_bytes: usize,
    /// Most pieces of one request that are on the disk at a time.
    pub pieces_a_request: usize,
    /// Most bytes that one receive of requests asks for.
    pub read_ahead: usize,
    /// Longest option in bytes; of a longer one the data is dropped.
    pub option_bytes: usize,
    /// Most options before the transmission begins.
    pub options: usize,
    /// Most extents in a reply to a block status request, for each metadata context.
    pub extents: usize,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            requests: 128,
            piece_bytes: 256 << 10,
            reserve_bytes: 64 << 10,
            incoming_bytes: 2 << 20,
            outgoing_bytes: 2 << 20,
            stream_bytes: 1 << 20,
            pieces_a_request: 4,
            read_ahead: 64 << 10,
            option_bytes: 18 << 10,
            options: 256,
            extents: 4096,
        }
    }
}

impl ConnectionLimits {
    /// # Panics
    /// If they contradict themselves.
    pub(super) fn check(&self) {
        let piece = self.piece_bytes;
        assert!(piece > 0 && (piece as u64).is_multiple_of(GRAIN), "pieces of {piece} bytes");
        assert!(
            self.reserve_bytes as u64 >= 2 * GRAIN && self.reserve_bytes <= piece,
            "a reserve of {} bytes",
            self.reserve_bytes
        );
        let accounts = [self.incoming_bytes, self.outgoing_bytes, self.stream_bytes];
        assert!(accounts.iter().all(|&bytes| bytes >= piece), "every account holds a piece");
        assert!(self.requests > 0 && self.pieces_a_request > 0 && self.options > 0, "limits above 0");
        assert!(self.read_ahead >= 4096 && self.option_bytes >= 4096 + 64, "room for a name");
        assert!((1..=1 << 20).contains(&self.extents), "{} extents", self.extents);
    }
}

/// Bytes that all connections of a server share. Cheap to clone: a handle.
#[derive(Clone, Debug)]
pub struct SharedBytes(Arc<AtomicUsize>);

impl SharedBytes {
    /// So many of them.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(AtomicUsize::new(bytes)))
    }

    /// Bytes that nobody has.
    #[must_use]
    pub fn left(&self) -> usize {
        // Relaxed here and below: it is a counter, and nothing is published by it.
        self.0.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }

    fn give(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// See the module's header. What it holds of the shared bytes goes back with it.
#[derive(Debug)]
pub(super) struct Account {
    shared: SharedBytes,
    reserve: usize,
    most: usize,
    used: usize,
}

impl Account {
    pub(super) fn new(shared: SharedBytes, reserve: usize, most: usize) -> Self {
        Self { shared, reserve, most, used: 0 }
    }

    /// Bytes that are held.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Bytes that could be taken now.
    pub(super) fn available(&self) -> usize {
        let own = self.reserve.saturating_sub(self.used);
        (own + self.shared.left()).min(self.most - self.used)
    }

    /// Take `bytes`, all or none.
    #[must_use]
    pub(super) fn take(&mut self, bytes: usize) -> bool {
        let used = self.used + bytes;
        if used > self.most {
            return false;
        }
        if !self.shared.take(self.beyond_reserve(used) - self.beyond_reserve(self.used)) {
            return false;
        }
        self.used = used;
        true
    }

    /// Give `bytes` back.
    pub(super) fn give(&mut self, bytes: usize) {
        let used = self.used.checked_sub(bytes).expect("no more is given back than was taken");
        self.shared.give(self.beyond_reserve(self.used) - self.beyond_reserve(used));
        self.used = used;
    }

    /// Of `used` bytes those that are of the shared ones.
    fn beyond_reserve(&self, used: usize) -> usize {
        used.saturating_sub(self.reserve)
    }

    /// Take the bytes of the first piece of `start..end` and return how many these are; `None`: not now.
    ///
    /// What is no longer than a piece is one; of what is longer, the first ends at the next multiple of `piece_bytes` on the disk. Where others
    /// have taken too much for that, it is shorter, but not by much shorter than the reserve: small pieces cost more than to wait for what
    /// is held here already.
    pub(super) fn take_piece(&mut self, start: u64, end: u64, piece_bytes: usize) -> Option<usize> {
        let piece_bytes = piece_bytes as u64;
        let full = if end - start <= piece_bytes { end - start } else { piece_bytes - start % piece_bytes };
        let (available, own_room) = (self.available() as u64, (self.most - self.used) as u64);
        let length = if full <= available {
            full
        } else if full <= own_room && available >= self.reserve as u64 {
            (start + available) / GRAIN * GRAIN - start
        } else {
            return None;
        };
        let length = usize::try_from(length).expect("no longer than a piece");
        self.take(length).then_some(length)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.shared.give(self.beyond_reserve(self.used));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_there_when_the_shared_bytes_are_gone() {
        let shared = SharedBytes::new(10_000);
        let mut first = Account::new(shared.clone(), 8192, 100_000);
        let mut second = Account::new(shared.clone(), 8192, 100_000);
        assert!(first.take(18_192));
        assert_eq!((first.available(), shared.left()), (0, 0));
        assert!(!first.take(1));
        assert!(second.take(8192));
        assert!(!second.take(1));
        first.give(1);
        assert_eq!(shared.left(), 1);
        assert!(second.take(1));
        drop(second);
        assert_eq!(shared.left(), 1);
        first.give(18_191);
        assert_eq!(shared.left(), 10_000);
    }

    #[test]
    fn an_account_has_a_limit_of_its_own() {
        let shared = SharedBytes::new(1 << 20);
        let mut account = Account::new(shared.clone(), 8192, 20_000);
        assert!(!account.take(20_001));
        assert!(account.take(20_000));
        assert_eq!(account.available(), 0);
        drop(account);
        assert_eq!(shared.left(), 1 << 20);
    }

    #[test]
    fn pieces_end_at_aligned_offsets_and_shrink_with_what_is_left() {
        const PIECE: usize = 65_536;
        let shared = SharedBytes::new(40_000);
        let mut account = Account::new(shared.clone(), 16_384, 1 << 20);
        // To the next multiple, or to the end.
        assert_eq!(account.take_piece(65_536 - 700, 1 << 20, PIECE), Some(700));
        assert_eq!(account.take_piece(65_536, 65_537, PIECE), Some(1));
        account.give(701);
        // 56,384 are left: 13 × 4096.
        assert_eq!(account.take_piece(65_536, 1 << 20, PIECE), Some(53_248));
        // 3136 are left, which is less than the reserve.
        assert_eq!(account.take_piece(0, 1 << 20, PIECE), None);
        assert_eq!(account.take_piece(0, 100, PIECE), Some(100));
        account.give(53_348);
        // What is held by the account itself is waited for.
        let mut held = Account::new(SharedBytes::new(1 << 20), 16_384, 100_000);
        assert!(held.take(60_000));
        assert_eq!(held.take_piece(0, 1 << 20, PIECE), None);
        // Never too little when nothing is held.
        assert!(Account::new(SharedBytes::new(0), 8192, PIECE).take_piece(4095, 1 << 20, PIECE).is_some());
        assert_eq!(shared.left(), 40_000);
    }

    #[test]
    fn a_piece_at_the_very_end_of_the_numbers() {
        let mut account = Account::new(SharedBytes::new(1 << 20), 8192, 1 << 20);
        assert_eq!(account.take_piece(u64::MAX - 10, u64::MAX, 4096), Some(10));
    }
}
