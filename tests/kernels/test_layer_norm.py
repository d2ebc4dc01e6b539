"""LayerNorm and RMSNorm, forward and backward, from every kept form of the normalized value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_razor.errors import UsageError
from edge_razor.runtime import kernel_run, kernel_scratch, packed_bytes, unpack
from tests.kernels.harness import Out, Scratch, assert_close, normal, run
from tests.kernels.test_razor import pack
from tests.reference.razor import FORMS, keep_count

SHAPES = [(1, 1), (3, 1), (1, 63), (63, 64), (65, 17), (130, 100), (7, 1000), (2, 3), (197, 192)]
EPSILON = 1e-5


def reference(
    x: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, rms: bool
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Y and xhat in float64, and the leaves x, gamma, beta."""
    leaves = [
        torch.from_numpy(np.ones(x.shape[-1]) * default if v is None else v).double().requires_grad_()
        for v, default in ((x, 0), (gamma, 1), (beta, 0))
    ]
    z, g, b = leaves
    centered = z if rms else z - z.mean(-1, keepdim=True)
    xhat = centered / (centered.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    return xhat * g + b, xhat, leaves


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int], affine: bool, rms: bool) -> None:
    rows, cols = shape
    x = 3 * normal(1, *shape) + 5
    gamma, beta = (normal(2, cols), normal(3, cols)) if affine else (None, None)
    expected, xhat, _ = reference(x, gamma, beta, rms)
    operands = [x, gamma, beta, Out(shape), Out(shape), Out((rows,))]
    (y, normalized, rstd), _ = run("layer_norm", [rows, cols, int(rms)], [EPSILON], operands)
    # (x − mean)/std of a row of one element is 0 over √ε, where rounding of the mean counts in full.
    assert_close(y, expected.detach(), 3e-6)
    assert_close(normalized, xhat.detach(), 3e-6) if cols > 1 else np.testing.assert_allclose(normalized, xhat.detach())
    z = torch.from_numpy(x).double()
    variance = z.square().mean(-1) if rms else z.var(-1, unbiased=False)
    np.testing.assert_allclose(rstd, (variance + EPSILON).rsqrt(), rtol=2e-6)
    if not rms and affine:
        own = torch.nn.functional.layer_norm(
            torch.from_numpy(x), [cols], *map(torch.from_numpy, (gamma, beta)), EPSILON
        )
        assert_close(y, own, 2e-5)
    (alone,), _ = run("layer_norm", [rows, cols, int(rms)], [EPSILON], [x, gamma, beta, Out(shape), None, None])
    np.testing.assert_array_equal(alone, y)


def test_variance_survives_a_large_mean() -> None:
    x = normal(1, 4, 512) + 1e4
    expected, _, _ = reference(x, None, None, False)
    (y,), _ = run("layer_norm", [4, 512, 0], [EPSILON], [x, None, None, Out(x.shape), None, None])
    assert_close(y, expected.detach(), 2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 1, 17), (2, 63, 16), (2, 65, 33), (3, 197, 48), (40, 70, 8)])
