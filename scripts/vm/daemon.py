"""The daemon, and a client for its control socket."""

import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

_PATIENCE_SECONDS = 300


class Refused(Exception):
    """The daemon did not do what it was asked to."""


class Daemon:
    """A daemon with the disk `vda` on an NBD socket, as a context."""

    def __init__(self, program: Path, disk: Path, directory: Path) -> None:
        self._qmp, nbd = directory / "qmp.sock", directory / "nbd.sock"
        self.uri = f"nbd+unix:///vda?socket={nbd}"
        command = [program, "daemon", "--qmp", f"unix:{self._qmp}", "--nbd", f"unix:{nbd}", "--disk", f"vda={disk}"]
        self._process = subprocess.Popen(command)
        self._events: list[dict[str, Any]] = []
        self._stream = self._connect()
        self._lines = self._stream.makefile("r")
        self._receive()
        self.execute("qmp_capabilities")

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def execute(self, command: str, **arguments: object) -> Any:
        """A command and what it returns. A `_` in a name of an argument stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._stream.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise Refused(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def start_backup(self, job: str, target: Path, length: int) -> None:
        """Start a backup of `vda` to a new file. It goes no further than guests drive it until `finish`."""
        with target.open("wb") as file:
            file.truncate(length)
        node = f"to-{job}"
        self.execute("blockdev-add", driver="file", node_name=node, filename=str(target))
        arguments = {"job_id": job, "device": "vda", "target": node, "sync": "full", "speed": 1}
        self.execute("blockdev-backup", **arguments)

    def finish(self, job: str, speed: int) -> dict[str, Any]:
        """Let the sweep of a backup go at this speed; its last words."""
        self.execute("block-job-set-speed", device=job, speed=speed)
        while True:
            event = self._events.pop(0) if self._events else self._receive()
            data = event.get("data", {})
            if event["event"] == "BLOCK_JOB_COMPLETED" and data["device"] == job:
                if "error" in data:
                    raise Refused(f"the backup failed: {data}")
                return data

    def quit(self) -> None:
        """End it as an operator does."""
        self.execute("quit")
        code = self._process.wait(_PATIENCE_SECONDS)
        if code:
            raise Refused(f"the daemon ended with {code}")

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            stream = socket.socket(socket.AF_UNIX)
            stream.settimeout(_PATIENCE_SECONDS)
            try:
                stream.connect(str(self._qmp))
                return stream
            except OSError:
                stream.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise Refused("the daemon does not answer") from None
            time.sleep(0.05)

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise Refused("the daemon has gone away")
        return json.loads(line)
