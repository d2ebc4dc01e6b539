"""Planning in a child process (`edge_razor.child`), so that the process that trains never imports onnx."""

from __future__ import annotations

import base64
import os
from typing import Any

from edge_razor.child import ask

from .plan_file import Plan

__all__ = ["answer", "plan_in_child"]


def plan_in_child(bundle: str | os.PathLike[str], **arguments: Any) -> Plan:
    """`plan(bundle, **arguments)` in a child process; the same result and the same errors.

    Raises:
        EdgeRazorError: beside the errors of `plan`, the child died without an answer.
    """
    remedy = "plan where there is more, with 'edge-razor plan -o model.plan', and train with --plan model.plan"
    made = ask("edge_razor.planner", {"bundle": os.fspath(bundle), **arguments}, "planning", remedy=remedy)
    buckets = {int(tokens): base64.b64decode(data) for tokens, data in made["buckets"].items()}
    return Plan(base64.b64decode(made["plan"]), made["summary"], buckets)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the child does with a request."""
    from .planning import plan

    made = plan(**request)
    buckets = {tokens: base64.b64encode(data).decode() for tokens, data in made.buckets.items()}
    return {"plan": base64.b64encode(made.binary).decode(), "summary": made.summary, "buckets": buckets}