def test_gradient_from_every_form(shape: tuple[int, int, int], rms: bool, form: str) -> None:
    samples, rows, cols = shape
    x, gamma, dy = normal(1, *shape), normal(2, cols), normal(3, *shape)
    y, xhat, (z, g, b) = reference(x, gamma, normal(4, cols), rms)
    normalized = xhat.detach().float().numpy()
    rstd = np.ascontiguousarray(
        ((x.astype(np.float64) - (0 if rms else x.mean(-1, keepdims=True, dtype=np.float64))) ** 2).mean(-1) + EPSILON
    )
    rstd = (rstd**-0.5).astype(np.float32)
    keep = keep_count(rows * cols, 0.8) if FORMS[form] >= 2 else 0
    kept = normalized if form == "dense" else pack(normalized, form, keep)
    seen = normalized if form == "dense" else unpack(FORMS[form], *shape, keep, kept)
    ints = [FORMS[form], *shape, keep, int(rms)]
    operands = [kept, dy, rstd, gamma, Out(shape), Out((cols,)), Out((cols,)), None, None, Scratch()]
    (dx, dgamma, dbeta), _ = run("layer_norm_grad", ints, [], operands)
    seen64, dy64 = seen.astype(np.float64), dy.astype(np.float64)
    scaled = dy64 * gamma
    mean = 0 if rms else scaled.mean(-1, keepdims=True)
    by_definition = rstd[..., None] * (scaled - mean - seen64 * (scaled * seen64).mean(-1, keepdims=True))
    assert_close(dx, by_definition, 3e-6)
    assert_close(dgamma, (dy64 * seen64).sum((0, 1)), 3e-6)
    assert_close(dbeta, dy64.sum((0, 1)), 3e-6)
    if form == "dense":
        y.backward(torch.from_numpy(dy).double())
        scale = float(rstd.max() * np.abs(scaled).max())  # of what cancels in dX where a row has few columns
        assert np.abs(dx - z.grad.numpy()).max() <= 2e-6 * scale
        assert_close(dgamma, g.grad, 3e-6)
        assert_close(dbeta, b.grad, 3e-6)
    for threads in (1, 2):
        same = dy.copy()
        scratch = np.empty(2**20, np.uint8)
        kernel_run("layer_norm_grad", ints, [], [kept, same, rstd, gamma, same, *[None] * 4, scratch], threads=threads)
        np.testing.assert_array_equal(same, dx)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 5), (3, 7, 17), (2, 63, 16), (2, 65, 33), (3, 197, 48), (40, 70, 8), (2, 9, 1000)]
)
def test_a_residual_is_added_and_the_sums_are_taken(shape: tuple[int, int, int], rms: bool, form: str) -> None:
    """Rows < 8, one chunk and more chunks than blocks among the shapes; in place of dY, of the addend and of both."""
    samples, rows, cols = shape
    normalized, gamma, dy, addend = (normal(i, *shape) if i != 2 else normal(2, cols) for i in range(1, 5))
    rstd = np.abs(normal(5, samples, rows)) + np.float32(0.5)
    keep = keep_count(rows * cols, 0.8) if FORMS[form] >= 2 else 0
    kept = normalized if form == "dense" else pack(normalized, form, keep)
    seen = normalized if form == "dense" else unpack(FORMS[form], *shape, keep, kept)
    ints, read = [FORMS[form], *shape, keep, int(rms)], [kept, dy, rstd, gamma]
    vector = Out((cols,))
    (plain, *expected), _ = run("layer_norm_grad", ints, [], [*read, Out(shape), vector, vector, None, None, Scratch()])
    operands = [*read, Out(shape), vector, vector, addend, vector, Scratch()]
    (dx, dgamma, dbeta, sums), _ = run("layer_norm_grad", ints, [], operands)
    scaled = dy.astype(np.float64) * gamma
    mean = 0 if rms else scaled.mean(-1, keepdims=True)
    exact = rstd[..., None] * (scaled - mean - seen.astype(np.float64) * (scaled * seen).mean(-1, keepdims=True))
    assert_close(dx, exact + addend, 3e-6)
    np.testing.assert_allclose(dx, plain.astype(np.float64) + addend, rtol=2e-7, atol=1e-6 * float(np.abs(plain).max()))
    for found, wanted in zip((dgamma, dbeta), expected, strict=True):
        assert found.tobytes() == wanted.tobytes()
    terms = dx.astype(np.float64)
    assert (np.abs(sums - terms.sum((0, 1))) <= 5e-7 * np.abs(terms).sum((0, 1))).all()
    (alone, own), _ = run("layer_norm_grad", ints, [], [*read, Out(shape), *[None] * 3, vector, Scratch()])
    assert alone.tobytes() == plain.tobytes()
    terms = plain.astype(np.float64)
    assert (np.abs(own - terms.sum((0, 1))) <= 5e-7 * np.abs(terms).sum((0, 1))).all()
    for threads in (1, 2):
        scratch = np.empty(kernel_scratch("layer_norm_grad", ints, [], threads), np.uint8)
        for aliased in ("dY", "addend"):
            d, a, out = dy.copy(), addend.copy(), np.empty(cols, np.float32)
            same = d if aliased == "dY" else a
            kernel_run(
                "layer_norm_grad", ints, [], [kept, d, rstd, gamma, same, None, None, a, out, scratch], threads=threads
            )
            assert same.tobytes() == dx.tobytes() and out.tobytes() == sums.tobytes(), (threads, aliased)
    (twice,), _ = run("layer_norm_grad", ints, [], [*read, Out(shape), None, None, dy, None, Scratch()])
    same = dy.copy()
    scratch = np.empty(kernel_scratch("layer_norm_grad", ints, [], 2), np.uint8)
    kernel_run("layer_norm_grad", ints, [], [kept, same, rstd, gamma, same, None, None, same, None, scratch], threads=2)
    assert same.tobytes() == twice.tobytes()


