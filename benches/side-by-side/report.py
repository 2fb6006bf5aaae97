"""Medians, spreads and ratios of the runs: as one markdown table for people and as JSON for programs."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

from contest import Failure, Run
from figures import ABSENT, Spread, environment, markdown
from tools import ENGINE
from units import MIB

Key = tuple[str, str, str]
Groups = dict[Key, list[Run]]

_PROGRAMS = ["fio", "qemu-img", "nbdcopy", "dd"]
_HEADINGS = [
    "workload",
    "tool",
    "MiB/s (min–max)",
    "engine ÷ tool (min–max)",
    "CPU s/GiB",
    "peak RSS MiB",
    "allocated ÷ source",
    "time ÷ dense (min–max)",
]


@dataclass(frozen=True)
class Summary:
    """One row: a tool on a workload."""

    workload: str
    case: str
    tool: str
    rounds: int
    is_limit: bool
    mib_per_second: Spread
    engine_speed_ratio: Spread | None
    cpu_per_gib: Spread
    peak_rss: int
    allocated_ratio: float | None
    time_to_dense: Spread | None


def summarize(runs: list[Run], source_allocation: dict[str, int], limits: set[str]) -> list[Summary]:
    """A row for each tool and case; `limits` names the tools of which the fastest is the device's limit."""
    groups: Groups = {}
    for run in runs:
        groups.setdefault((run.workload, run.case, run.tool), []).append(run)
    fastest = _fastest(groups, limits)
    return [_summary(key, groups, source_allocation, key in fastest) for key in groups]


def table(summaries: list[Summary]) -> str:
    """The markdown table."""
    return markdown(_HEADINGS, (_row(summary) for summary in summaries))


def save(path: str, summaries: list[Summary], runs: list[Run], failures: list[Failure], workdir: str) -> None:
    """All that was measured, and where."""
    results = {
        "environment": environment(workdir, _PROGRAMS),
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
        "failures": [asdict(failure) for failure in failures],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
        file.write("\n")


def _fastest(groups: Groups, limits: set[str]) -> set[tuple[str, str, str]]:
    """For each case the device benchmark with the best median."""
    best: dict[tuple[str, str], tuple[float, Key]] = {}
    for key, runs in groups.items():
        if key[2] in limits:
            speed = median(run.mib_per_second for run in runs)
            best[key[:2]] = max(best.get(key[:2], (0.0, key)), (speed, key))
    return {key for _, key in best.values()}


def _summary(key: Key, groups: Groups, source_allocation: dict[str, int], is_limit: bool) -> Summary:
    workload, case, tool = key
    runs = groups[key]
    allocated = [run.allocated for run in runs if run.allocated is not None]
    return Summary(
        workload=workload,
        case=case,
        tool=tool,
        rounds=len(runs),
        is_limit=is_limit,
        mib_per_second=Spread.of(run.mib_per_second for run in runs),
        engine_speed_ratio=_paired(runs, groups.get((workload, case, ENGINE), []), _speed_of_other),
        cpu_per_gib=Spread.of(run.cpu_per_gib for run in runs),
        peak_rss=max(run.peak_rss for run in runs),
        allocated_ratio=max(allocated) / source_allocation[case] if allocated else None,
        time_to_dense=_paired(runs, groups.get((workload, f"{workload}-as-dense", tool), []), _time_per_time),
    )


def _paired(runs: list[Run], others: list[Run], ratio: Callable[[Run, Run], float]) -> Spread | None:
    """The ratio within each round; None where there is nothing to compare with."""
    by_round = {other.round: other for other in others}
    ratios = [ratio(run, by_round[run.round]) for run in runs if run.round in by_round]
    if not ratios or runs[0] in others:
        return None
    return Spread.of(ratios)


def _speed_of_other(run: Run, engine: Run) -> float:
    return engine.mib_per_second / run.mib_per_second


def _time_per_time(run: Run, dense: Run) -> float:
    return run.seconds / dense.seconds


def _row(summary: Summary) -> list[str]:
    ratio, to_dense, allocated = summary.engine_speed_ratio, summary.time_to_dense, summary.allocated_ratio
    return [
        summary.case,
        f"{summary.tool} (limit)" if summary.is_limit else summary.tool,
        summary.mib_per_second.show(0),
        ratio.show(2) if ratio else ABSENT,
        f"{summary.cpu_per_gib.median:.3f}",
        f"{summary.peak_rss / MIB:.1f}",
        f"{allocated:.2f}" if allocated is not None else ABSENT,
        to_dense.show(2) if to_dense else ABSENT,
    ]
