"""Values that are columns of a wider one and need no copy: Q, K and V of a fused projection, and their gradients.

`attention`, `attention_grad` and `pack` read and write rows that lie further apart than they are long. So a Split that
feeds nothing else only names columns, and a Concat of nothing but gradients of attention names what already lies there.
"""

from __future__ import annotations

from math import prod

from .context import Columns, Lowering, Tensor
from .graph import Graph, Node
from .program import Buffer, Region
from .storage import Form, Place

__all__ = ["column_ints", "gradient_columns", "split_columns"]


def split_columns(lowering: Lowering, node: Node, x: Tensor, axis: int) -> list[Columns] | None:
    """The columns of `x` that each output of a Split is; None if copies are needed.

    They are if anything but attention reads an output, and where `x` would be kept whole for a part of it: Q, K and V
    are all kept as they are, or made again, or none of them. The spill file takes them one by one: less memory is under
    way at a time.
    """
    if x.buffer.region != Region.ARENA:
        return None
    row, first = prod(x.shape[axis:]), 0
    found: list[Columns] = []
    places: set[Place | None] = set()
    for name in node.outputs:
        width = prod(lowering.graph.shape(name, node).at(lowering.samples)[axis:])
        packs = _packs(lowering.graph, name, width)
        if packs is None:
            return None
        stored = [lowering.storage[pack] for pack in packs if pack in lowering.storage]
        places |= {storage.place for storage in stored if storage.form == Form.DENSE} or {None}
        found.append(Columns(row, first, width))
        first += width
    return found if len(places) == 1 and "spill" not in places else None


def _packs(graph: Graph, name: str, width: int) -> list[str] | None:
    """What is packed of rows of `width` for the gradient of attention; None if anything but attention reads them."""
    packs: list[str] = []
    names = [name]
    for value in names:
        if value == graph.output or value in graph.gradients.values():
            return None
        for reader in graph.consumers.get(value, ()):
            if reader.op == "Reshape" and value == reader.input(0):
                names.append(reader.output(0))
                continue
            if graph.shape(value, reader).dims[-1:] != (width,):
                return None
            if reader.op == "Pack":
                packs.append(reader.output(0))
                readers = [(r.op, r.inputs[3:]) for r in graph.consumers.get(packs[-1], ())]
                if any(op != "AttentionGrad" or packs[-1] in others for op, others in readers):
                    return None
            elif reader.op != "Attention" or value in reader.inputs[3:]:
                return None
    return packs


def gradient_columns(lowering: Lowering, node: Node) -> dict[int, Tensor]:
    """Those outputs of an AttentionGrad that only a Concat of such outputs reads: columns of its result."""
    graph = lowering.graph
    ends = {index: _end(graph, name) for index, name in enumerate(node.outputs[:3]) if name}
    found: dict[int, Tensor] = {}
    for concat in {id(reader): reader for _, reader in ends.values() if reader is not None}.values():
        parts = {name: index for index, (name, reader) in ends.items() if reader is concat}
        if sorted(parts) != sorted(concat.inputs):
            continue
        shape = graph.shape(concat.output(0), concat).at(lowering.samples)
        axis = concat.integer("axis")
        columns: dict[int, Tensor] = {}
        buffer, row, first = Buffer(concat.output(0), 4 * prod(shape)), prod(shape[axis:]), 0
        for name in concat.inputs:
            index = parts[name]
            own = graph.shape(node.output(index), node).at(lowering.samples)
            if prod(own[:-1]) * row != prod(shape):
                break
            columns[index] = Tensor(buffer, own, columns=Columns(row, first, own[-1]))
            first += own[-1]
        if first == row and len(columns) == len(parts):
            found |= columns
    for index, tensor in found.items():
        lowering.tensors[node.output(index)] = tensor
    return found


def _end(graph: Graph, name: str) -> tuple[str, Node | None]:
    """Under which name, after any Reshape, a Concat alone reads the value; None if others do."""
    while name not in graph.gradients.values():
        readers = graph.consumers.get(name, [])
        if len(readers) != 1 or readers[0].op not in ("Reshape", "Concat"):
            break
        if readers[0].op == "Concat":
            return name, readers[0]
        name = readers[0].output(0)
    return name, None


def column_ints(columns: list[Columns | None], widths: list[int]) -> list[int]:
    """Attributes of a kernel whose operands may be columns; `widths` of those that are not."""
    if not any(columns):
        return []
    pairs = [(c.row, c.first) if c else (width, 0) for c, width in zip(columns, widths, strict=True)]
    return [value for pair in pairs for value in pair]
