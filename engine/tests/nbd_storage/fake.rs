//! A server in the test's own process, whose disk is memory. It answers as it is told to, and remembers what it was asked.
//!
//! What was written is not on stable storage until it is flushed, on the connection over which it came: the protocol promises no more. A server that
//! loses power ([`Fake::lose_power`]) loses the rest.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::server::*;

/// Flags of exports.
pub(crate) mod flag {
    pub(crate) const HAS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 2;
    pub(crate) const FLUSH: u16 = 4;
    pub(crate) const FUA: u16 = 8;
    pub(crate) const TRIM: u16 = 32;
    pub(crate) const ZEROES: u16 = 64;
    pub(crate) const MULTI: u16 = 256;
    pub(crate) const ALL: u16 = HAS | FLUSH | FUA | TRIM | ZEROES;
}

const CONTEXT_ID: u32 = 42;
/// Granularity of what it tells of holes.
const GRAIN: usize = 4096;

/// How a server behaves.
#[derive(Clone)]
pub(crate) struct Behaviour {
    pub(crate) flags: u16,
    /// It takes whole blocks of this size alone, and reads and writes of so many bytes.
    pub(crate) block: u32,
    pub(crate) payload: u32,
    /// It knows structured replies and block status.
    pub(crate) structured: bool,
    /// It waits for more requests before it answers, and answers the last first, in pieces.
    pub(crate) shuffles: bool,
    /// Reads and writes in this range fail with this error.
    pub(crate) fails: Option<(Range<usize>, u32)>,
    /// It goes away, or sends nonsense, after so many requests.
    pub(crate) dies_after: Option<u32>,
    pub(crate) lies_after: Option<u32>,
    /// It answers the choice of an export with this error.
    pub(crate) refuses: Option<u32>,
    /// What it says instead of a greeting, before it goes; empty: it greets.
    pub(crate) greeting: &'static [u8],
    pub(crate) says_length: Option<u64>,
    /// So many connections are served, and the others kept waiting.
    pub(crate) clients: u32,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            flags: flag::ALL,
            block: 1,
            payload: 1 << 20,
            structured: true,
            shuffles: false,
            fails: None,
            dies_after: None,
            lies_after: None,
            refuses: None,
            greeting: b"",
            says_length: None,
            clients: u32::MAX,
        }
    }
}

/// What a server was asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) connections: u32,
    pub(crate) requests: u32,
    /// Requests against its rules.
    pub(crate) refused: u32,
    /// Most requests that were there at a time.
    pub(crate) together: usize,
    pub(crate) read_bytes: u64,
    pub(crate) writes: u32,
    pub(crate) durable_writes: u32,
    pub(crate) flushes: u32,
    /// Nothing was written since the last flush.
    pub(crate) flushed_last: bool,
    /// Requests that came over connections to a server which is no more.
    pub(crate) swallowed: u32,
}

struct Disk {
    /// As clients see it.
    contents: Vec<u8>,
    stable: Vec<u8>,
    /// What was written since the last flush over the same connection, and over which.
    unflushed: Vec<(u32, Range<usize>)>,
    /// How often power was lost.
    instance: u32,
}

impl Disk {
    fn changed(&mut self, connection: u32, range: Range<usize>, durably: bool) {
        if durably {
            self.stable[range.clone()].copy_from_slice(&self.contents[range]);
        } else {
            self.unflushed.push((connection, range));
        }
    }

    fn flush(&mut self, connection: u32) {
        for (_, range) in self.unflushed.extract_if(.., |(by, _)| *by == connection) {
            self.stable[range.clone()].copy_from_slice(&self.contents[range]);
        }
    }
}

/// A client's connection.
struct Client {
    number: u32,
    /// When it came, by losses of power.
    instance: u32,
    stream: UnixStream,
}

struct Shared {
    disk: Mutex<Disk>,
    seen: Mutex<Seen>,
    clients: Mutex<Vec<Client>>,
    behaviour: Behaviour,
}

/// See the module's header. Its threads end with their connections, or with the test.
pub(crate) struct Fake {
    shared: Arc<Shared>,
    directory: TempDir,
}

struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
    contents: Vec<u8>,
}

