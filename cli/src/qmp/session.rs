//! One client of QMP: what it sends becomes requests, what it is told becomes bytes.
//!
//! # Model
//! The owner hands in what was received ([`Session::receive`]), takes requests out ([`Session::next_request`]), carries each out and
//! answers it before it takes the next ([`Session::answer`]). Replies and events stand in [`Session::output`] until the owner has sent
//! them. Greeting, negotiation and everything that is wrong with a message as such are dealt with in here.
//!
//! # Bounds
//! A client that sends without reading is not listened to any more while [`MAX_REPLIES`] wait for it: the owner takes no requests out, and
//! so receives no more ([`Session::wants_input`]). So one reply at most stands behind these, as large as its question makes it: who asks for much is
//! not given up for it. Events cannot wait, so a client for which [`MAX_EVENTS`] are waiting behind the last reply is given up
//! ([`Session::is_overrun`]): it has to connect again, and to ask how things stand. In all that is [`MAX_REPLIES`], twice [`MAX_EVENTS`] (a reply may
//! come when so many wait) and one [`MAX_REPLY`]. What all clients have together is the owner's to bound ([`Session::heap_bytes`], [`Session::give_up`]).

use serde_json::{Value, json};

use super::commands::QMP_CAPABILITIES;
use super::{Arguments, Limits, QmpError, Reader, check, version};

/// Bytes that wait to be sent beyond which no request is taken.
pub const MAX_REPLIES: usize = 256 << 10;
/// Most bytes of events that wait to be sent behind the last reply.
pub const MAX_EVENTS: usize = 4 << 20;
/// More bytes than any reply has: no limit in itself, but what follows from the limits of what can be asked for. The largest are those to
/// `query-named-block-nodes` and, of jobs that have much to tell, `query-jobs`.
pub const MAX_REPLY: usize = 20 << 20;
/// Most bytes of memory that output has ahead of need.
const MAX_SPARE: usize = 1 << 20;
/// Most bytes that were received and not looked at, beyond which nothing should be received.
pub const MAX_INPUT: usize = 64 << 10;
// Our own clients read whatever is sent.
const _: () = assert!(MAX_REPLY <= Limits::REPLY.bytes && MAX_EVENTS <= Limits::REPLY.bytes);

/// A command of a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its name.
    pub name: String,
    /// Its arguments, none if there were none.
    pub arguments: Arguments,
    id: Option<Value>,
}

/// See the module's header.
#[derive(Debug)]
pub struct Session {
    reader: Reader,
    negotiated: bool,
    input: Vec<u8>,
    /// Of `input`, what was looked at.
    taken: usize,
    output: Vec<u8>,
    /// Of `output`, what was sent.
    sent: usize,
    /// Of `output`, the end of the last reply.
    replied: usize,
    overrun: bool,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A client that has just connected; the greeting is waiting to be sent.
    #[must_use]
    pub fn new() -> Self {
        let mut session = Self::silent();
        session.reply(&json!({ "QMP": { "version": version(), "capabilities": [] } }));
        session
    }

    fn silent() -> Self {
        Self {
            reader: Reader::new(Limits::REQUEST),
            negotiated: false,
            input: Vec::new(),
            taken: 0,
            output: Vec::new(),
            sent: 0,
            replied: 0,
            overrun: false,
        }
    }

