"""One trial: a server is started, a guest works on its export, and a backup may run meanwhile."""

import os
import time
from dataclasses import dataclass

from guest import Guest, GuestFailed, Part, Workload
from peers import Peer
from qmp import Qmp, QmpFailed, seconds_of
from servers import DISK, TARGET, Daemon, Server, ServerFailed
from turns import start_cold
from units import MIB
from waits import P50, P99, P999, Waits

IDLE, BACKUP = "idle", "backup"
NO_GUEST = "none"

FAILURES = (GuestFailed, ServerFailed, QmpFailed, OSError)

_NANOS_PER_MS = 1e6

# A backup that takes longer is stuck.
_BACKUP_SECONDS = 1800.0

# So long the guest goes on after a backup, so that what was stuck until its end comes back as it would.
_TAIL_SECONDS = 0.5

# Shares of all instants at which waits are kept for plots: four decades, in steps of which 20 are one.
SHARES = [10 ** (-step / 20) for step in range(81)]

# A target of a disk without holes takes this much of its space at least, or somebody copied nothing.
_ALLOCATED_PER_CENT = 99
_ST_BLOCK = 512


@dataclass(frozen=True)
class Felt:
    """What the guest felt. Waits are corrected for coordinated omission; `worst_ms` is the longest request."""

    seconds: float
    requests: int
    iops: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    worst_ms: float
    waits_ms: list[float]

    @staticmethod
    def of(part: Part, seconds: float) -> "Felt":
        """Fails when there is nothing to say anything about."""
        if not part.latencies:
            raise GuestFailed("the guest had no request under way")
        waits = Waits(part.latencies)
        p50, p99, p999, *curve = (waits.exceeded_by(share) / _NANOS_PER_MS for share in (P50, P99, P999, *SHARES))
        iops = part.completed / seconds
        return Felt(seconds, part.completed, iops, p50, p99, p999, waits.longest / _NANOS_PER_MS, curve)


@dataclass(frozen=True)
class Run:
    """What came of one trial. `felt` is None without a guest, `backup_mib_per_second` without a backup."""

    phase: str
    workload: str
    peer: str
    rival: str
    round: int
    felt: Felt | None = None
    backup_mib_per_second: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Place:
    """Where trials happen: the disk and the target of its backups, and directories for sockets and for fio."""

    disk: str
    size: int
    target: str
    sockets: str
    scratch: str


@dataclass(frozen=True)
class Times:
    """Of the guest, in seconds: until it is measured, and how long it is where no backup says that."""

    lead: float
    measured: float


def idle(place: Place, times: Times, peer: Peer, workload: Workload, number: int) -> Run:
    """The guest alone."""
    start_cold(place.disk)
    written = os.stat(place.disk).st_mtime_ns
    with peer.serve(place.disk, place.sockets) as server, _guest(place, server, workload, number) as guest:
        guest.run_for(times.lead)
        server.check_mode()
        # The end is what is measured: how long fio takes to start is not known.
        guest.run_for(times.measured)
        log = guest.finish()
    if os.stat(place.disk).st_mtime_ns == written:
        raise ServerFailed(f"{peer.name}: nothing of what the guest wrote has reached the disk")
    start = max(log.last - times.measured, log.first)
    part = log.between(start, log.last)
    return Run(IDLE, workload.name, peer.name, peer.rival, number, Felt.of(part, max(log.last - start, 0.001)))


def sweep(place: Place, peer: Peer, speed: int | None, number: int) -> Run:
    """A backup without a guest: what shares of throughput are shares of."""
    _make_target(place)
    start_cold(place.disk)
    with peer.serve(place.disk, place.sockets) as server:
        start, end = _back_up(place, peer, server, speed)
    _check_target(place)
    return Run(BACKUP, NO_GUEST, peer.name, peer.rival, number, None, place.size / MIB / (end - start))


def backup(place: Place, times: Times, peer: Peer, workload: Workload, speed: int | None, number: int) -> Run:
    """The guest during a full backup to another file, and nothing of before and after it."""
    _make_target(place)
    start_cold(place.disk)
    with peer.serve(place.disk, place.sockets) as server, _guest(place, server, workload, number) as guest:
        guest.run_for(times.lead)
        start, end = _back_up(place, peer, server, speed)
        server.check_mode()
        guest.run_for(_TAIL_SECONDS)
        log = guest.finish()
    _check_target(place)
    if log.first >= start:
        raise GuestFailed("fio had not begun when the backup did: the time before it is too short")
    # Within the milliseconds of its log and one more for the clocks.
    short = end - log.last - 0.002
    note = f"fio's last request came back {short:.3f} s before the backup's end" if short > 0 else None
    felt = Felt.of(log.between(start, end), end - start)
    speed_found = place.size / MIB / (end - start)
    return Run(BACKUP, workload.name, peer.name, peer.rival, number, felt, speed_found, note)


def _guest(place: Place, server: Server, workload: Workload, number: int) -> Guest:
    return Guest(server.uri, workload, number + 1, place.scratch)


def _back_up(place: Place, peer: Peer, server: Server, speed: int | None) -> tuple[float, float]:
    """When the backup was asked for, and when its daemon says that it was complete, in seconds since 1970."""
    if not isinstance(server, Daemon) or server.qmp is None:
        raise ServerFailed(f"{peer.name} makes no backups")
    try:
        return _run_job(place, peer, server, server.qmp, speed)
    except QmpFailed as failed:
        raise QmpFailed(f"{failed} ({peer.program}: {server.last_words()})") from failed


def _run_job(place: Place, peer: Peer, server: Daemon, qmp: Qmp, speed: int | None) -> tuple[float, float]:
    qmp.command("blockdev-add", server.target_node(place.target))
    job: dict[str, object] = {"job-id": "job", "device": DISK, "target": TARGET, "sync": "full"}
    if peer.is_limited and speed:
        job["speed"] = speed
    start = time.time()
    qmp.command("blockdev-backup", {**job, **(peer.backup_options or {})})
    ended = qmp.wait_for("BLOCK_JOB_COMPLETED", _BACKUP_SECONDS)
    outcome = ended["data"]
    if "error" in outcome:
        raise QmpFailed(f"the backup failed: {outcome['error']}")
    if outcome["offset"] != outcome["len"]:
        raise QmpFailed(f"the backup ended after {outcome['offset']} of {outcome['len']} bytes")
    return start, seconds_of(ended)


def _make_target(place: Place) -> None:
    """A new file of the disk's length which is all hole, as `qemu-img create` makes it."""
    if os.path.exists(place.target):
        os.unlink(place.target)
    with open(place.target, "xb") as file:
        file.truncate(place.size)


def _check_target(place: Place) -> None:
    state = os.stat(place.target)
    if state.st_size != place.size:
        raise ServerFailed(f"the backup has {state.st_size} bytes, the disk {place.size}")
    if state.st_blocks * _ST_BLOCK < place.size * _ALLOCATED_PER_CENT // 100:
        raise ServerFailed(f"of a disk without holes the backup has {state.st_blocks * _ST_BLOCK} bytes")
