"""Training a classifier on the same batches in PyTorch and in edge-razor: what the accuracy benchmarks share."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.common import markdown_table
from benchmarks.seeds import by_case, spread

__all__ = ["NOTE", "Data", "Steps", "bundle_for", "cosine_steps", "table", "train_edge_razor", "train_torch"]

Data = tuple[list[np.ndarray], np.ndarray]
"""What the model takes, each [samples, …], and the labels, int64 [samples]."""
Steps = list[tuple[np.ndarray, float]]
"""Indices of the samples [batch] and learning rate of every step."""
THREADS = 1
LAST = 100  # steps that the final loss is the mean of
NOTE = f"\nFinal training loss: mean of the last {LAST} steps. ± is the standard deviation over seeds.\n"


def cosine_steps(seed: int, samples: int, epochs: int, batch: int, rate: float) -> Steps:
    """Epochs of all samples in random order, without a last batch that is not full; the rate falls to 0."""
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(samples) for _ in range(epochs)]
    chosen = [order[i : i + batch] for order in orders for i in range(0, samples - batch + 1, batch)]
    rates = [rate * 0.5 * (1 + math.cos(math.pi * step / len(chosen))) for step in range(len(chosen))]
    return list(zip(chosen, rates, strict=True))


def _result(losses: list[float], hits: np.ndarray) -> dict[str, float]:
    return {"loss": mean(losses[-LAST:]), "accuracy": 100 * float(hits.mean())}


def train_torch(model: Any, train: Data, test: Data, steps: Steps) -> dict[str, float]:
    """Trains with AdamW (no weight decay) and tests: {"loss": final training loss, "accuracy": of the test, %}."""
    import torch

    torch.set_num_threads(THREADS)
    (inputs, labels), (test_inputs, expected) = train, test
    optimizer, losses = torch.optim.AdamW(model.parameters(), weight_decay=0.0), []
    for chosen, rate in steps:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        logits = model(*(torch.from_numpy(x[chosen]) for x in inputs))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[chosen]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        batches = ([torch.from_numpy(x[i : i + 100]) for x in test_inputs] for i in range(0, len(expected), 100))
        found = torch.cat([model(*batch).argmax(1) for batch in batches]).numpy()
    return _result(losses, found == expected)


def train_edge_razor(
    bundle: Path, train: Data, test: Data, steps: Steps, sparsity: float, form: str
) -> dict[str, float]:
    """As `train_torch`, with a bundle of the model."""
    import edge_razor

    (inputs, labels), (test_inputs, expected) = train, test
    batch = len(steps[0][0])
    with edge_razor.Trainer(
        bundle, batch_size=batch, sparsity=sparsity, razor=form, optimizer="adamw", lr=steps[0][1], threads=THREADS
    ) as trainer:
        losses = []
        for chosen, trainer.lr in steps:
            losses.append(trainer.step([x[chosen] for x in inputs], labels[chosen]))
        return _result(losses, trainer.predict(test_inputs).argmax(1) == expected)


def bundle_for(benchmark: str, *arguments: str) -> Path:
    """A bundle that ``python -m benchmarks.<benchmark> --export ARGUMENTS… PATH`` makes, unless an earlier run did."""
    path = Path(tempfile.gettempdir()) / f"edge-razor-{'-'.join((benchmark, *(a[:4] for a in arguments)))}.razor"
    if not path.exists():
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--export", *arguments, str(path)]
        subprocess.run(command, check=True)
    return path


def table(runs: list[dict[str, Any]], cases: Iterable[str]) -> str:
    rows = []
    for case, mine in by_case(runs, cases):
        accuracy, loss = [run["accuracy"] for run in mine], [run["loss"] for run in mine]
        each = ", ".join(f"{value:.1f}" for value in accuracy)
        rows.append((case, len(mine), spread(loss, 3), spread(accuracy, 2), each))
    header = ("system", "seeds", "final training loss", "test accuracy, %", "each seed")
    return markdown_table(header, rows) + NOTE
