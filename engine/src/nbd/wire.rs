//! The numbers and headers of the NBD protocol, as its `doc/proto.md` has them. All integers are big-endian.

use nix::errno::Errno;

use crate::error::{Error, ErrorKind, Refusal};

/// First word of a server's greeting, `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second word of a greeting, and first word of every option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Second word of a greeting of servers from before 2012, which know one export and no options.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Longest string of the protocol: names, descriptions, queries, messages.
pub const MAX_STRING_BYTES: usize = 4096;
/// Longest payload that anybody may send; who sends a longer one means harm.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Flags of the greeting (16 bits) and of the client's answer to it (32 bits).
pub mod handshake {
    /// More than one option; errors can be told.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeros after an export chosen with `NBD_OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Flags of an export.
#[allow(missing_docs, reason = "named as in the protocol")]
pub mod transmission {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options.
#[allow(missing_docs, reason = "named as in the protocol")]
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
#[allow(missing_docs, reason = "named as in the protocol")]
pub mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR_BIT + 1;
    pub const ERR_POLICY: u32 = ERROR_BIT + 2;
    pub const ERR_INVALID: u32 = ERROR_BIT + 3;
    pub const ERR_PLATFORM: u32 = ERROR_BIT + 4;
    pub const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    pub const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT + 8;
    pub const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
}

/// What a client can ask to be told of an export.
#[allow(missing_docs, reason = "named as in the protocol")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Requests.
#[allow(missing_docs, reason = "named as in the protocol")]
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
#[allow(missing_docs, reason = "named as in the protocol")]
pub mod command_flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Chunks of structured replies.
#[allow(missing_docs, reason = "named as in the protocol")]
pub mod chunk {
    /// Flag: the last one of its reply.
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error.
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT + 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// The errors that a reply can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WireError {
    /// `EPERM`: the export is read-only.
    Permission,
    /// `EIO`.
    Io,
    /// `ENOMEM`.
    NoMemory,
    /// `EINVAL`: the request makes no sense.
    Invalid,
    /// `ENOSPC`: out of space, out of quota, or beyond the end.
    NoSpace,
    /// `EOVERFLOW`: too long to do it in one.
    Overflow,
    /// `ENOTSUP`: making zeros would not be fast.
    NotSupported,
    /// `ESHUTDOWN`: the server is going.
    Shutdown,
}

impl WireError {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Permission,
        Self::Io,
        Self::NoMemory,
        Self::Invalid,
        Self::NoSpace,
        Self::Overflow,
        Self::NotSupported,
        Self::Shutdown,
    ];

    /// As a reply carries it.
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Permission => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }

    /// What a reply carries, as its receiver takes it: an unknown number counts as [`Self::Invalid`]. `None`: 0, no error.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        (code != 0).then(|| Self::ALL.into_iter().find(|error| error.code() == code).unwrap_or(Self::Invalid))
    }

    /// As the system has it.
    #[must_use]
    pub fn errno(self) -> Errno {
        match self {
            Self::Permission => Errno::EPERM,
            Self::Io => Errno::EIO,
            Self::NoMemory => Errno::ENOMEM,
            Self::Invalid => Errno::EINVAL,
            Self::NoSpace => Errno::ENOSPC,
            Self::Overflow => Errno::EOVERFLOW,
            Self::NotSupported => Errno::EOPNOTSUPP,
            Self::Shutdown => Errno::ESHUTDOWN,
        }
    }

    /// For people.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::Permission => "the export is read-only",
            Self::Io => "the disk reported an error",
            Self::NoMemory => "the server is out of memory",
            Self::Invalid => "the disk takes no such request",
            Self::NoSpace => "the disk is out of space",
            Self::Overflow => "the request is too long",
            Self::NotSupported => "it would be no faster than writing zeros",
            Self::Shutdown => "the export is being closed",
        }
    }
}

impl From<Errno> for WireError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EPERM | Errno::EACCES | Errno::EROFS => Self::Permission,
            Errno::ENOMEM => Self::NoMemory,
            Errno::EINVAL => Self::Invalid,
            Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => Self::NoSpace,
            Errno::EOVERFLOW => Self::Overflow,
            Errno::EOPNOTSUPP => Self::NotSupported,
            Errno::ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

impl From<&Error> for WireError {
    fn from(error: &Error) -> Self {
        match error.kind() {
            ErrorKind::Io(errno) | ErrorKind::FlushFailed(errno) => errno.into(),
            ErrorKind::NoSpace => Self::NoSpace,
            ErrorKind::Refused(Refusal::ReadOnly | Refusal::PermissionDenied) => Self::Permission,
            ErrorKind::Refused(Refusal::BadArgument | Refusal::TooLarge) => Self::Invalid,
            ErrorKind::EngineDied => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

/// Header of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which.
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes that it takes.
    pub const BYTES: usize = 16;

    /// `None`: it does not begin as options do.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u64()?;
        let header = Self { option: fields.u32()?, length: fields.u32()? };
        (magic == OPTION_MAGIC).then_some(header)
    }

    /// As it is sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(
            &mut bytes,
            &[&OPTION_MAGIC.to_be_bytes(), &self.option.to_be_bytes(), &self.length.to_be_bytes()],
        );
        bytes
    }
}

