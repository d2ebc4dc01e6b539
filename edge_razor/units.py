"""Byte amounts as people write them: "128MB" is 128·10^6 bytes, "512MiB" is 512·2^20."""

from __future__ import annotations

import re
from fractions import Fraction

from edge_razor.errors import UsageError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(amount: int | str) -> int:
    """Bytes that `amount` stands for; fractions of a byte are dropped.

    >>> parse_bytes("128MB"), parse_bytes("512MiB"), parse_bytes("1.5 kB"), parse_bytes(4096)
    (128000000, 536870912, 1500, 4096)

    Raises:
        UsageError: not an amount, an unknown unit, or less than one byte.
    """
    if isinstance(amount, bool) or not isinstance(amount, (int, str)):
        raise UsageError(f'memory size must be bytes or a text such as "128MB", not {amount!r}')
    if isinstance(amount, str):
        match = _AMOUNT.fullmatch(amount)
        if not match or match[2].upper() not in _UNITS:
            raise UsageError(
                f'memory size {amount!r} is not understood; write bytes, "128MB" (10^6) or "512MiB" (2^20)'
            )
        amount = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if amount < 1:
        raise UsageError(f"memory size must be at least one byte, not {amount}")
    return amount


def format_bytes(count: int) -> str:
    """`count` bytes for people, in decimal units with three or more significant digits.

    >>> format_bytes(128_000_000), format_bytes(1_234_567), format_bytes(999), format_bytes(-2500)
    ('128 MB', '1.23 MB', '999 B', '-2.50 kB')
    """
    size = abs(count)
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            value = count / unit
            digits = 0 if size >= 100 * unit else 1 if size >= 10 * unit else 2
            return f"{value:.{digits}f} {name}"
    return f"{count} B"
