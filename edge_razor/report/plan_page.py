"""The report of a plan: memory over one iteration, the arena map, what is kept, and what the cap is spent on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_razor.planner.summary import PLACES, error_text, solver_text
from edge_razor.planner.timeline import KINDS, Timeline, read_timeline
from edge_razor.units import format_bytes

from .chart import HEIGHT, Chart, Rule, Series
from .markup import Markup, element, page
from .tables import Column, color_of, section, spent, table, tiles

__all__ = ["error_tile", "kept_section", "memory_section", "plan_page", "plan_tiles", "settings_text"]

_NAMES = {
    "process": "process and libraries",
    "data": "data pipeline",
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "accumulators": "gradient accumulators",
    "other": "other",
    "kept": "kept for backward",
    "activations": "activations",
    "recomputed": "activations, made again",
    "gradients": "gradients",
    "scratch": "scratch",
}


def plan_page(name: str, summary: Mapping[str, Any], plan: bytes) -> str:
    """HTML of a plan.

    Args:
        name: of the model, as a title.
        summary: `Plan.summary` (docs/planner.md).
        plan: the plan file.

    Raises:
        PlanError: `plan` is no plan file.
    """
    return page(
        f"Plan of {name}",
        settings_text(summary),
        plan_tiles(summary),
        *memory_section(summary, read_timeline(plan)),
        kept_section(summary),
    )


def settings_text(summary: Mapping[str, Any]) -> str:
    """What was planned, in one line."""
    batch, micro, sparsity = summary["batch_size"], summary["micro_batch"], summary["sparsity"]
    if not summary["harm"]:
        kept = "kept exactly"
    elif summary["choices"] is None:
        kept = f"{summary['razor']} razor at sparsity {sparsity:g}"
    else:
        kept = "storage chosen for each value"
        kept += f", {sparsity:.0%} of the packed elements dropped" if sparsity else ""
    parts = (
        f"batch {batch}" + (f" in micro-batches of {micro}" if micro != batch else ""),
        kept,
        str(summary["optimizer"]["name"]),
        f"{summary['threads']} thread" + ("s" if summary["threads"] != 1 else ""),
    )
    return " · ".join(parts)


def plan_tiles(summary: Mapping[str, Any]) -> Markup:
    cap, peak, kept = summary["mem_budget"], summary["predicted_peak_bytes"], summary["kept"]
    figures = [(format_bytes(peak), "predicted peak of the process")]
    if cap is not None:
        figures.append((format_bytes(cap), f"cap, {peak / cap:.0%} of it planned"))
    figures.append((format_bytes(summary["arena_bytes"]), "arena"))
    if kept:
        bytes_, dense = sum(r["bytes"] for r in kept), sum(r["dense_bytes"] for r in kept)
        less = f"{dense / bytes_:.1f}× less than dense" if bytes_ else f"{format_bytes(dense)} if dense"
        figures.append((format_bytes(bytes_), f"kept for backward, {less}"))
    figures.append(error_tile(summary))
    slowdown = summary["slowdown"]
    against = "" if slowdown is None else f", {slowdown:.2f}× those of balanced"
    figures.append((f"{summary['predicted_seconds']:.3g} s", f"expected for a step, {summary['prefer']}{against}"))
    return tiles(figures)


def error_tile(summary: Mapping[str, Any]) -> tuple[str, str]:
    return error_text(summary["gradient_error"]), "expected error of the gradient"


def memory_section(
    summary: Mapping[str, Any], timeline: Timeline, measured: int | None = None
) -> tuple[Markup, Markup, Markup]:
    """Memory over the steps, the arena map, and the accounting; `measured` is the peak that was seen, in bytes."""
    cap, items = summary["mem_budget"], summary["items"]
    fixed: dict[str, int] = {}
    for item, size in items.items():
        if item != "arena":
            fixed[color_of(item)] = fixed.get(color_of(item), 0) + size
    live = timeline.live_bytes()
    steps = len(timeline.labels)
    layers = [Series(_NAMES[c], c, [size] * steps) for c, size in fixed.items() if size]
    layers += [Series(_NAMES[kind], kind, live[kind]) for kind in KINDS if any(live[kind])]
    peak = summary["predicted_peak_bytes"]
    rules = [Rule("predicted peak", peak, "plan")]
    if cap is not None:
        rules.insert(0, Rule("cap", cap, "cap"))
    if measured is not None:
        rules.append(Rule("measured peak", measured, "measured"))
    micro = summary["batch_size"] // summary["micro_batch"]
    marks = [(timeline.loss, "backward →")] if 0 < timeline.loss < steps else []
    note = "Resident memory of the whole process while one " + (
        f"micro-batch passes ({micro} of them make an update)." if micro > 1 else "batch passes."
    )
    chart = Chart(
        "Memory over the steps of one iteration",
        note + " Each step is one kernel; the dashed line counts the whole arena, since pages once used stay resident.",
        range(steps),
        "step of the plan",
        high=1.08 * max(peak, cap if cap is not None and cap < 2 * peak else 0, measured or 0),
        unit="bytes",
        labels=[f"{i}  {label}" for i, label in enumerate(timeline.labels)],
        rules=[r for r in rules if r.value <= 2.01 * peak],
        marks=marks,
        x_end=steps,
        heading="h2",
    )
    return (
        section(None, None, chart.stack(layers)),
        section(None, None, _arena_map(timeline, summary["arena_bytes"], marks)),
        section(
            "What the cap is spent on" if cap is not None else "What memory is spent on",
            "Items of the accounting; they add up to the predicted peak of the process's resident memory.",
            spent(items, cap),
        ),
    )


def _arena_map(timeline: Timeline, arena_bytes: int, marks: Sequence[tuple[float, str]]) -> Markup:
    steps = len(timeline.labels)
    chart = Chart(
        "Arena map",
        "Every buffer as a rectangle: from the step that writes it to the last that reads it, at its address. "
        "Hover or touch names it.",
        range(steps),
        "step of the plan",
        high=float(max(arena_bytes, 1)),
        unit="bytes",
        marks=marks,
        tall=True,
        x_end=steps,
        heading="h2",
    )
    boxes = []
    for stay in timeline.stays:
        left, right = chart.sx(stay.first), chart.sx(stay.last + 1)
        top, bottom = chart.sy(stay.offset + stay.bytes), chart.sy(stay.offset)
        about = (
            f"{stay.name}\n{_NAMES[stay.kind]}, {format_bytes(stay.bytes)}\n"
            f"steps {stay.first} to {stay.last}, address {format_bytes(stay.offset)}"
        )
        outlined = " outlined" if right - left > 5 and bottom - top > 4 else ""  # else the outline would cover it
        boxes.append(
            element(
                "rect",
                {
                    "class": f"box {stay.kind}{outlined}",
                    "x": f"{left:.2f}",
                    "y": f"{top:.2f}",
                    "width": f"{right - left:.2f}",
                    "height": f"{bottom - top:.2f}",
                    "data-tip": about,
                },
            )
        )
    ground = element("rect", {"class": "background", "x": 0, "y": 0, "width": 1000, "height": HEIGHT})
    present = {stay.kind for stay in timeline.stays}
    named = [Series(_NAMES[kind], kind, ()) for kind in KINDS if kind in present]
    return chart.shapes([ground, *boxes], named)


def kept_section(summary: Mapping[str, Any]) -> Markup | None:
    """Table of kept values, largest first."""
    kept = summary["kept"]
    if not kept:
        return None
    harmful = any(row.get("harm") is not None for row in kept)
    columns = [
        Column("layer", left=True),
        Column("operator", left=True, wide=True),
        Column("kept as", left=True),
        Column("sparsity"),
        Column("bytes"),
        Column("dense", wide=True),
        Column("smaller", wide=True),
        Column("samples × rows × columns", wide=True),
    ]
    if harmful:
        columns.insert(4, Column("harm"))
    rows: list[list[tuple[object, float | None] | str]] = []
    for row in sorted(kept, key=lambda r: -r["bytes"]):
        elements = row["rows"] * row["cols"]
        sparsity = 1 - row["keep"] / elements if row["keep"] else None
        cells: list[tuple[object, float | None] | str] = [
            str(row["layer"]),
            str(row["operator"]),
            PLACES.get(row.get("place", "memory"), str(row["form"]).replace("_", " ")),
            ("–" if sparsity is None else f"{sparsity:.3g}", sparsity),
            (format_bytes(row["bytes"]), row["bytes"]),
            (format_bytes(row["dense_bytes"]), row["dense_bytes"]),
            _smaller(row),
            (f"{row['samples']} × {row['rows']} × {row['cols']}", row["samples"] * elements),
        ]
        if harmful:
            harm = row.get("harm")
            cells.insert(4, ("–" if harm is None else f"{harm:.3g}", harm))
        rows.append(cells)
    total = sum(r["bytes"] for r in kept)
    note = (
        f"{len(kept)} values that the backward pass needs take {format_bytes(total)} together. A click on a head sorts."
    )
    solver = solver_text(summary)
    note += f" Chosen by {solver}." if solver is not None else ""
    return section("Kept for the backward pass", note, table(columns, rows, sorted_by=5 if harmful else 4))


def _smaller(row: Mapping[str, Any]) -> tuple[str, float | None]:
    if not row["bytes"]:
        return "–", None
    factor = row["dense_bytes"] / row["bytes"]
    return f"{factor:.1f}×", factor
