//! Disks and documents of the simulation: what is read, and what a power loss leaves. (The network has a module of its own.)

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use fastrand::Rng;
use nix::errno::Errno;

use super::SECTOR;
use super::network::Network;
use crate::ring::{Extent, ExtentQuery, ZeroMethod};
use crate::units::ByteRange;

/// Bytes a block of the allocation map.
const BLOCK: u64 = 4096;

/// A world that outlives the rings over it.
pub type SharedWorld = Rc<RefCell<World>>;

/// What kind of disk it is.
#[derive(Clone, Copy, Debug)]
pub struct DiskTraits {
    /// Alignment of direct I/O, in bytes; `None`: it is refused.
    pub direct_alignment: Option<u32>,
    /// Whether it can unmap ranges.
    pub unmaps: bool,
    /// Whether it can zero ranges in place.
    pub zeroes: bool,
    /// Whether its length is fixed (a device), rather than growing with writes.
    pub fixed_length: bool,
}

impl Default for DiskTraits {
    fn default() -> Self {
        Self { direct_alignment: Some(512), unmaps: true, zeroes: true, fixed_length: false }
    }
}

/// See the module's header.
#[derive(Clone, Debug)]
pub struct Disk {
    traits: DiskTraits,
    view: Vec<u8>,
    medium: Vec<u8>,
    /// Writes that completed and were not flushed: sequence number, offset, bytes.
    unflushed: Vec<(u64, usize, Vec<u8>)>,
    writes: u64,
    /// Blocks that hold data, as extent queries see it.
    allocated: BTreeSet<u64>,
    /// Blocks that take space: those that hold data, and those that are reserved or zeroed in place.
    space: BTreeSet<u64>,
    /// Blocks allocated in the top layer; `None`: there is one layer.
    top_layer: Option<BTreeSet<u64>>,
    /// Sectors that cannot be read, or written.
    bad: Vec<ByteRange>,
    stuck: bool,
    hung: bool,
    slowness: u64,
    written: u64,
}

impl Disk {
    /// A disk with these contents, all of it data.
    #[must_use]
    pub fn new(contents: Vec<u8>, traits: DiskTraits) -> Self {
        let blocks = (contents.len() as u64).div_ceil(BLOCK);
        Self {
            traits,
            medium: contents.clone(),
            view: contents,
            unflushed: Vec::new(),
            writes: 0,
            allocated: (0..blocks).collect(),
            space: (0..blocks).collect(),
            top_layer: None,
            bad: Vec::new(),
            stuck: false,
            hung: false,
            slowness: 1,
            written: 0,
        }
    }

    /// A new sparse file of this length.
    #[must_use]
    pub fn sparse(length: usize, traits: DiskTraits) -> Self {
        let mut disk = Self::new(vec![0; length], traits);
        disk.allocated.clear();
        disk.space.clear();
        disk
    }

    /// Declare blocks (of 4 KiB) to be holes; they read as zeros. In a top layer that holds them.
    pub fn punch(&mut self, blocks: impl IntoIterator<Item = u64>) {
        for block in blocks {
            if let Some(top) = &mut self.top_layer {
                top.insert(block);
            }
            self.allocated.remove(&block);
            self.space.remove(&block);
            let start = usize::try_from(block * BLOCK).expect("a small disk");
            let end = (start + 4096).min(self.view.len());
            self.view[start..end].fill(0);
            self.medium[start..end].fill(0);
        }
    }

    /// Put `bytes` there, as if they had been there from the start.
    pub fn fill(&mut self, offset: u64, bytes: &[u8]) {
        self.write(offset, bytes);
        self.flush(self.writes);
    }

    /// Fill blocks (of 4 KiB) with old data that the disk is said not to hold.
    pub fn stain(&mut self, blocks: &[u64]) {
        for &block in blocks {
            let start = usize::try_from(block * BLOCK).expect("a small disk");
            let end = (start + 4096).min(self.view.len());
            self.view[start..end].fill(0xEE);
            self.medium[start..end].fill(0xEE);
            self.allocated.insert(block);
        }
    }

    /// Declare which blocks (of 4 KiB) are allocated in the top layer. What is written from then on is allocated there, zeros and discards
    /// included; the others stay those of the layers below.
    pub fn set_top_layer(&mut self, blocks: impl IntoIterator<Item = u64>) {
        self.top_layer = Some(blocks.into_iter().collect());
    }

    /// Whether a block (of 4 KiB) is allocated in the top layer, as all are without layers.
    #[must_use]
    pub fn top_layer_holds(&self, block: u64) -> bool {
        self.top_layer.as_ref().is_none_or(|top| top.contains(&block))
    }

    /// Sectors in `range` fail from now on.
    pub fn set_bad(&mut self, range: ByteRange) {
        self.bad.push(range);
    }

    /// Nothing fails any more.
    pub fn repair(&mut self) {
        self.bad.clear();
    }

