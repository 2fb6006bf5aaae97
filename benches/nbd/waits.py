"""Latencies of a closed loop, corrected for coordinated omission.

A guest that waits for its request issues no other one meanwhile, so that a stall of a second is one slow request
among thousands of fast ones. What a request that arrives at a random instant would see is another thing: it falls into
a request of latency *l* with a chance in proportion to *l*, and waits for what is left of that. So it waits longer than
*x* with the chance Σ max(0, l − x) ÷ Σ l, and a corrected percentile is the *x* at which that is what is left to one.
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

# Of a request's instants, those that wait longer: what stands in tables.
P50, P99, P999 = 0.5, 0.01, 0.001


class Waits:
    """Latencies in nanoseconds, sorted once. At least one of them."""

    def __init__(self, latencies: Iterable[int]) -> None:
        self._longest_first = sorted(latencies, reverse=True)
        self._sums = list(accumulate(self._longest_first))

    @property
    def count(self) -> int:
        """How many requests there are."""
        return len(self._longest_first)

    @property
    def total(self) -> int:
        """The sum of all latencies, in nanoseconds."""
        return self._sums[-1]

    @property
    def longest(self) -> int:
        """The longest latency, in nanoseconds."""
        return self._longest_first[0]

    def exceeded_by(self, share: float) -> float:
        """The wait that this share of all instants (0 to 1) exceeds, in nanoseconds; exact."""
        target = share * self.total
        # Between the number-th longest and the one after it, the excess over x is sum - number * x: find where that
        # passes the target. Down to the next shorter one it grows with the number.
        number = 1 + bisect_left(range(1, self.count + 1), target, key=self._excess_over_next)
        return (self._sums[number - 1] - target) / number

    def _excess_over_next(self, number: int) -> int:
        """Σ max(0, l − x) for the x that is the latency after the `number` longest ones."""
        following = self._longest_first[number] if number < self.count else 0
        return self._sums[number - 1] - number * following
