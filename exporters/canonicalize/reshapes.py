"""Identity, Squeeze, Unsqueeze, Flatten, Reshape, Expand → Reshape with −1 for the batch dimension, or nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.graph_edit import BATCH, bypass, constant, dims, is_constant, make_node, remove_dead, replace

_VIEWS = ("Squeeze", "Unsqueeze", "Flatten", "Reshape")
# These broadcast by themselves, so that an Expand before them computes nothing.
_BROADCASTING = ("Add", "Sub", "Mul", "Div")


def reshape_node(graph: ir.Graph, value: ir.Value, sizes: tuple[int, ...], like: ir.Node | None) -> ir.Node:
    """A Reshape of ``value`` to ``sizes`` (`graph_edit.dims` form); at most one dimension may hold the batch."""
    target = [-1 if size and size % BATCH == 0 else size for size in sizes]
    return make_node("Reshape", [value, constant(graph, np.array(target, np.int64))], shapes=[sizes], like=like)


def canonicalize_reshapes(model: ir.Model) -> ir.Model:
    """See module docstring. Views of constants are folded; views of parameters stay nodes."""
    graph = model.graph
    for node in list(graph):
        if node.domain or not node.outputs:
            continue
        source = node.inputs[0] if node.inputs else None
        if source is None:
            continue
        if node.op_type in ("Identity", "Cast", "CastLike"):
            if node.op_type == "Identity" or source.dtype == node.outputs[0].dtype:
                bypass(node, source)
        elif node.op_type == "Expand":
            _drop_expand(node, source)
        elif node.op_type in _VIEWS:
            sizes = dims(node.outputs[0])
            if sizes == dims(source):
                bypass(node, source)
            elif is_constant(source):
                data = source.const_value.numpy().reshape(sizes)  # type: ignore[union-attr]
                bypass(node, constant(graph, data))
            else:
                # A view of a view is one view of the original.
                producer = source.producer()
                if producer is not None and producer.op_type == "Reshape" and not producer.domain:
                    source = producer.inputs[0]
                    assert source is not None
                if sizes == dims(source):
                    bypass(node, source)
                else:
                    replace(node, [reshape_node(graph, source, sizes, node)])
    remove_dead(graph)
    return model


def _drop_expand(node: ir.Node, source: ir.Value) -> None:
    """Removes an Expand that changes nothing, or whose every consumer broadcasts to the same shape without it."""
    output = node.outputs[0]
    full = dims(output)
    if full == dims(source):
        bypass(node, source)
        return
    for use in output.uses():
        consumer = use.node
        others = [v for i, v in enumerate(consumer.inputs) if i != use.idx and v is not None]
        reaches = consumer.op_type in _BROADCASTING and not consumer.domain and any(dims(v) == full for v in others)
        if not reaches or len(dims(source)) > len(full):
            node.meta["why"] = "an Expand whose result is not combined with a tensor of the same shape"
            return
    if output.is_graph_output():
        return
    bypass(node, source)
