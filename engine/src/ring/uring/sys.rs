//! The kernel's ring behind typed requests. All `unsafe` of the io_uring implementation is here.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::super::arena::Arena;
use super::super::blocking::errno_of;
use super::super::held::Outgoing;
use super::super::lent::Lent;
use super::setup::SetupFlags;
use crate::units::ByteRange;

/// `BLOCK_URING_CMD_DISCARD`, `_IO(0x12, 0)` (6.12).
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// Entries of the queues beyond one an operation: the wake-up's poll, the probe.
const SPARE_ENTRIES: usize = 8;

/// How everything is sent.
const SEND_FLAGS: i32 = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;

/// Key of the poll on the wake-up's descriptor.
const WAKE_KEY: u64 = u64::MAX;

/// Key of requests whose completion tells nothing.
const IGNORED_KEY: u64 = u64::MAX - 1;

/// A descriptor as the kernel's ring knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// By number. The storage that owns it lives as long as the ring.
    Plain(RawFd),
    /// By place in the ring's table.
    Registered(u32),
}

/// What to ask of the kernel.
pub(super) enum Request<'a> {
    /// Fill the buffer from an offset.
    Read { target: Target, offset: u64, lent: &'a Lent },
    /// Write the buffer at an offset.
    Write { target: Target, offset: u64, lent: &'a Lent },
    /// `fdatasync`.
    Flush { target: Target },
    /// `fallocate` in some mode.
    Fallocate { target: Target, range: ByteRange, mode: i32 },
    /// Discard on a block device, which must be in the ring's table.
    Discard { place: u32, range: ByteRange },
    /// Accept a connection.
    Accept { listener: RawFd },
    /// Fill memory from a socket, `whole` or with what comes.
    Receive { socket: RawFd, address: *mut u8, length: u32, whole: bool },
    /// Send to a socket.
    Send { socket: RawFd, outgoing: Outgoing },
    /// Cancel the request under a key.
    Cancel { key: u64 },
}

/// How entering the kernel went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Enter {
    /// Submitted and waited, perhaps not to the end (a signal).
    Entered,
    /// The kernel has no room now: take completions, then try again.
    Congested,
}

/// What the kernel reports.
#[derive(Clone, Copy, Debug)]
pub(super) enum Event {
    /// The request under `key` has ended.
    Ended { key: u64, result: i32 },
    /// The wake-up's poll fired; whether it still stands.
    Kicked { armed: Result<bool, Errno> },
    /// Nothing to act on.
    Ignored,
}

