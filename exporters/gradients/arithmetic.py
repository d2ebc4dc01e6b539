"""Gradients of the broadcasting arithmetic of ONNX, and of Softmax and Dropout."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edge_razor.exporters.gradients.tape import Tape, is_batched
from edge_razor.exporters.graph_edit import BATCH, dims, integer, number

Gradients = Sequence[ir.Value | None]


def reshape(tape: Tape, value: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
    """``value`` in ``shape``; the batch dimension is written −1."""
    if tuple(shape) == dims(value):
        return value
    target = tape.ints(-1 if size and size % BATCH == 0 else size for size in shape)
    return tape.standard("Reshape", [value, target], shape, name=name)


def unbroadcast(tape: Tape, gradient: ir.Value, operand: ir.Value) -> ir.Value:
    """Sums ``gradient`` over the dimensions along which ``operand`` was repeated; the result has its shape."""
    wide, narrow = dims(gradient), dims(operand)
    if wide == narrow:
        return gradient
    name = f"d/{operand.name}"
    aligned = (1,) * (len(wide) - len(narrow)) + narrow
    axes = [axis for axis, (a, b) in enumerate(zip(wide, aligned, strict=True)) if a != b]
    if axes and axes == [axis for axis in range(len(wide) - 1) if wide[axis] != 1]:
        # Only the columns remain: a bias. There is a kernel for just this.
        gradient = tape.emit("ChannelSum", [gradient], wide[-1:], name=name)
    elif axes:
        gradient = tape.standard("ReduceSum", [gradient, tape.ints(axes)], aligned, {"keepdims": 1}, name=name)
    return reshape(tape, gradient, narrow, name)


def add(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = A + B."""
    dy = dys[0]
    assert dy is not None
    return [unbroadcast(tape, dy, v) if v is not None and tape.needs(v) else None for v in node.inputs]


def subtract(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = A − B."""
    dy = dys[0]
    a, b = node.inputs
    assert a is not None and b is not None and dy is not None
    da = unbroadcast(tape, dy, a) if tape.needs(a) else None
    return da, _negative(tape, unbroadcast(tape, dy, b), b) if tape.needs(b) else None


def negate(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = −X."""
    x, dy = node.inputs[0], dys[0]
    assert x is not None and dy is not None
    return [_negative(tape, dy, x)]


def _negative(tape: Tape, value: ir.Value, of: ir.Value) -> ir.Value:
    return tape.standard("Neg", [value], dims(value), name=f"d/{of.name}")


def multiply(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = A·B."""
    dy = dys[0]
    a, b = node.inputs
    assert a is not None and b is not None and dy is not None
    da = _factor_gradient(tape, dy, b, a) if tape.needs(a) else None
    return da, _factor_gradient(tape, dy, a, b) if tape.needs(b) else None


def _factor_gradient(tape: Tape, dy: ir.Value, other: ir.Value, factor: ir.Value) -> ir.Value:
    """Gradient of ``factor`` in Y = other·factor.

    Where ``factor`` is the same for all rows (squeeze-and-excite [N,1,1,C], layer scale [C]), ``MulGrad`` reads
    ``other`` in its packed form. Otherwise the product is dense.
    """
    wide, narrow, name = dims(dy), dims(factor), f"d/{factor.name}"
    aligned = (1,) * (len(wide) - len(narrow)) + narrow
    # A first dimension of a·N holds a rows of each sample: a factor of that size is not one per sample.
    per_sample = aligned[0] == wide[0] == BATCH
    same_for_rows = all(size == 1 for size in aligned[1:-1]) and (per_sample or aligned[0] == 1) and len(wide) > 1
    if not (same_for_rows and narrow != wide and dims(other) == wide and is_batched(other)):
        product = tape.standard("Mul", [dy, other], wide, name=name)
        return unbroadcast(tape, product, factor)
    reduce = "samples" if per_sample else "all"
    shape = (wide[0], *aligned[1:-1], wide[-1]) if per_sample else wide[-1:]
    gradient = tape.emit("MulGrad", [other, dy], shape, {"reduce": reduce}, name=name)
    if aligned[-1] != wide[-1]:
        gradient = tape.standard(
            "ReduceSum", [gradient, tape.ints([len(shape) - 1])], (*shape[:-1], 1), {"keepdims": 1}, name=name
        )
    return reshape(tape, gradient, narrow, name)


def divide(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = A/B: dA = dY/B, dB = −dY/B·Y."""
    dy, y = dys[0], node.outputs[0]
    a, b = node.inputs
    assert a is not None and b is not None and dy is not None
    quotient = tape.standard("Div", [dy, b], dims(y), name=f"d/{a.name}")
    da = unbroadcast(tape, quotient, a) if tape.needs(a) else None
    if not tape.needs(b):
        return da, None
    product = tape.standard("Mul", [quotient, y], dims(y), name=f"d/{b.name}")
    return da, _negative(tape, unbroadcast(tape, product, b), b)


def softmax(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = exp(X)/Σ exp(X) along ``axis``: dX = Y·(dY − Σ Y·dY)."""
    x = node.inputs[0]
    assert x is not None
    axis = integer(node, "axis", -1) % len(dims(x))
    return [tape.emit("SoftmaxGrad", [dys[0], node.outputs[0]], dims(x), {"axis": axis}, name=f"d/{x.name}")]


def dropout(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = mask·X/(1 − ratio): the mask comes again from the counter, nothing is kept."""
    x = node.inputs[0]
    assert x is not None
    attributes = {"ratio": number(node, "ratio", 0.5), "stream": integer(node, "stream", 0)}
    return [tape.emit("DropoutGrad", [dys[0]], dims(x), attributes, name=f"d/{x.name}")]
