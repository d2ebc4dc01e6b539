"""Altered files: success, or an error of the package; nothing written elsewhere, no more memory than a bound."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_razor.errors import EdgeRazorError

from .readers import READERS

_BOUND = 4 << 20  # bytes that reading a file of a few kilobytes may take; buffers are up to 1 MB


@pytest.mark.parametrize("name", READERS)
def test_every_altered_file_is_read_or_refused_by_an_own_error_within_bounded_memory(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    seeds = reader.seeds(tmp_path)
    folder = tmp_path / "inside"
    folder.mkdir()
    if (tmp_path / "seed").exists():
        (folder / "seed").symlink_to(tmp_path / "seed")
    for data in seeds:
        reader.read(data, folder)  # what is altered is valid
    outside = sorted(tmp_path.iterdir())

    @settings(
        max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
    )
    @given(st.integers(0, 2**62))
    def check(seed: int) -> None:
        random = Random(seed)
        data = random.choice(seeds)
        for _ in range(random.randint(1, 3)):
            data = reader.mutate(data, random)
        tracemalloc.start()
        try:
            reader.read(data, folder)
        except EdgeRazorError as error:
            assert str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < _BOUND

    check()
    assert sorted(tmp_path.iterdir()) == outside
