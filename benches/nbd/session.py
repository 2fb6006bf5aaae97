"""One call of the program: the rounds, in which everybody takes a turn, and what came of them."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import guest
import servers
import trial
from content import Incompressible, write_extents
from figures import file_system
from guest import Workload
from layout import contiguous
from peers import Peer, all_peers
from servers import QemuServer
from trial import BACKUP, IDLE, NO_GUEST, Place, Run, Times
from turns import rotated
from units import MIB, format_size
from workspace import Refused, Skipped, Workspace, require_space

_NO_ENGINE = "there is no engine-cli at {}: build it with `cargo build --release`, or name it with --binary"

# fio takes some tenths of a second to start.
_LEAD = 2.0
_QUICK_TIMES = Times(lead=0.8, measured=0.5)

_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Failure:
    """A peer that could not do a trial, and is left out from then on."""

    phase: str
    workload: str
    peer: str
    reason: str


class Session:
    """Holds the rounds and gathers what they gave."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen = chosen
        if not guest.probe():
            raise Skipped("fio with its nbd engine is missing: run .ci/install")
        self.workdir = chosen.workdir or _default_workdir()
        self._workloads = [workload for workload in guest.WORKLOADS if workload.name in chosen.workloads]
        self._times = _QUICK_TIMES if chosen.quick else Times(_LEAD, chosen.seconds)
        self._peers: list[Peer] = []
        self.speed: int | None = chosen.speed
        self.qemu_aio: str | None = None
        self.runs: list[Run] = []
        self.failures: list[Failure] = []

    def hold(self) -> None:
        """Makes the disk and holds all rounds."""
        require_space(self.workdir, self._chosen.size * (2 if BACKUP in self._chosen.phases else 1))
        with Workspace("nbd-bench") as workspace:
            place = self._make_place(workspace)
            self._peers = self._usable_peers(place)
            for number in range(self._chosen.rounds):
                if IDLE in self._chosen.phases:
                    self._idle_round(place, number)
                if BACKUP in self._chosen.phases:
                    self._backup_round(place, number)

    def programs(self) -> list[str]:
        """All that was run."""
        return [guest.PROGRAM, *dict.fromkeys(peer.program for peer in self._peers)]

    def _make_place(self, workspace: Workspace) -> Place:
        directory = workspace.directory(self.workdir)
        # Sockets have short paths, wherever the disk is.
        sockets = workspace.directory(tempfile.gettempdir())
        if not servers.fits_sockets(sockets):
            raise Refused(f"{sockets} is too long for sockets: set TMPDIR to a shorter path")
        scratch = os.path.join(directory, "scratch")
        os.mkdir(scratch)
        size = self._chosen.size
        disk = os.path.join(directory, "disk.raw")
        _say(f"disk: {format_size(size)}, incompressible, in {self.workdir} ({file_system(self.workdir)})")
        write_extents(disk, size, contiguous(size), Incompressible())
        return Place(disk, size, os.path.join(directory, "target.raw"), sockets, scratch)

    def _usable_peers(self, place: Place) -> list[Peer]:
        """Those that are asked for and can be run; says who cannot."""
        chosen = self._chosen
        if any(name.startswith("qemu") for name in chosen.peers) and servers.is_installed(QemuServer.program):
            self.qemu_aio = servers.best_qemu_aio(place.disk, place.sockets)
            _say(f"{QemuServer.program}: " + (f"aio={self.qemu_aio}" if self.qemu_aio else "cannot open the disk"))
        missing, usable = set(), []
        for peer in all_peers(chosen.binary, self.qemu_aio or "threads"):
            if peer.name not in chosen.peers:
                continue
            if servers.is_installed(peer.program):
                usable.append(peer)
            else:
                missing.add(peer.program)
        for program in sorted(missing):
            is_ours = program == chosen.binary
            reason = _NO_ENGINE.format(program) if is_ours else f"{program} is missing and left out: run .ci/install"
            _say(f"NOTE: {reason}")
        if not usable or chosen.quick and all(peer.program != chosen.binary for peer in usable):
            raise Refused(_NO_ENGINE.format(chosen.binary))
        return usable

    def _idle_round(self, place: Place, number: int) -> None:
        peers = [peer for peer in self._peers if peer.idle]
        for workload in self._workloads:
            for peer in rotated(peers, number):
                self._try(IDLE, workload.name, peer, partial(trial.idle, place, self._times, peer, workload, number))

    def _backup_round(self, place: Place, number: int) -> None:
        free = [peer for peer in self._peers if peer.backs_up and not peer.is_limited]
        limited = [peer for peer in self._peers if peer.is_limited]
        for peer in rotated(free, number):
            self._try(BACKUP, NO_GUEST, peer, partial(trial.sweep, place, peer, None, number))
        if limited and not self.speed:
            self.speed = self._half_speed()
        for peer in rotated(limited, number):
            self._try(BACKUP, NO_GUEST, peer, partial(trial.sweep, place, peer, self.speed, number))
        for workload in self._workloads:
            self._backups(place, free + limited, workload, number)

    def _backups(self, place: Place, peers: list[Peer], workload: Workload, number: int) -> None:
        for peer in rotated(peers, number):
            attempt = partial(trial.backup, place, self._times, peer, workload, self.speed, number)
            self._try(BACKUP, workload.name, peer, attempt)

    def _half_speed(self) -> int:
        """A limit that everybody can keep up with."""
        alone = [run.backup_mib_per_second for run in self.runs if run.workload == NO_GUEST]
        known = [speed for speed in alone if speed]
        if not known:
            raise Refused("nobody's backup without a limit was measured to take half of its speed: give --speed")
        speed = max(1, int(min(known) / 2)) * MIB
        _say(f"speed limit: {speed // MIB} MiB/s")
        return speed

    def _try(self, phase: str, workload: str, peer: Peer, attempt: Callable[[], Run]) -> None:
        if any(failure.peer == peer.name for failure in self.failures):
            return
        try:
            run = attempt()
        except trial.FAILURES as failed:
            self.failures.append(Failure(phase, workload, peer.name, str(failed)))
            _say(f"{phase} {workload} {peer.name} FAILED: {failed}")
            return
        self.runs.append(run)
        _say(f"round {run.round + 1}/{self._chosen.rounds}  {phase:6}  {workload:8}  {peer.name:12}  {_figures(run)}")


def _figures(run: Run) -> str:
    parts = []
    if run.backup_mib_per_second:
        parts.append(f"{run.backup_mib_per_second:5.0f} MiB/s")
    if run.felt:
        felt = run.felt
        waits = f"p50 {felt.p50_ms:.2f}  p99 {felt.p99_ms:.2f}  p99.9 {felt.p999_ms:.2f}  worst {felt.worst_ms:.1f} ms"
        parts.append(f"{felt.iops:6.0f} IOPS  {waits}")
    if run.note:
        parts.append(f"NOTE: {run.note}")
    return "  ".join(parts)


def _default_workdir() -> str:
    """The directory for temporary files if that is on a disk."""
    for path in (tempfile.gettempdir(), "/var/tmp"):
        if os.path.isdir(path) and file_system(path) not in _IN_MEMORY:
            return path
    raise Refused("temporary files are in memory here: name a directory on a disk with --workdir")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
