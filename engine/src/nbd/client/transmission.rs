//! Requests and their replies, once an export is chosen.
//!
//! # Model
//! [`Transmission::begin`] gives a request its cookie and its header. [`Transmission::advance`] is shown what has come and was not taken yet, and says what
//! comes next, one [`Step`] at a time. Replies come in any order, chunks of several replies one among the other. After [`Step::Data`] the
//! caller takes that many bytes off the stream itself, to where they belong, before it asks again.
//!
//! # What is believed
//! A cookie that nobody has is a violation, and so is a chunk beyond its request, a byte that comes twice, a read that ends without all of its bytes and
//! without an error, block status of a context that was not chosen. An error's number that is not known counts as `EINVAL`. A reply with an
//! error is an error whatever else is in it.
//!
//! # Bounds
//! [`MAX_REQUESTS`] requests; of each the extents it asked for and the pieces that have come of it. A chunk has at most [`MAX_EXTENTS`] extents; a reply at
//! most [`MAX_ERRORS`] errors.

use std::collections::BTreeMap;

use super::Violation;
use super::coverage::{Coverage, Refused};
use super::negotiation::Agreement;
use crate::nbd::connection::StatusExtent;
use crate::nbd::wire::{
    ChunkHeader, Fields, MAX_PAYLOAD, RequestHeader, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC, WireError,
    chunk, command, command_flag, simple_reply_of,
};
use crate::units::ByteRange;

/// Most requests at a time.
pub const MAX_REQUESTS: usize = 1024;
/// Most extents in one chunk.
pub const MAX_EXTENTS: u32 = 1 << 20;
/// Most chunks with an error in one reply.
pub const MAX_ERRORS: u32 = 16;
/// Most bytes of a chunk with an error: its number, the length of a message, the message, an offset.
const MAX_ERROR_BYTES: u32 = 4 + 2 + 4096 + 8;
/// Most bytes that [`Transmission::advance`] ever needs to see at once.
pub const MAX_NEEDED: usize = MAX_ERROR_BYTES as usize;

/// What an export is asked for. Ranges are not empty, keep to the block sizes agreed on, and lie on the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Its contents.
    Read(ByteRange),
    /// To take contents, which follow the header.
    Write {
        /// Where.
        range: ByteRange,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// To bring everything to stable storage that it has replied to.
    Flush,
    /// To give a range back.
    Trim(ByteRange),
    /// To make a range zero.
    WriteZeroes {
        /// Where.
        range: ByteRange,
        /// Keep the space.
        no_hole: bool,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// Where there is data.
    Status {
        /// Where.
        range: ByteRange,
        /// Most extents that are kept of the answer.
        most: usize,
    },
    /// In which layer it is allocated.
    Depth {
        /// Where.
        range: ByteRange,
        /// Most extents that are kept of the answer.
        most: usize,
    },
}

impl Request {
    fn header(&self, cookie: u64) -> RequestHeader {
        let fua = |fua: bool| if fua { command_flag::FUA } else { 0 };
        let nowhere = ByteRange::new(0, 0);
        let (command, flags, range) = match *self {
            Self::Read(range) => (command::READ, 0, range),
            Self::Write { range, fua: durable } => (command::WRITE, fua(durable), range),
            Self::Flush => (command::FLUSH, 0, nowhere),
            Self::Trim(range) => (command::TRIM, 0, range),
            Self::WriteZeroes { range, no_hole, fua: durable } => {
                let keep = if no_hole { command_flag::NO_HOLE } else { 0 };
                (command::WRITE_ZEROES, keep | fua(durable), range)
            }
            Self::Status { range, .. } | Self::Depth { range, .. } => (command::BLOCK_STATUS, 0, range),
        };
        let length = u32::try_from(range.length).expect("a request is shorter than 4 GiB");
        RequestHeader { flags, command, cookie, offset: range.offset, length }
    }

    /// Bytes of contents that the reply brings.
    fn reads(&self) -> u32 {
        match self {
            Self::Read(range) => u32::try_from(range.length).expect("checked when it began"),
            _ => 0,
        }
    }
}

/// What a request has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It was done; of a read, all bytes have come.
    Done,
    /// What was asked for, from its start: at least one, none empty, neighbours differ, none beyond the range.
    Extents(Vec<StatusExtent>),
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many bytes, from the first one not taken, at most [`MAX_NEEDED`].
    Need(usize),
    /// The next `length` bytes of the stream are those of the read `cookie` from `at` on. Take them.
    Data {
        /// Whose.
        cookie: u64,
        /// First byte, from the read's own first.
        at: usize,
        /// How many.
        length: usize,
    },
    /// So many bytes of the read `cookie` are zeros, from `at` on.
    Zeros {
        /// Whose.
        cookie: u64,
        /// First byte, from the read's own first.
        at: usize,
        /// How many.
        length: usize,
    },
    /// The request is over, its cookie free.
    Ended {
        /// Which.
        cookie: u64,
        /// How.
        result: Result<Answer, WireError>,
    },
}

