//! Listeners, the table of sockets, and misuse.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use engine::ring::{MAX_SOCKET_BYTES, Op, Output, Ring, Token};
use nix::errno::Errno;

use crate::support::network::{Family, Peer, ends, one, receive, send_all, settle};
use crate::support::{Fixture, complete};

const FAMILIES: [Family; 2] = [Family::Unix, Family::Tcp];

/// Connections are accepted in their order, before and after they are waited for, and work both ways.
pub(crate) fn accepts<F: Fixture>() {
    let fixture = F::default();
    for family in FAMILIES {
        let mut ring = fixture.ring_with_sockets(1 << 20, 4, 8);
        let (listener, dial) = fixture.listener(family);
        let listener = ring.add_socket(listener).unwrap();
        let mut connections = Vec::new();
        for waiting in [true, false, true, false] {
            let mut peer = None;
            if waiting {
                peer = Some(dial().unwrap());
            }
            ring.push(Token(1), Op::Accept { listener });
            if !waiting {
                assert!(settle(&mut ring, Duration::from_millis(5)).is_empty());
                peer = Some(dial().unwrap());
            }
            let Ok(Output::Accepted(socket)) = one(&mut ring, 1) else { panic!("an accept") };
            assert_ne!(socket, listener);
            connections.push((socket, peer.unwrap()));
        }
        for (index, (socket, peer)) in (0_u8..).zip(&mut connections) {
            assert_eq!(peer.write(&[index; 20]), Ok(20));
            assert_eq!(receive(&mut ring, *socket, 20, true), [index; 20]);
            let answer = vec![vec![index; 5], vec![9; 5]];
            assert_eq!(send_all(&mut ring, *socket, answer.clone(), 0, peer.as_mut()), answer.concat());
        }
        // Each kind of socket refuses what is for the other.
        ring.push(Token(2), Op::Accept { listener: connections[0].0 });
        assert!(one(&mut ring, 2).is_err());
        ring.push(Token(2), Op::Receive { socket: listener, buffer: vec![0; 1], filled: 0, whole: false });
        assert!(one(&mut ring, 2).is_err());
        ring.push(Token(2), Op::Send { socket: listener, parts: vec![vec![0; 1]], skip: 0 });
        assert!(one(&mut ring, 2).is_err());
    }
}

/// An accept can be cancelled and the listener used again; shutting it down ends what is in flight and what comes after.
pub(crate) fn accepts_end<F: Fixture>() {
    let fixture = F::default();
    for family in FAMILIES {
        let mut ring = fixture.ring_with_sockets(1 << 20, 4, 8);
        let (listener, dial) = fixture.listener(family);
        let listener = ring.add_socket(listener).unwrap();
        ring.push(Token(1), Op::Accept { listener });
        assert!(settle(&mut ring, Duration::from_millis(5)).is_empty());
        ring.push(Token(2), Op::Cancel { target: Token(1) });
        let mut completions = complete(&mut ring, 2);
        completions.sort_by_key(|completion| completion.token);
        assert_eq!(completions[0].result, Err(Errno::ECANCELED));
        assert_eq!(completions[1].result, Ok(Output::Done));

        ring.push(Token(1), Op::Accept { listener });
        let _peer = dial().unwrap();
        let Ok(Output::Accepted(socket)) = one(&mut ring, 1) else { panic!("an accept") };
        ring.push(Token(1), Op::Accept { listener });
        assert!(settle(&mut ring, Duration::from_millis(5)).is_empty());
        ring.shutdown_socket(listener);
        ring.shutdown_socket(listener);
        assert_eq!(one(&mut ring, 1), Err(Errno::ECANCELED));
        let waiting = dial();
        ring.push(Token(1), Op::Accept { listener });
        assert_eq!(one(&mut ring, 1), Err(Errno::ECANCELED));
        drop(waiting);
        // Pushed and shut down in one batch.
        let (other, _dial) = fixture.listener(family);
        let other = ring.add_socket(other).unwrap();
        ring.push(Token(1), Op::Accept { listener: other });
        ring.shutdown_socket(other);
        assert_eq!(one(&mut ring, 1), Err(Errno::ECANCELED));
        ring.remove_socket(other);
        ring.remove_socket(listener);
        assert!(dial().is_err(), "nobody listens");
        ring.remove_socket(socket);
    }
}

