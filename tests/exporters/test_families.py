"""Every family: the channels-last graph and inference.onnx compute what the torch model computes."""

from __future__ import annotations

import pytest
import torch

from edge_razor import demo
from tests import models
from tests.exporters.forward_reference import check_model, ops
from tests.models import FAMILIES

# Operators that a good translation of the family needs; a Transpose among them would be a round trip through NCHW.
CONVOLUTIONAL = {"BatchNormFold", "Conv", "ReduceMean", "Linear", "Add"}
EXPECTED = {
    "resnet18": CONVOLUTIONAL | {"MaxPool"},
    "resnet50": CONVOLUTIONAL | {"MaxPool"},
    "mobilenet_v2": CONVOLUTIONAL,
    "mobilenet_v3_small": CONVOLUTIONAL | {"Mul", "Reshape"},
    "efficientnet_lite0": CONVOLUTIONAL,
    "squeezenet": {"Conv", "MaxPool", "Concat", "ReduceMean", "Reshape"},
    "densenet": (CONVOLUTIONAL - {"Add"}) | {"MaxPool", "AveragePool", "Affine", "Concat"},
    "shufflenet_v2": (CONVOLUTIONAL - {"Add"}) | {"MaxPool", "Split", "Concat", "Reshape", "Transpose"},
    "regnet": CONVOLUTIONAL | {"Mul"},
    "convnext": CONVOLUTIONAL | {"Affine", "Mul", "Reshape"},
    "mlp": {"Linear", "Transpose", "Reshape"},
    # The attention's own transpositions cancel; tokens are the rows of the patches' map.
    "vit": {"Conv", "Reshape", "ExpandBatch", "Concat", "Add", "LayerNorm", "Linear", "Split", "Attention", "Slice"},
}


def residual_activations(family: str) -> set[str]:
    """ReLU behind a residual sum stands alone."""
    return {"Affine"} if family in ("resnet18", "resnet50", "regnet") else set()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_computes_the_same(family: str) -> None:
    torch.manual_seed(3)
    forward = check_model(FAMILIES[family](num_classes=10), (3, 64, 64))
    assert set(ops(forward)) == EXPECTED[family] | residual_activations(family)


@pytest.mark.parametrize("family", ["mobilenet_v2", "shufflenet_v2"])
def test_family_computes_the_same_on_an_odd_size(family: str) -> None:
    torch.manual_seed(3)
    check_model(FAMILIES[family](num_classes=3), (3, 65, 47))


def test_pretrained_efficientnet_lite0_computes_the_same() -> None:
    forward = check_model(demo.digits_model(10, 64), (3, 64, 64))
    assert "Pad" not in ops(forward), "SAME padding belongs into the convolutions"
    layers = {node.metadata_props["layer"] for node in forward.model.graph}
    assert {"_conv_stem", "_blocks.0._depthwise_conv", "_fc"} <= layers


def test_convnext_as_published_needs_no_transpose() -> None:
    """Its permutes to channels-last and back are the layout that the graph has anyway."""
    forward = check_model(models.convnext(5, 0.5, linear=True), (3, 32, 32))
    assert "Transpose" not in ops(forward)


def test_channel_shuffle_stays_channels_last() -> None:
    """One Transpose of the last two dimensions for each shuffle."""
    forward = check_model(models.shufflenet_v2(5, 0.5), (3, 64, 64))
    transposes = [node for node in forward.model.graph if node.op_type == "Transpose"]
    assert len(transposes) == 16
    assert {tuple(node.attributes["perm"].as_ints()) for node in transposes} == {(0, 1, 2, 4, 3)}