/// A request without its final reply.
#[derive(Clone, Debug)]
struct Open {
    request: Request,
    coverage: Coverage,
    /// Those that are kept, without gaps from the start of the range.
    extents: Vec<StatusExtent>,
    /// Bytes that extents were told of, and that those have which are kept.
    described: u64,
    kept: u64,
    /// The context that it asks about was told of, and the other one.
    told: [bool; 2],
    error: Option<WireError>,
    errors: u32,
}

impl Open {
    fn new(request: Request) -> Self {
        Self {
            request,
            coverage: Coverage::new(request.reads()),
            extents: Vec::new(),
            described: 0,
            kept: 0,
            told: [false; 2],
            error: None,
            errors: 0,
        }
    }

    /// The range that a status request asked about, and how many extents are kept.
    fn asked(&self) -> Option<(ByteRange, usize)> {
        match self.request {
            Request::Status { range, most } | Request::Depth { range, most } => Some((range, most)),
            _ => None,
        }
    }

    /// The server tells of `length` bytes more.
    fn describe(&mut self, length: u32, flags: u32) -> Result<(), Violation> {
        let (range, most) = self.asked().ok_or(Violation("block status that was not asked for"))?;
        if length == 0 || self.described >= range.length {
            return Err(Violation("block status beyond what was asked for"));
        }
        let inside = u64::from(length).min(range.length - self.described);
        let gapless = self.kept == self.described;
        self.described += inside;
        let full = self.extents.len() >= most;
        match self.extents.last_mut() {
            Some(last) if gapless && last.flags == flags => last.length += inside,
            _ if gapless && !full => {
                self.extents.push(StatusExtent { length: inside, flags });
            }
            _ => return Ok(()),
        }
        self.kept = self.described;
        Ok(())
    }
}

/// Where in the stream of replies it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A header comes.
    Header,
    /// The payload of a chunk comes.
    Chunk { cookie: u64, part: Part, done: bool },
    /// The reply is there as a whole.
    Ending { cookie: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// The offset, and so many bytes of contents behind it.
    Data(u32),
    /// Offset and length.
    Hole,
    /// The number of a context, and so many extents behind it.
    Status(u32),
    /// So many extents.
    Extents(u32),
    /// So many extents of the other context: a server tells all that were chosen, whichever is asked about.
    Passed(u32),
    /// So many bytes about an error.
    Error(u32),
}

/// See the module's header.
#[derive(Clone, Debug)]
pub struct Transmission {
    structured: bool,
    allocation: Option<u32>,
    depth: Option<u32>,
    next_cookie: u64,
    open: BTreeMap<u64, Open>,
    place: Place,
    broken: Option<Violation>,
}

impl Transmission {
    /// Under `agreement`.
    #[must_use]
    pub fn new(agreement: &Agreement) -> Self {
        let Agreement { structured, allocation, depth, .. } = *agreement;
        let open = BTreeMap::new();
        Self { structured, allocation, depth, next_cookie: 1, open, place: Place::Header, broken: None }
    }

