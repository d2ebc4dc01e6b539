"""Another cap while training: a new plan takes over everything, and the same bits follow."""

from __future__ import annotations

import json
import os
import signal
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edge_razor
from edge_razor import BudgetError, Trainer, UsageError
from edge_razor.checkpoint import BUFFER_BYTES, Checkpoint
from edge_razor.cli import main, train
from edge_razor.data.arrays import ArraySource
from edge_razor.handover import put_aside, take_back
from edge_razor.memory import rss_bytes
from tests.models import Head, conv_bn
from tests.small import CLASSES, IMAGE, small_data, write_small_data


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, so that its random numbers count, and a frozen first layer."""
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn(3, 16, 3, 2), conv_bn(16, 24, 3), Head(24, CLASSES, dropout=0.5)).eval()
    path = tmp_path_factory.mktemp("rebudget") / "model.razor"
    edge_razor.export(model, (torch.zeros(2, *IMAGE),), path, trainable="last:2")
    return path


def everything(trainer: Trainer) -> dict[str, np.ndarray]:
    """Parameters and optimizer state."""
    session = trainer._session
    found = {name: session.read_parameter(name) for name in session.parameters()}
    for name, parameter in session.parameters().items():
        found |= {f"{name}/{slot}": session.read_state(name, slot) for slot in range(parameter.states)}
    return found


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].view(np.int32), b[name].view(np.int32), err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "micro_batch": 8},
        {"optimizer": "sgd", "nesterov": True, "micro_batch": 4},
        {"optimizer": "adamw", "weight_decay": 0.1, "micro_batch": 2},
    ],
)
def test_with_exact_storage_the_bits_are_those_of_an_uninterrupted_run(
    bundle: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    settings = {"sparsity": 0.0, "batch_size": 8, "lr": 0.05, "threads": 2, "seed": 3, "schedule": "cosine"}
    settings |= {"total_steps": 6, **options}
    losses: list[list[float]] = []
    ends = []
    for change in (False, True):
        with Trainer(bundle, mem_budget="3GB", **settings) as trainer:
            trainer.profile(True)
            found = []
            for step in range(6):
                if change and step == 2:
                    old = trainer.plan
                    new = trainer.set_budget("2GB", scratch=tmp_path)
                    assert trainer.plan is new is not old
                    assert new.summary["mem_budget"] == 2_000_000_000
                if change and step == 4:
                    with pytest.raises(BudgetError) as refused:
                        trainer.set_budget("1MB", scratch=tmp_path)
                    assert refused.value.smallest_budget > 1_000_000
                    assert trainer.plan is new
                found.append(trainer.step(*small_data(8, step)))
            assert sum(entry.calls for entry in trainer.profile_entries()) > 0
            losses.append(found)
            ends.append(everything(trainer))
            assert trainer.update == 6
    assert losses[0] == losses[1]
    assert_same_bits(*ends)
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_cap_takes_a_smaller_plan_and_nothing_is_lost(bundle: Path, tmp_path: Path) -> None:
    with Trainer(bundle, mem_budget="3GB", batch_size=256, threads=1, seed=1) as trainer:
        trainer.step(*small_data(256))
        trainer.position = (3, 14)
        weight = {name: value + 1 for name, value in trainer.state_dict().items()}
        trainer.load_state_dict(weight)  # frozen ones, too: they are in no checkpoint
        before = everything(trainer)
        with pytest.raises(BudgetError) as refused:
            trainer.set_budget("1MB")
        assert_same_bits(everything(trainer), before)
        old = trainer.plan
        new = trainer.set_budget(refused.value.smallest_budget)
        assert new.arena_bytes < old.arena_bytes
        assert_same_bits(everything(trainer), before)
        assert (trainer.update, trainer.position) == (1, (3, 14))
        assert new.predicted_peak_bytes <= refused.value.smallest_budget
        trainer.guard.watch(None, 0)  # this process holds PyTorch, too
        trainer.step(*small_data(256, 1))
        trainer.save(tmp_path)
        chosen = new.sparsity
    with Trainer.resume(tmp_path, mem_budget="3GB") as trainer:
        assert trainer.plan.sparsity == chosen
        assert trainer.set_budget("4GB").sparsity == 0  # the planner may choose again, as it could at first


def test_an_unusable_amount_or_directory_leaves_the_trainer_as_it_was(bundle: Path, tmp_path: Path) -> None:
    with Trainer(bundle, threads=1) as trainer:
        before, plan = everything(trainer), trainer.plan
        with pytest.raises(UsageError):
            trainer.set_budget("plenty")
        with pytest.raises(OSError):
            trainer.set_budget("1GB", scratch=tmp_path / "missing")
        assert trainer.plan is plan
        assert_same_bits(everything(trainer), before)
        trainer.step(*small_data(8))


def test_a_large_parameter_is_put_aside_and_taken_back_in_small_parts(tmp_path: Path) -> None:
    """The arena is still there meanwhile, and the cap is hard."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8192), nn.ReLU(), nn.Linear(8192, CLASSES)).eval()
    edge_razor.export(model, (torch.zeros(2, 3, 8, 8),), tmp_path / "large.razor")
    with Trainer(tmp_path / "large.razor", mem_budget="3GB", batch_size=4, threads=1) as trainer:
        images, labels = np.ones((4, 3, 8, 8), np.float32), np.zeros(4, np.int64)
        trainer.step(images, labels)
        before = everything(trainer)
        tracemalloc.start()
        try:
            places = put_aside(trainer._session, tmp_path, trainer._changing)
            take_back(trainer._session, tmp_path, places)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(places) == len(before)
        assert_same_bits(everything(trainer), before)
    assert peak < 3 * BUFFER_BYTES < before["1.weight"].nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets the peak begin anew")
