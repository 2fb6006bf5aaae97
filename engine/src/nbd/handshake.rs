//! The first phase of a connection: the client asks what there is, and chooses an export.
//!
//! # Model
//! Fixed newstyle. The server greets, the client says which of the greeting's flags it knows, and then sends options, each answered before the
//! next is looked at. [`Handshake::step`] takes the bytes that came and says how many it used up; replies are appended to a buffer of the
//! caller, and nothing more is done while that is full. So a list of any number of exports takes no memory beyond that.
//!
//! # What is refused
//! TLS and extended headers are not known here, so they get the reply for unknown options. A client that does not set the flag for fixed newstyle may
//! only name its export, as in the days before it.
//!
//! # Metadata contexts
//! A selection replaces the one before it, also when it fails, and counts only if the export that is chosen in the end has the same name.

use std::sync::Arc;

use super::connection::CloseReason;
use super::export::{BlockSizes, Export, Exports, MetaContext};
use super::limits::ConnectionLimits;
use super::wire::{self, Fields, MAX_PAYLOAD, MAX_STRING_BYTES, OptionHeader, info, option, option_reply};

/// Replies beyond which nothing more is done until they have left, in bytes.
const ENOUGH_REPLIES: usize = 16 << 10;

/// A metadata context that a client has selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selected {
    /// Its number on the wire.
    pub(super) id: u32,
    pub(super) context: MetaContext,
}

/// What was agreed.
#[derive(Debug)]
pub(super) struct Agreement {
    pub(super) export: Arc<Export>,
    pub(super) structured: bool,
    pub(super) contexts: Vec<Selected>,
}

/// What came of a step.
#[derive(Debug)]
pub(super) enum Progress {
    /// More bytes are needed.
    Starved,
    /// The replies have to leave first.
    RepliesFull,
    /// The transmission begins behind the replies.
    Agreed(Agreement),
    /// The end, once the replies have left.
    Over(CloseReason),
}

#[derive(Debug)]
enum Stage {
    ClientFlags,
    Options,
    /// Data of an option that is too long is dropped: so many bytes more.
    Dropping {
        option: u32,
        left: usize,
    },
    /// Exports are being listed; which was the last.
    Listing {
        previous: Option<Arc<str>>,
    },
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Handshake {
    stage: Stage,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export that contexts were selected for, by the name that the client used, and these.
    selection: Option<(Box<[u8]>, Vec<Selected>)>,
    options_left: usize,
    option_bytes: usize,
}

type Exporting<'a> = &'a dyn Exports;

impl Handshake {
    /// Its greeting is appended to `replies`.
    pub(super) fn new(limits: &ConnectionLimits, replies: &mut Vec<u8>) -> Self {
        wire::greet(replies, wire::handshake::FIXED_NEWSTYLE | wire::handshake::NO_ZEROES);
        Self {
            stage: Stage::ClientFlags,
            fixed: false,
            no_zeroes: false,
            structured: false,
            selection: None,
            options_left: limits.options,
            option_bytes: limits.option_bytes,
        }
    }

    /// Take as much of `bytes` as can be done now: how many of them, and what came of it.
    pub(super) fn step(
        &mut self,
        bytes: &[u8],
        exports: Exporting<'_>,
        replies: &mut Vec<u8>,
    ) -> (usize, Progress) {
        let mut rest = Fields(bytes);
        let progress = loop {
            if replies.len() >= ENOUGH_REPLIES {
                break Progress::RepliesFull;
            }
            match self.advance(&mut rest, exports, replies) {
                None => {}
                Some(progress) => break progress,
            }
        };
        (bytes.len() - rest.0.len(), progress)
    }

    /// One step; `None`: there may be more to do.
    fn advance(
        &mut self,
        rest: &mut Fields<'_>,
        exports: Exporting<'_>,
        replies: &mut Vec<u8>,
    ) -> Option<Progress> {
        match &mut self.stage {
            Stage::ClientFlags => {
                let Some(flags) = rest.u32() else { return Some(Progress::Starved) };
                let known = wire::handshake::FIXED_NEWSTYLE | wire::handshake::NO_ZEROES;
                if flags & !u32::from(known) != 0 {
                    return Some(violation("it set handshake flags that were not offered"));
                }
                self.fixed = flags & u32::from(wire::handshake::FIXED_NEWSTYLE) != 0;
                self.no_zeroes = flags & u32::from(wire::handshake::NO_ZEROES) != 0;
                self.stage = Stage::Options;
                None
            }
            Stage::Options => self.next_option(rest, exports, replies),
            Stage::Dropping { option, left } => {
                let dropped = rest.0.len().min(*left);
                rest.bytes(dropped).expect("as many are there");
                *left -= dropped;
                if *left > 0 {
                    return Some(Progress::Starved);
                }
                let option = *option;
                refuse(replies, option, option_reply::ERR_TOO_BIG, "the option is too long");
                self.stage = Stage::Options;
                None
            }
            Stage::Listing { previous } => {
                match exports.after(previous.as_deref()) {
                    Some(export) => {
                        *previous = Some(Arc::clone(export.name()));
                        list(&export, replies);
                    }
                    None => {
                        acknowledge(replies, option::LIST);
                        self.stage = Stage::Options;
                    }
                }
                None
            }
        }
    }

