"""Plots: of all instants, the share that waits longer, over that wait. Both axes are logarithmic."""

import math
import os
from statistics import median
from xml.sax.saxutils import escape

from peers import NAMES
from trial import SHARES, Run

_WIDTH, _HEIGHT = 900, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 45, 55

# Milliseconds, and shares.
_SHORTEST, _LONGEST = 0.01, 10_000.0
_RAREST = SHARES[-1]

_COLOURS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080"]

_WHAT = {"idle": "waits on an idle disk", "backup": "waits during a backup"}

Points = list[tuple[float, float]]


def save_all(directory: str, runs: list[Run]) -> None:
    """A picture for each phase, with one part for each workload and one line for each peer."""
    os.makedirs(directory, exist_ok=True)
    for phase in dict.fromkeys(run.phase for run in runs if run.felt):
        with open(os.path.join(directory, f"latencies-{phase}.svg"), "w", encoding="utf-8") as file:
            file.write(picture([run for run in runs if run.phase == phase and run.felt]))


def picture(runs: list[Run]) -> str:
    """One SVG of the runs of a phase."""
    workloads = list(dict.fromkeys(run.workload for run in runs))
    height = _HEIGHT * len(workloads)
    parts = [
        f'<svg width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, workload in enumerate(workloads):
        parts.append(f'<g transform="translate(0,{_HEIGHT * number})">')
        parts += _panel([run for run in runs if run.workload == workload])
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(runs: list[Run]) -> list[str]:
    title = f"{runs[0].workload}: {_WHAT[runs[0].phase]}"
    parts = [_text(_WIDTH / 2, 25, title, 'text-anchor="middle" font-size="18"'), *_mesh()]
    peers = [name for name in NAMES if any(run.peer == name for run in runs)]
    for peer in peers:
        points = _curve([run for run in runs if run.peer == peer])
        path = " ".join(f"{_x(wait):.1f},{_y(share):.1f}" for wait, share in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(peer)}" stroke-width="2"/>')
    return [*parts, *_legend(peers)]


def _curve(runs: list[Run]) -> Points:
    """The median of the rounds at each share."""
    curves = [run.felt.waits_ms for run in runs if run.felt]
    points = [(median(waits), share) for share, waits in zip(SHARES, zip(*curves))]
    return [(wait, share) for wait, share in points if wait >= _SHORTEST]


def _mesh() -> list[str]:
    """The frame, a line for each decade, thin ones between, and what the axes mean."""
    parts = []
    for decade in _decades(_SHORTEST, _LONGEST):
        for step in range(1, 10):
            if decade * step <= _LONGEST:
                parts.append(_line(_x(decade * step), _TOP, _x(decade * step), _HEIGHT - _BOTTOM, step == 1))
        parts.append(_text(_x(decade), _HEIGHT - _BOTTOM + 18, f"{decade:g}", 'text-anchor="middle"'))
    for decade in _decades(_RAREST, 1.0):
        for step in range(1, 10):
            if decade * step <= 1:
                parts.append(_line(_LEFT, _y(decade * step), _WIDTH - _RIGHT, _y(decade * step), step == 1))
        parts.append(_text(_LEFT - 8, _y(decade) + 4, f"{decade:g}", 'text-anchor="end"'))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 20 {middle})"'
    parts.append(_text(20, middle, "share of instants that wait longer", turned))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 15, "wait, ms", 'text-anchor="middle"'))
    return parts


def _legend(peers: list[str]) -> list[str]:
    # Lower left: short waits are common, so that no line comes there.
    line = 18
    height = line * len(peers) + 8
    left, top = _LEFT + 10, _HEIGHT - _BOTTOM - height - 10
    box = f'<rect x="{left}" y="{top}" width="130" height="{height}" fill="white" stroke="black"/>'
    parts = [box]
    for number, peer in enumerate(peers):
        y = top + line * number + 13
        colour = f'stroke="{_colour(peer)}" stroke-width="2"'
        parts.append(f'<line x1="{left + 8}" y1="{y}" x2="{left + 28}" y2="{y}" {colour}/>')
        parts.append(_text(left + 36, y + 4, peer, ""))
    return parts


def _decades(smallest: float, largest: float) -> list[float]:
    first, last = round(math.log10(smallest)), round(math.log10(largest))
    return [10.0**power for power in range(first, last + 1)]


def _x(wait: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _part(min(wait, _LONGEST), _SHORTEST, _LONGEST)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * _part(share, _RAREST, 1.0)


def _part(value: float, smallest: float, largest: float) -> float:
    """Where it lies between the ends of a logarithmic axis, 0 to 1."""
    return math.log(value / smallest) / math.log(largest / smallest)


def _colour(peer: str) -> str:
    return _COLOURS[NAMES.index(peer)]


def _line(x1: float, y1: float, x2: float, y2: float, is_main: bool) -> str:
    colour = "#bbbbbb" if is_main else "#eeeeee"
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, content: str, options: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" {options}>{escape(content)}</text>'
