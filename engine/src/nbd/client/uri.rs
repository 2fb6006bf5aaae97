//! NBD URIs, as the protocol's `doc/uri.md` has them: where a server listens, and which of its exports is meant.
//!
//! Pure text to typed values. `nbd://HOST[:PORT]/EXPORT` is TCP, `nbd+unix:///EXPORT?socket=PATH` a socket of this machine. One slash is taken
//! off the export's name, so `nbd://h//disk` means "/disk" and `nbd://h` the export without a name. `%` and two digits are a byte. A socket
//! whose name begins with `%00` is an abstract one. What asks for TLS, and a parameter nobody knows, is refused rather than ignored.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::error::Refusal;
use crate::nbd::wire::MAX_STRING_BYTES;

/// Where a server listens if nothing is said.
pub const DEFAULT_PORT: u16 = 10809;

/// Most bytes of an abstract socket's name, and of the path of one in a file system.
const MAX_SOCKET_NAME: usize = 107;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A name or an address, and a port.
    Tcp {
        /// Without the brackets around an address of version 6.
        host: String,
        /// The port.
        port: u16,
    },
    /// A socket in the file system.
    Unix(PathBuf),
    /// A socket without a place in the file system: its name, without the zero byte in front.
    Abstract(Vec<u8>),
}

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: Address,
    /// The export's name, often empty; at most 4096 bytes.
    pub export: String,
}

/// Why a text is no URI that can be used: the kind of refusal, the reason, and what to do.
pub type NotUsable = (Refusal, &'static str, &'static str);

const SHAPES: &str = "write it like nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";

/// Whether a scheme is one of NBD's.
#[must_use]
pub fn is_nbd(scheme: &str) -> bool {
    matches!(scheme, "nbd" | "nbds" | "nbd+unix" | "nbds+unix" | "nbd+vsock" | "nbds+vsock")
}

impl NbdUri {
    /// Understands `text`.
    ///
    /// # Errors
    /// What cannot be understood, or asks for what there is not.
    pub fn parse(text: &str) -> Result<Self, NotUsable> {
        let bad = |reason| (Refusal::BadArgument, reason, SHAPES);
        let unsupported = |reason, advice| Err((Refusal::Unsupported, reason, advice));
        let (scheme, rest) = text.split_once("://").ok_or(bad("it is no NBD address"))?;
        match scheme {
            "nbds" | "nbds+unix" | "nbds+vsock" => {
                return unsupported(
                    "NBD over TLS is not supported by this version",
                    "reach the server on a unix socket or through a tunnel, and leave out the s of nbds",
                );
            }
            "nbd+vsock" => {
                return unsupported("NBD over vsock is not supported by this version", SHAPES);
            }
            "nbd" | "nbd+unix" => {}
            _ => return Err(bad("it is no NBD address")),
        }
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decoded(export).and_then(|bytes| String::from_utf8(bytes).ok());
        let export = export.ok_or(bad("the export's name is no text"))?;
        if export.len() > MAX_STRING_BYTES {
            return Err(bad("the export's name is longer than 4096 bytes"));
        }
        let socket = socket_of(query)?;
        let address = match (scheme, socket) {
            ("nbd", None) => tcp(authority)?,
            ("nbd", Some(_)) => return Err(bad("a socket goes with nbd+unix:")),
            (_, None) => return Err(bad("it does not say which socket")),
            (_, Some(_)) if !authority.is_empty() => {
                return Err(bad("nbd+unix: takes no host; there are three slashes before the export"));
            }
            (_, Some(socket)) => unix(socket).ok_or(bad("the socket's name is empty or too long"))?,
        };
        Ok(Self { address, export })
    }
}

/// The value of `socket=`, the only parameter there is.
fn socket_of(query: Option<&str>) -> Result<Option<Vec<u8>>, NotUsable> {
    let mut socket = None;
    for parameter in query.unwrap_or("").split('&').filter(|parameter| !parameter.is_empty()) {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match key {
            "socket" if socket.is_none() => {
                let bytes = decoded(value);
                socket = Some(bytes.ok_or((Refusal::BadArgument, "the socket's name is spoilt", SHAPES))?);
            }
            "socket" => return Err((Refusal::BadArgument, "it names two sockets", SHAPES)),
            _ if key.starts_with("tls") => {
                return Err((
                    Refusal::Unsupported,
                    "NBD over TLS is not supported by this version",
                    "leave the parameters of TLS out",
                ));
            }
            _ => return Err((Refusal::BadArgument, "it has a parameter that is not known", SHAPES)),
        }
    }
    Ok(socket)
}

