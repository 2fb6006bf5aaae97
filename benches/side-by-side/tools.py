"""The programs that are compared, each called in the fastest way that is still durable at the end."""

from collections.abc import Callable
from dataclasses import dataclass

from cases import Case
from units import KIB

ENGINE = "engine"


class Tool:
    """One competitor. `program` must be installed; `is_copy` says whether its result can be verified."""

    name: str
    program: str
    is_copy = True

    def prepare(self, case: Case) -> None:
        """Puts the target into the state that the tool expects, outside of the timing."""
        case.target.clear()

    def command(self, case: Case) -> list[str]:
        """The command line which is timed."""
        raise NotImplementedError

    def seconds(self, case: Case, wall: float) -> float:
        """The time which the work took; checks what the tool reports about itself, where it does."""
        return wall


@dataclass(frozen=True)
class CopyTool(Tool):
    """A program which copies and is done when it exits."""

    name: str
    program: str
    arguments: Callable[[Case], list[str]]

    def command(self, case: Case) -> list[str]:
        return [self.program, *self.arguments(case)]


def engine(binary: str) -> CopyTool:
    """The program that this repository builds, with its defaults."""
    return CopyTool(ENGINE, binary, _engine_arguments)


def peers() -> list[CopyTool]:
    """What people use today."""
    return [
        CopyTool("qemu-img", "qemu-img", _qemu_img_arguments),
        CopyTool("nbdcopy", "nbdcopy", _nbdcopy_arguments),
        CopyTool("dd", "dd", _dd_arguments),
        CopyTool("cp", "sh", _cp_arguments),
    ]


def _engine_arguments(case: Case) -> list[str]:
    # A device always exists, and what exists is overwritten on request only.
    force = ["--force"] if case.target.is_device else []
    return ["copy", *force, case.source.path, case.target.path]


def _qemu_img_arguments(case: Case) -> list[str]:
    existing = ["-n"] if case.target.is_device else []
    options = ["convert", "-m", "16", "-W", "-t", "none", "-T", "none", "-f", "raw", "-O", "raw", *existing]
    return [*options, case.source.path, case.target.path]


def _nbdcopy_arguments(case: Case) -> list[str]:
    return ["--flush", case.source.path, case.target.path]


def _dd_arguments(case: Case) -> list[str]:
    is_sparse = case.source.payload < case.source.size
    # dd leaves out whole blocks only: with large ones around small extents it would write mostly zeros.
    is_scattered = case.source.payload < len(case.source.extents) * 64 * KIB
    return [
        f"if={case.source.path}",
        f"of={case.target.path}",
        f"bs={'64K' if is_scattered else '1M'}",
        "iflag=direct",
        "oflag=direct",
        "conv=sparse,fsync" if is_sparse else "conv=fsync",
        "status=none",
    ]


def _cp_arguments(case: Case) -> list[str]:
    # On a device, leaving out zeros would leave whatever was there before.
    sparse = "never" if case.target.is_device else "always"
    script = f'cp --sparse={sparse} "$1" "$2" && sync "$2"'
    return ["-c", script, "cp", case.source.path, case.target.path]
