"""The device's limit: fio reads the source and writes a target of the same shape, both at once, copying nothing."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass

from cases import Case
from layout import pieces
from measure import ToolFailed
from tools import Tool
from units import KIB, MIB

_PIECE = 64 * KIB
_DEPTH = 32
_MILLISECONDS = 1000


@dataclass(frozen=True)
class FioTool(Tool):
    """What all uses of fio have in common."""

    name: str
    io_engine: str
    program = "fio"
    is_copy = False

    def prepare(self, case: Case) -> None:
        case.target.preallocate(case.source.size, case.source.extents)

    def command(self, case: Case) -> list[str]:
        output = ["--output-format=json", f"--output={_report_path(case)}"]
        return [self.program, *output, *self.jobs(case)]

    @property
    def is_limit(self) -> bool:
        """Whether it does all that a copy has to do, so that its speed is what the device can give."""
        return True

    def jobs(self, case: Case) -> list[str]:
        """The options of each job, from its name on."""
        raise NotImplementedError

    def seconds(self, case: Case, wall: float) -> float:
        """The time of the slower job including its flush, without the start and the report of fio itself."""
        with open(_report_path(case), encoding="utf-8") as report:
            jobs = json.load(report)["jobs"]
        for job in jobs:
            moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
            if job["error"] or moved < case.source.payload:
                raise ToolFailed(f"{job['jobname']} moved {moved} of {case.source.payload} bytes")
        return max(job["job_runtime"] for job in jobs) / _MILLISECONDS


@dataclass(frozen=True)
class FioSequential(FioTool):
    """Reads and writes from one end to the other."""

    block: int
    depth: int

    def jobs(self, case: Case) -> list[str]:
        common = [
            f"--size={case.source.size}",
            f"--bs={self.block}",
            f"--iodepth={self.depth}",
            f"--ioengine={self.io_engine}",
            "--direct=1",
        ]
        read = ["--name=read", "--rw=read", f"--filename={case.source.path}", *common]
        write = ["--name=write", "--rw=write", f"--filename={case.target.path}", "--end_fsync=1", *common]
        return [*read, *write]


@dataclass(frozen=True)
class FioExtents(FioTool):
    """Moves exactly the extents of the source, in order, in requests of 64 KiB or what an extent leaves."""

    also_writes: bool

    @property
    def is_limit(self) -> bool:
        return self.also_writes

    def prepare(self, case: Case) -> None:
        super().prepare(case)
        _write_replay(case, "read", case.source.path)
        if self.also_writes:
            _write_replay(case, "write", case.target.path)

    def jobs(self, case: Case) -> list[str]:
        directions = ["read", "write"] if self.also_writes else ["read"]
        return [option for direction in directions for option in self._job(case, direction)]

    def _job(self, case: Case, direction: str) -> list[str]:
        return [
            f"--name={direction}",
            f"--read_iolog={_replay_path(case, direction)}",
            f"--iodepth={_DEPTH}",
            f"--ioengine={self.io_engine}",
            "--direct=1",
            "--end_fsync=1",
        ]


def sequential() -> list[FioTool]:
    """Small and large requests, by both interfaces: the fastest one is the limit."""
    best = _best_io_engine()
    variants = [
        FioSequential("fio-64k-d32", best, _PIECE, _DEPTH),
        FioSequential("fio-1m-d4", best, MIB, 4),
        FioSequential("fio-1m-d8", best, MIB, 8),
    ]
    if best != "libaio":
        variants.append(FioSequential("fio-64k-d32-libaio", "libaio", _PIECE, _DEPTH))
    return variants


def extents() -> list[FioTool]:
    """For sources of which not everything has to be written: reading alone, and reading and writing."""
    best = _best_io_engine()
    return [FioExtents("fio-extents-read", best, False), FioExtents("fio-extents", best, True)]


def _best_io_engine() -> str:
    """io_uring, unless it is switched off here as in most containers."""
    if shutil.which(FioTool.program) is None:
        return "io_uring"
    probe = ["fio", "--name=probe", "--ioengine=io_uring", "--rw=read", "--size=4k", "--filename=/proc/self/exe"]
    return "io_uring" if subprocess.run(probe, capture_output=True).returncode == 0 else "libaio"


def _write_replay(case: Case, direction: str, path: str) -> None:
    """A list of requests for fio to replay."""
    requests = pieces(case.source.extents, _PIECE)
    # fio stops without waiting for the last `iodepth` requests of a replay; these are others then.
    requests += requests[:1] * _DEPTH
    with open(_replay_path(case, direction), "w", encoding="utf-8") as replay:
        replay.write(f"fio version 2 iolog\n{path} add\n{path} open\n")
        replay.writelines(f"{path} {direction} {piece.offset} {piece.length}\n" for piece in requests)


def _replay_path(case: Case, direction: str) -> str:
    return os.path.join(case.scratch, f"replay-{direction}.iolog")


def _report_path(case: Case) -> str:
    return os.path.join(case.scratch, "fio.json")
