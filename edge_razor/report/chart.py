"""Charts: an SVG that stretches to the width it is given, with axes and labels as HTML around it, so that text keeps
its size on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10
from typing import Any

from edge_razor.units import format_bytes

from .markup import Markup, data_island, element, join

__all__ = ["HEIGHT", "WIDTH", "Chart", "Rule", "Series", "legend", "number", "ticks"]

WIDTH, HEIGHT = 1000, 400  # of the SVG's own coordinates


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one layer of a stack. `color` is a class of the style sheet; a value may be missing (None)."""

    name: str
    color: str
    values: Sequence[float | None]
    faint: bool = False  # the raw curve behind a smooth one
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A horizontal line with a name: the cap."""

    name: str
    value: float
    color: str


def number(value: float) -> str:
    """A figure with three or four significant digits, without exponents where people do not expect one.

    >>> number(1234.5), number(12.345), number(0.01234), number(0.0), number(3)
    ('1234', '12.3', '0.0123', '0', '3')
    """
    if not isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    size = abs(value)
    return f"{value:.0f}" if size >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from `low` to `high`, about `count` of them.

    >>> ticks(0, 128e6)
    [0.0, 25000000.0, 50000000.0, 75000000.0, 100000000.0, 125000000.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** floor(log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(slots=True)
class Chart:
    """Common frame of every plot: y from `low` to `high`, x from the first to the last of `x`.

    Attributes:
        title, note: what is shown, and how to read it.
        x: position of each value; strictly ascending.
        x_name: axis title.
        labels: what the tooltip calls each position; None: the axis title and the position.
        unit: "bytes", "share" (0 … 1, shown in percent) or "number".
        rules: horizontal lines.
        marks: (x, name) of vertical lines.
        tall: twice the height.
        x_end: where the axis ends; None: at the last x.
        heading: tag of the title; "h2" where the chart has a section for itself.
        extra: HTML laid over the plot.
    """

    title: str
    note: str
    x: Sequence[float]
    x_name: str
    high: float
    low: float = 0.0
    unit: str = "number"
    labels: Sequence[str] | None = None
    rules: Sequence[Rule] = ()
    marks: Sequence[tuple[float, str]] = ()
    tall: bool = False
    x_end: float | None = None
    heading: str = "h3"
    extra: list[Markup] = field(default_factory=list)

    def format(self, value: float) -> str:
        if self.unit == "bytes":
            return format_bytes(round(value))
        return f"{value:.0%}" if self.unit == "share" else number(value)

    def sx(self, x: float) -> float:
        first, last = self.x[0], self._end
        return (x - first) / (last - first) * WIDTH if last > first else 0.0

    @property
    def _end(self) -> float:
        return self.x[-1] if self.x_end is None else self.x_end

    def sy(self, y: float) -> float:
        return HEIGHT - (min(max(y, self.low), self.high) - self.low) / (self.high - self.low) * HEIGHT

    # ---- What is drawn ----

    def stack(self, layers: Sequence[Series]) -> Markup:
        """Layers on top of each other, drawn as steps (each value holds until the next x, the last one until
        `x_end`); first one at the bottom."""
        xs = [self.sx(x) for x in (*self.x, self._end)]
        shapes, below = [], [0.0] * len(self.x)
        for layer in layers:
            above = [b + (v or 0) for b, v in zip(below, layer.values, strict=True)]
            if any(layer.values):
                top = [p for i, y in enumerate(above) for p in ((xs[i], y), (xs[i + 1], y))]
                bottom = [p for i, y in enumerate(below) for p in ((xs[i], y), (xs[i + 1], y))][::-1]
                path = "M" + "L".join(f"{x:.1f} {self.sy(y):.1f}" for x, y in (*_corners(top), *_corners(bottom))) + "Z"
                shapes.append(element("path", {"class": f"area {layer.color}", "d": path}))
            below = above
        return self._figure(shapes, layers, "stack")

    def lines(self, series: Sequence[Series]) -> Markup:
        """Each series as a line, and as dots where it asks for them; gaps where values are missing."""
        shapes: list[Markup] = []
        dots: list[Markup] = []
        for line in series:
            points = [(x, v) for x, v in zip(self.x, line.values, strict=True)]
            pieces, pen = [], "M"
            for x, v in points:
                if v is None or not isfinite(v):
                    pen = "M" if not line.dots else pen
                    continue
                pieces.append(f"{pen}{self.sx(x):.1f} {self.sy(v):.1f}")
                pen = "L"
                if line.dots:
                    style = f"left:{self.sx(x) / WIDTH:.3%};top:{self.sy(v) / HEIGHT:.3%}"
                    dots.append(element("i", {"class": f"dot {line.color}", "style": style}))
            if pieces:
                faint = " faint" if line.faint else ""
                shapes.append(element("path", {"class": f"line {line.color}{faint}", "d": "".join(pieces)}))
        self.extra.extend(dots)
        return self._figure(shapes, [s for s in series if not s.faint], "lines", series)

    def shapes(self, shapes: Sequence[Markup], layers: Sequence[Series]) -> Markup:
        """Shapes made elsewhere, in the SVG's coordinates; `layers` only name the colors."""
        return self._figure(shapes, layers, "shapes")

    # ---- The frame around it ----

    def _figure(
        self, shapes: Sequence[Markup], named: Sequence[Series], kind: str, hovered: Sequence[Series] | None = None
    ) -> Markup:
        grid = [self._across("grid", t) for t in self._ticks()]
        marks = [self._upright(x) for x, _ in self.marks]
        rules = [self._across(f"rule {r.color}", r.value) for r in self.rules]
        over = [
            element("span", {"class": f"rule-name {r.color}", "style": self._top(r.value)}, self._named(r))
            for r in self.rules
        ]
        over += [
            element("span", {"class": "mark-name", "style": f"left:{self._left(x):.2%}"}, name)
            for x, name in self.marks
        ]
        svg = element(
            "svg",
            {
                "viewBox": f"0 0 {WIDTH} {HEIGHT}",
                "preserveAspectRatio": "none",
                "role": "img",
                "aria-label": self.title,
            },
            *(() if kind == "shapes" else grid),
            *shapes,
            *marks,
            *rules,
        )
        y_axis = [element("span", {"style": self._top(t)}, self._tick(t)) for t in self._ticks()]
        x_axis = [element("span", {"style": f"left:{self._left(t):.2%}"}, number(t)) for t in self._x_ticks()]
        hover = None if kind == "shapes" else self._hover(hovered or named, kind)
        return element(
            "figure",
            {"class": "chart" + (" tall" if self.tall else ""), "data-kind": kind},
            element("figcaption", None, element(self.heading, None, self.title), element("p", None, self.note)),
            legend([(s.name, s.color) for s in named]),
            element(
                "div",
                {"class": "plot"},
                element("div", {"class": "y-axis", "aria-hidden": "true"}, *y_axis),
                element("div", {"class": "canvas"}, svg, *over, *self.extra, element("i", {"class": "cursor"})),
                element("div", {"class": "x-axis", "aria-hidden": "true"}, *x_axis),
                element("div", {"class": "x-name"}, self.x_name),
            ),
            hover,
        )

    def _across(self, name: str, y: float) -> Markup:
        at = f"{self.sy(y):.1f}"
        return element("line", {"class": name, "x1": 0, "x2": WIDTH, "y1": at, "y2": at})

    def _upright(self, x: float) -> Markup:
        at = f"{self.sx(x):.1f}"
        return element("line", {"class": "mark", "x1": at, "x2": at, "y1": 0, "y2": HEIGHT})

    def _named(self, rule: Rule) -> str:
        return f"{rule.name} {self.format(rule.value)}"

    def _top(self, y: float) -> str:
        return f"top:{self.sy(y) / HEIGHT:.2%}"

    def _left(self, x: float) -> float:
        return self.sx(x) / WIDTH

    def _ticks(self) -> list[float]:
        return ticks(self.low, self.high)

    def _tick(self, value: float) -> str:
        if value == 0:
            return "0"
        if self.unit == "number" and value != int(value):
            return f"{value:.6g}"  # a round value; with fewer digits those of a nearly flat curve would look alike
        if self.unit != "bytes":
            return self.format(value)
        size, name = next(((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if self.high >= s), (1.0, "B"))
        return f"{value / size:g} {name}"

    def _x_ticks(self) -> list[float]:
        return ticks(self.x[0], self._end, 6)

    def _hover(self, series: Sequence[Series], kind: str) -> Markup:
        digits: Callable[[Any], Any] = (lambda v: v if v is None else round(v)) if self.unit == "bytes" else _six
        return data_island(
            {
                "x": [_six(x) for x in self.x],
                "name": self.x_name,
                "labels": None if self.labels is None else list(self.labels),
                "unit": self.unit,
                "series": [
                    {"name": s.name, "color": s.color, "values": [digits(v) for v in s.values]}
                    for s in series
                    if any(v is not None for v in s.values)
                ],
            }
        )


def _six(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else float(f"{value:.6g}")


def _corners(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points without those inside of a horizontal stretch."""
    kept = points[:1]
    for i in range(1, len(points) - 1):
        if not points[i - 1][1] == points[i][1] == points[i + 1][1]:
            kept.append(points[i])
    return [*kept, points[-1]]


def legend(names: Sequence[tuple[str, str]]) -> Markup | None:
    """What each color stands for; nothing for a single one."""
    if len(names) < 2:
        return None
    return element(
        "ul",
        {"class": "legend"},
        *(element("li", None, element("i", {"class": f"swatch {color}"}), join(name)) for name, color in names),
    )