impl Fake {
    pub(crate) fn start(disk: Vec<u8>, behaviour: Behaviour) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(directory.path().join("socket")).expect("bound");
        let disk = Disk { contents: disk.clone(), stable: disk, unflushed: Vec::new(), instance: 0 };
        let shared = Arc::new(Shared {
            disk: Mutex::new(disk),
            seen: Mutex::default(),
            clients: Mutex::default(),
            behaviour,
        });
        let served = Arc::clone(&shared);
        thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming().map_while(Result::ok) {
                let count = {
                    let mut seen = served.seen();
                    seen.connections += 1;
                    seen.connections
                };
                if count > served.behaviour.clients {
                    kept.push(stream);
                    continue;
                }
                let served = Arc::clone(&served);
                let instance = served.disk().instance;
                let client = Client { number: count, instance, stream };
                thread::spawn(move || {
                    let number = client.number;
                    // A client that goes away ends it with an error.
                    served.serve(client).ok();
                    served.end_connections(|client| client.number == number);
                });
            }
        });
        Self { shared, directory }
    }

    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.directory.path().join("socket").display())
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        self.shared.disk().contents.clone()
    }

    pub(crate) fn seen(&self) -> Seen {
        self.shared.seen().clone()
    }

    /// It starts anew, without what was not flushed. Whoever was connected does not learn of it: what he sends is swallowed.
    pub(crate) fn lose_power(&self) {
        let mut disk = self.shared.disk();
        disk.contents = disk.stable.clone();
        disk.unflushed.clear();
        disk.instance += 1;
    }

    /// Connections from before power was lost last end.
    pub(crate) fn end_old_connections(&self) {
        let instance = self.shared.disk().instance;
        self.shared.end_connections(|client| client.instance < instance);
    }

    /// The connection of this number ends, counted from 1.
    pub(crate) fn end_connection(&self, number: u32) {
        self.shared.end_connections(|client| client.number == number);
    }
}

type Io<T> = std::io::Result<T>;

