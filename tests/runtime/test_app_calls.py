"""What an app needs beside steps: evaluation, checkpoints that resume to the same bits, use from several threads."""

from __future__ import annotations

import json
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edge_razor.errors import BundleError, NonFiniteError, UsageError
from edge_razor.metrics import correct_count, loss_sum
from edge_razor.runtime import Session

from .plan_writer import encode, linear_plan
from .test_session import batch, make

PLAN = {"momentum": 0.9, "loss": "cross_entropy"}


def labels(samples: int, classes: int = 5) -> np.ndarray:
    return np.arange(samples, dtype=np.int32) % classes


def train(session: Session, first: int, last: int, samples: int = 4) -> None:
    for update in range(first, last + 1):
        x, _ = batch(session, samples, seed=update)
        session.train_step([x], labels(samples), learning_rate=0.1, update=update)


def everything(session: Session) -> dict[str, bytes]:
    out = {name: session.read_parameter(name).tobytes() for name in session.parameters()}
    for name, parameter in session.parameters().items():
        out |= {f"{name}/{slot}": session.read_state(name, slot).tobytes() for slot in range(parameter.states)}
    return out


@pytest.mark.parametrize("samples", [1, 2, 3, 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_evaluate_gives_the_loss_and_accuracy_of_the_definition(samples: int, threads: int) -> None:
    session, _, _ = make(threads=threads, **PLAN)
    x, _ = batch(session, samples)
    y = labels(samples)
    if samples > 1:
        y[1] = -100  # does not count
    (logits,) = session.predict([x])
    total, weight = loss_sum("cross_entropy", logits, y)
    right, _ = correct_count("cross_entropy", logits, y)
    got = session.evaluate([x], y)
    assert got.weight == weight
    assert got.accuracy == right / weight
    np.testing.assert_allclose(got.loss, total / weight, rtol=1e-6)


def test_evaluate_of_mean_squared_error_has_no_accuracy() -> None:
    session, _, _ = make()
    x, y = batch(session, 5)
    total, weight = loss_sum("mse", session.predict([x])[0], y)
    got = session.evaluate([x], y)
    np.testing.assert_allclose(got.loss, total / weight, rtol=1e-6)
    assert np.isnan(got.accuracy) and got.weight == 5


def test_evaluate_changes_nothing_and_refuses_what_a_step_would() -> None:
    session, _, _ = make(**PLAN)
    x, _ = batch(session, 3)
    before = everything(session)
    session.evaluate([x], labels(3))
    assert everything(session) == before
    with pytest.raises(UsageError, match="class 5"):
        session.evaluate([x], np.array([0, 5, 1], np.int32))
    with pytest.raises(UsageError, match="no samples"):
        session.evaluate([x[:0]], labels(0))
    with pytest.raises(UsageError, match="ignored"):
        session.evaluate([x], np.full(3, -100, np.int32))


@pytest.mark.parametrize("settings", [PLAN, {"loss": "cross_entropy", "batch": 4, "micro": 4}])
def test_a_resumed_run_ends_at_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, _, _ = make(**settings)
    train(whole, 1, 9)
    half, _, _ = make(**settings)
    train(half, 1, 5)
    half.save_checkpoint(tmp_path / "c", 5, b"place\0in the data")
    resumed, _, _ = make(seed=99, **settings)
    assert resumed.load_checkpoint(tmp_path / "c") == (5, b"place\0in the data")
    train(resumed, 6, 9)
    assert everything(resumed) == everything(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_is_a_safetensors_file_with_torch_names(tmp_path: Path) -> None:
    session, weight, bias = make(**PLAN)
    train(session, 1, 1)
    session.save_checkpoint(tmp_path / "c", 1)
    tensors = safetensors.numpy.load_file(tmp_path / "c")
    assert set(tensors) == {"fc.weight", "fc.bias", "optimizer/0/fc.weight", "optimizer/0/fc.bias"}
    np.testing.assert_array_equal(tensors["fc.weight"], session.read_parameter("fc.weight"))
    np.testing.assert_array_equal(tensors["optimizer/0/fc.bias"], session.read_state("fc.bias", 0))


def test_every_altered_byte_and_every_cut_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    session, _, _ = make(**PLAN)
    train(session, 1, 2)
    path = tmp_path / "c"
    session.save_checkpoint(path, 2, b"x")
    good = path.read_bytes()
    before = everything(session)
    for at in range(0, len(good), 3):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(BundleError):
            session.load_checkpoint(path)
        path.write_bytes(good[:at])
        with pytest.raises(BundleError):
            session.load_checkpoint(path)
    assert everything(session) == before
    path.write_bytes(good)
    assert session.load_checkpoint(path) == (2, b"x")


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of a checkpoint and gives it the right checksum."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    edit(header)
    header["__metadata__"]["checksum"] = "00000000"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    own = f"{zlib.crc32(head):08x}".encode()
    path.write_bytes(head.replace(b"00000000", own, 1) + data[8 + size :])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda h: h["__metadata__"].update(bundle_id="another"), "another model"),
        (lambda h: h["__metadata__"].update(update=""), "no number"),
        (lambda h: h["__metadata__"].update(update="99999999999999999999"), "no number"),
        (lambda h: h["__metadata__"].update(user="0g"), "malformed"),
        (lambda h: h["__metadata__"].update(user="00" * 65537), "malformed"),
        (lambda h: h["__metadata__"].update(crc32=""), "checksum for each"),
        (lambda h: h["__metadata__"].update(format="edge-razor checkpoint 2"), "newer"),
        (lambda h: h["fc.bias"].update(shape=[1, 5]), "another shape"),
        (lambda h: h["fc.bias"].update(dtype="I32"), "another shape or type"),
        (lambda h: h.update(other=h.pop("fc.bias")), "lacks 'fc.bias'"),
    ],
)
def test_a_header_that_lies_with_the_right_checksum_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], says: str
) -> None:
    session, _, _ = make(**PLAN)
    path = tmp_path / "c"
    session.save_checkpoint(path, 1)
    edited(path, lambda header: None)
    session.load_checkpoint(path)
    edited(path, edit)
    with pytest.raises(BundleError, match=says):
        session.load_checkpoint(path)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    with_momentum, _, _ = make(**PLAN)
    without, _, _ = make(loss="cross_entropy", batch=4, micro=4)
    with_momentum.save_checkpoint(tmp_path / "m", 1)
    without.save_checkpoint(tmp_path / "n", 1)
    with pytest.raises(BundleError, match="other tensors"):
        without.load_checkpoint(tmp_path / "m")
    with pytest.raises(BundleError, match="lacks 'optimizer/0/fc.weight'"):
        with_momentum.load_checkpoint(tmp_path / "n")


