"""Dropout masks come from Philox 4x32-10, counted by update, sample and element."""

from __future__ import annotations

import numpy as np
import pytest

from edge_razor.runtime import kernel_run
from tests.kernels.harness import Out, normal, run
from tests.reference.dropout import mask, philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_reference_gives_the_known_answers_of_random123(counter: tuple, key: tuple, words: tuple) -> None:
    assert tuple(philox(np.array([counter]), key)[0]) == words


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("samples", "elements"), [(1, 1), (1, 3), (3, 63), (2, 64), (2, 65), (5, 1000), (1, 20_001)])
def test_mask_is_the_documented_one(samples: int, elements: int, ratio: float) -> None:
    x = normal(1, samples, elements)
    seed, update, stream, first = 0x1234_5678_9ABC_DEF0, (7 << 32) + 11, 3, 40
    (y,), _ = run(
        "dropout", [elements, samples, stream], [ratio], [x, Out(x.shape)], seed=seed, update=update, first_sample=first
    )
    ratio32 = float(np.float32(ratio))
    kept = mask(seed, stream, update, range(first, first + samples), elements, ratio32)
    scale = np.float32(1 / (1 - ratio32)) if ratio < 1 else np.float32(0)
    np.testing.assert_array_equal(y, np.where(kept, x * scale, 0))


def test_mask_does_not_depend_on_the_micro_batch() -> None:
    x = normal(0, 6, 50)
    whole, halves = np.empty_like(x), np.empty_like(x)
    kernel_run("dropout", [50, 6, 1], [0.3], [x, whole], seed=5, update=2)
    for first in (0, 3):
        kernel_run(
            "dropout",
            [50, 3, 1],
            [0.3],
            [x[first : first + 3], halves[first : first + 3]],
            seed=5,
            update=2,
            first_sample=first,
        )
    np.testing.assert_array_equal(whole, halves)


def test_mask_changes_with_seed_stream_update_and_sample() -> None:
    x = np.ones((1, 4096), np.float32)
    masks = []
    for stream, context in [
        (0, {"seed": 1, "update": 1}),
        (0, {"seed": 2, "update": 1}),
        (1, {"seed": 1, "update": 1}),
        (0, {"seed": 1, "update": 2}),
        (0, {"seed": 1, "update": 1, "first_sample": 1}),
    ]:
        y = np.empty_like(x)
        kernel_run("dropout", [4096, 1, stream], [0.5], [x, y], **context)
        masks.append(y > 0)
    for i in range(5):
        assert abs(masks[i].mean() - 0.5) < 0.04
        for j in range(i):
            assert abs((masks[i] == masks[j]).mean() - 0.5) < 0.04  # five standard deviations


def test_in_place() -> None:
    x = normal(0, 3, 777)
    (y,), _ = run("dropout", [777, 3, 1], [0.5], [x, Out(x.shape)])
    kernel_run("dropout", [777, 3, 1], [0.5], [x, x], threads=2)
    np.testing.assert_array_equal(x, y)
