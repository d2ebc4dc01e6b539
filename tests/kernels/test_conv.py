"""`conv` and `conv_grad_input` against PyTorch in float64: every path, odd shapes, fused activations, kept forms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_razor.errors import UsageError
from edge_razor.runtime import kernel_run, kernel_scratch
from tests.kernels.instruction_sets import check_under

# Sums of at most ~5,000 float32 products, error relative to the largest result.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A convolution; `pads` is top, left, bottom, right."""

    n: int
    ih: int
    iw: int
    ic: int
    oc: int
    k: tuple[int, int] = (1, 1)
    s: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    d: tuple[int, int] = (1, 1)
    group: int = 1

    @property
    def out(self) -> tuple[int, int]:
        t, left, b, r = self.pads
        return (
            (self.ih + t + b - (self.k[0] - 1) * self.d[0] - 1) // self.s[0] + 1,
            (self.iw + left + r - (self.k[1] - 1) * self.d[1] - 1) // self.s[1] + 1,
        )

    @property
    def ints(self) -> list[int]:
        oh, ow = self.out
        shape = [self.n, self.ih, self.iw, self.ic, oh, ow, self.oc, *self.k, *self.s]
        return [*shape, self.pads[0], self.pads[1], *self.d, self.group]

    def tensors(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """X [n,ih,iw,ic], W [kh,kw,ic/group,oc], dY [n,oh,ow,oc], float32."""
        rng = np.random.default_rng(seed)
        shapes = (
            (self.n, self.ih, self.iw, self.ic),
            (*self.k, self.ic // self.group, self.oc),
            (self.n, *self.out, self.oc),
        )
        x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        return x, w, dy


SAME = (1, 1, 1, 1)
# Large enough for Winograd's tiles with three threads, forward and gradient, save where said.
WINOGRAD = {
    "winograd": Case(1, 14, 14, 32, 32, (3, 3), pads=SAME),
    "winograd_7": Case(8, 7, 7, 64, 48, (3, 3), pads=SAME),
    "winograd_odd": Case(3, 13, 9, 45, 70, (3, 3), pads=SAME),
    "winograd_unpadded": Case(2, 15, 14, 33, 37, (3, 3)),
    "winograd_padded_2": Case(2, 12, 11, 40, 65, (3, 3), pads=(2, 2, 2, 2)),
    "winograd_asymmetric": Case(2, 12, 13, 47, 32, (3, 3), pads=(0, 1, 2, 0)),
    "winograd_asymmetric_2": Case(2, 11, 14, 32, 79, (3, 3), pads=(2, 0, 1, 2)),
    "winograd_blocks": Case(1, 29, 31, 32, 33, (3, 3), pads=SAME),
    "winograd_chunks": Case(1, 13, 14, 160, 300, (3, 3), pads=SAME),
    "winograd_deep": Case(1, 12, 13, 1024, 40, (3, 3), pads=SAME),
    "winograd_small_output": Case(40, 4, 4, 32, 35, (3, 3)),
    # forward only: the gradient's maps are too small
    "winograd_from_1x1": Case(12, 1, 1, 33, 40, (3, 3), pads=(2, 2, 3, 3)),
    "winograd_from_1x7": Case(4, 1, 7, 40, 33, (3, 3), pads=(2, 2, 2, 2)),
}
CASES = {
    # pointwise
    "one_everything": Case(1, 1, 1, 1, 1),
    "pointwise_63_rows": Case(1, 9, 7, 5, 17),
    "pointwise_64_rows": Case(1, 8, 8, 16, 96),
    "pointwise_65_rows": Case(1, 65, 1, 33, 65),
    "pointwise_prime": Case(3, 7, 11, 13, 131),
    "pointwise_deep": Case(2, 5, 5, 1031, 70),
    "pointwise_tiles": Case(2, 17, 19, 24, 144),
    "pointwise_wide": Case(1, 7, 7, 64, 1000),
    "linear_one_row": Case(1, 1, 1, 1280, 1000),
    "linear_8_rows": Case(8, 1, 1, 320, 203),
    "pointwise_strided": Case(2, 9, 8, 12, 20, s=(2, 2)),
    "pointwise_padded": Case(1, 4, 5, 3, 9, pads=(1, 0, 2, 1)),
    # general
    "first_layer": Case(2, 23, 21, 3, 32, (3, 3), (2, 2), (1, 1, 1, 1)),
    "first_layer_asymmetric": Case(1, 16, 16, 3, 24, (3, 3), (2, 2), (0, 0, 1, 1)),
    "resnet_stem": Case(1, 29, 31, 3, 64, (7, 7), (2, 2), (3, 3, 3, 3)),
    "k3": Case(2, 14, 13, 20, 36, (3, 3), (1, 1), (1, 1, 1, 1)),
    "k3_deep": Case(1, 7, 7, 530, 40, (3, 3), (1, 1), (1, 1, 1, 1)),
    "k3_stride_2": Case(2, 15, 12, 8, 70, (3, 3), (2, 2), (1, 1, 1, 1)),
    "stride_3": Case(1, 17, 16, 7, 11, (3, 2), (3, 3), (1, 0, 0, 1)),
    "stride_above_kernel": Case(2, 11, 13, 5, 6, (2, 1), (3, 4)),
    "mixed_strides": Case(1, 10, 9, 4, 6, (3, 5), (1, 2), (2, 0, 1, 3)),
    "dilated": Case(1, 15, 17, 9, 10, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    "dilated_strided": Case(2, 15, 17, 6, 10, (3, 3), (2, 2), (2, 3, 2, 3), (2, 3)),
    "dilation_shares_stride": Case(1, 19, 19, 4, 5, (4, 3), (4, 6), (1, 2, 3, 4), (2, 4)),
    "kernel_above_input": Case(2, 3, 2, 5, 6, (7, 5), (1, 1), (3, 2, 3, 2)),
    "padding_above_kernel": Case(1, 3, 3, 4, 5, (2, 2), (1, 1), (4, 3, 4, 3)),
    "leftover_input": Case(1, 10, 11, 3, 4, (2, 2), (4, 4)),
    "one_channel": Case(2, 9, 9, 1, 1, (3, 3), (1, 1), (1, 1, 1, 1)),
    "many_taps": Case(1, 40, 41, 2, 3, (31, 33), (1, 1), (15, 16, 15, 16)),
    "patches": Case(2, 32, 32, 3, 24, (8, 8), (8, 8)),
    # few channels: a tap joins the pixels of a kernel row
    "joined_of_several_tiles": Case(3, 61, 53, 4, 9, (3, 3), (1, 1), SAME),
    "joined_lines_of_three": Case(2, 900, 3, 16, 5, (3, 5), (1, 1), (1, 2, 1, 2)),
    "joined_all_over_the_edge": Case(1, 2500, 1, 3, 6, (2, 3), (1, 2), (0, 4, 1, 5)),
    "joined_beyond_the_depth": Case(1, 6, 90, 16, 20, (2, 70), (1, 3), (0, 5, 0, 7)),
    "joined_lines_apart": Case(2, 30, 31, 3, 8, (3, 4), (2, 3), (2, 1, 3, 2), (2, 1)),
    # Winograd's tiles, see test_conv_winograd.py
    **WINOGRAD,
    # groups
    "groups": Case(2, 9, 8, 12, 18, (3, 3), (1, 1), (1, 1, 1, 1), group=3),
    "groups_odd": Case(1, 7, 7, 10, 35, (3, 3), (2, 2), (1, 1, 1, 1), group=5),
    "groups_pointwise": Case(3, 5, 5, 8, 12, group=2),
    "groups_wide": Case(1, 12, 12, 64, 256, (3, 3), (1, 1), (1, 1, 1, 1), group=2),
    "multiplier": Case(2, 8, 9, 6, 18, (3, 3), (1, 1), (1, 1, 1, 1), group=6),
    # depthwise
    "depthwise_3": Case(2, 14, 15, 96, 96, (3, 3), (1, 1), (1, 1, 1, 1), group=96),
    "depthwise_3_stride_2": Case(2, 15, 14, 40, 40, (3, 3), (2, 2), (1, 1, 1, 1), group=40),
    "depthwise_3_asymmetric": Case(1, 16, 16, 33, 33, (3, 3), (2, 2), (0, 0, 1, 1), group=33),
    "depthwise_5": Case(1, 19, 17, 48, 48, (5, 5), (1, 1), (2, 2, 2, 2), group=48),
    "depthwise_5_stride_2": Case(2, 14, 13, 24, 24, (5, 5), (2, 2), (2, 2, 2, 2), group=24),
    "depthwise_7": Case(1, 20, 21, 17, 17, (7, 7), (1, 1), (3, 3, 3, 3), group=17),
    "depthwise_7_stride_2": Case(1, 20, 21, 16, 16, (7, 7), (2, 2), (3, 3, 3, 3), group=16),
    "depthwise_7x7_map": Case(1, 7, 7, 576, 576, (5, 5), (1, 1), (2, 2, 2, 2), group=576),
    "depthwise_stride_3": Case(1, 13, 13, 20, 20, (4, 2), (3, 3), (1, 1, 1, 1), group=20),
    "depthwise_dilated": Case(1, 13, 14, 32, 32, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 32),
    "depthwise_dilated_strided": Case(1, 13, 14, 18, 18, (3, 3), (2, 2), (2, 2, 2, 2), (2, 3), 18),
    "depthwise_kernel_above_input": Case(1, 2, 3, 21, 21, (5, 5), (1, 1), (2, 2, 2, 2), group=21),
    "depthwise_two_channels": Case(1, 5, 5, 2, 2, (3, 3), (1, 1), (1, 1, 1, 1), group=2),
    "depthwise_padding_above_kernel": Case(1, 3, 2, 4, 4, (2, 2), (1, 1), (3, 4, 5, 3), group=4),
}


def scratch(kernel: str, ints: list[int], floats: list[float], threads: int) -> np.ndarray | None:
    size = kernel_scratch(kernel, ints, floats, threads)
    # NaN: a kernel that reads scratch before it writes it is found out.
    return np.full((size + 3) // 4, np.nan, np.float32) if size else None


def conv(
    case: Case,
    x: np.ndarray,
    w: np.ndarray,
    scale: np.ndarray | None = None,
    shift: np.ndarray | None = None,
    act: int = 0,
    keep: int = 0,
    alpha: float = 0.0,
    beta: float = 0.0,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray | None]:
    y = np.full((case.n, *case.out, case.oc), np.nan, np.float32)
    row_bytes = {0: 0, 1: (case.oc + 7) // 8, 2: (case.oc + 1) // 2, 3: 4 * case.oc}[keep]
    kept = np.full((y.size // case.oc, row_bytes), 0xA5, np.uint8) if keep else None
    ints, floats = [*case.ints, act, keep], [alpha, beta]
    kernel_run("conv", ints, floats, [x, w, scale, shift, y, kept, scratch("conv", ints, floats, threads)], threads)
    return y, kept


def grad_input(
    case: Case,
    dy: np.ndarray,
    w: np.ndarray,
    scale: np.ndarray | None = None,
    into: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    dx = np.full((case.n, case.ih, case.iw, case.ic), np.nan, np.float32) if into is None else into.copy()
    ints, floats = [*case.ints, 0, 0, 0, int(into is not None)], [0.0, 0.0]
    room = scratch("conv_grad_input", ints, floats, threads)
    kernel_run("conv_grad_input", ints, floats, [dy, w, scale, dx, None, None, room], threads)
    return dx


def reference(case: Case, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Y and dX in float64, NHWC."""
    t, left, b, r = case.pads
    tx = torch.from_numpy(x).double().permute(0, 3, 1, 2).requires_grad_()
    tw = torch.from_numpy(w).double().permute(3, 2, 0, 1)
    y = F.conv2d(F.pad(tx, (left, r, t, b)), tw, stride=case.s, dilation=case.d, groups=case.group)
    y.backward(torch.from_numpy(dy).double().permute(0, 3, 1, 2))
    assert tx.grad is not None
    return y.detach().permute(0, 2, 3, 1).numpy(), tx.grad.permute(0, 2, 3, 1).numpy()


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.isfinite(got).all()
    error = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_conv_and_input_gradient_equal_pytorch(name: str, threads: int) -> None:
    case = CASES[name]
    x, w, dy = case.tensors()
    y, dx = reference(case, x, w, dy)
    assert_close(conv(case, x, w, threads=threads)[0], y)
    assert_close(grad_input(case, dy, w, threads=threads), dx)


@pytest.mark.parametrize("name", CASES)
def test_scale_shift_and_accumulation(name: str) -> None:
    case = CASES[name]
    x, w, dy = case.tensors(1)
    rng = np.random.default_rng(2)
    scale, shift = (rng.uniform(-2, 2, case.oc).astype(np.float32) for _ in range(2))
    base = rng.standard_normal(x.shape).astype(np.float32)
    y, dx = reference(case, x, w, dy * scale)
    assert_close(conv(case, x, w, scale, shift, threads=2)[0], y * scale + shift)
    assert_close(conv(case, x, w, None, shift, threads=2)[0], y + shift)
    assert_close(grad_input(case, dy, w, scale, threads=2), dx)
    assert_close(grad_input(case, dy, w, scale, into=base, threads=2), dx + base)


@pytest.mark.parametrize(
    "name",
    ["pointwise_prime", "k3_stride_2", "depthwise_5", "linear_8_rows", "groups", "winograd_odd", "winograd_chunks"],
)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_repeated_runs_give_identical_bits(name: str, threads: int) -> None:
    case = CASES[name]
    x, w, dy = case.tensors(3)
    first = conv(case, x, w, threads=threads)[0], grad_input(case, dy, w, threads=threads)
    for _ in range(3):
        assert np.array_equal(first[0], conv(case, x, w, threads=threads)[0])
        assert np.array_equal(first[1], grad_input(case, dy, w, threads=threads))


# code: (function, alpha, beta)
ACTIVATIONS = {
    1: (torch.relu, 0.0, 0.0),
    2: (lambda z: torch.clamp(z, -0.7, 1.3), -0.7, 1.3),
    3: (lambda z: F.leaky_relu(z, 0.1), 0.1, 0.0),
    4: (lambda z: torch.clamp(z * 0.25 + 0.4, 0, 1), 0.25, 0.4),
    5: (F.hardswish, 0.0, 0.0),
    6: (torch.sigmoid, 0.0, 0.0),
    7: (torch.tanh, 0.0, 0.0),
    8: (F.silu, 0.0, 0.0),
    9: (F.gelu, 0.0, 0.0),
    10: (lambda z: F.gelu(z, approximate="tanh"), 0.0, 0.0),
}
ACTIVE = {
    1: lambda z: z > 0,
    2: lambda z: (z > np.float32(-0.7)) & (z < np.float32(1.3)),
    3: lambda z: z > 0,
    4: lambda z: (z * 0.25 + 0.4 > 0) & (z * 0.25 + 0.4 < 1),
}
RANGES = {
    5: (-0.5, 1.5),
    6: (0.0, 0.25),
    7: (0.0, 1.0),
    8: (-0.0999, 1.0999),
    9: (-0.1291, 1.1291),
    10: (-0.1291, 1.1291),
}
FUSED_CASES = [
    Case(2, 7, 9, 5, 37),
    Case(1, 7, 7, 6, 200),
    Case(1, 9, 9, 3, 21, (3, 3), (2, 2), (1, 1, 1, 1)),
    Case(1, 6, 7, 6, 21, (3, 3), group=3),
    Case(2, 9, 9, 43, 43, (3, 3), (1, 1), (1, 1, 1, 1), group=43),
    Case(1, 2, 5, 64, 64, (3, 3), (1, 1), (1, 1, 1, 1), group=64),
    WINOGRAD["winograd_asymmetric_2"],
    WINOGRAD["winograd_unpadded"],
]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("index", range(len(FUSED_CASES)))
def test_fused_activation_and_what_it_keeps(act: int, index: int) -> None:
    case = FUSED_CASES[index]
    function, alpha, beta = ACTIVATIONS[act]
    x, w, dy = case.tensors(4)
    scale = np.full(case.oc, 1.0 / np.sqrt(w[..., 0].size / 2), np.float32)
    shift = np.linspace(-1, 1, case.oc).astype(np.float32)
    exact = torch.from_numpy(reference(case, x, w, dy)[0] * scale + shift).requires_grad_()
    expected = function(exact)
    expected.sum().backward()
    assert exact.grad is not None
    for threads in (1, 2, 3):
        plain = conv(case, x, w, scale, shift, threads=threads)[0]  # the kernel's own pre-activation
        for keep in (0, 1 if act in ACTIVE else 2, 3):
            y, kept = conv(case, x, w, scale, shift, act, keep, alpha, beta, threads)
            assert_close(y, expected.detach().numpy(), 3e-6)
            if keep == 0:
                continue
            assert kept is not None
            if keep == 3:
                assert np.array_equal(kept.view(np.float32).reshape(y.shape), plain)
            elif keep == 1:
                got = np.unpackbits(kept, axis=1, bitorder="little")
                assert np.array_equal(got[:, : case.oc].reshape(y.shape).astype(bool), ACTIVE[act](plain))
                assert not got[:, case.oc :].any()
            else:
                low, high = RANGES[act]
                nibbles = np.stack([kept & 15, kept >> 4], -1).reshape(len(kept), -1)
                q = (exact.grad.numpy() - low) / (high - low) * 15
                assert np.abs(nibbles[:, : case.oc].reshape(y.shape) - np.clip(q, 0, 15)).max() <= 0.5 + 1e-4
                assert not nibbles[:, case.oc :].any()


def test_nan_stays_nan_through_activations() -> None:
    case = Case(1, 3, 3, 4, 5)
    x, w, _ = case.tensors()
    x[0, 1, 1, 2] = np.nan
    for act, (_, alpha, beta) in ACTIVATIONS.items():
        y, _ = conv(case, x, w, act=act, alpha=alpha, beta=beta)
        assert np.isnan(y[0, 1, 1]).all()
        assert np.isfinite(np.delete(y.reshape(9, 5), 4, axis=0)).all()


BAD_CALLS = {
    "zero dimension": lambda i: i.__setitem__(0, 0),
    "negative pad": lambda i: i.__setitem__(11, -1),
    "overflow": lambda i: i.__setitem__(slice(0, 4), [1 << 30] * 4),
    "group": lambda i: i.__setitem__(15, 5),
    "stride": lambda i: i.__setitem__(9, 0),
    "huge": lambda i: i.__setitem__(2, (1 << 62) + 1),
    "output channels": lambda i: i.__setitem__(6, 7),
    "output beyond the input": lambda i: i.__setitem__(4, 1 << 25),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_shapes_are_refused(name: str) -> None:
    case = CASES["k3"]
    x, w, dy = case.tensors()
    ints = list(case.ints)
    BAD_CALLS[name](ints)
    y, dx, room = np.empty_like(dy), np.empty_like(x), np.empty(1 << 18, np.float32)
    with pytest.raises(UsageError):
        kernel_run("conv", [*ints, 0, 0], [0.0, 0.0], [x, w, None, None, y, None, room])
    with pytest.raises(UsageError):
        kernel_run("conv_grad_input", [*ints, 0, 0, 0, 0], [0.0, 0.0], [dy, w, None, dx, None, None, room])


def test_bad_operands_and_attributes_are_refused() -> None:
    case = CASES["k3"]
    x, w, dy = case.tensors()
    y, dx, room = np.empty_like(dy), np.empty_like(x), np.empty(1 << 18, np.float32)
    good: list[np.ndarray | None] = [x, w, None, None, y, None, room]

    def run(ints: list[int], floats: tuple[float, ...] = (0.0, 0.0), **replaced: np.ndarray | None) -> None:
        operands = list(good)
        for index, array in replaced.items():
            operands[int(index[1:])] = array
        kernel_run("conv", ints, floats, operands)

    ints = [*case.ints, 1, 0]
    run(ints)
    kept = np.empty(y.size // case.oc * 5, np.uint8)
    run([*case.ints, 1, 1], _5=kept)
    for bad in (
        [*case.ints],
        [*case.ints, 11, 0],
        [*case.ints, -1, 0],
        [*case.ints, 1, 4],
        [*case.ints, 1, 2],
        [*case.ints, 7, 1],
    ):
        with pytest.raises(UsageError):
            run(bad, _5=kept)
    for index, array in {
        "_0": x[:1].copy(),
        "_1": w.ravel()[1:].copy(),
        "_2": np.ones(5, np.float32),
        "_4": None,
    }.items():
        with pytest.raises(UsageError):
            run(ints, **{index: array})
    with pytest.raises(UsageError):
        run([*case.ints, 1, 1])  # bits asked for, no room for them
    with pytest.raises(UsageError):
        run([*case.ints, 1, 1], _5=kept[1:].copy())
    with pytest.raises(UsageError):
        run(ints, _6=None)
    with pytest.raises(UsageError):
        run([*case.ints, 2, 0], (6.0, 0.0))  # clip bounds swapped
    with pytest.raises(UsageError):
        run([*case.ints, 3, 0], (float("nan"), 0.0))
    with pytest.raises(UsageError):
        kernel_run("conv_grad_input", [*case.ints, 0, 0, 0, 2], [0.0, 0.0], [dy, w, None, dx, None, None, room])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_passes(isa: str) -> None:
    check_under(isa, ["conv", "conv_finish"], "threads or scale or fused or conv_and_input or finish")


def test_scratch_grows_with_threads_and_stays_small() -> None:
    deep = Case(8, 7, 7, 512, 512, (3, 3), (1, 1), (1, 1, 1, 1))
    for kernel, tail in (("conv", [0, 0]), ("conv_grad_input", [0, 0, 0, 0])):
        floats = [0.0, 0.0]
        one, two = (kernel_scratch(kernel, [*deep.ints, *tail], floats, threads) for threads in (1, 2))
        assert one < two <= 4 << 20  # parts of transformed weight and windows, no copy of the 9.4 MB weight
    strided = replace(deep, s=(2, 2))
    for kernel, tail in (("conv", [0, 0]), ("conv_grad_input", [0, 0, 0, 0])):
        floats = [0.0, 0.0]
        one, two = (kernel_scratch(kernel, [*strided.ints, *tail], floats, threads) for threads in (1, 2))
        assert one < two <= 2 * 512 * 1024  # half a megabyte a thread
    assert kernel_scratch("conv", [*replace(deep, oc=512, group=512).ints, 0, 0], [0.0, 0.0], 2) == 0
