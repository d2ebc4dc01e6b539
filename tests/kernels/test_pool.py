"""Pooling, forward and backward, against torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.kernels.harness import Out, assert_close, normal, run


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).double().permute(0, 3, 1, 2).contiguous()


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


# n, ih, iw, c, kernel, stride, padding, dilation, ceil mode
MAX = [
    (2, 8, 8, 16, (2, 2), (2, 2), (0, 0), (1, 1), False),
    (1, 7, 9, 1, (3, 3), (2, 2), (1, 1), (1, 1), False),
    (2, 13, 5, 65, (3, 2), (1, 3), (1, 0), (1, 1), True),
    (1, 11, 12, 7, (3, 3), (1, 2), (1, 1), (2, 3), False),
    (3, 1, 1, 300, (1, 1), (1, 1), (0, 0), (1, 1), False),
    (1, 16, 16, 3, (16, 16), (16, 16), (0, 0), (1, 1), False),
    (1, 5, 5, 31, (2, 2), (3, 3), (0, 0), (1, 1), False),
    (2, 30, 31, 24, (3, 3), (2, 2), (0, 0), (1, 1), True),
]


@pytest.mark.parametrize("case", MAX)
def test_max_pool(case: tuple) -> None:
    n, ih, iw, c, kernel, stride, pad, dilation, ceil = case
    x = np.round(normal(1, n, ih, iw, c) * 2)  # many ties
    z = nchw(x).requires_grad_()
    y = F.max_pool2d(z, kernel, stride, pad, dilation, ceil)
    oh, ow = y.shape[2:]
    ints = [n, ih, iw, c, oh, ow, *kernel, *stride, *pad, *dilation]
    (out, index), _ = run("max_pool", ints, [], [x, Out((n, oh, ow, c)), Out((n, oh, ow, c), np.uint8)])
    np.testing.assert_array_equal(out, nhwc(y))
    (alone,), _ = run("max_pool", ints, [], [x, Out((n, oh, ow, c)), None])
    np.testing.assert_array_equal(alone, out)
    dy = normal(2, n, oh, ow, c)
    y.backward(nchw(dy))
    (dx,), _ = run("max_pool_grad", ints, [], [dy, index, Out(x.shape)])
    assert_close(dx, nhwc(z.grad))  # torch breaks ties the same way: the first wins


def test_max_pool_of_minus_infinity_picks_the_first_tap_inside() -> None:
    x = np.full((1, 3, 3, 5), -np.inf, np.float32)
    (y, index), _ = run(
        "max_pool", [1, 3, 3, 5, 2, 2, 3, 3, 2, 2, 1, 1, 1, 1], [], [x, Out((1, 2, 2, 5)), Out((1, 2, 2, 5), np.uint8)]
    )
    assert (y == -np.inf).all()
    assert index[0, :, :, 0].tolist() == [[4, 3], [1, 0]]


def test_max_pool_lets_nan_through() -> None:
    x = normal(0, 1, 4, 4, 3)
    x[0, 1, 1, 2] = np.nan
    (y, index), _ = run(
        "max_pool", [1, 4, 4, 3, 2, 2, 2, 2, 2, 2, 0, 0, 1, 1], [], [x, Out((1, 2, 2, 3)), Out((1, 2, 2, 3), np.uint8)]
    )
    assert np.isnan(y).sum() == 1 and np.isnan(y[0, 0, 0, 2]) and index[0, 0, 0, 2] == 3


def test_max_pool_window_altogether_in_the_padding_is_minus_infinity_and_has_no_gradient() -> None:
    ints = [1, 2, 2, 3, 3, 3, 1, 1, 2, 2, 2, 2, 1, 1]
    (y, index), _ = run("max_pool", ints, [], [normal(0, 1, 2, 2, 3), Out((1, 3, 3, 3)), Out((1, 3, 3, 3), np.uint8)])
    assert np.isneginf(y[0, 0]).all() and np.isfinite(y[0, 1, 1]).all()
    (dx,), _ = run("max_pool_grad", ints, [], [np.ones((1, 3, 3, 3), np.float32), index, Out((1, 2, 2, 3))])
    np.testing.assert_array_equal(dx[0, :, :, 0], [[1, 0], [0, 0]])


def test_max_pool_gradient_ignores_an_index_that_names_no_tap() -> None:
    ints = [1, 4, 4, 3, 2, 2, 2, 2, 2, 2, 0, 0, 1, 1]
    (dx,), _ = run(
        "max_pool_grad", ints, [], [normal(0, 1, 2, 2, 3), np.full((1, 2, 2, 3), 255, np.uint8), Out((1, 4, 4, 3))]
    )
    assert (dx == 0).all()


# n, ih, iw, c, kernel, stride, padding, ceil mode
AVERAGE = [
    (2, 8, 8, 16, (2, 2), (2, 2), (0, 0), False),
    (1, 7, 9, 1, (3, 3), (2, 2), (1, 1), False),
    (2, 13, 5, 65, (3, 2), (1, 3), (1, 1), True),
    (3, 7, 7, 1280, (7, 7), (1, 1), (0, 0), False),
    (1, 5, 5, 31, (2, 2), (3, 3), (1, 1), True),
    (1, 10, 9, 24, (5, 4), (1, 1), (2, 2), False),
    (1, 6, 6, 17, (3, 3), (4, 4), (0, 0), False),
]


@pytest.mark.parametrize("include_pad", [False, True])
@pytest.mark.parametrize("case", AVERAGE)
def test_average_pool(case: tuple, include_pad: bool) -> None:
    n, ih, iw, c, kernel, stride, pad, ceil = case
    x = normal(1, n, ih, iw, c)
    z = nchw(x).requires_grad_()
    y = F.avg_pool2d(z, kernel, stride, pad, ceil, include_pad)
    oh, ow = y.shape[2:]
    ints = [n, ih, iw, c, oh, ow, *kernel, *stride, *pad, *pad, int(include_pad)]
    (out,), _ = run("average_pool", ints, [], [x, Out((n, oh, ow, c))])
    assert_close(out, nhwc(y), 5e-7)
    dy = normal(2, n, oh, ow, c)
    y.backward(nchw(dy))
    (dx,), _ = run("average_pool_grad", ints, [], [dy, Out(x.shape)])
    assert_close(dx, nhwc(z.grad), 5e-7)


@pytest.mark.parametrize("include_pad", [False, True])
def test_average_pool_with_asymmetric_padding(include_pad: bool) -> None:
    """Top 0, left 1, bottom 2, right 0, as SAME padding gives: a mask that is pooled too gives the counts."""
    x = normal(3, 2, 6, 7, 5)
    z = F.pad(nchw(x), (1, 0, 0, 2)).requires_grad_()
    ones = F.pad(torch.ones(1, 1, 6, 7, dtype=torch.float64), (1, 0, 0, 2), value=float(include_pad))
    y = F.avg_pool2d(z, 3, 2, divisor_override=1) / F.avg_pool2d(ones, 3, 2, divisor_override=1)
    oh, ow = y.shape[2:]
    ints = [2, 6, 7, 5, oh, ow, 3, 3, 2, 2, 0, 1, 2, 0, int(include_pad)]
    (out,), _ = run("average_pool", ints, [], [x, Out((2, oh, ow, 5))])
    assert_close(out, nhwc(y), 5e-7)
    dy = normal(4, 2, oh, ow, 5)
    y.backward(nchw(dy))
    (dx,), _ = run("average_pool_grad", ints, [], [dy, Out(x.shape)])
    assert_close(dx, nhwc(z.grad[:, :, :6, 1:]), 5e-7)


def test_average_pool_window_altogether_in_the_padding_is_zero() -> None:
    ints = [1, 2, 2, 3, 3, 3, 1, 1, 2, 2, 2, 2, 1, 1, 0]
    (y,), _ = run("average_pool", ints, [], [np.ones((1, 2, 2, 3), np.float32), Out((1, 3, 3, 3))])
    assert y[0, :, :, 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
