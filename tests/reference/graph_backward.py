"""Runs a training graph with torch, node by node: what docs/training-graph.md says, in the plainest form.

Parameters are given in torch's layout, inputs and target as the graph wants them (channels-last). All is computed in
``dtype`` (float64 by default), so that a wrong rule and rounding cannot be confused. With ``sparsity`` 0 kept values
are exact; otherwise they are what the planner's rules make of them: the razor form, bf16 for fewer than 8 rows a
sample, 4-bit derivatives of smooth activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_razor.exporters.graph_edit import integer, ints, number, text
from tests.reference.attention import as_kept, pruned_gradients
from tests.reference.razor import keep_count, razor, to_bf16

MIN_ROWS = 8  # with fewer rows a sample a value is kept in bf16, a smooth activation's input dense
PIECEWISE = frozenset({"none", "relu", "clip", "leaky_relu", "hardsigmoid"})
Q4_RANGE = {
    "hardswish": (-0.5, 1.5),
    "sigmoid": (0.0, 0.25),
    "tanh": (0.0, 1.0),
    "silu": (-0.0999, 1.0999),
    "gelu": (-0.1291, 1.1291),
    "gelu_tanh": (-0.1291, 1.1291),
}
# Bounds written with hardtanh: its slope at the bounds is 0, as torch's ReLU6 and Hardsigmoid have it; clamp's is 1.
ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "none": lambda x, a, b: x,
    "relu": lambda x, a, b: F.relu(x),
    "clip": lambda x, a, b: F.hardtanh(x, a, b),
    "leaky_relu": lambda x, a, b: F.leaky_relu(x, a),
    "hardsigmoid": lambda x, a, b: F.hardtanh(a * x + b, 0.0, 1.0),
    "hardswish": lambda x, a, b: F.hardswish(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "silu": lambda x, a, b: F.silu(x),
    "gelu": lambda x, a, b: F.gelu(x),
    "gelu_tanh": lambda x, a, b: F.gelu(x, approximate="tanh"),
}

Value = Any  # Tensor, a list of integers (inline constants), or None (absent operand)


def default_mask(ratio: float, stream: int, shape: Sequence[int]) -> Tensor:
    """A dropout mask (1 = kept) that depends on nothing but ``stream`` and the shape."""
    generator = torch.Generator().manual_seed(1000 + stream)
    return (torch.rand(tuple(shape), generator=generator) >= ratio).to(torch.float64)


@dataclass
class Run:
    """One evaluation of a graph."""

    samples: int
    sparsity: float = 0.0
    form: Literal["plain", "centered"] = "centered"
    activation_keep: Literal["dense", "q4"] = "dense"
    mask: Callable[[float, int, Sequence[int]], Tensor] = default_mask
    attention: Literal["recompute", "probabilities"] = "recompute"
    values: dict[str, Value] = field(default_factory=dict)

    def rows(self, x: Tensor) -> int:
        """Rows a sample: everything between samples and columns."""
        return x.numel() // (self.samples * x.shape[-1])

    def prunes(self, keys: int) -> bool:
        """Whether attention over so many keys keeps its largest probabilities."""
        return self.attention == "probabilities" and self.sparsity > 0 and keys >= MIN_ROWS

    def pack(self, x: Tensor, *, whole: bool = False) -> Tensor:
        """The tensor that the kept form of x stands for; ``whole``: centered, and nothing dropped."""
        x = x.detach()
        if self.sparsity == 0:
            return x
        rows = x.reshape(self.samples, -1, x.shape[-1]).to(torch.float32).numpy()
        sparsity, form = (0.0, "centered") if whole else (self.sparsity, self.form)
        kept = to_bf16(rows) if rows.shape[1] < MIN_ROWS else razor(rows, sparsity, form)
        return torch.from_numpy(np.array(kept)).to(x.dtype).reshape(x.shape)

    def slope(self, z: Tensor, node: ir.Node) -> Tensor:
        """The activation's derivative at z, as precise as it is kept."""
        activation = text(node, "activation", "none")
        with torch.enable_grad():
            probe = z.detach().requires_grad_()
            y = _activate(node, probe)
            slope = torch.autograd.grad(y.sum(), probe)[0]
        if self.activation_keep == "dense" or activation in PIECEWISE or self.rows(z) < MIN_ROWS:
            return slope
        lo, hi = Q4_RANGE[activation]
        return lo + ((slope - lo) / (hi - lo) * 15).round().clamp(0, 15) * ((hi - lo) / 15)


