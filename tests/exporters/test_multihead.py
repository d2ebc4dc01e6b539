"""torch's own attention modules: nn.MultiheadAttention and nn.TransformerEncoderLayer, with masks and dropout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import edge_razor
from edge_razor.bundle import Bundle
from tests.parity import errors, moves, torch_gradients
from tests.reference.dropout import SameMasks

SAMPLES, TOKENS, WIDTH = 4, 20, 16


class Encoder(nn.Module):
    """Two layers, masked by the padding of each text, and causal."""

    def __init__(self, batch_first: bool, dropout: float) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout, batch_first=batch_first, norm_first=not batch_first)
        self.table = nn.Embedding(30, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, causal = self.table(ids), nn.Transformer.generate_square_subsequent_mask(TOKENS)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.layers(x, causal, src_key_padding_mask=mask == 0)
        return self.head(x if self.batch_first else x.transpose(0, 1))[:, 0]


class Cross(nn.Module):
    """Queries look at other values than their own; the weights that are returned are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, 0.2, batch_first=True)
        self.q, self.kv, self.head = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = self.q(x), self.kv(x)
        # Export sees the weights asked for; with them, torch's own dropout would draw masks of another shape.
        return self.head(self.attention(q, kv, kv, need_weights=not self.training)[0].mean(1))


def case(name: str, dropout: float) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(1)
    if name == "cross":
        return Cross(), {"x": torch.randn(SAMPLES, TOKENS, 6)}
    mask = (torch.arange(TOKENS) < torch.tensor([20, 7, 1, 13])[:, None]).long()
    ids = torch.randint(0, 30, (SAMPLES, TOKENS))
    return Encoder(name == "batch first", dropout), {"ids": ids, "mask": mask}


@pytest.mark.parametrize("name", ["batch first", "positions first", "cross"])
def test_gradients_with_dropout_equal_pytorch_with_the_same_masks(name: str, tmp_path: Path) -> None:
    # With positions in front, the masks of the test's torch would lie in another order.
    model, inputs = case(name, 0.0 if name == "positions first" else 0.2)
    target = torch.arange(SAMPLES) % 5
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = edge_razor.export(model, {key: value[:2] for key, value in inputs.items()}, tmp_path / "b")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert "forward" not in {key for module in model.modules() for key in vars(module)}
    masks = SameMasks(seed=77, update=1)
    with masks.active():
        loss, expected = torch_gradients(model.train(), inputs, target)
    assert masks.stream == {"cross": 1, "batch first": 8, "positions first": 0}[name]
    options = {"batch_size": SAMPLES, "sparsity": 0, "lr": 1e-3, "threads": 2, "seed": 77}
    with edge_razor.Trainer(path, mem_budget=None, **options) as trainer:  # type: ignore[arg-type]
        ours, found = moves(trainer, inputs, target)
        predicted = trainer.predict([x.numpy() for x in inputs.values()])
    assert ours == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, expected)
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"
    with Bundle(path) as bundle:
        graph = onnx.load_model_from_string(bundle.read_file("training.onnx")).graph
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == (1 if name == "cross" else 2)
    assert not {"Transpose", "Softmax"} & {node.op_type for node in graph.node}
    assert np.isfinite(predicted).all()
