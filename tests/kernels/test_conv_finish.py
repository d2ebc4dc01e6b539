"""The last step of `conv_grad_input`, slopes and channel sums, against `activation_grad` and sums in float64."""

from __future__ import annotations

import numpy as np
import pytest

from edge_razor.errors import UsageError
from edge_razor.runtime import kernel_run, kernel_scratch

from .test_conv import CASES, Case, grad_input, scratch

# name: act, keep, alpha, beta
SLOPES = {
    "none": (0, 0, 0.0, 0.0),
    "relu": (1, 1, 0.0, 0.0),
    "clip": (2, 1, -0.5, 0.75),
    "leaky_relu": (3, 1, 0.25, 0.0),
    "hardsigmoid": (4, 1, 0.2, 0.5),
    "hardswish": (5, 2, 0.0, 0.0),
    "silu": (8, 2, 0.0, 0.0),
}


def kept_slopes(keep: int, rows: int, cols: int, seed: int = 5) -> np.ndarray | None:
    """Random bits or nibbles; spare ones are set as well, and must not matter."""
    width = {0: 0, 1: (cols + 7) // 8, 2: (cols + 1) // 2}[keep]
    return np.random.default_rng(seed).integers(0, 256, rows * width, np.uint8) if keep else None


def finished(
    case: Case,
    dy: np.ndarray,
    w: np.ndarray,
    slope: str,
    kept: np.ndarray | None,
    into: np.ndarray | None,
    sum_too: bool,
    threads: int,
    sums_into: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """dX and its sums from one step, added to `into` and `sums_into`."""
    act, keep, alpha, beta = SLOPES[slope]
    dx = np.full((case.n, case.ih, case.iw, case.ic), np.nan, np.float32) if into is None else into.copy()
    sums = np.full(case.ic, np.nan, np.float32) if sum_too else None
    if sums_into is not None:
        sums = sums_into.copy()
    sum_code = int(sum_too) if sums_into is None else 2
    ints, floats = [*case.ints, act, keep, sum_code, int(into is not None)], [alpha, beta]
    room = scratch("conv_grad_input", ints, floats, threads)
    scale = np.linspace(-2, 2, case.oc, dtype=np.float32)
    kernel_run("conv_grad_input", ints, floats, [dy, w, scale, dx, kept, sums, room], threads)
    return dx, sums


def assert_sums(sums: np.ndarray | None, dx: np.ndarray) -> None:
    """Eight terms are added as they are, then their sum with compensation: a few roundings in all."""
    assert sums is not None
    terms = dx.reshape(-1, dx.shape[-1]).astype(np.float64)
    assert (np.abs(sums - terms.sum(0)) <= 3e-7 * np.abs(terms).sum(0) + 1e-30).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_finish_equals_separate_steps(name: str, accumulate: bool) -> None:
    case = CASES[name]
    x, w, dy = case.tensors(6)
    into = x if accumulate else None
    rows = case.n * case.ih * case.iw
    for threads in (1, 2, 3):
        plain = grad_input(case, dy, w, np.linspace(-2, 2, case.oc, dtype=np.float32), into, threads)
        for slope, (act, keep, alpha, beta) in SLOPES.items():
            kept = kept_slopes(keep, rows, case.ic)
            expected = plain
            if kept is not None:
                expected = np.empty_like(plain)
                operands = [plain, kept, expected, None, None]
                kernel_run("activation_grad", [rows, case.ic, act, keep, 0], [alpha, beta], operands)
            dx, sums = finished(case, dy, w, slope, kept, into, True, threads)
            np.testing.assert_array_equal(dx, expected)
            assert_sums(sums, dx)
            alone, none = finished(case, dy, w, slope, kept, into, False, threads)
            assert none is None
            np.testing.assert_array_equal(alone, expected)


@pytest.mark.parametrize("slope", ["none", "relu"])
@pytest.mark.parametrize("name", CASES)
def test_finish_adds_to_sums_that_are_there(name: str, slope: str) -> None:
    case = CASES[name]
    _, w, dy = case.tensors(9)
    kept = kept_slopes(SLOPES[slope][1], case.n * case.ih * case.iw, case.ic)
    before = np.linspace(-100, 100, case.ic, dtype=np.float32)
    for threads in (1, 2, 3):
        dx, sums = finished(case, dy, w, slope, kept, None, True, threads)
        again, added = finished(case, dy, w, slope, kept, None, True, threads, before)
        np.testing.assert_array_equal(again, dx)
        assert sums is not None and added is not None
        total = before.astype(np.float64) + sums  # which float32 rounds once more than the kernel's
        assert (np.abs(added - total) <= 2**-24 * (np.abs(sums) + np.abs(total)) * 1.001).all()
        sizes = [kernel_scratch("conv_grad_input", [*case.ints, 0, 0, s, 0], [0.0, 0.0], threads) for s in (1, 2)]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["pointwise_prime", "k3_stride_2", "stride_above_kernel", "depthwise_5", "groups_odd"])
def test_finish_repeats_bit_by_bit(name: str, threads: int) -> None:
    case = CASES[name]
    _, w, dy = case.tensors(7)
    kept = kept_slopes(1, case.n * case.ih * case.iw, case.ic)
    first = finished(case, dy, w, "relu", kept, None, True, threads)
    for _ in range(3):
        again = finished(case, dy, w, "relu", kept, None, True, threads)
        assert first[0].tobytes() == again[0].tobytes()
        assert first[1] is not None and again[1] is not None and first[1].tobytes() == again[1].tobytes()


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 224, 224, 9, 4),
        Case(2, 224, 224, 9, 9, (3, 3), (1, 1), (1, 1, 1, 1), group=9),
        Case(1, 1, 100_352, 9, 9, (1, 3), (1, 1), (0, 1, 0, 1), group=9),
        Case(2, 225, 223, 6, 6, (3, 3), (2, 2), (1, 1, 1, 1), group=2),
    ],
    ids=["pointwise", "depthwise", "depthwise_one_row", "groups"],
)
def test_finish_sums_of_many_equal_signs_stay_exact(case: Case) -> None:
    """100,000 rows, all positive: adding one after another in float32 would be off by 1e-5 and more."""
    rng = np.random.default_rng(8)
    _, w, dy = case.tensors()
    w, dy = np.abs(w), rng.random(dy.shape, np.float32) + np.float32(0.1)
    ints, floats = [*case.ints, 0, 0, 1, 0], [0.0, 0.0]
    for threads in (1, 3):
        dx, sums = np.empty((case.n, case.ih, case.iw, case.ic), np.float32), np.empty(case.ic, np.float32)
        room = scratch("conv_grad_input", ints, floats, threads)
        kernel_run("conv_grad_input", ints, floats, [dy, w, None, dx, None, sums, room], threads)
        exact = dx.astype(np.float64).sum((0, 1, 2))
        assert (np.abs(sums / exact - 1) < 2e-7).all()


