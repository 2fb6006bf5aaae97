//! QEMU's image locking: which programs may have a disk open at the same time.
//!
//! # Model
//! Whoever opens a disk says of every [`Permission`] whether it uses it, and whether it lets others use it. Each of these is a lock on one byte:
//! 100 + n for "I use permission n", 200 + n for "I do not share it". They are read locks: they never exclude each other, and need no
//! right to write. What excludes is that everybody looks whether somebody else has said the opposite. What we say goes by our [`Role`]:
//!
//! | role | uses | does not share | |
//! |---|---|---|---|
//! | source | read | write, resize | what others write to is of no one instant |
//! | forced source | read | | the user wants it all the same; or it is a live disk whose embedder has locks of its own |
//! | live disk | read, write | write, resize | also one that is open for reading: its embedder writes, under our permits |
//! | target | write, resize | read, write, resize | it is neither the old disk nor the new one |
//!
//! A target holds all bytes outside of the protocol's exclusively besides, the others one far byte of these together. So it
//! excludes whoever locks in another way, and copies know each other.
//!
//! # Order
//! 1. *Look.* What is in use is refused without a lock having been set: whoever waits for a disk does not get in the way of its user, who may
//!    be looking, too.
//! 2. *Say*: set our locks.
//! 3. *Look again.* Of two who say at the same time, each sees the other: both may be refused, but never do both pass.
//! 4. Refused: let go of everything, and try again while there is patience.
//!
//! # Letting go
//! The locks are of the description, and the kernel lets go of a description that a ring had some time after the ring has. [`Announced`]
//! therefore unlocks the protocol's bytes itself: a virtual machine that starts when a copy has ended finds the disk free. It lies in the
//! storage, which is there for as long as an operation on it may be in flight.
//!
//! A device lies on other devices and files, which have locks of their own. They are looked at, and not locked: two disks side by side on one
//! device do not exclude each other.

use std::fs::File;
use std::path::PathBuf;

use nix::errno::Errno;
use serde::Serialize;

use super::lock::{self, Bytes, Kind, Lock};
use super::topology::{self, Node};
use crate::error::{Error, Operation, Refusal, Result};

/// Byte 100 + n: permission n is used.
const USED: i64 = 100;
/// Byte 200 + n: permission n is not shared.
const NOT_SHARED: i64 = 200;
/// The first byte behind those of the protocol.
const BEHIND: i64 = 300;
/// All bytes of the protocol.
const PROTOCOL: Bytes = Bytes { start: USED, length: BEHIND - USED };
/// All other bytes.
const OUTSIDE: [Bytes; 2] = [Bytes { start: 0, length: USED }, Bytes { start: BEHIND, length: 0 }];
/// The byte of [`OUTSIDE`], far beyond any disk, that all but targets lock together.
const TOGETHER: Bytes = Bytes::one(1 << 62);

/// What a program may do with a disk that matters to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Permission {
    /// Read what makes sense: no copy under way.
    ConsistentRead,
    /// Write.
    Write,
    /// Change the length.
    Resize,
}

impl Permission {
    /// What matters most to somebody who is refused comes first.
    const ALL: [Self; 3] = [Self::Write, Self::Resize, Self::ConsistentRead];

    fn number(self) -> i64 {
        match self {
            Self::ConsistentRead => 0,
            Self::Write => 1,
            Self::Resize => 3,
        }
    }

    fn used(self) -> Bytes {
        Bytes::one(USED + self.number())
    }

    fn not_shared(self) -> Bytes {
        Bytes::one(NOT_SHARED + self.number())
    }
}

/// As what a disk is opened. See the module's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Source,
    ForcedSource,
    LiveDisk,
    Target,
}

