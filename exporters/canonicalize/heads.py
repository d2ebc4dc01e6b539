"""Between [N, heads, positions, d], as models write attention, and [N, positions, heads·d], as linear layers write it.

The transpositions put in here cancel those of the model when the graph gets its layout (`channels_last`).
"""

from __future__ import annotations

import onnx_ir as ir

from edge_razor.exporters.canonicalize.reshapes import reshape_node
from edge_razor.exporters.graph_edit import dims, make_node

HEADS = [0, 2, 1, 3]
"""[N, heads, positions, d] ↔ [N, positions, heads, d]."""


def join_heads(
    graph: ir.Graph, value: ir.Value, perm: list[int], like: ir.Node, tag: str = ""
) -> tuple[ir.Value, list[ir.Node]]:
    """``value`` transposed to [N, positions, heads, d] and viewed as [N, positions, heads·d], and the nodes for it."""
    n, positions, heads, d = (dims(value)[p] for p in perm)
    transpose = make_node("Transpose", [value], {"perm": perm}, shapes=[(n, positions, heads, d)], like=like)
    transpose.outputs[0].name = f"{value.name}/positions{tag}"
    view = reshape_node(graph, transpose.outputs[0], (n, positions, heads * d), like)
    view.outputs[0].name = f"{value.name}/rows{tag}"
    return view.outputs[0], [transpose, view]


def split_heads(graph: ir.Graph, node: ir.Node, output: ir.Value, heads: int, like: ir.Node) -> list[ir.Node]:
    """Nodes that bring the result [N, positions, heads·d] of ``node`` to [N, heads, positions, d], the shape of
    ``output``, which they stand for."""
    rows = node.outputs[0]
    n, positions, width = dims(rows)
    rows.name = f"{output.name}/rows"
    split = reshape_node(graph, rows, (n, positions, heads, width // heads), like)
    split.outputs[0].name = f"{output.name}/heads"
    shape = (n, heads, positions, width // heads)
    return [split, make_node("Transpose", [split.outputs[0]], {"perm": HEADS}, shapes=[shape], like=like)]
