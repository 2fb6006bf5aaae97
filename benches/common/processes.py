"""Processes of other programs: how they are ended with all that they started, and what they said last."""

import os
import signal
import subprocess
import time
from typing import IO

# A process that is killed still waits for the writes it has under way.
_PATIENCE = 30.0


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends the whole tree; its files and devices can be removed only when the last one is gone."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def last_line(messages: IO[bytes]) -> str:
    """Of a file that took a program's messages."""
    messages.seek(0)
    lines = messages.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"
