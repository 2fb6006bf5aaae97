"""A client of QMP, the JSON protocol that steers qemu-storage-daemon and engine-cli daemon alike."""

import json
import socket
import time
from typing import Any

Message = dict[str, Any]

_CHUNK = 1 << 16


class QmpFailed(Exception):
    """A command was refused, or the daemon is gone; says which and why."""


class Qmp:
    """One connection, past its greeting. One command at a time; events are kept until somebody asks for them."""

    def __init__(self, path: str, timeout: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._bytes = b""
        self._events: list[Message] = []
        try:
            self._socket.connect(path)
            self._deadline = time.monotonic() + timeout
            if "QMP" not in self._next_message():
                raise QmpFailed(f"{path}: no greeting")
            self.command("qmp_capabilities")
        except OSError as error:
            self.close()
            raise QmpFailed(f"{path}: {error}") from error
        except QmpFailed:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()

    def command(self, name: str, arguments: Message | None = None, timeout: float = 60.0) -> Any:
        """What the command returns; fails with the daemon's own words when it is refused."""
        self._deadline = time.monotonic() + timeout
        request = {"execute": name, "arguments": arguments or {}}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise QmpFailed(f"{name}: {error}") from error
        while True:
            message = self._next_message()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise QmpFailed(f"{name}: {message['error'].get('desc')}")
            elif "return" in message:
                return message["return"]

    def wait_for(self, event: str, timeout: float) -> Message:
        """The next event of this name, also if it has come already. Others before it are dropped."""
        self._deadline = time.monotonic() + timeout
        while True:
            message = self._events.pop(0) if self._events else self._next_message()
            if message.get("event") == event:
                return message

    def _next_message(self) -> Message:
        while b"\n" not in self._bytes:
            self._receive()
        line, _, self._bytes = self._bytes.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise QmpFailed(f"not an object: {line[:80]!r}")
        return message

    def _receive(self) -> None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise QmpFailed("no answer in time")
        self._socket.settimeout(remaining)
        try:
            received = self._socket.recv(_CHUNK)
        except TimeoutError as error:
            raise QmpFailed("no answer in time") from error
        except OSError as error:
            raise QmpFailed(str(error)) from error
        if not received:
            raise QmpFailed("the daemon hung up")
        self._bytes += received


def seconds_of(event: Message) -> float:
    """When the daemon says that it happened, in seconds since 1970."""
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
