"""SGD and AdamW against torch.optim in float64 over several updates, with the batch whole and in micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_razor.errors import EdgeRazorError
from edge_razor.runtime import kernel_run
from tests.kernels.harness import InOut, assert_close, normal, run

SIZES = [1, 17, 40_003]
UPDATES = 4


def rounded(value: float) -> float:
    return float(np.float32(value))


def gradients(n: int, micro: int) -> np.ndarray:
    """[updates, micro-batches, n]."""
    return normal(9, UPDATES, micro, n)


def train_torch(optimizer: torch.optim.Optimizer, param: torch.Tensor, grads: np.ndarray) -> np.ndarray:
    for grad in grads.astype(np.float64).sum(1):
        param.grad = torch.from_numpy(grad)
        optimizer.step()
    return param.detach().numpy()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("momentum", "nesterov"), [(None, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("with_accumulator", [False, True])
def test_sgd(n: int, micro: int, decay: float, momentum: float | None, nesterov: bool, with_accumulator: bool) -> None:
    if micro > 1 and not with_accumulator and (momentum is None or nesterov):
        with pytest.raises(EdgeRazorError):  # nowhere to add the gradients up
            kernel_run(
                "sgd",
                [n, int(nesterov)],
                [0.9, decay],
                [normal(0, n), normal(1, n), normal(2, n) if momentum else None, None],
                micro_count=micro,
            )
        return
    start, grads, rate = normal(1, n), gradients(n, micro), 0.1
    param = torch.from_numpy(start).double().requires_grad_()
    expected = train_torch(
        torch.optim.SGD(
            [param], rounded(rate), momentum=rounded(momentum or 0), weight_decay=rounded(decay), nesterov=nesterov
        ),
        param,
        grads,
    )
    w, v, accumulator = start, np.zeros(n, np.float32), np.full(n, np.nan, np.float32)
    for step in range(UPDATES):
        for m in range(micro):
            before = w
            outputs, _ = run(
                "sgd",
                [n, int(nesterov)],
                [momentum or 0, decay],
                [
                    InOut(w),
                    grads[step, m],
                    InOut(v) if momentum else None,
                    InOut(accumulator) if with_accumulator else None,
                ],
                threads=(1, 2),
                learning_rate=rate,
                update=step + 1,
                micro_index=m,
                micro_count=micro,
            )
            w, *rest = outputs
            if momentum:
                v = rest.pop(0)
            if with_accumulator:
                accumulator = rest.pop(0)
            if m < micro - 1:
                np.testing.assert_array_equal(w, before)  # the next forward pass must see the old parameter
    assert_close(w, expected, 1e-6)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_adamw(n: int, micro: int, decay: float) -> None:
    start, grads, rate = normal(1, n), gradients(n, micro), 1e-2
    param = torch.from_numpy(start).double().requires_grad_()
    betas, epsilon = (rounded(0.9), rounded(0.999)), rounded(1e-8)
    expected = train_torch(torch.optim.AdamW([param], rounded(rate), betas, epsilon, rounded(decay)), param, grads)
    w, m1, m2, accumulator = start, np.zeros(n, np.float32), np.zeros(n, np.float32), np.full(n, np.nan, np.float32)
    for step in range(UPDATES):
        for m in range(micro):
            before = w
            outputs, _ = run(
                "adamw",
                [n],
                [0.9, 0.999, 1e-8, decay],
                [InOut(w), grads[step, m], InOut(m1), InOut(m2), InOut(accumulator) if micro > 1 else None],
                threads=(1, 2),
                learning_rate=rate,
                update=step + 1,
                micro_index=m,
                micro_count=micro,
            )
            w, m1, m2 = outputs[:3]
            if micro > 1:
                accumulator = outputs[3]
            if m < micro - 1:
                np.testing.assert_array_equal(w, before)
    # The change is what must be right, not the parameter it is added to; it is a difference of rounded numbers.
    assert_close(w - start, expected - start, 2e-5)


def test_adamw_refuses_micro_batches_without_an_accumulator() -> None:
    w = normal(0, 5)
    before = w.copy()
    with pytest.raises(EdgeRazorError):
        kernel_run(
            "adamw",
            [5],
            [0.9, 0.999, 1e-8, 0],
            [w, normal(1, 5), np.zeros(5, np.float32), np.zeros(5, np.float32), None],
            micro_count=2,
            learning_rate=0.1,
        )
    np.testing.assert_array_equal(w, before)
