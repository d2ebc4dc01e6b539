"""`Plan.summary`: what was decided and what it costs, JSON-able (docs/planner.md lists the fields)."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

from .choose import Decision
from .search import Candidate
from .storage import ActivationKeep, Form

__all__ = ["PLACES", "error_text", "solver_text", "summarize"]

PLACES = {"recompute": "made again", "spill": "in the spill file"}
"""What is not in memory between the passes, by its place, in words."""


def error_text(error: float) -> str:
    """An expected gradient error; a small one does not look like none.

    >>> error_text(0.0), error_text(0.0002), error_text(0.123)
    ('none', '< 0.001', '0.123')
    """
    return "none" if not error else "< 0.001" if error < 0.0005 else f"{error:.3f}"


def solver_text(summary: Mapping[str, Any]) -> str | None:
    """What chose how values are kept, and how far that may be from the best; None where nothing was to be solved."""
    solver, gap = summary["solver"], summary["gap"]
    if solver == "none":
        return None
    of = summary.get("objective", "harm")
    if gap < 0.0005:
        return f"{solver}; the linear relaxation allows no less {of}"
    return f"{solver}; the linear relaxation's bound on {of} is {gap:.1%} lower"


def summarize(decision: Decision, bundle_id: str, budget: int | None, tried: int) -> dict[str, Any]:
    """`tried`: candidates that were lowered on the way."""
    best = decision.candidate
    search, accounting = best.search, best.accounting
    settings = search.settings
    optimizer = settings.optimizer
    return {
        "bundle_id": bundle_id,
        "mem_budget": budget,
        "predicted_peak_bytes": accounting.total,
        "items": accounting.items,
        "batch_size": settings.batch_size,
        "micro_batch": best.micro_batch,
        "sparsity": best.sparsity if best.sparsity is not None else _dropped(best),
        "razor": settings.razor,
        "attention": settings.attention,
        "prefer": settings.prefer,
        "harm": best.harm,
        "gradient_error": sqrt(best.harm),
        "predicted_seconds": best.seconds,
        "rates": search.rates.source,
        "gap": decision.gap,
        "objective": decision.objective,
        "solver": decision.solver,
        "candidates_tried": tried,
        "recompute_level": best.level,
        "frozen": list(search.frozen),
        "choices": None if settings.sparsity is not None else _choices(best),
        "threads": settings.threads,
        "optimizer": {
            "name": optimizer.name,
            "momentum": optimizer.momentum,
            "nesterov": optimizer.nesterov,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        "arena_bytes": accounting.arena,
        "live_bytes": best.peak_live,
        "frozen_weights": settings.frozen_weights,
        "mapped_bytes": best.memory.mapped_bytes,
        "params_bytes": best.memory.params_bytes,
        "state_bytes": best.memory.state_bytes,
        "trainable": list(search.graph.gradients),
        "train_steps": len(best.train.steps),
        "eval_steps": len(best.evaluate.steps),
        "kept": _kept(best),
    }


def _choices(best: Candidate) -> dict[str, Any]:
    """What `plan(choices=…)` takes to decide alike again."""
    return {
        "recompute_level": best.level,
        "frozen": list(best.search.frozen),
        "values": {name: str(choice) for name, choice in best.choices.items()},
    }


def _dropped(best: Candidate) -> float:
    """Share of the elements of all packed values that is dropped."""
    packed = [s for s in best.storage.values() if isinstance(s.form, Form) and s.place != "recompute"]
    elements = sum(s.samples * s.rows * s.cols for s in packed)
    kept = sum(
        s.samples * (s.keep if s.form in (Form.RAZOR_PLAIN, Form.RAZOR_CENTERED) else s.rows * s.cols) for s in packed
    )
    return round(1 - kept / elements, 4) if elements else 0.0


def _kept(best: Candidate) -> list[dict[str, Any]]:
    """What is kept for the backward pass, largest first.

    A dense input counts as the value that stays alive, what is made again or in the spill file as nothing.
    """
    rows: list[dict[str, Any]] = []
    for node in best.search.graph.nodes:
        for value in node.outputs:
            storage = best.storage.get(value)
            if storage is None:
                continue
            form = storage.form.name.lower() if isinstance(storage.form, (Form, ActivationKeep)) else "index"
            dense = 4 * storage.samples * storage.rows * storage.cols
            size = 0 if storage.place != "memory" else storage.bytes or dense
            rows.append(
                {
                    "value": value.removeprefix("kept/"),
                    "layer": node.layer,
                    "operator": node.op,
                    "form": form,
                    "place": storage.place,
                    "harm": best.value_harm(value),
                    "samples": storage.samples,
                    "rows": storage.rows,
                    "cols": storage.cols,
                    "keep": storage.keep,
                    "bytes": size,
                    "dense_bytes": dense,
                }
            )
    return sorted(rows, key=lambda row: -row["bytes"])
