//! Nodes: the disks that the daemon knows by name, and who uses them.
//!
//! # Model
//! As in QEMU there are two kinds: nodes with a file or device (or nothing) behind them, and `raw` nodes over one of those. What counts for
//! I/O is the *disk* at the bottom; all nodes over it share it. A disk is opened on the engine when the first job or export uses it, and
//! leaves it with the last: a node that nobody uses holds no lock and no memory of the engine, so that it may be the target of a job.
//!
//! # Rules
//! - A disk is the source of any number of jobs and the bottom of any number of exports, or the target of one job, never both.
//! - A node that is used, or that another stands on, stays. What goes with its job, a filter, is nothing to stand on.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use engine::live::{DiskOptions, Engine, Latencies, LiveDisk};
use engine::storage::share_bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::same::identity;
use crate::qmp::{Arguments, QmpError};

/// Most nodes.
const MAX_NODES: usize = 1024;
/// Most bytes of a node's name.
const MAX_NODE_NAME: usize = 31;
/// Length of `null-co` without a size.
const NULL_LENGTH: u64 = 1 << 30;
/// Lengths are told apart in these units.
pub(super) const SECTOR: u64 = 512;

/// What `blockdev-add` takes; checked before, its depth too: each level is put aside as a whole before it is decoded.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct NodeOptions {
    driver: String,
    node_name: Option<String>,
    discard: Option<String>,
    cache: Option<CacheOptions>,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    auto_read_only: bool,
    filename: Option<String>,
    locking: Option<String>,
    aio: Option<String>,
    file: Option<FileReference>,
    size: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
struct CacheOptions {
    #[serde(default)]
    direct: bool,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum FileReference {
    Name(String),
    Options(Box<NodeOptions>),
}

/// The bottom of a node.
struct Disk {
    /// As the engine takes it.
    locator: String,
    length: u64,
    /// Kept open, so that the file is there for as long as the node is; nothing for `null-co`.
    file: Option<File>,
    live: Option<LiveDisk>,
    /// Jobs that copy it and exports that show it.
    readers: usize,
    /// The job that writes to it.
    target: bool,
}

enum Kind {
    Disk(Disk),
    /// A raw node over the node of that name.
    Raw(String),
    /// The name that a job's filter has, over its source.
    Filter(String),
}

struct Node {
    name: String,
    driver: &'static str,
    read_only: bool,
    direct: bool,
    /// Whether guests may give space back, as far as this node goes.
    trim: bool,
    /// Made along with the node over it, and gone with it.
    implicit: bool,
    exports: usize,
    kind: Kind,
}

/// See the module's header.
#[derive(Default)]
pub(super) struct Nodes {
    /// In the order in which they were added.
    nodes: Vec<Node>,
    made_up: u64,
}

/// Whether `name` is a name by QEMU's rule for nodes, jobs and exports.
pub(super) fn is_well_formed(name: &str) -> bool {
    let mut letters = name.chars();
    letters.next().is_some_and(|first| first.is_ascii_alphabetic())
        && letters.all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '.' | '_'))
}

fn generic<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

/// That a job uses a node.
pub(super) fn busy(name: &str) -> QmpError {
    QmpError::generic(format!("Node '{name}' is busy: block device is in use by block job: backup"))
}

impl Nodes {
    /// `blockdev-add`.
    pub(super) fn add(&mut self, arguments: &Arguments) -> Result<(), QmpError> {
        let options: NodeOptions = serde_json::from_value(Value::Object(arguments.clone()))
            .map_err(|error| QmpError::generic(error.to_string()))?;
        if options.node_name.is_none() {
            return generic("'node-name' must be specified for the root node");
        }
        let before = self.nodes.len();
        let added = self.add_node(options, false);
        if added.is_err() {
            // Those made along with it go, too.
            self.nodes.truncate(before);
        }
        added.map(drop)
    }

    /// Add a raw disk by its path, as `--disk` does.
    pub(super) fn add_path(&mut self, name: &str, path: &str) -> Result<(), QmpError> {
        let is_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        let file = json!({ "driver": if is_device { "host_device" } else { "file" }, "filename": path });
        let node = json!({ "driver": "raw", "node-name": name, "auto-read-only": true, "file": file });
        self.add(node.as_object().expect("an object"))
    }

