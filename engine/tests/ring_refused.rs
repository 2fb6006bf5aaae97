//! Hosts that refuse io_uring, or lock little memory: really refused, in child processes that run this test program again.

#[path = "support/seccomp.rs"]
mod seccomp;

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::sync::Arc;

use engine::ring::select::{IoEngine, OpenedRing, RingConfig, SetupError, open};
use engine::ring::uring::UringRing;
use engine::ring::{BufferRange, Op, Ring, Token, Wait};
use engine::storage::Storage;
use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Uid, setresuid};

#[path = "support/plain.rs"]
mod plain;

/// Tells a child what it is; unset in the parent.
const ROLE: &str = "RING_REFUSED_ROLE";

const CONFIG: RingConfig = RingConfig { arena_bytes: 1 << 20, capacity: 8, threads: 2, sockets: 0 };

/// This test in a child process, in the given role, with `prepare` done before it starts.
fn child(
    test: &str,
    role: &str,
    prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static,
) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(ROLE, role);
    // SAFETY: `prepare` makes system calls only.
    unsafe { command.pre_exec(prepare) };
    command.output().unwrap()
}

fn passed(output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("the child did it"), "{text}");
}

/// Write, flush and read back through a ring.
fn works<R: Ring<File = Arc<dyn Storage>>>(ring: &mut R) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0; 65536]).unwrap();
    let file = ring.add_file(Arc::new(plain::PlainFile::open(&path, true).unwrap())).unwrap();
    let (from, to) = (BufferRange { start: 0, length: 65536 }, BufferRange { start: 65536, length: 65536 });
    ring.arena_mut().slice_mut(from).fill(0x5a);
    let path = engine::ring::IoPath::Buffered;
    for op in [
        Op::Write { file, offset: 0, buffer: from, path },
        Op::Flush { file },
        Op::Read { file, offset: 0, buffer: to, path },
    ] {
        let mut completions = Vec::new();
        ring.push(Token(1), op);
        while completions.is_empty() {
            ring.wait(Wait::Forever, &mut completions).unwrap();
        }
        assert!(completions[0].result.is_ok(), "{completions:?}");
    }
    assert!(ring.arena().slice(to) == [0x5a; 65536]);
    println!("the child did it");
}

#[test]
fn a_refusal_yields_threads_or_the_error() {
    if let Ok(role) = std::env::var(ROLE) {
        let expected = Errno::from_raw(role.parse().unwrap());
        match open(IoEngine::IoUring, &CONFIG) {
            Err(SetupError::Refused { errno, .. }) => assert_eq!(errno, expected),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("io_uring is not refused"),
        }
        let opened = open(IoEngine::Auto, &CONFIG).unwrap();
        let notice = opened.notice.expect("a notice");
        println!("{notice}");
        assert!(notice.starts_with("io_uring is not available here") && !notice.contains('\n'), "{notice}");
        // As all errors have it: the text, then the name behind it.
        assert!(notice.contains(&format!(" ({expected:?}); using")), "{notice}");
        let OpenedRing::Threads(mut ring) = opened.ring else { panic!("not the thread pool") };
        return works(&mut ring);
    }
    let mut calls = vec![seccomp::IO_URING_SETUP, seccomp::IO_URING_ENTER, seccomp::IO_URING_REGISTER];
    if let Err(refusal) = UringRing::new(&CONFIG) {
        eprintln!("skipped: refusal of enter and register: {refusal}");
        calls.truncate(1);
    }
    for call in calls {
        for errno in [Errno::EPERM, Errno::ENOSYS, Errno::EACCES] {
            let refuse = move || seccomp::install(call, errno as i32);
            passed(&child("a_refusal_yields_threads_or_the_error", &(errno as i32).to_string(), refuse));
        }
    }
}

/// Give up the right to lock memory without limit, and lower the limit.
fn lock_at_most(bytes: u64) {
    setrlimit(Resource::RLIMIT_MEMLOCK, bytes, bytes).unwrap();
    if Uid::effective().is_root() {
        let nobody = Uid::from_raw(65534);
        setresuid(nobody, nobody, nobody).unwrap();
    }
}

#[test]
fn a_small_memory_limit_costs_the_registration_only() {
    if std::env::var(ROLE).is_ok() {
        lock_at_most(256 << 10);
        let mut ring = UringRing::new(&CONFIG).unwrap();
        assert!(!ring.traits().registered_buffers, "{:?}", ring.traits());
        return works(&mut ring);
    }
    if let Err(refusal) = UringRing::new(&CONFIG) {
        eprintln!("skipped: small memory limit: {refusal}");
        return;
    }
    passed(&child("a_small_memory_limit_costs_the_registration_only", "limited", || Ok(())));
}

#[test]
fn too_few_descriptors_for_the_table_cost_the_table_only() {
    if std::env::var(ROLE).is_ok() {
        // The kernel allows tables no larger than the limit on open files.
        setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
        let mut ring = UringRing::new(&CONFIG).unwrap();
        assert!(!ring.traits().registered_files, "{:?}", ring.traits());
        return works(&mut ring);
    }
    if let Err(refusal) = UringRing::new(&CONFIG) {
        eprintln!("skipped: few descriptors: {refusal}");
        return;
    }
    passed(&child("too_few_descriptors_for_the_table_cost_the_table_only", "limited", || Ok(())));
}

#[test]
fn no_lockable_memory_at_all_yields_what_works() {
    if std::env::var(ROLE).is_ok() {
        lock_at_most(0);
        // Older kernels charge the ring's own memory as well, and refuse; either way something works.
        let opened = open(IoEngine::Auto, &CONFIG).unwrap();
        println!("{} {:?}", opened.ring.name(), opened.notice);
        return match opened.ring {
            OpenedRing::Uring(mut ring) => works(&mut ring),
            OpenedRing::Threads(mut ring) => works(&mut ring),
        };
    }
    let output = child("no_lockable_memory_at_all_yields_what_works", "limited", || Ok(()));
    passed(&output);
    println!("{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn threads_are_used_when_asked_for() {
    let opened = open(IoEngine::Threads, &CONFIG).unwrap();
    assert_eq!((opened.ring.name(), opened.notice), ("threads", None));
    let OpenedRing::Threads(mut ring) = opened.ring else { panic!("not the thread pool") };
    works(&mut ring);
}
