//! The commands and events, with what they take and return. The table is read by [`super::check`] and by introspection; what a
//! command does is the daemon's.
//!
//! Members whose names begin with `x-` are ours, for what QEMU has no word for. `docs/qemu-compatibility.md` describes them.

use super::schema::{
    Command, EMPTY, Event, Harmless, Kind, Object, Variants, Words, may, needs, object, refuse, words,
};

static CAPABILITY: Words = words(&["oob"]);
static JOB_STATUS: Words = words(&[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]);
static JOB_TYPE: Words = words(&["backup"]);
static IO_STATUS: Words = words(&["ok", "failed", "nospace"]);
static ON_ERROR: Words = words(&["report", "ignore", "enospc", "stop", "auto"]);
static ON_CBW_ERROR: Words = words(&["break-guest-write", "break-snapshot"]);
static ON_OFF_AUTO: Words = words(&["auto", "on", "off"]);
static SYNC: Words = Words { words: &["top", "full", "none"], refused: &["bitmap", "incremental"] };
static BITMAP_MODE: Words = words(&["on-success", "never", "always"]);
static DETECT_ZEROES: Words = words(&["off", "on", "unmap"]);
static DISCARD: Words = words(&["ignore", "unmap"]);
static AIO: Words = words(&["threads", "native", "io_uring"]);
static EXPORT_TYPE: Words = Words { words: &["nbd"], refused: &["vhost-user-blk", "fuse", "vduse-blk"] };
static REMOVE_MODE: Words = words(&["safe", "hard"]);
static COMPLETION_MODE: Words = words(&["individual", "grouped"]);
static OPERATION: Words = words(&["read", "write"]);
static ERROR_ACTION: Words = words(&["ignore", "report", "stop"]);
static DRIVER: Words = Words {
    words: &["file", "host_device", "null-co", "raw"],
    refused: &[
        "blkdebug",
        "blklogwrites",
        "blkreplay",
        "blkverify",
        "bochs",
        "cloop",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "dmg",
        "ftp",
        "ftps",
        "gluster",
        "host_cdrom",
        "http",
        "https",
        "io_uring",
        "iscsi",
        "luks",
        "nbd",
        "nfs",
        "null-aio",
        "nvme",
        "nvme-io_uring",
        "parallels",
        "preallocate",
        "qcow",
        "qcow2",
        "qed",
        "quorum",
        "rbd",
        "replication",
        "snapshot-access",
        "ssh",
        "throttle",
        "vdi",
        "vhdx",
        "virtio-blk-vfio-pci",
        "virtio-blk-vhost-user",
        "virtio-blk-vhost-vdpa",
        "vmdk",
        "vpc",
        "vvfat",
    ],
};
static ACTION: Words = Words {
    words: &["abort", "blockdev-backup"],
    refused: &[
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-merge",
        "block-dirty-bitmap-remove",
        "blockdev-snapshot",
        "blockdev-snapshot-internal-sync",
        "blockdev-snapshot-sync",
        "drive-backup",
    ],
};
static ADDRESS_TYPE: Words = Words { words: &["inet", "unix"], refused: &["fd", "vsock"] };

static CACHE: Object =
    object(&[may("direct", Kind::Bool), refuse("no-flush", Kind::Bool, Harmless::Bool(false))]);
static FILE: Object = object(&[
    needs("filename", Kind::Text),
    refuse("pr-manager", Kind::Text, Harmless::Nothing),
    may("locking", Kind::Word(&ON_OFF_AUTO)),
    may("aio", Kind::Word(&AIO)),
    refuse("aio-max-batch", Kind::Int, Harmless::Nothing),
    refuse("drop-cache", Kind::Bool, Harmless::Bool(true)),
    refuse("x-check-cache-dropped", Kind::Bool, Harmless::Bool(false)),
]);
static RAW: Object = object(&[
    needs("file", Kind::NodeOrName(&NODE)),
    refuse("offset", Kind::Int, Harmless::Nothing),
    refuse("size", Kind::Int, Harmless::Nothing),
]);
static NULL: Object = object(&[
    may("size", Kind::Int),
    refuse("latency-ns", Kind::Int, Harmless::Nothing),
    may("read-zeroes", Kind::Bool),
]);

/// A node, as `blockdev-add` takes it.
pub static NODE: Object = Object {
    members: &[
        needs("driver", Kind::Word(&DRIVER)),
        may("node-name", Kind::Text),
        may("discard", Kind::Word(&DISCARD)),
        may("cache", Kind::Object(&CACHE)),
        refuse("active", Kind::Bool, Harmless::Bool(true)),
        may("read-only", Kind::Bool),
        may("auto-read-only", Kind::Bool),
        refuse("force-share", Kind::Bool, Harmless::Bool(false)),
        refuse("detect-zeroes", Kind::Word(&DETECT_ZEROES), Harmless::Word("off")),
    ],
    variants: Some(Variants {
        tag: "driver",
        cases: &[("file", &FILE), ("host_device", &FILE), ("null-co", &NULL), ("raw", &RAW)],
    }),
};

