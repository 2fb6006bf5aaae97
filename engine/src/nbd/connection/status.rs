//! Block status: what the disk says of a range, for each of the contexts that were selected, cut to what a reply may hold.

use super::action::{IoKind, Outcome, StatusExtent};
use super::output::Output;
use super::table::{Body, Failure, Io, Key, Transmission, Turn};
use crate::nbd::wire::{ChunkHeader, WireError, chunk};
use crate::units::ByteRange;

/// Bytes of an extent on the wire.
const EXTENT_BYTES: usize = 8;
/// Bytes of a chunk beyond its extents.
const CHUNK_BYTES: usize = ChunkHeader::BYTES + 4;

/// A block status request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Status {
    pub(super) range: ByteRange,
    /// Only the first extent is wanted.
    pub(super) one: bool,
    /// Most extents of a context, and what the reply holds of its account, once it was given to the disk.
    pub(super) extents: usize,
    pub(super) charge: usize,
}

impl Transmission {
    fn status(&mut self, key: Key) -> &mut Status {
        match &mut self.requests[key].body {
            Body::Status(status) => status,
            _ => unreachable!("it asks for block status"),
        }
    }

    /// Give it to the disk, if there is memory for its reply.
    pub(super) fn start_status(&mut self, key: Key, output: &mut Output) -> Turn {
        let contexts = self.contexts.len();
        // Whatever was selected, the reply fits into what a connection can always have.
        let fitting = (self.limits.reserve_bytes / contexts - CHUNK_BYTES) / EXTENT_BYTES;
        let most = self.limits.extents.min(fitting);
        let status = self.status(key);
        let extents = if status.one { 1 } else { most };
        let charge = contexts * (CHUNK_BYTES + extents * EXTENT_BYTES);
        if !output.outgoing.take(charge) {
            return Turn::NoRoom;
        }
        status.extents = extents;
        status.charge = charge;
        let range = status.range;
        let contexts = self.contexts.iter().map(|selected| selected.context.clone()).collect();
        self.submit(key, range, 0, IoKind::BlockStatus { range, contexts, extents });
        Turn::Over
    }

    pub(super) fn status_found(&mut self, io: &Io, outcome: Outcome, output: &mut Output) {
        let status = *self.status(io.request);
        let request = self.end(io.request);
        let reply = match outcome {
            Outcome::Extents(lists) => self.status_reply(request.cookie, &status, &lists),
            Outcome::Failed(error) => Err(error),
            // An answer to another question: the driver's mistake.
            Outcome::Done | Outcome::Data(_) | Outcome::Zero => Err(WireError::Io),
        };
        match reply {
            Ok(reply) => {
                debug_assert!(reply.len() <= status.charge, "it holds what was reckoned");
                output.payload(reply, status.charge);
                output.end_reply();
            }
            Err(error) => {
                output.outgoing.give(status.charge);
                self.fail(output, request.cookie, Failure::at(error, status.range));
            }
        }
    }

    /// One chunk for each context.
    fn status_reply(
        &self,
        cookie: u64,
        status: &Status,
        lists: &[Vec<StatusExtent>],
    ) -> Result<Vec<u8>, WireError> {
        if lists.len() != self.contexts.len() {
            return Err(WireError::Io);
        }
        let mut reply = Vec::new();
        for (index, (selected, list)) in self.contexts.iter().zip(lists).enumerate() {
            let extents = fit(list, status.range.length, status.extents);
            if extents.is_empty() {
                return Err(WireError::Io);
            }
            let done = index + 1 == lists.len();
            let more = extents.len() * EXTENT_BYTES;
            let header = ChunkHeader { done, kind: chunk::BLOCK_STATUS, cookie };
            header.put(&mut reply, &[&selected.id.to_be_bytes()], more);
            for extent in extents {
                let length = u32::try_from(extent.length).expect("within a request");
                reply.extend_from_slice(&length.to_be_bytes());
                reply.extend_from_slice(&extent.flags.to_be_bytes());
            }
        }
        Ok(reply)
    }
}

/// The first `most` extents of `list` within `length` bytes. Neighbours that say the same are one; what is empty is left out.
fn fit(list: &[StatusExtent], length: u64, most: usize) -> Vec<StatusExtent> {
    let mut left = length;
    let mut fitted: Vec<StatusExtent> = Vec::new();
    for extent in list {
        let length = extent.length.min(left);
        if length == 0 {
            continue;
        }
        let full = fitted.len() == most;
        match fitted.last_mut() {
            Some(last) if last.flags == extent.flags => last.length += length,
            _ if full => break,
            _ => fitted.push(StatusExtent { length, flags: extent.flags }),
        }
        left -= length;
    }
    fitted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitted(list: &[(u64, u32)], length: u64, most: usize) -> Vec<(u64, u32)> {
        let list: Vec<_> = list.iter().map(|&(length, flags)| StatusExtent { length, flags }).collect();
        fit(&list, length, most).into_iter().map(|extent| (extent.length, extent.flags)).collect()
    }

    #[test]
    fn extents_are_cut_joined_and_counted() {
        assert_eq!(fitted(&[(10, 0), (20, 3)], 15, 9), [(10, 0), (5, 3)]);
        assert_eq!(fitted(&[(10, 0), (20, 3)], 10, 9), [(10, 0)]);
        assert_eq!(fitted(&[(10, 0), (0, 3), (20, 0), (1, 1)], 99, 1), [(30, 0)]);
        assert_eq!(fitted(&[(1, 0), (1, 1), (1, 0)], 99, 2), [(1, 0), (1, 1)]);
        assert_eq!(fitted(&[(0, 0)], 99, 2), []);
        assert_eq!(fitted(&[(u64::MAX, 2)], u64::from(u32::MAX), 1), [(u64::from(u32::MAX), 2)]);
    }
}
