"""Front end for ``.onnx`` files: any opset, weights under the file's own names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from edge_razor.errors import BundleError, UsageError
from edge_razor.exporters.canonicalize.masks import INTEGER
from edge_razor.exporters.capture import OPSET, Captured, mark_parameters
from edge_razor.exporters.graph_edit import array, bypass, constant

# Operators that use an initializer of one element as a weight; elsewhere one number is a constant of the graph.
_WEIGHTED = ("Conv", "Gemm", "MatMul", "BatchNormalization")


def load_onnx(path: str | os.PathLike[str], example_inputs: Any = None, *, dropout: bool = True) -> Captured:
    """Reads an ONNX model for training.

    Args:
        example_inputs: arrays or tensors whose shapes fix dimensions that the file leaves free; None if only the batch
            is free.
        dropout: keep Dropout nodes for training.

    Every float32 initializer with more than one element is a parameter, under its name in the file.

    Raises:
        BundleError: the file cannot be read, or is no valid ONNX model.
        UsageError: inputs or weights other than float32, or a free dimension besides the batch.
    """
    proto = _read(Path(path))
    model = ir.serde.deserialize_model(proto)
    graph = model.graph
    # Files written before IR version 4 list weights as inputs, too.
    for value in [v for v in graph.inputs if v.name in graph.initializers]:
        graph.inputs.remove(value)
    _fix_inputs(graph, example_inputs)
    parameters = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise BundleError(f"{path}: initializer {name} has no data")
        if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
            raise UsageError(f"{path}: initializer {name} is {tensor.dtype.name}; training needs a float32 model")
        weighted = any(use.node.op_type in _WEIGHTED for use in value.uses())
        if tensor.dtype == ir.DataType.FLOAT and (tensor.size > 1 or weighted):
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(tensor.numpy().shape)
            parameters.append(name)
    mark_parameters(graph, parameters)
    for node in list(graph):
        node.metadata_props["layer"] = node.name or ""
        if node.op_type == "Dropout" and not node.domain:
            _dropout(graph, node, keep=dropout)
    return Captured(model, parameters)


def _read(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
        version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), OPSET)
        return onnx.version_converter.convert_version(proto, OPSET) if version < OPSET else proto
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise BundleError(f"{path} is not a valid ONNX model: {str(error).strip().splitlines()[0]}") from error


def _fix_inputs(graph: ir.Graph, example_inputs: Any) -> None:
    """Makes the first dimension of every input the batch, and all others integers."""
    examples: Sequence[Any] = ()
    if example_inputs is not None:
        examples = example_inputs if isinstance(example_inputs, list | tuple) else (example_inputs,)
        if len(examples) != len(graph.inputs):
            raise UsageError(f"the model has {len(graph.inputs)} inputs, but {len(examples)} examples are given")
    for position, value in enumerate(graph.inputs):
        if value.dtype not in (ir.DataType.FLOAT, *INTEGER):
            raise UsageError(
                f"input {value.name} is {value.dtype.name if value.dtype else 'untyped'}; training needs "
                "float32 inputs, or whole numbers that index a table or are masks"
            )
        sizes = list(value.shape or [])
        if examples:
            given = tuple(int(s) for s in examples[position].shape)
            if len(given) != len(sizes) or any(
                isinstance(s, int) and s != g for s, g in zip(sizes[1:], given[1:], strict=True)
            ):
                raise UsageError(f"input {value.name} has shape {value.shape}; the example has {given}")
            sizes = [sizes[0], *given[1:]]
        if len(sizes) < 2:
            raise UsageError(f"input {value.name} has shape {value.shape}; the first dimension must be a batch")
        free = [str(s) for s in sizes[1:] if not isinstance(s, int)]
        if free:
            raise UsageError(
                f"input {value.name} has shape {value.shape}; give the size of {', '.join(free)} (--input)"
            )
        if isinstance(sizes[0], int):
            _unfix_batch(graph, sizes[0])
        value.shape = ir.Shape([ir.SymbolicDim("N"), *(int(s) for s in sizes[1:] if isinstance(s, int))])


def _unfix_batch(graph: ir.Graph, batch: int) -> None:
    """A file for a fixed batch states it in its Reshapes, too: there it becomes free."""
    for node in graph:
        if node.op_type != "Reshape" or node.domain:
            continue
        shape = array(node.inputs[1])
        producer = node.inputs[1].producer() if node.inputs[1] is not None else None
        if shape is None and producer is not None and producer.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(producer.outputs[0])
            shape = None if tensor is None else tensor.numpy()
        if shape is None or shape.size == 0 or shape[0] != batch:
            continue
        # 0 copies the input's dimension, for shapes that infer another one already.
        free = 0 if (shape == -1).any() else -1
        node.replace_input_with(1, constant(graph, np.concatenate([[free], shape[1:]]).astype(np.int64)))


def _dropout(graph: ir.Graph, node: ir.Node, *, keep: bool) -> None:
    data = node.inputs[0]
    assert data is not None
    if not keep:
        bypass(node, data)
        return
    # With training_mode set constant folding lets it be.
    ratio = node.inputs[1] if len(node.inputs) > 1 else None
    node.resize_inputs(3)
    node.replace_input_with(1, ratio or constant(graph, np.array(0.5, np.float32)))
    node.replace_input_with(2, constant(graph, np.array(True)))