static NODE_NAME: Object = object(&[needs("node-name", Kind::Text)]);

static PERF: Object = object(&[
    refuse("use-copy-range", Kind::Bool, Harmless::Bool(false)),
    may("max-workers", Kind::Int),
    may("max-chunk", Kind::Int),
    may("min-cluster-size", Kind::Int),
]);
static FLEECE: Object = object(&[needs("path", Kind::Text), may("size", Kind::Int)]);

/// The arguments of `blockdev-backup`.
pub static BACKUP: Object = object(&[
    may("job-id", Kind::Text),
    needs("device", Kind::Text),
    needs("sync", Kind::Word(&SYNC)),
    may("speed", Kind::Int),
    refuse("bitmap", Kind::Text, Harmless::Nothing),
    refuse("bitmap-mode", Kind::Word(&BITMAP_MODE), Harmless::Nothing),
    refuse("compress", Kind::Bool, Harmless::Bool(false)),
    may("on-source-error", Kind::Word(&ON_ERROR)),
    may("on-target-error", Kind::Word(&ON_ERROR)),
    may("on-cbw-error", Kind::Word(&ON_CBW_ERROR)),
    may("cbw-timeout", Kind::UInt32),
    may("auto-finalize", Kind::Bool),
    may("auto-dismiss", Kind::Bool),
    may("filter-node-name", Kind::Text),
    refuse("discard-source", Kind::Bool, Harmless::Bool(false)),
    may("x-perf", Kind::Object(&PERF)),
    needs("target", Kind::Text),
    may("x-fleece", Kind::Object(&FLEECE)),
]);

/// The arguments of `x-backup`: those of `blockdev-backup`, with a path of the daemon's host instead of a node.
static PATH_BACKUP: Object = object(&[
    may("job-id", Kind::Text),
    needs("device", Kind::Text),
    needs("path", Kind::Text),
    may("force", Kind::Bool),
    needs("sync", Kind::Word(&SYNC)),
    may("speed", Kind::Int),
    may("on-source-error", Kind::Word(&ON_ERROR)),
    may("on-target-error", Kind::Word(&ON_ERROR)),
    may("on-cbw-error", Kind::Word(&ON_CBW_ERROR)),
    may("cbw-timeout", Kind::UInt32),
    may("auto-finalize", Kind::Bool),
    may("auto-dismiss", Kind::Bool),
    may("filter-node-name", Kind::Text),
    may("x-perf", Kind::Object(&PERF)),
    may("x-fleece", Kind::Object(&FLEECE)),
]);

static INET: Object = object(&[
    needs("host", Kind::Text),
    needs("port", Kind::Text),
    refuse("numeric", Kind::Bool, Harmless::Bool(false)),
    refuse("to", Kind::Int, Harmless::Nothing),
    refuse("ipv4", Kind::Bool, Harmless::Nothing),
    refuse("ipv6", Kind::Bool, Harmless::Nothing),
    refuse("keep-alive", Kind::Bool, Harmless::Bool(false)),
    refuse("mptcp", Kind::Bool, Harmless::Bool(false)),
]);
static UNIX: Object = object(&[
    needs("path", Kind::Text),
    refuse("abstract", Kind::Bool, Harmless::Bool(false)),
    refuse("tight", Kind::Bool, Harmless::Bool(true)),
]);
static INET_DATA: Object = object(&[needs("data", Kind::Object(&INET))]);
static UNIX_DATA: Object = object(&[needs("data", Kind::Object(&UNIX))]);
static ADDRESS: Object = Object {
    members: &[needs("type", Kind::Word(&ADDRESS_TYPE))],
    variants: Some(Variants { tag: "type", cases: &[("inet", &INET_DATA), ("unix", &UNIX_DATA)] }),
};
static NBD_SERVER: Object = object(&[
    refuse("handshake-max-seconds", Kind::UInt32, Harmless::Nothing),
    refuse("tls-creds", Kind::Text, Harmless::Nothing),
    refuse("tls-authz", Kind::Text, Harmless::Nothing),
    may("max-connections", Kind::UInt32),
    needs("addr", Kind::Object(&ADDRESS)),
]);
static NBD_EXPORT: Object = object(&[
    may("name", Kind::Text),
    may("description", Kind::Text),
    refuse("bitmaps", Kind::Array(&Kind::Any), Harmless::Nothing),
    refuse("allocation-depth", Kind::Bool, Harmless::Bool(false)),
]);
static EXPORT: Object = Object {
    members: &[
        needs("type", Kind::Word(&EXPORT_TYPE)),
        needs("id", Kind::Text),
        refuse("fixed-iothread", Kind::Bool, Harmless::Bool(false)),
        refuse("iothread", Kind::Text, Harmless::Nothing),
        needs("node-name", Kind::Text),
        may("writable", Kind::Bool),
        refuse("writethrough", Kind::Bool, Harmless::Bool(false)),
        refuse("allow-inactive", Kind::Bool, Harmless::Bool(false)),
        may("x-snapshot", Kind::Text),
    ],
    variants: Some(Variants { tag: "type", cases: &[("nbd", &NBD_EXPORT)] }),
};
static EXPORT_INFO: Object = object(&[
    needs("id", Kind::Text),
    needs("type", Kind::Word(&EXPORT_TYPE)),
    needs("node-name", Kind::Text),
    needs("shutting-down", Kind::Bool),
]);

