"""Times the tools against each other: in rounds, taking turns, so that a drift of the machine hits all alike."""

import os
import sys
from dataclasses import dataclass

import measure
from cases import Case
from content import first_difference
from measure import ToolFailed
from tools import Tool
from turns import rotated, start_cold
from units import GIB, MIB


@dataclass(frozen=True)
class Run:
    """One timed run."""

    workload: str
    case: str
    tool: str
    round: int
    seconds: float
    cpu_seconds: float
    peak_rss: int
    payload: int
    allocated: int | None

    @property
    def mib_per_second(self) -> float:
        """The data moved per second; holes are not data."""
        return self.payload / MIB / self.seconds

    @property
    def cpu_per_gib(self) -> float:
        """CPU seconds for each GiB of data."""
        return self.cpu_seconds * GIB / self.payload


@dataclass(frozen=True)
class Failure:
    """A tool that could not do a case, and is left out from then on."""

    workload: str
    case: str
    tool: str
    reason: str


def hold(workload: str, cases: list[Case], tools: list[Tool], rounds: int) -> tuple[list[Run], list[Failure]]:
    """All runs of one workload. The first copy of every tool is compared with its source."""
    entries = [(tool, case) for tool in tools for case in cases]
    runs: list[Run] = []
    failures: list[Failure] = []
    for number in range(rounds):
        for tool, case in rotated(entries, number):
            if any(failure.tool == tool.name for failure in failures):
                continue
            try:
                run = _timed(workload, case, tool, number, verify=number == 0)
                runs.append(run)
                _say(f"round {number + 1}/{rounds}  {case.label:15} {tool.name:20} {run.mib_per_second:7.0f} MiB/s")
            except (ToolFailed, OSError) as failed:
                failures.append(Failure(workload, case.label, tool.name, str(failed)))
                _say(f"{case.label} {tool.name} FAILED: {failed}")
    return runs, failures


def _timed(workload: str, case: Case, tool: Tool, number: int, verify: bool) -> Run:
    tool.prepare(case)
    case.touch_memory()
    start_cold(case.source.path)
    usage = measure.run(tool.command(case), case.scratch)
    seconds = tool.seconds(case, usage.seconds)
    if verify and tool.is_copy:
        _verify(case)
    return Run(
        workload=workload,
        case=case.label,
        tool=tool.name,
        round=number,
        seconds=seconds,
        cpu_seconds=usage.cpu_seconds,
        peak_rss=usage.peak_rss,
        payload=case.source.payload,
        allocated=case.target.allocated() if tool.is_copy else None,
    )


def _verify(case: Case) -> None:
    if not os.path.exists(case.target.path):
        raise ToolFailed("it succeeded, yet there is no target")
    difference = first_difference(case.source.path, case.target.path, case.source.size)
    if difference is not None:
        raise ToolFailed(f"the copy differs from its source near offset {difference}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
