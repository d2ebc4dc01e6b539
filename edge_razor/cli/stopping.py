"""SIGINT and SIGTERM: while training they set a flag, so that it ends between steps; before, and the second time, they
end the process as an exception does, with child processes ended and temporary files removed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "Stop", "stop_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process at once. `exit_status` is what shells expect: 128 + its number."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.exit_status = 128 + number


class Stop:
    """
    Attributes:
        signal: the first signal that came while `gracefully` was in force.
    """

    signal: signal.Signals | None = None
    _graceful = False

    @contextmanager
    def gracefully(self) -> Iterator[None]:
        """Inside, the first signal only sets `signal`."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self._graceful or self.signal is not None:
            raise Interrupted(signal.Signals(number))
        self.signal = signal.Signals(number)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handles both signals inside."""
    stop = Stop()
    previous = {number: signal.signal(number, stop.handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
