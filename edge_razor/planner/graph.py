"""The training graph as plain typed data, read from `training.onnx` (docs/training-graph.md).

The file is untrusted: everything that lowering relies on is checked here or fails in `Node.fail` with the node's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

from edge_razor.errors import BundleError

__all__ = ["Graph", "Initializer", "Node", "Shape", "read_graph"]

DOMAIN = "ai.edge_razor"
_BATCH = re.compile(r"(?:([1-9]\d{0,5})\s*\*\s*)?N")
_MAX_ELEMENTS = 2**40  # of one value at batch 1: far above any device, far below what overflows 64-bit sizes


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a value: `batch` = a for a first dimension of a·N samples, 0 for a shape without a batch dimension.

    `dims` are the dimensions after the batch dimension, or all of them if there is none.
    """

    batch: int
    dims: tuple[int, ...]

    def at(self, samples: int) -> tuple[int, ...]:
        """The concrete shape for `samples` samples."""
        return (self.batch * samples, *self.dims) if self.batch else self.dims

    @property
    def sample_elements(self) -> int:
        """Elements of one sample."""
        return max(self.batch, 1) * prod(self.dims)

    def __str__(self) -> str:
        first = [] if not self.batch else ["N" if self.batch == 1 else f"{self.batch}*N"]
        return "[" + ", ".join(first + [str(d) for d in self.dims]) + "]"


