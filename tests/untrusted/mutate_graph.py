"""Altered copies of a training graph: still a protobuf message, with other attributes, shapes, names and nodes."""

from __future__ import annotations

from random import Random
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from .mutation import mutate_bytes

__all__ = ["mutate_graph"]

_INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 64, 2**20, 2**31, 2**46, 2**63 - 1)
_NUMBERS = (0.0, -1.0, 1e-9, 0.5, 1.0, 3e38, float("inf"), float("nan"))


def mutate_graph(data: bytes, random: Random) -> bytes:
    """One to three changes of the message; or of its bytes, once in eight and where they are no message any more."""
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError:
        return mutate_bytes(data, random)
    if random.random() < 1 / 8 or not model.graph.node:
        return mutate_bytes(data, random)
    for _ in range(random.randint(1, 3)):
        random.choice((_attribute, _attribute, _shape, _shape, _edge, _edge, _node))(model.graph, random)
    return bytes(model.SerializeToString())


def _attribute(graph: Any, random: Random) -> None:
    node = random.choice(graph.node)
    if not node.attribute:
        return
    attribute = random.choice(node.attribute)
    kind = random.randrange(6)
    if kind == 0:
        node.attribute.remove(attribute)
    elif attribute.ints:
        at = random.randrange(len(attribute.ints))
        attribute.ints[at] = random.choice(_INTEGERS)
        if kind == 1:
            attribute.ints.append(1)
        elif kind == 2:
            del attribute.ints[at]
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = random.choice(_NUMBERS)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = random.choice((b"", b"x", b"relu", b"\xff"))
    elif kind == 1:
        attribute.type = random.choice(
            (onnx.AttributeProto.FLOAT, onnx.AttributeProto.STRING, onnx.AttributeProto.INTS)
        )
    else:
        attribute.i = random.choice(_INTEGERS)


def _shape(graph: Any, random: Random) -> None:
    if graph.initializer and random.random() < 0.4:
        dims = random.choice(graph.initializer).dims
    else:
        dim = random.choice((*graph.input, *graph.output, *graph.value_info)).type.tensor_type.shape.dim
        if not dim:
            return
        if random.random() < 0.3:
            del dim[random.randrange(len(dim))]
        else:
            at = random.choice(dim)
            at.Clear()
            if random.random() < 0.3:
                at.dim_param = random.choice(("N", "2*N", "0*N", "99999999999999999999*N", "x"))
            else:
                at.dim_value = random.choice(_INTEGERS)
        return
    if dims and random.random() < 0.7:
        dims[random.randrange(len(dims))] = random.choice(_INTEGERS)
    else:
        dims.append(random.choice(_INTEGERS))


def _edge(graph: Any, random: Random) -> None:
    """An input or output of a node gets another one's name, or goes."""
    node = random.choice(graph.node)
    names = node.input if random.random() < 0.8 or not node.output else node.output
    if not names:
        return
    at = random.randrange(len(names))
    other = random.choice(graph.node)
    known = (*other.input, *other.output, *(t.name for t in graph.initializer), "")
    if random.random() < 0.2:
        del names[at]
    else:
        names[at] = random.choice(known)


def _node(graph: Any, random: Random) -> None:
    node, other = random.choice(graph.node), random.choice(graph.node)
    kind = random.randrange(5)
    if kind == 0:
        graph.node.remove(node)
    elif kind == 1:
        node.op_type = other.op_type
    elif kind == 2 and graph.output:
        graph.output.remove(random.choice(graph.output))
    elif kind == 3 and node.metadata_props:
        random.choice(node.metadata_props).value = random.choice(("forward", "loss", "backward", ""))
    else:
        graph.node.append(node)
