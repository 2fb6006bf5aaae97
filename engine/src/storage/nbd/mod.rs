//! An export of somebody else's NBD server as a storage.
//!
//! # Model
//! The protocol is a state machine without I/O (`crate::nbd::client`); here are the sockets. An export is a storage whose operations wait for somebody else,
//! without a descriptor that the kernel could do I/O on: rings hand them to their helper threads ([`Storage::is_remote`]), which wait here. So the copier, `compare`
//! and the sample before a resume use an export as they use a disk, over either ring, and copies of files know nothing of it. Carrying the sockets on
//! the ring thread would save two changes of threads a request, at the price of a second kind of storage in each ring; with requests of
//! half a MiB that is not where the time goes.
//!
//! Requests are pipelined: as many are under way as there are helper threads (12 of 16 for one side of a copy), on up to four connections where the server
//! says that they are one disk (`CAN_MULTI_CONN`), else on one ([`connection`]). The further ones are made together, when there are first two requests at a time.
//!
//! # Blocks
//! A server may insist on whole blocks of up to 64 KiB. Reads of parts of one read it all; writes of parts read, change and write it, one at a time, since the
//! parts of a block may belong to several clusters. What is longer than the server's longest payload comes back short, as the caller expects of any storage.
//!
//! # Durability
//! A flush is `NBD_CMD_FLUSH`. A server without it but with FUA gets every write with that; with neither, nothing can be promised: a copy says so at its start and end, and takes no map.
//!
//! A flush goes to *every* connection there is, makes none, and succeeds if all of them do. The reply to a write and the reply to a flush behind it come over one
//! connection, and so from one instance of the server: what it had acknowledged is on stable storage then, whatever became of others. So nothing hangs on when
//! a connection was made, nor on how well several are one disk. An instance that has started anew can answer for what it took itself, never for what
//! was lost with the old one, for no connection ever leaves the list: a lost one fails every flush from then on.
//!
//! When a connection is lost, all of the storage is: what a server has not flushed may be gone with it. Also what succeeds on another
//! connection meanwhile counts as failed. No connection is made in the place of a lost one, nor later than the first two requests that come
//! together. Further ones go to the address at which the server was found first: its name, looked up again, may mean another server with another disk.
//!
//! # Zeros
//! `NBD_CMD_WRITE_ZEROES` is used wherever it is offered, and without the flag for "fast or not at all": making zeros at the server is never slower than sending
//! them there. `NBD_CMD_TRIM` gives no zeros and is never used for them.

mod connection;
mod open;
mod stream;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use parking_lot::Mutex;
use serde::Serialize;

use self::connection::{Connection, Failure};
use self::stream::Found;
use super::{Descriptors, Limits, Storage};
use crate::nbd::StatusExtent;
use crate::nbd::client::{Agreement, Answer, Request};
use crate::nbd::wire::transmission;
use crate::ring::{Extent, ExtentQuery, IoPath, ZeroMethod};
use crate::units::{ByteRange, Length};
pub use open::plan_nbd;
pub(super) use open::{Layers, open_nbd, open_nbd_source};

/// Most connections to a server that takes several for one.
const MAX_CONNECTIONS: usize = 4;
/// Most bytes that are asked about, or made zero, by one request: what 32 bits hold, in whole blocks of any size.
const MAX_EFFECT: u64 = 0xffff_0000;
/// Alignment that the rest of the engine keeps to; other requests are taken as well.
const ALIGNMENT: u32 = 512;

/// What a server offers, as `engine-cli info` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NbdInfo {
    /// The export's name.
    pub export: String,
    /// Replies to reads come in chunks.
    pub structured_replies: bool,
    /// It tells where there is data (`base:allocation`).
    pub block_status: bool,
    /// It can be flushed.
    pub flush: bool,
    /// Single writes can be made durable.
    pub fua: bool,
    /// Ranges can be made zero without sending zeros.
    pub write_zeroes: bool,
    /// Several connections are one disk.
    pub multi_conn: bool,
    /// Offsets and lengths of requests are multiples of this, in bytes.
    pub minimum_block: u32,
    /// In bytes; multiples of this are fast.
    pub preferred_block: u32,
    /// Most bytes of a read or write.
    pub maximum_payload: u32,
}

/// An export of a server. See the module's header.
#[derive(Debug)]
pub(super) struct NbdStorage {
    name: String,
    export: String,
    found: Found,
    agreement: Agreement,
    /// None ever leaves.
    connections: Mutex<Vec<Arc<Connection>>>,
    /// There will be no more of them but those that are being made.
    grown: AtomicBool,
    lost: OnceLock<Errno>,
    /// Who has it changes parts of blocks.
    parts: Mutex<()>,
}

