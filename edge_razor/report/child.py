"""A run's report, made in a child process from its run directory (`plan.json`, `metrics.jsonl`) and the plan file: the
process that trains has no memory for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_razor.child import ask
from edge_razor.tensors import replacing

__all__ = ["answer", "write_run_report"]


def write_run_report(run: Path, plan: bytes, settings: Mapping[str, Any], name: str) -> Path:
    """Writes `report.html` into a run directory, in a child process; returns its path.

    Args:
        run: run directory with plan.json and metrics.jsonl.
        plan: the plan file that the run executed last.
        settings: what to list, JSON-able.
        name: of the model.

    Raises:
        EdgeRazorError: the child failed.
    """
    request = {
        "run": str(run),
        "plan": base64.b64encode(plan).decode(),
        "settings": dict(settings),
        "name": name,
    }
    return Path(ask("edge_razor.report", request, "writing the report")["path"])


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """What the child does with a request."""
    run = Path(request["run"])
    summary = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    from .run_page import run_page

    events = _read_events(run / "metrics.jsonl")
    text = run_page(request["name"], summary, base64.b64decode(request["plan"]), events, request["settings"])
    path = run / "report.html"
    with replacing(path) as file:
        file.write(text.encode())
    return {"path": str(path)}


def _read_events(path: Path) -> list[dict[str, Any]]:
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the last line of a run that was cut off
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events
