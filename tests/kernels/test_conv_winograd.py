"""Which convolutions go through Winograd's tiles, how exact they are, and what memory they take. Their results are
compared with PyTorch in test_conv.py, beside the other ways."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_razor.runtime import kernel_scratch
from tests.kernels.test_conv import SAME, WINOGRAD, Case, assert_close, conv, grad_input, reference
from tests.kernels.test_conv_weight import Geometry, expected, gradient

K3 = (3, 3)
# ResNet's layers for 224 pixels.
RESNET = [(56, 64), (28, 128), (14, 256), (7, 512)]


def directly(case: Case) -> tuple[Case, np.ndarray, np.ndarray, np.ndarray]:
    """The same convolution with a fourth column of zeros in the kernel, which sums directly: the case, X, W, dY."""
    top, left, bottom, right = case.pads
    x, w, dy = case.tensors(5)
    direct = replace(case, k=(3, 4), pads=(top, left, bottom, right + case.d[1]))
    return direct, x, np.concatenate([w, np.zeros_like(w[:, :1])], 1), dy


def by_tiles(case: Case, gradient: bool, threads: int) -> bool:
    """Whether the result is rounded otherwise than the direct sums."""
    direct, x, wide, dy = directly(case)
    w = np.ascontiguousarray(wide[:, :3])
    if gradient:
        return not np.array_equal(grad_input(case, dy, w, threads=threads), grad_input(direct, dy, wide))
    return not np.array_equal(conv(case, x, w, threads=threads)[0], conv(direct, x, wide)[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", WINOGRAD)
def test_the_cases_of_test_conv_are_on_this_way(name: str, threads: int) -> None:
    assert by_tiles(WINOGRAD[name], False, threads)
    assert by_tiles(WINOGRAD[name], True, threads) == ("from" not in name)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(8, 14, 14, 31, 32, K3, pads=SAME), id="few input channels"),
        pytest.param(Case(8, 14, 14, 32, 31, K3, pads=SAME), id="few output channels"),
        pytest.param(Case(1, 6, 6, 32, 32, K3, pads=SAME), id="few tiles"),
        pytest.param(Case(8, 3, 3, 32, 32, K3, pads=SAME), id="3x3 map"),
        pytest.param(Case(64, 1, 1, 64, 64, K3, pads=SAME), id="1x1 map"),
        pytest.param(Case(16, 1, 7, 64, 64, K3, pads=SAME), id="1x7 map"),
        pytest.param(Case(1, 12, 12, 32, 1025, K3, pads=SAME), id="too many channels"),
        pytest.param(Case(2, 14, 14, 32, 32, K3, pads=(3, 1, 1, 1)), id="wide padding"),
        pytest.param(Case(2, 14, 14, 64, 64, K3, pads=SAME, group=2), id="groups"),
        pytest.param(Case(2, 14, 14, 32, 32, K3, pads=(2, 2, 2, 2), d=(2, 1)), id="dilated"),
        pytest.param(Case(2, 28, 14, 32, 32, K3, (2, 1), SAME), id="strided"),
    ],
)
def test_other_shapes_are_not(case: Case) -> None:
    assert not by_tiles(case, False, 2)
    assert not by_tiles(case, True, 2)
    x, w, dy = case.tensors()
    y, dx = reference(case, x, w, dy)
    assert_close(conv(case, x, w, threads=2)[0], y)
    assert_close(grad_input(case, dy, w, threads=2), dx)


@pytest.mark.parametrize("size, channels", RESNET)
def test_rounding_is_near_that_of_the_direct_sum(size: int, channels: int) -> None:
    case = Case(1 if size > 14 else 2, size, size, channels, channels, K3, pads=SAME)
    direct, x, wide, dy = directly(case)
    w = np.ascontiguousarray(wide[:, :3])
    y, dx = reference(case, x, w, dy)
    for ours, theirs, exact in (
        (conv(case, x, w)[0], conv(direct, x, wide)[0], y),
        (grad_input(case, dy, w), grad_input(direct, dy, wide), dx),
    ):
        error, limit = (np.sqrt(np.mean((result - exact) ** 2)) for result in (ours, theirs))
        assert 0 < error <= 2 * limit
        assert np.abs(ours - exact).max() <= 4 * np.abs(theirs - exact).max()


@pytest.mark.parametrize("threads", [1, 2])
def test_nan_reaches_the_results_that_depend_on_it_and_no_other(threads: int) -> None:
    case = WINOGRAD["winograd"]
    for y, x in ((0, 0), (6, 7), (7, 6), (13, 12)):
        values, w, dy = case.tensors()
        values[0, y, x, 3] = dy[0, y, x, 3] = np.nan
        expected = np.zeros((14, 14), bool)
        expected[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = True
        assert np.array_equal(np.isnan(conv(case, values, w, threads=threads)[0][0]).all(-1), expected)
        assert np.array_equal(np.isnan(grad_input(case, dy, w, threads=threads)[0]).any(-1), expected)


@pytest.mark.parametrize("size, channels", RESNET)
def test_scratch_of_two_threads_is_bounded(size: int, channels: int) -> None:
    for batch in (1, 8, 64):
        case = Case(batch, size, size, channels, channels, K3, pads=SAME)
        for kernel, tail, floats in (("conv", [0, 0], [0.0, 0.0]), ("conv_grad_input", [0, 0, 0, 0], [0.0, 0.0])):
            assert 0 < kernel_scratch(kernel, [*case.ints, *tail], floats, 2) <= 4_200_000


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pads = tuple(draw(st.integers(0, 2)) for _ in range(4))
    ih, iw = draw(st.integers(3, 17)), draw(st.integers(3, 17))
    ic, oc = draw(st.integers(32, 80)), draw(st.integers(32, 80))
    return Case(draw(st.integers(1, 9)), ih, iw, ic, oc, K3, pads=pads)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 5), st.integers(0, 9))
def test_any_3x3(case: Case, threads: int, seed: int) -> None:
    x, w, dy = case.tensors(seed)
    rng = np.random.default_rng(seed)
    scale, shift = (rng.uniform(-2, 2, case.oc).astype(np.float32) for _ in range(2))
    base = rng.standard_normal(x.shape).astype(np.float32)
    y, dx = reference(case, x, w, dy * scale)
    assert_close(conv(case, x, w, scale, shift, threads=threads)[0], y * scale + shift)
    assert_close(grad_input(case, dy, w, scale, into=base, threads=threads), dx + base)


def weight_gradient(g: Geometry, seed: int, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kernel's weight gradient of random tensors, the float64 one, and that of magnitudes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((g.n, g.ih * g.iw, g.ic)).astype(np.float32)
    dy = rng.standard_normal((g.n, g.oh, g.ow, g.oc)).astype(np.float32)
    return gradient(g, 0, 0, x, dy, threads), *expected(g, x, dy)


@pytest.mark.parametrize("size, channels", RESNET)
def test_weight_gradients_are_rounded_nearly_as_direct_sums(size: int, channels: int) -> None:
    """Against float32 sums in columns of the definition: numpy's matrix product."""
    n = 1 if size > 14 else 2
    g = Geometry(n, size, size, channels, channels, 3, 3, pads=(1, 1, 1, 1))
    ours, exact, _ = weight_gradient(g, 0, 2)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, size * size, channels)).astype(np.float32).reshape(n, size, size, channels)
    dy = rng.standard_normal((n, size, size, channels)).astype(np.float32).reshape(-1, channels)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for ky in range(3):
        for kx in range(3):
            column = np.ascontiguousarray(padded[:, ky : ky + size, kx : kx + size]).reshape(-1, channels)
            direct = column.T @ dy
            assert not np.array_equal(ours[ky, kx], direct)  # it took the other way
            error, limit = (np.sqrt(np.mean((g_ - exact[ky, kx]) ** 2)) for g_ in (ours[ky, kx], direct))
            assert error <= 3 * limit


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 5), st.integers(0, 9))
def test_any_weight_gradient(case: Case, threads: int, seed: int) -> None:
    g = Geometry(case.n, case.ih, case.iw, case.ic, case.oc, 3, 3, pads=case.pads)
    ours, exact, size = weight_gradient(g, seed, threads)
    assert np.all(np.abs(ours - exact) <= 32 * 2**-24 * size)


