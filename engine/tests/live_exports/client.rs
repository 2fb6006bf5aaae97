//! A client by hand: it says what it is told to, right or wrong, and shows what comes back.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::protocol::{self, READ, Request, WRITE};

/// A connection with simple replies.
pub(crate) struct Client {
    stream: UnixStream,
    pub(crate) length: u64,
    cookie: u64,
}

/// Connect, as far as the greeting.
pub(crate) fn connect(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    Ok(stream)
}

/// What a client says to choose an export, greeting included.
pub(crate) fn choice(export: &str) -> Vec<u8> {
    [protocol::client_flags(3), protocol::option(protocol::OPT_GO, &protocol::info_data(export, &[]))]
        .concat()
}

/// A request as it goes over the wire.
pub(crate) fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    Request::new(command, flags, cookie, offset, length).bytes()
}

impl Client {
    /// Connect and choose an export; the error number of the option's reply if it is refused.
    pub(crate) fn open(socket: &Path, export: &str) -> Result<Self, u32> {
        let mut stream = connect(socket).expect("a server");
        stream.write_all(&choice(export)).expect("room for an option");
        let mut length = None;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head).expect("a reply");
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let (kind, bytes) = (word(12), word(16));
            let mut data = vec![0; bytes as usize];
            stream.read_exact(&mut data).expect("its data");
            match kind {
                1 => return Ok(Self { stream, length: length.expect("it was told"), cookie: 0 }),
                3 if data[..2] == [0, 0] => {
                    length = Some(u64::from_be_bytes(data[2..10].try_into().unwrap()));
                }
                3 => {}
                error => return Err(error & !(1 << 31)),
            }
        }
    }

    /// Send any bytes.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("room");
    }

    /// Receive so many bytes, whatever they are.
    pub(crate) fn hear(&mut self, bytes: usize) {
        self.stream.read_exact(&mut vec![0; bytes]).expect("a reply");
    }

    /// A simple reply without data: its cookie and its error number.
    pub(crate) fn hear_reply(&mut self) -> (u64, u32) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).expect("a reply");
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (u64::from_be_bytes(head[8..].try_into().unwrap()), error)
    }

    /// Send any bytes, as many as go without waiting for long; how many.
    pub(crate) fn say_what_goes(&mut self, bytes: &[u8]) -> usize {
        self.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut said = 0;
        while said < bytes.len() {
            match self.stream.write(&bytes[said..]) {
                Ok(more) => said += more,
                Err(_) => break,
            }
        }
        said
    }

    /// A request and its reply: the error number, 0 for success, and the data of a read.
    pub(crate) fn ask(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> (u32, Vec<u8>) {
        self.try_ask(command, flags, offset, length, payload).expect("a reply")
    }

    pub(crate) fn try_ask(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<(u32, Vec<u8>)> {
        self.cookie += 1;
        self.stream.write_all(&request(command, flags, self.cookie, offset, length))?;
        self.stream.write_all(payload)?;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        assert_eq!(head[8..], self.cookie.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let mut data = vec![0; if command == READ && error == 0 { length as usize } else { 0 }];
        self.stream.read_exact(&mut data)?;
        Ok((error, data))
    }

    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        let (error, data) = self.ask(READ, 0, offset, length, &[]);
        assert_eq!(error, 0, "read of {length} at {offset}");
        data
    }

    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        assert_eq!(self.ask(WRITE, flags, offset, length, data).0, 0, "write of {length} at {offset}");
    }

    /// Whether the server has ended the connection, after any replies that are under way.
    pub(crate) fn is_over(&mut self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }
}
