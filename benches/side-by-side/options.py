"""The command line."""

import argparse
import os
import tempfile
from collections.abc import Callable

from units import parse_size
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
    parser.add_argument("--workload", type=_names(names), default=names, help=f"any of {','.join(names)}")
    parser.add_argument("--rounds", type=_positive, help=f"runs of each tool (default {_ROUNDS})")
    parser.add_argument("--tools", type=_list, help="tools or the first letters of them, such as engine,fio,dd")
    parser.add_argument("--size", type=_size, help="the data to copy in each workload, such as 1G")
    parser.add_argument("--workdir", default=tempfile.gettempdir(), help="where disks are made (default %(default)s)")
    parser.add_argument("--binary", default=_DEFAULT_BINARY, help="engine-cli (default target/release/engine-cli)")
    parser.add_argument("--json", metavar="FILE", help="write every run and the summaries there as well")
    parser.add_argument("--keep", action="store_true", help="leave the files behind")
    parser.add_argument("--quick", action="store_true", help="small disks, one round: shows that the benches work")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else _ROUNDS)
    return options


def _list(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def parse_names(text: str) -> list[str]:
        chosen = _list(text)
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}")
        return chosen

    return parse_names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
