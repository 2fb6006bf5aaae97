"""What a run leaves behind is nothing: directories and loop devices made here go away however it ends."""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack

from units import format_size

# File systems fill up badly at the very end, and directories and maps need a little too.
_SPARE = 1.05


class Refused(Exception):
    """A condition that the user has to change; shown as one line."""


class Skipped(Exception):
    """A workload that this machine or user cannot run; the others go on."""


class Workspace:
    """Owns temporary directories and loop devices and removes them at the end, also after Ctrl-C."""

    def __init__(self, name: str, keep: bool = False) -> None:
        self._name = name
        self._keep = keep
        self._stack = ExitStack()

    def __enter__(self) -> "Workspace":
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _exit_on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave gigabytes or loop devices behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.clear()

    def clear(self) -> None:
        """Removes all that was made so far; a workload's files go before the next one needs the space."""
        self._stack.close()

    def directory(self, parent: str) -> str:
        """A new directory in `parent`."""
        path = tempfile.mkdtemp(prefix=f"{self._name}-", dir=parent)
        if not self._keep:
            self._stack.callback(shutil.rmtree, path, ignore_errors=True)
        return path

    def loop_device(self, path: str) -> str:
        """A loop device over a file, with direct I/O so that nothing is cached twice."""
        attach = ["losetup", "--find", "--show", "--direct-io=on", path]
        result = subprocess.run(attach, capture_output=True, text=True)
        if result.returncode:
            raise Skipped(f"no loop device: {result.stderr.strip()}")
        device = result.stdout.strip()
        self._stack.callback(subprocess.run, ["losetup", "--detach", device])
        return device


def require_space(parent: str, needed: int) -> None:
    """Refuses to begin what could not end."""
    if not os.path.isdir(parent):
        raise Refused(f"{parent} is not a directory; name another one with --workdir")
    state = os.statvfs(parent)
    free = state.f_bavail * state.f_frsize
    if free < needed * _SPARE:
        raise Refused(
            f"{parent} has {format_size(free)} free and {format_size(int(needed * _SPARE))} are needed:"
            " choose another --workdir or a smaller --size"
        )


def _exit_on_signal(number: int, _: object) -> None:
    raise SystemExit(128 + number)
