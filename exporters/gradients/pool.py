"""Gradients of pooling and reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from edge_razor.exporters.gradients.tape import Tape, is_batched, unsupported
from edge_razor.exporters.graph_edit import AttributeValue, array, dims, integer, ints

Gradients = Sequence[ir.Value | None]


def _window(node: ir.Node) -> dict[str, AttributeValue]:
    """Geometry that forward and backward share."""
    x = node.inputs[0]
    assert x is not None
    return {
        "kernel_shape": ints(node, "kernel_shape"),
        "strides": ints(node, "strides", [1, 1]),
        "pads": ints(node, "pads", [0, 0, 0, 0]),
        "input_shape": list(dims(x)[1:]),
    }


def max_pool(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = the largest of each window; which one it was is kept, a byte each."""
    x = node.inputs[0]
    assert x is not None
    attributes = _window(node) | {"dilations": ints(node, "dilations", [1, 1])}
    return [tape.emit("MaxPoolGrad", [dys[0], tape.kept(node, "index")], dims(x), attributes, name=f"d/{x.name}")]


def average_pool(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = the mean of each window."""
    x = node.inputs[0]
    assert x is not None
    attributes = _window(node) | {name: integer(node, name, 0) for name in ("count_include_pad", "ceil_mode")}
    return [tape.emit("AveragePoolGrad", [dys[0]], dims(x), attributes, name=f"d/{x.name}")]


def reduce(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = the sum (ReduceSum) or mean (ReduceMean) of X over ``axes``."""
    x = node.inputs[0]
    assert x is not None
    shape = dims(x)
    operand = node.inputs[1] if len(node.inputs) > 1 else None
    data = array(operand)
    if operand is not None and data is None:
        raise unsupported(node, "axes must be a constant")
    axes = sorted(int(a) % len(shape) for a in data.reshape(-1)) if data is not None else []
    if not axes and not integer(node, "noop_with_empty_axes", 0):
        axes = list(range(len(shape)))
    if 0 in axes or not is_batched(x):
        raise unsupported(node, "a gradient through a reduction over the batch, or of parameters, is not known")
    if not axes:
        return [dys[0], None]
    scale = 1.0 / math.prod(shape[a] for a in axes) if node.op_type == "ReduceMean" else 1.0
    attributes: dict[str, AttributeValue] = {
        "axes": axes,
        "keepdims": integer(node, "keepdims", 1),
        "scale": scale,
        "input_shape": list(shape[1:]),
    }
    return [tape.emit("ReduceGrad", [dys[0]], shape, attributes, name=f"d/{x.name}"), None]
