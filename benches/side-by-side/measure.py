"""Runs one command and says what it took: wall time, CPU time of the whole process tree, peak memory."""

import os
import resource
import subprocess
import tempfile
import time
from dataclasses import dataclass

from processes import kill_group, last_line
from units import KIB
from workspace import Refused

# The kernel counts the memory of the process that forks into the peak of its child, so a small program
# has to stand between this interpreter and the tool.
_GNU_TIME = "/usr/bin/time"


class ToolFailed(Exception):
    """The tool did not do its work; says how."""


@dataclass(frozen=True)
class Usage:
    """What one run took."""

    seconds: float
    cpu_seconds: float
    peak_rss: int


def require_gnu_time() -> None:
    """Refuses to begin without the program that measures memory."""
    if not os.access(_GNU_TIME, os.X_OK):
        raise Refused(f"{_GNU_TIME} is missing (the Debian package time): run .ci/install")


def run(command: list[str], scratch: str) -> Usage:
    """Runs the command to its end; fails with the last line of its messages when it does not succeed."""
    with tempfile.TemporaryFile(dir=scratch) as messages, tempfile.NamedTemporaryFile(dir=scratch) as memory:
        wrapped = [_GNU_TIME, "--quiet", "--format=%M", f"--output={memory.name}", *command]
        started = time.perf_counter()
        status, usage = _run_to_end(wrapped, messages.fileno())
        seconds = time.perf_counter() - started
        if status:
            raise ToolFailed(f"exit status {status}: {last_line(messages)}")
        peak_rss = int(memory.read()) * KIB
    return Usage(seconds, usage.ru_utime + usage.ru_stime, peak_rss)


def _run_to_end(command: list[str], output: int) -> tuple[int, resource.struct_rusage]:
    # A group of its own, so that the whole tree can be ended with it.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
    )
    try:
        # Unlike Popen.wait this tells the CPU time, of all descendants that were waited for.
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        kill_group(process)
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage
