"""The emulated forms of `bench forms` against the definition of the razor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.forms import CASES, CompressedLinear, centered
from tests.reference.razor import razor


def sample() -> torch.Tensor:
    return torch.randn((3, 64, 24), generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("form", ["plain", "centered"])
@pytest.mark.parametrize("sparsity", [0.9, 0.97])
def test_a_form_is_the_razor_but_for_bf16(form: str, sparsity: float) -> None:
    x = sample()
    found, expected = CASES[f"{form} {sparsity:.2f}"](x).numpy(), razor(x.numpy(), sparsity, form)
    # The emulation does not round to bf16: a value may be the next int8 one, an element near the threshold another one.
    step = 1.5 * np.abs(expected).max() / 127
    differ, dropped = np.abs(found - expected) > step, np.abs(x.numpy() - expected) > step
    assert differ.sum() <= 2 * len(x) < 0.01 * dropped.sum()


@pytest.mark.parametrize("energy_of", [(1, 2), (1,)])
def test_scaled_residuals_have_the_product_of_the_whole_with_the_kept(energy_of: tuple[int, ...]) -> None:
    x = sample()
    mean = x.mean(1, keepdim=True)
    residual, kept = x - mean, centered(x, 0.8, energy_of) - mean
    product, energy = ((residual * v).sum(energy_of) for v in (kept, residual))
    torch.testing.assert_close(product, energy, rtol=0.02, atol=0)
    plain_kept = (residual * (centered(x, 0.8, ()) - mean)).sum(energy_of)
    assert (plain_kept < 0.95 * energy).all(), "without the factor the product is smaller"


def test_keeping_everything_gives_the_gradients_of_a_linear_layer() -> None:
    weight, bias = torch.randn(24, 7), torch.randn(7)
    gradients = []
    for linear in (lambda x, w, b: x @ w + b, lambda x, w, b: CompressedLinear.apply(x, w, b, torch.clone)):
        leaves = [v.clone().requires_grad_() for v in (sample(), weight, bias)]
        linear(*leaves).square().sum().backward()
        gradients.append([v.grad for v in leaves])
    torch.testing.assert_close(*gradients)
