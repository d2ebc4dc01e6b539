"""Every error that edge-razor raises on purpose: one class per cause, each with the CLI's exit status.

A message is one or two lines that name the thing at fault and the remedy.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "Advice",
    "BudgetError",
    "BundleError",
    "CheckpointError",
    "DataError",
    "EdgeRazorError",
    "MemoryCapError",
    "NonFiniteError",
    "PlanError",
    "RunLockedError",
    "UnsupportedOpError",
    "UsageError",
]


class EdgeRazorError(Exception):
    """Base of all. ``exit_status`` is what the command line returns for it."""

    exit_status = 4


class UsageError(EdgeRazorError, ValueError):
    """An argument has a wrong value, shape or type."""

    exit_status = 2


class Advice(NamedTuple):
    """What a change of settings would bring: the smallest cap (bytes) that works then, and the expected relative error
    of the gradient and seconds of an update at that cap."""

    change: str
    smallest_budget: int
    gradient_error: float
    seconds: float


class BudgetError(EdgeRazorError):
    """The memory cap cannot be met.

    Attributes:
        smallest_budget: bytes of the smallest cap that works with the present settings.
        advice: (what to change, smallest cap in bytes that it would bring), best first.
        table: the present settings, then each change that helps, in the order of `advice`.
    """

    exit_status = 3

    def __init__(
        self,
        message: str,
        smallest_budget: int,
        advice: tuple[tuple[str, int], ...] = (),
        table: tuple[Advice, ...] = (),
    ) -> None:
        super().__init__(message)
        self.smallest_budget = smallest_budget
        self.advice = advice
        self.table = table


class MemoryCapError(EdgeRazorError):
    """Resident memory came close to the cap while training, above what was planned; training stopped between steps.

    Attributes:
        parts: (what, bytes planned, bytes seen) of the process's memory.
    """

    exit_status = 3

    def __init__(self, message: str, parts: tuple[tuple[str, int, int], ...] = ()) -> None:
        super().__init__(message)
        self.parts = parts


class OutOfMemoryError(EdgeRazorError):
    """The system ended a helper process, most likely for want of memory."""

    exit_status = 3


class BundleError(EdgeRazorError):
    """A model bundle is missing, truncated, altered, or of another format version."""


class PlanError(EdgeRazorError):
    """A plan file is damaged or belongs to another bundle."""


class CheckpointError(EdgeRazorError):
    """A checkpoint is missing, damaged, or belongs to another bundle."""


class RunLockedError(EdgeRazorError):
    """Another process is training in the run directory."""


class DataError(EdgeRazorError):
    """A data set is empty, mixed up, or holds a file that cannot be read."""


class NonFiniteError(EdgeRazorError):
    """Loss or activations became NaN or infinite; training stopped before the update."""


class UnsupportedOpError(EdgeRazorError):
    """The model has operators that the exporter does not know; all of them are listed.

    Attributes:
        nodes: (node name, operator type, input shapes as text) of each.
    """

    def __init__(self, message: str, nodes: tuple[tuple[str, str, str], ...] = ()) -> None:
        super().__init__(message)
        self.nodes = nodes
