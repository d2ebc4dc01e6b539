"""The training loop over epochs: steps, metrics, evaluation, checkpoints, resuming. What `edge-razor train` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_razor.checkpointing import Every
from edge_razor.data.loader import Batch
from edge_razor.errors import DataError, MemoryCapError
from edge_razor.memory import peak_rss_bytes, rss_bytes
from edge_razor.run_directory import RunDirectory
from edge_razor.throttle import Throttle
from edge_razor.trainer import KEEP, Trainer

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
    on_message: Callable[[str], None] = lambda text: None
    between_steps: Callable[[], None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(slots=True)
class FitResult:
    """Figures of a finished or interrupted run. `alarm`: memory grew close to the cap, which ended it."""

    interrupted: bool = False
    alarm: MemoryCapError | None = None
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0  # without pauses
    paused_seconds: float = 0.0
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
    checkpoint_every: Every | None = None,
    keep: int = KEEP,
    throttle: Throttle | None = None,
    events: Events | None = None,
    extra: dict[str, Any] | None = None,
) -> FitResult:
    """Trains from the trainer's position to the end of epoch `epochs`.

    Args:
        trainer: new or resumed; `trainer.position` says where it goes on.
        train, validation: what to train on and, after each epoch, to evaluate on.
        out: run directory for checkpoints, metrics.jsonl and plan.json; None: nothing is written.
        log_every: steps between lines in metrics.jsonl.
        checkpoint_every: steps or seconds between checkpoints, beside the one after each epoch.
        keep: how many checkpoints stay.
        throttle: pauses between steps and batches of an evaluation; a checkpoint is written when one begins.
        events: callbacks: figures of each step and each epoch, messages; after each step a place to change the
            trainer's budget; and whether to stop (asked between batches).
        extra: JSON-able values to keep in the checkpoint.

    Raises:
        NonFiniteError: the loss or a parameter is not finite; the last good checkpoint stays.
        DataError, UsageError: from the data; the steps before are saved.
        OSError: the run directory cannot be written; the newest checkpoint stays.
        RunLockedError: another process is training in `out`.
    """
    events = events or Events()
    result = FitResult()
    with ExitStack() as stack:
        run = None
        if out is not None:
            run = stack.enter_context(RunDirectory(out, trainer, checkpoint_every, keep, extra or {}))
        try:
            _epochs(trainer, train, epochs, validation, run, log_every, throttle, events, result)
        except (_Stopped, MemoryCapError, DataError) as error:  # each between two steps
            result.interrupted = True
            if run is not None:
                run.save()
            if isinstance(error, DataError):
                raise
            if isinstance(error, MemoryCapError):
                result.alarm = error
    result.peak_rss_bytes = peak_rss_bytes()
    return result


class _Stopped(Exception):
    """The caller wants to stop, between two batches."""


def _epochs(
    trainer: Trainer,
    train: Epochs,
    epochs: int,
    validation: Epochs | None,
    run: RunDirectory | None,
    log_every: int,
    throttle: Throttle | None,
    events: Events,
    result: FitResult,
) -> None:
    if throttle is not None:
        throttle.start()
    start = time.perf_counter()
    logged, logged_at = 0, 0.0  # samples and seconds at the last logged step

    def check() -> None:
        if events.should_stop():
            raise _Stopped

    def pausing(reason: str) -> None:
        events.on_message(f"paused: {reason}")
        if run is not None:
            run.save()  # a pause may be the end: the battery is empty, the machine is switched off

    def between() -> None:
        if throttle is not None:
            result.paused_seconds += throttle.between_steps(events.should_stop, pausing, events.on_message)
        check()

    def watched(batches: Epochs) -> Iterator[tuple[Any, Any]]:
        for batch in batches:
            yield batch
            between()

    for epoch in range(trainer.position[0], epochs):
        for batch in train.batches(epoch, trainer.position[1]):
            check()  # the batch may have taken its time
            rate = trainer.current_lr
            result.last_loss = trainer.step(batch.inputs, batch.targets)
            trainer.position = (epoch, batch.done)
            result.steps += 1
            result.samples += len(batch.targets)
            result.seconds = time.perf_counter() - start - result.paused_seconds
            figures: dict[str, Any] = {
                "epoch": epoch,
                "loss": result.last_loss,
                "lr": rate,
                "samples_per_second": result.samples / result.seconds,
                "rss_bytes": rss_bytes(),
            }
            if throttle is not None:
                figures["paused_seconds"] = round(result.paused_seconds, 3)
            spill = trainer.spill_info()
            if spill.file_bytes:
                figures["spill_written_bytes"] = spill.written_bytes
                figures["spill_waited_seconds"] = round(spill.waited_seconds, 3)
            events.on_step(figures)
            if run is not None and (trainer.update % log_every == 0 or trainer.update == 1):
                recent = (result.samples - logged) / (result.seconds - logged_at)
                run.log.write("step", trainer.update, **figures, recent_samples_per_second=recent)
                logged, logged_at = result.samples, result.seconds
            plan = trainer.plan
            events.between_steps()
            if trainer.plan is not plan and run is not None:
                run.write_plan()
            check()
            if run is not None:
                run.save_if_due()
            between()
        figures = {"epoch": epoch, "loss": result.last_loss, "seconds": round(result.seconds, 3)}
        if throttle is not None:
            figures["paused_seconds"] = round(result.paused_seconds, 3)
        if validation is not None:
            result.evaluation = trainer.evaluate(watched(validation))
            figures["validation"] = result.evaluation
        figures["peak_rss_bytes"] = peak_rss_bytes()
        # Only now: a run that stops in the evaluation does it when it is resumed.
        trainer.position = (epoch + 1, 0)
        if run is not None:
            run.log.write("epoch", trainer.update, **figures)
            run.save()
        events.on_epoch(figures)
