//! The system calls of the storages that need `unsafe`; the only module of the storages that has any.
//!
//! Each function is one call on a borrowed descriptor, with kernel structures that live on this stack frame, and gives
//! back plain values.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::units::ByteRange;

mod ioctl {
    //! Request codes of `linux/fs.h` and `linux/loop.h`.
    #![allow(missing_docs, unreachable_pub)]
    nix::ioctl_read!(blkgetsize64, 0x12, 114, libc::size_t);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), libc::c_uint);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), libc::c_int);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, super::LoopInfo64);
}

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// What a loop device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoopBacking {
    /// Device of the file system that holds the backing file.
    pub(super) device: u64,
    /// Its inode there.
    pub(super) inode: u64,
    /// Device number, where the backing file is itself a block device.
    pub(super) rdevice: Option<u64>,
    /// First byte of it that the loop device shows.
    pub(super) offset: u64,
    /// Most bytes that it shows, 0 for all.
    pub(super) size_limit: u64,
}

/// What `statx` says about direct I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DirectSupport {
    /// The kernel or the file system does not say.
    Unknown,
    /// Refused.
    Refused,
    /// Wanted of buffers, and of offsets and lengths.
    Aligned {
        /// Of buffers.
        memory: u32,
        /// Of offsets and lengths.
        offset: u32,
    },
}

/// `STATX_DIOALIGN`.
pub(super) fn direct_support(fd: BorrowedFd<'_>) -> Result<DirectSupport, Errno> {
    let mut result = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a valid empty C string, `result` a writable `struct statx` of this frame; all-zero is a valid value.
    let stat = unsafe {
        Errno::result(libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            result.as_mut_ptr(),
        ))?;
        result.assume_init()
    };
    Ok(if stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        DirectSupport::Unknown
    } else if stat.stx_dio_mem_align == 0 || stat.stx_dio_offset_align == 0 {
        DirectSupport::Refused
    } else {
        DirectSupport::Aligned { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align }
    })
}

/// Length of a block device in bytes.
pub(super) fn device_length(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    // The request code says `size_t`, the kernel writes 64 bits always: the variable has room for them.
    let mut bytes = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer, which is valid for that.
    unsafe { ioctl::blkgetsize64(fd.as_raw_fd(), (&raw mut bytes).cast()) }?;
    Ok(bytes)
}

/// Logical block size of a block device in bytes.
pub(super) fn logical_block(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut bytes = 0;
    // SAFETY: BLKSSZGET writes one int to the pointer, which is valid for that.
    unsafe { ioctl::blksszget(fd.as_raw_fd(), &raw mut bytes) }?;
    u32::try_from(bytes).map_err(|_| Errno::EINVAL)
}

/// Physical block size of a block device in bytes.
pub(super) fn physical_block(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut bytes = 0;
    // SAFETY: BLKPBSZGET writes one unsigned int to the pointer, which is valid for that.
    unsafe { ioctl::blkpbszget(fd.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

/// Whether a block device takes no writes.
pub(super) fn is_read_only(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut flag = 0;
    // SAFETY: BLKROGET writes one int to the pointer, which is valid for that.
    unsafe { ioctl::blkroget(fd.as_raw_fd(), &raw mut flag) }?;
    Ok(flag != 0)
}

/// `BLKDISCARD`.
pub(super) fn discard_device(fd: BorrowedFd<'_>, range: ByteRange) -> Result<(), Errno> {
    let bounds = [range.offset, range.length];
    // SAFETY: BLKDISCARD reads two u64 from the pointer, which is valid for that.
    unsafe { ioctl::blkdiscard(fd.as_raw_fd(), &raw const bounds) }.map(drop)
}

/// `LOOP_GET_STATUS64`; `ENXIO` for a loop device that shows nothing.
pub(super) fn loop_backing(fd: BorrowedFd<'_>) -> Result<LoopBacking, Errno> {
    let mut info = MaybeUninit::<LoopInfo64>::zeroed();
    // SAFETY: the call fills the structure, which has the kernel's layout; all-zero is a valid value of it.
    let info = unsafe {
        ioctl::loop_get_status64(fd.as_raw_fd(), info.as_mut_ptr())?;
        info.assume_init()
    };
    Ok(LoopBacking {
        device: decode_device(info.device),
        inode: info.inode,
        rdevice: (info.rdevice != 0).then(|| decode_device(info.rdevice)),
        offset: info.offset,
        size_limit: info.size_limit,
    })
}

/// The kernel's packing of a device number (`new_encode_dev`) as `stat` of the C library shows it.
fn decode_device(packed: u64) -> u64 {
    let major = (packed & 0xf_ff00) >> 8;
    let minor = (packed & 0xff) | ((packed >> 12) & 0xf_ff00);
    nix::sys::stat::makedev(major, minor)
}

/// `sync_file_range`: start and wait for the write-back of a range. An error of an earlier write-back may be reported
/// here, and then not again by the next flush on the same descriptor.
pub(super) fn write_back(fd: BorrowedFd<'_>, offset: i64, length: i64) -> Result<(), Errno> {
    let flags =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: plain values; no memory of ours is involved.
    Errno::result(unsafe { libc::sync_file_range(fd.as_raw_fd(), offset, length, flags) }).map(drop)
}

/// `flock`, exclusive, without waiting; `EWOULDBLOCK` while another description holds one.
pub(super) fn flock_exclusive(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: plain values; no memory of ours is involved.
    Errno::result(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_unpacked_as_the_kernel_packs_them() {
        for (major, minor) in [(7_u64, 0_u64), (8, 1), (259, 70_000), (0, 45), (4095, 1_048_575)] {
            let packed = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
            assert_eq!(decode_device(packed), nix::sys::stat::makedev(major, minor));
        }
    }

    #[test]
    fn loop_info_has_the_size_of_the_kernels() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
    }
}
