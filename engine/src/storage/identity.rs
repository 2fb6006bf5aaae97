//! What tells one disk from another, and a changed disk from an unchanged one, between two runs.
//!
//! A source *file* is known by file system, inode, birth, length, modification and change time: any write to it shows.
//! A *device* is known by its serial number (its device number where it has none) and its length. That says which device
//! it is, if the number is unique; it cannot say whether its contents have changed, and nothing else can either. A *target* is
//! compared without its times, because copying to it changes them: what others write to it between two runs does not show here.
//! An *export* over NBD is known by
//! its server's address, its name and its length, which says less than of a device: the server may have another disk there.
//! (A sample of the contents is compared as well before a copy goes on, by `copy::sample`.)

use std::fmt;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use nix::sys::statvfs::fstatvfs;
use serde::{Deserialize, Serialize};

use super::topology;
use crate::units::Length;

/// A point in time as a file system keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileTime(
    /// Seconds since 1970.
    pub i64,
    /// Nanoseconds of the second.
    pub i64,
);

impl fmt::Display for FileTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, second) = (self.0.div_euclid(86_400), self.0.rem_euclid(86_400));
        let (year, month, day) = date(days);
        let (hour, minute) = (second / 3600, second % 3600 / 60);
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}.{:09} UTC", second % 60, self.1)
    }
}

/// The date so many days after 1970-01-01, in the Gregorian calendar. Years are counted from March, so that the leap day is the
/// last one, in cycles of 400 years, which all have the same length.
fn date(days: i64) -> (i64, i64, i64) {
    // From 0000-03-01 on.
    let days = days + 719_468;
    let (cycle, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Months of 30 and 31 days alternate, five of them in 153 days.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (year + cycle * 400 + next_year, month, day)
}

/// Which disk it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DiskId {
    /// A regular file.
    File {
        /// Device number of its file system; may differ after a reboot.
        device: u64,
        /// Identifier of its file system, where it has one.
        file_system: Option<u64>,
        /// Inode number.
        inode: u64,
        /// When it was created, where the file system knows. Tells a file that was removed and made again.
        born: Option<FileTime>,
        /// Last change of its contents.
        modified: FileTime,
        /// Last change of its contents, attributes or names.
        changed: FileTime,
    },
    /// A block device.
    Device {
        /// Its device number; may differ after a reboot.
        number: u64,
        /// Serial number, with the number of the partition if it is one; `None` where it has none.
        serial: Option<String>,
        /// For a device without a serial number: the boot and the number of the attachment in it, where the kernel counts them.
        attachment: Option<(String, String)>,
    },
    /// A disk without contents.
    Null,
    /// An export of an NBD server.
    Nbd {
        /// Where the server listens: `HOST:PORT`, or the path of a socket.
        server: String,
        /// The export's name.
        export: String,
    },
}

/// A disk as a map file remembers it. See the module's header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Where it was, symbolic links resolved. For people: a disk may be renamed.
    pub path: String,
    /// Length in bytes.
    pub length: u64,
    /// Which disk it is.
    pub disk: DiskId,
}

/// In what a disk is not the one remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which property.
    pub property: &'static str,
    /// What was remembered.
    pub recorded: String,
    /// What was found.
    pub found: String,
}

impl Difference {
    /// Whether it is the same file with other contents (or attributes).
    pub(crate) fn is_modification(&self) -> bool {
        matches!(self.property, "length" | "modification time" | "change time")
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its {} was {} and is now {}", self.property, self.recorded, self.found)
    }
}

