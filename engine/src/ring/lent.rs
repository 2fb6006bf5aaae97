//! A buffer that is lent out: what an operation in flight holds instead of a reference.
//!
//! A [`Lent`] exists exactly while the arena's record says that its pages are lent, so it may travel to another thread,
//! or its address to the kernel, without anybody aliasing the memory. It is given back by value; one that is lost (a ring
//! broke) leaves its pages lent, and the arena then leaks its mapping rather than unmap memory in use.

use std::ptr::NonNull;

use super::arena::{Access, Arena, BufferRange};

/// A lent buffer. See the module's header.
#[derive(Debug)]
#[must_use = "a buffer that is not given back stays lent for ever"]
pub(crate) struct Lent {
    start: NonNull<u8>,
    range: BufferRange,
    access: Access,
}

// SAFETY: the memory is the arena's mapping, tied to no thread; the arena makes no reference that conflicts with `access`
// before the buffer is given back, and outlives it (an arena with pages lent leaks its mapping).
unsafe impl Send for Lent {}

impl Lent {
    /// Borrow `range` of `arena`.
    ///
    /// # Panics
    /// As [`Arena::lend`].
    pub(crate) fn new(arena: &mut Arena, range: BufferRange, access: Access) -> Self {
        Self { start: arena.lend(range, access), range, access }
    }

    /// Which part of the arena.
    pub(crate) fn range(&self) -> BufferRange {
        self.range
    }

    /// Address of the first byte, for the kernel.
    pub(crate) fn address(&self) -> NonNull<u8> {
        self.start
    }

    /// The bytes, to fill them.
    ///
    /// # Panics
    /// If it was lent to be looked at only.
    pub(crate) fn fill(&mut self) -> &mut [u8] {
        assert_eq!(self.access, Access::Fill, "{:?} was not lent to be filled", self.range);
        // SAFETY: in bounds and initialised (the arena checked and zero-filled it); exclusive, since it is lent to be
        // filled to this value alone, which is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.range.length as usize) }
    }

    /// The bytes, to look at them.
    ///
    /// # Panics
    /// If it was lent to be filled.
    pub(crate) fn look(&self) -> &[u8] {
        assert_eq!(self.access, Access::Look, "{:?} was not lent to be looked at", self.range);
        // SAFETY: in bounds and initialised as in `fill`; nobody changes it while it is lent to be looked at.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.range.length as usize) }
    }

    /// Return it to `arena`, which it came from.
    pub(crate) fn give_back(self, arena: &mut Arena) {
        arena.give_back(self.range, self.access);
    }
}
