"""The guest: fio over NBD, and its log of each request."""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from types import TracebackType

from processes import kill_group, last_line

PROGRAM = "fio"

_BLOCK = "4k"
_READS_PER_CENT = 70

# fio ends when it is told to; this only bounds what a mishap can take.
_LONGEST = 3600

# Its log is in memory until the end. Room from the start, as much as fio allows: growing it takes time while requests
# wait.
_LOG_ENTRIES = 1 << 20

# A request can be stuck for as long as a backup takes, and fio waits for it.
_PATIENCE = 120.0

_NANOS_PER_MS = 1_000_000


class GuestFailed(Exception):
    """fio did not do its work; says how."""


@dataclass(frozen=True)
class Workload:
    """What the guest does: blocks of 4 KiB at random places of the whole disk, `depth` requests at a time."""

    name: str
    depth: int
    also_reads: bool

    def options(self) -> list[str]:
        """As fio takes them."""
        mix = [f"--rwmixread={_READS_PER_CENT}"] if self.also_reads else []
        return [f"--rw={'randrw' if self.also_reads else 'randwrite'}", *mix, f"--iodepth={self.depth}"]


WORKLOADS = [
    Workload("write-1", 1, also_reads=False),
    Workload("write-16", 16, also_reads=False),
    Workload("mix-1", 1, also_reads=True),
    Workload("mix-16", 16, also_reads=True),
]


def probe() -> bool:
    """Whether fio is here and speaks NBD."""
    try:
        return subprocess.run([PROGRAM, "--enghelp=nbd"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Part:
    """The requests of some time: the latencies of all that were under way in it, and how many of them ended in it."""

    latencies: list[int]
    completed: int


class Log:
    """fio's log: for each request when it ended, in milliseconds since 1970, and how many nanoseconds it took."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            split = [line.split(b",", 2) for line in file]
        self._requests = [(int(ended), int(nanos)) for ended, nanos, _ in split]

    @property
    def first(self) -> float:
        """When the first request ended, in seconds since 1970."""
        return min(ended for ended, _ in self._requests) / 1000

    @property
    def last(self) -> float:
        """When the last request ended."""
        return max(ended for ended, _ in self._requests) / 1000

    @property
    def is_empty(self) -> bool:
        """Whether no request ended at all."""
        return not self._requests

    def between(self, start: float, end: float) -> Part:
        """Those under way at any instant between these. A stall that outlasts the end counts, and as a whole."""
        first, last = start * 1000, end * 1000
        latencies, completed = [], 0
        for ended, nanos in self._requests:
            # A time is that of the millisecond in which the request ended.
            if ended + 1 > first and ended - nanos / _NANOS_PER_MS <= last:
                latencies.append(nanos)
                completed += ended <= last
        return Part(latencies, completed)


class Guest:
    """A running fio. It goes on until `finish`, and is gone when the context ends."""

    def __init__(self, uri: str, workload: Workload, seed: int, directory: str) -> None:
        self._directory = directory
        self._messages = open(os.path.join(directory, "fio.err"), "w+b")
        self._command = [
            PROGRAM,
            "--name=guest",
            "--ioengine=nbd",
            f"--uri={uri}",
            *workload.options(),
            f"--bs={_BLOCK}",
            "--norandommap",
            # The same places in the same order for all peers of a round.
            f"--randseed={seed}",
            "--time_based",
            f"--runtime={_LONGEST}",
            f"--write_lat_log={self._path('guest')}",
            "--log_avg_msec=0",
            "--log_unix_epoch=1",
            "--per_job_logs=0",
            f"--log_entries={_LOG_ENTRIES}",
            # Only the time from submission to completion is looked at.
            "--disable_clat=1",
            "--disable_slat=1",
            "--eta=never",
            "--output-format=json",
            f"--output={self._path('fio.json')}",
        ]

    def __enter__(self) -> "Guest":
        # A group of its own: Ctrl-C is for this program, which ends what it has started.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._messages,
            stderr=self._messages,
            cwd=self._directory,
            process_group=0,
        )
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._process.poll() is None:
            kill_group(self._process)
        self._messages.close()
        for name in os.listdir(self._directory):
            os.unlink(self._path(name))

    def run_for(self, seconds: float) -> None:
        """Lets it work; fails when it ends by itself."""
        time.sleep(seconds)
        if self._process.poll() is not None:
            raise GuestFailed(f"fio ended early: {last_line(self._messages)}")

    def finish(self) -> Log:
        """Ends it and reads its log."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired as expired:
            raise GuestFailed(f"fio did not end within {_PATIENCE:.0f} s") from expired
        self._check_report()
        log = Log(self._path("guest_lat.log"))
        if log.is_empty:
            raise GuestFailed("fio's requests did not come back")
        return log

    def _check_report(self) -> None:
        try:
            with open(self._path("fio.json"), encoding="utf-8") as file:
                text = file.read()
            # Messages may stand before the report.
            jobs = json.loads(text[text.index("{") :])["jobs"]
        except (OSError, ValueError) as error:
            raise GuestFailed(f"fio left no report: {last_line(self._messages)}") from error
        for job in jobs:
            if job["error"]:
                raise GuestFailed(f"fio: {os.strerror(job['error'])}: {last_line(self._messages)}")

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)
