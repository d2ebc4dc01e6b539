"""Losses and their gradients against torch in float64, whole and in micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_razor.errors import NonFiniteError
from edge_razor.runtime import kernel_run
from tests.kernels.harness import Out, assert_close, normal, run


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 1, 2), (8, 1, 10), (5, 7, 17), (2, 3, 1000), (1, 130, 33), (3, 1, 30_011)]
)
def test_cross_entropy(shape: tuple[int, int, int], smoothing: float) -> None:
    samples, positions, classes = shape
    logits = 5 * normal(1, *shape)
    target = np.random.default_rng(2).integers(0, classes, (samples, positions)).astype(np.int32)
    z = torch.from_numpy(logits).double().requires_grad_()
    smooth32 = float(np.float32(smoothing))
    expected = F.cross_entropy(z.flatten(0, 1), torch.from_numpy(target).long().flatten(), label_smoothing=smooth32)
    expected.backward()
    context = {"valid_batch": samples, "valid_micro": samples}
    (d,), loss = run("cross_entropy", [*shape, -100], [smoothing], [logits, target, Out(shape)], **context)
    assert loss == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert np.abs(d - z.grad.numpy()).max() <= 1e-6 / (samples * positions)
    _, alone = run("cross_entropy", [*shape, -100], [smoothing], [logits, target, None], **context)
    assert alone == loss
    same = logits.copy()
    kernel_run("cross_entropy", [*shape, -100], [smoothing], [same, target, same], threads=2, **context)
    np.testing.assert_array_equal(same, d)


def test_cross_entropy_is_stable_for_huge_logits() -> None:
    logits = np.array([[[1e4, 0, -1e4]], [[-1e30, 1e30, 0]]], np.float32)
    (d,), loss = run(
        "cross_entropy",
        [2, 1, 3, -100],
        [0],
        [logits, np.array([0, 1], np.int32), Out((2, 1, 3))],
        valid_batch=2,
        valid_micro=2,
    )
    assert loss == 0 and (np.abs(d) < 1e-30).all()


@pytest.mark.parametrize("bad", [-1, 3, -99, 2**31 - 1])
def test_cross_entropy_of_a_target_that_is_no_class_is_not_finite(bad: int) -> None:
    logits = normal(0, 2, 1, 3)
    with pytest.raises(NonFiniteError):
        kernel_run(
            "cross_entropy",
            [2, 1, 3, -100],
            [0],
            [logits, np.array([0, bad], np.int32), None],
            valid_batch=2,
            valid_micro=2,
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_predictions_are_reported(value: float) -> None:
    x = normal(0, 4, 6)
    x[2, 3] = value
    context = {"valid_batch": 4, "valid_micro": 4}
    for call in (
        ("cross_entropy", [4, 1, 6, -100], [0.0], [x, np.zeros(4, np.int32), None]),
        ("mse", [4, 6], [], [x, normal(1, 4, 6), None]),
        ("bce_logits", [4, 6], [], [x, np.full((4, 6), 0.5, np.float32), None]),
    ):
        with pytest.raises(NonFiniteError):
            kernel_run(*call, **context)


TORCH = {"mse": F.mse_loss, "bce_logits": F.binary_cross_entropy_with_logits}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 65), (2, 30_011)])
def test_elementwise_losses(name: str, shape: tuple[int, int]) -> None:
    prediction, target = 3 * normal(1, *shape), np.random.default_rng(2).random(shape, np.float32)
    z = torch.from_numpy(prediction).double().requires_grad_()
    expected = TORCH[name](z, torch.from_numpy(target).double())
    expected.backward()
    context = {"valid_batch": shape[0], "valid_micro": shape[0]}
    (d,), loss = run(name, shape, [], [prediction, target, Out(shape)], **context)
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert_close(d, z.grad, 2e-7)
    kernel_run(name, shape, [], [prediction, target, prediction], threads=2, **context)
    np.testing.assert_array_equal(prediction, d)


def test_bce_is_stable_for_huge_logits() -> None:
    x, t = np.array([[1e30, -1e30, 200.0, -200.0]], np.float32), np.array([[1, 0, 0, 1]], np.float32)
    (d,), loss = run("bce_logits", [1, 4], [], [x, t, Out((1, 4))])
    assert loss == pytest.approx(100.0) and d.tolist() == [[0, 0, 0.25, -0.25]]


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "bce_logits"])
def test_micro_batches_and_a_short_last_one_add_up_to_the_whole_batch(name: str) -> None:
    """7 valid samples in micro-batches of 4: the eighth row is padding and must not matter."""
    positions, classes = 3, 5
    x = normal(1, 8, positions, classes)
    if name == "cross_entropy":
        target = np.random.default_rng(2).integers(0, classes, (8, positions)).astype(np.int32)
        target[7] = -1
        floats, per_sample = [0.1], [positions, classes, -100]
    else:
        target, floats, per_sample = np.random.default_rng(2).random(x.shape, np.float32), [], [positions * classes]
    x[7] = np.nan
    (whole,), loss = run(
        name, [7, *per_sample], floats, [x[:7], target[:7], Out(x[:7].shape)], valid_batch=7, valid_micro=7
    )
    total, gradients = 0.0, []
    for first, valid in ((0, 4), (4, 3)):
        part = slice(first, first + 4)
        (d,), share = run(
            name,
            [4, *per_sample],
            floats,
            [x[part], target[part], Out((4, positions, classes))],
            valid_batch=7,
            valid_micro=valid,
        )
        total += share
        gradients.append(d)
    together = np.concatenate(gradients)
    np.testing.assert_array_equal(together[:7], whole)
    assert (together[7] == 0).all()
    assert total == pytest.approx(loss, rel=1e-12)


def test_losses_add_to_what_is_there() -> None:
    x, t = normal(0, 2, 3), normal(1, 2, 3)
    context = {"valid_batch": 2, "valid_micro": 2}
    alone = kernel_run("mse", [2, 3], [], [x, t, None], **context).loss
    assert kernel_run("mse", [2, 3], [], [x, t, None], loss=1.5, **context).loss == pytest.approx(1.5 + alone)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_targets_do_not_count(smoothing: float) -> None:
    """The mean is over the targets that count, in the whole batch: over micro-batches, too."""
    samples, positions, classes, ignored = 6, 5, 11, -100
    logits = 3 * normal(1, samples, positions, classes)
    target = np.random.default_rng(2).integers(0, classes, (samples, positions)).astype(np.int32)
    target[0] = ignored
    target[1, 3:] = ignored
    z = torch.from_numpy(logits).double().requires_grad_()
    expected = F.cross_entropy(
        z.flatten(0, 1), torch.from_numpy(target).long().flatten(), label_smoothing=float(np.float32(smoothing))
    )
    expected.backward()
    counted = int((target != ignored).sum())
    total, gradients = 0.0, []
    for first in range(0, samples, 2):
        part = slice(first, first + 2)
        operands = [logits[part], target[part], Out((2, positions, classes))]
        (d,), share = run(
            "cross_entropy",
            [2, positions, classes, ignored],
            [smoothing],
            operands,
            valid_batch=samples,
            valid_micro=2,
            counted_batch=counted,
        )
        total += share
        gradients.append(d)
    assert total == pytest.approx(expected.item(), rel=1e-6)
    assert np.abs(np.concatenate(gradients) - z.grad.numpy()).max() <= 1e-6 / counted
    assert not np.concatenate(gradients)[target == ignored].any()
