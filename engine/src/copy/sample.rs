//! Whether the target holds what a map says, by a sample.
//!
//! A map knows its target by serial number or device number and by length. Two disks may have all of that in common (some
//! adapters give every disk the same serial number, and most sticks of one model have the same length), and what others wrote to
//! a target between two runs shows in none of it. So before a copy goes on, a few of the clusters that are done are read from
//! both sides: the first, the last, and some between, where the source has data if possible, since holes tell little. A difference
//! refuses the map, and nothing was touched. Equal samples prove nothing about the rest.
//!
//! What cannot be read cannot be compared. A failing source may have been readable there once, and that is no reason to copy all of it
//! again, so this is a notice. What the top layer of a source does not hold, where only that is copied, is done without being equal: no sample is
//! taken of it.

use crate::compare::Spots;
use crate::error::{Error, ErrorKind, Operation};
use crate::map::{Map, MapFile};
use crate::modes::SyncMode;
use crate::ring::ExtentQuery;
use crate::storage::{DiskId, OpenedSource, Storage, TargetPlan};
use crate::units::{ByteRange, ClusterIndex, ClusterRange};

/// Most clusters that are compared, the first and the last among them.
const MOST_SAMPLES: u64 = 18;
/// So many that cannot be read end it: each may take a failing disk its time.
const MOST_UNREADABLE: usize = 3;
/// How far behind a hole data is looked for.
const LOOK_AHEAD: u64 = 1 << 30;

/// Compare some of what `map` calls done; gives what the user should know.
///
/// # Errors
/// [`ErrorKind::MapRefused`] where source and target differ, or the target cannot be read at all.
pub(super) fn compare(
    map: &MapFile,
    source: &OpenedSource,
    target: &TargetPlan,
) -> Result<Option<String>, Error> {
    let (Some(found), Some(there)) = (map.map(), target.to_read()?) else { return Ok(None) };
    if source.identity().disk == DiskId::Null {
        return Ok(None);
    }
    let from = source.storage();
    let mut spots = Spots::new([from.as_ref(), there.as_ref()])?;
    let mut unreadable = Vec::new();
    for cluster in samples(found, from.as_ref()) {
        let range = found.header().geometry.bytes_of(ClusterRange::new(cluster.0, cluster.0 + 1));
        match spots.first_difference(range) {
            Ok(None) => {}
            Ok(Some(difference)) => return Err(refused(map, there.as_ref(), difference.offset)),
            Err(error) => unreadable.push(error),
        }
        if unreadable.len() == MOST_UNREADABLE {
            break;
        }
    }
    let told = |error: &Error| {
        format!("not all that map file {} says of {} could be compared: {error}", map.path(), there.name())
    };
    Ok(unreadable.first().map(told))
}

fn refused(map: &MapFile, target: &dyn Storage, offset: u64) -> Error {
    let name = target.name();
    let reason = format!(
        "the target does not hold what the map says: {name} was copied there, and differs from the source at byte {offset}"
    );
    Error::new(ErrorKind::MapRefused, Operation::UseMap, map.path(), reason).advise(
        "name the source and the target of the interrupted copy, or, if something else wrote to one of them, remove the map file and add --force \
         to copy everything again",
    )
}

/// The clusters to compare, ascending.
fn samples(map: &Map, source: &dyn Storage) -> Vec<ClusterIndex> {
    let header = map.header();
    let mut clusters: Vec<_> = spread(map.done())
        .into_iter()
        .filter_map(|rest| {
            let bytes = header.geometry.bytes_of(rest);
            let found = match header.sync {
                SyncMode::Top => first(source, bytes, ExtentQuery::TopLayer)?,
                SyncMode::Full | SyncMode::None => {
                    // Without an answer the sample is taken where it would have been.
                    first(source, bytes, ExtentQuery::Data).unwrap_or(bytes.offset)
                }
            };
            Some(header.geometry.cluster_at(found))
        })
        .collect();
    clusters.dedup();
    clusters
}

/// At most [`MOST_SAMPLES`] clusters of `done`, evenly spread, the first and the last among them; each with the rest of its range
/// behind it.
fn spread(done: &[ClusterRange]) -> Vec<ClusterRange> {
    let count: u64 = done.iter().map(|range| range.count()).sum();
    let samples = count.min(MOST_SAMPLES);
    let mut chosen = Vec::new();
    let (mut ranges, mut before) = (done.iter().peekable(), 0);
    for sample in 0..samples {
        let nth = if samples == 1 { 0 } else { sample * (count - 1) / (samples - 1) };
        while let Some(range) = ranges.next_if(|range| before + range.count() <= nth) {
            before += range.count();
        }
        let range = ranges.peek().expect("the nth of all lies in one of them");
        chosen.push(ClusterRange::new(range.start.0 + (nth - before), range.end.0));
    }
    chosen
}

/// Where `range` first has what `query` asks about, as far as its storage tells and within [`LOOK_AHEAD`].
fn first(source: &dyn Storage, range: ByteRange, query: ExtentQuery) -> Option<u64> {
    let ahead = ByteRange::new(range.offset, range.length.min(LOOK_AHEAD));
    let extents = source.extents(ahead, query, 2).ok()?;
    extents.iter().find(|extent| extent.present).map(|extent| extent.range.offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starts(done: &[(u64, u64)]) -> Vec<u64> {
        let done: Vec<_> = done.iter().map(|&(start, end)| ClusterRange::new(start, end)).collect();
        let chosen = spread(&done);
        for rest in &chosen {
            assert!(done.iter().any(|range| range.contains(rest.start) && range.end == rest.end));
        }
        chosen.iter().map(|rest| rest.start.0).collect()
    }

    #[test]
    fn samples_are_the_first_the_last_and_some_between() {
        assert_eq!(starts(&[]), [0; 0]);
        assert_eq!(starts(&[(7, 8)]), [7]);
        assert_eq!(starts(&[(7, 8), (9, 11)]), [7, 9, 10]);
        let many = starts(&[(5, 10), (1000, 1 << 40)]);
        assert_eq!(many.len() as u64, MOST_SAMPLES);
        assert_eq!((many[0], many[17]), (5, (1 << 40) - 1));
        assert!(many.is_sorted_by(|a, b| a < b), "{many:?}");
    }
}
