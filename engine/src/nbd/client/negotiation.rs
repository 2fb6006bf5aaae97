//! The handshake: from the server's greeting to the choice of an export. Fixed newstyle, and what is before it as far as it has names of exports.
//!
//! # Order
//! Structured replies, then (where there are any) `base:allocation`, and `qemu:allocation-depth` if layers are asked about, then `NBD_OPT_GO` with the question for block sizes. A server that knows an option
//! not says so, and the next one follows: what it knows not is done without. One that does not know `GO` is asked by `NBD_OPT_EXPORT_NAME`, which has no
//! reply for an export that is not there: the server just goes.
//!
//! # Bounds
//! A reply has at most [`MAX_REPLY_BYTES`] of data, an option at most [`MAX_REPLIES`] replies. Sizes of blocks that make no sense are a
//! violation: requests made of them would be refused one after the other.

use super::Violation;
use crate::nbd::export::{BlockSizes, MetaContext};
use crate::nbd::wire::{
    Fields, GREETING_MAGIC, MAX_STRING_BYTES, OLDSTYLE_MAGIC, OPTION_MAGIC, OptionHeader, OptionReplyHeader,
    handshake, info, option, option_reply, transmission,
};

/// Most bytes of data in a reply to an option: a string of the longest kind, and what stands before it.
pub const MAX_REPLY_BYTES: usize = MAX_STRING_BYTES + 64;
/// Most replies to one option.
pub const MAX_REPLIES: u32 = 64;
/// Most bytes that [`Negotiation::advance`] ever needs to see at once.
pub const MAX_NEEDED: usize = OptionReplyHeader::BYTES + MAX_REPLY_BYTES;

const GREETING_BYTES: usize = 18;
/// Zeros behind an export chosen by `NBD_OPT_EXPORT_NAME`, for clients that have not asked to be spared them.
const EXPORT_ZEROS: usize = 124;
/// Most letters of a server's message that are told.
const MAX_MESSAGE: usize = 200;

/// What client and server have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Length of the export in bytes, as the server says: not bounded yet.
    pub length: u64,
    /// Bits of [`transmission`].
    pub flags: u16,
    /// Which requests it takes.
    pub blocks: BlockSizes,
    /// Replies to reads come in chunks.
    pub structured: bool,
    /// How the server calls `base:allocation`, where it tells it.
    pub allocation: Option<u32>,
    /// How it calls `qemu:allocation-depth`.
    pub depth: Option<u32>,
}

impl Agreement {
    /// Whether the server has set a bit of [`transmission`].
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// So many bytes, from the first one not taken, at most [`MAX_NEEDED`].
    Need(usize),
    /// This is to be sent.
    Send(Vec<u8>),
    /// It is over: what follows are replies to requests.
    Agreed(Agreement),
}

/// Why there is no agreement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NegotiationError {
    /// It does not greet as NBD servers do.
    #[error("what answers there is no NBD server")]
    NotNbd,
    /// A server from before 2012.
    #[error("the server speaks NBD as before 2012, which is not supported")]
    OldStyle,
    /// There is no such export.
    #[error("the server has no such export{}", told(.0))]
    NoSuchExport(String),
    /// Nothing goes without TLS there.
    #[error("the server insists on TLS{}", told(.0))]
    TlsRequired(String),
    /// It does not want to.
    #[error("the server refuses{}", told(.0))]
    Refused(String),
    /// The stream ended.
    #[error("the server closed the connection")]
    Closed,
    /// It broke the protocol.
    #[error("the server does not keep to the protocol: {0}")]
    Violation(#[from] Violation),
}

fn told(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (it says: {message})") }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Greeting,
    /// A reply to this option is awaited.
    Option(u32),
    /// The answer to `NBD_OPT_EXPORT_NAME`, which is no reply as others are.
    ExportName,
    Over,
}

/// See the module's header.
#[derive(Clone, Debug)]
pub struct Negotiation {
    export: String,
    stage: Stage,
    no_zeroes: bool,
    /// Replies to the option at hand.
    replies: u32,
    structured: bool,
    /// Layers are asked about.
    layers: bool,
    allocation: Option<u32>,
    depth: Option<u32>,
    described: Option<(u64, u16)>,
    blocks: BlockSizes,
}

impl Negotiation {
    /// With a server that has not greeted yet, about the export of this name.
    ///
    /// # Panics
    /// If the name is longer than 4096 bytes.
    #[must_use]
    pub fn new(export: &str) -> Self {
        assert!(export.len() <= MAX_STRING_BYTES, "the name of an export of {} bytes", export.len());
        Self {
            export: export.to_owned(),
            stage: Stage::Greeting,
            no_zeroes: false,
            replies: 0,
            structured: false,
            layers: false,
            allocation: None,
            depth: None,
            described: None,
            blocks: BlockSizes::DEFAULT,
        }
    }

