//! Connections: receiving, sending, stalling, breaking.

use std::net::Shutdown;
use std::time::Duration;

use engine::ring::{Completion, IoPath, Op, Output, Ring, SocketId, Token, Wait};
use nix::errno::Errno;

use crate::support::network::{Family, drain, ends, one, receive, send_all, settle, stall, turn, write_all};
use crate::support::{Fixture, Random, TestDisk, buffer, complete, pattern, run};

const FAMILIES: [Family; 2] = [Family::Unix, Family::Tcp];

/// A receive gives some of what is there, where it was asked to put it, and leaves the rest of the buffer alone.
pub(crate) fn receives_what_comes<F: Fixture>() {
    let fixture = F::default();
    for family in FAMILIES {
        let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
        let (socket, mut peer) = fixture.pair(family);
        let socket = ring.add_socket(socket).unwrap();
        ring.push(Token(1), Op::Receive { socket, buffer: vec![7; 100], filled: 5, whole: false });
        assert_eq!(ring.in_flight(), 0, "sockets do not count");
        assert!(settle(&mut ring, Duration::from_millis(20)).is_empty());
        assert_eq!(peer.write(b"0123456789"), Ok(10));
        let Ok(Output::Received { buffer, bytes }) = one(&mut ring, 1) else { panic!("a receive") };
        let bytes = bytes as usize;
        assert!((1..=10).contains(&bytes), "{bytes}");
        assert_eq!(buffer[5..5 + bytes], b"0123456789"[..bytes]);
        assert!(buffer.len() == 100 && buffer[..5] == [7; 5]);
        assert!(buffer[5 + bytes..].iter().all(|&byte| byte == 7));
        assert_eq!(receive(&mut ring, socket, 10 - bytes, false), b"0123456789"[bytes..]);
    }
}

/// A receive of the whole waits for all of it, in whatever pieces it comes; at the end it gives what there was, and then
/// nothing, again and again.
pub(crate) fn receives_the_whole<F: Fixture>() {
    const BYTES: usize = 3_000_000;
    let fixture = F::default();
    for family in FAMILIES {
        let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
        let (socket, mut peer) = fixture.pair(family);
        let socket = ring.add_socket(socket).unwrap();
        let sent = pattern(3, BYTES);
        let mut buffer = vec![0; BYTES + 10];
        buffer[..3].copy_from_slice(b"old");
        ring.push(Token(2), Op::Receive { socket, buffer, filled: 10, whole: true });
        let mut completions = Vec::new();
        for piece in [0..1, 1..4096, 4096..2_000_000, 2_000_000..BYTES] {
            assert!(settle(&mut ring, Duration::from_millis(5)).is_empty(), "not whole yet");
            assert!(completions.is_empty());
            completions = write_all(&mut ring, peer.as_mut(), &sent[piece]);
        }
        if completions.is_empty() {
            completions = complete(&mut ring, 1);
        }
        let Ok(Output::Received { buffer, bytes }) = completions.remove(0).result else {
            panic!("a receive")
        };
        assert_eq!(bytes as usize, BYTES);
        assert!(buffer[..3] == *b"old" && buffer[10..] == sent);

        ring.push(Token(3), Op::Receive { socket, buffer: vec![0; 10], filled: 0, whole: true });
        assert_eq!(peer.write(b"end"), Ok(3));
        assert!(settle(&mut ring, Duration::from_millis(20)).is_empty());
        peer.shut_down(Shutdown::Write);
        let end = Output::Received { buffer: b"end\0\0\0\0\0\0\0".to_vec(), bytes: 3 };
        assert_eq!(one(&mut ring, 3), Ok(end));
        for whole in [true, false] {
            assert_eq!(receive(&mut ring, socket, 10, whole), b"");
        }
        // The other direction goes on.
        assert_eq!(send_all(&mut ring, socket, vec![b"bye".to_vec()], 0, peer.as_mut()), b"bye");
    }
}

