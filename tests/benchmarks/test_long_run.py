"""A run does not grow: `benchmarks/long_run.py` with 500 steps instead of 20,000."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.long_run import observe, write_arrays
from tests.bundles import write_linear_bundle


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_memory_threads_and_files_stay_flat_over_500_steps(tmp_path: Path) -> None:
    bundle = write_linear_bundle(tmp_path / "model.razor")
    data = write_arrays(tmp_path / "data.npz", 89, (6,), 3)  # 10 steps an epoch
    course = observe(bundle, data, tmp_path / "run", 50, 500, "--checkpoint-every", "7", "--max-cpu", "90%")
    assert course.rss[1] - course.rss[0] <= 1_000_000
    assert course.threads[1] <= 5  # the process, two of the plan, one that reads data, the memory guard
    # Standard streams, lock, weights, data, metrics and the guard's file of /proc; for a moment, and seldom at once, a
    # checkpoint, its directory, and sensors and processor time that are read. A leak would be of 71 checkpoints.
    assert course.files[1] <= 14
