"""Gather of a parameter by an input → Embedding; with constant indices → Slice (+ Concat, Reshape); Slices that cut a
value into all its parts → Split."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.canonicalize.reshapes import reshape_node
from edge_razor.exporters.graph_edit import (
    BATCH,
    DOMAIN,
    array,
    constant,
    dims,
    integer,
    is_constant,
    is_parameter,
    make_node,
    remove_dead,
    replace,
    to_shape,
)

_MAX_RUNS = 64  # of consecutive rows that one Gather may select; each becomes a Slice


def canonicalize_gather(model: ir.Model) -> ir.Model:
    """A Gather of one index, or of consecutive ones, is a Slice in another shape."""
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if node.domain or node.op_type != "Gather" or source is None or is_constant(source):
            continue
        shape = dims(source)
        axis = integer(node, "axis", 0) % len(shape)
        given = node.inputs[1]
        indices = array(given)
        if indices is None:
            if given is not None and given.is_graph_input() and is_parameter(source) and len(shape) == 2 and axis == 0:
                shapes = [dims(node.outputs[0])]
                attributes = {"padding_idx": int(source.meta.get("padding_idx", -1))}
                rows = make_node("Embedding", [given, source], attributes, domain=DOMAIN, shapes=shapes, like=node)
                replace(node, [rows])
            else:
                node.meta["why"] = "its indices are computed; only an Embedding's may be, which are an input"
            continue
        if shape[axis] % BATCH == 0 or not indices.size:
            node.meta["why"] = "selects samples of the batch, or nothing"
            continue
        flat = indices.reshape(-1) % shape[axis]
        if (flat == flat[0]).all() and indices.shape[:-1] == (1,) * (indices.ndim - 1) and _broadcasts(node):
            # One row for all positions, such as BERT's token type 0: arithmetic repeats it.
            flat = flat[:1]
        runs = np.split(flat, np.flatnonzero(np.diff(flat) != 1) + 1)
        if len(runs) > _MAX_RUNS:
            node.meta["why"] = f"selects {len(runs)} separate ranges; at most {_MAX_RUNS} are known"
            continue
        name, parts = str(node.outputs[0].name), list[ir.Node]()
        for number, run in enumerate(runs):
            cut = (*shape[:axis], run.size, *shape[axis + 1 :])
            bounds = [constant(graph, np.array([v], np.int64)) for v in (run[0], run[0] + run.size, axis)]
            parts.append(
                make_node("Slice", [source, *bounds], shapes=[cut], like=node, names=[f"{name}/slice/{number}"])
            )
        if len(parts) > 1:
            whole = (*shape[:axis], flat.size, *shape[axis + 1 :])
            pieces = [part.outputs[0] for part in parts]
            parts.append(make_node("Concat", pieces, {"axis": axis}, shapes=[whole], like=node, names=[f"{name}/rows"]))
        sizes = dims(node.outputs[0])
        if flat.size != indices.size:
            sizes = (*shape[:axis], *(1,) * indices.ndim, *shape[axis + 1 :])
            node.outputs[0].shape = to_shape(sizes)
        if sizes != dims(parts[-1].outputs[0]):
            parts.append(reshape_node(graph, parts[-1].outputs[0], sizes, node))
        replace(node, parts)
    remove_dead(graph)
    return model


def _broadcasts(node: ir.Node) -> bool:
    """Whether all that ``node`` gives is added to something as large."""
    full = dims(node.outputs[0])
    return all(
        use.node.op_type in ("Add", "Sub") and not use.node.domain and dims(use.node.outputs[0])[1:] == full[1:]
        for use in node.outputs[0].uses()
    )


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
