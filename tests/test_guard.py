"""The guard: growth close to the cap ends training between two steps, the checkpoint is written and the cause named."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_razor import MemoryCapError, Trainer
from edge_razor.checkpoint import Checkpoint
from edge_razor.cli import main
from edge_razor.data.arrays import ArraySource
from edge_razor.guard import HISTORY, MemoryGuard, cap_error, memory_parts
from edge_razor.memory import rss_bytes
from tests.bundles import write_linear_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_linear_bundle(tmp_path / "model.razor")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((64, 6), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=generator.integers(0, 3, 64))
    return tmp_path / "data.npz"


def leak(into: list[np.ndarray], most: int) -> None:
    """Two more megabytes that are resident, up to `most` bytes."""
    if 2_000_000 * len(into) < most:
        into.append(np.ones(2_000_000, np.uint8))


@pytest.mark.parametrize(
    ("cap", "planned", "limit"),
    [
        (100_000_000, 60_000_000, 98_000_000),
        (100_000_000, 99_000_000, 99_000_001),  # what was planned for is no growth
        (100_000_000, 100_000_000, 100_000_000),
        (None, 60_000_000, None),
    ],
)
def test_the_alarm_is_at_98_percent_or_above_the_plan(cap: int | None, planned: int, limit: int | None) -> None:
    assert MemoryGuard(cap, planned).limit == limit


def test_the_alarm_stays_until_another_cap_is_set() -> None:
    guard = MemoryGuard(100, 50)
    for seconds, resident in enumerate((97, 98, 60)):
        guard._note(seconds, resident)
    assert (guard.alarm, guard.peak) == (98, 98)
    guard.watch(200, 50)
    assert guard.alarm is None
    guard._note(3, 195)
    assert guard.alarm is None
    guard._note(4, 196)
    assert guard.alarm == 196


def test_a_long_history_keeps_its_peaks_and_its_size() -> None:
    guard = MemoryGuard(None, 0)
    count = 20 * HISTORY
    for i in range(count):
        guard._note(i * 0.05, 1000 if i == 7777 else i % 10)
    history = guard.history()
    assert HISTORY / 2 <= len(history) <= HISTORY
    seconds = [t for t, _ in history]
    assert seconds == sorted(set(seconds))
    at = next(t for t, resident in history if resident == 1000)
    assert abs(at - 7777 * 0.05) < 3 * count * 0.05 / HISTORY
    assert seconds[0] == 0 and seconds[-1] > 0.95 * count * 0.05


def test_a_guard_whose_thread_finds_no_memory_neither_starts_nor_stops_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_razor.guard._thread.start_new_thread", lambda function, arguments: 1)  # it never runs
    guard = MemoryGuard(None, 0)
    guard.start()
    guard.stop()
    assert guard.history() == []


def test_a_stopped_guard_reads_no_more() -> None:
    guard = MemoryGuard(None, 0)
    guard.start()
    while not guard.history():
        time.sleep(0.01)
    guard.stop()
    assert guard.peak > 0 and not guard._reading.locked()


def test_the_message_names_what_grew_most_beyond_its_plan() -> None:
    summary = {"items": {"arena": 30, "parameters": 20, "data pipeline": 5}, "predicted_peak_bytes": 100}
    parts = memory_parts(summary, session=49, data=5_000_000)
    assert [(p.planned, p.seen) for p in parts[1:]] == [(50, 49), (5, 5_000_000)]
    assert parts[0].planned == 45
    assert sum(p.seen for p in parts) == pytest.approx(rss_bytes(), abs=5_000_000)
    grown = [parts[0]._replace(seen=40), *parts[1:]]
    message = str(cap_error(98_000_000, 100_000_000, 7, grown))
    assert "98.0 MB of the cap of 100 MB at step 7: data pipeline grew to 5.00 MB (planned 5 B)" in message
    assert "arena, parameters and optimizer state 49 B (planned 50 B)" in message
    assert "\n" not in message


def test_a_trainer_refuses_the_next_step_and_goes_on_with_a_larger_cap(bundle: Path) -> None:
    x, y = np.ones((8, 6), np.float32), np.zeros(8, int)
    with Trainer(bundle, mem_budget=rss_bytes() + 60_000_000, sparsity=0.0, threads=1) as trainer:
        trainer.step(x, y)
        held: list[np.ndarray] = []
        with pytest.raises(MemoryCapError, match="process baseline .* grew to") as stopped:
            for _ in range(5000):
                leak(held, 100_000_000)
                trainer.step(x, y)
        assert stopped.value.exit_status == 3
        assert len(held) > 5
        before = trainer.update, trainer.read_tensor("fc.weight").copy()
        with pytest.raises(MemoryCapError):
            trainer.step(x, y)
        assert trainer.update == before[0]
        np.testing.assert_array_equal(trainer.read_tensor("fc.weight"), before[1])
        trainer.set_budget(rss_bytes() + 200_000_000)
        trainer.step(x, y)
        assert trainer.update == before[0] + 1


def test_growth_ends_a_run_with_its_checkpoint_written_and_status_3(
    bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held: list[np.ndarray] = []
    read = ArraySource.read

    def leaking(self: ArraySource, *arguments: Any) -> bool:
        leak(held, 160_000_000)
        return read(self, *arguments)

    monkeypatch.setattr(ArraySource, "read", leaking)
    out = tmp_path / "run"
    run = ["train", str(bundle), "--data", str(data), "--out", str(out), "--threads", "1", "--epochs", "3000"]
    assert main([*run, "--mem-budget", str(rss_bytes() + 80_000_000)]) == 3
    captured = capsys.readouterr()
    error = captured.err
    assert len(error.splitlines()) == 2 and error.startswith("error: resident memory reached")
    assert re.search(r"process baseline \(.*\) grew to [\d.]+ MB \(planned [\d.]+ MB\)", error)
    assert "data pipeline" in error and "optimizer state" in error
    assert f"the checkpoint in {out} is whole" in error and "--resume" in error
    with Checkpoint(out) as checkpoint:
        stopped = checkpoint.state["update"]
    assert f"at step {stopped}:" in error
    assert stopped > 0
    assert (out / "report.html").is_file()
    monkeypatch.undo()
    held.clear()
    assert main([*run[:-1], str(stopped // 7 + 2), "--resume", "--mem-budget", "2GB"]) == 0