Operator = Callable[..., Sequence[Value]]


def _activate(node: ir.Node, z: Tensor) -> Tensor:
    act = ACTIVATIONS[text(node, "activation", "none")]
    return act(z, number(node, "alpha", 0.0), number(node, "beta", 0.0))


def _activated(run: Run, node: ir.Node, z: Tensor, scale: Value, shift: Value) -> Sequence[Value]:
    z = z if scale is None else z * scale
    z = z if shift is None else z + shift
    return _activate(node, z), run.slope(z, node) if len(node.outputs) > 1 else None


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _convolve(node: ir.Node, x: Tensor, w: Tensor) -> Tensor:
    top, left, bottom, right = ints(node, "pads", [0, 0, 0, 0])
    x = F.pad(_nchw(x), (left, right, top, bottom))
    strides, dilations = ints(node, "strides", [1, 1]), ints(node, "dilations", [1, 1])
    return _nhwc(F.conv2d(x, w, None, strides, 0, dilations, integer(node, "group", 1)))


def conv(run: Run, node: ir.Node, x: Tensor, w: Tensor, scale: Value = None, shift: Value = None) -> Sequence[Value]:
    return _activated(run, node, _convolve(node, x, w), scale, shift)


def _pull_back(forward: Callable[[Tensor], Tensor], at: Tensor, dy: Tensor) -> Tensor:
    """Transposed Jacobian of ``forward`` times dy, by autograd."""
    with torch.enable_grad():
        probe = at.detach().clone().requires_grad_()
        return torch.autograd.grad(forward(probe), probe, dy)[0]


def conv_grad_input(run: Run, node: ir.Node, dy: Tensor, w: Tensor, scale: Value = None) -> Sequence[Value]:
    x = dy.new_zeros(dy.shape[0], *ints(node, "input_shape"))
    return [_pull_back(lambda x: _convolve(node, x, w), x, dy if scale is None else dy * scale)]


def conv_grad_weight(run: Run, node: ir.Node, x: Tensor, dy: Tensor) -> Sequence[Value]:
    assert list(x.shape[1:]) == ints(node, "input_shape")
    return [_pull_back(lambda w: _convolve(node, x, w), dy.new_zeros(ints(node, "weight_shape")), dy)]


def _by_output(node: ir.Node, w: Tensor) -> Tensor:
    """A Linear weight as [O, C]."""
    return w if integer(node, "transW", 1) else w.T


def linear(run: Run, node: ir.Node, x: Tensor, w: Tensor, scale: Value = None, shift: Value = None) -> Sequence[Value]:
    return _activated(run, node, x @ _by_output(node, w).T, scale, shift)


def linear_grad_input(run: Run, node: ir.Node, dy: Tensor, w: Tensor, scale: Value = None) -> Sequence[Value]:
    return [(dy if scale is None else dy * scale) @ _by_output(node, w)]


def linear_grad_weight(run: Run, node: ir.Node, x: Tensor, dy: Tensor) -> Sequence[Value]:
    g = _by_output(node, dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]))
    assert list(g.shape) == ints(node, "weight_shape")
    return [g]


def affine(run: Run, node: ir.Node, x: Tensor, scale: Value = None, shift: Value = None) -> Sequence[Value]:
    return _activated(run, node, x, scale, shift)


def _statistics(node: ir.Node, mean: Tensor, var: Tensor, bias: Value) -> tuple[Tensor, Tensor]:
    """1/√(var+ε), bias − mean."""
    return (var + number(node, "epsilon", 1e-5)).rsqrt(), -mean if bias is None else bias - mean


def batch_norm_fold(
    run: Run, node: ir.Node, gamma: Value, beta: Value, mean: Tensor, var: Tensor, bias: Value = None
) -> Sequence[Value]:
    rstd, offset = _statistics(node, mean, var, bias)
    scale = rstd if gamma is None else gamma * rstd
    return scale, offset * scale if beta is None else beta + offset * scale


