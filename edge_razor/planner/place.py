"""Arena placement: offline dynamic storage allocation.

Each buffer is live from its first to its last step; buffers that live at the same time must not overlap. Finding the
smallest arena is NP-hard; placing buffers one by one, largest first, each into the smallest gap that holds it, comes
within a few percent of the lower bound (the maximum of live bytes). Beside that order, others are tried: by lifetime,
and step by step from the fullest (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
Inference", 2020); in the best of them the buffer that ends highest is moved forward while that helps. If that leaves
more than a few percent, it and buffers that live when it does are moved forward at random, where that costs nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from .program import Buffer, Program, Region, aligned

__all__ = ["Lifetime", "lifetimes", "live_bytes", "place"]

_NO_GAP = np.iinfo(np.int64).max
GOOD_ENOUGH = 1.005  # of the lower bound: stop searching
MAX_ROUNDS = 60
LARGE = (16, 32)  # a buffer of at least such a part of the lower bound is large
IMPROVED = 3  # orders, those that begin best
FAIR = 1.03  # of the lower bound: above it the other orders are improved, too, and then buffers are moved at random
RESTARTS, MOVES = 3, 40  # of the random search, and moves in each


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A buffer that needs memory from step `start` to step `end`, both included, and the parts of it in use."""

    buffer: Buffer
    start: int
    end: int
    parts: tuple[Buffer, ...] = ()

    @property
    def size(self) -> int:
        """Bytes, rounded up to the alignment."""
        return aligned(self.buffer.bytes)


def lifetimes(program: Program) -> list[Lifetime]:
    """Lifetimes of the arena buffers of a scheduled program, scratch included."""
    spans: dict[Buffer, list[int]] = {buffer: [0, 0] for buffer in program.inputs}
    parts: dict[Buffer, dict[Buffer, None]] = {}
    for index, step in enumerate(program.steps):
        for buffer in step.operands:
            if buffer is not None and buffer.region == Region.ARENA:
                spans.setdefault(buffer.whole or buffer, [index, index])[1] = index
                if buffer.whole is not None:
                    parts.setdefault(buffer.whole, {})[buffer] = None
    for buffer in program.outputs:
        if buffer.region == Region.ARENA:
            spans.setdefault(buffer, [0, 0])[1] = len(program.steps)
    return [Lifetime(buffer, start, end, tuple(parts.get(buffer, ()))) for buffer, (start, end) in spans.items()]


def live_bytes(lives: list[Lifetime]) -> np.ndarray:
    """Bytes alive at each step (int64): their maximum is the lower bound of any placement."""
    change = np.zeros(max((life.end for life in lives), default=0) + 2, np.int64)
    for life in lives:
        change[life.start] += life.size
        change[life.end + 1] -= life.size
    return np.cumsum(change)


def place(lives: list[Lifetime], enough: int = 0) -> int:
    """Sets every buffer's offset; returns the arena's bytes. The search for a smaller one ends at `enough` bytes."""
    if not lives:
        return 0
    live = live_bytes(lives)
    good, fair = (max(enough, int(live.max() * part)) for part in (GOOD_ENOUGH, FAIR))
    sizes = np.array([life.size for life in lives], np.int64)
    starts = np.array([life.start for life in lives], np.int64)
    ends = np.array([life.end for life in lives], np.int64)
    spans = ends - starts + 1
    fullest = _by_fullest_step(live, spans, starts, ends)
    orders = [
        np.lexsort((starts, -sizes)),
        fullest,
        # The few large buffers first, so that small ones do not part the room that those need.
        *(fullest[np.argsort(sizes[fullest] * part < live.max(), kind="stable")] for part in LARGE),
        np.lexsort((-sizes, -spans)),
        _by_fullest_step(live, sizes, starts, ends),
    ]
    best = (int(sizes.sum()) + 1, starts)
    begun: list[tuple[int, int]] = []
    for number, order in enumerate(orders):
        offsets, total = _best_fit(order, sizes, starts, ends)
        begun.append((total, number))
        if total < best[0]:
            best = (total, offsets)
        if total <= good:
            break
    else:
        for rank, (_, number) in enumerate(sorted(begun)):
            if rank >= IMPROVED and best[0] <= fair:
                break
            offsets, total = _improve(orders[number], sizes, starts, ends, good)
            if total < best[0]:
                best = (total, offsets)
            if total <= good:
                break
        for seed in range(RESTARTS if best[0] > fair else 0):
            offsets, total = _move_at_random(fullest, sizes, starts, ends, good, seed)
            if total < best[0]:
                best = (total, offsets)
            if total <= fair:
                break
    for life, offset in zip(lives, best[1].tolist(), strict=True):
        life.buffer.offset = offset
        for part in life.parts:
            part.offset = offset + part.start
    return best[0]