@dataclass(frozen=True, slots=True)
class Initializer:
    """A parameter or constant in its torch shape; `data` if that is inline (int64 axes and shapes, single floats)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: tuple[int, ...] | tuple[float, ...] | None


@dataclass(slots=True)
class Node:
    """One node. Optional inputs and outputs that are left out are the empty string or missing at the end."""

    name: str
    op: str
    domain: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    phase: str
    layer: str

    def input(self, index: int) -> str:
        return self.inputs[index] if index < len(self.inputs) else ""

    def output(self, index: int) -> str:
        return self.outputs[index] if index < len(self.outputs) else ""

    def integers(self, name: str, default: list[int] | None = None) -> list[int]:
        """A list-of-ints attribute."""
        value = self.attributes.get(name, default)
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            self.fail(f"attribute {name} must be a list of integers, not {value!r}")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            self.fail(f"attribute {name} must be an integer, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.attributes.get(name, default)
        if not isinstance(value, (int, float)):
            self.fail(f"attribute {name} must be a number, not {value!r}")
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self.attributes.get(name, default)
        if not isinstance(value, str):
            self.fail(f"attribute {name} must be a text, not {value!r}")
        return value

    def fail(self, reason: str) -> NoReturn:
        raise BundleError(f"training graph: node {self.name!r} ({self.op}): {reason}")


@dataclass(slots=True)
class Graph:
    """A training graph. `shapes` has the float values that are no initializers; `gradients` maps parameter → value."""

    inputs: list[str]
    output: str
    nodes: list[Node]
    shapes: dict[str, Shape]
    initializers: dict[str, Initializer]
    gradients: dict[str, str]
    consumers: dict[str, list[Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    self.consumers.setdefault(name, []).append(node)

    def shape(self, name: str, node: Node) -> Shape:
        """Shape of the value or initializer that `node` uses."""
        if name in self.initializers:
            return Shape(0, self.initializers[name].shape)
        if name not in self.shapes:
            node.fail(f"value {name!r} has no known shape")
        return self.shapes[name]

    def int_input(self, node: Node, index: int) -> list[int] | None:
        """The inline integers that a node takes as input `index`; None if the input is absent."""
        name = node.input(index)
        if not name:
            return None
        initializer = self.initializers.get(name)
        if initializer is None or initializer.dtype != "int64" or initializer.data is None:
            node.fail(f"input {name!r} must be an inline int64 initializer")
        return [int(v) for v in initializer.data]

    def restricted(self, trainable: list[str] | None) -> Graph:
        """This graph with gradients for `trainable` only (None: all), without the nodes that nothing then needs."""
        gradients = {p: g for p, g in self.gradients.items() if trainable is None or p in trainable}
        needed = set(gradients.values())
        nodes: list[Node] = []
        for node in reversed(self.nodes):
            if node.phase == "loss" or any(o in needed for o in node.outputs if o):
                needed.update(i for i in node.inputs if i)
                nodes.append(node)
        return Graph(self.inputs, self.output, nodes[::-1], self.shapes, self.initializers, gradients)

    def inference(self) -> Graph:
        """The forward nodes that the model output needs, without what they keep for the backward pass."""
        needed = {self.output}
        nodes: list[Node] = []
        for node in reversed(self.nodes):
            if node.phase == "forward" and node.output(0) in needed:
                needed.update(i for i in node.inputs if i)
                nodes.append(node)
        inputs = [i for i in self.inputs if i != "target"]
        return Graph(inputs, self.output, nodes[::-1], self.shapes, self.initializers, {})


def read_graph(data: bytes, output: str) -> Graph:
    """Parses `training.onnx`; `output` is the model output's name.

    Raises:
        BundleError: the data is no ONNX model or breaks a convention of docs/training-graph.md.
    """
    import onnx  # only while planning: the training process never pays for it
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise BundleError(f"training graph: not an ONNX model: {error}") from error
    domains = {o.domain: o.version for o in model.opset_import}
    if domains.get(DOMAIN) != 1 or not 18 <= domains.get("", 20) <= 20:
        raise BundleError(f"training graph: needs {DOMAIN} 1 and ONNX opset 18 to 20, has {domains}")
    proto = model.graph
    _check_names(proto)
    initializers = {t.name: _initializer(t) for t in proto.initializer}
    shapes: dict[str, Shape] = {}
    for info in (*proto.input, *proto.output, *proto.value_info):
        shape = _shape(info)
        if shape is not None:
            shapes[info.name] = shape
    inputs = [i.name for i in proto.input if i.name not in initializers]
    for name in inputs:
        if name not in shapes or shapes[name].batch != 1:
            raise BundleError(f"training graph: input {name!r} must have the first dimension N")
    if not inputs or inputs[-1] != "target":
        raise BundleError("training graph: the last input must be 'target'")
    outputs = [o.name for o in proto.output]
    if output not in outputs or "loss" not in outputs:
        raise BundleError(f"training graph: outputs must include {output!r} and 'loss', has {outputs[:4]}")
    gradients: dict[str, str] = {}
    for name in outputs:
        if name.startswith("grad/"):
            parameter = name.removeprefix("grad/")
            if parameter not in initializers or initializers[parameter].dtype != "float32":
                raise BundleError(f"training graph: {name!r} is the gradient of no float32 parameter")
            gradients[parameter] = name
    nodes = [_node(n, i) for i, n in enumerate(proto.node)]
    _check_order(nodes, set(inputs) | set(initializers), outputs)
    return Graph(inputs, output, nodes, shapes, initializers, gradients)


def _check_names(proto: Any) -> None:
    """Refuses texts that are no UTF-8: protobuf hands those out as bytes, which nothing after this expects."""
    infos = (*proto.input, *proto.output, *proto.value_info)
    names = [t.name for t in proto.initializer] + [i.name for i in infos]
    names += [d.dim_param for i in infos for d in i.type.tensor_type.shape.dim]
    for node in proto.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [a.name for a in node.attribute] + [t for p in node.metadata_props for t in (p.key, p.value)]
    if not all(isinstance(name, str) for name in names):
        raise BundleError("training graph: a name is not valid UTF-8; the file is damaged")


def _initializer(tensor: Any) -> Initializer:
    import onnx

    dtypes = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
    dtype = dtypes.get(tensor.data_type)
    shape = tuple(int(d) for d in tensor.dims)
    if dtype is None or any(d < 1 for d in shape) and dtype == "float32" or prod(shape) > _MAX_ELEMENTS:
        raise BundleError(f"training graph: initializer {tensor.name!r} has an unsupported type or shape {list(shape)}")
    data = None
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        try:
            data = tuple(onnx.numpy_helper.to_array(tensor).reshape(-1).tolist())
        except (ValueError, TypeError) as error:
            raise BundleError(f"training graph: initializer {tensor.name!r} is damaged: {error}") from error
    return Initializer(tensor.name, dtype, shape, data)


def _shape(info: Any) -> Shape | None:
    """Shape of a float or label value; None for kept values and values without a stated shape."""
    import onnx

    tensor = info.type.tensor_type
    if tensor.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64) or not tensor.HasField("shape"):
        return None
    dims = list(tensor.shape.dim)
    batch = 0
    if dims and dims[0].dim_param:
        match = _BATCH.fullmatch(dims[0].dim_param)
        if not match:
            raise BundleError(f"training graph: {info.name!r}: first dimension {dims[0].dim_param!r} is not a*N")
        batch = int(match[1] or 1)
        dims = dims[1:]
    if any(d.dim_param or d.dim_value < 1 for d in dims) or len(dims) > 7:
        raise BundleError(f"training graph: {info.name!r}: only the first dimension may be symbolic, none may be empty")
    shape = Shape(batch, tuple(int(d.dim_value) for d in dims))
    if shape.sample_elements > _MAX_ELEMENTS:
        raise BundleError(f"training graph: {info.name!r}: shape {shape} is too large")
    return shape


def _attribute(proto: Any) -> Any:
    """An attribute's value: int, float, str, or a list of numbers; None for kinds that training graphs do not use."""
    kinds = {
        proto.INT: lambda: proto.i,
        proto.FLOAT: lambda: proto.f,
        proto.STRING: lambda: proto.s.decode("utf-8", "replace"),
        proto.INTS: lambda: list(proto.ints),
        proto.FLOATS: lambda: list(proto.floats),
    }
    return kinds[proto.type]() if proto.type in kinds else None


def _node(proto: Any, index: int) -> Node:
    attributes = {a.name: _attribute(a) for a in proto.attribute}
    meta = {p.key: p.value for p in proto.metadata_props}
    phase = meta.get("phase", "")
    name = proto.name or f"{proto.op_type}_{index}"
    if phase not in ("forward", "loss", "backward"):
        raise BundleError(f"training graph: node {name!r} has no phase (forward, loss or backward)")
    return Node(
        name,
        proto.op_type,
        proto.domain,
        list(proto.input),
        list(proto.output),
        attributes,
        phase,
        meta.get("layer", name),
    )


def _check_order(nodes: list[Node], defined: set[str], outputs: list[str]) -> None:
    for node in nodes:
        for name in node.inputs:
            if name and name not in defined:
                node.fail(f"input {name!r} is not defined before it is used")
        for name in node.outputs:
            if name and name in defined:
                node.fail(f"output {name!r} is defined twice")
            if name:
                defined.add(name)
    for name in outputs:
        if name not in defined:
            raise BundleError(f"training graph: output {name!r} is produced by no node")
