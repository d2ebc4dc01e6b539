"""Plain aligned tables on standard output: the same on a terminal, in a pipe and in a log."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_razor.checkpoint import Checkpoint
    from edge_razor.data import Source

__all__ = ["print_pairs", "print_table", "show_damaged", "show_text"]


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


def show_damaged(checkpoint: Checkpoint) -> None:
    """Warns of newer checkpoints that are not whole, on standard error."""
    for problem in checkpoint.damaged.values():
        print(f"warning: {problem}; using {checkpoint.path.name}", file=sys.stderr)


def show_text(source: Source) -> None:
    """Figures of a data set of texts; nothing for others."""
    from edge_razor.data.text import TextSource

    if not isinstance(source, TextSource):
        return
    answer, length = source.answer, source.input_shape[1]
    print(f"{answer.texts} texts, {answer.tokens} tokens, {answer.samples} samples of at most {length} tokens")
    if answer.truncated:
        print(f"{answer.truncated} texts are longer and were cut; --no-truncate refuses them")
    if answer.bad:
        print(f"{len(answer.bad)} texts were left out: {next(iter(answer.bad.items()))}, …")
