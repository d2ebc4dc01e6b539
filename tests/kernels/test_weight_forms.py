"""Weights as frozen parameters may be stored, rows of an output channel in float32, bf16 or int8: `conv`,
`conv_grad_input` and `embedding` give what the definition "expand the whole weight, then compute in float32" gives."""

from __future__ import annotations

import numpy as np
import pytest

from edge_razor.errors import NonFiniteError, UsageError
from edge_razor.runtime import kernel_run, kernel_scratch
from tests.kernels.harness import Out, normal, run
from tests.kernels.instruction_sets import check_under
from tests.kernels.test_conv import CASES, Case, assert_close, reference, scratch

FORMS = {"float": 1, "bf16": 2, "int8": 3}
LINEAR = {
    "linear": Case(3, 37, 1, 70, 130),
    "linear_wide": Case(2, 160, 1, 384, 96),  # more rows than a tile: the weight is packed again for each
    "linear_deep": Case(1, 9, 1, 1100, 24),  # several depth blocks
    "linear_row": Case(1, 1, 1, 129, 65),
    "linear_one": Case(1, 5, 1, 1, 1),
}
# The way from a weight's element to the product is what the forms change: one case of each kernel's path suffices.
OTHERS = (
    *("pointwise_strided", "first_layer", "k3_deep", "stride_above_kernel", "mixed_strides", "dilated_strided"),
    *("one_channel", "winograd_odd", "winograd_chunks", "winograd_asymmetric", "groups", "groups_odd", "groups_wide"),
    "joined_beyond_the_depth",
)
ALL = {**LINEAR, **{name: CASES[name] for name in OTHERS}}


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even; the upper half of each float."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored(rows: np.ndarray, form: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of rows as bytes in a form (docs/plan-format.md, "Weights"), and the float32 that they stand for."""
    if form == 1:
        return rows, rows
    if form == 2:
        halves = bf16(rows)
        return halves, (halves.astype(np.uint32) << 16).view(np.float32)
    scale = (np.abs(rows).max(1) / np.float32(127)).astype(np.float32)
    q = np.rint(rows / np.where(scale, scale, 1)[:, None]).clip(-127, 127).astype(np.int8)
    head = np.zeros(-(-len(rows) // 16) * 16, np.float32)
    head[: len(rows)] = scale
    return np.concatenate([head.view(np.uint8), q.view(np.uint8).reshape(-1)]), q.astype(np.float32) * scale[:, None]


def weight(case: Case, form: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight in a form, and HWIO in float32."""
    shape = (case.oc, case.k[0], case.k[1], case.ic // case.group)
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal(shape).astype(np.float32) * rng.uniform(0.1, 10, (case.oc, 1, 1, 1)).astype(np.float32)
    if form == 3:
        rows[0] = 0  # a channel of zeros has the scale 0
    data, values = stored(rows.reshape(case.oc, -1), form)
    return data, np.ascontiguousarray(values.reshape(shape).transpose(1, 2, 3, 0))


def check_case(case: Case, form: int, threads: int) -> None:
    x, _, dy = case.tensors()
    data, hwio = weight(case, form)
    y, dx = reference(case, x, hwio, dy)
    scale, shift = normal(1, case.oc), normal(2, case.oc)
    out = np.full(y.shape, np.nan, np.float32)
    ints = [*case.ints, 0, 0, form]
    room = scratch("conv", ints, [0.0, 0.0], threads)
    kernel_run("conv", ints, [0.0, 0.0], [x, data, scale, shift, out, None, room], threads)
    assert_close(out, y * scale + shift)
    for factor in (None, scale) if threads == 3 else (None,):
        into = np.full(dx.shape, np.nan, np.float32)
        ints = [*case.ints, 0, 0, 0, 0, form]
        room = scratch("conv_grad_input", ints, [0.0, 0.0], threads)
        kernel_run("conv_grad_input", ints, [0.0, 0.0], [dy, data, factor, into, None, None, room], threads)
        expected = dx if factor is None else reference(case, x, hwio * factor, dy)[1]
        assert_close(into, expected)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ALL)
def test_is_the_product_with_the_expanded_weight(name: str, form: int) -> None:
    for threads in (1, 3):
        check_case(ALL[name], form, threads)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_same_bits_as_with_the_expanded_weight_in_rows(form: int) -> None:
    """Expanding while packing adds no rounding: form 1 with the values that the bytes stand for gives the same bits."""
    case = LINEAR["linear_wide"]
    x, _, dy = case.tensors()
    data, hwio = weight(case, form)
    expanded = np.ascontiguousarray(hwio.transpose(3, 0, 1, 2))
    for kernel, operand, shape, tail in (
        ("conv", x, (case.n, *case.out, case.oc), [0, 0]),
        ("conv_grad_input", dy, (case.n, case.ih, case.iw, case.ic), [0, 0, 0, 0]),
    ):
        results = []
        for stored_as, matrix in ((form, data), (1, expanded)):
            result = np.full(shape, np.nan, np.float32)
            ints = [*case.ints, *tail, stored_as]
            operands = [operand, matrix, None, *([None, result] if kernel == "conv" else [result, None])]
            room = scratch(kernel, ints, [0.0, 0.0], 2)
            kernel_run(kernel, ints, [0.0, 0.0], [*operands, None, room], 2)
            results.append(result)
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize(("n", "vocabulary", "cols"), [(1, 1, 1), (5, 3, 7), (64, 11, 64), (700, 90, 33)])
def test_embedding(n: int, vocabulary: int, cols: int, form: int) -> None:
    ids = np.random.default_rng(0).integers(0, vocabulary, n).astype(np.int32)
    data, values = stored(normal(1, vocabulary, cols), form)
    (y,), _ = run("embedding", [n, vocabulary, cols, form], [], [ids, data, Out((n, cols))])
    np.testing.assert_array_equal(y, values[ids])
    with pytest.raises(NonFiniteError):
        kernel_run("embedding", [1, vocabulary, cols, form], [], [np.array([vocabulary], np.int32), data, y[:1].copy()])


@pytest.mark.parametrize("form", [-1, 4, 2**40])
def test_an_unknown_form_is_refused(form: int) -> None:
    case = LINEAR["linear"]
    x, w, dy = case.tensors()
    with pytest.raises(UsageError, match=f"the form of W must be 0 to 3, not {form}"):
        kernel_run("conv", [*case.ints, 0, 0, form], [0.0, 0.0], [x, w, None, None, dy.copy(), None, None])
    with pytest.raises(UsageError):
        kernel_scratch("conv_grad_input", [*case.ints, 0, 0, 0, 0, form], [0.0, 0.0])
    with pytest.raises(UsageError, match="form must be 0 to 3"):
        kernel_run("embedding", [1, 2, 3, form], [], [np.zeros(1, np.int32), w, dy])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_weight_of_another_size_than_its_form_is_refused(form: int) -> None:
    case = LINEAR["linear"]
    x, _, dy = case.tensors()
    data, _ = weight(case, form)
    raw = data.reshape(-1).view(np.uint8)
    room = scratch("conv", [*case.ints, 0, 0, form], [0.0, 0.0], 1)
    for wrong in (raw[:-1], np.append(raw, np.uint8(0))):
        with pytest.raises(UsageError, match=f"W has {wrong.nbytes} bytes, needs {raw.nbytes}"):
            operands = [x, wrong, None, None, dy.copy(), None, room]
            kernel_run("conv", [*case.ints, 0, 0, form], [0.0, 0.0], operands)


def test_depthwise_weights_have_one_form() -> None:
    case = CASES["depthwise_3"]
    x, w, dy = case.tensors()
    with pytest.raises(UsageError, match="depthwise"):
        kernel_run("conv", [*case.ints, 0, 0, 1], [0.0, 0.0], [x, w, None, None, dy.copy(), None, None])


@pytest.mark.parametrize("isa", ["portable", "avx2"])  # avx512 is what all of this runs with where there is one
def test_every_instruction_set_passes(isa: str) -> None:
    check_under(isa, ["weight_forms", "row_sets"], "int8 and not wide or bits or embedding or by_rows or adamw")
