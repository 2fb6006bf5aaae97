//! The map file: what an interrupted copy has done already, so that the next run goes on from there.
//!
//! # Model
//! A [`Map`] is a [`MapHeader`] (which source, which target, cut how, copied how) and two lists of cluster ranges: those
//! that are *done*, which is a claim that their data is on the target's stable storage, and those that were *skipped*
//! because they could not be copied. What is in neither list, and what was skipped, is copied by the next run.
//! Claiming too little is always right: a map that would grow beyond its limit leaves ranges out.
//!
//! # Format
//! A line of text, `engine-cli map 1 <XXH3-128 of the rest, in hexadecimal>`, then JSON. Every byte is covered by the
//! checksum or compared as it is, so a damaged map is refused, whatever the damage. A map is hostile input: its size, its
//! lists and every number in it are bounded before they are believed.
//!
//! # Order
//! The set of done clusters is captured, then the target is flushed, then the map is published ([`MapFile`] replaces
//! it atomically and durably). [`MapFile::open`] changes nothing of an existing map.

mod file;

use std::fmt;

use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeSeq, Serializer};
use xxhash_rust::xxh3::xxh3_128;

pub use file::MapFile;

use crate::error::{Error, ErrorKind, Operation, Result};
use crate::modes::SyncMode;
use crate::storage::Identity;
use crate::units::{ClusterRange, ClusterSize, Geometry, Length, MAX_LENGTH};

/// Largest map file in bytes.
pub const MAX_BYTES: usize = 64 << 20;
/// Most ranges in each of the two lists; with the longest numbers both fit into [`MAX_BYTES`].
pub const MAX_RANGES: usize = 512 << 10;

const MAGIC: &str = "engine-cli map ";
const VERSION: u32 = 1;
/// Hexadecimal digits of the checksum.
const CHECKSUM_DIGITS: usize = 32;
/// No first line of any version is longer.
const MAX_FIRST_LINE: usize = 128;

/// Which copy a map belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapHeader {
    /// The source when the copy began.
    pub source: Identity,
    /// The target, prepared.
    pub target: Identity,
    /// Length of the source and size of the clusters.
    pub geometry: Geometry,
    /// What the copy covers.
    pub sync: SyncMode,
    /// Whether everything done was verified.
    pub verify: bool,
    /// Whether the target read as zeros when the copy began.
    pub target_was_zero: bool,
}

impl MapHeader {
    /// Whether a run with these options can go on with the copy that the map at `map_path` tells of. (Source and target
    /// are compared by [`crate::storage::plan_target`].)
    ///
    /// # Errors
    /// [`ErrorKind::MapRefused`], with what to do.
    pub fn check_options(
        &self,
        geometry: Geometry,
        sync: SyncMode,
        verify: bool,
        map_path: &str,
    ) -> Result<()> {
        let refused = |reason: String, advice: String| {
            Err(Error::new(ErrorKind::MapRefused, Operation::UseMap, map_path, reason).advise(advice))
        };
        let anew = "or remove the map file and add --force to copy everything again";
        let (then, now) = (self.geometry, geometry);
        if then.cluster_size() != now.cluster_size() {
            let (then, now) = (then.cluster_size().bytes() >> 10, now.cluster_size().bytes() >> 10);
            return refused(
                format!("the copy began with clusters of {then} KiB, not {now} KiB"),
                format!("go on with --cluster-size {then}K, {anew}"),
            );
        }
        if then.length() != now.length() {
            return refused(
                format!("the source had {} bytes and now has {}", then.length().0, now.length().0),
                "remove the map file and add --force to copy everything again".to_owned(),
            );
        }
        if self.sync != sync {
            return refused(
                format!("the copy began with --sync {}, not {}", option_of(self.sync), option_of(sync)),
                format!("go on with --sync {}, {anew}", option_of(self.sync)),
            );
        }
        if verify && !self.verify {
            return refused(
                "the copy began without --verify, so what is done already was not verified".to_owned(),
                format!("go on without --verify (and compare source and target at the end), {anew}"),
            );
        }
        Ok(())
    }
}

