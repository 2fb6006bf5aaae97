//! Map files that are refused: of another pair, changed, damaged, or not to be understood.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::kernel::{LoopDevice, is_root};
use crate::support::{Running, dense, directory, same};
use crate::{MIB, copied, refused};

/// A map of a copy of `a` to `b` that was killed.
fn interrupted(place: &Path, options: &[&str]) {
    dense(&place.join("a"), 16 * MIB, 0);
    let slow = ["copy", "--speed", "2M", "--progress", "json", "--map", "m", "a", "b"];
    let mut running = Running::program(place, &[&slow, options].concat());
    running.progress(|progress| progress["done"].as_u64() > Some(0));
    running.kill();
    assert!(place.join("m").exists());
}

#[test]
fn of_another_copy() {
    let there = directory();
    let place = there.path();
    interrupted(place, &[]);
    dense(&place.join("a2"), 16 * MIB, 0);
    dense(&place.join("a3"), 17 * MIB, 0);
    dense(&place.join("b2"), 16 * MIB, 0);
    // Whatever else differs, and however long they are: that map is somebody's.
    for other in [&["a2", "b"][..], &["a3", "b"], &["a3", "new"], &["--cluster-size", "4K", "a2", "b"]] {
        let arguments = [&["--map", "m"], other].concat();
        refused(place, &arguments, &["map file m", "another source", "/a:", "name the map of this copy"]);
    }
    refused(place, &["--map", "m", "a", "b2"], &["map file m", "target", "remove the map file"]);
    fs::rename(place.join("b"), place.join("elsewhere")).expect("renamed");
    refused(place, &["--map", "m", "a", "b"], &["map file m", "its target b does not exist any more"]);
    fs::rename(place.join("elsewhere"), place.join("b")).expect("renamed");
    refused(place, &["--map", "m", "a", "b2", "--force"], &["map file m", "target"]);
    refused(place, &["--map", "m", "a", "new"], &["map file m", "/b, and new does not exist"]);
    for other in [&["--cluster-size", "4K"][..], &["--verify"], &["--sync", "top"]] {
        let arguments = |target| [&["--map", "m"], other, &["a", target]].concat();
        refused(place, &arguments("b2"), &["map file m", "target", "the map of this copy"]);
        refused(place, &arguments("new"), &["map file m", "/b, and new does not exist"]);
    }
    refused(place, &["--map", "m", "--cluster-size", "4K", "a", "b"], &["map file m", "--cluster-size 64K"]);
    refused(place, &["--map", "m", "--sync", "top", "a", "b"], &["map file m", "--sync full"]);
    refused(place, &["--map", "m", "--verify", "a", "b"], &["map file m", "without --verify"]);
    // None of that has hurt it.
    copied(place, &["--map", "m", "a", "b"]);
    assert!(same(&place.join("a"), &place.join("b")) && !place.join("m").exists());
}

#[test]
fn of_a_source_that_changed() {
    let there = directory();
    let place = there.path();
    interrupted(place, &[]);
    dense(&place.join("a"), 16 * MIB, 7);
    refused(place, &["--map", "m", "a", "b"], &["map file m", "modification time", "remove"]);
    fs::write(place.join("a"), "short").expect("written");
    refused(place, &["--map", "m", "a", "b"], &["map file m", "16777216", "remove"]);
    fs::remove_file(place.join("m")).expect("removed");
    refused(place, &["--map", "m", "a", "b"], &["b", "exists", "--force"]);
    copied(place, &["--map", "m", "--force", "a", "b"]);
    assert!(same(&place.join("a"), &place.join("b")));
}

#[test]
fn of_a_disk_that_passes_for_the_target() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 16 * MIB, 0);
    fs::write(place.join("disk"), vec![0xee; 16 * MIB]).expect("written");
    let device = is_root().then(|| LoopDevice::over(&place.join("disk")));
    for (target, backing) in [("b", "b")].into_iter().chain(device.iter().map(|it| (it.text(), "disk"))) {
        let arguments = ["copy", "--speed", "4M", "--progress", "json", "--map", "m", "a", target];
        let mut running = Running::program(place, &arguments);
        running.progress(|progress| progress["done"].as_u64() > Some(MIB as u64));
        running.signal("INT");
        assert_eq!(running.end().0, 130);
        // Another disk with the same length, serial number and place, as far as anybody can see.
        let copied_so_far = exchange(&place.join(target), &vec![0x11; 16 * MIB]);
        refused(
            place,
            &["--map", "m", "a", target],
            &["map file m", "does not hold what the map says", "at byte 0;", "remove the map file"],
        );
        exchange(&place.join(target), &copied_so_far);
        copied(place, &["--map", "m", "a", target]);
        assert!(same(&place.join("a"), &place.join(backing)) && !place.join("m").exists());
    }
}

/// Put other contents into a file or a device; gives the old ones.
fn exchange(disk: &Path, contents: &[u8]) -> Vec<u8> {
    let old = fs::read(disk).expect("read");
    let mut file = fs::OpenOptions::new().write(true).open(disk).expect("open");
    file.write_all(contents).and_then(|()| file.sync_all()).expect("written");
    old
}

#[test]
fn damaged() {
    let there = directory();
    let place = there.path();
    interrupted(place, &[]);
    let map = place.join("m");
    let good = fs::read(&map).expect("read");
    let text = String::from_utf8(good.clone()).expect("text");
    for at in [0, 12, 30, good.len() / 2, good.len() - 2] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&map, bad).expect("written");
        refused(place, &["--map", "m", "a", "b"], &["cannot use map file m", ";"]);
    }
    fs::write(&map, &good[..good.len() / 2]).expect("written");
    refused(
        place,
        &["--map", "m", "a", "b"],
        &["map file m", "remove the map file and add --force to copy everything again"],
    );
    fs::write(&map, text.replacen("map 1 ", "map 2 ", 1)).expect("written");
    refused(
        place,
        &["--map", "m", "a", "b"],
        &["map file m", "newer version (map format 2;", "the version that wrote it"],
    );
    fs::write(&map, "this is no map").expect("written");
    refused(place, &["--map", "m", "a", "b"], &["map file m", "name a map file"]);
    fs::write(&map, good).expect("written");
    copied(place, &["--map", "m", "a", "b"]);
    assert!(same(&place.join("a"), &place.join("b")));
}

#[test]
fn in_a_place_where_no_map_can_be() {
    let there = directory();
    let place = there.path();
    dense(&place.join("a"), 100_000, 0);
    fs::create_dir(place.join("dir")).expect("made");
    symlink("nothing", place.join("dangling")).expect("linked");
    refused(place, &["--map", "a", "a", "b"], &["map file a", "source"]);
    refused(place, &["--map", "b", "a", "b"], &["map file b", "target"]);
    refused(place, &["--map", "dir", "a", "b"], &["map file dir", "regular file"]);
    refused(place, &["--map", "/dev/null", "a", "b"], &["/dev/null", "regular file"]);
    refused(place, &["--map", "dangling", "a", "b"], &["map file dangling", "symbolic link"]);
    refused(place, &["--map", "nowhere/m", "a", "b"], &["nowhere/m", "does not exist", "create it"]);
    refused(place, &["--map", "m", "a", "null:"], &["null:"]);
    // The next version of a map is written under another name first.
    fs::rename(place.join("a"), place.join(".m.engine-cli-new")).expect("renamed");
    refused(place, &["--map", "m", ".m.engine-cli-new", "b"], &["map file m", "the source of the copy"]);
}
