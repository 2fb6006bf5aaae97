//! Opening the kernel's ring: which flags it knows, whether the host lets us use it at all, and what can be registered.
//!
//! Flags that an older kernel refuses are dropped one at a time, newest first. What speeds things up but cannot be had
//! (registered buffers under a small `RLIMIT_MEMLOCK`, registered files) is done without; a *refusal* of any of the three
//! system calls (a seccomp filter may allow setup and refuse the others) counts as no io_uring here.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::super::arena::Arena;
use super::super::base::MAX_FILES;
use super::super::config::{RingConfig, SetupError};
use super::sys::{Enter, Kernel};

/// How long `ENOMEM` is taken for a charge that the kernel has not given back yet (it does so late, after a ring is closed).
const MEMLOCK_PATIENCE: Duration = Duration::from_millis(100);

/// Pause between two attempts.
const MEMLOCK_PAUSE: Duration = Duration::from_millis(5);

/// Optional setup flags, in the order in which kernels learned them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetupFlags {
    /// A failed entry does not end the batch (5.18).
    pub submit_all: bool,
    /// No interrupts for completions, with a flag that says that some are due (5.19).
    pub coop_taskrun: bool,
    /// One thread submits (6.0).
    pub single_issuer: bool,
    /// Completions are processed only when that thread asks for them (6.1).
    pub defer_taskrun: bool,
}

impl SetupFlags {
    const ALL: Self = Self { submit_all: true, coop_taskrun: true, single_issuer: true, defer_taskrun: true };

    /// Without the newest one left; `None` when none is left.
    fn without_newest(mut self) -> Option<Self> {
        let newest =
            [&mut self.defer_taskrun, &mut self.single_issuer, &mut self.coop_taskrun, &mut self.submit_all]
                .into_iter()
                .find(|flag| **flag)?;
        *newest = false;
        Some(self)
    }
}

/// What the ring got from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UringTraits {
    /// Setup flags in use.
    pub flags: SetupFlags,
    /// The arena is registered as a fixed buffer.
    pub registered_buffers: bool,
    /// Descriptors are registered.
    pub registered_files: bool,
}

/// Try with all flags, then without the newest, and so on, as long as the answer is `EINVAL`.
fn ladder<T>(mut try_setup: impl FnMut(SetupFlags) -> Result<T, Errno>) -> Result<(T, SetupFlags), Errno> {
    let mut flags = SetupFlags::ALL;
    loop {
        match try_setup(flags) {
            Ok(ring) => return Ok((ring, flags)),
            Err(Errno::EINVAL) => flags = flags.without_newest().ok_or(Errno::EINVAL)?,
            Err(errno) => return Err(errno),
        }
    }
}

/// Repeat `attempt` while it says `ENOMEM`, for [`MEMLOCK_PATIENCE`].
fn patiently<T>(mut attempt: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let start = Instant::now();
    loop {
        match attempt() {
            Err(Errno::ENOMEM) if start.elapsed() < MEMLOCK_PATIENCE => std::thread::sleep(MEMLOCK_PAUSE),
            result => return result,
        }
    }
}

/// Open a ring of the size that `config` says, and check that it can be used.
pub(super) fn open(config: &RingConfig, arena: &Arena) -> Result<(Kernel, UringTraits), SetupError> {
    let RingConfig { capacity, sockets, .. } = *config;
    let refused = |step| move |errno| SetupError::Refused { step, errno };
    let (mut kernel, flags) = patiently(|| ladder(|flags| Kernel::new(flags, capacity, sockets)))
        .map_err(refused("io_uring_setup"))?;
    if !kernel.has_needed_features() {
        return Err(refused("features of Linux 5.13")(Errno::ENOSYS));
    }
    probe(&mut kernel).map_err(refused("io_uring_enter"))?;

    let files = u32::try_from(2 * MAX_FILES).expect("a small constant");
    let registered_files =
        optional(kernel.register_files(files)).map_err(refused("io_uring_register (files)"))?;
    let registered_buffers = optional(patiently(|| kernel.register_arena(arena)))
        .map_err(refused("io_uring_register (buffers)"))?;
    let traits = UringTraits { flags, registered_buffers, registered_files };
    tracing::debug!(?traits, capacity, sockets, arena = arena.bytes(), "io_uring is set up");
    Ok((kernel, traits))
}

/// Whether something that can be done without was granted; an error only if it was forbidden rather than not possible.
fn optional(granted: Result<(), Errno>) -> Result<bool, Errno> {
    match granted {
        Ok(()) => Ok(true),
        Err(errno @ (Errno::EPERM | Errno::EACCES | Errno::ENOSYS)) => Err(errno),
        Err(_) => Ok(false),
    }
}

/// One operation that does nothing, there and back.
fn probe(kernel: &mut Kernel) -> Result<(), Errno> {
    kernel.push_nop();
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        match kernel.enter(Some(Some(Duration::from_millis(100))))? {
            Enter::Entered if kernel.drain().next().is_some() => return Ok(()),
            Enter::Entered => {}
            Enter::Congested => std::thread::sleep(MEMLOCK_PAUSE),
        }
    }
    Err(Errno::ETIMEDOUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel that knows the first `known` flags.
    fn kernel_with(known: usize) -> impl FnMut(SetupFlags) -> Result<usize, Errno> {
        let mut calls = 0;
        move |flags| {
            calls += 1;
            let asked = [flags.submit_all, flags.coop_taskrun, flags.single_issuer, flags.defer_taskrun];
            if asked[known..].contains(&true) { Err(Errno::EINVAL) } else { Ok(calls) }
        }
    }

    #[test]
    fn flags_are_dropped_one_by_one_newest_first() {
        for known in 0..=4 {
            let (calls, flags) = ladder(kernel_with(known)).unwrap();
            assert_eq!(calls, 5 - known, "one call a flag dropped");
            assert_eq!(
                [flags.submit_all, flags.coop_taskrun, flags.single_issuer, flags.defer_taskrun],
                std::array::from_fn(|flag| flag < known)
            );
        }
    }

    #[test]
    fn a_refusal_ends_the_ladder_at_once() {
        let mut calls = 0;
        let refused: Result<((), _), _> = ladder(|_| {
            calls += 1;
            Err(Errno::EPERM)
        });
        assert_eq!((refused, calls), (Err(Errno::EPERM), 1));
        assert_eq!(ladder::<()>(|_| Err(Errno::EINVAL)), Err(Errno::EINVAL));
    }

    #[test]
    fn only_a_ban_on_registering_counts_as_a_refusal() {
        assert_eq!(optional(Ok(())), Ok(true));
        assert_eq!(optional(Err(Errno::ENOMEM)), Ok(false));
        assert_eq!(optional(Err(Errno::EINVAL)), Ok(false));
        assert_eq!(optional(Err(Errno::EPERM)), Err(Errno::EPERM));
    }
}
