//! What a target must pass before anything of it is changed, for each kind: a device, an existing file, a new one, none at all.
//!
//! Nothing in here changes anything, but for the locks that a target holds from here on. The rules are those of the parent's header.

use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, faccessat};

use super::{Planned, Resume, TargetOptions, TargetPlan};
use crate::error::{Error, ErrorKind, Operation, Refusal, Result};
use crate::storage::identity::Identity;
use crate::storage::locator::Locator;
use crate::storage::lock::{self, Lock};
use crate::storage::open::{Access, OpenedPair, OpenedSource, length_of, no_length, open_both};
use crate::storage::prepare::{NewPlace, open_directory};
use crate::storage::sharing::{self, Role, Taken};
use crate::storage::topology::{self, Node};
use crate::storage::{place, sys};
use crate::units::Length;

/// What lengths of disks are multiples of, if their last sector is made whole.
const SECTOR: u64 = 512;

impl TargetPlan {
    /// For one that exists.
    pub(super) fn plan_existing(
        &mut self,
        path: &Path,
        seen: &Metadata,
        source: &OpenedSource,
        options: &TargetOptions<'_>,
    ) -> Result<()> {
        let is_device = seen.file_type().is_block_device();
        let blank =
            seen.blocks() == 0 && (seen.len() == 0 || seen.len() == self.length.0) && holds_nothing(path);
        let may_take =
            options.force || options.in_place || options.resume.is_some() || options.take_over_blank && blank;
        if !is_device && !may_take {
            return Err(self
                .refused(Refusal::Exists, "it exists already")
                .advise("overwrite it with --force, or choose another name"));
        }
        let access = if is_device { Access::Claim } else { Access::Write };
        let mut pair = open_both(Operation::OpenTarget, &self.locator, path, seen, access).map_err(
            |error| match error.kind() {
                ErrorKind::Refused(Refusal::InUse) if is_device => self
                    .refused(Refusal::InUse, "it is mounted, or in use by another device or copy (EBUSY)")
                    .advise("unmount it and stop what uses it (see lsblk), then try again")
                    .because(Errno::EBUSY),
                _ => error,
            },
        )?;
        if is_device {
            self.check_device(&pair)?;
        } else {
            self.check_file_size_limit()?;
        }
        self.check_unused(&mut pair, is_device)?;
        let size =
            length_of(&pair.buffered, &pair.metadata).map_err(|errno| self.refused_by_system(errno))?;
        if options.in_place && !is_device {
            self.check_length_in_place(size)?;
            self.known_zero |= blank && size == self.length.0;
        }
        let identity = Identity::of(path, &pair.buffered, &pair.metadata, Length(size), is_device);
        if let Some(resume) = &options.resume {
            check_same_pair(resume, source.identity(), &identity)?;
        }
        if !is_device {
            let taken = seen.blocks() * 512;
            self.warn_of_space(source, &pair.buffered, taken);
        }
        let empty_it = !is_device && options.resume.is_none() && !options.in_place;
        self.state = Planned::Existing { path: path.to_owned(), pair: Box::new(pair), identity, empty_it };
        Ok(())
    }

    fn check_device(&mut self, pair: &OpenedPair) -> Result<()> {
        let fd = pair.buffered.as_fd();
        if sys::is_read_only(fd).map_err(|errno| self.refused_by_system(errno))? {
            return Err(self
                .refused(Refusal::ReadOnly, "the device is read-only")
                .advise("make it writable (blockdev --setrw), or choose another device"));
        }
        let size = sys::device_length(fd).map_err(|errno| self.refused_by_system(errno))?;
        if size == 0 {
            return Err(no_length(Operation::OpenTarget, &self.locator));
        }
        if size < self.length.0 {
            return Err(self.too_small(size));
        }
        if size > self.length.0 {
            self.warnings.push(format!(
                "{}: the device is larger than the source; its last {} stay as they are",
                self.locator,
                Length(size - self.length.0)
            ));
        }
        Ok(())
    }

    /// A last sector that is not all there counts: it is made whole when the target is prepared.
    fn check_length_in_place(&mut self, size: u64) -> Result<()> {
        if size.next_multiple_of(SECTOR) < self.length.0 {
            return Err(self.too_small(size));
        }
        if size > self.length.0 {
            let rest = Length(size - self.length.0);
            let path = &self.locator;
            self.warnings
                .push(format!("{path}: it is larger than the source; its last {rest} stay as they are"));
        }
        Ok(())
    }

