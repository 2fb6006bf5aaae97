//! What `info` found, in lines for people and as the JSON object.

use engine::error::Error;
use engine::ring::uring::UringTraits;
use engine::storage::{DiskInfo, DiskKind, NbdInfo, Permission};
use serde_json::{Value, json};

use super::units::bytes;
use super::{DONE, error_value, exit_code, result_of};
use crate::args::InfoArgs;
use crate::out;

/// What this host offers for I/O: the traits of a ring that was opened, or why none could be.
pub(crate) type Offer = Result<UringTraits, String>;

/// The lines for people.
pub(crate) fn lines(args: &InfoArgs, disk: &DiskInfo, offer: &Offer) -> String {
    let yes_no = |flag| if flag { "yes" } else { "no" };
    let block = |size: u32| bytes(u64::from(size));
    let mut rows = vec![
        ("path", out::one_line(&disk.path)),
        ("kind", kind(disk.kind).to_owned()),
        ("format", format!("{} (as given, not guessed)", args.format.name())),
    ];
    if let Some(format) = disk.begins_like {
        let hint = format!("the contents begin like a {format} image; it is treated as raw here");
        rows.push(("hint", hint));
    }
    rows.push(("size", exact(disk.length)));
    if let Some(allocated) = disk.allocated_bytes {
        rows.push(("allocated", exact(allocated)));
        rows.push(("holes can be found", yes_no(disk.finds_holes).to_owned()));
    }
    if let Some(size) = disk.logical_block_bytes {
        rows.push(("logical block", block(size)));
    }
    if let Some(size) = disk.physical_block_bytes {
        rows.push(("physical block", block(size)));
    }
    match &disk.nbd {
        Some(nbd) => rows.extend(export_rows(nbd, disk.finds_holes)),
        None => rows.push((
            "direct I/O",
            disk.direct_io_alignment.map_or("no: copies go through the page cache".into(), |size| {
                format!("yes, aligned to {}", block(size))
            }),
        )),
    }
    let flags = [("discards", disk.discards), ("read-only", disk.read_only), ("mounted", disk.mounted)];
    rows.extend(flags.into_iter().filter_map(|(name, flag)| Some((name, yes_no(flag?).to_owned()))));
    if let Some(serial) = &disk.serial {
        rows.push(("serial", out::one_line(serial)));
    }
    if let Some(use_) = in_use(disk) {
        rows.push(("in use", use_));
    }
    rows.push((
        "io_uring",
        match offer {
            Ok(traits) => format!("yes: {}", granted(traits).join(", ")),
            Err(reason) => format!("no: {}; copies use threads", out::one_line(reason)),
        },
    ));
    rows.iter().map(|(name, value)| format!("{:<20}{value}\n", format!("{name}:"))).collect()
}

/// What is told of an export alone.
fn export_rows(nbd: &NbdInfo, finds_holes: bool) -> Vec<(&'static str, String)> {
    let size = |size: u32| bytes(u64::from(size));
    let offered: Vec<_> = [
        (nbd.structured_replies, "structured replies"),
        (nbd.block_status, "block status"),
        (nbd.flush, "flush"),
        (nbd.fua, "FUA"),
        (nbd.write_zeroes, "zeroes"),
        (nbd.multi_conn, "several connections"),
    ]
    .into_iter()
    .filter_map(|(offered, name)| offered.then_some(name))
    .collect();
    let offered = if offered.is_empty() { "nothing".to_owned() } else { offered.join(", ") };
    let (least, good, most) = (nbd.minimum_block, nbd.preferred_block, nbd.maximum_payload);
    vec![
        ("export", format!("'{}'", out::one_line(&nbd.export))),
        ("holes can be found", if finds_holes { "yes" } else { "no" }.to_owned()),
        ("requests", format!("in blocks of {}, better {}, up to {}", size(least), size(good), size(most))),
        ("server offers", offered),
    ]
}

/// The object for `--json`.
pub(crate) fn json(args: &InfoArgs, disk: &DiskInfo, offer: &Offer) -> Value {
    json!({
        "command": "info",
        "result": "told",
        "path": disk.path,
        "kind": kind(disk.kind),
        "format": args.format.name(),
        "begins_like": disk.begins_like,
        "length": disk.length,
        "allocated_bytes": disk.allocated_bytes,
        "logical_block_bytes": disk.logical_block_bytes,
        "physical_block_bytes": disk.physical_block_bytes,
        "direct_io_alignment": disk.direct_io_alignment,
        "finds_holes": disk.finds_holes,
        "discards": disk.discards,
        "read_only": disk.read_only,
        "mounted": disk.mounted,
        "serial": disk.serial,
        "used_by_others": disk.used_by_others,
        "not_shared_by_others": disk.not_shared_by_others,
        "nbd": disk.nbd,
        "io_uring": {
            "available": offer.is_ok(),
            "reason": offer.as_ref().err(),
            "registered_buffers": offer.as_ref().is_ok_and(|traits| traits.registered_buffers),
            "registered_files": offer.as_ref().is_ok_and(|traits| traits.registered_files),
            "setup_flags": offer.as_ref().map(setup_flags).unwrap_or_default(),
        },
        "error": null,
        "exit_code": DONE,
    })
}

/// The object for `--json` when nothing could be told.
pub(crate) fn failed_json(args: &InfoArgs, error: &Error) -> Value {
    json!({
        "command": "info",
        "result": result_of(error),
        "path": args.path,
        "error": error_value(error),
        "exit_code": exit_code(error),
    })
}

fn kind(kind: DiskKind) -> &'static str {
    match kind {
        DiskKind::File => "file",
        DiskKind::BlockDevice => "block_device",
        DiskKind::Nbd => "nbd",
    }
}

/// `by others, who read and write; they let nobody else write`: as far as they say so.
fn in_use(disk: &DiskInfo) -> Option<String> {
    let verbs = |permissions: &[Permission], between: &str| {
        let verbs: Vec<_> = permissions.iter().map(|&permission| verb(permission)).collect();
        verbs.join(between)
    };
    let uses = verbs(&disk.used_by_others, " and ");
    let keeps = verbs(&disk.not_shared_by_others, " or ");
    match (uses.is_empty(), keeps.is_empty()) {
        (true, true) => None,
        (false, true) => Some(format!("by others, who {uses} it")),
        (true, false) => Some(format!("by others, who let nobody else {keeps} it")),
        (false, false) => Some(format!("by others, who {uses} it, and let nobody else {keeps} it")),
    }
}

fn verb(permission: Permission) -> &'static str {
    match permission {
        Permission::Write => "write",
        Permission::Resize => "resize",
        Permission::ConsistentRead => "read",
    }
}

/// `4.0 GiB (4294967296 bytes)`.
fn exact(count: u64) -> String {
    format!("{} ({count} bytes)", bytes(count))
}

fn setup_flags(traits: &UringTraits) -> Vec<&'static str> {
    let flags = traits.flags;
    [
        (flags.submit_all, "SUBMIT_ALL"),
        (flags.coop_taskrun, "COOP_TASKRUN"),
        (flags.single_issuer, "SINGLE_ISSUER"),
        (flags.defer_taskrun, "DEFER_TASKRUN"),
    ]
    .into_iter()
    .filter_map(|(granted, name)| granted.then_some(name))
    .collect()
}

fn granted(traits: &UringTraits) -> Vec<&'static str> {
    let mut names = setup_flags(traits);
    if traits.registered_buffers {
        names.push("registered buffers");
    }
    if traits.registered_files {
        names.push("registered files");
    }
    names
}
