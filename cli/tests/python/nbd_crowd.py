"""Clients in numbers, and clients that die, by hand: a daemon's memory and descriptors stay within what it says.

Usage: nbd_crowd.py SOCKET PROCESS-ID

The server has an export `vda`, writable, of at least 64 MiB. Others use the daemon for nothing meanwhile.
"""

import os
import socket
import struct
import sys
import time
from collections.abc import Callable

SOCKET, PROCESS = sys.argv[1], sys.argv[2]
CLIENTS = 500
# As README.md says: what all of them have together, and what each has at most beyond that.
SHARED_BYTES, BYTES_EACH = 64 << 20, 388 << 10
# A client that asks for nothing: its state, and the receive that waits for its next request, with some room for how memory is dealt out.
IDLE_BYTES_EACH = 16 << 10
READ, WRITE = 0, 1
PATIENCE_SECONDS = 60


def header(command: int, offset: int, length: int, cookie: int = 7) -> bytes:
    """A request without its payload."""
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length)


def receive(connection: socket.socket, length: int) -> bytes:
    """Exactly so many bytes."""
    parts = b""
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        assert part, "the daemon has closed the connection"
        parts += part
    return parts


def connect() -> socket.socket:
    """A client that has chosen the export, with simple replies."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE_SECONDS)
    connection.connect(SOCKET)
    assert receive(connection, 18)[:8] == b"NBDMAGIC"
    data = struct.pack(">I", 3) + b"vda" + struct.pack(">H", 0)
    connection.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(data)) + data)
    kind = 0
    while kind != 1:
        _, _, kind, length = struct.unpack(">QIII", receive(connection, 20))
        assert kind < 1 << 31, f"refused: {kind:#x}"
        receive(connection, length)
    return connection


def ask(connection: socket.socket, command: int, offset: int, payload: "bytes | int") -> bytes:
    """A request that succeeds, with its reply."""
    length = payload if isinstance(payload, int) else len(payload)
    connection.sendall(header(command, offset, length) + (b"" if isinstance(payload, int) else payload))
    assert receive(connection, 16) == struct.pack(">IIQ", 0x67446698, 0, 7)
    return receive(connection, length) if command == READ else b""


def is_served(connection: socket.socket) -> None:
    """Whoever behaves is served, and soon."""
    begun = time.monotonic()
    for round_ in range(20):
        data = bytes([round_ + 1]) * 4096
        ask(connection, WRITE, 33 << 20, data)
        assert ask(connection, READ, 33 << 20, 4096) == data
    elapsed = time.monotonic() - begun
    assert elapsed < 20, f"40 small requests took {elapsed:.1f} s"


def resident_bytes() -> int:
    """Memory of the daemon."""
    with open(f"/proc/{PROCESS}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Open files of the daemon."""
    return len(os.listdir(f"/proc/{PROCESS}/fd"))


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    """It takes a moment."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def many_that_ask_for_nothing(other: socket.socket) -> list[socket.socket]:
    """They cost next to nothing."""
    before = resident_bytes()
    idle = [connect() for _ in range(CLIENTS)]
    is_served(other)
    is_served(connect())
    grown = resident_bytes() - before
    print(f"{CLIENTS} idle clients: {grown // CLIENTS} bytes each")
    assert grown <= CLIENTS * IDLE_BYTES_EACH, f"{grown} bytes for {CLIENTS} idle clients"
    return idle


def many_that_never_read(other: socket.socket, clients: list[socket.socket]) -> None:
    """They ask for 32 MiB each, several times, and take nothing: memory keeps to its bound, and others are served."""
    before = resident_bytes()
    for client in clients:
        client.sendall(header(READ, 0, 32 << 20) * 8)
    most = 0
    for _ in range(10):
        is_served(other)
        most = max(most, resident_bytes() - before)
        time.sleep(0.1)
    bound = SHARED_BYTES + CLIENTS * BYTES_EACH
    print(f"{CLIENTS} clients that never read: {most >> 10} KiB")
    assert most <= bound, f"{most} bytes for {CLIENTS} clients that ask for 256 MiB each; {bound} are the bound"


def one_that_dies_at_every_byte(other: socket.socket) -> None:
    """In the header of a request, and in its payload: what is not whole is not written."""
    offset, payload = 34 << 20, b"\xee" * 5000
    old = b"\x11" * len(payload)
    request = header(WRITE, offset, len(payload)) + payload
    cuts = [*range(len(header(WRITE, 0, 0)) + 1), 29, 1028, 4096, len(request) - 1]
    for cut in cuts:
        for gently in (True, False):
            ask(other, WRITE, offset, old)
            dying = connect()
            # One request is under way as well.
            dying.sendall(header(READ, 0, 1 << 20) + request[:cut])
            if gently:
                dying.shutdown(socket.SHUT_WR)
            dying.close()
            assert ask(other, READ, offset, len(old)) == old, f"a part of a write, after {cut} bytes"
    is_served(other)


def main() -> None:
    """All of them, and nothing is left."""
    other = connect()
    is_served(other)
    open_before = descriptors()
    idle = many_that_ask_for_nothing(other)
    many_that_never_read(other, idle)
    for client in idle:
        client.close()
    wait_for("their descriptors are closed", lambda: descriptors() <= open_before)
    one_that_dies_at_every_byte(other)
    wait_for("their descriptors are closed", lambda: descriptors() <= open_before)


main()
