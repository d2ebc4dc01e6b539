"""Gather with constant indices → Slice (+ Reshape); Slices that cut a value into all its parts → Split."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.graph_edit import (
    BATCH,
    array,
    constant,
    dims,
    integer,
    is_constant,
    make_node,
    remove_dead,
    replace,
)


def canonicalize_gather(model: ir.Model) -> ir.Model:
    """A Gather of one index, or of consecutive ones, is a Slice in another shape."""
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.domain or node.op_type != "Gather" or source is None or is_constant(source):
            continue
        shape = dims(source)
        axis = integer(node, "axis", 0) % len(shape)
        indices = array(node.inputs[1])
        if indices is None:
            node.meta["why"] = "its indices are computed; only an Embedding's may be"
            continue
        first = int(indices.reshape(-1)[0]) % shape[axis] if indices.size else 0
        flat = indices.reshape(-1) % shape[axis]
        if shape[axis] % BATCH == 0 or not indices.size or not np.array_equal(flat, first + np.arange(flat.size)):
            node.meta["why"] = "selects samples of the batch, or indices that are not consecutive"
            continue
        cut = (*shape[:axis], flat.size, *shape[axis + 1 :])
        bounds = [constant(graph, np.array([v], np.int64)) for v in (first, first + flat.size, axis)]
        part = make_node("Slice", [source, *bounds], shapes=[cut], like=node)
        sizes = dims(node.outputs[0])
        if sizes == cut:
            replace(node, [part])
        else:
            part.outputs[0].name = f"{node.outputs[0].name}/slice"
            target = constant(graph, np.array([-1 if s and s % BATCH == 0 else s for s in sizes], np.int64))
            replace(node, [part, make_node("Reshape", [part.outputs[0], target], shapes=[sizes], like=node)])
    remove_dead(graph)
    return model


def slices_to_split(model: ir.Model) -> ir.Model:
    """Slices along one axis that together are the whole value become one Split, whose gradient is one Concat."""
    graph = model.graph
    for node in list(graph):
        for value in node.outputs:
            slices = [use.node for use in value.uses() if use.node.op_type == "Slice" and not use.node.domain]
            if len(slices) < 2 or len(slices) != len(list(value.uses())):
                continue
            ranges = [_range(part) for part in slices]
            if any(r is None for r in ranges) or len({r[0] for r in ranges if r}) > 1:
                continue
            ordered = sorted(zip((r for r in ranges if r), slices, strict=True), key=lambda pair: pair[0][1])
            axis = ordered[0][0][0]
            ends = [0] + [end for (_, _, end), _ in ordered]
            if [start for (_, start, _), _ in ordered] != ends[:-1] or ends[-1] != dims(value)[axis]:
                continue
            _split(graph, value, axis, [part for _, part in ordered])
    remove_dead(graph)
    return model


def _range(node: ir.Node) -> tuple[int, int, int] | None:
    """(axis, start, end) of a canonical Slice along one axis."""
    bounds = [array(v) for v in node.inputs[1:4]]
    if len(bounds) < 3 or any(b is None or b.size != 1 for b in bounds):
        return None
    start, end, axis = (int(b.reshape(-1)[0]) for b in bounds if b is not None)
    return axis, start, end


def _split(graph: ir.Graph, value: ir.Value, axis: int, parts: list[ir.Node]) -> None:
    shapes = [dims(part.outputs[0]) for part in parts]
    sizes = constant(graph, np.array([shape[axis] for shape in shapes], np.int64))
    split = make_node("Split", [value, sizes], {"axis": axis}, shapes=shapes, like=parts[0])
    graph.insert_before(_first(graph, parts), split)
    for part, output in zip(parts, split.outputs, strict=True):
        output.name = part.outputs[0].name
        ir.convenience.replace_all_uses_with(part.outputs[0], output, replace_graph_outputs=True)
        graph.remove(part, safe=True)


def _first(graph: ir.Graph, nodes: Iterable[ir.Node]) -> ir.Node:
    wanted = set(nodes)
    return next(node for node in graph if node in wanted)
