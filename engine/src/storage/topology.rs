//! On what a disk's bytes really lie, so that a copy never writes over its own source by another name.
//!
//! # Model
//! A disk is a chain of *layers*: itself first, then what holds its bytes: a loop device's backing file, a partition's
//! disk, a mapped device's slaves. Each layer is a file or a device and the window of it in which the bytes lie. Two
//! disks overlap when they share a layer and the windows meet. The window that a mapped device (LVM, RAID, encryption)
//! occupies in its slaves is only known to be somewhere in them: two such disks side by side on one slave do not count
//! as overlapping, one of them and the slave itself do.
//!
//! All of it comes from sysfs and the loop driver. Where they tell nothing a disk is its own only layer.

use std::fs::{self, File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, makedev, minor};

use super::sys;

/// Deepest stack of devices that is followed.
const MAX_DEPTH: usize = 8;
/// Most layers that are collected.
const MAX_LAYERS: usize = 64;
/// The unit of sysfs, whatever the device's sector.
const SYSFS_SECTOR: u64 = 512;

/// Something that holds bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// A regular file.
    File {
        /// Device number of its file system.
        device: u64,
        /// Its inode.
        inode: u64,
    },
    /// A block device.
    Device(u64),
}

impl Node {
    /// The file or device that `metadata` describes.
    pub(crate) fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::Device(metadata.rdev())
        } else {
            Self::File { device: metadata.dev(), inode: metadata.ino() }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layer {
    node: Node,
    /// The bytes lie in `start..end` of the node,
    start: u64,
    end: u64,
    /// and are all of that.
    exact: bool,
}

impl Layer {
    /// The layer below: `length` bytes from `skip` on of `node` are this layer's node.
    fn below(self, node: Node, skip: u64, length: u64, exact: bool) -> Self {
        let end = skip.saturating_add(length);
        Self {
            node,
            start: skip.saturating_add(self.start).min(end),
            end: skip.saturating_add(self.end).min(end),
            exact: self.exact && exact,
        }
    }

    fn meets(self, other: Self) -> bool {
        self.node == other.node
            && self.start < other.end
            && other.start < self.end
            && (self.exact || other.exact)
    }
}

/// Whether writing to one of the two may change the other.
pub(crate) fn overlap(one: Node, other: Node) -> bool {
    let others = layers(other);
    layers(one).iter().any(|&layer| others.iter().any(|&other| layer.meets(other)))
}

/// Whether writing to one of two files or devices may change the other, by whatever name: they are the same, one lies on the other, or
/// both on the same part of a third.
#[must_use]
pub fn share_bytes(one: &Metadata, other: &Metadata) -> bool {
    overlap(Node::of(one), Node::of(other))
}

/// What the device `node` lies on, open for reading: files and devices, as far as there are paths to them. Nothing for a file.
pub(super) fn beneath(node: Node) -> Vec<(PathBuf, File)> {
    let layers = layers(node);
    let open = |path: PathBuf| {
        // Looked at first: opening what stands in the place of a file that has gone may do something.
        let is_beneath =
            |metadata: &Metadata| layers.iter().skip(1).any(|layer| layer.node == Node::of(metadata));
        fs::metadata(&path).ok().filter(is_beneath)?;
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).ok()?;
        file.metadata().is_ok_and(|metadata| is_beneath(&metadata)).then_some((path, file))
    };
    let devices = layers.iter().filter_map(|layer| match layer.node {
        Node::Device(number) => sysfs(number),
        Node::File { .. } => None,
    });
    let paths = devices.flat_map(|directory| {
        let backing = attribute(&directory, "loop/backing_file").map(PathBuf::from);
        // In sysfs a slash in a name is an exclamation mark.
        let name = directory.file_name().map(|name| name.to_string_lossy().replace('!', "/"));
        [name.map(|name| Path::new("/dev").join(name)), backing].into_iter().flatten()
    });
    paths.filter_map(open).collect()
}

