//! Live disks and their backups beside programs of QEMU, which lock what they open.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use engine::error::{ErrorKind, Refusal};
use engine::job::Outcome;
use engine::live::{BackupOptions, DiskOptions, Engine, EngineOptions, LiveDisk};
use engine::storage::{Locator, Permission, info};
use engine::units::ByteRange;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

const LENGTH: u64 = 4 << 20;

struct Fixture {
    directory: tempfile::TempDir,
    engine: Engine,
}

impl Fixture {
    /// With a disk; `None`, with a word about it, where QEMU's programs are not installed.
    fn new() -> Option<Self> {
        if Command::new("qemu-io").arg("--version").stdout(Stdio::null()).status().is_err() {
            println!("skipped: needs qemu-io");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let mut contents = vec![0; usize::try_from(LENGTH).unwrap()];
        fastrand::Rng::with_seed(7).fill(&mut contents);
        fs::write(directory.path().join("disk"), contents).unwrap();
        Some(Self { directory, engine: Engine::start(&EngineOptions::default()).unwrap() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn open(&self, writable: bool) -> LiveDisk {
        let options = DiskOptions { path: self.text("disk"), writable };
        self.engine.open_disk(&options).unwrap()
    }

    /// Nobody may have the disk for writing but us.
    #[track_caller]
    fn is_ours(&self) {
        let disk = self.path("disk");
        refused(&disk, &["write 0 4k"], "write");
        let read_only = qemu_io(&disk, &["-r"], "read 0 4k");
        assert_eq!(read_only, Ok(()), "readers that share it may");
        let error = engine::storage::open_source(&Locator::path(&disk), &Default::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused(Refusal::InUse));
        assert!(error.to_string().contains("open for writing"), "{error}");
    }
}

/// `qemu-io` with `options`; what it says where it cannot open the disk.
fn qemu_io(path: &Path, options: &[&str], command: &str) -> Result<(), String> {
    let output = Command::new("qemu-io")
        .args(["-f", "raw", "-c", command])
        .args(options)
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

#[track_caller]
fn refused(path: &Path, commands: &[&str], permission: &str) {
    for command in commands {
        let message = qemu_io(path, &[], command).expect_err(permission);
        assert!(message.contains(&format!("Failed to get \"{permission}\" lock")), "{message}");
    }
}

/// Lock as QEMU does, with a description of its own.
fn lock(path: &Path, bytes: &[i64]) -> Result<File, Errno> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    for &byte in bytes {
        let lock = libc::flock {
            l_type: i16::try_from(libc::F_RDLCK).unwrap(),
            l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&lock))?;
    }
    Ok(file)
}

#[test]
fn a_live_disk_is_kept_from_other_writers_whoever_carries_its_writes() {
    let Some(fixture) = Fixture::new() else { return };
    for writable in [true, false] {
        let disk = fixture.open(writable);
        fixture.is_ours();
        let again = DiskOptions { path: fixture.text("disk"), writable: false };
        assert!(fixture.engine.open_disk(&again).is_err_and(|error| error.is_refusal()));
        if !writable {
            // The embedder's own descriptors are no others.
            let _permit = disk.begin_write(ByteRange::new(0, 4096)).unwrap();
            std::os::unix::fs::FileExt::write_all_at(
                &File::options().write(true).open(fixture.path("disk")).unwrap(),
                &[1; 4096],
                0,
            )
            .unwrap();
        }
        drop(disk);
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(message) = qemu_io(&fixture.path("disk"), &[], "write 0 4k") {
            assert!(Instant::now() < deadline, "it is not let go: {message}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_disk_that_another_program_writes_to_is_no_live_disk() {
    let Some(fixture) = Fixture::new() else { return };
    // As a virtual machine, as a program that shares everything, as a reader that lets nobody write.
    for (bytes, reason) in [
        (&[100, 101, 201][..], "open for writing"),
        (&[100, 101], "open for writing"),
        (&[100, 201], "lets nobody write"),
    ] {
        let held = lock(&fixture.path("disk"), bytes).unwrap();
        for writable in [true, false] {
            let options = DiskOptions { path: fixture.text("disk"), writable };
            let error = fixture.engine.open_disk(&options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused(Refusal::InUse));
            assert!(error.to_string().contains(reason), "{error}");
        }
        drop(held);
    }
    fixture.open(true);
}

/// A hypervisor that embeds the engine has the locks itself.
#[test]
fn an_embedder_may_have_locks_of_its_own() {
    let Some(fixture) = Fixture::new() else { return };
    let _machine = lock(&fixture.path("disk"), &[100, 101, 201]).unwrap();
    let disk = fixture.engine.open_disk_that_is_locked(&fixture.text("disk")).unwrap();
    fixture.is_ours();
    let backup = fixture.engine.start_backup(&disk, &BackupOptions::new(fixture.text("backup"))).unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    assert!(fs::read(fixture.path("disk")).unwrap() == fs::read(fixture.path("backup")).unwrap());
    // But of what makes no sense as a whole there is no backup.
    let _target = lock(&fixture.path("backup"), &[101, 200]).unwrap();
    let error = fixture.engine.open_disk_that_is_locked(&fixture.text("backup")).unwrap_err();
    assert!(error.to_string().contains("lets nobody read it"), "{error}");
}

#[test]
fn a_backups_target_is_nobodys_until_the_backup_has_ended() {
    let Some(fixture) = Fixture::new() else { return };
    for (round, writable) in [true, false].into_iter().cycle().take(10).enumerate() {
        let disk = fixture.open(writable);
        let target = format!("backup{round}");
        let mut options = BackupOptions::new(fixture.text(&target));
        options.speed = std::num::NonZeroU64::new(64 << 10);
        let backup = fixture.engine.start_backup(&disk, &options).unwrap();
        let target = fixture.path(&target);
        if round < 2 {
            refused(&target, &["write 0 4k", "read 0 4k"], "consistent read");
            assert!(qemu_io(&target, &["-r"], "read 0 4k").is_err());
            let told = info(&Locator::path(&target)).unwrap();
            assert_eq!(told.used_by_others, [Permission::Write, Permission::Resize]);
            fixture.is_ours();
        }
        backup.job.set_speed(None).unwrap();
        assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
        // Whoever is told that it has ended may go on with it at once.
        assert_eq!(qemu_io(&target, &[], "write 0 4k"), Ok(()), "round {round}");
        drop(disk);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !info(&Locator::path(fixture.path("disk"))).unwrap().used_by_others.is_empty() {
            assert!(Instant::now() < deadline, "it is not let go");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A copy of the library, in the program that goes on with both disks.
#[test]
fn both_disks_of_a_copy_are_free_when_it_has_ended() {
    let Some(fixture) = Fixture::new() else { return };
    for io_engine in [engine::copy::IoEngine::Auto, engine::copy::IoEngine::Threads] {
        for _ in 0..5 {
            let options = engine::copy::CopyOptions {
                force: true,
                io_engine,
                ..engine::copy::CopyOptions::new(fixture.text("disk"), fixture.text("copy"))
            };
            let copy = engine::copy::start(&options).unwrap();
            assert!(matches!(copy.job.wait().outcome, Outcome::Complete));
            for name in ["disk", "copy"] {
                assert_eq!(qemu_io(&fixture.path(name), &[], "write 0 4k"), Ok(()), "{name}");
            }
        }
    }
}
