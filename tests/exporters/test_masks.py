"""What models compute from integer inputs is recognized by its values, in whatever spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from edge_razor.errors import UnsupportedOpError, UsageError
from edge_razor.exporters.capture import capture
from edge_razor.exporters.forward import build_forward
from edge_razor.exporters.graph_edit import array
from tests.reference.graph_backward import OPERATORS, Run, _run_node

T, WIDTH, HEADS = 6, 8, 2


class Masked(nn.Module):
    """Attention whose scores ``apply(scores, mask)`` changes."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.apply_mask = apply
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).view(x.shape[0], -1, HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = self.apply_mask(q @ k.transpose(2, 3), mask)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def causal() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril()


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool, bool]] = {
    # name: (scores, mask → scores, causal, inverted)
    "additive": (lambda s, m: s + (1.0 - m[:, None, None].float()) * -10000.0, False, False),
    "finfo": (lambda s, m: s + (1.0 - m[:, None, None].float()) * torch.finfo(torch.float32).min, False, False),
    "masked_fill": (lambda s, m: s.masked_fill(m[:, None, None] == 0, float("-inf")), False, False),
    "where": (lambda s, m: torch.where(m[:, None, None] > 0, s, torch.tensor(-1e9)), False, False),
    "causal and": (lambda s, m: s.masked_fill(~(causal() & (m[:, None, None] != 0)), -1e30), True, False),
    "causal twice": (
        lambda s, m: s.masked_fill(~causal(), -1e30) + torch.where(m[:, None, None] == 1, 0.0, float("-inf")),
        True,
        False,
    ),
    "gathered": (
        lambda s, m: s.masked_fill(
            ~torch.stack([m[:, j] != 0 for j in range(T)], -1)[:, None, None].expand(-1, 1, T, T), -1e30
        ),
        False,
        False,
    ),
    "ignored keys": (lambda s, m: s.masked_fill((m != 0)[:, None, None], float("-inf")), False, True),
    "ignored keys, causal": (
        lambda s, m: s.masked_fill((m != 0)[:, None, None] | ~causal(), float("-inf")),
        True,
        True,
    ),
}


def forward_of(model: nn.Module, *inputs: Tensor) -> ir.Model:
    return build_forward(capture(model.eval(), inputs)).model


def evaluate(model: ir.Model, module: nn.Module, *inputs: Tensor) -> np.ndarray:
    """The forward graph in float64."""
    run = Run(len(inputs[0]))
    state = module.state_dict()
    for name, value in model.graph.initializers.items():
        data = array(value)
        if value.dtype == ir.DataType.INT64:
            assert data is not None
            run.values[name] = data.reshape(-1).tolist()
        else:
            run.values[name] = state[name].double() if name in state else torch.from_numpy(np.array(data)).double()
    for value, data in zip(model.graph.inputs, inputs, strict=True):
        run.values[str(value.name)] = data if value.dtype == ir.DataType.INT64 else data.double()
    for node in model.graph:
        assert node.op_type in OPERATORS
        _run_node(run, node)
    return np.asarray(run.values[str(model.graph.outputs[0].name)])


def padded(samples: int = 4) -> Tensor:
    mask = torch.zeros(samples, T, dtype=torch.int64)
    for sample, length in enumerate((T, 3, 1, 5)[:samples]):
        mask[sample, :length] = 1
    return mask


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("name", SPELLINGS)
def test_attention_masks(name: str, dtype: torch.dtype) -> None:
    apply, is_causal, inverted = SPELLINGS[name]
    if dtype == torch.bool:
        original = apply
        apply = lambda s, m: original(s, m.long())  # noqa: E731
    module = Masked(apply)
    mask = padded().to(dtype)
    x = torch.randn(4, T, WIDTH)
    model = forward_of(module, x, mask)
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    assert attention.attributes.get_int("causal", 0) == int(is_causal)
    assert attention.inputs[3] is not None and len([v for v in attention.inputs if v is not None]) == 4
    assert {n.op_type for n in model.graph} <= {"Linear", "Attention", "Reshape", "Sub"}
    assert ("Sub" in {n.op_type for n in model.graph}) == inverted
    shown = 1 - mask.long() if inverted else mask
    if inverted:
        shown = shown.to(dtype)
    with torch.no_grad():
        expected = module(x, shown).numpy()
    np.testing.assert_allclose(evaluate(model, module, x, shown), expected, atol=1e-5)


class OfTokens(nn.Module):
    """x = table[ids] (+ something made from ids or a mask)."""

    def __init__(self, change: Callable[..., Tensor]) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(80, WIDTH), nn.Embedding(T + 2, WIDTH)
        self.change = change

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.change(self, self.table(ids), ids, mask)


def pooled(module: Any, x: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).expand(x.size()).float()
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


CHANGES: dict[str, Callable[..., Tensor]] = {
    "positions": lambda m, x, ids, mask: x + m.positions(torch.arange(ids.shape[1]) + 2),
    "positions of the batch": lambda m, x, ids, mask: x + m.positions(torch.arange(T).expand(ids.shape)),
    "one type": lambda m, x, ids, mask: x + m.positions(torch.zeros_like(ids)),
    "mean": pooled,
    "mean of a count": lambda m, x, ids, mask: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "mean, float": lambda m, x, ids, mask: (x * mask.float()[..., None]).sum(1) / mask.float().sum(1)[:, None],
    "what is left out": lambda m, x, ids, mask: (x * (1 - mask[..., None].float())).sum(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_positions_and_pooling(name: str) -> None:
    module, ids, mask = OfTokens(CHANGES[name]), torch.randint(0, 11, (4, T)), padded()
    model = forward_of(module, ids, mask)
    with torch.no_grad():
        expected = module(ids, mask).numpy()
    np.testing.assert_allclose(evaluate(model, module, ids, mask), expected, atol=1e-5)
    assert [v.dtype for v in model.graph.inputs] == [ir.DataType.INT64, ir.DataType.FLOAT]


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "computed index": (lambda m, x, ids, mask: x + m.positions(mask.cumsum(1)), "its indices are computed"),
    "index as mask": (lambda m, x, ids, mask: (x * (ids != 0)[..., None]).sum(1), "indexes a table"),
    "one rare token": (lambda m, x, ids, mask: x + m.positions((ids == 77).long()), "its indices are computed"),
    "mask of one rare token": (
        lambda m, x, ids, mask: x.masked_fill((ids == 77)[..., None], 0.0),
        "indexes a table",
    ),
    "index as number": (lambda m, x, ids, mask: x * ids[..., None].float(), "indexes a table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_named(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(UnsupportedOpError, match=message):
        forward_of(OfTokens(change), torch.randint(0, 11, (2, T)), padded(2))


def test_padding_idx_gets_no_gradient() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, WIDTH, padding_idx=3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).mean(1)

    model = forward_of(Padded(), torch.randint(0, 11, (2, T)))
    (node,) = [n for n in model.graph if n.op_type == "Embedding"]
    assert node.attributes.get_int("padding_idx", -1) == 3


def test_a_double_input_is_refused() -> None:
    with pytest.raises(UsageError, match="float64"):
        capture(nn.Linear(3, 2), torch.zeros(2, 3, dtype=torch.float64))
