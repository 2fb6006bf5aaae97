//! What is refused before anything is touched.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};

use crate::kernel::{Look, LoopDevice, Mount, Unattached, as_nobody, is_root, tool};
use crate::support::{code, dense, directory, has, run_in};
use crate::{MIB, assert_refused, copied, refused};

#[test]
fn sources_that_are_no_disks() {
    let there = directory();
    let place = there.path();
    fs::create_dir(place.join("dir")).expect("made");
    symlink("nothing", place.join("dangling")).expect("linked");
    if has("mkfifo") {
        tool("mkfifo", &[place.join("fifo").to_str().expect("text")]);
        refused(place, &["fifo", "b"], &["cannot open source fifo", "FIFO"]);
    }
    refused(place, &["missing", "b"], &["cannot open source missing", "no such file", "check the path"]);
    refused(place, &["dangling", "b"], &["cannot open source dangling", "no such file"]);
    refused(place, &["dir", "b"], &["cannot open source dir", "directory", "name a regular file"]);
    refused(place, &["/dev/zero", "b"], &["/dev/zero", "character device", "name a regular file"]);
    refused(place, &["null:", "b"], &["null:", "needs a size", "null:64G"]);
}

#[test]
fn targets_that_are_no_disks() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 100_000, 0);
    dense(&place.join("b"), 1000, 1);
    fs::create_dir(place.join("dir")).expect("made");
    symlink("nothing", place.join("dangling")).expect("linked");
    refused(place, &["a", "b"], &["cannot open target b", "exists", "--force"]);
    refused(place, &["a", "dir"], &["cannot open target dir", "directory", "dir/a"]);
    refused(place, &["a", "/dev/null"], &["/dev/null", "character device"]);
    refused(place, &["a", "dangling"], &["cannot open target dangling", "symbolic link"]);
    refused(place, &["a", "nowhere/b"], &["nowhere/b", "directory nowhere does not exist", "create it"]);
    refused(place, &["a", "b/c"], &["b/c"]);
    refused(place, &["a", "null:1K"], &["null:1K", "1024 bytes are fewer", "larger target"]);
}

#[test]
fn one_disk_under_two_names() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), MIB, 0);
    symlink("a", place.join("link")).expect("linked");
    fs::hard_link(place.join("a"), place.join("hard")).expect("linked");
    for same in ["a", "./a", "link", "hard"] {
        refused(place, &["--force", "a", same], &["cannot open target", same, "same disk", "name two"]);
    }
    if !is_root() {
        return;
    }
    let device = LoopDevice::over(&place.join("a"));
    refused(place, &["a", device.text()], &[device.text(), "shares its bytes with the source a"]);
    refused(place, &["--force", device.text(), "a"], &["open target a", "shares its bytes", device.text()]);
    refused(place, &["--force", device.text(), device.text()], &[device.text(), "same disk"]);
}

#[test]
fn devices_that_cannot_be_the_target() {
    if !is_root() || !has("mkfs.ext4") {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 2 * MIB, 0);
    dense(&place.join("small"), MIB, 1);
    dense(&place.join("locked"), 2 * MIB, 1);
    File::create(place.join("mounted")).expect("created").set_len(8 << 20).expect("set");
    tool("mkfs.ext4", &["-q", place.join("mounted").to_str().expect("text")]);
    let small = LoopDevice::over(&place.join("small"));
    refused(
        place,
        &["a", small.text()],
        &[small.text(), "1048576 bytes are fewer than the source's 2097152"],
    );
    let read_only = LoopDevice::with(&place.join("locked"), &["--read-only"]);
    refused(place, &["a", read_only.text()], &[read_only.text(), "open target"]);
    // The file under a device is the device's.
    refused(place, &["--force", "a", "locked"], &["open target locked", read_only.text(), "attached"]);
    let device = LoopDevice::over(&place.join("mounted"));
    let elsewhere = directory();
    let _mount = Mount::new("ext4", device.text(), "ro", &elsewhere.path().join("at"));
    refused(place, &["a", device.text()], &[device.text(), "mounted", "unmount it"]);
}

/// A device to which nothing is attached is no disk of no bytes: with `--force` an old backup would be emptied for it.
#[test]
fn devices_without_a_length() {
    let there = directory();
    let place = there.path();
    dense(&place.join("old"), MIB, 0);
    fs::write(place.join("empty"), "").expect("written");
    let Some(device) = Unattached::new(&place.join("loop")) else { return };
    let words = [device.text(), "the device has no length", "lsblk"];
    refused(place, &["--force", device.text(), "old"], &words);
    refused(place, &["--force", "--map", "m", device.text(), "old"], &words);
    refused(place, &[device.text(), "new"], &words);
    // As the target it is no better, also for a source for which there is room.
    refused(place, &["old", device.text()], &words);
    refused(place, &["empty", device.text()], &words);
    let compared = run_in(place, &["compare", "old", device.text()]);
    assert_refused(&compared, &["compare"], &words);
    // Whoever only looks is told what there is; and a file may be empty.
    assert_eq!(code(&run_in(place, &["info", device.text()])), 0);
    copied(place, &["--force", "empty", "old"]);
    assert_eq!(fs::metadata(place.join("old")).expect("stat").len(), 0);
}