@pytest.mark.parametrize("ic, oc", [(32, 32), (130, 40), (48, 300), (257, 129)])
def test_weight_gradients_of_several_blocks_of_channels(ic: int, oc: int) -> None:
    g = Geometry(2, 15, 12, ic, oc, 3, 3, pads=(1, 1, 1, 1))
    for threads in (1, 2, 3):
        ours, exact, size = weight_gradient(g, threads, threads)
        assert np.all(np.abs(ours - exact) <= 32 * 2**-24 * size)


def test_a_nan_channel_spoils_its_own_weight_gradient_only() -> None:
    g = Geometry(2, 14, 14, 64, 64, 3, 3, pads=(1, 1, 1, 1))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((g.n, 196, 64)).astype(np.float32)
    dy = rng.standard_normal((g.n, 14, 14, 64)).astype(np.float32)
    x[0, 30, 5] = dy[1, 3, 4, 9] = np.nan
    spoilt = np.isnan(gradient(g, 0, 0, x, dy, 2))
    assert spoilt[:, :, 5].all() and spoilt[:, :, :, 9].all()
    assert spoilt.sum() == 9 * (64 + 64 - 1)


@pytest.mark.parametrize("size, channels", RESNET)
def test_scratch_of_weight_gradients_is_bounded(size: int, channels: int) -> None:
    for batch in (1, 8, 64):
        g = Geometry(batch, size, size, channels, channels, 3, 3, pads=(1, 1, 1, 1))
        assert 0 < kernel_scratch("conv_grad_weight", [*g.ints(), 0, 0], [], 2) <= 4_300_000
