"""Tables, tiles and bars of the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edge_razor.units import format_bytes

from .markup import Markup, element

__all__ = ["Column", "pairs", "section", "spent", "table", "tiles"]

# Item of the accounting → class of the style sheet.
ITEM_COLORS = {
    "Python and libraries": "process",
    "growth while training": "process",
    "data pipeline": "data",
    "parameters": "parameters",
    "frozen weights in the file": "parameters",
    "optimizer state": "optimizer",
    "gradient accumulators": "accumulators",
    "arena": "arena",
}


class Column(NamedTuple):
    """A column of `table`: its title; `left` for text; `wide`: left out on a phone."""

    title: str
    left: bool = False
    wide: bool = False


def section(title: str | None, note: str | None, *children: object) -> Markup:
    """A card; without a title where a chart brings its own."""
    heading = None if title is None else element("h2", None, title)
    return element("section", None, heading, None if note is None else element("p", None, note), *children)


def tiles(figures: Sequence[tuple[str, str]]) -> Markup:
    """(figure, what it is) side by side."""
    return element(
        "div",
        {"class": "tiles"},
        *(element("div", {"class": "tile"}, element("b", None, f), element("span", None, what)) for f, what in figures),
    )


def pairs(rows: Sequence[tuple[str, str]]) -> Markup:
    return element(
        "dl",
        {"class": "pairs"},
        *(element("div", None, element("dt", None, name), element("dd", None, value)) for name, value in rows),
    )


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[tuple[object, float | None] | str]], sorted_by: int | None = None
) -> Markup:
    """A table that can be sorted by a click on a head. A cell is text, or (what is shown, value that it is sorted by).

    Args:
        sorted_by: the column that the rows are already sorted by, descending.
    """

    def style(column: Column) -> str | None:
        return " ".join(n for n, on in (("left", column.left), ("wide", column.wide)) if on) or None

    head = [
        element(
            "th",
            {"class": style(c), "scope": "col", "aria-sort": "descending" if i == sorted_by else None},
            element("button", {"type": "button"}, c.title),
        )
        for i, c in enumerate(columns)
    ]
    body = []
    for row in rows:
        cells = []
        for cell, column in zip(row, columns, strict=True):
            if isinstance(cell, str):
                cells.append(element("td", {"class": style(column), "title": cell if column.left else None}, cell))
            else:
                shown, value = cell
                cells.append(
                    element("td", {"class": style(column), "data-value": "" if value is None else value}, shown)
                )
        body.append(element("tr", None, *cells))
    return element(
        "div",
        {"class": "scroll", "tabindex": "0"},
        element(
            "table",
            {"class": "sortable"},
            element("thead", None, element("tr", None, *head)),
            element("tbody", None, *body),
        ),
    )


def spent(items: Mapping[str, int], cap: int | None) -> Markup:
    """What resident memory is spent on: one bar of the whole, and a row an item."""
    total = sum(items.values())
    whole = max(cap or 0, total, 1)
    present = {name: size for name, size in items.items() if size}
    meter = element(
        "div",
        {"class": "meter", "role": "img", "aria-label": "shares of the cap"},
        *(
            element("i", {"class": color_of(n), "style": f"width:{s / whole:.3%}", "title": f"{n}: {format_bytes(s)}"})
            for n, s in present.items()
        ),
    )

    def row(name: str, size: int, color: str | None) -> Markup:
        bar = {"class": f"bar {color}", "style": f"width:{size / whole:.2%}"}
        return element(
            "tr",
            None,
            element("td", None, name),
            element("td", {"class": "bars"}, element("span", bar) if color else None),
            element("td", None, format_bytes(size)),
            element("td", None, f"{size / whole:.1%}"),
        )

    foot = [row("predicted peak", total, None)]
    if cap is not None:
        foot += [row("free", cap - total, None), row("cap", cap, None)]
    rows = [row(name, size, color_of(name)) for name, size in present.items()]
    return element(
        "div",
        {"class": "spent"},
        meter,
        element("table", None, element("tbody", None, *rows), element("tfoot", None, *foot)),
    )


def color_of(item: str) -> str:
    """Class of the style sheet for an item of the accounting."""
    return ITEM_COLORS.get(item, "other")
