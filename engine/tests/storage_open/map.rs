//! The map file on disk: never two runs on one, never another file taken for one, replaced as a whole, and nothing left
//! behind by a copy that published none.

use std::fs;
use std::os::unix::fs::symlink;

use engine::copy::SyncMode;
use engine::error::{Refusal, Result};
use engine::map::{Map, MapFile, MapHeader, frame};
use engine::storage::{Document, Locator, OpenedSource};
use engine::units::{ClusterRange, ClusterSize, Geometry};
use nix::errno::Errno;

use crate::support::*;

/// Under this name the next version of `map` is written.
const TEMPORARY: &str = ".map.engine-cli-new";

fn setup() -> (Place, OpenedSource) {
    let place = Place::new();
    let from = source(place.file("source", MIB)).expect("source");
    (place, from)
}

fn open(place: &Place, from: &OpenedSource, name: &str) -> Result<MapFile> {
    patiently(|| MapFile::open(&place.path(name), from, &Locator::path(place.path("target"))))
}

fn sample(from: &OpenedSource, done: u64) -> Map {
    let header = MapHeader {
        source: from.identity().clone(),
        target: from.identity().clone(),
        geometry: Geometry::new(from.length(), ClusterSize::DEFAULT),
        sync: SyncMode::Full,
        verify: false,
        target_was_zero: true,
    };
    Map::new(header, vec![ClusterRange::new(0, done)], Vec::new()).expect("map")
}

#[test]
fn a_map_is_published_found_again_and_removed() {
    let (place, from) = setup();
    let file = open(&place, &from, "map").expect("new");
    assert!(file.map().is_none());
    for done in [1, 2, 3] {
        file.publish(Some(&sample(&from, done).encode())).expect("publish");
        assert_eq!(place.names(), ["map", "source"]);
    }
    drop(file);
    let file = open(&place, &from, "map").expect("again");
    assert_eq!(file.map(), Some(&sample(&from, 3)));
    file.publish(None).expect("remove");
    file.publish(None).expect("it may be missing");
    drop(file);
    assert_eq!(place.names(), ["source"]);
}

#[test]
fn nothing_stays_of_a_copy_that_published_nothing() {
    let (place, from) = setup();
    drop(open(&place, &from, "map").expect("new"));
    assert_eq!(place.names(), ["source"]);
    fs::write(place.path("mine"), b"").expect("an empty file counts as new");
    let file = open(&place, &from, "mine").expect("new");
    assert!(file.map().is_none());
    drop(file);
    assert_eq!(place.names(), ["mine", "source"], "what this run did not create stays");
}

#[test]
fn two_runs_never_share_a_map() {
    let (place, from) = setup();
    let first = open(&place, &from, "map").expect("new");
    refused(open(&place, &from, "map"), Refusal::InUse, "another copy is using it");
    first.publish(Some(&sample(&from, 1).encode())).expect("publish");
    refused(open(&place, &from, "map"), Refusal::InUse, "another copy is using it");
    first.publish(Some(&sample(&from, 2).encode())).expect("publish");
    symlink(place.path("map"), place.path("link")).expect("symlink");
    refused(open(&place, &from, "link"), Refusal::InUse, "another copy is using it");
    drop(first);
    let through_link = open(&place, &from, "link").expect("free");
    through_link.publish(Some(&sample(&from, 3).encode())).expect("publish");
    drop(through_link);
    assert!(fs::symlink_metadata(place.path("link")).expect("link").is_symlink(), "the link stays");
    assert_eq!(open(&place, &from, "map").expect("again").map(), Some(&sample(&from, 3)));
}

/// Somebody removes the map of a copy under way, and begins another one with a map of that name.
#[test]
fn a_map_is_never_put_over_that_of_another_run() {
    let (place, from) = setup();
    let first = open(&place, &from, "map").expect("new");
    first.publish(Some(&sample(&from, 1).encode())).expect("publish");
    fs::remove_file(place.path("map")).expect("removed");
    first.publish(Some(&sample(&from, 2).encode())).expect("one that is gone is written anew");
    fs::remove_file(place.path("map")).expect("removed");
    let second = open(&place, &from, "map").expect("another");
    assert_eq!(first.publish(Some(&sample(&from, 3).encode())), Err(Errno::EEXIST));
    second.publish(Some(&sample(&from, 4).encode())).expect("publish");
    assert_eq!(first.publish(None), Err(Errno::EEXIST));
    drop((first, second));
    assert_eq!(place.names(), ["map", "source"]);
    assert_eq!(open(&place, &from, "map").expect("the second one's").map(), Some(&sample(&from, 4)));
}

#[test]
fn the_leftover_of_a_crash_is_overwritten() {
    let (place, from) = setup();
    let next = sample(&from, 2).encode();
    for written in [0, 5, 40, next.len() / 2, next.len()] {
        fs::write(place.path(TEMPORARY), &next[..written]).expect("leftover");
        let file = open(&place, &from, "map").expect("new");
        file.publish(Some(&sample(&from, 1).encode())).expect("publish");
        assert_eq!(place.names(), ["map", "source"], "after {written} bytes");
    }
}