/// As the option `--sync` takes it.
fn option_of(sync: SyncMode) -> &'static str {
    match sync {
        SyncMode::Full => "full",
        SyncMode::Top => "top",
        SyncMode::None => "none",
    }
}

/// What is wrong with the bytes of a map file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Larger than any map.
    #[error("it is larger than any map file")]
    TooLarge,
    /// Some other file.
    #[error("it is not a map file")]
    NotAMap,
    /// Written by a later version.
    #[error("it is from a newer version (map format {0}; this version reads up to {VERSION})")]
    NewerVersion(u32),
    /// Its checksum does not match, or it is cut off.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// Its checksum matches and its contents make no sense.
    #[error("it is damaged: {0}")]
    Invalid(String),
}

/// What a copy has done. See the module's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    header: MapHeader,
    done: Vec<ClusterRange>,
    skipped: Vec<ClusterRange>,
}

impl Map {
    /// A map of clusters `done` and `skipped`. Of lists beyond [`MAX_RANGES`] the rest is left out: claimed by nobody.
    ///
    /// # Errors
    /// [`MapError::Invalid`] unless both lists ascend without empty ranges or overlaps, lie on the disk and share no
    /// cluster, and the disks' lengths agree.
    pub fn new(
        header: MapHeader,
        mut done: Vec<ClusterRange>,
        mut skipped: Vec<ClusterRange>,
    ) -> std::result::Result<Self, MapError> {
        done.truncate(MAX_RANGES);
        skipped.truncate(MAX_RANGES);
        let map = Self { header, done, skipped };
        map.check().map_err(|what| MapError::Invalid(what.to_owned()))?;
        Ok(map)
    }

    /// Which copy it belongs to.
    #[must_use]
    pub fn header(&self) -> &MapHeader {
        &self.header
    }

    /// Clusters whose data is on the target's stable storage, ascending.
    #[must_use]
    pub fn done(&self) -> &[ClusterRange] {
        &self.done
    }

    /// Clusters that could not be copied, ascending.
    #[must_use]
    pub fn skipped(&self) -> &[ClusterRange] {
        &self.skipped
    }

    fn check(&self) -> std::result::Result<(), &'static str> {
        let MapHeader { source, target, geometry, .. } = &self.header;
        if source.length != geometry.length().0 || target.length < source.length {
            return Err("the lengths of source and target do not agree");
        }
        let clusters = geometry.clusters().0;
        for list in [&self.done, &self.skipped] {
            if list.iter().any(|range| range.start >= range.end) {
                return Err("a range is empty");
            }
            if list.windows(2).any(|pair| pair[0].end > pair[1].start) {
                return Err("the ranges are not in order");
            }
            if list.last().is_some_and(|range| range.end.0 > clusters) {
                return Err("a range lies beyond the end of the disk");
            }
        }
        let (mut done, mut skipped) = (self.done.iter().peekable(), self.skipped.iter().peekable());
        while let (Some(one), Some(other)) = (done.peek(), skipped.peek()) {
            if one.start < other.end && other.start < one.end {
                return Err("a cluster is both done and skipped");
            }
            if one.end <= other.start {
                done.next()
            } else {
                skipped.next()
            };
        }
        Ok(())
    }

    /// The bytes of the map file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let MapHeader { source, target, geometry, sync, verify, target_was_zero } = &self.header;
        let wire = WireOut {
            source,
            target,
            length: geometry.length().0,
            cluster_size: geometry.cluster_size().bytes(),
            sync: *sync,
            verify: *verify,
            target_was_zero: *target_was_zero,
            done: Ranges(&self.done),
            skipped: Ranges(&self.skipped),
        };
        let mut body = serde_json::to_vec(&wire).expect("numbers, strings and lists always serialise");
        body.push(b'\n');
        let bytes = frame(&body);
        assert!(bytes.len() <= MAX_BYTES, "a map within its limits is within its size");
        bytes
    }

    /// The map in the bytes of a map file.
    ///
    /// # Errors
    /// Whatever is wrong with them; see [`MapError`].
    pub fn decode(bytes: &[u8]) -> std::result::Result<Self, MapError> {
        let wire: WireIn = serde_json::from_slice(checked_body(bytes)?)
            .map_err(|error| MapError::Invalid(error.to_string()))?;
        let invalid = |what: &str| MapError::Invalid(what.to_owned());
        let cluster = ClusterSize::new(wire.cluster_size).ok_or_else(|| invalid("no such cluster size"))?;
        if wire.length > MAX_LENGTH {
            return Err(invalid("no disk is that long"));
        }
        let header = MapHeader {
            source: wire.source,
            target: wire.target,
            geometry: Geometry::new(Length(wire.length), cluster),
            sync: wire.sync,
            verify: wire.verify,
            target_was_zero: wire.target_was_zero,
        };
        Self::new(header, wire.done.0, wire.skipped.0)
    }
}

