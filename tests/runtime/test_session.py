"""Sessions: what goes in and comes out, in which layout, and what a step does, against numpy in float64."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edge_razor.errors import BundleError, NonFiniteError, UsageError
from edge_razor.runtime import Session

from .plan_writer import encode, linear_plan


def make(seed: int = 0, **settings: Any) -> tuple[Session, np.ndarray, np.ndarray]:
    """A session of `linear_plan`, and its weights [outputs, features], [outputs] in float64."""
    session = Session(encode(linear_plan(**settings)))
    rng = np.random.default_rng(seed)
    for parameter in session.parameters().values():
        session.write_parameter(parameter.name, rng.normal(size=parameter.shape).astype(np.float32))
    return session, session.read_parameter("fc.weight").astype(float), session.read_parameter("fc.bias").astype(float)


def flat(x: np.ndarray) -> np.ndarray:
    """NCHW → [N, features] in the runtime's order."""
    return x.transpose(0, 2, 3, 1).reshape(len(x), -1).astype(float)


def batch(session: Session, samples: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, *session.inputs[0].shape[1:])).astype(np.float32)
    return x, rng.normal(size=(samples, *session.target.shape[1:])).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("pixels", [(1, 1), (3, 5)])
def test_predict_takes_any_number_of_samples(threads: int, samples: int, pixels: tuple[int, int]) -> None:
    session, w, b = make(threads=threads, pixels=pixels)
    x, _ = batch(session, samples)
    (logits,) = session.predict([x])
    np.testing.assert_allclose(logits, flat(x) @ w.T + b, rtol=1e-5, atol=1e-5)


def test_predict_of_no_samples_is_empty() -> None:
    session, _, _ = make()
    (logits,) = session.predict([np.empty((0, 3, 1, 2), np.float32)])
    assert logits.shape == (0, 5)