/// What was there before is given without waiting for another turn of anything.
pub(crate) fn what_is_there_comes_at_once<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
    let (socket, mut peer) = fixture.pair(Family::Unix);
    let socket = ring.add_socket(socket).unwrap();
    for round in 0..100_u8 {
        assert_eq!(peer.write(&[round; 4096]), Ok(4096));
        ring.push(Token(1), Op::Receive { socket, buffer: vec![0; 4096], filled: 0, whole: true });
        let mut completions = Vec::new();
        ring.wait(Wait::Poll, &mut completions).unwrap();
        let there = Ok(Output::Received { buffer: vec![round; 4096], bytes: 4096 });
        assert_eq!(completions, [Completion { token: Token(1), result: there }]);
    }
}

/// All parts from any byte on, empty parts among them.
pub(crate) fn sends_from_every_offset<F: Fixture>() {
    let fixture = F::default();
    for family in FAMILIES {
        let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
        let (socket, mut peer) = fixture.pair(family);
        let socket = ring.add_socket(socket).unwrap();
        let parts = vec![Vec::new(), pattern(1, 16), pattern(2, 1), Vec::new(), pattern(3, 30)];
        let whole = parts.concat();
        for skip in 0..whole.len() {
            let read = send_all(&mut ring, socket, parts.clone(), skip, peer.as_mut());
            assert_eq!(read, whole[skip..], "{family:?} {skip}");
        }
        // More parts than one operation takes, and more bytes than the connection holds.
        let many: Vec<Vec<u8>> =
            (0..3000_u16).map(|seed| pattern(u64::from(seed), 1 + usize::from(seed % 7))).collect();
        assert!(send_all(&mut ring, socket, many.clone(), 1, peer.as_mut()) == many.concat()[1..]);
        let large = vec![pattern(4, 16), pattern(5, 5_000_000)];
        assert!(send_all(&mut ring, socket, large.clone(), 0, peer.as_mut()) == large.concat());
    }
}

/// A send to a peer that reads nothing waits, with receives going on; it goes on when the peer does.
pub(crate) fn a_send_waits_for_room<F: Fixture>() {
    let fixture = F::default();
    for family in FAMILIES {
        let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
        let (socket, mut peer) = fixture.pair(family);
        let socket = ring.add_socket(socket).unwrap();
        let sent = pattern(9, F::MORE_THAN_FITS);
        let skip = stall(&mut ring, socket, &sent);
        assert_eq!(peer.write(b"question"), Ok(8));
        assert_eq!(receive(&mut ring, socket, 8, true), b"question");
        let mut read = Vec::new();
        let mut completions = turn(&mut ring, |completions| {
            drain(peer.as_mut(), &mut read);
            !completions.is_empty()
        });
        let Ok(Output::Sent { parts, bytes }) = completions.remove(0).result else { panic!("a send") };
        let skip = skip + bytes as usize;
        if skip < sent.len() {
            read.extend(send_all(&mut ring, socket, parts, skip, peer.as_mut()));
        }
        turn(&mut ring, |_| {
            drain(peer.as_mut(), &mut read);
            read.len() == sent.len()
        });
        assert!(read == sent);
    }
}

/// A send that was stuck has ended; it may have moved bytes.
fn check_ended(result: &Result<Output, Errno>, errno: Errno) {
    let partial = matches!(result, Ok(Output::Sent { bytes, .. }) if *bytes > 0);
    assert!(partial || matches!(result, Err(error) if *error == errno), "{:?}", result.as_ref().map(|_| ()));
}

