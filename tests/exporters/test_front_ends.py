"""torch modules and ONNX files as they come in: names, tied tensors, dropout, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edge_razor.errors import BundleError, UsageError
from edge_razor.exporters.capture import capture
from edge_razor.exporters.forward import build_forward
from edge_razor.exporters.load_onnx import load_onnx
from edge_razor.exporters.spec import load_spec
from tests.exporters.forward_reference import Function, captured, check_model, ops
from tests.exporters.onnx_models import X4, check_onnx, onnx_model, save


class Small(nn.Module):
    """Everything that a state dict can hold: buffers that the graph does not read, a frozen and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.conv.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.second(self.drop(self.first(x)))


def test_state_dict_comes_back_whole() -> None:
    model = Small()
    result = captured(model, (3, 8, 8))
    assert result.state_dict == list(model.state_dict())
    assert result.aliases == {"second.weight": "first.weight"}
    assert set(result.extra) == {"norm.num_batches_tracked"}
    for name in set(result.state_dict) - set(result.aliases) - set(result.extra):
        tensor = result.model.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), model.state_dict()[name].numpy())


def test_tied_weight_is_read_twice() -> None:
    forward = check_model(Small(), (3, 8, 8))
    readers = [n for n in forward.model.graph for v in n.inputs if v is not None and v.name == "first.weight"]
    assert [node.op_type for node in readers] == ["Linear", "Linear"]


def test_dropout_is_kept_for_training_and_absent_from_inference() -> None:
    forward = build_forward(captured(Small(), (3, 8, 8), dropout=True))
    (node,) = [n for n in forward.model.graph if n.op_type == "Dropout"]
    assert node.attributes["ratio"].as_float() == pytest.approx(0.3)
    assert node.attributes["stream"].as_int() == 0
    assert node.metadata_props["layer"] == "drop"
    assert "Dropout" not in {n.op_type for n in forward.inference.graph}


def test_dropout_can_be_left_out() -> None:
    assert "Dropout" not in ops(build_forward(captured(Small(), (3, 8, 8), dropout=False)))


def test_every_dropout_has_a_stream_of_its_own() -> None:
    shared = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared, nn.Dropout(0.0), nn.Dropout(0.1))
    nodes = [n for n in build_forward(captured(model, (3,), dropout=True)).model.graph if n.op_type == "Dropout"]
    assert [n.attributes["stream"].as_int() for n in nodes] == [0, 1, 2]


def fails(x: Tensor) -> Tensor:
    raise ValueError("this model always fails")


@pytest.mark.parametrize("broken", [False, True])
def test_model_is_as_before(broken: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    if broken:
        model.append(Function(fails))
    model.train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if broken:
        with pytest.raises(UsageError, match="always fails"):
            captured(model, (3,), dropout=True)
    else:
        captured(model, (3,), dropout=True)
    assert [m.training for m in model.modules()][:4] == [True, True, True, False]
    assert "forward" not in model[1].__dict__
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("example", "what"),
    [
        ((), "empty"),
        (torch.zeros(2, 3, dtype=torch.float64), "float64"),
        (np.zeros((2, 3), np.float32), "ndarray"),
        (torch.zeros(3), "batch"),
        (torch.zeros(0, 3), "batch"),
    ],
)
def test_wrong_example_inputs(example: object, what: str) -> None:
    example = (example,) if isinstance(example, np.ndarray) else example
    with pytest.raises(UsageError, match=what):
        capture(nn.Linear(3, 3), example)


def test_half_precision_model_is_refused() -> None:
    with pytest.raises(UsageError, match="weight is torch.float16"):
        capture(nn.Linear(3, 3).half(), torch.zeros(2, 3))


def test_two_inputs() -> None:
    model = Function(lambda a, b, w: torch.relu(a * w) + b.mean((2, 3)), w=torch.randn(4))
    forward = check_model(model, (4,), (4, 5, 3))
    assert forward.input_orders == [(0, 1), (0, 2, 3, 1)]


def test_two_outputs_are_refused() -> None:
    with pytest.raises(UsageError, match="one output"):
        build_forward(captured(Function(lambda x: (x + 1, x * 2)), (3,)))


def test_names_of_the_training_graph_are_left_free() -> None:
    def forward(target: Tensor, w: Tensor) -> Tensor:
        loss = target * w
        return loss + 1

    graph = check_model(Function(forward, w=torch.randn(3)), (3,)).model.graph
    names = {v.name for v in graph.inputs} | {v.name for node in graph for v in node.outputs}
    assert not names & {"target", "loss"}


