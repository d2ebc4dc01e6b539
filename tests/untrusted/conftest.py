from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.bundles import write_linear_bundle

_SECONDS = 60  # what a test here may hang; they take milliseconds
_BYTES = 1 << 30  # of address space that it may take


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """A reader that waits, for a FIFO, say, or reads without end, fails and leaves the machine alone."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, fail)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    return json.loads((write_linear_bundle(tmp_path / "model.razor") / "bundle.json").read_bytes())
