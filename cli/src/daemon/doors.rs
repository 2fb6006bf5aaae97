//! Where disks lie, and their ways into the engine.
//!
//! # Model
//! A [`Site`] is a path and what was there when its node was made. An [`Opening`] looks at a path and makes a disk of it; a [`Door`] opens that
//! disk on the engine, once for all who use it; [`Claims`] tell whether a path is one of the disks. All of this touches paths, which may not answer,
//! so it is for threads of its own (see `errands`); the control thread only looks whether a door is open.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::live::{DiskOptions, Engine, LiveDisk};
use engine::storage::share_bytes;

use super::same::identity;
use crate::qmp::QmpError;

/// Most bytes of a disk's path as it stands in a reply. The system takes 4,096; what it takes twice as much for is full of control characters.
pub(super) const MAX_PATH_TEXT: usize = 8 << 10;

fn generic<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

/// Where a disk lies.
#[derive(Clone, Debug)]
pub(super) struct Site {
    /// As the engine takes it.
    locator: String,
    /// What was there; nothing for `null-co`.
    found: Option<Arc<Metadata>>,
}

impl Site {
    /// Of a disk of `length` bytes with nothing behind it.
    pub(super) fn null(length: u64) -> Self {
        Self { locator: format!("null:{length}"), found: None }
    }

    pub(super) fn locator(&self) -> &str {
        &self.locator
    }

    /// The engine opens disks by their paths: what is there now must be what the node was made of.
    pub(super) fn check(&self) -> Result<(), QmpError> {
        let (path, Some(found)) = (&self.locator, &self.found) else { return Ok(()) };
        match std::fs::metadata(path) {
            Ok(now) if identity(&now) == identity(found) => Ok(()),
            Ok(_) => generic(format!("Could not open '{path}': another file has taken its place")),
            Err(error) => generic(format!("Could not open '{path}': {error}")),
        }
    }
}

/// The way of a disk into the engine, shared by all who use the disk.
#[derive(Debug)]
pub(super) struct Door {
    site: Site,
    writable: bool,
    /// Held while it is being opened, by threads that may wait.
    live: Mutex<Option<LiveDisk>>,
}

impl Door {
    pub(super) fn new(site: Site, writable: bool) -> Self {
        Self { site, writable, live: Mutex::new(None) }
    }

    /// The disk, if the door stands open. Waits for nobody.
    pub(super) fn opened(&self) -> Option<LiveDisk> {
        self.live.try_lock().ok()?.clone()
    }

    /// The disk on `engine`. Waits for the path, and for whoever else is opening it.
    pub(super) fn open(&self, engine: &Engine) -> Result<LiveDisk, QmpError> {
        let mut live: MutexGuard<'_, _> = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(live) = &*live {
            return Ok(live.clone());
        }
        self.site.check()?;
        let options = DiskOptions { path: self.site.locator.clone(), writable: self.writable };
        let opened = engine.open_disk(&options).map_err(|error| QmpError::generic(error.to_string()))?;
        Ok(live.insert(opened).clone())
    }
}

/// The files and devices of the daemon's disks, with the names of their nodes.
#[derive(Debug)]
pub(super) struct Claims(Vec<(Arc<Metadata>, String)>);

impl Claims {
    pub(super) fn new<'a>(disks: impl Iterator<Item = (&'a Site, &'a str)>) -> Self {
        Self(disks.filter_map(|(site, name)| Some((site.found.clone()?, name.to_owned()))).collect())
    }

    /// That whoever writes to the file or device at `path` writes to no disk from here. No disk of the daemon is overwritten because its path is
    /// given where no node is meant: nobody may use it at present, and then no lock would tell.
    pub(super) fn check(&self, path: &str, what_for: &str) -> Result<(), QmpError> {
        let Ok(sought) = std::fs::metadata(path) else { return Ok(()) };
        let find = |meets: &dyn Fn(&Metadata) -> bool| self.0.iter().find(|(found, _)| meets(found));
        let (name, is) = match find(&|found| identity(found) == identity(&sought)) {
            Some((_, name)) => (name, "is"),
            None => match find(&|found| share_bytes(found, &sought)) {
                Some((_, name)) => (name, "shares its bytes with"),
                None => return Ok(()),
            },
        };
        generic(format!("{path} {is} the daemon's disk '{name}'; choose another {what_for}"))
    }
}

