"""Live progress of training: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

from edge_razor.units import format_bytes

__all__ = ["Progress"]

LINE_SECONDS = 10.0  # between plain lines


class Progress:
    """Shows loss, images a second, resident memory against the cap, and the time left."""

    def __init__(self, total_steps: int, cap: int | None) -> None:
        """Imports what it draws with, so that a memory reading after this includes it."""
        self.total = total_steps
        self.cap = cap
        self.done = 0
        self._start = 0
        self._began = time.monotonic()
        self._printed = 0.0
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("train", total=total_steps, figures="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start_at(self, update: int) -> None:
        """A resumed run has `update` steps behind it."""
        self._start = self.done = update
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=update)

    def step(self, figures: dict[str, Any]) -> None:
        """One step is done."""
        self.done += 1
        memory = format_bytes(figures["rss_bytes"]) + (f" of {format_bytes(self.cap)}" if self.cap else "")
        text = f"loss {figures['loss']:.4f}  {figures['samples_per_second']:.1f} samples/s  {memory}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, figures=text)
            return
        now = time.monotonic()
        if now - self._printed >= LINE_SECONDS or self.done == self.total:
            self._printed = now
            left = (now - self._began) / (self.done - self._start) * (self.total - self.done)
            print(f"step {self.done}/{self.total}  {text}  {_clock(left)} left")

    def epoch(self, figures: dict[str, Any]) -> None:
        """One epoch is done."""
        text = f"epoch {figures['epoch'] + 1}: "
        # A run stopped behind an epoch's last step, and resumed, has no step left in it.
        text += "no step was left" if figures["loss"] is None else f"loss {figures['loss']:.4f}"
        validation = figures.get("validation")
        if validation is not None:
            text += f", validation loss {validation['loss']:.4f}"
            if validation["accuracy"] is not None:
                text += f", accuracy {validation['accuracy']:.2%}"
        self.say(text)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