def batch_norm_grad(
    run: Run, node: ir.Node, dot: Tensor, dshift: Tensor, mean: Tensor, var: Tensor, bias: Value = None
) -> Sequence[Value]:
    rstd, offset = _statistics(node, mean, var, bias)
    return [(dot + offset * dshift) * rstd]


def _output_dim(node: ir.Node) -> int:
    assert text(node, "layout", "") in ("conv", "linear")
    return 0 if text(node, "layout", "") == "conv" or integer(node, "transW", 1) else 1


def column_dot(run: Run, node: ir.Node, w: Tensor, g: Tensor) -> Sequence[Value]:
    return [(w * g).transpose(0, _output_dim(node)).flatten(1).sum(1)]


def scale_columns(run: Run, node: ir.Node, g: Tensor, scale: Tensor) -> Sequence[Value]:
    dim = _output_dim(node)
    return [g * scale.reshape([-1 if d == dim else 1 for d in range(g.ndim)])]


def channel_sum(run: Run, node: ir.Node, dy: Tensor) -> Sequence[Value]:
    return [dy.reshape(-1, dy.shape[-1]).sum(0)]


def mul_grad(run: Run, node: ir.Node, x: Tensor, dy: Tensor) -> Sequence[Value]:
    product = x * dy
    if text(node, "reduce", "") == "samples":
        return [product.sum(tuple(range(1, dy.ndim - 1)), keepdim=True) if dy.ndim > 2 else product]
    assert text(node, "reduce", "") == "all"
    return [product.reshape(-1, dy.shape[-1]).sum(0)]


def _padded_for_pool(node: ir.Node, x: Tensor, value: float) -> Tensor:
    top, left, bottom, right = ints(node, "pads", [0, 0, 0, 0])
    return F.pad(_nchw(x), (left, right, top, bottom), value=value)


def max_pool(run: Run, node: ir.Node, x: Tensor) -> Sequence[Value]:
    kernel, strides = ints(node, "kernel_shape"), ints(node, "strides", [1, 1])
    padded = _padded_for_pool(node, x, -math.inf)
    y, index = F.max_pool2d(padded, kernel, strides, 0, ints(node, "dilations", [1, 1]), return_indices=True)
    return _nhwc(y), index


def max_pool_grad(run: Run, node: ir.Node, dy: Tensor, index: Tensor) -> Sequence[Value]:
    height, width, _ = ints(node, "input_shape")
    top, left, _, _ = ints(node, "pads", [0, 0, 0, 0])
    padded = _padded_for_pool(node, dy.new_zeros(dy.shape[0], *ints(node, "input_shape")), 0.0)
    flat = padded.flatten(2).scatter_add(2, index.flatten(2), _nchw(dy).flatten(2))
    return [_nhwc(flat.reshape(padded.shape)[:, :, top : top + height, left : left + width])]


def _average(node: ir.Node, x: Tensor) -> Tensor:
    kernel, strides = ints(node, "kernel_shape"), ints(node, "strides", [1, 1])

    def window_sums(image: Tensor) -> Tensor:
        if integer(node, "ceil_mode", 0):
            # Elements beyond the padding belong to no average.
            over = [-(size - k) % s for size, k, s in zip(image.shape[2:], kernel, strides, strict=True)]
            image = F.pad(image, (0, over[1], 0, over[0]))
        return F.avg_pool2d(image, kernel, strides, divisor_override=1)

    count = _padded_for_pool(node, torch.ones_like(x), float(integer(node, "count_include_pad", 0)))
    return _nhwc(window_sums(_padded_for_pool(node, x, 0.0)) / window_sums(count))


def average_pool(run: Run, node: ir.Node, x: Tensor) -> Sequence[Value]:
    return [_average(node, x)]


def average_pool_grad(run: Run, node: ir.Node, dy: Tensor) -> Sequence[Value]:
    x = dy.new_zeros(dy.shape[0], *ints(node, "input_shape"))
    return [_pull_back(lambda x: _average(node, x), x, dy)]


