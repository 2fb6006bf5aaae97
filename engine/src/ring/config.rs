//! How large a ring is, and why one cannot be had.

use std::io;

use nix::errno::Errno;

use super::Arena;
use super::base::{MAX_CAPACITY, MAX_FILES};
use super::blocking::{MAX_THREADS, errno_of};
use super::socket::MAX_SOCKETS;
use crate::error::describe;
use crate::units::Length;

/// How large a ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Bytes of buffers, 1 to [`Arena::MAX_BYTES`].
    pub arena_bytes: usize,
    /// Most operations in flight, 1 to [`RingConfig::MAX_CAPACITY`].
    pub capacity: usize,
    /// Threads that carry out operations where io_uring is refused, 1 to [`RingConfig::MAX_THREADS`]; one storage has at most three quarters of
    /// them. Where storages do not answer and others have no thread left, a few more are started, at most two for each storage.
    pub threads: usize,
    /// Most sockets at a time, listening and connected, 0 to [`RingConfig::MAX_SOCKETS`]. Each takes a descriptor of the process:
    /// whoever asks for many raises the soft limit on open files (`RLIMIT_NOFILE`) to [`RingConfig::descriptors`] before.
    pub sockets: usize,
}

impl RingConfig {
    /// Largest `capacity`.
    pub const MAX_CAPACITY: usize = MAX_CAPACITY;
    /// Largest `threads`.
    pub const MAX_THREADS: usize = MAX_THREADS;
    /// Largest `sockets`.
    pub const MAX_SOCKETS: usize = MAX_SOCKETS;
    /// Largest `arena_bytes`.
    pub const MAX_ARENA_BYTES: usize = Arena::MAX_BYTES;
    /// A good number of threads: what it takes to keep a fast disk busy.
    pub const DEFAULT_THREADS: usize = 16;

    /// Descriptors that a process needs for a ring of this size with as many storages as it takes, and a few of its own.
    #[must_use]
    pub fn descriptors(&self) -> u64 {
        (self.sockets + 2 * MAX_FILES + OWN_DESCRIPTORS) as u64
    }
}

/// Descriptors beyond sockets and storages: the ring's own, standard streams, directories, one connection on its way to be refused.
const OWN_DESCRIPTORS: usize = 64;

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
    #[error("no memory for {} of buffers: {}", Length(*.bytes as u64), describe(errno_of(.source)))]
    Memory {
        /// How much was asked for.
        bytes: usize,
        /// The system call's error.
        source: io::Error,
    },
    /// No threads for the pool.
    #[error("cannot start the I/O threads: {}", describe(errno_of(.source)))]
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
