"""`conv_grad_weight` against the weight gradient of the unpacked tensor in float64, for every form and geometry."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_razor.errors import UsageError
from edge_razor.runtime import kernel_run, kernel_scratch, packed_bytes, unpack
from tests.reference.razor import FORMS, keep_count

torch.set_num_threads(1)  # the maps are tiny, and threads that wait for work would slow down the kernel's


@dataclass(frozen=True)
class Geometry:
    """A convolution; pads are top, left, bottom, right."""

    n: int = 2
    ih: int = 9
    iw: int = 7
    ic: int = 5
    oc: int = 6
    kh: int = 1
    kw: int = 1
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    group: int = 1

    @property
    def oh(self) -> int:
        return (self.ih + self.pads[0] + self.pads[2] - self.dilation[0] * (self.kh - 1) - 1) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        return (self.iw + self.pads[1] + self.pads[3] - self.dilation[1] * (self.kw - 1) - 1) // self.stride[1] + 1

    def ints(self) -> list[int]:
        return [
            *(self.n, self.ih, self.iw, self.ic, self.oh, self.ow, self.oc, self.kh, self.kw),
            *(*self.stride, self.pads[0], self.pads[1], *self.dilation, self.group),
        ]


GEOMETRIES = {
    "pointwise": Geometry(n=3, ih=13, iw=11, ic=33, oc=24),
    "one of everything": Geometry(n=1, ih=1, iw=1, ic=1, oc=1),
    "one row a sample": Geometry(n=7, ih=1, iw=1, ic=19, oc=17),
    "63 rows": Geometry(ih=63, iw=1, ic=16, oc=16),
    "64 rows": Geometry(ih=64, iw=1, ic=17, oc=15),
    "65 rows": Geometry(ih=65, iw=1, ic=15, oc=17),
    "129 rows": Geometry(n=1, ih=129, iw=1, ic=48, oc=97),
    "one input channel": Geometry(ic=1, oc=40),
    "one output channel": Geometry(ic=40, oc=1),
    "wide output": Geometry(n=1, ih=70, iw=1, ic=20, oc=331),
    "many tiles and chunks": Geometry(n=1, ih=8, iw=8, ic=784, oc=208),
    "gradient shared by input channels": Geometry(n=2, ih=5, iw=1, ic=700, oc=100),
    "more columns than are taken at once": Geometry(n=1, ih=60, iw=1, ic=1100, oc=20),
    "3x3": Geometry(ih=12, iw=10, ic=18, oc=20, kh=3, kw=3, pads=(1, 1, 1, 1)),
    "3x3 stride 2": Geometry(ih=13, iw=15, ic=18, oc=9, kh=3, kw=3, stride=(2, 2), pads=(1, 1, 1, 1)),
    "3x3 without padding": Geometry(ih=9, iw=9, ic=6, oc=9, kh=3, kw=3),
    "large gradient": Geometry(n=1, ih=6, iw=5, ic=72, oc=112, kh=3, kw=3, pads=(1, 1, 1, 1)),
    "large gradient, stride 2": Geometry(
        n=2, ih=13, iw=11, ic=75, oc=110, kh=3, kw=3, stride=(2, 2), pads=(1, 1, 1, 1)
    ),
    "large gradient of many taps": Geometry(n=1, ih=9, iw=12, ic=21, oc=190, kh=4, kw=5, pads=(1, 2, 2, 0)),
    "1x1 stride 2": Geometry(ih=15, iw=8, ic=21, oc=22, stride=(2, 2)),
    "1x1 padded": Geometry(ih=5, iw=4, ic=4, oc=3, pads=(1, 0, 0, 2)),
    "asymmetric": Geometry(ih=11, iw=17, ic=5, oc=7, kh=2, kw=5, stride=(3, 1), pads=(0, 1, 1, 3)),
    "dilated": Geometry(ih=17, iw=16, ic=4, oc=6, kh=3, kw=3, dilation=(2, 3), pads=(2, 3, 2, 3)),
    "dilated stride 2": Geometry(
        ih=17, iw=16, ic=4, oc=6, kh=3, kw=2, stride=(2, 3), dilation=(3, 2), pads=(3, 1, 2, 1)
    ),
    "kernel larger than the map": Geometry(ih=2, iw=3, ic=4, oc=5, kh=5, kw=5, pads=(2, 2, 2, 2)),
    "first layer": Geometry(n=2, ih=31, iw=33, ic=3, oc=32, kh=3, kw=3, stride=(2, 2), pads=(1, 1, 1, 1)),
    "first layer in one piece of many lines": Geometry(
        n=3, ih=41, iw=6, ic=3, oc=5, kh=3, kw=4, stride=(2, 1), pads=(2, 1, 3, 2), dilation=(2, 1)
    ),
    "first layer of wide output": Geometry(
        n=1, ih=9, iw=40, ic=16, oc=170, kh=3, kw=3, stride=(1, 3), pads=(0, 1, 1, 1)
    ),
    "7x7 of many channels": Geometry(n=1, ih=9, iw=9, ic=40, oc=100, kh=7, kw=7, pads=(3, 3, 3, 3)),
    "3x3 wide map": Geometry(n=2, ih=3, iw=150, ic=18, oc=20, kh=3, kw=3, pads=(1, 1, 1, 1)),
    "3x3 wide map, stride 2": Geometry(n=1, ih=5, iw=201, ic=5, oc=33, kh=3, kw=3, stride=(2, 2), pads=(1, 1, 1, 1)),
    "3x3 narrow map": Geometry(n=2, ih=130, iw=1, ic=17, oc=18, kh=3, kw=3, pads=(1, 1, 1, 1)),
    "3x3 of many small maps": Geometry(n=11, ih=7, iw=7, ic=70, oc=40, kh=3, kw=3, pads=(1, 1, 1, 1)),
    "3x3 of many blocks": Geometry(n=2, ih=29, iw=30, ic=10, oc=140, kh=3, kw=3, pads=(1, 1, 1, 1)),
    "nine classes of positions": Geometry(n=2, ih=16, iw=14, ic=9, oc=20, kh=5, kw=4, stride=(3, 3), pads=(2, 1, 2, 1)),
    "strides that dilations divide": Geometry(
        n=3, ih=23, iw=26, ic=6, oc=18, kh=3, kw=4, stride=(4, 2), dilation=(2, 2), pads=(2, 1, 3, 2)
    ),
    "classes of positions whose taps lie far apart": Geometry(
        n=1, ih=64, iw=3, ic=5, oc=7, kh=2, kw=3, stride=(1, 3), dilation=(1, 5000), pads=(0, 5000, 0, 5000)
    ),
    "3x3 stride 2 of one pixel": Geometry(n=9, ih=1, iw=1, ic=5, oc=20, kh=3, kw=3, stride=(2, 2), pads=(1, 1, 1, 1)),
    "3x3 stride 2 of many blocks": Geometry(
        n=6, ih=20, iw=22, ic=20, oc=40, kh=3, kw=3, stride=(2, 2), pads=(1, 1, 1, 1)
    ),
    "3x3 stride 2 whose lines take many blocks": Geometry(
        n=1, ih=2, iw=1100, ic=5, oc=9, kh=3, kw=3, stride=(2, 2), pads=(1, 1, 1, 1)
    ),
    "3x3 stride that all positions of many blocks meet": Geometry(
        n=1, ih=1100, iw=1, ic=5, oc=6, kh=3, kw=3, stride=(1, 2), pads=(1, 1, 1, 1)
    ),
    "2x4 kernel": Geometry(ih=9, iw=11, ic=20, oc=20, kh=2, kw=4, pads=(1, 1, 0, 2)),
    "1x1 stride 4": Geometry(n=3, ih=17, iw=13, ic=33, oc=40, stride=(4, 4)),
    "1x1 stride 2 of many blocks": Geometry(n=4, ih=45, iw=47, ic=37, oc=103, stride=(2, 2), pads=(1, 0, 0, 1)),
    "1x1 stride that leaves a block out": Geometry(n=2, ih=150, iw=1, ic=20, oc=18, stride=(100, 1)),
    "1x1 stride, groups across column groups": Geometry(ih=9, iw=18, ic=70, oc=10, stride=(2, 3), group=5),
    "few rows, large gradient": Geometry(n=9, ih=1, iw=1, ic=310, oc=230),
    "groups": Geometry(ih=10, iw=10, ic=24, oc=36, kh=3, kw=3, pads=(1, 1, 1, 1), group=3),
    "groups across column groups": Geometry(
        ih=9, iw=8, ic=40, oc=10, kh=3, kw=3, stride=(2, 1), pads=(1, 1, 1, 1), group=5
    ),
    "two groups, large": Geometry(n=1, ih=4, iw=4, ic=128, oc=256, kh=3, kw=3, pads=(1, 1, 1, 1), group=2),
    "pointwise groups": Geometry(ih=9, iw=8, ic=12, oc=8, group=4),
    "depthwise": Geometry(ih=14, iw=14, ic=35, oc=35, kh=3, kw=3, pads=(1, 1, 1, 1), group=35),
    "depthwise 16": Geometry(ih=9, iw=9, ic=16, oc=16, kh=3, kw=3, pads=(1, 1, 1, 1), group=16),
    "depthwise wide": Geometry(n=1, ih=7, iw=7, ic=145, oc=145, kh=5, kw=5, pads=(2, 2, 2, 2), group=145),
    "depthwise stride 2": Geometry(ih=15, iw=13, ic=70, oc=70, kh=3, kw=3, stride=(2, 2), pads=(0, 1, 1, 0), group=70),
    "depthwise strides 3 and 2": Geometry(
        ih=23, iw=21, ic=37, oc=37, kh=4, kw=3, stride=(3, 2), pads=(2, 3, 1, 2), dilation=(1, 2), group=37
    ),
    "depthwise 5x5 stride 2": Geometry(
        ih=17, iw=14, ic=35, oc=35, kh=5, kw=5, stride=(2, 2), pads=(2, 2, 2, 2), group=35
    ),
    "depthwise 7x9, strides 3 and 2": Geometry(
        ih=20, iw=23, ic=20, oc=20, kh=7, kw=9, stride=(3, 2), pads=(3, 4, 2, 5), group=20
    ),
    "depthwise stride across alone": Geometry(
        n=1, ih=9, iw=70, ic=17, oc=17, kh=3, kw=2, stride=(1, 2), pads=(1, 3, 1, 0), group=17
    ),
    "depthwise kernel smaller than its stride": Geometry(
        ih=13, iw=16, ic=66, oc=66, kh=2, kw=2, stride=(3, 3), pads=(0, 1, 2, 3), group=66
    ),
    "depthwise dilated": Geometry(ih=15, iw=13, ic=20, oc=20, kh=3, kw=3, dilation=(2, 2), pads=(2, 2, 2, 2), group=20),
    "depthwise large map": Geometry(n=1, ih=3, iw=150, ic=3, oc=3, kh=3, kw=3, pads=(1, 1, 1, 1), group=3),
    "depthwise many blocks": Geometry(n=2, ih=30, iw=31, ic=70, oc=70, kh=3, kw=3, pads=(1, 1, 1, 1), group=70),
    "many blocks": Geometry(n=3, ih=47, iw=46, ic=21, oc=101),
    "depth multiplier": Geometry(ih=8, iw=9, ic=6, oc=18, kh=3, kw=3, pads=(1, 1, 1, 1), group=6),
}

# Threads share the blocks of these (the last of three has fewer), so that the sum depends on their number.
SHARED_BLOCKS = ("many blocks", "1x1 stride 2 of many blocks")


def pack(x: np.ndarray, form: int, keep: int) -> np.ndarray:
    """x[S, R, C] in a form; dense stays as it is."""
    if form == 0:
        return x
    ints = [form, *x.shape, keep]
    packed = np.zeros(packed_bytes(*ints), np.uint8)
    kernel_run("pack", ints, [], [x, packed, np.empty(kernel_scratch("pack", ints), np.uint8)])
    return packed


def gradient(
    g: Geometry,
    form: int,
    keep: int,
    x: np.ndarray,
    dy: np.ndarray,
    threads: int,
    turn: tuple[int, ...] = (),
    before: np.ndarray | None = None,
) -> np.ndarray:
    """The kernel's G[kh, kw, ic/g, oc]; `turn` is accumulate, samples, first. Scratch, and G without what it was
    `before`, begin as NaN: nothing may rest on their contents."""
    ints = [*g.ints(), form, keep, *turn]
    scratch = np.full(kernel_scratch("conv_grad_weight", ints, threads=threads) // 4 + 16, np.nan, np.float32)
    shape = (g.kh, g.kw, g.ic // g.group, g.oc)
    out = np.full(shape, np.nan, np.float32) if before is None else before.copy()
    used = scratch[: scratch.size - 16]
    kernel_run("conv_grad_weight", ints, [], [x, dy, out, used if used.size else None], threads=threads)
    assert np.isnan(scratch[-16:]).all(), "wrote past the scratch"
    return out


def expected(g: Geometry, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """G in float64 from x[n, ih·iw, ic] and dy[n, oh, ow, oc], and the same of magnitudes: the scale of rounding."""
    maps = torch.tensor(x, dtype=torch.float64).reshape(g.n, g.ih, g.iw, g.ic).permute(0, 3, 1, 2)
    maps = torch.nn.functional.pad(maps, (g.pads[1], g.pads[3], g.pads[0], g.pads[2]))
    grad = torch.tensor(dy, dtype=torch.float64).permute(0, 3, 1, 2)
    shape = (g.oc, g.ic // g.group, g.kh, g.kw)
    results = []
    for a, b in ((maps, grad), (maps.abs(), grad.abs())):
        # autograd of the convolution cut to the windows that exist; a bottom row no window reaches gets no gradient
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.conv2d(a, weight, None, g.stride, 0, g.dilation, g.group)
        y.backward(b)
        assert weight.grad is not None
        results.append(weight.grad.permute(2, 3, 1, 0).numpy())
    return results[0], results[1]


def operands(g: Geometry, form: str, sparsity: float, seed: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """keep, X before it is packed, X in its form, and dY."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((g.n, g.ih * g.iw, g.ic)).astype(np.float32) + 0.5
    x[rng.random(x.shape) < 0.3] = 0
    dy = rng.standard_normal((g.n, g.oh, g.ow, g.oc)).astype(np.float32)
    code = FORMS[form]
    keep = keep_count(x[0].size, sparsity) if code >= 2 else 0
    return keep, x, pack(x, code, keep), dy


