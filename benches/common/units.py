"""Sizes: how they are read from the command line and how they are written in messages and tables."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SUFFIXES = {"K": KIB, "M": MIB, "G": GIB}

# Every size and offset here is a multiple of this, so that direct I/O is possible on any common device.
ALIGNMENT = 4 * KIB


def parse_size(text: str) -> int:
    """Turns `64K`, `200M` or `4G` (powers of 1024) or plain bytes into a number of bytes."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or int(digits) == 0:
        raise ValueError(f"{text!r} is not a size such as 64M or 4G")
    size = int(digits) * factor
    if size % ALIGNMENT:
        raise ValueError(f"{text!r} is not a multiple of {format_size(ALIGNMENT)}")
    return size


def format_size(size: int) -> str:
    """In the largest unit that fits, with one decimal where it does not come out even."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{size} bytes"
