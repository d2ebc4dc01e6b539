"""On-device fine-tuning inside a memory cap.

`export` (workstation; needs the extra ``export``) makes a bundle from a torch or ONNX model, `plan` places every byte
of its training under a cap, `Trainer` trains it. Importing this package loads neither numpy nor torch nor onnx: each
name loads what it needs at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edge_razor.errors import (
    BudgetError,
    BundleError,
    CheckpointError,
    DataError,
    EdgeRazorError,
    MemoryCapError,
    NonFiniteError,
    PlanError,
    RunLockedError,
    UnsupportedOpError,
    UsageError,
)

if TYPE_CHECKING:
    from edge_razor.bundle import Bundle
    from edge_razor.exporters.export import export
    from edge_razor.planner import Plan, plan
    from edge_razor.trainer import Trainer

__all__ = [
    "BudgetError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "DataError",
    "EdgeRazorError",
    "MemoryCapError",
    "NonFiniteError",
    "Plan",
    "PlanError",
    "RunLockedError",
    "Trainer",
    "UnsupportedOpError",
    "UsageError",
    "export",
    "plan",
]

__version__ = "0.1.0"

_LAZY = {
    "Bundle": "edge_razor.bundle",
    "Plan": "edge_razor.planner",
    "Trainer": "edge_razor.trainer",
    "export": "edge_razor.exporters.export",
    "plan": "edge_razor.planner",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
