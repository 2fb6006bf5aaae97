//! A map comes back as it was written; whatever else a file holds is refused, without a panic: a map that is believed
//! wrongly loses data silently.

use proptest::prelude::*;

use super::*;
use crate::storage::{DiskId, FileTime};

pub(super) fn identity(length: u64, inode: u64) -> Identity {
    let time = FileTime(1_700_000_000, 123_456_789);
    let disk = DiskId::File {
        device: 64_769,
        file_system: Some(7),
        inode,
        born: Some(time),
        modified: time,
        changed: time,
    };
    Identity { path: format!("/disks/{inode}.img"), length, disk }
}

pub(super) fn header(length: u64) -> MapHeader {
    MapHeader {
        source: identity(length, 1),
        target: identity(length, 2),
        geometry: Geometry::new(Length(length), ClusterSize::DEFAULT),
        sync: SyncMode::Full,
        verify: true,
        target_was_zero: true,
    }
}

fn sample() -> Map {
    let done = vec![ClusterRange::new(0, 5), ClusterRange::new(6, 9)];
    Map::new(header(1 << 20), done, vec![ClusterRange::new(5, 6)]).expect("a map")
}

/// Any valid map: a disk cut into runs that are done, skipped or neither.
fn maps() -> impl Strategy<Value = Map> {
    let runs = proptest::collection::vec((1_u64..1000, 0_u8..3), 0..60);
    let disk = prop_oneof![
        Just(DiskId::Null),
        ("\\PC{0,20}", "\\PC{0,20}").prop_map(|(server, export)| DiskId::Nbd { server, export }),
        (any::<u64>(), proptest::option::of("\\PC{0,20}")).prop_map(|(number, serial)| {
            let attachment = serial.is_none().then(|| ("boot".to_owned(), number.to_string()));
            DiskId::Device { number, serial, attachment }
        }),
    ];
    (runs, 0_u64..65536, 12_u32..23, any::<(bool, bool, bool)>(), disk, "\\PC{0,40}").prop_map(
        |(runs, tail, shift, (verify, zero, top), disk, path)| {
            let cluster = ClusterSize::new(1 << shift).expect("within bounds");
            let (mut at, mut done, mut skipped) = (0, Vec::new(), Vec::new());
            for (count, kind) in runs {
                let range = ClusterRange::new(at, at + count);
                match kind {
                    0 => done.push(range),
                    1 => skipped.push(range),
                    _ => {}
                }
                at += count;
            }
            let length = at * cluster.bytes() + tail;
            let mut header = header(length);
            header.geometry = Geometry::new(Length(length), cluster);
            header.sync = if top { SyncMode::Top } else { SyncMode::Full };
            (header.verify, header.target_was_zero) = (verify, zero);
            header.target = Identity { path, length: length + 512, disk };
            Map::new(header, done, skipped).expect("valid by construction")
        },
    )
}

proptest! {
    #[test]
    fn a_map_comes_back_as_it_was(map in maps()) {
        prop_assert_eq!(Map::decode(&map.encode()), Ok(map));
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Map::decode(&bytes).is_err());
        prop_assert!(Map::decode(&frame(&bytes)).is_err());
        let with_magic = [MAGIC.as_bytes(), &bytes].concat();
        prop_assert!(Map::decode(&with_magic).is_err());
    }

    #[test]
    fn numbers_behind_a_right_checksum_are_checked(
        starts in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..4),
        length in any::<u64>(), cluster in any::<u64>(),
    ) {
        let text = String::from_utf8(sample().encode()).expect("text");
        let (_, body) = text.split_once('\n').expect("two lines");
        let ranges: Vec<_> = starts.iter().map(|(start, end)| format!("[{start},{end}]")).collect();
        let body = body.replace("[[0,5],[6,9]]", &format!("[{}]", ranges.join(",")));
        if let Ok(map) = Map::decode(&frame(body.as_bytes())) {
            prop_assert_eq!(Map::decode(&map.encode()), Ok(map));
        }
        for (name, value) in [("\"length\":1048576,\"cluster", length), ("\"cluster_size\":65536", cluster)] {
            let (key, _) = name.split_once(':').expect("a key");
            let tail = if name.ends_with("cluster") { ",\"cluster" } else { "" };
            prop_assert!(body.contains(name));
            drop(Map::decode(&frame(body.replace(name, &format!("{key}:{value}{tail}")).as_bytes())));
        }
    }
}