fn tcp(authority: &str) -> Result<Address, NotUsable> {
    let bad = |reason| (Refusal::BadArgument, reason, SHAPES);
    if authority.contains('@') {
        return Err(bad("a user's name is for TLS, which is not supported by this version"));
    }
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']').ok_or(bad("there is no ] behind the address"))?;
        (
            host,
            if port.is_empty() {
                None
            } else {
                Some(port.strip_prefix(':').ok_or(bad("its port is spoilt"))?)
            },
        )
    } else {
        authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)))
    };
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) if port.bytes().all(|digit| digit.is_ascii_digit()) => {
            port.parse().ok().filter(|&port| port > 0).ok_or(bad("its port is out of range"))?
        }
        Some(_) => return Err(bad("its port is no number")),
    };
    let host = decoded(host).and_then(|bytes| String::from_utf8(bytes).ok());
    let host = host.filter(|host| !host.is_empty()).ok_or(bad("it names no host"))?;
    Ok(Address::Tcp { host, port })
}

fn unix(mut name: Vec<u8>) -> Option<Address> {
    if name.first() == Some(&0) {
        name.remove(0);
        return (!name.is_empty() && name.len() <= MAX_SOCKET_NAME).then_some(Address::Abstract(name));
    }
    let good = !name.is_empty() && name.len() <= MAX_SOCKET_NAME && !name.contains(&0);
    good.then(|| Address::Unix(OsString::from_vec(name).into()))
}

/// `text` with every `%` and two digits made a byte; `None` where there are no two.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let (high, low) = (digit(bytes.next()?)?, digit(bytes.next()?)?);
                u8::try_from(high << 4 | low).ok()?
            }
            _ => byte,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> Result<NbdUri, NotUsable> {
        Ok(NbdUri { address: Address::Tcp { host: host.into(), port }, export: export.into() })
    }

    fn unix(path: &str, export: &str) -> Result<NbdUri, NotUsable> {
        Ok(NbdUri { address: Address::Unix(path.into()), export: export.into() })
    }

    #[test]
    fn uris() {
        for (text, expected) in [
            ("nbd://host", tcp("host", 10809, "")),
            ("nbd://host/", tcp("host", 10809, "")),
            ("nbd://host/disk", tcp("host", 10809, "disk")),
            ("nbd://host//disk", tcp("host", 10809, "/disk")),
            ("nbd://host:1234/a/b", tcp("host", 1234, "a/b")),
            ("nbd://host:/a", tcp("host", 10809, "a")),
            ("nbd://[::1]/a", tcp("::1", 10809, "a")),
            ("nbd://[fe80::1%25eth0]:7/", tcp("fe80::1%eth0", 7, "")),
            ("nbd://10.0.0.1/%C3%A4%20", tcp("10.0.0.1", 10809, "ä ")),
            ("nbd+unix:///disk?socket=/run/nbd.sock", unix("/run/nbd.sock", "disk")),
            ("nbd+unix:///?socket=nbd.sock", unix("nbd.sock", "")),
            ("nbd+unix://?socket=nbd%3fsock", unix("nbd?sock", "")),
            ("nbd+unix:////disk?socket=s", unix("s", "/disk")),
        ] {
            assert_eq!(NbdUri::parse(text), expected, "{text}");
        }
        let hidden = NbdUri::parse("nbd+unix:///x?socket=%00name").unwrap();
        assert_eq!(hidden.address, Address::Abstract(b"name".to_vec()));
    }

    #[test]
    fn what_is_no_uri_is_refused() {
        for text in [
            "nbd",
            "http://x",
            "nbd://",
            "nbd:///disk",
            "nbd://host:x/",
            "nbd://host:0/",
            "nbd://host:65536/",
            "nbd://host:+1/",
            "nbd://[::1",
            "nbd://[::1]7/",
            "nbd://me@host/",
            "nbd://host/%",
            "nbd://host/%4",
            "nbd://host/%zz",
            "nbd://host/%ff",
            "nbd://host/?socket=/s",
            "nbd://host/?x=1",
            "nbd+unix:///disk",
            "nbd+unix:///disk?socket=",
            "nbd+unix:///disk?socket=%00",
            "nbd+unix:///disk?socket=a%00b",
            "nbd+unix:///disk?socket=a&socket=b",
            "nbd+unix://host/disk?socket=a",
        ] {
            assert_eq!(NbdUri::parse(text).map_err(|refused| refused.0), Err(Refusal::BadArgument), "{text}");
        }
        for text in ["nbds://h", "nbds+unix:///?socket=s", "nbd+vsock://1/", "nbd://h/?tls-certificates=/x"] {
            assert_eq!(NbdUri::parse(text).map_err(|refused| refused.0), Err(Refusal::Unsupported), "{text}");
        }
        let long = |count: usize| NbdUri::parse(&format!("nbd://h/{}", "x".repeat(count)));
        assert!(long(4096).is_ok() && long(4097).is_err());
        assert!(NbdUri::parse(&format!("nbd+unix:///?socket={}", "x".repeat(108))).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(nbd|nbd\\+unix)://\\PC{0,40}") {
            drop(NbdUri::parse(&text));
        }

        #[test]
        fn names_come_back(name in "\\PC{0,40}") {
            let written: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let export = NbdUri::parse(&format!("nbd://h/{written}")).map(|uri| uri.export);
            prop_assert_eq!(export, Ok(name));
        }
    }
}