def _by_fullest_step(live: np.ndarray, first: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Buffers of the fullest step, largest `first` in front, then those of the next fullest that are new, and so on:
    where memory is short nothing is wasted."""
    placed = np.zeros(len(starts), bool)
    order: list[int] = []
    for step in np.argsort(-live, kind="stable").tolist():
        new = np.flatnonzero((starts <= step) & (ends >= step) & ~placed)
        order += new[np.argsort(-first[new], kind="stable")].tolist()
        placed[new] = True
        if len(order) == len(starts):
            break
    return np.array(order, np.int64)


def _improve(
    order: np.ndarray, sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray, good: int
) -> tuple[np.ndarray, int]:
    """Best fit in `order`; then again and again with the buffer on top moved to the front, while there is hope."""
    offsets, total = _best_fit(order, sizes, starts, ends)
    best = (offsets, total)
    seen_worse = 0
    for _ in range(MAX_ROUNDS):
        if best[1] <= good or seen_worse > 12:
            break
        top = int(np.argmax(offsets + sizes))
        rest = order[order != top]
        position = int(np.flatnonzero(order == top)[0]) // 2
        order = np.concatenate([rest[:position], [top], rest[position:]])
        offsets, total = _best_fit(order, sizes, starts, ends)
        if total < best[1]:
            best, seen_worse = (offsets, total), 0
        else:
            seen_worse += 1
    return best


def _move_at_random(
    order: np.ndarray, sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray, good: int, seed: int
) -> tuple[np.ndarray, int]:
    """Best fit in `order`; then again and again with the buffer on top, or one that lives when it does, somewhere
    farther in front. Moves that make the arena larger are taken back."""
    chance = random.Random(seed)
    offsets, total = _best_fit(order, sizes, starts, ends)
    for _ in range(MOVES):
        if total <= good:
            break
        moved = top = int(np.argmax(offsets + sizes))
        if chance.random() < 0.5:
            near = np.flatnonzero((starts <= ends[top]) & (ends >= starts[top]))
            moved = int(near[chance.randrange(len(near))])
        rest = order[order != moved]
        position = chance.randrange(int(np.flatnonzero(order == moved)[0]) + 1)
        changed = np.concatenate([rest[:position], [moved], rest[position:]])
        placed, height = _best_fit(changed, sizes, starts, ends)
        if height <= total:
            order, offsets, total = changed, placed, height
    return offsets, total


def _best_fit(order: np.ndarray, sizes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, int]:
    """Places buffers in `order`, each into the smallest gap between the placed buffers that live when it does."""
    count = len(order)
    offsets = np.zeros(count, np.int64)
    # Columns of the placed buffers, kept sorted by offset so that gaps come from one pass.
    placed = np.empty((4, count), np.int64)  # offset, end offset, first step, last step
    for n, index in enumerate(order.tolist()):
        size = int(sizes[index])
        view = placed[:, :n]
        overlap = (view[2] <= ends[index]) & (view[3] >= starts[index])
        lows, highs = view[0][overlap], view[1][overlap]
        if len(lows):
            edges = np.zeros(len(lows) + 1, np.int64)
            np.maximum.accumulate(highs, out=edges[1:])
            gaps = np.full(len(lows) + 1, _NO_GAP)
            gaps[:-1] = lows
            gaps -= edges
            gaps[gaps < size] = _NO_GAP  # the last gap is open, so it is taken only if no other fits
            offset = int(edges[np.argmin(gaps)])
        else:
            offset = 0
        offsets[index] = offset
        at = int(np.searchsorted(view[0], offset))
        placed[:, at + 1 : n + 1] = placed[:, at:n].copy()
        placed[:, at] = (offset, offset + size, starts[index], ends[index])
    return offsets, int((offsets + sizes).max())
