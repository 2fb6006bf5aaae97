//! Refuse system calls for real: a seccomp filter of a few instructions, as container runtimes install them.
//!
//! Uses nothing of the crate around it, so other packages' tests can include this file by `#[path]`. [`install`] allocates
//! nothing and may run between `fork` and `exec` (`CommandExt::pre_exec`): then the program under test starts refused.

use std::io;

/// `io_uring_setup`, the same number on every architecture.
pub(crate) const IO_URING_SETUP: u32 = 425;
/// `io_uring_enter`.
pub(crate) const IO_URING_ENTER: u32 = 426;
/// `io_uring_register`.
pub(crate) const IO_URING_REGISTER: u32 = 427;

const fn instruction(code: u32, jump_true: u8, jump_false: u8, value: u32) -> libc::sock_filter {
    #[expect(clippy::cast_possible_truncation, reason = "BPF opcodes have 16 bits")]
    libc::sock_filter { code: code as u16, jt: jump_true, jf: jump_false, k: value }
}

/// From now on, in this thread and all it starts, system call `number` fails with `errno`.
pub(crate) fn install(number: u32, errno: i32) -> io::Result<()> {
    let errno = errno.cast_unsigned() & libc::SECCOMP_RET_DATA;
    // The number of the call is the first word of what the filter is given.
    let mut filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    let (one, zero): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: takes integers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, zero, zero, zero) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mode = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
    // SAFETY: the program points to four instructions that live through the call; the kernel copies them.
    if unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
