"""HTML and SVG as escaped text: the only place where tags are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

__all__ = ["Markup", "data_island", "element", "join", "page"]


class Markup(str):
    """Text that is HTML already; every other text is escaped when it becomes part of an element."""

    __slots__ = ()


_EMPTY = frozenset({"meta", "rect", "path", "line", "circle", "br"})


def element(tag: str, attributes: Mapping[str, object] | None = None, *children: object) -> Markup:
    """One element; attributes that are None are left out, children that are no `Markup` are escaped text.

    >>> element("td", {"class": "name", "title": None}, "<script>")
    '<td class="name">&lt;script&gt;</td>'
    """
    text = "".join(f' {k}="{escape(str(v), quote=True)}"' for k, v in (attributes or {}).items() if v is not None)
    if tag in _EMPTY:
        return Markup(f"<{tag}{text}>" if tag in ("meta", "br") else f"<{tag}{text}/>")
    return Markup(f"<{tag}{text}>{join(*children)}</{tag}>")


def join(*children: object) -> Markup:
    """The children one after another."""
    return Markup(
        "".join(c if isinstance(c, Markup) else escape(str(c), quote=False) for c in children if c is not None)
    )


def data_island(data: Any) -> Markup:
    """JSON for the page's script; no text in it can end the element."""
    text = (
        json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
    return Markup(f'<script type="application/json">{text}</script>')


def page(title: str, subtitle: str, *sections: object) -> str:
    """A whole document. Its policy forbids every request, whatever a bundle may have smuggled into a name."""
    source = files("edge_razor.report")
    style = source.joinpath("report.css").read_text(encoding="utf-8")
    script = source.joinpath("report.js").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    head = join(
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("title", None, title),
        element("style", None, Markup(style)),
    )
    body = join(
        element("header", None, element("h1", None, title), element("p", None, subtitle)),
        element("main", None, *sections),
        element("div", {"id": "tip", "role": "status", "hidden": "hidden"}),
        element("script", None, Markup(script)),
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
