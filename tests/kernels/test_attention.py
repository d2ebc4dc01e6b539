"""Fused attention, forward and backward, against its definition in float64 and torch's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from edge_razor.errors import EdgeRazorError
from edge_razor.runtime import kernel_run, kernel_scratch, packed_bytes
from tests.kernels.harness import Out, Scratch, assert_close, normal, run
from tests.reference.attention import as_kept, keep_rows, pruned_gradients, unpack_rows
from tests.reference.dropout import mask as dropout_mask
from tests.reference.razor import FORMS, keep_count, razor, to_bf16


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

    def forward(self, keep: int = 0) -> list[int]:
        """Attributes of `attention`."""
        return [*self.ints(), keep]

    def backward(self, forms: tuple[int, int, int] = (0, 0, 0), keeps: tuple[int, int, int] = (0, 0, 0), keep: int = 0):
        """Attributes of `attention_grad`."""
        return [*self.ints(), *forms, *keeps, keep]

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
NO_SUMS = (None, None, None)
CONTEXT = {"seed": 2**40 + 3, "update": 2**33 + 7, "first_sample": 6}


def by_head(case: Case, x: torch.Tensor) -> torch.Tensor:
    """[n, heads, positions, d] of rows as a linear layer writes them, K and V repeated for their query heads."""
    x = x.reshape(case.n, x.shape[1], -1, case.d).transpose(1, 2)
    return x.repeat_interleave(case.heads // x.shape[1], 1)


def softmax(
    case: Case, tensors: list[torch.Tensor], mask: np.ndarray | None, bias: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and what dropout multiplies them by, [n, heads, t, s]."""
    q, k = (by_head(case, x) for x in tensors[:2])
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
        return p, torch.from_numpy(kept.reshape(p.shape)) / (1 - ratio)
    return p, torch.ones_like(p)


def definition(
    case: Case, tensors: list[torch.Tensor], mask: np.ndarray | None, bias: np.ndarray | None
) -> torch.Tensor:
    """Y in float64."""
    p, factor = softmax(case, tensors, mask, bias)
    return (p * factor @ by_head(case, tensors[2])).transpose(1, 2).reshape(case.n, case.t, -1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case) -> None:
    tensors, mask, bias = case.operands()
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in tensors]
    expected = definition(case, leaves, mask, bias)
    shape = (case.n, case.t, case.heads * case.d)
    floats = [case.scale, case.ratio]
    (y,), _ = run("attention", case.forward(), floats, [*tensors, mask, bias, Out(shape), None, Scratch()], **CONTEXT)
    assert_close(y, expected.detach(), 3e-6)
    dy = normal(6, *shape)
    expected.backward(torch.from_numpy(dy).double())
    outputs = [Out(x.shape) for x in tensors]
    operands = [*tensors, mask, bias, dy, None, *outputs, *NO_SUMS, Scratch()]
    gradients, _ = run("attention_grad", case.backward(), floats, operands, **CONTEXT)
    for ours, leaf in zip(gradients, leaves, strict=True):
        if case.s == 1 and leaf is not leaves[2]:
            assert np.abs(ours).max() <= 1e-6  # of one probability, which is 1 whatever the scores
        else:
            assert_close(ours, leaf.grad, 5e-6)
    for wanted in range(3):  # each gradient alone
        alone = [out if i == wanted else None for i, out in enumerate(outputs)]
        operands = [*tensors, mask, bias, dy, None, *alone, *NO_SUMS, Scratch()]
        (single,), _ = run("attention_grad", case.backward(), floats, operands, **CONTEXT)
        np.testing.assert_array_equal(single, gradients[wanted])


