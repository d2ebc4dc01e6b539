"""`conv` with an addend, Y = act(scale · conv(X, W) + shift + addend), against PyTorch in float64: every path, the
addend in a tensor of its own and in Y itself, which must give the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edge_razor.errors import UsageError
from edge_razor.runtime import kernel_run
from tests.kernels.harness import normal
from tests.kernels.instruction_sets import check_under
from tests.kernels.test_conv import (
    ACTIVATIONS,
    ACTIVE,
    CASES,
    FUSED_CASES,
    RANGES,
    Case,
    assert_close,
    conv,
    reference,
    scratch,
)
from tests.kernels.test_weight_forms import ALL, FORMS, weight

KEPT_ROW = {0: lambda oc: 0, 1: lambda oc: (oc + 7) // 8, 2: lambda oc: (oc + 1) // 2, 3: lambda oc: 4 * oc}


def conv_add(
    case: Case,
    x: np.ndarray,
    w: np.ndarray,
    addend: np.ndarray,
    scale: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    *,
    act: tuple[int, int] = (0, 0),
    bounds: tuple[float, float] = (0.0, 0.0),
    form: int = 0,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Y and what the activation keeps, `act` = (code, keep); made twice, the addend apart from Y and in it."""
    ints = [*case.ints, *act, form]
    results: list[tuple[np.ndarray, np.ndarray]] = []
    for y in (np.full_like(addend, np.nan), addend.copy()):
        kept = np.full((y.size // case.oc, KEPT_ROW[act[1]](case.oc)), 0xA5, np.uint8)
        other = addend.copy() if np.isnan(y).any() else y
        room = scratch("conv", ints, list(bounds), threads)
        operands = [x, w, scale, shift, y, kept if act[1] else None, other, room]
        kernel_run("conv", ints, bounds, operands, threads)
        assert other is y or np.array_equal(other, addend)
        results.append((y, kept))
    (y, kept), (in_place, kept_in_place) = results
    np.testing.assert_array_equal(y, in_place)
    np.testing.assert_array_equal(kept, kept_in_place)
    return y, kept


@pytest.mark.parametrize("name", CASES)
def test_what_is_added_is_not_scaled(name: str) -> None:
    case = CASES[name]
    x, w, dy = case.tensors(6)
    scale, shift = normal(1, case.oc), normal(2, case.oc)
    y, _ = reference(case, x, w, dy)
    addend = normal(3, *y.shape) * np.float32(np.abs(y).max())  # as large as the sum: neither hides the other
    for threads in (1, 3):
        assert_close(conv_add(case, x, w, addend, scale, shift, threads=threads)[0], y * scale + shift + addend)
        assert_close(conv_add(case, x, w, addend, threads=threads)[0], y + addend)
    assert_close(conv_add(case, x, w, addend, None, shift, threads=2)[0], y + shift + addend)
    assert_close(conv_add(case, x, w, addend, scale, threads=2)[0], y * scale + addend)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ALL)
def test_every_form_of_weight(name: str, form: int) -> None:
    case = ALL[name]
    x, _, dy = case.tensors()
    data, hwio = weight(case, form)
    scale, shift = normal(1, case.oc), normal(2, case.oc)
    expected = reference(case, x, hwio, dy)[0] * scale + shift
    addend = normal(3, *expected.shape) * np.float32(np.abs(expected).max())
    for threads in (1, 3):
        y, _ = conv_add(case, x, data, addend, scale, shift, form=form, threads=threads)
        assert_close(y, expected + addend)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("index", range(len(FUSED_CASES)))
def test_the_activation_and_what_it_keeps_are_of_the_sum(act: int, index: int) -> None:
    case = FUSED_CASES[index]
    function, *bounds = ACTIVATIONS[act]
    x, w, dy = case.tensors(4)
    scale = np.full(case.oc, 0.5 / np.sqrt(w[..., 0].size), np.float32)
    shift = np.linspace(-1, 1, case.oc).astype(np.float32)
    addend = normal(5, *dy.shape)
    exact = torch.from_numpy(reference(case, x, w, dy)[0] * scale + shift + addend).requires_grad_()
    expected = function(exact)
    expected.sum().backward()
    assert exact.grad is not None
    for threads in (1, 2, 3):
        plain, _ = conv_add(case, x, w, addend, scale, shift, threads=threads)  # the kernel's own pre-activation
        for keep in (0, 1 if act in ACTIVE else 2, 3):
            y, kept = conv_add(
                case, x, w, addend, scale, shift, act=(act, keep), bounds=(bounds[0], bounds[1]), threads=threads
            )
            assert_close(y, expected.detach().numpy(), 3e-6)
            if keep == 3:
                assert np.array_equal(kept.view(np.float32).reshape(y.shape), plain)
            elif keep == 1:
                bits = np.unpackbits(kept, axis=1, bitorder="little")
                assert np.array_equal(bits[:, : case.oc].reshape(y.shape).astype(bool), ACTIVE[act](plain))
                assert not bits[:, case.oc :].any()
            elif keep == 2:
                low, high = RANGES[act]
                nibbles = np.stack([kept & 15, kept >> 4], -1).reshape(len(kept), -1)
                q = ((exact.grad.numpy() - low) / (high - low) * 15).clip(0, 15)
                assert np.abs(nibbles[:, : case.oc].reshape(y.shape) - q).max() <= 0.5 + 1e-4
                assert not nibbles[:, case.oc :].any()


@pytest.mark.parametrize("name", ["pointwise_deep", "k3_deep", "groups_odd", "depthwise_5", "winograd_odd"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_repeated_runs_give_identical_bits(name: str, threads: int) -> None:
    case = CASES[name]
    x, w, dy = case.tensors(3)
    addend, scale = normal(1, *dy.shape), normal(2, case.oc)
    first, _ = conv_add(case, x, w, addend, scale, threads=threads)
    for _ in range(3):
        assert np.array_equal(first, conv_add(case, x, w, addend, scale, threads=threads)[0])


@pytest.mark.parametrize("size", [(1, 1), (63, 1), (65, 7), (127, 64)])
def test_the_addend_may_be_what_is_multiplied(size: tuple[int, int]) -> None:
    rows, cols = size
    case = Case(1, rows, 1, cols, cols)
    x, w, dy = case.tensors()
    y = np.full_like(x, np.nan)
    room = scratch("conv", [*case.ints, 0, 0], [0.0, 0.0], 2)
    kernel_run("conv", [*case.ints, 0, 0], [0.0, 0.0], [x, w, None, None, y, None, x, room], 2)
    assert_close(y, reference(case, x, w, dy)[0] + x)


@pytest.mark.parametrize("name", ["pointwise_tiles", "k3_deep", "groups", "depthwise_3", "winograd"])
def test_without_an_addend_its_place_may_be_left_out(name: str) -> None:
    case = CASES[name]
    x, w, dy = case.tensors()
    expected, _ = conv(case, x, w, threads=2)
    y, room = np.full_like(dy, np.nan), scratch("conv", [*case.ints, 0, 0], [0.0, 0.0], 2)
    kernel_run("conv", [*case.ints, 0, 0], [0.0, 0.0], [x, w, None, None, y, None, None, room], 2)
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("name", ["pointwise_tiles", "depthwise_3", "winograd"])
def test_nan_in_the_addend_stays_where_it_is(name: str) -> None:
    case = CASES[name]
    x, w, dy = case.tensors()
    addend = normal(1, *dy.shape)
    addend[0, 3, 2, 1] = np.nan
    for act in (0, 1):
        y = addend.copy()
        room = scratch("conv", [*case.ints, act, 0], [0.0, 0.0], 1)
        kernel_run("conv", [*case.ints, act, 0], [0.0, 0.0], [x, w, None, None, y, None, y, room])
        assert np.array_equal(np.isnan(y), np.isnan(addend))


def test_addends_of_another_size_and_other_numbers_of_operands_are_refused() -> None:
    case = CASES["k3"]
    x, w, dy = case.tensors()
    y, room = np.empty_like(dy), scratch("conv", [*case.ints, 0, 0], [0.0, 0.0], 1)

    def run(*behind: Any) -> None:
        kernel_run("conv", [*case.ints, 0, 0], [0.0, 0.0], [x, w, None, None, y, None, *behind])

    run(dy, room)
    for wrong in (dy.ravel()[1:].copy(), np.append(dy, dy[:1])):
        with pytest.raises(UsageError, match=f"the addend has {wrong.nbytes} bytes, needs {y.nbytes}"):
            run(wrong, room)
    for behind in ((), (dy, None, room)):
        with pytest.raises(UsageError, match="needs 7 or 8 operands"):
            run(*behind)
    with pytest.raises(UsageError, match="scratch has 0 bytes"):
        run(dy, None)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_passes(isa: str) -> None:
    check_under(isa, ["conv_addend"], "not every_instruction_set")