/// The table holds what the ring was made for. A connection that finds no place is closed, and costs its accept and nothing else.
pub(crate) fn sockets_are_bounded<F: Fixture>() {
    let fixture = F::default();
    let mut none = fixture.ring(1 << 20, 4);
    let failure = none.add_socket(fixture.pair(Family::Unix).0).unwrap_err();
    assert_eq!((failure.ring, failure.errno), (none.name(), Errno::ENFILE));
    for family in FAMILIES {
        let mut ring = fixture.ring_with_sockets(1 << 20, 4, 2);
        let (listener, dial) = fixture.listener(family);
        let listener = ring.add_socket(listener).unwrap();
        let accept = |ring: &mut F::R| {
            ring.push(Token(1), Op::Accept { listener });
            one(ring, 1)
        };
        let mut first = dial().unwrap();
        let Ok(Output::Accepted(socket)) = accept(&mut ring) else { panic!("an accept") };
        for _ in 0..20 {
            let mut refused = dial().unwrap();
            assert_eq!(accept(&mut ring), Err(Errno::ENFILE));
            ends(&mut ring, refused.as_mut());
        }
        let (other, mut closed) = fixture.pair(family);
        assert_eq!(ring.add_socket(other).unwrap_err().errno, Errno::ENFILE);
        ends(&mut ring, closed.as_mut());
        assert_eq!(first.write(b"still here"), Ok(10));
        assert_eq!(receive(&mut ring, socket, 10, true), b"still here");
        ring.remove_socket(socket);
        let _second = dial().unwrap();
        assert_eq!(accept(&mut ring), Ok(Output::Accepted(socket)));
    }
}

fn panics(action: impl FnOnce()) -> bool {
    catch_unwind(AssertUnwindSafe(action)).is_err()
}

/// Misuse is caught, and leaves what is in flight as it was: a place used twice, a token used twice, a socket that is removed while in
/// use or not there at all, nothing or too much to receive or to send.
pub(crate) fn misuse_of_sockets_panics<F: Fixture>() {
    let fixture = F::default();
    let mut ring = fixture.ring_with_sockets(1 << 20, 1, 4);
    let (socket, mut peer): (_, Box<dyn Peer>) = fixture.pair(Family::Unix);
    let socket = ring.add_socket(socket).unwrap();
    let receive = |bytes: usize, filled| Op::Receive { socket, buffer: vec![0; bytes], filled, whole: false };
    let send = |parts: Vec<Vec<u8>>, skip| Op::Send { socket, parts, skip };
    for (what, op) in [
        ("nothing to receive into", receive(0, 0)),
        ("all is filled", receive(10, 10)),
        ("more is filled than there is", receive(10, 11)),
        ("too much to receive", receive(MAX_SOCKET_BYTES + 1, 0)),
        ("nothing to send", send(Vec::new(), 0)),
        ("all was sent", send(vec![vec![1; 5], vec![2; 5]], 10)),
        ("more was sent than there is", send(vec![vec![1; 5]], 6)),
        ("too much to send", send(vec![vec![0; MAX_SOCKET_BYTES], vec![0; 2]], 1)),
    ] {
        assert!(panics(|| ring.push(Token(9), op)), "{what}");
    }
    ring.push(Token(1), receive(10, 0));
    assert!(panics(|| ring.push(Token(2), receive(10, 0))), "two receives");
    assert!(panics(|| ring.push(Token(2), Op::Accept { listener: socket })), "a receive and an accept");
    if cfg!(debug_assertions) {
        assert!(panics(|| ring.push(Token(1), send(vec![vec![1]], 0))), "a token used twice");
    }
    assert!(panics(|| ring.remove_socket(socket)), "removed while in use");
    ring.push(Token(3), send(vec![vec![1; 10]], 0));
    assert!(panics(|| ring.push(Token(4), send(vec![vec![1]], 0))), "two sends");
    assert_eq!(peer.write(b"x"), Ok(1));
    assert_eq!(complete(&mut ring, 2).len(), 2);
    ring.remove_socket(socket);
    assert!(panics(|| ring.remove_socket(socket)), "removed twice");
    assert!(panics(|| ring.push(Token(5), receive(1, 0))), "not there any more");
    assert!(panics(|| ring.shutdown_socket(socket)), "not there any more");
}