def test_classes_of_a_segmentation_model_come_last_at_run_time() -> None:
    """The output keeps the user's order [N, classes, H, W] in the manifest: only the order of storage is said."""
    forward = check_model(nn.Conv2d(3, 5, 1), (3, 4, 6), classes_last=True)
    assert forward.output_order == (0, 2, 3, 1)
    tokens = check_model(Function(lambda x: x.transpose(1, 2) * 2), (4, 6), classes_last=True)
    assert tokens.output_order == (0, 2, 1)


def test_layernorm_free_transformer_pieces() -> None:
    """Linear on tokens, BatchNorm over dimension 1 of rank 3."""
    check_model(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(8, 3)), (5, 6))


# ONNX files


def test_file_with_a_fixed_batch_becomes_free() -> None:
    body = "s = Constant <value_ints = [2, -1]> () r = Reshape(x, s) y = MatMul(r, w)"
    forward = check_onnx(onnx_model(body, "float[2,4,6,5] x", "float[2,3] y", w=(120, 3)))
    assert str(forward.model.graph.outputs[0].shape) == "[N,3]"


def test_free_image_size_is_asked_for_and_taken_from_an_example(tmp_path: Path) -> None:
    model = onnx_model("y = Conv(x, w)", "float[N,4,h,5] x", "float[N,3,k,l] y", w=(3, 4, 3, 3))
    path = save(model, tmp_path)
    with pytest.raises(UsageError, match="give the size of h"):
        load_onnx(path)
    forward = build_forward(load_onnx(path, np.zeros((1, 4, 9, 5), np.float32)))
    assert str(forward.model.graph.outputs[0].shape) == "[N,7,3,3]"
    with pytest.raises(UsageError, match="the example has"):
        load_onnx(path, np.zeros((1, 4, 9, 6), np.float32))


def test_dropout_of_a_file(tmp_path: Path) -> None:
    body = "r = Constant <value_float = 0.25> () d = Dropout(x, r) y = Relu(d)"
    path = save(onnx_model(body, X4, "float[N,4,6,5] y"), tmp_path)
    assert ops(build_forward(load_onnx(path))) == ["Dropout", "Affine"]
    assert ops(build_forward(load_onnx(path, dropout=False))) == ["Affine"]


def test_weights_keep_the_names_of_the_file(tmp_path: Path) -> None:
    path = save(onnx_model("y = Conv(x, w, b)", X4, "float[N,1,4,3] y", w=(1, 4, 3, 3), b=(1,)), tmp_path)
    assert load_onnx(path).state_dict == ["w", "b"]


@pytest.mark.parametrize("content", [b"", b"no model at all", None])
def test_unreadable_files(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match="model.onnx"):
        load_onnx(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = save(onnx_model("y = Conv(x, w)", X4, "float[N,3,4,3] y", w=(3, 4, 3, 3)), tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BundleError, match="not a valid ONNX model"):
        load_onnx(path)


def test_half_precision_file_is_refused(tmp_path: Path) -> None:
    model = onnx_model("y = Relu(x)", X4, "float[N,4,6,5] y")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3, np.float16), "w"))
    with pytest.raises(UsageError, match="w is FLOAT16"):
        load_onnx(save(model, tmp_path))


# The command line's SPEC


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "spec_models.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Linear(2, 2)\n"
        "def number():\n    return 3\n"
        "def broken():\n    raise KeyError('lost')\n"
        "ready = nn.Linear(2, 2)\nconstant = 5\n"
    )
    (tmp_path / "spec_syntax.py").write_text("def net(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", __import__("sys").path[:])
    return tmp_path


def test_spec_finds_a_factory_in_the_current_directory(package: Path) -> None:
    assert isinstance(load_spec("spec_models:net"), nn.Linear)
    assert isinstance(load_spec("spec_models:ready"), nn.Linear)


def test_spec_of_a_file(package: Path) -> None:
    (package / "a.onnx").touch()
    assert load_spec("a.onnx") == Path("a.onnx")


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("missing.onnx", "no such file"),
        ("spec_models", "neither"),
        ("spec_models:", "neither"),
        ("no_such_module:net", "cannot import"),
        ("spec_models:nothing", "has no 'nothing'"),
        ("spec_models:number", "returned a int"),
        ("spec_models:broken", "KeyError"),
        ("spec_models:constant", "must be a function"),
        ("spec_syntax:net", "SyntaxError"),
    ],
)
def test_wrong_specs(spec: str, what: str, package: Path) -> None:
    with pytest.raises(UsageError, match=what):
        load_spec(spec)