    /// Requests without their final reply.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.open.len()
    }

    /// Begin a request; gives its cookie, and the header to send (before the contents of a write).
    ///
    /// # Panics
    /// If [`MAX_REQUESTS`] are in flight, or its range is not as [`Request`] says.
    pub fn begin(&mut self, request: Request) -> (u64, [u8; RequestHeader::BYTES]) {
        assert!(self.open.len() < MAX_REQUESTS, "{MAX_REQUESTS} requests are in flight already");
        let header = request.header(self.next_cookie);
        assert!(header.length > 0 || request == Request::Flush, "{request:?} is empty");
        if let Request::Read(range) | Request::Write { range, .. } = request {
            assert!(range.length <= u64::from(MAX_PAYLOAD), "{request:?} is too long");
        }
        self.next_cookie += 1;
        self.open.insert(header.cookie, Open::new(request));
        (header.cookie, header.encode())
    }

    /// The header of a farewell, after which nothing is sent.
    #[must_use]
    pub fn farewell() -> [u8; RequestHeader::BYTES] {
        RequestHeader { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 }.encode()
    }

    /// Take what has come from the front of `input`; gives how many bytes were taken, and what comes next.
    ///
    /// # Errors
    /// The server broke the protocol: nothing that follows means anything.
    pub fn advance(&mut self, input: &[u8]) -> Result<(usize, Step), Violation> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        let mut taken = 0;
        loop {
            let moved = match self.place {
                Place::Header => self.on_header(&input[taken..]),
                Place::Chunk { cookie, part, done } => self.on_part(cookie, part, done, &input[taken..]),
                Place::Ending { cookie } => self.end(cookie).map(|step| (0, Some(step))),
            };
            match moved {
                Ok((more, step)) => {
                    taken += more;
                    if let Some(step) = step {
                        return Ok((taken, step));
                    }
                }
                Err(violation) => {
                    self.broken = Some(violation);
                    return Err(violation);
                }
            }
        }
    }

    fn request(&mut self, cookie: u64) -> Result<&mut Open, Violation> {
        self.open.get_mut(&cookie).ok_or(Violation("a reply to a request that was not made"))
    }

    fn on_header(&mut self, input: &[u8]) -> Result<(usize, Option<Step>), Violation> {
        let Some(first) = input.first_chunk::<SIMPLE_REPLY_BYTES>() else {
            return Ok((0, Some(Step::Need(SIMPLE_REPLY_BYTES))));
        };
        if first[..4] == SIMPLE_REPLY_MAGIC.to_be_bytes() {
            let (cookie, error) = simple_reply_of(first).ok_or(Violation("no reply where one was due"))?;
            return Ok((SIMPLE_REPLY_BYTES, self.on_simple(cookie, error)?));
        }
        let Some(header) = input.first_chunk::<{ ChunkHeader::BYTES }>() else {
            return Ok((0, Some(Step::Need(ChunkHeader::BYTES))));
        };
        let (header, length) = ChunkHeader::decode(header).ok_or(Violation("no reply where one was due"))?;
        self.on_chunk(header, length)?;
        Ok((ChunkHeader::BYTES, None))
    }

    fn on_simple(&mut self, cookie: u64, error: Option<WireError>) -> Result<Option<Step>, Violation> {
        let structured = self.structured;
        let open = self.request(cookie)?;
        let length = open.request.reads();
        if length > 0 && structured {
            return Err(Violation("a read answered in one piece, where chunks were agreed on"));
        }
        open.error = error;
        let brings = length > 0 && error.is_none();
        if brings {
            open.coverage.add(0, u64::from(length)).map_err(misplaced)?;
        }
        self.place = Place::Ending { cookie };
        Ok(brings.then_some(Step::Data { cookie, at: 0, length: length as usize }))
    }

    /// What comes behind the header of a chunk.
    fn on_chunk(&mut self, header: ChunkHeader, length: u32) -> Result<(), Violation> {
        let ChunkHeader { done, kind, cookie } = header;
        if !self.structured {
            return Err(Violation("a chunk, where no chunks were agreed on"));
        }
        let open = self.request(cookie)?;
        let reads = open.request.reads();
        let part = match kind {
            chunk::NONE if length == 0 && done => {
                self.place = Place::Ending { cookie };
                return Ok(());
            }
            chunk::OFFSET_DATA if length > 8 && length - 8 <= reads => Part::Data(length - 8),
            chunk::OFFSET_HOLE if length == 12 && reads > 0 => Part::Hole,
            chunk::BLOCK_STATUS if open.asked().is_some() && open.told != [true; 2] => {
                let extents = length.saturating_sub(4) / 8;
                if length != 4 + 8 * extents || !(1..=MAX_EXTENTS).contains(&extents) {
                    return Err(Violation("block status of a strange length"));
                }
                Part::Status(extents)
            }
            _ if kind & chunk::ERROR_BIT != 0 && (6..=MAX_ERROR_BYTES).contains(&length) => {
                open.errors += 1;
                if open.errors > MAX_ERRORS {
                    return Err(Violation("errors without end"));
                }
                Part::Error(length)
            }
            _ => return Err(Violation("a chunk that does not go with its request")),
        };
        self.place = Place::Chunk { cookie, part, done };
        Ok(())
    }

    fn on_part(
        &mut self,
        cookie: u64,
        part: Part,
        done: bool,
        input: &[u8],
    ) -> Result<(usize, Option<Step>), Violation> {
        let needed = match part {
            Part::Data(_) | Part::Extents(_) | Part::Passed(_) => 8,
            Part::Hole => 12,
            Part::Status(_) => 4,
            Part::Error(length) => length as usize,
        };
        let Some(mut fields) = input.get(..needed).map(Fields) else {
            return Ok((0, Some(Step::Need(needed))));
        };
        let after = if done { Place::Ending { cookie } } else { Place::Header };
        let spoilt = Violation("a chunk that is cut off");
        let (allocation, depth) = (self.allocation, self.depth);
        let open = self.request(cookie)?;
        let mut step = None;
        let place = match part {
            Part::Data(length) => {
                let at = place_of(open, fields.u64().ok_or(spoilt)?, length)?;
                step = Some(Step::Data { cookie, at, length: length as usize });
                after
            }
            Part::Hole => {
                let (offset, length) = fields.u64().zip(fields.u32()).ok_or(spoilt)?;
                let at = place_of(open, offset, length)?;
                step = Some(Step::Zeros { cookie, at, length: length as usize });
                after
            }
            Part::Status(extents) => {
                let by_depth = matches!(open.request, Request::Depth { .. });
                let (wanted, other) = if by_depth { (depth, allocation) } else { (allocation, depth) };
                let id = fields.u32().ok_or(spoilt)?;
                let part = if wanted == Some(id) { Part::Extents(extents) } else { Part::Passed(extents) };
                if wanted != Some(id) && other != Some(id) {
                    return Err(Violation("block status of a context that was not chosen"));
                }
                let told = &mut open.told[usize::from(wanted != Some(id))];
                if std::mem::replace(told, true) {
                    return Err(Violation("block status of one context twice"));
                }
                Place::Chunk { cookie, part, done }
            }
            Part::Passed(left) => match left - 1 {
                0 => after,
                left => Place::Chunk { cookie, part: Part::Passed(left), done },
            },
            Part::Extents(left) => {
                let (length, flags) = fields.u32().zip(fields.u32()).ok_or(spoilt)?;
                open.describe(length, flags)?;
                match left - 1 {
                    0 => after,
                    left => Place::Chunk { cookie, part: Part::Extents(left), done },
                }
            }
            Part::Error(_) => {
                let (code, message) = fields.u32().zip(fields.u16()).ok_or(spoilt)?;
                let error = WireError::from_code(code).ok_or(Violation("an error that is none"))?;
                fields.bytes(usize::from(message)).ok_or(Violation("a message that is cut off"))?;
                open.error.get_or_insert(error);
                after
            }
        };
        self.place = place;
        Ok((needed, step))
    }

    /// The last of the reply to `cookie` is there.
    fn end(&mut self, cookie: u64) -> Result<Step, Violation> {
        let open = self.open.remove(&cookie).ok_or(Violation("a reply to a request that was not made"))?;
        self.place = Place::Header;
        let result = match open.error {
            Some(error) => Err(error),
            None if !open.coverage.is_complete() => {
                return Err(Violation("a read that ended without all of its bytes"));
            }
            None if open.asked().is_some() && open.extents.is_empty() => {
                return Err(Violation("block status that ended without any"));
            }
            None if open.asked().is_some() => Ok(Answer::Extents(open.extents)),
            None => Ok(Answer::Done),
        };
        Ok(Step::Ended { cookie, result })
    }
}

/// Where contents of a read go that lie at `offset` of the export.
fn place_of(open: &mut Open, offset: u64, length: u32) -> Result<usize, Violation> {
    let Request::Read(range) = open.request else {
        return Err(Violation("contents that were not asked for"));
    };
    if length == 0 {
        return Err(Violation("an empty chunk"));
    }
    let at = offset.checked_sub(range.offset).ok_or(misplaced(Refused::Beyond))?;
    open.coverage.add(at, u64::from(length)).map_err(misplaced)?;
    usize::try_from(at).map_err(|_| misplaced(Refused::Beyond))
}

fn misplaced(refused: Refused) -> Violation {
    Violation(match refused {
        Refused::Beyond => "contents beyond what was asked for",
        Refused::Twice => "the same contents twice",
        Refused::Scattered => "contents in too many pieces",
    })
}
