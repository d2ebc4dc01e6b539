"""Lowering of operators that only move data: views cost nothing, the others become strided copies."""

from __future__ import annotations

from math import prod

from .context import Columns, Lowering, Tensor, collapse, row_major
from .graph import Node
from .lower_columns import split_columns
from .lower_math import axis_in
from .program import Buffer

__all__ = ["RULES"]


def _copy(
    lowering: Lowering,
    node: Node,
    dims: list[int],
    source: tuple[Buffer, list[int], int],
    target: tuple[Buffer, list[int], int],
) -> None:
    """Copies `dims` elements; source and target are (buffer, strides, offset), in elements."""
    (src, src_strides, src_offset), (dst, dst_strides, dst_offset) = source, target
    walk, (a, b) = collapse(dims, src_strides, dst_strides)
    lowering.emit(node, "copy", [len(walk), *walk, *a, *b, src_offset, dst_offset], [], [src, dst])


def _reshape(lowering: Lowering, node: Node) -> None:
    lowering.alias(node, lowering.stored(node, 0))


def _transpose(lowering: Lowering, node: Node) -> None:
    x = lowering.plain(node, 0)
    perm = node.integers("perm", list(range(len(x.shape)))[::-1])
    shape = lowering.graph.shape(node.output(0), node).at(lowering.samples)
    if sorted(perm) != list(range(len(x.shape))) or shape != tuple(x.shape[p] for p in perm):
        node.fail(f"perm {perm} of {list(x.shape)} does not give {list(shape)}")
    strides = row_major(x.shape)
    walk = [strides[p] for p in perm]
    if collapse(shape, walk) == collapse(shape, row_major(shape)):  # only dimensions of 1 move
        lowering.alias(node, x)
        return
    y = lowering.output(node)
    _copy(lowering, node, list(shape), (x.buffer, walk, 0), (y.buffer, row_major(shape), 0))


def _fits(node: Node, part: Tensor, whole: Tensor, axis: int, start: int) -> None:
    """Checks that `part` is a slice of `whole` along `axis` from `start`."""
    same = [d for i, d in enumerate(part.shape) if i != axis] == [d for i, d in enumerate(whole.shape) if i != axis]
    if len(part.shape) != len(whole.shape) or not same or start < 0 or start + part.shape[axis] > whole.shape[axis]:
        node.fail(f"{list(part.shape)} at {start} of axis {axis} does not fit {list(whole.shape)}")


def _concat(lowering: Lowering, node: Node) -> None:
    y = lowering.output(node)
    axis = axis_in(node, node.integer("axis"), len(y.shape))
    if _lies_there(lowering, node, y, axis):
        return
    strides, start = row_major(y.shape), 0
    for index in range(len(node.inputs)):
        x = lowering.plain(node, index)
        _fits(node, x, y, axis, start)
        _copy(
            lowering, node, list(x.shape), (x.buffer, row_major(x.shape), 0), (y.buffer, strides, start * strides[axis])
        )
        start += x.shape[axis]
    if start != y.shape[axis]:
        node.fail(f"inputs cover {start} of {y.shape[axis]} along axis {axis}")


def _lies_there(lowering: Lowering, node: Node, y: Tensor, axis: int) -> bool:
    """Whether the inputs of a Concat are the columns of one buffer that it would make; its output is that, then."""
    inputs = [lowering.columns(node, index) for index in range(len(node.inputs))]
    row, first = prod(y.shape[axis:]), 0
    for x in inputs:
        width = prod(x.shape[axis:])
        if x.columns != Columns(row, first, width) or x.buffer is not inputs[0].buffer:
            return False
        first += width
    if first != row or inputs[0].buffer.bytes != y.buffer.bytes:
        return False
    lowering.tensors[node.output(0)] = Tensor(inputs[0].buffer, y.shape)
    return True


def _split(lowering: Lowering, node: Node) -> None:
    x = lowering.plain(node, 0)
    axis = axis_in(node, node.integer("axis", 0), len(x.shape))
    columns = split_columns(lowering, node, x, axis)
    strides, start = row_major(x.shape), 0
    for index, name in enumerate(node.outputs):
        shape = lowering.graph.shape(name, node).at(lowering.samples)
        if (
            name in lowering.graph.consumers
            or name == lowering.graph.output
            or name in lowering.graph.gradients.values()
        ):
            y = lowering.output(node, index)
            _fits(node, y, x, axis, start)
            if columns is not None:
                lowering.tensors[name] = Tensor(x.buffer, y.shape, columns=columns[index])
            else:
                _copy(
                    lowering,
                    node,
                    list(y.shape),
                    (x.buffer, strides, start * strides[axis]),
                    (y.buffer, row_major(y.shape), 0),
                )
        start += shape[axis]
    if start != x.shape[axis]:
        node.fail(f"outputs cover {start} of {x.shape[axis]} along axis {axis}")


def _slice(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    if len(x.shape) != len(y.shape):
        node.fail(f"cannot slice {list(x.shape)} to {list(y.shape)}")
    starts, ends = lowering.graph.int_input(node, 1), lowering.graph.int_input(node, 2)
    if starts is None or ends is None or len(starts) != len(ends):
        node.fail("needs as many starts as ends")
    axes, steps = lowering.graph.int_input(node, 3), lowering.graph.int_input(node, 4)
    axes = list(range(len(starts))) if axes is None else axes
    if len(axes) != len(starts) or any(s != 1 for s in steps or ()):
        node.fail("needs one axis a start, and steps of 1")
    expected, offset, strides = list(x.shape), 0, row_major(x.shape)
    for start, end, axis in zip(starts, ends, axes, strict=True):
        axis = axis_in(node, axis, len(x.shape))
        extent = x.shape[axis]
        first, last = (min(max(v + extent if v < 0 else v, 0), extent) for v in (start, end))
        expected[axis] = last - first
        offset += first * strides[axis]
    if expected != list(y.shape):
        node.fail(f"slicing {list(x.shape)} gives {expected}, not {list(y.shape)}")
    _copy(lowering, node, list(y.shape), (x.buffer, strides, offset), (y.buffer, row_major(y.shape), 0))


def _pad(lowering: Lowering, node: Node) -> None:
    x, y = lowering.plain(node, 0), lowering.output(node)
    pads = lowering.graph.int_input(node, 1)
    if pads is None or node.text("mode", "constant") != "constant":
        node.fail("needs constant padding with inline pads")
    axes = lowering.graph.int_input(node, 3)
    axes = list(range(len(x.shape))) if axes is None else [axis_in(node, a, len(x.shape)) for a in axes]
    if len(pads) != 2 * len(axes) or min(pads, default=0) < 0:
        node.fail(f"pads {pads} do not fit axes {axes}")
    expected, offset, strides = list(x.shape), 0, row_major(y.shape)
    for i, axis in enumerate(axes):
        expected[axis] += pads[i] + pads[i + len(axes)]
        offset += pads[i] * strides[axis]
    if expected != list(y.shape):
        node.fail(f"padding {list(x.shape)} by {pads} gives {expected}, not {list(y.shape)}")
    value = 0.0
    if node.input(2):
        constant = lowering.graph.initializers.get(node.input(2))
        if constant is None or constant.data is None or len(constant.data) != 1:
            node.fail(f"fill value {node.input(2)!r} must be an inline number")
        value = float(constant.data[0])
    lowering.emit(node, "fill", [y.elements], [value], [y.buffer])
    _copy(lowering, node, list(x.shape), (x.buffer, row_major(x.shape), 0), (y.buffer, strides, offset))


RULES = {
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
}