def dropout(run: Run, node: ir.Node, x: Tensor) -> Sequence[Value]:
    ratio = number(node, "ratio", 0.5)
    return [x * run.mask(ratio, integer(node, "stream", 0), x.shape) / (1 - ratio)]


def _normalize(x: Tensor, node: ir.Node) -> tuple[Tensor, Tensor]:
    """xhat and 1/std [..., 1]."""
    centered = x if integer(node, "rms", 0) else x - x.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + number(node, "epsilon", 1e-5)).rsqrt()
    return centered * rstd, rstd


def layer_norm(run: Run, node: ir.Node, x: Tensor, gamma: Value = None, beta: Value = None) -> Sequence[Value]:
    xhat, rstd = _normalize(x, node)
    y = xhat if gamma is None else xhat * gamma
    return y if beta is None else y + beta, xhat, rstd.squeeze(-1)


def layer_norm_grad(
    run: Run, node: ir.Node, xhat: Tensor, dy: Tensor, rstd: Tensor, gamma: Value = None
) -> Sequence[Value]:
    g = dy if gamma is None else dy * gamma
    inner = g - xhat * (g * xhat).mean(-1, keepdim=True)
    inner = inner if integer(node, "rms", 0) else inner - g.mean(-1, keepdim=True)
    rows = tuple(range(dy.dim() - 1))
    return rstd.unsqueeze(-1) * inner, (dy * xhat).sum(rows), dy.sum(rows)


def _heads(x: Tensor, heads: int, queries: int) -> Tensor:
    """[n, positions, heads·d] as [n, queries, positions, d], K and V repeated for their query heads."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2).repeat_interleave(queries // heads, 1)


def _attend(
    run: Run, node: ir.Node, q: Tensor, k: Tensor, v: Tensor, key_mask: Value = None, bias: Value = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Y, and [n, heads, t, s]: probabilities, and what dropout multiplies them by."""
    heads, kv_heads, n, t, s = integer(node, "heads", 1), integer(node, "kv_heads", 1), *q.shape[:2], k.shape[1]
    q, k, v = (_heads(x, h, heads) for x, h in ((q, heads), (k, kv_heads), (v, kv_heads)))
    scores = number(node, "scale", 1.0) * q @ k.transpose(2, 3)
    scores = scores if bias is None else scores + bias
    hidden = torch.zeros(n, 1, t, s, dtype=torch.bool)
    if integer(node, "causal", 0):
        hidden = hidden | torch.ones(t, s, dtype=torch.bool).triu(1)
    if key_mask is not None:
        hidden = hidden | (key_mask < 0.5)[:, None, None, :]
    p = torch.where(hidden.all(-1, keepdim=True), 0.0, scores.masked_fill(hidden, -math.inf).softmax(-1))
    ratio, factor = number(node, "ratio", 0.0), torch.ones_like(p)
    if ratio:
        factor = run.mask(ratio, integer(node, "stream", 0), p.shape) / (1 - ratio)
    return (p * factor @ v).transpose(1, 2).reshape(n, t, -1), p, factor


def attention(run: Run, node: ir.Node, *operands: Value) -> Sequence[Value]:
    y, p, factor = _attend(run, node, *operands)
    if not run.prunes(p.shape[-1]):
        return [y, None]
    kept = as_kept(p.detach().to(torch.float32).numpy(), keep_count(p.shape[-1], run.sparsity))
    return [y, torch.stack([torch.from_numpy(kept).to(p.dtype), factor.to(p.dtype)])]


def attention_grad(
    run: Run,
    node: ir.Node,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Value,
    bias: Value,
    dy: Tensor,
    kept: Value = None,
) -> Sequence[Value]:
    if isinstance(kept, Tensor):
        heads, kv_heads, n = integer(node, "heads", 1), integer(node, "kv_heads", 1), len(q)
        each = [_heads(x, h, heads).numpy() for x, h in ((q, heads), (k, kv_heads), (v, kv_heads), (dy, heads))]
        found = pruned_gradients(*each, *(x.numpy() for x in kept), number(node, "scale", 1.0))
        shared = (heads, kv_heads, kv_heads)
        summed = [torch.from_numpy(g).unflatten(1, (h, -1)).sum(2) for g, h in zip(found, shared, strict=True)]
        return [g.transpose(1, 2).reshape(n, g.shape[2], -1) for g in summed]
    with torch.enable_grad():
        probes = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(_attend(run, node, *probes, key_mask, bias)[0], probes, dy)


