"""One call of the program: the chosen workloads one after the other, and what came of them."""

import argparse
import shutil
import sys
from typing import TypeVar

import contest
import fio
import report
import tools
from cases import allocated_bytes
from contest import Failure, Run
from tools import Tool
from units import format_size
from workloads import MEMORY, WORKLOADS, Workload
from workspace import Refused, Skipped, Workspace, require_space

_NO_ENGINE = "there is no engine-cli at {}: build it with `cargo build --release`, or name it with --binary"

AnyTool = TypeVar("AnyTool", bound=Tool)


class Session:
    """Holds the contests and gathers their runs."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        self._workloads = [workload for workload in WORKLOADS if workload.name in chosen.workload]
        self._copiers = _usable([tools.engine(chosen.binary), *tools.peers()], chosen.tools)
        self._sequential = _usable(fio.sequential(), chosen.tools)
        self._extents = _usable(fio.extents(), chosen.tools)
        if not self._copiers and not self._sequential and not self._extents:
            raise Refused("none of the chosen tools is here")
        self._allocation: dict[str, int] = {}
        self.runs: list[Run] = []
        self.failures: list[Failure] = []

    def hold_all(self) -> None:
        """Runs every workload, once it is sure that all of them fit."""
        for workload in self._workloads:
            require_space(self._parent(workload), workload.space(self._size(workload)))
        with Workspace("side-by-side", self._chosen.keep) as workspace:
            for workload in self._workloads:
                try:
                    self._hold(workload, workspace)
                except Skipped as skipped:
                    _say(f"{workload.name}: skipped, {skipped}")
                workspace.clear()

    def summaries(self) -> list[report.Summary]:
        """The rows of the table."""
        limits = {tool.name for tool in (*self._sequential, *self._extents) if tool.is_limit}
        return report.summarize(self.runs, self._allocation, limits)

    def _hold(self, workload: Workload, workspace: Workspace) -> None:
        size = self._size(workload)
        _say(f"{workload.name}: {format_size(size)}, {workload.summary}")
        cases = workload.cases(workspace.directory(self._parent(workload)), size, workspace)
        self._allocation |= {case.label: allocated_bytes(case.source.path) for case in cases}
        competitors: list[Tool] = [*self._copiers, *self._benchmarks(workload)]
        runs, failures = contest.hold(workload.name, cases, competitors, self._chosen.rounds)
        self.runs += runs
        self.failures += failures

    def _benchmarks(self, workload: Workload) -> list[fio.FioTool]:
        return self._sequential if workload.kind in ("dense", "loop") else self._extents

    def _parent(self, workload: Workload) -> str:
        return MEMORY if workload.in_memory else self._chosen.workdir

    def _size(self, workload: Workload) -> int:
        return self._chosen.size or (workload.quick_size if self._chosen.quick else workload.size)


def _usable(candidates: list[AnyTool], chosen: list[str] | None) -> list[AnyTool]:
    """The candidates that are asked for and installed; says which ones are missing."""
    usable = []
    for tool in candidates:
        if chosen and not any(tool.name.startswith(prefix) for prefix in chosen):
            continue
        if shutil.which(tool.program):
            usable.append(tool)
        elif tool.name != tools.ENGINE:
            _say(f"{tool.name} is missing and left out: run .ci/install")
        elif chosen:
            raise Refused(_NO_ENGINE.format(tool.program))
        else:
            _say(f"NOTE: {_NO_ENGINE.format(tool.program)}; timing its peers only")
    return usable


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
