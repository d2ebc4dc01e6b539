"""`pack`, unpacking and `mul_grad` against the definition in tests/reference/razor.py."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_razor.errors import NonFiniteError, UsageError
from edge_razor.runtime import kernel_run, kernel_scratch, packed_bytes, unpack
from tests.reference.razor import FORMS, block_bounds, block_means, keep_count, select, to_bf16

SHAPES = [
    (1, 1, 1),
    (3, 1, 17),
    (2, 63, 16),
    (2, 64, 15),
    (2, 65, 17),
    (1, 128, 1),
    (5, 129, 31),
    (2, 331, 7),
    (1, 700, 37),
    (2, 200, 128),
]


def pack(x: np.ndarray, form: str, keep: int, threads: int = 1) -> np.ndarray:
    """The kept form of x[S, R, C]. Output and scratch begin as noise: nothing may rest on their contents."""
    ints = [FORMS[form], *x.shape, keep]
    packed = np.full(packed_bytes(*ints), 0xA5, np.uint8)
    scratch = np.full(kernel_scratch("pack", ints, threads=threads), 0xA5, np.uint8)
    kernel_run("pack", ints, [], [x, packed, scratch if scratch.size else None], threads=threads)
    return packed


class Sections:
    """The sections of a razor tensor, read as docs/plan-format.md lays them out."""

    def __init__(self, packed: np.ndarray, form: str, samples: int, rows: int, cols: int, keep: int) -> None:
        self.bounds = block_bounds(rows)
        blocks, groups = len(self.bounds) - 1, -(-cols // 16)
        end = 0

        def section(dtype: type, *shape: int) -> np.ndarray:
            nonlocal end
            begin = -(-end // 64) * 64
            end = begin + int(np.prod(shape)) * np.dtype(dtype).itemsize
            return packed[begin:end].view(dtype).reshape(shape)

        centered = form == "centered"
        self.scale = section(np.float32, samples if centered else 0)
        mean = section(np.uint16, samples if centered else 0, blocks, cols)
        self.mean = (mean.astype(np.uint32) << 16).view(np.float32)
        self.mask = section(np.uint64, samples, blocks, cols)
        self.offset = section(np.uint32, samples, blocks, groups)
        value = section(np.int8 if centered else np.uint16, samples, keep)
        self.value = value if centered else (value.astype(np.uint32) << 16).view(np.float32)
        assert end == packed.size


def check(x: np.ndarray, form: str, keep: int, threads: int = 1) -> np.ndarray:
    """Packs x and compares every section, bit for bit, with the definition, given the means that the kernel stored."""
    packed = pack(x, form, keep, threads)
    samples, rows, cols = x.shape
    got = Sections(packed, form, samples, rows, cols, keep)
    if form == "centered":
        exact = np.stack(
            [x[:, a:b].mean(1, dtype=np.float64) for a, b in zip(got.bounds, got.bounds[1:], strict=False)], 1
        )
        size = np.stack(
            [np.abs(x[:, a:b]).mean(1, dtype=np.float64) for a, b in zip(got.bounds, got.bounds[1:], strict=False)], 1
        )
        # half a unit of bf16 (2⁻⁹ of the value), and the rounding of up to 64 float32 additions
        assert np.all(np.abs(got.mean - exact) <= np.abs(exact) * 2**-8 + size * 64 * 2**-24 + 2.0**-134)
        assert np.array_equal(got.mean, block_means(x)), "the sum in row order is part of the definition"
    kept = select(x, keep, form, got.mean if form == "centered" else None)
    if form == "centered":  # the energy factor's sums are of float32 squares, in an order of each instruction set's own
        np.testing.assert_allclose(got.scale, kept.scale, rtol=64 * 2**-24, atol=2**-149)
        kept = replace(kept, scale=got.scale)
    for s in range(samples):
        index = 0
        for b, (begin, end) in enumerate(zip(got.bounds, got.bounds[1:], strict=False)):
            bits = (got.mask[s, b] >> np.arange(64, dtype=np.uint64)[:, None]) & np.uint64(1)
            assert not bits[end - begin :].any(), "bits beyond the block's rows"
            assert np.array_equal(bits[: end - begin].astype(bool), kept.mask[s, begin:end])
            for c in range(cols):
                if c % 16 == 0:
                    assert got.offset[s, b, c // 16] == index
                column = kept.values[s, begin:end, c][kept.mask[s, begin:end, c]]
                assert np.array_equal(got.value[s, index : index + len(column)].astype(np.float32), column)
                index += len(column)
        assert index <= keep
    dense = unpack(FORMS[form], samples, rows, cols, keep, packed)
    if form == "plain":
        assert np.array_equal(dense, kept.dense())
    else:  # mean + scale · q: a compiler may or may not fuse the two
        np.testing.assert_allclose(
            dense, kept.dense(), rtol=0, atol=2**-23 * (np.abs(got.mean).max() + 127 * got.scale.max())
        )
    return packed


def values(shape: tuple[int, ...], kind: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x: np.ndarray = rng.standard_normal(shape)
    if kind == "relu6":
        x = np.clip(4 * x, 0, 6)
    elif kind == "ties":
        x = rng.integers(-2, 3, shape).astype(float)
    elif kind == "constant":
        x = np.full(shape, 1.7)
    elif kind == "zero":
        x = np.zeros(shape)
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "smallest denormals":
        x = rng.integers(-3, 4, shape) * 2.0**-149
    elif kind == "huge":
        x = np.clip(x, -1, 1) * 1e36
    elif kind == "wide":
        x = np.sign(x) * 10 ** rng.uniform(-30, 30, shape)
    elif kind == "outlier":
        x[..., 0] *= 1e6
    elif kind == "offset":
        x = 1e-3 * x + 1000
    elif kind == "gradient":  # rows differ in scale, so a sample of rows misjudges the threshold
        x = x * np.linspace(0, 1, shape[1])[None, :, None] ** 8
    return x.astype(np.float32)


KINDS = [
    *("normal", "relu6", "ties", "constant", "zero", "denormal", "smallest denormals", "huge", "wide", "outlier"),
    *("offset", "gradient"),
]


@pytest.mark.parametrize("form", ["plain", "centered"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packs_what_the_definition_keeps(shape: tuple[int, int, int], form: str) -> None:
    n = shape[1] * shape[2]
    for keep in sorted({0, 1, 2, n // 2, n - 1, n, *(keep_count(n, s) for s in (0.5, 0.9, 0.97))} & set(range(n + 1))):
        check(values(shape, "normal"), form, keep, threads=1 + keep % 3)


@pytest.mark.parametrize("form", ["plain", "centered"])
@pytest.mark.parametrize("kind", KINDS)
def test_packs_any_values(kind: str, form: str) -> None:
    for shape in [(2, 129, 17), (1, 64, 16), (3, 5, 3)]:
        n = shape[1] * shape[2]
        for keep in (0, 1, keep_count(n, 0.9), n // 2, n):
            check(values(shape, kind), form, keep)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("kind", ["normal", "relu6", "gradient", "outlier"])
def test_kept_residuals_stand_for_the_energy_of_all(kind: str, sparsity: float) -> None:
    """Their product with the residuals is Σr², to the rounding of int8; the product with the means is exact anyway."""
    x = values((3, 129, 17), kind)
    keep = keep_count(129 * 17, sparsity)
    packed = pack(x, "centered", keep)
    means = np.repeat(Sections(packed, "centered", 3, 129, 17, keep).mean, np.diff(block_bounds(129)), axis=1)
    residual = (x - means).astype(np.float64)
    dense = unpack(FORMS["centered"], 3, 129, 17, keep, packed) - means
    np.testing.assert_allclose((residual * dense).sum((1, 2)), np.square(residual).sum((1, 2)), rtol=2e-3)


@pytest.mark.parametrize("form", ["plain", "centered"])
@pytest.mark.parametrize("kind", ["normal", "relu6", "ties", "gradient", "outlier", "wide"])
def test_large_samples_take_the_sampled_bracket(kind: str, form: str) -> None:
    """Above 16,384 elements the first histogram sees every eighth row only; the selection stays exact."""
    for shape in [(1, 1031, 24), (2, 300, 70)]:
        n = shape[1] * shape[2]
        for sparsity in (0.5, 0.95, 0.999):
            check(values(shape, kind), form, keep_count(n, sparsity))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["plain", "centered"])
@pytest.mark.parametrize("looked_at", [1e-3, 1e3], ids=["too many are listed", "too few are listed"])
@pytest.mark.parametrize("kind", ["normal", "ties", "relu6"])  # of many equal ones a full list cannot be rid
def test_a_wrong_guess_of_the_threshold_changes_nothing(kind: str, looked_at: float, form: str, threads: int) -> None:
    blocks, rows, cols = 100, 64, 20
    x = values((1, blocks * rows, cols), kind)
    for i in range(16):  # the blocks from which `pack` guesses
        x[0, ((2 * i + 1) * blocks // 32) * rows :][:rows] *= looked_at
    for sparsity in (0.95, 0.5):
        check(x, form, keep_count(x[0].size, sparsity), threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("lanes", [4, 8, 16])  # of the instruction set, whichever it is
def test_a_wrong_guess_from_an_eighth_of_the_list_changes_nothing(lanes: int, larger: bool, threads: int) -> None:
    """Half of the columns are listed, the others small; every eighth vector of the list is unlike the rest of it."""
    blocks, rows, cols = 128, 64, 8
    rng = np.random.default_rng(0)
    place = np.arange(blocks * cols * rows).reshape(blocks, cols, rows)
    low, high = rng.uniform(1, 1.02, place.shape), rng.uniform(1.04, 1.06, place.shape)  # one bin of the first guess
    listed = np.where((place // lanes % 8 == 0) == larger, high, low).transpose(0, 2, 1).reshape(1, blocks * rows, cols)
    x = np.concatenate([listed, np.full_like(listed, 1e-3)], axis=2).astype(np.float32)
    check(x, "plain", 52_000, threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_values_near_the_threshold(threads: int) -> None:
    """They differ by a few bits: no histogram parts them soon. Behind one thread's list is no room to copy them all."""
    near = 12_000
    rng = np.random.default_rng(0)
    x = rng.uniform(1e-3, 2e-3, (1, 2048 * 64)).astype(np.float32)
    x[0, rng.choice(x.size, near, replace=False)] = 1 + rng.integers(0, 16, near) * np.float32(2**-23)
    check(x.reshape(1, 2048, 64), "plain", keep_count(x.size, 0.95), threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["plain", "centered"])