/// What a node is to be made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) filename: String,
    pub(super) is_device: bool,
    pub(super) read_only: bool,
    /// For reading only where writing is not allowed.
    pub(super) auto_read_only: bool,
}

/// What was found there.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) site: Site,
    pub(super) length: u64,
    /// Kept open, so that the file is there for as long as the node is.
    pub(super) file: Kept,
    pub(super) read_only: bool,
}

/// A file that is closed in a thread of its own, whoever lets go of it: its server may want to be asked first. Where no thread is to be had it is closed
/// there and then.
#[derive(Debug)]
pub(super) struct Kept(Option<File>);

impl Kept {
    pub(super) fn new(file: File) -> Self {
        Self(Some(file))
    }

    /// See [`allocated`].
    pub(super) fn allocated(&self) -> Option<u64> {
        self.0.as_ref().and_then(allocated)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let file = self.0.take();
        // What cannot be started drops what it was given.
        std::thread::Builder::new().name("close".into()).spawn(move || drop(file)).ok();
    }
}

impl Opening {
    /// Open it, to see that it can be used so, and whether for reading only.
    pub(super) fn open(&self) -> Result<Opened, QmpError> {
        let filename = &self.filename;
        let failed = |error: std::io::Error| {
            let why = crate::out::strerror(nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0)));
            QmpError::generic(format!("Could not open '{filename}': {why}"))
        };
        // Looked at before it is opened: opening a pipe would wait for its other end.
        let found = std::fs::metadata(filename).map_err(failed)?;
        let kind = found.file_type();
        if found.is_dir() {
            return generic(format!("Could not open '{filename}': Is a directory"));
        }
        if self.is_device && !kind.is_block_device() {
            let text = format!(
                "'host_device' driver requires '{filename}' to be either a character or block device"
            );
            return generic(text);
        }
        if !self.is_device && !kind.is_file() {
            return generic(format!("'file' driver requires '{filename}' to be a regular file"));
        }
        let (mut file, read_only) = match self.open_file(!self.read_only) {
            Err(error) if self.auto_read_only && may_be_read_only(&error) => {
                (self.open_file(false).map_err(failed)?, true)
            }
            opened => (opened.map_err(failed)?, self.read_only),
        };
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let locator = std::path::absolute(filename).map_err(failed)?.to_string_lossy().into_owned();
        if serde_json::Value::from(locator.as_str()).to_string().len() > MAX_PATH_TEXT {
            return generic(format!("Could not open '{filename}': the path is too long to be told"));
        }
        let found = Some(Arc::new(file.metadata().map_err(failed)?));
        Ok(Opened { site: Site { locator, found }, length, file: Kept::new(file), read_only })
    }

    fn open_file(&self, write: bool) -> std::io::Result<File> {
        let mut options = OpenOptions::new();
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = options.read(true).write(write).custom_flags(flags).open(&self.filename)?;
        // Linux opens a read-only device for writing, and refuses the writes.
        if write && self.is_device && is_read_only_device(&file)? {
            return Err(std::io::Error::from_raw_os_error(libc::EACCES));
        }
        Ok(file)
    }
}

/// Bytes that an open file takes, as far as this host knows: a server is not asked, for it may not answer.
fn allocated(file: &File) -> Option<u64> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let (fd, path) = (file.as_raw_fd(), c"".as_ptr());
    // SAFETY: the path is a C string, and `found` has room for what is written to it; nothing is kept, and the descriptor is open.
    let done = unsafe { libc::statx(fd, path, flags, libc::STATX_BLOCKS, found.as_mut_ptr()) };
    // SAFETY: it is made of integers, for which all bits zero is a value, too.
    let found = unsafe { found.assume_init() };
    (done == 0 && found.stx_mask & libc::STATX_BLOCKS != 0).then(|| found.stx_blocks * 512)
}

/// Whether nothing can be written to a block device, however it was opened.
fn is_read_only_device(device: &File) -> std::io::Result<bool> {
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), libc::c_int);
    let mut flag: libc::c_int = 0;
    // SAFETY: BLKROGET writes one int to where the pointer leads, which is `flag`, and keeps nothing; the descriptor is open.
    unsafe { blkroget(device.as_raw_fd(), &raw mut flag) }?;
    Ok(flag != 0)
}

fn may_be_read_only(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
}
