"""Elementwise arithmetic, broadcasting and its gradient, copies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edge_razor.runtime import kernel_run
from tests.kernels.harness import InOut, Out, Scratch, normal, run

OPS = [np.add, np.subtract, np.multiply, np.divide]


def element_strides(shape: tuple[int, ...], dims: tuple[int, ...]) -> list[int]:
    """Row-major strides of `shape`, aligned at the right with `dims`; 0 where it is broadcast."""
    strides, step = [], 1
    for size, dim in zip(reversed((1,) * (len(dims) - len(shape)) + shape), reversed(dims), strict=True):
        strides.append(step if size == dim else 0)
        step *= size
    return strides[::-1]


BROADCASTS = [
    ((), ()),
    ((1,), (1,)),
    ((17,), (17,)),
    ((100_003,), (100_003,)),
    ((100_003,), (1,)),
    ((1,), (40_000,)),
    ((1, 1), (65, 1)),
    ((63, 5), (5,)),
    ((513, 48), (48,)),
    ((48,), (513, 48)),
    ((2, 7, 9, 24), (2, 1, 1, 24)),
    ((3, 1, 1, 130), (3, 31, 5, 130)),
    ((2, 1, 5), (1, 3, 5)),
    ((64, 65), (64, 1)),
    ((4, 1, 3, 1), (1, 5, 1, 7)),
    ((1, 2, 1, 3, 1, 2, 1, 5), (2, 2, 2, 1, 1, 2, 3, 1)),
]


@pytest.mark.parametrize("op", range(4))
@pytest.mark.parametrize(("shape_a", "shape_b"), BROADCASTS)
def test_binary_broadcasts_like_numpy(op: int, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    a, b = normal(1, *shape_a), normal(2, *shape_b)
    expected = OPS[op](a, b)
    dims = expected.shape
    ints = [op, len(dims), *dims, *element_strides(shape_a, dims), *element_strides(shape_b, dims)]
    (out,), _ = run("binary", ints, [], [a, b, Out(dims)])
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("op", range(4))
def test_binary_in_place_over_either_operand(op: int) -> None:
    a, b = normal(1, 37, 129), normal(2, 37, 129)
    ints = [op, 2, 37, 129, 129, 1, 129, 1]
    for threads in (1, 2):
        first, second = a.copy(), b.copy()
        kernel_run("binary", ints, [], [first, b, first], threads=threads)
        kernel_run("binary", ints, [], [a, second, second], threads=threads)
        np.testing.assert_array_equal(first, OPS[op](a, b))
        np.testing.assert_array_equal(second, OPS[op](a, b))


def test_binary_reads_transposed_operands() -> None:
    a, b = normal(1, 33, 20), normal(2, 20, 33)
    (out,), _ = run("binary", [0, 2, 20, 33, 1, 20, 33, 1], [], [a, b, Out((20, 33))])
    np.testing.assert_array_equal(out, a.T + b)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40_001])
def test_neg_and_fill(n: int) -> None:
    x = normal(0, n)
    x[0] = 0.0
    (y,), _ = run("neg", [n], [], [x, Out((n,))])
    np.testing.assert_array_equal(y, -x)
    assert np.signbit(y[0])
    (filled,), _ = run("fill", [n], [-2.5], [Out((n,))])
    assert (filled == -2.5).all()
    same = x.copy()
    kernel_run("neg", [n], [], [same, same], threads=2)
    np.testing.assert_array_equal(same, -x)


REDUCED_SHAPES = [
    (1,),
    (7,),
    (100_003,),
    (1, 5),
    (2049, 3),
    (3, 2049),
    (65, 64),
    (3, 49, 40),
    (4, 6, 5, 18),
    (2, 3, 1, 5, 7),
    (1, 700, 2, 3),
]


@pytest.mark.parametrize("shape", REDUCED_SHAPES)
@pytest.mark.parametrize("op", [0, 1])
def test_reduce_every_set_of_axes(shape: tuple[int, ...], op: int) -> None:
    x = normal(3, *shape)
    exact = x.astype(np.float64)
    for flags in itertools.product([0, 1], repeat=len(shape)):
        axes = tuple(d for d, flag in enumerate(flags) if flag)
        expected = exact.sum(axes) if op == 0 else exact.mean(axes)
        bound = np.abs(exact).sum(axes) / (1 if op == 0 else math.prod(shape[d] for d in axes))
        (out,), _ = run(
            "reduce", [op, len(shape), *shape, *flags], [], [x, Out(expected.shape), Scratch()], threads=(1, 2)
        )
        assert (np.abs(out - expected) <= 3e-7 * bound).all(), flags


def test_reduce_of_many_equal_signs_stays_exact() -> None:
    x = np.random.default_rng(0).random((2, 100_352, 9), np.float32) + np.float32(0.1)
    (out,), _ = run("reduce", [0, 3, *x.shape, 0, 1, 0], [], [x, Out((2, 9)), Scratch()])
    assert (np.abs(out / x.astype(np.float64).sum(1) - 1) < 3e-7).all()
    (out,), _ = run("reduce", [0, 3, *x.shape, 1, 1, 1], [], [x, Out(()), Scratch()])
    assert abs(out / x.astype(np.float64).sum() - 1) < 3e-7


@pytest.mark.parametrize(
    ("dims", "shape"),
    [((3, 49, 40), (3, 1, 40)), ((5, 7), (5, 1)), ((4, 6, 5), (1,)), ((2, 3, 4), (2, 3, 4)), ((300, 70), (70,))],
)
def test_broadcast_scales_and_repeats(dims: tuple[int, ...], shape: tuple[int, ...]) -> None:
    dy = normal(4, *shape)
    (dx,), _ = run("broadcast", [len(dims), *dims, *element_strides(shape, dims)], [0.25], [dy, Out(dims)])
    np.testing.assert_array_equal(dx, np.broadcast_to(dy * np.float32(0.25), dims))


PERMUTED = [(1,), (5, 1), (63, 65), (2, 58), (300, 70), (3, 5, 7), (4, 1, 33, 6), (3, 49, 2, 58), (2, 3, 4, 5, 6)]


@pytest.mark.parametrize("shape", PERMUTED)
def test_copy_every_permutation(shape: tuple[int, ...]) -> None:
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    for perm in itertools.permutations(range(len(shape))):
        dims = tuple(shape[p] for p in perm)
        src = [x.strides[p] // 4 for p in perm]
        dst = element_strides(dims, dims)
        dst = [stride or 1 for stride in dst]
        (out,), _ = run("copy", [len(dims), *dims, *src, *dst, 0, 0], [], [x, Out(dims)], threads=(1, 2))
        np.testing.assert_array_equal(out, x.transpose(perm))


def test_copy_slice_into_a_slice_leaves_the_rest() -> None:
    """Concatenation and splitting: columns 3 to 20 of one map go to columns 5 to 22 of another."""
    x, y = normal(1, 70, 24), normal(2, 70, 30)
    ints = [2, 70, 17, 24, 1, 30, 1, 3, 5]
    (out,), _ = run("copy", ints, [], [x, InOut(y)])
    expected = y.copy()
    expected[:, 5:22] = x[:, 3:20]
    np.testing.assert_array_equal(out, expected)


def test_copy_of_every_other_element() -> None:
    x, y = normal(1, 9, 40), normal(2, 9, 60)
    (out,), _ = run("copy", [2, 9, 20, 40, 2, 60, 3, 1, 2], [], [x, InOut(y)])
    expected = y.copy()
    expected[:, 2::3] = x[:, 1::2]
    np.testing.assert_array_equal(out, expected)


def test_copy_repeats_with_source_stride_zero() -> None:
    x = normal(1, 13)
    (out,), _ = run("copy", [2, 50, 13, 0, 1, 13, 1, 0, 0], [], [x, Out((50, 13))])
    np.testing.assert_array_equal(out, np.broadcast_to(x, (50, 13)))


def test_copy_moves_bits_unchanged() -> None:
    """A not-a-number keeps its payload: copies move integers too."""
    x = np.array([0x7FA00001, 0xFFFFFFFF, 1, 0x80000000] * 9, np.uint32)
    (out,), _ = run("copy", [1, 36, 1, 1, 0, 0], [], [x, Out((36,), np.uint32)])
    np.testing.assert_array_equal(out, x)
