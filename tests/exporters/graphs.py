"""Builds small forward graphs by hand, as the exporter's front half would hand them over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edge_razor.exporters.differentiate import differentiate
from edge_razor.exporters.graph_edit import DOMAIN
from edge_razor.exporters.razor import insert_packs
from tests.reference.graph_backward import OPERATORS, Result, Run, run_training_graph

STANDARD = frozenset(
    "Add Sub Mul Div Neg Concat Split Slice Transpose Pad Reshape Softmax ReduceMean ReduceSum".split()
)
N = 3  # samples of every test batch


class Builder:
    """A forward graph that grows op by op; shapes come from running each op on example data of N samples."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 20, DOMAIN: 1}, name="test")
        self.params: dict[str, np.ndarray] = {}
        self.inputs: dict[str, np.ndarray] = {}
        self.examples: dict[ir.Value, Any] = {}

    def input(self, *shape: int, name: str = "input") -> ir.Value:
        """An input of [N, *shape] with random data."""
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", *shape]))
        self.graph.inputs.append(value)
        self.inputs[name] = self.rng.standard_normal((N, *shape))
        self.examples[value] = torch.from_numpy(self.inputs[name])
        return value

    def param(self, name: str, *shape: int, positive: bool = False) -> ir.Value:
        """A parameter with random data."""
        data = self.rng.uniform(0.5, 1.5, shape) if positive else self.rng.standard_normal(shape) / 2
        self.params[name] = np.asarray(data)
        tensor = ir.tensor(self.params[name].astype(np.float32), name=name)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape), const_value=tensor)
        value.meta["parameter"] = True
        self.graph.register_initializer(value)
        self.examples[value] = torch.from_numpy(self.params[name])
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """An inline constant."""
        name = f"c{len(self.graph.initializers)}"
        tensor = ir.tensor(np.array(numbers, dtype=np.int64), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(numbers)]), const_value=tensor
        )
        self.graph.register_initializer(value)
        self.examples[value] = list(numbers)
        return value

    def ops(self, op: str, *inputs: ir.Value | None, outputs: int = 1, layer: str = "", **attributes: Any) -> list:
        """A node and its outputs."""
        values = [ir.Value(type=ir.TensorType(ir.DataType.FLOAT)) for _ in range(outputs)]
        domain = "" if op in STANDARD else DOMAIN
        node = ir.node(op, list(inputs), attributes, domain=domain, outputs=values)
        node.name = f"{op}_{len(self.graph)}"
        node.metadata_props["layer"] = layer or node.name
        operands = [None if v is None else self.examples[v] for v in inputs]
        results = OPERATORS[op](Run(N), node, *operands)
        batched = any(
            v is not None and v.shape is not None and isinstance(v.shape[0], ir.SymbolicDim)
            for v in inputs
            if v is not None and v.shape is not None and len(v.shape)
        )
        for index, (value, result) in enumerate(zip(values, results, strict=False)):
            value.name = f"v{len(self.graph)}" if index == 0 else f"v{len(self.graph)}_{index}"
            shape: list[Any] = list(result.shape)
            if batched:
                multiple = shape[0] // N
                shape[0] = ir.SymbolicDim("N" if multiple == 1 else f"{multiple}*N")
            value.shape = ir.Shape(shape)
            self.examples[value] = result
        self.graph.append(node)
        return values

    def op(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node with one output."""
        return self.ops(op, *inputs, **attributes)[0]

    def batch_norm(self, name: str, channels: int, bias: ir.Value | None = None) -> list[ir.Value]:
        """(scale, shift) of a frozen BatchNorm."""
        operands = [
            self.param(f"{name}.weight", channels),
            self.param(f"{name}.bias", channels),
            self.param(f"{name}.running_mean", channels),
            self.param(f"{name}.running_var", channels, positive=True),
            bias,
        ]
        return self.ops("BatchNormFold", *operands, outputs=2, layer=name, epsilon=1e-3)

    def conv(self, name: str, x: ir.Value, out: int, kernel: int = 1, *, bn: bool = False, bias: bool = False,
             **attributes: Any) -> ir.Value:  # fmt: skip
        """A convolution with 'same' padding unless told, with BatchNorm and bias as asked."""
        channels = int(self.examples[x].shape[-1]) // attributes.get("group", 1)
        attributes = {"pads": [kernel // 2] * 4} | attributes
        w = self.param(f"{name}.weight", out, channels, kernel, kernel)
        b = self.param(f"{name}.bias", out) if bias else None
        scale, shift = self.batch_norm(f"{name}_bn", out, b) if bn else (None, b)
        return self.op("Conv", x, w, scale, shift, layer=name, **attributes)

    def linear(self, name: str, x: ir.Value, out: int, **attributes: Any) -> ir.Value:
        """A linear layer with bias."""
        columns = int(self.examples[x].shape[-1])
        shape = (out, columns) if attributes.get("transW", 1) else (columns, out)
        w, b = self.param(f"{name}.weight", *shape), self.param(f"{name}.bias", out)
        return self.op("Linear", x, w, None, b, layer=name, **attributes)

    def model(self, output: ir.Value) -> ir.Model:
        """The finished forward graph."""
        self.graph.outputs.append(output)
        return ir.Model(self.graph, ir_version=10)

    def trainable(self) -> list[str]:
        """Every parameter but statistics."""
        return [name for name in self.params if "running" not in name]

    def target(self, output: ir.Value, loss: str) -> np.ndarray:
        """A random target for ``output``."""
        shape = tuple(self.examples[output].shape)
        if loss == "cross_entropy":
            return self.rng.integers(0, shape[-1], shape[:-1])
        return self.rng.uniform(0, 1, shape)


def train(
    builder: Builder,
    output: ir.Value,
    *,
    loss: str = "mse",
    trainable: Sequence[str] | None = None,
    packs: bool = True,
    **options: Any,
) -> tuple[ir.Model, Result]:
    """Differentiates the graph that ends in ``output`` and runs it once, with torch's autograd beside it."""
    target = builder.target(output, loss)
    specification: Mapping[str, object] = {"name": loss, "label_smoothing": options.pop("label_smoothing", 0.0)}
    model = differentiate(builder.model(output), specification, trainable or builder.trainable())
    if packs:
        model = insert_packs(model)
    result = run_training_graph(model, builder.inputs, target, builder.params, autograd=True, **options)
    return model, result


def assert_equal_gradients(result: Result, tolerance: float = 1e-9) -> None:
    """Gradients of the backward nodes equal autograd's: float64 leaves only summation order."""
    assert result.gradients.keys() == result.autograd.keys()
    for name, expected in result.autograd.items():
        actual = result.gradients[name]
        assert actual.shape == expected.shape, name
        size = float(expected.abs().max())
        assert size > 0, f"{name}: a gradient of zero proves nothing"
        error = float((actual - expected).abs().max())
        assert error <= tolerance * size, f"{name}: off by {error:.3g} of {size:.3g}"


def op_types(model: ir.Model, phase: str | None = None) -> list[str]:
    """Operators in order."""
    return [n.op_type for n in model.graph if phase is None or n.metadata_props["phase"] == phase]
