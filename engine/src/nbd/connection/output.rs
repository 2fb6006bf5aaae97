//! The line of replies: what leaves in which order, and what it holds until it has left.
//!
//! Headers and short replies are gathered in one buffer after the other; payloads are parts of their own, as they came from the disk. While a long
//! reply goes out as a whole, those of other requests wait in a line behind it.

use std::collections::VecDeque;

use crate::nbd::limits::{Account, ConnectionLimits, SharedBytes};

/// Most parts, and most bytes unless a single part has more, of a send.
const SEND_PARTS: usize = 64;
const SEND_BYTES: usize = 1 << 20;
/// Headers are appended to a buffer that is shorter than this.
const TEXT_BYTES: usize = 4096;

/// What a part holds until it has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Charge {
    /// So many bytes of the account for replies.
    Outgoing(usize),
    /// So many bytes of the account of the long reply.
    Stream(usize),
}

#[derive(Debug)]
struct Part {
    bytes: Vec<u8>,
    charge: Charge,
    /// Text, to which more may be appended.
    text: bool,
    /// Requests whose reply ends in it.
    replies: usize,
}

/// What leaves with a send.
#[derive(Debug, Default)]
struct Sending {
    outgoing: usize,
    stream: usize,
    replies: usize,
}

/// See the module's header.
#[derive(Debug)]
pub(super) struct Output {
    line: VecDeque<Part>,
    behind: VecDeque<Part>,
    /// A long reply is under way.
    held: bool,
    sending: Option<Sending>,
    unsent_replies: usize,
    pub(super) outgoing: Account,
    pub(super) stream: Account,
}

impl Output {
    pub(super) fn new(limits: &ConnectionLimits, shared: &SharedBytes) -> Self {
        let account = |most| Account::new(shared.clone(), limits.reserve_bytes, most);
        Self {
            line: VecDeque::new(),
            behind: VecDeque::new(),
            held: false,
            sending: None,
            unsent_replies: 0,
            outgoing: account(limits.outgoing_bytes),
            stream: account(limits.stream_bytes),
        }
    }

    /// Where to append headers and short replies.
    pub(super) fn text(&mut self) -> &mut Vec<u8> {
        text_of(if self.held { &mut self.behind } else { &mut self.line }, TEXT_BYTES)
    }

    /// Where the replies to options are appended: one buffer, which is taken by the next send. Whoever appends bounds it.
    pub(super) fn options(&mut self) -> &mut Vec<u8> {
        text_of(&mut self.line, usize::MAX)
    }

    /// Append a payload, or a reply that is held like one.
    pub(super) fn payload(&mut self, bytes: Vec<u8>, charge: usize) {
        let line = if self.held { &mut self.behind } else { &mut self.line };
        line.push_back(Part { bytes, charge: Charge::Outgoing(charge), text: false, replies: 0 });
    }

    /// What was appended last was the end of a reply.
    pub(super) fn end_reply(&mut self) {
        end_reply_in(if self.held { &mut self.behind } else { &mut self.line });
        self.unsent_replies += 1;
    }

    /// A long reply begins; its header is to be appended to what is returned.
    pub(super) fn begin_stream(&mut self) -> &mut Vec<u8> {
        assert!(!self.held, "one at a time");
        self.held = true;
        text_of(&mut self.line, TEXT_BYTES)
    }

    /// Append a piece of the long reply.
    pub(super) fn stream_payload(&mut self, bytes: Vec<u8>) {
        let charge = Charge::Stream(bytes.len());
        self.line.push_back(Part { bytes, charge, text: false, replies: 0 });
    }

    /// The long reply ends, with `end` behind its payload, and others may follow.
    pub(super) fn end_stream(&mut self, end: &[u8]) {
        assert!(self.held, "a long reply is under way");
        if !end.is_empty() {
            text_of(&mut self.line, TEXT_BYTES).extend_from_slice(end);
        }
        end_reply_in(&mut self.line);
        self.unsent_replies += 1;
        self.line.append(&mut self.behind);
        self.held = false;
    }

    /// The next send, if none is under way and there is something to send.
    pub(super) fn next_send(&mut self) -> Option<Vec<Vec<u8>>> {
        if self.sending.is_some() {
            return None;
        }
        let mut sending = Sending::default();
        let (mut parts, mut bytes) = (Vec::new(), 0);
        while let Some(part) = self.line.front() {
            if !parts.is_empty() && (parts.len() == SEND_PARTS || bytes + part.bytes.len() > SEND_BYTES) {
                break;
            }
            let part = self.line.pop_front().expect("just seen");
            match part.charge {
                Charge::Outgoing(charge) => sending.outgoing += charge,
                Charge::Stream(charge) => sending.stream += charge,
            }
            sending.replies += part.replies;
            bytes += part.bytes.len();
            if !part.bytes.is_empty() {
                parts.push(part.bytes);
            }
        }
        if parts.is_empty() {
            return None;
        }
        self.sending = Some(sending);
        Some(parts)
    }

    /// The last send has left.
    pub(super) fn sent(&mut self) {
        let sending = self.sending.take().expect("something is being sent");
        self.outgoing.give(sending.outgoing);
        self.stream.give(sending.stream);
        self.unsent_replies -= sending.replies;
        if self.line.is_empty() && self.line.capacity() > SEND_PARTS {
            self.line = VecDeque::new();
        }
    }

    /// Replies that have not left as a whole.
    pub(super) fn unsent_replies(&self) -> usize {
        self.unsent_replies
    }

    /// Whether everything has left.
    pub(super) fn is_empty(&self) -> bool {
        self.line.is_empty() && self.behind.is_empty() && self.sending.is_none()
    }

    /// Bytes that it has in memory, spare room included.
    pub(super) fn heap_bytes(&self) -> usize {
        let parts = self.line.iter().chain(&self.behind).map(|part| part.bytes.capacity()).sum::<usize>();
        parts + (self.line.capacity() + self.behind.capacity()) * size_of::<Part>()
    }

    /// Forget all of it; nothing leaves any more.
    pub(super) fn clear(&mut self) {
        self.line = VecDeque::new();
        self.behind = VecDeque::new();
    }
}

/// The buffer at the end of `line` for text, if it is shorter than `most`, or a new one.
fn text_of(line: &mut VecDeque<Part>, most: usize) -> &mut Vec<u8> {
    let fits = line.back().is_some_and(|part| part.text && part.bytes.len() < most);
    if !fits {
        line.push_back(Part { bytes: Vec::new(), charge: Charge::Outgoing(0), text: true, replies: 0 });
    }
    &mut line.back_mut().expect("there is one").bytes
}

fn end_reply_in(line: &mut VecDeque<Part>) {
    line.back_mut().expect("a reply has bytes").replies += 1;
}
