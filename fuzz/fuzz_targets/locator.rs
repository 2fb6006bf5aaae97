//! What a user writes for a disk, a size, a speed or a cluster size: whatever the text, parsing it ends without a panic,
//! and what is accepted is within its bounds and means the same when written out in full.

#![no_main]

use engine::storage::locator::{Locator, Place, parse_cluster_size, parse_size, parse_speed};
use engine::units::MAX_LENGTH;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(length) = parse_size(text) {
        assert!(length.0 <= MAX_LENGTH);
        assert_eq!(parse_size(&length.0.to_string()).ok(), Some(length));
    }
    if let Ok(speed) = parse_speed(text) {
        assert!(speed.0.get() <= MAX_LENGTH);
        assert_eq!(parse_speed(&format!("{}/s", speed.0)).ok(), Some(speed));
    }
    if let Ok(cluster) = parse_cluster_size(text) {
        assert!(cluster.bytes().is_power_of_two() && (4 << 10..=4 << 20).contains(&cluster.bytes()));
    }
    if let Ok(locator) = Locator::parse(text) {
        assert_eq!(locator.as_str(), text);
        match locator.place() {
            Place::Path(path) => assert_eq!(path.as_os_str(), text),
            Place::Nbd(uri) => assert!(uri.export.len() <= 4096 && !text.starts_with("nbds")),
            Place::Null { length } => assert!(length.is_none_or(|length| length.0 <= MAX_LENGTH)),
        }
    }
});
