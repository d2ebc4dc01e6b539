"""The training graph as a file: writing it as a ModelProto, and the invariants of docs/training-graph.md."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from edge_razor.errors import BundleError
from edge_razor.exporters.graph_edit import DOMAIN
from edge_razor.exporters.schemas import register

__all__ = ["WEIGHTS_FILE", "to_proto", "validate"]

WEIGHTS_FILE = "weights.safetensors"
PHASES = ("forward", "loss", "backward")
BATCH_DIM = re.compile(r"([1-9][0-9]*\*)?N")
STANDARD = frozenset(
    "Add Sub Mul Div Neg Concat Split Slice Transpose Pad Reshape Softmax ReduceMean ReduceSum".split()
)


def to_proto(model: ir.Model) -> ModelProto:
    """The model without its weights: each floating-point initializer becomes a reference to ``weights.safetensors``.

    Offset and length are left to the writer of the bundle, who knows that file's layout. Integer initializers stay
    inline. The model itself is not changed, and no weight is copied.
    """
    copy = model.clone()
    for name, value in copy.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype.is_floating_point():
            dtype, shape = (value.dtype, value.shape) if tensor is None else (tensor.dtype, tensor.shape)
            assert dtype is not None and isinstance(shape, ir.Shape), f"initializer {name!r} has no type"
            value.const_value = ir.ExternalTensor(WEIGHTS_FILE, None, None, dtype, shape=shape, name=name)
    return ir.to_proto(copy)


def validate(model: ModelProto) -> None:
    """Checks everything that docs/training-graph.md promises.

    Raises:
        BundleError: what is wrong, with the name of the node or value.
    """
    register()
    for problem in _problems(model):
        raise BundleError(f"training graph: {problem}")


def _problems(model: ModelProto) -> Iterator[str]:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("", 0) != 20 or opsets.get(DOMAIN, 0) != 1:
        yield f"opsets are {opsets}, not 20 of ONNX and 1 of {DOMAIN}"
    yield from _operator_problems(model.graph)
    try:
        onnx.checker.check_model(_without_weights(model))
    except onnx.checker.ValidationError as error:
        yield str(error).strip()
    yield from _node_problems(model.graph)
    yield from _initializer_problems(model.graph)
    yield from _shape_problems(model.graph)
    yield from _kept_problems(model.graph)
    yield from _output_problems(model.graph)


def _without_weights(model: ModelProto) -> ModelProto:
    """A copy that the checker accepts before the weights exist: parameters are inputs, as ONNX allows."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            copy.graph.initializer.append(tensor)
    external = {value.name for value in copy.graph.input}
    infos = [info for info in copy.graph.value_info if info.name not in external]
    del copy.graph.value_info[:]
    copy.graph.value_info.extend(infos)
    return copy


def _operator_problems(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        known = node.op_type in STANDARD if not node.domain else node.domain == DOMAIN
        if not known or (node.domain and not onnx.defs.has(node.op_type, DOMAIN)):
            yield f"node {node.name!r}: no operator {node.domain or 'onnx'}::{node.op_type} in training graphs"


def _metadata(node: NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _node_problems(graph: GraphProto) -> Iterator[str]:
    names: set[str] = set()
    reached = 0
    for node in graph.node:
        if not node.name or node.name in names:
            yield f"node name {node.name!r} ({node.op_type}) is empty or used twice"
        names.add(node.name)
        metadata = _metadata(node)
        phase = metadata.get("phase")
        if phase not in PHASES or "layer" not in metadata:
            yield f"node {node.name!r}: metadata phase and layer are {phase!r}, {metadata.get('layer')!r}"
        elif PHASES.index(phase) < reached:
            yield f"node {node.name!r}: {phase} node after a {PHASES[reached]} node"
        else:
            reached = PHASES.index(phase)


def _initializer_problems(graph: GraphProto) -> Iterator[str]:
    for tensor in graph.initializer:
        external = tensor.data_location == TensorProto.EXTERNAL
        if tensor.data_type == TensorProto.INT64:
            if external:
                yield f"initializer {tensor.name!r}: int64 constants are inline"
            continue
        if tensor.data_type != TensorProto.FLOAT:
            yield f"initializer {tensor.name!r}: {TensorProto.DataType.Name(tensor.data_type)}, not FLOAT or INT64"
        locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if not external or locations != [WEIGHTS_FILE]:
            yield f"initializer {tensor.name!r}: float data belongs into {WEIGHTS_FILE}"


def _dims(value: ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _shape_problems(graph: GraphProto) -> Iterator[str]:
    values = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    for value in graph.input:
        shape = _dims(value)
        if not shape or not isinstance(shape[0], str):
            yield f"input {value.name!r}: shape {shape} has no batch dimension"
    for node in graph.node:
        for name in node.output:
            if not name:
                continue
            value = values.get(name)
            if value is None or not value.type.tensor_type.HasField("shape"):
                yield f"node {node.name!r}: output {name!r} has no shape"
                continue
            if value.type.tensor_type.elem_type == TensorProto.UINT8:
                continue
            shape = _dims(value)
            symbols_right = all(
                isinstance(d, int) or (axis == 0 and BATCH_DIM.fullmatch(d)) for axis, d in enumerate(shape)
            )
            if value.type.tensor_type.elem_type != TensorProto.FLOAT or not symbols_right:
                yield f"node {node.name!r}: output {name!r} is not float32 of shape [a*N, integers…]: {shape}"


def _kept_problems(graph: GraphProto) -> Iterator[str]:
    kept = {v.name for v in (*graph.value_info, *graph.output) if v.type.tensor_type.elem_type == TensorProto.UINT8}
    for name in sorted(kept):
        if not name.startswith("kept/"):
            yield f"value {name!r}: a uint8 value is called kept/…"
    used: set[str] = set()
    for node in graph.node:
        operands = kept.intersection(node.input)
        used |= operands
        if operands and _metadata(node).get("phase") != "backward":
            yield f"node {node.name!r}: reads kept value {min(operands)!r}, but is no backward node"
    for name in sorted(kept - used):
        yield f"value {name!r} is kept, but no backward node reads it"


def _output_problems(graph: GraphProto) -> Iterator[str]:
    outputs = {v.name: v for v in graph.output}
    loss = outputs.get("loss")
    if loss is None or _dims(loss):
        yield "output 'loss' is missing or no scalar"
    if "target" not in {v.name for v in graph.input}:
        yield "input 'target' is missing"
    parameters = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    gradients = [name for name in outputs if name.startswith("grad/")]
    if not gradients:
        yield "no output grad/<parameter>: nothing trains"
    for name in gradients:
        parameter = name.removeprefix("grad/")
        if parameters.get(parameter) != _dims(outputs[name]):
            yield f"output {name!r} has shape {_dims(outputs[name])}, its parameter {parameters.get(parameter)}"
