"""Rows, ratios and pictures from made-up rounds."""

import math
import os
import sys
import unittest
import xml.etree.ElementTree as xml

sys.path.append(os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "common"))

import plot
import report
from trial import BACKUP, IDLE, NO_GUEST, SHARES, Felt, Run


def felt(iops: float, milliseconds: float) -> Felt:
    """A guest all of whose waits are in proportion to one figure."""
    curve = [milliseconds * (1 + math.log10(1 / share)) for share in SHARES]
    return Felt(1.0, int(iops), iops, milliseconds, 2 * milliseconds, 3 * milliseconds, 4 * milliseconds, curve)


def run(peer: str, number: int, iops: float, milliseconds: float, speed: float | None = None) -> Run:
    """A trial with a guest; with a backup if that has a speed."""
    rival = "engine-limit" if peer.endswith("limit") else "engine"
    return Run(BACKUP if speed else IDLE, "write-1", peer, rival, number, felt(iops, milliseconds), speed)


class Rows(unittest.TestCase):
    """`report.summarize`."""

    def test_ratios_are_those_within_rounds(self) -> None:
        # The machine is half as fast in the second round, and the qemu of the third has nothing to be compared with.
        runs = [run("qemu", 0, 100, 2), run("engine", 0, 200, 1), run("engine", 1, 100, 2), run("qemu", 1, 50, 6)]
        ours, theirs = report.summarize([*runs, run("qemu", 2, 75, 3)])
        self.assertEqual((ours.peer, theirs.peer, theirs.rounds), ("engine", "qemu", 3))
        assert theirs.iops_ratio and theirs.p999_ratio and theirs.iops
        self.assertEqual((theirs.iops_ratio.smallest, theirs.iops_ratio.largest), (2, 2))
        self.assertEqual((theirs.p999_ratio.smallest, theirs.p999_ratio.largest), (2, 3))
        self.assertEqual((theirs.iops.median, theirs.iops.smallest, theirs.iops.largest), (75, 50, 100))
        self.assertIsNone(ours.iops_ratio)

    def test_a_limit_is_compared_with_a_limit(self) -> None:
        peers = [("engine", 1), ("engine-limit", 2), ("qemu-limit", 8)]
        rows = report.summarize([run(peer, 0, 100, wait, 50) for peer, wait in peers])
        assert rows[2].p50_ratio
        self.assertEqual(rows[2].p50_ratio.median, 4)

    def test_throughput_is_compared_with_the_sweep_of_the_round(self) -> None:
        sweeps = [Run(BACKUP, NO_GUEST, "engine", "engine", number, None, 100 + 100 * number) for number in (0, 1)]
        runs = [run("engine", 0, 1, 1, 80), run("engine", 1, 1, 1, 150)]
        alone, busy = report.summarize([*sweeps, *runs])
        assert busy.of_sweep_alone
        self.assertEqual((alone.workload, alone.of_sweep_alone, alone.iops), (NO_GUEST, None, None))
        self.assertEqual((busy.of_sweep_alone.smallest, busy.of_sweep_alone.largest), (0.75, 0.8))

    def test_a_guest_that_stood_still_is_no_mistake(self) -> None:
        rows = report.summarize([run("engine", 0, 100, 1, 50), run("qemu", 0, 0, 900, 50)])
        self.assertIsNone(rows[1].iops_ratio)
        lines = report.table(rows).splitlines()
        self.assertEqual(len({line.count("|") for line in lines}), 1)


class Pictures(unittest.TestCase):
    """`plot.picture`."""

    def test_a_line_for_each_peer_within_the_frame(self) -> None:
        runs = [run(peer, number, 1, wait) for peer, wait in (("engine", 0.1), ("qemu", 9)) for number in (0, 1)]
        lines = xml.fromstring(plot.picture(runs)).iter("{http://www.w3.org/2000/svg}polyline")
        paths = [[tuple(map(float, point.split(","))) for point in line.attrib["points"].split()] for line in lines]
        self.assertEqual([len(path) for path in paths], [81, 81])
        for x, y in (point for path in paths for point in path):
            self.assertTrue(80 <= x <= 880 and 45 <= y <= 365, (x, y))
        # Longer waits are further right, rarer ones further down.
        self.assertLess(paths[0][40][0], paths[1][40][0])
        self.assertLess(paths[0][0][1], paths[0][80][1])


if __name__ == "__main__":
    unittest.main()