    fn add_node(&mut self, mut options: NodeOptions, implicit: bool) -> Result<String, QmpError> {
        if self.nodes.len() >= MAX_NODES {
            return generic(format!("{MAX_NODES} nodes are the most; delete some"));
        }
        let direct = options.cache.as_ref().is_some_and(|cache| cache.direct);
        let mut read_only = options.read_only;
        let (driver, kind) = match options.driver.as_str() {
            "raw" => {
                let file = options.file.take().ok_or_else(|| missing("file"))?;
                let below = self.add_below(file, &options)?;
                read_only |= self.get(&below)?.read_only;
                ("raw", Kind::Raw(below))
            }
            "null-co" => ("null-co", Kind::Disk(null_disk(options.size)?)),
            driver => {
                if options.aio.as_deref() == Some("native") && !direct {
                    let text =
                        "aio=native was specified, but it requires cache.direct=on, which was not specified.";
                    return generic(text);
                }
                if options.locking.as_deref() == Some("off") {
                    return generic("Parameter 'locking': \"off\" is not supported");
                }
                let filename = options.filename.as_deref().ok_or_else(|| missing("filename"))?;
                let is_device = driver == "host_device";
                let (disk, opened_read_only) = open_disk(filename, is_device, &options)?;
                read_only |= opened_read_only;
                (if is_device { "host_device" } else { "file" }, Kind::Disk(disk))
            }
        };
        let name = match &options.node_name {
            Some(name) => self.check_name(name).map(|()| name.clone())?,
            None => self.make_name_up(),
        };
        let trim = options.discard.as_deref() != Some("ignore");
        let node = Node { name: name.clone(), driver, read_only, direct, trim, implicit, exports: 0, kind };
        self.nodes.push(node);
        Ok(name)
    }

    fn add_below(&mut self, file: FileReference, above: &NodeOptions) -> Result<String, QmpError> {
        match file {
            FileReference::Name(name) => {
                let found = self.get(&name)?;
                if matches!(found.kind, Kind::Filter(_)) {
                    return Err(busy(&name));
                }
                if !above.read_only && found.read_only && !above.auto_read_only {
                    return generic("Block node is read-only");
                }
                Ok(name)
            }
            FileReference::Options(mut options) => {
                // Unless it says otherwise, what holds for the one above holds for the one below.
                options.read_only |= above.read_only;
                options.auto_read_only |= above.auto_read_only;
                options.cache = options.cache.take().or_else(|| above.cache.clone());
                let implicit = options.node_name.is_none();
                self.add_node(*options, implicit)
            }
        }
    }

    /// Whether a node may be called so.
    pub(super) fn check_name(&self, name: &str) -> Result<(), QmpError> {
        if !is_well_formed(name) {
            return generic(format!("Invalid node-name: '{name}'"));
        }
        if name.len() > MAX_NODE_NAME {
            return generic("Node name too long");
        }
        if self.nodes.iter().any(|node| node.name == name) {
            return generic(format!("Duplicate nodes with node-name='{name}'"));
        }
        Ok(())
    }

    fn make_name_up(&mut self) -> String {
        self.made_up += 1;
        format!("#block{:03}", self.made_up)
    }

    /// `blockdev-del`.
    pub(super) fn remove(&mut self, name: &str) -> Result<(), QmpError> {
        let Some(at) = self.nodes.iter().position(|node| node.name == name) else {
            return generic(format!("Failed to find node with node-name='{name}'"));
        };
        let node = &self.nodes[at];
        // With QEMU, the exports of a disk that is being backed up stand on a filter, and that one on the node.
        let filtered = self.disk_of(name).is_ok_and(|disk| disk.readers > node.exports);
        if matches!(node.kind, Kind::Filter(_)) || node.exports > 0 && !filtered {
            return generic(format!("Node {name} is in use"));
        }
        if self.disk_of(name).is_ok_and(|disk| disk.target) {
            return Err(busy(name));
        }
        let is_bottom = matches!(node.kind, Kind::Disk(_));
        let in_use = node.exports > 0
            || self.is_stood_on(name)
            || self.disk_of(name).is_ok_and(|disk| disk.readers > 0) && (is_bottom || self.is_only_top(name));
        if in_use {
            return generic(format!("Block device {name} is in use"));
        }
        let mut gone = self.nodes.remove(at).kind;
        // What was made along with it goes, too, unless somebody uses that by its own name.
        while let Kind::Raw(below) = gone {
            let unused = |node: &Node| node.name == below && node.implicit && node.exports == 0;
            match self.nodes.iter().position(unused) {
                Some(at) if !self.is_stood_on(&below) => gone = self.nodes.remove(at).kind,
                _ => break,
            }
        }
        Ok(())
    }

