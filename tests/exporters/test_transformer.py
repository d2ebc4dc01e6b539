"""LayerNorm, attention, class tokens and gathers in their spellings: the same function, and the right gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_razor.errors import UnsupportedOpError
from edge_razor.exporters.differentiate import differentiate
from edge_razor.exporters.razor import insert_packs
from edge_razor.exporters.trainable import parameters, resolve
from edge_razor.exporters.training_graph import to_proto, validate
from tests.exporters.forward_reference import Function, captured, check_model, ops
from tests.models import VisionTransformer
from tests.reference.graph_backward import run_training_graph

HEADS, WIDTH = 2, 12


def heads(x: Tensor) -> Tensor:
    """[N, T, C] → [N, heads, T, C/heads]."""
    return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


def merged(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


class Attend(nn.Module):
    """Q, K and V by three linear layers, then ``attend`` on [N, heads, T, d]."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for name, data in buffers.items():
            self.register_buffer(name, data)

    def forward(self, x: Tensor) -> Tensor:
        extra = dict(self.named_buffers())
        return merged(self.attend(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)), **extra))


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.4
    return torch.matmul((scores if mask is None else scores + mask).softmax(-1), v)


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.matmul(q, k.transpose(-1, -2)) / 2.5).softmax(-1) @ v


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 0.3) @ k.permute(0, 1, 3, 2)).softmax(dim=-1) @ v


def sliced(x: Tensor) -> Tensor:
    """Q, K and V as slices of one value."""
    q, k, v = x[..., :WIDTH], x[..., WIDTH : 2 * WIDTH], x[..., 2 * WIDTH :]
    return merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


MASK = torch.randn(5, 5)
CAUSAL = torch.full((5, 5), -torch.inf).triu(1)
ATTENTIONS = {
    "sdpa": lambda: Attend(F.scaled_dot_product_attention),
    "sdpa with its own scale": lambda: Attend(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.7)),
    "sdpa, causal": lambda: Attend(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    "sdpa with a mask": lambda: Attend(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), mask=MASK
    ),
    "eager": lambda: Attend(eager),
    "eager with a mask": lambda: Attend(eager, mask=MASK),
    "eager, causal": lambda: Attend(eager, mask=CAUSAL[None, None]),
    "eager with a mask a head": lambda: Attend(eager, mask=torch.randn(1, HEADS, 5, 5)),
    "divided": lambda: Attend(divided),
    "scaled query": lambda: Attend(scaled_query),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_becomes_one_node_without_transpositions(name: str) -> None:
    torch.manual_seed(1)
    model = ATTENTIONS[name]()
    found = ops(check_model(model, (5, WIDTH)))
    assert found.count("Attention") == 1, found
    assert set(found) <= {"Attention", "Linear", "Reshape"}, found


def test_slices_of_one_projection_are_one_split() -> None:
    found = ops(check_model(nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), Function(sliced)), (4, WIDTH)))
    assert found.count("Split") == 1 and "Slice" not in found and found.count("Attention") == 1


def test_attention_over_another_sequence() -> None:
    def cross(x: Tensor, y: Tensor) -> Tensor:
        return merged(F.scaled_dot_product_attention(heads(x), heads(y), heads(y * 2)))

    assert ops(check_model(Function(cross), (3, WIDTH), (7, WIDTH))).count("Attention") == 1


@pytest.mark.parametrize("is_eager", [False, True])
def test_vision_transformer_trains_exactly(is_eager: bool) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(5, channels=24, depth=2, image=32, patch=8, eager=is_eager)
    found = ops(check_model(model, (3, 32, 32)))
    assert found.count("Attention") == 2 and "Transpose" not in found
    check_gradients(model, (3, 32, 32))


def check_gradients(model: nn.Module, shape: tuple[int, ...], trainable: str = "all") -> list[str]:
    """Compares the training graph's gradients with torch's, in float64; returns the names of its operators."""
    from edge_razor.exporters.forward import build_forward

    forward = build_forward(captured(model, shape))
    names = resolve(trainable, parameters(forward.model))
    graph = insert_packs(differentiate(forward.model, {"name": "cross_entropy"}, names))
    validate(to_proto(graph))
    x, labels = torch.randn(3, *shape), torch.tensor([0, 1, 2])
    weights: dict[str, Any] = {
        name: value.const_value.numpy()
        for name, value in graph.graph.initializers.items()
        if value.const_value is not None and value.dtype is not None and value.dtype.is_floating_point()
    }
    runtime = x.permute(forward.input_orders[0])
    result = run_training_graph(graph, {graph.graph.inputs[0].name or "": runtime}, labels, weights)
    double = model.double()
    double.zero_grad()
    F.cross_entropy(double(x.double()), labels).backward()
    model.float()
    for name, parameter in double.named_parameters():
        if name not in names:
            continue
        assert parameter.grad is not None
        error = float((result.gradients[name] - parameter.grad).abs().max())
        assert error <= 1e-6 * max(float(parameter.grad.abs().max()), 1e-9), f"{name} is off by {error:.2g}"
    return [node.op_type for node in graph.graph]


