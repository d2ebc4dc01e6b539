"""Parameters that do not train: read in the weights file, or stored in bf16 or int8; and plans that misuse them."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edge_razor.errors import BundleError, EdgeRazorError, PlanError, UsageError
from edge_razor.planner.program import KERNELS
from edge_razor.runtime import Session
from tests.kernels.test_weight_forms import stored

from .frozen_plans import FEATURES, FORMS, MAPPED, OUTPUTS, SIZES, frozen_plan, rows_plan, table_plan
from .plan_writer import encode, seal


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"other": (3,), "fc.weight": (OUTPUTS, FEATURES), "fc.bias": (OUTPUTS,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def session_on(form: int, path: Path, values: dict[str, np.ndarray]) -> Session:
    safetensors.numpy.save_file(values, path)
    session = Session(encode(frozen_plan(form)))
    session.load_weights(path)
    return session


def inputs(samples: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((samples, 3, 1, 2)).astype(np.float32)


def flat(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1).reshape(len(x), -1).astype(np.float64)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_frozen_weight_is_used_and_stays(form: int, tmp_path: Path) -> None:
    values = weights()
    with session_on(form, tmp_path / "w", values) as session:
        _, expected = stored(values["fc.weight"], form)
        np.testing.assert_array_equal(session.read_parameter("fc.weight"), expected)
        x, target = inputs(4), np.zeros((4, OUTPUTS), np.float32)
        (y,) = session.predict([x])
        np.testing.assert_allclose(y, flat(x) @ expected.T + values["fc.bias"], rtol=1e-5, atol=1e-5)
        session.train_step([x], target, learning_rate=0.5, update=1)
        moved = values["fc.bias"] - 0.5 * (2 * y / y.size).sum(0)
        np.testing.assert_allclose(session.read_parameter("fc.bias"), moved, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(session.read_parameter("fc.weight"), expected)
        session.save_weights(tmp_path / "saved")
        saved = safetensors.numpy.load_file(tmp_path / "saved")
    np.testing.assert_array_equal(saved["fc.weight"], expected)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "w")["fc.weight"], values["fc.weight"])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_frozen_weight_can_be_written(form: int, tmp_path: Path) -> None:
    """In the file nothing changes: the parameter gets memory of its own."""
    values, others = weights(), weights(seed=5)
    with session_on(form, tmp_path / "w", values) as session:
        before = (tmp_path / "w").read_bytes()
        x = inputs(3)
        session.predict([x])
        session.write_parameter("fc.weight", others["fc.weight"])
        _, expected = stored(others["fc.weight"], form)
        (y,) = session.predict([x])
        np.testing.assert_allclose(y, flat(x) @ expected.T + values["fc.bias"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(session.read_parameter("fc.weight"), expected)
    assert (tmp_path / "w").read_bytes() == before


def test_without_weights_nothing_runs() -> None:
    with Session(encode(frozen_plan(1))) as session:
        for run in (
            lambda: session.predict([inputs(2)]),
            lambda: session.train_step([inputs(2)], np.zeros((2, 5), np.float32), learning_rate=0.1, update=1),
            lambda: session.evaluate([inputs(2)], np.zeros((2, 5), np.float32)),
            lambda: session.read_parameter("fc.weight"),
        ):
            with pytest.raises(UsageError, match="weights file"):
                run()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [truncate, touch])
def test_a_file_that_changes_under_the_session_is_an_error(change: Callable[[Path], None], tmp_path: Path) -> None:
    with session_on(1, tmp_path / "w", weights()) as session:
        session.predict([inputs(2)])
        change(tmp_path / "w")
        with pytest.raises(BundleError, match="was changed while a session reads its weights there"):
            session.predict([inputs(2)])
        with pytest.raises(BundleError, match="was changed"):
            session.train_step([inputs(2)], np.zeros((2, 5), np.float32), learning_rate=0.1, update=1)


def test_a_file_that_is_replaced_by_a_rename_goes_on_being_read(tmp_path: Path) -> None:
    with session_on(1, tmp_path / "w", weights()) as session:
        (before,) = session.predict([inputs(2)])
        safetensors.numpy.save_file(weights(seed=9), tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "w")
        np.testing.assert_array_equal(session.predict([inputs(2)])[0], before)


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 4097])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_weights_inside_another_file_at_any_offset(form: int, shift: int, tmp_path: Path) -> None:
    safetensors.numpy.save_file(weights(), tmp_path / "w")
    data = (tmp_path / "w").read_bytes()
    (tmp_path / "archive").write_bytes(b"x" * shift + data + b"behind")
    plan = encode(frozen_plan(form))
    with Session(plan) as session, Session(plan) as other:
        session.load_weights(tmp_path / "archive", shift, len(data))
        other.load_weights(tmp_path / "w")
        np.testing.assert_array_equal(session.predict([inputs(3)])[0], other.predict([inputs(3)])[0])
        with pytest.raises(BundleError, match="truncated"):
            session.load_weights(tmp_path / "archive", shift, len(data) + 7)


@pytest.mark.parametrize("shift", [0, 1, 2, 4])
def test_rows_of_a_table_in_the_file_at_any_offset(shift: int, tmp_path: Path) -> None:
    table, others = (np.random.default_rng(s).standard_normal((9, FEATURES)).astype(np.float32) for s in (1, 2))
    values = weights()
    safetensors.numpy.save_file({**values, "table": table}, tmp_path / "w")
    data = (tmp_path / "w").read_bytes()
    (tmp_path / "archive").write_bytes(b"x" * shift + data)
    ids = np.array([[8], [3]], np.int32)

    def expected(rows: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return rows[ids[:, 0]] @ session.read_parameter("fc.weight").T + bias

    with Session(encode(table_plan())) as session:
        session.load_weights(tmp_path / "archive", shift, len(data))
        (y,) = session.predict([ids])
        np.testing.assert_allclose(y, expected(table, values["fc.bias"]), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(session.read_parameter("table"), table)
        target = np.zeros((2, OUTPUTS), np.float32)
        loss = session.train_step([ids], target, learning_rate=0.1, update=1)
        assert loss == pytest.approx((y**2).mean(), rel=1e-5)
        session.write_parameter("table", others)  # from now on in memory of its own
        (y,) = session.predict([ids])
        np.testing.assert_allclose(y, expected(others, session.read_parameter("fc.bias")), rtol=1e-5, atol=1e-5)
        with pytest.raises(UsageError):
            session.predict([ids + 1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_what_no_step_reads_in_the_file_does_not_become_resident(tmp_path: Path) -> None:
    """Though the system maps what lies around a touched page."""
    path, between = tmp_path / "w", np.zeros(1_000_000, np.float32)
    safetensors.numpy.save_file({**weights(), "a": between, "z": between}, path)
    path.read_bytes()  # into the page cache
    with Session(encode(frozen_plan(1))) as session:
        session.load_weights(path)
        session.predict([inputs(2)])
        assert 0 < mapped_bytes(path) <= 3 << 16


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_no_row_of_a_table_in_the_file_becomes_resident(tmp_path: Path) -> None:
    rows, path = 100_000, tmp_path / "w"  # 2.4 MB
    safetensors.numpy.save_file({**weights(), "table": np.ones((rows, FEATURES), np.float32)}, path)
    with Session(encode(table_plan(rows))) as session:
        session.load_weights(path)
        for first in range(0, rows, 1000):
            session.predict([np.array([[first], [first + 500]], np.int32)])
        assert mapped_bytes(path) == 0
        session.read_parameter("table")  # this one goes through the mapping
        assert mapped_bytes(path) >= rows * FEATURES * 4


def mapped_bytes(path: Path) -> int:
    """Resident bytes of this process's mappings of a file."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.partition(" ")[0].count("-") == 1 and not line.partition(" ")[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_checkpoint_holds_what_trains_and_resumes_to_the_same_bits(form: int, tmp_path: Path) -> None:
    values, x, target = weights(), inputs(4), np.zeros((4, OUTPUTS), np.float32)

    def train(session: Session, *updates: int) -> None:
        for update in updates:
            session.train_step([x], target, learning_rate=0.3, update=update)

    with session_on(form, tmp_path / "w", values) as session:
        train(session, 1, 2)
        session.save_checkpoint(tmp_path / "c", 2, b"here")
        train(session, 3)
        end = session.read_parameter("fc.bias")
    held = safetensors.numpy.load_file(tmp_path / "c")
    assert "fc.bias" in held and not any("fc.weight" in name for name in held)
    with session_on(form, tmp_path / "w2", {**values, "fc.bias": np.ones(OUTPUTS, np.float32)}) as session:
        assert session.load_checkpoint(tmp_path / "c") == (2, b"here")
        train(session, 3)
        np.testing.assert_array_equal(session.read_parameter("fc.bias"), end)
        np.testing.assert_array_equal(session.read_parameter("fc.weight"), stored(values["fc.weight"], form)[1])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_evaluate_uses_the_frozen_weight(form: int, tmp_path: Path) -> None:
    values, x, target = weights(), inputs(5), np.ones((5, OUTPUTS), np.float32)
    with session_on(form, tmp_path / "w", values) as session:
        got = session.evaluate([x], target)
    y = flat(x) @ stored(values["fc.weight"], form)[1].T + values["fc.bias"]
    np.testing.assert_allclose(got.loss, ((y - 1) ** 2).mean(), rtol=1e-5)


