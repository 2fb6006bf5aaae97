//! Whether replies are right.

use engine::units::ByteRange;

use super::{LENGTH, Open, World};
use crate::client::*;

impl World {
    /// The error that the rules give a request, whatever the disk says.
    fn refusal(&self, request: &Request) -> Option<u32> {
        let Request { command, flags, offset, length, .. } = *request;
        let allowed = FUA
            | match command {
                READ if self.structured => DF,
                READ | WRITE | FLUSH | TRIM | CACHE => 0,
                WRITE_ZEROES => NO_HOLE | FAST_ZERO,
                BLOCK_STATUS => REQ_ONE,
                _ => return Some(EINVAL),
            };
        if flags & !allowed != 0 {
            return Some(EINVAL);
        }
        let changes = [WRITE, TRIM, WRITE_ZEROES].contains(&command);
        if changes && self.read_only {
            return Some(EPERM);
        }
        if command == BLOCK_STATUS && !self.structured {
            return Some(EINVAL);
        }
        if command != FLUSH && u128::from(offset) + u128::from(length) > u128::from(LENGTH) {
            return Some(if command == WRITE || command == WRITE_ZEROES { ENOSPC } else { EINVAL });
        }
        (command == BLOCK_STATUS && length == 0).then_some(EINVAL)
    }

    /// A final reply has come.
    pub(super) fn check_reply(&mut self, open: Open) {
        let Open { request, reply, .. } = &open;
        if let Some(error) = self.refusal(request) {
            assert_eq!(reply.errors, [(error, None)], "{request:?}");
            assert!(reply.data.is_empty() && open.parts.is_empty());
            assert_eq!(reply.simple, !self.structured);
            self.seen.refused += 1;
            return;
        }
        match request.command {
            READ => self.check_read(&open),
            BLOCK_STATUS => {
                assert_eq!((reply.errors.len(), reply.status.len()), (0, 2), "{request:?}");
                assert_eq!(reply.status[1].1, [(request.length, 1)]);
                let first = reply.status[0].1[0];
                assert_eq!(first, (request.length.min(512), 0));
            }
            WRITE | TRIM | WRITE_ZEROES => self.check_change(&open),
            _ => assert_eq!(reply.errors, []),
        }
    }

    fn check_read(&mut self, open: &Open) {
        let Open { request, reply, since, disk, .. } = open;
        assert_eq!(reply.simple, !self.structured, "{request:?}");
        let range = ByteRange::new(request.offset, u64::from(request.length));
        let parts = if self.is_bad(range) {
            let [(EIO, offset)] = reply.errors[..] else { panic!("{request:?}: {:?}", reply.errors) };
            assert_eq!(offset.is_some(), self.structured);
            self.seen.failed += 1;
            let before = |part: &&(u64, Vec<u8>)| {
                let part = ByteRange::new(part.0, part.1.len() as u64);
                // What is filled up in a reply as a whole holds from its beginning to the error.
                offset.is_some_and(|offset| part.end() <= offset) || !self.is_bad(part)
            };
            reply.data.iter().filter(before).cloned().collect()
        } else {
            assert_eq!(reply.errors, [], "{request:?}");
            self.seen.good_reads += 1;
            self.seen.holes += reply.holes as u64;
            reply.whole(request);
            reply.data.clone()
        };
        for (offset, bytes) in parts {
            for (place, byte) in (offset..).zip(bytes) {
                let mut may = disk[place as usize] == byte;
                may |= self.changes.iter().rev().take_while(|change| change.at > *since).any(|change| {
                    let index = place.wrapping_sub(change.range.offset) as usize;
                    change.bytes.get(index) == Some(&byte)
                });
                assert!(may, "{request:?} read {byte} at {place}");
            }
        }
    }

    fn check_change(&mut self, open: &Open) {
        let Open { request, reply, .. } = open;
        let range = ByteRange::new(request.offset, u64::from(request.length));
        let has = |flag: u16| request.flags & flag != 0;
        if request.length > 0 && has(FAST_ZERO) {
            assert_eq!(reply.errors, [(ENOTSUP, None)]);
            return;
        }
        if self.is_bad(range) {
            let error = if request.command == WRITE { ENOSPC } else { EIO };
            assert!(open.failed);
            assert_eq!(reply.errors.iter().map(|error| error.0).collect::<Vec<_>>(), [error], "{request:?}");
            self.seen.failed += 1;
            return;
        }
        assert_eq!((reply.errors.len(), open.failed), (0, false), "{request:?}: {reply:?}");
        let all: u64 = open.parts.iter().map(|(part, _)| part.length).sum();
        assert_eq!(all, range.length, "{request:?} was not done as a whole");
        for (part, _) in &open.parts {
            let start = (part.offset - range.offset) as usize;
            let done = self.changes.iter().any(|change| {
                let wanted = if request.command == WRITE {
                    request.payload[start..start + part.length as usize] == change.bytes
                } else {
                    change.bytes.iter().all(|&byte| byte == 0)
                };
                change.range == *part && change.at > open.since && wanted
            });
            assert!(done, "{request:?}: {part} was answered before it was done");
        }
        self.seen.good_writes += 1;
        if has(FUA) && !open.parts.iter().all(|(_, durable)| *durable) {
            self.seen.durable_long += 1;
            let flushed = self.flushes.iter().any(|&(issued, _)| issued >= open.settled);
            assert!(flushed, "{request:?} is not durable");
        }
    }

    /// That is right for one reason only.
    pub(super) fn check_cut_off(&mut self) {
        self.seen.cut_off += 1;
        let bad = self.open.values().any(|open| {
            let range = ByteRange::new(open.request.offset, u64::from(open.request.length));
            open.request.command == READ && self.refusal(&open.request).is_none() && self.is_bad(range)
        });
        assert!(bad && !self.structured);
    }
}
