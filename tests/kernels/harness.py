"""Runs one kernel the way that finds most mistakes: several thread counts, twice each, outputs between guard bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_razor.runtime import kernel_run, kernel_scratch

GUARD = 64  # bytes before and behind every output
GUARD_BYTE = 0xA5


@dataclass
class Out:
    """An output that the kernel must fill; it starts as bytes that are no sensible value."""

    shape: tuple[int, ...]
    dtype: type = np.float32


@dataclass
class InOut:
    """An operand that the kernel reads and writes; each run gets a fresh copy."""

    value: np.ndarray


class Scratch:
    """The scratch operand, as large as the kernel asks for."""


Operand = np.ndarray | Out | InOut | Scratch | None


def _guarded(start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raw = np.full(start.nbytes + 2 * GUARD, GUARD_BYTE, np.uint8)
    view = raw[GUARD : GUARD + start.nbytes].view(start.dtype).reshape(start.shape)
    view[...] = start
    return raw, view


def run(
    name: str,
    ints: Sequence[int],
    floats: Sequence[float],
    operands: Sequence[Operand],
    threads: Sequence[int] = (1, 2, 3),
    **context: Any,
) -> tuple[list[np.ndarray], float]:
    """Runs a kernel with every thread count, twice.

    Asserts that all runs give the same bits, that no byte outside of an output changed, and that inputs did not change.

    Returns:
        The `Out` and `InOut` operands after the call, in order, and what the call added to the loss.
    """
    expected: list[np.ndarray] | None = None
    loss = 0.0
    for count in [t for t in threads for _ in range(2)]:
        arrays: list[np.ndarray | None] = []
        guards, written, inputs = [], [], []
        for operand in operands:
            if isinstance(operand, Out | InOut):
                if isinstance(operand, Out):
                    size = int(np.prod(operand.shape)) * np.dtype(operand.dtype).itemsize
                    start = np.full(size, 0x5A, np.uint8).view(operand.dtype).reshape(operand.shape)
                else:
                    start = operand.value
                raw, view = _guarded(start)
                guards.append(raw)
                written.append(view)
                arrays.append(view)
            elif isinstance(operand, Scratch):
                size = kernel_scratch(name, ints, floats, count)
                raw, view = _guarded(np.full(size, 0xFF, np.uint8))
                guards.append(raw)
                arrays.append(view if size else None)
            elif operand is None:
                arrays.append(None)
            else:
                array = _guarded(operand)[1]  # aligned, which a slice of a test's array need not be
                inputs.append((array, array.copy()))
                arrays.append(array)
        result = kernel_run(name, ints, floats, arrays, threads=count, **context)
        for raw in guards:
            assert (raw[:GUARD] == GUARD_BYTE).all() and (raw[-GUARD:] == GUARD_BYTE).all(), (
                f"{name} wrote out of bounds"
            )
        for array, before in inputs:
            assert array.tobytes() == before.tobytes(), f"{name} changed an input"
        if expected is None:
            expected, loss = [view.copy() for view in written], result.loss
        for view, first in zip(written, expected, strict=True):
            assert view.tobytes() == first.tobytes(), f"{name}: {count} threads give other bits"
        assert result.loss == loss or np.isnan(loss)
    assert expected is not None
    return expected, loss


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(actual: np.ndarray, expected: Any, relative: float = 1e-6) -> None:
    """`actual` is within `relative` times the largest expected magnitude (a few float32 roundings by default)."""
    wanted = np.asarray(expected, np.float64)
    assert actual.shape == wanted.shape
    scale = max(float(np.abs(wanted).max()), 1e-30)
    error = float(np.abs(actual.astype(np.float64) - wanted).max()) / scale
    assert error <= relative, f"error {error:.3g} of the largest value, allowed {relative:.3g}"
