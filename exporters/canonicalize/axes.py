"""Axes, ranges and permutations in one spelling: non-negative, explicit, as the training graph wants them.

Concat, Split, Slice, Transpose, Softmax, ReduceMean, ReduceSum. What turns out to change nothing is removed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    BATCH,
    array,
    bypass,
    constant,
    dims,
    integer,
    ints,
    make_node,
    remove_dead,
    replace,
)


def canonicalize_axes(model: ir.Model) -> ir.Model:
    """See module docstring."""
    for node in list(model.graph):
        rule = _RULES.get(node.op_type)
        if rule is not None and not node.domain:
            rule(model.graph, node)
    remove_dead(model.graph)
    return model


def _rank(value: ir.Value | None) -> int:
    assert value is not None
    return len(dims(value))


def _concat(graph: ir.Graph, node: ir.Node) -> None:
    inputs = [v for v in node.inputs if v is not None and 0 not in dims(v)]
    if len(inputs) == 1:
        bypass(node, inputs[0])
        return
    axis = integer(node, "axis", 0) % _rank(node.outputs[0])
    if axis == 0:
        node.meta["why"] = "concatenates along the batch dimension"
        return
    replace(node, [make_node("Concat", inputs, {"axis": axis}, shapes=[dims(node.outputs[0])], like=node)])


def _split(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    axis = integer(node, "axis", 0) % _rank(source)
    if axis == 0:
        node.meta["why"] = "splits the batch dimension"
        return
    if len(node.outputs) == 1:
        bypass(node, source)
        return
    # Nobody may use an output, in which case its shape is unknown.
    shape = dims(source)
    given = array(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is not None:
        sizes = [int(s) for s in given]
    else:
        chunk = -(-shape[axis] // len(node.outputs))
        sizes = [min(chunk, max(0, shape[axis] - i * chunk)) for i in range(len(node.outputs))]
    shapes = [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
    lengths = constant(graph, np.array(sizes, np.int64))
    replace(node, [make_node("Split", [source, lengths], {"axis": axis}, shapes=shapes, like=node)])


def _slice(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    shape = dims(source)
    operands = [array(v) for v in node.inputs[1:]]
    if len(operands) < 2 or operands[0] is None or operands[1] is None:
        node.meta["why"] = "its range is computed from data"
        return
    starts, ends = operands[0], operands[1]
    axes = operands[2] if len(operands) > 2 and operands[2] is not None else np.arange(len(starts))
    steps = operands[3] if len(operands) > 3 and operands[3] is not None else np.ones(len(starts), np.int64)
    if any(step != 1 for step in steps):
        node.meta["why"] = f"steps {[int(s) for s in steps]}; only 1 is known"
        return
    ranges = []
    for axis, start, end in zip(axes, starts, ends, strict=True):
        axis, size = int(axis) % len(shape), shape[int(axis)]
        first, last = slice(int(start), int(end)).indices(size)[:2]
        batched = axis == 0 and size % BATCH == 0
        if (first, last) == (0, size) or (batched and first == 0 and end >= BATCH):
            continue
        if batched:
            node.meta["why"] = "selects samples of the batch"
            return
        ranges.append((axis, first, last))
    if not ranges:
        bypass(node, source)
        return
    ranges.sort()
    inputs = [source] + [constant(graph, np.array(column, np.int64)) for column in zip(*ranges, strict=True)]
    data, axis_values, first_values, last_values = inputs
    ordered = [data, first_values, last_values, axis_values]
    replace(node, [make_node("Slice", ordered, shapes=[dims(node.outputs[0])], like=node)])


def _transpose(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    rank = _rank(source)
    perm = ints(node, "perm", list(reversed(range(rank))))
    if perm == list(range(rank)):
        bypass(node, source)
        return
    replace(node, [make_node("Transpose", [source], {"perm": perm}, shapes=[dims(node.outputs[0])], like=node)])


def _softmax(graph: ir.Graph, node: ir.Node) -> None:
    axis = integer(node, "axis", -1) % _rank(node.outputs[0])
    if axis == 0:
        node.meta["why"] = "normalizes over the batch dimension"
        return
    replace(node, [make_node("Softmax", [node.inputs[0]], {"axis": axis}, shapes=[dims(node.outputs[0])], like=node)])


def _reduce(graph: ir.Graph, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    rank = _rank(source)
    given = array(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        node.meta["why"] = "its axes are computed from data"
        return
    if (given is None or given.size == 0) and integer(node, "noop_with_empty_axes", 0):
        bypass(node, source)
        return
    axes = sorted({int(a) % rank for a in given}) if given is not None and given.size else list(range(rank))
    if 0 in axes:
        node.meta["why"] = "reduces over the batch dimension"
        return
    replace(node, [reduce_node(graph, node.op_type, source, axes, integer(node, "keepdims", 1), node)])


def reduce_node(
    graph: ir.Graph, op_type: str, source: ir.Value, axes: list[int], keepdims: int, like: ir.Node
) -> ir.Node:
    """ReduceMean or ReduceSum of ``source`` over ``axes`` (sorted, non-negative)."""
    shape = dims(source)
    sizes = [1 if d in axes else size for d, size in enumerate(shape) if keepdims or d not in axes]
    inputs = [source, constant(graph, np.array(axes, np.int64))]
    return make_node(op_type, inputs, {"keepdims": keepdims}, shapes=[sizes], like=like)


_RULES = {
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Transpose": _transpose,
    "Softmax": _softmax,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
}
