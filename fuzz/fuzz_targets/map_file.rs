//! A map file from anywhere: whatever the bytes, decoding ends without a panic and without memory beyond its bounds, and
//! what is accepted is written back as something that reads the same.
//!
//! The checksum stops nearly every mutated input at the first line; the first byte of the input therefore decides whether
//! the rest is a whole file or a body that gets the right first line.

#![no_main]

use engine::map::{Map, frame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((choice, rest)) = input.split_first() else { return };
    let decoded = if choice % 2 == 0 { Map::decode(rest) } else { Map::decode(&frame(rest)) };
    if let Ok(map) = decoded {
        assert_eq!(Map::decode(&map.encode()), Ok(map));
    }
});