    fn next_option(
        &mut self,
        rest: &mut Fields<'_>,
        exports: Exporting<'_>,
        replies: &mut Vec<u8>,
    ) -> Option<Progress> {
        let Some(header) = rest.0.first_chunk() else { return Some(Progress::Starved) };
        let Some(header) = OptionHeader::decode(header) else {
            return Some(violation("an option did not begin as options do"));
        };
        if header.length > MAX_PAYLOAD {
            return Some(violation("an option was longer than anything"));
        }
        let length = usize::try_from(header.length).expect("32 MiB");
        if !self.fixed && !matches!(header.option, option::EXPORT_NAME | option::ABORT) {
            return Some(violation("it sent an option without fixed newstyle negotiation"));
        }
        let too_long = length > self.option_bytes;
        if too_long && header.option == option::EXPORT_NAME {
            return Some(violation("the name of an export was too long"));
        }
        if !too_long && rest.0.len() < OptionHeader::BYTES + length {
            return Some(Progress::Starved);
        }
        let Some(left) = self.options_left.checked_sub(1) else {
            return Some(violation("it sent too many options"));
        };
        self.options_left = left;
        rest.bytes(OptionHeader::BYTES).expect("the header is there");
        if too_long {
            self.forget_selection_of(header.option);
            self.stage = Stage::Dropping { option: header.option, left: length };
            return None;
        }
        let data = rest.bytes(length).expect("the data is there");
        self.option(header.option, data, exports, replies)
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        exports: Exporting<'_>,
        replies: &mut Vec<u8>,
    ) -> Option<Progress> {
        if !data.is_empty() && matches!(option, option::LIST | option::STARTTLS | option::STRUCTURED_REPLY) {
            refuse(replies, option, option_reply::ERR_INVALID, "the option takes no data");
            return None;
        }
        match option {
            option::EXPORT_NAME => return Some(self.export_name(data, exports, replies)),
            option::ABORT => {
                acknowledge(replies, option);
                return Some(Progress::Over(CloseReason::Disconnected));
            }
            option::LIST => self.stage = Stage::Listing { previous: None },
            option::STRUCTURED_REPLY => {
                self.structured = true;
                acknowledge(replies, option);
            }
            option::INFO | option::GO => return self.info(option, data, exports, replies),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.forget_selection_of(option);
                match self.contexts(option, data, exports, replies) {
                    Ok(()) => acknowledge(replies, option),
                    Err((error, message)) => refuse(replies, option, error, message),
                }
            }
            option::STARTTLS => {
                refuse(replies, option, option_reply::ERR_UNSUP, "this server has no TLS");
            }
            _ => refuse(replies, option, option_reply::ERR_UNSUP, "the option is not known"),
        }
        None
    }

