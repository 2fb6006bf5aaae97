"""The command line."""

import argparse
import os
import tempfile

from option_types import any_of, positive, size, words
from workloads import WORKLOADS

_REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_DEFAULT_BINARY = os.path.join(_REPOSITORY, "target", "release", "engine-cli")

# Medians over fewer pairs than these are not quoted.
_ROUNDS = 9


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; ends the program with a message when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="benches/side-by-side/run",
        description="Copies the same disks with engine-cli and with its peers, taking turns, and prints one table.",
        epilog="example: benches/side-by-side/run --workload dense --rounds 3 --tools engine,fio,dd",
    )
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workload", type=any_of(names), default=names, help=f"any of {','.join(names)}")
    parser.add_argument("--rounds", type=positive, help=f"runs of each tool (default {_ROUNDS})")
    parser.add_argument("--tools", type=words, help="tools or the first letters of them, such as engine,fio,dd")
    parser.add_argument("--size", type=size, help="the data to copy in each workload, such as 1G")
    parser.add_argument("--workdir", default=tempfile.gettempdir(), help="where disks are made (default %(default)s)")
    parser.add_argument("--binary", default=_DEFAULT_BINARY, help="engine-cli (default target/release/engine-cli)")
    parser.add_argument("--json", metavar="FILE", help="write every run and the summaries there as well")
    parser.add_argument("--keep", action="store_true", help="leave the files behind")
    parser.add_argument("--quick", action="store_true", help="small disks, one round: shows that the benches work")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else _ROUNDS)
    return options
