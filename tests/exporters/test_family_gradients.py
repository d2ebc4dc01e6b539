"""Training graphs of whole networks: gradients equal torch's, exact and with packed values, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor, nn

from edge_razor.exporters.export import export
from tests.models import FAMILIES
from tests.reference.graph_backward import run_training_graph
from tests.reference.razor import razor
from tests.reference.torch_model import KeptModel

# Together they have every operator: squeeze-and-excite, dense connections, channel shuffle, layer scale, attention.
NAMES = ["mobilenet_v3_small", "densenet", "shufflenet_v2", "convnext", "vit"]
SAMPLES, CLASSES = 2, 5
# Attributes such as hard-sigmoid's 1/6 and a mean's 1/49 are float32 in the file.
TOLERANCE = 1e-6


def no_dropout(ratio: float, stream: int, shape: Sequence[int]) -> Tensor:
    """A mask that undoes the scaling by 1/(1 − ratio), as torch's eval mode has no dropout."""
    return torch.full(tuple(shape), 1.0 - ratio, dtype=torch.float64)


def torch_gradients(model: nn.Module, run: nn.Module | KeptModel, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(run(x), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_family(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name](num_classes=CLASSES).eval()
    x, labels = torch.randn(SAMPLES, 3, 64, 64), torch.randint(0, CLASSES, (SAMPLES,))
    export(model, x, tmp_path / "bundle")
    graph = onnx.load(str(tmp_path / "bundle" / "training.onnx"), load_external_data=False)
    weights = load_file(tmp_path / "bundle" / "weights.safetensors")
    inputs = {graph.graph.input[0].name: x.permute(0, 2, 3, 1).to(torch.float64)}
    double = copy.deepcopy(model).to(torch.float64)

    def keep(rows: Tensor) -> Tensor:
        return torch.from_numpy(np.array(razor(rows.to(torch.float32).numpy(), 0.9))).to(rows.dtype)

    for sparsity, run in ((0.0, double), (0.9, KeptModel(double, keep))):
        expected = torch_gradients(double, run, x.to(torch.float64), labels)
        result = run_training_graph(graph, inputs, labels, weights, sparsity=sparsity, mask=no_dropout)
        assert result.gradients.keys() == expected.keys()
        for parameter, gradient in expected.items():
            error = float((result.gradients[parameter] - gradient).abs().max() / gradient.abs().max())
            assert error <= TOLERANCE, f"{parameter} at sparsity {sparsity}: off by {error:.2g}"
