"""What the virtual machine is made of, from Debian's packages. Nothing is installed: they are unpacked into a directory, as any user.

The package lists are private as well, so that backports are to be had on a system that does not have them, and no
package of the system is ever touched. (Installing `qemu-system-x86` of Debian 12 would remove a newer `qemu-utils`.)
"""

import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_MIRROR = "http://deb.debian.org"
# What the guest's kernel needs beyond itself to see a virtio disk; file systems are built in or found by their names.
_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")


class Unavailable(Exception):
    """Something that the test needs cannot be had."""


class Parts(NamedTuple):
    """Where things are."""

    emulator: list[str]
    environment: dict[str, str]
    kernel: Path
    modules: list[Path]  # in the order in which they have to be loaded
    busybox: Path


def get(directory: Path) -> Parts:
    """Everything, downloaded unless `directory` has it already."""
    root = directory / "root"
    if not root.is_dir():
        archives = _download(directory)
        aside = directory / "unpacking"
        shutil.rmtree(aside, ignore_errors=True)
        for archive in archives:
            _run("dpkg-deb", "-x", str(archive), str(aside))
        aside.rename(root)
    kernels = sorted(root.glob("boot/vmlinuz-*"))
    if not kernels:
        raise Unavailable(f"no kernel in {root}: remove {directory} and try again")
    busybox = next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists())
    emulator, environment = _emulator(root)
    return Parts(emulator, environment, kernels[-1], _modules(root), busybox)


def _emulator(root: Path) -> tuple[list[str], dict[str, str]]:
    libraries = [str(root / "usr/lib" / name) for name in ("x86_64-linux-gnu", "x86_64-linux-gnu/qemu", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)}
    program = root / "usr/bin/qemu-system-x86_64"
    firmware = [str(root / "usr/share" / name) for name in ("qemu", "seabios", "ipxe/qemu")]
    return [str(program), *(word for place in firmware for word in ("-L", place))], environment


def _modules(root: Path) -> list[Path]:
    found = {path.name.split(".")[0].replace("-", "_"): path for path in root.glob("**/kernel/**/*.ko*")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = found.get(name)
        if path is None or path in order:
            return  # built in, or had
        for needed in _depends(path):
            add(needed)
        order.append(path)

    for name in _MODULES:
        add(name)
    return order


def contents(module: Path) -> bytes:
    """A kernel module, uncompressed."""
    raw = module.read_bytes()
    return lzma.decompress(raw) if module.suffix == ".xz" else raw


def _depends(module: Path) -> list[str]:
    found = re.search(rb"\0depends=([^\0]*)\0", contents(module))
    names = found[1].decode().replace("-", "_") if found else ""
    return [name for name in names.split(",") if name]


def _download(directory: Path) -> list[Path]:
    """The archives of all packages that are needed and not installed."""
    release = _release()
    apt = directory / "apt"
    archives = apt / "archives"
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    suites = [("debian", release), ("debian", f"{release}-backports"), ("debian-security", f"{release}-security")]
    lines = [f"deb [signed-by={_KEYRING}] {_MIRROR}/{tree} {suite} main\n" for tree, suite in suites]
    (apt / "sources.list").write_text("".join(lines))
    options = [
        f"Dir::State::lists={apt}/lists",
        f"Dir::Cache={apt}",
        f"Dir::Cache::archives={archives}",
        f"Dir::Etc::sourcelist={apt}/sources.list",
        "Dir::Etc::sourceparts=-",
        "Debug::NoLocking=1",
        "APT::Sandbox::User=",
    ]
    configured = [word for option in options for word in ("-o", option)]
    print("vm-test: downloading some 45 MB of packages", flush=True)
    _run("apt-get", *configured, "-q", "update")
    install = ("install", "-q", "-y", "--no-remove", "--no-install-recommends", "--download-only")
    # Also where it is installed already.
    _run("apt-get", *configured, *install, "--reinstall", "-t", f"{release}-backports", "qemu-system-x86")
    depends = _run("apt-cache", *configured, "depends", "linux-image-cloud-amd64")
    image = re.search(r"Depends: (linux-image-\S+)", depends)
    if not image:
        raise Unavailable("Debian has no linux-image-cloud-amd64 here")
    _run("apt-get", *configured, "-q", "download", "busybox-static", image[1], cwd=archives)
    return sorted(archives.glob("*.deb"))


def _release() -> str:
    with open("/etc/os-release") as lines:
        found = re.search(r"^VERSION_CODENAME=(\w+)$", lines.read(), re.MULTILINE)
    if not found or not shutil.which("apt-get"):
        raise Unavailable("this needs a Debian system, whose packages make the virtual machine")
    return found[1]


def _run(*command: str, cwd: "Path | None" = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:1])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
