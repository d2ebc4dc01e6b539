"""Small editing operations on an onnx_ir graph that every pass of the exporter uses.

Shapes: the first dimension of an activation is symbolic, ``"N"`` or ``"a*N"``; every other dimension is an integer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

DOMAIN = "ai.edge_razor"
# Stands for N where shapes are multiplied or compared as integers; a prime larger than any real dimension.
BATCH = 1_000_003

AttributeValue = int | float | str | Sequence[int] | Sequence[float]


def batch_dim(multiple: int) -> ir.SymbolicDim:
    """The symbolic dimension ``multiple``·N."""
    return ir.SymbolicDim("N" if multiple == 1 else f"{multiple}*N")


def dims(value: ir.Value) -> tuple[int, ...]:
    """The shape of ``value`` with ``BATCH`` for N, so that ``2*N`` is ``2·BATCH``.

    Raises:
        ValueError: the shape is unknown, or has a symbol that is no multiple of N.
    """
    if value.shape is None:
        raise ValueError(f"value {value.name!r} has no shape")
    result = []
    for dim in value.shape:
        if isinstance(dim, int):
            result.append(dim)
            continue
        factor, _, symbol = str(dim.value).rpartition("*")
        if symbol != "N" or (factor and not factor.isdigit()):
            raise ValueError(f"value {value.name!r} has dimension {dim}; only integers and multiples of N are known")
        result.append(int(factor or 1) * BATCH)
    return tuple(result)


def to_shape(sizes: Sequence[int]) -> ir.Shape:
    """Inverse of `dims`: multiples of ``BATCH`` become symbolic."""
    return ir.Shape([batch_dim(s // BATCH) if s and s % BATCH == 0 else s for s in sizes])


def shape_text(value: ir.Value | None) -> str:
    """A shape for people: ``[N,3,224,224]``; ``?`` where unknown."""
    if value is None:
        return "-"
    return "?" if value.shape is None else "[" + ",".join(str(d) for d in value.shape) + "]"


def array(value: ir.Value | None) -> np.ndarray | None:
    """The constant that ``value`` is, or None if it is computed, a parameter without data, or absent."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def is_parameter(value: ir.Value | None) -> bool:
    """Whether ``value`` is a tensor of the user's model (it has a name in its state dict), not a constant of the
    graph."""
    return value is not None and bool(value.meta.get("parameter"))


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``value`` is a constant of the graph that passes may fold: known data, no tensor of the user's model."""
    return value is not None and value.const_value is not None and not is_parameter(value)


def fixed(value: ir.Value | None) -> np.ndarray | None:
    """The constant that ``value`` is: of the graph, or a buffer of the user's model. None if it is computed, absent, or
    a parameter, which may train."""
    known = is_constant(value) or value is not None and bool(value.meta.get("buffer"))
    return array(value) if known else None


def fresh_name(graph: ir.Graph, stem: str) -> str:
    """A value name that no value of ``graph`` has: ``stem``, else ``stem_1``, …"""
    taken: set[str | None] = {v.name for v in graph.inputs} | set(graph.initializers)
    for node in graph:
        taken.update(v.name for v in node.outputs)
    candidate, count = stem, 0
    while candidate in taken:
        count += 1
        candidate = f"{stem}_{count}"
    return candidate


def constant(graph: ir.Graph, data: np.ndarray, stem: str = "const/0") -> ir.Value:
    """A new initializer of ``graph`` that holds ``data``; int64 and float32 are what training graphs may hold."""
    data = np.asarray(data)
    if stem == "const/0":
        count = sum(1 for name in graph.initializers if name.startswith("const/"))
        while f"const/{count}" in graph.initializers:
            count += 1
        stem = f"const/{count}"
    name = stem if stem not in graph.initializers else fresh_name(graph, stem)
    tensor = ir.tensor(data, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, AttributeValue] | None = None,
    *,
    domain: str = "",
    shapes: Sequence[Sequence[int]],
    like: ir.Node | None,
    names: Sequence[str] | None = None,
) -> ir.Node:
    """A detached float32 node.

    Args:
        shapes: one shape per output, as `dims` gives them.
        like: the node that it stands for, whose layer it inherits.
        names: names of the outputs; made from the layer if absent.
    """
    outputs = [ir.Value(type=ir.TensorType(ir.DataType.FLOAT), shape=to_shape(shape)) for shape in shapes]
    for index, output in enumerate(outputs):
        if names:
            output.name = names[index]
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    node = ir.node(op_type, list(inputs), dict(attributes or {}), domain=domain, outputs=outputs)
    if like is not None:
        node.metadata_props["layer"] = like.metadata_props.get("layer", "")
    return node


def replace(node: ir.Node, new_nodes: Sequence[ir.Node]) -> None:
    """Puts ``new_nodes`` in the place of ``node``; the last one's outputs take over names and uses of the old
    outputs."""
    graph = node.graph
    assert isinstance(graph, ir.Graph), f"node {node.name!r} is in no graph"
    last = new_nodes[-1]
    for old, new in zip(node.outputs, last.outputs, strict=True):
        new.name = old.name
    last.name = node.name
    graph.insert_after(node, list(new_nodes))
    ir.convenience.replace_all_uses_with(node.outputs, last.outputs, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def bypass(node: ir.Node, value: ir.Value) -> None:
    """Removes ``node``, whose only used output equals ``value``."""
    graph = node.graph
    assert isinstance(graph, ir.Graph), f"node {node.name!r} is in no graph"
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that alone uses ``value``, once; None if there are more uses or it is an output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes ``value``, if it is one of these standard operators."""
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain and node.op_type in op_types else None


def remove_dead(graph: ir.Graph) -> None:
    """Removes nodes and initializers that nobody uses."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def ints(node: ir.Node, name: str, default: Sequence[int] | None = None) -> list[int]:
    """Integer-list attribute of ``node``."""
    attribute = node.attributes.get(name)
    if attribute is None:
        assert default is not None, f"{node.op_type} {node.name!r} has no attribute {name}"
        return list(default)
    return [int(i) for i in attribute.as_ints()]


def integer(node: ir.Node, name: str, default: int) -> int:
    """Integer attribute of ``node``."""
    return node.attributes.get_int(name, default)


def number(node: ir.Node, name: str, default: float) -> float:
    """Float attribute of ``node``."""
    return node.attributes.get_float(name, default)


def text(node: ir.Node, name: str, default: str) -> str:
    """String attribute of ``node``."""
    return node.attributes.get_string(name, default)