def expected_and_bound(
    g: Geometry, form: str, keep: int, x: np.ndarray, packed: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The exact gradient, and how far off one in float32 may be."""
    code = FORMS[form]
    samples, rows, cols = x.shape
    exact, size = expected(g, x if code == 0 else unpack(code, samples, rows, cols, keep, packed), dy)
    # float32 rounding: each of up to `rows` additions may lose half a unit of a partial sum that Σ|x||dy| bounds; the
    # centered form's value · dY + mean · ΣdY is two terms larger than their sum; errors do not all add up, hence a few
    # units instead of `rows`.
    slack = np.abs(x).max() * np.abs(dy).max() * g.n * g.oh * g.ow
    return exact, 16 * 2**-24 * (size + (code == 3) * slack)


def check(g: Geometry, form: str, sparsity: float, threads: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Compares the kernel's result for each number of threads with the exact one; returns them."""
    keep, x, packed, dy = operands(g, form, sparsity, seed)
    ours = [gradient(g, FORMS[form], keep, packed, dy, count) for count in threads]
    exact, bound = expected_and_bound(g, form, keep, x, packed, dy)
    for result in ours:
        assert np.all(np.abs(result - exact) <= bound), f"seed {seed}"
    return ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_the_gradient_of_the_unpacked_tensor(name: str, form: str) -> None:
    for sparsity in (0.95, 0.5) if FORMS[form] >= 2 else (0.0,):
        one, two, three, again = check(GEOMETRIES[name], form, sparsity, (1, 2, 3, 3), seed=1)
        assert np.array_equal(three, again), "the same threads must give the same bits"
        if FORMS[form] >= 2 and not name.startswith("depthwise") and name not in SHARED_BLOCKS:
            assert np.array_equal(one, two) and np.array_equal(one, three)


@pytest.mark.parametrize("form", ["plain", "centered"])
def test_nothing_kept_and_everything_kept(form: str) -> None:
    for sparsity in (1.0, 0.0):
        check(GEOMETRIES["pointwise"], form, sparsity, (2,), seed=2)
        check(GEOMETRIES["3x3 stride 2"], form, sparsity, (2,), seed=2)
        check(GEOMETRIES["depthwise"], form, sparsity, (2,), seed=2)


IN_TURNS = [
    *("pointwise", "one row a sample", "1x1 stride 2", "3x3", "3x3 stride 2", "3x3 of many small maps", "first layer"),
    *("groups", "pointwise groups", "depthwise", "depthwise stride 2", "depthwise dilated", "many blocks"),
]


def check_turns(g: Geometry, form: str, threads: int) -> None:
    """Five samples in turns of two, two and one."""
    g, code = replace(g, n=5), FORMS[form]
    keep, x, packed, dy = operands(g, form, 0.8, seed=4)
    exact, bound = expected_and_bound(g, form, keep, x, packed, dy)
    total: np.ndarray | None = None
    for first, count in ((3, 2), (0, 2), (2, 1)):
        part, mine = replace(g, n=count), slice(first, first + count)
        own = pack(x[mine].copy(), code, keep)
        read, place = (own, (count, 0)) if form == "dense" else (packed, (g.n, first))
        alone = gradient(part, code, keep, own, dy[mine].copy(), threads)
        turn = gradient(part, code, keep, read, dy[mine].copy(), threads, (0, *place))
        assert np.array_equal(turn, alone), "a turn reads its own samples"
        if total is None:
            total = turn
            continue
        added = gradient(part, code, keep, read, dy[mine].copy(), threads, (1, *place), total)
        assert np.array_equal(added, total + alone), "a turn adds its own samples"
        total = added
    assert total is not None and np.all(np.abs(total - exact) <= bound)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", IN_TURNS)
def test_turns_add_up_to_the_gradient_of_all_samples(name: str, form: str, threads: int) -> None:
    check_turns(GEOMETRIES[name], form, threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", IN_TURNS)
def test_a_turn_of_all_samples_is_the_plain_call(name: str, form: str) -> None:
    g, code = GEOMETRIES[name], FORMS[form]
    keep, _, packed, dy = operands(g, form, 0.8, seed=5)
    before = np.random.default_rng(6).standard_normal((g.kh, g.kw, g.ic // g.group, g.oc)).astype(np.float32)
    for threads in (1, 2, 3):
        plain = gradient(g, code, keep, packed, dy, threads)
        assert np.array_equal(gradient(g, code, keep, packed, dy, threads, (0, g.n, 0)), plain)
        assert np.array_equal(gradient(g, code, keep, packed, dy, threads, (1, g.n, 0), before), before + plain)


def test_adding_takes_as_much_more_scratch_as_the_gradient() -> None:
    for name in IN_TURNS:
        g = GEOMETRIES[name]
        for form in FORMS.values():
            ints = [*g.ints(), form, 0]
            plain = kernel_scratch("conv_grad_weight", ints, threads=2)
            own = -(-g.kh * g.kw * g.ic // g.group * g.oc * 4 // 64) * 64
            assert kernel_scratch("conv_grad_weight", [*ints, 0, g.n, 0], threads=2) == plain
            assert kernel_scratch("conv_grad_weight", [*ints, 1, g.n, 0], threads=2) == plain + own


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    def small(high: int) -> int:
        return draw(st.integers(1, high))

    group = draw(st.sampled_from([1, 1, 2, 3, 17]))
    depthwise = draw(st.booleans()) and group > 1
    ic, oc = (group, group) if depthwise else (group * small(20), group * small(20))
    kh, kw, dilation = small(4), small(4), (small(2), small(2))
    reach = (dilation[0] * (kh - 1) + 1, dilation[1] * (kw - 1) + 1)
    pads = tuple(draw(st.integers(0, 3)) for _ in range(4))
    ih = max(small(14), reach[0] - pads[0] - pads[2], 1)
    iw = max(small(14), reach[1] - pads[1] - pads[3], 1)
    return Geometry(small(3), ih, iw, ic, oc, kh, kw, (small(3), small(3)), pads, dilation, group)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    geometries(),
    st.sampled_from(list(FORMS)),
    st.sampled_from([0.0, 0.5, 0.9, 0.97]),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_any_geometry(g: Geometry, form: str, sparsity: float, threads: int, seed: int) -> None:
    check(g, form, sparsity, (threads,), seed)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = f"""
import sys
from edge_razor.runtime import isa
if isa() != {isa!r}: sys.exit(77)
from tests.kernels.test_conv_weight import FORMS, GEOMETRIES, IN_TURNS, check, check_turns
for g in GEOMETRIES.values():
    for form in FORMS:
        check(g, form, 0.9, (2,), 3)
for name in IN_TURNS:
    for form in FORMS:
        check_turns(GEOMETRIES[name], form, 2)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "EDGE_RAZOR_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.returncode == 77 or "EDGE_RAZOR_ISA" in run.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert run.returncode == 0, run.stderr


def test_wrong_calls_are_refused() -> None:
    g = Geometry(ih=8, iw=8, ic=4, oc=4, kh=3, kw=3, pads=(1, 1, 1, 1))
    x, dy = np.zeros((2, 64, 4), np.float32), np.zeros((2, 8, 8, 4), np.float32)
    ints, out = [*g.ints(), 0, 0], np.zeros((3, 3, 4, 4), np.float32)
    scratch = np.zeros(kernel_scratch("conv_grad_weight", ints), np.uint8)
    kernel_run("conv_grad_weight", ints, [], [x, dy, out, scratch])
    calls: list[tuple[list[np.ndarray | None], str]] = [
        ([x[:1], dy, out, scratch], "X has"),
        ([x, dy[:1], out, scratch], "dY has"),
        ([x, dy, out[:2], scratch], "G has"),
        ([x, dy, out, scratch[:8]], "scratch has"),
        ([x, dy, out, None], "scratch has"),
        ([None, dy, out, scratch], "X is absent"),
        ([x, dy, out], "operands"),
    ]
    for operands, message in calls:
        with pytest.raises(UsageError, match=message):
            kernel_run("conv_grad_weight", ints, [], operands)
    for change, message in [
        ({16: 4}, "kept tensor"),
        ({16: 2, 17: 257}, "kept tensor"),
        ({16: 0, 17: 1}, "kept tensor"),
        ({16: -1}, "kept tensor"),
        ({15: 3}, "group"),
        ({0: 0}, "n = 0"),
        ({0: 1 << 30, 1: 1 << 30}, "elements"),
    ]:
        wrong = [change.get(i, value) for i, value in enumerate(ints)]
        with pytest.raises(UsageError, match=message):
            kernel_run("conv_grad_weight", wrong, [], [x, dy, out, scratch])
    with pytest.raises(UsageError):
        kernel_run("conv_grad_weight", ints[:-1], [], [x, dy, out, scratch])


def test_wrong_turns_are_refused() -> None:
    g = Geometry(ih=8, iw=8, ic=4, oc=4, kh=3, kw=3, pads=(1, 1, 1, 1))  # of 2 samples
    dy, out = np.zeros((2, 8, 8, 4), np.float32), np.zeros((3, 3, 4, 4), np.float32)
    dense, half = np.zeros((5, 64, 4), np.float32), np.zeros((5, 64, 4), np.uint16)
    scratch = np.zeros(1 << 20, np.uint8)

    def call(form: int, *turn: int) -> None:
        x = half if form else dense
        kernel_run("conv_grad_weight", [*g.ints(), form, 0, *turn], [], [x, dy, out, scratch])

    call(0, 1, 2, 0)
    call(1, 1, 5, 3)
    for turn in ((0,), (0, 5), (0, 5, 3, 0)):
        with pytest.raises(UsageError, match="expected (18|21) ints"):
            call(1, *turn)
    for accumulate in (-1, 2, 1 << 62):
        with pytest.raises(UsageError, match="accumulate"):
            call(1, accumulate, 5, 3)
    high = (1 << 63) - 1
    for samples, first in ((5, -1), (5, 4), (1, 0), (2, 1), (5, high), (5, -high), (1 << 20, 1 << 20)):
        with pytest.raises(UsageError, match="samples"):
            call(1, 0, samples, first)
    for samples in (0, -1, high, -high):
        with pytest.raises(UsageError, match="kept tensor"):
            call(1, 0, samples, 0)
    for samples, first in ((5, 0), (5, 3), (2, 1), (2, -1), (1, 0), (3, 1)):
        with pytest.raises(UsageError, match="samples"):
            call(0, 0, samples, first)
    with pytest.raises(UsageError, match="X has"):
        call(1, 0, 6, 0)  # the whole kept tensor is an operand
    for ints in ([2, 5, 3], [0, 5, 4], [0, 5]):
        with pytest.raises(UsageError):
            kernel_scratch("conv_grad_weight", [*g.ints(), 1, 0, *ints])
    room = kernel_scratch("conv_grad_weight", [*g.ints(), 1, 0, 1, 5, 3])
    with pytest.raises(UsageError, match="scratch has"):
        kernel_run("conv_grad_weight", [*g.ints(), 1, 0, 1, 5, 3], [], [half, dy, out, scratch[: room - 1]])


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("form", ["plain", "centered"])
def test_contents_that_point_outside_are_refused(form: str, group: int) -> None:
    """An operand that was never packed: its bytes are read, but nothing outside it."""
    from edge_razor.errors import NonFiniteError

    g = replace(Geometry(n=1, ih=8, iw=8, ic=16, oc=16), group=group)
    keep = 10
    garbage = np.full(packed_bytes(FORMS[form], 1, 64, 16, keep), 0xFF, np.uint8)
    with pytest.raises(NonFiniteError):
        gradient(g, FORMS[form], keep, garbage, np.ones((1, 8, 8, 16), np.float32), 1)
    whole = np.full(packed_bytes(FORMS[form], 3, 64, 16, keep), 0xFF, np.uint8)
    before = np.ones((1, 1, 16 // group, 16), np.float32)
    with pytest.raises(NonFiniteError):
        gradient(g, FORMS[form], keep, whole, np.ones((1, 8, 8, 16), np.float32), 1, (1, 3, 2), before)
