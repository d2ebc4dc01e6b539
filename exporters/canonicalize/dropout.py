"""Dropout → ``ai.edge_razor`` Dropout with a counter stream of its own, or nothing."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    DOMAIN,
    array,
    bypass,
    dims,
    made_by,
    make_node,
    number,
    remove_dead,
    replace,
)
from edge_razor.exporters.training_dropout import PROBABILITIES


def dropout_ratio(node: ir.Node) -> float | None:
    """Ratio of a standard Dropout, from the second input (opset ≥ 12) or the attribute; None if it cannot be trained,
    and ``node.meta["why"]`` says why."""
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        node.meta["why"] = "its mask is used"
        return None
    given = array(node.inputs[1]) if len(node.inputs) > 1 else None
    ratio = float(given.reshape(())) if given is not None else number(node, "ratio", 0.5)
    if not 0.0 <= ratio < 1.0:
        node.meta["why"] = f"ratio {ratio}; it must be at least 0 and below 1"
        return None
    return ratio


def dropout_of_probabilities(model: ir.Model) -> ir.Model:
    """A Dropout behind an attention that stands for its probabilities (`PROBABILITIES`) moves in front of the product
    with V, where eager code has it."""
    for node in list(model.graph):
        if PROBABILITIES not in node.metadata_props:
            continue
        result = node.inputs[0]
        product = made_by(result, "MatMul")
        if result is None or product is None or len(list(result.uses())) > 1:
            node.meta["why"] = "the probabilities that it drops are not found"
            continue
        probabilities = product.inputs[0]
        assert probabilities is not None
        moved = ir.node("Dropout", [probabilities, *node.inputs[1:]])
        moved.name, moved.outputs[0].name = f"{node.name}/probabilities", f"{product.outputs[0].name}/dropped"
        moved.outputs[0].type, moved.outputs[0].shape = probabilities.type, probabilities.shape
        moved.metadata_props["layer"] = node.metadata_props.get("layer", "")
        model.graph.insert_before(product, moved)
        product.replace_input_with(0, moved.outputs[0])
        bypass(node, result)
    return model


def canonicalize_dropout(model: ir.Model) -> ir.Model:
    """Ratio 0 disappears; streams count from 0 in graph order, Attention's own dropout among them."""
    stream = 0
    for node in list(model.graph):
        if node.op_type == "Attention" and node.domain == DOMAIN and number(node, "ratio", 0.0) > 0:
            node.attributes["stream"] = ir.AttrInt64("stream", stream)
            stream += 1
        if node.op_type != "Dropout" or node.domain or "why" in node.meta:
            continue
        data, ratio = node.inputs[0], dropout_ratio(node)
        assert data is not None
        if ratio is None:
            continue
        if ratio == 0.0:
            bypass(node, data)
            continue
        node.resize_outputs(1)
        attributes = {"ratio": ratio, "stream": stream}
        shapes = [dims(node.outputs[0])]
        replace(node, [make_node("Dropout", [data], attributes, domain=DOMAIN, shapes=shapes, like=node)])
        stream += 1
    remove_dead(model.graph)
    return model
