"""`fidelity`: how far compressed gradients are from exact ones, on the user's own data."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.budget import resolve_budget
from edge_razor.bundle import Bundle
from edge_razor.data import BatchRing, Loader, open_source
from edge_razor.data.text import TextOptions
from edge_razor.errors import UsageError
from edge_razor.fidelity import SPARSITIES, Fidelity, Probe, harm, training_curves
from edge_razor.memory import peak_rss_bytes
from edge_razor.tensors import replacing
from edge_razor.units import format_bytes

from .tables import show_text

__all__ = ["FidelityOptions", "run"]

SHOWN = (0.5, 0.8, 0.9, 0.95, 0.97, 0.99)  # columns of the table on the terminal, of the default grid
TRAINED = (0.9, 0.97)  # whose curves are drawn, unless sparsities are given


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """The command line of `fidelity`; `training` are arguments of the trainer for the curves."""

    bundle: Path
    data: Path
    batch_size: int
    batches: int
    sparsities: str | None
    razor: str
    mem_budget: str | None
    threads: int | None
    seed: int
    skip_bad: bool
    harm: Path | None
    html: Path | None
    train_steps: int | None
    text: TextOptions
    training: dict[str, Any]


def run(options: FidelityOptions) -> None:
    sparsities = SPARSITIES if options.sparsities is None else parse_sparsities(options.sparsities)
    budget, why = resolve_budget(options.mem_budget)
    if why is not None:
        print(f"cap: {why}")
    with Bundle(options.bundle) as bundle:
        source = open_source(
            options.data,
            bundle.manifest,
            skip_bad=options.skip_bad,
            memory_limit=budget,
            bundle=bundle,
            text=options.text,
        )
    show_text(source)
    import rich.console  # what prints belongs to the base that the planner is told
    import rich.table  # noqa: F401

    ring = BatchRing(source, options.batch_size)
    loader = Loader(source, np.arange(len(source)), ring, seed=options.seed, shuffle=True)

    def batches() -> Generator[tuple[Any, Any], None, None]:
        for epoch in count():
            for batch in loader.batches(epoch):
                yield batch.inputs, batch.targets

    data_bytes = BatchRing.bytes_for(source, options.batch_size)
    common: dict[str, Any] = {
        "razor": options.razor,
        "batch_size": options.batch_size,
        "mem_budget": budget,
        "threads": options.threads,
    }
    wanted = min(options.batches, len(loader))
    note = _Note()
    with Probe(
        options.bundle,
        sparsities=sparsities,
        data_bytes=data_bytes,
        planned=lambda s: note(f"planned {'exact' if not s else f'sparsity {s:g}'}"),
        **common,
    ) as probe:
        cap = "" if budget is None else f" of the cap of {format_bytes(budget)}"
        note.end()
        print(f"memory of the probe: {format_bytes(probe.predicted_peak_bytes)} planned{cap}")
        with closing(batches()) as feed:
            result = probe.run(islice(feed, wanted), options.seed)
    print(f"peak resident memory: {format_bytes(peak_rss_bytes())}")
    if options.train_steps is not None:
        result.curves = training_curves(
            options.bundle,
            batches,
            steps=options.train_steps,
            sparsities=TRAINED if options.sparsities is None else sparsities,
            options={**options.training, **common, "seed": options.seed, "data_bytes": data_bytes},
            done=lambda s, losses: note(f"trained {'exact' if not s else f'sparsity {s:g}'}: loss {losses[-1]:.4f}"),
        )
        note.end()
    _show(result, sparsities if options.sparsities is not None else SHOWN)
    _write(options, result)


def parse_sparsities(text: str) -> tuple[float, ...]:
    """
    Raises:
        UsageError: not a list of different numbers between 0 and 1.
    """
    try:
        values = tuple(sorted(float(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--sparsities must be numbers by commas, such as 0.9,0.95, not {text!r}") from None
    if not all(0 < v < 1 for v in values) or len(set(values)) != len(values):
        raise UsageError(f"--sparsities must be different and between 0 and 1, not {text!r}")
    return values


class _Note:
    """Progress in one line of a terminal, nothing elsewhere."""

    def __call__(self, text: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="", flush=True)

    def end(self) -> None:
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)


def _show(result: Fidelity, shown: Sequence[float]) -> None:
    """Relative error and cosine of every layer, and of all parameters together."""
    from rich.console import Console
    from rich.table import Table

    shown = [s for s in shown if s in result.sparsities]
    title = f"gradients, {result.razor} razor against exact: relative error (cosine)"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    for sparsity in shown:
        table.add_column(f"{sparsity:g}", justify="right", no_wrap=True)
    rows = [*result.layers().items(), ("all parameters", result.whole())]
    for number, (name, sums) in enumerate(rows):
        cells = [f"{sums[s].relative_error:.3f} ({sums[s].cosine:.3f})" for s in shown]
        table.add_row(name, *cells, end_section=number == len(rows) - 2, style="bold" if sums is rows[-1][1] else None)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:  # a file has no width
        console.width = 32 + 17 * len(shown) + max(len(name) for name, _ in rows)
    console.print(table)
    batches = "one batch" if result.batches == 1 else f"{result.batches} batches"
    print(f"{batches} of {result.batch_size}, loss {result.loss:.4f}")
    if result.curves:
        _show_curves(result, console)


def _show_curves(result: Fidelity, console: Any) -> None:
    """Mean loss over each fifth of the steps."""
    from rich.table import Table

    steps = len(result.curves[0.0])
    parts = min(5, steps)
    edges = [steps * i // parts for i in range(parts + 1)]
    table = Table(title="training loss, mean over steps", title_justify="left", title_style="bold")
    table.add_column("sparsity")
    for begin, end in zip(edges, edges[1:], strict=False):
        table.add_column(f"{begin + 1}–{end}" if end - begin > 1 else str(end), justify="right")
    for sparsity, losses in result.curves.items():
        means = [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
        table.add_row("exact" if not sparsity else f"{sparsity:g}", *(f"{m:.4f}" for m in means))
    console.print(table)


def _write(options: FidelityOptions, result: Fidelity) -> None:
    written = []
    if options.harm is not None:
        with replacing(options.harm) as file:
            file.write((json.dumps(harm(result), indent=1) + "\n").encode())
        written.append(str(options.harm))
    if options.html is not None:
        from edge_razor.report.fidelity_page import fidelity_page

        with replacing(options.html) as file:
            file.write(fidelity_page(options.bundle.name.removesuffix(".razor"), result).encode())
        written.append(str(options.html))
    if written:
        print(f"wrote {' and '.join(written)}")
