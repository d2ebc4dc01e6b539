"""Fused attention, forward and backward, against its definition in float64 and torch's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from edge_razor.runtime import kernel_run
from tests.kernels.harness import Out, Scratch, assert_close, normal, run
from tests.kernels.test_dropout import mask as dropout_mask
from tests.reference.razor import to_bf16


@dataclass
class Case:
    """Sizes, and what masks the scores: `bias` 0 no, 1 for all heads, 2 each head its own."""

    n: int
    t: int
    s: int
    heads: int
    kv_heads: int
    d: int
    causal: bool = False
    bias: int = 0
    key_mask: bool = False
    ratio: float = 0.0

    @property
    def scale(self) -> float:
        return self.d**-0.5

    def ints(self) -> list[int]:
        bias_heads = {0: 0, 1: 1, 2: self.heads}[self.bias]
        return [self.n, self.t, self.s, self.heads, self.kv_heads, self.d, int(self.causal), bias_heads, 5]

    def operands(self) -> tuple[list[np.ndarray], np.ndarray | None, np.ndarray | None]:
        """Q, K, V; key_mask; bias."""
        q = normal(1, self.n, self.t, self.heads * self.d)
        k = normal(2, self.n, self.s, self.kv_heads * self.d)
        v = normal(3, self.n, self.s, self.kv_heads * self.d)
        mask = None
        if self.key_mask:
            mask = (np.random.default_rng(4).random((self.n, self.s)) < 0.6).astype(np.float32)
            mask[0] = 0  # a sample without any key to look at
        bias = None if not self.bias else normal(5, self.ints()[7], self.t, self.s)
        return [q, k, v], mask, bias


CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(2, 3, 5, 2, 1, 7),
    Case(2, 63, 63, 1, 1, 8, causal=True),
    Case(1, 64, 64, 3, 3, 16, key_mask=True),
    Case(2, 65, 65, 2, 2, 32, causal=True, key_mask=True),
    Case(1, 197, 197, 3, 3, 64),
    Case(1, 130, 70, 4, 2, 5, bias=1),
    Case(2, 70, 130, 4, 1, 12, bias=2, key_mask=True),
    Case(2, 70, 70, 6, 2, 8, causal=True, bias=2),
    Case(3, 66, 67, 2, 2, 4, ratio=0.3),
    Case(2, 65, 65, 4, 2, 4, ratio=0.5, causal=True, key_mask=True),
    Case(1, 5, 130, 2, 1, 3, causal=True),
]
CONTEXT = {"seed": 2**40 + 3, "update": 2**33 + 7, "first_sample": 6}


def definition(
    case: Case, tensors: list[torch.Tensor], mask: np.ndarray | None, bias: np.ndarray | None
) -> torch.Tensor:
    """Y in float64."""
    q, k, v = (x.reshape(case.n, x.shape[1], -1, case.d).transpose(1, 2) for x in tensors)  # [n, heads, positions, d]
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * np.float32(case.scale)
    if bias is not None:
        scores = scores + torch.from_numpy(bias).double()
    hidden = torch.zeros(case.n, 1, case.t, case.s, dtype=torch.bool)
    if case.causal:
        hidden = hidden | torch.ones(case.t, case.s, dtype=torch.bool).triu(1)
    if mask is not None:
        hidden = hidden | torch.from_numpy(mask < 0.5)[:, None, None, :]
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    p = torch.where(hidden.all(-1, keepdim=True), 0.0, p)
    if case.ratio:
        samples = range(CONTEXT["first_sample"], CONTEXT["first_sample"] + case.n)
        elements = case.heads * case.t * case.s
        ratio = float(np.float32(case.ratio))
        kept = dropout_mask(CONTEXT["seed"], 5, CONTEXT["update"], samples, elements, ratio)
        p = p * torch.from_numpy(kept.reshape(p.shape)) / (1 - ratio)
    return (p @ v).transpose(1, 2).reshape(case.n, case.t, -1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case) -> None:
    tensors, mask, bias = case.operands()
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in tensors]
    expected = definition(case, leaves, mask, bias)
    shape = (case.n, case.t, case.heads * case.d)
    floats = [case.scale, case.ratio]
    (y,), _ = run("attention", case.ints(), floats, [*tensors, mask, bias, Out(shape), Scratch()], **CONTEXT)
    assert_close(y, expected.detach(), 3e-6)
    dy = normal(6, *shape)
    expected.backward(torch.from_numpy(dy).double())
    outputs = [Out(x.shape) for x in tensors]
    operands = [*tensors, mask, bias, dy, *outputs, Scratch()]
    gradients, _ = run("attention_grad", [*case.ints(), 0, 0, 0], floats, operands, **CONTEXT)
    for ours, leaf in zip(gradients, leaves, strict=True):
        if case.s == 1 and leaf is not leaves[2]:
            assert np.abs(ours).max() <= 1e-6  # of one probability, which is 1 whatever the scores
        else:
            assert_close(ours, leaf.grad, 5e-6)
    for wanted in range(3):  # each gradient alone
        alone = [out if i == wanted else None for i, out in enumerate(outputs)]
        operands = [*tensors, mask, bias, dy, *alone, Scratch()]
        (single,), _ = run("attention_grad", [*case.ints(), 0, 0, 0], floats, operands, **CONTEXT)
        np.testing.assert_array_equal(single, gradients[wanted])


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch(causal: bool) -> None:
    case = Case(2, 128, 128, 12, 12, 32, causal=causal)
    tensors, _, _ = case.operands()
    q, k, v = (torch.from_numpy(x).reshape(2, 128, 12, 32).transpose(1, 2) for x in tensors)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    shape = (2, 128, 384)
    operands = [*tensors, None, None, Out(shape), Scratch()]
    (y,), _ = run("attention", case.ints(), [case.scale, 0.0], operands, **CONTEXT)
    assert_close(y, expected.reshape(shape), 3e-6)


@pytest.mark.parametrize("forms", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_backward_reads_bf16(forms: tuple[int, int, int]) -> None:
    """The gradient is that of the rounded operands."""
    case = Case(2, 70, 66, 4, 2, 9, key_mask=True)
    tensors, mask, bias = case.operands()
    rounded = [to_bf16(x) if form else x for x, form in zip(tensors, forms, strict=True)]
    halves = [
        (x.view(np.uint32) >> 16).astype(np.uint16) if form else x for x, form in zip(rounded, forms, strict=True)
    ]
    dy = normal(6, case.n, case.t, case.heads * case.d)
    outputs = [Out(x.shape) for x in tensors]
    floats = [case.scale, 0.0]
    ours, _ = run(
        "attention_grad", [*case.ints(), *forms], floats, [*halves, mask, bias, dy, *outputs, Scratch()], **CONTEXT
    )
    theirs, _ = run(
        "attention_grad", [*case.ints(), 0, 0, 0], floats, [*rounded, mask, bias, dy, *outputs, Scratch()], **CONTEXT
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-6)


def test_large_scores_do_not_overflow() -> None:
    case = Case(1, 4, 70, 1, 1, 2)
    (q, k, v), _, _ = case.operands()
    q, k = q * 1e4, k * 1e4
    (y,), _ = run("attention", case.ints(), [1.0, 0.0], [q, k, v, None, None, Out(q.shape), Scratch()], **CONTEXT)
    best = (q[0] @ k[0].T).argmax(1)
    np.testing.assert_allclose(y[0], v[0][best], rtol=1e-6)


def test_nan_spoils_its_own_query_only() -> None:
    case = Case(1, 70, 70, 1, 1, 4)
    (q, k, v), _, _ = case.operands()
    q[0, 9] = np.nan
    scratch = np.empty(2**20, np.uint8)
    y = np.empty_like(q)
    kernel_run("attention", case.ints(), [0.5, 0.0], [q, k, v, None, None, y, scratch], threads=2, **CONTEXT)
    assert np.isnan(y[0, 9]).all() and np.isnan(y).sum() == 4