    fn export_name(&mut self, name: &[u8], exports: Exporting<'_>, replies: &mut Vec<u8>) -> Progress {
        let Some(export) = find(exports, name) else { return Progress::Over(CloseReason::UnknownExport) };
        if export.block_sizes.minimum() > BlockSizes::DEFAULT.minimum() {
            // It was never told of sizes that it has to keep to.
            return violation("it chose an export that has a minimum block size without asking for it");
        }
        replies.extend_from_slice(&export.length().0.to_be_bytes());
        replies.extend_from_slice(&export.transmission_flags(self.structured).to_be_bytes());
        if !self.no_zeroes {
            replies.extend_from_slice(&[0; 124]);
        }
        Progress::Agreed(self.agree(export, name))
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`.
    fn info(
        &mut self,
        option: u32,
        data: &[u8],
        exports: Exporting<'_>,
        replies: &mut Vec<u8>,
    ) -> Option<Progress> {
        let Some((name, wanted)) = parse_info(data) else {
            refuse(replies, option, option_reply::ERR_INVALID, "the option's data makes no sense");
            return None;
        };
        if name.len() > MAX_STRING_BYTES {
            refuse(replies, option, option_reply::ERR_TOO_BIG, "the name is too long");
            return None;
        }
        let Some(export) = find(exports, name) else {
            refuse(replies, option, option_reply::ERR_UNKNOWN, "there is no such export");
            return None;
        };
        let mut tell = |kind: u16, fields: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            let mut parts: Vec<&[u8]> = vec![&kind];
            parts.extend_from_slice(fields);
            wire::reply_to_option(replies, option, option_reply::INFO, &parts);
        };
        let flags = export.transmission_flags(self.structured);
        tell(info::EXPORT, &[&export.length().0.to_be_bytes(), &flags.to_be_bytes()]);
        if wanted.contains(&info::NAME) {
            tell(info::NAME, &[export.name().as_bytes()]);
        }
        if wanted.contains(&info::DESCRIPTION) && !export.description().is_empty() {
            tell(info::DESCRIPTION, &[export.description().as_bytes()]);
        }
        let sizes = export.block_sizes;
        let sizes_as_sent = [sizes.minimum(), sizes.preferred(), sizes.maximum_payload()];
        let fields = sizes_as_sent.map(u32::to_be_bytes);
        tell(info::BLOCK_SIZE, &[&fields[0], &fields[1], &fields[2]]);
        if sizes.minimum() > BlockSizes::DEFAULT.minimum() && !wanted.contains(&info::BLOCK_SIZE) {
            let message = "the export has a minimum block size";
            refuse(replies, option, option_reply::ERR_BLOCK_SIZE_REQD, message);
            return None;
        }
        acknowledge(replies, option);
        (option == option::GO).then(|| Progress::Agreed(self.agree(export, name)))
    }

    /// `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`, up to the last reply.
    fn contexts(
        &mut self,
        option: u32,
        data: &[u8],
        exports: Exporting<'_>,
        replies: &mut Vec<u8>,
    ) -> Result<(), (u32, &'static str)> {
        if !self.structured {
            return Err((option_reply::ERR_INVALID, "structured replies have to be negotiated first"));
        }
        let malformed = (option_reply::ERR_INVALID, "the option's data makes no sense");
        let (name, queries) = parse_queries(data).ok_or(malformed)?;
        if name.len() > MAX_STRING_BYTES || queries.iter().any(|query| query.len() > MAX_STRING_BYTES) {
            return Err((option_reply::ERR_TOO_BIG, "a name is too long"));
        }
        let export = find(exports, name).ok_or((option_reply::ERR_UNKNOWN, "there is no such export"))?;
        // What is no text cannot name anything.
        let texts: Vec<&str> = queries.iter().filter_map(|query| std::str::from_utf8(query).ok()).collect();
        let list = option == option::LIST_META_CONTEXT;
        let meant = |context: &MetaContext| {
            if list {
                queries.is_empty() || texts.iter().any(|query| context.is_listed_by(query))
            } else {
                texts.iter().any(|query| context.is_selected_by(query))
            }
        };
        let mut selected = Vec::new();
        for context in export.contexts().iter().filter(|context| meant(context)) {
            let id = if list { 0 } else { u32::try_from(selected.len()).expect("a few contexts") + 1 };
            let (id_as_sent, name) = (id.to_be_bytes(), context.name());
            let parts: [&[u8]; 2] = [&id_as_sent, name.as_bytes()];
            wire::reply_to_option(replies, option, option_reply::META_CONTEXT, &parts);
            selected.push(Selected { id, context: context.clone() });
        }
        if !list {
            self.selection = Some((name.into(), selected));
        }
        Ok(())
    }

    fn forget_selection_of(&mut self, option: u32) {
        if option == option::SET_META_CONTEXT {
            self.selection = None;
        }
    }

    fn agree(&mut self, export: Arc<Export>, name: &[u8]) -> Agreement {
        let contexts = match self.selection.take() {
            Some((selected_for, contexts)) if *selected_for == *name => contexts,
            _ => Vec::new(),
        };
        Agreement { export, structured: self.structured, contexts }
    }
}

fn violation(what: &'static str) -> Progress {
    Progress::Over(CloseReason::Violation(what))
}

fn find(exports: Exporting<'_>, name: &[u8]) -> Option<Arc<Export>> {
    let name = std::str::from_utf8(name).ok()?;
    if name.len() > MAX_STRING_BYTES { None } else { exports.find(name) }
}

fn acknowledge(replies: &mut Vec<u8>, option: u32) {
    wire::reply_to_option(replies, option, option_reply::ACK, &[]);
}

fn refuse(replies: &mut Vec<u8>, option: u32, error: u32, message: &str) {
    wire::reply_to_option(replies, option, error, &[message.as_bytes()]);
}

fn list(export: &Export, replies: &mut Vec<u8>) {
    let name = export.name().as_bytes();
    let length = u32::try_from(name.len()).expect("names are bounded").to_be_bytes();
    let parts: [&[u8]; 3] = [&length, name, export.description().as_bytes()];
    wire::reply_to_option(replies, option::LIST, option_reply::SERVER, &parts);
}

/// The name of the export, and what the client wants to be told.
fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    if fields.0.len() != usize::from(count) * 2 {
        return None;
    }
    Some((name, std::iter::from_fn(|| fields.u16()).collect()))
}

/// The name of the export, and the queries.
fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        // Each takes at least 4 bytes, so there are no more than the data's length allows.
        queries.push(fields.string()?);
    }
    fields.0.is_empty().then_some((name, queries))
}
