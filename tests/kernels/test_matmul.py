"""Products of two batches of matrices against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.harness import Out, assert_close, normal, run


@pytest.mark.parametrize("transpose_b", [0, 1])
@pytest.mark.parametrize("transpose_a", [0, 1])
@pytest.mark.parametrize(
    ("batch", "m", "k", "p"), [(1, 1, 1, 1), (3, 5, 7, 11), (2, 130, 64, 33), (1, 300, 20, 65), (9, 17, 1, 3)]
)
def test_batch_matmul(batch: int, m: int, k: int, p: int, transpose_a: int, transpose_b: int) -> None:
    a, b = normal(1, batch, m, k), normal(2, batch, k, p)
    expected = a.astype(np.float64) @ b
    stored_a = np.ascontiguousarray(a.transpose(0, 2, 1)) if transpose_a else a
    stored_b = np.ascontiguousarray(b.transpose(0, 2, 1)) if transpose_b else b
    ints = [batch, m, k, p, transpose_a, transpose_b]
    (y,), _ = run("batch_matmul", ints, [], [stored_a, stored_b, Out((batch, m, p))])
    assert_close(y, expected, 2e-6)
