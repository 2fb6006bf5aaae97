"""The programs that serve the disk: how each is started, so that all do direct I/O on the same file, and ended."""

import os
import shutil
import socket
import subprocess
import time
from types import TracebackType

from processes import kill_group, last_line
from qmp import Qmp, QmpFailed

# Of the export, and of the node behind it.
DISK = "disk"
TARGET = "target"

# A unix socket's address has room for 107 bytes.
_LONGEST_SOCKET_PATH = 107

_START_SECONDS = 20.0
_END_SECONDS = 30.0


class ServerFailed(Exception):
    """The server did not start, or does not do what it should; says how."""


class Server:
    """A running server, from the moment at which clients can connect to the end of the context."""

    program: str
    # What a reader of the figures has to know of its I/O on the disk.
    is_direct = True

    def __init__(self, disk: str, directory: str) -> None:
        self._disk = disk
        self._directory = directory
        self._nbd = os.path.join(directory, "n")
        self._qmp = os.path.join(directory, "q")
        self.qmp: Qmp | None = None

    @property
    def uri(self) -> str:
        """Where the guest finds its disk."""
        return f"nbd+unix:///{DISK}?socket={self._nbd}"

    def command(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def __enter__(self) -> "Server":
        self._messages = open(os.path.join(self._directory, "server.err"), "w+b")
        # A group of its own: Ctrl-C is for this program, which ends what it has started.
        self._process = subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=self._messages,
            stderr=self._messages,
            process_group=0,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._end()

    def check_mode(self) -> None:
        """Fails unless the disk is open, and for direct I/O if the server is said to do that."""
        flags = list(self._flags_of_disk())
        if not flags:
            raise ServerFailed(f"{self.program} has not opened {self._disk}")
        if self.is_direct != any(flag & os.O_DIRECT for flag in flags):
            raise ServerFailed(f"{self.program} {'does no' if self.is_direct else 'does'} direct I/O on {self._disk}")

    def last_words(self) -> str:
        """The last line that it said, if any."""
        return last_line(self._messages)

    def _connect_monitor(self) -> bool:
        """Connects to the monitor if there is one; whether that is done."""
        return True

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not (self._accepts() and self._connect_monitor()):
            if self._process.poll() is not None:
                raise ServerFailed(f"{self.program} did not start: {self.last_words()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.program} does not listen after {_START_SECONDS:.0f} s")
            time.sleep(0.01)

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self._nbd)
            except OSError:
                return False
        return True

    def _flags_of_disk(self) -> list[int]:
        found = []
        descriptors = f"/proc/{self._process.pid}/fd"
        for descriptor in os.listdir(descriptors):
            try:
                if os.path.samefile(os.path.join(descriptors, descriptor), self._disk):
                    found.append(_open_flags(self._process.pid, descriptor))
            except OSError:
                # Sockets and the like, and what was closed meanwhile.
                continue
        return found

    def _end(self) -> None:
        if self.qmp:
            self.qmp.close()
            self.qmp = None
        try:
            self._process.terminate()
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also after a Ctrl-C while it was waited for.
            if self._process.poll() is None:
                kill_group(self._process)
        self._messages.close()
        for name in os.listdir(self._directory):
            os.unlink(os.path.join(self._directory, name))


class Daemon(Server):
    """One that can be told to make a backup."""

    def target_node(self, path: str) -> dict[str, object]:
        """The arguments of blockdev-add for a backup's target."""
        raise NotImplementedError

    def _connect_monitor(self) -> bool:
        if self.qmp is None:
            try:
                self.qmp = Qmp(self._qmp, timeout=_START_SECONDS)
            except QmpFailed:
                return False
        return True


class EngineServer(Daemon):
    """The program that this repository builds, with its defaults."""

    def __init__(self, program: str, disk: str, directory: str) -> None:
        super().__init__(disk, directory)
        self.program = program

    def command(self) -> list[str]:
        sockets = ["--qmp", f"unix:{self._qmp}", "--nbd", f"unix:{self._nbd}"]
        return [self.program, "daemon", *sockets, "--disk", f"{DISK}={self._disk}"]

    def target_node(self, path: str) -> dict[str, object]:
        return {"driver": "file", "node-name": TARGET, "filename": path, "cache": {"direct": True}}


class QemuServer(Daemon):
    """qemu-storage-daemon with direct I/O; `aio` says by which interface."""

    program = "qemu-storage-daemon"

    def __init__(self, aio: str, disk: str, directory: str) -> None:
        super().__init__(disk, directory)
        self._aio = aio

    def command(self) -> list[str]:
        file = f"driver=file,node-name=file,filename={self._disk},cache.direct=on,aio={self._aio},discard=unmap"
        return [
            self.program,
            f"--blockdev={file}",
            f"--blockdev=driver=raw,node-name={DISK},file=file,cache.direct=on,discard=unmap",
            f"--nbd-server=addr.type=unix,addr.path={self._nbd}",
            f"--export=type=nbd,id=export,node-name={DISK},name={DISK},writable=on",
            f"--chardev=socket,id=monitor,path={self._qmp},server=on,wait=off",
            "--monitor=chardev=monitor",
        ]

    def target_node(self, path: str) -> dict[str, object]:
        direct = {"cache": {"direct": True}, "discard": "unmap"}
        file = {"driver": "file", "filename": path, "aio": self._aio, **direct}
        return {"driver": "raw", "node-name": TARGET, "file": file, **direct}


class NbdkitServer(Server):
    """nbdkit's file plugin. It has no direct I/O; with cache=none it writes back at once and keeps nothing."""

    program = "nbdkit"
    is_direct = False

    def command(self) -> list[str]:
        plugin = ["file", f"file={self._disk}", "cache=none", "fadvise=random"]
        return [self.program, "--foreground", "--exit-with-parent", "--unix", self._nbd, *plugin]


def is_installed(program: str) -> bool:
    """Whether it can be called."""
    return shutil.which(program) is not None


def fits_sockets(directory: str) -> bool:
    """Whether sockets in the directory have an address."""
    return len(os.path.join(directory, "n")) <= _LONGEST_SOCKET_PATH


def best_qemu_aio(disk: str, directory: str) -> str | None:
    """The fastest interface with which qemu-storage-daemon can open the disk here; None where it cannot at all."""
    for aio in ("io_uring", "native", "threads"):
        try:
            with QemuServer(aio, disk, directory):
                return aio
        except ServerFailed:
            continue
    return None


def _open_flags(process: int, descriptor: str) -> int:
    with open(f"/proc/{process}/fdinfo/{descriptor}", encoding="ascii") as file:
        for line in file:
            if line.startswith("flags:"):
                return int(line.split()[1], 8)
    return 0
