"""Gradients of tables by rows: against the dense kernels and torch's dense optimizers in float64, in micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_razor.errors import NonFiniteError, UsageError
from edge_razor.planner.optimizer import row_set_bytes
from edge_razor.runtime import kernel_run
from tests.kernels.harness import InOut, Out, assert_close, normal, run

SHAPES = [(1, 2, 1), (5, 9, 7), (200, 700, 33), (40, 11, 5)]  # ids, vocabulary, columns
UPDATES = 3


def batch(seed: int, n: int, vocabulary: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, some often and some never, and dY."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, vocabulary, n) // 2 * 2 % vocabulary).astype(np.int32), normal(seed, n, cols)


def dense(ids: np.ndarray, dy: np.ndarray, vocabulary: int, padding: int = -1) -> np.ndarray:
    gradient = np.zeros((vocabulary, dy.shape[1]))
    np.add.at(gradient, ids[ids != padding], dy[ids != padding].astype(np.float64))
    return gradient


def row_set(ids: np.ndarray, dy: np.ndarray, vocabulary: int, padding: int = -1) -> np.ndarray:
    n, cols = dy.shape
    capacity = min(n, vocabulary)
    out = Out((row_set_bytes(vocabulary, cols, capacity),), np.uint8)
    (made,), _ = run("embedding_grad_rows", [n, vocabulary, cols, capacity, padding], [], [ids, dy, out])
    return made


def unpacked(rows: np.ndarray, vocabulary: int, cols: int) -> np.ndarray:
    """By the definition in docs/plan-format.md."""
    slots = rows[: 4 * vocabulary].view(np.int32)
    values = rows[-(-4 * vocabulary // 64) * 64 :].view(np.float32).reshape(-1, cols)
    result = np.zeros((vocabulary, cols), np.float32)
    result[slots >= 0] = values[slots[slots >= 0]]
    return result


@pytest.mark.parametrize(("n", "vocabulary", "cols"), SHAPES)
def test_the_gradient_by_rows_is_the_dense_one(n: int, vocabulary: int, cols: int) -> None:
    ids, dy = batch(0, n, vocabulary, cols)
    for padding in (-1, int(ids[0])):
        found = unpacked(row_set(ids, dy, vocabulary, padding), vocabulary, cols)
        assert_close(found, dense(ids, dy, vocabulary, padding), 2e-6)
        ints = [n, vocabulary, cols, 0, padding]
        (kernels,), _ = run("embedding_grad", ints, [], [ids, dy, Out((vocabulary, cols))], threads=(2,))
        np.testing.assert_array_equal(found, kernels)


def rounded(value: float) -> float:
    return float(np.float32(value))


def reference(optimizer: torch.optim.Optimizer, param: torch.Tensor, gradients: list[np.ndarray]) -> np.ndarray:
    for gradient in gradients:
        param.grad = torch.from_numpy(gradient)
        optimizer.step()
    return param.detach().numpy()


def train(
    kernel: str,
    shape: tuple[int, int, int],
    micro: int,
    tail: list[int],
    floats: list[float],
    states: int,
    with_accumulator: bool,
    rate: float,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Start, end, and each update's dense gradient in float64."""
    n, vocabulary, cols = shape
    start = normal(1, vocabulary, cols)
    w, moments = start, [np.zeros_like(start) for _ in range(states)]
    most = min(micro * n, vocabulary)
    accumulator = np.full(row_set_bytes(vocabulary, cols, most), 0xFF, np.uint8)
    gradients = []
    for update in range(UPDATES):
        total = np.zeros((vocabulary, cols))
        for m in range(micro):
            ids, dy = batch(10 * update + m, n, vocabulary, cols)
            total += dense(ids, dy, vocabulary)
            operands = [InOut(w), row_set(ids, dy, vocabulary), *map(InOut, moments)]
            if kernel == "sgd_rows" and not states:
                operands.append(None)
            before = w
            (w, *rest), _ = run(
                kernel,
                [vocabulary, cols, min(n, vocabulary), most if with_accumulator else 0, *tail],
                floats,
                [*operands, InOut(accumulator) if with_accumulator else None],
                threads=(1, 2),
                learning_rate=rate,
                update=update + 1,
                micro_index=m,
                micro_count=micro,
            )
            moments, accumulator = rest[:states], rest[states] if with_accumulator else accumulator
            if m < micro - 1:
                np.testing.assert_array_equal(w, before)
        gradients.append(total)
    return start, w, gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("momentum", "nesterov"), [(None, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs_dense_one(
    shape: tuple[int, int, int], micro: int, decay: float, momentum: float | None, nesterov: bool
) -> None:
    in_momentum = momentum is not None and not nesterov
    tail, floats, rate = [int(nesterov)], [momentum or 0.0, decay], 0.1
    start, w, gradients = train(
        "sgd_rows", shape, micro, tail, floats, int(momentum is not None), micro > 1 and not in_momentum, rate
    )
    param = torch.from_numpy(start).double().requires_grad_()
    optimizer = torch.optim.SGD(
        [param], rounded(rate), momentum=rounded(momentum or 0), weight_decay=rounded(decay), nesterov=nesterov
    )
    assert_close(w, reference(optimizer, param, gradients), 1e-6)
    untouched = ~np.any([g.any(1) for g in gradients], 0)
    if not decay:
        np.testing.assert_array_equal(w[untouched], start[untouched])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_adamw_is_torchs_dense_one(shape: tuple[int, int, int], micro: int, decay: float) -> None:
    """Moments of rows without a gradient decay, and move their rows, as torch's dense AdamW has it."""
    rate, floats = 1e-2, [0.9, 0.999, 1e-8, decay]
    start, w, gradients = train("adamw_rows", shape, micro, [], floats, 2, micro > 1, rate)
    param = torch.from_numpy(start).double().requires_grad_()
    optimizer = torch.optim.AdamW([param], rounded(rate), (rounded(0.9), rounded(0.999)), rounded(1e-8), rounded(decay))
    assert_close(w - start, reference(optimizer, param, gradients) - start, 2e-5)


@pytest.mark.parametrize("kernel", ["sgd_rows", "adamw_rows"])
@pytest.mark.parametrize("slot", [-2, 4, 2**31 - 1, -(2**31)])
def test_a_slot_outside_of_the_row_set_changes_nothing(kernel: str, slot: int) -> None:
    rows = np.zeros(row_set_bytes(7, 3, 4), np.uint8)
    rows[:28].view(np.int32)[:] = [-1, 0, 1, -1, slot, 2, 3]
    w, moments = normal(0, 7, 3), [np.zeros((7, 3), np.float32) for _ in range(2)]
    before = w.copy()
    ints, floats = [7, 3, 4, 0], [0.9, 0.999, 1e-8, 0.0]
    operands = [w, rows, *moments, None]
    if kernel == "sgd_rows":
        ints, floats, operands = [*ints, 0], floats[:2], [w, rows, None, None]
    with pytest.raises(NonFiniteError):
        kernel_run(kernel, ints, floats, operands, learning_rate=0.1)
    np.testing.assert_array_equal(w, before)


def test_an_accumulator_without_room_is_reported() -> None:
    ids, dy = np.arange(5, dtype=np.int32), normal(0, 5, 3)
    rows, accumulator = row_set(ids, dy, 9), np.zeros(row_set_bytes(9, 3, 4), np.uint8)
    with pytest.raises(NonFiniteError):
        kernel_run("sgd_rows", [9, 3, 5, 4, 0], [0.0, 0.0], [normal(1, 9, 3), rows, None, accumulator], micro_count=2)


@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1])
def test_an_index_outside_of_the_table_is_reported(bad: int) -> None:
    rows = np.zeros(row_set_bytes(9, 3, 2), np.uint8)
    with pytest.raises(NonFiniteError):
        kernel_run("embedding_grad_rows", [2, 9, 3, 2, -1], [], [np.array([0, bad], np.int32), normal(0, 2, 3), rows])


@pytest.mark.parametrize(
    ("ints", "missing", "message"),
    [
        ([2, 9, 3, 1, -1], 0, "capacity must be 2 to 9"),
        ([2, 9, 3, 10, -1], 0, "capacity must be 2 to 9"),
        ([2, 9, 3, 2, -1], 1, "R has"),
        ([2, 9, 3, 2, -2], 0, "padding_idx"),
        ([2, 9, 3, 2], 0, "expected 5 ints"),
    ],
)
def test_a_row_set_that_is_too_small_is_refused(ints: list[int], missing: int, message: str) -> None:
    rows = np.zeros(row_set_bytes(9, 3, 2) - missing, np.uint8)
    with pytest.raises(UsageError, match=message):
        kernel_run("embedding_grad_rows", ints, [], [np.zeros(2, np.int32), normal(0, 2, 3), rows])
