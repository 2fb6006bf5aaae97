"""The virtual machine: an initramfs with one program, `init`, and a conversation with it over the serial console."""

import queue
import shutil
import stat
import subprocess
import threading
import time
from pathlib import Path

from packages import Parts, contents

_PATIENCE_SECONDS = 120


class Broken(Exception):
    """The guest did not do what it was asked to."""


class Machine:
    """A guest at work, as a context."""

    def __init__(self, parts: Parts, disk: str, directory: Path) -> None:
        self._log = (directory / "console.log").open("w")
        initramfs = directory / "initramfs"
        initramfs.write_bytes(_initramfs(parts))
        command = [
            *parts.emulator,
            *("-accel", "tcg", "-m", "256", "-nodefaults", "-no-reboot", "-nographic", "-serial", "stdio"),
            *("-kernel", str(parts.kernel), "-initrd", str(initramfs)),
            *("-append", "console=ttyS0 quiet panic=-1 rdinit=/init"),
            *("-drive", f"file={disk},format=raw,if=virtio,cache=none,discard=unmap"),
        ]
        self._process = subprocess.Popen(
            command, env=parts.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._lines: "queue.Queue[str | None]" = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def ask(self, command: str, reply: str) -> str:
        """Have the guest carry out a command; what it says after the word `reply`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        self._process.stdin.flush()
        return self.expect(reply)

    def expect(self, word: str) -> str:
        """Wait for the guest to say this word; what it says after it."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise Broken(f"the guest does not say '{word}'; see {self._log.name}") from None
            if line is None:
                raise Broken(f"the guest ended before it said '{word}'; see {self._log.name}")
            if line.startswith("FAILED"):
                raise Broken(f"the guest: {line}")
            if line.split(" ")[0] == word:
                return line.removeprefix(word).strip()

    def wait(self) -> None:
        """Wait for it to switch itself off."""
        self._process.wait(_PATIENCE_SECONDS)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip()
            self._log.write(line + "\n")
            self._log.flush()
            # What the firmware has left on the first line stands before it.
            _, said, words = line.partition("guest: ")
            if said:
                self._lines.put(words)
        self._lines.put(None)


def _initramfs(parts: Parts) -> bytes:
    init = Path(__file__).with_name("init").read_bytes()
    files = {"init": init, "bin/busybox": parts.busybox.read_bytes()}
    names = [f"{number:02}-{path.name.removesuffix('.xz')}" for number, path in enumerate(parts.modules)]
    files |= {f"modules/{name}": contents(path) for name, path in zip(names, parts.modules)}
    files["modules/order"] = "".join(f"{name}\n" for name in names).encode()
    archive = b"".join(_entry(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "modules"))
    archive += b"".join(_entry(name, stat.S_IFREG | 0o755, data) for name, data in files.items())
    # Without it the first program has no standard output, and nobody hears of what goes wrong early.
    archive += _entry("dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))
    return archive + _entry("TRAILER!!!", 0, b"")


def _entry(name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    """One file of a cpio archive in the `newc` format."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def has_tools() -> "str | None":
    """A program of the host that is missing."""
    tools = ("mkfs.ext4", "e2fsck", "debugfs", "dpkg-deb")
    places = "/usr/sbin:/sbin:/usr/bin:/bin"
    return next((tool for tool in tools if not shutil.which(tool, path=places)), None)