def test_values_that_grow_from_place_to_place(form: str, threads: int) -> None:
    """The list of candidates is full again and again, and the blocks that `pack` guesses from differ."""
    x = values((2, 6400, 20), "normal") * np.geomspace(1e-3, 1e3, 6400, dtype=np.float32)[:, None]
    for sparsity in (0.97, 0.9, 0.5):
        check(x, form, keep_count(x[0].size, sparsity), threads)
        check(np.ascontiguousarray(x[:, ::-1]), form, keep_count(x[0].size, sparsity), threads)


@pytest.mark.parametrize("form", ["plain", "centered"])
@pytest.mark.parametrize("kind", ["normal", "ties", "relu6"])
def test_threads_give_the_same_bytes(kind: str, form: str) -> None:
    for shape in [(1, 1, 5), (1, 700, 40), (3, 130, 33), (5, 64, 3)]:
        x = values(shape, kind)
        keep = keep_count(shape[1] * shape[2], 0.8)
        one = check(x, form, keep)
        for threads in (2, 3, 4):
            other = Sections(check(x, form, keep, threads), form, *shape, keep)
            assert np.array_equal(other.mask, Sections(one, form, *shape, keep).mask)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 140),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(KINDS),
    st.sampled_from(["plain", "centered"]),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_any_shape(
    samples: int, rows: int, cols: int, sparsity: float, kind: str, form: str, threads: int, seed: int
) -> None:
    check(values((samples, rows, cols), kind, seed), form, keep_count(rows * cols, sparsity), threads)