def test_weights_may_be_saved_over_the_file_that_is_being_read(tmp_path: Path) -> None:
    with session_on(1, tmp_path / "w", weights()) as session:
        session.train_step([inputs(4)], np.zeros((4, OUTPUTS), np.float32), learning_rate=0.5, update=1)
        (before,) = session.predict([inputs(3)])
        session.save_weights(tmp_path / "w")
        np.testing.assert_array_equal(session.predict([inputs(3)])[0], before)
        session.load_weights(tmp_path / "w")
        np.testing.assert_array_equal(session.predict([inputs(3)])[0], before)


def test_int8_has_no_infinity(tmp_path: Path) -> None:
    values = weights()
    values["fc.weight"][3, 2] = np.inf
    safetensors.numpy.save_file(values, tmp_path / "w")
    with Session(encode(frozen_plan(3))) as session:
        with pytest.raises(BundleError, match=r"'fc.weight' holds NaN or infinite values, which int8 cannot express"):
            session.load_weights(tmp_path / "w")
        with pytest.raises(UsageError, match="no NaN or infinity"):
            session.write_parameter("fc.weight", values["fc.weight"])


WRONG: list[tuple[str, int, Callable[[dict[str, Any]], None]]] = [
    ("cannot be stored in form 1", 1, lambda p: p["params"][0].update(trainable=1)),
    ("cannot be stored in form 4", 1, lambda p: p["params"][0].update(form=4)),
    ("place or a layout of its own", 1, lambda p: p["params"][0].update(offset=64)),
    ("place or a layout of its own", 1, lambda p: p["params"][0].update(perm=[1, 0])),
    ("does not train, but has optimizer state", 1, lambda p: p["params"][0].update(states=[0])),
    ("does not train, but has optimizer state", 3, lambda p: p["params"][0].update(states=[0])),
    ("inside its region", 3, lambda p: p.update(params_bytes=64)),
    ("parameters of the plan overlap", 3, lambda p: p["params"][1].update(offset=64)),
    ("operand 1 is no parameter in the weights file", 1, lambda p: set_operand(p, 1, (4, 1, 120))),
    ("operand 1 is no parameter in the weights file", 1, lambda p: set_operand(p, 1, (4, 2, 120))),
    ("operand 1 is no parameter in the weights file", 1, lambda p: set_operand(p, 1, (4, 2**64 - 1, 120))),
    ("operand 1 is no parameter in the weights file", 1, lambda p: set_operand(p, 1, (4, 0, 124))),
    ("operand 1 is no parameter in the weights file", 1, lambda p: set_operand(p, 1, (4, 0, 2**64 - 4))),
    ("cannot have operand 4 in the weights file", 1, lambda p: set_operand(p, 4, (4, 0, 120))),
    ("W has 120 bytes, needs 94", 1, lambda p: p["train"][0]["ints"].__setitem__(-1, 3)),
    ("W has 94 bytes, needs 120", 3, lambda p: p["train"][0]["ints"].__setitem__(-1, 1)),
    ("the form of W must be 0 to 3", 3, lambda p: p["train"][0]["ints"].__setitem__(-1, 4)),
]


