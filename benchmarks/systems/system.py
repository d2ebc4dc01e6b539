"""What a system offers to the worker that drives it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class System:
    """One system, set up.

    Attributes:
        step: one training step (or one inference, for what only infers); returns the loss (or an output).
        setup: JSON-able figures that are known before the first step.
        finish: called after the last step and after the peak memory was read: more JSON-able figures, such as
            ``kept_bytes``, what autograd keeps between the passes.
        profile: runs this many steps and returns ``edge_razor.profile`` lines as dictionaries; None: has no profile.
    """

    step: Callable[[], float]
    setup: dict[str, Any] = field(default_factory=dict)
    finish: Callable[[], dict[str, Any]] = dict
    profile: Callable[[int], list[dict[str, Any]]] | None = None


Maker = Callable[[argparse.Namespace, np.ndarray, np.ndarray], System]
