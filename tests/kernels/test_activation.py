"""affine and activation_grad: every activation in every form in which its derivative can be kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_razor.runtime import kernel_run, kernel_scratch
from tests.kernels.harness import Out, Scratch, assert_close, normal, run

BITS, Q4, DENSE = 1, 2, 3
SIXTH = float(np.float32(1 / 6))
# name: code, alpha, beta, torch function of float64, kept forms
ACTIVATIONS = {
    "none": (0, 0.0, 0.0, lambda x: x, ()),
    "relu": (1, 0.0, 0.0, F.relu, (BITS, DENSE)),
    "clip": (2, 0.0, 6.0, F.relu6, (BITS, DENSE)),
    "clip_below_zero": (2, -0.5, 0.75, lambda x: F.hardtanh(x, -0.5, 0.75), (BITS, DENSE)),
    "leaky_relu": (3, 0.25, 0.0, lambda x: F.leaky_relu(x, 0.25), (BITS, DENSE)),
    "hardsigmoid": (4, SIXTH, 0.5, lambda x: (SIXTH * x + 0.5).clamp(0, 1), (BITS, DENSE)),
    "hardswish": (5, 0.0, 0.0, F.hardswish, (Q4, DENSE)),
    "sigmoid": (6, 0.0, 0.0, torch.sigmoid, (Q4, DENSE)),
    "tanh": (7, 0.0, 0.0, torch.tanh, (Q4, DENSE)),
    "silu": (8, 0.0, 0.0, F.silu, (Q4, DENSE)),
    "gelu": (9, 0.0, 0.0, F.gelu, (Q4, DENSE)),
    "gelu_tanh": (10, 0.0, 0.0, lambda x: F.gelu(x, approximate="tanh"), (Q4, DENSE)),
}
RANGES = {
    5: (-0.5, 1.5),
    6: (0.0, 0.25),
    7: (0.0, 1.0),
    8: (-0.0999, 1.0999),
    9: (-0.1291, 1.1291),
    10: (-0.1291, 1.1291),
}
CASES = [(name, keep) for name, spec in ACTIVATIONS.items() for keep in (0, *spec[4])]
SHAPES = [(1, 1), (3, 2), (5, 7), (63, 8), (64, 9), (65, 17), (2, 33), (700, 24), (9, 4100)]


def kept_bytes(keep: int, rows: int, cols: int) -> int:
    return rows * {0: 0, BITS: (cols + 7) // 8, Q4: (cols + 1) // 2, DENSE: 4 * cols}[keep]


def torch_value_and_slope(name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = ACTIVATIONS[name][3](z)
    y.sum().backward()
    return y.detach().numpy(), z.grad.numpy()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize(("name", "keep"), CASES)
def test_affine_and_its_gradient(name: str, keep: int, rows: int, cols: int) -> None:
    code, alpha, beta, _, _ = ACTIVATIONS[name]
    x, scale, shift = 3 * normal(rows, rows, cols), normal(1, cols), normal(2, cols)
    ints, floats = [rows, cols, code, keep], [alpha, beta]
    size = kept_bytes(keep, rows, cols)
    (y, *kept), _ = run(
        "affine", ints, floats, [x, scale, shift, Out((rows, cols)), Out((size,), np.uint8) if keep else None]
    )
    z = x.astype(np.float64) * scale + shift
    value, slope = torch_value_and_slope(name, z)
    assert_close(y, value, 1e-6)
    if not keep:
        return
    dy = normal(5, rows, cols)
    (dx,), _ = run("activation_grad", [*ints, 0], floats, [dy, kept[0], Out((rows, cols)), None, None])
    operands = [dy, kept[0], Out((rows, cols)), Out((cols,)), Scratch()]
    (same, sums), _ = run("activation_grad", [*ints, 1], floats, operands)
    np.testing.assert_array_equal(same, dx)
    exact = dx.astype(np.float64)
    assert (np.abs(sums - exact.sum(0)) <= 5e-7 * np.abs(exact).sum(0) + 1e-30).all()
    before = normal(6, cols)
    added, size = before.copy(), kernel_scratch("activation_grad", [*ints, 2], floats)
    scratch = np.full(size, 0xA5, np.uint8)
    kernel_run("activation_grad", [*ints, 2], floats, [dy, kept[0], np.empty_like(dx), added, scratch])
    np.testing.assert_array_equal(added, before + sums)
    if keep == Q4:
        low, high = RANGES[code]
        step = (high - low) / 15
        assert (np.abs(dx - dy * slope) <= np.abs(dy) * step * 0.51 + 1e-6).all()
        nibbles = np.stack([kept[0] & 15, kept[0] >> 4], -1).reshape(rows, -1)[:, :cols]
        np.testing.assert_allclose(dx, dy * (low + nibbles * step), rtol=1e-5, atol=1e-6)
    else:
        # Float32 rounding may put a value on the other side of a kink.
        kinks = {1: [0], 2: [alpha, beta], 3: [0], 4: [-3, 3], 5: [-3, 3]}.get(code, [])
        away = np.all([np.abs(z - kink) > 1e-5 for kink in kinks], axis=0) if kinks else np.ones_like(z, bool)
        assert np.abs((dx - dy * slope)[away]).max(initial=0) <= 2e-6 * np.abs(dy).max()


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_scale_and_shift_may_be_absent_and_the_result_may_replace_the_input(given: tuple[bool, bool]) -> None:
    x = normal(0, 33, 70)
    scale, shift = (normal(i, 70) if keep else None for i, keep in enumerate(given))
    expected = np.maximum(x * (scale if given[0] else 1) + (shift if given[1] else 0), 0).astype(np.float32)
    (y,), _ = run("affine", [33, 70, 1, 0], [0, 0], [x, scale, shift, Out((33, 70)), None])
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    for threads in (1, 2):
        same, kept = x.copy(), np.zeros(33 * 9, np.uint8)
        kernel_run("affine", [33, 70, 1, 1], [0, 0], [same, scale, shift, same, kept], threads=threads)
        np.testing.assert_array_equal(same, y)
        dy = normal(3, 33, 70)
        gradient = dy.copy()
        kernel_run(
            "activation_grad", [33, 70, 1, 1, 0], [0, 0], [gradient, kept, gradient, None, None], threads=threads
        )
        np.testing.assert_array_equal(gradient, np.where(y > 0, dy, 0))
        gradient, sums = dy.copy(), np.empty(70, np.float32)
        kernel_run(
            "activation_grad", [33, 70, 1, 1, 1], [0, 0], [gradient, kept, gradient, sums, None], threads=threads
        )
        np.testing.assert_array_equal(gradient, np.where(y > 0, dy, 0))
        assert_close(sums, gradient.astype(np.float64).sum(0))


def test_identity_without_scale_copies() -> None:
    x = normal(0, 5, 1300)
    (y,), _ = run("affine", [5, 1300, 0, 0], [0, 0], [x, None, None, Out((5, 1300)), None])
    np.testing.assert_array_equal(y, x)


def test_bits_are_laid_out_as_documented() -> None:
    x = normal(0, 3, 21)
    (_, kept), _ = run("affine", [3, 21, 1, 1], [0, 0], [x, None, None, Out((3, 21)), Out((9,), np.uint8)])
    bits = np.unpackbits(kept.reshape(3, 3), axis=1, bitorder="little")
    np.testing.assert_array_equal(bits[:, :21], x > 0)
    assert not bits[:, 21:].any()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "none"])
def test_nan_stays_visible(name: str) -> None:
    code, alpha, beta, _, _ = ACTIVATIONS[name]
    x = normal(0, 2, 19)
    x[1, 18] = x[0, 3] = np.nan
    (y,), _ = run("affine", [2, 19, code, 0], [alpha, beta], [x, None, None, Out((2, 19)), None])
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
