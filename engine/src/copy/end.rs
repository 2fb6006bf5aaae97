//! The end of a copy, before anybody is told: whether source and target stayed what they were, and what is kept of target and map.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Operation, describe};
use crate::job::runner::AtEnd;
use crate::job::{JobResult, Outcome};
use crate::map::MapFile;
use crate::storage::{Document, OpenedSource, OpenedTarget, Published, source_unchanged};

/// What is to be done when the copy is over: a target that is gone or a source that changed makes it a failure and its map
/// useless, and a new target file of a copy that did not succeed and cannot go on is removed.
pub(super) fn at_end(source: OpenedSource, target: OpenedTarget, map: Option<Arc<MapFile>>) -> AtEnd {
    Box::new(move |result: &mut JobResult| {
        result.durable = target.storage().can_be_flushed();
        if let Some(map) = map.as_deref().filter(|map| result.resumable && !map.is_there()) {
            result.resumable = false;
            // A copy that is complete has nothing left to go on with, and has told what became of its map.
            if !is_complete(&result.outcome) {
                result.notices.push(format!("map file {} is gone: no run can go on from it", map.path()));
            }
        }
        if (is_complete(&result.outcome) || result.resumable)
            && let Err(error) = target.still_there()
            && judge_target(result, error) == MapIs::OfNoUse
        {
            result.notices.extend(map.as_deref().map(|map| forget_map(map, "the target is gone")));
        }
        let complete = is_complete(&result.outcome);
        let unchanged = if complete || result.resumable { source_unchanged(&source) } else { Ok(()) };
        if let Err(error) = unchanged {
            let shows_changes = source.identity().shows_changes();
            if judge(result, error, target.storage().name(), shows_changes) == MapIs::OfNoUse {
                result.notices.extend(map.as_deref().map(|map| forget_map(map, "the source has changed")));
            }
        }
        if !complete && !result.resumable {
            match target.discard_new_file() {
                Ok(true) => {
                    result.notices.push(format!("the partial file {} was removed", target.storage().name()));
                }
                Ok(false) => {}
                Err(error) => result.notices.push(error.to_string()),
            }
        }
        if !result.resumable {
            result.resumable_bytes = 0;
        }
        drop(map);
    })
}

fn is_complete(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Complete | Outcome::CompleteWithSkipped)
}

/// What becomes of the map of a copy that has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MapIs {
    /// It stays as it is.
    Kept,
    /// Every later run would refuse it.
    OfNoUse,
}

/// Make of the result what it is when asking for the target, at the end, gave `error`.
fn judge_target(result: &mut JobResult, error: Error) -> MapIs {
    let complete = is_complete(&result.outcome);
    if error.kind() != ErrorKind::TargetLost {
        if complete {
            result.notices.push(format!("cannot tell whether the target is still there: {error}"));
        } else {
            tracing::info!(%error, "whether the target is still there cannot be told");
        }
        return MapIs::Kept;
    }
    let map = if result.resumable { MapIs::OfNoUse } else { MapIs::Kept };
    result.resumable = false;
    if complete {
        result.outcome = Outcome::Failed(Arc::new(error));
    } else {
        result.notices.push(error.to_string());
    }
    map
}

/// Make of the result what it is when asking for the source, at the end, gave `error`.
fn judge(result: &mut JobResult, error: Error, target: &str, shows_changes: bool) -> MapIs {
    let complete = is_complete(&result.outcome);
    if error.kind() != ErrorKind::SourceChanged {
        // Everything was read and written without an error. That nobody answers now says nothing about what was copied.
        if complete {
            result.notices.push(format!("cannot tell whether the source changed: {error}"));
        } else {
            tracing::info!(%error, "whether the source has changed cannot be told");
        }
        return MapIs::Kept;
    }
    // A file was changed for certain: every later run would refuse the map. What is only out of reach (a device that dropped out has
    // no length) comes back, and the copy goes on.
    let map = if result.resumable && shows_changes { MapIs::OfNoUse } else { MapIs::Kept };
    if complete {
        result.notices.push(format!("{target} is kept, but may mix old and new contents"));
        result.outcome = Outcome::Failed(Arc::new(error));
        result.resumable = false;
    } else {
        tracing::info!(%error, ?map, "the source is not what it was");
        result.resumable &= map == MapIs::Kept;
    }
    map
}

