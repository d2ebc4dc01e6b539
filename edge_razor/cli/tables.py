"""Plain aligned tables on standard output: the same on a terminal, in a pipe and in a log."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["print_pairs", "print_table"]


def print_pairs(rows: Sequence[tuple[str, str]]) -> None:
    """`name  value` lines, values aligned."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table with its first `left` columns aligned left, the others right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for number, line in enumerate(lines):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * w for w in widths))
