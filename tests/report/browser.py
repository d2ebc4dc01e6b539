"""Pages in a real browser: headless Chromium, without a driver."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-quic --enable-logging=stderr --virtual-time-budget=2000"
).split()
FLAGS.append("--host-resolver-rules=MAP * ~NOTFOUND")  # the browser's own errands find no network


class Loaded(NamedTuple):
    """What a page became, and what it logged: errors, and requests that its policy refused."""

    dom: str
    console: list[str]


def load(page: Path, work: Path, *flags: str) -> Loaded:
    """Opens a file; `work` is an empty directory for the browser's profile."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={work / 'profile'}", "--dump-dom"]
    result = subprocess.run(
        [*command, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(work)},
    )
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return Loaded(result.stdout, console)


def examine(page: Path, work: Path, script: str, *flags: str) -> dict[str, Any]:
    """Runs `script` on the page, wide and as on a phone, and returns what it returns for each.

    Args:
        script: body of a function of `page` (its document) and `view` (its window); returns something JSON-able.
    """
    frame = '<iframe id="{}" style="width:{}px;height:3000px;border:0" srcdoc="{}"></iframe>'
    text = html.escape(page.read_text(encoding="utf-8"), quote=True)
    wrapper = work / "wrapper.html"
    wrapper.write_text(
        "<!DOCTYPE html><meta charset=utf-8><meta name=color-scheme content='light dark'>"
        + frame.format("wide", 1200, text)
        + frame.format("phone", 390, text)
        + "<script>onload = () => { const found = {};"
        + "for (const id of ['wide', 'phone']) { const view = document.getElementById(id).contentWindow;"
        + "found[id] = (function (page, view) {"
        + script
        + "})(view.document, view); }"
        + "const out = document.createElement('pre'); out.id = 'found'; out.textContent = JSON.stringify(found);"
        + "document.body.replaceChildren(out); };</script>",
        encoding="utf-8",
    )
    loaded = load(wrapper, work, "--window-size=1300,3000", *flags)
    assert not loaded.console, loaded.console
    match = re.search(r'<pre id="found">(.*)</pre>', loaded.dom, re.DOTALL)
    assert match, loaded.dom[-2000:]
    return json.loads(html.unescape(match[1]))
