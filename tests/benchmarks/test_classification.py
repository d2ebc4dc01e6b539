"""What the accuracy benchmarks share: the batches, training in both systems, the classes of Fashion-MNIST."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge_razor
from benchmarks import accuracy_vit, common
from benchmarks.classification import Data, cosine_steps, table, train_edge_razor, train_torch


def test_steps_are_whole_epochs_in_full_batches_with_a_rate_that_falls_to_nothing() -> None:
    steps = cosine_steps(seed=3, samples=10, epochs=2, batch=4, rate=0.5)
    assert [len(chosen) for chosen, _ in steps] == [4] * 4, "two of the ten are left over in each epoch"
    for epoch in (steps[:2], steps[2:]):
        assert len(np.unique(np.concatenate([chosen for chosen, _ in epoch]))) == 8
    rates = [rate for _, rate in steps]
    assert rates[0] == 0.5 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.1


def points(count: int, seed: int) -> Data:
    """Points of a plane, and on which side of a line they are."""
    x = np.random.default_rng(seed).standard_normal((count, 2), dtype=np.float32)
    return [x], (x.sum(1) > 0).astype(np.int64)


def test_both_systems_find_the_same_loss_and_accuracy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    bundle = tmp_path / "model.razor"
    edge_razor.export(model, (torch.zeros(2, 2),), bundle)
    train, test = points(160, 0), points(250, 1)
    steps = cosine_steps(0, 160, epochs=4, batch=16, rate=0.05)
    ours = train_edge_razor(bundle, train, test, steps, 0.0, "centered")
    theirs = train_torch(model, train, test, steps)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.5)
    assert ours["accuracy"] > 90, "it learned something, so the figures are not those of the start"


def test_a_row_for_each_case_that_ran_says_how_many_seeds_it_has() -> None:
    runs = [{"case": "a", "seed": s, "loss": 0.5, "accuracy": 80.0 + s} for s in range(2)]
    runs.append({"case": "b", "seed": 0, "loss": 0.25, "accuracy": 90.0})
    assert table(runs, ("b", "a", "c")).splitlines()[2:4] == [
        "| b | 1 | 0.250 | 90.00 | 90.0 |",
        "| a | 2 | 0.500 ± 0.000 | 80.50 ± 0.71 | 80.0, 81.0 |",
    ]


def test_data_has_some_classes_of_the_set_counted_from_zero(tmp_path: Path, monkeypatch: Any) -> None:
    labels = np.arange(40, dtype=np.uint8) % 10
    images = np.repeat(labels, 28 * 28)  # each image has the brightness of its class
    for name, header, content in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
        with gzip.open(tmp_path / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(bytes(header) + content.tobytes())
    monkeypatch.setattr(common, "FASHION_MNIST", tmp_path)
    shown, classes = common.fashion_mnist("train", 12, 28, classes=range(5, 10))
    assert set(classes) <= set(range(5, 10)) and len(classes) == 12
    assert (shown == classes[:, None, None, None]).all(), "an image and its label stay together"
    (inputs,), targets = accuracy_vit.data("train", 12, accuracy_vit.NEW)
    assert inputs.shape == (12, 3, 28, 28) and (targets == classes - 5).all()
