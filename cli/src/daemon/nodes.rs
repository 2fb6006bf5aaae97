//! Nodes: the disks that the daemon knows by name, and who uses them.
//!
//! # Model
//! As in QEMU there are two kinds: nodes with a file or device (or nothing) behind them, and `raw` nodes over one of those. What counts for
//! I/O is the *disk* at the bottom; all nodes over it share it. A disk is opened on the engine when the first job or export uses it, and
//! leaves it with the last: a node that nobody uses holds no lock and no memory of the engine, so that it may be the target of a job.
//! Commands open and look up no path in here: that is for `doors`, in threads of their own. Disks of the command line, which come while nobody is served,
//! are opened here, and asking a node for its size asks the kernel alone. Files are closed aside ([`Kept`]).
//!
//! # Rules
//! - A disk is the source of any number of jobs and the bottom of any number of exports, or the target of one job, never both.
//! - A node that is used, or that another stands on, stays. What goes with its job, a filter, is nothing to stand on.

use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use engine::live::Latencies;
use serde::Deserialize;
use serde_json::{Value, json};

use super::doors::{Claims, Door, Kept, MAX_PATH_TEXT, Opened, Opening, Site};
use crate::qmp::session::MAX_REPLY;
use crate::qmp::{Arguments, QmpError};

/// Most nodes.
const MAX_NODES: usize = 1024;
/// Most bytes of what is told of a node, but for the path of its disk, which is told twice.
const MAX_NODE_TEXT: usize = 1 << 10;
// Else a client that asks for all of them would be given up.
const _: () = assert!(MAX_NODES * (2 * MAX_PATH_TEXT + MAX_NODE_TEXT) <= MAX_REPLY);
/// Most bytes of a node's name.
pub(super) const MAX_NODE_NAME: usize = 31;
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

impl NodeOptions {
    /// Of `blockdev-add`.
    pub(super) fn of(arguments: &Arguments) -> Result<Self, QmpError> {
        let mut options: Self = serde_json::from_value(Value::Object(arguments.clone()))
            .map_err(|error| QmpError::generic(error.to_string()))?;
        if options.node_name.is_none() {
            return generic("'node-name' must be specified for the root node");
        }
        options.hand_down();
        Ok(options)
    }

    /// Of a raw disk by its path, as `--disk` has it.
    pub(super) fn of_path(name: &str, path: &str) -> Result<Self, QmpError> {
        let is_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        let file = json!({ "driver": if is_device { "host_device" } else { "file" }, "filename": path });
        let node = json!({ "driver": "raw", "node-name": name, "auto-read-only": true, "file": file });
        Self::of(node.as_object().expect("an object"))
    }

    /// What has to be opened before such a node can be added: the file or device at its bottom, unless that is a node already.
    pub(super) fn opening(&self) -> Result<Option<Opening>, QmpError> {
        match (self.driver.as_str(), &self.file) {
            ("raw", Some(FileReference::Options(below))) => below.opening(),
            ("raw" | "null-co", _) => Ok(None),
            (driver, _) => {
                if self.aio.as_deref() == Some("native") && !self.is_direct() {
                    let text =
                        "aio=native was specified, but it requires cache.direct=on, which was not specified.";
                    return generic(text);
                }
                if self.locking.as_deref() == Some("off") {
                    return generic("Parameter 'locking': \"off\" is not supported");
                }
                Ok(Some(Opening {
                    filename: self.filename.clone().ok_or_else(|| missing("filename"))?,
                    is_device: driver == "host_device",
                    read_only: self.read_only,
                    auto_read_only: self.auto_read_only,
                }))
            }
        }
    }

    fn is_direct(&self) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.direct)
    }

    /// Unless it says otherwise, what holds for the one above holds for the one below.
    fn hand_down(&mut self) {
        let mut above = self;
        while let Some(FileReference::Options(below)) = &mut above.file {
            below.read_only |= above.read_only;
            below.auto_read_only |= above.auto_read_only;
            below.cache = below.cache.take().or_else(|| above.cache.clone());
            above = below;
        }
    }
}

/// The bottom of a node.
struct Disk {
    site: Site,
    length: u64,
    /// Nothing for `null-co`.
    file: Option<Kept>,
    /// There while somebody reads it.
    door: Option<Arc<Door>>,
    /// Jobs that copy it, exports that show it, and those that are about to.
    readers: usize,
    /// The job that writes to it, or is about to.
    target: bool,
}

impl Disk {
    fn new(site: Site, length: u64, file: Option<Kept>) -> Self {
        Self { site, length, file, door: None, readers: 0, target: false }
    }
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

/// Most bytes of the id of a job or an export. All clients hear of them, again and again, and whoever asks has all of them in one reply.
pub(super) const MAX_ID: usize = 255;

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
    /// Add a node, for which was `opened` what [`NodeOptions::opening`] asked for.
    pub(super) fn add(&mut self, options: &NodeOptions, mut opened: Option<Opened>) -> Result<(), QmpError> {
        let before = self.nodes.len();
        let added = self.add_node(options, false, &mut opened);
        if added.is_err() {
            // Those made along with it go, too.
            self.nodes.truncate(before);
        }
        added.map(drop)
    }

