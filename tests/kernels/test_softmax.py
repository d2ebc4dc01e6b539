"""Softmax along any axis, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_razor.runtime import kernel_run
from tests.kernels.harness import Out, assert_close, normal, run

SHAPES = [
    (1, 1, 1),
    (3, 7, 1),
    (65, 64, 1),
    (2, 1000, 1),
    (1, 30_011, 1),
    (4, 3, 5),
    (2, 10, 17),
    (7, 5, 130),
    (1, 1, 9),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_and_its_gradient(shape: tuple[int, int, int]) -> None:
    x = 4 * normal(1, *shape)
    z = torch.from_numpy(x).double().requires_grad_()
    expected = z.softmax(1)
    (y,), _ = run("softmax", shape, [], [x, Out(shape)])
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=2e-6, atol=1e-37)
    dy = normal(2, *shape)
    expected.backward(torch.from_numpy(dy).double())
    (dx,), _ = run("softmax_grad", shape, [], [dy, y, Out(shape)])
    if shape[1] == 1:
        assert (np.abs(dx) < 1e-6).all()
    else:
        assert_close(dx, z.grad, 2e-6)
    for threads in (1, 2):
        same, gradient = x.copy(), dy.copy()
        kernel_run("softmax", shape, [], [same, same], threads=threads)
        kernel_run("softmax_grad", shape, [], [gradient, y, gradient], threads=threads)
        np.testing.assert_array_equal(same, y)
        np.testing.assert_array_equal(gradient, dx)


@pytest.mark.parametrize("inner", [1, 3])
def test_large_values_and_masked_positions(inner: int) -> None:
    x = np.repeat(np.array([1e30, -np.inf, 1e30, -1e30], np.float32), inner).reshape(1, 4, inner)
    (y,), _ = run("softmax", x.shape, [], [x, Out(x.shape)])
    np.testing.assert_array_equal(y[0, :, 0], [0.5, 0, 0.5, 0])


@pytest.mark.parametrize("inner", [1, 3])
def test_nan_spoils_its_own_row_only(inner: int) -> None:
    x = normal(0, 3, 20, inner)
    x[1, 7, 0] = np.nan
    (y,), _ = run("softmax", x.shape, [], [x, Out(x.shape)])
    assert np.isnan(y[1, :, 0]).all() and np.isnan(y).sum() == 20