impl NbdStorage {
    fn new(name: &str, (export, found): (&str, Found), agreement: Agreement, first: Connection) -> Self {
        Self {
            name: name.to_owned(),
            export: export.to_owned(),
            found,
            agreement,
            connections: Mutex::new(vec![Arc::new(first)]),
            grown: AtomicBool::new(!agreement.has(transmission::CAN_MULTI_CONN)),
            lost: OnceLock::new(),
            parts: Mutex::new(()),
        }
    }

    /// Whether it takes no writes.
    pub(super) fn is_read_only(&self) -> bool {
        self.agreement.has(transmission::READ_ONLY)
    }

    /// Whether ranges can be given back.
    pub(super) fn trims(&self) -> bool {
        self.agreement.has(transmission::SEND_TRIM)
    }

    /// Whether the server says what is in the top layer; it was asked for that.
    pub(super) fn tells_layers(&self) -> bool {
        self.agreement.depth.is_some()
    }

    /// What the server offers.
    pub(super) fn describe(&self) -> NbdInfo {
        let Agreement { blocks, structured, allocation, .. } = self.agreement;
        let has = |flag| self.agreement.has(flag);
        NbdInfo {
            export: self.export.clone(),
            structured_replies: structured,
            block_status: allocation.is_some(),
            flush: has(transmission::SEND_FLUSH),
            fua: has(transmission::SEND_FUA),
            write_zeroes: has(transmission::SEND_WRITE_ZEROES),
            multi_conn: has(transmission::CAN_MULTI_CONN),
            minimum_block: blocks.minimum(),
            preferred_block: blocks.preferred(),
            maximum_payload: blocks.maximum_payload(),
        }
    }

    fn length(&self) -> u64 {
        self.agreement.length
    }

    fn block(&self) -> u64 {
        u64::from(self.agreement.blocks.minimum())
    }

    /// Most bytes of a read or write: whole blocks.
    fn most_bytes(&self) -> u64 {
        u64::from(self.agreement.blocks.maximum_payload())
    }

    /// Each write is to be durable by itself.
    fn fua(&self) -> bool {
        !self.agreement.has(transmission::SEND_FLUSH) && self.agreement.has(transmission::SEND_FUA)
    }

    /// The connection with the least to do. When the first one has something, the others are made, once.
    fn connection(&self) -> Arc<Connection> {
        let idlest = self.idlest();
        if idlest.in_flight() == 0 || self.grown.swap(true, Ordering::Relaxed) {
            return idlest;
        }
        for _ in 1..MAX_CONNECTIONS {
            let Some(another) = open::another(&self.export, &self.found, &self.agreement) else { break };
            self.connections.lock().push(Arc::new(another));
        }
        self.idlest()
    }

    fn idlest(&self) -> Arc<Connection> {
        let all = self.connections.lock();
        let idlest = all.iter().min_by_key(|connection| connection.in_flight());
        Arc::clone(idlest.expect("there is a first one"))
    }

    fn call(&self, request: Request, contents: &[u8], into: &mut [u8]) -> Result<Answer, Errno> {
        self.if_not_lost()?;
        self.call_on(&self.connection(), request, contents, into)
    }

    fn call_on(
        &self,
        connection: &Connection,
        request: Request,
        contents: &[u8],
        into: &mut [u8],
    ) -> Result<Answer, Errno> {
        match connection.call(request, contents, into) {
            // Another connection may have been lost meanwhile.
            Ok(answer) => self.if_not_lost().map(|()| answer),
            Err(Failure::Refused(error)) => Err(error.errno()),
            Err(Failure::Lost(errno)) => Err(*self.lost.get_or_init(|| errno)),
        }
    }

    fn if_not_lost(&self) -> Result<(), Errno> {
        self.lost.get().map_or(Ok(()), |errno| Err(*errno))
    }

    /// How many of `count` bytes at `offset`, all on the export, one request moves; `None`: not even a whole block, or not from a block's start.
    fn in_whole_blocks(&self, offset: u64, count: u64) -> Option<u64> {
        let (block, count) = (self.block(), count.min(self.most_bytes()));
        let to_the_end = offset + count == self.length();
        let whole = if to_the_end { count } else { count - count % block };
        (offset.is_multiple_of(block) && whole > 0).then_some(whole)
    }

    /// The whole blocks around `count` bytes at `offset`, or as many as one request takes.
    fn blocks_around(&self, offset: u64, count: u64) -> ByteRange {
        let start = offset - offset % self.block();
        let end = (offset + count).next_multiple_of(self.block()).min(self.length());
        ByteRange::between(start, end.min(start + self.most_bytes()))
    }

    fn read_blocks(&self, range: ByteRange) -> Result<Vec<u8>, Errno> {
        let mut contents = vec![0; usize::try_from(range.length).map_err(|_| Errno::EOVERFLOW)?];
        self.call(Request::Read(range), &[], &mut contents)?;
        Ok(contents)
    }