#[test]
fn read_only_file_systems() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 100_000, 0);
    let mount = Mount::tmpfs(&place.join("fs"), 4 << 20);
    dense(&place.join("fs/old"), 1000, 1);
    mount.remount("ro");
    refused(place, &["a", "fs/b"], &["cannot open target fs/b", "read-only", "choose a place"]);
    refused(place, &["--force", "a", "fs/old"], &["cannot open target fs/old", "read-only"]);
    refused(place, &["--map", "fs/m", "a", "b"], &["map file fs/m", "read-only"]);
}

#[test]
fn what_an_ordinary_user_may_not() {
    let there = directory();
    let place = there.path();
    dense(&place.join("secret"), 1000, 0);
    fs::set_permissions(place.join("secret"), fs::Permissions::from_mode(0o600)).expect("set");
    dense(&place.join("a"), 1000, 0);
    fs::set_permissions(place.join("a"), fs::Permissions::from_mode(0o644)).expect("set");
    fs::create_dir(place.join("closed")).expect("made");
    fs::set_permissions(place.join("closed"), fs::Permissions::from_mode(0o755)).expect("set");
    for (arguments, word) in [
        (["secret", "b", ""], "open source secret"),
        (["a", "closed/b", ""], "open target closed/b"),
        (["a", "secret", "--force"], "open target secret"),
        (["a", "b", "--map=closed/m"], "map file closed/m"),
    ] {
        let Some(mut command) = as_nobody(place, &[]) else { return };
        let before = Look::at(place);
        let arguments: Vec<_> = arguments.into_iter().filter(|argument| !argument.is_empty()).collect();
        let output = command.arg("copy").args(&arguments).output().expect("runs");
        assert_refused(&output, &arguments, &[word, "permission denied", "check its permissions"]);
        assert_eq!(Look::at(place), before);
    }
}

#[test]
fn sizes_speeds_and_depths_out_of_range() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 100_000, 0);
    dense(&place.join("b"), 1000, 1);
    for (option, value) in [
        ("--cluster-size", "0"),
        ("--cluster-size", "2K"),
        ("--cluster-size", "65535"),
        ("--cluster-size", "8M"),
        ("--cluster-size", "16E"),
        ("--speed", "0"),
        ("--speed", "18446744073709551616"),
        ("--speed", "x"),
        ("--queue-depth", "0"),
        ("--queue-depth", "1000000"),
        ("--queue-depth", "99999999999999999999"),
        ("--sync", "none"),
        ("--on-source-error", "hope"),
    ] {
        refused(place, &["--force", option, value, "a", "b"], &[option, value]);
    }
    // Each is fine, together they are too much memory.
    let both = ["--force", "--cluster-size", "4M", "--queue-depth", "8192", "a", "b"];
    refused(place, &both, &["--queue-depth", "8192", "choose 1 to 256"]);
    for source in ["null:0x", "null:-1", "null:9999999P", "null:16E"] {
        refused(place, &["--force", source, "b"], &["cannot ", source]);
    }
}

#[test]
fn files_larger_than_the_target_takes() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    // No file on ext4 is as long as this; on other file systems the test says nothing.
    let _mount = Mount::tmpfs(&place.join("fs"), 4 << 20);
    File::create(place.join("fs/a")).expect("created").set_len(1 << 60).expect("set");
    let probe = File::create(place.join("probe")).expect("created");
    if probe.set_len(1 << 60).is_ok() {
        eprintln!("SKIPPED: this file system has files of 1 EiB");
        return;
    }
    drop(probe);
    dense(&place.join("old"), 1000, 1);
    refused(place, &["fs/a", "b"], &["create b", "too large"]);
    let before = fs::read(place.join("old")).expect("read");
    let output = crate::copy(place, &["--force", "fs/a", "old"]);
    assert_refused(&output, &["--force"], &["old", "too large"]);
    assert_eq!(fs::read(place.join("old")).expect("read"), before);
}

#[test]
fn a_limit_on_file_sizes() {
    if !has("prlimit") {
        return;
    }
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 4 * MIB, 0);
    let before = Look::at(place);
    let output = std::process::Command::new("prlimit")
        .arg("--fsize=1048576")
        .arg(crate::support::program())
        .args(["copy", "a", "b"])
        .current_dir(place)
        .output()
        .expect("runs");
    assert_refused(&output, &["a", "b"], &["open target b", "limit on file sizes (1048576)", "ulimit -f"]);
    assert_eq!(Look::at(place), before);
}
