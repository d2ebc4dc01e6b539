"""Planning in a short-lived child process, so that the process that trains never imports onnx.

Protocol: one JSON object on the child's standard input (the arguments of `plan`), one JSON line on its standard output
({"plan": base64, "buckets": …, "summary": …} or {"error": class name, "message": …}).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from typing import Any

from edge_razor import errors
from edge_razor.errors import BudgetError, EdgeRazorError

from .plan_file import Plan

__all__ = ["plan_in_child", "serve"]


def plan_in_child(bundle: str | os.PathLike[str], **arguments: Any) -> Plan:
    """`plan(bundle, **arguments)` in a child process; the same result and the same errors.

    Raises:
        EdgeRazorError: beside the errors of `plan`, the child died without an answer.
    """
    request = json.dumps({"bundle": os.fspath(bundle), **arguments})
    result = subprocess.run(
        [sys.executable, "-m", "edge_razor.planner"], input=request, capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(result.stdout)
    except ValueError:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise EdgeRazorError(f"planning failed with exit status {result.returncode}: {reason}") from None
    if "error" in answer:
        raise _error(answer)
    buckets = {int(tokens): base64.b64decode(data) for tokens, data in answer["buckets"].items()}
    return Plan(base64.b64decode(answer["plan"]), answer["summary"], buckets)


def _error(answer: dict[str, Any]) -> EdgeRazorError:
    if answer["error"] == "BudgetError":
        advice = tuple((str(text), int(size)) for text, size in answer["advice"])
        return BudgetError(answer["message"], int(answer["smallest_budget"]), advice)
    kind = getattr(errors, answer["error"], EdgeRazorError)
    return kind(answer["message"])


def serve() -> None:
    """The child: answers the request on standard input."""
    from .planning import plan

    try:
        made = plan(**json.load(sys.stdin))
        buckets = {tokens: base64.b64encode(data).decode() for tokens, data in made.buckets.items()}
        plan_file = base64.b64encode(made.binary).decode()
        answer: dict[str, Any] = {"plan": plan_file, "summary": made.summary, "buckets": buckets}
    except EdgeRazorError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
        if isinstance(error, BudgetError):
            answer |= {"smallest_budget": error.smallest_budget, "advice": error.advice}
    json.dump(answer, sys.stdout)