def test_the_old_checkpoint_stays_when_saving_fails(tmp_path: Path) -> None:
    session, _, _ = make(**PLAN)
    path = tmp_path / "c"
    session.save_checkpoint(path, 1)
    good = path.read_bytes()
    session.write_parameter("fc.bias", np.full(5, np.nan, np.float32))
    with pytest.raises(NonFiniteError, match="'fc.bias' holds NaN"):
        session.save_checkpoint(path, 2)
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file"):
        session.load_checkpoint(tmp_path / "none")
    with pytest.raises(UsageError, match="at most 65536"):
        session.save_checkpoint(path, 2, bytes(65537))
    session.write_parameter("fc.bias", np.zeros(5, np.float32))
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match="cannot replace"):
        session.save_checkpoint(tmp_path / "d", 2)
    assert not (tmp_path / "d.tmp").exists()


def test_what_a_crash_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    session, _, _ = make(**PLAN)
    (tmp_path / "c.tmp").write_bytes(b"half a checkpoint" * 10000)
    session.save_checkpoint(tmp_path / "c", 3)
    assert session.load_checkpoint(tmp_path / "c") == (3, b"")


def test_threads_that_use_one_session_see_whole_updates_only() -> None:
    session, _, _ = make(threads=2, **PLAN)
    alone, _, _ = make(threads=2, **PLAN)
    x, _ = batch(session, 6, seed=50)
    possible = [alone.predict([x])[0]]
    for update in range(1, 41):
        train(alone, update, update)
        possible.append(alone.predict([x])[0])
    failures: list[str] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            (logits,) = session.predict([x])
            if not any(np.array_equal(logits, p) for p in possible):
                failures.append("a prediction belongs to no update")

    servers = [threading.Thread(target=serve) for _ in range(3)]
    for server in servers:
        server.start()
    train(session, 1, 40)
    done.set()
    for server in servers:
        server.join()
    assert not failures
    np.testing.assert_array_equal(session.predict([x])[0], possible[-1])


def test_a_shared_session_takes_turns_with_its_base() -> None:
    plan = encode(linear_plan(**PLAN))
    base = Session(plan)
    other = Session(plan, base)
    x, _ = batch(base, 4)
    expected = base.predict([x])[0]
    threads = [
        threading.Thread(target=lambda s=s: results.extend(s.predict([x])[0] for _ in range(50))) for s in (base, other)
    ]
    results: list[np.ndarray] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 100 and all(np.array_equal(r, expected) for r in results)
