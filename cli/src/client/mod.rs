//! The operator's side of a running daemon: a client of QMP, and the commands made with it.
//!
//! Replies and events come on one stream; [`Client::execute`] keeps the events that come before its reply for [`Client::next_event`]. What
//! the daemon sends is bounded ([`Limits::REPLY`]), so a daemon that is none cannot fill the memory.

pub(crate) mod backup;
pub(crate) mod job;

use std::collections::VecDeque;
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::qmp::{Limits, Reader, SyntaxError};

/// How long the daemon may take for a reply. A start may wait for writes of guests that are under way.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// How an NBD server begins, which speaks first as a QMP server does.
const NBD_MAGIC: &[u8] = b"NBDMAGIC";
/// Most events that are kept.
const MAX_EVENTS: usize = 4096;

/// Why the daemon did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ClientError {
    /// It said no.
    Refused(String),
    /// It is not there, or not any more, or makes no sense.
    Lost(String),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(text) | Self::Lost(text) => f.write_str(text),
        }
    }
}

/// A connection to a daemon, negotiated.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    reader: Reader,
    /// What was received and not read yet.
    received: Vec<u8>,
    events: VecDeque<Value>,
}

impl Client {
    /// Connect to the daemon whose QMP socket is at `path`.
    pub(crate) fn connect(path: &Path) -> Result<Self, ClientError> {
        Self::connect_within(path, REPLY_TIMEOUT)
    }

    /// As [`Self::connect`]; the daemon may take `patience` for its greeting.
    pub(crate) fn connect_within(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|error| {
            let advice = match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => "; is engine-cli daemon running?",
                _ => "",
            };
            ClientError::Lost(format!(
                "cannot connect to {}: {}{advice}",
                path.display(),
                crate::out::reason(&error)
            ))
        })?;
        let mut client = Self {
            stream,
            reader: Reader::new(Limits::REPLY),
            received: Vec::new(),
            events: VecDeque::new(),
        };
        let deadline = Instant::now() + patience;
        client.fill(deadline)?;
        if client.received.starts_with(NBD_MAGIC) {
            let why = "is a socket of NBD; name the one that the daemon was given with --qmp";
            return Err(ClientError::Lost(format!("{} {why}", path.display())));
        }
        let Some(greeting) = client.receive(deadline)? else {
            let most = crate::daemon::MAX_MONITORS;
            return Err(ClientError::Lost(format!(
                "the daemon at {} does not answer: it is busy, or has as many clients as it takes ({most}); try again later",
                path.display()
            )));
        };
        if greeting.get("QMP").is_none() {
            return Err(ClientError::Lost(format!("{} does not speak QMP", path.display())));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Have a command carried out.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        self.ask(command, arguments)?;
        match self.reply(command, Instant::now() + REPLY_TIMEOUT)? {
            Some(reply) => Ok(reply),
            None => Err(no_answer(command)),
        }
    }

    /// Send a command, whose [`Self::reply`] comes before the next is sent.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<(), ClientError> {
        let request = json!({ "execute": command, "arguments": arguments }).to_string();
        self.stream.write_all(request.as_bytes()).map_err(|error| gone(&error))
    }

    /// What the command that was sent came to; `None`: it is not known before `deadline`.
    pub(crate) fn reply(&mut self, command: &str, deadline: Instant) -> Result<Option<Value>, ClientError> {
        while let Some(mut message) = self.receive(deadline)? {
            if message.get("event").is_some() {
                self.keep(message);
            } else if let Some(text) = message["error"]["desc"].as_str() {
                return Err(ClientError::Refused(text.to_owned()));
            } else if message.get("return").is_some() {
                return Ok(Some(message["return"].take()));
            } else {
                return Err(ClientError::Lost(format!("the daemon's answer to {command} makes no sense")));
            }
        }
        Ok(None)
    }

    /// The next event; `None`: not before `deadline`. What has come by then is given even so.
    pub(crate) fn next_event(&mut self, deadline: Instant) -> Result<Option<Value>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        while let Some(message) = self.receive(deadline)? {
            if message.get("event").is_some() {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }

    /// Forget what was told before job `id` was created, which has just been accepted: there may have been others of that id, and their ends are
    /// not its own. A daemon tells `created` before its reply, and after all that was about those others.
    pub(crate) fn forget_before_creation(&mut self, id: &str) -> Result<(), ClientError> {
        let is_created = |event: &Value| {
            let data = &event["data"];
            event["event"] == "JOB_STATUS_CHANGE" && data["id"] == id && data["status"] == "created"
        };
        // The last one: the others may have begun since we listen, too.
        if let Some(at) = self.events.iter().rposition(is_created) {
            self.events.drain(..=at);
            return Ok(());
        }
        self.events.clear();
        let deadline = Instant::now() + REPLY_TIMEOUT;
        while let Some(event) = self.next_event(deadline)? {
            if is_created(&event) {
                return Ok(());
            }
        }
        Err(ClientError::Lost(format!("the daemon does not tell that job {id} was created")))
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// The next message; `None`: not before `deadline`.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Value>, ClientError> {
        loop {
            let mut rest = &self.received[..];
            let message = self.reader.next(&mut rest);
            let taken = self.received.len() - rest.len();
            self.received.drain(..taken);
            if let Some(message) = message {
                return message.map(Some).map_err(|error| nonsense(&error));
            }
            if !self.fill(deadline)? {
                return Ok(None);
            }
        }
    }

    /// Receive some bytes; `false`: none came before `deadline`.
    fn fill(&mut self, deadline: Instant) -> Result<bool, ClientError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.stream.set_read_timeout(Some(left)).map_err(|error| gone(&error))?;
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ClientError::Lost("the daemon has closed the connection".into())),
                Ok(bytes) => {
                    self.received.extend_from_slice(&buffer[..bytes]);
                    return Ok(true);
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(false);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(gone(&error)),
            }
        }
    }
}

fn gone(error: &std::io::Error) -> ClientError {
    ClientError::Lost(format!("the connection to the daemon is lost: {}", crate::out::reason(error)))
}

fn no_answer(command: &str) -> ClientError {
    ClientError::Lost(format!("the daemon does not answer to {command}"))
}

fn nonsense(error: &SyntaxError) -> ClientError {
    ClientError::Lost(format!("what the daemon sends makes no sense: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What is told of a server that greets so, and then says nothing more.
    fn told_of(greeting: &[u8]) -> String {
        let there = tempfile::tempdir().expect("a directory");
        let path = there.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).expect("bound");
        let greeting = greeting.to_vec();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            stream.write_all(&greeting).expect("sent");
            // Until the client has gone.
            stream.read_to_end(&mut Vec::new()).ok();
        });
        let told = Client::connect_within(&path, Duration::from_millis(100)).expect_err("it is no daemon");
        server.join().expect("unharmed");
        told.to_string().replace(&path.display().to_string(), "PATH")
    }

    #[test]
    fn a_daemon_that_does_not_greet_is_busy_and_one_that_greets_otherwise_is_none() {
        let busy = "the daemon at PATH does not answer: it is busy, or has as many clients as it takes (32); try again later";
        assert_eq!(told_of(b""), busy);
        assert_eq!(told_of(br#"{"QMP": {"#), busy);
        assert_eq!(told_of(b"{}\r\n"), "PATH does not speak QMP");
        assert!(told_of(b"NBDMAGIC").contains("is a socket of NBD"));
        assert!(told_of(b"SSH-2.0\r\n").contains("makes no sense"));
    }
}
