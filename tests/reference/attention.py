"""Attention with pruned probabilities in plain numpy: what the packed rows hold, and the backward pass made from them.

docs/plan-format.md ("Kept probabilities") is the text that this follows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.reference.razor import to_bf16

Doubles = NDArray[np.float64]


def keep_rows(p: NDArray[np.float32], keep: int) -> NDArray[np.bool_]:
    """True where an element of p[…, keys] is among the ``keep`` largest of its row; of equal ones the first, zeros
    never."""
    order = np.argsort(-p, axis=-1, kind="stable")[..., :keep]
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return kept & (p > 0)


def unpack_rows(
    packed: NDArray[np.uint8], rows: int, keys: int, keep: int
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.bool_]]:
    """(kept, values, dropped), each [rows, keys], of packed probabilities."""
    words = -(-keys // 64)
    begin = -(-rows * words * 8 // 64) * 64
    bits = np.unpackbits(packed[: rows * words * 8].reshape(rows, -1), axis=1, bitorder="little")
    assert not bits[:, keys:].any(), "a bit past the last key"
    kept = bits[:, :keys].astype(bool)
    halves = packed[begin : begin + rows * keep * 2].view(np.uint16).reshape(rows, keep)
    values, dropped = np.zeros((rows, keys), np.float32), np.zeros((rows, keys), bool)
    for row in range(rows):
        half = halves[row, : kept[row].sum()]
        values[row, kept[row]] = ((half & 0x7FFF).astype(np.uint32) << 16).view(np.float32)
        dropped[row, kept[row]] = half >> 15
    return kept, values, dropped


def pruned_gradients(
    q: Doubles, k: Doubles, v: Doubles, dy: Doubles, p: Doubles, factor: Doubles, scale: float
) -> tuple[Doubles, Doubles, Doubles]:
    """dQ, dK and dV of [n, heads, positions, d] from pruned probabilities p[n, heads, t, s]; ``factor`` is what dropout
    multiplies them by."""
    dp = (dy @ v.swapaxes(-1, -2)) * factor
    mass = p.sum(-1, keepdims=True)
    delta = np.divide((p * dp).sum(-1, keepdims=True), mass, out=np.zeros_like(mass), where=mass > 0)
    ds = scale * p * (dp - delta)
    return ds @ k, ds.swapaxes(-1, -2) @ q, (p * factor).swapaxes(-1, -2) @ dy


def as_kept(p: NDArray[np.float32], keep: int) -> NDArray[np.float32]:
    """Probabilities as the backward pass sees them."""
    return np.where(keep_rows(p, keep), to_bf16(p), np.float32(0))