/// Header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Bits of [`command_flag`].
    pub flags: u16,
    /// One of [`command`], or unknown.
    pub command: u16,
    /// The client's name for it; comes back with the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl RequestHeader {
    /// Bytes that it takes.
    pub const BYTES: usize = 28;

    /// `None`: it does not begin as requests do.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u32()?;
        let header = Self {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        };
        (magic == REQUEST_MAGIC).then_some(header)
    }

    /// As it is sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        put(
            &mut bytes,
            &[
                &REQUEST_MAGIC.to_be_bytes(),
                &self.flags.to_be_bytes(),
                &self.command.to_be_bytes(),
                &self.cookie.to_be_bytes(),
                &self.offset.to_be_bytes(),
                &self.length.to_be_bytes(),
            ],
        );
        bytes
    }
}

/// Header of a reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// To which.
    pub option: u32,
    /// One of [`option_reply`].
    pub reply: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Bytes that it takes.
    pub const BYTES: usize = 20;

    /// `None`: it does not begin as such replies do.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u64()?;
        let header = Self { option: fields.u32()?, reply: fields.u32()?, length: fields.u32()? };
        (magic == OPTION_REPLY_MAGIC).then_some(header)
    }
}

/// Appends the greeting of a server.
pub fn greet(to: &mut Vec<u8>, flags: u16) {
    to.extend_from_slice(&GREETING_MAGIC.to_be_bytes());
    to.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    to.extend_from_slice(&flags.to_be_bytes());
}

/// Appends a reply to an option; its data is `parts`, one behind the other.
///
/// # Panics
/// If that is more than 4 GiB.
pub fn reply_to_option(to: &mut Vec<u8>, option: u32, reply: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    to.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    to.extend_from_slice(&option.to_be_bytes());
    to.extend_from_slice(&reply.to_be_bytes());
    to.extend_from_slice(&length_u32(length).to_be_bytes());
    parts.iter().for_each(|part| to.extend_from_slice(part));
}

/// Bytes of a simple reply's header.
pub const SIMPLE_REPLY_BYTES: usize = 16;

/// Cookie and error of the header of a simple reply; `None`: it does not begin as such replies do.
#[must_use]
pub fn simple_reply_of(bytes: &[u8; SIMPLE_REPLY_BYTES]) -> Option<(u64, Option<WireError>)> {
    let mut fields = Fields(bytes);
    let magic = fields.u32()?;
    let error = WireError::from_code(fields.u32()?);
    let cookie = fields.u64()?;
    (magic == SIMPLE_REPLY_MAGIC).then_some((cookie, error))
}

/// Appends the header of a simple reply.
pub fn simple_reply(to: &mut Vec<u8>, cookie: u64, error: Option<WireError>) {
    to.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    to.extend_from_slice(&error.map_or(0, WireError::code).to_be_bytes());
    to.extend_from_slice(&cookie.to_be_bytes());
}

/// Header of a chunk of a structured reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The last one of its reply.
    pub done: bool,
    /// One of [`chunk`].
    pub kind: u16,
    /// The client's name for the request.
    pub cookie: u64,
}

impl ChunkHeader {
    /// Bytes that it takes.
    pub const BYTES: usize = 20;

    /// The header, and the bytes of payload behind it. `None`: it does not begin as chunks do.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<(Self, u32)> {
        let mut fields = Fields(bytes);
        let magic = fields.u32()?;
        let done = fields.u16()? & chunk::DONE != 0;
        let header = Self { done, kind: fields.u16()?, cookie: fields.u64()? };
        let length = fields.u32()?;
        (magic == CHUNK_MAGIC).then_some((header, length))
    }

    /// Appends it, and `fields` of its payload. `more`: bytes of payload to come behind them.
    ///
    /// # Panics
    /// If the payload is more than 4 GiB.
    pub fn put(self, to: &mut Vec<u8>, fields: &[&[u8]], more: usize) {
        let length: usize = more + fields.iter().map(|field| field.len()).sum::<usize>();
        let flags = if self.done { chunk::DONE } else { 0 };
        to.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
        to.extend_from_slice(&flags.to_be_bytes());
        to.extend_from_slice(&self.kind.to_be_bytes());
        to.extend_from_slice(&self.cookie.to_be_bytes());
        to.extend_from_slice(&length_u32(length).to_be_bytes());
        fields.iter().for_each(|field| to.extend_from_slice(field));
    }
}

/// Takes fields off the front of bytes that came from a peer; `None` where there are too few.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// So many bytes.
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    /// 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string behind its length in 32 bits.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.bytes(usize::try_from(length).ok()?)
    }
}