    /// Reads and writes that are pushed from now on never end, unless they are cancelled.
    pub fn set_stuck(&mut self) {
        self.stuck = true;
    }

    /// Nothing that is pushed from now on ends, whatever it is: the device hangs.
    pub fn set_hung(&mut self) {
        self.hung = true;
    }

    /// What was stuck, or has hung, goes on.
    pub fn set_free(&mut self) {
        self.stuck = false;
        self.hung = false;
    }

    /// Everything that is pushed from now on takes so many times as long.
    pub fn set_slowness(&mut self, factor: u64) {
        self.slowness = factor;
    }

    /// Bytes that write operations have written; zeros made by operations of their own do not count.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written
    }

    /// Cut it short, as if another program truncated it.
    pub fn truncate(&mut self, length: usize) {
        self.view.truncate(length);
        self.medium.truncate(length);
    }

    /// What a read gives.
    #[must_use]
    pub fn view(&self) -> &[u8] {
        &self.view
    }

    /// What a power loss leaves for sure.
    #[must_use]
    pub fn medium(&self) -> &[u8] {
        &self.medium
    }

    /// Whether the medium holds all that was written.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.unflushed.is_empty()
    }

    /// Bytes in blocks that hold data.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated.len() as u64 * BLOCK
    }

    /// Bytes in blocks that take space: data, and what is reserved or zeroed in place.
    #[must_use]
    pub fn space_bytes(&self) -> u64 {
        self.space.len() as u64 * BLOCK
    }

    /// Whether a block (of 4 KiB) takes space.
    #[must_use]
    pub fn takes_space(&self, block: u64) -> bool {
        self.space.contains(&block)
    }

    /// Reserve space for all of it.
    pub fn reserve(&mut self) {
        self.space.extend(0..(self.view.len() as u64).div_ceil(BLOCK));
    }

    /// Where the last block that takes space ends.
    #[must_use]
    pub fn space_end(&self) -> u64 {
        self.space.last().map_or(0, |block| (block + 1) * BLOCK)
    }

    pub(super) fn direct_alignment(&self) -> Option<u32> {
        self.traits.direct_alignment
    }

    pub(super) fn is_stuck(&self) -> bool {
        self.stuck
    }

    pub(super) fn is_hung(&self) -> bool {
        self.hung
    }

    pub(super) fn slowness(&self) -> u64 {
        self.slowness
    }

    pub(super) fn count_written(&mut self, bytes: u64) {
        self.written += bytes;
    }

    pub(super) fn writes_so_far(&self) -> u64 {
        self.writes
    }

    fn is_bad(&self, offset: u64, length: u64) -> bool {
        self.bad.iter().any(|bad| bad.intersection(ByteRange::new(offset, length)).is_some())
    }

    pub(super) fn readable(&self, offset: u64, length: u64) -> Result<u64, Errno> {
        if self.is_bad(offset, length) {
            return Err(Errno::EIO);
        }
        Ok(length.min((self.view.len() as u64).saturating_sub(offset)))
    }

    pub(super) fn writable(&self, offset: u64, length: u64) -> Result<(), Errno> {
        if self.is_bad(offset, length) {
            return Err(Errno::EIO);
        }
        let beyond = offset + length > self.view.len() as u64;
        if self.traits.fixed_length && beyond { Err(Errno::ENOSPC) } else { Ok(()) }
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        let start = usize::try_from(offset).expect("a small disk");
        if !into.is_empty() {
            into.copy_from_slice(&self.view[start..start + into.len()]);
        }
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let start = usize::try_from(offset).expect("a small disk");
        let end = start + bytes.len();
        if end > self.view.len() {
            self.view.resize(end, 0);
        }
        self.view[start..end].copy_from_slice(bytes);
        self.writes += 1;
        self.unflushed.push((self.writes, start, bytes.to_vec()));
        let blocks = offset / BLOCK..(end as u64).div_ceil(BLOCK);
        if let Some(top) = &mut self.top_layer {
            top.extend(blocks.clone());
        }
        self.allocated.extend(blocks.clone());
        self.space.extend(blocks);
    }

    pub(super) fn may_zero(&self, method: ZeroMethod) -> Result<(), Errno> {
        let can = match method {
            ZeroMethod::Unmap => self.traits.unmaps,
            ZeroMethod::Keep => self.traits.zeroes,
        };
        if can { Ok(()) } else { Err(Errno::EOPNOTSUPP) }
    }

    /// Zero what of `range` lies on the disk. What is zeroed in place is no data any more, but keeps its space.
    pub(super) fn write_zeroes(&mut self, range: ByteRange, method: ZeroMethod) {
        let end = range.end().min(self.view.len() as u64);
        if range.offset < end {
            let length = usize::try_from(end - range.offset).expect("a small disk");
            self.write(range.offset, &vec![0; length]);
            for block in range.offset.div_ceil(BLOCK)..end / BLOCK {
                self.allocated.remove(&block);
                if method == ZeroMethod::Unmap {
                    self.space.remove(&block);
                }
            }
        }
    }

    pub(super) fn allocate(&mut self, range: ByteRange) -> Result<(), Errno> {
        if !self.traits.unmaps {
            return Err(Errno::EOPNOTSUPP);
        }
        self.space.extend(range.offset / BLOCK..range.end().div_ceil(BLOCK));
        Ok(())
    }

    fn to_medium(medium: &mut Vec<u8>, start: usize, bytes: &[u8]) {
        let end = start + bytes.len();
        if end > medium.len() {
            medium.resize(end, 0);
        }
        medium[start..end].copy_from_slice(bytes);
    }

    pub(super) fn flush(&mut self, covers: u64) {
        let rest = self.unflushed.split_off(self.unflushed.partition_point(|(number, ..)| *number <= covers));
        for (_, start, bytes) in std::mem::replace(&mut self.unflushed, rest) {
            Self::to_medium(&mut self.medium, start, &bytes);
        }
    }

    /// Keep or lose each sector of `writes`, in their order.
    fn tear(&mut self, writes: Vec<(u64, usize, Vec<u8>)>, rng: &mut Rng) {
        let all = rng.u8(..8);
        for (_, start, bytes) in writes {
            let mut at = 0;
            while at < bytes.len() {
                let next = (at + SECTOR - (start + at) % SECTOR).min(bytes.len());
                let keep = match all {
                    0 => false,
                    1 => true,
                    _ => rng.bool(),
                };
                if keep {
                    Self::to_medium(&mut self.medium, start + at, &bytes[at..next]);
                }
                at = next;
            }
        }
    }

    /// The flush fails: what it covered is on the medium or not, and never tried again.
    pub(super) fn fail_flush(&mut self, covers: u64, rng: &mut Rng) {
        let rest = self.unflushed.split_off(self.unflushed.partition_point(|(number, ..)| *number <= covers));
        let lost = std::mem::replace(&mut self.unflushed, rest);
        self.tear(lost, rng);
    }

    fn crash(&mut self, rng: &mut Rng) {
        let writes = std::mem::take(&mut self.unflushed);
        self.tear(writes, rng);
        let length = self.medium.len().max(self.view.len());
        self.medium.resize(length, 0);
        self.view.clone_from(&self.medium);
    }

    pub(super) fn extents(&self, range: ByteRange, query: ExtentQuery, limit: usize) -> Vec<Extent> {
        let present = |block: u64| match query {
            ExtentQuery::Data => self.allocated.contains(&block),
            ExtentQuery::TopLayer => self.top_layer_holds(block),
        };
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.offset;
        while at < range.end() {
            let end = (at / BLOCK * BLOCK + BLOCK).min(range.end());
            let here = present(at / BLOCK);
            let full = extents.len() == limit;
            match extents.last_mut() {
                Some(last) if last.present == here => last.range.length = end - last.range.offset,
                _ if full => break,
                _ => extents.push(Extent { range: ByteRange::between(at, end), present: here }),
            }
            at = end;
        }
        extents
    }
}

