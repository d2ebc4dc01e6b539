"""The variants of PyTorch and onnxruntime-training: the same function, and honest counts of what they keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks.systems.ort_training import fold_frozen_batch_norms
from benchmarks.systems.pytorch import Checkpointed, checkpoint_blocks, kept_bytes
from tests.parity import export_model
from tests.text_models import MODELS, TOKENS, batch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(10, 10), nn.Sigmoid(), nn.Linear(10, 10), nn.Sigmoid()) for _ in range(3)]
    return nn.Sequential(*blocks)


def test_kept_bytes_count_each_storage_once_and_no_parameter() -> None:
    model = network()
    x = torch.randn(4, 10)
    # Saved: x, and the output of each of six sigmoids, which the next layer saves as its input too. x is left out.
    found = kept_bytes(lambda: model(x).sum(), [*model.parameters(), x], [])
    assert found == 6 * 4 * 10 * 4


def test_checkpointing_keeps_the_blocks_inputs_and_gives_the_same_gradients() -> None:
    x = torch.randn(4, 10)
    plain, checkpointed = network(), network()
    inputs = checkpoint_blocks(checkpointed)
    assert all(isinstance(block, Checkpointed) for block in checkpointed)
    tensors = [*checkpointed.parameters(), x]
    assert kept_bytes(lambda: checkpointed(x).sum(), tensors, inputs) == 2 * 4 * 10 * 4
    assert len(inputs) == 3
    for model in (plain, checkpointed):
        model(x).sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", ["bert", "mean_pooled", "vit"])
def test_checkpointing_of_transformers_keeps_the_layers_inputs_and_gives_the_same_gradients(name: str) -> None:
    inputs, _ = batch(name, 3)
    plain, checkpointed = MODELS[name]("sdpa"), MODELS[name]("sdpa")
    kept = checkpoint_blocks(checkpointed)
    layers = [module for module in checkpointed.modules() if isinstance(module, Checkpointed)]
    assert len(layers) == 2
    outputs = [getattr(out, "logits", out) for out in (plain(**inputs), checkpointed(**inputs))]
    assert torch.equal(outputs[0], outputs[1])
    hidden = [value for value in kept if value.requires_grad]
    assert [value.shape for value in hidden] == 2 * [(3, 65 if name == "vit" else TOKENS, 32)]
    for output in outputs:
        output.square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), key  # type: ignore[arg-type]


def test_a_model_without_blocks_cannot_be_checkpointed() -> None:
    with pytest.raises(ValueError, match="Linear has no blocks"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_folding_frozen_batch_norms_changes_nothing_but_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1),
        nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1),
    ).eval()  # fmt: skip
    for norm in (model[1], model[4]):
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    x = torch.randn(2, 3, 9, 7)
    proto = onnx.load(str(export_model(model, tmp_path / "model.razor", (3, 9, 7)) / "inference.onnx"))
    before = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {proto.graph.input[0].name: x.numpy()})
    constants = fold_frozen_batch_norms(proto)
    onnx.checker.check_model(proto)
    after = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {proto.graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=1e-5)  # sums of 27 products near 1 in float32
    operators = [node.op_type for node in proto.graph.node]
    assert "BatchNormalization" not in operators and operators.count("Conv") == 3
    left = {i.name for i in proto.graph.initializer}
    assert {"0.weight", "1.weight", "1.bias", "3.bias", "4.bias"} <= left - set(constants)
    assert not any(name.endswith(("running_mean", "running_var")) for name in left)
