"""Gradients of convolution, linear layer, BatchNorm and activation.

A product layer is Y = act(Z), Z = scale·(X∗W) + shift. With G = Σ X·dZ, *not* multiplied by scale, one pass over X
gives both dW = scale·G and dscale = Σ dZ·(X∗W) = Σ W·G, so that the product's output need not be kept for
BatchNorm's gamma.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edge_razor.exporters.gradients.tape import Tape
from edge_razor.exporters.graph_edit import AttributeValue, dims, integer, ints, number, text

Gradients = Sequence[ir.Value | None]


def _operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _before_activation(tape: Tape, node: ir.Node, dy: ir.Value) -> ir.Value:
    """dZ from dY, both of Y's shape; asks the forward node to keep what the derivative needs."""
    activation = text(node, "activation", "none")
    if activation == "none":
        return dy
    attributes: dict[str, AttributeValue] = {"activation": activation}
    attributes |= {bound: number(node, bound, 0.0) for bound in ("alpha", "beta") if bound in node.attributes}
    y = node.outputs[0]
    kept = tape.kept(node, "activation")
    return tape.emit("ActivationGrad", [dy, kept], dims(y), attributes, name=f"d/{y.name}/preactivation")


def _channel_sum(tape: Tape, node: ir.Node, dz: ir.Value) -> ir.Value:
    return tape.emit("ChannelSum", [dz], [dims(dz)[-1]], name=f"d/{node.outputs[0].name}/shift")


def _product(
    tape: Tape,
    node: ir.Node,
    dy: ir.Value,
    layout: str,
    geometry: dict[str, AttributeValue],
    input_shape: dict[str, AttributeValue],
) -> Gradients:
    """X, W, scale?, shift? → their gradients; ``layout`` is ``conv`` or ``linear``."""
    op = layout.capitalize()
    x, w, scale, shift = (_operand(node, i) for i in range(4))
    assert x is not None and w is not None
    dz = _before_activation(tape, node, dy)
    dshift = _channel_sum(tape, node, dz) if tape.needs(shift) else None
    dw = dscale = None
    if tape.needs(w) or tape.needs(scale):
        columns: dict[str, AttributeValue] = {"layout": layout}
        if layout == "linear":
            columns["transW"] = geometry["transW"]
        attributes = geometry | input_shape | {"weight_shape": list(dims(w))}
        dw = tape.emit(f"{op}GradWeight", [x, dz], dims(w), attributes, name=f"d/{w.name}/unscaled")
        if tape.needs(scale):
            dscale = tape.emit("ColumnDot", [w, dw], [dims(dz)[-1]], columns, name=f"d/{node.outputs[0].name}/scale")
        if tape.needs(w) and scale is not None:
            dw = tape.emit("ScaleColumns", [dw, scale], dims(w), columns, name=f"d/{w.name}")
    dx = None
    if tape.needs(x):
        dx = tape.emit(f"{op}GradInput", [dz, w, scale], dims(x), geometry | input_shape, name=f"d/{x.name}")
    return dx, dw if tape.needs(w) else None, dscale, dshift


def conv(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y[N,OH,OW,O] = act(scale[O]·conv(X[N,H,W,C], W[O,C/g,kh,kw]) + shift[O])."""
    x, dy = node.inputs[0], dys[0]
    assert x is not None and dy is not None
    geometry: dict[str, AttributeValue] = {
        "strides": ints(node, "strides", [1, 1]),
        "pads": ints(node, "pads", [0, 0, 0, 0]),
        "dilations": ints(node, "dilations", [1, 1]),
        "group": integer(node, "group", 1),
    }
    return _product(tape, node, dy, "conv", geometry, {"input_shape": list(dims(x)[1:])})


def linear(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y[…,O] = act(scale[O]·X[…,C]·Wᵀ + shift[O]); W is [O,C], or [C,O] if transW is 0."""
    dy = dys[0]
    assert dy is not None
    return _product(tape, node, dy, "linear", {"transW": integer(node, "transW", 1)}, {})


def affine(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = act(scale[C]·X[…,C] + shift[C]); with neither, an activation alone."""
    x, scale, shift = (_operand(node, i) for i in range(3))
    dy = dys[0]
    assert x is not None and dy is not None
    dz = _before_activation(tape, node, dy)
    dshift = _channel_sum(tape, node, dz) if tape.needs(shift) else None
    dscale = dx = None
    if tape.needs(scale):
        name = f"d/{node.outputs[0].name}/scale"
        dscale = tape.emit("MulGrad", [x, dz], [dims(x)[-1]], {"reduce": "all"}, name=name)
    if tape.needs(x):
        dx = dz if scale is None else tape.standard("Mul", [dz, scale], dims(x), name=f"d/{x.name}")
    return dx, dscale, dshift


def batch_norm_fold(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """scale = gamma/√(var+ε), shift = beta + (bias − mean)·scale, from gamma?, beta?, mean, var, bias?; all [C].

    dgamma = (dscale + (bias − mean)·dshift)/√(var+ε), dbeta = dshift, dbias = scale·dshift.
    """
    gamma, beta, mean, var, bias = (_operand(node, i) for i in range(5))
    dscale, dshift = dys
    dgamma = dbias = None
    if tape.needs(gamma):
        assert gamma is not None
        epsilon: dict[str, AttributeValue] = {"epsilon": number(node, "epsilon", 1e-5)}
        dgamma = tape.emit(
            "BatchNormGrad", [dscale, dshift, mean, var, bias], dims(gamma), epsilon, name=f"d/{gamma.name}"
        )
    if tape.needs(bias):
        assert bias is not None and dshift is not None
        dbias = tape.standard("Mul", [dshift, node.outputs[0]], dims(bias), name=f"d/{bias.name}")
    return dgamma, dshift if tape.needs(beta) else None, None, None, dbias
