//! Programs that people have: they find what they expect.

use std::num::NonZeroU64;
use std::path::Path;
use std::process::{Command, Output};

use engine::copy::SyncMode;
use engine::job::{Outcome, Status};
use engine::live::BackupOptions;

use crate::Fixture;

/// Run a program; `None`, and a line that says so, if it is not here.
fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    match Command::new("timeout").arg("60").arg(program).args(arguments).output() {
        Ok(output) if output.status.code() == Some(127) => {
            eprintln!("skipped: {program} is not installed");
            None
        }
        Ok(output) => Some(output),
        Err(error) => panic!("{program}: {error}"),
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

#[test]
fn qemu_io_writes_and_reads() {
    let fixture = Fixture::new(400);
    let (_export, _) = fixture.export_disk();
    let uri = uri(&fixture.socket(), "disk");
    let commands = [
        "write -P 0x5a 1000 70000",
        "read -P 0x5a 1000 70000",
        "write -f -P 0x11 0 512",
        "write -z -u 1M 1M",
        "read -P 0 1M 1M",
        "discard 4M 4M",
        "write -P 3 2M 20M",
        "read -P 3 2M 20M",
        "flush",
        "read -P 0x11 0 512",
    ];
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&uri);
    let Some(output) = run("qemu-io", &arguments) else { return };
    assert!(output.status.success() && !text(&output).contains("failed"), "{}", text(&output));
    assert_eq!(fixture.disk.read(2 << 20, 4).unwrap(), [3; 4]);
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let fixture = Fixture::new(20);
    let (_export, _) = fixture.export_disk();
    let Some(output) = run("nbdinfo", &[&uri(&fixture.socket(), "disk")]) else { return };
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    for expected in [
        &format!("export-size: {}", fixture.contents.len()),
        "base:allocation",
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 1",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
    ] {
        assert!(said.contains(expected), "no {expected:?} in {said}");
    }
    let list = run("nbdinfo", &["--list", &uri(&fixture.socket(), "")]).expect("it is installed");
    assert!(text(&list).contains("a disk of random bytes"), "{}", text(&list));
}

#[test]
fn nbdcopy_takes_a_disk_out_and_puts_one_in() {
    let fixture = Fixture::new(200);
    let (_export, _) = fixture.export_disk();
    let uri = uri(&fixture.socket(), "disk");
    let out = fixture.directory.path().join("out.img");
    let Some(output) = run("nbdcopy", &[&uri, &out.display().to_string()]) else { return };
    assert!(output.status.success(), "{}", text(&output));
    assert!(std::fs::read(&out).unwrap() == fixture.contents, "taken out");
    let mut other = fixture.contents.clone();
    fastrand::Rng::with_seed(8).fill(&mut other);
    other[1 << 20..3 << 20].fill(0);
    std::fs::write(&out, &other).unwrap();
    let output = run("nbdcopy", &["--flush", &out.display().to_string(), &uri]).expect("it is installed");
    assert!(output.status.success(), "{}", text(&output));
    assert!(fixture.disk.read(0, other.len()).unwrap() == other, "put in");
}

#[test]
fn fio_verifies_what_it_wrote_during_a_backup() {
    let fixture = Fixture::new(400);
    let (_export, _) = fixture.export_disk();
    // By itself it gets nowhere: all that fio changes is copied for that.
    let options = BackupOptions { speed: NonZeroU64::new(1), ..fixture.options(SyncMode::Full) };
    let backup = fixture.engine.start_backup(&fixture.disk, &options).unwrap();
    let uri = format!("--uri={}", uri(&fixture.socket(), "disk"));
    let arguments = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--bs_unaligned=1",
        "--iodepth=16",
        "--size=20M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        // Nothing is left in the directory of whoever runs the tests.
        "--verify_state_save=0",
    ];
    let output = run("fio", &arguments);
    let (status, progress) = (backup.job.status(), backup.job.progress());
    backup.job.set_speed(None).unwrap();
    let Some(output) = output else { return };
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(status, Status::Running, "it ran all the time");
    assert!((10 << 20..progress.total).contains(&progress.copied), "copied for fio: {progress:?}");
    assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    let copied = std::fs::read(fixture.directory.path().join("backup.img")).unwrap();
    assert!(copied == fixture.contents, "the backup shows t0");
}