#[test]
fn what_has_the_name_of_a_next_version_and_is_none_is_never_removed() {
    let (place, from) = setup();
    let notes = b"important notes, longer than the first line of a map";
    fs::write(place.path(TEMPORARY), notes).expect("write");
    let before = fingerprint(place.path(TEMPORARY));
    refused(open(&place, &from, "map"), Refusal::Exists, TEMPORARY);
    assert_eq!(place.names(), [TEMPORARY, "source"]);
    assert_eq!(fingerprint(place.path(TEMPORARY)), before);
    fs::remove_file(place.path(TEMPORARY)).expect("remove");
    // It comes after the map was opened: the map stays as it is.
    let file = open(&place, &from, "map").expect("new");
    file.publish(Some(&sample(&from, 1).encode())).expect("publish");
    fs::write(place.path(TEMPORARY), notes).expect("write");
    assert_eq!(file.publish(Some(&sample(&from, 2).encode())), Err(Errno::EEXIST));
    assert_eq!(fs::read(place.path(TEMPORARY)).expect("there"), notes);
    fs::remove_file(place.path(TEMPORARY)).expect("remove");
    drop(file);
    assert_eq!(open(&place, &from, "map").expect("again").map(), Some(&sample(&from, 1)));
    symlink(place.path("source"), place.path(TEMPORARY)).expect("symlink");
    refused(open(&place, &from, "map"), Refusal::Exists, TEMPORARY);
    assert!(fs::symlink_metadata(place.path(TEMPORARY)).expect("link").is_symlink(), "the link stays");
}

#[test]
fn a_disk_with_the_name_of_a_next_version_is_never_removed() {
    let place = Place::new();
    let from = source(place.file(TEMPORARY, MIB)).expect("source");
    let before = fingerprint(place.path(TEMPORARY));
    refused(open(&place, &from, "map"), Refusal::SameDisk, "which is the source of the copy");
    assert_eq!((place.names(), fingerprint(place.path(TEMPORARY))), (vec![TEMPORARY.to_owned()], before));
    let from = source(place.file("source", MIB)).expect("source");
    fs::remove_file(place.path(TEMPORARY)).expect("remove");
    let as_target = || MapFile::open(&place.path("map"), &from, &Locator::path(place.path(TEMPORARY)));
    refused(as_target(), Refusal::SameDisk, "which is the target of the copy");
    place.file(TEMPORARY, 0);
    refused(as_target(), Refusal::SameDisk, "which is the target of the copy");
    assert_eq!(place.names(), [TEMPORARY, "source"]);
    // Such a map would be taken for the leftover of another one.
    refused(open(&place, &from, TEMPORARY), Refusal::BadArgument, "no name for a map file");
}

#[test]
fn what_is_no_map_is_refused_and_untouched() {
    let (place, from) = setup();
    let good = sample(&from, 1).encode();
    let mut damaged = good.clone();
    *damaged.last_mut().expect("bytes") ^= 1;
    let cases: [(&[u8], &str); 5] = [
        (b"important notes", "it is not a map file"),
        (b"engine-cli map 7 x\n{}", "from a newer version (map format 7"),
        (&damaged, "it is damaged: its checksum does not match"),
        (&good[..good.len() / 2], "it is damaged"),
        (&frame(b"{}"), "it is damaged: missing field"),
    ];
    for (contents, words) in cases {
        fs::write(place.path("map"), contents).expect("write");
        let before = fingerprint(place.path("map"));
        map_refused(open(&place, &from, "map"), words);
        assert_eq!(fingerprint(place.path("map")), before);
    }
}

#[test]
fn a_map_in_an_impossible_place_is_refused() {
    let (place, from) = setup();
    refused(open(&place, &from, "no/where"), Refusal::NotFound, "does not exist");
    refused(open(&place, &from, ""), Refusal::BadArgument, "not a regular file");
    refused(open(&place, &from, "new/"), Refusal::BadArgument, "no name for a map file");
    refused(open(&place, &from, &"x".repeat(250)), Refusal::BadArgument, "no name for a map file");
    refused(open(&place, &from, "source"), Refusal::SameDisk, "it is the source of the copy");
    refused(open(&place, &from, "target"), Refusal::SameDisk, "it is the target of the copy");
    let before = fingerprint(place.file("target", 0));
    refused(open(&place, &from, "target"), Refusal::SameDisk, "it is the target of the copy");
    assert_eq!(fingerprint(place.path("target")), before);
    symlink(place.path("nothing"), place.path("dangling")).expect("symlink");
    refused(open(&place, &from, "dangling"), Refusal::NotFound, "symbolic link to nothing");
    assert_eq!(place.names(), ["dangling", "source", "target"]);
}
