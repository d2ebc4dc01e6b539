"""When a run saves: every so many steps or seconds, and before anything that may be the end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_razor.errors import UsageError

__all__ = ["Every", "parse_every"]

_AMOUNT = re.compile(r"(\d+)\s*(s|m|min|h)?")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}


@dataclass(slots=True)
class Every:
    """A number of steps or of seconds between checkpoints.

    Attributes:
        steps, seconds: one of them is given.
        clock: in seconds.
    """

    steps: int | None = None
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        self._last = self.clock()

    def is_due(self, update: int) -> bool:
        """Whether to save after `update`; steps count from the first update, also in a resumed run."""
        if self.steps is not None:
            return update % self.steps == 0
        return self.seconds is not None and self.clock() - self._last >= self.seconds

    def saved(self) -> None:
        """Starts the seconds anew."""
        self._last = self.clock()


def parse_every(text: str) -> Every:
    """Steps ("500") or time ("30s", "5m", "2h").

    >>> parse_every("500").steps, parse_every("5m").seconds
    (500, 300)

    Raises:
        UsageError: neither, or zero.
    """
    match = _AMOUNT.fullmatch(text.strip())
    amount = int(match[1]) if match else 0
    if match is None or not amount:
        raise UsageError(f'checkpoints are made every N steps ("500") or after a time ("30s", "5m"), not {text!r}')
    return Every(seconds=amount * _SECONDS[match[2]]) if match[2] else Every(steps=amount)
