//! Every length around the borders of sectors and clusters: the result is exact, and nothing beyond it is touched.

use std::fs::{self, File};
use std::io::{Read, Write};

use crate::kernel::{LoopDevice, is_root};
use crate::support::{dense, directory, same};
use crate::{KIB, MIB, copied};

const LENGTHS: [usize; 17] = [
    0,
    1,
    511,
    512,
    513,
    4 * KIB - 1,
    4 * KIB,
    4 * KIB + 1,
    64 * KIB - 1,
    64 * KIB,
    64 * KIB + 1,
    64 * KIB + 512,
    MIB - 1,
    MIB,
    MIB + 1,
    MIB + 512,
    MIB + 4 * KIB,
];

const OPTIONS: [&[&str]; 4] = [
    &[],
    &["--verify"],
    &["--io-engine", "threads"],
    &["--io-engine", "threads", "--verify", "--no-zero-detect"],
];

#[test]
fn file_to_file() {
    for length in LENGTHS {
        let there = directory();
        let place = there.path();
        dense(&place.join("a"), length, 0);
        for options in OPTIONS {
            fs::write(place.join("b"), vec![0xee; 70_000]).expect("written");
            let messages = copied(place, &[options, &["--force", "a", "b"]].concat());
            assert!(same(&place.join("a"), &place.join("b")), "{length} {options:?}");
            assert_eq!(messages.lines().count(), 1, "the summary alone: {messages}");
        }
    }
}

#[test]
fn sparse_file_to_file() {
    for length in LENGTHS {
        let there = directory();
        let place = there.path();
        let file = File::create(place.join("a")).expect("created");
        file.set_len(length as u64).expect("set");
        if length > 0 {
            std::os::unix::fs::FileExt::write_all_at(&file, b"x", length as u64 - 1).expect("written");
        }
        for options in OPTIONS {
            copied(place, &[options, &["--force", "a", "b"]].concat());
            assert!(same(&place.join("a"), &place.join("b")), "{length} {options:?}");
        }
    }
}

#[test]
fn file_to_device_leaves_the_rest_of_the_device() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    let disk = 2 * MIB;
    fs::write(place.join("disk"), vec![0; disk]).expect("written");
    let device = LoopDevice::over(&place.join("disk"));
    for length in LENGTHS {
        dense(&place.join("a"), length, 0);
        let mut expected = fs::read(place.join("a")).expect("read");
        expected.resize(disk, 0xee);
        for options in OPTIONS {
            let mut file = File::options().write(true).open(device.path()).expect("open");
            file.write_all(&vec![0xee; disk]).and_then(|()| file.sync_all()).expect("filled");
            drop(file);
            let messages = copied(place, &[options, &["a", device.text()]].concat());
            let mut found = Vec::new();
            File::open(device.path()).expect("open").read_to_end(&mut found).expect("read");
            assert!(found == expected, "{length} {options:?}");
            assert!(messages.contains("stay as they are"), "{messages}");
        }
    }
}

#[test]
fn device_to_file_and_device_to_device() {
    if !is_root() {
        return;
    }
    let there = directory();
    let place = there.path();
    // A device has whole sectors: an odd end of its file does not show.
    for length in [512, 4 * KIB + 512, 64 * KIB, MIB + 512] {
        dense(&place.join("a"), length, 0);
        fs::write(place.join("disk"), vec![0xee; length]).expect("written");
        let (from, to) = (LoopDevice::over(&place.join("a")), LoopDevice::over(&place.join("disk")));
        copied(place, &["--verify", "--force", from.text(), "b"]);
        copied(place, &["--verify", from.text(), to.text()]);
        drop((from, to));
        assert!(
            same(&place.join("a"), &place.join("b")) && same(&place.join("a"), &place.join("disk")),
            "{length}"
        );
    }
}

#[test]
fn extreme_clusters_and_depths() {
    let there = directory();
    let place = there.path();
    for length in [1, 4 * KIB + 1, 4 * MIB + 513, 9 * MIB] {
        dense(&place.join("a"), length, 0);
        for options in [
            &["--cluster-size", "4K"][..],
            &["--cluster-size", "4M"],
            &["--queue-depth", "1"],
            &["--queue-depth", "1", "--cluster-size", "4M", "--verify"],
            &["--queue-depth", "1", "--cluster-size", "4K", "--io-engine", "threads"],
            &["--cluster-size", "4K", "--queue-depth", "2000"],
            &["--sync", "top"],
        ] {
            copied(place, &[options, &["--force", "a", "b"]].concat());
            assert!(same(&place.join("a"), &place.join("b")), "{length} {options:?}");
        }
    }
}