def set_operand(plan: dict[str, Any], index: int, operand: tuple[int, int, int]) -> None:
    plan["train"][0]["operands"][index] = operand


@pytest.mark.parametrize(("message", "form", "change"), WRONG, ids=[f"{i}-{m}" for i, (m, *_) in enumerate(WRONG)])
def test_a_wrong_plan_is_refused(message: str, form: int, change: Callable[[dict[str, Any]], None]) -> None:
    plan = frozen_plan(form)
    with Session(encode(plan)):
        pass
    change(plan)
    with pytest.raises(PlanError, match=message):
        Session(encode(plan))


@pytest.mark.parametrize("kernel", [name for name in KERNELS if not name.startswith("spill")])
def test_no_kernel_gets_a_written_operand_that_cannot_be_written(kernel: str) -> None:
    """And what a kernel only reads may lie in the file: the loader's table says what the planner's does."""
    signature = KERNELS[kernel]
    for index in range(signature.operands + signature.scratch):
        plan = frozen_plan(1)
        operands = [(0, 0, 0)] * (signature.operands + signature.scratch)
        operands[index] = (MAPPED, 0, SIZES[1])
        plan["train"][0] = {"kernel": kernel, "label": "x", "ints": [], "floats": [], "operands": operands}
        with pytest.raises(PlanError) as refused:
            Session(encode(plan))
        reads = index < signature.operands and index not in signature.writes
        assert ("in the weights file, which is never written" in str(refused.value)) != reads, index