/// Remove a map that every later run would refuse; says so.
fn forget_map(map: &MapFile, why: &str) -> String {
    let removed = || format!("{why}, so no run can go on from map file {}: it was removed", map.path());
    match map.publish(None) {
        Ok(Published::Durably) => removed(),
        Ok(Published::Unsynced(errno)) => format!(
            "{}, but its directory could not be synced: {}; after a power loss remove it by hand",
            removed(),
            describe(errno)
        ),
        Err(errno) => Error::io(Operation::Remove, map.path(), None, errno).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::errno::Errno;

    use super::*;
    use crate::job::runner::empty_progress;

    fn result(outcome: Outcome, resumable: bool) -> JobResult {
        JobResult {
            outcome,
            progress: empty_progress(1 << 20),
            skipped: Vec::new(),
            verified: false,
            durable: true,
            elapsed: Duration::ZERO,
            engine: "threads",
            resumable,
            resumable_bytes: 0,
            map_removed: false,
            guests: None,
            notices: Vec::new(),
        }
    }

    fn changed() -> Error {
        Error::new(ErrorKind::SourceChanged, Operation::Copy, "a", "its length changed")
    }

    #[test]
    fn a_source_that_cannot_be_asked_at_the_end_makes_no_failure() {
        for (errno, resumable) in [(Errno::EIO, false), (Errno::ESTALE, true)] {
            let error = Error::io(Operation::Inspect, "a", None, errno);
            let mut complete =
                result(if resumable { Outcome::CompleteWithSkipped } else { Outcome::Complete }, resumable);
            assert_eq!(judge(&mut complete, error, "b", true), MapIs::Kept);
            assert!(is_complete(&complete.outcome), "{complete:?}");
            assert_eq!(complete.resumable, resumable);
            let [notice] = &complete.notices[..] else { panic!("{complete:?}") };
            assert!(
                notice.starts_with("cannot tell whether the source changed: cannot inspect a: "),
                "{notice}"
            );
        }
    }

    #[test]
    fn a_target_that_is_gone_makes_a_failure_and_takes_a_map_with_it() {
        let lost = || Error::new(ErrorKind::TargetLost, Operation::Copy, "b", "it was removed");
        let mut complete = result(Outcome::Complete, false);
        assert_eq!(judge_target(&mut complete, lost()), MapIs::Kept);
        assert!(matches!(&complete.outcome, Outcome::Failed(error) if error.kind() == ErrorKind::TargetLost));
        for outcome in [Outcome::CompleteWithSkipped, Outcome::Cancelled] {
            let mut resumable = result(outcome, true);
            assert_eq!(judge_target(&mut resumable, lost()), MapIs::OfNoUse);
            assert!(!resumable.resumable && !is_complete(&resumable.outcome), "{resumable:?}");
        }
        let mut unknown = result(Outcome::Complete, false);
        let error = Error::io(Operation::Inspect, "b", None, Errno::EACCES);
        assert_eq!(judge_target(&mut unknown, error), MapIs::Kept);
        assert!(is_complete(&unknown.outcome) && unknown.notices.len() == 1);
    }

    #[test]
    fn a_source_that_changed_makes_a_failure_and_takes_a_map_with_it() {
        for (outcome, has_map) in [(Outcome::Complete, false), (Outcome::CompleteWithSkipped, true)] {
            for shows_changes in [true, false] {
                let mut ended = result(outcome.clone(), has_map);
                let map = judge(&mut ended, changed(), "b", shows_changes);
                assert_eq!(map == MapIs::OfNoUse, has_map && shows_changes);
                let Outcome::Failed(error) = &ended.outcome else { panic!("{ended:?}") };
                assert_eq!(error.kind(), ErrorKind::SourceChanged);
                assert!(!ended.resumable && ended.notices == ["b is kept, but may mix old and new contents"]);
            }
        }
        let mut cancelled = result(Outcome::Cancelled, true);
        assert_eq!(judge(&mut cancelled, changed(), "b", true), MapIs::OfNoUse);
        assert!(!cancelled.resumable && matches!(cancelled.outcome, Outcome::Cancelled));
        let mut dropped_out = result(Outcome::Cancelled, true);
        assert_eq!(judge(&mut dropped_out, changed(), "b", false), MapIs::Kept);
        assert!(dropped_out.resumable && dropped_out.notices.is_empty());
    }
}
