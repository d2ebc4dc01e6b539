"""A plan is untrusted: whatever is wrong with it is one PlanError, before any memory is allocated for it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_razor.errors import EdgeRazorError, PlanError
from edge_razor.runtime import Session

from .frozen_plans import rows_plan
from .plan_writer import ABSENT, attention_gradient, encode, linear_plan, seal

Plan = dict[str, Any]


def refuse(data: bytes, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Session(data)


def put(*path: Any, value: Any) -> Callable[[Plan], None]:
    """A change of one field: put("params", 0, "offset", value=64)."""

    def change(plan: Plan) -> None:
        at: Any = plan
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


WRONG: list[tuple[str, Callable[[Plan], None]]] = [
    ("reserved", put("reserved", value=1)),
    ("batch size 0", put("batch_size", value=0)),
    ("batch size", put("batch_size", value=2**32 - 1)),
    ("micro-batch 0", put("micro_batch", value=0)),
    ("micro-batch 5", put("micro_batch", value=5)),
    ("0 threads", put("threads", value=0)),
    ("65 threads", put("threads", value=65)),
    ("arena region", put("arena_bytes", value=2**63)),
    ("inside its region", put("arena_bytes", value=0)),
    ("inside its region", put("params_bytes", value=64)),
    ("inside its region", put("state_bytes", value=64)),
    ("invalid name", put("params", 0, "name", value="")),
    ("invalid name", put("params", 0, "name", value=b"\xff\xfe")),
    ("invalid name", put("params", 0, "name", value="a\0b")),
    ("two parameters 'fc.bias'", put("params", 0, "name", value="fc.bias")),
    ("trainable is 2", put("params", 0, "trainable", value=2)),
    ("impossible shape", put("params", 0, "shape", value=[5, 0])),
    ("impossible shape", put("params", 0, "shape", value=[2**33, 2**33])),
    ("9 dimensions", put("params", 0, "shape", value=[1] * 9)),
    ("permutation", put("params", 0, "perm", value=[0, 0])),
    ("permutation", put("params", 0, "perm", value=[0, 2])),
    ("permutation", put("params", 0, "perm", value=[0, 200])),
    ("permutation", put("params", 0, "perm", value=[0])),
    ("permutation", put("params", 1, "perm", value=[])),
    ("inside its region", put("params", 0, "offset", value=4)),
    ("inside its region", put("params", 0, "offset", value=2**64 - 64)),
    ("parameters of the plan overlap", put("params", 1, "offset", value=64)),
    ("inside its region", put("params", 0, "states", value=[192])),
    ("state tensors of the plan overlap", put("params", 1, "states", value=[0])),
    ("no target", put("inputs", value=[])),
    ("not a target", put("inputs", 1, "name", value="label")),
    ("not a target", put("inputs", 1, "eval", value=0)),
    ("dtype 2", put("inputs", 0, "dtype", value=2)),
    ("first dimension is not the micro-batch", put("inputs", 0, "shape", value=[1, 3, 1, 4])),
    ("first dimension is not the micro-batch", put("inputs", 0, "perm", value=[1, 0, 2, 3])),
    ("first dimension is not the micro-batch", lambda p: p["inputs"][1].update(shape=[], perm=[])),
    ("normalization for 2 and 3", put("inputs", 0, "mul", value=[1.0, 1.0])),
    ("non-finite normalization", put("inputs", 0, "add", value=[1.0, float("nan"), 0.0])),
    ("normalization", lambda p: p["inputs"][1].update(mul=[1.0], add=[1.0])),
    ("inside its region", put("inputs", 0, "train", value=ABSENT)),
    ("inputs of the plan overlap", put("inputs", 1, "train", value=0)),
    ("no place in the evaluation part", put("inputs", 0, "eval", value=ABSENT)),
    ("first dimension is not the micro-batch", put("outputs", 0, "shape", value=[3, 5])),
    ("inside its region", put("outputs", 0, "eval", value=2**40)),
    ("permutation", put("outputs", 0, "perm", value=[1, 1])),
    ("kernel 'nope'", put("train", 0, "kernel", value="nope")),
    ("kernel 'conv", put("train", 0, "kernel", value="conv\0x")),
    ("invalid label", put("train", 0, "label", value=b"\xc0\x80")),
    ("region 5", put("train", 0, "operands", 0, value=(5, 0, 64))),
    ("inside its region", put("train", 0, "operands", 0, value=(0, 0, 48))),
    ("inside its region", put("train", 0, "operands", 0, value=(1, 32, 48))),
    ("inside its region", put("train", 0, "operands", 0, value=(1, 2**64 - 64, 128))),
    ("inside its region", put("train", 0, "operands", 0, value=(1, 0, 2**64 - 1))),
    (r"step 'fc' \(conv\)", put("train", 0, "operands", 0, value=(1, 0, 44))),
    (r"step 'fc' \(conv\)", put("train", 0, "operands", 1, value=(0, 0, 0))),
    (r"step 'fc' \(conv\)", put("train", 0, "operands", value=[])),
    (r"step 'fc' \(conv\)", put("train", 0, "ints", value=[])),
    (r"step 'fc' \(conv\)", put("train", 0, "ints", 3, value=2**62)),
    (r"step 'fc' \(conv\)", put("train", 0, "ints", 3, value=-1)),
    (r"step 'fc' \(conv\)", put("train", 0, "floats", value=[])),
    (r"step 'fc' \(mse\)", put("train", 1, "ints", value=[2])),
    (r"step 'fc' \(sgd\)", put("train", 4, "ints", 0, value=31)),
    ("no loss", lambda p: p["train"].pop(1)),
    ("evaluation part of the plan has a loss", lambda p: p["eval"].append(p["train"][1])),
    ("does not fit its target", put("inputs", 1, "dtype", value=1)),
]


@pytest.mark.parametrize(("message", "change"), WRONG, ids=[f"{i}-{m}" for i, (m, _) in enumerate(WRONG)])
def test_a_wrong_field_is_refused(message: str, change: Callable[[Plan], None]) -> None:
    plan = linear_plan()
    change(plan)
    refuse(encode(plan), message)


def test_a_scratch_operand_that_is_too_small_is_refused() -> None:
    plan = linear_plan(threads=2, pixels=(8, 8), outputs=64)
    with_scratch = [s for s in plan["train"] if s["kernel"] in ("conv", "conv_grad_weight", "channel_sum")]
    step = max(with_scratch, key=lambda s: s["operands"][-1][2])
    region, offset, size = step["operands"][-1]
    assert size > 0, "no kernel of this plan has scratch: choose another shape"
    step["operands"][-1] = (region, offset, size - 1)
    refuse(encode(plan), f"scratch has {size - 1} bytes, {size} are needed with 2 threads")


@pytest.mark.parametrize("operand", [0, 4])
def test_scratch_that_overlaps_another_operand_is_refused(operand: int) -> None:
    plan = linear_plan(threads=2, pixels=(8, 8), outputs=64)
    operands = plan["train"][0]["operands"]
    size = operands[-1][2]
    plan["arena_bytes"] += size
    operands[-1] = (1, operands[operand][1], size)
    refuse(encode(plan), "scratch overlaps operand")


@pytest.mark.parametrize(
    ("kernel", "indices", "written"),
    [("embedding", 0, 2), ("embedding_grad_rows", 0, 2), ("sgd_rows", 1, 0), ("conv_grad_weight", 0, 2)],
)
def test_a_step_cannot_overwrite_its_own_indices(kernel: str, indices: int, written: int) -> None:
    plan = rows_plan()
    (step,) = [s for s in plan["train"] if s["kernel"] == kernel]
    region, offset, size = step["operands"][indices]
    plan["arena_bytes"] = plan["params_bytes"] = plan["arena_bytes"] + plan["params_bytes"] + 4096
    step["operands"][written] = (region, offset + size // 4 // 64 * 64, step["operands"][written][2])
    refuse(encode(plan), f"operand {written} would overwrite the indices in operand {indices}")


def test_an_addend_lies_apart_from_the_result_or_is_it() -> None:
    """Anything between would be overwritten before it is read, by another thread at that."""
    plan = linear_plan(threads=2, outputs=33)
    y, size = plan["train"][0]["operands"][4][1:]
    plan["arena_bytes"] += 1024
    for step in (plan["train"][0], plan["eval"][0]):
        *operands, scratch = step["operands"]
        assert scratch[0] == 0 or scratch[1] >= y + size, "scratch is in the way: choose another shape"
        for offset in (y, y - 320, y + 320):
            step["operands"] = [*operands, (1, offset, size), scratch]
            Session(encode(plan)).close()
        for offset in (y - 64, y + 64, y + 256):  # of 264 bytes
            step["operands"] = [*operands, (1, offset, size), scratch]
            refuse(encode(plan), "a part of the addend is overwritten before it is read")
        for wrong in (size - 4, size + 4):
            step["operands"] = [*operands, (1, y, wrong), scratch]
            refuse(encode(plan), f"the addend has {wrong} bytes, needs {size}")
        step["operands"] = [*operands, scratch]


TOGETHER, APART = [[0, 312]] * 3, [[0, 96], [128, 96], [256, 96]]


def test_gradients_that_are_columns_of_one_matrix_must_not_overlap() -> None:
    read = [4, 0] * 3
    for places, columns in (
        (APART, []),
        (APART, [*read, *read]),
        (TOGETHER, [*read, 13, 0, 13, 4, 13, 9]),
        (TOGETHER, [*read, 12, 8, 12, 0, 12, 4]),
    ):
        Session(encode(attention_gradient(places, columns))).close()
    for places, columns in (
        ([[0, 96]] * 3, []),
        ([[0, 96], [64, 96], [256, 96]], []),
        (TOGETHER, [*read, 12, 0, 12, 3, 12, 8]),
        (TOGETHER, [*read, 12, 0, 12, 8, 12, 8]),
        (TOGETHER, [*read, 12, 0, 13, 4, 12, 8]),  # other rows
        ([[0, 384], [64, 384], [128, 384]], [*read, 12, 0, 12, 4, 12, 8]),  # rows that begin elsewhere
        ([[0, 384], [0, 320], [0, 384]], [*read, 12, 0, 12, 4, 12, 8]),
    ):
        refuse(encode(attention_gradient(places, columns)), "its gradients overlap")


def test_header() -> None:
    good = encode(linear_plan())
    refuse(b"", "not a plan file")
    refuse(good[:23], "not a plan file")
    refuse(b"X" + good[1:], "not a plan file")
    refuse(seal(good[24:], version=1), "format version 1; this runtime reads version 5")
    refuse(good[:-1], "truncated")
    refuse(good + b"\0", "truncated or altered")
    refuse(seal(good[24:] + b"\0"), "1 bytes after its end")


def test_every_flipped_byte_is_noticed() -> None:
    good = encode(linear_plan())
    for i in range(len(good)):
        bad = bytearray(good)
        bad[i] ^= 1 << i % 8
        with pytest.raises(PlanError):
            Session(bytes(bad))


def test_every_truncation_behind_a_right_checksum_is_noticed() -> None:
    payload = encode(linear_plan())[24:]
    for n in range(len(payload)):
        with pytest.raises(PlanError):
            Session(seal(payload[:n]))


def test_altered_plans_with_a_right_checksum_are_refused_or_run() -> None:
    """What passes every check must be safe to run, whatever it computes."""
    payload = encode(linear_plan(micro=2, momentum=0.9))[24:]
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    ran = 0
    for _ in range(1500):
        bad = bytearray(payload)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(bad))
            if rng.random() < 0.5:
                bad[at] = rng.choice([0, 1, 2, 3, 64, 127, 128, 255])
            else:
                bad[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2, 64, 2**31, 2**32 - 1]))[: len(bad) - at]
        try:
            session = Session(seal(bytes(bad)))
        except (EdgeRazorError, MemoryError):  # of a plan, or where a region became huge
            continue
        with session:
            if session.info.arena_bytes + session.info.params_bytes + session.info.state_bytes > 2**20:
                continue
            shapes = [(1, *port.shape[1:]) for port in session.inputs]
            inputs = [np.ones(s, p.dtype) for s, p in zip(shapes, session.inputs, strict=True)]
            target = np.zeros((1, *session.target.shape[1:]), session.target.dtype)
            try:
                session.train_step(inputs, target, learning_rate=0.1, update=1)
                session.predict(inputs)
            except EdgeRazorError:
                continue
            ran += 1
    assert ran > 0