@pytest.mark.parametrize(
    ("trainable", "absent"),
    [
        ("head", {"LayerNormGrad", "AttentionGrad"}),
        ("norm.*", {"AttentionGrad"}),
        ("blocks.1.norm1.bias", set()),
        ("token,positions", {"LinearGradWeight"}),
        ("blocks.0.attention.qkv.bias", {"LinearGradWeight"}),
    ],
)
def test_a_part_of_a_vision_transformer(trainable: str, absent: set[str]) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(5, channels=12, depth=2, image=16, patch=8)
    found = check_gradients(model, (3, 16, 16), trainable)
    assert not absent & set(found)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, 1e-3, bias=False), nn.LayerNorm(WIDTH, elementwise_affine=False)]
)
def test_layer_norm(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Flatten(), nn.Linear(5 * WIDTH, 4))
    assert "LayerNorm" in ops(check_model(model, (5, WIDTH)))
    check_gradients(model, (5, WIDTH))


def test_layer_norm_of_channels_on_a_map_needs_no_transpose() -> None:
    """As ConvNeXt has it: permuted to channels-last for the norm and the linear layer, and back."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x + self.linear(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    model = nn.Sequential(Block(), nn.Flatten(), nn.Linear(8 * 3 * 4, 4))
    assert "LayerNorm" in ops(check_model(model, (3, 5, 6)))
    assert "Transpose" not in ops(check_model(model[0], (3, 5, 6)))
    check_gradients(model, (3, 5, 6))


class Written(nn.Module):
    """A norm written out: ``forward`` of x and the module's weight and bias."""

    def __init__(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) + 0 * bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d / (d * d).mean(-1, keepdim=True).add(1e-6).sqrt() * weight + bias


@pytest.mark.parametrize("norm", [nn.RMSNorm(WIDTH), Written(rms_norm), Written(layer_norm)])
def test_norms_written_out(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Flatten(), nn.Linear(5 * WIDTH, 4))
    found = ops(check_model(model, (5, WIDTH)))
    assert found.count("LayerNorm") == 1 and not {"ReduceMean", "Div"} & set(found), found
    check_gradients(model, (5, WIDTH))


@pytest.mark.parametrize(
    "almost",
    [
        lambda x, w, b: x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * w + b,  # over positions
        lambda x, w, b: (x + b) / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt() * w,  # of something else
    ],
)
def test_what_is_almost_a_norm_is_not_taken_for_one(almost: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedOpError, match="Sqrt"):  # which alone is not known
        check_model(Written(almost), (5, WIDTH))


def test_layer_norm_over_two_dimensions_says_so() -> None:
    with pytest.raises(UnsupportedOpError, match="normalizes more than the last dimension"):
        check_model(nn.LayerNorm([5, WIDTH]), (5, WIDTH))


def test_gather_of_consecutive_indices_is_a_slice() -> None:
    found = ops(check_model(Function(lambda x: x[:, 1] + x.index_select(1, torch.tensor([2, 3])).sum(1)), (5, WIDTH)))
    assert "Slice" in found and "Gather" not in found


def test_gather_of_other_indices_is_slices_one_after_another() -> None:
    found = ops(check_model(Function(lambda x: x.index_select(1, torch.tensor([3, 1, 2]))), (5, WIDTH)))
    assert found.count("Slice") == 2 and "Concat" in found


def test_gather_of_too_many_ranges_says_so() -> None:
    with pytest.raises(UnsupportedOpError, match="70 separate ranges"):
        check_model(Function(lambda x: x.index_select(1, torch.arange(0, 140, 2))), (140, 4))


def test_a_repeated_parameter_needs_its_batch() -> None:
    """The class token alone, before anything that broadcasts it."""
    model = Function(
        lambda x, token: torch.cat([token.expand(x.shape[0], -1, -1), x], 1), token=torch.randn(1, 1, WIDTH)
    )
    assert "ExpandBatch" in ops(check_model(model, (5, WIDTH)))