def test_the_peak_begins_anew_with_another_cap(bundle: Path, tmp_path: Path) -> None:
    with Trainer(bundle, mem_budget="3GB", threads=1) as trainer:
        trainer.step(*small_data(8))
        ballast = np.ones(40_000_000, np.uint8)
        high = trainer.peak_rss_bytes
        del ballast
        trainer.set_budget("2GB", scratch=tmp_path)
        assert trainer.peak_rss_bytes < high - 20_000_000
        assert [cap for _, cap in trainer.guard.changes] == [2_000_000_000]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no SIGUSR1")
def test_sigusr1_reads_the_budget_file_and_the_run_ends_as_without_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_small_data(tmp_path / "d.npz", 48)
    plain, changed = tmp_path / "plain", tmp_path / "changed"

    def run(out: Path) -> list[str]:
        options = ("--epochs", 2, "--sparsity", 0, "--threads", 1, "--lr", 0.05, "--mem-budget", "3GB")
        return [str(a) for a in ("train", bundle, "--data", data, "--out", out, *options)]

    assert main(run(plain)) == 0
    reads = 0
    read, report = ArraySource.read, train.write_report

    def signalled_report(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)  # too late to change anything: no harm either
        report(*arguments)

    monkeypatch.setattr(train, "write_report", signalled_report)

    def signalling(self: ArraySource, *arguments: Any) -> bool:
        nonlocal reads
        reads += 1
        texts = {20: "2GB", 45: "1MB", 60: "many"}
        if reads in texts:
            (changed / "budget").write_text(texts[reads])
            os.kill(os.getpid(), signal.SIGUSR1)
        return read(self, *arguments)

    monkeypatch.setattr(ArraySource, "read", signalling)
    capsys.readouterr()
    assert main(run(changed)) == 0
    shown = capsys.readouterr().out
    assert "new cap: 2.00 GB; gradient error none" in shown
    assert "SIGUSR1: " in shown and "the plan stays as it was" in shown
    assert json.loads((changed / "plan.json").read_text())["mem_budget"] == 2_000_000_000
    with Checkpoint(plain) as a, Checkpoint(changed) as b:
        assert_same_bits({n: a.read(n) for n in a.tensors}, {n: b.read(n) for n in b.tensors})
        assert a.state["update"] == b.state["update"]


def test_sigusr1_without_a_file_looks_again_at_what_is_free_if_the_cap_is_auto(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_razor.cli.progress import Progress
    from edge_razor.cli.rebudget import BudgetSignal

    with Trainer(bundle, mem_budget="3GB", threads=1) as trainer:
        noted, progress = BudgetSignal(), Progress(1, 3_000_000_000)
        noted.apply(trainer, tmp_path, "auto", progress)
        assert capsys.readouterr().out == ""  # no signal, no change
        noted.pending = True
        noted.apply(trainer, tmp_path, "3GB", progress)
        assert "nothing changes" in capsys.readouterr().out
        noted.pending = True
        noted.apply(trainer, tmp_path, "auto", progress)
        assert "that this process holds" in capsys.readouterr().out
        assert progress.cap == trainer.plan.summary["mem_budget"] > rss_bytes()