def backward_sums(
    case: Case, ints: list[int], operands: list[np.ndarray | None], wanted: tuple[int, ...] = (0, 1, 2)
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """dQ, dK and dV, and the sums of those `wanted`."""
    widths = [case.heads * case.d, case.kv_heads * case.d, case.kv_heads * case.d]
    outputs = [Out((case.n, rows, width)) for rows, width in zip((case.t, case.s, case.s), widths, strict=True)]
    sums = [Out((width,)) if i in wanted else None for i, width in enumerate(widths)]
    floats = [case.scale, case.ratio]
    found, _ = run("attention_grad", ints, floats, [*operands, *outputs, *sums, Scratch()], **CONTEXT)
    return found[:3], found[3:]


@pytest.mark.parametrize("probabilities", ["made again", "kept"])
@pytest.mark.parametrize("case", [*CASES, Case(5, 70, 70, 2, 1, 17), Case(3, 150, 67, 2, 2, 33)], ids=str)
def test_sums_over_samples_and_positions(case: Case, probabilities: str) -> None:
    """Those of dK cancel: what counts is the size of their terms."""
    tensors, mask, bias = case.operands()
    dy = normal(6, case.n, case.t, case.heads * case.d)
    keep, kept = (0, None) if probabilities == "made again" else ((case.s + 2) // 3, None)
    if keep:
        out = Out((packed_bytes(4, case.n * case.heads, case.t, case.s, keep),), np.uint8)
        operands = [*tensors, mask, bias, Out(dy.shape), out, Scratch()]
        (_, kept), _ = run("attention", case.forward(keep), [case.scale, case.ratio], operands, **CONTEXT)
    ints, read = case.backward(keep=keep), [*tensors, mask, bias, dy, kept]
    gradients, sums = backward_sums(case, ints, read)
    plain, _ = backward_sums(case, ints, read, ())
    for found, gradient, alone in zip(sums, gradients, plain, strict=True):
        assert gradient.tobytes() == alone.tobytes()
        terms = gradient.astype(np.float64)
        assert (np.abs(found - terms.sum((0, 1))) <= 5e-7 * np.abs(terms).sum((0, 1))).all()
    if not keep:
        leaves = [torch.from_numpy(x).double().requires_grad_() for x in tensors]
        definition(case, leaves, mask, bias).backward(torch.from_numpy(dy).double())
        for found, leaf in zip(sums, leaves, strict=True):
            exact = leaf.grad.numpy()
            assert np.abs(found - exact.sum((0, 1))).max() <= 5e-6 * np.abs(exact).sum((0, 1)).max() + 1e-6
    for wanted in ((0,), (1,), (2,), (0, 2)):
        _, some = backward_sums(case, ints, read, wanted)
        for index, found in zip(wanted, some, strict=True):
            assert found.tobytes() == sums[index].tobytes()


def test_sums_of_many_rows_do_not_grow_row_by_row() -> None:
    """4,096 equal rows of dV: one by one they would add up 4e-5 short."""
    case = Case(1, 1, 4096, 1, 1, 3)
    tensors = [np.zeros((1, rows, 3), np.float32) for rows in (1, 4096, 4096)]
    dy = np.full((1, 1, 3), 0.7, np.float32)
    (_, _, dv), (_, _, sums) = backward_sums(case, case.backward(), [*tensors, None, None, dy, None])
    exact = dv.astype(np.float64).sum((0, 1))
    np.testing.assert_allclose(sums, exact, rtol=2e-6)


def test_sums_of_a_gradient_that_is_not_there_are_refused() -> None:
    case = Case(2, 3, 5, 2, 1, 7)
    tensors, _, _ = case.operands()
    dy, sums, scratch = normal(6, 2, 3, 14), np.zeros(14, np.float32), np.zeros(1 << 16, np.uint8)
    for index, name in enumerate(("dQ", "dK", "dV")):
        operands = [None] * 6
        operands[3 + index] = sums
        with pytest.raises(EdgeRazorError, match=f"{name} is absent"):
            kernel_run(
                "attention_grad", case.backward(), [0.5, 0.0], [*tensors, None, None, dy, None, *operands, scratch]
            )


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch(causal: bool) -> None:
    case = Case(2, 128, 128, 12, 12, 32, causal=causal)
    tensors, _, _ = case.operands()
    q, k, v = (torch.from_numpy(x).reshape(2, 128, 12, 32).transpose(1, 2) for x in tensors)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    shape = (2, 128, 384)
    operands = [*tensors, None, None, Out(shape), None, Scratch()]
    (y,), _ = run("attention", case.forward(), [case.scale, 0.0], operands, **CONTEXT)
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
        "attention_grad",
        case.backward(forms),
        floats,
        [*halves, mask, bias, dy, None, *outputs, *NO_SUMS, Scratch()],
        **CONTEXT,
    )
    theirs, _ = run(
        "attention_grad",
        case.backward(),
        floats,
        [*rounded, mask, bias, dy, None, *outputs, *NO_SUMS, Scratch()],
        **CONTEXT,
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("form", ["plain", "centered"])
@pytest.mark.parametrize(
    "case", [Case(2, 70, 66, 4, 2, 9), Case(3, 130, 130, 2, 2, 16), Case(1, 8, 65, 3, 1, 20)], ids=str
)
def test_backward_reads_razor(case: Case, form: str) -> None:
    """Q, K and V in different forms and with different numbers of values; heads that begin inside a column group."""
    tensors, mask, bias = case.operands()
    sparsities = (0.5, 0.9, 0.3)
    kept = [razor(x, s, form) for x, s in zip(tensors, sparsities, strict=True)]
    keeps = tuple(keep_count(x[0].size, s) for x, s in zip(tensors, sparsities, strict=True))
    packed = [pack(x, FORMS[form], keep) for x, keep in zip(tensors, keeps, strict=True)]
    dy = normal(6, case.n, case.t, case.heads * case.d)
    outputs = [Out(x.shape) for x in tensors]
    floats, tail = [case.scale, 0.0], [mask, bias, dy, None, *outputs, *NO_SUMS, Scratch()]
    ours, _ = run("attention_grad", case.backward((FORMS[form],) * 3, keeps), floats, [*packed, *tail], **CONTEXT)
    theirs, _ = run("attention_grad", case.backward(), floats, [*kept, *tail], **CONTEXT)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 3e-6)


def pack(x: np.ndarray, form: int, keep: int) -> np.ndarray:
    sizes = [form, *x.shape, keep]
    (packed,), _ = run("pack", sizes, [], [x, Out((packed_bytes(*sizes),), np.uint8), Scratch()])
    return packed


PRUNED = [
    (Case(1, 1, 1, 1, 1, 1), 1),
    (Case(2, 3, 5, 2, 1, 7), 2),
    (Case(2, 63, 63, 1, 1, 8, causal=True), 6),
    (Case(2, 65, 65, 2, 2, 32, causal=True, key_mask=True), 65),
    (Case(1, 197, 197, 3, 3, 64), 20),
    (Case(2, 70, 130, 4, 1, 12, bias=2, key_mask=True), 13),
    (Case(2, 65, 65, 4, 2, 4, ratio=0.5, causal=True, key_mask=True), 7),
    (Case(3, 66, 67, 2, 2, 4, ratio=0.3), 67),
]


FORMS_OF_PRUNED = ("plain", "dense", "bf16", "centered")


@pytest.mark.parametrize(
    ("case", "keep", "form"), [(*pair, FORMS_OF_PRUNED[i % 4]) for i, pair in enumerate(PRUNED)], ids=str
)
def test_pruned_probabilities(case: Case, keep: int, form: str) -> None:
    """The forward pass keeps each query's largest; the backward pass is the definition's on what was kept."""
    tensors, mask, bias = case.operands()
    shape, rows = (case.n, case.t, case.heads * case.d), case.n * case.heads * case.t
    out = Out((packed_bytes(4, case.n * case.heads, case.t, case.s, keep),), np.uint8)
    floats = [case.scale, case.ratio]
    (y, packed), _ = run(
        "attention", case.forward(keep), floats, [*tensors, mask, bias, Out(shape), out, Scratch()], **CONTEXT
    )
    (alone,), _ = run(
        "attention", case.forward(), floats, [*tensors, mask, bias, Out(shape), None, Scratch()], **CONTEXT
    )
    np.testing.assert_array_equal(y, alone)
    exact, factor = (x.numpy() for x in softmax(case, [torch.from_numpy(x).double() for x in tensors], mask, bias))
    kept, values, dropped = (x.reshape(exact.shape) for x in unpack_rows(packed, rows, case.s, keep))
    expected = keep_rows(exact.astype(np.float32), keep)
    assert (kept.sum(-1) == expected.sum(-1)).all()
    # Rounding of a score may swap two values that differ in their last bits.
    swapped = kept != expected
    smallest = np.where(expected, exact, 1).min(-1, keepdims=True)
    assert (np.abs(exact / smallest - 1) <= 1e-4)[swapped].all() and swapped.mean() < 1e-3
    np.testing.assert_allclose(values[kept], exact[kept], rtol=2**-8)
    np.testing.assert_array_equal(dropped[kept], (factor == 0)[kept])
    keeps = (0, 0, 0)
    operands, seen = tensors, tensors
    if form == "bf16":
        seen = [to_bf16(x) for x in tensors]
        operands = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in seen]
    elif form != "dense":
        keeps = tuple(keep_count(x[0].size, 0.5) for x in tensors)
        seen = [razor(x, 0.5, form) for x in tensors]
        operands = [pack(x, FORMS[form], k) for x, k in zip(tensors, keeps, strict=True)]
    dy = normal(6, *shape)
    heads = [by_head(case, torch.from_numpy(x).double()).numpy() for x in (*seen, dy)]
    wanted = pruned_gradients(*heads, values.astype(np.float64), factor, case.scale)
    ints, outputs = case.backward((FORMS[form],) * 3, keeps, keep), [Out(x.shape) for x in tensors]
    ours, _ = run(
        "attention_grad", ints, floats, [*operands, None, None, dy, packed, *outputs, *NO_SUMS, Scratch()], **CONTEXT
    )
    for x, found, gradient in zip(tensors, ours, wanted, strict=True):
        groups = x.shape[2] // case.d  # K and V are shared by query heads
        summed = gradient.reshape(case.n, groups, -1, x.shape[1], case.d).sum(2).transpose(0, 2, 1, 3).reshape(x.shape)
        if np.abs(summed).max() < 1e-9:  # of one probability, which is 1 whatever the scores
            assert np.abs(found).max() <= 1e-6
        else:
            assert_close(found, summed, 5e-6)
    for index in range(3):  # each gradient alone
        single = [out if i == index else None for i, out in enumerate(outputs)]
        (alone,), _ = run(
            "attention_grad", ints, floats, [*operands, None, None, dy, packed, *single, *NO_SUMS, Scratch()], **CONTEXT
        )
        np.testing.assert_array_equal(alone, ours[index])