    /// Ask as well in which layer the disk is allocated.
    #[must_use]
    pub fn with_layers(self) -> Self {
        Self { layers: true, ..self }
    }

    /// Take what has come from the front of `input`; gives how many bytes were taken, and what comes next.
    ///
    /// # Errors
    /// There will be no agreement; the connection is of no use.
    ///
    /// # Panics
    /// If there was an agreement already.
    pub fn advance(&mut self, input: &[u8]) -> Result<(usize, Next), NegotiationError> {
        match self.stage {
            Stage::Greeting => match input.first_chunk() {
                Some(greeting) => Ok((GREETING_BYTES, self.greeted(greeting)?)),
                None => Ok((0, Next::Need(GREETING_BYTES))),
            },
            Stage::Option(option) => {
                let Some(header) = input.first_chunk() else {
                    return Ok((0, Next::Need(OptionReplyHeader::BYTES)));
                };
                let header = OptionReplyHeader::decode(header).filter(|header| header.option == option);
                let header = header.ok_or(Violation("a reply to an option that was not asked"))?;
                let length = usize::try_from(header.length).unwrap_or(usize::MAX);
                if length > MAX_REPLY_BYTES {
                    return Err(Violation("a reply to an option that is too long").into());
                }
                let whole = OptionReplyHeader::BYTES + length;
                let Some(data) = input.get(OptionReplyHeader::BYTES..whole) else {
                    return Ok((0, Next::Need(whole)));
                };
                self.replies += 1;
                if self.replies > MAX_REPLIES {
                    return Err(Violation("replies to an option without end").into());
                }
                Ok((whole, self.replied(option, header.reply, data)?))
            }
            Stage::ExportName => {
                let whole = 10 + if self.no_zeroes { 0 } else { EXPORT_ZEROS };
                let Some(mut fields) = input.get(..whole).map(Fields) else {
                    return Ok((0, Next::Need(whole)));
                };
                self.described = fields.u64().zip(fields.u16());
                Ok((whole, self.agreed()?))
            }
            Stage::Over => panic!("the handshake is over"),
        }
    }

    /// The server has ended its stream: why there will be no agreement.
    #[must_use]
    pub fn end_of_stream(&self) -> NegotiationError {
        match self.stage {
            Stage::ExportName => NegotiationError::NoSuchExport(String::new()),
            _ => NegotiationError::Closed,
        }
    }

    fn greeted(&mut self, greeting: &[u8; GREETING_BYTES]) -> Result<Next, NegotiationError> {
        let mut fields = Fields(greeting);
        match (fields.u64(), fields.u64()) {
            (Some(GREETING_MAGIC), Some(OPTION_MAGIC)) => {}
            (Some(GREETING_MAGIC), Some(OLDSTYLE_MAGIC)) => return Err(NegotiationError::OldStyle),
            _ => return Err(NegotiationError::NotNbd),
        }
        let offered = fields.u16().unwrap_or(0);
        let flags = offered & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.no_zeroes = flags & handshake::NO_ZEROES != 0;
        let mut send = u32::from(flags).to_be_bytes().to_vec();
        send.extend(if flags & handshake::FIXED_NEWSTYLE == 0 {
            self.ask_by_name()
        } else {
            self.ask(option::STRUCTURED_REPLY)
        });
        Ok(Next::Send(send))
    }

    /// The option itself, whose replies are awaited from here on.
    fn ask(&mut self, option: u32) -> Vec<u8> {
        self.stage = Stage::Option(option);
        self.replies = 0;
        let mut data = Vec::new();
        match option {
            option::SET_META_CONTEXT => {
                put_string(&mut data, &self.export);
                data.extend_from_slice(&(1 + u32::from(self.layers)).to_be_bytes());
                put_string(&mut data, &MetaContext::Allocation.name());
                if self.layers {
                    put_string(&mut data, &MetaContext::AllocationDepth.name());
                }
            }
            option::GO => {
                put_string(&mut data, &self.export);
                data.extend_from_slice(&1_u16.to_be_bytes());
                data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
            }
            _ => {}
        }
        option_with(option, &data)
    }

    fn ask_by_name(&mut self) -> Vec<u8> {
        self.stage = Stage::ExportName;
        option_with(option::EXPORT_NAME, self.export.as_bytes())
    }

