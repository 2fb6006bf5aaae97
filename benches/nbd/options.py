"""The command line."""

import argparse
import os
import tempfile

import peers
from guest import WORKLOADS
from option_types import any_of, positive, size
from trial import BACKUP, IDLE
from units import GIB, MIB, format_size

_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
_DEFAULT_BINARY = os.path.join(_REPOSITORY, "target", "release", "engine-cli")

_ROUNDS, _SIZE, _SECONDS = 5, 4 * GIB, 10
_QUICK_SIZE = 32 * MIB
_PHASES = [IDLE, BACKUP]
_HALF = "half of what the slowest backup without one reaches alone, in the first round"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; ends the program with a message when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="benches/nbd/run",
        description="Measures what a guest on an NBD export feels, idle and during backups, with engine-cli and with "
        "its peers, taking turns, and prints one table.",
        epilog="example: benches/nbd/run --phases backup --workloads write-1 --peers engine,qemu --rounds 3",
    )
    workloads = [workload.name for workload in WORKLOADS]
    option = parser.add_argument
    option("--phases", type=any_of(_PHASES), default=_PHASES, help=f"any of {','.join(_PHASES)}")
    option("--workloads", type=any_of(workloads), help=f"any of {','.join(workloads)} (default all)")
    option("--peers", type=any_of(peers.NAMES), default=peers.NAMES, help=f"any of {','.join(peers.NAMES)}")
    option("--rounds", type=positive, help=f"trials of each kind (default {_ROUNDS})")
    option("--size", type=size, help=f"of the disk (default {format_size(_SIZE)})")
    option("--seconds", type=positive, help=f"of each idle trial (default {_SECONDS})")
    option("--speed", type=size, help=f"of backups with a limit, in bytes a second (default {_HALF})")
    option("--workdir", help=f"where the disk is (default {tempfile.gettempdir()}, or /var/tmp if that is no disk)")
    option("--binary", default=_DEFAULT_BINARY, help="engine-cli (default target/release/engine-cli)")
    option("--json", metavar="FILE", help="write every round and the summaries there as well")
    option("--plots", metavar="DIR", help="write latencies-idle.svg and latencies-backup.svg there")
    option("--quick", action="store_true", help="a small disk, one round: shows that the bench works")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else _ROUNDS)
    options.size = options.size or (_QUICK_SIZE if options.quick else _SIZE)
    options.seconds = options.seconds or _SECONDS
    options.workloads = options.workloads or (["mix-16"] if options.quick else workloads)
    return options