/// A loop device, as `/dev/loopN`, that is attached to `node`.
pub(super) fn loop_device_on(node: Node) -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/block").ok()?;
    for entry in entries.flatten() {
        let directory = entry.path();
        if !directory.join("loop").is_dir() {
            continue;
        }
        let Some(number) = device_number(&directory) else { continue };
        if loop_window(number, &directory).is_some_and(|window| window.node == node) {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

/// Whether a device is mounted, as far as this process sees.
pub(super) fn is_mounted(number: u64) -> bool {
    let device = format!("{}:{}", major(number), minor(number));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| line.split(' ').nth(2) == Some(device.as_str()))
}

/// What tells this attachment of a device from others: the kernel's count of disks, which starts anew with each boot.
pub(super) fn attachment(number: u64) -> Option<(String, String)> {
    let mut directory = sysfs(number)?;
    if attribute(&directory, "partition").is_some() {
        directory.pop();
    }
    let boot = attribute(Path::new("/proc/sys/kernel/random"), "boot_id")?;
    Some((boot, attribute(&directory, "diskseq")?))
}

/// What tells a device from others of its kind, with the number of the partition if it is one. A loop device is told by what it
/// lies over.
pub(super) fn serial(number: u64) -> Option<String> {
    let mut directory = sysfs(number)?;
    if let Some(backing) = directory.join("loop").is_dir().then(|| loop_status(number, &directory)).flatten()
    {
        let loop_of = format!("loop over inode {} of device {}", backing.inode, backing.device);
        return Some(format!("{loop_of} from byte {}", backing.offset));
    }
    let partition = attribute(&directory, "partition");
    if partition.is_some() {
        directory.pop();
    }
    let names = ["wwid", "device/wwid", "serial", "device/serial", "dm/uuid", "md/uuid"];
    let serial = names.iter().find_map(|name| attribute(&directory, name))?;
    Some(match partition {
        Some(partition) => format!("{serial} partition {partition}"),
        None => serial,
    })
}

/// Whether a device gives space back; `None` where sysfs does not say.
pub(super) fn discards(number: u64) -> Option<bool> {
    let mut directory = sysfs(number)?;
    if attribute(&directory, "partition").is_some() {
        directory.pop();
    }
    attribute(&directory, "queue/discard_max_bytes").map(|bytes| bytes != "0")
}

fn layers(node: Node) -> Vec<Layer> {
    let mut found = vec![Layer { node, start: 0, end: u64::MAX, exact: true }];
    let mut depth_ends = found.len();
    let (mut next, mut depth) = (0, 0);
    while next < found.len() && found.len() < MAX_LAYERS && depth < MAX_DEPTH {
        let below = layers_below(found[next]);
        found.extend(below);
        next += 1;
        if next == depth_ends {
            (depth, depth_ends) = (depth + 1, found.len());
        }
    }
    found
}

fn layers_below(layer: Layer) -> Vec<Layer> {
    let Node::Device(number) = layer.node else { return Vec::new() };
    let Some(directory) = sysfs(number) else { return Vec::new() };
    if attribute(&directory, "partition").is_some() {
        return partition_disk(layer, &directory).into_iter().collect();
    }
    if directory.join("loop").is_dir() {
        return backing_of_loop(layer, number, &directory).into_iter().collect();
    }
    let slaves = fs::read_dir(directory.join("slaves")).into_iter().flatten().flatten();
    slaves
        .filter_map(|slave| device_number(&slave.path()))
        .map(|number| Layer { node: Node::Device(number), start: 0, end: u64::MAX, exact: false })
        .collect()
}

fn partition_disk(layer: Layer, directory: &Path) -> Option<Layer> {
    let bytes = |name| attribute(directory, name)?.parse::<u64>().ok()?.checked_mul(SYSFS_SECTOR);
    let disk = device_number(directory.parent()?)?;
    Some(layer.below(Node::Device(disk), bytes("start")?, bytes("size")?, true))
}

fn backing_of_loop(layer: Layer, number: u64, directory: &Path) -> Option<Layer> {
    let LoopWindow { node, offset, limit } = loop_window(number, directory)?;
    Some(layer.below(node, offset, if limit == 0 { u64::MAX } else { limit }, true))
}

/// What a loop device shows.
struct LoopWindow {
    /// Of this file or device
    node: Node,
    /// what lies from this byte on,
    offset: u64,
    /// and of that at most so much; 0 for all.
    limit: u64,
}

fn loop_window(number: u64, directory: &Path) -> Option<LoopWindow> {
    if let Some(backing) = loop_status(number, directory) {
        let file = Node::File { device: backing.device, inode: backing.inode };
        let node = backing.rdevice.map_or(file, Node::Device);
        return Some(LoopWindow { node, offset: backing.offset, limit: backing.size_limit });
    }
    // Without the right to open the device there is still its description. It names a path, which may mean nothing by now, or
    // another file in this mount namespace than where the device was attached.
    let number_in = |name| attribute(directory, name)?.parse::<u64>().ok();
    let metadata = fs::metadata(attribute(directory, "loop/backing_file")?).ok()?;
    let (offset, limit) = (number_in("loop/offset")?, number_in("loop/sizelimit")?);
    Some(LoopWindow { node: Node::of(&metadata), offset, limit })
}

fn loop_status(number: u64, directory: &Path) -> Option<sys::LoopBacking> {
    let device = File::open(Path::new("/dev").join(directory.file_name()?)).ok()?;
    let metadata = device.metadata().ok()?;
    (Node::of(&metadata) == Node::Device(number)).then(|| sys::loop_backing(device.as_fd()).ok())?
}

/// The directory of a device in sysfs, symbolic links resolved: a partition's lies in its disk's.
fn sysfs(number: u64) -> Option<PathBuf> {
    fs::canonicalize(format!("/sys/dev/block/{}:{}", major(number), minor(number))).ok()
}

fn device_number(directory: &Path) -> Option<u64> {
    let text = attribute(directory, "dev")?;
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// A non-empty attribute of sysfs.
fn attribute(directory: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(directory.join(name)).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Node = Node::Device(1);

    fn whole(node: Node) -> Layer {
        Layer { node, start: 0, end: u64::MAX, exact: true }
    }

    #[test]
    fn partitions_meet_their_disk_and_not_each_other() {
        let first = whole(Node::Device(2)).below(DISK, 1 << 20, 1 << 20, true);
        let second = whole(Node::Device(3)).below(DISK, 2 << 20, 1 << 20, true);
        assert!(first.meets(whole(DISK)) && whole(DISK).meets(second));
        assert!(!first.meets(second));
        assert_eq!((second.start, second.end), (2 << 20, 3 << 20));
    }

    #[test]
    fn volumes_meet_what_they_lie_on_and_not_each_other() {
        let volume = whole(Node::Device(4)).below(DISK, 0, u64::MAX, false);
        assert!(volume.meets(whole(DISK)));
        assert!(!volume.meets(volume));
        let part_of_it =
            whole(Node::Device(5)).below(Node::Device(4), 100, 100, true).below(DISK, 0, u64::MAX, false);
        assert!(!part_of_it.exact);
    }

    #[test]
    fn windows_in_windows_add_up() {
        let nested =
            whole(Node::Device(2)).below(Node::Device(3), 100, 50, true).below(DISK, 1000, 120, true);
        assert_eq!((nested.start, nested.end), (1100, 1120));
    }
}
