"""``export``: the bundle that it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.numpy
import torch
from torch import nn

import edge_razor
from edge_razor.errors import BundleError, UsageError
from tests.exporters.onnx_models import X4, onnx_model, save


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 36, 5),
    )


EXAMPLE = torch.zeros(1, 3, 8, 8)


def manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "bundle.json").read_text())


def test_bundle_holds_graphs_weights_and_their_description(tmp_path: Path) -> None:
    model = small()
    path = edge_razor.export(model, EXAMPLE, tmp_path / "m.razor", classes=list("abcde"), trainable="last:1")
    content = manifest(path)
    assert content["inputs"] == [
        {"name": "input", "dtype": "float32", "indices": False, "shape": [None, 3, 8, 8], "perm": [0, 2, 3, 1]}
    ]
    assert (content["output"]["shape"], content["output"]["perm"]) == ([None, 5], [0, 1])
    assert content["loss"] == {"name": "cross_entropy", "label_smoothing": 0.0}
    assert content["trainable"] == {"spec": "last:1", "parameters": ["5.weight", "5.bias"]}
    assert content["state_dict"] == list(model.state_dict())
    assert (content["aliases"], content["classes"], content["preprocessing"]) == ({}, list("abcde"), None)
    weights = safetensors.numpy.load_file(path / "weights.safetensors")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(weights[name], tensor.numpy())
    training = onnx.load(path / "training.onnx", load_external_data=False)
    assert [o.name for o in training.graph.output] == [
        content["output"]["name"],
        "loss",
        "grad/5.weight",
        "grad/5.bias",
    ]


def test_inference_graph_of_the_bundle_runs_in_stock_onnxruntime(tmp_path: Path) -> None:
    model = small().eval()
    path = edge_razor.export(model, EXAMPLE, tmp_path / "m.razor")
    session = onnxruntime.InferenceSession(path / "inference.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(3, 3, 8, 8)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_weights_are_outside_of_both_graphs(tmp_path: Path) -> None:
    path = edge_razor.export(small(), EXAMPLE, tmp_path / "m.razor")
    for name in ("training.onnx", "inference.onnx"):
        graph = onnx.load(path / name, load_external_data=False).graph
        inline = [
            t.name for t in graph.initializer if t.data_location != t.EXTERNAL and t.data_type == onnx.TensorProto.FLOAT
        ]
        assert inline == []


def test_onnx_file_exports_too(tmp_path: Path) -> None:
    body = "c = Conv(x, w, b) r = Relu(c) f = Flatten(r) y = Gemm <transB = 1> (f, v)"
    source = save(onnx_model(body, X4, "float[N,5] y", w=(3, 4, 3, 3), b=(3,), v=(5, 36)), tmp_path)
    path = edge_razor.export(source, None, tmp_path / "m.razor", loss="mse", trainable="head")
    content = manifest(path)
    assert content["trainable"]["parameters"] == ["v"]
    assert content["state_dict"] == ["w", "b", "v"]


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    path = edge_razor.export(model, torch.zeros(2, 4), tmp_path / "m.razor")
    assert manifest(path)["aliases"] == {"1.weight": "0.weight"}
    assert "1.weight" not in safetensors.numpy.load_file(path / "weights.safetensors")


def test_parameters_that_nothing_reads_stay_in_the_state_dict(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.unused = nn.Parameter(torch.ones(3))
    path = edge_razor.export(model, torch.zeros(2, 4), tmp_path / "m.razor")
    content = manifest(path)
    assert "unused" in content["state_dict"]
    assert "unused" not in content["trainable"]["parameters"]
    assert safetensors.numpy.load_file(path / "weights.safetensors")["unused"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"label_smoothing": 0.1, "loss": "mse"}, "cross_entropy only"),
        ({"classes": ["a", "b"]}, "2 class names.*5 classes"),
        ({"classes": ["a", "a", "b", "c", "d"]}, "same name"),
        ({"classes": "abcde"}, "list of names"),
        ({"trainable": "nothing.*"}, "nothing"),
    ],
)
def test_wrong_options(options: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=what):
        edge_razor.export(small(), EXAMPLE, tmp_path / "m.razor", **options)
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(BundleError, match="precious"):
        edge_razor.export(small(), EXAMPLE, tmp_path / "precious")
