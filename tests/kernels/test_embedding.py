"""Embedding and its gradient, and rotary position embedding, against numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_razor.errors import NonFiniteError
from edge_razor.runtime import kernel_run
from tests.kernels.harness import Out, assert_close, normal, run


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize(
    ("n", "vocabulary", "cols"), [(1, 1, 1), (5, 3, 7), (64, 11, 64), (700, 90, 33), (3, 500, 130)]
)
def test_embedding_and_its_gradient(n: int, vocabulary: int, cols: int, transposed: int) -> None:
    ids = np.random.default_rng(0).integers(0, vocabulary, n).astype(np.int32)
    w, dy = normal(1, vocabulary, cols), normal(2, n, cols)
    stored = np.ascontiguousarray(w.T) if transposed else w
    (y,), _ = run("embedding", [n, vocabulary, cols, transposed], [], [ids, stored, Out((n, cols))])
    np.testing.assert_array_equal(y, w[ids])
    for padding in (-1, int(ids[0])):
        expected = np.zeros((vocabulary, cols))
        np.add.at(expected, ids[ids != padding], dy[ids != padding].astype(np.float64))
        shape = stored.shape
        (g,), _ = run("embedding_grad", [n, vocabulary, cols, transposed, padding], [], [ids, dy, Out(shape)])
        assert_close(g.T if transposed else g, expected, 2e-6)


@pytest.mark.parametrize("bad", [-1, 7, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", ["embedding", "embedding_grad"])
def test_an_index_outside_of_the_table_is_reported_and_reads_nothing(name: str, bad: int) -> None:
    ids = np.array([0, 6, bad], np.int32)
    rows, table = np.ones((3, 4), np.float32), np.ones((7, 4), np.float32)
    ints, operands = (
        ([3, 7, 4, 0], [ids, table, rows]) if name == "embedding" else ([3, 7, 4, 0, -1], [ids, rows, table])
    )
    with pytest.raises(NonFiniteError):
        kernel_run(name, ints, [], operands)


@pytest.mark.parametrize(("n", "t", "heads", "d"), [(1, 1, 1, 2), (2, 5, 3, 6), (3, 40, 4, 64), (1, 130, 2, 34)])
def test_rotary_and_its_transpose(n: int, t: int, heads: int, d: int) -> None:
    x, dy = normal(1, n, t, heads, d), normal(2, n, t, heads, d)
    cos, sin = normal(3, t, d), normal(4, t, d)  # the transpose is right for any tables, not only for angles
    z = torch.from_numpy(x).double().requires_grad_()
    a, b = z.chunk(2, -1)
    tables = [torch.from_numpy(table).double()[:, None] for table in (cos, sin)]
    y = z * tables[0] + torch.cat([-b, a], -1) * tables[1]
    y.backward(torch.from_numpy(dy).double())
    ints = [n, t, heads, d]
    (forward,), _ = run("rotary", [*ints, 0], [], [x, cos, sin, Out(x.shape)])
    (backward,), _ = run("rotary", [*ints, 1], [], [dy, cos, sin, Out(x.shape)])
    assert_close(forward, y.detach(), 1e-6)
    assert_close(backward, z.grad, 1e-6)
    same = x.copy()
    kernel_run("rotary", [*ints, 0], [], [same, cos, sin, same], threads=2)
    np.testing.assert_array_equal(same, forward)
