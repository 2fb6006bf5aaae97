//! `info`: what is known about a disk, and what this host offers for copying it.
//!
//! What io_uring offers is found out by opening a small ring, as a copy does, not by reading version numbers.

use engine::error::{Error, Operation, Refusal};
use engine::ring::select::RingConfig;
use engine::ring::uring::UringRing;
use engine::storage::{DiskInfo, Locator, info};

use crate::args::{ImageFormat, InfoArgs};
use crate::out;
use crate::report::info::{Offer, failed_json, json, lines};
use crate::report::{DONE, FAILED, deliver, exit_code};

/// Carry out `info`; gives the exit code.
pub(crate) fn run(args: &InfoArgs) -> u8 {
    let disk = match look(args) {
        Ok(disk) => disk,
        Err(error) => {
            out::complain(&error);
            let code = exit_code(&error);
            return if args.json { deliver(&failed_json(args, &error), code) } else { code };
        }
    };
    let offer = probe();
    if args.json {
        return deliver(&json(args, &disk, &offer), DONE);
    }
    match out::print(lines(args, &disk, &offer).as_bytes()) {
        Ok(()) => DONE,
        Err(undelivered) => {
            out::complain(undelivered);
            FAILED
        }
    }
}

fn look(args: &InfoArgs) -> Result<DiskInfo, Error> {
    if args.format != ImageFormat::Raw {
        let reason = "the format qcow2 is not supported yet";
        return Err(Error::refused(Refusal::Unsupported, Operation::Inspect, args.path.as_str(), reason)
            .advise("use `qemu-img info`, or leave --format out to look at the file as raw bytes"));
    }
    info(&Locator::parse(&args.path)?)
}

/// Open a small ring and see what it got.
fn probe() -> Offer {
    let config = RingConfig { arena_bytes: 64 << 10, capacity: 8, threads: 1, sockets: 0 };
    match UringRing::new(&config) {
        Ok(ring) => Ok(ring.traits()),
        Err(error) => Err(error.to_string()),
    }
}
