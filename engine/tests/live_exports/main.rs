//! Exports on a real engine, real files and real sockets: what clients see, and what they leave behind.

mod client;
#[allow(dead_code, clippy::cast_possible_truncation, reason = "shared with the tests of the protocol")]
#[path = "../nbd_protocol/client.rs"]
mod protocol;
mod tools;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use engine::copy::SyncMode;
use engine::job::{Outcome, Status};
use engine::live::{
    BackupOptions, DiskOptions, Engine, EngineOptions, Export, ExportOptions, ExportSource, LiveDisk,
    NbdListener, NbdOptions, NbdServer, Removal,
};

use client::Client;
use protocol::{DISC, EIO, ENOSPC, EPERM, ESHUTDOWN, FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES};

const CLUSTER: u64 = 64 << 10;

/// An engine with a disk `disk` under a server.
struct Fixture {
    directory: tempfile::TempDir,
    engine: Engine,
    server: NbdServer,
    disk: LiveDisk,
    contents: Vec<u8>,
}

impl Fixture {
    fn new(clusters: u64) -> Self {
        Self::with(clusters * CLUSTER + 700, NbdOptions::default())
    }

    fn with(length: u64, options: NbdOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let engine = Engine::start(&EngineOptions { clients: 1000, ..EngineOptions::default() }).unwrap();
        let mut contents = vec![0; usize::try_from(length).unwrap()];
        fastrand::Rng::with_seed(7).fill(&mut contents);
        let path = directory.path().join("disk.img");
        fs::write(&path, &contents).unwrap();
        let path = path.display().to_string();
        let disk = engine.open_disk(&DiskOptions { path, writable: true }).unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let server = engine.start_nbd(NbdListener::Unix(listener), options).unwrap();
        Self { directory, engine, server, disk, contents }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn export(&self, name: &str, source: ExportSource, writable: bool) -> (Export, mpsc::Receiver<()>) {
        let (sender, gone) = mpsc::channel();
        let options = ExportOptions {
            name: name.to_owned(),
            description: "a disk of random bytes".to_owned(),
            source,
            writable,
            trim: true,
            on_gone: Some(Box::new(move || sender.send(()).unwrap_or_default())),
        };
        (self.server.add_export(options).unwrap(), gone)
    }

    /// The disk under its own name, for writing.
    fn export_disk(&self) -> (Export, mpsc::Receiver<()>) {
        self.export("disk", ExportSource::Disk(self.disk.clone()), true)
    }

    fn open(&self, name: &str) -> Client {
        Client::open(&self.socket(), name).unwrap()
    }

    fn options(&self, sync: SyncMode) -> BackupOptions {
        let mut options = BackupOptions::new(self.directory.path().join("backup.img").display().to_string());
        options.sync = sync;
        options
    }
}

/// Wait for what takes its time, but not for ever.
fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_reads_and_writes_and_the_disk_has_it() {
    let fixture = Fixture::new(20);
    let (_export, _gone) = fixture.export_disk();
    let mut client = fixture.open("disk");
    let length = fixture.contents.len();
    assert_eq!(client.length, length as u64);
    let mut expected = fixture.contents.clone();
    assert_eq!(client.read(0, u32::try_from(length).unwrap()), expected);
    for (flags, offset, bytes) in
        [(0, 0, 4096), (FUA, 511, 70_000), (0, length - 3, 3), (FUA, length - 700, 700)]
    {
        let data: Vec<u8> =
            (0..bytes).map(|index| u8::try_from((index * 7 + offset) % 251).unwrap()).collect();
        client.write(flags, offset as u64, &data);
        expected[offset..offset + bytes].copy_from_slice(&data);
    }
    assert_eq!(client.ask(WRITE_ZEROES, FUA, 100_001, 150_000, &[]), (0, vec![]));
    expected[100_001..250_001].fill(0);
    assert_eq!(client.ask(TRIM, 0, 4 * CLUSTER, 65_536, &[]), (0, vec![]));
    assert_eq!(client.ask(FLUSH, 0, 0, 0, &[]), (0, vec![]));
    let read = client.read(0, u32::try_from(length).unwrap());
    // What a trim leaves behind is anybody's guess.
    let trimmed = usize::try_from(4 * CLUSTER).unwrap()..usize::try_from(5 * CLUSTER).unwrap();
    expected[trimmed.clone()].copy_from_slice(&read[trimmed]);
    assert!(read == expected, "through the export");
    assert!(fixture.disk.read(0, length).unwrap() == expected, "on the disk");
    // Beyond the end.
    assert_eq!(client.ask(WRITE, 0, length as u64 - 1, 2, &[1, 2]).0, ENOSPC);
    assert_eq!(client.ask(READ, 0, length as u64, 1, &[]).0, 22);
    client.say(&client::request(DISC, 0, 9, 0, 0));
    assert!(client.is_over());
}

#[test]
fn clients_that_may_give_no_space_back_make_no_holes() {
    let fixture = Fixture::new(40);
    let keeping = ExportOptions {
        name: "keeping".to_owned(),
        description: String::new(),
        source: ExportSource::Disk(fixture.disk.clone()),
        writable: true,
        trim: false,
        on_gone: None,
    };
    fixture.server.add_export(keeping).unwrap();
    let (_export, _gone) = fixture.export_disk();
    let blocks = || fs::metadata(fixture.directory.path().join("disk.img")).unwrap().blocks();
    let (before, half) = (blocks(), 20 * 65_536);
    let mut client = fixture.open("keeping");
    assert_eq!(client.ask(WRITE_ZEROES, 0, 0, half, &[]), (0, vec![]));
    assert_eq!(client.read(0, half), vec![0; half as usize]);
    assert_eq!(client.ask(TRIM, 0, 0, half, &[]).0, 22);
    assert!(blocks() >= before, "{before} blocks, then {}", blocks());
    // Another export of the same disk may do so.
    assert_eq!(fixture.open("disk").ask(WRITE_ZEROES, 0, 0, half, &[]), (0, vec![]));
    assert!(blocks() < before, "{before} blocks, then {}", blocks());
}

#[test]
fn what_clients_write_during_a_backup_is_not_in_it() {
    let fixture = Fixture::new(400);
    let (_export, _gone) = fixture.export_disk();
    let mut clients: Vec<Client> = (0..4).map(|_| fixture.open("disk")).collect();
    clients[0].write(0, 1000, b"before t0");
    let mut expected = fixture.contents.clone();
    expected[1000..1009].copy_from_slice(b"before t0");
    let backup = fixture.engine.start_backup(&fixture.disk, &fixture.options(SyncMode::Full)).unwrap();
    let mut rng = fastrand::Rng::with_seed(1);
    let mut disk = expected.clone();
    for round in 0..300 {
        let client = &mut clients[round % 4];
        let bytes = rng.usize(1..9000);
        let offset = rng.usize(0..disk.len() - bytes);
        if rng.u8(..) < 40 {
            assert_eq!(client.ask(WRITE_ZEROES, 0, offset as u64, u32::try_from(bytes).unwrap(), &[]).0, 0);
            disk[offset..offset + bytes].fill(0);
        } else {
            let data = vec![rng.u8(..); bytes];
            client.write(0, offset as u64, &data);
            disk[offset..offset + bytes].copy_from_slice(&data);
        }
    }
    assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    assert!(
        fs::read(fixture.directory.path().join("backup.img")).unwrap() == expected,
        "the backup shows t0"
    );
    let length = u32::try_from(disk.len()).unwrap();
    assert!(clients[0].read(0, length) == disk, "the disk has every write");
}

#[test]
fn a_snapshot_is_served_while_its_job_runs() {
    let fixture = Fixture::new(20);
    let (_disk, _) = fixture.export_disk();
    let backup = fixture.engine.start_backup(&fixture.disk, &fixture.options(SyncMode::None)).unwrap();
    let (_snapshot, _) = fixture.export("t0", ExportSource::Snapshot(backup.snapshot.clone()), false);
    let (mut writer, mut reader) = (fixture.open("disk"), fixture.open("t0"));
    writer.write(0, 5000, &[1; 200_000]);
    let length = u32::try_from(fixture.contents.len()).unwrap();
    assert!(reader.read(0, length) == fixture.contents, "as of t0");
    assert_eq!(reader.ask(WRITE, 0, 0, 3, b"no!").0, EPERM);
    assert_eq!(writer.read(5000, 3), [1; 3]);
    backup.job.cancel().unwrap();
    assert!(!matches!(backup.job.wait().outcome, Outcome::Complete));
    assert_eq!(reader.ask(READ, 0, 0, 512, &[]).0, EIO, "the snapshot has ended");
}

#[test]
fn an_export_goes_when_it_is_told_to() {
    let fixture = Fixture::new(4);
    let (export, gone) = fixture.export_disk();
    let mut client = fixture.open("disk");
    let error = export.remove(Removal::IfUnused).unwrap_err().to_string();
    assert!(error.contains("disk") && error.contains("1 clients use it"), "{error}");
    client.write(0, 0, b"still there");
    export.remove(Removal::Disconnect).unwrap();
    gone.recv_timeout(Duration::from_secs(10)).expect("it is gone once its client was told to leave");
    assert!(client.is_over());
    assert_eq!(Client::open(&fixture.socket(), "disk").err(), Some(6), "no such export");
    export.remove(Removal::IfUnused).expect("gone already");
    // The name is free again.
    let (export, gone) = fixture.export_disk();
    export.remove(Removal::IfUnused).unwrap();
    gone.recv_timeout(Duration::from_secs(10)).unwrap();
}

#[test]
fn a_name_is_taken_once_and_found_when_it_is_the_only_one() {
    let fixture = Fixture::new(4);
    let (_first, _) = fixture.export_disk();
    let again = ExportOptions {
        name: "disk".to_owned(),
        description: String::new(),
        source: ExportSource::Disk(fixture.disk.clone()),
        writable: false,
        trim: true,
        on_gone: None,
    };
    let error = fixture.server.add_export(again).unwrap_err();
    assert!(error.is_refusal() && error.to_string().contains("already"), "{error}");
    assert_eq!(fixture.open("").length, fixture.contents.len() as u64, "the only one needs no name");
    let (_second, _) = fixture.export("other", ExportSource::Disk(fixture.disk.clone()), false);
    assert_eq!(Client::open(&fixture.socket(), "").err(), Some(6));
    let mut reader = fixture.open("other");
    assert_eq!(reader.ask(WRITE, 0, 0, 1, &[0]).0, EPERM);
    assert_eq!(reader.ask(TRIM, 0, 0, 512, &[]).0, EPERM);
}

#[test]
fn who_comes_before_a_server_is_opened_finds_everything_there() {
    let fixture = Fixture::with(CLUSTER, NbdOptions { closed: true, ..NbdOptions::default() });
    let socket = fixture.socket();
    let early = std::thread::spawn(move || Client::open(&socket, "disk").map(|client| client.length));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!early.is_finished(), "it is not even greeted");
    let (_export, _gone) = fixture.export_disk();
    fixture.server.open().unwrap();
    assert_eq!(early.join().unwrap(), Ok(CLUSTER));
    fixture.server.stop().unwrap();
    assert!(fixture.server.open().is_err(), "it has stopped");
}