def test_pruned_with_every_probability_is_the_exact_gradient() -> None:
    """Up to bf16 of the probabilities."""
    case = Case(2, 70, 70, 2, 1, 16, causal=True, key_mask=True)
    tensors, mask, bias = case.operands()
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in tensors]
    dy = normal(6, case.n, case.t, case.heads * case.d)
    definition(case, leaves, mask, bias).backward(torch.from_numpy(dy).double())
    out = Out((packed_bytes(4, case.n * case.heads, case.t, case.s, case.s),), np.uint8)
    floats, shape = [case.scale, 0.0], dy.shape
    operands = [*tensors, mask, bias, Out(shape), out, Scratch()]
    (_, packed), _ = run("attention", case.forward(case.s), floats, operands, **CONTEXT)
    outputs = [Out(x.shape) for x in tensors]
    operands = [*tensors, None, None, dy, packed, *outputs, *NO_SUMS, Scratch()]
    ours, _ = run("attention_grad", case.backward(keep=case.s), floats, operands, **CONTEXT)
    for found, leaf in zip(ours, leaves, strict=True):
        assert_close(found, leaf.grad, 2**-8)


def test_ties_are_broken_by_position() -> None:
    """Equal scores: 1/70 each, of which the first nine are kept."""
    case = Case(1, 2, 70, 1, 1, 4)
    (q, k, v), _, _ = case.operands()
    out = Out((packed_bytes(4, 1, 2, 70, 9),), np.uint8)
    operands = [np.zeros_like(q), k, v, None, None, Out(q.shape), out, Scratch()]
    (_, packed), _ = run("attention", case.forward(9), [0.5, 0.0], operands)
    kept, values, _ = unpack_rows(packed, 2, 70, 9)
    assert kept[:, :9].all() and not kept[:, 9:].any()
    np.testing.assert_array_equal(values, as_kept(np.full((2, 70), np.float32(1 / 70)), 9))


