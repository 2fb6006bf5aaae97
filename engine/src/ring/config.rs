//! How large a ring is, and why one cannot be had.

use std::io;

use nix::errno::Errno;

use super::Arena;
use super::base::MAX_CAPACITY;
use super::blocking::MAX_THREADS;
use crate::error::describe;

/// How large a ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Bytes of buffers, 1 to [`Arena::MAX_BYTES`].
    pub arena_bytes: usize,
    /// Most operations in flight, 1 to [`RingConfig::MAX_CAPACITY`].
    pub capacity: usize,
    /// Threads that carry out operations where io_uring is refused, 1 to [`RingConfig::MAX_THREADS`].
    pub threads: usize,
}

impl RingConfig {
    /// Largest `capacity`.
    pub const MAX_CAPACITY: usize = MAX_CAPACITY;
    /// Largest `threads`.
    pub const MAX_THREADS: usize = MAX_THREADS;
    /// Largest `arena_bytes`.
    pub const MAX_ARENA_BYTES: usize = Arena::MAX_BYTES;
    /// A good number of threads: what it takes to keep a fast disk busy.
    pub const DEFAULT_THREADS: usize = 16;
}

/// Why a ring could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The kernel, or what guards it, does not let us use io_uring.
    #[error("io_uring is not available here: {step}: {}", describe(*.errno))]
    Refused {
        /// What was tried.
        step: &'static str,
        /// The answer.
        errno: Errno,
    },
    /// No memory for the buffers.
    #[error("no memory for {bytes} bytes of buffers: {source}")]
    Memory {
        /// How much was asked for.
        bytes: usize,
        /// The system call's error.
        source: io::Error,
    },
    /// No threads for the pool.
    #[error("cannot start the I/O threads: {source}")]
    Threads {
        /// The system call's error.
        source: io::Error,
    },
}

impl SetupError {
    /// Whether threads may succeed where this failed.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Refused { errno, .. } => matches!(
                errno,
                Errno::EPERM
                    | Errno::EACCES
                    | Errno::ENOSYS
                    | Errno::ENOMEM
                    | Errno::EINVAL
                    | Errno::EOPNOTSUPP
                    | Errno::EMFILE
                    | Errno::ENFILE
                    | Errno::ETIMEDOUT
            ),
            Self::Memory { .. } | Self::Threads { .. } => false,
        }
    }
}
