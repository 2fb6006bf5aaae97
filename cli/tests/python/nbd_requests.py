"""Legal and illegal requests to exports of the daemon, one by one, with libnbd, which refuses none of them by itself here.

Usage: nbd_requests.py SOCKET LENGTH

The server has the exports `vda`, writable, and `r`, read-only, of one disk of LENGTH bytes, whose contents do not matter.
Of each request: the error number that the protocol has for it, and that the connection goes on, or ends where it must.
"""

import sys
import unittest
from collections.abc import Callable

import nbd

SOCKET, LENGTH = sys.argv[1], int(sys.argv[2])
MAX_PAYLOAD = 32 << 20
UNKNOWN_FLAG = 1 << 14


def client(export: str = "vda", structured: bool = True, contexts: tuple[str, ...] = ()) -> nbd.NBD:
    """A connection whose client leaves it to the server to refuse."""
    handle = nbd.NBD()
    handle.set_export_name(export)
    handle.set_request_structured_replies(structured)
    for context in contexts:
        handle.add_meta_context(context)
    handle.set_strict_mode(0)
    handle.connect_unix(SOCKET)
    return handle


class Requests(unittest.TestCase):
    """With structured replies; `SimpleRequests` without."""

    structured = True

    def setUp(self) -> None:
        self.handle = client(structured=self.structured)
        self.reader = client("r", structured=self.structured)

    def refused(self, error: str, request: Callable[[], object], handle: "nbd.NBD | None" = None) -> None:
        """The request gives this error, and the next one is served."""
        with self.assertRaises(nbd.Error) as raised:
            request()
        self.assertEqual(raised.exception.errno, error, raised.exception.string)
        handle = handle or self.handle
        self.assertTrue(handle.aio_is_ready(), "the connection has ended")
        self.assertEqual(len(handle.pread(512, 0)), 512)

    def unchanged(self, request: Callable[[], object], *about: object) -> None:
        """The request fails, and writes nothing near the end, which is where these requests are."""
        before = self.handle.pread(8192, LENGTH - 8192)
        with self.assertRaises(nbd.Error):
            request()
        self.assertEqual(self.handle.pread(8192, LENGTH - 8192), before, about)

    def test_what_is_agreed(self) -> None:
        self.assertEqual(self.handle.get_structured_replies_negotiated(), self.structured)
        for handle, read_only in ((self.handle, False), (self.reader, True)):
            self.assertEqual(handle.get_size(), LENGTH)
            self.assertEqual(handle.is_read_only(), read_only)
            self.assertEqual(handle.can_trim(), not read_only)
            self.assertEqual(handle.can_zero(), not read_only)
            self.assertEqual(handle.can_fua(), not read_only)
            self.assertTrue(handle.can_multi_conn())
            self.assertEqual(handle.can_df(), self.structured)
            self.assertEqual(handle.get_block_size(nbd.SIZE_MINIMUM), 1)
            self.assertEqual(handle.get_block_size(nbd.SIZE_MAXIMUM), MAX_PAYLOAD)

    def test_reads_and_writes_of_every_alignment(self) -> None:
        for offset, length in ((0, 1), (1, 1), (511, 2), (4095, 4098), (LENGTH - 1, 1), (LENGTH - 5000, 5000)):
            data = bytes((offset + index * 7) % 251 for index in range(length))
            self.handle.pwrite(data, offset)
            self.assertEqual(self.handle.pread(length, offset), data, (offset, length))
            self.assertEqual(self.reader.pread(length, offset), data, (offset, length))

    def test_the_largest_request_of_all(self) -> None:
        if LENGTH < MAX_PAYLOAD:
            self.fail("the disk is too small for this")
        data = bytes(range(256)) * (MAX_PAYLOAD // 256)
        self.handle.pwrite(data, 0)
        self.assertTrue(self.handle.pread(MAX_PAYLOAD, 0) == data)

    def test_more_than_the_largest_read(self) -> None:
        # Libnbd itself has 64 MiB as its limit.
        self.refused("EINVAL", lambda: self.handle.pread(MAX_PAYLOAD + 1, 0))

    def test_more_than_the_largest_write_ends_the_connection(self) -> None:
        with self.assertRaises(nbd.Error):
            self.handle.pwrite(bytes(MAX_PAYLOAD + 1), 0)
        self.assertTrue(self.handle.aio_is_dead() or self.handle.aio_is_closed())
        self.assertEqual(len(self.reader.pread(512, 0)), 512, "others are served")

    def test_nothing_at_all(self) -> None:
        # The protocol leaves it to the server what a request of length 0 does: nothing, here.
        self.assertEqual(self.handle.pread(0, 0), b"")
        self.assertEqual(self.handle.pread(0, LENGTH), b"")
        self.handle.pwrite(b"", 4096)
        for request in (self.handle.trim, self.handle.zero, self.handle.cache):
            request(0, 4096)
        self.assertEqual(len(self.handle.pread(512, 0)), 512)
        self.refused("EINVAL", lambda: self.handle.pread(0, LENGTH + 1))

    def test_beyond_the_end(self) -> None:
        for offset, length in ((LENGTH, 1), (LENGTH - 1, 2), (LENGTH - 4096, 8192), (1 << 62, 4096), (2**63 - 512, 512)):
            about = (offset, length)
            with self.subTest(about):
                self.refused("EINVAL", lambda: self.handle.pread(length, offset))
                self.refused("ENOSPC", lambda: self.handle.pwrite(bytes(length), offset))
                self.refused("ENOSPC", lambda: self.handle.zero(length, offset))
                self.refused("EINVAL", lambda: self.handle.trim(length, offset))
                self.refused("EINVAL", lambda: self.handle.cache(length, offset))
                self.unchanged(lambda: self.handle.pwrite(b"\xee" * length, offset), about)
                self.unchanged(lambda: self.handle.zero(length, offset), about)
        # A sum that does not fit into 64 bits. (Python's offsets are unsigned.)
        self.refused("EINVAL", lambda: self.handle.pread(512, 2**64 - 256))
        self.refused("ENOSPC", lambda: self.handle.pwrite(bytes(512), 2**64 - 256))

    def test_flags_that_are_not_known_or_not_for_this_command(self) -> None:
        for flags in (UNKNOWN_FLAG, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_REQ_ONE):
            with self.subTest(flags):
                self.refused("EINVAL", lambda: self.handle.pread(512, 0, flags))
                self.refused("EINVAL", lambda: self.handle.pwrite(bytes(512), 0, flags))
                self.refused("EINVAL", lambda: self.handle.trim(512, 0, flags))
                self.refused("EINVAL", lambda: self.handle.flush(flags))
                self.refused("EINVAL", lambda: self.handle.cache(512, 0, flags))
        self.refused("EINVAL", lambda: self.handle.zero(512, 0, nbd.CMD_FLAG_DF))
        self.refused("EINVAL", lambda: self.handle.zero(512, 0, UNKNOWN_FLAG))
        for flags in (nbd.CMD_FLAG_DF, UNKNOWN_FLAG):
            self.unchanged(lambda: self.handle.pwrite(b"\xee" * 512, LENGTH - 512, flags), flags)

    def test_flags_that_are(self) -> None:
        # Durability may be asked of any command.
        fua = nbd.CMD_FLAG_FUA
        data = b"\x5a" * 70000
        self.handle.pwrite(data, 100, fua)
        self.assertEqual(self.handle.pread(70000, 100, fua), data)
        self.handle.zero(4096, 0, fua | nbd.CMD_FLAG_NO_HOLE)
        self.assertEqual(self.handle.pread(4096, 0), bytes(4096))
        self.handle.trim(4096, 0, fua)
        self.handle.flush(fua)
        self.handle.cache(4096, 0, fua)

    def test_fast_zeroes(self) -> None:
        self.handle.pwrite(b"\x11" * 131072, 131072)
        try:
            self.handle.zero(131072, 131072, nbd.CMD_FLAG_FAST_ZERO)
        except nbd.Error as error:
            self.assertEqual(error.errno, "ENOTSUP")
            self.assertEqual(self.handle.pread(512, 131072), b"\x11" * 512)
        else:
            self.assertEqual(self.handle.pread(131072, 131072), bytes(131072))
        # Without the flag it is never refused.
        self.handle.zero(131072, 131072)
        self.assertEqual(self.handle.pread(131072, 131072), bytes(131072))

    def test_changes_of_what_is_for_reading(self) -> None:
        before = self.reader.pread(65536, 0)
        for flags in (0, nbd.CMD_FLAG_FUA):
            self.refused("EPERM", lambda: self.reader.pwrite(b"\xee" * 65536, 0, flags), self.reader)
            self.refused("EPERM", lambda: self.reader.trim(65536, 0, flags), self.reader)
            self.refused("EPERM", lambda: self.reader.zero(65536, 0, flags), self.reader)
        # Whatever else is wrong with it.
        self.refused("EPERM", lambda: self.reader.pwrite(b"\xee" * 512, LENGTH), self.reader)
        self.assertEqual(self.reader.pread(65536, 0), before)

    def test_block_status_that_was_not_agreed(self) -> None:
        self.refused("EINVAL", lambda: self.handle.block_status(4096, 0, lambda *_: 0))

    def test_many_requests_at_a_time(self) -> None:
        buffers = [nbd.Buffer(65536) for _ in range(100)]
        self.handle.pwrite(b"\x77" * 65536 * 100, 0)
        cookies = [self.handle.aio_pread(buffer, index * 65536) for index, buffer in enumerate(buffers)]
        bad = self.handle.aio_pread(nbd.Buffer(512), LENGTH)
        waiting = set(cookies)
        while waiting:
            self.handle.poll(-1)
            waiting = {cookie for cookie in waiting if not self.handle.aio_command_completed(cookie)}
        self.assertTrue(all(buffer.to_bytearray() == b"\x77" * 65536 for buffer in buffers))
        with self.assertRaises(nbd.Error):
            while not self.handle.aio_command_completed(bad):
                self.handle.poll(-1)


class SimpleRequests(Requests):
    """Without structured replies."""

    structured = False

    def test_an_unfragmented_read_that_was_not_agreed(self) -> None:
        self.refused("EINVAL", lambda: self.handle.pread(512, 0, nbd.CMD_FLAG_DF))


class Structured(unittest.TestCase):
    """What there is only with structured replies."""

    def test_a_read_in_one_piece(self) -> None:
        handle = client()
        data = bytes(range(256)) * 256
        handle.pwrite(data, 1000)
        chunks: list[tuple[int, int]] = []

        def chunk(part: bytes, offset: int, status: int, _error: "nbd.NBD") -> int:
            self.assertEqual(status, nbd.READ_DATA)
            chunks.append((offset, len(part)))
            return 0

        read = handle.pread_structured(len(data), 1000, chunk, nbd.CMD_FLAG_DF)
        self.assertEqual(read, data)
        self.assertEqual(chunks, [(1000, len(data))])

    def test_holes_and_data(self) -> None:
        handle = client(contexts=("base:allocation",))
        self.assertTrue(handle.can_meta_context("base:allocation"))
        handle.pwrite(b"\x33" * (1 << 20), 0)
        handle.trim(1 << 20, 1 << 20)
        handle.pwrite(b"\x33" * (1 << 20), 2 << 20)
        extents = self.extents(handle, 3 << 20, 0)
        self.assertEqual(extents[0], (1 << 20, 0))
        self.assertEqual(sum(length for length, _ in extents), 3 << 20)
        if extents[1][1]:
            self.assertEqual(extents, [(1 << 20, 0), (1 << 20, 3), (1 << 20, 0)], "hole and zeros")
        # The one that the range begins in alone, and no further than the range.
        self.assertEqual(self.extents(handle, 3 << 20, 1000, nbd.CMD_FLAG_REQ_ONE), [((1 << 20) - 1000, 0)])
        self.assertEqual(self.extents(handle, 1000, 500), [(1000, 0)])
        self.assertEqual(self.extents(handle, 1, LENGTH - 1)[0][0], 1)

    def test_bad_questions_about_blocks(self) -> None:
        handle = client(contexts=("base:allocation",))
        for length, offset, flags in (
            (0, 0, 0),
            (1, LENGTH, 0),
            (LENGTH, 1, 0),
            (512, 2**64 - 256, 0),
            (512, 0, UNKNOWN_FLAG),
            (512, 0, nbd.CMD_FLAG_DF),
        ):
            with self.subTest((length, offset, flags)):
                with self.assertRaises(nbd.Error) as raised:
                    handle.block_status(length, offset, lambda *_: 0, flags)
                self.assertEqual(raised.exception.errno, "EINVAL", raised.exception.string)
                self.assertEqual(self.extents(handle, 512, 0)[0][0], 512)

    def test_contexts_that_nobody_knows(self) -> None:
        unknown = ("base:unknown", "x-other:thing", "qemu:dirty-bitmap:none", "base:")
        handle = client(contexts=unknown)
        for context in (*unknown, "base:allocation"):
            self.assertFalse(handle.can_meta_context(context), context)
        with self.assertRaises(nbd.Error) as raised:
            handle.block_status(512, 0, lambda *_: 0)
        self.assertEqual(raised.exception.errno, "EINVAL")
        self.assertEqual(len(handle.pread(512, 0)), 512)
        # Among others they do no harm.
        handle = client(contexts=(*unknown, "base:allocation"))
        self.assertTrue(handle.can_meta_context("base:allocation"))
        self.assertEqual(self.extents(handle, 512, 0)[0][0], 512)

    def extents(self, handle: "nbd.NBD", length: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
        """Length and flags of each extent."""
        found: list[tuple[int, int]] = []

        def tell(context: str, at: int, entries: list[int], _error: object) -> int:
            self.assertEqual((context, at), ("base:allocation", offset))
            found.extend(zip(entries[::2], entries[1::2]))
            return 0

        handle.block_status(length, offset, tell, flags)
        return found


class Handshakes(unittest.TestCase):
    """Up to the choice of an export."""

    def test_an_export_that_there_is_not(self) -> None:
        for name in ("none", "VDA", "vda/", "x" * 4096):
            with self.assertRaises(nbd.Error) as raised:
                client(name)
            self.assertEqual(raised.exception.errno, "ENOENT", raised.exception.string)

    def test_choosing_after_having_been_refused(self) -> None:
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.connect_unix(SOCKET)
        names: list[str] = []
        handle.opt_list(lambda name, _description: names.append(name) or 0)
        self.assertEqual(sorted(names), ["r", "vda"])
        handle.set_export_name("none")
        with self.assertRaises(nbd.Error):
            handle.opt_info()
        with self.assertRaises(nbd.Error):
            handle.opt_go()
        handle.set_export_name("r")
        handle.opt_info()
        self.assertTrue(handle.is_read_only())
        handle.set_export_name("vda")
        handle.opt_go()
        self.assertFalse(handle.is_read_only())
        self.assertEqual(len(handle.pread(512, 0)), 512)

    def test_leaving_before_choosing(self) -> None:
        handle = nbd.NBD()
        handle.set_opt_mode(True)
        handle.connect_unix(SOCKET)
        handle.opt_abort()
        self.assertTrue(handle.aio_is_closed())

    def test_tls_is_refused(self) -> None:
        handle = nbd.NBD()
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_export_name("vda")
        with self.assertRaises(nbd.Error):
            handle.connect_unix(SOCKET)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
