"""`metrics.jsonl`: one JSON object a line, appended as training goes, and figures computed from model outputs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.manifest import IGNORE_INDEX
from edge_razor.regular_file import open_regular
from edge_razor.tensors import replacing

__all__ = ["MetricsLog", "correct_count", "loss_sum"]


class MetricsLog:
    """Appends to a run's `metrics.jsonl`. Every line has `event` ("step", "epoch", …) and `update`."""

    def __init__(self, path: Path, resume_at: tuple[int, int] | None = None) -> None:
        """`resume_at`: (update, epoch) at which the run goes on: what was logged later, and will be again, is dropped;
        None: start an empty file."""
        with replacing(path) as file:
            if resume_at is not None and path.exists():
                # Line by line: the log of a long run is larger than the cap may allow.
                with io.BufferedReader(open_regular(path)) as old:
                    file.writelines(line for line in old if _is_before(line, *resume_at))
        self._path = path
        # Unbuffered: a buffer that a full disk refused would be written, and refused, once more when it is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, event: str, update: int, **values: Any) -> None:
        """Appends one line and hands it to the operating system.

        Raises:
            OSError: it cannot be written.
        """
        rest = memoryview((json.dumps({"event": event, "update": update, **values}) + "\n").encode())
        with self._naming():
            while rest:
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Makes what was written durable: a checkpoint that is newer must not survive alone.

        Raises:
            OSError: the disk fails.
        """
        with self._naming():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Errors of an open file do not say which."""
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise


def _is_before(line: bytes, update: int, epoch: int) -> bool:
    try:
        entry = json.loads(line)
        is_epoch = entry["event"] == "epoch"
        return line.endswith(b"\n") and entry["update"] <= update and not (is_epoch and entry["epoch"] >= epoch)
    except (ValueError, KeyError, TypeError):  # the last line of a run that was cut off
        return False


def loss_sum(
    loss: str, outputs: np.ndarray, targets: np.ndarray, label_smoothing: float = 0.0, class_axis: int = 1
) -> tuple[float, float]:
    """The bundle's loss over the samples as (sum, weight), in float64: their quotient, also of sums over several
    batches, is what torch gives with reduction="mean".

    Args:
        loss: cross_entropy (weight: the targets that count), mse or bce_with_logits (weight: the samples).
        outputs: float32, samples first.
        targets: class indices in the shape of `outputs` without the class axis (`IGNORE_INDEX`: does not count), or
            floats in the shape of `outputs`.
        label_smoothing, class_axis: cross_entropy only.
    """
    x = outputs.astype(np.float64)
    if loss == "mse":
        return float(((x - targets) ** 2).reshape(len(x), -1).mean(axis=1).sum()), len(x)
    if loss == "bce_with_logits":
        losses = np.maximum(x, 0) - x * targets + np.log1p(np.exp(-np.abs(x)))
        return float(losses.reshape(len(x), -1).mean(axis=1).sum()), len(x)
    counted = targets != IGNORE_INDEX
    shifted = x - x.max(axis=class_axis, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=class_axis, keepdims=True))
    classes = np.expand_dims(np.where(counted, targets, 0), class_axis).astype(np.intp)
    picked = np.take_along_axis(log_probabilities, classes, class_axis)
    smooth = log_probabilities.mean(axis=class_axis, keepdims=True)
    losses = (-(1 - label_smoothing) * picked - label_smoothing * smooth).squeeze(class_axis)
    return float(losses[counted].sum()), int(counted.sum())


def correct_count(loss: str, outputs: np.ndarray, targets: np.ndarray, class_axis: int = 1) -> tuple[float, float]:
    """(right, of how many): targets that count for cross_entropy, samples for bce_with_logits, where a sample with
    several outputs counts by its share of right ones; (0, 0) for mse."""
    if loss == "mse":
        return 0.0, 0
    if loss == "cross_entropy":
        counted = targets != IGNORE_INDEX
        return float((outputs.argmax(axis=class_axis) == targets)[counted].sum()), int(counted.sum())
    right = (outputs > 0) == (targets > 0.5)
    return float(right.reshape(len(outputs), -1).mean(axis=1).sum()), len(outputs)
