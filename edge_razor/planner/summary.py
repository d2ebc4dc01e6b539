"""`Plan.summary`: what was decided and what it costs, JSON-able (docs/planner.md lists the fields)."""

from __future__ import annotations

from math import sqrt
from typing import Any

from .choose import Decision
from .place import Lifetime, lifetimes
from .program import KERNELS, Buffer, Program, Region
from .search import Candidate
from .storage import ActivationKeep, Form

__all__ = ["arena_map", "summarize", "timeline"]

KINDS = ("params", "state", "kept", "activations", "gradients", "scratch")


def summarize(decision: Decision, bundle_id: str, budget: int | None, detail: bool, parts: int) -> dict[str, Any]:
    """
    Args:
        detail: with `timeline` and `arena_map`.
        parts: candidates that were lowered on the way.
    """
    best = decision.candidate
    search, accounting = best.search, best.accounting
    settings = search.settings
    optimizer = settings.optimizer
    summary: dict[str, Any] = {
        "bundle_id": bundle_id,
        "mem_budget": budget,
        "predicted_peak_bytes": accounting.total,
        "items": accounting.items,
        "batch_size": settings.batch_size,
        "micro_batch": best.micro_batch,
        "sparsity": best.sparsity if best.sparsity is not None else _dropped(best),
        "razor": settings.razor,
        "prefer": settings.prefer,
        "harm": best.harm,
        "gradient_error": sqrt(best.harm),
        "predicted_seconds": best.seconds,
        "rates": search.rates.source,
        "gap": decision.gap,
        "solver": decision.solver,
        "candidates_tried": parts,
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
        "params_bytes": best.memory.params_bytes,
        "state_bytes": best.memory.state_bytes,
        "trainable": list(search.graph.gradients),
        "train_steps": len(best.train.steps),
        "eval_steps": len(best.evaluate.steps),
        "kept": _kept(best),
    }
    if detail:
        summary["timeline"] = timeline(best)
        summary["arena_map"] = arena_map(best)
    return summary


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


def _kinds(best: Candidate) -> dict[Buffer, str]:
    """Kind of every arena buffer of the training program."""
    program = best.train
    kinds: dict[Buffer, str] = {}
    first_backward = _first_backward(program)
    gradients = {step.operands[1] for step in program.steps if step.kernel in ("sgd", "adamw")}
    for index, step in enumerate(program.steps):
        signature = KERNELS[step.kernel]
        for position, buffer in enumerate(step.operands):
            if buffer is None or buffer.region != Region.ARENA or buffer in kinds:
                continue
            if position >= signature.operands:
                kinds[buffer] = "scratch"
            elif buffer.name in best.storage:
                kinds[buffer] = "kept"
            elif buffer in gradients or index >= first_backward and not step.label.endswith(" again"):
                kinds[buffer] = "gradients"
            else:
                kinds[buffer] = "activations"
    for buffer in program.inputs:
        kinds[buffer] = "activations"
    last = {life.buffer: life.end for life in best.lives}
    for buffer, kind in kinds.items():
        if kind == "activations" and buffer not in program.inputs and last.get(buffer, 0) >= first_backward:
            kinds[buffer] = "kept"  # dense: it stays alive for the backward pass
    return kinds


def _first_backward(program: Program) -> int:
    return next((i for i, step in enumerate(program.steps) if step.backward), len(program.steps))


def timeline(best: Candidate) -> dict[str, Any]:
    """Live bytes of every training step by kind: `steps` (labels), and for each of `KINDS` a list as long."""
    count = len(best.train.steps)
    kinds = _kinds(best)
    found: dict[str, list[int]] = {kind: [0] * (count + 1) for kind in KINDS}
    for life in best.lives:
        column = found[kinds[life.buffer]]
        column[life.start] += life.size
        if life.end + 1 <= count:
            column[life.end + 1] -= life.size
    result: dict[str, Any] = {
        "steps": [{"kernel": step.kernel, "label": step.label} for step in best.train.steps],
        "params": [best.memory.params_bytes] * count,
        "state": [best.memory.state_bytes] * count,
    }
    for kind in KINDS[2:]:
        total, values = 0, []
        for change in found[kind][:count]:
            total += change
            values.append(total)
        result[kind] = values
    return result


def arena_map(best: Candidate) -> list[dict[str, Any]]:
    """Every arena buffer of the training program: name, kind, first and last step, offset and bytes, by offset."""
    assert best.accounting.arena >= 0  # placed
    kinds = _kinds(best)
    lives: list[Lifetime] = lifetimes(best.train)
    return [
        {
            "name": life.buffer.name,
            "kind": kinds[life.buffer],
            "first": life.start,
            "last": life.end,
            "offset": life.buffer.offset,
            "bytes": life.buffer.bytes,
        }
        for life in sorted(lives, key=lambda life: (life.buffer.offset, life.start))
    ]