#[test]
fn a_server_that_stops_lets_its_clients_finish() {
    let fixture = Fixture::new(4);
    let (_export, gone) = fixture.export_disk();
    let (mut idle, stray) = (fixture.open("disk"), client::connect(&fixture.socket()).unwrap());
    idle.write(0, 0, b"done");
    fixture.server.stop().unwrap();
    gone.try_recv().expect("all is gone when it has stopped");
    assert!(idle.is_over());
    drop(stray);
    let refused = fixture.server.add_export(ExportOptions {
        name: "late".to_owned(),
        description: String::new(),
        source: ExportSource::Disk(fixture.disk.clone()),
        writable: true,
        trim: true,
        on_gone: None,
    });
    assert!(refused.is_err());
    fixture.server.stop().expect("stopped already");
    assert_eq!(fixture.disk.read(0, 4).unwrap(), b"done");
}

#[test]
fn whoever_stops_a_server_need_not_wait_for_a_client_that_takes_its_time() {
    let fixture = Fixture::new(4);
    let (_export, gone) = fixture.export_disk();
    let mut client = fixture.open("disk");
    let before = client.read(0, 100);
    // In one piece: a request, and another one of whose payload there is only the beginning. Whoever answers the first knows of both.
    let both = [client::request(READ, 0, 1, 0, 16), client::request(WRITE, 0, 2, 0, 4096), vec![7; 100]];
    client.say(&both.concat());
    client.hear(16 + 16);
    let begun = Instant::now();
    assert!(!fixture.server.stop_within(Duration::from_millis(50)).unwrap(), "it is waited for");
    assert!(begun.elapsed() < Duration::from_secs(4), "for as long as was asked for");
    drop(client);
    fixture.server.stop().unwrap();
    gone.try_recv().expect("all is gone when it has stopped");
    assert_eq!(fixture.disk.read(0, 100).unwrap(), before, "half a write is none");
}

