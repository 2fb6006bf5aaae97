//! What a ring itself costs: operations on a storage that does nothing, direct reads of a file, wake-ups, and questions and answers
//! over a connection, beside servers that block in `read` or wait in `epoll_wait`.
//!
//! The file lies in the directory for temporary files (`TMPDIR`).

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::ring::select::{IoEngine, OpenedRing, RingConfig, open};
use engine::ring::{BufferRange, Extent, ExtentQuery, IoPath, Op, Output, Ring, Token, Wait, ZeroMethod};
use engine::storage::{Descriptors, Limits, Storage};
use engine::units::{ByteRange, Length};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

const DEPTH: u32 = 32;
const FILE_BYTES: u64 = 256 << 20;
const CONFIG: RingConfig =
    RingConfig { arena_bytes: 32 << 20, capacity: 64, threads: RingConfig::DEFAULT_THREADS, sockets: 2 };

/// A file to read, or nothing at all.
struct Source(Option<File>);

impl Storage for Source {
    fn name(&self) -> &'static str {
        "source"
    }

    fn limits(&self) -> Limits {
        Limits { length: Length(FILE_BYTES), direct_alignment: Some(4096) }
    }

    fn descriptors(&self) -> Option<Descriptors<'_>> {
        let file = self.0.as_ref()?.as_fd();
        Some(Descriptors { direct: Some(file), buffered: file, block_device: false })
    }

    fn read_at(&self, _: IoPath, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        match &self.0 {
            None => Ok(buffer.len()),
            Some(file) => file.read_at(buffer, offset).map_err(|_| Errno::EIO),
        }
    }

    fn write_at(&self, _: IoPath, _: u64, buffer: &[u8]) -> Result<usize, Errno> {
        Ok(buffer.len())
    }

    fn write_zeroes(&self, _: ByteRange, _: ZeroMethod) -> Result<(), Errno> {
        Ok(())
    }

    fn discard(&self, _: ByteRange) -> Result<(), Errno> {
        Ok(())
    }

    fn allocate(&self, _: &[ByteRange]) -> Result<(), Errno> {
        Ok(())
    }

    fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn drop_cache(&self, _: ByteRange) -> Result<(), Errno> {
        Ok(())
    }

    fn extents(&self, range: ByteRange, _: ExtentQuery, _: usize) -> Result<Vec<Extent>, Errno> {
        Ok(vec![Extent { range, present: true }])
    }
}

/// Read `count` times `size` bytes, [`DEPTH`] at a time.
fn read<R: Ring<File = Arc<dyn Storage>>>(ring: &mut R, source: &Arc<dyn Storage>, size: u32, count: u64) {
    let file = ring.add_file(Arc::clone(source)).expect("the table has room");
    let (mut pushed, mut done, mut completions) = (0, 0, Vec::new());
    let mut free: Vec<u32> = (0..DEPTH).collect();
    while done < count {
        while let Some(slot) = free.pop_if(|_| pushed < count) {
            let offset = pushed * u64::from(size) % FILE_BYTES;
            let buffer = BufferRange { start: slot * size, length: size };
            ring.push(Token(u64::from(slot)), Op::Read { file, offset, buffer, path: IoPath::Direct });
            pushed += 1;
        }
        ring.wait(Wait::Forever, &mut completions).expect("the ring works");
        for completion in completions.drain(..) {
            assert_eq!(completion.result, Ok(Output::Bytes(size)));
            free.push(u32::try_from(completion.token.0).expect("a slot"));
            done += 1;
        }
    }
}

/// How long reading takes on a fresh ring, opening it not counted.
fn timed(engine: IoEngine, source: &Arc<dyn Storage>, size: u32, count: u64) -> Duration {
    let opened = open(engine, &CONFIG).expect("it was there a moment ago");
    let start = Instant::now();
    match opened.ring {
        OpenedRing::Uring(mut ring) => read(&mut ring, source, size, count),
        OpenedRing::Threads(mut ring) => read(&mut ring, source, size, count),
    }
    start.elapsed()
}

