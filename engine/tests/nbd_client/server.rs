//! What a server sends, byte by byte, by the protocol's document.

/// Big-endian fields, one behind the other.
#[derive(Clone, Default)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Bytes {
    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn all(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

pub(crate) fn bytes() -> Bytes {
    Bytes::default()
}

pub(crate) fn greeting(flags: u16) -> Vec<u8> {
    bytes().all(b"NBDMAGIC").all(b"IHAVEOPT").u16(flags).0
}

pub(crate) const ACK: u32 = 1;
pub(crate) const INFO: u32 = 3;
pub(crate) const CONTEXT: u32 = 4;
pub(crate) const UNSUPPORTED: u32 = (1 << 31) + 1;
pub(crate) const POLICY: u32 = (1 << 31) + 2;
pub(crate) const TLS_REQUIRED: u32 = (1 << 31) + 5;
pub(crate) const UNKNOWN: u32 = (1 << 31) + 6;

pub(crate) fn option_reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    bytes().u64(0x3e889045565a9).u32(option).u32(reply).u32(data.len() as u32).all(data).0
}

pub(crate) fn export_info(length: u64, flags: u16) -> Vec<u8> {
    option_reply(7, INFO, &bytes().u16(0).u64(length).u16(flags).0)
}

pub(crate) fn block_info(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    option_reply(7, INFO, &bytes().u16(3).u32(minimum).u32(preferred).u32(maximum).0)
}

pub(crate) fn context(id: u32, name: &str) -> Vec<u8> {
    option_reply(10, CONTEXT, &bytes().u32(id).all(name.as_bytes()).0)
}

pub(crate) fn simple(cookie: u64, error: u32) -> Vec<u8> {
    bytes().u32(0x67446698).u32(error).u64(cookie).0
}

pub(crate) const NONE: u16 = 0;
pub(crate) const DATA: u16 = 1;
pub(crate) const HOLE: u16 = 2;
pub(crate) const STATUS: u16 = 5;
pub(crate) const ERROR: u16 = (1 << 15) + 1;
pub(crate) const ERROR_OFFSET: u16 = (1 << 15) + 2;

pub(crate) fn chunk(cookie: u64, done: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
    let head = bytes().u32(0x668e33ef).u16(u16::from(done)).u16(kind).u64(cookie);
    head.u32(payload.len() as u32).all(payload).0
}

pub(crate) fn data(cookie: u64, done: bool, offset: u64, contents: &[u8]) -> Vec<u8> {
    chunk(cookie, done, DATA, &bytes().u64(offset).all(contents).0)
}

pub(crate) fn hole(cookie: u64, done: bool, offset: u64, length: u32) -> Vec<u8> {
    chunk(cookie, done, HOLE, &bytes().u64(offset).u32(length).0)
}

pub(crate) fn status(cookie: u64, done: bool, id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let payload =
        extents.iter().fold(bytes().u32(id), |payload, (length, flags)| payload.u32(*length).u32(*flags));
    chunk(cookie, done, STATUS, &payload.0)
}

pub(crate) fn error(cookie: u64, done: bool, code: u32, message: &str) -> Vec<u8> {
    let payload = bytes().u32(code).u16(message.len() as u16).all(message.as_bytes());
    chunk(cookie, done, ERROR, &payload.0)
}
