//! Which ring: io_uring where it works, a thread pool where it is refused, or what the user asked for.
//!
//! Whether io_uring works is found out by using it. Hosts refuse it in several places (`kernel.io_uring_disabled`, a seccomp
//! filter on one of its three system calls, a memory limit), so opening the ring goes through all three before it counts.

use super::Ring;
pub use super::config::{RingConfig, SetupError};
use super::threads::ThreadsRing;
use super::uring::UringRing;

/// What the user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum IoEngine {
    /// io_uring, or threads where it is refused.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// The thread pool.
    Threads,
}

/// A ring of either kind; the logic is generic over [`Ring`], so callers branch once, at the start.
#[expect(clippy::large_enum_variant, reason = "one a process, moved once")]
pub enum OpenedRing {
    /// io_uring.
    Uring(UringRing),
    /// The thread pool.
    Threads(ThreadsRing),
}

impl OpenedRing {
    /// The ring's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Uring(ring) => ring.name(),
            Self::Threads(ring) => ring.name(),
        }
    }
}

/// What [`open`] gives.
pub struct Opened {
    /// The ring.
    pub ring: OpenedRing,
    /// One line for the user, when it is not what io_uring would have been.
    pub notice: Option<String>,
}

/// Open a ring. To be called on the thread that will use it.
///
/// # Errors
/// When neither the ring asked for nor, with [`IoEngine::Auto`], its substitute can be had.
///
/// # Panics
/// If the configuration is out of the bounds that [`RingConfig`] states.
pub fn open(engine: IoEngine, config: &RingConfig) -> Result<Opened, SetupError> {
    let threads = || ThreadsRing::new(config).map(OpenedRing::Threads);
    match engine {
        IoEngine::Threads => Ok(Opened { ring: threads()?, notice: None }),
        IoEngine::IoUring => Ok(Opened { ring: OpenedRing::Uring(UringRing::new(config)?), notice: None }),
        IoEngine::Auto => match UringRing::new(config) {
            Ok(ring) => Ok(Opened { ring: OpenedRing::Uring(ring), notice: None }),
            Err(refusal) if refusal.is_refusal() => {
                let notice = format!("{refusal}; using a pool of {} threads", config.threads);
                tracing::info!(%refusal, "falling back to threads");
                Ok(Opened { ring: threads()?, notice: Some(notice) })
            }
            Err(error) => Err(error),
        },
    }
}
