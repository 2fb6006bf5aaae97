"""Medians, spreads and ratios of the rounds: as one markdown table for people and as JSON for programs."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from figures import ABSENT, Spread, environment, markdown
from peers import NAMES
from session import Session
from trial import NO_GUEST, SHARES, Felt, Run

Key = tuple[str, str, str]
Groups = dict[Key, list[Run]]

_HEADINGS = [
    "disk",
    "guest",
    "peer",
    "IOPS (min–max)",
    "p50, ms",
    "p99, ms",
    "p99.9, ms",
    "worst, ms",
    "backup, MiB/s",
    "of the sweep alone",
    "IOPS, ours ÷ theirs",
    "p50, theirs ÷ ours",
    "p99.9, theirs ÷ ours",
]


@dataclass(frozen=True)
class Summary:
    """One row: a peer under a workload. Ratios are those within rounds; above 1 ours is the better one."""

    phase: str
    workload: str
    peer: str
    rounds: int
    iops: Spread | None
    p50_ms: Spread | None
    p99_ms: Spread | None
    p999_ms: Spread | None
    worst_ms: Spread | None
    backup_mib_per_second: Spread | None
    of_sweep_alone: Spread | None
    iops_ratio: Spread | None
    p50_ratio: Spread | None
    p999_ratio: Spread | None
    notes: list[str]


def summarize(runs: list[Run]) -> list[Summary]:
    """A row for each peer under each workload, in the order of the first round."""
    groups: Groups = {}
    for run in runs:
        groups.setdefault((run.phase, run.workload, run.peer), []).append(run)
    # Turns change the order of peers; a table does not.
    order = list(dict.fromkeys((phase, workload) for phase, workload, _ in groups))
    keys = sorted(groups, key=lambda key: (order.index(key[:2]), NAMES.index(key[2])))
    return [_summary(key, groups) for key in keys]


def table(summaries: list[Summary]) -> str:
    """The markdown table."""
    return markdown(_HEADINGS, (_row(summary) for summary in summaries))


def save(path: str, chosen: argparse.Namespace, summaries: list[Summary], session: Session) -> None:
    """All that was measured, and where."""
    results = {
        "environment": environment(session.workdir, session.programs()),
        "size": chosen.size,
        "rounds": chosen.rounds,
        "seconds": chosen.seconds,
        "speed_limit": session.speed,
        "qemu_aio": session.qemu_aio,
        "shares_of_waits_ms": SHARES,
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in session.runs],
        "failures": [asdict(failure) for failure in session.failures],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
        file.write("\n")


def _summary(key: Key, groups: Groups) -> Summary:
    phase, workload, peer = key
    runs = groups[key]
    ours = groups.get((phase, workload, runs[0].rival), [])
    if peer == runs[0].rival:
        ours = []
    return Summary(
        phase=phase,
        workload=workload,
        peer=peer,
        rounds=len(runs),
        iops=_spread(runs, lambda felt: felt.iops),
        p50_ms=_spread(runs, lambda felt: felt.p50_ms),
        p99_ms=_spread(runs, lambda felt: felt.p99_ms),
        p999_ms=_spread(runs, lambda felt: felt.p999_ms),
        worst_ms=_spread(runs, lambda felt: felt.worst_ms),
        backup_mib_per_second=_backup_speed(runs),
        of_sweep_alone=_of_sweep_alone(runs, groups.get((phase, NO_GUEST, peer), [])),
        iops_ratio=_paired(runs, ours, lambda theirs, our: our.iops / theirs.iops),
        p50_ratio=_paired(runs, ours, lambda theirs, our: theirs.p50_ms / our.p50_ms),
        p999_ratio=_paired(runs, ours, lambda theirs, our: theirs.p999_ms / our.p999_ms),
        notes=[f"round {run.round + 1}: {run.note}" for run in runs if run.note],
    )


def _spread(runs: list[Run], figure: Callable[[Felt], float]) -> Spread | None:
    known = [figure(run.felt) for run in runs if run.felt]
    return Spread.of(known) if known else None


def _backup_speed(runs: list[Run]) -> Spread | None:
    known = [run.backup_mib_per_second for run in runs if run.backup_mib_per_second]
    return Spread.of(known) if known else None


def _of_sweep_alone(runs: list[Run], sweeps: list[Run]) -> Spread | None:
    """The share of what the same peer's backup reaches without a guest, within each round."""
    alone = {sweep.round: sweep.backup_mib_per_second for sweep in sweeps}
    shares = []
    for run in runs:
        speed, limit = run.backup_mib_per_second, alone.get(run.round)
        if run.felt and speed and limit:
            shares.append(speed / limit)
    return Spread.of(shares) if shares else None


def _paired(runs: list[Run], ours: list[Run], ratio: Callable[[Felt, Felt], float]) -> Spread | None:
    """The ratio within each round; None where there is nothing to compare with."""
    by_round = {our.round: our.felt for our in ours}
    ratios = []
    for run in runs:
        our = by_round.get(run.round)
        # A guest that stood still for the whole backup has no ratio of its IOPS.
        if run.felt and our and run.felt.iops and our.iops:
            ratios.append(ratio(run.felt, our))
    return Spread.of(ratios) if ratios else None


def _row(summary: Summary) -> list[str]:
    return [
        summary.phase,
        summary.workload,
        summary.peer,
        _show(summary.iops, 0),
        _show(summary.p50_ms, 2),
        _show(summary.p99_ms, 2),
        _show(summary.p999_ms, 2),
        _show(summary.worst_ms, 1),
        _show(summary.backup_mib_per_second, 0),
        _show(summary.of_sweep_alone, 2),
        _show(summary.iops_ratio, 2),
        _show(summary.p50_ratio, 2),
        _show(summary.p999_ratio, 2),
    ]


def _show(spread: Spread | None, digits: int) -> str:
    return spread.show(digits) if spread else ABSENT
