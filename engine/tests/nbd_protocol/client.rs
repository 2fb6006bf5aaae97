//! A naive client: writes the protocol's bytes by its own numbers, and takes the server's apart. It knows nothing of the engine's code for
//! either, so that a wrong number there is found here.

use std::fmt;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;

pub const FUA: u16 = 1;
pub const NO_HOLE: u16 = 2;
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const ENOTSUP: u32 = 95;
pub const ESHUTDOWN: u32 = 108;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;
pub const OPT_EXTENDED_HEADERS: u32 = 11;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const ERR_UNSUP: u32 = 0x8000_0001;
pub const ERR_INVALID: u32 = 0x8000_0003;
pub const ERR_UNKNOWN: u32 = 0x8000_0006;
pub const ERR_BLOCK_SIZE_REQD: u32 = 0x8000_0008;
pub const ERR_TOO_BIG: u32 = 0x8000_0009;

/// What the client sends after the greeting: fixed newstyle, no zeros.
pub fn client_flags(flags: u32) -> Vec<u8> {
    flags.to_be_bytes().to_vec()
}

pub fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// Data of INFO and GO.
pub fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|kind| data.extend(kind.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query.as_bytes())));
    data
}

/// A request as the client sent it.
#[derive(Clone, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
    pub payload: Vec<u8>,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flags, command, cookie, offset, length, .. } = self;
        write!(f, "#{cookie}: command {command} flags {flags:#x} {offset}+{length}")
    }
}

impl Request {
    pub fn new(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Self {
        Self { flags, command, cookie, offset, length, payload: Vec::new() }
    }

    pub fn write(flags: u16, cookie: u64, offset: u64, payload: Vec<u8>) -> Self {
        Self { payload, ..Self::new(WRITE, flags, cookie, offset, 0) }.with_length()
    }

    fn with_length(mut self) -> Self {
        self.length = self.payload.len() as u32;
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes.extend(self.length.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }
}

/// A reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub option: u32,
    pub kind: u32,
    pub data: Vec<u8>,
}

/// What comes in the transmission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Simple { cookie: u64, error: u32, data: Vec<u8> },
    Chunk { cookie: u64, done: bool, kind: u16, payload: Vec<u8> },
}

impl Message {
    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }
}

/// Takes the server's bytes apart.
#[derive(Debug, Default)]
pub struct Parser {
    pub bytes: Vec<u8>,
    at: usize,
}

impl Parser {
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.at..]
    }

    pub fn take(&mut self, count: usize) -> Option<Vec<u8>> {
        let taken = self.rest().get(..count)?.to_vec();
        self.at += count;
        Some(taken)
    }

    /// The handshake flags of the greeting.
    pub fn greeting(&mut self) -> Option<u16> {
        let bytes = self.take(18)?;
        assert_eq!(&bytes[..16], b"NBDMAGICIHAVEOPT");
        Some(u16_at(&bytes, 16))
    }

    pub fn option_reply(&mut self) -> Option<OptionReply> {
        let header = self.rest().get(..20)?;
        assert_eq!(u64_at(header, 0), 0x0003_e889_0455_65a9, "magic of an option reply");
        let (option, kind) = (u32_at(header, 8), u32_at(header, 12));
        let length = u32_at(header, 16) as usize;
        let data = self.rest().get(20..20 + length)?.to_vec();
        self.at += 20 + length;
        Some(OptionReply { option, kind, data })
    }

    /// The next message; `read_length`: of the read with this cookie, 0 of anything else.
    pub fn message(&mut self, read_length: impl Fn(u64) -> usize) -> Option<Message> {
        let rest = self.rest();
        let magic = u32_at(rest.get(..4)?, 0);
        if magic == 0x6744_6698 {
            let header = rest.get(..16)?;
            let (error, cookie) = (u32_at(header, 4), u64_at(header, 8));
            let length = if error == 0 { read_length(cookie) } else { 0 };
            let data = rest.get(16..16 + length)?.to_vec();
            self.at += 16 + length;
            return Some(Message::Simple { cookie, error, data });
        }
        assert_eq!(magic, 0x668e_33ef, "magic of a reply");
        let header = rest.get(..20)?;
        let (flags, kind, cookie) = (u16_at(header, 4), u16_at(header, 6), u64_at(header, 8));
        assert!(flags <= 1, "chunk flags {flags:#x}");
        let length = u32_at(header, 16) as usize;
        let payload = rest.get(20..20 + length)?.to_vec();
        self.at += 20 + length;
        Some(Message::Chunk { cookie, done: flags == 1, kind, payload })
    }
}

pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The reply to a read that is put together chunk by chunk, or to anything else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Parts of the data of a read: offset and bytes.
    pub data: Vec<(u64, Vec<u8>)>,
    /// Of them those that came as holes.
    pub holes: usize,
    /// Contexts and their extents (length, flags).
    pub status: Vec<(u32, Vec<(u32, u32)>)>,
    /// Errors, with the offset if there is one.
    pub errors: Vec<(u32, Option<u64>)>,
    pub chunks: usize,
    pub simple: bool,
    pub done: bool,
}

impl Reply {
    /// Add a message, checking it against the rules of the protocol that hold for every message.
    pub fn add(&mut self, request: &Request, message: &Message) {
        assert!(!self.done, "a message after the last one of {request:?}");
        match message {
            Message::Simple { error, data, .. } => {
                assert_eq!(self.chunks, 0, "simple after chunks");
                self.simple = true;
                self.done = true;
                if *error != 0 {
                    self.errors.push((*error, None));
                } else if !data.is_empty() {
                    self.data.push((request.offset, data.clone()));
                }
            }
            Message::Chunk { done, kind, payload, .. } => self.add_chunk(request, *done, *kind, payload),
        }
        for (error, _) in &self.errors {
            assert!([1, 5, 12, 22, 28, 75, 95, 108].contains(error), "error {error} is not for the wire");
        }
    }

    fn add_chunk(&mut self, request: &Request, done: bool, kind: u16, payload: &[u8]) {
        self.chunks += 1;
        self.done = done;
        let (start, end) = (request.offset, request.offset + u64::from(request.length));
        match kind {
            0 => assert!(done && payload.is_empty(), "NONE ends a reply"),
            1 | 2 => {
                assert_eq!(request.command, READ);
                let offset = u64_at(payload, 0);
                let data =
                    if kind == 1 { payload[8..].to_vec() } else { vec![0; u32_at(payload, 8) as usize] };
                assert!(kind == 1 || payload.len() == 12);
                assert!(!data.is_empty() && start <= offset && offset + data.len() as u64 <= end);
                for (other, bytes) in &self.data {
                    let apart = offset + data.len() as u64 <= *other || other + bytes.len() as u64 <= offset;
                    assert!(apart, "chunks of {request:?} overlap");
                }
                assert!(request.flags & DF == 0 || (self.data.is_empty() && kind == 1), "DF means one chunk");
                self.holes += usize::from(kind == 2);
                self.data.push((offset, data));
            }
            5 => {
                assert_eq!(request.command, BLOCK_STATUS);
                let extents: Vec<_> =
                    payload[4..].chunks_exact(8).map(|e| (u32_at(e, 0), u32_at(e, 4))).collect();
                assert!(payload.len() % 8 == 4 && !extents.is_empty() && extents.iter().all(|e| e.0 > 0));
                assert!(request.flags & REQ_ONE == 0 || extents.len() == 1);
                let covered: u64 = extents.iter().map(|e| u64::from(e.0)).sum();
                assert!(covered <= u64::from(request.length), "the engine does not look beyond");
                self.status.push((u32_at(payload, 0), extents));
            }
            0x8001 | 0x8002 => {
                let (error, length) = (u32_at(payload, 0), usize::from(u16_at(payload, 4)));
                let with_offset = kind == 0x8002;
                assert_eq!(payload.len(), 6 + length + if with_offset { 8 } else { 0 });
                assert!(error != 0 && std::str::from_utf8(&payload[6..6 + length]).is_ok());
                let offset = with_offset.then(|| u64_at(payload, 6 + length));
                assert!(offset.is_none_or(|offset| start <= offset && offset < end));
                assert!(!with_offset || request.command != FLUSH, "a flush has no offset");
                self.errors.push((error, offset));
            }
            _ => panic!("chunk of type {kind:#x}"),
        }
    }

    /// All data of a read that succeeded.
    pub fn whole(&self, request: &Request) -> Vec<u8> {
        let mut parts = self.data.clone();
        parts.sort();
        let whole = parts.into_iter().flat_map(|(_, bytes)| bytes).collect::<Vec<u8>>();
        assert_eq!(whole.len(), request.length as usize, "the reply to {request:?} has holes");
        whole
    }
}
