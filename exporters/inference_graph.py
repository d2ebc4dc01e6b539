"""``inference.onnx``: the user's model in standard ONNX, ready to take tuned weights.

NCHW, BatchNorm apart, dropout gone: what came from the front end with shapes resolved. Its initializers are exactly the
parameters, under their torch names, so that exporting a tuned model only fills in data.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.graph_edit import BATCH, bypass, constant, dims, is_parameter, remove_dead


def _expand_to_batch(graph: ir.Graph, node: ir.Node) -> None:
    """An Expand of [1, …] to [N, …] takes N from the model's input: `resolve_shapes` has left 1 there."""
    source, shape = node.inputs[0], dims(node.outputs[0])
    assert source is not None
    if shape[:1] != (BATCH,) or dims(source)[:1] == (BATCH,) and len(dims(source)) == len(shape):
        return
    batch = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1})
    rest = constant(graph, np.array(shape[1:], np.int64), f"{node.outputs[0].name}/shape")
    whole = ir.node("Concat", [batch.outputs[0], rest], {"axis": 0})
    for new, name, length in ((batch, "batch", 1), (whole, "sizes", len(shape))):
        new.outputs[0].name = f"{node.outputs[0].name}/{name}"
        new.outputs[0].type, new.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([length])
        graph.insert_before(node, new)
    node.replace_input_with(1, whole.outputs[0])


def inference_graph(resolved: ir.Model) -> ir.Model:
    """A copy of ``resolved`` (`resolve_shapes`) for inference in any ONNX runtime. Constants become Constant nodes."""
    model = resolved.clone()
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Dropout" and not node.domain and node.inputs[0] is not None:
            bypass(node, node.inputs[0])
        if node.op_type == "Expand" and not node.domain:
            _expand_to_batch(graph, node)
    remove_dead(graph)
    first = next(iter(graph), None)
    for name, value in list(graph.initializers.items()):
        if is_parameter(value) or first is None or value.const_value is None:
            continue
        node = ir.node(
            "Constant",
            [],
            {"value": value.const_value},
            outputs=[ir.Value(name=name, type=value.type, shape=value.shape)],
        )
        graph.insert_before(first, node)
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        del graph.initializers[name]
    names: set[str] = set()
    for node in graph:
        stem, count = node.name or node.op_type, 0
        while node.name is None or node.name in names:
            count += 1
            node.name = f"{stem}_{count}"
        names.add(node.name)
        layer = node.metadata_props.get("layer") or ""
        node.metadata_props.clear()
        node.metadata_props["layer"] = layer
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "edge-razor"
    return model