def embedding_grad(run: Run, node: ir.Node, ids: Tensor, dy: Tensor) -> Sequence[Value]:
    g = torch.zeros(ints(node, "weight_shape"), dtype=dy.dtype)
    padding = integer(node, "padding_idx", -1)
    rows = dy * (ids != padding).to(dy.dtype).unsqueeze(-1)
    return [g.index_add(0, ids.reshape(-1), rows.reshape(-1, dy.shape[-1]))]


def position(node: ir.Node, source: Tensor) -> Tensor:
    other, steps = source != integer(node, "number", 0), torch.arange(source.shape[1])
    return (other * steps).argmax(1) if text(node, "kind", "") == "last" else (other.sum(1) - 1) % len(steps)


def select_position_grad(run: Run, node: ir.Node, dy: Tensor, source: Tensor) -> Sequence[Value]:
    dx = dy.new_zeros(len(dy), *ints(node, "input_shape"))
    dx[torch.arange(len(dy)), position(node, source)] = dy
    return [dx]


def batch_matmul(run: Run, node: ir.Node, a: Tensor, b: Tensor) -> Sequence[Value]:
    a = a.transpose(-1, -2) if integer(node, "transA", 0) else a
    return [a @ (b.transpose(-1, -2) if integer(node, "transB", 0) else b)]


def rotary(run: Run, node: ir.Node, x: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Value]:
    n, t, width = x.shape
    pairs = x.reshape(n, t, integer(node, "heads", 1), -1)
    cos, sin = cos[:, None], sin[:, None]
    if integer(node, "inverse", 0):
        a, b = (pairs * sin).chunk(2, -1)
        y = pairs * cos + torch.cat([b, -a], -1)
    else:
        a, b = pairs.chunk(2, -1)
        y = pairs * cos + torch.cat([-b, a], -1) * sin
    return [y.reshape(n, t, width)]


def pack(run: Run, node: ir.Node, x: Tensor) -> Sequence[Value]:
    """What attention reads is kept in bf16, a normalized value in int8; the rest in the razor form."""
    readers = {use.node.op_type for use in node.outputs[0].uses()}
    if readers == {"AttentionGrad"} and run.sparsity > 0 and not run.prunes(run.rows(x)):
        return [torch.from_numpy(to_bf16(x.detach().to(torch.float32).numpy()).copy()).to(x.dtype)]
    return [run.pack(x, whole=readers == {"LayerNormGrad"})]


def reduce_grad(run: Run, node: ir.Node, dy: Tensor) -> Sequence[Value]:
    axes = ints(node, "axes")
    if not integer(node, "keepdims", 1):
        for axis in sorted(axes):
            dy = dy.unsqueeze(axis)
    return [number(node, "scale", 1.0) * dy.expand(dy.shape[0], *ints(node, "input_shape"))]


def softmax_grad(run: Run, node: ir.Node, dy: Tensor, y: Tensor) -> Sequence[Value]:
    return [y * (dy - (y * dy).sum(integer(node, "axis", -1), keepdim=True))]


def cross_entropy(run: Run, node: ir.Node, logits: Tensor, target: Tensor) -> Sequence[Value]:
    classes, smoothing = logits.shape[-1], number(node, "label_smoothing", 0.0)
    counted = target != integer(node, "ignore_index", -100)
    wanted = F.one_hot(target.where(counted, 0), classes).to(logits.dtype) * (1 - smoothing) + smoothing / classes
    logs, share = F.log_softmax(logits, -1), counted.to(logits.dtype).unsqueeze(-1) / counted.sum()
    return -(wanted * logs * share).sum(), (logs.exp() - wanted) * share


def mse(run: Run, node: ir.Node, prediction: Tensor, target: Tensor) -> Sequence[Value]:
    error = prediction - target
    return (error * error).mean(), 2 * error / error.numel()


