"""Where the data of a source lies: one extent, or many scattered ones drawn from a seeded generator."""

import math
import random
from dataclasses import dataclass

from units import ALIGNMENT

# The same seed draws the same disk on every machine, so that two people compare the same work.
SEED = 20130


@dataclass(frozen=True)
class Extent:
    """A run of data; everything between extents is a hole."""

    offset: int
    length: int


def contiguous(size: int) -> list[Extent]:
    """One extent over the whole disk."""
    return [Extent(0, size)]


def scattered(span: int, data: int, smallest: int, largest: int) -> list[Extent]:
    """Extents of `smallest` to `largest` bytes, `data` in all, spread over `span` with a hole before each."""
    generator = random.Random(SEED)
    lengths = _draw_lengths(generator, data, smallest, largest)
    gaps = _draw_gaps(generator, span - data, len(lengths))
    extents, position = [], 0
    for gap, length in zip(gaps, lengths):
        position += gap
        extents.append(Extent(position, length))
        position += length
    return extents


def pieces(extents: list[Extent], largest: int) -> list[Extent]:
    """The same data cut into requests of at most `largest` bytes."""
    return [
        Extent(extent.offset + start, min(largest, extent.length - start))
        for extent in extents
        for start in range(0, extent.length, largest)
    ]


def _draw_lengths(generator: random.Random, data: int, smallest: int, largest: int) -> list[int]:
    """Lengths spread evenly over the orders of magnitude; the last one is what remains."""
    lengths, remaining = [], data
    while remaining:
        exact = math.exp(generator.uniform(math.log(smallest), math.log(largest)))
        length = min(remaining, max(smallest, _aligned_down(int(exact))))
        lengths.append(length)
        remaining -= length
    return lengths


def _draw_gaps(generator: random.Random, free: int, count: int) -> list[int]:
    """`count` aligned gaps of at least one block each, together no more than `free`."""
    spare = free - count * ALIGNMENT
    if spare < 0:
        raise ValueError("the span is too small to keep the extents apart")
    cuts = sorted(_aligned_down(generator.randrange(spare + 1)) for _ in range(count))
    return [ALIGNMENT + cut - previous for previous, cut in zip([0, *cuts], cuts)]


def _aligned_down(size: int) -> int:
    return size - size % ALIGNMENT