def test_a_mask_that_points_outside_is_refused() -> None:
    case = Case(1, 3, 70, 1, 1, 4)
    tensors, _, _ = case.operands()
    dy = normal(6, 1, 3, 4)
    scratch = np.empty(2**20, np.uint8)
    for word in (1 << 10, 0b111):  # a bit at key 74, and three values where two are kept
        packed = np.zeros(packed_bytes(4, 1, 3, 70, 2), np.uint8)
        packed[:48].view(np.uint64)[1] = word
        outputs = [np.empty_like(x) for x in tensors]
        operands = [*tensors, None, None, dy, packed, *outputs, *NO_SUMS, scratch]
        with pytest.raises(EdgeRazorError, match="attention_grad"):
            kernel_run("attention_grad", case.backward(keep=2), [0.5, 0.0], operands)


class Columns:
    """Q, K and V as columns of one matrix (of two where Q has other rows), in another order, with gaps of NaN."""

    def __init__(self, case: Case, shapes: list[tuple[int, ...]]) -> None:
        self.shapes = shapes
        together = [(2, 0, 1)] if case.t == case.s else [(0,), (2, 1)]
        self.matrix = [next(m for m, parts in enumerate(together) if i in parts) for i in range(3)]
        self.first, rows = [0] * 3, []
        for parts in together:
            end = 1
            for part in parts:
                self.first[part] = end
                end += shapes[part][2] + (part == 2)
            rows.append(end + 2)
        self.rows = rows
        self.ints = [value for i in range(3) for value in (rows[self.matrix[i]], self.first[i])]

    def empty(self) -> list[np.ndarray]:
        """The matrices, without the parts."""
        return [
            np.full((*self.shapes[self.matrix.index(m)][:2], row), np.nan, np.float32)
            for m, row in enumerate(self.rows)
        ]

    def part(self, matrices: list[np.ndarray], i: int) -> np.ndarray:
        return matrices[self.matrix[i]][:, :, self.first[i] : self.first[i] + self.shapes[i][2]]

    def operands(self, matrices: list[np.ndarray]) -> list[np.ndarray]:
        return [matrices[m] for m in self.matrix]

    def filled(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        matrices = self.empty()
        for i, part in enumerate(parts):
            self.part(matrices, i)[...] = part
        return matrices


def gradients_in_columns(
    columns: Columns, ints: list[int], floats: list[float], operands: list[np.ndarray | None], threads: int
) -> list[np.ndarray]:
    """dQ, dK and dV, written into shared matrices, and their sums, into rows like theirs. Nothing is written between
    them."""
    out, sums = columns.empty(), [np.full((1, 1, row), np.nan, np.float32) for row in columns.rows]
    scratch = np.full(kernel_scratch("attention_grad", ints, floats, threads), 0xFF, np.uint8)
    written = [*columns.operands(out), *columns.operands(sums)]
    kernel_run("attention_grad", ints, floats, [*operands, *written, scratch], threads, **CONTEXT)
    found = []
    for matrices in (out, sums):
        found += [columns.part(matrices, i).copy() for i in range(3)]
        for i in range(3):
            columns.part(matrices, i)[...] = np.nan
        assert all(np.isnan(matrix).all() for matrix in matrices)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_of_one_matrix_give_the_same_bits(case: Case) -> None:
    tensors, mask, bias = case.operands()
    shape, floats, dy = (case.n, case.t, case.heads * case.d), [case.scale, case.ratio], normal(6, *tensors[0].shape)
    columns = Columns(case, [x.shape for x in tensors])
    wide = columns.operands(columns.filled(tensors))
    for keep in (0, (case.s + 2) // 3):  # probabilities that are made again, and kept ones
        kept = Out((packed_bytes(4, case.n * case.heads, case.t, case.s, keep),), np.uint8) if keep else None
        tail = [mask, bias, Out(shape), kept, Scratch()]
        expected, _ = run("attention", case.forward(keep), floats, [*tensors, *tail], **CONTEXT)
        found, _ = run("attention", [*case.forward(keep), *columns.ints], floats, [*wide, *tail], **CONTEXT)
        for a, b in zip(found, expected, strict=True):
            assert a.tobytes() == b.tobytes()
        masks = [None, None] if keep else [mask, bias]
        middle = [*masks, dy, expected[1] if keep else None]
        outputs = [Out(x.shape) for x in tensors]
        for form in ("dense", "bf16", "centered"):
            read, places, keeps = wide, columns.ints, (0, 0, 0)
            operands = tensors
            if form != "dense":
                keeps = tuple(keep_count(x[0].size, 0.5) if form == "centered" else 0 for x in tensors)
                operands = read = [pack(x, FORMS[form], k) for x, k in zip(tensors, keeps, strict=True)]
                places = [value for x in tensors for value in (x.shape[2], 0)]
            ints = case.backward((FORMS[form],) * 3, keeps, keep)
            sums = [Out((x.shape[2],)) for x in tensors]
            expected, _ = run(
                "attention_grad", ints, floats, [*operands, *middle, *outputs, *sums, Scratch()], **CONTEXT
            )
            for threads in (1, 3):
                all_ints = [*ints, *places, *columns.ints]
                ours = gradients_in_columns(columns, all_ints, floats, [*read, *middle], threads)
                for a, b in zip(ours, expected, strict=True):
                    assert a.tobytes() == b.tobytes(), (keep, form, threads)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 11, "row must be 12 to"),  # shorter than Q's 12 columns
        (0, 2**31 + 1, "row must be 12 to"),
        (0, 2**62, "row must be 12 to"),
        (0, 40, "bytes, needs"),
        (1, -1, "column must be 0 to 12"),
        (1, 13, "column must be 0 to 12"),
        (1, 2**63 - 1, "column must be 0 to 12"),
        (2, 5, "row must be 6 to"),
        (3, 19, "column must be 0 to 18"),
        (7, 13, "column must be 0 to 12"),
        (9, 19, "column must be 0 to 18"),
        (11, -(2**63), "column must be 0 to 18"),
        (10, 48, "bytes, needs"),
    ],
)
def test_columns_that_do_not_fit_are_refused(at: int, value: int, message: str) -> None:
    case = Case(2, 3, 3, 4, 2, 3)
    columns = [24, 0, 24, 12, 24, 18]
    wide, y, scratch = np.zeros((2, 3, 24), np.float32), np.zeros((2, 3, 12), np.float32), np.zeros(1 << 16, np.uint8)
    changed = [*columns, *columns]
    changed[at] = value
    ints, floats = [*case.backward(), *changed], [0.5, 0.0]
    with pytest.raises(EdgeRazorError, match=message):
        kernel_run(
            "attention_grad",
            ints,
            floats,
            [wide, wide, wide, None, None, y, None, *[wide.copy()] * 3, *NO_SUMS, scratch],
        )
    if at < 6:
        ints = [*case.forward(), *changed[:6]]
        with pytest.raises(EdgeRazorError, match=message):
            kernel_run("attention", ints, floats, [wide, wide, wide, None, None, y, None, scratch])


