//! Going on with an interrupted copy: only with the same source, unchanged, and the same target.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use engine::copy::SyncMode;
use engine::map::MapHeader;
use engine::storage::{Identity, OpenedSource, Resume, TargetOptions};
use engine::units::{ClusterSize, Geometry};

use crate::support::*;

fn header(source: &OpenedSource, target: &Identity) -> MapHeader {
    MapHeader {
        source: source.identity().clone(),
        target: target.clone(),
        geometry: Geometry::new(source.length(), ClusterSize::DEFAULT),
        sync: SyncMode::Full,
        verify: false,
        target_was_zero: true,
    }
}

fn resume(header: &MapHeader) -> TargetOptions<'_> {
    TargetOptions { resume: Some(Resume { header, map_path: "copy.map" }), ..TargetOptions::default() }
}

/// A copy that was interrupted after its first byte.
fn interrupted(place: &Place) -> MapHeader {
    let from = source(place.file("source", MIB)).expect("source");
    let to = target(place.path("target"), &from, &TargetOptions::default()).expect("target");
    to.storage().write_at(engine::ring::IoPath::Buffered, 0, b"s").expect("write");
    header(&from, to.identity())
}

#[test]
fn the_same_pair_goes_on_and_keeps_what_is_there() {
    let place = Place::new();
    let header = interrupted(&place);
    let from = source(place.path("source")).expect("source");
    let to = target(place.path("target"), &from, &resume(&header)).expect("target");
    assert!(to.known_zero() && !to.is_new_file());
    assert_eq!(fs::read(place.path("target")).expect("read")[..2], *b"s\0");
    assert_eq!(to.identity().difference_as_target(&header.target), None);
    drop(to);
    let not_zero = MapHeader { target_was_zero: false, ..header };
    let to = target(place.path("target"), &from, &resume(&not_zero)).expect("target");
    assert!(!to.known_zero());
}

#[test]
fn a_changed_source_is_refused() {
    let place = Place::new();
    let header = interrupted(&place);
    let before = fingerprint(place.path("target"));
    std::thread::sleep(std::time::Duration::from_millis(20));
    let file = fs::OpenOptions::new().write(true).open(place.path("source")).expect("open");
    file.write_all_at(b"S", 0).expect("write");
    let from = source(place.path("source")).expect("source");
    map_refused(plan(place.path("target"), &from, &resume(&header)), "modification time was");
    file.set_len(MIB - 1).expect("shrink");
    let from = source(place.path("source")).expect("source");
    map_refused(
        plan(place.path("target"), &from, &resume(&header)),
        "its length was 1048576 and is now 1048575",
    );
    assert_eq!(fingerprint(place.path("target")), before);
}

#[test]
fn another_source_of_the_same_length_is_refused() {
    let place = Place::new();
    let header = interrupted(&place);
    let from = source(place.file("other", MIB)).expect("source");
    map_refused(plan(place.path("target"), &from, &resume(&header)), "source");
}

#[test]
fn another_target_is_refused() {
    let place = Place::new();
    let header = interrupted(&place);
    let from = source(place.path("source")).expect("source");
    place.file("other", MIB);
    map_refused(plan(place.path("other"), &from, &resume(&header)), "inode number");
    fs::remove_file(place.path("target")).expect("remove");
    map_refused(plan(place.path("target"), &from, &resume(&header)), "does not exist any more");
    // Made again with the same name and length, often with the same inode: the birth time tells.
    place.file("target", MIB);
    map_refused(plan(place.path("target"), &from, &resume(&header)), "target");
}

#[test]
fn a_target_of_another_length_is_refused() {
    let place = Place::new();
    let header = interrupted(&place);
    let from = source(place.path("source")).expect("source");
    fs::OpenOptions::new()
        .write(true)
        .open(place.path("target"))
        .expect("open")
        .set_len(MIB + 5)
        .expect("length");
    map_refused(plan(place.path("target"), &from, &resume(&header)), "length");
    assert_eq!(fs::metadata(place.path("target")).expect("metadata").size(), MIB + 5);
}

#[test]
fn a_renamed_target_is_still_the_target() {
    let place = Place::new();
    let header = interrupted(&place);
    let from = source(place.path("source")).expect("source");
    fs::rename(place.path("target"), place.path("moved")).expect("rename");
    drop(target(place.path("moved"), &from, &resume(&header)).expect("target"));
}