/// Disks, documents, and the network. See the module's header.
#[derive(Clone, Debug, Default)]
pub struct World {
    disks: Vec<Disk>,
    documents: Vec<Option<Vec<u8>>>,
    pub(super) network: Network,
    pub(super) question_failed: bool,
}

impl World {
    /// Nothing yet.
    #[must_use]
    pub fn shared() -> SharedWorld {
        Rc::new(RefCell::new(Self::default()))
    }

    /// Add a disk; gives its number.
    pub fn add_disk(&mut self, disk: Disk) -> usize {
        self.disks.push(disk);
        self.disks.len() - 1
    }

    /// Add a document that does not exist yet; gives its number.
    pub fn add_document(&mut self) -> usize {
        self.documents.push(None);
        self.documents.len() - 1
    }

    /// Whether a question where a disk has data was made to fail.
    #[must_use]
    pub fn question_failed(&self) -> bool {
        self.question_failed
    }

    /// A disk by its number.
    pub fn disk(&mut self, number: usize) -> &mut Disk {
        &mut self.disks[number]
    }

    /// A document's contents.
    #[must_use]
    pub fn document(&self, number: usize) -> Option<&[u8]> {
        self.documents[number].as_deref()
    }

    /// Bytes that may be under way in each direction of connections to come, at least 1.
    pub fn set_pipe_bytes(&mut self, bytes: usize) {
        self.network.pipe_bytes = bytes.max(1);
    }

    pub(super) fn publish(&mut self, number: usize, contents: Option<Vec<u8>>) {
        self.documents[number] = contents;
    }

    /// The power goes.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        for disk in &mut self.disks {
            disk.crash(rng);
        }
    }
}