#[test]
fn the_damage_of_any_single_byte_is_refused() {
    let good = sample().encode();
    for at in 0..good.len() {
        for flip in 1..=u8::MAX {
            let mut bad = good.clone();
            bad[at] ^= flip;
            assert!(Map::decode(&bad).is_err(), "byte {at} ^ {flip:#x}");
        }
    }
}

#[test]
fn a_map_cut_off_anywhere_or_with_a_tail_is_refused() {
    let good = sample().encode();
    for length in 0..good.len() {
        assert!(Map::decode(&good[..length]).is_err(), "{length} bytes");
    }
    assert!(Map::decode(&[&good[..], b"\n"].concat()).is_err());
}

#[test]
fn refusals_say_what_is_wrong() {
    assert_eq!(Map::decode(b"[package]\nname = \"x\"\n"), Err(MapError::NotAMap));
    assert_eq!(Map::decode(b"engine-cli map 2 whatever\n{}"), Err(MapError::NewerVersion(2)));
    assert_eq!(Map::decode(&vec![0; MAX_BYTES + 1]), Err(MapError::TooLarge));
    let text = String::from_utf8(sample().encode()).expect("text");
    let body = text.split_once('\n').expect("two lines").1;
    let refused = |body: &str| Map::decode(&frame(body.as_bytes())).expect_err("refused").to_string();
    assert!(refused(&body.replacen("{\"source\"", "{\"extra\":1,\"source\"", 1)).contains("unknown field"));
    assert!(refused(&body.replace("[5,6]", "[4,6]")).contains("both done and skipped"));
    assert!(refused(&body.replace("[6,9]", "[6,17]")).contains("beyond the end"));
    assert!(refused(&body.replace("[6,9]", "[4,9]")).contains("not in order"));
    assert!(refused(&body.replace("[6,9]", "[6,6]")).contains("empty"));
    assert!(refused(&body.replace("[6,9]", "[9,6]")).contains("backwards"));
    assert!(refused(&"[".repeat(1 << 20)).contains("damaged"));
}

#[test]
fn too_many_ranges_are_left_out_when_written_and_refused_when_read() {
    let count = MAX_RANGES as u64 + 10;
    let header = header(count * 2 * 65536);
    let every_other = (0..count).map(|index| ClusterRange::new(index * 2, index * 2 + 1)).collect();
    let map = Map::new(header, every_other, Vec::new()).expect("a map");
    assert_eq!(map.done().len(), MAX_RANGES);
    let bytes = map.encode();
    assert!(Map::decode(&bytes).is_ok());
    let text = String::from_utf8(bytes).expect("text");
    let body = text.split_once('\n').expect("two lines").1;
    let more = body.replace(r#"]],"skipped""#, r#"],[1048590,1048591]],"skipped""#);
    assert_ne!(more, body);
    assert!(matches!(Map::decode(&frame(more.as_bytes())), Err(MapError::Invalid(_))));
}

#[test]
fn options_must_be_those_of_the_first_run() {
    let header = MapHeader { verify: false, ..header(1 << 20) };
    let check = |cluster: u64, length: u64, sync, verify| {
        let cluster = ClusterSize::new(cluster).expect("cluster");
        header.check_options(Geometry::new(Length(length), cluster), sync, verify, "a.map")
    };
    check(65536, 1 << 20, SyncMode::Full, false).expect("the same");
    for (result, hint) in [
        (check(4096, 1 << 20, SyncMode::Full, false), "--cluster-size 64K"),
        (check(65536, 1 << 21, SyncMode::Full, false), "remove the map file"),
        (check(65536, 1 << 20, SyncMode::Top, false), "--sync full"),
        (check(65536, 1 << 20, SyncMode::Full, true), "without --verify"),
    ] {
        let error = result.expect_err(hint);
        assert!(error.is_refusal() && error.kind() == ErrorKind::MapRefused, "{error}");
        assert!(error.to_string().contains(hint), "{error}");
    }
}