static BACKUP_ACTION: Object = object(&[needs("data", Kind::Object(&BACKUP))]);
static ABORT_ACTION: Object = object(&[needs("data", Kind::Object(&EMPTY))]);
static ACTIONS: Object = Object {
    members: &[needs("type", Kind::Word(&ACTION))],
    variants: Some(Variants {
        tag: "type",
        cases: &[("abort", &ABORT_ACTION), ("blockdev-backup", &BACKUP_ACTION)],
    }),
};
static PROPERTIES: Object = object(&[may("completion-mode", Kind::Word(&COMPLETION_MODE))]);

static JOB: Object = object(&[needs("id", Kind::Text)]);
static DEVICE: Object = object(&[needs("device", Kind::Text)]);
static JOB_INFO: Object = object(&[
    needs("id", Kind::Text),
    needs("type", Kind::Word(&JOB_TYPE)),
    needs("status", Kind::Word(&JOB_STATUS)),
    needs("current-progress", Kind::Int),
    needs("total-progress", Kind::Int),
    may("error", Kind::Text),
    may("x-detail", Kind::Text),
    may("x-only-skipped", Kind::Bool),
    may("x-progress", Kind::Any),
]);
static BLOCK_JOB_INFO: Object = object(&[
    needs("type", Kind::Word(&JOB_TYPE)),
    needs("device", Kind::Text),
    needs("len", Kind::Int),
    needs("offset", Kind::Int),
    needs("busy", Kind::Bool),
    needs("paused", Kind::Bool),
    needs("speed", Kind::Int),
    needs("io-status", Kind::Word(&IO_STATUS)),
    needs("ready", Kind::Bool),
    needs("status", Kind::Word(&JOB_STATUS)),
    needs("auto-finalize", Kind::Bool),
    needs("auto-dismiss", Kind::Bool),
    may("error", Kind::Text),
]);

static IMAGE_INFO: Object = object(&[
    needs("filename", Kind::Text),
    needs("format", Kind::Text),
    may("dirty-flag", Kind::Bool),
    may("actual-size", Kind::Int),
    needs("virtual-size", Kind::Int),
]);
static CACHE_INFO: Object =
    object(&[needs("writeback", Kind::Bool), needs("direct", Kind::Bool), needs("no-flush", Kind::Bool)]);
static NODE_INFO: Object = object(&[
    needs("file", Kind::Text),
    may("node-name", Kind::Text),
    needs("ro", Kind::Bool),
    needs("drv", Kind::Text),
    needs("backing_file_depth", Kind::Int),
    needs("encrypted", Kind::Bool),
    needs("active", Kind::Bool),
    needs("detect_zeroes", Kind::Word(&DETECT_ZEROES)),
    needs("bps", Kind::Int),
    needs("bps_rd", Kind::Int),
    needs("bps_wr", Kind::Int),
    needs("iops", Kind::Int),
    needs("iops_rd", Kind::Int),
    needs("iops_wr", Kind::Int),
    needs("image", Kind::Object(&IMAGE_INFO)),
    needs("cache", Kind::Object(&CACHE_INFO)),
    needs("write_threshold", Kind::Int),
]);

static VERSION_NUMBERS: Object =
    object(&[needs("major", Kind::Int), needs("minor", Kind::Int), needs("micro", Kind::Int)]);
static VERSION: Object =
    object(&[needs("qemu", Kind::Object(&VERSION_NUMBERS)), needs("package", Kind::Text)]);
static NAME: Object = object(&[needs("name", Kind::Text)]);

const NOTHING: Kind = Kind::Object(&EMPTY);

/// The one that a session carries out by itself.
pub static QMP_CAPABILITIES: Command = Command {
    name: "qmp_capabilities",
    arguments: &Object {
        members: &[may("enable", Kind::Array(&Kind::Word(&Words { words: &[], refused: CAPABILITY.words })))],
        variants: None,
    },
    returns: NOTHING,
};

