"""The profile: multiply-adds and bytes of each kernel from the figures of the plan, sums by kernel, plans read back."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from edge_razor.errors import PlanError
from edge_razor.planner import plan
from edge_razor.planner.deserialize import read_steps
from edge_razor.planner.program import Buffer, Step
from edge_razor.profile import (
    Line,
    _sums,
    by_kernel,
    profile_lines,
    slowest,
    step_bytes,
    step_multiply_adds,
    table_cells,
)
from edge_razor.runtime import StepTime
from tests.bundles import write_linear_bundle

# n, ih, iw, ic, oh, ow, oc, kh, kw, sh, sw, pt, pl, dh, dw, group
CONV = [2, 7, 5, 6, 4, 3, 9, 3, 3, 2, 2, 1, 1, 1, 1, 3]
DENSE = 2 * 4 * 3 * 9 * 3 * 3 * 2


def step(kernel: str, ints: list[int], *sizes: int | None) -> Step:
    return Step(kernel, "layer:op", ints, [], [None if size is None else Buffer("", size) for size in sizes])


@pytest.mark.parametrize(
    ("kernel", "rest", "expected"),
    [
        ("conv", [0, 0], DENSE),
        ("conv_grad_input", [0, 0, 0, 0], DENSE),
        ("conv_grad_weight", [0, 0], DENSE),  # dense float32
        ("conv_grad_weight", [1, 0], DENSE),  # bf16
        ("conv_grad_weight", [2, 21], DENSE // 10),  # 21 of 7·5·6 values a sample
        ("conv_grad_weight", [3, 21], DENSE // 10),
    ],
)
def test_multiply_adds_of_convolutions(kernel: str, rest: list[int], expected: int) -> None:
    assert step_multiply_adds(step(kernel, [*CONV, *rest])) == expected


def test_multiply_adds_of_attention() -> None:
    sizes = [2, 5, 7, 6, 3, 4]  # n, t, s, heads, kv_heads, d
    product = 2 * 6 * 5 * 7 * 4
    assert step_multiply_adds(step("attention", [*sizes, 1, 0, 0, 0])) == 2 * product
    assert step_multiply_adds(step("attention_grad", [*sizes, 1, 0, 0, *[0] * 7])) == 5 * product
    kept = step("attention_grad", [*sizes, 1, 0, 0, *[0] * 6, 3])
    assert step_multiply_adds(kept) == 4 * product // sizes[2] * 3


def test_other_kernels_count_no_multiply_adds() -> None:
    assert step_multiply_adds(step("pack", [3, 2, 35, 6, 21], 1680, 100)) == 0
    assert step_multiply_adds(step("binary", [0, 1, 5, 1, 1], 20, 20, 20)) == 0


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        # X, W, scale, shift, Y, kept, addend, and scratch that does not count
        (step("conv", [*CONV, 1, 1], 100, 20, 4, 4, 50, 7, None, 999), 185),
        (step("conv", [*CONV, 1, 1], 100, 20, 4, 4, 50, 7, 50, 999), 235),
        (step("conv", [*CONV, 0, 0], 100, 20, None, None, 50, None, None, 999), 170),
        (step("conv_grad_input", [*CONV, 0, 0, 0, 0], 50, 20, None, 100, None, None, 999), 170),
        (
            step("conv_grad_input", [*CONV, 0, 0, 0, 1], 50, 20, None, 100, None, None, 999),
            270,
        ),  # accumulates: dX is read too
        (step("sgd", [5, 0], 20, 20, None, None), 60),  # the parameter is read and written
        (step("adamw", [5], 20, 20, 20, 20, None), 140),
        (step("copy", [2, 3, 5, 1, 1, 1, 1, 0, 0], 4000, 8000), 2 * 4 * 15),  # a part of its operands
        (step("fill", [5], 20), 20),
        # A turn: 2 of the packed tensor's 8 samples; X, dY and G are as large as the step says.
        (step("pack", [3, 8, 35, 6, 21, 6, 0, 2, 2], 1680, 4000), 1680 + 1000),
        (step("conv_grad_weight", [*CONV, 3, 21, 0, 8, 2], 4000, 50, 20), 1000 + 50 + 20),
        (step("conv_grad_weight", [*CONV, 3, 21, 1, 8, 2], 4000, 50, 20), 1000 + 50 + 40),  # G is read too
        (step("conv_grad_weight", [*CONV, 0, 0, 1, 2, 0], 1680, 50, 20), 1680 + 50 + 40),
        (step("conv_grad_input", [*CONV, 0, 0, 2, 0], 50, 20, None, 100, None, 24, 999), 170 + 48),  # sums += …
    ],
)
def test_bytes_are_the_operands_once_and_twice_if_updated(made: Step, expected: int) -> None:
    assert step_bytes(made) == expected


@pytest.fixture
def binary(tmp_path: Path) -> bytes:
    bundle = write_linear_bundle(tmp_path / "model.razor")
    return plan(bundle, mem_budget=None, batch_size=4, sparsity=0, optimizer="sgd", momentum=0.0, threads=1).binary


def entries(binary: bytes, calls: int = 3) -> list[StepTime]:
    steps = read_steps(binary)
    named = [("train", s) for s in steps.train] + [("eval", s) for s in steps.evaluate]
    return [StepTime(s.kernel, s.label, phase, calls, 0.5 + i) for i, (phase, s) in enumerate(named)]


def test_a_plan_is_read_back_as_it_was_planned(binary: bytes) -> None:
    steps = read_steps(binary)
    kernels = [s.kernel for s in steps.train]
    assert kernels[:2] == ["conv", "cross_entropy"] and kernels.count("sgd") == 2
    assert [s.kernel for s in steps.evaluate] == ["conv"]
    conv = steps.train[0]
    assert conv.ints[: len(CONV)] == [4, 1, 1, 6, 1, 1, 3, 1, 1, 1, 1, 0, 0, 1, 1, 1]
    assert conv.operands[0] is not None and conv.operands[0].bytes == 4 * 4 * 6
    assert step_multiply_adds(conv) == 4 * 6 * 3


def test_lines_sum_calls_and_skip_what_never_ran(binary: bytes) -> None:
    measured = entries(binary)
    measured[-1] = replace(measured[-1], calls=0)
    lines = profile_lines(binary, measured)
    assert len(lines) == len(measured) - 1 and {line.phase for line in lines} == {"train"}
    assert lines[0].multiply_adds == 3 * 4 * 6 * 3
    kernels = by_kernel(lines)
    assert [line.seconds for line in kernels] == sorted((line.seconds for line in kernels), reverse=True)
    assert sum(line.bytes for line in kernels) == sum(line.bytes for line in lines)
    updates = next(line for line in kernels if line.kernel == "sgd")
    assert updates.calls == 6 and updates.bytes == 3 * 3 * 4 * (6 * 3 + 3)
    assert slowest(lines, 2) == [lines[-1], lines[-2]]


def test_turns_of_a_step_are_one_line(binary: bytes) -> None:
    """Steps of one kernel and label: here both updates get the label of the first."""
    steps = read_steps(binary)
    updates = [s for s in steps.train if s.kernel == "sgd"]
    assert len(updates) == 2
    lines = profile_lines(binary, entries(binary))
    relabelled = [replace(line, label="same") if line.kernel == "sgd" else line for line in lines]
    merged = _sums(relabelled, lambda line: (line.phase, line.kernel, line.label))
    assert len(merged) == len(lines) - 1
    (line,) = [line for line in merged if line.label == "same"]
    both = [line for line in relabelled if line.label == "same"]
    assert (line.calls, line.seconds) == (6, both[0].seconds + both[1].seconds)
    order = [(line.phase, line.label) for line in relabelled]
    assert [(line.phase, line.label) for line in merged] == list(dict.fromkeys(order))


def test_cells() -> None:
    assert table_cells(Line("train", "conv", "", 4, 2.0, 3 * 10**9, 8 * 10**9), 8.0) == (
        "500.000",
        "25.0%",
        "3.0",
        "4.0",
    )
    assert table_cells(Line("train", "pack", "", 1, 0.0, 0, 0), 0.0) == ("0.000", "0.0%", "–", "0.0")


def test_a_profile_of_another_plan_is_refused(binary: bytes) -> None:
    with pytest.raises(PlanError, match="another plan"):
        profile_lines(binary, entries(binary)[1:])


def test_every_truncation_of_a_plan_is_an_error(binary: bytes) -> None:
    for size in (0, 7, 23, len(binary) // 2, len(binary) - 1):
        with pytest.raises(PlanError):
            read_steps(binary[:size])


def test_a_kernel_that_is_not_known_is_an_error(binary: bytes) -> None:
    payload = binary[24:].replace(b"cross_entropy", b"cross_entropz")
    header = struct.pack(
        "<8sIIQ", binary[:8], struct.unpack_from("<I", binary, 8)[0], zlib.crc32(payload), len(payload)
    )
    with pytest.raises(PlanError, match="unknown kernel 'cross_entropz'"):
        read_steps(header + payload)