def test_a_packed_tensor_has_no_columns() -> None:
    case = Case(2, 3, 3, 4, 2, 3)
    wide, y, scratch = np.zeros((2, 3, 24), np.float32), np.zeros((2, 3, 12), np.float32), np.zeros(1 << 16, np.uint8)
    ints = [*case.backward((1, 0, 0)), *[24, 0, 24, 12, 24, 18] * 2]
    with pytest.raises(EdgeRazorError, match="a packed tensor has no columns"):
        kernel_run(
            "attention_grad",
            ints,
            [0.5, 0.0],
            [wide, wide, wide, None, None, y, None, *[wide.copy()] * 3, *NO_SUMS, scratch],
        )


def test_large_scores_do_not_overflow() -> None:
    case = Case(1, 4, 70, 1, 1, 2)
    (q, k, v), _, _ = case.operands()
    q, k = q * 1e4, k * 1e4
    (y,), _ = run(
        "attention", case.forward(), [1.0, 0.0], [q, k, v, None, None, Out(q.shape), None, Scratch()], **CONTEXT
    )
    best = (q[0] @ k[0].T).argmax(1)
    np.testing.assert_allclose(y[0], v[0][best], rtol=1e-6)


def test_nan_spoils_its_own_query_only() -> None:
    case = Case(1, 70, 70, 1, 1, 4)
    (q, k, v), _, _ = case.operands()
    q[0, 9] = np.nan
    scratch = np.empty(2**20, np.uint8)
    y = np.empty_like(q)
    kernel_run("attention", case.forward(), [0.5, 0.0], [q, k, v, None, None, y, None, scratch], threads=2, **CONTEXT)
    assert np.isnan(y[0, 9]).all() and np.isnan(y).sum() == 4
