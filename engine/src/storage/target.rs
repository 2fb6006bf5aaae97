//! Opening the target of a copy, in two steps: everything that can be refused, then everything that changes something.
//!
//! # Order
//! [`plan_target`] looks, opens, claims and locks, and changes nothing: whatever it refuses is untouched.
//! [`TargetPlan::prepare`] then creates or empties the file and gives it the source's exact length; a new file's
//! directory entry is durable before any map can speak of it. A step of `prepare` that fails undoes what went before
//! it where that is possible: a new file is removed, and an existing one is lengthened before it is emptied, so that a
//! length which the file system cannot hold is refused with the old contents intact.
//!
//! # Rules
//! - An existing regular file is overwritten only with `force`, or to resume; one in which nothing is stored also to begin a copy
//!   with a map.
//! - A block device always exists and needs no `force`; it must be free: not mounted and not claimed (`O_EXCL`, which it
//!   then stays for everyone else), not under a loop device, not locked, writable, and large enough.
//! - A target that shares bytes with the source by whatever name is refused, `force` or not.
//!
//! `target_checks` has what [`plan_target`] looks at, for each kind of target.

#[path = "target_checks.rs"]
mod checks;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;

use super::identity::{DiskId, Identity};
use super::locator::{Locator, Place};
use super::open::{
    OpenedPair, OpenedSource, errno_of, no_live_nbd, refuse_format, refuse_non_disk, warn_of_buffered,
};
use super::prepare::{NewFile, NewPlace, create, empty, identify, lengthen, will_lengthen};
use super::topology::Node;
use super::{NullStorage, Storage};
use crate::error::{Error, ErrorKind, Operation, Refusal, Result};
use crate::job::TargetHolds;
use crate::map::MapHeader;
use crate::modes::Format;
use crate::units::Length;

/// How to open a target.
#[derive(Clone, Copy, Debug)]
pub struct TargetOptions<'a> {
    /// How the disk shall lie in its file or device.
    pub format: Format,
    /// Overwrite an existing file.
    pub force: bool,
    /// Overwrite what exists where it is, as on a device: a file keeps its length, its place on the disk, and what is not copied. It must
    /// exist.
    pub in_place: bool,
    /// The user says that the target reads as zeros. A new file does in any case.
    pub target_is_zero: bool,
    /// It will be read back.
    pub verify: bool,
    /// Take over an existing file in which nothing is stored (of no length, or of the source's, and without a block): what a copy leaves that
    /// was killed after it had created its target and before its first map. There is nothing in it to lose.
    pub take_over_blank: bool,
    /// Go on with the copy that a map file tells of.
    pub resume: Option<Resume<'a>>,
}

impl Default for TargetOptions<'_> {
    fn default() -> Self {
        Self {
            format: Format::Raw,
            force: false,
            in_place: false,
            target_is_zero: false,
            verify: false,
            take_over_blank: false,
            resume: None,
        }
    }
}

/// The copy to go on with.
#[derive(Clone, Copy, Debug)]
pub struct Resume<'a> {
    /// What the map file says about it.
    pub header: &'a MapHeader,
    /// The map file, for messages.
    pub map_path: &'a str,
}

/// A target that has passed every check and is not changed yet.
pub struct TargetPlan {
    locator: Locator,
    length: Length,
    known_zero: bool,
    state: Planned,
    warnings: Vec<String>,
}

enum Planned {
    Null { capacity: Length },
    Remote { storage: Arc<dyn Storage>, identity: Identity },
    Existing { path: PathBuf, pair: Box<OpenedPair>, identity: Identity, empty_it: bool },
    New(NewPlace),
}

impl std::fmt::Debug for TargetPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TargetPlan").field("locator", &self.locator).finish_non_exhaustive()
    }
}

/// A target that is ready to be written, at its final length.
pub struct OpenedTarget {
    storage: Arc<dyn Storage>,
    identity: Identity,
    known_zero: bool,
    new_file: Option<NewFile>,
    /// Its name, wherever the process goes meanwhile.
    path: Option<PathBuf>,
    warnings: Vec<String>,
}

impl std::fmt::Debug for OpenedTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenedTarget").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Check everything about the target of a copy of `source`. Changes nothing. (Of an export over NBD: [`super::plan_nbd`].)
///
/// # Errors
/// Refusals only; see the module's header.
pub fn plan_target(
    locator: &Locator,
    source: &OpenedSource,
    options: &TargetOptions<'_>,
) -> Result<TargetPlan> {
    refuse_format(Operation::OpenTarget, locator, options.format)?;
    let length = source.length();
    let known_zero = known_zero(source, options);
    let path = match locator.place() {
        Place::Nbd(_) => return Err(no_live_nbd(Operation::OpenTarget, locator)),
        Place::Null { length: capacity } => return checks::plan_null(locator, length, *capacity, options),
        Place::Path(path) => path,
    };
    let mut plan = TargetPlan {
        locator: locator.clone(),
        length,
        known_zero,
        state: Planned::Null { capacity: length },
        warnings: Vec::new(),
    };
    match std::fs::metadata(path) {
        Ok(seen) => {
            refuse_non_disk(Operation::OpenTarget, locator, &seen)?;
            checks::refuse_overlap(locator, source, &seen)?;
            plan.plan_existing(path, &seen, source, options)?;
        }
        Err(error) if errno_of(&error) == Errno::ENOENT => plan.plan_new(path, source, options)?,
        Err(error) => return Err(plan.refused_by_system(errno_of(&error))),
    }
    Ok(plan)
}