def test_scratch_in_the_place_of_a_missing_addend_cannot_lie_in_the_file() -> None:
    plan = frozen_plan(1)
    plan["train"][0] |= {"kernel": "conv", "operands": [(0, 0, 0)] * 6 + [(MAPPED, 0, SIZES[1])]}
    with pytest.raises(PlanError, match="cannot have operand 6 in the weights file, which is never written"):
        Session(encode(plan))


@pytest.mark.parametrize("kind", ["in_file", "int8", "rows", "table"])
def test_altered_plans_with_a_right_checksum_are_refused_or_run(kind: str, tmp_path: Path) -> None:
    """What passes every check must be safe to run, whatever it computes."""
    plans = {"rows": rows_plan, "table": table_plan}
    payload = encode(plans[kind]() if kind in plans else frozen_plan(FORMS[kind], micro=2))[24:]
    safetensors.numpy.save_file({**weights(), "table": np.ones((9, FEATURES), np.float32)}, tmp_path / "w")
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, ran = random.Random(seed), 0
    for attempt in range(300):
        bad = bytearray(payload)
        for _ in range(rng.randint(1, 3) if attempt else 0):
            at = rng.randrange(len(bad))
            value = rng.choice([0, 1, 2, 3, 4, 8, 64, 127, 128, 255, 2**31, 2**32 - 1])
            width = min(rng.choice([1, 4]), len(bad) - at)
            bad[at : at + width] = struct.pack("<I", value)[:width]
        try:
            with Session(seal(bytes(bad))) as session:
                if session.info.arena_bytes + session.info.params_bytes + session.info.state_bytes > 2**20:
                    continue
                session.load_weights(tmp_path / "w")
                shapes = [(1, *port.shape[1:]) for port in session.inputs]
                data = [np.ones(s, p.dtype) for s, p in zip(shapes, session.inputs, strict=True)]
                target = np.zeros((1, *session.target.shape[1:]), session.target.dtype)
                session.train_step(data, target, learning_rate=0.1, update=1)
                session.predict(data)
        except (EdgeRazorError, MemoryError):  # of a plan, or where a region became huge
            continue
        ran += 1
    assert ran > 0
