"""`metrics.jsonl`: one JSON object a line, appended as training goes, and figures computed from model outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edge_razor.tensors import replacing

__all__ = ["MetricsLog", "correct_count", "loss_sum"]


class MetricsLog:
    """Appends to a run's `metrics.jsonl`. Every line has `event` ("step", "epoch", …) and `update`."""

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        """`resume_at`: drop what was logged after that update; None: start an empty file."""
        kept = []
        if resume_at is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["update"] <= resume_at:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):  # the last line of a run that was cut off
                    continue
        with replacing(path) as file:
            file.write("".join(kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, event: str, update: int, **values: Any) -> None:
        """Appends one line and hands it to the operating system."""
        self._file.write(json.dumps({"event": event, "update": update, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def loss_sum(
    loss: str, outputs: np.ndarray, targets: np.ndarray, label_smoothing: float = 0.0, class_axis: int = 1
) -> float:
    """Sum over the samples of the bundle's loss, in float64, as torch defines it with reduction="mean" for one sample.

    Args:
        loss: cross_entropy, mse or bce_with_logits.
        outputs: float32, samples first.
        targets: class indices in the shape of `outputs` without the class axis, or floats in the shape of `outputs`.
        label_smoothing, class_axis: cross_entropy only.
    """
    x = outputs.astype(np.float64)
    if loss == "mse":
        return float(((x - targets) ** 2).reshape(len(x), -1).mean(axis=1).sum())
    if loss == "bce_with_logits":
        losses = np.maximum(x, 0) - x * targets + np.log1p(np.exp(-np.abs(x)))
        return float(losses.reshape(len(x), -1).mean(axis=1).sum())
    shifted = x - x.max(axis=class_axis, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=class_axis, keepdims=True))
    picked = np.take_along_axis(log_probabilities, np.expand_dims(targets, class_axis).astype(np.intp), class_axis)
    smooth = log_probabilities.mean(axis=class_axis, keepdims=True)
    losses = -(1 - label_smoothing) * picked - label_smoothing * smooth
    return float(losses.reshape(len(x), -1).mean(axis=1).sum())


def correct_count(loss: str, outputs: np.ndarray, targets: np.ndarray, class_axis: int = 1) -> float | None:
    """Samples that are right (a sample with several positions counts by its share of right ones); None for mse."""
    if loss == "mse":
        return None
    right = outputs.argmax(axis=class_axis) == targets if loss == "cross_entropy" else (outputs > 0) == (targets > 0.5)
    return float(right.reshape(len(outputs), -1).mean(axis=1).sum())
