//! The words of the set in memory: anonymous pages that the kernel hands out, zeroed, at the first touch.
//!
//! Why a mapping and not a `Vec`: the size is a matter of the disk (2 bits a cluster; 256 MiB for 64 TiB in clusters
//! of 64 KiB) while the cost should be a matter of what is used. Zero bits say *to copy*, so a fresh mapping is a
//! fresh set. Without a reservation of swap a map that is larger than memory and sparsely used is no error, and
//! without huge pages one touched word costs 4 KiB rather than 2 MiB.
//!
//! Under loom and shuttle the words are a `Vec` of their atomics, which are larger than the words they model.

use std::io;
use std::ops::Deref;

use crate::sync::AtomicU64;

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(super) use self::mapped::Words;
#[cfg(any(feature = "loom", feature = "shuttle"))]
pub(super) use self::modelled::Words;

/// Tells one live set from another: where its words lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SetId(usize);

impl Words {
    pub(super) fn id(&self) -> SetId {
        SetId(self.deref().as_ptr() as usize)
    }
}

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
mod mapped {
    use std::num::NonZeroUsize;
    use std::ptr::NonNull;

    use nix::errno::Errno;
    use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

    use super::{AtomicU64, Deref, io};

    /// A fixed number of atomic words, all 0 at first.
    pub(in super::super) struct Words {
        base: NonNull<AtomicU64>,
        count: usize,
    }

    // SAFETY: it owns its mapping alone, and nothing in it is tied to the thread that made it.
    unsafe impl Send for Words {}
    // SAFETY: through a shared reference only `&[AtomicU64]` can be had, which is Sync.
    unsafe impl Sync for Words {}

    impl Words {
        pub(in super::super) fn new(count: usize) -> io::Result<Self> {
            let bytes = count.checked_mul(size_of::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
            let Some(bytes) = NonZeroUsize::new(bytes) else {
                return Ok(Self { base: NonNull::dangling(), count: 0 });
            };
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
            let base =
                unsafe { mmap_anonymous(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)? };
            let words = Self { base: base.cast(), count };
            assert!(words.base.is_aligned(), "a mapping begins at a page");
            // SAFETY: the range is the mapping just made; this advice changes how pages are handed out, not
            // what they hold.
            match unsafe { madvise(base, bytes.get(), MmapAdvise::MADV_NOHUGEPAGE) } {
                // EINVAL: a kernel without huge pages, which is what was asked for.
                Ok(()) | Err(Errno::EINVAL) => Ok(words),
                Err(error) => Err(error.into()),
            }
        }
    }

    impl Deref for Words {
        type Target = [AtomicU64];

        #[inline]
        fn deref(&self) -> &[AtomicU64] {
            // SAFETY: `base` is the start of a live mapping of `count` words (or dangling and aligned with a count
            // of 0); its bytes are initialised (zero pages), aligned to a page, and only ever used as atomics; the
            // mapping lives until `self` is dropped, which the returned lifetime does not outlast.
            unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.count) }
        }
    }

    impl Drop for Words {
        fn drop(&mut self) {
            if self.count == 0 {
                return;
            }
            // SAFETY: the mapping is whole and ours, and `&mut self` proves that no slice of it is borrowed.
            let unmapped = unsafe { munmap(self.base.cast(), self.count * size_of::<AtomicU64>()) };
            assert!(unmapped.is_ok(), "cannot unmap {} words: {unmapped:?}", self.count);
        }
    }
}

#[cfg(any(feature = "loom", feature = "shuttle"))]
mod modelled {
    use super::{AtomicU64, Deref, io};

    /// A fixed number of atomic words, all 0 at first.
    pub(in super::super) struct Words(Vec<AtomicU64>);

    impl Words {
        pub(in super::super) fn new(count: usize) -> io::Result<Self> {
            assert!(count <= 8, "a model of {count} words is never done");
            Ok(Self((0..count).map(|_| AtomicU64::new(0)).collect()))
        }
    }

    impl Deref for Words {
        type Target = [AtomicU64];

        fn deref(&self) -> &[AtomicU64] {
            &self.0
        }
    }
}