@pytest.mark.parametrize("name", ["pointwise_63_rows", "k3", "groups", "depthwise_3"])
def test_finish_drops_gradients_that_are_not_finite_where_relu_is_off(name: str) -> None:
    case = CASES[name]
    _, w, dy = case.tensors()
    dy[:] = np.nan
    rows = case.n * case.ih * case.iw
    kept = np.zeros(rows * ((case.ic + 7) // 8), np.uint8)
    dx, sums = finished(case, dy, w, "relu", kept, None, True, 2)
    assert not dx.any()
    assert sums is not None and not sums.any()


def test_finish_scratch_is_two_rows_of_sums_for_each_part_of_the_rows() -> None:
    for case in (CASES["k3"], CASES["depthwise_3"]):
        for threads in (1, 3):
            without, with_sums = (
                kernel_scratch("conv_grad_input", [*case.ints, 0, 0, s, 0], [0.0, 0.0], threads) for s in (0, 1)
            )
            parts, rest = divmod(with_sums - without, 2 * 4 * (-(-case.ic // 16) * 16))
            assert rest == 0
            assert parts == 1 if threads == 1 else 1 <= parts <= 24 * threads


def _large(ic: int, oc: int, kernel: int, stride: int, pad: int, group: int = 1) -> Case:
    return Case(4, 37, 31, ic, oc, (kernel, kernel), (stride, stride), (pad,) * 4, (1, 1), group)


@pytest.mark.parametrize(
    "case",
    [_large(40, 200, 1, 1, 0), _large(200, 40, 1, 1, 0), _large(24, 48, 5, 1, 2), _large(48, 64, 3, 1, 1),
     _large(48, 32, 3, 2, 1), _large(40, 40, 3, 1, 1, 40), _large(40, 40, 5, 2, 2, 40), _large(48, 72, 3, 1, 1, 3)],
)  # fmt: skip
def test_the_same_bits_whichever_thread_takes_what(case: Case) -> None:
    """More threads than processors: they take over from one another, never twice in the same way."""
    _, w, dy = case.tensors(7)
    kept = kept_slopes(2, case.n * case.ih * case.iw, case.ic)
    results = [finished(case, dy, w, "silu", kept, None, True, 5) for _ in range(12)]
    for dx, sums in results[1:]:
        np.testing.assert_array_equal(dx, results[0][0])
        np.testing.assert_array_equal(sums, results[0][1])
    assert_sums(results[0][1], results[0][0])


@pytest.mark.parametrize(
    ("tail", "floats", "kept", "sums", "message"),
    [
        ([0, 0, 0], [0.0, 0.0], None, None, "needs 20 or 21 integers"),
        ([0, 0, 0, 0], [0.0], None, None, "needs 2 floats"),
        ([1, 0, 0, 0], [0.0, 0.0], None, None, "an activation needs what it kept"),
        ([0, 1, 0, 0], [0.0, 0.0], 546, None, "no activation"),
        ([1, 2, 0, 0], [0.0, 0.0], 3640, None, "q4"),
        ([8, 1, 0, 0], [0.0, 0.0], 1092, None, "bits"),
        ([1, 3, 0, 0], [0.0, 0.0], 29120, None, "keep must be"),
        ([11, 1, 0, 0], [0.0, 0.0], 1092, None, "unknown activation"),
        ([1, -1, 0, 0], [0.0, 0.0], 1092, None, "unknown keep"),
        ([3, 1, 0, 0], [float("nan"), 0.0], 1092, None, "finite"),
        ([2, 1, 0, 0], [6.0, 0.0], 1092, None, "wrong way round"),
        ([1, 1, 0, 0], [0.0, 0.0], None, None, "kept is missing"),
        ([1, 1, 0, 0], [0.0, 0.0], 1091, None, "kept has 1091 bytes, needs 1092"),
        ([0, 0, 0, 0], [0.0, 0.0], 1092, None, "nothing is kept"),
        ([0, 0, 3, 0], [0.0, 0.0], None, 80, "sum must be"),
        ([0, 0, -1, 0], [0.0, 0.0], None, 80, "sum must be"),
        ([0, 0, 2, 0], [0.0, 0.0], None, None, "sums is missing"),
        ([0, 0, 1, 0], [0.0, 0.0], None, None, "sums is missing"),
        ([0, 0, 1, 0], [0.0, 0.0], None, 79, "sums has 79 bytes, needs 80"),
        ([0, 0, 0, 0], [0.0, 0.0], None, 80, "sums is present"),
        ([0, 0, 0, 2], [0.0, 0.0], None, None, "accumulate must be"),
    ],
)
def test_finish_attributes_and_operands_are_checked(
    tail: list[int], floats: list[float], kept: int | None, sums: int | None, message: str
) -> None:
    case = CASES["k3"]  # dX is 2 · 14 · 13 rows of 20 columns
    x, w, dy = case.tensors()
    given = [None if size is None else np.zeros(size, np.uint8) for size in (kept, sums)]
    room = np.empty(1 << 18, np.float32)
    with pytest.raises(UsageError, match=message):
        kernel_run("conv_grad_input", [*case.ints, *tail], floats, [dy, w, None, x, *given, room])


def test_finish_needs_room_for_its_sums() -> None:
    case = CASES["depthwise_3"]
    x, w, dy = case.tensors()
    ints, sums = [*case.ints, 0, 0, 1, 0], np.empty(case.ic, np.float32)
    room = np.empty(kernel_scratch("conv_grad_input", ints, [0.0, 0.0], 2) - 1, np.uint8)
    with pytest.raises(UsageError, match="scratch has"):
        kernel_run("conv_grad_input", ints, [0.0, 0.0], [dy, w, None, x, None, sums, room], 2)
