"""Lowering of convolutions, matrix products, their activations and weight gradients to kernel steps."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from .context import Lowering, ParamForm, Tensor, weight_perm
from .graph import Node
from .lower_columns import column_ints
from .program import Buffer
from .storage import ACTIVATIONS, ActivationKeep, Form, Storage

__all__ = ["RULES"]

_ROWS_FLOAT, _ROWS_BF16, _ROWS_INT8 = 1, 2, 3  # forms of a weight by rows of an output channel


def activation(node: Node) -> tuple[int, list[float]]:
    """Code and (alpha, beta) of the node's activation."""
    name = node.text("activation", "none")
    if name not in ACTIVATIONS:
        node.fail(f"unknown activation {name!r}")
    return ACTIVATIONS[name], [node.number("alpha", 0.0), node.number("beta", 0.0)]


def conv_shape(node: Node, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> list[int]:
    """ConvShape ints from X [N,H,W,C], W [O,C/g,kh,kw] and Y [N,OH,OW,O]."""
    if len(x) != 4 or len(w) != 4 or len(y) != 4:
        node.fail(f"needs four dimensions each, got X {list(x)}, W {list(w)}, Y {list(y)}")
    (n, ih, iw, ic), (oc, per_group, kh, kw), (yn, oh, ow, yc) = x, w, y
    strides, pads = node.integers("strides", [1, 1]), node.integers("pads", [0, 0, 0, 0])
    dilations, group = node.integers("dilations", [1, 1]), node.integer("group", 1)
    if (
        len(strides) != 2
        or len(pads) != 4
        or len(dilations) != 2
        or min(*strides, *dilations, group) < 1
        or min(pads) < 0
    ):
        node.fail(f"strides {strides}, pads {pads}, dilations {dilations} or group {group} are not valid")
    (sh, sw), (pt, pl, pb, pr), (dh, dw) = strides, pads, dilations
    expected = (n, (ih + pt + pb - dh * (kh - 1) - 1) // sh + 1, (iw + pl + pr - dw * (kw - 1) - 1) // sw + 1, oc)
    if expected != (yn, oh, ow, yc) or ic != per_group * group or oc % group:
        node.fail(f"X {list(x)} and W {list(w)} with group {group} cannot give {list(y)}")
    return [n, ih, iw, ic, oh, ow, oc, kh, kw, sh, sw, pt, pl, dh, dw, group]


def linear_shape(node: Node, samples: int, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> list[int]:
    """A matrix product as a convolution over `samples` images of rows × 1 pixels."""
    if len(w) != 2 or not x or not y:
        node.fail(f"needs a matrix W, got X {list(x)}, W {list(w)}, Y {list(y)}")
    out, inner = w if node.integer("transW", 1) else (w[1], w[0])
    if x[-1] != inner or y[-1] != out or prod(x[:-1]) != prod(y[:-1]):
        node.fail(f"X {list(x)} and W {list(w)} cannot give {list(y)}")
    n = samples if prod(x[:-1]) % samples == 0 else 1
    rows = prod(x[:-1]) // n
    return [n, rows, 1, inner, rows, 1, out, 1, 1, 1, 1, 0, 0, 1, 1, 1]


def _weight(lowering: Lowering, node: Node, index: int) -> tuple[Tensor, list[int]]:
    """The weight, and what the kernel is told of its form: nothing if it is float32 as trained weights are stored."""
    weight = lowering.tensor(node, index)
    if weight.form in (ParamForm.BF16, ParamForm.INT8):
        return weight, [_ROWS_BF16 if weight.form == ParamForm.BF16 else _ROWS_INT8]
    if weight.form == ParamForm.IN_FILE and weight_perm(node) is not None:
        return weight, [_ROWS_FLOAT]
    if weight.perm != weight_perm(node):
        node.fail(f"weight {node.input(index)!r} must be a parameter")
    return weight, []


def _shape(lowering: Lowering, node: Node, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> list[int]:
    if node.op.startswith("Conv"):
        return conv_shape(node, x, w, y)
    return linear_shape(node, lowering.samples, x, w, y)


def _forward(lowering: Lowering, node: Node) -> None:
    x, (weight, form) = lowering.plain(node, 0), _weight(lowering, node, 1)
    y = lowering.output(node)
    shape = _shape(lowering, node, x.shape, weight.shape, y.shape)
    code, bounds = activation(node)
    scale, shift = lowering.vector(node, 2, shape[6]), lowering.vector(node, 3, shape[6])
    kept = lowering.keep(node, 1)
    keep = lowering.storage[node.output(1)].form if kept else ActivationKeep.NOTHING
    operands = [x.buffer, weight.buffer, scale, shift, y.buffer, kept, None]  # the addend is the schedule's
    lowering.emit(node, "conv", [*shape, code, int(keep or 0), *form], bounds, operands)


def _grad_input(lowering: Lowering, node: Node) -> None:
    dy, (weight, form) = lowering.plain(node, 0), _weight(lowering, node, 1)
    dx = lowering.output(node)
    shape = _shape(lowering, node, dx.shape, weight.shape, dy.shape)
    scale = lowering.vector(node, 2, shape[6])
    # No activation, no sums, no accumulation yet: that is the schedule's.
    operands = [dy.buffer, weight.buffer, scale, dx.buffer, None, None]
    lowering.emit(node, "conv_grad_input", [*shape, 0, 0, 0, 0, *form], [0.0, 0.0], operands)


def _kept_or_dense(lowering: Lowering, node: Node, index: int) -> tuple[Buffer, Storage | None]:
    """A packed operand with its storage, or a plain tensor and None."""
    if node.input(index) in lowering.kept:
        return lowering.kept_input(node, index)
    return lowering.plain(node, index).buffer, None


def _grad_weight(lowering: Lowering, node: Node) -> None:
    x, storage = _kept_or_dense(lowering, node, 0)
    dy = lowering.plain(node, 1)
    gradient = lowering.output(node, perm=weight_perm(node))
    if list(gradient.shape) != node.integers("weight_shape"):
        node.fail(f"output shape {list(gradient.shape)} is not weight_shape {node.integers('weight_shape')}")
    if node.op == "ConvGradWeight":
        shape = conv_shape(node, (dy.shape[0], *node.integers("input_shape")), gradient.shape, dy.shape)
    else:
        cols = gradient.shape[1] if node.integer("transW", 1) else gradient.shape[0]
        samples = storage.samples if storage else lowering.samples
        shape = linear_shape(node, samples, (*dy.shape[:-1], cols), gradient.shape, dy.shape)
    n, ih, iw, ic = shape[:4]
    if storage and (storage.samples, storage.rows, storage.cols) != (n, ih * iw, ic):
        node.fail(
            f"kept value of shape {(storage.samples, storage.rows, storage.cols)} does not fit X {(n, ih * iw, ic)}"
        )
    if not storage and x.bytes != 4 * n * ih * iw * ic:
        node.fail(f"X has {x.bytes // 4} elements, expected {n * ih * iw * ic}")
    form, keep = (int(storage.form or 0), storage.keep) if storage else (0, 0)
    lowering.emit(node, "conv_grad_weight", [*shape, form, keep], [], [x, dy.buffer, gradient.buffer])


def _pack(lowering: Lowering, node: Node) -> None:
    x = lowering.columns(node, 0)
    storage = lowering.storage.get(node.output(0))
    if storage is None:
        return
    if storage.form == Form.DENSE:
        lowering.kept[node.output(0)] = x.buffer
        if x.columns is not None:
            lowering.kept_columns[node.output(0)] = x.columns
        return
    out = lowering.keep(node, 0)
    ints = [int(storage.form or 0), storage.samples, storage.rows, storage.cols, storage.keep]
    ints += column_ints([x.columns], [storage.cols])
    lowering.emit(node, "pack", ints, [], [x.buffer, out])


def _rows_cols(node: Node, tensor: Tensor) -> tuple[int, int]:
    if not tensor.shape:
        node.fail("needs at least one dimension")
    return tensor.elements // tensor.shape[-1], tensor.shape[-1]


def _same(node: Node, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        node.fail(f"shapes {list(a.shape)} and {list(b.shape)} differ")


def _affine(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    _same(node, x, y)
    rows, cols = _rows_cols(node, x)
    code, bounds = activation(node)
    scale, shift = lowering.vector(node, 1, cols), lowering.vector(node, 2, cols)
    kept = lowering.keep(node, 1)
    keep = lowering.storage[node.output(1)].form if kept else ActivationKeep.NOTHING
    lowering.emit(node, "affine", [rows, cols, code, int(keep or 0)], bounds, [x.buffer, scale, shift, y.buffer, kept])


def _activation_grad(lowering: Lowering, node: Node) -> None:
    dy, (kept, storage), dx = lowering.plain(node, 0), lowering.kept_input(node, 1), lowering.output(node)
    _same(node, dy, dx)
    rows, cols = _rows_cols(node, dy)
    if (rows, cols) != (storage.rows, storage.cols):
        node.fail(f"kept activation of {storage.rows} × {storage.cols} does not fit dY {list(dy.shape)}")
    code, bounds = activation(node)
    ints = [rows, cols, code, int(storage.form or 0), 0]
    lowering.emit(node, "activation_grad", ints, bounds, [dy.buffer, kept, dx.buffer, None])


def _channel_sum(lowering: Lowering, node: Node) -> None:
    dy, out = lowering.plain(node, 0), lowering.output(node)
    rows, cols = _rows_cols(node, dy)
    if out.elements != cols:
        node.fail(f"output {list(out.shape)} does not hold {cols} channels")
    lowering.emit(node, "channel_sum", [rows, cols], [], [dy.buffer, out.buffer])


def _batch_norm_fold(lowering: Lowering, node: Node) -> None:
    scale, shift = lowering.output(node, 0), lowering.output(node, 1)
    channels = scale.elements
    vectors = [lowering.vector(node, i, channels) for i in range(5)]
    if shift.elements != channels or vectors[2] is None or vectors[3] is None:
        node.fail(f"needs mean, var and shift of {channels} channels")
    epsilon = node.number("epsilon", 1e-5)
    lowering.emit(node, "batch_norm_fold", [channels], [epsilon], [*vectors, scale.buffer, shift.buffer])


def _batch_norm_grad(lowering: Lowering, node: Node) -> None:
    dgamma = lowering.output(node)
    channels = dgamma.elements
    vectors = [lowering.vector(node, i, channels) for i in range(5)]
    if any(v is None for v in vectors[:4]):
        node.fail("needs dot, dshift, mean and var")
    lowering.emit(node, "batch_norm_grad", [channels], [node.number("epsilon", 1e-5)], [*vectors, dgamma.buffer])


def _column_dot(lowering: Lowering, node: Node) -> None:
    (weight, form), gradient, out = _weight(lowering, node, 0), lowering.tensor(node, 1), lowering.output(node)
    if form:
        node.fail(f"weight {node.input(0)!r} is stored by rows, which this operator cannot read")
    if gradient.perm != weight.perm or gradient.shape != weight.shape or weight.elements % out.elements:
        node.fail(f"W {list(weight.shape)}, G {list(gradient.shape)} and output {list(out.shape)} do not fit")
    rows = weight.elements // out.elements
    lowering.emit(node, "column_dot", [rows, out.elements], [], [weight.buffer, gradient.buffer, out.buffer])


def _scale_columns(lowering: Lowering, node: Node) -> None:
    gradient, scale = lowering.tensor(node, 0), lowering.plain(node, 1)
    if len(gradient.shape) > 1 and gradient.perm != weight_perm(node):
        node.fail(f"G {node.input(0)!r} is not stored as this operator's layout")
    out = lowering.output(node, perm=gradient.perm)
    if out.shape != gradient.shape or gradient.elements % scale.elements:
        node.fail(f"G {list(gradient.shape)}, scale {list(scale.shape)} and output {list(out.shape)} do not fit")
    rows = gradient.elements // scale.elements
    lowering.emit(node, "scale_columns", [rows, scale.elements], [], [gradient.buffer, scale.buffer, out.buffer])


def _mul_grad(lowering: Lowering, node: Node) -> None:
    x, storage = _kept_or_dense(lowering, node, 0)
    dy, out = lowering.plain(node, 1), lowering.output(node)
    cols = dy.shape[-1]
    samples = storage.samples if storage else dy.shape[0]
    reduce = node.text("reduce", "samples")
    if reduce not in ("samples", "all"):
        node.fail(f"reduce must be samples or all, not {reduce!r}")
    if out.elements != (samples if reduce == "samples" else 1) * cols or dy.elements % (samples * cols):
        node.fail(f"dY {list(dy.shape)} cannot be reduced to {list(out.shape)}")
    rows = dy.elements // (samples * cols)
    if storage and (storage.rows, storage.cols) != (rows, cols) or not storage and x.bytes != 4 * dy.elements:
        node.fail(f"X does not fit dY {list(dy.shape)}")
    form, keep = (int(storage.form or 0), storage.keep) if storage else (0, 0)
    ints = [form, samples, rows, cols, keep, int(reduce == "all")]
    lowering.emit(node, "mul_grad", ints, [], [x, dy.buffer, out.buffer])


RULES = {
    "Conv": _forward,
    "Linear": _forward,
    "ConvGradInput": _grad_input,
    "LinearGradInput": _grad_input,
    "ConvGradWeight": _grad_weight,
    "LinearGradWeight": _grad_weight,
    "Pack": _pack,
    "Affine": _affine,
    "ActivationGrad": _activation_grad,
    "ChannelSum": _channel_sum,
    "BatchNormFold": _batch_norm_fold,
    "BatchNormGrad": _batch_norm_grad,
    "ColumnDot": _column_dot,
    "ScaleColumns": _scale_columns,
    "MulGrad": _mul_grad,
}
