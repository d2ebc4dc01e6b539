"""LayerNormalization, and LayerNorm and RMSNorm written out → ``ai.edge_razor`` LayerNorm; a parameter repeated for
each sample → ExpandBatch."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    BATCH,
    DOMAIN,
    array,
    dims,
    integer,
    made_by,
    make_node,
    number,
    only_consumer,
    remove_dead,
    replace,
)


def canonicalize_layer_norm(model: ir.Model) -> ir.Model:
    """LayerNorm over the last dimension, with a scale and an optional bias that are parameters."""
    for node in list(model.graph):
        if node.domain or node.op_type != "LayerNormalization":
            continue
        data, gamma, beta = [*node.inputs, None][:3]
        assert data is not None
        shape = dims(data)
        if integer(node, "axis", -1) % len(shape) != len(shape) - 1:
            node.meta["why"] = "normalizes more than the last dimension"
        elif any(node.outputs[i].uses() for i in range(1, len(node.outputs))):
            node.meta["why"] = "its mean or deviation is used"
        elif any(v is not None and (v.producer() is not None or dims(v) != shape[-1:]) for v in (gamma, beta)):
            node.meta["why"] = "its scale or bias is computed"
        else:
            attributes = {"epsilon": number(node, "epsilon", 1e-5), "rms": 0}
            inputs = [data, gamma, beta]
            new = make_node("LayerNorm", inputs, attributes, domain=DOMAIN, shapes=[shape], like=node)
            node.resize_outputs(1)
            replace(node, [new])
    remove_dead(model.graph)
    return model


def canonicalize_written_norms(model: ir.Model) -> ir.Model:
    """x/√(mean(x²) + ε), times a parameter: RMSNorm. With x = z − mean(z), plus a parameter: LayerNorm of z."""
    for node in list(model.graph):
        if not node.domain and node.op_type == "Sqrt":
            _fuse_written_norm(node)
    remove_dead(model.graph)
    return model


def _constant_operand(node: ir.Node | None) -> tuple[ir.Value | None, float]:
    """(x, number) of an Add or Pow of a value and a constant number."""
    if node is None:
        return None, 0.0
    for index in (1, 0) if node.op_type == "Add" else (1,):
        data = array(node.inputs[index])
        if data is not None and data.size == 1:
            return node.inputs[1 - index], float(data.reshape(-1)[0])
    return None, 0.0


def _mean_of(value: ir.Value | None) -> ir.Value | None:
    """x of a mean over x's last dimension that keeps it."""
    node = made_by(value, "ReduceMean")
    axes = array(node.inputs[1]) if node is not None and len(node.inputs) > 1 else None
    x = node.inputs[0] if node is not None else None
    if node is None or x is None or axes is None or not integer(node, "keepdims", 1):
        return None
    return x if [int(a) % len(dims(x)) for a in axes.reshape(-1)] == [len(dims(x)) - 1] else None


def _squared(value: ir.Value | None) -> ir.Value | None:
    """x of x² or x·x."""
    node = made_by(value, "Pow", "Mul")
    if node is not None and node.op_type == "Mul":
        return node.inputs[0] if node.inputs[0] is node.inputs[1] else None
    x, exponent = _constant_operand(node)
    return x if exponent == 2.0 else None


def _quotient(root: ir.Value, x: ir.Value) -> ir.Node | None:
    """The node that computes x/root, and alone uses root."""
    node = only_consumer(root)
    if node is not None and not node.domain and node.op_type == "Reciprocal":
        node = only_consumer(node.outputs[0])
        return node if node is not None and node.op_type == "Mul" and x in node.inputs else None
    return node if node is not None and node.op_type == "Div" and node.inputs[0] is x else None


def _with_parameter(node: ir.Node, op_type: str, width: int) -> tuple[ir.Node, ir.Value | None]:
    """The ``op_type`` of ``node``'s result and a vector that is not computed, if that comes next and alone."""
    follower = only_consumer(node.outputs[0])
    if follower is not None and not follower.domain and follower.op_type == op_type:
        others = [v for v in follower.inputs if v is not None and v is not node.outputs[0]]
        if len(others) == 1 and others[0].producer() is None and dims(others[0]) == (width,):
            return follower, others[0]
    return node, None


def _fuse_written_norm(root: ir.Node) -> None:
    variance, epsilon = _constant_operand(made_by(root.inputs[0], "Add"))
    x = _squared(_mean_of(variance))
    if x is None or epsilon < 0:
        return
    last = _quotient(root.outputs[0], x)
    if last is None:
        return
    width = dims(x)[-1]
    deviation = made_by(x, "Sub")
    centered = deviation is not None and _mean_of(deviation.inputs[1]) is deviation.inputs[0]
    data = deviation.inputs[0] if deviation is not None and centered else x
    last, gamma = _with_parameter(last, "Mul", width)
    beta = None
    if centered:
        last, beta = _with_parameter(last, "Add", width)
    attributes = {"epsilon": epsilon, "rms": int(not centered)}
    replace(last, [make_node("LayerNorm", [data, gamma, beta], attributes, domain=DOMAIN, shapes=[dims(x)], like=last)])


def canonicalize_batch_expansion(model: ir.Model) -> ir.Model:
    """An Expand of [1, …] to [N, …], such as a class token's, where broadcasting does not do it."""
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.domain or node.op_type != "Expand" or source is None:
            continue
        full, own = dims(node.outputs[0]), dims(source)
        if full[:1] == (BATCH,) and own == (1, *full[1:]):
            inputs = [source, graph.inputs[0]]
            replace(node, [make_node("ExpandBatch", inputs, domain=DOMAIN, shapes=[full], like=node)])
    remove_dead(graph)
    return model