#[test]
fn who_comes_beyond_the_bound_waits_for_one_to_leave() {
    let fixture = Fixture::with(CLUSTER, NbdOptions { clients: 2, ..NbdOptions::default() });
    let (_export, _) = fixture.export_disk();
    let (first, _second) = (fixture.open("disk"), fixture.open("disk"));
    let socket = fixture.socket();
    let third = std::thread::spawn(move || Client::open(&socket, "disk").map(|client| client.length));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!third.is_finished(), "it waits in the backlog");
    drop(first);
    assert_eq!(third.join().unwrap(), Ok(CLUSTER));
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Bytes of this process in memory. (What `statm` tells may be off by half a MiB.)
fn resident() -> u64 {
    let told = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = told.lines().find(|line| line.starts_with("Rss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Whether this test has a process to itself, where memory is its own. If not, it is run again in one, and must succeed there.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "LIVE_EXPORTS_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.args([test, "--exact", "--nocapture"]).env(ALONE, "1").output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    false
}

/// Bytes by which memory may grow while 900 clients come and go: much less than a KiB for each.
const MOST_GROWN: u64 = 256 << 10;

/// What it checks: a thousand clients that come and go during a backup, in any state of their conversation, leave nothing behind. Why: each
/// has a descriptor, memory, and perhaps a permit; one that is forgotten is a disk whose next backup cannot start.
#[test]
fn a_thousand_clients_come_and_go() {
    if !is_alone("a_thousand_clients_come_and_go") {
        return;
    }
    let fixture = Fixture::new(800);
    let (_export, _) = fixture.export_disk();
    let mut options = fixture.options(SyncMode::Full);
    options.speed = std::num::NonZeroU64::new(1 << 20);
    let mut settled = fixture.open("disk");
    let before = descriptors();
    let backup = fixture.engine.start_backup(&fixture.disk, &options).unwrap();
    let (during, mut after_some) = (descriptors(), 0);
    // What is there for whoever comes first is there from here on.
    settled.write(0, 4000, &[9; 5000]);
    settled.read(0, 1 << 20);
    let session = [
        client::choice("disk"),
        client::request(WRITE, 0, 1, 4000, 5000),
        vec![9; 5000],
        client::request(READ, 0, 2, 0, 1 << 20),
        client::request(FLUSH, 0, 3, 0, 0),
    ]
    .concat();
    let mut rng = fastrand::Rng::with_seed(3);
    for round in 0..1000 {
        use std::io::Write as _;
        let mut stream = client::connect(&fixture.socket()).unwrap();
        let said = rng.usize(0..=session.len());
        stream.write_all(&session[..said]).expect("a server that takes it");
        if round % 3 == 0 {
            drop(stream.shutdown(std::net::Shutdown::Write));
        }
        drop(stream);
        if round == 100 {
            wait_for("the first have gone", || descriptors() <= during);
            after_some = resident();
        }
    }
    assert_eq!(backup.job.status(), Status::Running, "all that was during the backup");
    wait_for("all have gone", || descriptors() <= during);
    let grown = resident().saturating_sub(after_some);
    assert!(grown < MOST_GROWN, "{grown} bytes more after 1000 clients than after 100");
    settled.write(0, 0, b"all is well");
    backup.job.set_speed(None).unwrap();
    assert!(matches!(backup.job.wait().outcome, Outcome::Complete));
    wait_for("their descriptors are closed", || descriptors() <= before);
    // No permit is out: another backup starts.
    let mut options = fixture.options(SyncMode::Full);
    options.force = true;
    let again = fixture.engine.start_backup(&fixture.disk, &options).unwrap();
    assert!(matches!(again.job.wait().outcome, Outcome::Complete));
    assert_eq!(settled.read(0, 11), b"all is well");
}

/// What it checks: clients that ask and never read take bounded memory, and nobody else's time.
#[test]
fn clients_that_never_read_harm_nobody() {
    let fixture = Fixture::with(40 << 20, NbdOptions { memory: 4 << 20, ..NbdOptions::default() });
    let (_export, _) = fixture.export_disk();
    let mut other = fixture.open("disk");
    other.write(0, 0, &[7; 4096]);
    let before = resident();
    let flood: Vec<u8> = (0..1000).flat_map(|cookie| client::request(READ, 0, cookie, 0, 32 << 20)).collect();
    let mut slow: Vec<Client> = (0..20).map(|_| fixture.open("disk")).collect();
    for client in &mut slow {
        let said = client.say_what_goes(&flood);
        assert!(said > 0, "it takes some requests");
    }
    let start = Instant::now();
    for round in 0..100_u64 {
        other.write(0, round * 4096, &[u8::try_from(round).unwrap(); 4096]);
        assert_eq!(other.read(round * 4096, 4), [u8::try_from(round).unwrap(); 4]);
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let grown = resident().saturating_sub(before);
    assert!(grown < 48 << 20, "{grown} bytes for twenty clients that ask for 32 GiB each");
    drop(slow);
    wait_for("the export can be closed", || {
        other.try_ask(FLUSH, 0, 0, 0, &[]).expect("it still works").0 == 0
    });
}

#[test]
fn requests_of_an_export_that_goes_are_told_so() {
    let fixture = Fixture::new(20);
    let (export, gone) = fixture.export_disk();
    let mut client = fixture.open("disk");
    // A write whose payload does not come as a whole yet keeps the client there. Of this much, more than a socket holds, the server has the first part.
    let payload = vec![0x5a; 1 << 20];
    let (first, last) = payload.split_at(payload.len() - 4096);
    client.say(&[&client::request(WRITE, FUA, 1, 0, 1 << 20), first].concat());
    export.remove(Removal::Disconnect).unwrap();
    assert!(gone.recv_timeout(Duration::from_millis(100)).is_err(), "it is owed the end of its write");
    client.say(&[last, &client::request(READ, 0, 2, 512, 4096)].concat());
    let mut told = [client.hear_reply(), client.hear_reply()];
    told.sort_unstable();
    assert_eq!(told, [(1, 0), (2, ESHUTDOWN)], "cookies and errors");
    assert!(client.is_over());
    gone.recv_timeout(Duration::from_secs(20)).expect("the last has left");
    assert!(fixture.disk.read(0, 1 << 20).unwrap() == payload);
}

#[test]
fn whoever_does_not_leave_an_export_that_goes_is_closed() {
    let fixture = Fixture::new(20);
    let (export, gone) = fixture.export_disk();
    let mut client = fixture.open("disk");
    // As above.
    client.say(&[client::request(WRITE, 0, 1, 0, 1 << 20), vec![1; (1 << 20) - 4096]].concat());
    export.remove(Removal::Disconnect).unwrap();
    assert!(gone.recv_timeout(Duration::from_millis(100)).is_err(), "it has time to send the rest");
    gone.recv_timeout(Duration::from_secs(20)).expect("it is closed");
    assert!(client.is_over());
}
