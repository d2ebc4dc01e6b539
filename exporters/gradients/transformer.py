"""Gradients of LayerNorm, attention, embeddings, and of a parameter that is repeated for each sample."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edge_razor.exporters.gradients.tape import Tape
from edge_razor.exporters.graph_edit import AttributeValue, dims, integer, number, text

Gradients = Sequence[ir.Value | None]


def layer_norm(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = gamma·xhat + beta. The backward pass needs xhat and 1/std, which become outputs of the forward node.

    With g = gamma·dY: dX = rstd·(g − mean(g) − xhat·mean(g·xhat)), dgamma = Σ dY·xhat, dbeta = Σ dY.
    """
    x, gamma, beta = [*node.inputs, None, None][:3]
    dy, y = dys[0], node.outputs[0]
    assert x is not None and dy is not None
    shape = dims(x)
    if not tape.needs(x) and not tape.needs(gamma):
        return None, None, tape.emit("ChannelSum", [dy], shape[-1:], name=f"d/{beta.name}") if beta else None
    xhat, rstd = tape.more_outputs(node, {f"{y.name}/normalized": shape, f"{y.name}/rstd": shape[:-1]})
    wanted = [(x, shape), (gamma, shape[-1:]), (beta, shape[-1:])]
    names = [f"d/{v.name}" if v is not None and tape.needs(v) else "" for v, _ in wanted]
    attributes: dict[str, AttributeValue] = {"rms": integer(node, "rms", 0)}
    return tape.emit_many(
        "LayerNormGrad", [xhat, dy, rstd, gamma], [sizes for _, sizes in wanted], attributes, names=names
    )


def attention(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = softmax(scale·Q·Kᵀ + bias)·V; the probabilities are made again from Q and K, or the planner keeps some."""
    q, k, v, key_mask, bias = [*node.inputs, None, None][:5]
    wanted = [x if tape.needs(x) else None for x in (q, k, v)]
    attributes: dict[str, AttributeValue] = {
        **{name: integer(node, name, 0) for name in ("heads", "kv_heads", "causal", "stream")},
        **{name: number(node, name, 0.0) for name in ("scale", "ratio")},
    }
    gradients = tape.emit_many(
        "AttentionGrad",
        [q, k, v, key_mask, bias, dys[0], tape.kept(node, "probabilities")],
        [dims(x) for x in (q, k, v) if x is not None],
        attributes,
        names=["" if x is None else f"d/{x.name}" for x in wanted],
    )
    return [*gradients, None, None]


def embedding(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = W[ids]: rows of dY add up by index."""
    ids, w = node.inputs[:2]
    dy = dys[0]
    assert w is not None
    attributes: dict[str, AttributeValue] = {
        "weight_shape": list(dims(w)),
        "padding_idx": integer(node, "padding_idx", -1),
    }
    return None, tape.emit("EmbeddingGrad", [ids, dy], dims(w), attributes, name=f"d/{w.name}")


def select_position(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = one position of X[N, T, C]: dX is dY there, and 0 elsewhere."""
    x, source = node.inputs
    assert x is not None
    attributes: dict[str, AttributeValue] = {
        "kind": text(node, "kind", "last"),
        "number": integer(node, "number", 0),
        "input_shape": list(dims(x)[1:]),
    }
    return tape.emit("SelectPositionGrad", [dys[0], source], dims(x), attributes, name=f"d/{x.name}"), None


def rotary(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """A rotation of pairs: its gradient is the transpose."""
    x, cos, sin = node.inputs
    assert x is not None
    attributes: dict[str, AttributeValue] = {"heads": integer(node, "heads", 1), "inverse": 1}
    return tape.emit("Rotary", [dys[0], cos, sin], dims(x), attributes, name=f"d/{x.name}"), None, None


def batch_matmul(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = A·B: dA = dY·Bᵀ, dB = Aᵀ·dY."""
    a, b = node.inputs
    assert a is not None and b is not None
    da = db = None
    if tape.needs(a):
        da = tape.emit("BatchMatMul", [dys[0], b], dims(a), {"transA": 0, "transB": 1}, name=f"d/{a.name}")
    if tape.needs(b):
        db = tape.emit("BatchMatMul", [a, dys[0]], dims(b), {"transA": 1, "transB": 0}, name=f"d/{b.name}")
    return da, db


def expand_batch(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y[N, …] = X[1, …] for each sample."""
    x, dy = node.inputs[0], dys[0]
    assert x is not None and dy is not None
    axes = tape.ints([0])
    return [tape.standard("ReduceSum", [dy, axes], dims(x), {"keepdims": 1}, name=f"d/{x.name}"), None]
