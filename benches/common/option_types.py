"""Types of command-line options that several benches take."""

import argparse
from collections.abc import Callable

from units import parse_size


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word for word in text.split(",") if word]


def any_of(known: list[str]) -> Callable[[str], list[str]]:
    """Some of the known names, between commas."""

    def parse_names(text: str) -> list[str]:
        chosen = words(text)
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}")
        return chosen

    return parse_names


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def size(text: str) -> int:
    """Bytes, as `64K` or `4G`."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
