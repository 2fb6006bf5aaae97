"""The two sides of a copy: a source with known contents, and a target that is as good as new before each run."""

import os
from dataclasses import dataclass

from content import Incompressible, Zeros, fill, write_extents
from layout import Extent, contiguous
from workspace import Skipped, Workspace

_ST_BLOCK = 512


@dataclass(frozen=True)
class Source:
    """A disk to copy. `payload` is what there is to move: the bytes in extents."""

    path: str
    size: int
    extents: list[Extent]

    @property
    def payload(self) -> int:
        """The bytes that are not holes; all rates are counted in these."""
        return sum(extent.length for extent in self.extents)


class FileTarget:
    """A file which does not exist before a run."""

    is_device = False

    def __init__(self, path: str) -> None:
        self.path = path

    def clear(self) -> None:
        """Removes what the run before has left."""
        if os.path.exists(self.path):
            os.unlink(self.path)

    def preallocate(self, size: int, extents: list[Extent]) -> None:
        """A new file with room for the extents: what a benchmark of the bare device starts from."""
        self.clear()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, size)
        for extent in extents:
            os.posix_fallocate(descriptor, extent.offset, extent.length)
        os.close(descriptor)

    def allocated(self) -> int | None:
        """The bytes that the result takes on the disk."""
        return allocated_bytes(self.path)


class DeviceTarget:
    """A block device; it cannot be removed, so what an earlier run wrote is overwritten instead."""

    is_device = True

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self._size = size

    def clear(self) -> None:
        """Zeros everywhere: a tool that copies nothing does not pass for one that copied all."""
        fill(self.path, contiguous(self._size), Zeros())

    def preallocate(self, size: int, extents: list[Extent]) -> None:
        """Devices have their room."""

    def allocated(self) -> int | None:
        """Has no meaning for a device."""
        return None


@dataclass(frozen=True)
class Case:
    """One copy to be timed; `scratch` takes the small files that tools need."""

    label: str
    source: Source
    target: FileTarget | DeviceTarget
    scratch: str
    in_memory: bool = False

    def touch_memory(self) -> None:
        """Has as much memory used and given back as the target takes, if that lies in memory.

        A virtual machine gets memory from its host at the first touch, which costs several times as much as filling it,
        and whether a run meets such memory is chance.
        """
        if self.in_memory:
            path = os.path.join(self.scratch, "touched.raw")
            write_extents(path, self.source.size, self.source.extents, Zeros())
            os.unlink(path)


def allocated_bytes(path: str) -> int:
    """The bytes that a file takes on the disk."""
    return os.stat(path).st_blocks * _ST_BLOCK


def file_case(
    label: str, directory: str, size: int, extents: list[Extent], zeros: bool, in_memory: bool = False
) -> Case:
    """A source file written with the extents, and a target beside it."""
    path = os.path.join(directory, f"{label}.raw")
    write_extents(path, size, extents, Zeros() if zeros else Incompressible())
    target = FileTarget(os.path.join(directory, "target.raw"))
    return Case(label, Source(path, size, extents), target, directory, in_memory)


def device_case(label: str, directory: str, size: int, workspace: Workspace) -> Case:
    """Two loop devices over files of `size` bytes."""
    if os.geteuid():
        raise Skipped("loop devices need root")
    source, target = (os.path.join(directory, f"{label}-{side}.raw") for side in ("source", "target"))
    write_extents(source, size, contiguous(size), Incompressible())
    # Written rather than reserved: the first tool would otherwise pay for converting the extents.
    write_extents(target, size, contiguous(size), Zeros())
    devices = [workspace.loop_device(path) for path in (source, target)]
    return Case(label, Source(devices[0], size, contiguous(size)), DeviceTarget(devices[1], size), directory)
