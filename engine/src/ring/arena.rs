//! The buffers of a ring: one page-aligned mapping, handed out in ranges, with a record of what is lent to the kernel.
//!
//! # Why the record
//! While an operation is in flight the kernel (or a pool thread) reads or writes its buffer without asking the borrow
//! checker. The arena therefore notes for each 4 KiB page whether it is lent, and for what, and refuses (panics) to make
//! a reference that would alias: no `&` to a page that is being filled, no `&mut` to a page that is being read. Lending is
//! the ring implementations' privilege, so the rest of the crate cannot cause a data race whatever it does, and a slot
//! used twice shows at once instead of as a corrupt copy. The cost is one byte compared and stored per page and operation.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// Bytes a page of the lending record.
pub const PAGE_BYTES: usize = 4096;

/// A contiguous part of the arena, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BufferRange {
    /// Bytes from the arena's start.
    pub start: u32,
    /// Bytes.
    pub length: u32,
}

impl BufferRange {
    /// The part of it from `skip` bytes on, `length` bytes long.
    ///
    /// # Panics
    /// If the part does not lie in the range.
    #[must_use]
    pub fn part(self, skip: u32, length: u32) -> Self {
        assert!(
            u64::from(skip) + u64::from(length) <= u64::from(self.length),
            "part {skip}+{length} outside {self:?}"
        );
        Self { start: self.start + skip, length }
    }

    fn pages(self) -> std::ops::Range<usize> {
        let start = self.start as usize;
        start / PAGE_BYTES..(start + self.length as usize).div_ceil(PAGE_BYTES)
    }
}

/// What the one who borrows does with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Fills it (a read from storage). Exclusive.
    Fill,
    /// Looks at it (a write to storage, a checksum). Shared.
    Look,
}

/// Lent to one who fills it.
const FILLING: u8 = u8::MAX;
/// Most lookers a page.
const MAX_LOOKERS: u8 = FILLING - 1;

/// The buffers of a ring. See the module's header.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    bytes: NonZeroUsize,
    /// For each page 0 (free), a number of lookers, or [`FILLING`].
    lent: Vec<u8>,
}

// SAFETY: the arena owns its mapping; nothing in it is tied to a thread. (It is not `Sync`-shared: rings own it.)
unsafe impl Send for Arena {}

impl Arena {
    /// Largest arena in bytes (1 GiB: what one registered buffer of `io_uring` may span).
    pub const MAX_BYTES: usize = 1 << 30;

    /// A zero-filled arena of `bytes` bytes, rounded up to pages.
    ///
    /// # Errors
    /// When the memory cannot be had.
    ///
    /// # Panics
    /// If `bytes` is 0 or beyond [`Self::MAX_BYTES`].
    pub fn new(bytes: usize) -> io::Result<Self> {
        assert!(bytes > 0 && bytes <= Self::MAX_BYTES, "arena of {bytes} bytes");
        let bytes = NonZeroUsize::new(bytes.next_multiple_of(PAGE_BYTES)).expect("not zero: checked above");
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            mmap_anonymous(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }?
        .cast::<u8>();
        // A child forked while reads are in flight must not get the pages that they fill.
        // SAFETY: as above.
        unsafe { madvise(base.cast(), bytes.get(), MmapAdvise::MADV_DONTFORK) }.ok();
        if bytes.get() >= 2 << 20 {
            // SAFETY: the range is the mapping just made. Huge pages are a wish: a refusal changes nothing.
            unsafe { madvise(base.cast(), bytes.get(), MmapAdvise::MADV_HUGEPAGE) }.ok();
        }
        Ok(Self { base, bytes, lent: vec![0; bytes.get() / PAGE_BYTES] })
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.get()
    }

    /// Whether any part of `range` is lent to an operation in flight.
    #[must_use]
    pub fn is_lent(&self, range: BufferRange) -> bool {
        self.lent[range.pages()].iter().any(|&page| page != 0)
    }

    /// The bytes of `range`.
    ///
    /// # Panics
    /// If it lies outside, or a page of it is being filled by an operation in flight.
    #[must_use]
    pub fn slice(&self, range: BufferRange) -> &[u8] {
        self.check_bounds(range);
        assert!(self.lent[range.pages()].iter().all(|&page| page != FILLING), "{range:?} is being filled");
        // SAFETY: in bounds of the mapping (checked); initialised (anonymous memory is zero-filled); nobody writes to it while
        // the reference lives: no operation fills it (checked), none can be lent it (that takes `&mut self`), and
        // `slice_mut` takes `&mut self`.
        unsafe {
            std::slice::from_raw_parts(self.base.add(range.start as usize).as_ptr(), range.length as usize)
        }
    }