impl Shared {
    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().expect("no panic")
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("no panic")
    }

    fn end_connections(&self, which: impl Fn(&Client) -> bool) {
        let clients = self.clients.lock().expect("no panic");
        for client in clients.iter().filter(|client| which(client)) {
            // It may have ended.
            client.stream.shutdown(Shutdown::Both).ok();
        }
    }

    fn serve(&self, client: Client) -> Io<()> {
        let Client { number, instance, ref stream } = client;
        let mut stream = stream.try_clone()?;
        self.clients.lock().expect("no panic").push(client);
        if !self.behaviour.greeting.is_empty() {
            return stream.write_all(self.behaviour.greeting);
        }
        stream.write_all(&greeting(3))?;
        let mut flags = [0; 4];
        stream.read_exact(&mut flags)?;
        while !self.answer_option(&mut stream)? {}
        loop {
            let mut batch = vec![receive(&mut stream)?];
            while self.behaviour.shuffles && batch.len() < 16 {
                stream.set_read_timeout(Some(Duration::from_millis(5)))?;
                let mut first = [0; 1];
                match stream.read(&mut first) {
                    Ok(0) => return Ok(()),
                    Ok(_) => {
                        stream.set_read_timeout(None)?;
                        batch.push(receive_after(&first, &mut stream)?);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            stream.set_read_timeout(None)?;
            let mut seen = self.seen();
            seen.together = seen.together.max(batch.len());
            drop(seen);
            for request in batch.into_iter().rev() {
                if request.command == 2 {
                    return Ok(());
                }
                if self.disk().instance != instance {
                    self.seen().swallowed += 1;
                    continue;
                }
                let count = {
                    let mut seen = self.seen();
                    seen.requests += 1;
                    seen.requests
                };
                if self.behaviour.dies_after.is_some_and(|most| count > most) {
                    return Ok(());
                }
                let lies = self.behaviour.lies_after.is_some_and(|most| count > most);
                let reply = if lies { vec![0x67; 4096] } else { self.answer(&request, number) };
                stream.write_all(&reply)?;
            }
        }
    }

    /// Whether the export is chosen.
    fn answer_option(&self, stream: &mut UnixStream) -> Io<bool> {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let option = u32::from_be_bytes(header[8..12].try_into().expect("four"));
        let length = u32::from_be_bytes(header[12..].try_into().expect("four"));
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        let Behaviour { structured, block, payload, flags, refuses, says_length, .. } = self.behaviour;
        let length = says_length.unwrap_or(self.disk().contents.len() as u64);
        let reply = match option {
            8 if structured => option_reply(8, ACK, &[]),
            10 if structured => [context(CONTEXT_ID, "base:allocation"), option_reply(10, ACK, &[])].concat(),
            7 if refuses.is_some() => option_reply(7, refuses.unwrap_or(0), b"planted"),
            7 => {
                let preferred = block.max(4096);
                [export_info(length, flags), block_info(block, preferred, payload), option_reply(7, ACK, &[])]
                    .concat()
            }
            other => option_reply(other, UNSUPPORTED, &[]),
        };
        stream.write_all(&reply)?;
        Ok(option == 7 && refuses.is_none())
    }

    /// Why it does not want to, if it does not.
    fn refusal(&self, request: &Request) -> Option<u32> {
        let Behaviour { block, payload, flags, fails, .. } = &self.behaviour;
        let (start, end) = (request.offset, request.offset + u64::from(request.length));
        let length = self.disk().contents.len() as u64;
        let is_block = |at: u64| at.is_multiple_of(u64::from(*block)) || at == length;
        let offered = match request.command {
            0 => true,
            1 => flags & flag::READ_ONLY == 0,
            3 => flags & flag::FLUSH != 0,
            4 => flags & flag::TRIM != 0,
            6 => flags & flag::ZEROES != 0,
            7 => self.behaviour.structured,
            _ => false,
        };
        let fits = request.command > 1 || request.length <= *payload;
        let whole = request.command == 3 || is_block(start) && is_block(end) && start < end;
        if !offered || !fits || !whole || end > length || request.flags > 1 && request.command < 6 {
            self.seen().refused += 1;
            return Some(22);
        }
        let (range, code) = fails.as_ref()?;
        ((start as usize) < range.end && range.start < end as usize).then_some(*code)
    }

    fn answer(&self, request: &Request, connection: u32) -> Vec<u8> {
        let Request { cookie, offset, length, .. } = *request;
        if let Some(code) = self.refusal(request) {
            let chunks = self.behaviour.structured && request.command == 0;
            return if chunks { error(cookie, true, code, "planted") } else { simple(cookie, code) };
        }
        let range = offset as usize..offset as usize + length as usize;
        match request.command {
            0 => {
                self.seen().read_bytes += u64::from(length);
                let contents = self.disk().contents[range].to_vec();
                self.contents_reply(cookie, offset, &contents)
            }
            7 => status(cookie, true, CONTEXT_ID, &self.extents(range)),
            command => {
                let (mut disk, mut seen) = (self.disk(), self.seen());
                seen.flushed_last = command == 3;
                let durably = request.flags & 1 != 0;
                match command {
                    1 => {
                        seen.writes += 1;
                        seen.durable_writes += u32::from(durably);
                        disk.contents[range.clone()].copy_from_slice(&request.contents);
                        disk.changed(connection, range, durably);
                    }
                    3 => {
                        seen.flushes += 1;
                        disk.flush(connection);
                    }
                    6 => {
                        disk.contents[range.clone()].fill(0);
                        disk.changed(connection, range, durably);
                    }
                    _ => {}
                }
                simple(cookie, 0)
            }
        }
    }

    fn contents_reply(&self, cookie: u64, offset: u64, contents: &[u8]) -> Vec<u8> {
        if !self.behaviour.structured {
            return [simple(cookie, 0), contents.to_vec()].concat();
        }
        let half = contents.len() / 2;
        if self.behaviour.shuffles && half > 0 {
            let second = data(cookie, false, offset + half as u64, &contents[half..]);
            return [second, data(cookie, true, offset, &contents[..half])].concat();
        }
        data(cookie, true, offset, contents)
    }

    /// What it holds there, in grains: zeros or data.
    fn extents(&self, range: Range<usize>) -> Vec<(u32, u32)> {
        let disk = &self.disk().contents;
        let mut extents: Vec<(u32, u32)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = ((at / GRAIN + 1) * GRAIN).min(range.end);
            let flags = if disk[at..end].iter().all(|&byte| byte == 0) { 3 } else { 0 };
            match extents.last_mut() {
                Some((length, last)) if *last == flags => *length += (end - at) as u32,
                _ => extents.push(((end - at) as u32, flags)),
            }
            at = end;
        }
        extents
    }
}

fn receive(stream: &mut UnixStream) -> Io<Request> {
    receive_after(&[], stream)
}

/// A request whose first bytes have come.
fn receive_after(first: &[u8], stream: &mut UnixStream) -> Io<Request> {
    let mut header = [0; 28];
    header[..first.len()].copy_from_slice(first);
    stream.read_exact(&mut header[first.len()..])?;
    assert_eq!(header[..4], [0x25, 0x60, 0x95, 0x13], "a request");
    let u64_at = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().expect("eight"));
    let u16_at = |at: usize| u16::from_be_bytes(header[at..at + 2].try_into().expect("two"));
    let length = u32::from_be_bytes(header[24..].try_into().expect("four"));
    let command = u16_at(6);
    let mut contents = vec![0; if command == 1 { length as usize } else { 0 }];
    stream.read_exact(&mut contents)?;
    Ok(Request { flags: u16_at(4), command, cookie: u64_at(8), offset: u64_at(16), length, contents })
}
