"""The training loop over epochs: steps, metrics, evaluation, checkpoints, resuming. What `edge-razor train` runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_razor.data.loader import Batch
from edge_razor.errors import MemoryCapError
from edge_razor.memory import peak_rss_bytes, rss_bytes
from edge_razor.metrics import MetricsLog
from edge_razor.tensors import replacing
from edge_razor.trainer import Trainer

__all__ = ["Epochs", "Events", "FitResult", "fit"]


class Epochs(Protocol):
    """What feeds `fit`: `edge_razor.data.Loader`, or `IterableLoader` around any iterable of batches."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on."""
        ...

    def __iter__(self) -> Iterator[tuple[Any, Any]]: ...


@dataclass(slots=True)
class Events:
    """What a caller wants to hear and say while `fit` runs; all may be left alone."""

    on_step: Callable[[dict[str, Any]], None] = lambda figures: None
    on_epoch: Callable[[dict[str, Any]], None] = lambda figures: None
    between_steps: Callable[[], None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(slots=True)
class FitResult:
    """Figures of a finished or interrupted run. `alarm`: memory grew close to the cap, which ended it."""

    interrupted: bool = False
    alarm: MemoryCapError | None = None
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    last_loss: float | None = None
    evaluation: dict[str, Any] | None = None
    peak_rss_bytes: int = 0


def fit(
    trainer: Trainer,
    train: Epochs,
    *,
    epochs: int,
    validation: Epochs | None = None,
    out: Path | None = None,
    log_every: int = 10,
    save_every: int | None = None,
    events: Events | None = None,
    extra: dict[str, Any] | None = None,
) -> FitResult:
    """Trains from the trainer's position to the end of epoch `epochs`.

    Args:
        trainer: new or resumed; `trainer.position` says where it goes on.
        train, validation: what to train on and, after each epoch, to evaluate on.
        out: run directory for checkpoint, metrics.jsonl and plan.json; None: nothing is written.
        log_every: steps between lines in metrics.jsonl.
        save_every: steps between checkpoints, beside the one after each epoch.
        events: callbacks: figures of each step and each epoch; after each step a place to change the trainer's budget,
            and whether to stop.
        extra: JSON-able values to keep in the checkpoint.

    Raises:
        NonFiniteError: the loss or a parameter is not finite; the last good checkpoint stays.
        DataError, UsageError: from the data.
        OSError: the run directory cannot be written.
    """
    events, extra = events or Events(), extra or {}
    result = FitResult()
    log = _open_run(trainer, out) if out is not None else None
    logged, logged_at = 0, 0.0  # samples and seconds at the last logged step
    if out is not None and trainer.update == 0:
        trainer.save(out, **extra)  # shows that the disk takes it, and a good checkpoint exists whatever happens
    start = time.perf_counter()
    try:
        for epoch in range(trainer.position[0], epochs):
            for batch in train.batches(epoch, trainer.position[1]):
                rate = trainer.current_lr
                try:
                    result.last_loss = trainer.step(batch.inputs, batch.targets)
                except MemoryCapError as error:  # before anything changed
                    result.alarm, result.interrupted = error, True
                    break
                trainer.position = (epoch, batch.done)
                result.steps += 1
                result.samples += len(batch.targets)
                result.seconds = time.perf_counter() - start
                figures: dict[str, Any] = {
                    "epoch": epoch,
                    "loss": result.last_loss,
                    "lr": rate,
                    "samples_per_second": result.samples / result.seconds,
                    "rss_bytes": rss_bytes(),
                }
                spill = trainer.spill_info()
                if spill.file_bytes:
                    figures["spill_written_bytes"] = spill.written_bytes
                    figures["spill_waited_seconds"] = round(spill.waited_seconds, 3)
                events.on_step(figures)
                if log is not None and (trainer.update % log_every == 0 or trainer.update == 1):
                    recent = (result.samples - logged) / (result.seconds - logged_at)
                    log.write("step", trainer.update, **figures, recent_samples_per_second=recent)
                    logged, logged_at = result.samples, result.seconds
                plan = trainer.plan
                events.between_steps()
                if trainer.plan is not plan and out is not None:
                    _write_plan(trainer, out)
                if events.should_stop():
                    result.interrupted = True
                    break
                if out is not None and save_every and trainer.update % save_every == 0:
                    trainer.save(out, **extra)
            if result.interrupted:
                break
            trainer.position = (epoch + 1, 0)
            figures = {"epoch": epoch, "loss": result.last_loss, "seconds": round(result.seconds, 3)}
            if validation is not None:
                result.evaluation = trainer.evaluate(validation)
                figures["validation"] = result.evaluation
            figures["peak_rss_bytes"] = peak_rss_bytes()
            if out is not None:
                trainer.save(out, **extra)
            if log is not None:
                log.write("epoch", trainer.update, **figures)
            events.on_epoch(figures)
        if result.interrupted and out is not None:
            trainer.save(out, **extra)
    finally:
        if log is not None:
            samples = trainer.guard.history()
            log.write("memory", trainer.update, peak_rss_bytes=peak_rss_bytes(), samples=samples)
            log.close()
    result.peak_rss_bytes = peak_rss_bytes()
    return result


def _open_run(trainer: Trainer, out: Path) -> MetricsLog:
    out.mkdir(parents=True, exist_ok=True)
    _write_plan(trainer, out)
    return MetricsLog(out / "metrics.jsonl", trainer.update if trainer.update else None)


def _write_plan(trainer: Trainer, out: Path) -> None:
    with replacing(out / "plan.json") as file:
        file.write((json.dumps(trainer.plan.summary, indent=2) + "\n").encode())