def test_sums_of_many_rows_do_not_grow_row_by_row() -> None:
    """128 samples of 2,048 equal rows, whose xhat is 0 and whose mean is not taken off: dX is dY. Those of a chunk, one
    by one, would add up 4e-5 short."""
    shape = (128, 2048, 3)
    ones, value = np.ones(shape[:2], np.float32), np.float32(0.7)
    dy, zeros = np.full(shape, value), np.zeros(shape, np.float32)
    operands = [zeros, dy, ones, None, Out(shape), None, Out((3,)), None, Out((3,)), Scratch()]
    (dx, dbeta, sums), _ = run("layer_norm_grad", [0, *shape, 0, 1], [], operands)
    np.testing.assert_array_equal(dx, dy)
    for found in (dbeta, sums):
        np.testing.assert_allclose(found, float(value) * 128 * 2048, rtol=2e-6)


def test_sums_of_a_gradient_that_is_not_there_are_refused() -> None:
    shape = (2, 3, 5)
    dy, rstd, sums, scratch = normal(1, *shape), normal(2, 2, 3), np.zeros(5, np.float32), np.zeros(1 << 16, np.uint8)
    operands = [dy, dy, rstd, None, None, None, None, None, sums, scratch]
    with pytest.raises(UsageError, match="dX is absent"):
        kernel_run("layer_norm_grad", [0, *shape, 0, 0], [], operands)


def test_gradient_without_gamma_and_of_gamma_alone() -> None:
    shape = (2, 70, 24)
    x, dy = normal(1, *shape), normal(2, *shape)
    y, xhat, (z, _, _) = reference(x, None, None, False)
    y.backward(torch.from_numpy(dy).double())
    normalized = xhat.detach().float().numpy()
    rstd = (x.astype(np.float64).var(-1) + EPSILON) ** -0.5
    operands = [normalized, dy, rstd.astype(np.float32), None]
    ints = [0, *shape, 0, 0]
    (dx,), _ = run("layer_norm_grad", ints, [], [*operands, Out(shape), *[None] * 4, Scratch()])
    assert_close(dx, z.grad, 3e-6)
    (dgamma,), _ = run("layer_norm_grad", ints, [], [*operands, None, Out((24,)), *[None] * 3, Scratch()])
    assert_close(dgamma, (dy.astype(np.float64) * normalized).sum((0, 1)), 3e-6)


def test_a_kept_tensor_whose_offsets_point_outside_is_refused() -> None:
    shape = (1, 70, 20)
    keep = keep_count(70 * 20, 0.9)
    kept = pack(normal(1, *shape), "centered", keep)
    kept[: packed_bytes(3, *shape, keep) - keep] = 0xFF
    dy = normal(2, *shape)
    scratch = np.empty(2**20, np.uint8)
    with pytest.raises(Exception, match="NaN or infinite") as caught:
        kernel_run(
            "layer_norm_grad", [3, *shape, keep, 0], [], [kept, dy, dy[0, :, 0].copy(), None, dy, *[None] * 4, scratch]
        )
    assert not isinstance(caught.value, UsageError)