/// Shutting down ends whatever is in flight and whatever comes after, also a send that the peer never drains, and the peer sees the end.
pub(crate) fn shutdown_ends_all<F: Fixture>() {
    let fixture = F::default();
    for family in FAMILIES {
        let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
        let (socket, mut peer) = fixture.pair(family);
        let socket = ring.add_socket(socket).unwrap();
        stall(&mut ring, socket, &vec![1; F::MORE_THAN_FITS]);
        ring.push(Token(1), Op::Receive { socket, buffer: vec![0; 10], filled: 0, whole: true });
        assert!(settle(&mut ring, Duration::from_millis(5)).is_empty());
        ring.shutdown_socket(socket);
        ring.shutdown_socket(socket);
        for completion in complete(&mut ring, 2) {
            if completion.token == Token(1) {
                let nothing = Output::Received { buffer: vec![0; 10], bytes: 0 };
                assert_eq!(completion.result, Ok(nothing));
            } else {
                check_ended(&completion.result, Errno::EPIPE);
            }
        }
        let send = Op::Send { socket, parts: vec![vec![1]], skip: 0 };
        ring.push(Token(2), send);
        assert_eq!(one(&mut ring, 2), Err(Errno::EPIPE));
        assert_eq!(receive(&mut ring, socket, 10, false), b"");
        ends(&mut ring, peer.as_mut());
        ring.remove_socket(socket);
    }
}

/// What waits can be cancelled, and the connection's other direction goes on.
pub(crate) fn cancels_on_connections<F: Fixture>() {
    let fixture = F::default();
    for family in FAMILIES {
        for whole in [false, true] {
            let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
            let (socket, mut peer) = fixture.pair(family);
            let socket = ring.add_socket(socket).unwrap();
            ring.push(Token(1), Op::Receive { socket, buffer: vec![0; 10], filled: 0, whole });
            assert!(settle(&mut ring, Duration::from_millis(5)).is_empty());
            ring.push(Token(2), Op::Cancel { target: Token(1) });
            assert_eq!(ring.in_flight(), 1, "a cancellation counts");
            let mut completions = complete(&mut ring, 2);
            completions.sort_by_key(|completion| completion.token);
            assert_eq!(completions[0].result, Err(Errno::ECANCELED));
            assert_eq!(completions[1].result, Ok(Output::Done));
            // Nothing had come, so nothing is lost.
            assert_eq!(peer.write(b"later"), Ok(5));
            assert_eq!(receive(&mut ring, socket, 5, true), b"later");
            stall(&mut ring, socket, &vec![1; F::MORE_THAN_FITS]);
            ring.push(Token(3), Op::Cancel { target: Token(902) });
            let mut completions = complete(&mut ring, 2);
            completions.sort_by_key(|completion| completion.token);
            assert_eq!(completions[0].result, Ok(Output::Done));
            check_ended(&completions[1].result, Errno::ECANCELED);
            assert_eq!(run(&mut ring, Op::Cancel { target: Token(902) }), Err(Errno::ENOENT));
            // Pushed and cancelled in one batch.
            ring.push(Token(4), Op::Receive { socket, buffer: vec![0; 10], filled: 0, whole });
            ring.push(Token(5), Op::Cancel { target: Token(4) });
            assert_eq!(complete(&mut ring, 2).len(), 2);
        }
    }
}

/// A peer that resets the connection is an error of what is in flight, and of what comes after; no signal is raised.
pub(crate) fn a_reset_is_an_error<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
    let (socket, mut peer) = fixture.pair(Family::Tcp);
    let socket = ring.add_socket(socket).unwrap();
    ring.push(Token(1), Op::Receive { socket, buffer: vec![0; 10], filled: 0, whole: false });
    assert!(settle(&mut ring, Duration::from_millis(5)).is_empty());
    peer.reset();
    assert_eq!(one(&mut ring, 1), Err(Errno::ECONNRESET));
    let mut broken = 0;
    for _ in 0..3 {
        ring.push(Token(2), Op::Send { socket, parts: vec![vec![1; 10]], skip: 0 });
        let result = one(&mut ring, 2);
        assert!(matches!(result, Err(Errno::EPIPE | Errno::ECONNRESET)), "{result:?}");
        broken += usize::from(result == Err(Errno::EPIPE));
    }
    assert!(broken >= 2);
    assert_eq!(receive(&mut ring, socket, 10, false), b"");
    ring.remove_socket(socket);

    // One that is closed with something unread, while a send waits.
    let (socket, other) = fixture.pair(Family::Unix);
    peer = other;
    let socket = ring.add_socket(socket).unwrap();
    stall(&mut ring, socket, &vec![1; F::MORE_THAN_FITS]);
    peer.close();
    let result = complete(&mut ring, 1).remove(0).result;
    assert!(
        matches!(result, Err(Errno::EPIPE | Errno::ECONNRESET) | Ok(Output::Sent { .. })),
        "{:?}",
        result.map(drop)
    );
}

