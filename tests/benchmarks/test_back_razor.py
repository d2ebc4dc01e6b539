"""PyTorch's plain Back Razor keeps what the definition keeps, and its gradients are those of the kept values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.systems.back_razor import BackRazor, dense_again, keep_largest
from tests.reference.razor import keep_count, razor


def reference(x: Tensor, sparsity: float) -> Tensor:
    """The plain form of x[n, …] as the definition in numpy gives it."""
    flat = x.detach().reshape(len(x), -1, 1).numpy()
    return torch.from_numpy(razor(flat, sparsity, "plain").reshape(x.shape))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 13, 11), (1, 64, 9, 7)])
def test_keeps_the_largest_of_each_sample(shape: tuple[int, ...], sparsity: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask, values = keep_largest(x, sparsity)
    elements = x[0].numel()
    assert mask.reshape(len(x), -1).sum(1).tolist() == [keep_count(elements, sparsity)] * len(x)
    assert torch.equal(dense_again(mask, values), reference(x, sparsity))
    assert values.dtype == torch.bfloat16


def test_zeros_are_never_kept() -> None:
    x = torch.relu(torch.randn(2, 400, generator=torch.Generator().manual_seed(2)) - 2)  # about one in 44 is not 0
    mask, values = keep_largest(x, 0.5)
    assert torch.equal(mask, x > 0) and 0 < len(values) < 40
    assert torch.equal(keep_largest(torch.zeros(2, 5), 0.0)[0], torch.zeros(2, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
        lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False),
        lambda: nn.Conv2d(6, 9, 1, groups=3),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6 * 7 * 5, 4)),
    ],
)
def test_weight_gradient_is_that_of_the_kept_input_and_the_rest_is_exact(make: object) -> None:
    assert callable(make)
    torch.manual_seed(3)
    layer: nn.Module = make()
    x = torch.randn(2, 6, 7, 5, requires_grad=True)

    def gradients(inputs: Tensor, mode: bool) -> tuple[Tensor, dict[str, Tensor]]:
        layer.zero_grad()
        if mode:
            with BackRazor(0.8):
                out = layer(inputs)
        else:
            out = layer(inputs)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        (dx,) = torch.autograd.grad((out * upstream).sum(), inputs, retain_graph=True)
        (out * upstream).sum().backward()
        return dx, {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}

    dx, found = gradients(x, True)
    exact_dx, exact = gradients(x, False)
    _, kept = gradients(reference(x, 0.8).requires_grad_(), False)
    np.testing.assert_allclose(dx, exact_dx, rtol=0, atol=1e-5)  # sums of at most 100 products near 1 in float32
    for name, gradient in found.items():
        wanted = kept if name.endswith("weight") else exact
        np.testing.assert_allclose(gradient, wanted[name], rtol=0, atol=2e-5)
    weight = next(name for name in found if name.endswith("weight"))
    assert (found[weight] - exact[weight]).abs().max() > 1e-2


def test_the_forward_pass_is_dense() -> None:
    torch.manual_seed(5)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 9, 9)
    dense = layer(x)
    with BackRazor(0.97):
        assert torch.equal(layer(x), dense)
