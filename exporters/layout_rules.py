"""What each operator of the canonical graph does with the order of its operands' dimensions (see `channels_last`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edge_razor.exporters.canonicalize.reshapes import reshape_node
from edge_razor.exporters.channels_last import Layout, Order, channel_order, squeezed
from edge_razor.exporters.graph_edit import BATCH, DOMAIN, array, constant, dims, integer, ints

Rule = Callable[[Layout, ir.Node], None]


def _operand(node: ir.Node, index: int = 0) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} {node.name!r} lacks operand {index}"
    return value


def _channels(layout: Layout, node: ir.Node) -> None:
    """Conv, pools: rows and columns before channels, in and out."""
    data = _operand(node)
    order = channel_order(len(dims(data)))
    layout.emit([layout.in_order(data, order), *_vectors(layout, node)], order)


def _vectors(layout: Layout, node: ir.Node) -> list[ir.Value | None]:
    """Weights and vectors behind the data operand; none of them is ever reordered."""
    return [None if value is None else layout.placed(value).value for value in node.inputs[1:]]


def _affine(layout: Layout, node: ir.Node) -> None:
    """With scale and shift (a BatchNorm's) channels must be last; a plain activation takes any order."""
    if len(node.inputs) > 1:
        _channels(layout, node)
    else:
        _any_order(layout, node)


def _any_order(layout: Layout, node: ir.Node) -> None:
    placed = layout.placed(_operand(node))
    layout.emit([placed.value], placed.order)


def _fold(layout: Layout, node: ir.Node) -> None:
    layout.emit([None if v is None else layout.placed(v).value for v in node.inputs], (0,))


def _linear(layout: Layout, node: ir.Node) -> None:
    """The user's last dimension must be last; the rows may be in any order."""
    data = _operand(node)
    last = len(dims(data)) - 1
    order = tuple(d for d in layout.placed(data).order if d != last) + (last,)
    layout.emit([layout.in_order(data, order), *_vectors(layout, node)], order)


def _natural(layout: Layout, node: ir.Node) -> None:
    """What reads and writes rows as a linear layer does: every operand as the user's graph has it."""
    rank = len(dims(node.outputs[0]))
    operands: list[ir.Value | None] = [
        None if v is None else layout.in_order(v, tuple(range(len(dims(v))))) for v in node.inputs
    ]
    if node.op_type == "ExpandBatch":
        operands[1] = layout.placed(_operand(node, 1)).value  # only its batch counts
    layout.emit(operands, tuple(range(rank)))


def _binary(layout: Layout, node: ir.Node) -> None:
    """Both operands in the order of the bigger one that has a batch."""
    a, b = _operand(node, 0), _operand(node, 1)
    rank = len(dims(node.outputs[0]))
    leaders = sorted((v for v in (a, b) if len(dims(v)) == rank), key=lambda v: -int(np.prod(dims(v), dtype=object)))
    order = layout.placed(leaders[0]).order if leaders else tuple(range(rank))
    layout.emit([layout.broadcast_operand(a, order), layout.broadcast_operand(b, order)], order)


def _concat(layout: Layout, node: ir.Node) -> None:
    values = [value for value in node.inputs if value is not None]
    order = layout.placed(max(values, key=lambda v: int(np.prod(dims(v), dtype=object)))).order
    axis = order.index(integer(node, "axis", 0))
    layout.emit([layout.in_order(v, order) for v in values], order, {"axis": ir.AttrInt64("axis", axis)})


def _split(layout: Layout, node: ir.Node) -> None:
    placed = layout.placed(_operand(node))
    axis = placed.order.index(integer(node, "axis", 0))
    layout.emit([placed.value, node.inputs[1]], placed.order, {"axis": ir.AttrInt64("axis", axis)})


def _slice(layout: Layout, node: ir.Node) -> None:
    placed = layout.placed(_operand(node))
    axes = array(node.inputs[3])
    assert axes is not None
    runtime = constant(layout.graph, np.array([placed.order.index(int(a)) for a in axes], np.int64))
    layout.emit([placed.value, node.inputs[1], node.inputs[2], runtime], placed.order)


def _pad(layout: Layout, node: ir.Node) -> None:
    placed = layout.placed(_operand(node))
    pads = array(node.inputs[1])
    assert pads is not None
    rank = len(placed.order)
    moved = [pads[d] for d in placed.order] + [pads[rank + d] for d in placed.order]
    layout.emit([placed.value, constant(layout.graph, np.array(moved, np.int64)), *node.inputs[2:]], placed.order)


def _softmax(layout: Layout, node: ir.Node) -> None:
    placed = layout.placed(_operand(node))
    axis = placed.order.index(integer(node, "axis", -1))
    layout.emit([placed.value], placed.order, {"axis": ir.AttrInt64("axis", axis)})


def _reduce(layout: Layout, node: ir.Node) -> None:
    placed = layout.placed(_operand(node))
    axes = array(node.inputs[1])
    assert axes is not None
    reduced = {int(a) for a in axes}
    runtime = constant(layout.graph, np.array(sorted(placed.order.index(a) for a in reduced), np.int64))
    order: Order = placed.order
    if not integer(node, "keepdims", 1):
        kept = sorted(set(order) - reduced)
        order = tuple(kept.index(d) for d in order if d not in reduced)
    layout.emit([placed.value, runtime], order)


def _transpose(layout: Layout, node: ir.Node) -> None:
    """No node: the same bytes under other names of dimensions."""
    perm = ints(node, "perm")
    placed = layout.placed(_operand(node))
    layout.place(node.outputs[0], placed.value, tuple(perm.index(d) for d in placed.order))


def _reshape(layout: Layout, node: ir.Node) -> None:
    """A view if every group of dimensions that is merged or split lies in one piece; else a transpose puts it into one
    piece first."""
    data, output = _operand(node), node.outputs[0]
    source, target = dims(data), dims(output)
    placed = layout.placed(data)
    groups = matching_groups(source, target)
    sequence = squeezed(placed.order, source)
    ordered = sorted(groups, key=lambda group: min((sequence.index(d) for d in group[0]), default=-1))
    wanted = tuple(d for group in ordered for d in group[0])
    value = placed.value
    if sequence != wanted:
        ones = tuple(d for d in range(len(source)) if source[d] == 1)
        value = layout.in_order(data, wanted + ones)
    order = _with_ones(tuple(d for group in ordered for d in group[1]), target)
    sizes = tuple(target[d] for d in order)
    if dims(value) != sizes:
        new = reshape_node(layout.graph, value, sizes, node)
        new.name, new.outputs[0].name = node.name, output.name
        (value,) = layout.insert(new)
    layout.place(output, value, order)


def matching_groups(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of dimensions (none of size 1) that a reshape maps onto each other.

    >>> matching_groups((2, 6, 5), (2, 3, 2, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    left = [d for d, size in enumerate(source) if size != 1]
    right = [d for d, size in enumerate(target) if size != 1]
    groups = []
    i = j = 0
    while i < len(left) and j < len(right):
        mine, theirs = [left[i]], [right[j]]
        a, b = source[left[i]], target[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= source[left[i]]
                mine.append(left[i])
                i += 1
            else:
                b *= target[right[j]]
                theirs.append(right[j])
                j += 1
        groups.append((mine, theirs))
    return groups


def _with_ones(sequence: Order, sizes: tuple[int, ...]) -> Order:
    """An order of all dimensions whose others than size 1 come as in ``sequence``: channels-last or natural if that
    fits (dimensions of size 1 move freely), else those of size 1 right behind the first."""
    rank = len(sizes)
    preferred = [channel_order(rank), tuple(range(rank))] if rank == 4 else [tuple(range(rank))]
    for order in preferred:
        if squeezed(order, sizes) == sequence and (
            not sequence or order[0] == sequence[0] or sizes[sequence[0]] % BATCH
        ):
            return order
    ones = tuple(d for d in range(rank) if sizes[d] == 1)
    return sequence[:1] + ones + sequence[1:]


RULES: dict[tuple[str, str], Rule] = {
    (DOMAIN, "Conv"): _channels,
    (DOMAIN, "MaxPool"): _channels,
    (DOMAIN, "AveragePool"): _channels,
    (DOMAIN, "Affine"): _affine,
    (DOMAIN, "BatchNormFold"): _fold,
    (DOMAIN, "Linear"): _linear,
    (DOMAIN, "LayerNorm"): _linear,
    (DOMAIN, "Attention"): _natural,
    (DOMAIN, "ExpandBatch"): _natural,
    (DOMAIN, "Embedding"): _natural,
    (DOMAIN, "SelectPosition"): _natural,
    (DOMAIN, "Rotary"): _natural,
    (DOMAIN, "BatchMatMul"): _natural,
    (DOMAIN, "Dropout"): _any_order,
    ("", "Neg"): _any_order,
    ("", "Add"): _binary,
    ("", "Sub"): _binary,
    ("", "Mul"): _binary,
    ("", "Div"): _binary,
    ("", "Concat"): _concat,
    ("", "Split"): _split,
    ("", "Slice"): _slice,
    ("", "Pad"): _pad,
    ("", "Softmax"): _softmax,
    ("", "ReduceMean"): _reduce,
    ("", "ReduceSum"): _reduce,
    ("", "Transpose"): _transpose,
    ("", "Reshape"): _reshape,
}