/// A socket that is removed is closed, and its number is free.
pub(crate) fn removal_closes<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring_with_sockets(1 << 20, 4, 1);
    let mut first = None;
    for round in 0..50 {
        let (socket, mut peer) = fixture.pair(FAMILIES[round % 2]);
        let socket = ring.add_socket(socket).unwrap();
        assert_eq!(*first.get_or_insert(socket), socket);
        assert_eq!(send_all(&mut ring, socket, vec![vec![5; 10]], 0, peer.as_mut()), [5; 10]);
        // Also after something was in flight on it, which the kernel may hold on to.
        ring.push(Token(1), Op::Receive { socket, buffer: vec![0; 10], filled: 0, whole: false });
        settle(&mut ring, Duration::from_micros(100));
        ring.push(Token(2), Op::Cancel { target: Token(1) });
        complete(&mut ring, 2);
        ring.remove_socket(socket);
        ends(&mut ring, peer.as_mut());
    }
}

/// Many connections at a time, each with a question and an answer in turn, beside many that are silent.
pub(crate) fn many_connections<F: Fixture>() {
    const TALKING: usize = 60;
    const SILENT: usize = 140;
    const ROUNDS: u32 = 30;
    let fixture = F::default();
    let mut ring = fixture.ring_with_sockets(1 << 20, 1, TALKING + SILENT);
    let mut connections = Vec::new();
    for index in 0..TALKING + SILENT {
        let (socket, peer) = fixture.pair(FAMILIES[index % 2]);
        let socket = ring.add_socket(socket).unwrap();
        assert_eq!(usize::from(socket.0), index);
        ring.push(Token(index as u64), Op::Receive { socket, buffer: vec![0; 512], filled: 0, whole: true });
        connections.push((peer, 0_u32, Vec::new()));
    }
    let question = |index: usize, round: u32| pattern((index as u64) << 32 | u64::from(round), 512);
    for (index, (peer, ..)) in connections.iter_mut().enumerate().take(TALKING) {
        assert_eq!(peer.write(&question(index, 0)), Ok(512));
    }
    let mut random = Random(7);
    while connections[..TALKING].iter().any(|(_, round, _)| *round < ROUNDS) {
        for Completion { token, result } in turn(&mut ring, |completions| !completions.is_empty()) {
            let socket = SocketId(u16::try_from(token.0 & 0xffff).unwrap());
            match result.unwrap() {
                Output::Received { buffer, bytes } => {
                    assert_eq!((bytes, usize::from(socket.0)), (512, usize::try_from(token.0).unwrap()));
                    // The answer is the question, and the next question is asked for before it is sent.
                    let next = Op::Receive { socket, buffer: vec![0; 512], filled: 0, whole: true };
                    ring.push(token, next);
                    ring.push(Token(token.0 | 1 << 16), Op::Send { socket, parts: vec![buffer], skip: 0 });
                }
                Output::Sent { parts, bytes } => {
                    let sent = parts[0].clone();
                    let (peer, _, told) = &mut connections[usize::from(socket.0)];
                    if (bytes as usize) < sent.len() {
                        let rest = sent[bytes as usize..].to_vec();
                        ring.push(token, Op::Send { socket, parts: vec![rest], skip: 0 });
                    }
                    drain(peer.as_mut(), told);
                }
                other => panic!("{other:?}"),
            }
        }
        let start = usize::try_from(random.below(TALKING as u64)).unwrap();
        for index in (start..TALKING).chain(0..start) {
            let (peer, round, told) = &mut connections[index];
            drain(peer.as_mut(), told);
            if told.len() == 512 && *round < ROUNDS {
                assert!(*told == question(index, *round));
                told.clear();
                *round += 1;
                assert_eq!(peer.write(&question(index, *round)), Ok(512));
            }
        }
    }
}

