"""One position of each sample, chosen by its tokens or its mask (the last token before the padding) → SelectPosition.

Classifiers on top of causal language models take the logits of the last token that is no padding. Libraries find it
in ever new ways; like masks, it is recognized by its values (`masks`). In ``inference.onnx`` it becomes one spelling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edge_razor.errors import UnsupportedOpError
from edge_razor.exporters.graph_edit import DOMAIN, AttributeValue, constant, dims, make_node, remove_dead, replace

Array = np.ndarray

_MARK = "edge_razor.position"  # metadata of a GatherND: kind and number of a Position


class Position(NamedTuple):
    """Of the positions of ``source`` [N, T] that do not hold ``number``: ``last``, the last one, 0 if there is none;
    ``count``, the one whose index is their number less one, which is the last position if there is none."""

    source: ir.Value
    kind: str
    number: int

    def of(self, tokens: Array) -> Array:
        """[N] for tokens or a mask [N, T].

        >>> tokens = np.array([[5, 0, 6, 0], [0, 0, 0, 0]])
        >>> Position(ir.Value(name="ids"), "last", 0).of(tokens), Position(ir.Value(name="ids"), "count", 0).of(tokens)
        (array([2, 0]), array([1, 3]))
        """
        other, size = tokens != self.number, tokens.shape[1]
        if self.kind == "last":
            return np.asarray((other * np.arange(size)).argmax(axis=1))
        return np.asarray((other.sum(axis=1) - 1) % size)


def recognize_position(
    found: Sequence[Array], sources: Mapping[ir.Value, Sequence[Array]], numbers: Sequence[int]
) -> Position | None:
    """What an index pair (sample, position) [N, 2] means that was found for each of some inputs; None if nothing known.

    Args:
        numbers: what may stand for padding.
    """
    if any(a.ndim != 2 or a.shape[1] != 2 or a.dtype.kind != "i" for a in found):
        return None
    if any(not np.array_equal(a[:, 0], np.arange(len(a))) for a in found):
        return None
    for source, arrays in sources.items():
        if any(a.ndim != 2 for a in arrays):
            continue
        for kind in ("last", "count"):
            for number in dict.fromkeys((0, *numbers)):
                position = Position(source, kind, number)
                pairs = zip(arrays, found, strict=True)
                if all(np.array_equal(position.of(a), index[:, 1] % a.shape[1]) for a, index in pairs):
                    return position
    return None


def rewrite_position(graph: ir.Graph, indices: ir.Value, position: Position) -> bool:
    """GatherND by ``indices`` reads the one spelling of ``position`` instead; False if something else reads them."""
    readers = [use.node for use in indices.uses()]
    if any(node.op_type != "GatherND" or node.attributes.get_int("batch_dims", 0) for node in readers):
        return False
    source, stem = position.source, str(indices.name)
    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, dtype: ir.DataType = ir.DataType.INT64, **attributes: int) -> ir.Value:
        output = ir.Value(name=f"{stem}/{op_type}{len(nodes)}", type=ir.TensorType(dtype))
        nodes.append(ir.node(op_type, list(inputs), attributes, outputs=[output]))
        nodes[-1].name = output.name
        return output

    def const(data: int | list[int]) -> ir.Value:
        return constant(graph, np.array(data, np.int64), f"{stem}/const")

    tokens = source if source.dtype == ir.DataType.INT64 else add("Cast", source, to=int(ir.DataType.INT64))
    same = add("Equal", tokens, const(position.number), dtype=ir.DataType.BOOL)
    other = add("Cast", add("Not", same, dtype=ir.DataType.BOOL), to=int(ir.DataType.INT64))
    if position.kind == "last":
        size = source.shape[1] if source.shape is not None else 0
        assert isinstance(size, int)
        index = add("ArgMax", add("Mul", other, const(list(range(size)))), axis=1, keepdims=1)
    else:
        index = add("Sub", add("ReduceSum", other, const([1]), keepdims=1), const(1))
    graph.insert_before(readers[0], nodes)
    for node in readers:
        node.replace_input_with(1, index)
        node.attributes["batch_dims"] = ir.AttrInt64("batch_dims", 1)
        node.metadata_props[_MARK] = f"{position.kind}:{position.number}:{source.name}"
        for made in nodes:
            made.metadata_props["layer"] = node.metadata_props.get("layer", "")
    return True


def refuse_position(indices: ir.Value) -> None:
    """
    Raises:
        UnsupportedOpError: a GatherND reads ``indices``, which are no known `Position`.
    """
    for node in (use.node for use in indices.uses()):
        if node.op_type == "GatherND" and not node.domain and _MARK not in node.metadata_props:
            raise UnsupportedOpError(
                f"{node.name}: GatherND selects positions by the model's integer inputs in a way that is not known; "
                "known are the last token that is no padding, and the length of the mask less one",
                ((str(node.name), "GatherND", ""),),
            )


def select_positions(model: ir.Model) -> ir.Model:
    """GatherND that `rewrite_position` has marked → SelectPosition; the chains that made its indices go."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    for node in list(graph):
        kind, _, rest = node.metadata_props.get(_MARK, "").partition(":")
        data = node.inputs[0] if node.inputs else None
        if not kind or data is None:
            continue
        if len(dims(data)) != 3:
            node.meta["why"] = "selects a position of each sample; only of [N, positions, columns] it may"
            continue
        number, _, source = rest.partition(":")
        attributes: dict[str, AttributeValue] = {"kind": kind, "number": int(number)}
        shapes = [dims(node.outputs[0])]
        replace(
            node,
            [make_node("SelectPosition", [data, inputs[source]], attributes, domain=DOMAIN, shapes=shapes, like=node)],
        )
    remove_dead(graph)
    return model
