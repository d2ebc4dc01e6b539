"""A refusal that helps: the smallest cap with the present settings, and what each change of them would bring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt

from edge_razor.errors import Advice, BudgetError
from edge_razor.units import format_bytes

from .context import ParamForm
from .graph import Graph
from .search import SPARSITY_GRID, Candidate, Search, Settings, searches, trained_layers

__all__ = ["refusal"]

PRESENT = "the present settings"
WORTHWHILE = 0.995  # of the present cap: a change that brings less is no advice


def refusal(parts: list[Search], budget: int) -> BudgetError:
    """The error for a cap that none of `parts` meets."""
    present = _smallest(parts)
    variation = parts[0].settings.base_variation
    first = _row(PRESENT, present, variation)
    rows: list[Advice] = []
    for change, graph, settings in _changes(parts[0]):
        row = _row(change, _smallest(searches(graph, settings)), variation)
        if row.smallest_budget <= WORTHWHILE * first.smallest_budget:
            rows.append(row)
    rows.sort(key=lambda row: row.smallest_budget)
    hints = "; ".join(f"{row.change}: {format_bytes(row.smallest_budget)}" for row in rows)
    return BudgetError(
        f"the cap of {format_bytes(budget)} cannot be met: the smallest that works with these settings is "
        f"{format_bytes(first.smallest_budget)} ({first.smallest_budget} bytes)" + (f"; with {hints}" if hints else ""),
        first.smallest_budget,
        tuple((row.change, row.smallest_budget) for row in rows),
        (first, *rows),
    )


def _smallest(parts: list[Search]) -> Candidate:
    return min((part.smallest() for part in parts), key=lambda c: c.accounting.total)


def _row(change: str, candidate: Candidate, variation: int) -> Advice:
    return Advice(change, candidate.accounting.total + variation, sqrt(candidate.harm), candidate.seconds)


def _changes(search: Search) -> Iterator[tuple[str, Graph, Settings]]:
    """(what to change, graph and settings then): one knob at a time, the others as they are."""
    graph, settings = search.whole, search.settings
    if settings.sparsity is not None and settings.sparsity < SPARSITY_GRID[-1] and settings.prefer != "exact":
        yield f"sparsity {SPARSITY_GRID[-1]}", graph, replace(settings, sparsity=SPARSITY_GRID[-1])
    if settings.prefer == "exact":
        yield "prefer balanced", graph, replace(settings, prefer="balanced", sparsity=None, attention="recompute")
    if settings.micro_batch is not None and settings.micro_batch > 1:
        yield "micro-batch auto", graph, replace(settings, micro_batch=None)
    if settings.batch_size > 1:
        yield "batch size 1", graph, replace(settings, batch_size=1, micro_batch=None)
    if settings.optimizer.name == "adamw":
        yield "optimizer sgd", graph, replace(settings, optimizer=replace(settings.optimizer, name="sgd"))
    elif settings.optimizer.momentum:
        plain = replace(settings.optimizer, momentum=0.0, nesterov=False)
        yield "momentum 0", graph, replace(settings, optimizer=plain)
    if settings.frozen_weights != "int8" and any(form != ParamForm.FLOAT for form in search.forms.values()):
        yield "frozen weights int8", graph, replace(settings, frozen_weights="int8")
    if not settings.spill:
        yield "spill-dir", graph, replace(settings, spill=True)
    layers = trained_layers(search.whole.restricted(None))
    half = len(layers) // 2
    if settings.allow_freeze < half:
        yield f"allow-freeze {half}", graph, replace(settings, allow_freeze=half)
    if len(layers) > 1:
        head = graph.restricted(layers[-1])
        yield "training the last layer only", head, replace(settings, micro_batch=None, harm=None, allow_freeze=0)
