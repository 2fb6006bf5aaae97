//! Hosts where io_uring is switched off for real, and where little memory may be locked.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::kernel::{Look, as_nobody};
use crate::support::{code, dense, directory, has, program, same, stderr, stdout};
use crate::{MIB, assert_refused};

#[path = "../../../engine/tests/support/seccomp.rs"]
mod seccomp;

/// Run `copy` with system call `number` refused with `errno`, as a container runtime does.
fn without(number: u32, errno: i32, place: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(program());
    command.arg("copy").args(arguments).current_dir(place).env_remove("ENGINE_LOG");
    // SAFETY: `install` makes system calls alone and allocates nothing.
    unsafe { command.pre_exec(move || seccomp::install(number, errno)) };
    command.output().expect("runs")
}

const REFUSALS: [(u32, i32); 4] = [
    (seccomp::IO_URING_SETUP, libc::EPERM),
    (seccomp::IO_URING_SETUP, libc::ENOSYS),
    (seccomp::IO_URING_SETUP, libc::ENOMEM),
    (seccomp::IO_URING_ENTER, libc::EACCES),
];

#[test]
fn auto_falls_back_and_says_so_once() {
    for (number, errno) in REFUSALS {
        let there = directory();
        let place = there.path();
        dense(&place.join("a"), 3 * MIB + 1, 0);
        let output = without(number, errno, place, &["--verify", "a", "b"]);
        let messages = stderr(&output);
        assert_eq!(code(&output), 0, "{messages}");
        assert_eq!(messages.matches("io_uring is not available here").count(), 1, "{messages}");
        assert_eq!(messages.lines().count(), 2, "the notice and the summary: {messages}");
        assert!(same(&place.join("a"), &place.join("b")));
        let output = without(number, errno, place, &["--force", "--json", "a", "b"]);
        let object: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
        assert_eq!(object["engine"], "threads");
        assert_eq!(object["notices"].as_array().map(Vec::len), Some(1), "{object}");
        // Nobody asked for it: there is nothing to say.
        let output = without(number, errno, place, &["--force", "--io-engine", "threads", "a", "b"]);
        assert_eq!((code(&output), stderr(&output).lines().count()), (0, 1), "{}", stderr(&output));
    }
}

#[test]
fn io_uring_alone_is_refused_with_nothing_touched() {
    for (number, errno) in REFUSALS {
        let there = directory();
        let place = there.path();
        dense(&place.join("a"), MIB, 0);
        dense(&place.join("old"), 1000, 1);
        for target in ["b", "old"] {
            let before = Look::at(place);
            let arguments = ["--io-engine", "io_uring", "--force", "--map", "m", "a", target];
            let output = without(number, errno, place, &arguments);
            assert_refused(&output, &arguments, &["io_uring", "use --io-engine threads, or auto"]);
            assert_eq!(Look::at(place), before);
        }
    }
}

#[test]
fn register_refused_is_done_without() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 3 * MIB + 1, 0);
    let output = without(seccomp::IO_URING_REGISTER, libc::EACCES, place, &["a", "b"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stderr(&output).lines().count() <= 2, "{}", stderr(&output));
    assert!(same(&place.join("a"), &place.join("b")));
}

#[test]
fn an_ordinary_user_with_little_lockable_memory() {
    if !has("prlimit") {
        return;
    }
    for limit in ["0", "16384", "65536", "8388608"] {
        let there = directory();
        let place = there.path();
        dense(&place.join("a"), 20 * MIB, 0);
        std::fs::set_permissions(place.join("a"), std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .expect("set");
        let Some(mut command) = as_nobody(place, &["prlimit", &format!("--memlock={limit}")]) else { return };
        let output = command.args(["copy", "--verify", "a", "b"]).output().expect("runs");
        assert_eq!(code(&output), 0, "{limit}: {}", stderr(&output));
        assert!(stderr(&output).lines().count() <= 2, "{limit}: {}", stderr(&output));
        assert!(same(&place.join("a"), &place.join("b")), "{limit}");
    }
}
