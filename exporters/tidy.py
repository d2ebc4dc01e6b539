"""Last pass of the forward graph: views of views merged, names unique and free of reserved ones, metadata as
documented."""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.canonicalize.reshapes import reshape_node
from edge_razor.exporters.graph_edit import bypass, dims, is_constant, remove_dead, replace

# Names that the training graph gives to values of its own (docs/training-graph.md).
_RESERVED = ("target", "loss")
_RESERVED_PREFIXES = ("grad/", "kept/")


def tidy(model: ir.Model) -> ir.Model:
    """See module docstring. Initializers of the user's model keep their names; a value with the same name as one is
    renamed."""
    graph = model.graph
    _merge_views(graph)
    remove_dead(graph)
    _name_constants(graph)
    taken = set(graph.initializers)
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        value.name = _unique(str(value.name or "value"), taken)
    names: set[str] = set()
    for node in graph:
        node.name = _unique(node.name or node.op_type, names, reserved=False)
        layer = node.metadata_props.get("layer") or ""
        node.metadata_props.clear()
        node.metadata_props.update({"phase": "forward", "layer": layer})
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    return model


def _unique(name: str, taken: set[str], *, reserved: bool = True) -> str:
    """``name``, or ``name_1``, … if it is taken or reserved; enters the result into ``taken``."""
    candidate, count = name, 0
    while candidate in taken or (reserved and (candidate in _RESERVED or candidate.startswith(_RESERVED_PREFIXES))):
        count += 1
        candidate = f"{name.replace('/', '_')}_{count}"
    taken.add(candidate)
    return candidate


def _name_constants(graph: ir.Graph) -> None:
    """Constants of the graph are ``const/0``, ``const/1``, …, whatever the front end called them."""
    constants = [value for value in graph.initializers.values() if is_constant(value)]
    for value in constants:
        del graph.initializers[str(value.name)]
    for number, value in enumerate(constants):
        value.name = f"const/{number}"
        graph.initializers[value.name] = value


def _merge_views(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        source = node.inputs[0]
        assert source is not None
        producer = source.producer()
        if producer is None or producer.op_type != "Reshape" or producer.domain:
            continue
        origin = producer.inputs[0]
        assert origin is not None
        sizes = dims(node.outputs[0])
        if dims(origin) == sizes:
            bypass(node, origin)
        else:
            replace(node, [reshape_node(graph, origin, sizes, node)])