    fn is_stood_on(&self, name: &str) -> bool {
        let stands_on =
            |node: &Node| matches!(&node.kind, Kind::Raw(below) | Kind::Filter(below) if below == name);
        self.nodes.iter().any(stands_on)
    }

    /// Whether no other node stands on the disk of `name`, so that whoever uses that uses it by this one.
    fn is_only_top(&self, name: &str) -> bool {
        let Ok(bottom) = self.bottom_of(name) else { return false };
        let on_it = |node: &&Node| matches!(&node.kind, Kind::Raw(below) if *below == bottom);
        self.nodes.iter().filter(on_it).count() <= 1
    }

    fn get(&self, name: &str) -> Result<&Node, QmpError> {
        let found = self.nodes.iter().find(|node| node.name == name);
        found.ok_or_else(|| QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'")))
    }

    /// The node at the bottom of `name`: what it is called, and its disk.
    fn bottom(&self, name: &str) -> Result<(&str, &Disk), QmpError> {
        let mut node = self.get(name)?;
        loop {
            match &node.kind {
                Kind::Disk(disk) => return Ok((&node.name, disk)),
                Kind::Raw(below) | Kind::Filter(below) => node = self.get(below)?,
            }
        }
    }

    /// The name of the node at the bottom of `name`.
    pub(super) fn bottom_of(&self, name: &str) -> Result<String, QmpError> {
        self.bottom(name).map(|(bottom, _)| bottom.to_owned())
    }

    fn disk_of(&self, name: &str) -> Result<&Disk, QmpError> {
        self.bottom(name).map(|(_, disk)| disk)
    }

    fn disk_mut(&mut self, bottom: &str) -> Option<&mut Disk> {
        self.nodes.iter_mut().find(|node| node.name == bottom).and_then(|node| match &mut node.kind {
            Kind::Disk(disk) => Some(disk),
            Kind::Raw(_) | Kind::Filter(_) => None,
        })
    }

    /// Bytes of the disk under `name`.
    pub(super) fn length_of(&self, name: &str) -> Result<u64, QmpError> {
        self.disk_of(name).map(|disk| disk.length)
    }

    /// Whether nobody may write to `name`.
    pub(super) fn is_read_only(&self, name: &str) -> Result<bool, QmpError> {
        self.get(name).map(|node| node.read_only)
    }

    /// Whether guests may give space of `name` back: every node down to the disk passes it on.
    pub(super) fn may_trim(&self, name: &str) -> Result<bool, QmpError> {
        let mut node = self.get(name)?;
        while let (Kind::Raw(below) | Kind::Filter(below), true) = (&node.kind, node.trim) {
            node = self.get(below)?;
        }
        Ok(node.trim)
    }

    /// Whether a job writes to the disk under `name`.
    pub(super) fn is_target(&self, name: &str) -> Result<bool, QmpError> {
        self.disk_of(name).map(|disk| disk.target)
    }

    /// Whether a job copies, or an export shows, the disk under `name`.
    pub(super) fn is_read(&self, name: &str) -> Result<bool, QmpError> {
        self.disk_of(name).map(|disk| disk.readers > 0)
    }

    /// The path of the disk under `name`, for a job to write to.
    pub(super) fn locator_of(&self, name: &str) -> Result<String, QmpError> {
        let disk = self.disk_of(name)?;
        still_the_same(disk)?;
        Ok(disk.locator.clone())
    }

    /// That whoever writes to the file or device at `path` writes to a disk from here, and to which; `None` if not.
    pub(super) fn claim_on(&self, path: &str) -> Option<String> {
        let sought = std::fs::metadata(path).ok()?;
        let holds = |meets: &dyn Fn(&Metadata) -> bool| {
            self.nodes.iter().find(|node| match &node.kind {
                Kind::Disk(Disk { file: Some(file), .. }) => file.metadata().is_ok_and(|found| meets(&found)),
                _ => false,
            })
        };
        let (node, is) = match holds(&|found| identity(found) == identity(&sought)) {
            Some(node) => (node, "is"),
            None => (holds(&|found| share_bytes(found, &sought))?, "shares its bytes with"),
        };
        Some(format!("{path} {is} the daemon's disk '{}'", self.known_as(node)))
    }

    /// What `node` is called by those who added it: one that was made along with the node over it has a name that nobody gave it.
    fn known_as<'a>(&'a self, node: &'a Node) -> &'a str {
        let over =
            self.nodes.iter().find(|over| matches!(&over.kind, Kind::Raw(below) if *below == node.name));
        &over.filter(|_| node.implicit).unwrap_or(node).name
    }

    /// The node whose export one of `name` is, for as long as it lasts: a filter goes with its job, its disk stays.
    pub(super) fn lasting(&self, name: &str) -> Result<&str, QmpError> {
        let node = self.get(name)?;
        match &node.kind {
            Kind::Filter(below) => self.get(below).map(|below| self.known_as(below)),
            Kind::Disk(_) | Kind::Raw(_) => Ok(&node.name),
        }
    }

    /// The disk under `name` on `engine`, for one more reader; to be given back with [`Self::release`].
    pub(super) fn use_disk(&mut self, engine: &Engine, name: &str) -> Result<LiveDisk, QmpError> {
        let bottom = self.bottom_of(name)?;
        let writable = !self.get(&bottom)?.read_only;
        let disk = self.disk_mut(&bottom).expect("a bottom has a disk");
        if disk.target {
            return Err(busy(name));
        }
        let live = match &disk.live {
            Some(live) => live.clone(),
            None => {
                still_the_same(disk)?;
                let options = DiskOptions { path: disk.locator.clone(), writable };
                let live = engine.open_disk(&options).map_err(|e| QmpError::generic(e.to_string()))?;
                disk.live.insert(live).clone()
            }
        };
        disk.readers += 1;
        Ok(live)
    }

    /// What guests of the node `name` have felt lately; nothing where it has none.
    pub(super) fn latencies(&self, name: &str) -> Result<Latencies, QmpError> {
        match &self.disk_of(name)?.live {
            Some(live) => live.latencies().map_err(|error| QmpError::generic(error.to_string())),
            None => Ok(Latencies::default()),
        }
    }

    /// A reader of the disk of the node `bottom` has gone.
    pub(super) fn release(&mut self, bottom: &str) {
        if let Some(disk) = self.disk_mut(bottom) {
            disk.readers = disk.readers.checked_sub(1).expect("it was used");
            if disk.readers == 0 {
                disk.live = None;
            }
        }
    }

    /// A job writes to the disk of the node `bottom`, or does no more.
    pub(super) fn set_target(&mut self, bottom: &str, target: bool) {
        if let Some(disk) = self.disk_mut(bottom) {
            disk.target = target;
        }
    }

    /// The node `name` has one export more, or one less.
    pub(super) fn count_export(&mut self, name: &str, more: bool) {
        if let Some(node) = self.nodes.iter_mut().find(|node| node.name == name) {
            node.exports = if more { node.exports + 1 } else { node.exports - 1 };
        }
    }

    /// The name of a job's filter over `source`.
    pub(super) fn add_filter(&mut self, name: &str, source: &str) {
        let read_only = self.get(source).is_ok_and(|node| node.read_only);
        self.nodes.push(Node {
            name: name.to_owned(),
            driver: "copy-before-write",
            read_only,
            direct: false,
            trim: true,
            implicit: false,
            exports: 0,
            kind: Kind::Filter(source.to_owned()),
        });
    }

    /// The job is over.
    pub(super) fn remove_filter(&mut self, name: &str) {
        self.nodes.retain(|node| !(node.name == name && matches!(node.kind, Kind::Filter(_))));
    }

    /// `query-named-block-nodes`, the newest first.
    pub(super) fn query(&self) -> Value {
        let described = |node: &Node| self.disk_of(&node.name).ok().map(|disk| describe(node, disk));
        self.nodes.iter().rev().filter_map(described).collect()
    }
}

fn describe(node: &Node, disk: &Disk) -> Value {
    let filename = if node.driver == "null-co" || disk.file.is_none() {
        format!("json:{{\"driver\": \"null-co\", \"size\": {}}}", disk.length)
    } else {
        disk.locator.clone()
    };
    let mut image = json!({ "filename": filename, "format": node.driver, "virtual-size": disk.length });
    if let Some(metadata) = disk.file.as_ref().and_then(|file| file.metadata().ok()) {
        image["actual-size"] = (metadata.blocks() * 512).into();
    }
    json!({
        "file": filename, "node-name": node.name, "ro": node.read_only, "drv": node.driver,
        "backing_file_depth": 0, "encrypted": false, "active": true, "detect_zeroes": "off",
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "image": image, "write_threshold": 0,
        "cache": { "writeback": true, "direct": node.direct, "no-flush": false },
    })
}

fn missing(name: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{name}' is missing"))
}

fn null_disk(size: Option<i64>) -> Result<Disk, QmpError> {
    let length = match size.map(u64::try_from) {
        None => NULL_LENGTH,
        Some(Ok(length)) => length,
        Some(Err(_)) => return generic("Parameter 'size' expects a non-negative value"),
    };
    Ok(Disk { locator: format!("null:{length}"), length, file: None, live: None, readers: 0, target: false })
}

/// Open what `filename` means, to see that it can be used so, and whether for reading only.
fn open_disk(filename: &str, is_device: bool, options: &NodeOptions) -> Result<(Disk, bool), QmpError> {
    let failed = |error: std::io::Error| {
        let why = nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0)).desc();
        QmpError::generic(format!("Could not open '{filename}': {why}"))
    };
    // Looked at before it is opened: opening a pipe would wait for its other end.
    let found = std::fs::metadata(filename).map_err(failed)?;
    let kind = found.file_type();
    if found.is_dir() {
        return generic(format!("Could not open '{filename}': Is a directory"));
    }
    if is_device && !kind.is_block_device() {
        let text =
            format!("'host_device' driver requires '{filename}' to be either a character or block device");
        return generic(text);
    }
    if !is_device && !kind.is_file() {
        return generic(format!("'file' driver requires '{filename}' to be a regular file"));
    }
    let open = |write: bool| {
        let mut options = OpenOptions::new();
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = options.read(true).write(write).custom_flags(flags).open(filename)?;
        // Linux opens a read-only device for writing, and refuses the writes.
        if write && is_device && is_read_only_device(&file)? {
            return Err(std::io::Error::from_raw_os_error(libc::EACCES));
        }
        Ok(file)
    };
    let (mut file, read_only) = match open(!options.read_only) {
        Err(error) if options.auto_read_only && may_be_read_only(&error) => {
            (open(false).map_err(failed)?, true)
        }
        opened => (opened.map_err(failed)?, options.read_only),
    };
    let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let locator = std::path::absolute(filename).map_err(failed)?.to_string_lossy().into_owned();
    let disk = Disk { locator, length, file: Some(file), live: None, readers: 0, target: false };
    Ok((disk, read_only))
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

/// The engine opens disks by their paths: what is there now must be what the node was made of.
fn still_the_same(disk: &Disk) -> Result<(), QmpError> {
    let Some(file) = &disk.file else { return Ok(()) };
    let same = file.metadata().and_then(|ours| {
        let theirs = std::fs::metadata(&disk.locator)?;
        Ok((ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()))
    });
    match same {
        Ok(true) => Ok(()),
        Ok(false) => generic(format!("Could not open '{}': another file has taken its place", disk.locator)),
        Err(error) => generic(format!("Could not open '{}': {error}", disk.locator)),
    }
}

#[cfg(test)]
#[path = "nodes_tests.rs"]
mod tests;
