"""A training run survives failing calls, kills and losses of power; `benchmarks/faults.py` does it for every call."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_razor.checkpoint import checkpoint_files
from tests.faults.app import AppHarness
from tests.faults.harness import (
    DEATHS,
    FAILURES,
    POWER_AND_LYING_DISK,
    Fault,
    Harness,
    harness_directory,
    stopped_run,
    sweep,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None or not hasattr(os, "pidfd_open"),
    reason="the fault shim needs Linux and a C compiler",
)


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    directory = harness_directory()
    made = Harness(directory)
    yield made
    made.close()
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def stopped(harness: Harness) -> Path:
    return stopped_run(harness, harness.directory)


@pytest.mark.parametrize(("kind", "error", "sticky"), FAILURES)
def test_a_call_that_fails_is_one_clear_error_and_costs_no_bit(
    harness: Harness, kind: str, error: int, sticky: bool
) -> None:
    figures = sweep(harness, Fault(kind, 1, error, sticky), step=1 + harness.counts[kind] // 12)
    assert figures.problems == ()
    assert figures.runs >= 2


def test_an_allocation_that_fails_is_one_clear_error_and_costs_no_bit(harness: Harness) -> None:
    figures = sweep(harness, Fault("alloc", 1, errno.ENOMEM), step=harness.counts["alloc"] // 30)
    assert figures.problems == ()
    assert figures.refused > 20


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("action", DEATHS)
def test_a_kill_or_a_loss_of_power_at_any_call_costs_no_bit(
    harness: Harness, stopped: Path, action: int, resumed: bool
) -> None:
    figures = sweep(harness, Fault("any", 1 + action, action=action), stopped if resumed else None, step=8)
    assert figures.problems == ()
    assert figures.died > 5


def test_the_check_finds_a_run_that_does_not_sync(harness: Harness) -> None:
    """The sweeps above can fail: with a disk that ignores fsync they do."""
    figures = sweep(harness, Fault("any", 20, action=POWER_AND_LYING_DISK), step=14)
    assert any("is damaged" in problem or "truncated" in problem for problem in figures.problems)


def test_kills_at_random_moments_cost_no_bit(harness: Harness) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    harness.clear()
    for number in range(8):
        answer = harness.train(kill_after=generator.uniform(0, 1.1 * harness.seconds), fresh=False)
        if answer["status"] == 0 or generator.random() < 0.3:
            harness.check(f"seed {seed}, kill {number}", answer, False)
            harness.clear()


# ---- A C program ----


@pytest.fixture(scope="module")
def app() -> Iterator[AppHarness]:
    directory = harness_directory()
    yield AppHarness(directory)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def stopped_app(app: AppHarness) -> Path:
    directory = stopped_run(app, app.directory)
    assert {file.name for file in directory.iterdir()} == {"checkpoint", "checkpoint.tmp"}
    return directory


@pytest.mark.parametrize("resumed", [False, True])
def test_a_call_that_fails_in_a_c_program_is_one_clear_error_and_costs_no_bit(
    app: AppHarness, stopped_app: Path, resumed: bool
) -> None:
    for kind, error, sticky in FAILURES:
        if app.counts[kind]:
            step = 1 + app.counts[kind] // 3
            figures = sweep(app, Fault(kind, 1, error, sticky), stopped_app if resumed else None, step)
            assert figures.problems == ()
            assert figures.runs >= 2


def test_an_allocation_that_fails_in_a_c_program_is_one_clear_error_and_costs_no_bit(app: AppHarness) -> None:
    figures = sweep(app, Fault("alloc", 1, errno.ENOMEM), step=app.counts["alloc"] // 20)
    assert figures.problems == ()
    assert figures.refused > 10


@pytest.mark.parametrize("action", DEATHS)
def test_a_kill_or_a_loss_of_power_at_any_call_of_a_c_program_costs_no_bit(
    app: AppHarness, stopped_app: Path, action: int
) -> None:
    for start in (None, stopped_app):
        figures = sweep(app, Fault("any", 1 + action, action=action), start, step=9)
        assert figures.problems == ()
        assert figures.died > 3


def test_a_checkpoint_that_cannot_be_read_now_is_not_replaced_by_a_c_program(
    app: AppHarness, stopped_app: Path
) -> None:
    app.clear()
    shutil.copytree(stopped_app, app.run, dirs_exist_ok=True)
    before = (app.run / "checkpoint").read_bytes()
    answer = app.train(Fault("open", 1, errno.EACCES), fresh=False)
    assert answer["status"] == 1 and "cannot read" in answer["stderr"]
    assert (app.run / "checkpoint").read_bytes() == before


# ---- A disk that is really full or read-only, and limits ----


def in_run(harness: Harness) -> list[str]:
    return sorted(file.name for file in checkpoint_files(harness.run))


@pytest.fixture
def small_disk(harness: Harness, tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB with the harness's run directory on it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    harness.clear()
    harness.run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "edge-razor-test", str(harness.run)])
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield harness.run
    subprocess.run(["mount", "-o", "remount,rw", str(harness.run)])
    subprocess.run(["umount", str(harness.run)], check=True)


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_once_there_is_space(
    harness: Harness, small_disk: Path
) -> None:
    answer = harness.train(fresh=False)
    assert answer["status"] == 0
    for file in checkpoint_files(small_disk)[1:]:
        file.unlink()
    for file in (*checkpoint_files(small_disk), small_disk / "metrics.jsonl", small_disk / "report.html"):
        file.unlink()
    filler = small_disk / "other-data"
    filler.write_bytes(bytes(48 << 10))
    answer = harness.train(fresh=False)
    assert answer["status"] == 4
    assert "No space left on device; free some space" in answer["stderr"]
    filler.unlink()
    harness.check("disk full", answer, bool(checkpoint_files(small_disk)))


def test_a_read_only_disk_is_one_clear_error_and_loses_nothing(harness: Harness, small_disk: Path) -> None:
    assert harness.train(Fault("any", 60, action=DEATHS[0]), fresh=False)["status"] < 0
    before = in_run(harness)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    answer = harness.train(fresh=False)
    assert answer["status"] == 4
    assert "Read-only file system; choose a directory that can be written" in answer["stderr"]
    assert in_run(harness) == before != []
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    harness.check("read-only", answer, True)


def test_a_limit_on_file_sizes_is_one_clear_error(harness: Harness) -> None:
    harness.clear()
    command = f"ulimit -f 1; exec {sys.executable} -m edge_razor {' '.join(harness.arguments)}"
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4
    assert "File too large; raise the limit" in done.stderr and len(done.stderr.splitlines()) <= 2
    harness.check("limit", {"status": 4, "stderr": done.stderr}, False)