impl Role {
    fn uses(self) -> &'static [Permission] {
        match self {
            Self::Source | Self::ForcedSource => &[Permission::ConsistentRead],
            Self::LiveDisk => &[Permission::Write, Permission::ConsistentRead],
            Self::Target => &[Permission::Write, Permission::Resize],
        }
    }

    fn does_not_share(self) -> &'static [Permission] {
        match self {
            Self::Source | Self::LiveDisk => &[Permission::Write, Permission::Resize],
            Self::ForcedSource => &[],
            Self::Target => &Permission::ALL,
        }
    }

    /// What it locks outside of the protocol's bytes.
    fn outside(self) -> (Kind, &'static [Bytes]) {
        match self {
            Self::Target => (Kind::Exclusive, &OUTSIDE),
            Self::Source | Self::ForcedSource | Self::LiveDisk => (Kind::Shared, &[TOGETHER]),
        }
    }
}

/// What somebody else holds that excludes a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Conflict {
    /// A lock that is not the protocol's: a copy's, or that of a program with another way of locking.
    Locked,
    /// It uses what the role does not share.
    Uses(Permission),
    /// It does not share what the role uses.
    DoesNotShare(Permission),
}

/// How taking a disk ended.
#[derive(Debug)]
pub(super) enum Taken {
    /// It is ours in that role.
    Held(Announced),
    /// Somebody else has it.
    Refused(Conflict),
    /// The file system has no locks.
    Unsupported,
}

/// A disk that others know to be in use. Dropped, it is free for those who lock as QEMU does.
#[derive(Debug)]
pub(super) struct Announced(File);

impl Drop for Announced {
    fn drop(&mut self) {
        if let Err(errno) = lock::unset(&self.0, PROTOCOL) {
            tracing::debug!(%errno, "a disk stays locked until its descriptors are gone");
        }
    }
}

/// Take a disk, with patience for those who are just ending.
pub(super) fn take(file: &File, role: Role) -> std::result::Result<Taken, Errno> {
    lock::patiently(|| attempt(file, role), |outcome| matches!(outcome, Ok(Taken::Refused(_))))
}

/// The error for who is refused.
pub(super) fn refusal(operation: Operation, name: &str, role: Role, conflict: Conflict) -> Error {
    Error::refused(Refusal::InUse, operation, name, reason(role, conflict)).advise(advice(role, conflict))
}

/// Refuse a device that lies on something which excludes the role.
pub(super) fn refuse_used_beneath(operation: Operation, name: &str, node: Node, role: Role) -> Result<()> {
    let Some((path, conflict)) = lock::patiently(|| conflict_beneath(node, role), Option::is_some) else {
        return Ok(());
    };
    let reason = format!("{}, on which it lies, is in use: {}", path.display(), reason(role, conflict));
    Err(Error::refused(Refusal::InUse, operation, name, reason).advise(advice(role, conflict)))
}

/// What others use of a disk and what they do not share, as far as they say.
pub(super) fn of_others(file: &File) -> (Vec<Permission>, Vec<Permission>) {
    let held = |bytes: fn(Permission) -> Bytes| {
        let is_held = |permission: &Permission| {
            lock::obstacle(file, Kind::Exclusive, bytes(*permission)).is_ok_and(|found| found.is_some())
        };
        Permission::ALL.into_iter().filter(is_held).collect()
    };
    (held(Permission::used), held(Permission::not_shared))
}

fn conflict_beneath(node: Node, role: Role) -> Option<(PathBuf, Conflict)> {
    let conflict_at = |(path, file): (PathBuf, File)| match look(&file, role) {
        Ok(conflict) => conflict.map(|conflict| (path, conflict)),
        Err(errno) => {
            tracing::debug!(%errno, path = %path.display(), "its locks cannot be seen");
            None
        }
    };
    topology::beneath(node).into_iter().find_map(conflict_at)
}