    /// How many of `bytes` bytes at `offset` lie on the export.
    fn within(&self, offset: u64, bytes: usize) -> u64 {
        self.length().saturating_sub(offset).min(bytes as u64)
    }

    /// The whole blocks within `range`.
    fn blocks_within(&self, range: ByteRange) -> Option<ByteRange> {
        let start = range.offset.next_multiple_of(self.block());
        let end = range.end();
        let end = if end == self.length() { end } else { end - end % self.block() };
        (start < end).then(|| ByteRange::between(start, end))
    }

    fn write_zeros_as_data(&self, range: ByteRange) -> Result<(), Errno> {
        let zeros = vec![0; usize::try_from(range.length.min(1 << 20)).unwrap_or(1 << 20)];
        let mut at = range.offset;
        while at < range.end() {
            let count = usize::try_from(range.end() - at).map_or(zeros.len(), |left| left.min(zeros.len()));
            at += self.write_at(IoPath::Direct, at, &zeros[..count])? as u64;
        }
        Ok(())
    }
}

/// `range` in pieces for one request each.
fn pieces(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let count = range.length.div_ceil(MAX_EFFECT);
    (0..count).map(move |number| {
        let start = range.offset + number * MAX_EFFECT;
        ByteRange::between(start, range.end().min(start + MAX_EFFECT))
    })
}

impl Storage for NbdStorage {
    fn name(&self) -> &str {
        &self.name
    }

    fn limits(&self) -> Limits {
        Limits { length: Length(self.length()), direct_alignment: Some(ALIGNMENT) }
    }

    fn descriptors(&self) -> Option<Descriptors<'_>> {
        None
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn read_at(&self, _: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        let count = self.within(offset, buffer.len());
        if count == 0 {
            return Ok(0);
        }
        if let Some(whole) = self.in_whole_blocks(offset, count) {
            let whole_bytes = usize::try_from(whole).map_err(|_| Errno::EOVERFLOW)?;
            let range = ByteRange::new(offset, whole);
            self.call(Request::Read(range), &[], &mut buffer[..whole_bytes])?;
            return Ok(whole_bytes);
        }
        let blocks = self.blocks_around(offset, count);
        let contents = self.read_blocks(blocks)?;
        let part = part_of(blocks, offset, count)?;
        buffer[..part.len()].copy_from_slice(&contents[part.clone()]);
        Ok(part.len())
    }

    fn write_at(&self, _: IoPath, offset: u64, buffer: &[u8]) -> Result<usize, Errno> {
        let count = self.within(offset, buffer.len());
        if count == 0 {
            return if buffer.is_empty() { Ok(0) } else { Err(Errno::ENOSPC) };
        }
        let fua = self.fua();
        if let Some(whole) = self.in_whole_blocks(offset, count) {
            let whole_bytes = usize::try_from(whole).map_err(|_| Errno::EOVERFLOW)?;
            let range = ByteRange::new(offset, whole);
            self.call(Request::Write { range, fua }, &buffer[..whole_bytes], &mut [])?;
            return Ok(whole_bytes);
        }
        let _alone = self.parts.lock();
        let range = self.blocks_around(offset, count);
        let mut contents = self.read_blocks(range)?;
        let part = part_of(range, offset, count)?;
        contents[part.clone()].copy_from_slice(&buffer[..part.len()]);
        self.call(Request::Write { range, fua }, &contents, &mut [])?;
        Ok(part.len())
    }

    fn write_zeroes(&self, range: ByteRange, method: ZeroMethod) -> Result<(), Errno> {
        if !self.agreement.has(transmission::SEND_WRITE_ZEROES) {
            return Err(Errno::EOPNOTSUPP);
        }
        if range.end() > self.length() {
            return Err(Errno::EINVAL);
        }
        let Some(blocks) = self.blocks_within(range) else { return self.write_zeros_as_data(range) };
        let (no_hole, fua) = (method == ZeroMethod::Keep, self.fua());
        for range in pieces(blocks) {
            self.call(Request::WriteZeroes { range, no_hole, fua }, &[], &mut [])?;
        }
        self.write_zeros_as_data(ByteRange::between(range.offset, blocks.offset))?;
        self.write_zeros_as_data(ByteRange::between(blocks.end(), range.end()))
    }

    fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        if !self.trims() {
            return Err(Errno::EOPNOTSUPP);
        }
        if range.end() > self.length() {
            return Err(Errno::EINVAL);
        }
        for range in self.blocks_within(range).into_iter().flat_map(pieces) {
            self.call(Request::Trim(range), &[], &mut [])?;
        }
        Ok(())
    }

    fn allocate(&self, _: &[ByteRange]) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn can_be_flushed(&self) -> bool {
        self.agreement.has(transmission::SEND_FLUSH) || self.agreement.has(transmission::SEND_FUA)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.if_not_lost()?;
        if self.agreement.has(transmission::SEND_FLUSH) {
            // Taken now: what was acknowledged before came over one of these.
            let all = self.connections.lock().clone();
            for connection in all {
                self.call_on(&connection, Request::Flush, &[], &mut [])?;
            }
        }
        Ok(())
    }

    /// Whatever is cached is cached by the server.
    fn drop_cache(&self, _: ByteRange) -> Result<(), Errno> {
        Ok(())
    }

    /// What reads as zeros counts as a hole; what has no space behind it, but may read as anything, as data. In the top layer is what the server says is
    /// at depth 1: 0 is nowhere, 2 and more in a layer below.
    fn extents(&self, range: ByteRange, query: ExtentQuery, limit: usize) -> Result<Vec<Extent>, Errno> {
        let tells = match query {
            ExtentQuery::Data => self.agreement.allocation.is_some(),
            ExtentQuery::TopLayer => self.tells_layers(),
        };
        if !tells || range.offset >= self.length() {
            return Ok(vec![Extent { range, present: true }]);
        }
        let start = range.offset - range.offset % self.block();
        let end = range.end().next_multiple_of(self.block()).min(self.length()).min(start + MAX_EFFECT);
        // One may lie before the range, within its first block.
        let (asked, most) = (ByteRange::between(start, end), limit.saturating_add(1));
        let (request, present): (_, fn(u32) -> bool) = match query {
            ExtentQuery::Data => {
                (Request::Status { range: asked, most }, |flags| flags & StatusExtent::ZERO == 0)
            }
            ExtentQuery::TopLayer => (Request::Depth { range: asked, most }, |depth| depth == 1),
        };
        let Answer::Extents(told) = self.call(request, &[], &mut [])? else { return Err(Errno::EPROTO) };
        let mut extents = extents_in(range, start, &told, present);
        extents.truncate(limit);
        if extents.is_empty() {
            let rest_of_block = ByteRange::between(range.offset, range.end().min(start + self.block()));
            extents.push(Extent { range: rest_of_block, present: true });
        }
        Ok(extents)
    }
}

/// Where `count` bytes at `offset` lie in `blocks`, as far as they do.
fn part_of(blocks: ByteRange, offset: u64, count: u64) -> Result<std::ops::Range<usize>, Errno> {
    let end = (offset + count).min(blocks.end());
    let bytes = |count: u64| usize::try_from(count).map_err(|_| Errno::EOVERFLOW);
    Ok(bytes(offset - blocks.offset)?..bytes(end - blocks.offset)?)
}

/// What a server has `told` of a range from `start` on, as far as it lies in `range`; `present`: which flags mean that there is something.
fn extents_in(
    range: ByteRange,
    start: u64,
    told: &[StatusExtent],
    present: impl Fn(u32) -> bool,
) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::with_capacity(told.len());
    let mut at = start;
    for StatusExtent { length, flags } in told {
        let piece = ByteRange::new(at, *length);
        at = piece.end();
        let Some(inside) = piece.intersection(range).filter(|inside| !inside.is_empty()) else { continue };
        let present = present(*flags);
        match extents.last_mut() {
            Some(last) if last.present == present => last.range.length += inside.length,
            _ => extents.push(Extent { range: inside, present }),
        }
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_tells_is_cut_to_the_range_and_merged() {
        let told = |list: &[(u64, u32)]| -> Vec<StatusExtent> {
            list.iter().map(|&(length, flags)| StatusExtent { length, flags }).collect()
        };
        let range = ByteRange::between(100, 1000);
        let expected = [
            Extent { range: ByteRange::between(100, 164), present: false },
            Extent { range: ByteRange::between(164, 468), present: true },
            Extent { range: ByteRange::between(468, 1000), present: false },
        ];
        let data = |flags| flags & StatusExtent::ZERO == 0;
        assert_eq!(extents_in(range, 0, &told(&[(64, 0)]), data), []);
        assert_eq!(extents_in(range, 0, &told(&[(64, 0), (100, 2), (304, 1), (600, 3)]), data), expected);
    }

    #[test]
    fn effects_are_cut_to_what_a_request_holds() {
        let whole = ByteRange::new(512, 3 * MAX_EFFECT);
        let cut: Vec<_> = pieces(whole).collect();
        assert_eq!(cut.len(), 3);
        assert!(cut.iter().all(|piece| piece.length == MAX_EFFECT));
        assert_eq!((cut[0].offset, cut[2].end()), (512, whole.end()));
        assert_eq!(pieces(ByteRange::new(7, 9)).collect::<Vec<_>>(), [ByteRange::new(7, 9)]);
    }
}