    fn too_small(&self, size: u64) -> Error {
        self.refused(
            Refusal::TooSmall,
            format!("its {size} bytes are fewer than the source's {}", self.length.0),
        )
        .advise("choose a larger target")
    }

    fn check_unused(&mut self, pair: &mut OpenedPair, is_device: bool) -> Result<()> {
        let (operation, node) = (Operation::OpenTarget, Node::of(&pair.metadata));
        if let Some(device) = topology::loop_device_on(node) {
            let device = device.to_string_lossy();
            return Err(self
                .refused(Refusal::InUse, format!("the loop device {device} is attached to it"))
                .advise(format!("detach it with `losetup -d {device}`, or name {device} as the target")));
        }
        sharing::refuse_used_beneath(operation, self.locator.as_str(), node, Role::Target)?;
        match sharing::take(&pair.buffered, Role::Target).map_err(|errno| self.refused_by_system(errno))? {
            Taken::Held(announced) => pair.announced = Some(announced),
            Taken::Refused(conflict) => {
                return Err(sharing::refusal(operation, self.locator.as_str(), Role::Target, conflict));
            }
            Taken::Unsupported => self.warn_of_no_locks(),
        }
        let for_udev = is_device.then(|| lock::keep_udev_off(&pair.buffered)).transpose();
        match for_udev.map_err(|errno| self.refused_by_system(errno))? {
            None | Some(Lock::Held) => {}
            Some(Lock::Busy) => {
                return Err(self
                    .refused(Refusal::InUse, "another copy or a running machine has it locked")
                    .advise("wait until that has ended, or choose another target"));
            }
            Some(Lock::Unsupported) => self.warn_of_no_locks(),
        }
        Ok(())
    }

    fn warn_of_no_locks(&mut self) {
        self.warnings.push(format!(
            "{}: its file system has no locks; make sure that nothing else writes to it",
            self.locator
        ));
    }

    /// For one that does not exist yet.
    pub(super) fn plan_new(
        &mut self,
        path: &Path,
        source: &OpenedSource,
        options: &TargetOptions<'_>,
    ) -> Result<()> {
        if let Some(resume) = &options.resume {
            let of = &resume.header.target.path;
            let reason = if is_named(path, of) {
                format!("its target {} does not exist any more", self.locator)
            } else {
                format!("it belongs to a copy to another target, {of}, and {} does not exist", self.locator)
            };
            return Err(map_refused(resume, reason));
        }
        if options.in_place {
            return Err(self.refused(Refusal::NotFound, "it does not exist"));
        }
        if std::fs::symlink_metadata(path).is_ok() {
            return Err(self
                .refused(Refusal::NotFound, "it is a symbolic link to nothing")
                .advise("remove the link, or name the file itself"));
        }
        let name = match path.file_name() {
            Some(name) if !self.locator.as_str().ends_with('/') => name.to_owned(),
            _ => {
                return Err(self
                    .refused(Refusal::NotFound, "there is no such directory, and a directory is no target")
                    .advise("name a file or a block device"));
            }
        };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let no_device =
            || self.refused(Refusal::NotFound, "there is no such device").advise("check the name with lsblk");
        if place::is_named_for_devices(parent) {
            return Err(no_device());
        }
        let directory = open_directory(parent).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR => self
                .refused(Refusal::NotFound, format!("the directory {} does not exist", parent.display()))
                .advise("create it first, or check the path")
                .because(errno),
            _ => self.refused_by_system(errno),
        })?;
        if place::holds_devices(&directory) {
            return Err(no_device());
        }
        let needed = AccessFlags::W_OK | AccessFlags::X_OK;
        faccessat(&directory, ".", needed, AtFlags::AT_EACCESS)
            .map_err(|errno| self.refused_by_system(errno))?;
        self.check_file_size_limit()?;
        self.warn_of_space(source, &directory, 0);
        if place::is_in_memory(&directory) {
            self.warnings.push(format!("{} is in memory: it does not survive a restart", self.locator));
        }
        let mode = source.mode_of_copy();
        self.state = Planned::New(NewPlace { directory, name, path: path.to_owned(), mode });
        Ok(())
    }

    /// Writing beyond this limit would raise a signal in the middle of the copy.
    fn check_file_size_limit(&self) -> Result<()> {
        use nix::sys::resource::{Resource, getrlimit};
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE).map_err(|errno| self.refused_by_system(errno))?;
        if limit >= self.length.0 {
            return Ok(());
        }
        Err(self
            .refused(
                Refusal::TooLarge,
                format!(
                    "the source's {} bytes are beyond this process's limit on file sizes ({limit})",
                    self.length.0
                ),
            )
            .advise("raise the limit with ulimit -f"))
    }

    fn warn_of_space(&mut self, source: &OpenedSource, place: &File, taken: u64) {
        // An estimate for a warning: where the file system does not tell, there is none.
        let Ok(vfs) = nix::sys::statvfs::fstatvfs(place) else { return };
        let free = vfs.blocks_available().saturating_mul(vfs.fragment_size()).saturating_add(taken);
        let needed = source.expected_allocation();
        if needed > free {
            self.warnings.push(format!(
                "{}: the copy takes about {} and there is room for {}",
                self.locator,
                Length(needed),
                Length(free)
            ));
        }
    }
}

