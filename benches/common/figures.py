"""Medians and spreads, the table for people, and what a reader of figures has to know about the machine."""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median

ABSENT = "–"


@dataclass(frozen=True)
class Spread:
    """A median, and how far the runs lie apart."""

    median: float
    smallest: float
    largest: float

    @staticmethod
    def of(values: Iterable[float]) -> "Spread":
        """Of at least one value."""
        known = list(values)
        return Spread(median(known), min(known), max(known))

    def show(self, digits: int) -> str:
        """As it stands in the table; a single run has no spread."""
        if self.smallest == self.largest:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.smallest:.{digits}f}–{self.largest:.{digits}f})"


def markdown(headings: list[str], rows: Iterable[list[str]]) -> str:
    """A markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def environment(workdir: str, programs: list[str]) -> dict[str, str | int | None]:
    """The machine, and the versions of the programs that were measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "file_system": file_system(workdir),
        **{os.path.basename(program): _first_line([program, "--version"]) for program in programs},
    }


def file_system(path: str) -> str | None:
    """The type of the file system that holds the path."""
    return _first_line(["findmnt", "--noheadings", "--output", "FSTYPE", "--target", path])


def _first_line(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    lines = result.stdout.splitlines()
    return lines[0] if lines else None
