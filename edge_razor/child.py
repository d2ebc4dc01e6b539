"""Work that needs large libraries, in a short-lived child process, so that the process that trains never holds them.

Protocol: one JSON object (the request) on the child's standard input, one JSON object on its standard output: the
answer, or {"error": class name, "message": …}, and for a BudgetError its `smallest_budget`, `advice` and `table`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from edge_razor import errors
from edge_razor.errors import Advice, BudgetError, EdgeRazorError, OutOfMemoryError

__all__ = ["ask", "serve"]


def ask(
    module: str,
    request: Mapping[str, Any],
    doing: str,
    environment: Mapping[str, str] | None = None,
    remedy: str = "",
) -> dict[str, Any]:
    """The answer of `python -m module` to a request.

    Args:
        doing: what the child does, for the message if it dies: "planning".
        environment: variables beside this process's own.
        remedy: what helps if there is not memory enough for the child.

    Raises:
        OutOfMemoryError: the child was killed.
        EdgeRazorError: the child's own error, of its own class; or it died without an answer.
    """
    result = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    try:
        answer: dict[str, Any] = json.loads(result.stdout)
    except ValueError:
        if result.returncode == -signal.SIGKILL:
            killed = f"{doing} was killed, most likely because memory ran out"
            raise OutOfMemoryError(killed + (f"; {remedy}" if remedy else "")) from None
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise EdgeRazorError(f"{doing} failed with exit status {result.returncode}: {reason}") from None
    if "error" in answer:
        raise _error(answer)
    return answer


def _error(answer: dict[str, Any]) -> EdgeRazorError:
    if answer["error"] == "BudgetError":
        advice = tuple((str(text), int(size)) for text, size in answer["advice"])
        table = tuple(Advice(*row) for row in answer["table"])
        return BudgetError(answer["message"], int(answer["smallest_budget"]), advice, table)
    kind = getattr(errors, answer["error"], EdgeRazorError)
    return kind(answer["message"])


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child: answers the request on standard input with what `handle` makes of it."""
    try:
        answer = handle(json.load(sys.stdin))
    except EdgeRazorError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
        if isinstance(error, BudgetError):
            answer |= {"smallest_budget": error.smallest_budget, "advice": error.advice, "table": error.table}
    json.dump(answer, sys.stdout)