/// Whether a file has no data in it, as its file system tells. (Some report no blocks for small contents.)
fn holds_nothing(path: &Path) -> bool {
    let seek = |file: File| nix::unistd::lseek(&file, 0, nix::unistd::Whence::SeekData);
    File::open(path).is_ok_and(|file| seek(file) == Err(Errno::ENXIO))
}

/// A target that keeps nothing.
pub(super) fn plan_null(
    locator: &Locator,
    length: Length,
    capacity: Option<Length>,
    options: &TargetOptions<'_>,
) -> Result<TargetPlan> {
    let capacity = capacity.unwrap_or(length);
    let warnings = Vec::new();
    let state = Planned::Null { capacity };
    let plan = TargetPlan { locator: locator.clone(), length, known_zero: true, state, warnings };
    if capacity < length {
        return Err(plan.too_small(capacity.0));
    }
    let unsupported = match options {
        TargetOptions { verify: true, .. } => "a null target keeps nothing that could be verified",
        TargetOptions { resume: Some(_), .. } => "a null target keeps nothing that a copy could go on with",
        _ => return Ok(plan),
    };
    Err(plan.refused(Refusal::Unsupported, unsupported).advise("leave out that option or name a real target"))
}

/// Refuse a target that is the source, or lies on it.
pub(super) fn refuse_overlap(locator: &Locator, source: &OpenedSource, target: &Metadata) -> Result<()> {
    let (Some(from), to) = (source.node(), Node::of(target)) else { return Ok(()) };
    let reason = if from == to {
        format!("it is the same disk as the source {}", source.storage().name())
    } else if topology::overlap(from, to) {
        format!("it shares its bytes with the source {}", source.storage().name())
    } else {
        return Ok(());
    };
    Err(Error::refused(Refusal::SameDisk, Operation::OpenTarget, locator.as_str(), reason)
        .advise("name two different disks"))
}

pub(super) fn check_same_pair(resume: &Resume<'_>, source: &Identity, target: &Identity) -> Result<()> {
    let sides = [
        ("source", resume.header.source.difference_as_source(source), source),
        ("target", resume.header.target.difference_as_target(target), target),
    ];
    for (side, difference, disk) in sides {
        if let Some(difference) = difference {
            return Err(map_refused(
                resume,
                format!("the {side} {} is not the one of the interrupted copy: {difference}", disk.path),
            ));
        }
    }
    Ok(())
}

/// Whether what does not exist at `path` would be found there as `resolved`.
fn is_named(path: &Path, resolved: &str) -> bool {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (Ok(parent), Some(name)) = (std::fs::canonicalize(parent), path.file_name()) else { return false };
    parent.join(name) == Path::new(resolved)
}

fn map_refused(resume: &Resume<'_>, reason: String) -> Error {
    Error::new(ErrorKind::MapRefused, Operation::UseMap, resume.map_path, reason)
        .advise("name the same source and target as before, or the map of this copy, or remove the map file and add --force to copy everything again")
}