def bce_with_logits(run: Run, node: ir.Node, prediction: Tensor, target: Tensor) -> Sequence[Value]:
    loss = F.softplus(prediction) - target * prediction
    return loss.mean(), (torch.sigmoid(prediction) - target) / target.numel()


def slice_(run: Run, node: ir.Node, x: Tensor, starts: list, ends: list, axes: Value = None) -> Sequence[Value]:
    index = [slice(None)] * x.ndim
    for axis, start, end in zip(axes or range(len(starts)), starts, ends, strict=True):
        index[axis] = slice(start, end)
    return [x[tuple(index)]]


def pad(run: Run, node: ir.Node, x: Tensor, pads: list, value: Value = None, axes: Value = None) -> Sequence[Value]:
    sides = [(0, 0)] * x.ndim
    for axis, before, after in zip(axes or range(x.ndim), pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True):
        sides[axis] = (before, after)
    return [F.pad(x, [p for side in reversed(sides) for p in side], value=0.0 if value is None else float(value))]


def reduce(run: Run, node: ir.Node, x: Tensor, axes: Value = None) -> Sequence[Value]:
    total = torch.mean if node.op_type == "ReduceMean" else torch.sum
    return [total(x, dim=axes or list(range(x.ndim)), keepdim=bool(integer(node, "keepdims", 1)))]


OPERATORS: dict[str, Operator] = {
    "Conv": conv,
    "ConvGradInput": conv_grad_input,
    "ConvGradWeight": conv_grad_weight,
    "Linear": linear,
    "LinearGradInput": linear_grad_input,
    "LinearGradWeight": linear_grad_weight,
    "Affine": affine,
    "ActivationGrad": lambda run, node, dy, slope: [dy * slope],
    "BatchNormFold": batch_norm_fold,
    "BatchNormGrad": batch_norm_grad,
    "ColumnDot": column_dot,
    "ScaleColumns": scale_columns,
    "ChannelSum": channel_sum,
    "MulGrad": mul_grad,
    "Pack": pack,
    "MaxPool": max_pool,
    "MaxPoolGrad": max_pool_grad,
    "AveragePool": average_pool,
    "AveragePoolGrad": average_pool_grad,
    "LayerNorm": layer_norm,
    "LayerNormGrad": layer_norm_grad,
    "Attention": attention,
    "AttentionGrad": attention_grad,
    "Embedding": lambda run, node, ids, w: [w[ids]],
    "EmbeddingGrad": embedding_grad,
    "SelectPosition": lambda run, node, x, source: [x[torch.arange(len(x)), position(node, source)]],
    "SelectPositionGrad": select_position_grad,
    "Rotary": rotary,
    "BatchMatMul": batch_matmul,
    "ExpandBatch": lambda run, node, x, like: [x.expand(like.shape[0], *x.shape[1:])],
    "Dropout": dropout,
    "DropoutGrad": dropout,
    "ReduceGrad": reduce_grad,
    "SoftmaxGrad": softmax_grad,
    "CrossEntropyLoss": cross_entropy,
    "MSELoss": mse,
    "BCEWithLogitsLoss": bce_with_logits,
    "Add": lambda run, node, a, b: [a + b],
    "Sub": lambda run, node, a, b: [a - b],
    "Mul": lambda run, node, a, b: [a * b],
    "Div": lambda run, node, a, b: [a / b],
    "Neg": lambda run, node, x: [-x],
    "Concat": lambda run, node, *parts: [torch.cat(parts, integer(node, "axis", 0))],
    "Split": lambda run, node, x, sizes: torch.split(x, sizes, integer(node, "axis", 0)),
    "Slice": slice_,
    "Pad": pad,
    "Transpose": lambda run, node, x: [x.permute(ints(node, "perm"))],
    "Reshape": lambda run, node, x, shape: [x.reshape(shape)],
    "Softmax": lambda run, node, x: [torch.softmax(x, integer(node, "axis", -1))],
    "ReduceMean": reduce,
    "ReduceSum": reduce,
}