impl Identity {
    /// The identity of an open file or device, found at `path`.
    pub(super) fn of(path: &Path, file: &File, metadata: &Metadata, length: Length, is_device: bool) -> Self {
        let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let disk = if is_device {
            let serial = topology::serial(metadata.rdev());
            let attachment = if serial.is_none() { topology::attachment(metadata.rdev()) } else { None };
            DiskId::Device { number: metadata.rdev(), serial, attachment }
        } else {
            let file_system = fstatvfs(file).ok().map(|vfs| vfs.filesystem_id()).filter(|&id| id != 0);
            DiskId::File {
                device: metadata.dev(),
                file_system,
                inode: metadata.ino(),
                born: birth(metadata),
                modified: FileTime(metadata.mtime(), metadata.mtime_nsec()),
                changed: FileTime(metadata.ctime(), metadata.ctime_nsec()),
            }
        };
        Self { path: resolved.to_string_lossy().into_owned(), length: length.0, disk }
    }

    /// The identity of `null:`.
    #[must_use]
    pub fn null(length: Length) -> Self {
        Self { path: "null:".to_owned(), length: length.0, disk: DiskId::Null }
    }

    /// Whether a change of contents shows in the identity.
    #[must_use]
    pub fn shows_changes(&self) -> bool {
        matches!(self.disk, DiskId::File { .. })
    }

    /// Why `now` is not this source, unchanged; `None` if it is.
    #[must_use]
    pub fn difference_as_source(&self, now: &Self) -> Option<Difference> {
        self.difference(now, true)
    }

    /// Why `now` is not this target; `None` if it is.
    #[must_use]
    pub fn difference_as_target(&self, now: &Self) -> Option<Difference> {
        self.difference(now, false)
    }

    fn difference(&self, now: &Self, with_times: bool) -> Option<Difference> {
        if let Some(kind) = differs("kind", kind_of(&self.disk), kind_of(&now.disk)) {
            return Some(kind);
        }
        match (&self.disk, &now.disk) {
            (
                DiskId::File { device, file_system, inode, born, modified, changed },
                DiskId::File {
                    device: device_now,
                    file_system: file_system_now,
                    inode: inode_now,
                    born: born_now,
                    modified: modified_now,
                    changed: changed_now,
                },
            ) => {
                let place = match (file_system, file_system_now) {
                    (Some(then), Some(now)) => differs("file system", then, now),
                    _ => differs("file system's device number", device, device_now),
                };
                place
                    .or_else(|| differs("inode number", inode, inode_now))
                    .or_else(|| differs("birth time", born.as_ref()?, born_now.as_ref()?))
                    .or_else(|| differs("length", self.length, now.length))
                    .or_else(|| with_times.then(|| differs("modification time", modified, modified_now))?)
                    .or_else(|| with_times.then(|| differs("change time", changed, changed_now))?)
            }
            (
                DiskId::Device { number, serial, attachment },
                DiskId::Device { number: number_now, serial: serial_now, attachment: attachment_now },
            ) => {
                let which = match (serial, serial_now) {
                    (Some(then), Some(now)) => differs("serial number", then, now),
                    _ => differs("device number", number, number_now).or_else(|| {
                        // Numbers of attachments can be compared within one boot only.
                        let ((boot, then), (boot_now, now)) =
                            (attachment.as_ref()?, attachment_now.as_ref()?);
                        (boot == boot_now).then(|| differs("attachment", then, now))?
                    }),
                };
                which.or_else(|| differs("length", self.length, now.length))
            }
            (DiskId::Nbd { server, export }, DiskId::Nbd { server: server_now, export: export_now }) => {
                differs("server", server, server_now)
                    .or_else(|| differs("export", export, export_now))
                    .or_else(|| differs("length", self.length, now.length))
            }
            _ => differs("length", self.length, now.length),
        }
    }
}

fn differs<T: PartialEq + fmt::Display>(property: &'static str, then: T, now: T) -> Option<Difference> {
    (then != now).then(|| Difference { property, recorded: then.to_string(), found: now.to_string() })
}

fn kind_of(disk: &DiskId) -> &'static str {
    match disk {
        DiskId::File { .. } => "a regular file",
        DiskId::Device { .. } => "a block device",
        DiskId::Null => "null:",
        DiskId::Nbd { .. } => "an NBD export",
    }
}