def test_channels_last_and_uint8_inputs_mean_the_same_as_nchw_float() -> None:
    session, w, b = make(pixels=(4, 3))
    x = np.random.default_rng(3).integers(0, 256, (3, 3, 4, 3), dtype=np.uint8)
    mul, add = np.array([0.5, 1.5, 2.5])[:, None, None], np.array([-1.0, -2.0, -3.0])[:, None, None]
    expected = flat(x * mul + add) @ w.T + b
    nhwc = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    scale = np.abs(expected).max()
    for value, last in ((x, False), (nhwc, True), ((x * mul + add).astype(np.float32), False)):
        (logits,) = session.predict([value], channels_last=last)
        np.testing.assert_allclose(logits, expected, atol=1e-6 * scale)


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_step_equals_the_full_batch_update(samples: int, micro: int, momentum: float) -> None:
    """Whatever the micro-batch, and for a short last batch: its empty micro-batches must not swallow the update."""
    session, w, b = make(micro=micro, momentum=momentum, threads=2)
    velocity_w, velocity_b = np.zeros_like(w), np.zeros_like(b)
    for update in range(1, 4):
        x, y = batch(session, samples, seed=update)
        error = flat(x) @ w.T + b - y
        loss = session.train_step([x], y, learning_rate=0.1, update=update)
        assert loss == pytest.approx((error**2).mean(), rel=1e-5)
        gradient = 2 * error / error.size
        velocity_w = momentum * velocity_w + gradient.T @ flat(x)
        velocity_b = momentum * velocity_b + gradient.sum(0)
        w, b = w - 0.1 * velocity_w, b - 0.1 * velocity_b
        np.testing.assert_allclose(session.read_parameter("fc.weight"), w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(session.read_parameter("fc.bias"), b, rtol=1e-5, atol=1e-6)
    if momentum:
        np.testing.assert_allclose(session.read_state("fc.weight", 0), velocity_w, rtol=1e-5, atol=1e-6)


def test_same_threads_give_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        session, _, _ = make(threads=3, pixels=(5, 7), momentum=0.9)
        for update in range(1, 6):
            x, y = batch(session, 4, seed=update)
            session.train_step([x], y, learning_rate=0.01, update=update)
        runs.append(session.read_parameter("fc.weight").tobytes())
    assert runs[0] == runs[1]


def test_parameters_and_state_round_trip_in_torch_layout() -> None:
    session, w, _ = make(momentum=0.9, pixels=(3, 3))
    parameters = session.parameters()
    assert list(parameters) == ["fc.weight", "fc.bias"]
    assert parameters["fc.weight"].shape == (5, 27) and parameters["fc.weight"].states == 1
    value = np.arange(5 * 27, dtype=np.float32).reshape(5, 27)
    session.write_state("fc.weight", 0, value)
    np.testing.assert_array_equal(session.read_state("fc.weight", 0), value)
    np.testing.assert_array_equal(session.read_parameter("fc.weight"), w.astype(np.float32))
    session.write_parameter("fc.weight", np.asfortranarray(value))
    np.testing.assert_array_equal(session.read_parameter("fc.weight"), value)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_parts_of_any_size_are_the_whole_tensor_in_torch_order(size: int) -> None:
    session, _, _ = make(momentum=0.9, pixels=(3, 5))  # stored in another order than torch's
    other, _, _ = make(seed=5, momentum=0.9, pixels=(3, 5))
    session.train_step([batch(session, 4)[0]], batch(session, 4)[1], learning_rate=0.1, update=1)
    for name, parameter in session.parameters().items():
        for slot in (None, *range(parameter.states)):
            whole = session.read_parameter(name) if slot is None else session.read_state(name, slot)
            parts = [p.copy() for p in session.read_parts(name, slot, np.empty(size, np.float32))]
            assert all(0 < p.size <= size for p in parts)
            assert np.array_equal(np.concatenate(parts), whole.reshape(-1))
            other.write_parts(name, slot, whole.shape, parts)
            written = other.read_parameter(name) if slot is None else other.read_state(name, slot)
            assert np.array_equal(written, whole)


def test_parts_that_do_not_fit_are_refused() -> None:
    session, _, _ = make(momentum=0.9)
    shape = session.parameters()["fc.bias"].shape
    right = [np.zeros(shape, np.float32)]
    for slot, given_shape, parts, message in (
        (None, (99,), right, "is float32"),
        (1, shape, right, "there is no 1"),
        (None, shape, [right[0].astype(np.float64)], "not float64"),
        (None, shape, [*right, np.zeros(1, np.float32)], "elements, not 1 from"),
        (0, shape, [right[0][1:]], "elements, not"),
    ):
        with pytest.raises(UsageError, match=message):
            session.write_parts("fc.bias", slot, given_shape, parts)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no parameter 'fc.nothing'"):
        list(session.read_parts("fc.nothing", None, np.empty(4, np.float32)))


def test_weights_files_are_safetensors_both_ways(tmp_path: Path) -> None:
    # 70,000 elements: more than one buffer of the streaming copy, which ends in the middle of a row.
    session, w, b = make(channels=100, pixels=(7, 10), outputs=10)
    path = tmp_path / "é weights.safetensors"
    session.save_weights(path)
    saved = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(saved["fc.weight"], w.astype(np.float32))
    np.testing.assert_array_equal(saved["fc.bias"], b.astype(np.float32))
    tensors = {"other": np.ones((3, 1), np.int64), "fc.weight": -saved["fc.weight"], "fc.bias": saved["fc.bias"] + 1}
    safetensors.numpy.save_file(tensors, path, metadata={"format": 'p"t\n\\'})
    session.load_weights(path)
    np.testing.assert_array_equal(session.read_parameter("fc.weight"), -w.astype(np.float32))
    np.testing.assert_array_equal(session.read_parameter("fc.bias"), tensors["fc.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.bias"), "lacks the tensor 'fc.bias'"),
        (lambda t: t.update({"fc.bias": np.ones(6, np.float32)}), r"'fc.bias' has shape \[6\], \[5\] is needed"),
        (lambda t: t.update({"fc.bias": np.ones(5, np.float64)}), "'fc.bias' is F64, F32 is needed"),
    ],
)
def test_unfit_weights_are_refused_and_change_nothing(tmp_path: Path, change: Any, message: str) -> None:
    session, w, b = make()
    tensors = {"fc.weight": np.zeros((5, 6), np.float32), "fc.bias": np.zeros(5, np.float32)}
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "w")
    with pytest.raises(BundleError, match=message):
        session.load_weights(tmp_path / "w")
    np.testing.assert_array_equal(session.read_parameter("fc.weight"), w.astype(np.float32))


def test_damaged_or_missing_weights_files(tmp_path: Path) -> None:
    session, _, _ = make()
    path = tmp_path / "w"
    session.save_weights(path)
    good = path.read_bytes()
    for bad in (b"", good[:7], good[:20], good[:-1], good + b"\0", b"\xff" * 8 + good[8:], b"\0" * len(good)):
        path.write_bytes(bad)
        with pytest.raises(BundleError):
            session.load_weights(path)
    with pytest.raises(OSError, match="No such file"):
        session.load_weights(tmp_path / "missing")
    with pytest.raises(OSError, match="regular file"):
        session.load_weights(tmp_path)
    with pytest.raises(OSError, match="cannot write"):
        session.save_weights(tmp_path / "no" / "such" / "folder")


@pytest.mark.parametrize("sample", [0, 1, 2])
@pytest.mark.parametrize("label", [-1, 5, 2**31 - 1])
def test_label_out_of_range_is_named_and_nothing_runs(sample: int, label: int) -> None:
    session, w, _ = make(loss="cross_entropy")
    x = np.zeros((3, 3, 1, 2), np.float32)
    y = np.zeros(3, np.int32)
    y[sample] = label
    with pytest.raises(UsageError, match=f"sample {sample} is class {label}; the model has classes 0 to 4"):
        session.train_step([x], y, learning_rate=0.1, update=1)
    np.testing.assert_array_equal(session.read_parameter("fc.weight"), w.astype(np.float32))