    fn replied(&mut self, option: u32, reply: u32, data: &[u8]) -> Result<Next, NegotiationError> {
        let is_error = reply & option_reply::ERROR_BIT != 0;
        if reply == option_reply::ERR_TLS_REQD {
            return Err(NegotiationError::TlsRequired(message(data)));
        }
        let need = Next::Need(OptionReplyHeader::BYTES);
        match (option, reply) {
            (option::STRUCTURED_REPLY, option_reply::ACK) => {
                self.structured = true;
                Ok(Next::Send(self.ask(option::SET_META_CONTEXT)))
            }
            (option::STRUCTURED_REPLY, _) if is_error => Ok(Next::Send(self.ask(option::GO))),
            (option::SET_META_CONTEXT, option_reply::META_CONTEXT) => {
                self.on_context(data)?;
                Ok(need)
            }
            (option::SET_META_CONTEXT, option_reply::ACK) => Ok(Next::Send(self.ask(option::GO))),
            (option::SET_META_CONTEXT, _) if is_error => {
                (self.allocation, self.depth) = (None, None);
                Ok(Next::Send(self.ask(option::GO)))
            }
            (option::GO, option_reply::INFO) => {
                self.on_info(data)?;
                Ok(need)
            }
            (option::GO, option_reply::ACK) => Ok(self.agreed()?),
            (option::GO, option_reply::ERR_UNSUP) => Ok(Next::Send(self.ask_by_name())),
            (option::GO, option_reply::ERR_UNKNOWN) => Err(NegotiationError::NoSuchExport(message(data))),
            (option::GO, _) if is_error => Err(NegotiationError::Refused(refusal(reply, data))),
            _ => Err(Violation("a reply that does not go with its option").into()),
        }
    }

    fn on_context(&mut self, data: &[u8]) -> Result<(), Violation> {
        let mut fields = Fields(data);
        let id = fields.u32().ok_or(Violation("a meta context without a number"))?;
        let is = |context: MetaContext| fields.0 == context.name().as_bytes();
        let (place, other) = if is(MetaContext::Allocation) {
            (&mut self.allocation, self.depth)
        } else if self.layers && is(MetaContext::AllocationDepth) {
            (&mut self.depth, self.allocation)
        } else {
            return Err(Violation("a meta context that was not asked for"));
        };
        if place.is_some() || other == Some(id) {
            return Err(Violation("a meta context that was not asked for"));
        }
        *place = Some(id);
        Ok(())
    }

    fn on_info(&mut self, data: &[u8]) -> Result<(), Violation> {
        const SHORT: Violation = Violation("information about the export that is cut off");
        let mut fields = Fields(data);
        match fields.u16().ok_or(SHORT)? {
            info::EXPORT => {
                self.described = Some(fields.u64().zip(fields.u16()).ok_or(SHORT)?);
            }
            info::BLOCK_SIZE => {
                let sizes = fields.u32().zip(fields.u32()).zip(fields.u32()).ok_or(SHORT)?;
                let ((minimum, preferred), maximum) = sizes;
                // Longer requests than those of the protocol's own limit are never made.
                let most = BlockSizes::DEFAULT.maximum_payload();
                self.blocks = BlockSizes::new(minimum, preferred.min(most), maximum.min(most))
                    .ok_or(Violation("block sizes that make no sense"))?;
            }
            _ => {}
        }
        Ok(())
    }

    fn agreed(&mut self) -> Result<Next, Violation> {
        let (length, flags) = self.described.ok_or(Violation("an export without a length"))?;
        self.stage = Stage::Over;
        let flags = if flags & transmission::HAS_FLAGS == 0 { 0 } else { flags };
        let Self { blocks, structured, allocation, depth, .. } = *self;
        Ok(Next::Agreed(Agreement { length, flags, blocks, structured, allocation, depth }))
    }
}

fn option_with(option: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("names are short");
    let mut bytes = OptionHeader { option, length }.encode().to_vec();
    bytes.extend_from_slice(data);
    bytes
}

fn put_string(to: &mut Vec<u8>, text: &str) {
    to.extend_from_slice(&u32::try_from(text.len()).expect("names are short").to_be_bytes());
    to.extend_from_slice(text.as_bytes());
}

/// The beginning of what the server says, without what could drive a terminal.
fn message(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data);
    text.trim().chars().filter(|letter| !letter.is_control()).take(MAX_MESSAGE).collect()
}

/// The server's message, or what its number means.
fn refusal(reply: u32, data: &[u8]) -> String {
    let said = message(data);
    if !said.is_empty() {
        return said;
    }
    match reply {
        option_reply::ERR_POLICY => "its policy forbids it".to_owned(),
        option_reply::ERR_SHUTDOWN => "it is shutting down".to_owned(),
        option_reply::ERR_BLOCK_SIZE_REQD => "it wants to agree on block sizes".to_owned(),
        _ => format!("error {}", reply & !option_reply::ERROR_BIT),
    }
}
