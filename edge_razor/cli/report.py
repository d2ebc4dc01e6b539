"""Writes a run's report; a run does not fail because its report cannot be written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_razor.errors import EdgeRazorError
from edge_razor.planner import Plan

__all__ = ["write_report"]


def write_report(run: Path, plan: Plan, settings: Mapping[str, Any], bundle: Path) -> None:
    from edge_razor.report.child import write_run_report

    try:
        write_run_report(run, plan.binary, settings, bundle.name.removesuffix(".razor"))
    except (EdgeRazorError, OSError) as error:
        print(f"{run}: report.html was not written: {error}", file=sys.stderr)