def test_cross_entropy_step() -> None:
    session, w, b = make(loss="cross_entropy", threads=2)
    x, _ = batch(session, 3)
    y = np.array([0, 4, 2], np.int32)
    logits = flat(x) @ w.T + b
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = session.train_step([x], y, learning_rate=0.5, update=1)
    assert loss == pytest.approx(-np.log(p[np.arange(3), y]).mean(), rel=1e-5)
    gradient = (p - np.eye(5)[y]) / 3
    np.testing.assert_allclose(
        session.read_parameter("fc.weight"), w - 0.5 * gradient.T @ flat(x), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_loss_stops_before_any_update(value: float) -> None:
    session, w, b = make(momentum=0.9, micro=4)
    x, y = batch(session, 4)
    x[2, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match="loss"):
        session.train_step([x], y, learning_rate=0.1, update=1)
    np.testing.assert_array_equal(session.read_parameter("fc.weight"), w.astype(np.float32))
    np.testing.assert_array_equal(session.read_state("fc.weight", 0), 0)


def test_wrong_arrays_are_refused() -> None:
    session, _, _ = make()
    x, y = batch(session, 2)
    step = {"learning_rate": 0.1, "update": 1}
    wrong: list[tuple[Any, Any, str]] = [
        ([x], y[:1], r"'input' has shape \(2, 3, 1, 2\), \(1, 3, 1, 2\) is needed"),
        ([x[:, :2]], y, "'input' has shape"),
        ([x.astype(np.float64)], y, "'input' is float64, float32 or uint8 is needed"),
        ([x], y.astype(np.int32), "'target' is int32, float32 is needed"),
        ([x, x], y, "3 arrays were given, 2 are needed"),
        ([np.asfortranarray(x)], y, "not C-contiguous"),
        ([np.zeros((5, 3, 1, 2), np.float32)], np.zeros((5, 5), np.float32), "5 samples; the plan takes 1 to 4"),
        ([x[:0]], y[:0], "0 samples"),
    ]
    for inputs, target, message in wrong:
        with pytest.raises(UsageError, match=message):
            session.train_step(inputs, target, **step)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="count from 1"):
        session.train_step([x], y, learning_rate=0.1, update=0)
    with pytest.raises(UsageError, match="learning rate"):
        session.train_step([x], y, learning_rate=float("nan"), update=1)
    with pytest.raises(UsageError, match="no parameter 'nope'"):
        session.read_parameter("nope")
    with pytest.raises(UsageError, match="there is no 1"):
        session.read_state("fc.weight", 1)
    with pytest.raises(UsageError, match="is float32"):
        session.write_parameter("fc.bias", np.zeros(6, np.float32))


def test_uint8_needs_a_normalization() -> None:
    plan = linear_plan()
    plan["inputs"][0].update(mul=[], add=[])
    with pytest.raises(UsageError, match="no normalization"):
        Session(encode(plan)).predict([np.zeros((1, 3, 1, 2), np.uint8)])


def test_profile_counts_every_step() -> None:
    session, _, _ = make()
    x, y = batch(session, 3)
    session.train_step([x], y, learning_rate=0.1, update=1)
    session.profile()
    session.train_step([x], y, learning_rate=0.1, update=2)
    session.predict([x])
    session.profile(False)
    session.predict([x])
    entries = session.profile_entries()
    assert [(e.kernel, e.phase, e.calls) for e in entries][:2] == [("conv", "train", 2), ("mse", "train", 2)]
    assert (entries[-1].kernel, entries[-1].phase, entries[-1].calls) == ("conv", "eval", 2)
    assert all(e.seconds > 0 for e in entries)


def test_closed_session_is_an_error_and_not_a_crash() -> None:
    with Session(encode(linear_plan())) as session:
        pass
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.read_parameter("fc.weight")


def test_sessions_work_side_by_side_in_threads() -> None:
    results: dict[int, bytes] = {}

    def work(i: int) -> None:
        session, _, _ = make(threads=2, momentum=0.9)
        for update in range(1, 50):
            x, y = batch(session, 4, seed=update)
            session.train_step([x], y, learning_rate=0.01, update=update)
        results[i] = session.read_parameter("fc.weight").tobytes()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results.values())) == 1


def test_memory_is_resident_once_it_is_touched_and_never_more_than_the_plan_has() -> None:
    session, _, _ = make(pixels=(64, 64))  # arena of several hundred pages
    sizes = session.info.arena_bytes + session.info.params_bytes + session.info.state_bytes
    before = session.resident_bytes()
    x, y = batch(session, session.info.batch_size)
    session.train_step([x], y, learning_rate=0.1, update=1)
    after = session.resident_bytes()
    assert before < after <= sizes
    assert after > 0.9 * sizes
