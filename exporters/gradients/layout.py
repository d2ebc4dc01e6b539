"""Gradients of what only moves elements: each is another such operator."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from edge_razor.exporters.gradients.arithmetic import reshape
from edge_razor.exporters.gradients.tape import Tape, unsupported
from edge_razor.exporters.graph_edit import BATCH, array, dims, integer, ints

Gradients = Sequence[ir.Value | None]


def _constants(node: ir.Node, index: int) -> list[int] | None:
    """An int64 operand; None if absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    data = array(value)
    if data is None:
        raise unsupported(node, f"operand {index} ({value.name!r}) must be a constant")
    return [int(i) for i in data.reshape(-1)]


def _axis(node: ir.Node, default: int) -> int:
    """Attribute ``axis``, counted from the front."""
    axis = integer(node, "axis", default) % len(dims(node.outputs[0]))
    if axis == 0 and dims(node.outputs[0])[0] % BATCH == 0:
        raise unsupported(node, "works along the batch dimension")
    return axis


def _cut(tape: Tape, value: ir.Value, starts: Sequence[int], shape: Sequence[int], name: str) -> ir.Value:
    """The part of ``value`` of size ``shape`` from ``starts`` on."""
    axes = [axis for axis, size in enumerate(dims(value)) if size != shape[axis]]
    if not axes:
        return value
    bounds = ([starts[a] for a in axes], [starts[a] + shape[a] for a in axes], axes)
    return tape.standard("Slice", [value, *map(tape.ints, bounds)], shape, name=name)


def _embed(tape: Tape, value: ir.Value, starts: Sequence[int], shape: Sequence[int], name: str) -> ir.Value:
    """Zeros of size ``shape`` with ``value`` from ``starts`` on: the transpose of `_cut`."""
    if dims(value) == tuple(shape):
        return value
    # The batch dimension is never padded; its sizes cancel.
    ends = [whole - start - part for whole, start, part in zip(shape, starts, dims(value), strict=True)]
    return tape.standard("Pad", [value, tape.ints([*starts, *ends])], shape, {"mode": "constant"}, name=name)


def _along(axis: int, start: int, rank: int) -> list[int]:
    return [start if dim == axis else 0 for dim in range(rank)]


def concat(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = the inputs one after another along ``axis``: one Split, or a Slice for each input that needs a gradient."""
    dy = dys[0]
    assert dy is not None
    parts = [v for v in node.inputs if v is not None]
    shapes = [dims(v) for v in parts]
    axis = _axis(node, 0)
    sizes = [shape[axis] for shape in shapes]
    if all(tape.needs(v) for v in parts):
        names = [f"d/{v.name}" for v in parts]
        return tape.emit_many("Split", [dy, tape.ints(sizes)], shapes, {"axis": axis}, names=names, domain="")
    return [
        _cut(tape, dy, _along(axis, sum(sizes[:i]), len(shapes[i])), shapes[i], f"d/{v.name}")
        if tape.needs(v)
        else None
        for i, v in enumerate(parts)
    ]


def split(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Inverse of `concat`; an output that nothing uses contributes zeros."""
    x = node.inputs[0]
    assert x is not None
    name, axis, shape = f"d/{x.name}", _axis(node, 0), dims(x)
    known = [dy for dy in dys if dy is not None]
    if len(known) == len(dys):
        return [tape.standard("Concat", known, shape, {"axis": axis}, name=name)]
    total, start = None, 0
    for output, dy in zip(node.outputs, dys, strict=True):
        if dy is not None:
            part = _embed(tape, dy, _along(axis, start, len(shape)), shape, name)
            total = part if total is None else tape.standard("Add", [total, part], shape, name=name)
        start += dims(output)[axis]
    return [total]


def slice_(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = X[…, start:end, …], step 1."""
    x, dy = node.inputs[0], dys[0]
    assert x is not None and dy is not None
    shape = dims(x)
    starts = _constants(node, 1) or []
    axes = _constants(node, 3) or list(range(len(starts)))
    if any(step != 1 for step in _constants(node, 4) or []):
        raise unsupported(node, "only a step of 1 is known")
    offsets = [0] * len(shape)
    for axis, start in zip(axes, starts, strict=True):
        size = shape[axis]
        offsets[axis] = min(max(start + size, 0) if start < 0 else start, size)
    return [_embed(tape, dy, offsets, shape, f"d/{x.name}")]


def pad(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = X with constant elements around it."""
    x, dy = node.inputs[0], dys[0]
    assert x is not None and dy is not None
    shape = dims(x)
    pads = _constants(node, 1) or []
    axes = _constants(node, 3) or list(range(len(shape)))
    if any(p < 0 for p in pads):
        raise unsupported(node, "negative pads are not known")
    before = [0] * len(shape)
    for axis, amount in zip(axes, pads[: len(axes)], strict=True):
        before[axis] = amount
    return [_cut(tape, dy, before, shape, f"d/{x.name}")]


def transpose(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y's dimension d is X's dimension perm[d]."""
    x, dy = node.inputs[0], dys[0]
    assert x is not None and dy is not None
    perm = ints(node, "perm", list(range(len(dims(x))))[::-1])
    inverse = [perm.index(dim) for dim in range(len(perm))]
    return [tape.standard("Transpose", [dy], dims(x), {"perm": inverse}, name=f"d/{x.name}")]


def reshape_(tape: Tape, node: ir.Node, dys: Gradients) -> Gradients:
    """Y = X in another shape."""
    x, dy = node.inputs[0], dys[0]
    assert x is not None and dy is not None
    return [reshape(tape, dy, dims(x), f"d/{x.name}"), None]