def test_keep_count_takes_sparsity_as_a_decimal() -> None:
    assert [keep_count(10, s) for s in (0.0, 0.1, 0.7, 0.9, 0.95, 1.0)] == [10, 9, 3, 1, 1, 0]
    assert keep_count(100, 0.29) == 71 and keep_count(1000, 0.999) == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 40000])
def test_bf16_rounds_to_nearest_even(n: int, threads: int) -> None:
    x = values((1, n, 1), "wide")
    x[0, : n // 3, 0] = np.float32(1 + 2**-8)  # halfway: to the even neighbour, 1
    packed = pack(x, "bf16", 0, threads)
    assert np.array_equal(unpack(1, 1, n, 1, 0, packed), to_bf16(x))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["bf16", "plain", "centered"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_non_finite_values_are_reported(bad: float, form: str, threads: int) -> None:
    for position in [(0, 0, 0), (1, 128, 18), (0, 64, 16)]:
        x = values((2, 129, 19), "normal")
        x[position] = bad
        for keep in (0,) if form == "bf16" else (0, 5, 129 * 19):
            with pytest.raises(NonFiniteError):
                pack(x, form, keep, threads)


def test_every_pattern_of_nan_is_reported() -> None:
    for pattern in (0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7FC00000):
        x = values((1, 30, 2), "normal")
        x.view(np.uint32)[0, 7, 1] = pattern
        for form in ("bf16", "plain", "centered"):
            with pytest.raises(NonFiniteError):
                pack(x, form, 0 if form == "bf16" else 6)


def test_overflow_is_reported() -> None:
    largest = np.finfo(np.float32).max
    x = np.full((1, 64, 1), largest, np.float32)
    for form in ("bf16", "plain", "centered"):  # no bf16 near it; the sum of the block overflows
        with pytest.raises(NonFiniteError):
            pack(x, form, 0 if form == "bf16" else 3)
    for tail in ([-1.0], [-1 / 70] * 63):  # the mean is small and the residuals are finite
        check(np.array([1.0, *tail], np.float32).reshape(1, -1, 1) * np.float32(0.9) * largest, "centered", 2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", ["bf16", "plain", "centered"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_of_wider_rows_are_packed_alike(shape: tuple[int, int, int], form: str, threads: int) -> None:
    x = values(shape, "normal")
    keep = 0 if form == "bf16" else keep_count(x[0].size, 0.8)
    expected = pack(x, form, keep)
    for before, after in ((0, 1), (3, 0), (16, 5)):
        wide = np.full((*shape[:2], before + shape[2] + after), np.nan, np.float32)
        wide[:, :, before : before + shape[2]] = x
        ints = [FORMS[form], *shape, keep, wide.shape[2], before]
        packed = np.full(packed_bytes(*ints[:5]), 0xA5, np.uint8)
        scratch = np.full(kernel_scratch("pack", ints, threads=threads), 0xA5, np.uint8)
        kernel_run("pack", ints, [], [wide, packed, scratch if scratch.size else None], threads=threads)
        assert packed.tobytes() == expected.tobytes()


def bytes_of(form: str, shape: tuple[int, int, int], keep: int, first: int, count: int) -> np.ndarray:
    """Which bytes of a kept tensor belong to its samples [first, first + count)."""
    samples, rows, cols = shape
    blocks, groups = len(block_bounds(rows)) - 1, -(-cols // 16)
    of_sample = {
        "bf16": [2 * rows * cols],
        "plain": [8 * blocks * cols, 4 * blocks * groups, 2 * keep],
        "centered": [4, 2 * blocks * cols, 8 * blocks * cols, 4 * blocks * groups, keep],
    }[form]
    mine, end = np.zeros(packed_bytes(FORMS[form], *shape, keep), bool), 0
    for size in of_sample:
        begin = -(-end // 64) * 64
        mine[begin + first * size : begin + (first + count) * size] = True
        end = begin + samples * size
    assert end == mine.size
    return mine


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 700])
@pytest.mark.parametrize("form", ["bf16", "plain", "centered"])
@pytest.mark.parametrize("cols", [1, 17, 40])
def test_samples_in_turns_are_packed_as_all_at_once(rows: int, cols: int, form: str, threads: int) -> None:
    shape = (6, rows, cols)
    for kind in ("normal", "ties"):
        x = values(shape, kind)
        keep = 0 if form == "bf16" else keep_count(rows * cols, 0.7)
        expected = pack(x, form, keep, threads)
        for before, after in ((0, 0), (3, 2)):
            wide = np.full((*shape[:2], before + cols + after), np.nan, np.float32)
            wide[:, :, before : before + cols] = x
            raw = np.full(expected.size + 64, 0xA5, np.uint8)
            packed = raw[: expected.size]
            for first, count in ((3, 3), (0, 1), (1, 2)):
                ints = [FORMS[form], *shape, keep, wide.shape[2], before, first, count]
                size = kernel_scratch("pack", ints, threads=threads)
                assert size == kernel_scratch("pack", [*ints[:1], count, *ints[2:5]], threads=threads)
                scratch = np.full(size, 0xA5, np.uint8) if size else None
                was = raw.copy()
                kernel_run("pack", ints, [], [wide[first : first + count].copy(), packed, scratch], threads=threads)
                mine = np.zeros(raw.size, bool)
                mine[: packed.size] = bytes_of(form, shape, keep, first, count)
                assert np.array_equal(raw[~mine], was[~mine])
                assert np.array_equal(raw[mine], expected[mine[: packed.size]])
            assert packed.tobytes() == expected.tobytes()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["bf16", "plain", "centered"])
def test_values_of_a_turn_that_are_not_finite_are_reported(form: str, threads: int) -> None:
    x, keep = values((2, 9, 3), "normal"), 0 if form == "bf16" else 5
    x[1, 8, 2] = np.nan
    out = np.zeros(packed_bytes(FORMS[form], 4, 9, 3, keep), np.uint8)
    ints = [FORMS[form], 4, 9, 3, keep, 3, 0]
    scratch = np.zeros(kernel_scratch("pack", ints, threads=threads) or 1, np.uint8)
    kernel_run("pack", [*ints, 3, 1], [], [x[:1], out, scratch], threads=threads)
    with pytest.raises(NonFiniteError):
        kernel_run("pack", [*ints, 2, 2], [], [x, out, scratch], threads=threads)


def test_turns_that_do_not_fit_are_refused() -> None:
    x, out = np.zeros((2, 20, 3), np.float32), np.zeros(packed_bytes(1, 4, 20, 3, 0), np.uint8)
    ints = [1, 4, 20, 3, 0, 3, 0]
    kernel_run("pack", [*ints, 2, 2], [], [x, out, None])
    high = (1 << 63) - 1
    for first, count in ((-1, 1), (0, 0), (0, -1), (4, 1), (3, 2), (0, 5), (high, 1), (1, high), (-high, high)):
        with pytest.raises(UsageError, match="first|count"):
            kernel_run("pack", [*ints, first, count], [], [x, out, None])
    for wrong in ([*ints, 2], [*ints, 2, 2, 0]):
        with pytest.raises(UsageError, match="ints"):
            kernel_run("pack", wrong, [], [x, out, None])
    for operands in ([x[:1], out, None], [x, out[:-1], None]):
        with pytest.raises(UsageError, match="bytes, needs"):
            kernel_run("pack", [*ints, 2, 2], [], operands)


def test_columns_that_do_not_fit_are_refused() -> None:
    wide, out = np.zeros((2, 20, 5), np.float32), np.zeros(packed_bytes(1, 2, 20, 3, 0), np.uint8)
    kernel_run("pack", [1, 2, 20, 3, 0, 5, 2], [], [wide, out, None])
    for row, column in ((2, 0), (5, 3), (5, -1), (6, 0), (-5, 0), (1 << 40, 0), (5, 1 << 62), (1 << 62, 1 << 62)):
        with pytest.raises(UsageError):
            kernel_run("pack", [1, 2, 20, 3, 0, row, column], [], [wide, out, None])


def test_wrong_calls_are_refused() -> None:
    x, out = values((2, 20, 3), "normal"), np.zeros(packed_bytes(3, 2, 20, 3, 6), np.uint8)
    scratch = np.zeros(kernel_scratch("pack", [3, 2, 20, 3, 6]), np.uint8)
    for ints in (
        [0, 2, 20, 3, 0],
        [4, 2, 20, 3, 6],
        [-1, 2, 20, 3, 6],
        [3, 0, 20, 3, 6],
        [3, 2, 20, 3, 61],
        [1, 2, 20, 3, 6],
    ):
        with pytest.raises(UsageError):
            kernel_run("pack", ints, [], [x, out, scratch])
    for ints in ([3, 2, 20, 3, -1], [3, 1 << 62, 20, 3, 6], [3, 1, 1 << 31, 2, 6], [3, 2, 20], [3, 2, 20, 3, 6, 0]):
        with pytest.raises(UsageError):
            kernel_run("pack", ints, [], [x, out, scratch])
    for operands in ([x[:1], out, scratch], [x, out[:-1], scratch], [x, out, scratch[:-1]], [x, out, None], [x, out]):
        with pytest.raises(UsageError):
            kernel_run("pack", [3, 2, 20, 3, 6], [], operands)
    kernel_run("pack", [3, 2, 20, 3, 6], [], [x, out, scratch])
    with pytest.raises(UsageError):
        unpack(3, 2, 20, 3, 6, out[:-1])
    with pytest.raises(UsageError):
        unpack(3, 2, 20, 3, 6, np.full_like(out, 0xFF))
    for arguments in ((4, 1, 1, 1, 0), (3, 0, 1, 1, 0), (2, 1, 4, 4, 17), (0, 1, 4, 4, 1), (3, 1 << 40, 1 << 40, 1, 0)):
        with pytest.raises(UsageError):
            packed_bytes(*arguments)


def test_sizes_are_those_of_the_format() -> None:
    assert packed_bytes(0, 2, 3, 5, 0) == 120 and packed_bytes(1, 2, 3, 5, 0) == 60
    # 2 samples of 65 × 17: 2 blocks, 2 groups; mask 2·2·17·8 = 544 → 576, offsets 2·2·2·4 = 32 → 640, then 2·100 bf16
    assert packed_bytes(2, 2, 65, 17, 100) == 640 + 400
    # scales 8 → 64, means 2·2·17·2 = 136 → 256, mask 544 → 832 (800 aligned), offsets 32 → 896, then 2·100 int8
    assert packed_bytes(3, 2, 65, 17, 100) == 896 + 200


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mul_grad_sums_products(shape: tuple[int, int, int], form: str, sparsity: float) -> None:
    x = values(shape, "normal")
    keep = keep_count(shape[1] * shape[2], sparsity) if FORMS[form] >= 2 else 0
    packed = x if form == "dense" else pack(x, form, keep)
    dense = unpack(FORMS[form], *shape, keep, packed.view(np.uint8).ravel())
    dy = values(shape, "normal", 1)
    product = dense.astype(np.float64) * dy
    for reduce, axes in ((0, (1,)), (1, (0, 1))):
        results = []
        for threads in (1, 2, 3):
            out = np.full(product.sum(axes).shape, np.nan, np.float32)
            kernel_run("mul_grad", [FORMS[form], *shape, keep, reduce], [], [packed, dy, out, None], threads=threads)
            # sums of 64 in float32, then sums of at most a few dozen of those
            assert np.all(np.abs(out - product.sum(axes)) <= 8 * 2**-24 * np.abs(product).sum(axes) + 1e-12)
            results.append(out)
        assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_mul_grad_refuses_wrong_calls_and_contents() -> None:
    x, dy, out = (np.zeros((2, 8, 4), np.float32) for _ in range(3))
    for ints in ([0, 2, 8, 4, 0, 2], [0, 2, 8, 4, 0], [0, 2, 9, 4, 0, 0], [5, 2, 8, 4, 0, 0]):
        with pytest.raises(UsageError):
            kernel_run("mul_grad", ints, [], [x, dy, out, None])
    with pytest.raises(UsageError):
        kernel_run("mul_grad", [0, 2, 8, 4, 0, 0], [], [x, dy, np.zeros(7, np.float32), None])
    garbage = np.full(packed_bytes(3, 2, 8, 4, 3), 0xFF, np.uint8)
    with pytest.raises(NonFiniteError):
        kernel_run("mul_grad", [3, 2, 8, 4, 3, 0], [], [garbage, dy, out, None])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_keeps_the_same(isa: str) -> None:
    code = f"""
import sys
from edge_razor.runtime import isa
if isa() != {isa!r}: sys.exit(77)
from tests.kernels.test_razor import KINDS, SHAPES, check, values, test_mul_grad_sums_products
from tests.kernels.test_razor import test_samples_in_turns_are_packed_as_all_at_once
for form in ("plain", "centered"):
    for shape in SHAPES:
        check(values(shape, "normal"), form, shape[1] * shape[2] // 10)
    for kind in KINDS:
        check(values((2, 129, 17), kind), form, 300, 2)
for sparsity in (0.0, 0.9):
    test_mul_grad_sums_products((5, 129, 31), "centered", sparsity)
for form in ("bf16", "plain", "centered"):
    test_samples_in_turns_are_packed_as_all_at_once(65, 17, form, 2)
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
