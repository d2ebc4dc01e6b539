"""Calls that are not valid give an error and touch nothing; and every instruction set gives the same results."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from edge_razor.errors import UsageError
from edge_razor.runtime import kernel_run, kernel_scratch
from tests.kernels.instruction_sets import check_under


@dataclass
class Valid:
    """A valid call: operand bytes, which ints are sizes (at least 1), which operands may not be absent."""

    ints: list[int]
    floats: list[float]
    bytes: list[int | None]
    sizes: list[int]
    required: list[int]
    scratch: bool = False


MAX = [2, 6, 6, 5, 3, 3, 2, 2, 2, 2, 0, 0, 1, 1]
AVERAGE = [2, 6, 6, 5, 3, 3, 2, 2, 2, 2, 0, 0, 0, 0, 1]
POOL_SIZES = list(range(10))
CALLS = {
    "affine": Valid([3, 9, 1, 1], [0, 0], [108, 36, 36, 108, 6], [0, 1], [0, 3, 4]),
    "activation_grad": Valid([1100, 3, 9, 2, 1], [0, 0], [13200, 2200, 13200, 12], [0, 1], [0, 1, 2, 3], scratch=True),
    "channel_sum": Valid([1100, 3], [], [13200, 12], [0, 1], [0, 1], scratch=True),
    "batch_norm_fold": Valid([7], [1e-5], [28] * 7, [0], [2, 3, 5, 6]),
    "batch_norm_grad": Valid([7], [1e-5], [28] * 6, [0], [0, 1, 2, 3, 5]),
    "column_dot": Valid([3, 9], [], [108, 108, 36], [0, 1], [0, 1, 2]),
    "scale_columns": Valid([3, 9], [], [108, 36, 108], [0, 1], [0, 1, 2]),
    "binary": Valid([0, 2, 3, 9, 9, 1, 0, 1], [], [108, 36, 108], [2, 3], [0, 1, 2]),
    "neg": Valid([9], [], [36, 36], [0], [0, 1]),
    "reduce": Valid([1, 2, 1100, 3, 1, 0], [], [13200, 12], [2, 3], [0, 1], scratch=True),
    "broadcast": Valid([2, 3, 9, 0, 1], [0.5], [36, 108], [1, 2], [0, 1]),
    "copy": Valid([2, 3, 9, 10, 1, 12, 1, 2, 3], [], [124, 144], [1, 2], [0, 1]),
    "fill": Valid([9], [1.0], [36], [0], [0]),
    "max_pool": Valid(MAX, [], [1440, 360, 90], POOL_SIZES, [0, 1]),
    "max_pool_grad": Valid(MAX, [], [360, 90, 1440], POOL_SIZES, [0, 1, 2]),
    "average_pool": Valid(AVERAGE, [], [1440, 360], POOL_SIZES, [0, 1]),
    "average_pool_grad": Valid(AVERAGE, [], [360, 1440], POOL_SIZES, [0, 1]),
    "softmax": Valid([2, 5, 3], [], [120, 120], [0, 1, 2], [0, 1]),
    "softmax_grad": Valid([2, 5, 3], [], [120, 120, 120], [0, 1, 2], [0, 1, 2]),
    "layer_norm": Valid([3, 9, 0], [1e-5], [108, 36, 36, 108, 108, 12], [0, 1], [0, 3]),
    "layer_norm_grad": Valid(
        [0, 2, 3, 5, 0, 0], [], [120, 120, 24, 20, 120, 20, 20, 120, 20], [1, 2, 3], [0, 1, 2, 4], scratch=True
    ),
    "attention": Valid(
        [2, 3, 5, 4, 2, 6, 0, 1, 0, 2],
        [0.5, 0],
        [576, 480, 480, 40, 60, 576, 288],
        [0, 1, 2, 3, 4, 5, 9],
        [0, 1, 2, 4, 5, 6],
        scratch=True,
    ),
    "attention_grad": Valid(
        [2, 3, 5, 4, 2, 6, 0, 1, 0, 0, 1, 0, 0, 0, 0, 2],
        [0.5, 0],
        [576, 240, 480, 40, 60, 576, 288, 576, 480, 480, 96, 48, 48],
        [0, 1, 2, 3, 4, 5, 15],
        [0, 1, 2, 5, 6, 7, 8, 9],
        scratch=True,
    ),
    "attention columns": Valid(
        [2, 3, 3, 4, 2, 6, 1, 1, 0, 2, 50, 1, 50, 26, 50, 38],
        [0.5, 0],
        [1200, 1200, 1200, 24, 36, 576, 288],
        [0, 1, 2, 3, 4, 5, 9, 10, 12, 14],
        [0, 1, 2, 4, 5, 6],
        scratch=True,
    ),
    "attention_grad columns": Valid(
        [2, 3, 3, 4, 2, 6, 1, 1, 0, 0, 1, 0, 0, 0, 0, 2, 50, 1, 12, 0, 50, 38, 48, 0, 48, 24, 48, 36],
        [0.5, 0],
        [1200, 144, 1200, 24, 36, 576, 288, 1152, 1152, 1152, 192, 192, 192],
        [0, 1, 2, 3, 4, 5, 15, 16, 18, 20, 22, 24, 26],
        [0, 1, 2, 5, 6, 7, 8, 9],
        scratch=True,
    ),
    "select_position": Valid([2, 3, 5, 0, 7, 1], [], [120, 24, 40], [0, 1, 2], [0, 1, 2]),
    "select_position_grad": Valid([2, 3, 5, 1, 0, 0], [], [40, 24, 120], [0, 1, 2], [0, 1, 2]),
    "embedding": Valid([3, 7, 5, 0], [], [12, 140, 60], [0, 1, 2], [0, 1, 2]),
    "embedding_grad": Valid([3, 7, 5, 1, -1], [], [12, 60, 140], [0, 1, 2], [0, 1, 2]),
    "batch_matmul": Valid([2, 3, 4, 5, 0, 1], [], [96, 160, 120], [0, 1, 2, 3], [0, 1, 2]),
    "rotary": Valid([2, 3, 4, 6, 0], [], [576, 72, 72, 576], [0, 1, 2, 3], [0, 1, 2, 3]),
    "dropout": Valid([9, 2, 1], [0.5], [72, 72], [0, 1], [0, 1]),
    "cross_entropy": Valid([2, 3, 5, -100], [0.1], [120, 24, 120], [0, 1, 2], [0, 1]),
    "mse": Valid([2, 9], [], [72, 72, 72], [0, 1], [0, 1]),
    "bce_logits": Valid([2, 9], [], [72, 72, 72], [0, 1], [0, 1]),
    "sgd": Valid([9, 1], [0.9, 0.1], [36, 36, 36, 36], [0], [0, 1, 2]),
    "adamw": Valid([9], [0.9, 0.999, 1e-8, 0.1], [36] * 5, [0], [0, 1, 2, 3]),
}


def buffers(sizes: list[int | None]) -> list[np.ndarray | None]:
    return [None if size is None else np.zeros(size, np.uint8) for size in sizes]


def call(name: str, ints: list[int], floats: list[float], sizes: list[int | None]) -> None:
    kernel, spec = name.partition(" ")[0], CALLS[name]
    scratch: list[np.ndarray | None] = []
    if spec.scratch:
        # As large as the valid call needs: what is wrong must be found without its help.
        scratch = [np.zeros(kernel_scratch(kernel, spec.ints) or 64, np.uint8)]
    operands = buffers(sizes)
    kernel_run(kernel, ints, floats, [*operands, *scratch], valid_batch=2, valid_micro=2, learning_rate=0.1)


@pytest.mark.parametrize("name", CALLS)
def test_the_valid_call_is_valid(name: str) -> None:
    spec = CALLS[name]
    call(name, spec.ints, spec.floats, spec.bytes)


@pytest.mark.parametrize("name", CALLS)
def test_every_operand_one_byte_short(name: str) -> None:
    spec = CALLS[name]
    for i, size in enumerate(spec.bytes):
        assert size is not None
        with pytest.raises(UsageError, match="bytes, needs"):
            call(name, spec.ints, spec.floats, [*spec.bytes[:i], size - 1, *spec.bytes[i + 1 :]])


@pytest.mark.parametrize("name", CALLS)
def test_operands_that_must_be_present(name: str) -> None:
    spec = CALLS[name]
    for i in range(len(spec.bytes)):
        sizes = [*spec.bytes[:i], None, *spec.bytes[i + 1 :]]
        if i in spec.required:
            with pytest.raises(UsageError, match="absent|needs"):
                call(name, spec.ints, spec.floats, sizes)
        else:
            call(name, spec.ints, spec.floats, sizes)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_counts(name: str) -> None:
    spec = CALLS[name]
    more = [1, 1] if name == "channel_sum" else [1]  # whose accumulate may be left out
    for ints, floats, sizes in (
        ([*spec.ints, *more], spec.floats, spec.bytes),
        (spec.ints[:-1], spec.floats, spec.bytes),
        ([], spec.floats, spec.bytes),
        (spec.ints, [*spec.floats, 0.0], spec.bytes),
        (spec.ints, spec.floats, [*spec.bytes, 64]),
        (spec.ints, spec.floats, spec.bytes[:-1]),
        (spec.ints, spec.floats, []),
    ):
        with pytest.raises(UsageError, match="expected|scratch"):
            call(name, ints, floats, sizes)
    if spec.floats:
        with pytest.raises(UsageError, match="expected"):
            call(name, spec.ints, spec.floats[:-1], spec.bytes)


@pytest.mark.parametrize("value", [0, -1, -(2**63), 2**31, 2**62 + 1, 2**63 - 1])
@pytest.mark.parametrize("name", CALLS)
def test_sizes_out_of_range(name: str, value: int) -> None:
    spec = CALLS[name]
    for i in spec.sizes:
        ints = list(spec.ints)
        ints[i] = value
        with pytest.raises(UsageError):
            call(name, ints, spec.floats, spec.bytes)


@pytest.mark.parametrize("name", CALLS)
def test_every_attribute_with_every_odd_value_is_an_error_or_harmless(name: str) -> None:
    """Nothing hangs, overflows or leaves its buffers (the sanitizer build runs this too)."""
    spec = CALLS[name]
    values = [
        -(2**63),
        -(2**31),
        -1,
        0,
        1,
        2,
        3,
        7,
        8,
        11,
        255,
        2**20,
        2**31 - 1,
        2**31,
        2**40,
        2**61,
        2**62,
        2**63 - 1,
    ]
    for i in range(len(spec.ints)):
        for value in values:
            ints = list(spec.ints)
            ints[i] = value
            try:
                call(name, ints, spec.floats, spec.bytes)
            except UsageError:
                pass
    for i in range(len(spec.floats)):
        for number in (-1.0, 0.0, 1.0, 2.0, float("nan"), float("inf"), -float("inf")):
            floats = list(spec.floats)
            floats[i] = number
            try:
                call(name, spec.ints, floats, spec.bytes)
            except UsageError:
                pass


@pytest.mark.parametrize(
    ("name", "ints", "floats", "sizes", "message"),
    [
        ("binary", [4, 1, 9, 1, 1], [], [36, 36, 36], "op"),
        ("binary", [0, 9, *[1] * 27], [], [4, 4, 4], "rank"),
        ("binary", [0, 1, 9, -1, 1], [], [36, 36, 36], "stride"),
        ("binary", [0, 2, 2, 2, 2**62, 2**62, 0, 0], [], [4, 4, 16], "A"),
        ("reduce", [0, 1, 9, 2], [], [36, 36, None], "reduced"),
        ("reduce", [2, 1, 9, 1], [], [36, 36, None], "op"),
        ("copy", [1, 9, 1, 1, 1, 0], [], [36, 36], "src has 36 bytes, needs 40"),
        ("copy", [1, 9, 1, 1, 0, 1], [], [36, 36], "dst has 36 bytes, needs 40"),
        ("copy", [1, 9, 1, 1, -1, 0], [], [36, 36], "src offset"),
        ("copy", [1, 9, 1, 1, 2**63 - 1, 0], [], [36, 36], "src"),
        ("copy", [1, 9, 1, 0, 0, 0], [], [36, 36], "dst stride is 0"),
        ("affine", [3, 9, 11, 0], [0, 0], [108, 36, 36, 108, None], "activation"),
        ("affine", [3, 9, 8, 1], [0, 0], [108, 36, 36, 108, 6], "bits"),
        ("affine", [3, 9, 1, 2], [0, 0], [108, 36, 36, 108, 15], "q4"),
        ("channel_sum", [3, 9, 2], [], [108, 36, None], "accumulate"),
        ("channel_sum", [3, 9, 1, 1], [], [108, 36, None], "ints"),
        ("activation_grad", [3, 9, 1, 0, 0], [0, 0], [108, 6, 108, None, None], "nothing was kept"),
        ("activation_grad", [3, 9, 1, 1, 3], [0, 0], [108, 6, 108, 36, None], "sum"),
        ("activation_grad", [3, 9, 1, 1, 0], [0, 0], [108, 6, 108, 36, None], "sums is present"),
        ("activation_grad", [3, 9, 1, 1, 1], [0, 0], [108, 6, 108, None, None], "sums is absent"),
        ("max_pool", [1, 17, 17, 1, 1, 1, 17, 17, 1, 1, 0, 0, 1, 1], [], [1156, 4, 1], "256"),
        ("max_pool", [*MAX[:10], -1, 0, 1, 1], [], [1440, 360, 90], "pt"),
        ("max_pool", [*MAX[:12], 0, 1], [], [1440, 360, 90], "dh"),
        ("average_pool", [*AVERAGE[:14], 2], [], [1440, 360], "include_pad"),
        ("dropout", [9, 2, -1], [0.5], [72, 72], "stream"),
        ("dropout", [9, 2, 1], [1.5], [72, 72], "ratio"),
        ("dropout", [9, 2, 1], [float("nan")], [72, 72], "ratio"),
        ("cross_entropy", [2, 3, 5, -100], [1.1], [120, 24, 120], "label_smoothing"),
        ("sgd", [9, 2], [0.9, 0], [36, 36, 36, None], "nesterov"),
        ("sgd", [9, 1], [0.9, 0], [36, 36, None, None], "momentum"),
        ("sgd", [9, 0], [-0.1, 0], [36, 36, 36, None], "momentum"),
        ("adamw", [9], [1.0, 0.9, 1e-8, 0], [36] * 5, "beta"),
        ("adamw", [9], [0.9, 0.9, -1.0, 0], [36] * 5, "epsilon"),
    ],
)
def test_the_message_names_what_is_wrong(
    name: str, ints: list[int], floats: list[float], sizes: list[int | None], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        kernel_run(name, ints, floats, buffers(sizes))


@pytest.mark.parametrize("ints", [[], [1], [-1, 5], [0, -1], [5, -5], [0, 9], [1 << 62, 1 << 62], [2, 3, 4, 5, 6, 7]])
def test_scratch_of_nonsense_is_an_error(ints: list[int]) -> None:
    for name in ("channel_sum", "reduce", "activation_grad", "conv_grad_input"):
        with pytest.raises(UsageError):
            kernel_scratch(name, ints)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_passes_the_kernel_tests(isa: str) -> None:
    """The rest of this directory."""
    names = [
        "norm",
        "layer_norm",
        "attention",
        "embedding",
        "matmul",
        "activation",
        "pool",
        "softmax",
        "dropout",
        "loss",
        "optimizer",
        "arithmetic",
    ]
    check_under(isa, names)
