"""The report of a run: its plan against the memory that was measured, loss, throughput, settings and versions.

Made from what is in the run directory and the plan file, in a child process (`child.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_razor.planner.timeline import read_timeline
from edge_razor.units import format_bytes

from .chart import Chart, Rule, Series, number
from .markup import Markup, page
from .plan_page import error_tile, kept_section, memory_section, settings_text
from .tables import pairs, section, tiles

__all__ = ["loss_range", "run_page", "smoothed"]

POINTS = 600  # of a curve; more could not be told apart on a screen


def run_page(
    name: str,
    summary: Mapping[str, Any],
    plan: bytes,
    events: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> str:
    """HTML of a run.

    Args:
        name: of the model, as a title.
        summary: `Plan.summary`.
        plan: the plan file.
        events: lines of metrics.jsonl: `step`, `epoch` and `memory`.
        settings: options and versions, name → value.

    Raises:
        PlanError: `plan` is no plan file.
    """
    steps = [e for e in events if e["event"] == "step"]
    epochs = [e for e in events if e["event"] == "epoch"]
    memory = [e for e in events if e["event"] == "memory"]
    measured = _measured_peak(events, summary["mem_budget"])
    return page(
        f"Training of {name}",
        settings_text(summary),
        _tiles(summary, steps, epochs, measured),
        _training_section(steps, epochs),
        _measured_section(summary, memory),
        *memory_section(summary, read_timeline(plan), measured),
        kept_section(summary),
        section("Settings and versions", None, pairs([(k, _text(v)) for k, v in settings.items() if v is not None])),
    )


def _tiles(
    summary: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    epochs: Sequence[Mapping[str, Any]],
    measured: int | None,
) -> Markup:
    figures: list[tuple[str, str]] = []
    peak, cap = summary["predicted_peak_bytes"], summary["mem_budget"]
    if measured is not None:
        against = f"predicted {format_bytes(peak)}" + (f", cap {format_bytes(cap)}" if cap is not None else "")
        figures.append((format_bytes(measured), f"measured peak; {against}"))
    if steps:
        figures.append((number(steps[-1]["samples_per_second"]), "samples a second"))
        figures.append((number(steps[-1]["loss"]), f"training loss at step {steps[-1]['update']}"))
    figures.append(error_tile(summary))
    checked = [e["validation"] for e in epochs if e.get("validation")]
    if checked:
        last = checked[-1]
        if last.get("perplexity") is not None:
            figures.append((number(last["perplexity"]), "validation perplexity"))
        if last.get("accuracy") is not None:
            figures.append((f"{last['accuracy']:.1%}", "validation accuracy"))
        else:
            figures.append((number(last["loss"]), "validation loss"))
    return tiles(figures)


def _training_section(steps: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]]) -> Markup | None:
    if not steps:
        return None
    steps = thinned(steps)
    x = [int(e["update"]) for e in steps]
    losses = [float(e["loss"]) for e in steps]
    checked = {int(e["update"]): float(e["validation"]["loss"]) for e in epochs if e.get("validation")}
    places = sorted({*x, *checked})
    at = dict(zip(x, losses, strict=True))
    smooth = dict(zip(x, smoothed(losses), strict=True))
    curves = [
        Series("training loss", "s1", _bridged(places, at), faint=True),
        Series("training loss, smoothed", "s1", _bridged(places, smooth)),
        Series("validation loss", "s2", [checked.get(p) for p in places], dots=True),
    ]
    if not checked:
        curves.pop()
    values = [*losses, *checked.values()]
    low, high = loss_range(values)
    loss = Chart("Loss", "Mean over each batch before its update.", places, "step", low=low, high=high)
    drawn = [loss.lines(curves)]
    rates = [e.get("recent_samples_per_second", e["samples_per_second"]) for e in steps]
    rate = Chart("Throughput", "Between two logged steps.", x, "step", high=1.15 * max([*rates, 1e-9]))
    drawn.append(rate.lines([Series("samples a second", "s3", rates)]))
    return section("Training", None, *drawn)


def _measured_peak(events: Sequence[Mapping[str, Any]], cap: int | None) -> int | None:
    """The most that was seen under the present cap, in bytes."""
    first = 0  # what was seen before belongs to another cap
    for index, event in enumerate(events):
        if event["event"] == "memory" and event.get("mem_budget", cap) != cap:
            first = index + 1
        elif event["event"] == "memory" and event.get("changes"):
            first = index  # its peak began anew with the last change
    seen = [int(event.get("peak_rss_bytes") or event.get("rss_bytes") or 0) for event in events[first:]]
    return max(seen, default=0) or None


def _measured_section(summary: Mapping[str, Any], memory: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Resident memory over time, each start of the run behind the one before, and where the cap was changed."""
    seconds: list[float] = []
    resident: list[float] = []
    marks: list[tuple[float, str]] = []
    for event in memory:
        offset = seconds[-1] + 0.1 if seconds else 0.0
        if seconds:
            marks.append((offset, "resumed"))
        for t, cap in event.get("changes", ()):
            marks.append((offset + float(t), "no cap" if cap is None else f"cap {format_bytes(cap)}"))
        for t, rss in event.get("samples", ()):
            at = offset + float(t)
            if not seconds or at > seconds[-1]:
                seconds.append(at)
                resident.append(float(rss))
    if len(seconds) < 2:
        return None
    peak, cap = summary["predicted_peak_bytes"], summary["mem_budget"]
    rules = [Rule("predicted peak", peak, "plan")]
    if cap is not None and cap <= 2 * peak:
        rules.insert(0, Rule("cap", cap, "cap"))
    chart = Chart(
        "Measured memory against the plan",
        "What the kernel counts for the process, read several times a second; a point is the most until the next.",
        seconds,
        "seconds",
        high=1.08 * max(max(resident), *(r.value for r in rules)),
        unit="bytes",
        rules=rules,
        marks=marks,
        heading="h2",
    )
    return section(None, None, chart.lines([Series("resident memory", "s1", resident)]))


def thinned(rows: Sequence[Any]) -> list[Any]:
    """At most about `POINTS` of the rows, evenly, the last one always."""
    stride = max(1, -(-len(rows) // POINTS))
    kept = list(rows[::stride])
    if kept and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    return kept


def loss_range(values: Sequence[float]) -> tuple[float, float]:
    """The axis of a loss: from 0, unless the curve would then be a flat line on top."""
    low, high = min(values), max(values)
    span = high - low
    if 0 < span < 0.6 * high:
        return max(0.0, low - 0.15 * span), high + 0.1 * span
    return min(0.0, low), max(1.05 * high, 1e-9)


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the curve, centered."""
    reach = len(values) // 40
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def _bridged(places: Sequence[int], known: Mapping[int, float]) -> list[float | None]:
    """Values at all places, straight between known ones, so that a point of another curve leaves no gap."""
    xs = sorted(known)
    values: list[float | None] = []
    for place in places:
        if place in known or not xs or not xs[0] < place < xs[-1]:
            values.append(known.get(place))
            continue
        after = next(i for i, x in enumerate(xs) if x > place)
        a, b = xs[after - 1], xs[after]
        values.append(known[a] + (known[b] - known[a]) * (place - a) / (b - a))
    return values


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)
