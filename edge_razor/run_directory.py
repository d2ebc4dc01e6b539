"""The run directory while a run has it: lock, `plan.json`, `metrics.jsonl`, and when a checkpoint is written."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edge_razor.checkpointing import Every
from edge_razor.memory import peak_rss_bytes
from edge_razor.metrics import MetricsLog
from edge_razor.run_lock import run_lock
from edge_razor.tensors import make_directory, remove_leftovers, replacing
from edge_razor.trainer import Trainer

__all__ = ["RunDirectory", "put_in_order"]


def put_in_order(path: Path, update: int, epoch: int) -> None:
    """Removes what a kill after the last checkpoint of a finished run left half written: files and a line of the log.

    Args:
        update, epoch: where the run ended.

    Raises:
        RunLockedError: another process has it.
        OSError: it cannot be written.
    """
    with run_lock(path):
        remove_leftovers(path)
        MetricsLog(path / "metrics.jsonl", (update, epoch)).close()


class RunDirectory:
    """Holds `path` for a trainer from entry to exit.

    Attributes:
        log: metrics.jsonl, without what a resumed run will do again.
    """

    log: MetricsLog

    def __init__(self, path: Path, trainer: Trainer, every: Every | None, keep: int, extra: dict[str, Any]) -> None:
        self.path = path
        self._trainer, self._every, self._keep, self._extra = trainer, every, keep, extra
        self._saved: tuple[int, tuple[int, int]] | None = None  # what the newest checkpoint is of
        self._stack = ExitStack()

    def __enter__(self) -> RunDirectory:
        """
        Raises:
            RunLockedError: another process has it.
            OSError: it cannot be written.
        """
        trainer = self._trainer
        with ExitStack() as stack:
            make_directory(self.path)
            stack.enter_context(run_lock(self.path))
            remove_leftovers(self.path)
            self.write_plan()
            resume_at = (trainer.update, trainer.position[0]) if trainer.update else None
            self.log = MetricsLog(self.path / "metrics.jsonl", resume_at)
            stack.callback(self.log.close)
            stack.push(self._log_memory)
            if trainer.update == 0:
                self.save()  # shows that the disk takes it, and a good checkpoint exists whatever happens
            if self._every is not None:
                self._every.saved()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _log_memory(self, kind: type[BaseException] | None, *_: object) -> None:
        """The last line of a run's part, unless the disk refused one before."""
        if kind is None or not issubclass(kind, OSError):
            guard, cap = self._trainer.guard, self._trainer.plan.summary["mem_budget"]
            figures = {"peak_rss_bytes": peak_rss_bytes(), "mem_budget": cap, "changes": guard.changes}
            self.log.write("memory", self._trainer.update, **figures, samples=guard.history())

    def write_plan(self) -> None:
        """Writes plan.json: at the beginning, and when the plan was changed.

        Raises:
            OSError: it cannot be written.
        """
        with replacing(self.path / "plan.json") as file:
            file.write((json.dumps(self._trainer.plan.summary, indent=2) + "\n").encode())

    def save_if_due(self) -> None:
        """Saves after a step if it is time to."""
        if self._every is not None and self._every.is_due(self._trainer.update):
            self.save()

    def save(self) -> None:
        """Writes a checkpoint, unless the newest one is of this very state.

        Raises:
            NonFiniteError, OSError: as `Trainer.save`.
        """
        state = (self._trainer.update, self._trainer.position)
        if state == self._saved:
            return
        self.log.sync()
        self._trainer.save(self.path, self._keep, **self._extra)
        self._saved = state
        if self._every is not None:
            self._every.saved()
