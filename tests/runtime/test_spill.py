"""The spill file: the same bits as without it, nothing left behind, and clean errors when the disk fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_razor.errors import NonFiniteError, PlanError, UsageError
from edge_razor.runtime import Session, kernel_run

from .plan_writer import encode, linear_plan, spilled

Plan = dict[str, Any]
SHAPE = {"batch": 4, "micro": 2, "pixels": (30, 40), "outputs": 700, "threads": 2}


def batch(seed: int = 0, samples: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, 3, *SHAPE["pixels"])).astype(np.float32)  # type: ignore[misc]
    return x, rng.normal(size=(samples, SHAPE["outputs"])).astype(np.float32)


def start(session: Session) -> Session:
    rng = np.random.default_rng(5)
    for name, parameter in session.parameters().items():
        session.write_parameter(name, rng.normal(size=parameter.shape).astype(np.float32) * 0.01)
    return session


def parameters(session: Session) -> dict[str, np.ndarray]:
    return {name: session.read_parameter(name) for name in session.parameters()}


def step(session: Session, seed: int = 0, update: int = 1) -> float:
    x, target = batch(seed)
    return session.train_step([x], target, learning_rate=0.1, update=update)


def open_spilled(directory: Path) -> Session:
    return start(Session(encode(spilled(linear_plan(**SHAPE))), spill_dir=directory))


def spill_descriptor() -> int:
    """The open spill file of this process."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if "edge-razor-spill" in os.readlink(f"/proc/self/fd/{name}"):
                return int(name)
        except OSError:
            continue
    raise AssertionError("no spill file is open")


def test_spilled_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    with start(Session(encode(linear_plan(**SHAPE)))) as plain, open_spilled(tmp_path) as session:
        for update in range(1, 6):
            assert step(session, update, update) == step(plain, update, update)
        for name, value in parameters(plain).items():
            np.testing.assert_array_equal(session.read_parameter(name), value)
        info = session.spill_info()
    tensors = 4 * 2 * (3 * 30 * 40 + 700)  # a micro-batch's
    assert info.written_bytes == info.read_bytes == 5 * 2 * tensors
    assert tensors <= info.file_bytes <= tensors + 4096
    assert info.waited_seconds >= 0


def test_nothing_is_left_behind_not_even_while_it_is_open(tmp_path: Path) -> None:
    with open_spilled(tmp_path) as session:
        step(session)
        assert os.listdir(tmp_path) == []


def test_a_short_batch_and_evaluation(tmp_path: Path) -> None:
    x, target = batch(1, samples=3)
    with start(Session(encode(linear_plan(**SHAPE)))) as plain, open_spilled(tmp_path) as session:
        losses = [s.train_step([x], target, learning_rate=0.1, update=1) for s in (plain, session)]
        assert losses[0] == losses[1]
        np.testing.assert_array_equal(session.predict([x])[0], plain.predict([x])[0])


def test_a_plan_that_spills_needs_a_directory() -> None:
    with start(Session(encode(spilled(linear_plan(**SHAPE))))) as session:
        with pytest.raises(UsageError, match="give a directory"):
            step(session)
        assert session.spill_info().file_bytes > 0


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot make a spill file in '.*nowhere': No such file.*choose another"):
        open_spilled(tmp_path / "nowhere")


def test_a_plan_that_does_not_spill_makes_no_file(tmp_path: Path) -> None:
    with start(Session(encode(linear_plan(**SHAPE)), spill_dir=tmp_path / "nowhere")) as session:
        step(session)
        assert session.spill_info().file_bytes == 0


def test_a_file_beyond_what_the_disk_has_is_refused_at_once(tmp_path: Path) -> None:
    plan = spilled(linear_plan(**SHAPE))
    for at in plan["train"]:
        if at["kernel"] in ("spill_write", "spill_read") and at["ints"][0] == 1:
            at["ints"][1] = 1 << 45
    with pytest.raises(OSError, match=r"the spill file in '.*' needs 35184372094432 bytes: .*; free space there or"):
        Session(encode(plan), spill_dir=tmp_path)


def test_a_full_disk_changes_no_parameter_and_leaves_the_session_usable(tmp_path: Path) -> None:
    with open_spilled(tmp_path) as session:
        before = parameters(session)
        number = spill_descriptor()
        kept, full = os.dup(number), os.open("/dev/full", os.O_RDWR)
        os.dup2(full, number)
        with pytest.raises(OSError, match=r"cannot write the spill file in '.*': No space left on device; free space"):
            step(session)
        for name, value in before.items():
            np.testing.assert_array_equal(session.read_parameter(name), value)
        os.dup2(kept, number)
        os.close(kept)
        os.close(full)
        loss = step(session)
    with start(Session(encode(linear_plan(**SHAPE)))) as plain:
        assert step(plain) == loss