/// Storages and sockets at the same time: a disk that is kept busy does not hold up a connection, nor the other way round.
pub(crate) fn beside_files<F: Fixture>() {
    const WANTED: usize = 300;
    let fixture = F::default();
    let mut ring = fixture.ring_with_sockets(1 << 20, 8, 1);
    let disk = fixture.disk(1 << 20);
    disk.fill(0, &pattern(1, 1 << 20));
    let file = ring.add_file(fixture.file(&disk)).unwrap();
    let (socket, mut peer) = fixture.pair(Family::Unix);
    let socket = ring.add_socket(socket).unwrap();
    let read = |slot: u64| {
        let part = buffer(u32::try_from(slot).unwrap() * 16, 65536);
        Op::Read { file, offset: slot << 16, buffer: part, path: IoPath::Buffered }
    };
    let take = || Op::Receive { socket, buffer: vec![0; 4096], filled: 0, whole: true };
    for slot in 0..8 {
        ring.push(Token(slot), read(slot));
    }
    ring.push(Token(100), take());
    assert_eq!(peer.write(&[3; 4096]), Ok(4096));
    let (mut reads, mut questions, mut asked) = (0, 0, ring.now());
    while reads < WANTED || questions < WANTED {
        // Scheduling on a busy host takes its time, too; never is longer.
        assert!(ring.now().since(asked) < Duration::from_secs(5), "{reads} reads, and a request still waits");
        for Completion { token, result } in turn(&mut ring, |completions| !completions.is_empty()) {
            if token == Token(100) {
                assert!(result.is_ok_and(|output| matches!(output, Output::Received { bytes: 4096, .. })));
                questions += 1;
                ring.push(token, take());
                assert_eq!(peer.write(&[3; 4096]), Ok(4096));
                asked = ring.now();
            } else {
                assert_eq!(result, Ok(Output::Bytes(65536)));
                reads += 1;
                ring.push(token, read(token.0));
            }
        }
    }
}

/// A ring that is dropped with operations on sockets in flight does not hang, closes what it had, and frees nothing too early.
pub(crate) fn dropped_with_sockets<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring_with_sockets(1 << 20, 4, 4);
    let (listener, dial) = fixture.listener(Family::Unix);
    let listener = ring.add_socket(listener).unwrap();
    let mut peers = Vec::new();
    for family in FAMILIES {
        let (socket, peer) = fixture.pair(family);
        let socket = ring.add_socket(socket).unwrap();
        stall(&mut ring, socket, &vec![1; F::MORE_THAN_FITS]);
        ring.push(
            Token(u64::from(socket.0)),
            Op::Receive { socket, buffer: vec![0; 9000], filled: 0, whole: true },
        );
        // A token of its own for the next.
        ring.push(Token(50), Op::Cancel { target: Token(902) });
        complete(&mut ring, 2);
        ring.push(
            Token(60 + u64::from(socket.0)),
            Op::Send { socket, parts: vec![vec![1; 1 << 20]], skip: 0 },
        );
        peers.push(peer);
    }
    ring.push(Token(0), Op::Accept { listener });
    settle(&mut ring, Duration::from_millis(5));
    // One that was accepted, and whose completion nobody has seen.
    peers.push(dial().unwrap());
    let start = std::time::Instant::now();
    drop(ring);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    let mut idle = fixture.ring(1 << 20, 1);
    for mut peer in peers {
        ends(&mut idle, peer.as_mut());
    }
    turn(&mut idle, |_| dial().is_err());
}
