//! Telling a service manager how things stand (`NOTIFY_SOCKET`).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Everything listens.
pub(super) const READY: &str = "READY=1";
/// It is going to end.
pub(super) const STOPPING: &str = "STOPPING=1";

/// Tell `state` to the service manager, if there is one. That it cannot be told is logged, and changes nothing.
pub(super) fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(&socket, state) {
        crate::out::say(format_args!(
            "cannot tell {state} on {}: {}",
            socket.to_string_lossy(),
            crate::out::reason(&error)
        ));
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reaches_a_path_and_an_abstract_name() {
        let there = tempfile::tempdir().expect("a directory");
        let path = there.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("bound");
        send(path.as_os_str(), READY).expect("sent");
        let name = format!("engine-cli-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        let abstract_manager = UnixDatagram::bind_addr(&address).expect("bound");
        send(OsStr::new(&format!("@{name}")), STOPPING).expect("sent");
        let mut buffer = [0; 64];
        let told = manager.recv(&mut buffer).expect("received");
        assert_eq!(&buffer[..told], b"READY=1");
        let told = abstract_manager.recv(&mut buffer).expect("received");
        assert_eq!(&buffer[..told], b"STOPPING=1");
        assert!(send(OsStr::new("/nonexistent/socket"), READY).is_err());
    }
}
