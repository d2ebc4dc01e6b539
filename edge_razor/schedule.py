"""Learning-rate schedules: a factor on the base rate as a function of the update number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_razor.errors import UsageError

__all__ = ["SCHEDULES", "Schedule"]

SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True, slots=True)
class Schedule:
    """`kind` after a linear warm-up of `warmup_steps` updates; cosine and linear fall to zero just after `total_steps`.

    The factor of update t (from 1) is t/(warmup + 1) while warming up. After that, with
    p = (t − 1 − warmup)/(total − warmup): constant 1, cosine (1 + cos πp)/2, linear 1 − p. So update warmup + 1 has the
    full rate, as in torch's CosineAnnealingLR, and no update has rate zero.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UsageError(f"schedule {self.kind!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        if self.warmup_steps < 0:
            raise UsageError(f"warm-up must be 0 or more steps, not {self.warmup_steps}")
        if self.kind != "constant" and self.total_steps is None:
            raise UsageError(f"schedule {self.kind!r} needs total_steps")
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise UsageError(f"total_steps {self.total_steps} must exceed the {self.warmup_steps} steps of warm-up")

    def factor(self, update: int) -> float:
        """Factor for update number `update`, from 1; past `total_steps` that of the last update."""
        if update <= self.warmup_steps:
            return update / (self.warmup_steps + 1)
        if self.kind == "constant" or self.total_steps is None:
            return 1.0
        progress = (min(update, self.total_steps) - 1 - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