fn known_zero(source: &OpenedSource, options: &TargetOptions<'_>) -> bool {
    match options.resume {
        // A cluster that was written and not claimed may have been zeroed on a device since; a file would show that.
        Some(resume) => resume.header.target_was_zero && source.identity().shows_changes(),
        None => options.target_is_zero,
    }
}

impl TargetPlan {
    /// For a storage that is not of this machine, which was checked but for the copy to go on with.
    pub(super) fn remote(
        locator: &Locator,
        source: &OpenedSource,
        options: &TargetOptions<'_>,
        (storage, identity): (Arc<dyn Storage>, Identity),
        warnings: Vec<String>,
    ) -> Result<Self> {
        if let Some(resume) = &options.resume {
            checks::check_same_pair(resume, source.identity(), &identity)?;
        }
        let known_zero = known_zero(source, options);
        let state = Planned::Remote { storage, identity };
        Ok(Self { locator: locator.clone(), length: source.length(), known_zero, state, warnings })
    }

    /// Which disk it is; `None` for a file that does not exist yet.
    #[must_use]
    pub fn identity(&self) -> Option<&Identity> {
        match &self.state {
            Planned::Existing { identity, .. } | Planned::Remote { identity, .. } => Some(identity),
            Planned::Null { .. } | Planned::New(_) => None,
        }
    }

    /// Whether what is written there can be flushed to stable storage.
    pub(crate) fn can_be_flushed(&self) -> bool {
        match &self.state {
            Planned::Remote { storage, .. } => storage.can_be_flushed(),
            Planned::Existing { .. } | Planned::Null { .. } | Planned::New(_) => true,
        }
    }

    /// The file or device; `None` where there is none yet, or never.
    pub(super) fn node(&self) -> Option<Node> {
        match &self.state {
            Planned::Existing { pair, .. } => Some(Node::of(&pair.metadata)),
            Planned::Null { .. } | Planned::Remote { .. } | Planned::New(_) => None,
        }
    }

    /// Whether preparing it destroys what it holds now.
    pub(crate) fn destroys(&self) -> bool {
        matches!(&self.state, Planned::Existing { pair, empty_it: true, .. } if pair.metadata.len() > 0)
    }

    /// Whether preparing it changes a file that is there, which nothing undoes.
    pub(crate) fn leaves_a_mark(&self) -> bool {
        let Planned::Existing { pair, empty_it, .. } = &self.state else { return false };
        *empty_it || will_lengthen(pair, self.length)
    }

    /// See whether a file that is to be emptied can have its new length. Changes nothing.
    ///
    /// # Errors
    /// A refusal where it cannot.
    pub(crate) fn check_length(&self) -> Result<()> {
        match &self.state {
            Planned::Existing { pair, empty_it: true, .. } => {
                super::prepare::check_length(&self.locator, pair, self.length)
            }
            _ => Ok(()),
        }
    }

