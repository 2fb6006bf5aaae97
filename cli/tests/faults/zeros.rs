//! Zeros and holes on file systems and devices, and file systems without direct I/O.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use crate::kernel::{LoopDevice, Mount, is_root};
use crate::support::{Running, dense, directory, same, sparse};
use crate::{KIB, MIB, copied, json};

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).expect("stat").blocks() * 512
}

/// Data, written zeros, a hole, data that ends oddly.
fn mixed(path: &Path) {
    dense(path, 4 * MIB + 777, 0);
    let file = File::options().write(true).open(path).expect("open");
    file.write_all_at(&vec![0; MIB], MIB as u64).expect("written");
    drop(file);
    let output = std::process::Command::new("fallocate")
        .args(["--punch-hole", "--offset", "2097152", "--length", "1048576"])
        .arg(path)
        .output()
        .expect("fallocate runs");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn sparse_stays_sparse_and_written_zeros_become_holes() {
    let there = directory();
    let place = there.path();
    sparse(&place.join("a"), 64 << 20);
    copied(place, &["a", "b"]);
    assert!(same(&place.join("a"), &place.join("b")));
    assert!(allocated(&place.join("b")) * 10 <= allocated(&place.join("a")) * 11);
    fs::write(place.join("zeros"), vec![0; 4 * MIB]).expect("written");
    File::open(place.join("zeros")).expect("open").sync_all().expect("synced");
    let object = json(place, &["zeros", "z"], 0);
    assert_eq!((&object["zeros"], &object["copied"]), (&(4 * MIB).into(), &0.into()), "{object}");
    assert_eq!(allocated(&place.join("z")), 0);
    copied(place, &["--no-zero-detect", "--force", "zeros", "z"]);
    assert!(allocated(&place.join("z")) >= 4 << 20, "written as they are when asked for");
    assert!(same(&place.join("zeros"), &place.join("z")));
}

/// Space is reserved ahead of the data, and the run that comes to the zeros behind it is not the one that has done so.
#[test]
fn zeros_become_holes_also_when_a_copy_was_interrupted() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 24 * MIB, 0);
    let file = File::options().append(true).open(place.join("a")).expect("open");
    file.write_all_at(&vec![0; 64 * MIB], 24 * MIB as u64).expect("written");
    drop(file);
    // From 12 MiB on the next 32 beyond 20 are reserved, and the copy is among them for more than five seconds.
    let slow = ["copy", "--speed", "5M", "--progress", "json", "--map", "m", "a", "b"];
    let mut running = Running::program(place, &slow);
    running.progress(|progress| progress["done"].as_u64() > Some(14 * MIB as u64));
    running.signal("INT");
    assert_eq!(running.end().0, 130);
    let reserved = allocated(&place.join("b"));
    assert!(reserved > 30 << 20, "{reserved} bytes: nothing was reserved ahead");
    copied(place, &["--map", "m", "a", "b"]);
    assert!(same(&place.join("a"), &place.join("b")));
    let kept = allocated(&place.join("b"));
    assert!(kept <= 26 << 20, "{kept} bytes");
}

#[test]
fn an_old_target_file_gives_its_space_back() {
    let there = directory();
    let place = there.path();
    sparse(&place.join("a"), 16 << 20);
    dense(&place.join("b"), 32 * MIB, 1);
    copied(place, &["--force", "a", "b"]);
    assert!(same(&place.join("a"), &place.join("b")));
    assert!(allocated(&place.join("b")) * 10 <= allocated(&place.join("a")) * 11);
}

#[test]
fn old_garbage_on_a_device_becomes_zeros() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    mixed(&place.join("a"));
    for options in [&[][..], &["--io-engine", "threads"], &["--no-zero-detect", "--verify"]] {
        fs::write(place.join("disk"), vec![0xee; 5 * MIB]).expect("written");
        let device = LoopDevice::over(&place.join("disk"));
        copied(place, &[options, &["a", device.text()]].concat());
        drop(device);
        let (source, mut expected) =
            (fs::read(place.join("a")).expect("read"), fs::read(place.join("a")).expect("read"));
        expected.resize(5 * MIB, 0xee);
        assert!(
            fs::read(place.join("disk")).expect("read") == expected,
            "{options:?}, {} bytes",
            source.len()
        );
    }
}

#[test]
fn a_device_that_is_zero_is_not_written_where_the_source_is() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    mixed(&place.join("a"));
    File::create(place.join("disk")).expect("created").set_len(5 << 20).expect("set");
    let device = LoopDevice::over(&place.join("disk"));
    let object = json(place, &["--target-is-zero", "a", device.text()], 0);
    drop(device);
    assert_eq!((&object["zeros"], &object["holes"]), (&MIB.into(), &MIB.into()), "{object}");
    let found = fs::read(place.join("disk")).expect("read");
    assert!(found[..4 * MIB + 777] == fs::read(place.join("a")).expect("read"));
    assert!(
        allocated(&place.join("disk")) <= (2 * MIB + 64 * KIB) as u64,
        "{}",
        allocated(&place.join("disk"))
    );
}

#[test]
fn file_systems_without_direct_io() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    let _mount = Mount::new("ramfs", "none", "rw", &place.join("fs"));
    for length in [1, 65_537, 4 * MIB + 777] {
        dense(&place.join("a"), length, 0);
        fs::write(place.join("fs/a"), fs::read(place.join("a")).expect("read")).expect("written");
        for options in [&[][..], &["--io-engine", "threads"]] {
            for (from, to, side) in [("a", "fs/b", "fs/b"), ("fs/a", "b", "fs/a"), ("fs/a", "fs/b", "fs/b")] {
                let messages = copied(place, &[options, &["--force", from, to]].concat());
                let notice = format!("engine-cli: {side}: direct I/O is refused here; using the page cache");
                assert_eq!(messages.matches(&notice).count(), 1, "{from} {to}: {messages}");
                assert!(same(&place.join(from), &place.join(to)), "{from} {to} {length}");
            }
            // What is read back from such a target has been in memory all the time, for all that is known.
            for (from, to, told) in [("a", "fs/b", 1), ("fs/a", "b", 0)] {
                let messages = copied(place, &[options, &["--force", "--verify", from, to]].concat());
                let notice = "what is read back comes through the page cache";
                assert_eq!(messages.matches(notice).count(), told, "{from} {to}: {messages}");
            }
        }
    }
}
