"""Dropout → ``ai.edge_razor`` Dropout with a counter stream of its own, or nothing."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.graph_edit import DOMAIN, array, bypass, dims, make_node, number, remove_dead, replace


def canonicalize_dropout(model: ir.Model) -> ir.Model:
    """Ratios from the second input (opset ≥ 12) or the attribute. Ratio 0 disappears; streams count from 0 in graph
    order."""
    stream = 0
    for node in list(model.graph):
        if node.op_type != "Dropout" or node.domain:
            continue
        data = node.inputs[0]
        assert data is not None
        if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
            node.meta["why"] = "its mask is used"
            continue
        given = array(node.inputs[1]) if len(node.inputs) > 1 else None
        ratio = float(given.reshape(())) if given is not None else number(node, "ratio", 0.5)
        if ratio == 0.0:
            bypass(node, data)
            continue
        if not 0.0 < ratio < 1.0:
            node.meta["why"] = f"ratio {ratio}; it must be at least 0 and below 1"
            continue
        node.resize_outputs(1)
        attributes = {"ratio": ratio, "stream": stream}
        shapes = [dims(node.outputs[0])]
        replace(node, [make_node("Dropout", [data], attributes, domain=DOMAIN, shapes=shapes, like=node)])
        stream += 1
    remove_dead(model.graph)
    return model
