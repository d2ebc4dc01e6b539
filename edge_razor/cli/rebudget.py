"""`SIGUSR1` while training: plan again for another cap at the next step boundary.

The new cap is what the file `budget` in the run directory says ("200MB", or "auto"). Without that file a run that was
started with `--mem-budget auto` looks again at what is free.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from edge_razor.budget import AUTO, resolve_budget
from edge_razor.errors import EdgeRazorError
from edge_razor.planner.summary import error_text
from edge_razor.trainer import Trainer
from edge_razor.units import format_bytes

from .progress import Progress

__all__ = ["BUDGET_FILE", "BudgetSignal", "budget_signal"]

BUDGET_FILE = "budget"  # in the run directory


class BudgetSignal:
    """Whether the signal came since `apply` was called last."""

    pending = False

    def apply(self, trainer: Trainer, out: Path, given: str | None, progress: Progress) -> None:
        """Between two steps: sets the new cap, or says why not and leaves everything as it is.

        Args:
            out: run directory.
            given: the command line's cap.
        """
        if not self.pending:
            return
        self.pending = False
        try:
            amount = self._amount(out, given)
            if amount is None:
                progress.say(f"SIGUSR1: there is no {out / BUDGET_FILE}, and the cap is not auto: nothing changes")
                return
            cap, why = resolve_budget(amount)
            plan = trainer.set_budget(cap, scratch=out)
        except (EdgeRazorError, OSError) as error:
            progress.say(f"SIGUSR1: {error}; the plan stays as it was")
            return
        progress.cap = cap
        text = why or format_bytes(cap or 0)
        progress.say(
            f"new cap: {text}; gradient error {error_text(plan.summary['gradient_error'])}, "
            f"micro-batch {plan.micro_batch}, "
            f"predicted peak {format_bytes(plan.predicted_peak_bytes)}"
        )

    @staticmethod
    def _amount(out: Path, given: str | None) -> str | None:
        try:
            return (out / BUDGET_FILE).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return AUTO if given is not None and given.strip().lower() == AUTO else None


@contextmanager
def budget_signal() -> Iterator[BudgetSignal]:
    """Notes SIGUSR1 while the block runs, where the system has it: before the first step and after the last, too, where
    it would end the process otherwise."""
    noted = BudgetSignal()

    def handle(number: int, frame: FrameType | None) -> None:
        noted.pending = True

    if not hasattr(signal, "SIGUSR1"):
        yield noted
        return
    previous = signal.signal(signal.SIGUSR1, handle)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGUSR1, previous)