@pytest.mark.parametrize("early_end", [False, True])
def test_a_read_that_fails_ends_training_for_good(tmp_path: Path, early_end: bool) -> None:
    with open_spilled(tmp_path) as session:
        number = spill_descriptor()
        # Writing works on both; reading is refused by the one, and finds nothing in the other.
        path = "/dev/null" if early_end else str(tmp_path / "write-only")
        other = os.open(path, os.O_RDWR if early_end else os.O_WRONLY | os.O_CREAT)
        os.dup2(other, number)
        os.close(other)
        reason = "it is shorter than what was written" if early_end else "Bad file descriptor"
        with pytest.raises(OSError, match=rf"cannot read the spill file in '.*': {reason}"):
            step(session)
        with pytest.raises(OSError, match="an earlier step ended halfway.*last checkpoint"):
            step(session)
        assert np.isfinite(session.predict([batch()[0]])[0]).all()


def test_a_step_that_stops_early_leaves_no_transfer_under_way(tmp_path: Path) -> None:
    with open_spilled(tmp_path) as session:
        x, target = batch()
        bad = target.copy()
        bad[0, 0] = np.nan
        for _ in range(20):
            with pytest.raises(NonFiniteError):
                session.train_step([x], bad, learning_rate=0.1, update=1)
        loss = session.train_step([x], target, learning_rate=0.1, update=1)
    with start(Session(encode(linear_plan(**SHAPE)))) as plain:
        assert step(plain) == loss


def test_sessions_that_share_memory_share_the_file(tmp_path: Path) -> None:
    data = encode(spilled(linear_plan(**SHAPE)))
    with open_spilled(tmp_path) as session, Session(data, session, spill_dir=tmp_path) as other:
        step(session)
        written = session.spill_info().written_bytes
        step(other, update=2)
        assert session.spill_info() == other.spill_info()
        assert session.spill_info().written_bytes == 2 * written


def test_a_transfer_runs_only_in_a_session() -> None:
    with pytest.raises(UsageError, match="spill_write runs only as a step of a session"):
        kernel_run("spill_write", [0, 0], [], [np.zeros(64, np.uint8)], 1)


# Indices of the steps: 1 write 0, 3 write 1, 4 wait 0, 5 wait 1, 6 read 1, 7 read 0, 8 wait 0, 9 wait 1.
def ints(index: int, *values: int) -> Callable[[Plan], None]:
    return lambda plan: plan["train"][index].update(ints=list(values))


def operand(index: int, region: int, offset: int, size: int) -> Callable[[Plan], None]:
    return lambda plan: plan["train"][index].update(operands=[(region, offset, size)])


def without(index: int) -> Callable[[Plan], None]:
    return lambda plan: plan["train"].pop(index)


WRONG: list[tuple[str, Callable[[Plan], None]]] = [
    ("slot must be 0 to", ints(1, -1, 0)),
    ("slot must be 0 to", ints(1, 1 << 40, 0)),
    ("has slot 2, the plan writes 2", ints(4, 2)),
    ("offset must be a multiple of 4096", ints(1, 0, 64)),
    ("offset must be 0 to", ints(1, 0, -4096)),
    ("beyond reason", ints(1, 0, 1 << 62)),
    ("reads slot 0 otherwise than it was written", ints(7, 0, 4096)),
    ("overlap in the spill file", lambda p: [ints(i, 1, 0)(p) for i in (3, 6)][0]),
    ("writes slot 0 again", ints(3, 0, 1 << 20)),
    ("expected 2 ints, got 1", ints(1, 0)),
    ("expected 1 ints, got 2", ints(4, 0, 0)),
    ("expected 1 operands", lambda p: p["train"][1].update(operands=p["train"][1]["operands"] * 2)),
    ("expected 0 floats", lambda p: p["train"][1].update(floats=[1.0])),
    ("X is absent", operand(1, 0, 0, 0)),
    ("is not about the arena", operand(1, 2, 0, 64)),
    ("inside its region", operand(7, 1, 1 << 40, 64)),
    ("waits for a transfer of slot 0 that is not under way", operand(4, 1, 0, 64)),
    ("touches memory that is being spilled", ints(4, 1)),
    ("reads slot 1, which is not written", without(5)),
    ("has slot 1, the plan writes 1", without(1)),
    ("waits for a transfer of slot 0", without(7)),
    ("slot 0 of the spill file is not written and read back", lambda p: [without(7)(p) for _ in range(2)][0]),
    ("touches memory that is being spilled", lambda p: p["train"].insert(2, p["train"][0])),
    ("touches memory that is being spilled", lambda p: p["train"].insert(10, p["train"].pop(8))),
    ("the evaluation part of the plan spills", lambda p: p["eval"].append(p["train"][1])),
]


@pytest.mark.parametrize(("message", "change"), WRONG, ids=[f"{i}-{m}" for i, (m, _) in enumerate(WRONG)])
def test_wrong_spill_steps_are_refused(message: str, change: Callable[[Plan], None]) -> None:
    plan = spilled(linear_plan(**SHAPE))
    change(plan)
    with pytest.raises(PlanError, match=message):
        Session(encode(plan))
