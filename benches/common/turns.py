"""Fairness between competitors: who begins, and what each of them finds."""

import os
from typing import TypeVar

Entry = TypeVar("Entry")


def rotated(entries: list[Entry], number: int) -> list[Entry]:
    """Another one comes first in each round, and every second round goes backwards."""
    if not entries:
        return []
    first = number % len(entries)
    turned = entries[first:] + entries[:first]
    return turned[::-1] if number % 2 else turned


def start_cold(path: str) -> None:
    """No writes of the run before are under way any more, and nothing of the file or device is in memory."""
    os.sync()
    # Not /proc/sys/vm/drop_caches: it evicts the programs too, and their cold start is not what is compared.
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
