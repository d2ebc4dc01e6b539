"""Frozen batch normalization and per-channel sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_razor.runtime import kernel_run, kernel_scratch
from tests.kernels.harness import Out, Scratch, assert_close, normal, run

SHAPES = [(1, 1), (1, 17), (2, 3), (7, 16), (63, 5), (64, 64), (65, 33), (511, 4), (1024, 31), (4099, 24), (3, 1300)]


@pytest.mark.parametrize(
    "present", [(True, True, True), (False, True, False), (True, False, True), (False, False, False)]
)
@pytest.mark.parametrize("channels", [1, 19, 64])
def test_fold_and_gamma_gradient_match_torch_batch_norm(channels: int, present: tuple[bool, bool, bool]) -> None:
    gamma, beta, mean, bias = (normal(i, channels) for i in range(4))
    var = np.abs(normal(5, channels)) + 0.1
    given = [array if keep else None for array, keep in zip((gamma, beta, bias), present, strict=True)]
    ints, floats = [channels], [1e-3]
    (scale, shift), _ = run(
        "batch_norm_fold", ints, floats, [given[0], given[1], mean, var, given[2], Out((channels,)), Out((channels,))]
    )
    z = torch.from_numpy(normal(6, 40, channels)).double()  # the preceding convolution's output, without its bias
    g = torch.tensor(gamma if present[0] else np.ones(channels), dtype=torch.float64, requires_grad=True)
    b = torch.tensor(beta if present[1] else np.zeros(channels), dtype=torch.float64)
    offset = torch.tensor(bias if present[2] else np.zeros(channels), dtype=torch.float64)
    y = torch.nn.functional.batch_norm(
        z + offset, torch.from_numpy(mean).double(), torch.from_numpy(var).double(), g, b, eps=float(np.float32(1e-3))
    )
    assert_close(z.numpy() * scale + shift, y.detach(), 5e-7)

    dy = torch.from_numpy(normal(7, 40, channels)).double()
    y.backward(dy)
    dot = (dy * z).sum(0).float().numpy()
    dshift = dy.sum(0).float().numpy()
    (dgamma,), _ = run("batch_norm_grad", ints, floats, [dot, dshift, mean, var, given[2], Out((channels,))])
    assert_close(dgamma, g.grad)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_channel_sum(rows: int, cols: int) -> None:
    dy = normal(rows, rows, cols)
    (total,), _ = run("channel_sum", [rows, cols], [], [dy, Out((cols,)), Scratch()])
    assert_close(total, dy.astype(np.float64).sum(0))
    before = normal(1, cols)
    added = before.copy()
    scratch = np.full(kernel_scratch("channel_sum", [rows, cols, 1]), 0xA5, np.uint8)
    kernel_run("channel_sum", [rows, cols, 1], [], [dy, added, scratch])
    np.testing.assert_array_equal(added, before + total)


@pytest.mark.parametrize("cols", [1, 8, 40])
def test_channel_sum_of_many_equal_signs_stays_exact(cols: int) -> None:
    """100,352 rows, all positive: adding one after another in float32 would be off by 1e-5 and more."""
    dy = np.random.default_rng(0).random((100_352, cols), np.float32) + np.float32(0.1)
    (total,), _ = run("channel_sum", list(dy.shape), [], [dy, Out((cols,)), Scratch()])
    assert (np.abs(total / dy.astype(np.float64).sum(0) - 1) < 2e-7).all()


def test_channel_sum_scratch_is_one_row_a_chunk() -> None:
    assert kernel_scratch("channel_sum", [511, 7]) == kernel_scratch("channel_sum", [511, 7, 0]) == 0
    assert kernel_scratch("channel_sum", [511, 7, 1]) == 7 * 4  # what is added to is read last
    assert kernel_scratch("channel_sum", [1024, 7]) == 2 * 7 * 4
    assert kernel_scratch("channel_sum", [10**6, 7], threads=8) == 32 * 7 * 4


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_column_dot_and_scale_columns(rows: int, cols: int) -> None:
    w, g, scale = normal(1, rows, cols), normal(2, rows, cols), normal(3, cols)
    (dot,), _ = run("column_dot", [rows, cols], [], [w, g, Out((cols,))])
    exact = w.astype(np.float64) * g
    assert (np.abs(dot - exact.sum(0)) <= 5e-7 * np.abs(exact).sum(0) + 1e-12).all()
    (out,), _ = run("scale_columns", [rows, cols], [], [g, scale, Out((rows, cols))])
    np.testing.assert_array_equal(out, g * scale)
