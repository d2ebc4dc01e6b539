"""A torch model whose backward pass keeps what docs/training-graph.md says is kept: the oracle at sparsity s.

The model is traced by torch.fx and interpreted: a convolution or linear layer (with the frozen BatchNorm behind it), a
standalone BatchNorm, LayerNorm, attention, a broadcast product and a smooth activation become autograd functions that
save what is kept of their input; everything else is plain autograd. Independent of the exporter and of the runtime.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.reference.razor import razor

Keep = Callable[[Tensor], Tensor]
"""[samples, rows, columns] → the tensor of the same shape that the kept form stands for."""

MIN_ROWS = 8  # values with fewer rows a sample stay dense, in bf16
Q4_RANGE = {
    "hardswish": (-0.5, 1.5),
    "sigmoid": (0.0, 0.25),
    "tanh": (0.0, 1.0),
    "silu": (-0.0999, 1.0999),
    "gelu": (-0.1291, 1.1291),
}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
}
SMOOTH_MODULES = {nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.SiLU: "silu", nn.GELU: "gelu"}
SMOOTH_FUNCTIONS = {
    F.hardswish: "hardswish",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.silu: "silu",
    F.gelu: "gelu",
}
SMOOTH_METHODS = {"sigmoid": "sigmoid", "tanh": "tanh"}


def _rows(x: Tensor) -> int:
    """Positions a sample: H·W of an NCHW tensor, 1 of a [N, C] one, the middle dimensions of [N, …, C] otherwise."""
    return x.shape[2] * x.shape[3] if x.ndim == 4 else x[0, ..., 0].numel()


def kept_form(x: Tensor, keep: Keep) -> Tensor:
    """The tensor that the kept form of x stands for; channels of a 4-D tensor are dimension 1, else the last."""
    if _rows(x) < MIN_ROWS:
        return x.to(torch.bfloat16).to(x.dtype)
    if x.ndim == 4:
        n, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
        return keep(rows).reshape(n, h, w, c).permute(0, 3, 1, 2)
    return keep(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


def disturbed(x: Tensor, noise: float) -> Tensor:
    """x with normal noise of ``noise`` times its root mean square: what rounding in the sums that made x amounts to."""
    return x + noise * x.square().mean().sqrt() * torch.randn_like(x) if noise else x.clone()


@dataclass
class _Padded:
    """Zero padding that the next convolution takes over: what is kept is the unpadded x."""

    x: Tensor
    amounts: Sequence[int]


@dataclass
class _Pending:
    """A convolution whose BatchNorm comes next."""

    module: nn.Conv2d
    x: Tensor | _Padded


class _ConvBatchNorm(torch.autograd.Function):
    """y = scale·conv(x, w) + shift with frozen statistics; gradients of w and gamma from the kept x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        w: Tensor,
        b: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        norm: nn.BatchNorm2d | None,
        geometry: tuple,
    ) -> Tensor:
        z = F.conv2d(x, w, b, *geometry)
        ctx.geometry, ctx.norm, ctx.shape = geometry, norm, x.shape
        ctx.save_for_backward(kept, w, b, gamma, beta)
        if norm is None:
            return z
        return F.batch_norm(z, norm.running_mean, norm.running_var, gamma, beta, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, w, b, gamma, beta = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        column = dy.sum((0, 2, 3))
        raw = torch.nn.grad.conv2d_weight(kept, w.shape, dy, stride, padding, dilation, groups)
        if ctx.norm is None:
            dx = torch.nn.grad.conv2d_input(ctx.shape, w, dy, stride, padding, dilation, groups)
            return dx, None, raw, None if b is None else column, None, None, None, None
        rstd = (ctx.norm.running_var + ctx.norm.eps).rsqrt()
        scale = rstd if gamma is None else gamma * rstd
        dx = torch.nn.grad.conv2d_input(ctx.shape, w, dy * scale.view(1, -1, 1, 1), stride, padding, dilation, groups)
        offset = -ctx.norm.running_mean if b is None else b - ctx.norm.running_mean
        dgamma = None if gamma is None else rstd * ((w * raw).sum((1, 2, 3)) + offset * column)
        db = None if b is None else scale * column
        return dx, None, raw * scale.view(-1, 1, 1, 1), db, dgamma, None if beta is None else column, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(kept, w)
        ctx.bias = b is not None
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, w = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        return dy @ w, None, flat.T @ kept.reshape(-1, kept.shape[-1]), flat.sum(0) if ctx.bias else None


class _BatchNorm(torch.autograd.Function):
    """A BatchNorm that follows no convolution; gamma's gradient from the kept input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, gamma: Tensor, beta: Tensor, norm: Any) -> Tensor:
        ctx.save_for_backward(kept, gamma)
        ctx.norm = norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, gamma, beta, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, gamma = ctx.saved_tensors
        rstd = (ctx.norm.running_var + ctx.norm.eps).rsqrt()
        axes = tuple(i for i in range(dy.ndim) if i != 1)
        column = dy.sum(axes)
        dgamma = rstd * ((dy * kept).sum(axes) - ctx.norm.running_mean * column)
        view = (1, -1, 1, 1) if dy.ndim == 4 else (1, -1)
        return dy * (gamma * rstd).view(view), None, dgamma, column, None


class _BroadcastMul(torch.autograd.Function):
    """x · factor, the factor broadcast over positions: its gradient from the kept x, x's gradient exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(kept, factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, factor = ctx.saved_tensors
        return dy * factor, None, (dy * kept).sum_to_size(factor.shape)


class _Quantized(torch.autograd.Function):
    """A smooth activation whose derivative is kept in 4 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, noise: float) -> Tensor:
        with torch.enable_grad():
            probe = disturbed(x.detach(), noise).requires_grad_()
            slope = torch.autograd.grad(SMOOTH[name](probe).sum(), probe)[0]
        lo, hi = Q4_RANGE[name]
        ctx.save_for_backward(lo + ((slope - lo) / (hi - lo) * 15).round().clamp(0, 15) * ((hi - lo) / 15))
        return SMOOTH[name](x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy * ctx.saved_tensors[0], None, None


def _whole(rows: Tensor) -> Tensor:
    """Centered, in int8, and nothing dropped: how a LayerNorm's normalized value is kept."""
    return torch.as_tensor(razor(rows.numpy(), 0.0, "centered")).to(rows.dtype)


class _LayerNorm(torch.autograd.Function):
    """LayerNorm over the last dimension, whose backward reads the kept normalized value and the exact 1/std."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(kept, gamma, (x.var(-1, correction=0, keepdim=True) + eps).rsqrt())
        return F.layer_norm(x, gamma.shape, gamma, beta, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        kept, gamma, rstd = ctx.saved_tensors
        g = dy * gamma
        dx = rstd * (g - g.mean(-1, keepdim=True) - kept * (g * kept).mean(-1, keepdim=True))
        rows = tuple(range(dy.ndim - 1))
        return dx, None, (dy * kept).sum(rows), dy.sum(rows), None


class _Attention(torch.autograd.Function):
    """Attention whose backward makes the probabilities again from Q, K and V as they are kept, in bf16."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, noise: float) -> Tensor:
        ctx.save_for_backward(*(disturbed(x, noise).to(torch.bfloat16).to(x.dtype) for x in (q, k, v)))
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        with torch.enable_grad():
            probes = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return (*torch.autograd.grad(F.scaled_dot_product_attention(*probes), probes, dy), None)


class KeptModel(fx.Interpreter):
    """Runs ``model`` (eval mode) with the kept forms of ``keep``; call it like the model, then ``backward()``."""

    def __init__(self, model: nn.Module, keep: Keep, noise: float = 0.0) -> None:
        """``noise``: see ``disturbed``; put on every value before it is kept, to test how sensitive gradients are."""
        super().__init__(fx.symbolic_trace(model.eval()))
        self._keep = keep
        self._noise = noise
        self._input: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self._input = x
        return self.run(x)

    def _kept(self, x: Tensor) -> Tensor:
        if x is self._input:
            return x.detach()
        return kept_form(disturbed(x.detach(), self._noise), self._keep)

    def _convolve(self, module: nn.Conv2d, x: Tensor | _Padded, norm: nn.BatchNorm2d | None) -> Tensor:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise NotImplementedError(f"reference: convolution with padding {module.padding!r}, {module.padding_mode}")
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
        if isinstance(x, _Padded):
            kept, x = F.pad(self._kept(x.x), x.amounts), F.pad(x.x, x.amounts)
        else:
            kept = self._kept(x)
        return _ConvBatchNorm.apply(x, kept, module.weight, module.bias, gamma, beta, norm, geometry)

    def _smooth(self, name: str, x: Tensor) -> Tensor:
        return SMOOTH[name](x) if _rows(x) < MIN_ROWS else _Quantized.apply(x, name, self._noise)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, _Padded):
            users = [self.submodules.get(user.target) if user.op == "call_module" else None for user in n.users]
            if not all(isinstance(user, nn.Conv2d) for user in users):
                return F.pad(value.x, value.amounts)
        if isinstance(value, _Pending):
            user = next(iter(n.users)) if len(n.users) == 1 else None
            follower = self.submodules.get(user.target) if user is not None and user.op == "call_module" else None
            if not isinstance(follower, nn.BatchNorm2d):
                return self._convolve(value.module, value.x, None)
        return value

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        module = self.submodules[target]
        x = args[0]
        if isinstance(module, nn.ZeroPad2d):
            return _Padded(x, module.padding)
        if isinstance(module, nn.Conv2d):
            return _Pending(module, x)
        if isinstance(module, nn.BatchNorm2d):
            if isinstance(x, _Pending):
                return self._convolve(x.module, x.x, module)
            return _BatchNorm.apply(x, self._kept(x), module.weight, module.bias, module)
        if isinstance(module, nn.LayerNorm):
            xhat = F.layer_norm(x.detach(), module.normalized_shape, None, None, module.eps)
            kept = kept_form(disturbed(xhat, self._noise), _whole)
            return _LayerNorm.apply(x, kept, module.weight, module.bias, module.eps)
        if isinstance(module, nn.Linear):
            return _Linear.apply(x, self._kept(x), module.weight, module.bias)
        if type(module) in SMOOTH_MODULES:
            return self._smooth(SMOOTH_MODULES[type(module)], x)
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in SMOOTH_FUNCTIONS:
            return self._smooth(SMOOTH_FUNCTIONS[target], args[0])
        if target is F.scaled_dot_product_attention and len(args) == 3 and not kwargs:
            return _Attention.apply(*args, self._noise)
        if target in (operator.mul, torch.mul) and all(isinstance(a, Tensor) for a in args):
            a, b = args
            if a.shape != b.shape:
                big, factor = (a, b) if a.numel() >= b.numel() else (b, a)
                return _BroadcastMul.apply(big, self._kept(big), factor)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in SMOOTH_METHODS:
            return self._smooth(SMOOTH_METHODS[target], args[0])
        return super().call_method(target, args, kwargs)
