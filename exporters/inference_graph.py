"""``inference.onnx``: the user's model in standard ONNX, ready to take tuned weights.

NCHW, BatchNorm apart, dropout gone: what came from the front end with shapes resolved. Its initializers are exactly the
parameters, under their torch names, so that exporting a tuned model only fills in data.
"""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.graph_edit import bypass, is_parameter, remove_dead


def inference_graph(resolved: ir.Model) -> ir.Model:
    """A copy of ``resolved`` (`resolve_shapes`) for inference in any ONNX runtime. Constants become Constant nodes."""
    model = resolved.clone()
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Dropout" and not node.domain and node.inputs[0] is not None:
            bypass(node, node.inputs[0])
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