    /// The bytes of `range`, to change them.
    ///
    /// # Panics
    /// If it lies outside, or a page of it is lent to an operation in flight.
    #[must_use]
    pub fn slice_mut(&mut self, range: BufferRange) -> &mut [u8] {
        self.check_bounds(range);
        assert!(!self.is_lent(range), "{range:?} is lent");
        // SAFETY: as in `slice`; exclusive because nothing of it is lent (checked) and `&mut self` is held.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.base.add(range.start as usize).as_ptr(),
                range.length as usize,
            )
        }
    }

    /// Lend `range` to an operation; it must be given back with the same access when the operation has ended.
    ///
    /// # Panics
    /// If it lies outside, or its pages are lent in a way that excludes `access`.
    pub(crate) fn lend(&mut self, range: BufferRange, access: Access) -> NonNull<u8> {
        self.check_bounds(range);
        let pages = &mut self.lent[range.pages()];
        // All of it is checked before any of it is marked, so that a refusal leaves the record as it was.
        match access {
            Access::Fill => {
                assert!(pages.iter().all(|&page| page == 0), "{range:?} is lent already");
                pages.fill(FILLING);
            }
            Access::Look => {
                let free = pages.iter().all(|&page| page < MAX_LOOKERS);
                assert!(free, "{range:?} is being filled, or by too many looked at");
                pages.iter_mut().for_each(|page| *page += 1);
            }
        }
        // SAFETY: in bounds of the mapping (checked above).
        unsafe { self.base.add(range.start as usize) }
    }

    /// Take back what was lent.
    ///
    /// # Panics
    /// If it was not lent so.
    pub(crate) fn give_back(&mut self, range: BufferRange, access: Access) {
        for page in &mut self.lent[range.pages()] {
            match access {
                Access::Fill => {
                    assert!(*page == FILLING, "{range:?} was not being filled");
                    *page = 0;
                }
                Access::Look => {
                    assert!(*page > 0 && *page <= MAX_LOOKERS, "{range:?} was not being looked at");
                    *page -= 1;
                }
            }
        }
    }

    /// Start of the mapping, for registering it with the kernel.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn check_bounds(&self, range: BufferRange) {
        assert!(
            range.start as usize + range.length as usize <= self.bytes.get(),
            "{range:?} outside an arena of {} bytes",
            self.bytes
        );
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.lent.iter().any(|&page| page != 0) {
            // An operation in flight still uses the memory (a ring died): leaking it is the only safe end.
            return;
        }
        // SAFETY: the mapping is ours, nothing is lent, and no reference outlives `self`.
        let unmapped = unsafe { munmap(self.base.cast(), self.bytes.get()) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping: {unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: BufferRange = BufferRange { start: 0, length: 4096 };

    #[test]
    fn lookers_share_and_fillers_do_not() {
        let mut arena = Arena::new(8192).unwrap();
        let _ = arena.lend(FIRST, Access::Look);
        let _ = arena.lend(FIRST, Access::Look);
        assert_eq!(arena.slice(FIRST)[0], 0);
        arena.give_back(FIRST, Access::Look);
        assert!(arena.is_lent(FIRST));
        arena.give_back(FIRST, Access::Look);
        arena.slice_mut(FIRST)[0] = 7;
        assert_eq!(arena.slice(FIRST)[0], 7);
    }

    #[test]
    #[should_panic(expected = "is lent already")]
    fn a_buffer_is_filled_by_one_operation_only() {
        let mut arena = Arena::new(8192).unwrap();
        let _ = arena.lend(BufferRange { start: 0, length: 8192 }, Access::Fill);
        let _ = arena.lend(BufferRange { start: 4096, length: 1 }, Access::Fill);
    }

    #[test]
    fn a_refusal_to_lend_marks_nothing() {
        for taken in [Access::Fill, Access::Look] {
            let mut arena = Arena::new(8192).unwrap();
            let second = BufferRange { start: 4096, length: 4096 };
            let _ = arena.lend(second, taken);
            let both = BufferRange { start: 0, length: 8192 };
            let wanted = if taken == Access::Fill { Access::Look } else { Access::Fill };
            let lend = std::panic::AssertUnwindSafe(|| arena.lend(both, wanted));
            assert!(std::panic::catch_unwind(lend).is_err());
            assert!(!arena.is_lent(FIRST), "{wanted:?}");
            arena.give_back(second, taken);
        }
    }

    #[test]
    #[should_panic(expected = "is being filled")]
    fn a_buffer_being_filled_is_not_looked_at() {
        let mut arena = Arena::new(4096).unwrap();
        let _ = arena.lend(FIRST, Access::Fill);
        assert!(arena.slice(FIRST).is_empty());
    }

    #[test]
    #[should_panic(expected = "outside an arena")]
    fn a_range_outside_is_refused() {
        let arena = Arena::new(4096).unwrap();
        assert!(arena.slice(BufferRange { start: 4096, length: 1 }).is_empty());
    }
}