/// The body of a map file as a whole map file. For the encoder, and for fuzzing what lies behind the checksum.
#[doc(hidden)]
#[must_use]
pub fn frame(body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{MAGIC}{VERSION} {:032x}\n", xxh3_128(body)).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// What lies behind the first line, after that line has been checked.
fn checked_body(bytes: &[u8]) -> std::result::Result<&[u8], MapError> {
    if bytes.len() > MAX_BYTES {
        return Err(MapError::TooLarge);
    }
    let rest = bytes.strip_prefix(MAGIC.as_bytes()).ok_or(MapError::NotAMap)?;
    let cut = rest.iter().take(MAX_FIRST_LINE).position(|&byte| byte == b'\n');
    let (line, body) = rest.split_at(cut.ok_or(MapError::Damaged("its first line is cut off"))?);
    let bad_line = MapError::Damaged("its first line makes no sense");
    let line = str::from_utf8(line).map_err(|_| bad_line.clone())?;
    let (version, checksum) = line.split_once(' ').ok_or(bad_line.clone())?;
    let number: u32 = version.parse().map_err(|_| bad_line.clone())?;
    if number > VERSION {
        return Err(MapError::NewerVersion(number));
    }
    // One spelling alone is right, so that no byte of the line can change unnoticed.
    if version != VERSION.to_string() || checksum.len() != CHECKSUM_DIGITS {
        return Err(bad_line);
    }
    let body = &body[1..];
    if checksum != format!("{:032x}", xxh3_128(body)) {
        return Err(MapError::Damaged("its checksum does not match"));
    }
    Ok(body)
}

/// [`SyncMode`] as the file spells it, whatever the code will call it.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(remote = "SyncMode", rename_all = "snake_case")]
enum WireSync {
    Full,
    Top,
    None,
}

#[derive(serde::Serialize)]
struct WireOut<'a> {
    source: &'a Identity,
    target: &'a Identity,
    length: u64,
    cluster_size: u64,
    #[serde(with = "WireSync")]
    sync: SyncMode,
    verify: bool,
    target_was_zero: bool,
    done: Ranges<&'a [ClusterRange]>,
    skipped: Ranges<&'a [ClusterRange]>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct WireIn {
    source: Identity,
    target: Identity,
    length: u64,
    cluster_size: u64,
    #[serde(with = "WireSync")]
    sync: SyncMode,
    verify: bool,
    target_was_zero: bool,
    done: Ranges<Vec<ClusterRange>>,
    skipped: Ranges<Vec<ClusterRange>>,
}

/// A list of ranges, `[[start, end], …]` in JSON; never longer than [`MAX_RANGES`].
struct Ranges<T>(T);

impl Serialize for Ranges<&[ClusterRange]> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.len()))?;
        for range in self.0 {
            list.serialize_element(&[range.start.0, range.end.0])?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for Ranges<Vec<ClusterRange>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Vec<ClusterRange>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_RANGES} ranges of clusters")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Self::Value, A::Error> {
                use serde::de::Error as _;
                let mut ranges = Vec::new();
                while let Some([start, end]) = list.next_element::<[u64; 2]>()? {
                    if start > end {
                        return Err(A::Error::custom("a range runs backwards"));
                    }
                    if ranges.len() == MAX_RANGES {
                        return Err(A::Error::invalid_length(MAX_RANGES + 1, &self));
                    }
                    ranges.push(ClusterRange::new(start, end));
                }
                Ok(ranges)
            }
        }
        deserializer.deserialize_seq(List).map(Self)
    }
}

#[cfg(test)]
mod tests;
