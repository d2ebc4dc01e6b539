"""Classifiers that read the last token of each text: the position comes from tokens or mask, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import edge_razor
from edge_razor.bundle import Bundle
from edge_razor.errors import UnsupportedOpError
from tests.parity import errors, moves, torch_gradients
from tests.text_models import CLASSES, VOCABULARY, LastToken, batch, gpt2_classifier, llama_classifier

SAMPLES = 5


def texts(padding: int) -> tuple[dict[str, Tensor], Tensor]:
    """Padded behind with the token `padding`, which a text may hold inside, too; one text is nothing else."""
    inputs, target = batch("bert", SAMPLES)
    ids, mask = inputs["input_ids"].where(inputs["attention_mask"] == 1, padding), inputs["attention_mask"].clone()
    ids[1, 1], ids[4] = padding, padding
    return {"input_ids": ids, "attention_mask": mask}, target


@pytest.mark.parametrize(
    ("make", "padding", "kind"),
    [
        pytest.param(lambda: gpt2_classifier("sdpa"), 0, "last", id="GPT-2"),
        pytest.param(lambda: llama_classifier("eager"), 3, "last", id="Llama"),
        pytest.param(LastToken, 0, "count", id="length of the mask"),
    ],
)
def test_gradients_equal_pytorch(make: Callable[[], nn.Module], padding: int, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    inputs, target = texts(padding)
    path = edge_razor.export(model, {k: v[:2] for k, v in inputs.items()}, tmp_path / "b", dropout=False)
    with Bundle(path) as bundle:
        graph = onnx.load_model_from_string(bundle.read_file("training.onnx")).graph
    (node,) = [n for n in graph.node if n.op_type == "SelectPosition"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"kind": kind.encode(), "number": padding}
    loss, expected = torch_gradients(model, inputs, target)
    arrays = [v.numpy() for v in inputs.values()]
    options = {"batch_size": SAMPLES, "sparsity": 0, "lr": 1e-3, "threads": 2, "micro_batch": 1}
    with edge_razor.Trainer(path, mem_budget=None, **options) as trainer:  # type: ignore[arg-type]
        ours, found = moves(trainer, inputs, target)
        trainer.to_onnx(tmp_path / "tuned.onnx")
        tuned = trainer.predict(arrays)
    assert ours == pytest.approx(loss, rel=1e-5)
    error, worst = errors(found, expected)
    assert error <= 2e-4, f"{worst} is off by {error:.1e}"
    session = onnxruntime.InferenceSession(tmp_path / "tuned.onnx")
    (stock,) = session.run(None, dict(zip([p.name for p in session.get_inputs()], arrays, strict=True)))
    np.testing.assert_allclose(stock, tuned, rtol=1e-4, atol=2e-5)


class FirstOfTwo(nn.Module):
    """A position that is neither the last token nor a length."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids)[torch.arange(ids.shape[0]), (ids == 7).int().argmax(1)])


def test_another_position_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match="GatherND"):
        edge_razor.export(FirstOfTwo(), {"ids": torch.ones(2, 12, dtype=torch.int64)}, tmp_path / "b")
