"""x·cos + rotate_half(x)·sin on [N, heads, positions, d] → Rotary (Su et al., "RoFormer", 2021)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.canonicalize.heads import HEADS, join_heads, split_heads
from edge_razor.exporters.graph_edit import (
    DOMAIN,
    constant,
    dims,
    fixed,
    integer,
    made_by,
    make_node,
    remove_dead,
    replace,
)


def canonicalize_rotary(model: ir.Model) -> ir.Model:
    """See module docstring; cos and sin must be constants [positions, d], broadcast over samples and heads."""
    graph = model.graph
    for node in list(graph):
        if not node.domain and node.op_type == "Add" and len(dims(node.outputs[0])) == 4:
            _fuse(graph, node)
    remove_dead(graph)
    return model


def _fuse(graph: ir.Graph, add: ir.Node) -> None:
    shape = dims(add.outputs[0])
    terms = [_times_table(value, shape) for value in add.inputs]
    for (x, cos), (rotated, sin) in (terms, terms[::-1]):
        if x is None or cos is None or sin is None or not _is_rotation(rotated, x):
            continue
        n, heads, positions, d = shape
        rows, nodes = join_heads(graph, x, HEADS, add)
        tables = [constant(graph, np.ascontiguousarray(table, np.float32)) for table in (cos, sin)]
        fused = make_node(
            "Rotary",
            [rows, *tables],
            {"heads": heads, "inverse": 0},
            domain=DOMAIN,
            shapes=[(n, positions, heads * d)],
            like=add,
        )
        replace(add, [*nodes, fused, *split_heads(graph, fused, add.outputs[0], heads, add)])
        return


def _times_table(value: ir.Value | None, shape: tuple[int, ...]) -> tuple[ir.Value | None, np.ndarray | None]:
    """(x, table [positions, d]) of x·table."""
    node = made_by(value, "Mul")
    for index in (0, 1) if node is not None else ():
        assert node is not None
        table, x = fixed(node.inputs[index]), node.inputs[1 - index]
        if table is not None and x is not None and dims(x) == shape and table.shape[-2:] == shape[2:]:
            if table.size == shape[2] * shape[3]:
                return x, table.reshape(shape[2:])
    return None, None


def _is_rotation(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether ``value`` is [−b, a] for x = [a, b]."""
    concat = made_by(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or integer(concat, "axis", 0) % 4 != 3:
        return False
    negative = made_by(concat.inputs[0], "Neg")
    half = dims(x)[3] // 2
    return (
        negative is not None
        and dims(x)[3] % 2 == 0
        and _is_part(negative.inputs[0], x, half, 2 * half)
        and _is_part(concat.inputs[1], x, 0, half)
    )


def _is_part(value: ir.Value | None, x: ir.Value, start: int, end: int) -> bool:
    """Whether ``value`` is x[…, start:end], as a canonical Slice or an output of a Split in halves."""
    node = made_by(value, "Slice", "Split")
    if node is None or node.inputs[0] is not x:
        return False
    if node.op_type == "Slice":
        bounds = [fixed(v) for v in node.inputs[1:4]]
        return [None if b is None else b.reshape(-1).tolist() for b in bounds] == [[start], [end], [3]]
    sizes = fixed(node.inputs[1])
    return (
        integer(node, "axis", 0) == 3
        and sizes is not None
        and sizes.tolist() == [end - start] * 2
        and node.outputs[int(start > 0)] is value
    )
