"""The fidelity report: gradient error and cosine by sparsity and layer, and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_razor.fidelity import Fidelity, Sums
from edge_razor.units import format_bytes

from .chart import Chart, Series, number
from .markup import Markup, element, page
from .run_page import loss_range, smoothed
from .tables import Column, section, table, tiles

__all__ = ["fidelity_page"]

LAYER_COLORS = ("s2", "s3", "s4", "s5")  # of the layers that suffer most


def fidelity_page(name: str, fidelity: Fidelity) -> str:
    """HTML of a probe.

    Args:
        name: of the model, as a title.
    """
    batches = "one batch" if fidelity.batches == 1 else f"{fidelity.batches} batches"
    return page(
        f"What compression costs {name}",
        f"{fidelity.razor} razor · gradients of {batches} of {fidelity.batch_size} against the exact ones",
        _tiles(fidelity),
        _by_sparsity(fidelity),
        _curves(fidelity.curves) if fidelity.curves else None,
        _by_layer(fidelity),
    )


def _tiles(fidelity: Fidelity) -> Markup:
    whole = fidelity.whole()
    shown = [s for s in (0.9, 0.95, 0.99) if s in whole] or list(whole)[-3:]
    figures = [
        (f"{whole[s].relative_error:.1%}", f"gradient error at sparsity {s:g}; cosine {whole[s].cosine:.3f}")
        for s in shown
    ]
    figures.append((format_bytes(fidelity.predicted_peak_bytes), "memory planned for the probe"))
    return tiles(figures)


def _by_sparsity(fidelity: Fidelity) -> Markup:
    whole, layers, x = fidelity.whole(), fidelity.layers(), list(fidelity.sparsities)
    weight = sum(s.exact for s in (layer[x[-1]] for layer in layers.values())) or 1.0
    worst = sorted(layers, key=lambda n: -layers[n][x[-1]].difference / weight)[: len(LAYER_COLORS)]

    def series(value: str) -> list[Series]:
        picked: list[tuple[str, str, Mapping[float, Sums]]] = [("all parameters", "s1", whole)]
        if len(layers) > 1:
            picked += [(n, color, layers[n]) for n, color in zip(worst, LAYER_COLORS, strict=False)]
        return [Series(n, color, [getattr(sums[s], value) for s in x], dots=True) for n, color, sums in picked]

    errors, cosines = series("relative_error"), series("cosine")
    highest = max(v for line in errors for v in line.values if v is not None)
    lowest = min(v for line in cosines for v in line.values if v is not None)
    error = Chart(
        "Relative error",
        "‖compressed − exact‖ / ‖exact‖, over all parameters and in the layers that contribute most to it.",
        x,
        "sparsity",
        high=max(1.08 * min(highest, 3.0), 0.01),
    )
    cosine = Chart("Cosine", "1: the same direction.", x, "sparsity", low=1 - max(1.15 * (1 - lowest), 0.01), high=1)
    note = "Gradient error orders sparsities of one razor form; it does not compare one form with another."
    return section("Gradients by sparsity", note, error.lines(errors), cosine.lines(cosines))


def _by_layer(fidelity: Fidelity) -> Markup:
    x = list(fidelity.sparsities)
    columns = [Column("layer", left=True), Column("norm"), *(Column(f"{s:g}") for s in x)]
    rows: list[Sequence[tuple[object, float | None] | str]] = []
    for name, sums in fidelity.layers().items():
        norm = (sums[x[-1]].exact / fidelity.batches) ** 0.5
        rows.append([name, (number(norm), norm), *(_cell(sums[s]) for s in x)])
    note = "Relative error of each layer's gradient at each sparsity; hover for the cosine. A click on a head sorts."
    return section("Gradients by layer", note, table(columns, rows))


def _cell(sums: Sums) -> tuple[Markup, float]:
    error = sums.relative_error
    heat = round(min(error, 1.0) * 70)
    about = f"relative error {error:.4f}, cosine {sums.cosine:.4f}"
    return element("span", {"class": "heat", "style": f"--heat:{heat}%", "title": about}, f"{error:.3f}"), error


def _curves(curves: Mapping[float, Sequence[float]]) -> Markup:
    steps = list(range(1, max(len(c) for c in curves.values()) + 1))
    lines: list[Series] = []
    for index, (sparsity, losses) in enumerate(curves.items()):
        color = f"s{index % 8}"
        name = "exact" if not sparsity else f"sparsity {sparsity:g}"
        lines.append(Series(name, color, list(losses), faint=True))
        lines.append(Series(name, color, smoothed(losses)))
    low, high = loss_range([v for losses in curves.values() for v in losses])
    chart = Chart(
        "Training loss",
        "From the same weights, on the same batches in the same order; strong lines are means over a twentieth of all.",
        steps,
        "step",
        low=low,
        high=high,
        heading="h2",
    )
    return section(None, None, chart.lines(lines))
