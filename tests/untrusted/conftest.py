from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

_SECONDS = 60  # what a test here may hang; they take milliseconds


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A reader that waits, for whoever writes to a FIFO, say, fails instead of standing still."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
