"""A thread that watches resident memory against the cap while a process trains, and keeps its course for the report."""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edge_razor.errors import MemoryCapError
from edge_razor.memory import rss_bytes
from edge_razor.units import format_bytes

__all__ = ["MemoryGuard", "MemoryPart", "cap_error", "memory_parts"]

NEAR = 0.98  # of the cap
INTERVAL = 0.05  # seconds between readings; each takes some 10 µs
HISTORY = 512  # points that are kept; when they are full, two become one


class MemoryGuard:
    """Reads resident memory 20 times a second from `start` to `stop`.

    The alarm goes off at 98 % of the cap, or where the plan itself needs more than that, above what it needs: memory
    that was planned for is no growth. It stays on until `watch` sets another cap.

    Attributes:
        alarm: resident bytes when the alarm went off; None: it did not.
        changes: (seconds since the start, cap in bytes or None) of every cap that was set while it read.
        peak: highest reading so far, in bytes.
    """

    def __init__(self, cap: int | None, planned: int) -> None:
        """
        Args:
            cap: bytes; None: only the course is kept.
            planned: predicted peak of the plan, in bytes.
        """
        self.alarm: int | None = None
        self.changes: list[tuple[float, int | None]] = []
        self.peak = 0
        self._points: list[tuple[float, int]] = []
        self._span = INTERVAL  # seconds that a point stands for
        self._stop = threading.Event()
        self._reading = threading.Lock()  # held by the thread from its first reading to its last
        self._thread: int | None = None  # its identity
        self._began = 0.0
        self.watch(cap, planned)

    def watch(self, cap: int | None, planned: int) -> None:
        """Takes another cap and plan; the alarm is off again."""
        self.limit = None if cap is None else min(cap, max(int(NEAR * cap), planned + 1))
        self.alarm = None
        if self._thread is not None:
            self.changes.append((round(time.monotonic() - self._began, 2), cap))

    def start(self) -> None:
        """Starts the thread, if it is not running yet.

        Raises:
            RuntimeError: the system has no thread to give.
        """
        if self._thread is None and not self._stop.is_set():
            self._began = time.monotonic()
            # threading.Thread.start waits for a sign of life, for ever if the new thread finds no memory to give one
            self._thread = _thread.start_new_thread(self._run, ())

    def stop(self) -> None:
        """Ends the thread; it cannot be started again."""
        self._stop.set()
        if self._thread != _thread.get_ident():  # else garbage is collected in the thread itself
            with self._reading:
                pass

    def history(self) -> list[tuple[float, int]]:
        """(seconds since the start, most resident bytes until the next point), at most some 500 points."""
        return list(self._points)

    def _run(self) -> None:
        with self._reading:
            if not self._stop.is_set():
                self._read()

    def _read(self) -> None:
        statm = os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else None
        page = os.sysconf("SC_PAGESIZE") if statm is not None else 0
        try:
            while True:
                resident = rss_bytes() if statm is None else int(os.pread(statm, 128, 0).split()[1]) * page
                self._note(time.monotonic() - self._began, resident)
                if self._stop.wait(INTERVAL):
                    return
        finally:
            if statm is not None:
                os.close(statm)

    def _note(self, seconds: float, resident: int) -> None:
        self.peak = max(self.peak, resident)
        if self.limit is not None and resident >= self.limit and self.alarm is None:
            self.alarm = resident
        points = self._points
        if points and seconds - points[-1][0] < self._span * 0.9:
            points[-1] = (points[-1][0], max(points[-1][1], resident))
            return
        if len(points) >= HISTORY:
            self._points = points = [
                (points[i][0], max(r for _, r in points[i : i + 2])) for i in range(0, len(points), 2)
            ]
            self._span *= 2
        points.append((round(seconds, 2), resident))


class MemoryPart(NamedTuple):
    """A part of the process's resident memory, in bytes."""

    name: str
    planned: int
    seen: int


def memory_parts(summary: Mapping[str, Any], session: int, data: int | None) -> list[MemoryPart]:
    """What was planned and what is resident now.

    Args:
        summary: `Plan.summary`.
        session: resident bytes of the session.
        data: bytes that the data pipeline holds; None: not known, and part of the rest.
    """
    items: Mapping[str, int] = summary["items"]
    own = sum(items.get(name, 0) for name in ("parameters", "optimizer state", "gradient accumulators", "arena"))
    parts = [MemoryPart("arena, parameters and optimizer state", own, session)]
    if data is not None:
        parts.append(MemoryPart("data pipeline", items.get("data pipeline", 0), data))
    planned, seen = sum(part.planned for part in parts), sum(part.seen for part in parts)
    rest = "process baseline (Python, libraries, everything else)"
    return [MemoryPart(rest, summary["predicted_peak_bytes"] - planned, rss_bytes() - seen), *parts]


def cap_error(resident: int, cap: int, step: int, parts: Sequence[MemoryPart]) -> MemoryCapError:
    """The error that names the part which grew most beyond its plan, and what the others hold."""
    grown = max(parts, key=lambda part: part.seen - part.planned)
    others = ", ".join(
        f"{part.name} {format_bytes(part.seen)} (planned {format_bytes(part.planned)})"
        for part in parts
        if part is not grown
    )
    return MemoryCapError(
        f"resident memory reached {format_bytes(resident)} of the cap of {format_bytes(cap)} at step {step}: "
        f"{grown.name} grew to {format_bytes(grown.seen)} (planned {format_bytes(grown.planned)}); {others}",
        tuple(parts),
    )
