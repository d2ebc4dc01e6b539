"""ONNX models written as text; the exporter's graphs must compute what stock onnxruntime computes from the file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import torch

from edge_razor.exporters.forward import Forward, build_forward
from edge_razor.exporters.load_onnx import load_onnx
from tests.exporters.forward_reference import relative_error, run_forward, run_inference


def onnx_model(
    body: str, inputs: str, outputs: str, opset: int = 20, seed: int = 0, **weights: tuple[int, ...]
) -> onnx.ModelProto:
    """``body`` in ONNX's text syntax; ``weights`` are float32 initializers of these shapes with random data."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    model = onnx.parser.parse_model(f"{head} test ({inputs}) => ({outputs}) {{ {body} }}")
    rng = np.random.default_rng(seed)
    for name, shape in weights.items():
        data = (
            rng.uniform(0.3, 1.0, shape) * np.where(rng.random(shape) < 0.5, -1, 1)
            if name[0] != "p"
            else rng.uniform(0.5, 1.5, shape)
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(data, np.float32), name))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def save(model: onnx.ModelProto, directory: str | Path, name: str = "model.onnx") -> Path:
    path = Path(directory) / name
    onnx.save(model, path)
    return path


def check_onnx(model: onnx.ModelProto, *, classes_last: bool = False, tolerance: float = 1e-5) -> Forward:
    """Compares the canonical and the inference graph with the file, at batch sizes 1 and 3 (or the file's own)."""
    with tempfile.TemporaryDirectory() as directory:
        forward = build_forward(load_onnx(save(model, directory), dropout=False), classes_last=classes_last)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for samples in (1, 3):
        inputs, feed = [], {}
        for value in session.get_inputs():
            batch = value.shape[0] if isinstance(value.shape[0], int) else samples
            inputs.append(torch.randn(batch, *value.shape[1:], generator=generator) * 2)
            feed[value.name] = inputs[-1].numpy()
        (expected,) = session.run(None, feed)
        assert relative_error(run_forward(forward, *inputs), torch.from_numpy(expected)) <= tolerance
        assert relative_error(run_inference(forward, *inputs), torch.from_numpy(expected)) <= tolerance
    return forward


X4 = "float[N,4,6,5] x"
"""An image input whose sizes are all different."""


def check_body(body: str, output: str, inputs: str = X4, opset: int = 20, **weights: tuple[int, ...]) -> Forward:
    """`check_onnx` of ``body``; ``output`` is the declaration of y, for example ``float[N,4,6,5] y``."""
    return check_onnx(onnx_model(body, inputs, output, opset, **weights))