fn reads(criterion: &mut Criterion) {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    for _ in 0..FILE_BYTES >> 20 {
        file.write_all(&[0x5a; 1 << 20]).expect("room for the file");
    }
    file.as_file().sync_all().expect("a disk that works");
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file.path());
    let mut sources: Vec<(&str, u32, Arc<dyn Storage>)> =
        vec![("null-64K", 64 << 10, Arc::new(Source(None)))];
    match direct {
        Ok(direct) => {
            let source: Arc<dyn Storage> = Arc::new(Source(Some(direct)));
            sources.push(("direct-64K", 64 << 10, Arc::clone(&source)));
            sources.push(("direct-1M", 1 << 20, source));
        }
        Err(error) => eprintln!("skipped: direct reads: {error}"),
    }
    for (name, size, source) in sources {
        let mut group = criterion.benchmark_group(format!("ring/{name}"));
        let count = if name.starts_with("null") { 100_000 } else { (64 << 20) / u64::from(size) };
        group.throughput(if name.starts_with("null") {
            Throughput::Elements(count)
        } else {
            Throughput::Bytes(count * u64::from(size))
        });
        for (ring, engine) in [("io_uring", IoEngine::IoUring), ("threads", IoEngine::Threads)] {
            if let Err(error) = open(engine, &CONFIG) {
                eprintln!("skipped: {ring}: {error}");
                continue;
            }
            group.sample_size(10).bench_function(BenchmarkId::from_parameter(ring), |bencher| {
                bencher.iter_custom(|rounds| timed(engine, &source, size, count * rounds));
            });
        }
        group.finish();
    }
}

fn wakes(criterion: &mut Criterion) {
    let opened = open(IoEngine::Threads, &CONFIG).expect("threads can be had");
    let OpenedRing::Threads(ring) = opened.ring else { unreachable!("threads were asked for") };
    let waker = ring.waker();
    criterion.bench_function("ring/wake-awake", |bencher| bencher.iter(|| waker.wake()));
}

/// Bytes of a question, and of its answer.
const MESSAGE: usize = 4096;

/// Answer each question through a ring, until the peer ends.
fn answer_by_ring<R: Ring<Socket = OwnedFd>>(ring: &mut R, socket: OwnedFd) {
    let socket = ring.add_socket(socket).expect("the table has room");
    let (question, answer) = (Token(1), Token(2));
    let take = |buffer| Op::Receive { socket, buffer, filled: 0, whole: true };
    let (mut spare, mut completions) = (vec![0; MESSAGE], Vec::new());
    ring.push(question, take(vec![0; MESSAGE]));
    loop {
        ring.wait(Wait::Forever, &mut completions).expect("the ring works");
        for completion in completions.drain(..) {
            match completion.result {
                Ok(Output::Received { buffer, bytes }) if bytes as usize == MESSAGE => {
                    ring.push(answer, Op::Send { socket, parts: vec![buffer], skip: 0 });
                    ring.push(question, take(std::mem::take(&mut spare)));
                }
                Ok(Output::Sent { mut parts, bytes }) if bytes as usize == MESSAGE => {
                    spare = parts.pop().expect("it had one part");
                }
                _ => return,
            }
        }
    }
}

/// Who answers.
#[derive(Clone, Copy)]
enum Server {
    Ring(IoEngine),
    Blocking,
    Epoll,
}

fn serve(server: Server, socket: UnixStream) {
    let mut socket = socket;
    let mut buffer = vec![0; MESSAGE];
    match server {
        Server::Ring(engine) => match open(engine, &CONFIG).expect("it was there a moment ago").ring {
            OpenedRing::Uring(mut ring) => answer_by_ring(&mut ring, socket.into()),
            OpenedRing::Threads(mut ring) => answer_by_ring(&mut ring, socket.into()),
        },
        Server::Blocking => {
            while socket.read_exact(&mut buffer).is_ok() && socket.write_all(&buffer).is_ok() {}
        }
        Server::Epoll => {
            socket.set_nonblocking(true).expect("a socket");
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll");
            epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0)).expect("room for one");
            let mut events = [EpollEvent::empty(); 8];
            let mut filled = 0;
            loop {
                epoll.wait(&mut events, EpollTimeout::NONE).expect("a wait");
                loop {
                    match socket.read(&mut buffer[filled..]) {
                        Ok(0) => return,
                        Ok(bytes) => filled += bytes,
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                        Err(_) => return,
                    }
                    if filled == MESSAGE {
                        filled = 0;
                        if socket.write_all(&buffer).is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// One question at a time, over a unix socket.
fn answers(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring/answer-4K");
    group.throughput(Throughput::Elements(1));
    for (name, server) in [
        ("io_uring", Server::Ring(IoEngine::IoUring)),
        ("threads", Server::Ring(IoEngine::Threads)),
        ("blocking", Server::Blocking),
        ("epoll", Server::Epoll),
    ] {
        if let Server::Ring(engine) = server
            && let Err(error) = open(engine, &CONFIG)
        {
            eprintln!("skipped: {name}: {error}");
            continue;
        }
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            let (mut client, socket) = UnixStream::pair().expect("two sockets");
            let thread = std::thread::spawn(move || serve(server, socket));
            let mut message = vec![7; MESSAGE];
            bencher.iter(|| {
                client.write_all(&message).expect("it is there");
                client.read_exact(&mut message).expect("it answers");
            });
            drop(client);
            thread.join().expect("it ends");
        });
    }
    group.finish();
}

criterion_group!(benches, reads, wakes, answers);
criterion_main!(benches);