    /// Whether there is room for such a node, and its names are free: before anything is opened for it. Asked again by [`Self::add`], for others may
    /// come meanwhile.
    pub(super) fn may_add(&self, options: &NodeOptions) -> Result<(), QmpError> {
        let (mut level, mut levels) = (Some(options), 0);
        while let Some(node) = level {
            levels += 1;
            node.node_name.iter().try_for_each(|name| self.check_name(name))?;
            level = match &node.file {
                Some(FileReference::Options(below)) => Some(&**below),
                Some(FileReference::Name(_)) | None => None,
            };
        }
        self.check_room(levels)
    }

    fn check_room(&self, more: usize) -> Result<(), QmpError> {
        if self.nodes.len() + more > MAX_NODES {
            return generic(format!("{MAX_NODES} nodes are the most; delete some"));
        }
        Ok(())
    }

    /// As [`Self::add`], with what is to be opened opened here and now.
    pub(super) fn open_and_add(&mut self, options: &NodeOptions) -> Result<(), QmpError> {
        let opened = options.opening()?.map(|opening| opening.open()).transpose()?;
        self.add(options, opened)
    }

    fn add_node(
        &mut self,
        options: &NodeOptions,
        implicit: bool,
        opened: &mut Option<Opened>,
    ) -> Result<String, QmpError> {
        self.check_room(1)?;
        let mut read_only = options.read_only;
        let (driver, kind) = match options.driver.as_str() {
            "raw" => {
                let file = options.file.as_ref().ok_or_else(|| missing("file"))?;
                let below = self.add_below(file, options, opened)?;
                read_only |= self.get(&below)?.read_only;
                ("raw", Kind::Raw(below))
            }
            "null-co" => ("null-co", Kind::Disk(null_disk(options.size)?)),
            driver => {
                let opened = opened.take().expect("there is one bottom, and it was opened");
                read_only |= opened.read_only;
                let disk = Disk::new(opened.site, opened.length, Some(opened.file));
                (if driver == "host_device" { "host_device" } else { "file" }, Kind::Disk(disk))
            }
        };
        let name = match &options.node_name {
            Some(name) => self.check_name(name).map(|()| name.clone())?,
            None => self.make_name_up(),
        };
        let direct = options.is_direct();
        let trim = options.discard.as_deref() != Some("ignore");
        let node = Node { name: name.clone(), driver, read_only, direct, trim, implicit, exports: 0, kind };
        self.nodes.push(node);
        Ok(name)
    }

    fn add_below(
        &mut self,
        file: &FileReference,
        above: &NodeOptions,
        opened: &mut Option<Opened>,
    ) -> Result<String, QmpError> {
        match file {
            FileReference::Name(name) => {
                let found = self.get(name)?;
                if matches!(found.kind, Kind::Filter(_)) {
                    return Err(busy(name));
                }
                if !above.read_only && found.read_only && !above.auto_read_only {
                    return generic("Block node is read-only");
                }
                Ok(name.clone())
            }
            FileReference::Options(options) => self.add_node(options, options.node_name.is_none(), opened),
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
        while let Kind::Raw(below) = &gone {
            let unused = |node: &Node| node.name == *below && node.implicit && node.exports == 0;
            match self.nodes.iter().position(unused) {
                Some(at) if !self.is_stood_on(below) => gone = self.nodes.remove(at).kind,
                _ => break,
            }
        }
        drop(gone);
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

    /// Where the disk under `name` lies, for a job to write to.
    pub(super) fn site_of(&self, name: &str) -> Result<Site, QmpError> {
        self.disk_of(name).map(|disk| disk.site.clone())
    }

    /// What paths that are given for no node must not lead to.
    pub(super) fn claims(&self) -> Claims {
        Claims::new(self.nodes.iter().filter_map(|node| match &node.kind {
            Kind::Disk(disk) => Some((&disk.site, self.known_as(node))),
            Kind::Raw(_) | Kind::Filter(_) => None,
        }))
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

    /// The way to the disk under `name`, for one more reader; to be given back with [`Self::release`].
    pub(super) fn enter(&mut self, name: &str) -> Result<Arc<Door>, QmpError> {
        let bottom = self.bottom_of(name)?;
        let writable = !self.get(&bottom)?.read_only;
        let disk = self.disk_mut(&bottom).expect("a bottom has a disk");
        if disk.target {
            return Err(busy(name));
        }
        disk.readers += 1;
        Ok(Arc::clone(disk.door.get_or_insert_with(|| Arc::new(Door::new(disk.site.clone(), writable)))))
    }

    /// What guests of the node `name` have felt lately; nothing where it has none.
    pub(super) fn latencies(&self, name: &str) -> Result<Latencies, QmpError> {
        let door = self.disk_of(name)?.door.as_ref();
        match door.and_then(|door| door.opened()) {
            Some(live) => live.latencies().map_err(|error| QmpError::generic(error.to_string())),
            None => Ok(Latencies::default()),
        }
    }

    /// A reader of the disk of the node `bottom` has gone.
    pub(super) fn release(&mut self, bottom: &str) {
        if let Some(disk) = self.disk_mut(bottom) {
            disk.readers = disk.readers.checked_sub(1).expect("it was used");
            if disk.readers == 0 {
                disk.door = None;
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
        disk.site.locator().to_owned()
    };
    let mut image = json!({ "filename": filename, "format": node.driver, "virtual-size": disk.length });
    if let Some(bytes) = disk.file.as_ref().and_then(Kept::allocated) {
        image["actual-size"] = bytes.into();
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
    Ok(Disk::new(Site::null(length), length, None))
}

#[cfg(test)]
#[path = "nodes_tests.rs"]
mod tests;
