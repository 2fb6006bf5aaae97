//! What the daemon and those who steer it take.

use std::path::PathBuf;

use clap::Args;
use engine::copy::IoEngine;
use engine::storage::locator;
use engine::units::Length;

use super::{Carrier, whole_number, why};
use crate::daemon::MAX_CONNECTIONS;
use crate::daemon::listen::Endpoint;

pub(super) const DAEMON_HELP: &str = "\
QMP is QEMU's control protocol; docs/qemu-compatibility.md says which of its commands are there. The sockets are the \
owner's alone. A single --disk is also what NBD clients get that name no export: it has the empty name besides its own. Started \
with a socket (LISTEN_FDS), as nbdcopy does below, the daemon serves NBD on that. With a log (--log, -v, $ENGINE_LOG) \
have standard error read: while nobody does, guests wait. Ends with the command quit, or SIGTERM or SIGINT: jobs are cancelled then.

Examples:
  engine-cli daemon --qmp unix:/run/engine.qmp
  engine-cli daemon --qmp unix:/run/engine.qmp --nbd unix:/run/engine.nbd --disk vda=/srv/vm1.img
  engine-cli daemon --nbd tcp:10809 --disk vda=/dev/vg0/vm1
  nbdcopy -- [ engine-cli daemon --disk vda=vm1.img ] copy.img

Exit codes:
  0    ended in good order
  1    failed, as when the engine has died
  2    wrong usage, or something that was asked for cannot be had
  129, 130, 143
       a second SIGHUP, SIGINT (Ctrl-C), SIGTERM ended it at once";

/// `daemon`.
#[derive(Args, Debug)]
pub(crate) struct DaemonArgs {
    /// Take commands on this socket, unix:PATH
    #[arg(long, value_name = "SOCKET", value_parser = qmp_socket)]
    pub(crate) qmp: Option<PathBuf>,
    /// Serve disks on this socket: unix:PATH, or tcp:[HOST:]PORT, which is this host alone unless an address is given, and any free port
    /// where it is 0 (which one is told); tcp: alone is port 10809
    #[arg(long, value_name = "SOCKET", value_parser = Endpoint::parse)]
    pub(crate) nbd: Option<Endpoint>,
    /// Open the file or block device PATH, raw, as node NAME, and export it if there is an NBD socket; may be given again
    #[arg(long = "disk", value_name = "NAME=PATH", value_parser = disk)]
    pub(crate) disks: Vec<DiskArg>,
    /// Most NBD connections at a time, 1 to 1024, for nbd-server-start too; who comes then waits until one leaves. Tools that connect several times, as
    /// nbdcopy does four times, need as many; with 1 they are not offered to
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = max_connections)]
    pub(crate) max_connections: u32,
    /// Memory for disks and jobs, 16M to 1G: a disk in use takes 4M of it, a job 5M. Clients take their own: all of NBD together 64M and 388K each, all
    /// of QMP together 48M and 1M each, at most
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = memory)]
    pub(crate) memory: Length,
    /// What carries the I/O; auto: io_uring where the system allows it, else threads
    #[arg(long, value_name = "ENGINE", value_enum, default_value_t = Carrier::Auto)]
    io_engine: Carrier,
}

impl DaemonArgs {
    /// As the engine takes it.
    pub(crate) fn io_engine(&self) -> IoEngine {
        self.io_engine.engine()
    }
}

/// `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskArg {
    /// The node, and its export.
    pub(crate) name: String,
    /// Where it is.
    pub(crate) path: String,
}

/// A unix socket.
pub(super) fn qmp_socket(text: &str) -> Result<PathBuf, String> {
    match Endpoint::parse(text) {
        Ok(Endpoint::Unix(path)) => Ok(path),
        Ok(Endpoint::Tcp { .. }) => {
            Err("whoever reaches it rules over all disks, so it is no TCP socket; write it as unix:PATH"
                .into())
        }
        Err(_) => Err("write it as unix:PATH".into()),
    }
}

fn disk(text: &str) -> Result<DiskArg, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok(DiskArg { name: name.to_owned(), path: path.to_owned() })
        }
        _ => Err("write it as NAME=PATH".into()),
    }
}

fn max_connections(text: &str) -> Result<u32, String> {
    whole_number(text, 1, MAX_CONNECTIONS)
}

fn memory(text: &str) -> Result<Length, String> {
    let size = locator::parse_size(text).map_err(|error| why(&error))?;
    if !(16 << 20..=1 << 30).contains(&size.0) {
        return Err("it is out of range; choose 16M to 1G".to_owned());
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_and_disks_as_users_write_them() {
        assert_eq!(qmp_socket("unix:/run/x"), Ok("/run/x".into()));
        assert!(qmp_socket("tcp:1").is_err_and(|why| why.contains("TCP")));
        assert!(qmp_socket("/run/x").is_err());
        assert_eq!(disk("vda=/a=b"), Ok(DiskArg { name: "vda".into(), path: "/a=b".into() }));
        assert!(disk("vda").is_err() && disk("=x").is_err() && disk("x=").is_err());
        assert_eq!(memory("64M"), Ok(Length(64 << 20)));
        assert_eq!(max_connections("1024"), Ok(1024));
        for (text, why) in [("0", "out of range"), ("99999999999", "out of range"), ("x", "no whole number")]
        {
            assert_eq!(max_connections(text), Err(format!("it is {why}; choose 1 to 1024")), "{text}");
        }
        assert!(memory("1M").is_err() && memory("2G").is_err());
    }
}