    /// Whether more should be received: not while the client leaves its replies unread, nor before what has come was looked at.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.input.len() - self.taken < MAX_INPUT && self.takes_requests()
    }

    /// These bytes have come.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.input.drain(..self.taken);
        self.taken = 0;
        self.input.extend_from_slice(bytes);
    }

    /// The next command to carry out; to be answered before the next one is taken.
    pub fn next_request(&mut self) -> Option<Request> {
        while self.takes_requests() {
            let mut rest = &self.input[self.taken..];
            let message = self.reader.next(&mut rest);
            self.taken = self.input.len() - rest.len();
            let message = match message? {
                Ok(message) => message,
                Err(error) => {
                    self.refuse(None, &QmpError::generic(error.to_string()));
                    continue;
                }
            };
            let request = match request_of(message) {
                Ok(request) => request,
                Err((id, error)) => {
                    self.refuse(id.as_ref(), &error);
                    continue;
                }
            };
            if self.negotiated && request.name != QMP_CAPABILITIES.name {
                return Some(request);
            }
            let answer = self.negotiate(&request);
            self.answer(&request, answer);
        }
        None
    }

    fn negotiate(&mut self, request: &Request) -> Result<Value, QmpError> {
        if request.name != QMP_CAPABILITIES.name {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(QmpError::not_found(text));
        }
        if self.negotiated {
            let text = "Capabilities negotiation is already complete, command ignored";
            return Err(QmpError::not_found(text));
        }
        check(QMP_CAPABILITIES.arguments, &request.arguments)?;
        self.negotiated = true;
        Ok(json!({}))
    }

    /// What became of `request`.
    pub fn answer(&mut self, request: &Request, result: Result<Value, QmpError>) {
        let value = match result {
            Ok(value) => value,
            Err(error) => return self.refuse(request.id.as_ref(), &error),
        };
        let mut reply = json!({ "return": value });
        if let Some(id) = &request.id {
            reply["id"] = id.clone();
        }
        self.reply(&reply);
    }

    fn refuse(&mut self, id: Option<&Value>, error: &QmpError) {
        let mut reply = json!({ "error": error.value() });
        if let Some(id) = id {
            reply["id"] = id.clone();
        }
        self.reply(&reply);
    }

    /// Something has happened; told to clients that have negotiated.
    pub fn event(&mut self, event: &Value) {
        if !self.negotiated || self.overrun {
            return;
        }
        let text = event.to_string();
        if self.output.len() - self.replied.max(self.sent) + text.len() > MAX_EVENTS {
            // Half of what is waiting is of no use to it.
            return self.give_up();
        }
        self.push(&text);
    }

    fn reply(&mut self, value: &Value) {
        if !self.overrun {
            self.push(&value.to_string());
            self.replied = self.output.len();
        }
    }

    fn push(&mut self, text: &str) {
        let more = text.len() + 2;
        if self.output.capacity() - self.output.len() < more {
            // Doubled, a large reply would take as much again for a few events.
            self.output.reserve_exact(more + self.output.len().min(MAX_SPARE));
        }
        self.output.extend_from_slice(text.as_bytes());
        self.output.extend_from_slice(b"\r\n");
    }

    /// It is told nothing any more, and takes no memory.
    pub fn give_up(&mut self) {
        *self = Self { overrun: true, ..Self::silent() };
    }

    /// Bytes of memory for what it has sent and what it is told, spare room included.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        self.reader.heap_bytes() + self.input.capacity() + self.output.capacity()
    }

    /// Whether it has left so much unread that it is given up.
    #[must_use]
    pub fn is_overrun(&self) -> bool {
        self.overrun
    }

    /// Whether something that has come was not looked at yet.
    #[must_use]
    pub fn has_input(&self) -> bool {
        self.taken < self.input.len()
    }

    /// Whether requests may be taken out: not while too many replies wait to be sent.
    #[must_use]
    pub fn takes_requests(&self) -> bool {
        self.output().len() < MAX_REPLIES
    }

    /// What is to be sent.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.output[self.sent..]
    }

    /// That much of the output was sent.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        assert!(self.sent <= self.output.len(), "no more is sent than there is");
        // Not each time: it moves all that is left.
        if self.sent >= self.output.len() / 2 {
            self.output.drain(..self.sent);
            self.replied = self.replied.saturating_sub(self.sent);
            self.sent = 0;
        }
        if self.output.is_empty() && self.output.capacity() > MAX_REPLIES {
            self.output = Vec::new();
        }
    }
}

/// The command that `message` asks for; else the id to answer with, and the mistake.
fn request_of(message: Value) -> Result<Request, (Option<Value>, QmpError)> {
    let Value::Object(mut members) = message else {
        return Err((None, QmpError::generic("QMP input must be a JSON object")));
    };
    let id = members.remove("id");
    let (mut name, mut arguments) = (None, Arguments::new());
    for (member, value) in members {
        let wrong = match (member.as_str(), value) {
            ("execute", Value::String(command)) => {
                name = Some(command);
                continue;
            }
            ("arguments", Value::Object(given)) => {
                arguments = given;
                continue;
            }
            ("execute", _) => "QMP input member 'execute' must be a string".to_owned(),
            ("arguments", _) => "QMP input member 'arguments' must be an object".to_owned(),
            (member, _) => format!("QMP input member '{member}' is unexpected"),
        };
        return Err((id, QmpError::generic(wrong)));
    }
    match name {
        Some(name) => Ok(Request { name, arguments, id }),
        None => Err((id, QmpError::generic("QMP input lacks member 'execute'"))),
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
