"""Plain Back Razor as one would write it in PyTorch: what our kernels are measured against.

Jiang et al., "Back Razor" (NeurIPS 2022): the forward pass is dense; of the input that a convolution or matrix product
keeps for its weight gradient, only the largest magnitudes of each sample stay (never zeros). PyTorch has no arithmetic
on such a form, so the backward pass makes the input dense again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.overrides import TorchFunctionMode


def keep_largest(x: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """(mask, values) of x[n, …]: the mask in x's shape, the kept values as bf16 in its order.

    Each sample of m elements keeps its m − ⌊sparsity·m⌋ largest magnitudes (more if some equal the smallest of these).
    """
    magnitude = x.detach().reshape(len(x), -1).abs()
    elements = magnitude.shape[1]
    dropped = int(sparsity * elements + 1e-9)
    if dropped:
        threshold = magnitude.kthvalue(dropped + 1, dim=1, keepdim=True).values
        mask = (magnitude >= threshold) & (magnitude > 0)
    else:
        mask = magnitude > 0
    mask = mask.reshape(x.shape)
    return mask, x.detach()[mask].bfloat16()


def dense_again(mask: Tensor, values: Tensor) -> Tensor:
    """The float32 tensor that ``keep_largest`` kept."""
    x = torch.zeros(mask.shape, dtype=torch.float32)
    x[mask] = values.float()
    return x


class RazorConv2d(torch.autograd.Function):
    """conv2d whose weight gradient comes from the kept part of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        sparsity: float,
    ) -> Tensor:
        ctx.save_for_backward(weight, *keep_largest(x, sparsity))
        ctx.bias_sizes = None if bias is None else [len(bias)]
        ctx.settings = (stride, padding, dilation, False, [0, 0], groups)
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, values = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.convolution_backward(
            dy, dense_again(mask, values), weight, ctx.bias_sizes, *ctx.settings, needs
        )
        return (*gradients, None, None, None, None, None)


class RazorLinear(torch.autograd.Function):
    """linear whose weight gradient comes from the kept part of its input."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, sparsity: float) -> Tensor:
        ctx.save_for_backward(weight, *keep_largest(x, sparsity))
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask, values = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, rows.T @ dense_again(mask, values).flatten(0, -2), rows.sum(0), None


class BackRazor(TorchFunctionMode):
    """Within it, conv2d and linear with a trained weight keep their input as Back Razor does."""

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.sparsity = sparsity

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.conv2d and not kwargs:
            x, weight, bias, stride, padding, dilation, groups = args
            return RazorConv2d.apply(
                x, weight, bias, list(stride), list(padding), list(dilation), groups, self.sparsity
            )
        if function is torch.nn.functional.linear and not kwargs:
            x, weight, bias = args
            return RazorLinear.apply(x, weight, bias, self.sparsity)
        return function(*args, **(kwargs or {}))