/// The connection that an accept has ended with.
///
/// # Safety
/// `result` is that of an accept, and this is called once for it.
pub(super) unsafe fn connection(result: u32) -> OwnedFd {
    let raw = RawFd::try_from(result).expect("descriptors are small");
    // SAFETY: the kernel has made this descriptor for us; nobody else knows of it, as the caller promises.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// See the module's header.
pub(super) struct Kernel {
    ring: IoUring,
    fixed_buffers: bool,
}

/// Build a request for either kind of descriptor.
macro_rules! on {
    ($target:expr, $fd:ident => $build:expr) => {
        match $target {
            Target::Plain(raw) => {
                let $fd = Fd(raw);
                $build
            }
            Target::Registered(place) => {
                let $fd = Fixed(place);
                $build
            }
        }
    };
}

impl Kernel {
    /// A ring in which `capacity` requests, and a cancellation of each, find room in both queues; and so do two for each socket.
    pub(super) fn new(flags: SetupFlags, capacity: usize, sockets: usize) -> Result<Self, Errno> {
        // One each way, and what cancels the accept of a listener that is shut down; the completion queue takes a recall of each besides.
        let submissions = (capacity + 3 * sockets + SPARE_ENTRIES).next_power_of_two();
        let completions = (2 * capacity + 5 * sockets + SPARE_ENTRIES).next_power_of_two();
        let entries = |count: usize| u32::try_from(count).expect("capacity is bounded");
        let mut builder = IoUring::builder();
        builder.setup_cqsize(entries(completions)).dontfork();
        if flags.submit_all {
            builder.setup_submit_all();
        }
        if flags.coop_taskrun {
            builder.setup_coop_taskrun().setup_taskrun_flag();
        }
        if flags.single_issuer {
            builder.setup_single_issuer();
        }
        if flags.defer_taskrun {
            builder.setup_defer_taskrun();
        }
        let ring = builder.build(entries(submissions)).map_err(|error| errno_of(&error))?;
        Ok(Self { ring, fixed_buffers: false })
    }

    /// Completions are never dropped, waiting takes a timeout, and a poll may last (this one has no flag of its own, but
    /// came with the tagging of resources).
    pub(super) fn has_needed_features(&self) -> bool {
        let parameters = self.ring.params();
        parameters.is_feature_nodrop()
            && parameters.is_feature_ext_arg()
            && parameters.is_feature_resource_tagging()
    }

    /// Register the arena as the one fixed buffer.
    pub(super) fn register_arena(&mut self, arena: &Arena) -> Result<(), Errno> {
        let whole = libc::iovec { iov_base: arena.base().as_ptr().cast(), iov_len: arena.bytes() };
        // SAFETY: the mapping is valid; the kernel pins its pages, so even when the ring outlives the arena, nothing but those
        // pages is touched. Requests name parts of it only while those are lent.
        unsafe { self.ring.submitter().register_buffers(&[whole]) }.map_err(|error| errno_of(&error))?;
        self.fixed_buffers = true;
        Ok(())
    }

    /// Make an empty table of `count` descriptors.
    pub(super) fn register_files(&self, count: u32) -> Result<(), Errno> {
        self.ring.submitter().register_files_sparse(count).map_err(|error| errno_of(&error))
    }

    /// Put a descriptor into the table.
    pub(super) fn register_file(&self, place: u32, file: BorrowedFd<'_>) -> Result<(), Errno> {
        match self.ring.submitter().register_files_update(place, &[file.as_raw_fd()]) {
            Ok(1) => Ok(()),
            Ok(count) => panic!("registered {count} descriptors instead of 1"),
            Err(error) => Err(errno_of(&error)),
        }
    }

    /// Take a descriptor out of the table.
    pub(super) fn unregister_file(&self, place: u32) -> Result<(), Errno> {
        const NONE: i32 = -1;
        match self.ring.submitter().register_files_update(place, &[NONE]) {
            Ok(_) => Ok(()),
            Err(error) => Err(errno_of(&error)),
        }
    }

    /// Queue a request under `key`.
    ///
    /// # Safety
    /// The memory that it names, if any, stays lent until [`Kernel::drain`] has returned the end of `key`, and so do sockets stay open.
    pub(super) unsafe fn push(&mut self, key: u64, request: &Request<'_>) {
        let entry = self.entry(request).user_data(key);
        // SAFETY: memory and sockets stay as the caller promises; other descriptors are owned by storages that the ring keeps.
        unsafe { self.push_entry(&entry) };
    }

    /// Queue a request to cancel `key` whose own end is of no interest. `false`: there is no room for it.
    pub(super) fn push_cancel(&mut self, key: u64) -> bool {
        if self.ring.submission().is_full() {
            return false;
        }
        let entry = opcode::AsyncCancel::new(key).build().user_data(IGNORED_KEY);
        // SAFETY: names no memory.
        unsafe { self.push_entry(&entry) };
        true
    }

    /// Queue a request that does nothing.
    pub(super) fn push_nop(&mut self) {
        let entry = opcode::Nop::new().build().user_data(IGNORED_KEY);
        // SAFETY: names no memory.
        unsafe { self.push_entry(&entry) };
    }

    /// Queue a lasting poll: every write to `event` is an [`Event::Kicked`].
    pub(super) fn push_wake_poll(&mut self, event: &EventFd) {
        let events = u32::try_from(libc::POLLIN).expect("a small constant");
        let descriptor = Fd(event.as_raw_fd());
        let entry = opcode::PollAdd::new(descriptor, events).multi(true).build().user_data(WAKE_KEY);
        // SAFETY: names no memory.
        unsafe { self.push_entry(&entry) };
    }

    /// Whether entering the kernel has a purpose other than waiting: requests to submit, completions to process.
    pub(super) fn needs_entering(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    /// Submit what is queued. `wait`: until a completion is there, at most for the time given, if one is.
    pub(super) fn enter(&mut self, wait: Option<Option<Duration>>) -> Result<Enter, Errno> {
        let mut arguments = SubmitArgs::new();
        let timeout = wait.flatten().map(Timespec::from);
        if let Some(timeout) = &timeout {
            arguments = arguments.timespec(timeout);
        }
        match self.ring.submitter().submit_with_args(usize::from(wait.is_some()), &arguments) {
            Ok(_) => Ok(Enter::Entered),
            Err(error) => match errno_of(&error) {
                Errno::EINTR | Errno::ETIME => Ok(Enter::Entered),
                Errno::EAGAIN | Errno::EBUSY => Ok(Enter::Congested),
                errno => Err(errno),
            },
        }
    }

    /// Take all completions that are there.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Event> {
        self.ring.completion().map(|entry: cqueue::Entry| match entry.user_data() {
            WAKE_KEY if entry.result() < 0 => Event::Kicked { armed: Err(Errno::from_raw(-entry.result())) },
            WAKE_KEY => Event::Kicked { armed: Ok(cqueue::more(entry.flags())) },
            IGNORED_KEY => Event::Ignored,
            key => Event::Ended { key, result: entry.result() },
        })
    }

    fn entry(&self, request: &Request<'_>) -> squeue::Entry {
        match *request {
            Request::Read { target, offset, lent } => {
                let (address, length) = (lent.address().as_ptr(), lent.range().length);
                if self.fixed_buffers {
                    on!(target, fd => opcode::ReadFixed::new(fd, address, length, 0).offset(offset).build())
                } else {
                    on!(target, fd => opcode::Read::new(fd, address, length).offset(offset).build())
                }
            }
            Request::Write { target, offset, lent } => {
                let (address, length) = (lent.address().as_ptr().cast_const(), lent.range().length);
                if self.fixed_buffers {
                    on!(target, fd => opcode::WriteFixed::new(fd, address, length, 0).offset(offset).build())
                } else {
                    on!(target, fd => opcode::Write::new(fd, address, length).offset(offset).build())
                }
            }
            Request::Flush { target } => {
                on!(target, fd => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build())
            }
            Request::Fallocate { target, range, mode } => on!(target, fd => {
                opcode::Fallocate::new(fd, range.length).offset(range.offset).mode(mode).build()
            }),
            Request::Discard { place, range } => {
                let mut command = [0; 16];
                command[..8].copy_from_slice(&range.length.to_ne_bytes());
                opcode::UringCmd16::new(Fixed(place), BLOCK_URING_CMD_DISCARD)
                    .addr(Some(range.offset))
                    .cmd(command)
                    .build()
            }
            Request::Accept { listener } => {
                opcode::Accept::new(Fd(listener), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Request::Receive { socket, address, length, whole } => {
                let flags = if whole { libc::MSG_WAITALL } else { 0 };
                opcode::Recv::new(Fd(socket), address, length).flags(flags).build()
            }
            // All of it, as far as the kernel can do that by itself (5.19): fewer ways there and back.
            Request::Send { socket, outgoing: Outgoing::Bytes(address, length) } => {
                opcode::Send::new(Fd(socket), address, length).flags(SEND_FLAGS).build()
            }
            Request::Send { socket, outgoing: Outgoing::Message(header) } => {
                opcode::SendMsg::new(Fd(socket), header).flags(SEND_FLAGS.cast_unsigned()).build()
            }
            Request::Cancel { key } => opcode::AsyncCancel::new(key).build(),
        }
    }

    /// # Safety
    /// As [`Kernel::push`].
    unsafe fn push_entry(&mut self, entry: &squeue::Entry) {
        // SAFETY: as the caller promises.
        let pushed = unsafe { self.ring.submission().push(entry) };
        assert!(pushed.is_ok(), "the submission queue has room for the ring's capacity");
    }
}
