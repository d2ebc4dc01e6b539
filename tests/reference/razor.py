"""The razor in plain numpy: the definition that kernels, planner and whole training steps are tested against.

A kept value is x[samples, rows, columns], float32. docs/plan-format.md ("Packed tensor") is the text that this follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

BLOCK_ROWS = 64
GROUP_COLUMNS = 16
FORMS = {"dense": 0, "bf16": 1, "plain": 2, "centered": 3}

Floats = NDArray[np.float32]


def keep_count(elements: int, sparsity: float) -> int:
    """Values kept of a sample of ``elements``: n − floor(s·n), s taken as the decimal that it prints as."""
    return elements - int(Fraction(str(sparsity)) * elements)


def block_bounds(rows: int) -> list[int]:
    """First row of each block of a sample, and ``rows`` at the end."""
    blocks = -(-rows // BLOCK_ROWS)
    return [b * rows // blocks for b in range(blocks + 1)]


def to_bf16(x: ArrayLike) -> Floats:
    """Rounds float32 to the nearest bf16 (ties to even), returned as float32. Overflow gives infinity."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def block_means(x: Floats) -> Floats:
    """Mean of each block and column of x[S, R, C] as [S, B, C] in bf16 precision.

    Rows are added in order in float32, then divided by their number, then rounded to the nearest bf16.
    """
    bounds = block_bounds(x.shape[1])
    means = np.empty((x.shape[0], len(bounds) - 1, x.shape[2]), np.float32)
    for b, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        total = np.zeros((x.shape[0], x.shape[2]), np.float32)
        for row in range(begin, end):
            total += x[:, row]
        means[:, b] = total / np.float32(end - begin)
    return to_bf16(means)


def packed_order(rows: int, cols: int) -> NDArray[np.int64]:
    """Indices row·cols + column of a sample's elements, in the order block, column, row."""
    index = np.arange(rows * cols).reshape(rows, cols)
    bounds = block_bounds(rows)
    return np.concatenate([index[a:b].T.ravel() for a, b in zip(bounds[:-1], bounds[1:], strict=True)])


@dataclass(frozen=True)
class Kept:
    """What a razor form keeps of x[S, R, C]."""

    mask: NDArray[np.bool_]
    """[S, R, C], True where the element is kept."""
    means: Floats
    """[S, B, C]; zeros for plain."""
    scale: Floats
    """[S], the energy factor included; ones for plain."""
    values: Floats
    """[S, R, C]: bf16 values (plain) or whole numbers of scale (centered), 0 where not kept."""

    def dense(self) -> Floats:
        """The tensor [S, R, C] that the kept form stands for: mean + scale · value, in float32."""
        lengths = np.diff(block_bounds(self.values.shape[1]))
        return np.repeat(self.means, lengths, axis=1) + self.values * self.scale[:, None, None]


def select(x: ArrayLike, keep: int, form: str = "centered", means: Floats | None = None) -> Kept:
    """Keeps the ``keep`` largest magnitudes of each sample of x[S, R, C]; zeros are never kept.

    Args:
        keep: values a sample.
        form: "plain" or "centered".
        means: [S, B, C], the block means to use for centered instead of `block_means`.
    """
    x = np.ascontiguousarray(x, np.float32)
    samples, rows, cols = x.shape
    lengths = np.diff(block_bounds(rows))
    if form == "plain":
        means = np.zeros((samples, len(lengths), cols), np.float32)
    elif means is None:
        means = block_means(x)
    residual = x - np.repeat(means, lengths, axis=1)
    order = packed_order(rows, cols)
    mask = np.zeros((samples, rows * cols), bool)
    for s in range(samples):
        magnitude = np.abs(residual[s].ravel()[order])
        largest = np.argsort(-magnitude, kind="stable")[:keep]
        mask[s, order[largest[magnitude[largest] > 0]]] = True
    mask = mask.reshape(x.shape)
    if form == "plain":
        return Kept(mask, means, np.ones(samples, np.float32), np.where(mask, to_bf16(x), np.float32(0)))
    kept = np.where(mask, residual, np.float32(0))
    scale = np.abs(kept).max(axis=(1, 2), initial=0) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.where(scale[:, None, None] > 0, kept / scale[:, None, None], np.float32(0))
    values = np.clip(np.rint(quotient), -127, 127).astype(np.float32)
    return Kept(mask, means, scale * energy_factor(residual, values, scale, keep), values)


def energy_factor(residual: Floats, values: Floats, scale: Floats, keep: int) -> Floats:
    """Σr² / Σ(scale · value)² of each sample [S], at least 1 and at most elements / keep.

    With it the kept residuals have the same product with all residuals as all residuals themselves. 1 where nothing is
    dropped, where nothing is kept, and where a sum of squares overflows or vanishes in float32.
    """
    elements = residual[0].size
    if keep in (0, elements):
        return np.ones(len(scale), np.float32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
        squares = (residual * residual).astype(np.float64).sum(axis=(1, 2))
        kept = np.square(values, dtype=np.float64).sum(axis=(1, 2)) * np.square(scale, dtype=np.float64)
        factor = np.where(squares < np.finfo(np.float32).max, squares / kept, 1.0)
        return np.where(factor > 1, np.minimum(factor, elements / keep), 1.0).astype(np.float32)


def razor(x: ArrayLike, sparsity: float, form: str = "centered") -> Floats:
    """The dense tensor that the kept form of x[S, R, C] at ``sparsity`` stands for.

    >>> razor(np.array([[[1.0], [-4.0], [2.0], [0.0]]]), 0.5, "plain").ravel()
    array([ 0., -4.,  2.,  0.], dtype=float32)
    """
    array = np.asarray(x, np.float32)
    if form == "dense":
        return array
    if form == "bf16":
        return to_bf16(array)
    return select(array, keep_count(array.shape[1] * array.shape[2], sparsity), form).dense()
