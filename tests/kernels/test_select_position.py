"""One position of each sample, by tokens or by mask."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.harness import Out, normal, run


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize(("kind", "expected"), [(0, [3, 0, 4, 0]), (1, [2, 4, 4, 0])])
def test_selects_and_puts_back(kind: int, expected: list[int], dtype: type) -> None:
    """Padding 7 inside, nothing but padding, none, and one token in front."""
    source = np.array([[1, 7, 2, 3, 7], [7, 7, 7, 7, 7], [1, 2, 3, 4, 5], [0, 7, 7, 7, 7]], dtype)
    x, dy = normal(0, 4, 5, 9), normal(1, 4, 9)
    ints = [4, 5, 9, kind, 7, int(dtype is np.int32)]
    (y,), _ = run("select_position", ints, [], [x, source, Out((4, 9))])
    np.testing.assert_array_equal(y, x[np.arange(4), expected])
    (dx,), _ = run("select_position_grad", ints, [], [dy, source, Out(x.shape)])
    wanted = np.zeros_like(x)
    wanted[np.arange(4), expected] = dy
    np.testing.assert_array_equal(dx, wanted)