const fn command(name: &'static str, arguments: &'static Object, returns: Kind) -> Command {
    Command { name, arguments, returns }
}

/// All of them, by name.
pub static COMMANDS: &[Command] = &[
    command("block-export-add", &EXPORT, NOTHING),
    command(
        "block-export-del",
        &object(&[needs("id", Kind::Text), may("mode", Kind::Word(&REMOVE_MODE))]),
        NOTHING,
    ),
    command("block-job-cancel", &object(&[needs("device", Kind::Text), may("force", Kind::Bool)]), NOTHING),
    command("block-job-complete", &DEVICE, NOTHING),
    command("block-job-dismiss", &JOB, NOTHING),
    command("block-job-finalize", &JOB, NOTHING),
    command("block-job-pause", &DEVICE, NOTHING),
    command("block-job-resume", &DEVICE, NOTHING),
    command(
        "block-job-set-speed",
        &object(&[needs("device", Kind::Text), needs("speed", Kind::Int)]),
        NOTHING,
    ),
    command("blockdev-add", &NODE, NOTHING),
    command("blockdev-backup", &BACKUP, NOTHING),
    command("blockdev-del", &NODE_NAME, NOTHING),
    command("job-cancel", &JOB, NOTHING),
    command("job-complete", &JOB, NOTHING),
    command("job-dismiss", &JOB, NOTHING),
    command("job-finalize", &JOB, NOTHING),
    command("job-pause", &JOB, NOTHING),
    command("job-resume", &JOB, NOTHING),
    command("nbd-server-start", &NBD_SERVER, NOTHING),
    command("nbd-server-stop", &EMPTY, NOTHING),
    command("qmp_capabilities", QMP_CAPABILITIES.arguments, NOTHING),
    command("query-block-exports", &EMPTY, Kind::Array(&Kind::Object(&EXPORT_INFO))),
    command("query-block-jobs", &EMPTY, Kind::Array(&Kind::Object(&BLOCK_JOB_INFO))),
    command("query-commands", &EMPTY, Kind::Array(&Kind::Object(&NAME))),
    command("query-jobs", &EMPTY, Kind::Array(&Kind::Object(&JOB_INFO))),
    command(
        "query-named-block-nodes",
        &object(&[may("flat", Kind::Bool)]),
        Kind::Array(&Kind::Object(&NODE_INFO)),
    ),
    command("query-qmp-schema", &EMPTY, Kind::Array(&Kind::Any)),
    command("query-version", &EMPTY, Kind::Object(&VERSION)),
    command("quit", &EMPTY, NOTHING),
    command(
        "transaction",
        &object(&[
            needs("actions", Kind::Array(&Kind::Object(&ACTIONS))),
            may("properties", Kind::Object(&PROPERTIES)),
        ]),
        NOTHING,
    ),
    command("x-backup", &PATH_BACKUP, NOTHING),
    command("x-query-latencies", &NODE_NAME, Kind::Any),
];

static COMPLETED: Object = object(&[
    needs("type", Kind::Word(&JOB_TYPE)),
    needs("device", Kind::Text),
    needs("len", Kind::Int),
    needs("offset", Kind::Int),
    needs("speed", Kind::Int),
    may("error", Kind::Text),
    may("x-detail", Kind::Text),
    may("x-only-skipped", Kind::Bool),
    may("x-report", Kind::Any),
]);

/// All of them, by name.
pub static EVENTS: &[Event] = &[
    Event { name: "BLOCK_EXPORT_DELETED", data: &JOB },
    Event {
        name: "BLOCK_JOB_CANCELLED",
        data: &object(&[
            needs("type", Kind::Word(&JOB_TYPE)),
            needs("device", Kind::Text),
            needs("len", Kind::Int),
            needs("offset", Kind::Int),
            needs("speed", Kind::Int),
            may("x-report", Kind::Any),
        ]),
    },
    Event { name: "BLOCK_JOB_COMPLETED", data: &COMPLETED },
    Event {
        name: "BLOCK_JOB_ERROR",
        data: &object(&[
            needs("device", Kind::Text),
            needs("operation", Kind::Word(&OPERATION)),
            needs("action", Kind::Word(&ERROR_ACTION)),
            may("x-detail", Kind::Text),
        ]),
    },
    Event {
        name: "BLOCK_JOB_PENDING",
        data: &object(&[needs("type", Kind::Word(&JOB_TYPE)), needs("id", Kind::Text)]),
    },
    Event {
        name: "JOB_STATUS_CHANGE",
        data: &object(&[needs("id", Kind::Text), needs("status", Kind::Word(&JOB_STATUS))]),
    },
];

/// The command of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}
