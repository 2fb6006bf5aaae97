"""What the sources hold, and the comparison which proves that a tool really copied it."""

import errno
import mmap
import os
import random
from collections.abc import Iterator

from layout import SEED, Extent
from units import MIB

_CHUNK = MIB

# Odd, so that no two aligned 4 KiB pages are equal within the first 4 GiB: a cluster that ends up at the
# wrong place is a difference.
_STEP = 4099


class Incompressible:
    """Seeded random bytes with no two equal pages (so no zero cluster either), at the speed of memory."""

    def __init__(self) -> None:
        # Cutting windows out of one random block is far faster than drawing gigabytes.
        self._block = memoryview(random.Random(SEED).randbytes(2 * _CHUNK))
        self._windows = 0

    def next_chunk(self) -> memoryview:
        """The next mebibyte; each begins elsewhere in the block than the one before."""
        start = self._windows * _STEP % _CHUNK
        self._windows += 1
        return self._block[start : start + _CHUNK]


class Zeros:
    """Zeros which are written, so that the file system has allocated them."""

    def __init__(self) -> None:
        self._chunk = memoryview(bytes(_CHUNK))

    def next_chunk(self) -> memoryview:
        """A mebibyte of zeros."""
        return self._chunk


def write_extents(path: str, size: int, extents: list[Extent], content: Incompressible | Zeros) -> None:
    """Makes a file of `size` bytes with data in the extents and holes elsewhere, on stable storage."""
    with open(path, "xb") as file:
        file.truncate(size)
    fill(path, extents, content)


def fill(path: str, extents: list[Extent], content: Incompressible | Zeros) -> None:
    """Writes the extents of an existing file or device and flushes it."""
    descriptor = _open_uncached(path, os.O_WRONLY)
    buffer = memoryview(mmap.mmap(-1, _CHUNK))
    try:
        for extent in extents:
            for start in range(0, extent.length, _CHUNK):
                length = min(_CHUNK, extent.length - start)
                buffer[:length] = content.next_chunk()[:length]
                if os.pwrite(descriptor, buffer[:length], extent.offset + start) != length:
                    raise OSError(f"{path}: short write at {extent.offset + start}")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_difference(source: str, target: str, size: int) -> int | None:
    """The offset of a chunk where the two differ, or None. Holes count as zeros and are not read."""
    left, right = (_open_uncached(path, os.O_RDONLY) for path in (source, target))
    try:
        target_size = os.lseek(right, 0, os.SEEK_END)
        if target_size != size:
            return min(size, target_size)
        return _first_differing_chunk(left, right, size)
    finally:
        os.close(left)
        os.close(right)


def _first_differing_chunk(left: int, right: int, size: int) -> int | None:
    buffers = mmap.mmap(-1, _CHUNK), mmap.mmap(-1, _CHUNK)
    for offset in _chunks_with_data(left, right, size):
        length = min(_CHUNK, size - offset)
        for descriptor, buffer in zip((left, right), buffers):
            if os.preadv(descriptor, [memoryview(buffer)[:length]], offset) != length:
                raise OSError(f"short read at {offset}")
        if buffers[0][:length] != buffers[1][:length]:
            return offset
    return None


def _open_uncached(path: str, flags: int) -> int:
    """With direct I/O, so that gigabytes of page cache neither help nor hinder the run that comes next."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)


def _chunks_with_data(left: int, right: int, size: int) -> Iterator[int]:
    """The chunks in which at least one of the two has data."""
    offset = 0
    while offset < size:
        offset = min(_next_data(left, offset, size), _next_data(right, offset, size))
        offset -= offset % _CHUNK
        if offset < size:
            yield offset
        offset += _CHUNK


def _next_data(descriptor: int, offset: int, size: int) -> int:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        # ENXIO: holes up to the end. Anything else: a device, which does not know holes.
        return size if error.errno == errno.ENXIO else offset
