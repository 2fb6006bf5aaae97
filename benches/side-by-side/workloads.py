"""The disks on which the tools are compared."""

from collections.abc import Callable
from dataclasses import dataclass

from cases import Case, device_case, file_case
from layout import Extent, contiguous, scattered
from units import GIB, KIB, MIB
from workspace import Workspace

MEMORY = "/dev/shm"

# A tool may allocate whole megabytes around small extents of a sparse source.
_SPARSE_SLACK = 4


@dataclass(frozen=True)
class Scatter:
    """Extents of `smallest` to `largest` bytes on a disk of `spread` times their sum."""

    spread: int
    smallest: int
    largest: int


@dataclass(frozen=True)
class Workload:
    """One kind of disk. `size` is the data to move; `kind` says which device benchmark stands beside it."""

    name: str
    summary: str
    size: int
    quick_size: int
    kind: str
    in_memory: bool = False
    scatter: Scatter | None = None

    def space(self, size: int) -> int:
        """The bytes that sources and a target take together, at most."""
        if self.scatter:
            return size * (2 + _SPARSE_SLACK)
        return size * 2

    def cases(self, directory: str, size: int, workspace: Workspace) -> list[Case]:
        """The copies to time; the first one is the workload, others are what it is compared with."""
        return _BUILDERS[self.kind](self, directory, size, workspace)


def _dense(workload: Workload, directory: str, size: int, _: Workspace) -> list[Case]:
    return [file_case(workload.name, directory, size, contiguous(size), zeros=False, in_memory=workload.in_memory)]


def _zeros(workload: Workload, directory: str, size: int, _: Workspace) -> list[Case]:
    return [file_case(workload.name, directory, size, contiguous(size), zeros=True)]


def _loop(workload: Workload, directory: str, size: int, workspace: Workspace) -> list[Case]:
    return [device_case(workload.name, directory, size, workspace)]


def _sparse(workload: Workload, directory: str, size: int, _: Workspace) -> list[Case]:
    scatter = workload.scatter
    assert scatter
    span = size * scatter.spread
    extents: list[Extent] = scattered(span, size, scatter.smallest, scatter.largest)
    return [
        file_case(workload.name, directory, span, extents, zeros=False),
        file_case(f"{workload.name}-as-dense", directory, size, contiguous(size), zeros=False),
    ]


_BUILDERS: dict[str, Callable[[Workload, str, int, Workspace], list[Case]]] = {
    "dense": _dense,
    "zeros": _zeros,
    "loop": _loop,
    "sparse": _sparse,
}

WORKLOADS = [
    Workload("dense", "incompressible, file to file", 4 * GIB, 64 * MIB, "dense"),
    Workload("loop", "incompressible, device to device", 4 * GIB, 64 * MIB, "loop"),
    Workload(
        "sparse",
        "extents of 64 KiB to 4 MiB on a disk 64 times as large",
        1 * GIB,
        16 * MIB,
        "sparse",
        scatter=Scatter(64, 64 * KIB, 4 * MIB),
    ),
    Workload(
        "small",
        "extents of 4 to 64 KiB on a disk 128 times as large",
        512 * MIB,
        8 * MIB,
        "sparse",
        scatter=Scatter(128, 4 * KIB, 64 * KIB),
    ),
    Workload("zeros", "zeros that were written, file to file", 4 * GIB, 64 * MIB, "zeros"),
    Workload("ram", "incompressible, within tmpfs", 2 * GIB, 16 * MIB, "dense", in_memory=True),
]