fn put(to: &mut [u8], parts: &[&[u8]]) {
    let mut at = 0;
    for part in parts {
        to[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
}

fn length_u32(length: usize) -> u32 {
    u32::try_from(length).expect("replies are bounded")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Operation;

    #[test]
    fn numbers_as_the_protocol_has_them() {
        assert_eq!(GREETING_MAGIC, 0x4e42_444d_4147_4943);
        assert_eq!(OPTION_MAGIC, 0x4948_4156_454f_5054);
        assert_eq!(option_reply::ERR_TOO_BIG, 0x8000_0009);
        assert_eq!(chunk::ERROR_OFFSET, 0x8002);
    }

    #[test]
    fn headers_come_back_as_they_went() {
        let option = OptionHeader { option: 7, length: 0x0102_0304 };
        assert_eq!(OptionHeader::decode(&option.encode()), Some(option));
        let request =
            RequestHeader { flags: 3, command: 1, cookie: u64::MAX - 1, offset: 1 << 40, length: 9 };
        let bytes = request.encode();
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 3, 0, 1]);
        assert_eq!(RequestHeader::decode(&bytes), Some(request));
        for at in 0..4 {
            let mut wrong = bytes;
            wrong[at] ^= 1;
            assert_eq!(RequestHeader::decode(&wrong), None);
        }
        let mut wrong = option.encode();
        wrong[7] ^= 1;
        assert_eq!(OptionHeader::decode(&wrong), None);
    }

    #[test]
    fn replies_are_read_as_they_are_written() {
        let mut reply = Vec::new();
        reply_to_option(&mut reply, 7, option_reply::INFO, &[&[1, 2], &[3]]);
        let header = OptionReplyHeader { option: 7, reply: option_reply::INFO, length: 3 };
        assert_eq!(OptionReplyHeader::decode(reply.first_chunk().unwrap()), Some(header));
        reply[0] ^= 1;
        assert_eq!(OptionReplyHeader::decode(reply.first_chunk().unwrap()), None);
        let mut simple = Vec::new();
        simple_reply(&mut simple, 77, Some(WireError::NoSpace));
        assert_eq!(simple_reply_of(simple.first_chunk().unwrap()), Some((77, Some(WireError::NoSpace))));
        let mut chunk = Vec::new();
        let header = ChunkHeader { done: true, kind: chunk::OFFSET_HOLE, cookie: 1 << 60 };
        header.put(&mut chunk, &[&[0; 12]], 0);
        assert_eq!(ChunkHeader::decode(chunk.first_chunk().unwrap()), Some((header, 12)));
        chunk[3] ^= 1;
        assert_eq!(ChunkHeader::decode(chunk.first_chunk().unwrap()), None);
        for error in WireError::ALL {
            assert_eq!(WireError::from(error.errno()), error);
        }
    }

    #[test]
    fn errors_are_one_of_eight() {
        for (errno, code) in [
            (Errno::EPERM, 1),
            (Errno::EROFS, 1),
            (Errno::EIO, 5),
            (Errno::ENOMEM, 12),
            (Errno::EINVAL, 22),
            (Errno::ENOSPC, 28),
            (Errno::EDQUOT, 28),
            (Errno::EFBIG, 28),
            (Errno::EOVERFLOW, 75),
            (Errno::EOPNOTSUPP, 95),
            (Errno::ESHUTDOWN, 108),
            (Errno::ENODEV, 5),
            (Errno::ETIMEDOUT, 5),
        ] {
            assert_eq!(WireError::from(errno).code(), code, "{errno}");
        }
        for error in WireError::ALL {
            assert_eq!(WireError::from_code(error.code()), Some(error));
        }
        assert_eq!(WireError::from_code(0), None);
        assert_eq!(WireError::from_code(110), Some(WireError::Invalid));
    }

    #[test]
    fn errors_of_the_engine_as_a_client_sees_them() {
        let of = |kind| WireError::from(&Error::new(kind, Operation::Write, "disk", "a reason"));
        assert_eq!(of(ErrorKind::Io(Errno::EDQUOT)), WireError::NoSpace);
        assert_eq!(of(ErrorKind::NoSpace), WireError::NoSpace);
        assert_eq!(of(ErrorKind::FlushFailed(Errno::EIO)), WireError::Io);
        assert_eq!(of(ErrorKind::EngineDied), WireError::Shutdown);
        assert_eq!(
            of(ErrorKind::Cancelled),
            WireError::Io,
            "a job that was cancelled is no reason to disconnect"
        );
        assert_eq!(of(ErrorKind::Refused(Refusal::ReadOnly)), WireError::Permission);
        assert_eq!(of(ErrorKind::SourceShrank), WireError::Io);
    }

    #[test]
    fn fields_end_where_the_bytes_do() {
        let mut fields = Fields(&[0, 0, 0, 2, b'a', b'b', 1]);
        assert_eq!(fields.string(), Some(&b"ab"[..]));
        assert_eq!(fields.u16(), None);
        assert_eq!(Fields(&[0, 0, 0, 3, 1, 2]).string(), None);
        assert_eq!(Fields(&[0xff; 4]).string(), None);
        assert_eq!(Fields(&[1, 2, 3, 4]).u32(), Some(0x0102_0304));
    }
}
