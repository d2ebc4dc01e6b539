"""Runs what the front half of the exporter makes, in the user's layout, to compare it with the model that it was made
from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from edge_razor.exporters.capture import Captured, capture
from edge_razor.exporters.forward import Forward, build_forward
from tests.parity import randomize_norms
from tests.reference.graph_backward import OPERATORS, Run


def run_forward(forward: Forward, *inputs: Tensor) -> Tensor:
    """Output of the canonical graph in float64, user's layout; every stated shape is checked on the way."""
    graph = forward.model.graph
    run = Run(inputs[0].shape[0])
    for name, value in graph.initializers.items():
        assert value.const_value is not None
        data = value.const_value.numpy()
        run.values[name] = [int(i) for i in data.reshape(-1)] if data.dtype == np.int64 else torch.tensor(data).double()
    for value, order, data in zip(graph.inputs, forward.input_orders, inputs, strict=True):
        run.values[value.name or ""] = data.double().permute(order)
    for node in graph:
        operands = [None if v is None else run.values[v.name or ""] for v in node.inputs]
        for output, result in zip(node.outputs, OPERATORS[node.op_type](run, node, *operands), strict=False):
            check_shape(output, result, inputs[0].shape[0])
            run.values[output.name or ""] = result
    order = forward.output_order
    return run.values[graph.outputs[0].name or ""].permute([order.index(d) for d in range(len(order))])


def check_shape(value: ir.Value, data: Tensor, samples: int) -> None:
    assert value.shape is not None
    stated = [d if isinstance(d, int) else int(str(d).rpartition("*")[0] or 1) * samples for d in value.shape]
    assert list(data.shape) == stated, f"{value.name} is {list(data.shape)}, stated {value.shape}"


def run_inference(forward: Forward, *inputs: Tensor) -> Tensor:
    """Output of the inference graph in stock onnxruntime."""
    proto = ir.to_proto(forward.inference)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (output,) = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return torch.from_numpy(output)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """max|result − expected| / max|expected|."""
    assert result.shape == expected.shape, f"{tuple(result.shape)} instead of {tuple(expected.shape)}"
    return float((result - expected).abs().max() / expected.abs().max())


def check_model(model: nn.Module, *shapes: tuple[int, ...], seed: int = 0, **options: Any) -> Forward:
    """Exports ``model`` for inputs of these shapes (without batch) and compares both graphs with it, at batch sizes 1
    and 3. The canonical graph is run in float64 against the model in float64: what remains is the rounding of
    constants. Returns the graphs."""
    torch.manual_seed(seed)
    model = randomize_norms(model, seed).eval()
    forward = build_forward(captured(model, *shapes), **options)
    for samples in (1, 3):
        inputs = [torch.randn(samples, *shape) for shape in shapes]
        with torch.no_grad():
            expected = model(*inputs)
            exact = model.double()(*(x.double() for x in inputs))
            model.float()
        assert relative_error(run_forward(forward, *inputs), exact) <= 1e-6
        assert relative_error(run_inference(forward, *inputs), expected) <= 1e-5
    return forward


def captured(model: nn.Module, *shapes: tuple[int, ...], dropout: bool = False) -> Captured:
    return capture(model, tuple(torch.randn(2, *shape) for shape in shapes), dropout=dropout)


def ops(forward: Forward) -> list[str]:
    """Operator types of the canonical graph, in order."""
    return [node.op_type for node in forward.model.graph]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any, **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, data in parameters.items():
            self.register_parameter(name, nn.Parameter(data))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, **dict(self.named_parameters()))
