"""LayerNormalization → ``ai.edge_razor`` LayerNorm, and a parameter repeated for each sample → ExpandBatch."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    BATCH,
    DOMAIN,
    dims,
    integer,
    make_node,
    number,
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