@dataclass(frozen=True)
class Result:
    """What one run gives.

    Attributes:
        prediction: the model's output, in the graph's layout.
        loss: scalar.
        gradients: parameter name → what the backward nodes computed, torch layout.
        autograd: the same by torch's autograd over the forward nodes (only if asked for).
    """

    prediction: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    autograd: dict[str, Tensor]


def run_training_graph(
    model: ir.Model | onnx.ModelProto,
    inputs: Mapping[str, Any],
    target: Any,
    params: Mapping[str, Any],
    *,
    sparsity: float = 0.0,
    form: Literal["plain", "centered"] = "centered",
    activation_keep: Literal["dense", "q4"] | None = None,
    dtype: torch.dtype = torch.float64,
    mask: Callable[[float, int, Sequence[int]], Tensor] = default_mask,
    attention: Literal["recompute", "probabilities"] = "recompute",
    autograd: bool = False,
) -> Result:
    """Loss and gradients of a training graph.

    Args:
        inputs: input name → array, channels-last.
        target: class indices, or an array of the prediction's shape.
        params: parameter name → array in torch's layout; ``const/…`` too.
        sparsity: of every packed value; 0 keeps all values exactly.
        form: "plain" or "centered".
        activation_keep: how smooth activations keep their derivative; None: dense at sparsity 0, else q4.
        mask: (ratio, stream, shape) → dropout mask, 1 = kept.
        attention: what its backward pass works from above sparsity 0.
        autograd: also differentiate the forward nodes with torch.
    """
    graph = (ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model).graph
    first = torch.as_tensor(next(iter(inputs.values())))
    keep = activation_keep or ("dense" if sparsity == 0 else "q4")
    run = Run(first.shape[0], sparsity, form, keep, mask, attention)

    def number_tensor(data: Any) -> Tensor:
        tensor = torch.as_tensor(np.array(data) if not isinstance(data, Tensor) else data)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    trained = [v.name.removeprefix("grad/") for v in graph.outputs if v.name and v.name.startswith("grad/")]
    leaves = {name: number_tensor(params[name]).detach().clone().requires_grad_(autograd) for name in trained}
    for name, value in graph.initializers.items():
        if value.dtype == ir.DataType.INT64:
            assert value.const_value is not None
            run.values[name] = [int(i) for i in value.const_value.numpy().reshape(-1)]
        else:
            run.values[name] = leaves[name] if name in leaves else number_tensor(params[name])
    run.values |= {name: number_tensor(data) for name, data in inputs.items()}
    run.values["target"] = number_tensor(target)
    nodes = list(graph)
    with torch.set_grad_enabled(autograd):
        for node in nodes:
            if node.metadata_props["phase"] != "backward":
                _run_node(run, node)
    loss = run.values["loss"]
    expected: dict[str, Tensor] = {}
    if autograd:
        expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    run.values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in run.values.items()}
    for node in nodes:
        if node.metadata_props["phase"] == "backward":
            _run_node(run, node)
    gradients = {name: run.values[f"grad/{name}"] for name in trained}
    return Result(run.values[graph.outputs[0].name or ""], run.values["loss"], gradients, expected)


def _run_node(run: Run, node: ir.Node) -> None:
    operands = [None if v is None else run.values[v.name or ""] for v in node.inputs]
    for output, value in zip(node.outputs, OPERATORS[node.op_type](run, node, *operands), strict=False):
        if (
            output.name
            and isinstance(value, Tensor)
            and value.is_floating_point()
            and output.dtype == ir.DataType.FLOAT
        ):
            _check_shape(run, node, output, value)
        if output.name:
            run.values[output.name] = value


def _check_shape(run: Run, node: ir.Node, output: ir.Value, value: Tensor) -> None:
    """The graph's shapes are promises to the planner: they must be what comes out."""
    assert output.shape is not None, f"{node.name}: {output.name} has no shape"
    stated = []
    for dim in output.shape:
        factor = 1 if isinstance(dim, int) else int(str(dim.value).rpartition("*")[0] or 1)
        stated.append(dim if isinstance(dim, int) else factor * run.samples)
    assert list(value.shape) == stated, f"{node.name}: {output.name} is {list(value.shape)}, stated {stated}"
