"""The arithmetic of corrected latencies against its definition, and what is cut out of fio's logs."""

import os
import random
import sys
import tempfile
import unittest

sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "common"))

from guest import Log
from waits import P50, P99, P999, Waits


def naive_share(latencies: list[int], wait: float) -> float:
    """The definition, word for word."""
    return sum(max(0.0, latency - wait) for latency in latencies) / sum(latencies)


def naive_wait(latencies: list[int], share: float) -> float:
    """By halving, since the share falls as the wait grows."""
    low, high = 0.0, float(max(latencies))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if naive_share(latencies, middle) > share else (low, middle)
    return (low + high) / 2


class CorrectedWaits(unittest.TestCase):
    """`Waits.exceeded_by`."""

    def test_by_hand(self) -> None:
        # One request of 10: a random instant waits evenly between 0 and 10.
        self.assertAlmostEqual(Waits([10]).exceeded_by(P50), 5)
        self.assertAlmostEqual(Waits([10, 10, 10]).exceeded_by(0.1), 9)
        # 100 of 1 and one stall of 100: half of the time lies in the stall, so one in a hundred waits more than 98.
        self.assertAlmostEqual(Waits([1] * 100 + [100]).exceeded_by(P99), 98)
        # From 1 downwards the short ones take part.
        self.assertAlmostEqual(Waits([1, 1, 4]).exceeded_by(P50), 1)
        self.assertAlmostEqual(Waits([1, 1, 4]).exceeded_by(0.75), 0.5)

    def test_ends(self) -> None:
        waits = Waits([3, 9, 1])
        self.assertEqual(waits.exceeded_by(0), 9)
        self.assertEqual(waits.exceeded_by(1), 0)
        self.assertEqual((waits.count, waits.total, waits.longest), (3, 13, 9))

    def test_against_the_definition(self) -> None:
        generator = random.Random(1)
        for _ in range(200):
            largest = 10 ** generator.randint(1, 9)
            latencies = [generator.randint(1, largest) for _ in range(generator.randint(1, 60))]
            waits = Waits(latencies)
            for share in (P50, P99, P999, generator.random()):
                found = waits.exceeded_by(share)
                self.assertAlmostEqual(naive_share(latencies, found), share, delta=1e-9)
                self.assertAlmostEqual(found, naive_wait(latencies, share), delta=1e-6 * largest)

    def test_plain_percentiles_would_hide_it(self) -> None:
        latencies = [100_000] * 10_000 + [1_000_000_000]
        self.assertEqual(sorted(latencies)[int(len(latencies) * 0.999)], 100_000)
        self.assertGreater(Waits(latencies).exceeded_by(P99), 0.97e9)


class Logs(unittest.TestCase):
    """`Log`."""

    def test_keeps_what_was_under_way(self) -> None:
        lines = [
            # (ended at ms, took ms)
            (1_000, 5),  # over before
            (1_004, 5),  # began before, ended within
            (1_020, 2),  # within
            (1_400, 395),  # began within, ended after: the stall that matters
            (1_500, 490),  # likewise
            (1_500, 2),  # began after
        ]
        with tempfile.NamedTemporaryFile("w") as file:
            file.writelines(f"{end}, {took * 1_000_000}, 1, 4096, 0\n" for end, took in lines)
            file.flush()
            log = Log(file.name)
        found = log.between(1.002, 1.03)
        self.assertEqual(sorted(nanos // 1_000_000 for nanos in found.latencies), [2, 5, 395, 490])
        self.assertEqual(found.completed, 2)
        self.assertEqual(log.last, 1.5)
        self.assertEqual(log.first, 1.0)


if __name__ == "__main__":
    unittest.main()