/// See the module's header for the order.
fn attempt(file: &File, role: Role) -> std::result::Result<Taken, Errno> {
    if let Some(conflict) = look(file, role)? {
        return Ok(Taken::Refused(conflict));
    }
    let announced = Announced(file.try_clone().map_err(|error| super::open::errno_of(&error))?);
    let said = say(file, role);
    let outcome = match said {
        Ok(Lock::Held) => look(file, role).map(|conflict| conflict.map(Taken::Refused)),
        Ok(Lock::Busy) => Ok(Some(Taken::Refused(Conflict::Locked))),
        Ok(Lock::Unsupported) => Ok(Some(Taken::Unsupported)),
        Err(errno) => Err(errno),
    };
    if matches!(outcome, Ok(None)) {
        return Ok(Taken::Held(announced));
    }
    // What is left outside of the protocol's bytes; where there are no locks there is nothing to let go of.
    let let_go = lock::unset(file, Bytes::ALL);
    match outcome? {
        Some(Taken::Unsupported) | None => Ok(Taken::Unsupported),
        Some(refused) => let_go.map(|()| refused),
    }
}

fn say(file: &File, role: Role) -> std::result::Result<Lock, Errno> {
    let (kind, outside) = role.outside();
    let outside = outside.iter().map(|&bytes| (kind, bytes));
    let used = role.uses().iter().map(|permission| (Kind::Shared, permission.used()));
    let not_shared = role.does_not_share().iter().map(|permission| (Kind::Shared, permission.not_shared()));
    for (kind, bytes) in outside.chain(used).chain(not_shared) {
        match lock::set(file, kind, bytes)? {
            Lock::Held => {}
            other => return Ok(other),
        }
    }
    Ok(Lock::Held)
}

fn look(file: &File, role: Role) -> std::result::Result<Option<Conflict>, Errno> {
    let (kind, outside) = role.outside();
    for &bytes in outside {
        if lock::obstacle(file, kind, bytes)?.is_some() {
            return Ok(Some(Conflict::Locked));
        }
    }
    for permission in Permission::ALL {
        let opposites = [
            (role.does_not_share(), permission.used(), Conflict::Uses(permission)),
            (role.uses(), permission.not_shared(), Conflict::DoesNotShare(permission)),
        ];
        for (ours, bytes, conflict) in opposites {
            if ours.contains(&permission)
                && let Some(found) = lock::obstacle(file, Kind::Exclusive, bytes)?
                && !is_harmless(role, found)
            {
                return Ok(Some(conflict));
            }
        }
    }
    Ok(None)
}

/// A lock for reading beyond the protocol's bytes says nothing in its terms, only that somebody reads. Where it stands, nobody sees
/// what else is said there: good enough for those alone who want to read come what may.
fn is_harmless(role: Role, (kind, bytes): (Kind, Bytes)) -> bool {
    let within = bytes.start >= USED && bytes.length != 0 && bytes.start + bytes.length <= BEHIND;
    role == Role::ForcedSource && kind == Kind::Shared && !within
}

fn reason(role: Role, conflict: Conflict) -> &'static str {
    match conflict {
        Conflict::Locked if role == Role::Target => "another copy or a running machine has it locked",
        Conflict::Locked => "another copy is writing to it",
        Conflict::Uses(Permission::Write) => {
            "another program has it open for writing, a running virtual machine for example"
        }
        Conflict::Uses(Permission::Resize) => "another program may change its length",
        Conflict::Uses(Permission::ConsistentRead) => "another program is reading it",
        Conflict::DoesNotShare(Permission::Write) => {
            "another program has it open and lets nobody write to it, a copy or a running virtual machine for example"
        }
        Conflict::DoesNotShare(Permission::Resize) => {
            "another program has it open and lets nobody change its length, a running virtual machine for example"
        }
        Conflict::DoesNotShare(Permission::ConsistentRead) => {
            "another program has it open and lets nobody read it, since its contents make no sense yet"
        }
    }
}

fn advice(role: Role, conflict: Conflict) -> &'static str {
    match (role, conflict) {
        (Role::Target, _) => "wait until that has ended, or choose another target",
        (Role::Source, Conflict::Uses(Permission::Write | Permission::Resize)) => {
            "stop it first, or add --force-share to read the disk while it may change"
        }
        (Role::LiveDisk, Conflict::Uses(_)) => "stop it first",
        _ => "wait until that has ended",
    }
}

#[cfg(test)]
#[path = "sharing_tests.rs"]
mod tests;