fn birth(metadata: &Metadata) -> Option<FileTime> {
    let since = metadata.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(FileTime(i64::try_from(since.as_secs()).ok()?, i64::from(since.subsec_nanos())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(inode: u64, length: u64, modified: i64) -> Identity {
        let disk = DiskId::File {
            device: 1,
            file_system: None,
            inode,
            born: None,
            modified: FileTime(modified, 0),
            changed: FileTime(modified, 0),
        };
        Identity { path: format!("/{inode}"), length, disk }
    }

    fn device(number: u64, serial: Option<&str>) -> Identity {
        let disk = DiskId::Device { number, serial: serial.map(str::to_owned), attachment: None };
        Identity { path: "/dev/x".into(), length: 512, disk }
    }

    #[test]
    fn times_are_told_as_dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00.000000007 UTC"),
            (951_782_399, "2000-02-28 23:59:59.000000007 UTC"),
            (951_782_400, "2000-02-29 00:00:00.000000007 UTC"),
            (1_709_251_200, "2024-03-01 00:00:00.000000007 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59.000000007 UTC"),
            (-1, "1969-12-31 23:59:59.000000007 UTC"),
        ] {
            assert_eq!(FileTime(seconds, 7).to_string(), text);
        }
    }

    #[test]
    fn a_changed_source_shows_and_a_written_target_is_the_same() {
        let then = file(5, 100, 7);
        assert_eq!(then.difference_as_source(&then), None);
        let property = |now: &Identity| then.difference_as_source(now).map(|difference| difference.property);
        assert_eq!(property(&file(6, 100, 7)), Some("inode number"));
        assert_eq!(property(&file(5, 101, 7)), Some("length"));
        assert_eq!(property(&file(5, 100, 8)), Some("modification time"));
        assert_eq!(property(&device(5, None)), Some("kind"));
        assert_eq!(then.difference_as_target(&file(5, 100, 8)), None);
        assert!(then.difference_as_target(&file(5, 99, 7)).is_some());
    }

    #[test]
    fn a_device_is_known_by_its_serial_wherever_it_is_plugged_in() {
        let then = device(5, Some("abc"));
        assert_eq!(then.difference_as_source(&device(6, Some("abc"))), None);
        assert!(then.difference_as_source(&device(5, Some("abd"))).is_some());
        assert!(device(5, None).difference_as_source(&device(6, None)).is_some());
    }

    #[test]
    fn an_export_is_known_by_server_name_and_length() {
        let export = |server: &str, export: &str, length: u64| {
            let disk = DiskId::Nbd { server: server.to_owned(), export: export.to_owned() };
            Identity { path: "nbd://h/x".into(), length, disk }
        };
        let then = export("h:10809", "x", 512);
        assert_eq!(then.difference_as_source(&export("h:10809", "x", 512)), None);
        let property = |now: &Identity| then.difference_as_target(now).map(|difference| difference.property);
        assert_eq!(property(&export("i:10809", "x", 512)), Some("server"));
        assert_eq!(property(&export("h:10809", "y", 512)), Some("export"));
        assert_eq!(property(&export("h:10809", "x", 1024)), Some("length"));
        assert_eq!(property(&device(5, None)), Some("kind"));
        assert!(!then.shows_changes());
    }

    #[test]
    fn a_device_without_a_serial_number_is_told_by_its_attachment_within_a_boot() {
        let attached = |boot: &str, count: &str| {
            let attachment = Some((boot.to_owned(), count.to_owned()));
            let disk = DiskId::Device { number: 7, serial: None, attachment };
            Identity { path: "/dev/x".into(), length: 512, disk }
        };
        let then = attached("one", "4");
        assert_eq!(then.difference_as_source(&attached("one", "4")), None);
        assert!(then.difference_as_source(&attached("one", "5")).is_some(), "another disk took its place");
        assert_eq!(then.difference_as_target(&attached("two", "1")), None, "after a boot nobody can tell");
    }
}