    /// Whether it is a file that is yet to be made at `path`.
    pub(super) fn will_be_at(&self, path: &Path) -> bool {
        let Planned::New(place) = &self.state else { return false };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let same_directory = place.directory.metadata().is_ok_and(|ours| {
            std::fs::metadata(parent)
                .is_ok_and(|theirs| (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
        });
        same_directory && path.file_name() == Some(place.name.as_os_str())
    }

    /// What the user should know, a line each.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// To read what is there already, if it stays; `None` for a target that will be empty.
    pub(crate) fn to_read(&self) -> Result<Option<Arc<dyn Storage>>> {
        let pair = match &self.state {
            Planned::Existing { pair, empty_it: false, .. } => pair,
            Planned::Remote { storage, .. } => return Ok(Some(Arc::clone(storage))),
            Planned::Null { .. } | Planned::Existing { .. } | Planned::New(_) => return Ok(None),
        };
        let again = pair.try_clone().map_err(|errno| self.refused_by_system(errno))?;
        again.into_storage(Operation::OpenTarget, &self.locator).map(Some)
    }

    /// Create or empty the target and give it its length. See the module's header.
    ///
    /// # Errors
    /// A refusal where nothing was changed or what was created is gone again, else an I/O error.
    pub fn prepare(self) -> Result<OpenedTarget> {
        let Self { locator, length, known_zero, state, mut warnings } = self;
        let (storage, identity, known_zero, new_file) = match state {
            Planned::Null { capacity } => {
                let storage: Arc<dyn Storage> = Arc::new(NullStorage::new(locator.as_str(), capacity));
                (storage, Identity::null(capacity), true, None)
            }
            Planned::Remote { storage, identity } => (storage, identity, known_zero, None),
            Planned::Existing { mut pair, identity, empty_it: false, .. } => {
                lengthen(&locator, &mut pair, length)?;
                (pair.into_storage(Operation::OpenTarget, &locator)?, identity, known_zero, None)
            }
            Planned::Existing { path, mut pair, empty_it: true, .. } => {
                empty(&locator, &pair, length)?;
                let identity = identify(&locator, &path, &mut pair, length)?;
                // It is not what it was: what fails now is no refusal.
                let failed =
                    |error| Error::io(Operation::Inspect, locator.as_str(), None, Errno::EIO).because(error);
                (pair.into_storage(Operation::OpenTarget, &locator).map_err(failed)?, identity, true, None)
            }
            Planned::New(place) => {
                let (pair, identity, new_file) = create(&locator, place, length)?;
                match pair.into_storage(Operation::OpenTarget, &locator) {
                    Ok(storage) => (storage, identity, true, Some(new_file)),
                    Err(error) => return Err(new_file.discard_after(&locator, error)),
                }
            }
        };
        assert!(storage.limits().length >= length, "a target that holds the source: checked or made so");
        warnings.extend(warn_of_buffered(&locator, storage.as_ref()));
        let path = match locator.place() {
            Place::Path(path) => Some(std::path::absolute(path).unwrap_or_else(|_| path.to_owned())),
            Place::Null { .. } | Place::Nbd(_) => None,
        };
        Ok(OpenedTarget { storage, identity, known_zero, new_file, path, warnings })
    }

    fn refused(&self, refusal: Refusal, reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        Error::refused(refusal, Operation::OpenTarget, self.locator.as_str(), reason)
    }

    fn refused_by_system(&self, errno: Errno) -> Error {
        Error::refused_by_system(Operation::OpenTarget, self.locator.as_str(), errno)
    }
}

impl OpenedTarget {
    /// To write it.
    #[must_use]
    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.storage)
    }

    /// Which disk it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether all that is not copied yet reads as zeros.
    #[must_use]
    pub fn known_zero(&self) -> bool {
        self.known_zero
    }

    /// What it holds where nothing is written. `goes_on`: with a copy that was interrupted, and may have written anywhere.
    #[must_use]
    pub fn holds_before(&self, goes_on: bool) -> TargetHolds {
        match self.storage.descriptors() {
            Some(_) if goes_on => TargetHolds::Unknown,
            Some(open) if open.block_device => TargetHolds::Unchanged,
            // A file that is not gone on with is new, or was emptied.
            Some(_) => TargetHolds::Zeros,
            None if matches!(self.identity.disk, DiskId::Nbd { .. }) && !goes_on => TargetHolds::Unchanged,
            None => TargetHolds::Unknown,
        }
    }

    /// Whether the file was created by this copy.
    #[must_use]
    pub fn is_new_file(&self) -> bool {
        self.new_file.is_some()
    }

    /// What the user should know, a line each, those of the plan included.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Whether its name still means the file that was written: what was removed, moved away or replaced is no copy, however well it
    /// was written. (A device cannot be lost that way.)
    ///
    /// # Errors
    /// [`ErrorKind::TargetLost`], or an I/O error when it cannot be asked.
    pub fn still_there(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let Some(open) = self.storage.descriptors().filter(|open| !open.block_device) else { return Ok(()) };
        let name = self.storage.name();
        let failed = |errno| Error::io(Operation::Inspect, name, None, errno);
        let lost =
            |reason: &'static str| Err(Error::new(ErrorKind::TargetLost, Operation::Copy, name, reason));
        let written = nix::sys::stat::fstat(open.buffered).map_err(failed)?;
        if written.st_nlink == 0 {
            return lost("it was removed or replaced while it was copied; the copy is lost");
        }
        match std::fs::metadata(path) {
            Ok(named) if (named.dev(), named.ino()) == (written.st_dev, written.st_ino) => Ok(()),
            Ok(_) => {
                lost("it was moved away and replaced while it was copied; what is there now is not the copy")
            }
            Err(error) if matches!(errno_of(&error), Errno::ENOENT | Errno::ENOTDIR) => {
                lost("it was removed or moved away while it was copied; the copy is not there any more")
            }
            Err(error) => Err(failed(errno_of(&error))),
        }
    }

    /// Remove the file if this copy created it and it still is the same: for a copy that failed and leaves no map.
    /// Returns whether it was removed. A target that existed before is never removed.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn discard_new_file(&self) -> Result<bool> {
        match &self.new_file {
            Some(file) => {
                file.discard().map_err(|errno| Error::io(Operation::Remove, self.storage.name(), None, errno))
            }
            None => Ok(false),
        }
    }
}
